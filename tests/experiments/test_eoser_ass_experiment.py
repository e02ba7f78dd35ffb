"""EOSER's and ASS's experiments: the toy, the control, what a watched call tells; the experiment on a small scale."""

import json
import math

import pandas as pd
import pytest
import torch
from toys import PAD, canvases, random_prompts, small_model

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.eoser_ass import EOSER, ascending_steps
from decodelab.experiments.diffusion import eoser_ass
from decodelab.experiments.diffusion.eoser_ass import EOS as TOY_EOS
from decodelab.experiments.diffusion.eoser_ass import Descending, arms, early_eos, long_or_short, per_step, toy_kind, toy_model
from decodelab.lab.lab import Lab
from decodelab.lab.provenance import to_plain

WHOLE = {"early_stop": False}


@pytest.fixture(scope="module")
def model():
    "A random decoder-only model that is run in both directions; <pad> stands for a masked position."
    model = small_model()
    model.config.mask_token_id = PAD
    return model


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(4, lengths=(3, 9), seed=5)


def committed(lines, row=0):
    "how many positions each step of a row filled."
    return lines[lines["row"] == row].groupby("step")["committed"].sum().tolist()


def test_the_control_fills_in_falling_sizes(model, prompts):
    for length in (3, 16, 23):
        _, lines = canvases(Descending(**WHOLE), model, prompts[0], length)
        assert committed(lines) == ascending_steps(length)[::-1]
    for name in ("eoser", "block_num"):
        with pytest.raises(TypeError, match=f"Descending has no hyper-parameter '{name}'"):
            Descending(**{name: 1})


def test_passes_and_early_eos_by_hand():
    columns = ["row", "step", "position", "confidence", "end", "committed"]
    rows = [
        (0, 0, 0, 0.2, False, False),
        (0, 0, 1, 0.4, False, True),
        (0, 0, 2, 0.9, True, True),
        (0, 1, 0, 0.6, False, True),
        (1, 0, 0, 0.5, False, True),
        (1, 1, 1, 0.8, True, False),
        (1, 2, 1, 0.8, True, True),
        (1, 3, 2, 1.0, True, True),
    ]
    lines = pd.DataFrame(rows, columns=columns)
    found = per_step(lines)
    assert found["eos"].tolist() == [0.5, 0, 0.5, 0.5]
    assert found["others"].tolist() == [1.0, 0.5, 0, 0]
    assert found["confidence"].tolist() == pytest.approx([0.5, 0.7, 0.8, 1.0])
    assert found["eos_confidence"].tolist() == pytest.approx([0.9, 0.8, 0.8, 1.0])
    assert found["other_confidence"].tolist() == pytest.approx([(0.2 + 0.4 + 0.5) / 3, 0.6, math.nan, math.nan], nan_ok=True)
    assert early_eos(lines) == pytest.approx([1 / 3, 0.0])  # passes 0 and 1 of 4


def test_the_distribution_of_the_toy():
    dist = long_or_short([6, 7, 8, 9])
    assert dist.strings.shape == (82, 16)
    short = [row for row, p in zip(dist.strings.tolist(), dist.p.tolist()) if p > 0.1]
    assert short == [[5, 9] + [TOY_EOS] * 14]
    assert float(dist.p.max()) == pytest.approx(0.3)
    assert dist.p.sort().values[:-1].tolist() == pytest.approx([0.7 / 81] * 81)
    long = [row[: row.index(TOY_EOS)] for row in dist.strings.tolist() if row[0] == 6]
    assert {tuple(t for t in row if t != 4) for row in long} == {(6, 7, 8, 9, 5, 9)}
    assert sorted(map(len, long))[0] == 6
    assert sorted(map(len, long))[-1] == 14
    assert len(set(map(tuple, long))) == 81


def test_answers_of_the_toy_are_read():
    ends = [TOY_EOS] * 3
    texts = [[6, 7, 8, 9, 5, 9, *ends], [6, 4, 7, 8, 4, 4, 9, 5, 9], [5, 9, *ends], [6, 7, 8, 5, 9, *ends], [6, 4, 4, 4, 7, 8, 9, 5, 9], []]
    assert [toy_kind([6, 7, 8, 9], t) for t in texts] == ["long", "long", "short", "wrong", "wrong", "wrong"]


def kinds(decoder, rows=40):
    toy, digits = toy_model(), [6, 7, 8, 9]
    out = decoder.generate(toy, torch.tensor([[*digits, 3]]).expand(rows, -1), max_new_tokens=16, do_sample=False)
    return {toy_kind(digits, c.tolist()) for c in out.continuations}


def test_a_perfect_model_falls_into_the_trap_and_early_rejection_gets_it_out():
    torch.manual_seed(0)
    assert kinds(LLaDA()) == {"short"}
    for decoder in (EOSER(), EOSER(gamma_min=0.01), LLaDA(block_length=4)):
        assert kinds(decoder) == {"long"}


def test_the_experiment_on_a_small_scale(monkeypatch, tokenizer):
    words = small_model(context=512)
    words.config.mask_token_id = PAD
    monkeypatch.setattr(Lab, "load", lambda self, role, cls=None: (words, tokenizer))
    monkeypatch.setattr(eoser_ass, "SOLVED", ("list_copy",))
    monkeypatch.setattr(eoser_ass, "GAMMAS", (0.4, 1.0))
    found = to_plain(eoser_ass.experiment(examples=4, length=32))
    assert json.loads(json.dumps(found)) == found
    assert list(found["arms"]) == list(arms(32))
    assert found["arms"]["full, 16"]["steps"] == 16
    assert found["arms"]["ASS, 5"]["steps"] == 5
    assert found["pairs"]["ASS - full"]["steps"] == {"difference": 0.0, "error": 0.0, "n": 4}
    assert len(found["watched"]["curve"]["step"]) == 16
    assert list(found["gamma"]) == ["0.4", "1.0"]
    assert list(found["longer"]) == [n for n in arms(64) if n.endswith(", 6")]
