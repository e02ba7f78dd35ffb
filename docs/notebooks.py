"""From the notebooks of `nbs/` to pages: hidden cells out, directives to tags, links and buttons in, saved outputs kept."""

import ast
import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
REPOSITORY = "https://github.com/decodelab/decodelab"

# the order of the families, and of the notebooks in them; what is not named comes after, by name
FAMILIES = (
    *("core", "sampling", "search", "speculative", "diffusion", "structured", "memory", "theory", "vision"),
    *("lab", "training", "experiments"),
)
FIRST = (
    *("canvas", "step"),  # what the loop of the diffusion family stands on
    *("base", "acceptance", "drafters", "fast_dllm", "measure"),
    *("output", "warp", "tree", "slots", "capability", "steps", "session", "call", "registry", "fields", "contract", "zoo"),
    *("lab", "data", "prompts", "text", "puzzles", "catalogue", "metrics", "mauve", "provenance", "claims", "bench", "cost", "repeat"),
)

_DIRECTIVE = re.compile(r"^[ \t]*#\|[ \t]*(\w[\w-]*):?[ \t]*(.*)$\n?", re.M)
_HIDDEN_LINE = re.compile(r"^.*#\|[ \t]*hide_line[ \t]*$\n?", re.M)
_MAGIC = re.compile(r"^%(load_ext|autoreload|reload_ext|matplotlib|config)\b.*$\n?", re.M)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_SYMBOL = re.compile(r"(?<![\[`\w{}])`([A-Za-z_][\w.]*)(\(\))?`(?!`|\]\()")


@dataclass(frozen=True)
class Notebook:
    """One notebook of `nbs/`: where it is, what it is called and what it holds."""

    name: str  # path below nbs/ without suffix, as "core/data"
    title: str  # text of its first heading
    summary: str  # its `> summary` line, or ""
    content: nbformat.NotebookNode  # the whole notebook

    @property
    def family(self) -> str:
        """First folder of the name, or "" for a notebook that lies in `nbs/` itself."""
        return self.name.split("/")[0] if "/" in self.name else ""

    @property
    def module(self) -> str:
        """The module that the notebook exports to, or ""."""
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in self.content.cells if c.cell_type == "code"), re.M)
        return f"decodelab.{found[1]}" if found else ""


def read_notebooks() -> list[Notebook]:
    """All notebooks, families in their order, within a family `FIRST` first and the rest by name."""
    paths = [p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)]
    return sorted((_read(p) for p in paths), key=_rank)


def family_rank(family: str) -> tuple[int, str]:
    """Sorting key of a family: its place in `FAMILIES`, unknown families last and by name."""
    return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)


def _rank(notebook: Notebook) -> tuple:
    *folders, leaf = notebook.name.split("/")
    inner = family_rank("/".join(folders[1:]))  # of the experiments of a family, and of folders in a folder
    return (
        *family_rank(notebook.family),
        inner if len(folders) > 1 else (-1, ""),
        FIRST.index(leaf) if leaf in FIRST else len(FIRST),
        leaf,
    )


def _read(path: Path) -> Notebook:
    content = nbformat.read(path, as_version=4)
    prose = next((c.source for c in content.cells if c.cell_type == "markdown" and c.source.strip()), "")
    title = re.search(r"^# +(.+)$", prose, re.M)
    if title is None:
        raise SystemExit(f"{path.relative_to(ROOT)}: the first markdown cell needs a title (`# Title`)")
    summary = re.search(r"^> *(.+(?:\n> ?.+)*)", prose, re.M)
    text = re.sub(r"\n> ?", " ", summary[1]) if summary else ""
    return Notebook(path.relative_to(NBS).with_suffix("").as_posix(), title[1].strip(), text, content)


