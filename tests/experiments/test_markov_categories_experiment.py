"""Markov categories, measured: texts of a source, probes and counts with known answers, codes that can be read back, drafters of a tiny model."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from toys import left_pad, random_prompts

from decodelab.experiments.theory.markov_categories import (
    FIRST,
    Positions,
    bigram_table,
    cubic_slope,
    drafter_figures,
    first_acceptance,
    merged,
    metric_figures,
)
from decodelab.experiments.theory.markov_sources import (
    arithmetic_code,
    counting_bias,
    drafted,
    fit_probes,
    graded_source,
    probed_source,
    sampled,
    source_model,
    spectral_toy,
    tabular_training,
    whitened,
)
from decodelab.speculative.drafters import DraftModel
from decodelab.theory.markov_categories import Source, best_losses, head_metric, random_source, softmax, surplus


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_texts_follow_their_source():
    source = random_source(2, 3, np.random.default_rng(0))
    ids = sampled(source, 6, 20_000, np.random.default_rng(1))
    assert ids.shape == (20_000, 6)
    for start in (0, 2):
        codes = ids[:, start : start + 4] @ np.array([27, 9, 3, 1])
        exact = source.joint(2).ravel()
        seen = np.bincount(codes, minlength=81)
        assert (((seen - 20_000 * exact) ** 2 / (20_000 * exact + 1e-9))[exact * 20_000 > 5]).sum() < 130  # chi-square, some 60 cells


def test_bias_falls_with_samples():
    source = random_source(2, 3, np.random.default_rng(0))
    found = counting_bias(source, (100, 2000), 20)
    raw, corrected = (np.mean(found[k], 1) for k in ("counted", "corrected"))
    assert raw[0] > raw[1] > 0 and abs(corrected[1]) < raw[1] < 0.03


@pytest.mark.parametrize("order", [1, 2])
def test_probe_with_a_known_answer(order):
    "Features are the last two tokens themselves: the bound must come near the exact surplus, and be about zero at order 1."
    source = random_source(order, 4, np.random.default_rng(order))
    eye = torch.eye(4)
    texts = torch.from_numpy(sampled(source, 5, 6000, np.random.default_rng(2)))
    features = eye[texts[:, 1:4]].flatten(1)
    later = eye[texts[:, 4]]
    train, held = slice(0, 4000), slice(4000, None)
    probe = fit_probes({"all": features[train]}, lambda rows: later[train][rows], 4, epochs=30, batch=200, rate=1e-2)["all"]
    loss = float(-(later[held] * probe(features[held])).sum(-1).mean())
    joint = source.joint(2)
    bound = best_losses(joint)["bigram"] - loss
    assert abs(bound) < 0.04 if order == 1 else 0.6 * surplus(joint) < bound < surplus(joint) + 0.05


def test_probe_starts_as_what_it_corrects():
    base = torch.tensor([0.5, 0.25, 0.25]).log()
    features = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    probes = fit_probes(
        {"a": features}, lambda rows: base.exp().expand(len(rows), 3), 3, bases={"a": lambda rows: base}, epochs=1, batch=32
    )
    assert probes["a"](features, base).exp() == pytest.approx(base.exp().expand(64, 3).numpy(), abs=1e-5)


def test_a_model_of_a_source_is_probed():
    source = random_source(1, 4, np.random.default_rng(3))
    found = probed_source(source, source_model(source, steps=5), texts=30)
    assert found["surplus"] == pytest.approx(0, abs=1e-9) and set(found["probes"]) == set(found["exact"])
    assert all(len(v) == 15 for v in found["probes"].values())


def test_gain_of_acceptance():
    rng = np.random.default_rng
    none = [drafted(graded_source(0.0, 4, rng(i)), 50_000, rng(9)) for i in range(3)]
    much = [drafted(graded_source(1.0, 4, rng(i)), 50_000, rng(9)) for i in range(3)]
    assert all(abs(f["surplus"]) < 1e-9 and abs(f["gain"]) < 0.01 for f in none)
    assert all(f["surplus"] > 0.1 and f["gain"] > 0.1 for f in much)


def test_a_table_learns_the_entropy_but_not_the_support():
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(4), 6)
    p[:, 0] = 0
    curve = tabular_training(p / p.sum(1, keepdims=True), (0, 50, 2000))
    assert curve[0]["loss"] > curve[1]["loss"] > curve[2]["loss"]
    assert abs(curve[2]["KL"]) < 0.01 and abs(curve[2]["TV"]) < 0.01 and curve[2]["chi2"] == pytest.approx(1)
    assert all(abs(row["KL"]) <= row["bound"] for row in curve)


def test_codes_can_be_read_back():
    source = random_source(2, 4, np.random.default_rng(5))

    def probs(past):
        return source.table[tuple(past[-2:])] if len(past) > 1 else np.full(4, 1 / 4)

    for seed in range(5):
        text = sampled(source, 40, 1, np.random.default_rng(seed))[0].tolist()
        code = arithmetic_code(text, probs)
        ideal = -sum(np.log2(probs(text[:i])[w]) for i, w in enumerate(text))
        assert ideal - 1e-6 <= len(code) <= ideal + 2
        number, low, width, read = Fraction(int(code, 2), 2 ** len(code)), Fraction(0), Fraction(1), []
        while len(read) < len(text):
            ends = [Fraction(float(x)) for x in np.concatenate([[0], np.cumsum(probs(read))])]
            ends[-1] = Fraction(1)
            token = next(w for w in range(4) if low + width * ends[w + 1] > number)
            low, width = low + width * ends[token], width * (ends[token + 1] - ends[token])
            read.append(token)
        assert read == text


def test_whitening():
    h = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    w = whitened(h)
    assert w.mean(0).abs().max() < 1e-10 and (w.T @ w / 30 - torch.eye(4)).abs().max() < 1e-10


@pytest.mark.parametrize("learnt", [False, True])
def test_spectral_toy(learnt):
    found = spectral_toy(0, learnt, contexts=30, vocab=8, d=3, steps=150)
    assert found["NLL"] < found["NLL at the start"] and found["J"] > found["J at the start"]
    assert found["J"] <= 1 + 1e-9 and found["trace"] <= 1 + 1e-9 and found["bound minus A"] >= 0


# drafters of a model


def test_merged_classes():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert merged(p, None) is p
    assert merged(p, torch.tensor([1, 3]))[0].tolist() == pytest.approx([0.2, 0.4, 0.4])


def test_bigrams_by_hand():
    table = bigram_table(np.array([0, 1, 0, 1, 0, 2]), 4)
    everything = np.array([2, 2, 1, 0]) + 0.1
    everything = everything / everything.sum()
    rows = table(torch.tensor([0, 3, -1, 0]))
    assert rows[0].tolist() == pytest.approx((np.array([0, 2, 1, 0]) + 2 * everything) / 5)
    assert rows[1].tolist() == rows[2].tolist() == pytest.approx(everything) and rows[3].tolist() == rows[0].tolist()
    some = bigram_table(np.array([0, 1, 0, 1, 0, 2]), 4, torch.tensor([1]))(torch.tensor([0]))
    assert some.shape == (1, 2) and float(some.sum()) == pytest.approx(1)


def test_positions_and_figures(llama):
    vocab = llama.config.vocab_size
    windows = torch.randint(5, vocab, (3, 20), generator=torch.Generator().manual_seed(2))
    held = Positions(llama, windows)
    count = 20 - FIRST - 1
    logits = llama(windows).logits
    assert held.token.view(3, count).tolist() == windows[:, FIRST + 1 :].tolist()
    everything = torch.arange(3 * count)
    p = held.target(everything).view(3, count, vocab)
    assert (p - logits[:, FIRST + 1 :].softmax(-1)).abs().max() < 1e-5
    assert (held.h.view(3, count, -1) @ held.G.T - logits[:, FIRST:-1]).abs().max() < 1e-4
    drafters = {
        "itself": lambda rows: held.target(rows).log(),
        "flat": lambda rows: torch.full((len(rows), vocab), -np.log(vocab)),
        "late": lambda rows: (held.h[rows] @ held.G.T).log_softmax(-1),  # negative control: one position too early
    }
    found = drafter_figures(held, drafters)
    own, flat, late = (found["drafters"][name] for name in drafters)
    assert own["KL"] == pytest.approx([0] * 3, abs=1e-5) and own["overlap"] == pytest.approx([1] * 3, abs=1e-5) and own["agree"] == [1] * 3
    assert own["entropy"] == pytest.approx(found["target entropy"], abs=1e-5)
    assert flat["KL"] == pytest.approx([np.log(vocab) - h for h in found["target entropy"]], abs=1e-4)
    assert min(late["KL"]) > 1e-3 and max(late["overlap"]) < 0.999
    kept = torch.arange(0, vocab, 2)
    some = Positions(llama, windows, kept).target(everything)
    assert some.shape == (3 * count, len(kept) + 1) and (some - merged(p.flatten(0, 1), kept)).abs().max() < 1e-6


def test_first_tokens_of_drafts(llama):
    inputs = left_pad(random_prompts(3, seed=2))
    assert first_acceptance(DraftModel(llama, 3), llama, inputs, 12) == {
        "accepted": [2] * 3,
        "rounds": [2] * 3,
        "tokens": [12] * 3,
        "forwards": [3] * 3,
    }


def test_metric_of_a_head():
    rng = np.random.default_rng(6)
    G, h = rng.normal(size=(9, 4)) * [3.0, 1.0, 1.0, 0.1], rng.normal(size=(12, 4))
    found = metric_figures(h, G, step=0.01)
    values = np.array(found["eigenvalues"])
    assert (np.diff(values) <= 0).all() and 1 <= found["participation"] <= 4
    assert values.sum() == pytest.approx(np.trace(np.mean([head_metric(softmax(G @ x), G) for x in h], 0)))
    for end, name in ((0, "top"), (-1, "bottom")):  # small steps: half the eigenvalue times the squared step
        assert np.mean(found["moved"][name]) == pytest.approx(found["step"] ** 2 / 2 * values[end], rel=0.05)
    assert np.mean(found["moved"]["top"]) > np.mean(found["moved"]["random"]) > np.mean(found["moved"]["bottom"])
    assert cubic_slope(h[0], G, rng.normal(size=4)) == pytest.approx(3, abs=0.15)


def test_a_source_must_be_one():
    with pytest.raises(ValueError, match="sum to 1"):
        Source(np.full((2, 2), 0.6))
