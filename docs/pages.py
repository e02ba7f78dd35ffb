"""Pages that no notebook holds: landing page, families, methods, scoreboard, zoo, API index."""

import html
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from apidoc import Module
from notebooks import ROOT, Notebook, family_rank, repository_links

# family -> (title, what its notebooks share)
ABOUT = {
    "core": ("Engine", "What every method stands on: the contract of a decoder, the state of a call, the model session with its cache."),
    "lab": ("Laboratory", "What the experiments stand on: profiles, data, tasks, metrics, timing, claims and their provenance."),
    "experiments": ("Experiments", "What each paper claims, measured: baselines on the same prompts in the same run, with intervals."),
    "sampling": (
        "Sampling",
        "One token at a time, or one short look ahead. A paper supplies a rule that changes or chooses the next token.",
    ),
    "search": ("Search", "Keep partial outputs, expand them, score them, choose. A paper supplies the expander, the scorer or the order."),
    "speculative": (
        "Speculative",
        "Draft a chain or a tree, verify it in one forward pass, commit what is right. A paper supplies the drafter or the rule.",
    ),
    "diffusion": (
        "Diffusion",
        "Denoise a canvas block by block. A paper supplies the policy: which positions to commit now, and when to stop.",
    ),
    "structured": (
        "Structured",
        "Score or constrain whole outputs: spans, formats, plans. A paper supplies the scorer, the automaton or the plan.",
    ),
    "memory": ("Memory", "Decode with a part of the key-value cache. A paper supplies what to keep and what to fetch back."),
    "training": (
        "Training",
        "Recipes that fit models, drafters, heads and policies. A paper supplies the data, the loss and the schedule.",
    ),
    "theory": ("Theory", "Analysis without a decoding loop. A paper supplies estimators and fits."),
    "vision": ("Vision", "The same loops with images. A paper supplies the drafter or the planner."),
}
NOT_PAPERS = ("core", "lab", "training")
COMPARING = ("which", "verdicts", "differences")  # pages of no family that compare the papers
# page, what it is called, what it holds: the pages that no notebook holds, for readers that are not browsers
TABLES = (
    (
        "_sources/methods.md",
        "Methods",
        "every registered decoder and recipe: family, paper, whether it is lossless, whether it needs training",
    ),
    ("_sources/scoreboard.md", "Scoreboard", "every claim of every paper with what was measured"),
    ("_sources/zoo/index.md", "Zoo", "the small models that come with the repository"),
    ("papers.bib", "Bibliography", "all papers and baselines as BibTeX"),
)


def about(family: str) -> tuple[str, str]:
    """Title and description of a family."""
    return ABOUT.get(family, (family.replace("_", " ").capitalize(), ""))


def toctree(entries: list[str], caption: str = "", depth: int = 2) -> str:
    """A hidden table of contents, "" when there is nothing in it."""
    if not entries:
        return ""
    options = [":hidden:", f":maxdepth: {depth}", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *entries, "```"])


def site_contents(notebooks: list[Notebook], extra: list[str]) -> str:
    """The tables of contents of the landing page; `extra` are the pages at the end."""
    families = sorted({n.family for n in notebooks if n.family}, key=family_rank)
    loose = [n.name for n in notebooks if not n.family and n.name not in ("index", *COMPARING)]
    first = [name for name in COMPARING if any(n.name == name for n in notebooks)]
    compare = [*first, "methods", "scoreboard", *(f"{f}/index" for f in ("experiments",) if f in families), "zoo/index"]
    return "\n\n".join(
        [
            toctree([f"{f}/index" for f in families if f not in (*NOT_PAPERS, "experiments")], "Methods"),
            toctree(compare, "Compare"),
            toctree([f"{f}/index" for f in NOT_PAPERS if f in families], "Foundations"),
            toctree([*loose, "api/index", *extra], "Reference"),
        ]
    )


