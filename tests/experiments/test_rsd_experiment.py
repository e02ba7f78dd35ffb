"""Experiments of RSD: equal budgets, block efficiency and its intervals."""

import pytest
import torch

from decodelab.experiments.speculative.rsd import SHAPES, difference, efficiency, measure, same_budget, unaligned
from decodelab.lab.table_model import table_model
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.rsd import RSDC, RSDS


@pytest.mark.parametrize("budget", SHAPES)
def test_all_arms_have_the_budget(budget):
    for name, decoder in same_budget(None, budget).items():
        if isinstance(decoder, RSDC):
            nodes = sum(int(torch.tensor(decoder.b[:n]).prod()) for n in range(1, len(decoder.b) + 1))
        elif isinstance(decoder, RSDS):
            nodes = decoder.W * decoder.L
        else:
            nodes = decoder.gamma if isinstance(decoder, DraftModel) else decoder.K * decoder.L
        assert nodes == budget, name


def test_measured_block_efficiency_is_the_exact_one():
    "For a chain on a table whose rows are equal the number of tokens is known."
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(4, -1), torch.tensor([0.1, 0.5, 0.3, 0.1]).expand(4, -1)
    inputs = {"input_ids": torch.ones(400, 1).long(), "attention_mask": torch.ones(400, 1).long()}
    found = measure(DraftModel(table_model(q), 2), table_model(p), inputs, 1.0, 40, seed=0)
    value, low, high = difference([(found, None)])
    assert value == efficiency(found)
    assert high - low < 0.08
    assert value == pytest.approx(1 + 0.7 + 0.49, abs=1.5 * (high - low))
    assert found["levels"] == 2
    assert found["drafted"] < 2.0  # the last rounds draft less


def test_the_difference_is_paired():
    hard, easy = {"tokens": [10, 30, 50], "rounds": [10, 10, 10]}, {"tokens": [12, 32, 52], "rounds": [10, 10, 10]}
    value, low, high = difference([(easy, hard)])  # each prompt differs by 0.2, whatever the prompts are
    assert value == pytest.approx(0.2)
    assert high - low < 1e-9
    assert difference([(easy, hard), (hard, easy)])[0] == pytest.approx(0)


def test_arms_on_tables_have_their_own_streams():
    found = unaligned(2, seed=1, rows=8)
    assert all(len(pairs) == 2 for pairs in found.values())
    assert len({tuple(pairs) for pairs in found.values()}) == len(found)
