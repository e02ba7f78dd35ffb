"""Writes README.md from nbs/index.ipynb: the prose, the shown cells, and their printed output. `--check` only compares."""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "docs/_static/home.png"  # the figure of the home page, for README
NOTICE = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"


def picture(cells: list[dict]) -> bytes:
    """The figure of the home page."""
    data = [o["data"]["image/png"] for c in cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    return base64.b64decode("".join(data[0]))


def output_text(output: dict) -> str:
    """What a README can show of an output: Markdown, the figure, or else text; HTML is left out."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "text/markdown" in data:
        return re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", "".join(data["text/markdown"]).strip())
    if "image/png" in data:
        return f"![the figure that the next sentence describes]({PICTURE})"
    if "text/plain" in data and "text/html" not in data:
        return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
    return ""


def cell_text(cell: dict) -> str:
    """A cell as Markdown; directives such as `#| hide` are obeyed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", source)
    if re.search(r"^#\| ?hide$", source, flags=re.M):
        return ""
    streams = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
    rest = [o for o in cell["outputs"] if o["output_type"] != "stream"]
    shown = [output_text(o) for o in ([{"output_type": "stream", "text": [streams]}] if streams.strip() else []) + rest]
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
    figure = picture(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"])
    if "--check" in sys.argv[1:]:
        current = path.is_file() and path.read_text(encoding="utf-8") == text and (ROOT / PICTURE).read_bytes() == figure
        if not current:
            print("README.md is not what nbs/index.ipynb says: run tools/readme.py")
        return int(not current)
    path.write_text(text, encoding="utf-8")
    (ROOT / PICTURE).write_bytes(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
