"""Experiments of PG-TD: what was tried is nested, the best is chosen by the public reward alone, and the baseline is the one described."""

import pytest
import torch

from decodelab.experiments.search.pg_td import (
    SMCGTD,
    TOY_BUDGETS,
    ExerciseTests,
    best_at,
    right_part,
    toy_arms,
    toy_caches,
    toy_problem,
    toy_run,
    tried,
)
from decodelab.lab.table_model import table_model
from decodelab.lab.tasks.programs import ListProgramTask, pass_rates, program_of
from decodelab.search.scorers import reads


def test_the_best_within_a_budget_is_the_first_of_equals():
    found = [(1, [1]), (1, [3]), (2, [5]), (4, [5, 5]), (8, [9])]
    assert best_at(found, lambda text: text[0], (1, 2, 4, 8)) == [[3], [5], [5], [9]]


def test_right_part():
    assert right_part([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert right_part([1, 2], [1, 2]) == 1.0
    table, target = toy_problem(3)
    last = 0
    for symbol in target:
        assert symbol in table[last].topk(3).indices
        last = symbol


def test_rewards_never_fall_with_the_budget_and_planning_is_never_below_greedy():
    for seed in range(2):
        run = toy_run(seed)
        for values in run.values():
            assert values == sorted(values)
            assert len(values) == len(TOY_BUDGETS)
        assert all(a >= b for a, b in zip(run["PG-TD"], run["greedy"]))
        assert toy_caches(seed, rollouts=24)["same"]


def smc(n, generations, seed=0, reward=None):
    table, target = toy_problem(1)
    scorer = reads("ids")(lambda texts: [right_part(t, target) if reward is None else reward for t in texts])
    start = torch.zeros(1, 1, dtype=torch.long)
    inputs = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    torch.manual_seed(seed)
    return tried(SMCGTD(n=n, scorer=scorer, generations=generations), table_model(table), inputs, max_new_tokens=8, do_sample=True, top_k=3)


def test_sequential_monte_carlo_stops_at_its_generations_and_completes_greedily():
    table, _ = toy_problem(1)
    found, stats = smc(6, 9)
    assert found[-1][0] == 9
    assert [g for g, _ in found] == sorted(g for g, _ in found)
    for _, text in found:
        assert len(text) == 8
    first = found[0][1]
    assert all(b == int(table[a].argmax()) for a, b in zip(first, first[1:]))  # one sampled symbol, then greedy
    assert stats.search[0]["scorer_calls"] == len({tuple(t) for _, t in found})


def test_sequential_monte_carlo_resamples_by_fitness():
    found, _ = smc(8, 1000, reward=0.0)  # all zero: uniform, and it goes on to the end
    assert len(found) == 8 * 8
    assert smc(8, 1000)[0] == smc(8, 1000)[0] != smc(8, 1000, seed=1)[0]


def test_tests_are_run_once_and_private_ones_are_kept_apart():
    example = ListProgramTask().examples(1)[0]

    class Words:
        def decode(self, ids, skip_special_tokens):
            return {1: example.answer, 2: "return xs"}[ids[0]]

    tests = ExerciseTests(example, Words())
    assert tests.shares([1]) == (1.0, 1.0)
    public = pass_rates(example, ["return xs"], "public")[0]
    assert tests.scorer(tests.public)([[2], [1]]) == [public, 1.0]
    assert tests.scorer(1, 0.25)([[1]])[0] == pytest.approx(1 + 0.25 * 2.718281828459045 ** (-1 / 20))
    assert len(tests.passed) == 2


def test_arms_of_the_toy():
    arms = toy_arms(reads("ids")(lambda texts: [0.0] * len(texts)))
    assert [name for name, (_, sample) in arms.items() if sample] == ["S+F", "SMCG-TD"]
    assert arms["PG-TD"][0].generations == arms["SMCG-TD"][0].generations == arms["S+F"][0].n == TOY_BUDGETS[-1]


def test_a_program_ends_at_its_first_blank_line():
    assert program_of(" return 1\n\nprint(2)") == "def f(xs):\n    return 1\n"
