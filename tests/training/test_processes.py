"One command on several processes: `accelerate launch` trains the model that one process trains."

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
TALE = "Once upon a time there lived a miller who had three sons and a cat. The cat said: give me a pair of boots, and do not fear. " * 40
OTHER = "A king had a garden, and in the garden stood a tree that bore golden apples. Every night one of the apples was gone. " * 20
SMALL = (
    "hidden_size=16 intermediate_size=16 layers=1 heads=2 vocab_size=300 block=16 warmup=2 save_every=50 eval_every=5 learning_rate=0.003"
)

# processors with bfloat16 would train in it, where sums depend on their order
IN_FLOAT32 = (
    'import torch\ntorch.cpu._is_avx512_bf16_supported = lambda: False\nfrom decodelab.cli import app\napp(prog_name="decodelab")\n'
)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books") / "tales"
    folder.mkdir()
    for number, text in ((1, TALE), (7128, OTHER)):
        (folder / f"{number}.txt").write_text(text)
    manifest = [{"gutenberg_id": n, "title": f"Book {n}", "file": f"tales/{n}.txt"} for n in (1, 7128)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.parent


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def trained(books, out, processes, batch_size):
    script = out.parent / "in_float32.py"
    script.write_text(IN_FLOAT32)
    command = [script, "train", "tales-draft", "--data-dir", books, "--out", out, "--steps", 50]
    command += [a for s in [*SMALL.split(), f"batch_size={batch_size}"] for a in ("--set", s)]
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        processes,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
    ]
    launch += ["--dynamo_backend", "no", "--main_process_port", port()] if processes > 1 else []
    start = [*launch, *command] if processes > 1 else command
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, start)], env=env, capture_output=True, text=True, timeout=280, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "training.json").read_text())


def test_two_processes_train_what_one_trains(books, tmp_path):
    alone, together = trained(books, tmp_path / "one", 1, 8), trained(books, tmp_path / "two", 2, 4)
    assert together["tokens_seen"] == alone["tokens_seen"] == 50 * 8 * 16
    gaps = []
    for a, b in zip(alone["curve"], together["curve"]):
        assert a["step"] == b["step"]
        gaps += [abs(a[k] - b[k]) for k in ("loss", "eval_loss") if k in a]
    assert len(gaps) >= 10
    assert max(gaps) < 1e-3
    assert sum(gaps) / len(gaps) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_configurations_for_several_gpus(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"data/accelerate/{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == 4
    assert config.mixed_precision == "bf16"
    assert config.fsdp_config if name == "fsdp" else config.deepspeed_config["zero_stage"] == 2
