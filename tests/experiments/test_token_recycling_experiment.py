"""What the experiments of Token Recycling are made of."""

import pytest
from toys import random_prompts

from decodelab.experiments.speculative.token_recycling import LEARNING, arms, learning, per_forward, used
from decodelab.speculative.token_recycling import TokenRecycling


def test_arms():
    found = arms(["0", "00"])
    assert [type(d).__name__ for d in found.values()] == ["Autoregressive", "TokenRecycling", "TokenRecycling"]
    assert (len(found["token recycling, 80 nodes"].paths), found["token recycling, fitted"].paths) == (80, ["0", "00"])


def test_tokens_of_one_way_over_those_of_another():
    assert per_forward([[2, 2], [4]], [[1, 1, 1, 1], [2, 2]])[0] == pytest.approx(2.0)
    assert per_forward([[3, 1]], [[3, 1]])[0] == 1.0


def test_a_hot_table_is_inherited_and_a_cold_one_is_not(llama):
    prompts = random_prompts(1, lengths=(6, 6), seed=1) * 2
    hot, cold = (used(llama, TokenRecycling(**LEARNING[n]), prompts, max_new_tokens=24, do_sample=False) for n in ("hot", "cold"))
    assert cold[0] == cold[1] == hot[0]
    assert len(hot[1]) < len(hot[0])
    found = learning(llama, prompts, 24)
    assert set(found["table"]) == set(LEARNING)
    assert found["table"]["cold"]["over cold"][0] == 1.0
    assert found["table"]["hot"]["over cold"][0] == pytest.approx(len(cold[0] + cold[1]) / len(hot[0] + hot[1]))
    assert found["along"]["cold"][:5] == [float(n) for n in cold[0][:5]]