def page(notebook: Notebook, symbols: dict[str, str], modules: set[str]) -> nbformat.NotebookNode:
    """The notebook as its page shows it; `symbols` maps a public name to its full one, `modules` are those with an API page."""
    result = copy.deepcopy(notebook.content)
    result.cells = [c for c in (_code(c) if c.cell_type == "code" else c for c in result.cells) if c is not None]
    _name_figures(result.cells)
    linked: set[str] = set()
    for cell in result.cells:
        if cell.cell_type == "markdown":
            cell.source = _prose(cell.source, notebook, symbols, linked)
    heading = next(c for c in result.cells if c.cell_type == "markdown" and c.source.strip())
    if notebook.name != "index":
        heading.source = re.sub(
            r"\A(# .+\n*(?:>.*\n*)*)", lambda m: m[1].rstrip() + "\n\n" + _buttons(notebook, modules) + "\n\n", heading.source
        )
    result.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
    return result


def _code(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    said = dict(_DIRECTIVE.findall(cell.source))
    if "hide" in said or said.get("include") == "false":
        return None
    cell.source = _MAGIC.sub("", _DIRECTIVE.sub("", _HIDDEN_LINE.sub("", cell.source))).strip()
    if not cell.source:
        return None
    tags = cell.metadata.setdefault("tags", [])
    if said.get("echo") == "false":
        tags.append("remove-input")
    if said.get("output") == "false":
        tags.append("remove-output")
    if said.get("code-fold") == "true" or (_imports_only(cell.source) and not cell.outputs):
        tags.append("hide-input")
        what = "imports" if _imports_only(cell.source) else "code"
        cell.metadata.setdefault("mystnb", {}).update(code_prompt_show=f"Show {what}", code_prompt_hide=f"Hide {what}")
    cell.outputs = [o for o in cell.outputs if not _address_only(o)]
    for output in cell.outputs:
        if text := "".join(output.get("data", {}).get("text/markdown") or ""):
            if re.search(r"^\|[ :-]*---", text, re.M):  # a table, which only the parser of prose knows; it mends links, too
                cell.metadata.setdefault("mystnb", {})["markdown_format"] = "myst"
            else:
                output["data"]["text/markdown"] = re.sub(r"\]\(([\w./]+)\.ipynb\)", r"](\1.html)", text)
    for output in cell.outputs:
        if "data" in output and len(output.data) > 1:
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return cell


def _address_only(output: nbformat.NotebookNode) -> bool:
    # what matplotlib calls leave behind: an object's address, of no use to a reader
    data = output.get("data", {})
    return set(data) == {"text/plain"} and re.fullmatch(r"\[?<[^<>]* at 0x[0-9a-f]+>(, .*)?\]?", data["text/plain"], re.S) is not None


def _name_figures(cells: list[nbformat.NotebookNode]) -> None:
    # alternative text of figures: heading of the section, then what the prose above or else below the figure says of it
    heading = ""
    for before, cell, after in zip([None, *cells], cells, [*cells[1:], None]):
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ +(.+)$", cell.source, re.M)][-1]
        elif any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            said = _beside(before, -1) or _beside(after, 0)
            cell.metadata.setdefault("mystnb", {})["image"] = {"alt": _plain(f"{heading}: {said}" if said else heading)}


def _beside(cell: nbformat.NotebookNode | None, which: int, limit: int = 300) -> str:
    # whole sentences at the end (-1) or at the start (0) of a cell of prose; below a figure, "...:" speaks of what comes next
    if cell is None or cell.cell_type != "markdown" or not cell.source.strip():
        return ""
    paragraph = " ".join(re.split(r"\n\s*\n", cell.source.strip())[which].split())
    if paragraph.startswith(("#", "|", ">", "<", "```", "$$", ":::", "- ", "* ", "1. ")) or (which == 0 and paragraph.endswith(":")):
        return ""
    sentences = re.split(r"(?<=[.!?:])\s+(?=\S)", paragraph)
    while len(sentences) > 1 and len(" ".join(sentences)) > limit:
        sentences.pop(0 if which == -1 else -1)
    return " ".join(sentences)


def _plain(text: str) -> str:
    # markdown without its marks; nothing is a mark within formulas and code
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"</?[a-z][^>]*>", "", text))
    parts = re.split(r"[$`]+([^$`]+)[$`]+", text)
    parts[::2] = [re.sub(r"(?<!\w)[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}(?!\w)", "", part) for part in parts[::2]]
    return "".join(parts).strip()


