"""Writes README.md from nbs/index.ipynb: the prose, the shown cells, and their printed output. `--check` only compares."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"


def output_text(output: dict) -> str:
    """What a README can show of an output: Markdown, or else text; pictures and HTML are left out."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    if "text/plain" in data and "text/html" not in data and "image/png" not in data:
        return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
    return ""


def cell_text(cell: dict) -> str:
    """A cell as Markdown; directives such as `#| hide` are obeyed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", source)
    if re.search(r"^#\| ?hide$", source, flags=re.M):
        return ""
    shown = [output_text(o) for o in cell["outputs"]]
    if not re.search(r"^#\| ?echo: false$", source, flags=re.M):
        shown.insert(0, f"```python\n{source}\n```")
    return "\n\n".join(s for s in shown if s)


def readme() -> str:
    """The text of README.md."""
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    return NOTICE + "\n\n".join(text for cell in cells if (text := cell_text(cell).strip())) + "\n"


def main() -> int:
    """Write, or with `--check` compare; the exit status is 1 when README.md is out of date."""
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv[1:]:
        current = path.is_file() and path.read_text(encoding="utf-8") == text
        if not current:
            print("README.md is not what nbs/index.ipynb says: run tools/readme.py")
        return int(not current)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
