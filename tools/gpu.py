"""Behind `make gpu`: every notebook in profile gpu and the bench, saved below runs/gpu/, logged to Weights & Biases when it is set up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

from check import BIN, ROOT, CheckFailed, data_folder

OUT = ROOT / "runs" / "gpu"


def run_logged(name: str, command: list[str], env: dict[str, str]) -> dict[str, object]:
    "Run one command with its own log file; a failure is recorded and the next one still runs."
    log = OUT / "logs" / f"{name.replace('/', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT).returncode
    row = {"name": name, "ok": status == 0, "seconds": round(time.monotonic() - start, 1)}
    print(f"{name:40} {'ok' if row['ok'] else 'FAILED, see ' + str(log.relative_to(ROOT)):30} {row['seconds']:8} s", flush=True)
    return row


def environment() -> dict[str, str]:
    "The variables of all runs: profile gpu where none is named, results below runs/gpu/."
    profile = os.environ.get("DECODELAB_PROFILE", "").strip() or "gpu"
    data = {"DECODELAB_DATA": str(folder)} if (folder := data_folder()) else {}
    return {**os.environ, **data, "DECODELAB_PROFILE": profile, "DECODELAB_RESULTS": str(OUT / "results")}


def run_all(env: dict[str, str]) -> list[dict[str, object]]:
    "Each notebook in a process of its own, so that its GPU memory is free again for the next; then the bench."
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", OUT / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    rows = []
    for path in sorted((OUT / "nbs").rglob("*.ipynb")):
        name = path.relative_to(OUT / "nbs").with_suffix("").as_posix()
        rows.append(run_logged(name, [str(BIN / "nbdev-test"), str(path), "--save", "--n-workers", "0", "--cell-timeout", "0"], env))
    rows.append(run_logged("bench", [str(BIN / "decodelab"), "bench"], env))
    (OUT / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def log_to_wandb(rows: list[dict[str, object]]) -> None:
    "Log times, outcomes and all results as one Weights & Biases run."
    import wandb

    with wandb.init(project=os.environ.get("WANDB_PROJECT", "decodelab"), job_type="gpu") as tracked:
        tracked.log({"notebooks": wandb.Table(columns=["name", "ok", "seconds"], data=[list(r.values()) for r in rows])})
        tracked.summary["failed"] = sum(not r["ok"] for r in rows)
        results = wandb.Artifact("gpu-results", type="results")
        results.add_dir(str(OUT))
        tracked.log_artifact(results)


def main() -> int:
    "Refuse without a GPU, else run, log and report."
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU; `make notebooks` runs the same notebooks on a CPU in profile tiny")
        return 2
    try:
        env = environment()
    except CheckFailed as error:
        print(error)
        return 2
    rows = run_all(env)
    if os.environ.get("WANDB_API_KEY"):
        log_to_wandb(rows)
    failed = sum(not r["ok"] for r in rows)
    print(f"{len(rows) - failed} passed, {failed} failed; results in {OUT.relative_to(ROOT)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
