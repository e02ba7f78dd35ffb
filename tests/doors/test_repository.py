"""The repository itself: what is committed is portable, consistent and free of leftovers."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import check
import citation
import colab
import gpu
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from decodelab.lab.papers import papers

ROOT = Path(__file__).resolve().parents[2]
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
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= set(found)


def test_citation_names_every_paper():
    "The references are those of the bibliography, as tools/citation.py writes them."
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert text == citation.citation(text), "run tools/citation.py"
    assert [r["url"] for r in yaml.safe_load(text)["references"]] == [p.url for p in papers()]


def test_one_version():
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "decodelab/__init__.py").read_text(encoding="utf-8"), flags=re.M)
    assert version
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert newest
    assert version[1] == found["version"] == newest[1]


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
    assert {p.stem for p in flows} == {"ci", "nightly", "gpu", "docs", "release"}
    uses = [line for p in flows for line in p.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert [u for u in uses if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", u)] == []


def test_import_is_quick_and_light():
    code = "import sys, time; t = time.perf_counter(); import decodelab; print(time.perf_counter() - t, 'torch' in sys.modules)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert {torch for _, torch in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_package_is_typed():
    assert (ROOT / "decodelab/py.typed").is_file()


# the words of the Makefile and the checks behind them


def test_checks_are_documented():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = re.search(r"^CHECKS := (.*)$", makefile, flags=re.M)
    assert run
    assert run[1].split() == list(check.CHECKS)
    assert [name for name in check.EVERY if f"`make {name}`" not in guide] == []
    assert "make slow" in (ROOT / ".github/workflows/nightly.yml").read_text(encoding="utf-8")


def make(folder, *words, programs=(), **variables):
    "`make WORDS` with our Makefile in a finished environment whose programs, also those of `programs`, only say what they are called with."
    bin_folder = folder / ".venv/bin"
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    for path in (*(bin_folder / name for name in ("python", "jupyter", "decodelab")), *programs):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text('#!/bin/sh\necho "$(basename "$0") $@"\n', encoding="utf-8")
        path.chmod(0o755)
    for name in (".base", ".dev"):
        (folder / ".venv" / name).touch()
    command = ["make", "-f", str(ROOT / "Makefile"), *words]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # the tests run under `make test`
    return subprocess.run(command, cwd=folder, env={**outside, **variables}, capture_output=True, text=True)


needs_make = pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="no make here")


@needs_make
@pytest.mark.parametrize(("user", "started"), [("0", "jupyter lab nbs --allow-root"), ("1000", "jupyter lab nbs")])
def test_make_lab_also_as_root(tmp_path, user, started):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n", encoding="utf-8")
    done = make(tmp_path, "lab", programs=[tmp_path / "id"], PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (done.returncode, done.stdout.strip()) == (0, started), done.stderr


@needs_make
def test_make_refuses_another_python_than_that_of_the_environment(tmp_path):
    other = tmp_path / "python9"
    assert make(tmp_path, "demo").stdout.strip() == "decodelab demo"
    done = make(tmp_path, "demo", f"PYTHON={other}", programs=[other])
    assert done.returncode != 0
    assert "has python -V: remove that folder to use python9 -V" in done.stdout
    assert "decodelab demo" not in done.stdout


@needs_make
def test_make_demo_needs_no_laboratory(tmp_path):
    done = make(tmp_path, "demo")
    (tmp_path / ".venv/.dev").unlink()
    again = make(tmp_path, "--dry-run", "demo")
    assert done.returncode == again.returncode == 0
    assert "[dev]" not in again.stdout


def brought_by(requirements):
    "Names of the distributions that installing `requirements` brings, as far as they are here."
    found, left = set(), [Requirement(r) for r in requirements]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            left += [Requirement(r) for r in metadata.requires(wanted.name) or ()]
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


WITHOUT = """
import sys
from importlib.machinery import PathFinder
absent = set(sys.argv[1].split(","))
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import decodelab.cli, decodelab.demo, decodelab.demo_page
import decodelab
decodelab.decoders()
"""


def test_demo_imports_only_what_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = brought_by(project["dependencies"])
    modules = metadata.packages_distributions()
    absent = {m for m, owners in modules.items() if m != "decodelab" and not {canonicalize_name(o) for o in owners} & brought}
    assert {"fastcore", "nbdev", "jupyterlab"} <= absent
    assert "torch" not in absent
    done = subprocess.run([sys.executable, "-c", WITHOUT, ",".join(absent)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git here")
def test_what_make_leaves_is_ignored():
    made = [".gitattributes", ".gitconfig", ".venv/x", "_site/x", "_proc/x", "dist/x", "runs/x", "demo.html", "nbs/.last_checked"]
    listed = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.split() == made


# what an environment variable names is used, or the check fails


def test_browser_named_by_the_environment(monkeypatch, tmp_path):
    browser = tmp_path / "my-browser"
    browser.write_text("#!/bin/sh\n", encoding="utf-8")
    browser.chmod(0o755)
    monkeypatch.setenv("CHROMIUM", str(browser))
    assert check.find_browser() == str(browser)
    for wrong in (tmp_path / "missing", tmp_path):
        monkeypatch.setenv("CHROMIUM", str(wrong))
        with pytest.raises(check.CheckFailed, match=f"CHROMIUM={re.escape(str(wrong))} is no program: set it to the path of a Chromium"):
            check.find_browser()
    monkeypatch.setenv("CHROMIUM", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.find_browser() is None


@pytest.mark.parametrize(("ci", "fails"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_continuous_integration_needs_a_browser(monkeypatch, tmp_path, ci, fails):
    monkeypatch.setattr(check, "run", lambda *command, **options: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(check.CheckFailed, match="no Chromium found, and CI is set") if fails else nullcontext():
        check.check_docs()


def test_data_folder_of_the_checks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/tales").mkdir(parents=True)
    (tmp_path / "data/tales/manifest.json").write_text("[]", encoding="utf-8")
    monkeypatch.setenv("DECODELAB_DATA", "data")
    assert check.data_folder() == (tmp_path / "data").resolve()
    for none in ("", " "):
        monkeypatch.setenv("DECODELAB_DATA", none)
        assert check.data_folder() is None
    for wrong in (tmp_path / "missing", tmp_path):
        monkeypatch.setenv("DECODELAB_DATA", str(wrong))
        with pytest.raises(check.CheckFailed, match=f"no data set in {re.escape(str(wrong))}: DECODELAB_DATA must name the folder"):
            check.data_folder()


@pytest.mark.parametrize(
    ("name", "variable"), [("unit", "DECODELAB_DATA"), ("notebooks", "DECODELAB_DATA"), ("docs-check", "CHROMIUM"), ("all", "CHROMIUM")]
)
def test_checks_refuse_a_wrong_variable_before_they_run(monkeypatch, tmp_path, capsys, name, variable):
    started = []
    monkeypatch.setattr(check, "run", lambda *command, **options: started.append(command))
    monkeypatch.setenv("DECODELAB_DATA", "")
    monkeypatch.setenv(variable, str(tmp_path / "missing"))
    assert check.main(name) == 1
    assert started == []
    assert variable in capsys.readouterr().out


def test_gpu_run_has_its_profile(monkeypatch, tmp_path):
    monkeypatch.setenv("DECODELAB_DATA", "")
    for said, used in (("", "gpu"), ("paper", "paper")):
        monkeypatch.setenv("DECODELAB_PROFILE", said)
        assert gpu.environment()["DECODELAB_PROFILE"] == used
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path / "missing"))
    with pytest.raises(check.CheckFailed, match="no data set in"):
        gpu.environment()


# tests end


def test_a_test_that_hangs_fails(tmp_path, pytestconfig):
    assert 0 < float(pytestconfig.getini("timeout")) <= 600
    (tmp_path / "test_two.py").write_text("def test_hangs():\n    while True: pass\n\ndef test_fine(): pass\n", encoding="utf-8")
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-o", "timeout=2", "-n", "1"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout


# pages in Colab


def test_every_page_installs_decodelab_in_colab():
    pages = {p: json.loads(p.read_text(encoding="utf-8")) for p in check.notebooks()}
    assert [p.name for p, page in pages.items() if colab.with_install_cell(page) != page] == [], "run tools/colab.py"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"git+{project['urls']['Repository']}#egg={project['name']}" in colab.INSTALL


def code_cell(text, **more):
    return {"cell_type": "code", "source": text, **more}


def test_install_cell_comes_before_the_first_code():
    title, target = {"cell_type": "markdown", "source": "# Title"}, code_cell("#| default_exp a.b")
    imports, work = code_cell("#| export\nimport json\nfrom os import path"), code_cell("print(1)")
    page = colab.with_install_cell({"cells": [title, target, imports, work]})
    assert [c.get("id") for c in page["cells"]] == [None, None, colab.ID, None, None]
    assert colab.first_cells(page) == [target["source"], colab.INSTALL, imports["source"]]
    assert colab.with_install_cell(page) == page
    old = {"cells": [title, code_cell("import old", id=colab.ID), work]}
    assert [colab.source(c) for c in colab.with_install_cell(old)["cells"]] == ["# Title", colab.INSTALL, "print(1)"]


IN_A_NOTEBOOK = """
import pathlib, sys, sysconfig
from IPython.core.interactiveshell import InteractiveShell
tests, packages, cell = sys.argv[1:]
sys.path = [p for p in sys.path if not (pathlib.Path(p) / "decodelab/__init__.py").is_file()]
shell = InteractiveShell.instance()
if tests == "present":
    sys.path.insert(0, packages + "/checkout")
sysconfig.get_path = lambda name: packages
def pip(line):
    print("pip", line)
    pathlib.Path(packages, "decodelab.pth").write_text(packages + "/checkout")
shell.register_magic_function(pip, "line", "pip")
for text in (cell, "import decodelab; print(decodelab.HERE)"):
    shell.run_cell(text).raise_error()
"""


@pytest.mark.parametrize("state", ["present", "missing"])
def test_install_cell_installs_where_it_is_missing(tmp_path, state):
    (tmp_path / "packages/checkout/decodelab").mkdir(parents=True)
    (tmp_path / "packages/checkout/decodelab/__init__.py").write_text("HERE = True\n", encoding="utf-8")
    (tmp_path / "decodelab").mkdir()  # a folder of that name where the notebook lies is no package
    command = [sys.executable, "-c", IN_A_NOTEBOOK, state, str(tmp_path / "packages"), colab.INSTALL]
    env = {**os.environ, "PYTHONPATH": "", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    called = [line for line in done.stdout.splitlines() if line.startswith("pip ")]
    assert called == (
        [] if state == "present" else ["pip install --quiet fastcore --editable git+https://github.com/decodelab/decodelab#egg=decodelab"]
    )
