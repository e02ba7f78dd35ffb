"""The sources of the site: every page is in the contents once, and what readers without a browser get is whole."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
import words

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def docs(monkeypatch):
    "The modules that write the site's sources."
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    yield __import__("notebooks"), __import__("pages")
    for name in ("apidoc", "notebooks", "pages"):
        sys.modules.pop(name, None)


def test_pages_that_compare_come_before_the_tables(docs):
    notebooks, pages = docs
    found = notebooks.read_notebooks()
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", pages.site_contents(found, ["changelog"]), re.S)
    (compare,) = [b.split("\n\n")[1].split() for b in blocks if ":caption: Compare" in b]
    assert compare[:5] == ["which", "verdicts", "differences", "methods", "scoreboard"]
    entries = [e for b in blocks for e in b.split("\n\n")[1].split()]
    assert len(entries) == len(set(entries))
    assert {n.name for n in found if not n.family} - set(entries) == {"index"}
    without = pages.site_contents([n for n in found if n.name != "which"], [])
    assert "\nwhich\n" not in without
    assert "/which.ipynb" in pages.landing("", "", found, "")


def test_map_for_language_models_lists_every_page(docs):
    notebooks, pages = docs
    found = notebooks.read_notebooks()
    text = pages.llms_text("x", "https://h/", found, [])
    listed = {line for line in text.split("\n") if line.startswith("- [")}
    assert all(re.fullmatch(r"- \[.+?\]\(https://h/\S+\): \S.*", line) for line in listed), "a page without its line"
    for name in (n.name for n in found if n.name != "index"):
        assert f"(https://h/{name}.html.md)" in text, name
    assert {"which", "verdicts", "differences"} <= {n.name for n in found}
    for page in ("papers.bib", "_sources/methods.md", "_sources/scoreboard.md", "_sources/zoo/index.md"):
        assert f"(https://h/{page})" in text


def test_plain_page_holds_what_a_reader_sees(docs):
    notebooks, _ = docs
    output = nbformat.v4.new_output("display_data", {"text/markdown": "| a |\n|---|", "text/plain": "<Markdown object>"})
    table = nbformat.v4.new_code_cell("made()", outputs=[output], metadata={"tags": ["remove-input"]})
    shown = nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "2"})])
    text = notebooks.as_markdown(nbformat.v4.new_notebook(cells=[table, shown]))
    assert text == "| a |\n|---|\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n"


def test_tables_of_outputs_are_read_as_prose(docs):
    "Plain CommonMark has no tables: an output with one says who reads it; links of the others are mended here."
    notebooks, _ = docs
    made = {}
    for name, text in (("table", "| a | b |\n|---|---|\n| [x](y/z.ipynb) | 1 |"), ("list", "- [x](y/z.ipynb) --- 1")):
        output = nbformat.v4.new_output("display_data", {"text/markdown": text})
        title = nbformat.v4.new_markdown_cell("# Title")
        page = nbformat.v4.new_notebook(cells=[title, nbformat.v4.new_code_cell("made()", outputs=[output])])
        made[name] = notebooks.page(notebooks.Notebook("a", "Title", "", page), {}, set()).cells[1]
    assert made["table"].metadata["mystnb"]["markdown_format"] == "myst"
    assert "(y/z.ipynb)" in made["table"].outputs[0]["data"]["text/markdown"]
    assert "markdown_format" not in made["list"].metadata.get("mystnb", {})
    assert "(y/z.html)" in made["list"].outputs[0]["data"]["text/markdown"]


def glossary() -> dict[str, str]:
    "Terms and meanings."
    text = nbformat.read(ROOT / "nbs/glossary.ipynb", as_version=4).cells[0].source
    return {row.split("|")[1].strip(): row.split("|")[2].strip() for row in text.split("|---|---|\n")[1].strip().split("\n")}


def test_glossary_is_sorted_and_used():
    "Every term stands on another page, too."
    terms = list(glossary())
    assert terms == sorted(terms, key=lambda t: re.sub(r"[^a-z ]", "", t.lower()))
    pages = [p for p in (ROOT / "nbs").rglob("*.ipynb") if p.name != "glossary.ipynb" and ".ipynb_checkpoints" not in p.parts]
    text = " ".join(line for p in pages for line in words.lines_of(p)).lower()
    parts = {t: [re.sub(r" \(.*?\)|`", "", part).lower() for part in t.split(", ")] for t in terms}
    assert [t for t, names in parts.items() if not any(re.search(rf"\b{re.escape(n)}", text) for n in names)] == []


def test_glossary_has_the_standard_words():
    "What tools/words.py tells to say instead of a private word is explained, ordinary words apart."
    known = " ".join(glossary()).lower()
    said = {word.strip().lower() for say in words.PATTERNS.values() for word in say.split(",")}
    ordinary = {"distribution", "probs", "positions", "confident", "expensive", "repeat", "(a word of the workshop)"}
    assert {w for w in said - ordinary if w.removesuffix("s") not in known} == set()