def _imports_only(source: str) -> bool:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def _prose(source: str, notebook: Notebook, symbols: dict[str, str], linked: set[str]) -> str:
    lines, fenced = [], False
    for line in _DIRECTIVE.sub("", source).split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            line = repository_links(line, (NBS / notebook.name).parent)
            if not line.startswith(("#", "<")):
                line = _SYMBOL.sub(lambda m: _symbol(m, symbols, linked), line)
        lines.append(line)
    return "\n".join(lines)


def _symbol(match: re.Match, symbols: dict[str, str], linked: set[str]) -> str:
    name = match[1].removeprefix("decodelab.")
    full = symbols.get(name)
    if full is None or full in linked:
        return match[0]
    linked.add(full)
    return f"{{py:obj}}`{match[1]}{match[2] or ''} <{full}>`"


def repository_links(line: str, folder: Path) -> str:
    """Links of a markdown line made to work on the site: `folder` is where its file lies; files without a page go to GitHub."""

    def fix(match: re.Match) -> str:
        target, anchor = match[2], match[3] or ""
        path = Path(os.path.normpath(folder / target))
        if "://" in target or target.startswith(("mailto:", "/")) or not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        home = path.relative_to(ROOT)
        if path.suffix == ".ipynb" and path.is_relative_to(NBS):
            return f"{match[1]}/{path.relative_to(NBS).as_posix()}{anchor}{match[4]}"
        if home.parts[:2] == ("data", "zoo") and path.name == "README.md":
            return f"{match[1]}/zoo/{path.parent.name}.md{anchor}{match[4]}"
        if home.as_posix() in ("CONTRIBUTING.md", "CHANGELOG.md"):
            return f"{match[1]}/{home.stem.lower()}.md{anchor}{match[4]}"
        if path.is_relative_to(NBS) and path.is_file():
            return match[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"{match[1]}{REPOSITORY}/{kind}/main/{home.as_posix()}{anchor}{match[4]}"

    return _LINK.sub(fix, line)


def _buttons(notebook: Notebook, modules: set[str]) -> str:
    up = "../" * notebook.name.count("/")
    colab = f"https://colab.research.google.com/github/decodelab/decodelab/blob/main/nbs/{notebook.name}.ipynb"
    parts = [
        f'<a class="dl-button" href="{colab}"><i class="fa-solid fa-rocket" aria-hidden="true"></i> Open in Colab</a>',
        f'<a class="dl-button" href="{up}_sources/{notebook.name}.ipynb" download>'
        '<i class="fa-solid fa-download" aria-hidden="true"></i> Download notebook</a>',
    ]
    if notebook.module in modules:
        api = f"{up}api/{notebook.module.removeprefix('decodelab.')}.html"
        parts.append(f'<a class="dl-button" href="{api}"><i class="fa-solid fa-book" aria-hidden="true"></i> API</a>')
    return f'<div class="dl-buttons">{"".join(parts)}</div>'


def as_markdown(prepared: nbformat.NotebookNode) -> str:
    """A page as plain markdown (prose, shown code, Markdown and text outputs), for readers that are not browsers."""
    parts = []
    for cell in prepared.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r'<div class="dl-buttons">.*?</div>\n*', "", re.sub(r"\{py:obj\}`(\S+) <[^>]+>`", r"`\1`", cell.source)))
            continue
        if "remove-input" not in cell.metadata.get("tags", ()):
            parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if written := output.get("data", {}).get("text/markdown"):
                parts.append("".join(written))
                continue
            text = output.get("text") if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
            if text and not text.startswith("<Figure"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