def landing(summary: str, body: str, notebooks: list[Notebook], contents: str) -> str:
    """Top and bottom of the landing page around the text of the index: hero sentence and cards."""
    papers = [n for n in notebooks if n.family and n.family not in (*NOT_PAPERS, "experiments")]
    read = (papers or notebooks)[0]
    decide = [
        ("Decide", "/which.ipynb", "Ten problems: what to use first, what was measured of it, what it costs, and what did not help."),
    ]
    cards = [
        *(decide if any(n.name == "which" for n in notebooks) else []),
        ("Read", f"/{read.family}/index.md", "Each paper is one notebook: the idea, the code piece by piece, the experiments, the claims."),
        ("Use", "/api/index.md", "Each notebook is a tested module: a decoder is one argument of `model.generate` on your own model."),
        ("Compare", "/scoreboard.md", "Every claim of a paper is measured and shown as held or not held, on the same models and prompts."),
    ]
    hero = f"# decodelab\n\n:::{{container}} dl-hero\n{summary.rstrip('.')}.\n:::"
    deck = "\n\n".join(f":::{{container}} dl-card\n[{title}]({target})\n\n{text}\n:::" for title, target, text in cards)
    return "\n\n".join([hero, f"::::{{container}} dl-cards\n{deck}\n::::", body, contents]) + "\n"


def family_page(family: str, notebooks: list[Notebook]) -> str:
    """The page of a family: what its papers share, and its notebooks."""
    title, summary = about(family)
    mine = [n for n in notebooks if n.family == family]
    parts = [f"# {title}\n\n> {summary}"]
    for folder in dict.fromkeys(n.name.rpartition("/")[0] for n in mine):
        inner = [n for n in mine if n.name.rpartition("/")[0] == folder]
        items = [f":::{{container}} dl-card\n[{n.title}](/{n.name}.ipynb)\n\n{n.summary}\n:::" for n in inner]
        heading = "" if folder == family else f"## {about(folder.removeprefix(family + '/'))[0]}\n\n"
        parts.append(heading + "::::{container} dl-cards dl-list\n" + "\n\n".join(items) + "\n::::")
    parts.append(toctree([n.name.removeprefix(family + "/") for n in mine]))
    return "\n\n".join(parts) + "\n"


def method_table(methods: dict[str, Any], recipes: dict[str, Any], notebooks: list[Notebook]) -> str:
    """All registered decoders, and the recipes that are a paper's method, as a table that the reader can filter."""
    if not methods:
        return "No method is registered yet."
    known = {n.name for n in notebooks}
    rows = []
    for m in sorted(methods.values(), key=lambda m: (*family_rank(m.family), m.name)):
        name = m.decoder.__name__
        link = f"[{name}](/{m.notebook}.ipynb)" if m.notebook in known else f"`{name}`"
        paper = f"[{_cell(m.paper)}]({m.url})" if m.url else _cell(m.paper)
        rows.append(f"| {link} | {about(m.family)[0]} | {paper} | {m.year} | {_tick(m.lossless)} | {_tick(m.needs_training)} |")
    for r in recipes.values():
        if r.paper:
            link = f"[{r.name}](/{r.notebook}.ipynb)" if r.notebook in known else f"`{r.name}`"
            rows.append(f"| {link} | {about('training')[0]} | [{_cell(r.paper)}]({r.url}) | {r.year} | | recipe |")
    head = ["| method | family | paper | year | lossless | needs training |", "|---|---|---|---|---|---|"]
    return ":::{container} dl-filter\n" + "\n".join(head + rows) + "\n:::"


def methods_page(table: str) -> str:
    """The page of all methods."""
    return (
        "# Methods\n\n> Every decoder of the registry, as `decodelab.decoders()` lists it, and every training recipe that is a paper's method.\n\n"
        "Which of them for a problem of yours: {doc}`/which`. What became of each paper's claims: {doc}`/verdicts`.\n\n"
        "*Lossless* means that the output follows the distribution of the model itself: the same text under greedy decoding, the same distribution "
        f"under sampling. *Needs training* means that a part must be fitted before the method can be used.\n\n{table}\n"
    )


def _tick(yes: bool) -> str:
    return '<span class="dl-chip dl-yes">yes</span>' if yes else '<span class="dl-chip dl-no">no</span>'


