"""The command line, the demo page, the exported repositories and the README."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from decodelab.cli import app, full_experiments
from decodelab.core.contract import decoders
from decodelab.core.output import TraceStep
from decodelab.core.zoo import load
from decodelab.demo import masked_decoders, masked_rows
from decodelab.demo_page import DemoRow, MaskedRow, comparison_page, draft_svg, masked_table
from decodelab.diffusion.measure import POLICIES
from decodelab.hub import export_hub
from decodelab.shell import make_decoder, parse_settings

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time there was a king who"


@pytest.fixture(autouse=True)
def _in_peace(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("DECODELAB_PROFILE", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tales():
    return load("tales")


@pytest.fixture(scope="module")
def masked():
    return load("tales-mdm")


def run(*arguments, code=0, stdin=None):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    return result


def refused(*arguments):
    "The error line of a command that must fail with exit code 2, nothing on stdout and one line on stderr."
    result = run(*arguments, code=2)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def process(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", "from decodelab.cli import app; app()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


# the whole


def test_help_does_not_import_torch():
    code = "import sys; from decodelab.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "methods", "generate", "bench", "train", "lab", "experiment", "export"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["demo", "methods", "generate", "bench", "train", "lab", "experiment", "export", "export hub"])
def test_every_command_has_help(command):
    assert "Usage" in run(*command.split(), "--help").stdout


def test_version():
    assert re.fullmatch(r"decodelab \d+\.\d+\.\d+\n", run("--version").stdout)


def test_unknown_command_and_option():
    assert "magic" in run("magic", code=2).stderr
    assert run("methods", "--magic", code=2).stdout == ""


def test_traceback_on_request():
    result = CliRunner().invoke(app, ["--traceback", "methods", "--family", "magic"])
    assert isinstance(result.exception, ValueError)


# settings


def test_parse_settings():
    assert parse_settings(None) == {}
    assert parse_settings(["a=1", "b=0.5", "c=cold", "d=[1, 2]", "e=None", "f = 'x=y'"]) == {
        "a": 1,
        "b": 0.5,
        "c": "cold",
        "d": [1, 2],
        "e": None,
        "f": "x=y",
    }
    for bad in ("k", "=4", "1k=4"):
        with pytest.raises(ValueError, match="write name=value"):
            parse_settings([bad])


def test_settings_are_data_not_code(tmp_path):
    value = f"__import__('os').mkdir('{tmp_path / 'made'}')"
    assert parse_settings([f"k={value}"]) == {"k": value}
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("momemtum", {}, "did you mean 'momentum'"),
        ("xyzzy", {}, "known: .*momentum"),
        ("momentum", {"q": 1}, "has no hyper-parameter 'q'; it has: "),
        ("momentum", {"k": 0}, "k must be at least 1"),
        ("momentum", {"k": "many"}, "cannot be made with these settings"),
    ],
)
def test_make_decoder_refuses(name, settings, message, tales):
    for model in (None, tales[0]):
        with pytest.raises(ValueError, match=message):
            make_decoder(name, settings, model)


# methods


def test_methods():
    known = json.loads(run("methods", "--json").stdout)
    assert {m["name"] for m in known} == set(decoders())
    assert all(m["paper"] and "trace" in m["hyper_parameters"] for m in known)
    family = json.loads(run("methods", "--family", "speculative", "--json").stdout)
    assert {m["family"] for m in family} == {"speculative"}
    assert "momentum" in run("methods").stdout
    assert "unknown family 'magic'" in refused("methods", "--family", "magic")


# generate


def test_generate_json_is_the_decoder(tales):
    model, tokenizer = tales
    out = json.loads(run("generate", PROMPT, "-m", "momentum", "--set", "k=4", "--max-new-tokens", 12, "--json").stdout)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = make_decoder("momentum", {"k": 4}).generate(model, **inputs, max_new_tokens=12, do_sample=False)
    assert out["tokens"] == expected.continuations[0].tolist()
    assert out["text"] == expected.text(tokenizer)[0]
    assert out["stats"]["new_tokens"] == len(out["tokens"])
    assert out["hyper_parameters"] == {"k": 4}
    assert not out["interrupted"]


def test_generate_takes_the_masked_model_for_a_diffusion_method(masked):
    model, tokenizer = masked
    settings = {"block_length": 4, "threshold": 0.5}
    flags = [a for k, v in settings.items() for a in ("--set", f"{k}={v}")]
    out = json.loads(run("generate", PROMPT, "-m", "fast_dllm", *flags, "--max-new-tokens", 8, "--json").stdout)
    expected = make_decoder("fast_dllm", settings).generate(
        model, **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False
    )
    assert out["tokens"] == expected.continuations[0].tolist()
    assert out["stats"]["target_forwards"] == expected.stats.target_forwards


def test_generate_streams_the_same_text():
    command = ["generate", PROMPT, "-m", "token_recycling", "--max-new-tokens", 16]
    streamed, whole = run(*command), run(*command, "--no-stream")
    assert streamed.stdout == whole.stdout
    assert "tokens per forward" in streamed.stderr


def test_generate_samples_with_a_seed():
    command = ["generate", PROMPT, "--temperature", 0.9, "--top-k", 40, "--top-p", 0.9, "--max-new-tokens", 12, "--json", "--seed"]
    first, again, other = (json.loads(run(*command, seed).stdout)["tokens"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_generate_from_standard_input_and_trace(tmp_path):
    out = json.loads(run("generate", "-", "--max-new-tokens", 4, "--json", stdin=PROMPT).stdout)
    assert out["prompt"] == PROMPT
    page = tmp_path / "trace.html"
    run("generate", PROMPT, "--max-new-tokens", 4, "--trace", page)
    assert "decodelab-trace" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--json"], "empty prompt"),
        ([PROMPT, "-m", "magic"], "unknown decoder 'magic'"),
        ([PROMPT, "-m", "momentum", "--set", "k"], "write name=value"),
        ([PROMPT, "-m", "momentum", "--sample"], "deterministic"),
        ([PROMPT, "--model", "./nowhere"], "no model folder"),
        ([PROMPT, "--model", "tales-mdm"], "tales-mdm fills holes: choose a decoder of `decodelab methods --family diffusion`"),
        ([PROMPT, "--model", "tales", "-m", "llada"], "names no mask token"),
        ([PROMPT, "--max-new-tokens", "99999"], "exceed the model's context"),
        ([PROMPT, "--trace", "nowhere/trace.html"], "name a file in a folder that exists"),
    ],
)
def test_generate_refuses(arguments, message):
    assert message in refused("generate", *arguments)


def test_ctrl_c_keeps_the_text():
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  shells have what runs in the background ignore it
    running = process("generate", PROMPT, "--max-new-tokens", 1900, preexec_fn=heard)
    seen = running.stdout.read(20)  # it has begun to write
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert len(seen) == 20
    assert "interrupted" in errors
    assert "Traceback" not in errors


# demo and bench


def check_page(page: str) -> None:
    "A page that loads nothing: addresses occur in links only."
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|srcset|action|data)\s*=\s*["']?(?:https?:)?//|url\(|@import|<link|<iframe""", page)
    without_links = re.sub(r'<a href="https://[^"]*">', "", page)
    assert "://" not in without_links


