"""CCD's experiments: drift and its measure against their definitions; the experiment on a small scale."""

import json
import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import PAD, Wandering, small_model

from decodelab.diffusion.ccd import entropy
from decodelab.experiments.diffusion import ccd
from decodelab.experiments.diffusion.ccd import arms, disagreement, drift, drift_aucs, stratified_auc, watch_distributions
from decodelab.lab.lab import Lab
from decodelab.lab.provenance import to_plain
from decodelab.lab.tasks.text import ListTask

MASK, VOCAB = 0, 9


def h(p):
    return -sum(x * math.log(x) for x in p if x > 0)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (4, 3), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, 0] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


@given(st.integers(1, 5), st.integers(2, 40), st.floats(0.1, 6), st.integers(0, 10**6))
def test_entropy_of_the_average_is_average_entropy_plus_divergence(k, vocab, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(3, k, vocab, generator=generator, dtype=torch.double)).softmax(-1)
    mean = p.mean(1, keepdim=True)
    jsd = (p * (p.log() - mean.log())).sum(-1).mean(-1)  # mean of KL(p_k, pbar)
    assert torch.allclose(entropy(mean[:, 0]) - entropy(p).mean(-1), jsd, atol=1e-6)
    assert torch.allclose(disagreement(p), jsd, atol=1e-6)
    assert bool((jsd > 1e-9).all()) == (k > 1)


def test_disagreement_is_zero_when_all_distributions_coincide_and_largest_when_they_exclude_each_other():
    same = torch.tensor([[0.5, 0.5, 0.0]]).expand(4, -1)
    assert float(disagreement(same)) == 0.0
    assert float(disagreement(torch.eye(4))) == pytest.approx(math.log(4))
    assert float(entropy(torch.eye(4)).sum()) == 0.0


def test_stratified_auc_counts_pairs():
    generator = torch.Generator().manual_seed(3)
    score = pd.Series(torch.randint(0, 6, (60,), generator=generator).tolist(), dtype=float)
    label = pd.Series((torch.rand(60, generator=generator) < 0.4).tolist())
    strata = pd.Series(torch.randint(0, 4, (60,), generator=generator).tolist())

    def by_pairs(same):
        pairs = [(i, j) for i in range(60) for j in range(60) if label[i] and not label[j] and same(i, j)]
        return sum((score[i] > score[j]) + (score[i] == score[j]) / 2 for i, j in pairs) / len(pairs)

    assert stratified_auc(score, label) == pytest.approx(by_pairs(lambda i, j: True))
    assert stratified_auc(score, label, strata) == pytest.approx(by_pairs(lambda i, j: strata[i] == strata[j]))
    assert math.isnan(stratified_auc(score, label & False))


def test_drift_is_what_the_definition_says(prompts):
    model, d, new = Wandering(0.6), 2, 9
    watched = watch_distributions(model, **prompts, max_new_tokens=new, do_sample=False)
    lines = drift(watched, d).set_index(["step", "row", "position"])
    dists, masked = [p.tolist() for p in watched.p], [h.tolist() for h in watched.masked]
    cases = [(t, r, i) for t in range(d, new) for r in range(4) for i in range(new) if masked[t][r][i]]
    assert sorted(lines.index) == sorted(cases)
    assert 0 < lines["changes"].mean() < 1
    for t, r, i in cases:
        best = [max(range(VOCAB), key=dists[u][r][i].__getitem__) for u in range(new) if masked[u][r][i]]
        past = [dists[u][r][i] for u in range(t - d, t + 1)]
        mean = [sum(x) / (d + 1) for x in zip(*past)]
        line = lines.loc[(t, r, i)]
        assert line["changes"] == any(b != best[t] for b in best[t:])
        assert line["entropy"] == pytest.approx(h(past[-1]), abs=1e-4)
        assert line["disagreement"] == pytest.approx(h(mean) - sum(map(h, past)) / (d + 1), abs=1e-4)


def test_watching_leaves_nothing_behind_from_one_call_to_the_next(prompts):
    model = Wandering(0.6)
    first, second = (watch_distributions(model, **prompts, max_new_tokens=new, do_sample=False) for new in (9, 5))
    assert [len(first.p), len(second.p)] == [len(first.masked), len(second.masked)] == [9, 5]
    assert [w.out.sequences.shape[1] - prompts["input_ids"].shape[1] for w in (first, second)] == [9, 5]


def test_drift_aucs_have_errors_and_see_a_planted_effect():
    generator = torch.Generator().manual_seed(0)
    entropies, noise = torch.rand(2000, generator=generator), torch.rand(2000, generator=generator)
    changes = torch.rand(2000, generator=generator) < 0.2 + 0.6 * noise
    columns = {"row": torch.arange(2000) % 20, "entropy": entropies, "disagreement": noise, "changes": changes}
    found = drift_aucs(pd.DataFrame({k: v.numpy() for k, v in columns.items()}))
    assert found["disagreement"]["value"] > 0.6
    assert found["disagreement, equal entropy"]["value"] == pytest.approx(found["disagreement"]["value"], abs=0.02)
    assert found["entropy"]["value"] == pytest.approx(0.5, abs=0.05)
    assert all(0.001 < v["error"] < 0.05 for v in found.values())


def test_the_experiment_on_a_small_scale(monkeypatch, tokenizer):
    model = small_model(context=512)
    model.config.mask_token_id = PAD
    monkeypatch.setattr(Lab, "load", lambda self, role: (model, tokenizer))
    monkeypatch.setattr(ccd, "HARD", (ListTask("copy", 2),))
    few = ("baseline", "CCD", "CCD-DS", "CCD, token of the step", "CCD-DS, token of the step", "released code")
    monkeypatch.setattr(ccd, "arms", lambda **fields: {name: d for name, d in arms(**fields).items() if name in few})
    monkeypatch.setattr(ccd, "sweeps", dict)
    found = to_plain(ccd.experiment(examples=6))
    assert json.loads(json.dumps(found)) == found
    assert list(found["arms"]) == list(few)
    assert found["arms"]["baseline"]["steps"] == found["arms"]["CCD"]["steps"] == 32
    assert found["plateaus"]["baseline"]["steps"] == 64
    assert set(found["drift"]) == {"entropy", "disagreement", "disagreement, equal entropy"}