def _cell(value: Any) -> str:
    return re.sub(r"([|*_`$\[\]{}\\])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


# the scoreboard

STATES = {"held": "held", "refuted": "failed", "inconclusive": "unsure", "not testable": "open"}  # verdict -> style


def read_claims(folder: Path) -> list[dict[str, Any]]:
    """All result files below `folder` that hold claims, families in their order."""
    files = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.json"))]
    found = [
        f
        for f in files
        if isinstance(f, dict) and isinstance(f.get("claims"), list) and f.get("notebook") and all("verdict" in c for c in f["claims"])
    ]
    return sorted(found, key=lambda f: (*family_rank(str(f["notebook"]).split("/")[0]), f["notebook"], _profile(f)))


def scoreboard_page(results: list[dict[str, Any]], notebooks: list[Notebook]) -> str:
    """Claims of all papers: counts first, then every claim with what was measured."""
    top = (
        "# Scoreboard\n\n> What the papers claim, and what held when the notebooks ran.\n\n"
        "Each notebook ends with its paper's claims and tests them on the models of its profile. "
        "Held or refuted means that the 95 % interval clears the boundary; else the claim is inconclusive. One that cannot be tested at this scale says so."
    )
    if not results:
        return f"{top}\n\nNo result is stored yet: run a paper's notebook, and its claims appear here.\n"
    titles = {n.name.removeprefix("experiments/"): n.title for n in notebooks}
    pages = {n.name for n in notebooks}
    rows = [_summary(r, titles) for r in results]
    total = Counter(c["verdict"] for r in results for c in _of_the_paper(r))
    head = ["| notebook | profile | claims | " + " | ".join([*STATES, "checks"]) + " |", "|---|---|---|---|---|---|---|---|"]
    sections = [_section(r, titles, pages) for r in results]
    return "\n\n".join([top, _tiles(total), "\n".join(head + rows), *sections]) + "\n"


def _of_the_paper(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in result["claims"] if c["kind"] == "paper"]


def _tiles(total: Counter) -> str:
    tiles = [f'<div class="dl-tile dl-{kind}"><b>{total[verdict]}</b><span>{verdict}</span></div>' for verdict, kind in STATES.items()]
    return f'<div class="dl-tiles">{"".join(tiles)}</div>'


def _summary(result: dict[str, Any], titles: dict[str, str]) -> str:
    count = Counter(c["verdict"] for c in _of_the_paper(result))
    parts = [f'<span class="dl-{kind}" style="flex:{count[verdict]}"></span>' for verdict, kind in STATES.items() if count[verdict]]
    bar = f'<span class="dl-bar">{"".join(parts)}</span>'
    checks = [c["verdict"] == "held" for c in result["claims"] if c["kind"] == "check"]
    numbers = " | ".join([*(str(count[verdict]) for verdict in STATES), f"{sum(checks)} of {len(checks)}" if checks else ""])
    return f"| [{_cell(titles.get(result['notebook'], result['notebook']))}](#{_anchor(result)}) | {_profile(result)} | {bar} | {numbers} |"


def _section(result: dict[str, Any], titles: dict[str, str], pages: set[str]) -> str:
    name = result["notebook"]
    title = _cell(titles.get(name, name))
    page = next((p for p in (f"experiments/{name}", name) if p in pages), "")
    link = f"From {{doc}}`/{page}`, profile `{_profile(result)}`." if page else f"Profile `{_profile(result)}`."
    parts = [f"({_anchor(result)})=\n## {title}", link]
    for kind, what in (("paper", "claim"), ("check", "check of ours")):
        rows = [_claim_row(c) for c in result["claims"] if c["kind"] == kind]
        head = [f"| | {what} | measured [95 %] | expected | in the paper |", "|---|---|---|---|---|"]
        parts += [":::{container} dl-claims\n" + "\n".join(head + rows) + "\n:::"] if rows else []
    parts.append(_provenance(result.get("provenance") or {}))
    return "\n\n".join(p for p in parts if p)


def _claim_row(claim: dict[str, Any]) -> str:
    why = f'<br><span class="dl-why">{_cell(claim["why"])}</span>' if claim.get("why") else ""
    interval = f" [{', '.join(map(_value, claim['interval']))}]" if claim.get("interval") else ""
    cells = [_value(claim.get("value")) + _cell(interval), _value(claim.get("expected")), _cell(claim.get("paper") or "")]
    chip = f'<span class="dl-chip dl-{STATES[claim["verdict"]]}">{claim["verdict"]}</span>'
    return f"| {chip} | {_cell(claim['text'])}{why} | {' | '.join(cells)} |"


def _anchor(result: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"claims-{result['notebook']}-{_profile(result)}".lower())


def _profile(result: dict[str, Any]) -> str:
    return str((result.get("provenance") or {}).get("profile") or "tiny")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{_cell(k)} {_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "" if value is None else _cell(value)


def _provenance(facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_flat(v))}</dd>" for k, v in facts.items())
    return f'<details class="dl-provenance"><summary>How it was measured</summary><dl>{items}</dl></details>'


def _flat(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


# the zoo


def zoo_pages(folder: Path) -> dict[str, str]:
    """Page name -> text for the model cards below `folder` and their index."""
    cards = sorted(folder.glob("*/README.md"))
    rows = [f"| [{p.parent.name}]({p.parent.name}.md) | {_architecture(p.parent)} | {_weights(p.parent)} |" for p in cards]
    table = (
        "\n".join(["| model | architecture | parameters | weights |", "|---|---|---|---|", *rows])
        if rows
        else "No model card is stored yet."
    )
    top = "# Zoo\n\n> Small models with a card each, trained by the recipes of this lab and shipped with it."
    use = '```python\nfrom decodelab.core.zoo import load\n\nmodel, tokenizer = load("tales")\n```' if _has_zoo() else ""
    pages = {"zoo/index": "\n\n".join(p for p in (top, table, use, toctree([c.parent.name for c in cards])) if p) + "\n"}
    return pages | {f"zoo/{c.parent.name}": _card(c) for c in cards}


def _has_zoo() -> bool:
    path = ROOT / "decodelab" / "core" / "zoo.py"
    return path.exists() and "def load(" in path.read_text(encoding="utf-8")


def _card(path: Path) -> str:
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.S).strip()
    if not re.match(r"# ", text):
        text = f"# {path.parent.name}\n\n{text}"
    return "\n".join(repository_links(line, path.parent) for line in text.split("\n")) + "\n"


def _architecture(folder: Path) -> str:
    if not (folder / "config.json").exists():
        return ""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [config.get("model_type", "")])[0]
    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    return f"{_cell(name)}, {layers} layers of width {width}" if layers and width else _cell(name)