def test_demo(tmp_path):
    started = time.perf_counter()
    page = tmp_path / "demo.html"
    out = json.loads(run("demo", "--prompts", 1, "--tokens", 12, "--seconds", 1, "--out", page, "--json").stdout)
    rows = {r["name"]: r for r in out["rows"]}
    assert {n for n in rows if "(transformers)" in n} == {
        f"{m} (transformers)" for m in ("greedy", "sampling", "prompt lookup", "assisted")
    }
    fills_holes = {POLICIES[row["name"]][0] for row in out["masked"]}
    assert fills_holes == {n for n, m in decoders().items() if m.family == "diffusion"}
    assert set(decoders()) == ({n for n in rows if "(transformers)" not in n} | fills_holes | set(out["left_out"]))
    assert not fills_holes & set(out["left_out"])
    assert (out["masked"][0]["name"], out["masked"][0]["ratio"], out["masked"][0]["passes"]) == ("one a pass", 1, 24)
    assert all(r["identical"] == 1 for r in rows.values() if r["lossless"])
    assert rows["greedy (transformers)"]["ratio"] == 1
    text = page.read_text(encoding="utf-8")
    check_page(text)
    assert all(name in text for name in [*rows, *(row["name"] for row in out["masked"])])
    assert 'class="tree"' in text
    print(f"demo {time.perf_counter() - started:.1f} s")


