"""PEARL's measurements: the clock, the simulations against closed forms, and the slower target."""

import numpy as np
import pytest
import torch
from toys import random_prompts

from decodelab.experiments.speculative.pearl import (
    accepted_runs,
    best_gamma,
    both,
    clock,
    gain,
    ideal,
    reused,
    simulate,
    speed,
    wall_clock,
)
from decodelab.speculative.model_drafter import example_drafter
from decodelab.speculative.pearl import tokens_per_round


@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("gamma", [1, 3, 6])
def test_simulated_rounds(alpha, gamma):
    assert simulate(alpha, gamma, rounds=60_000) == pytest.approx(tokens_per_round(alpha, gamma), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "alpha", "share"),
    [
        ("without pre", 0.3, 0.65),
        ("without pre", 0.8, 0.92),
        ("without pre", 0.95, 0.99),
        ("without post", 0.8, 0.90),
        ("without post", 0.95, 0.71),
    ],
)
def test_halves_left_out(kind, alpha, share):
    "Shares worked out beforehand for gamma 5."
    assert simulate(alpha, 5, kind, 60_000) / simulate(alpha, 5, rounds=60_000) == pytest.approx(share, abs=0.02)


def test_ideal_speeds():
    "PEARL over ordinary speculation at an acceptance of .9: 1.32 for c = 3 and c = 5."
    for c in (3, 5):
        mine, other = ideal(0.9, c)
        assert mine / other == pytest.approx(1.32, abs=0.01)
    assert ideal(0.6, 8)[0] < ideal(0.6, 8)[1] and ideal(0.7, 8)[0] > ideal(0.7, 8)[1]


def test_a_number_used_twice():
    fresh, again = reused(False), reused(True)
    assert fresh["total variation"] < 0.004 and again["total variation"] > 0.02
    assert fresh["tokens a round"] == pytest.approx(tokens_per_round(0.6, 4), abs=0.01) and again["tokens a round"] > 1.55


def test_the_clock():
    run = {"pairs": [[12, 3], [8, 4]]}
    assert speed(run, "ordinary", 4, 8.0) == pytest.approx(20 * 8 / (7 * 12))
    assert speed(run, "pearl", 4, 8.0) == pytest.approx(20 / 7)
    assert speed(run, "pearl", 16, 8.0, [1]) == pytest.approx(8 * 8 / (4 * 16))
    assert clock("plain", 5, 2, 4, 3.0) == 15
    runs = {"pearl 2": {"pairs": [[4, 2]]}, "pearl 4": {"pairs": [[4, 1]]}, "ordinary 2": {"pairs": [[4, 2]]}}
    assert best_gamma(runs, "pearl", 4.0)[0] == 4
    assert gain(runs, 4) == pytest.approx([4.0 / (16 / 12)] * 3)
    assert gain(runs, 4, "pearl") == pytest.approx([2.0] * 3)
    assert accepted_runs([4, 4, 2, 1], [3, 3, 3, 0]) == [9]


def test_runs_of_a_small_model(llama):
    drafter, prompts = example_drafter(llama), random_prompts(2, lengths=(4, 4), seed=1)
    inputs = {"input_ids": torch.cat(prompts), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    found = both(llama, drafter, inputs, (1, 3), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert list(found) == ["ordinary 1", "pearl 1", "ordinary 3", "pearl 3"]
    assert all(pair[0] == 9 for run in found.values() for pair in run["pairs"])
    wall = wall_clock(llama, drafter, prompts[:1], (1,), 6)
    assert set(wall["seconds"]) == {"plain", "ordinary 1", "pearl, one process", "pearl, two processes"}
    assert all(np.array(values).min() > 0 for values in wall["seconds"].values())