def _weights(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return "|"
    count = 0
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return f"{count / 1e6:.2f} M | {sum(f.stat().st_size for f in files) / 1e6:.1f} MB"


# reference


def api_index(modules: list[Module]) -> str:
    """The list of all modules, by family."""
    parts = ["# API", "> One page a module, every public name with its signature and parameters."]
    for family in dict.fromkeys(m.page.rpartition(".")[0] for m in modules):
        mine = [m for m in modules if m.page.rpartition(".")[0] == family]
        rows = [f"| [{m.page}]({m.page}.md) | {_cell(m.summary)} |" for m in mine]
        parts += [f"## {about(family)[0] if family else 'Top level'}", "\n".join(["| module | |", "|---|---|", *rows])]
    return "\n\n".join([*parts, toctree([m.page for m in modules], depth=1)]) + "\n"


def repository_page(path: Path) -> str:
    """A markdown file of the repository as a page."""
    return "\n".join(repository_links(line, path.parent) for line in path.read_text(encoding="utf-8").split("\n"))


def llms_text(description: str, base: str, notebooks: list[Notebook], modules: list[Module]) -> str:
    """A short map of the site for language models: every notebook as plain markdown, every API page."""
    parts = [f"# decodelab\n\n> {description}"]
    for family in sorted({n.family for n in notebooks}, key=family_rank):
        lines = [f"- [{n.title}]({base}{n.name}.html.md): {n.summary}" for n in notebooks if n.family == family and n.name != "index"]
        if lines:
            parts.append(f"## {about(family)[0] if family else 'Start'}\n\n" + "\n".join(lines))
    parts.append("## Tables\n\n" + "\n".join(f"- [{title}]({base}{page}): {what}" for page, title, what in TABLES))
    parts.append("## API\n\n" + "\n".join(f"- [{m.name}]({base}_sources/api/{m.page}.md): {m.summary}" for m in modules))
    return "\n\n".join(parts) + "\n"
