"""Advice follows from verdicts: who comes first, what is named as refuted, what a page says when nothing is shown."""

import json
from pathlib import Path

import pytest

from decodelab.lab.claims import Claim
from decodelab.lab.decisions import Evidence, Problem, compared, glance_table
from decodelab.lab.papers import Measured

NBS = Path(__file__).resolve().parents[2] / "nbs"


def evidence(method, verdict, says="is better", value=1.25, interval=(1.0, 1.5)):
    claim = Claim("a claim", verdict, value=value, interval=interval, why="" if verdict == "held" else "Measured: so")
    return Evidence(method, says, Measured(claim, "small", "sampling/x"), "`m`")


def problem(*verdicts, **more):
    return Problem("speed", [evidence(name, v, f"says {name}") for name, v in zip("ABCD", verdicts)], [], "Never.", **more)


@pytest.mark.parametrize(
    ("verdicts", "first"),
    [
        (("held", "held"), "A"),
        (("refuted", "inconclusive", "held"), "C"),
        (("inconclusive", "refuted"), None),
        ((), None),
    ],
)
def test_the_first_method_is_the_first_that_held(verdicts, first):
    found = problem(*verdicts)
    assert (found.first.method if found.first else None) == first
    assert f"Use first: {first or 'nothing yet, as nothing is shown to help'}." in found.advice
    assert f"| {first or 'nothing yet'} |" in found.glance()


def test_a_section_orders_by_verdict_and_names_what_is_refuted():
    lines = problem("refuted", "inconclusive", "held", "not testable")._repr_markdown_().split("\n")
    assert [line[2] for line in lines if line.startswith(("| A", "| B", "| C", "| D"))] == ["C", "B", "A", "D"]
    assert lines[0] == "**Use first: C.** Of 4 statements 1 held, 1 refuted, 1 inconclusive, 1 not testable."
    assert "| C | says C | 1.25 [1, 1.5] | `small`, `m` | [✔ held](experiments/sampling/x.ipynb) |" in lines
    assert "**Measured not to be so:** A *says A*." in lines
    assert lines[-1] == "**When not.** Never."


def test_costs_and_a_given_way():
    costs = ["nothing", evidence("X,", "refuted", "seconds")]
    found = Problem("speed", [evidence("A", "held")], costs, "Never.", use="advise")
    assert "**Costs.** nothing; X, seconds: 1.25 [1, 1.5] (`small`, `m`)." in found._repr_markdown_()
    assert found.glance() == "| speed | advise | A is better: 1.25 [1, 1.5] (`small`, `m`); 1 held | nothing |"
    assert glance_table([found, found]).count("| speed |") == 2


@pytest.mark.parametrize(
    ("interval", "bounds", "verdict"),
    [
        ((1.2, 1.1, 1.3), {"above": 1.0}, "held"),
        ((1.2, 0.9, 1.3), {"above": 1.0}, "inconclusive"),
        ((0.8, 0.7, 0.9), {"above": 1.0}, "refuted"),
        ((0.8, 0.7, 0.9), {"below": 1.0}, "held"),
    ],
)
def test_a_stored_interval_gets_its_verdict(interval, bounds, verdict):
    found = compared("sampling/x", "small", interval, **bounds)
    assert (found.verdict, found.profile, found.notebook) == (verdict, "small", "sampling/x")
    assert found.claim.value == interval[0]


@pytest.mark.parametrize("page", ["which", "verdicts"])
def test_no_result_is_typed(page):
    "Cells that show results hold code alone, and prose has no decimal number: what is measured is read when the page runs."
    cells = json.loads((NBS / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    prose = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert [word for word in prose.split() if any(a.isdigit() for a in word) and "." in word.strip(".,;:")] == []
    shown = [c for c in cells if c["cell_type"] == "code" and c["outputs"]]
    assert all("".join(c["source"]).startswith("#| echo: false") for c in shown)
    assert len(shown) > 5
