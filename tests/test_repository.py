"""The repository itself: what is committed is portable, consistent and free of leftovers."""

import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BUILT = {".git", ".venv", "_docs", "_site", "_proc", "dist", "build", "runs", "wandb", "scratch", "__pycache__", ".ipynb_checkpoints"}
CACHES = {".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
TEXT = {".py", ".ipynb", ".md", ".yml", ".yaml", ".toml", ".ini", ".txt", ".cff", ".json", ".css", ".js", ".html", ""}

MACHINE_PATH = re.compile(r"(?:^|[^\w.])/(?:home|Users|root|work)/\w|[A-Z]:\\\\?Users\\")
LEFTOVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME)\b|^(?:<{7}|>{7}) |\bbreak" r"point\(\)|\bset_" r"trace\(|(?i:as an ai language) model")
SECRET = re.compile(
    r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{32,}|pypi-AgE\w{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
UNSAFE = re.compile(r"trust_remote_code\s*=\s*True|\btorch\.load\(|\bimport pickle\b|\bpickle\.load")


def tracked() -> list[Path]:
    "Files of the repository: as git lists them, else (in an archive) all that were not built here."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode == 0 and (ROOT / ".git").exists():
        return [p for n in listed.stdout.decode().split("\0") if n and (p := ROOT / n).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not (BUILT | CACHES) & set(p.relative_to(ROOT).parts)]


def lines_of(path: Path, outputs: bool) -> list[str]:
    "Lines of a text file; of a notebook its sources and, if asked, its text outputs (no pictures)."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text.splitlines()
    cells = json.loads(text)["cells"]
    lines = [line for c in cells for line in "".join(c["source"]).splitlines()]
    if outputs:
        for cell in cells:
            for out in cell.get("outputs", []):
                shown = {k: v for k, v in out.get("data", {}).items() if not k.startswith("image/png")}
                lines += json.dumps([out.get("text"), out.get("traceback"), shown]).split("\\n")
    return lines


def found(pattern: re.Pattern, outputs: bool = True, folder: str = "") -> list[str]:
    "Where `pattern` occurs in the text files of the repository."
    here = Path(__file__).resolve()
    files = [p for p in tracked() if p.suffix in TEXT and p != here and p.is_relative_to(ROOT / folder)]
    return [f"{p.relative_to(ROOT)}: {line[:120]}" for p in files for line in lines_of(p, outputs) if pattern.search(line)]


def test_no_path_of_one_machine():
    assert found(MACHINE_PATH) == []


def test_no_secret():
    assert found(SECRET) == []


def test_no_leftover():
    assert found(LEFTOVER, outputs=False) == []


def test_no_unsafe_loading():
    assert found(UNSAFE, folder="decodelab") == []
    assert [p.name for p in tracked() if p.suffix in {".pkl", ".pickle", ".bin", ".pt", ".pth"}] == []


@pytest.mark.parametrize(
    ("pattern", "caught", "passed"),
    [
        (MACHINE_PATH, "open('/ho" + "me/ann/x')", "https://example.org/home/x"),
        (SECRET, "token = 'gh" + "p_" + "a" * 36 + "'", "secrets.WANDB_API_KEY"),
        (LEFTOVER, "# TO" + "DO later", "the todo list"),
        (UNSAFE, "torch.lo" + "ad(path)", "safetensors.torch.load_file(path)"),
    ],
)
def test_patterns_can_fail(pattern, caught, passed):
    assert pattern.search(caught)
    assert not pattern.search(passed)


def test_profiles():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert set(settings.sections()) >= {"tiny", "gpu", "paper"}
    for name in ("tiny", "gpu", "paper"):
        profile = settings[name]
        assert profile.getint("max_new_tokens") > 0
        assert profile["dtype"] in {"float32", "float16", "bfloat16"}
        assert all(profile[key] for key in ("seed", "device", "target", "draft", "diffusion", "featuriser"))
    assert settings["tiny"]["device"] == "cpu"


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documented = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.M))
    checks = {"lint", "types", "unit", "notebooks", "docs-check", "wheel", "workflows", "export-check"}
    assert documented >= {"help", "demo", "test", "lab", "docs", "bench", "gpu", "clean"} | checks
    run = re.search(r"^CHECKS := (.*)$", makefile, flags=re.M)
    assert run
    assert set(run[1].split()) == checks
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= set(citation)


def test_one_version():
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "decodelab/__init__.py").read_text(encoding="utf-8"), flags=re.M)
    assert version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert newest
    assert version[1] == citation["version"] == newest[1]


def test_one_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]


def test_constraints_are_pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", p)] == []


def test_actions_are_pinned():
    flows = list((ROOT / ".github/workflows").glob("*.yml"))
    assert {p.stem for p in flows} == {"ci", "gpu", "docs", "release"}
    uses = [line for p in flows for line in p.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert [u for u in uses if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", u)] == []


def test_import_is_quick_and_light():
    code = "import sys, time; t = time.perf_counter(); import decodelab; print(time.perf_counter() - t, 'torch' in sys.modules)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert {torch for _, torch in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_package_is_typed():
    assert (ROOT / "decodelab/py.typed").is_file()
