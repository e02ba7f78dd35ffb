"""Experiments of LongSpec: arms trained alike, overlap along a text, a memory that is weighed."""

import numpy as np
import pytest
import torch
from toys import VOCAB, small_model

from decodelab.experiments.speculative.longspec import (
    BINS,
    along,
    distances,
    emitted,
    memory_curve,
    quick_drafters,
    target_losses,
    tokens_per_forward,
)
from decodelab.speculative.longspec import LongSpec
from decodelab.speculative.longspec_drafter import new_drafter, target_states
from decodelab.training.longspec import LongSpecRecipe, next_token_loss

SETTINGS = LongSpecRecipe(window=8, block=16, offset_max=64, batch_size=4, warmup=1)


@pytest.fixture(scope="module")
def model():
    return small_model(hidden=16, context=BINS[-1], seed=2).requires_grad_(False)


@pytest.fixture(scope="module")
def stream():
    return np.resize(np.random.default_rng(0).integers(2, VOCAB, 37), 4000)  # repeats itself


def one(model, stream, steps, **changes):
    "An arm that is trained alone."
    drafters, losses = quick_drafters(model, stream, SETTINGS, steps, {"arm": changes})
    return drafters["arm"], losses["arm"]


def test_a_short_training_lowers_the_loss(model, stream):
    _, losses = one(model, stream, 40)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert one(model, stream, 40)[1] == losses
    assert one(model, stream, 3, lag_max=1)[1] != one(model, stream, 3)[1]


def test_arms_side_by_side_are_arms_alone(model, stream):
    "Arms share what the target says only where they have the same positions; shifted ones are not those of the ordinary arm."
    arms = {"shifted": {}, "ordinary": {"offset_max": 0}, "lag 1": {"lag_max": 1}, "blind": {"lag_max": 0}}
    _, losses = quick_drafters(model, stream, SETTINGS, 4, arms)
    for arm, changes in arms.items():
        assert losses[arm] == one(model, stream, 4, **changes)[1]
    assert len({tuple(values) for values in losses.values()}) == 4
    ids, plan = torch.from_numpy(stream[:16].copy())[None], torch.arange(16)
    drafter = new_drafter(model, 8).requires_grad_(False)
    states = target_states(model, ids, plan + 7)
    known = next_token_loss(drafter, model, ids, plan, 1, states)
    assert float(known) != float(next_token_loss(drafter, model, ids, plan, 1))
    assert float(next_token_loss(drafter, model, ids, plan + 7, 1, states)) == float(next_token_loss(drafter, model, ids, plan + 7, 1))


def test_without_cross_attention_the_target_has_no_say(model, stream):
    drafter, _ = one(model, stream, 2, lag_max=0)
    texts = torch.from_numpy(stream[: BINS[-1]].copy())[None]
    states = target_states(model, texts)
    spoilt = (states[0] + 3.0, states[1] - 1.0, states[2])
    assert along(drafter, model, texts, [states], blind=True, lags=(1,)) == along(drafter, model, texts, [spoilt], blind=True, lags=(1,))
    assert along(drafter, model, texts, [states], lags=(1,)) != along(drafter, model, texts, [spoilt], lags=(1,))


def test_shapes_of_what_is_stored(model, stream):
    drafter, _ = one(model, stream, 1)
    texts = torch.from_numpy(stream[: BINS[-1]].copy())[None]
    states = [target_states(model, texts)]
    measured = along(drafter, model, texts, states, lags=(1, 2))
    assert np.shape(measured["bins"]) == (1, len(BINS) - 1)
    assert np.shape(measured["depths"]) == (1, 2)
    assert np.isfinite(measured["bins"]).all()
    losses = target_losses(model, texts, states, block=16, offset=50)
    assert np.shape(losses["ordinary, shifted"]) == (1, 2)
    assert losses["ordinary, shifted"][0][0] != losses["ordinary, shifted"][0][1]
    rates = tokens_per_forward({"tree": LongSpec(drafter), "chain": LongSpec(drafter, widths=(1, 1))}, model, texts, (5, 20), new_tokens=6)
    assert set(rates) == {"tree", "chain"}
    assert all(1 <= rate <= 6 for rows in rates.values() for row in rows for rate in row)


def test_the_memory_is_that_of_the_window():
    small, large = memory_curve((20, 90), window=16, rounds=3)
    assert small["bytes"] == large["bytes"]
    assert large["own cache"] - small["own cache"] == 70 * 2 * 4 * 192


def test_what_the_rules_emit():
    "By hand; the exact rule at random, and a drafter that is right."
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.8, 0.1, 0.1]]).double()
    # 0.5 / 0.8 = 0.625 is kept; else p
    np.testing.assert_allclose(emitted(p, q, "released chain")[0], [0.8125, 0.09375, 0.09375])
    # else norm((p - q)_+) = (0, 1/2, 1/2): there the second child is kept for certain (1/2 over 1/10)
    np.testing.assert_allclose(emitted(p, q, "released tree", 2)[0], [0.625, 0.375, 0.0], atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(2 * torch.randn(50, 7, generator=generator).double(), -1) for _ in range(2))
    for width in (1, 2, 4, 7):
        np.testing.assert_allclose(emitted(p, q, "exact", width), p, atol=1e-12)
        assert (emitted(p, q, "released tree", width) - p).abs().sum(-1).min() > 1e-3
    # a drafter that is confident and right is kept for certain
    certain = torch.nn.functional.one_hot(p.argmax(-1), 7).double()
    np.testing.assert_allclose(emitted(certain, certain, "released chain"), certain)


def test_distances_along_a_text(model, stream):
    drafter, _ = one(model, stream, 2)
    texts = torch.from_numpy(stream[:60].copy())[None]
    found = distances(drafter, model, texts, [target_states(model, texts)])
    assert found["exact"][0] < 1e-12
    assert found["released chain"][0] > 1e-3
    assert found["released tree"][0] > 1e-3
