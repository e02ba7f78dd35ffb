"""Scylla's measurements: drafters with a schedule of their own, counts of a run, the source without entropy, speeds of depths."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import left_pad, random_prompts

from decodelab.experiments.theory import scylla
from decodelab.experiments.theory.scylla import (
    acceptance_of,
    alone_and_together,
    depth_speeds,
    deterministic_source,
    fits_of,
    machine_of,
    position_acceptance,
    small_drafter,
    table_of,
    width_slope,
)
from decodelab.speculative.model_drafter import example_drafter
from decodelab.theory.scylla import chain_tokens

SMALL = {"hidden_size": 16, "intermediate_size": 32, "heads": 2, "block": 16, "batch_size": 2}


def test_a_drafter_learns_and_its_run_can_be_made_again(tokenizer):
    stream = np.tile(np.arange(5, 13), 40).astype(np.int32)  # what follows is certain
    batch = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    losses = []
    for steps in (1, 40):
        model, tokens = small_drafter(tokenizer, stream, steps, 2, **SMALL)
        again, _ = small_drafter(tokenizer, stream, steps, 2, **SMALL)
        assert tokens == steps * 32 and model.config.num_hidden_layers == 2 and not model.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
        with torch.no_grad():
            losses.append(float(model(batch, labels=batch).loss))
    assert losses[1] < losses[0] - 0.5


def test_counts_of_a_run(llama):
    inputs = left_pad(random_prompts(3, seed=2))
    plain = llama.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    own = acceptance_of(llama, llama, inputs, 2, 12, plain)
    assert own == {"counts": [[12, 4]] * 3, "accepted": [0, 0, 9], "same text": True}
    other = acceptance_of(llama, example_drafter(llama), inputs, 2, 12, plain)
    assert other["same text"] and len(other["accepted"]) == 3
    assert all(tokens == 12 and 4 <= forwards <= 12 for tokens, forwards in other["counts"])
    assert sum(other["accepted"]) == sum(forwards - 1 for _, forwards in other["counts"])
    assert not acceptance_of(llama, llama, inputs, 2, 12, plain + 1)["same text"]


def test_batches_are_compared_with_single_prompts(llama, tokenizer):
    texts = ["abc", "hello there", "q"]
    assert alone_and_together(llama, example_drafter(llama), tokenizer, texts, 3, 10)


def test_a_source_without_entropy_by_hand():
    "A cycle of 8: after n tokens n - 1 transitions are known; a row starts at each token."
    found = deterministic_source((4, 9, 30), vocab=8, g=2, max_new_tokens=12)
    assert found[1:] == [[96, 8 * 4]] * 2
    assert found[0][0] == 96 and 8 * 4 < found[0][1] <= 8 * 12


def test_acceptance_by_position():
    assert position_acceptance([50, 25, 25]) == pytest.approx([0.5, 0.5])
    assert position_acceptance([1, 0, 0, 3]) == pytest.approx([0.75, 1, 1])
    assert np.isnan(position_acceptance([4, 0, 0])).tolist() == [False, True]


def test_the_grid_as_a_table():
    grid = [{"layers": D, "tokens": n, "counts": [[D * n, 1], [2, 1]]} for n in (10, 20) for D in (1, 3)]
    table = table_of({"grid": grid, "depths": [1, 3], "tokens": [10, 20]})
    assert table.shape == (2, 2, 2, 2)
    assert table[:, :, 0, 0].tolist() == [[10, 20], [30, 60]]


def test_fits_of_a_line():
    x, rng = [1e3, 1e4, 1e5, 1e6], np.random.default_rng(0)
    tau = np.array([1.5, 1.9, 2.3, 2.7])
    found = fits_of(x, tau, tau + rng.normal(0, 0.05, (400, 4)))
    assert found["slope"] == pytest.approx(0.4) and found["R2"] == pytest.approx(1) and found["best shape"] == "line"
    assert found["low"] < 0.4 < found["high"] and found["extrapolated minus measured"] == pytest.approx(0, abs=1e-9)
    assert found["AIC of the line above it"] == 0
    assert fits_of(x, np.array([1.5, 2.5, 2.55, 2.56]), tau + rng.normal(0, 0.01, (400, 4)))["best shape"] != "line"


def test_speeds_of_depths_by_force():
    curve = {"tokens": [1, 2, 4, 16], "relative": [1.0, 1.2, 1.4, 3.0]}
    stored = {"depths": [1, 4], "g": 3, "curves": {"target": curve}, "draft costs": {"1": 0.1, "4": 0.5}}
    alphas = (0.6, 0.7)
    found = depth_speeds(stored, np.array([chain_tokens(a, 4) for a in alphas]), widths=(2, 3, 6))
    for a, c, value in zip(alphas, (0.1, 0.5), found):
        by_hand = [sum(a**i for i in range(W)) / (np.interp(W, curve["tokens"], curve["relative"]) + (W - 1) * c) for W in (2, 3, 6)]
        assert value == pytest.approx(max(by_hand), rel=1e-6)
    assert machine_of(curve).seconds(3) == pytest.approx(1.3)


def test_slope_of_widths():
    assert width_slope(np.array([7, 5, 3, 1]), [1, 2, 4, 8]) == pytest.approx(-2)


def test_the_grid_of_a_real_model(llama, tokenizer, monkeypatch):
    "Two depths, two amounts of answers: counts add up, the text stays the plain one, more answers are more tokens."
    asked = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8]])]
    monkeypatch.setattr(scylla, "spec_bench_prompts", lambda *args, **kwargs: (asked, ["a", "b"]))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    lab = SimpleNamespace(target=lambda: (llama, tokenizer), names={"target": "tales"}, seed=0)
    small = {"tokens": 0, "chat": False, "new_tokens": 6, "held_out": 2, "bfloat16": False, "r": 2, "alpha": 4, "batch_size": 2}
    found = scylla.on_real_model(lab, (2, 4), ("0", "0,1"), 1, 2, 8, **small)
    assert found["depths"] == [1, 2] and found["texts"] == [2, 4] and found["tokens"][0] < found["tokens"][1]
    assert [run["layers"] for run in found["grid"]] == [1, 1, 2, 2] and all(run["same text"] for run in found["grid"])
    assert table_of(found).shape == (2, 2, 2, 2) and (table_of(found)[..., 0] == 8).all()