def test_demo_table_and_live_text(tmp_path):
    shown = run("demo", "--prompts", 1, "--tokens", 8, "-m", "momentum", "--out", tmp_path / "demo.html").stdout
    assert "momentum" in shown
    assert "live" in shown


def test_demo_refuses(tmp_path):
    assert "name a file in a folder" in refused("demo", "--out", tmp_path)
    assert "unknown decoder 'magic'" in refused("demo", "-m", "magic", "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_demo_without_a_masked_model(tmp_path, monkeypatch):
    import decodelab.cli as cli

    plain = cli.load_for

    def load_for(name, role, *more, **kwargs):
        if role == "diffusion_tasks":
            raise FileNotFoundError("unknown model 'tasks-mdm'")
        return plain(name, role, *more, **kwargs)

    monkeypatch.setattr(cli, "load_for", load_for)
    command = ["demo", "--prompts", 1, "--tokens", 4, "-m", "momentum", "-m", "llada", "--out", tmp_path / "demo.html", "--json"]
    out = json.loads(run(*command).stdout)
    assert out["masked"] == []
    assert out["left_out"] == {"llada": "needs a masked model: unknown model 'tasks-mdm'"}
    assert "fill the holes" not in (tmp_path / "demo.html").read_text(encoding="utf-8")


def test_demo_ctrl_c_among_the_masked_decoders_keeps_the_rest(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("decodelab.demo.masked_rows", stop)
    command = ["demo", "--prompts", 1, "--tokens", 4, "-m", "momentum", "-m", "llada", "--out", tmp_path / "demo.html", "--json"]
    out = json.loads(run(*command, code=130).stdout)
    assert out["masked"] == []
    assert "momentum" in (tmp_path / "demo.html").read_text(encoding="utf-8")


def test_masked_decoders_name_what_is_wrong(masked):
    ready, left_out = masked_decoders(masked[0], ["fast_dllm"])
    assert list(ready) == ["one a pass", "threshold 0.9", "factor 1"]
    assert left_out == {}
    assert masked_decoders(masked[0], ["momentum"]) == ({}, {})


def test_masked_rows_count_answers_and_respect_the_time(monkeypatch):
    asked = []

    def frontier(model, tokenizer, methods, examples, **settings):
        asked.append((list(methods), [e.task for e in examples]))
        time.sleep(0.05)
        # method, example, score, passes, tokens, seconds
        known = {"one a pass": [(1, 24, 12, 4.0), (1, 24, 12, 4.0)], "quick": [(1, 2, 12, 0.5), (0, 4, 6, 1.5)]}
        keys = ("score", "passes", "tokens", "seconds")
        lines = [
            {"method": m, "example": i, "batch": 0, "text": f" {m} {i}", **dict(zip(keys, known[m][i]))}
            for m in methods
            for i in range(len(examples))
        ]
        return pd.DataFrame(lines)

    monkeypatch.setattr("decodelab.diffusion.measure.frontier", frontier)
    question, rows = masked_rows({"one a pass": None, "quick": None}, None, None, seconds=0)
    assert asked == [(["one a pass"], ["list_shuffle"]), (["one a pass", "quick"], ["list_shuffle"] * 2)]  # a warm-up, then one task
    assert question.startswith("Write the list in any order.")
    assert rows == [MaskedRow("one a pass", 2, 2, 24, 0.5, 1, "one a pass 0"), MaskedRow("quick", 1, 2, 3, 3, 4, "quick 0")]
    assert len(masked_rows({"one a pass": None, "quick": None}, None, None)[1]) == 2
    assert [tasks[0] for _, tasks in asked[2:]] == ["list_shuffle", "list_shuffle", "list_sort", "list_copy"]


def test_masked_table_is_escaped_and_part_of_the_page(tales):
    rows = [MaskedRow("one <b>", 1, 2, 8, 2.5, 1.0, "a & b"), MaskedRow("two", 2, 2, 4, 5, 2.0, "c")]
    table = masked_table("List: <i>", rows)
    assert "<b>" not in table
    assert "<i>" not in table
    assert "a &amp; b" in table
    assert "--share:50%" in table
    assert re.findall(r">(\d of \d)<", table) == ["1 of 2", "2 of 2"]
    conditions = {"machine": {"cpu": "c"}, "versions": {}, "date": "today"}
    page = comparison_page("p", [DemoRow("m", 1, 1, 1, 1, 1, None)], {}, tales[1], conditions, masked=("List: <i>", rows))
    check_page(page)
    assert table in page


def test_page_check_can_fail():
    for bad in ('<img src="https://x.org/a.png">', "<style>a{background:url(x)}</style>", "<script>1</script>", "see https://x.org"):
        with pytest.raises(AssertionError):
            check_page("default-src 'none'" + bad)


def test_text_of_a_page_is_escaped(tales):
    step = TraceStep(0, [5], ["accepted"], info={"tokens": [5, 6, 7, 8], "parents": [0, 0, 0, 1], "path": [0, 1, 3]})
    step.info["tokens"] = tales[1]("a <b> & c").input_ids[:4]
    svg = draft_svg(step, tales[1])
    assert svg.count('<g class="hit">') == 3
    assert svg.count('<g class="miss">') == 1
    assert "<b>" not in svg


def test_bench(tmp_path):
    command = ["bench", "--prompts", 2, "--tokens", 8, "--repeats", 1, "-m", "token_recycling", "--out", tmp_path / "b"]
    out = json.loads(run(*command, "--json").stdout)
    assert "token_recycling" in out["table"]
    stored = json.loads((tmp_path / "b/bench.json").read_text())
    assert stored["baseline"] == "greedy (transformers)"
    assert {"commit", "machine", "model", "profile", "seed", "interrupted"} <= set(stored["provenance"])
    assert len(stored["rows"]) == 2 * 5
    assert (tmp_path / "b/bench.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("bench", "--out", tmp_path / "file")


def test_bench_without_a_place(monkeypatch):
    monkeypatch.setenv("DECODELAB_RESULTS", "off")
    result = run("bench", "--prompts", 1, "--tokens", 4, "--repeats", 1, "-m", "momentum")
    assert "not written" in result.stderr
    assert "momentum" in result.stdout


def test_bench_ctrl_c_keeps_finished_prompts(tmp_path, monkeypatch):
    import decodelab.demo as demo

    plain, calls = demo.compare, []

    def compare(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **kwargs)

    monkeypatch.setattr(demo, "compare", compare)
    result = run("bench", "--prompts", 3, "--tokens", 4, "--repeats", 1, "-m", "momentum", "--out", tmp_path, code=130)
    assert "interrupted" in result.stderr
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["provenance"]["interrupted"]
    assert {r["prompt"] for r in stored["rows"]} == {0}


# train


def books(folder: Path) -> None:
    texts = {1: "Once upon a time there was a king who had a golden apple tree. " * 40, 7128: "There was an old woman and a fox. " * 20}
    (folder / "tales").mkdir(parents=True)
    for number, text in texts.items():
        (folder / f"tales/{number}.txt").write_text(text)
    manifest = [{"gutenberg_id": n, "title": f"Book {n}", "file": f"tales/{n}.txt"} for n in texts]
    (folder / "tales/manifest.json").write_text(json.dumps(manifest))


def test_train_and_resume(tmp_path):
    pytest.importorskip("accelerate")
    books(tmp_path / "books")
    small = "hidden_size=32 intermediate_size=48 layers=1 heads=2 vocab_size=300 block=16 batch_size=2 warmup=1 save_every=2 eval_every=2"
    settings = [a for s in small.split() for a in ("--set", s)]
    command = ["train", "tales-draft", "--out", tmp_path / "model", "--data-dir", tmp_path / "books", *settings, "--json", "--steps"]
    run(*command, 2)
    assert (tmp_path / "model/run/checkpoint-2").is_dir()
    done = run(*command, 4).stdout
    figures = json.loads(done[done.index("{\n") :])
    assert figures["recipe"]["steps"] == 4
    assert min(r["step"] for r in figures["curve"] if "eval_loss" in r) == 2  # from the checkpoint, not again
    assert (tmp_path / "model/run/checkpoint-4").is_dir()
    assert "## Retrain" in (tmp_path / "model/README.md").read_text()
    text = run("generate", "Once upon a", "--model", tmp_path / "model", "--max-new-tokens", 4).stdout
    assert text.endswith("\n")


@pytest.mark.parametrize("recipe", ["tasks", "tasks-mdm", "tales-mdm"])
def test_train_masked_models(recipe, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    books(tmp_path / "books")
    monkeypatch.setattr("decodelab.training.masked_diffusion.evaluation_tasks", dict)
    small = "start_from=tales-draft batch_size=2 warmup=0 eval_every=1000"
    small += " block=16" if recipe == "tales-mdm" else " examples=8"
    settings = [a for s in small.split() for a in ("--set", s)]
    command = ["train", recipe, "--out", tmp_path / "model", "--data-dir", tmp_path / "books", *settings, "--steps", 1, "--json"]
    done = run(*command).stdout
    figures = json.loads(done[done.index("{\n") :])
    assert (figures["recipe"]["name"], figures["recipe"]["causal"]) == (recipe, recipe == "tasks")
    assert ("accuracy" in figures) == (recipe != "tales-mdm")
    assert ("held_out_bits_per_byte" in figures) == (recipe == "tales-mdm")
    assert "start from those of `tales-draft`" in (tmp_path / "model/README.md").read_text()
    assert getattr(load(tmp_path / "model")[0].config, "shift_logits", False) == (recipe != "tasks")


def test_train_refuses(tmp_path, monkeypatch):
    assert "unknown recipe 'tails'" in refused("train", "tails")
    assert "no such setting" in refused("train", "tales", "--set", "magic=1")
    assert "must be a multiple of heads" in refused("train", "tales", "--set", "heads=7")
    assert "tales" in refused("train", "tales", "--data-dir", tmp_path / "empty")
    assert "leave out --tokenizer" in refused("train", "tasks-mdm", "--tokenizer", "tales")
    assert "data must be 'tasks' or 'tales'" in refused("train", "tales-mdm", "--set", "data=books")
    monkeypatch.setattr("decodelab.cli.find_spec", lambda name: None)
    assert "decodelab[train]" in refused("train", "tales")


# lab and experiment


def test_lab(monkeypatch):
    facts = json.loads(run("lab", "--json").stdout)
    assert (facts["profile"], facts["device"]) == ("tiny", "cpu")
    assert next(m for m in facts["models"] if m["role"] == "target")["here"]
    assert not any(d["here"] for d in facts["data"])
    assert "tales-draft" in run("lab").stdout
    monkeypatch.setenv("DECODELAB_PROFILE", "huge")
    assert "unknown profile 'huge'" in refused("lab")


def test_lab_opens_the_notebooks(monkeypatch):
    started = []
    monkeypatch.setattr("decodelab.cli.subprocess.run", lambda command: started.append(command) or subprocess.CompletedProcess(command, 0))
    run("lab", "--open")
    assert started[0][1:3] == ["-m", "jupyterlab"]
    assert started[0][3].endswith("nbs")
    monkeypatch.setattr("decodelab.cli.find_spec", lambda name: None)
    assert "decodelab[lab]" in refused("lab", "--open")
    monkeypatch.setattr("decodelab.core.zoo.checkout_root", lambda: None)
    assert "clone it" in refused("lab", "--open")


def test_experiment(monkeypatch, tmp_path):
    module = importlib.import_module("decodelab.sampling.base")
    monkeypatch.setattr(module, "experiment", lambda n=1: {"n": n}, raising=False)
    out = run("experiment", "sampling/base", "--set", "n=3", "--allow-dirty", "--json")
    assert json.loads(out.stdout) == {"n": 3}
    stored = json.loads((tmp_path / "results/tiny/sampling/base-full.json").read_text())
    assert stored["data"] == {"n": 3}
    monkeypatch.setattr(module, "experiment", lambda: 3)
    assert "must return a dictionary" in refused("experiment", "sampling/base")


def test_experiment_refuses():
    for name in ("sampling/nothing", "nowhere/base", "../cli", "magic"):
        message = refused("experiment", name)
        assert name in message
        assert all(known in message for known in full_experiments())


# export


def exportable() -> list[str]:
    names = []
    for name, method in decoders().items():
        try:
            method.decoder()
        except (TypeError, ValueError):
            continue
        if not method.needs_training:
            names.append(name)
    return names


@pytest.mark.parametrize("name", exportable())
def test_export_round_trip(name, tmp_path, tales, masked, monkeypatch):
    model, tokenizer = masked if decoders()[name].family == "diffusion" else tales
    folder = tmp_path / name
    assert run("export", "hub", name, folder).stdout.strip() == str(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    try:
        torch.manual_seed(0)  # some choose at random even when they are greedy
        expected = model.generate(**inputs, **settings, custom_generate=decoders()[name].decoder())
    except ValueError:
        pytest.skip(f"{name} does not run on a plain causal model with its defaults")
    torch.manual_seed(0)
    shared = model.generate(**inputs, **settings, custom_generate=str(folder), trust_remote_code=True)
    assert shared.sequences.tolist() == expected.sequences.tolist()
    page = (folder / "README.md").read_text()
    assert "tags: [custom_generate, decodelab]" in page
    assert decoders()[name].url in page
    assert (folder / "custom_generate/requirements.txt").read_text() == "decodelab\n"


def test_exported_settings_reach_the_decoder(tmp_path, tales):
    model, tokenizer = tales
    run("export", "hub", "momentum", tmp_path / "m", "--set", "alpha=0.9", "--set", "k=3")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": 40, "do_sample": False}
    hub = {"custom_generate": str(tmp_path / "m"), "trust_remote_code": True}
    expected = make_decoder("momentum", {"alpha": 0.9, "k": 3}).generate(model, **inputs, **settings)
    assert model.generate(**inputs, **settings, **hub).sequences.tolist() == expected.sequences.tolist()
    greedy = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, **hub, alpha=0.0).sequences.tolist() == greedy.tolist()
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, **settings, custom_generate=str(tmp_path / "m"), trust_remote_code=False)


def test_export_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("export", "hub", "momentum", tmp_path / "file")
    assert "k must be" in refused("export", "hub", "momentum", tmp_path / "m", "--set", "k=0")
    assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match="only plain values"):
        export_hub(make_decoder("momentum", {"alpha": torch.tensor(0.5)}), tmp_path / "m")


# the README


def test_readme_is_the_index():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_lists_every_decoder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    assert listed == {m.decoder.__name__ for m in decoders().values()}, "run nbs/index.ipynb again, then tools/readme.py"


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
