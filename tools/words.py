"""The house's words: what the field has a standard term for is called by it. `python tools/words.py` lists where a private word stands."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"(?:a|one|two|three|four|five|six|ten|\d+|each|every|per|the|these|those|first|second|last|next|fewer|more|few|many|all|of|k)"
# private word -> what to say instead; a word also counts as a part of a name (`hole_ids`, `no_hole`)
WORDS: dict[str, str] = {
    r"(?<!scaling )(?<!power )(?<!linear )laws?": "distribution, probs",
    r"holes?": "masked position",
    r"(?<!decimal )places": "positions",
    r"diary|diaries|bills?": "call state, stats, unmasking log",
    r"guess(?:es|ed|ing)?": "draft token, candidate",
    r"surest|surer|sure": "confident",
    r"rivals?|contenders?|line[-_ ]?ups?": "baselines",
    r"rooms?": "remaining length",
    r"shelf|shelves": "chunks",
    r"twins?": "negative control",
    r"dear(?:er|est)?": "expensive",
    r"inflat(?:e|es|ed|ing)": "repeat",
    r"golden (?:values?|files?|tests?|numbers?|figures?)": "(a word of the workshop)",
}
PATTERNS = {re.compile(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", re.I): say for word, say in WORDS.items()}
# a pass is a verb, or a forward pass; as a count of anything else it is a denoising step
PATTERNS[re.compile(rf"\b{NUMBER} (?:\w+ )?(?<!forward )(?<!backward )pass(?:es)?\b(?! (?:the|it|a|on|an|over|through)\b)", re.I)] = (
    "denoising step, forward pass"
)
ALLOWED = {  # where a word is meant as it stands
    "nbs/lab/tasks/parallel_puzzles.ipynb": ("Sure",),  # of a model's chatter
    "nbs/lab/tasks/parallel_texts.ipynb": ("law",),  # a subject of texts
    "docs/notebooks.py": ("rooms",),
    "nbs/experiments/search/first_finish.ipynb": ("guess", "guesses", "guessing"),  # a model that answers without thinking
}
TEXT = {".py", ".md", ".toml", ".yml", ".ini", ".cff"}
SKIPPED = ("tools/words.py", "data/zoo", "decodelab/")  # itself; texts of models; generated modules follow their notebooks
WRITTEN = ("decodelab/__init__.py", "decodelab/__main__.py")


def lines_of(path: Path) -> list[str]:
    "What people wrote in a file: lines of a text, sources of a notebook's cells."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text.split("\n")
    return [line for cell in json.loads(text)["cells"] for line in "".join(cell["source"]).split("\n")]


def files() -> list[Path]:
    "Every file that people write."
    tops = [ROOT / name for name in ("nbs", "tests", "tools", "docs", "decodelab")]
    found = [p for top in tops for p in sorted(top.rglob("*")) if p.suffix in TEXT | {".ipynb"} and ".ipynb_checkpoints" not in p.parts]
    found += [p for p in sorted(ROOT.glob("*")) if p.suffix in TEXT]
    names = {p: p.relative_to(ROOT).as_posix() for p in found}
    return [p for p, name in names.items() if name in WRITTEN or not name.startswith(SKIPPED)]


def private_words(path: Path) -> list[tuple[int, str, str]]:
    "Line number, word and what to say instead, for every private word of a file."
    return [
        (number, match[0], say)
        for number, line in enumerate(lines_of(path), start=1)
        for pattern, say in PATTERNS.items()
        for match in pattern.finditer(line)
        if match[0] not in ALLOWED.get(path.relative_to(ROOT).as_posix(), ())
    ]


def main(paths: list[str]) -> int:
    "List private words; 1 when there are any."
    counts: Counter = Counter()
    for path in [Path(p).resolve() for p in paths] or files():
        for number, word, say in private_words(path):
            counts[word.lower()] += 1
            print(f"{path.relative_to(ROOT)}:{number}: {word!r}: say {say}")
    print(f"{sum(counts.values())} private words{': ' if counts else ''}{', '.join(f'{w} {n}' for w, n in counts.most_common(40))}")
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
