"""Method below, laboratory above: what a module may import, and what importing a decoder brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import decodelab
from decodelab.reading import decoder_classes

PACKAGE = Path(decodelab.__path__[0])
FAMILIES = ("sampling", "search", "speculative", "diffusion", "structured", "memory", "vision", "theory")
FLOORS = {"core": 1, **dict.fromkeys(FAMILIES, 2), "lab": 3, "training": 4, "experiments": 5}  # what lies beside them: 6
BASES = (
    "base",
    "classics",
    "fast_dllm",
    "drafters",
    "model_drafter",
    "sampled_tree",
)  # registered decoders that are no paper's page of its own
HEAVY = ("pandas", "pyarrow", "matplotlib", "datasets", "rich", "typer", "rouge_score", "trl", "peft", "wandb")
LIGHT = {"decodelab.core.fields": 1, "decodelab.reading": 1}  # no torch: used by all floors


def modules():
    "Name -> path of every module of the package."
    paths = [p for p in PACKAGE.rglob("*.py") if p.name not in ("_modidx.py", "__init__.py")]
    return {".".join(("decodelab", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in sorted(paths)}


def floor(module):
    return LIGHT.get(module) or FLOORS.get(module.split(".")[1], 6)


def imported(name, path):
    "Modules of ours that a module imports, those inside functions included."
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            top = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*top, *filter(None, [node.module])])
            found |= {n for n in (base, *(f"{base}.{a.name}" for a in node.names)) if n in known}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in known}
    return found


def test_a_module_imports_only_from_its_own_floor_and_below():
    wrong = [f"{name} imports {other}" for name, path in modules().items() for other in imported(name, path) if floor(other) > floor(name)]
    assert wrong == []


def test_a_paper_imports_no_other_paper():
    papers = {name for name, path in modules().items() if path in {p for p, _ in decoder_classes().values()} and path.stem not in BASES}
    wrong = [f"{name} imports {other}" for name in papers for other in imported(name, modules()[name]) if other in papers - {name}]
    assert wrong == []


def test_no_private_name_crosses_a_module():
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("decodelab")):
                wrong += [f"{name} imports {a.name}" for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
    assert [w for w in wrong if not w.startswith("decodelab.__") and not w.endswith("._modidx")] == []


DECODER_MODULES = sorted({f"decodelab.{p.parent.name}.{p.stem}" for p, _ in decoder_classes().values()})
BROUGHT = """
import os, sys, torch, transformers
before = set(sys.modules)
for module in sys.argv[1:]:
    print(module, end=" ", flush=True)
    if not os.fork():  # a process of its own, in which nothing of ours was imported yet
        __import__(module)
        print(*set(sys.modules) - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, module
"""


@pytest.fixture(scope="module")
def brought():
    "Decoder module -> what a fresh process loads for it beyond torch and transformers."
    done = subprocess.run([sys.executable, "-c", BROUGHT, *DECODER_MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("module", DECODER_MODULES)
def test_importing_a_decoder_brings_no_laboratory(module, brought):
    brought = brought[module]
    assert module in brought
    assert [
        m for m in brought if m.startswith("decodelab") and floor(m + ".x" if m in ("decodelab",) else m) > 2 and m != "decodelab"
    ] == []
    assert [m for m in brought if m.partition(".")[0] in HEAVY] == []


def test_top_level_names_are_the_decoders_and_three_functions():
    classes = {cls for _, cls in decoder_classes().values()}
    public = {n for n in dir(decodelab) if not n.startswith("_")}
    parts = {n for n in public if f"decodelab.{n}" in sys.modules}  # submodules that have been imported
    assert public - parts == classes | {"load", "decoders", "advise"}
    with pytest.raises(AttributeError, match="module 'decodelab' has no attribute 'compare'"):
        _ = decodelab.compare
