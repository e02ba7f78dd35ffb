"""The hidden cell that installs decodelab where it is missing, as in Colab: `python tools/colab.py` adds it to every page."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

from check import ROOT, notebooks

REPOSITORY = "https://github.com/decodelab/decodelab"
ID = "install"
# An editable install keeps the checkout, and with it the models and stored results that the wheel does not carry.
# Python reads the folder of such an install when it starts; `addsitedir` reads it now.
INSTALL = f"""#| hide
# installs decodelab where it is missing (in Colab, say); elsewhere it does nothing
import importlib.util
import site
import sysconfig

if not getattr(importlib.util.find_spec("decodelab"), "origin", None):  # a folder of that name is no package
    %pip install --quiet fastcore --editable git+{REPOSITORY}#egg=decodelab
    site.addsitedir(sysconfig.get_path("purelib"))"""


def source(
    cell: dict[str, Any],  # a cell as a notebook file holds it
) -> str:
    "Text of a cell."
    return "".join(cell["source"])


def with_install_cell(
    notebook: dict[str, Any],  # a notebook as its file holds it
) -> dict[str, Any]:
    "The notebook with the present install cell before its first code; an older install cell is replaced."
    cells = [c for c in notebook["cells"] if c.get("id") != ID and source(c).strip() != INSTALL.strip()]  # of copied pages, too
    first = next((i for i, c in enumerate(cells) if c["cell_type"] == "code" and has_code(source(c))), len(cells))
    lines = INSTALL.splitlines(keepends=True)
    cell = {"cell_type": "code", "execution_count": None, "id": ID, "metadata": {}, "outputs": [], "source": lines}
    return {**notebook, "cells": [*cells[:first], cell, *cells[first:]]}


def has_code(
    text: str,  # source of a code cell
) -> bool:
    "Whether anything but comments and directives stands in it."
    return any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines())


def first_cells(
    notebook: dict[str, Any],  # a notebook as its file holds it
) -> list[str]:
    "What a reader runs first: the install cell and the imports, up to the first cell that does something else."
    found = []
    for text in (source(c) for c in notebook["cells"] if c["cell_type"] == "code"):
        if text != INSTALL and not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(text).body):
            break
        found.append(text)
    return found


def main() -> int:
    "Add the cell to every page, or with `--check` only name the pages that lack it; the exit status is 1 when there are such."
    stale = {}
    for path in notebooks():
        old = path.read_text(encoding="utf-8")
        new = json.dumps(with_install_cell(json.loads(old)), indent=1, ensure_ascii=False) + "\n"
        if new != old:
            stale[path] = new
    if "--check" in sys.argv[1:]:
        lacking = ", ".join(p.relative_to(ROOT).as_posix() for p in stale)
        print(f"pages without the cell that installs decodelab in Colab: {lacking}; run tools/colab.py" if stale else "every page has it")
        return int(bool(stale))
    for path, text in stale.items():
        Path(path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
