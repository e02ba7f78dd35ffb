"""Experiments of A*-decoding: the toy chain against formulas, the noisy oracle, comparisons on the same samples."""

import random

import pytest

from decodelab.experiments.search.a_star import (
    TASK,
    chain_a_star,
    chain_best_of,
    chain_difference,
    chain_filter,
    chain_run,
    chain_value,
    difference,
    noisy_oracle,
    resampled,
)


def share(arm, runs=1500, **fields):
    rng = random.Random(1)
    return sum(arm(0.6, 3, 0.0, rng, **fields)[0] for _ in range(runs)) / runs


@pytest.mark.parametrize(
    ("arm", "fields", "expected"),
    [
        (chain_best_of, {"n": 1}, 0.6**3),
        (chain_best_of, {"n": 8}, 1 - (1 - 0.6**3) ** 8),
        (chain_filter, {"n": 1}, 0.6**3),
        (chain_a_star, {"k": 1}, 0.6**3),
        (chain_a_star, {"k": 4, "local": True}, (1 - 0.4**4) ** 3),
    ],
)
def test_an_exact_judge_has_the_accuracy_of_the_formula(arm, fields, expected):
    assert share(arm, **fields) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 1500) ** 0.5)


def test_costs_are_those_of_the_arms():
    rng = random.Random(0)
    assert chain_best_of(0.5, 6, 0.3, rng, n=16)[1:3] == (96, 16)
    assert chain_filter(0.5, 6, 0.3, rng, n=8)[1:3] == (48, 48)
    for _ in range(50):
        _, steps, calls, back = chain_a_star(0.3, 6, 0.5, rng, k=4, expansions=10)
        assert calls <= 40
        assert calls <= steps <= calls + 6
        assert back < 10


def test_a_run_has_every_seed_and_difficulty():
    run = chain_run(2, 0.1, 40, [1, 2])
    cell = run["best of 1"]
    assert (cell["problems"], len(cell["mean"]), len(cell["by_seed"])) == (20, 4, 2)
    assert chain_value(cell)[0] == pytest.approx(sum(cell["by_seed"]) / 2)
    value, low, high = chain_difference(run["PF 16"], cell)
    assert low < value < high
    assert run == chain_run(2, 0.1, 40, [1, 2])


def test_the_oracle_knows_and_its_noise_stays():
    example = TASK.examples(1)[0]
    lines = example.answer.splitlines(keepends=True)
    pairs = [(example.prompt, " " + lines[0]), (example.prompt, " 1 + 1 = 3\n"), (example.prompt, " " + example.answer)]
    assert noisy_oracle([example], 0.0, 0)(pairs) == [0.9, 0.25, 0.9]
    noisy = noisy_oracle([example], 0.3, 4)
    assert noisy(pairs) == noisy(pairs) == [noisy([pair])[0] for pair in pairs]
    assert noisy(pairs) != noisy_oracle([example], 0.3, 5)(pairs)
    assert all(0 <= r <= 1 for r in noisy(pairs))


def test_best_and_vote_of_the_first_samples():
    example = TASK.examples(1)[0]
    right, wrong = " " + example.answer, " The answer is 9999."
    found = resampled([wrong, right, right], [3, 4, 5], {"j": [0.1, 0.2, 0.9]}, example, (1, 2, 3))
    assert found["j: best of 2"] == (1.0, 7, 2)
    assert found["vote of 2"] == (0.0, 7, 0)
    assert found["vote of 3"] == (1.0, 12, 0)


def test_differences_are_paired():
    value, low, high = difference([0.5, 1.0, 0.0], [0.25, 0.75, -0.25])
    assert (value, low, high) == pytest.approx((0.25, 0.25, 0.25))
