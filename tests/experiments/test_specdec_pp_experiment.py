"""Experiments of SpecDec++: the plane of verification and discard rates, other stop rules, the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import left_pad, random_prompts

from decodelab.experiments.speculative.specdec_pp import (
    HeuristicLength,
    MaxProbability,
    best,
    gain,
    oracle_rounds,
    point,
    policies,
    rates,
    run_policies,
    speedup,
    zoo_heads,
)
from decodelab.speculative.model_drafter import example_drafter
from decodelab.speculative.specdec_pp import AcceptanceHead, AcceptanceHeadConfig, SpecDecPP

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 0}


@pytest.fixture(scope="module")
def drafter(llama):
    return example_drafter(llama)


def sharp_head(seed=0):
    "A random head whose answers depend strongly on the text."
    torch.manual_seed(seed)
    head = AcceptanceHead(AcceptanceHeadConfig(32, 1)).eval()
    with torch.no_grad():
        head.out.weight.mul_(30)
    return head


def run(decoder, model, prompt, seed=0, new=24, **kwargs):
    torch.manual_seed(seed)
    return decoder.generate(model, prompt, max_new_tokens=new, **(kwargs or SAMPLED))


@pytest.mark.parametrize("h", [0.0, 0.5, 1.0])
def test_drafted_tokens_are_all_accounted_for(llama, drafter, h):
    out = run(SpecDecPP(drafter, sharp_head(1), h=h, trace=True), llama, torch.tensor([[5, 6, 7]]), new=40, eos_token_id=None, **SAMPLED)
    discarded = sum(len(s.info["tokens"]) - len(s.info["path"]) for s in out.trace)
    assert out.stats.drafted == 40 + discarded - len(out.trace)
    assert rates(out.stats) == (len(out.trace) / 40, discarded / 40)


@given(v=st.floats(0.1, 1), d=st.floats(0, 3), c=st.floats(0.01, 0.99))
def test_speed_is_time(v, d, c):
    "Against the time itself: N_D draft forwards of c, N_T of 1."
    assert speedup(v, d, c) == pytest.approx(1 / (c * (1 + d - v) + v))
    assert speedup(1.0, 0.0, c) == pytest.approx(1)


def test_point_and_interval():
    counts = [[10, 5, 8], [20, 6, 20]]
    assert point(counts) == (11 / 30, (28 - 30 + 11) / 30)
    assert gain([(counts, counts, 0.1)]) == (1.0, 1.0, 1.0)
    slower = [[10, 8, 8], [20, 12, 20]]
    value, low, high = gain([(counts, slower, 0.1)])
    assert 1 < low <= value <= high
    assert gain([(counts, slower, 0.1), (slower, counts, 0.1)])[0] == pytest.approx(1)
    assert best({"K = 1": slower, "K = 2": counts, "head": slower}, "K", 0.1) == "K = 2"


def test_the_heuristic_schedule(llama, drafter):
    out = run(HeuristicLength(drafter), llama, torch.tensor([[5, 6, 7]]), new=60, eos_token_id=None, **SAMPLED)
    K, left = 5, 60
    for submitted, emitted in zip(out.stats.draft_lengths[0], out.stats.emitted[0], strict=True):
        assert submitted == min(K, left - 1)
        K = K + 2 if emitted - 1 == submitted else max(1, K - 1)
        left -= emitted


def test_other_stop_rules_in_a_batch(llama, drafter):
    prompts = random_prompts(4, seed=5)
    expected = [llama.generate(p, max_new_tokens=16, do_sample=False)[0, p.shape[1] :].tolist() for p in prompts]
    for decoder in (HeuristicLength(drafter), MaxProbability(drafter, h=0.5)):
        out = decoder.generate(llama, **left_pad(prompts), max_new_tokens=16, do_sample=False)
        assert [c.tolist() for c in out.continuations] == expected
        for row, prompt in enumerate(prompts):
            alone = run(decoder, llama, prompt, new=16, **GREEDY)
            assert out.stats.draft_lengths[row] == alone.stats.draft_lengths[0]


def test_max_probability_multiplies_the_largest_probabilities(llama, drafter):
    decoder = MaxProbability(drafter, h=0.9, K_max=8)
    prompt = torch.tensor([[5, 6, 7]])
    out = run(decoder, llama, prompt, new=20, eos_token_id=None, **GREEDY)
    ids, cum, k = prompt, 1.0, 0
    while True:
        with torch.no_grad():
            q = drafter(ids).logits[0, -1].softmax(-1)
        cum, k, ids = cum * float(q.max()), k + 1, torch.cat([ids, q.argmax()[None, None]], 1)
        if k >= 8 or (k >= 2 and 1 - cum > 0.9):
            break
    assert out.stats.draft_lengths[0][0] == k
    assert out.stats.new_tokens == 20


def test_oracle_rounds_by_force(llama, drafter):
    "Round by round: write with the drafter until it differs from the text."
    for seed, K_max in ((0, None), (1, 2), (2, None)):
        prompt = random_prompts(1, seed=seed)[0]
        text = llama.generate(prompt, max_new_tokens=24, do_sample=False)
        ids, rounds, end = prompt, [], text.shape[1]
        while ids.shape[1] < end:
            n = 0
            while ids.shape[1] + n < end - 1 and (K_max is None or n < K_max):
                with torch.no_grad():
                    candidate = drafter(text[:, : ids.shape[1] + n]).logits[0, -1].argmax()
                if candidate != text[0, ids.shape[1] + n]:
                    break
                n += 1
            rounds.append(n + 1)
            ids = text[:, : ids.shape[1] + n + 1]
        assert oracle_rounds(drafter, text, prompt.shape[1], K_max) == rounds
        assert sum(rounds) == 24


def test_no_policy_beats_the_oracle(llama, drafter):
    prompt = random_prompts(1, seed=6)[0]
    text = llama.generate(prompt, max_new_tokens=40, do_sample=False)
    least = len(oracle_rounds(drafter, text, prompt.shape[1])) / 40
    for decoder in policies(drafter, {"head w=6": sharp_head()}, lengths=(1, 4)).values():
        v, d = rates(run(decoder, llama, prompt, new=40, **GREEDY).stats)
        assert v >= least
        assert d >= 0


def test_run_policies(llama, drafter):
    made = policies(drafter, {"head": sharp_head()}, lengths=(2,))
    assert list(made) == ["K = 2", "heuristic", *(f"max-p, h = {h}" for h in (0.5, 0.7, 0.9, 0.97)), "head, h = 0.5", "head, h = 0.9"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    counts = run_policies(llama, left_pad(random_prompts(3)), made, max_new_tokens=10, eos_token_id=None, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
    assert all([row[0] for row in rows] == [10, 10, 10] for rows in counts.values())
    assert all(min(point(rows)) >= 0 for rows in counts.values())


def test_zoo_heads():
    heads = zoo_heads()
    assert [(h.config.w_rej, h.config.D) for h in heads.values()] == [(6.0, 3), (1.0, 3), (6.0, 0)]
    assert {p.dtype for h in heads.values() for p in h.parameters()} == {torch.float32}
