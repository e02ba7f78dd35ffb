"""Builds the site into `_site/`: `python docs/build.py`. Needs the `docs` extra, no network; every warning is an error."""

import os
import shutil
import sys
import tomllib
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import nbformat
from apidoc import Module, module_page, read_modules, symbols
from notebooks import NBS, ROOT, Notebook, as_markdown, family_rank, page, read_notebooks
from pages import (
    api_index,
    family_page,
    landing,
    llms_text,
    method_table,
    methods_page,
    read_claims,
    repository_page,
    scoreboard_page,
    site_contents,
    zoo_pages,
)
from sphinx.cmd.build import build_main

PROC = ROOT / "_proc"
SITE = ROOT / "_site"


def write(name: str, text: str) -> None:
    """Write one source page below `_proc/src`."""
    path = PROC / "src" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_notebooks(notebooks: list[Notebook], modules: list[Module]) -> None:
    """The pages of all notebooks but the index, and the files that they show."""
    names, with_page = symbols(modules), {m.name for m in modules}
    for notebook in notebooks:
        prepared = page(notebook, names, with_page)
        if notebook.name != "index":
            write(f"{notebook.name}.ipynb", nbformat.writes(prepared))
            write(f"../markdown/{notebook.name}.html.md", as_markdown(prepared))
    for file in NBS.rglob("*"):
        if file.suffix in (".png", ".svg", ".jpg", ".gif"):
            target = PROC / "src" / file.relative_to(NBS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


def write_home(description: str, notebooks: list[Notebook], modules: list[Module], table: str, extra: list[str]) -> None:
    """The landing page, from `nbs/index.ipynb` or else from the README."""
    index = next((n for n in notebooks if n.name == "index"), None)
    contents = site_contents(notebooks, extra)
    if index is None:
        text = repository_page(ROOT / "README.md")
        body = text.partition("\n## ")
        write("index.md", landing(description, body[1] + body[2], notebooks, contents))
        return
    prepared = page(index, symbols(modules), {m.name for m in modules})
    mark = "<!-- index -->"
    top, _, bottom = landing(index.summary or description, mark, notebooks, contents).partition(mark)
    heading = next(c for c in prepared.cells if c.cell_type == "markdown")
    heading.source = top + heading.source.partition("\n")[2].lstrip().removeprefix("> " + index.summary).strip()
    prepared.cells.append(nbformat.v4.new_markdown_cell(bottom))
    write("index.ipynb", nbformat.writes(prepared))


def write_pages(description: str, base: str) -> list[Notebook]:
    """All sources of the site; returns its notebooks."""
    from decodelab.core.contract import decoders
    from decodelab.training.recipes import recipes

    notebooks = read_notebooks()
    modules = read_modules(notebooks)
    write_notebooks(notebooks, modules)
    for family in sorted({n.family for n in notebooks if n.family}, key=family_rank):
        write(f"{family}/index.md", family_page(family, notebooks))
    table = method_table(decoders(), recipes(), notebooks)
    write("methods.md", methods_page(table))
    write("scoreboard.md", scoreboard_page(read_claims(ROOT / "data" / "results"), notebooks))
    for name, text in zoo_pages(ROOT / "data" / "zoo").items():
        write(f"{name}.md", text)
    write("api/index.md", api_index(modules))
    for module in modules:
        write(f"api/{module.page}.md", module_page(module))
    extra = [n for n in ("CONTRIBUTING", "CHANGELOG") if (ROOT / f"{n}.md").exists()]
    for name in extra:
        write(f"{name.lower()}.md", repository_page(ROOT / f"{name}.md"))
    write_home(description, notebooks, modules, table, [n.lower() for n in extra])
    write("../markdown/papers.bib", (NBS / "papers.bib").read_text(encoding="utf-8"))
    own = NBS / "llms.txt"
    write("../markdown/llms.txt", own.read_text(encoding="utf-8") if own.exists() else llms_text(description, base, notebooks, modules))
    return notebooks


def main() -> int:
    """Prepare the pages, run Sphinx, and put the finished site in place."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.rmtree(PROC, ignore_errors=True)
    notebooks = write_pages(project["description"], project["urls"]["Documentation"])
    html = PROC / "html"
    status = build_main(
        ["-q", "-b", "html", "-W", "--keep-going", "-c", str(HERE), "-d", str(PROC / "doctrees"), str(PROC / "src"), str(html)]
    )
    if status:
        return status
    for notebook in notebooks:  # the download is the whole notebook, with its hidden cells and directives
        shutil.copy2(NBS / f"{notebook.name}.ipynb", html / "_sources" / f"{notebook.name}.ipynb")
    shutil.copytree(PROC / "markdown", html, dirs_exist_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(html, SITE)
    print(f"{len(notebooks)} notebooks, {len(list(SITE.rglob('*.html')))} pages: {SITE / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
