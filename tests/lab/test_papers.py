"""The bibliography: every method's paper is in it, and what pages say of papers comes from stored runs."""

import json
import re

import pytest

from decodelab.core.contract import decoders
from decodelab.lab import papers as papers_module
from decodelab.lab.papers import bibliography, claim_of, claims_of, family_counts, papers, verdict_lines
from decodelab.training.recipes import recipes

# what registers a technique or a control under a paper's address, and so calls it otherwise
OTHERWISE = {"best_of_n", "last_finish"}


def spoken(title: str) -> str:
    "A title without what differs between two ways to write it."
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"\bLLMs?\b", "large language models", title).lower().replace("models", "model")).strip()


REGISTERED = [
    (name, m) for name, m in {**decoders(), **{f"recipe {r.name}": r for r in recipes().values()}}.items() if "arxiv.org" in m.url
]


@pytest.mark.parametrize(("name", "method"), REGISTERED, ids=[name for name, _ in REGISTERED])
def test_paper_of_a_method_is_in_the_bibliography(name, method):
    "Identifier, title and year of a registration are those of the bibliography."
    (work,) = [w for w in bibliography() if w.url == method.url]
    if name not in OTHERWISE:
        assert spoken(method.paper).startswith(spoken(work.title))
        assert method.year == work.year


def test_every_page_of_a_paper_is_named():
    "A registered method whose page a paper names cites that paper; no page belongs to two papers."
    owners = {page: paper for paper in papers() for page in paper.notebooks}
    assert len(owners) == sum(len(p.notebooks) for p in papers())
    for name, method in REGISTERED:
        if method.notebook in owners:
            assert owners[method.notebook].url == method.url, name


def test_entries_are_whole():
    for work in bibliography():
        assert re.fullmatch(r"\d{4}\.\d{5}", work.arxiv), work.key
        assert work.url == f"https://arxiv.org/abs/{work.arxiv}"
        assert work.authors
        assert "{" not in work.title
    assert len(papers()) == 31
    text = (papers_module._root() / "nbs" / "papers.bib").read_text(encoding="utf-8")
    assert text.count("@misc{") == len(bibliography())  # none is lost in reading


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A repository with one paper that has neither page nor results."
    (tmp_path / "nbs/vision").mkdir(parents=True)
    fields = "title = {{A Title}},\n  author = {Lin and others},\n  year = {2025},\n  eprint = {2505.00001},\n  url = {u},\n  notebook = {vision/new},"
    (tmp_path / "nbs/papers.bib").write_text(f"@misc{{new,\n  {fields}\n}}\n", encoding="utf-8")
    monkeypatch.setattr(papers_module, "_root", lambda: tmp_path)
    return tmp_path


CLAIM = {"kind": "paper", "value": 0.5, "interval": [0.4, 0.6], "expected": "> 0", "paper": "Table 1", "why": ""}


def test_a_new_paper_appears_with_its_page_and_its_results(elsewhere):
    (paper,) = papers()
    assert verdict_lines(paper)[1:] == ["Its page is not written yet.", "Nothing is measured yet.", ""]
    assert family_counts()["vision"]["measured"] == 0
    cells = [{"cell_type": "markdown", "source": ["# New\n", "\n", "> It does\n", "> a thing.\n"]}]
    (elsewhere / "nbs/vision/new.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    claims = [
        CLAIM | {"text": "smaller.", "verdict": "refuted", "why": "Measured: larger"},
        CLAIM | {"text": "better", "verdict": "held", "interval": None, "value": {"a": 1}},
        CLAIM | {"text": "faster", "verdict": "held"},
        CLAIM | {"text": "exact", "verdict": "held", "kind": "check"},
    ]
    for profile in ("tiny", "gpu"):
        run = {"claims": claims, "provenance": {"profile": profile}}
        (elsewhere / f"data/results/{profile}/vision").mkdir(parents=True)
        (elsewhere / f"data/results/{profile}/vision/new.json").write_text(json.dumps(run), encoding="utf-8")
    title, does, held, failed = verdict_lines(paper)
    assert title == "**[New](vision/new.ipynb)**, *[A Title](u)*, 2025"
    assert does == "It does a thing."
    assert held == "**held**: faster: 0.5 [0.4, 0.6] (`gpu`)"
    assert failed == "**refuted**: smaller: 0.5 [0.4, 0.6] (`gpu`). Measured: larger"
    assert {k: n for k, n in family_counts()["vision"].items() if n} == {"papers": 1, "measured": 1, "held": 4, "refuted": 2}
    assert claim_of("vision/new", "fast").profile == "tiny"
    assert [m.claim.text for m in claims_of("vision/new", "check")] == ["exact", "exact"]
    for words, count in (("er", 3), ("slower", 0)):
        with pytest.raises(ValueError, match=f"{count} claims of 'vision/new' \\(tiny\\) say '{words}'; they are: \\['smaller\\.'"):
            claim_of("vision/new", words)


def test_outside_a_checkout_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(papers_module, "checkout_root", lambda: None)
    with pytest.raises(FileNotFoundError, match="lie in the repository: clone it"):
        papers()
