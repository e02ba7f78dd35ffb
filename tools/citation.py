"""Writes the references of CITATION.cff from nbs/papers.bib, the papers of the laboratory. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decodelab.lab.papers import Paper, papers

MARK = "references:  # made from nbs/papers.bib by tools/citation.py\n"


def names(
    authors: tuple[str, ...],  # as BibTeX writes them: family name, or family name, comma, given name
) -> str:
    "All authors in one line: family names alone are not always different, and the format wants different authors."
    spoken = [" ".join(part.strip() for part in reversed(a.split(","))) for a in authors]
    return ", ".join(spoken)


def reference(paper: Paper) -> dict[str, object]:
    "A paper as a reference."
    found: dict[str, object] = {"type": "article", "title": paper.title, "authors": [{"name": names(paper.authors)}], "year": paper.year}
    found |= {"notes": paper.note} if paper.note else {}
    return found | {"url": paper.url, "identifiers": [{"type": "other", "value": f"arXiv:{paper.arxiv}"}]}


def citation(text: str) -> str:
    "The file with the present references; what stands above them is kept."
    head = text.partition("references:")[0]
    return head + MARK + yaml.safe_dump([reference(p) for p in papers()], sort_keys=False, allow_unicode=True, width=140)


def main() -> int:
    "Write, or with `--check` compare; the exit status is 1 when the file is out of date."
    path = ROOT / "CITATION.cff"
    old = path.read_text(encoding="utf-8")
    new = citation(old)
    if "--check" in sys.argv[1:]:
        print("the references of CITATION.cff are not nbs/papers.bib: run tools/citation.py" if new != old else "they agree")
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
