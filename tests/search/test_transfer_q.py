"Transfer Q*: enumerated trees against brute force, the theorem's inequalities, estimators of indirect transfer, and the decoder against a plain loop."

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from toys import EOS, VOCAB, fit, left_pad, random_prompts, small_model

from decodelab.experiments.search.transfer_q import (
    WatchedTransferQ,
    aligned,
    divergence,
    indirect,
    joint,
    ladder,
    random_tree,
    resampled,
    summary,
    tilt,
    token_policy,
    values,
)
from decodelab.lab.table_model import random_table, table_model
from decodelab.sampling.base import Autoregressive
from decodelab.search.base import Budget
from decodelab.search.scorers import reads
from decodelab.search.transfer_q import TransferQ, rollout_value, tilted

GREEDY = {"max_new_tokens": 6, "do_sample": False}
SAMPLE = {"max_new_tokens": 6, "do_sample": True, "top_k": 0}


@reads("ids")
def parity(texts):
    "A reward without structure: 0 to 6."
    return [float(sum((i + 2) * t for i, t in enumerate(text)) % 7) for text in texts]


@reads("ids")
def remainder(texts):
    "Another one: 0 to 4."
    return [float(sum((i + 1) * t for i, t in enumerate(text)) % 5) for text in texts]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def prompt():
    return random_prompts(1, lengths=(7, 7), seed=3)[0]


def trees(n=40):
    rng = np.random.default_rng(1)
    return [(*random_tree(rng), rng.random((3,) * 4)) for _ in range(n)]


# enumerated trees


def test_values_are_those_of_brute_force():
    policy, reward, _ = trees(1)[0]
    q = values(policy, reward)
    for t in range(4):
        for prefix in itertools.product(range(3), repeat=t + 1):
            total = 0.0
            for rest in itertools.product(range(3), repeat=3 - t):
                text = (*prefix, *rest)
                total += math.prod(policy[i][text[: i + 1]] for i in range(t + 1, 4)) * reward[text]
            assert q[t][prefix] == pytest.approx(total, abs=1e-12)
    assert joint(policy).sum() == pytest.approx(1)
    assert all(np.allclose(a, b) for a, b in zip(token_policy(joint(policy)), policy))


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
def test_the_theorem_holds_on_every_tree(alpha, beta):
    for policy, reward, _ in trees():
        row = ladder(policy, reward, alpha, beta)
        assert min(v for name, v in row.items() if name.startswith("slack")) > -1e-12


def test_bounds_can_fail():
    "Rollouts of the unaligned policy under the aligned one's distribution: no bound promises anything, and improvement over alpha KL is lost."
    worse = 0
    for policy, reward, _ in trees():
        base = aligned(policy, reward, 0.1)
        mixed = joint(tilt(base, values(policy, 1 - reward), 0.3))
        worse += float((mixed * reward).sum() - (joint(base) * reward).sum()) - 0.3 * divergence(mixed, joint(base)) < -1e-9
    assert worse > 30


def test_an_aligned_oracle_is_better_on_average():
    rows = [ladder(policy, reward, 0.3, 0.3) for policy, reward, _ in trees()]
    mean = {name: np.mean([row[name] for row in rows]) for name in ("unaligned", "CD", "aligned", "Transfer Q*")}
    assert mean["unaligned"] < mean["CD"] < mean["Transfer Q*"] > mean["aligned"]


def test_limits_of_alpha():
    policy, reward, _ = trees(1)[0]
    base = aligned(policy, reward, 0.3)
    q = values(base, reward)
    assert np.abs(joint(tilt(base, q, 1e6)) - joint(base)).sum() / 2 < 1e-5
    assert all((p.argmax(-1) == v.argmax(-1)).all() and p.max(-1).min() > 1 - 1e-9 for p, v in zip(tilt(base, q, 1e-6), q))


def test_soft_values_give_the_aligned_policy_and_iteration_climbs_to_the_best():
    policy, reward, _ = trees(1)[0]
    beta = 0.3
    soft = [beta * np.log(v) for v in values(policy, np.exp(reward / beta))]
    for mine, base in zip(tilt(policy, soft, beta), aligned(policy, reward, beta)):
        assert np.allclose(mine, base, atol=1e-12)
    current, reached = policy, []
    for _ in range(200):
        reached.append(float((joint(current) * reward).sum()))
        current = tilt(current, values(current, reward), beta)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(reached))
    assert reached[-1] == pytest.approx(reward.max(), abs=1e-3)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
def test_self_normalised_weights_are_exact_and_others_are_not(beta):
    found = [indirect(policy, reward, other, 0.3, beta) for policy, reward, other in trees()]
    assert max(row["error normalised"] for row in found) < 1e-12
    assert max(row["flips normalised"] for row in found) == 0
    assert np.mean([row["flips official"] for row in found]) > 0.05
    same = indirect(*trees(1)[0][:2], trees(1)[0][1], 0.3, beta)
    assert same["effective share"] == pytest.approx(1)
    assert same["uncorrected"] == pytest.approx(same["normalised"])


def test_fewer_rollouts_count_where_rewards_differ_more():
    share = [np.mean([indirect(p, r, b, 0.3, beta)["effective share"] for p, r, b in trees()]) for beta in (1.0, 0.3, 0.1)]
    assert share[0] > share[1] > share[2]


def test_error_falls_with_the_root_of_the_rollouts():
    policy, reward, other = trees(1)[0]
    base, beta, rng = aligned(policy, other, 0.5), 0.5, np.random.default_rng(0)
    wanted = float((joint(aligned(policy, reward, beta)) * reward).sum())
    p, r, b = (x.ravel() for x in (joint(base), reward, other))
    errors = []
    for m in (25, 400):
        drawn = [rng.choice(81, size=m, p=p / p.sum()) for _ in range(300)]
        errors.append(np.sqrt(np.mean([(rollout_value(r[i].tolist(), b[i].tolist(), beta) - wanted) ** 2 for i in drawn])))
    assert 3 < errors[0] / errors[1] < 5.5  # the root of 16 is 4


# values and tilt


def test_value_of_a_candidate():
    assert rollout_value([1.0, 2.0]) == 1.5
    assert rollout_value([0.0, 1.0], [1.0, 0.0], 0.5) == pytest.approx(1 / (1 + math.exp(-4)))
    assert rollout_value([2.0], [1.0], 2.0, "official") == pytest.approx(2 * math.exp(0.5))
    assert rollout_value([2.0], [5.0], 0.1) == 2.0  # a single rollout has weight 1
    r = [0.3, 0.7, 0.1]
    assert rollout_value(r, r, 0.01) == rollout_value(r)  # bit for bit
    for bad in (math.nan, math.inf, -math.inf):
        assert rollout_value([1.0, bad]) == -math.inf


def test_tilt_is_invariant_to_a_constant_and_never_overflows():
    log_p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.4, 0.9])
    p = tilted(log_p, q, 0.2).softmax(-1)
    by_hand = torch.tensor([0.5, 0.3, 0.2]).double() * (q.double() / 0.2).exp()
    assert torch.allclose(p, by_hand / by_hand.sum())
    assert torch.allclose(tilted(log_p, q + 7, 0.2).softmax(-1), p, atol=1e-6)
    assert tilted(log_p, q, 1e-305).softmax(-1).tolist() == [0, 0, 1]
    assert tilted(log_p, torch.full((3,), -math.inf), 0.2).tolist() == log_p.double().tolist()


# the decoder


def plain_loop(model, ids, reward, k, alpha, rollout_tokens, new, ends=(EOS,)):
    "No cache, one text, greedy."
    start = ids.shape[1]

    def best(text):
        return model(text).logits[0, -1].log_softmax(-1).topk(k)

    text = ids
    while text.shape[1] < start + new and not (text.shape[1] > start and int(text[0, -1]) in ends):
        found, f = best(text), []
        for log_p, z in zip(found.values, found.indices):
            roll = torch.cat([text, z.view(1, 1)], 1)
            while int(roll[0, -1]) not in ends and roll.shape[1] < min(text.shape[1] + 1 + rollout_tokens, start + new):
                roll = torch.cat([roll, best(roll).indices[:1].view(1, 1)], 1)
            f.append(float(log_p) + reward([roll[0, start:].tolist()])[0] / alpha)
        text = torch.cat([text, found.indices[f.index(max(f))].view(1, 1)], 1)
    return text[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize(("k", "alpha", "length"), [(4, 1.0, 3), (3, 0.2, 20), (5, 5.0, 0), (1, 1.0, 4)])
def test_decoder_is_the_plain_loop(model, k, alpha, length):
    differs = 0
    for ids in random_prompts(3, seed=5):
        out = TransferQ(k=k, alpha=alpha, rollout_tokens=length, scorer=parity).generate(model, ids, **GREEDY)
        assert out.sequences[0].tolist() == plain_loop(model, ids, parity, k, alpha, length, 6)
        differs += out.sequences.tolist() != model.generate(ids, **GREEDY).tolist()
    assert differs == (0 if k == 1 else 3)


@torch.no_grad()
def test_end_of_sequence_ends_candidates_and_rollouts(model):
    ends = list(range(1, VOCAB, 4))  # a quarter of the vocabulary
    for ids in random_prompts(4, seed=6):
        out = TransferQ(k=6, alpha=0.5, rollout_tokens=9, scorer=parity).generate(model, ids, **GREEDY | {"eos_token_id": ends})
        wanted = plain_loop(model, ids, parity, 6, 0.5, 9, 6, ends)
        assert out.sequences[0, : len(wanted)].tolist() == wanted


def test_one_candidate_or_infinite_alpha_is_the_model_itself(model, prompt):
    for decoder in (TransferQ(k=1, scorer=parity), TransferQ(k=9, alpha=math.inf, scorer=parity)):
        out = decoder.generate(model, prompt, **GREEDY)
        assert out.sequences.tolist() == model.generate(prompt, **GREEDY).tolist()
        assert out.stats.search[0]["scorer_calls"] == 0
    for k in (1, 5):
        rule = SAMPLE | {"top_k": k}
        torch.manual_seed(4)
        wanted = Autoregressive().generate(model, prompt, **rule).sequences
        torch.manual_seed(4)
        found = TransferQ(k=k, alpha=math.inf, rollout="sample", rollouts=3, scorer=parity).generate(model, prompt, **rule)
        assert found.sequences.tolist() == wanted.tolist()


def test_a_reward_that_says_nothing_changes_nothing(model, prompt):
    for value in (0.0, 3.0, -math.inf, math.inf):
        same = reads("ids")(lambda texts, value=value: [value] * len(texts))
        found = TransferQ(k=5, rollout_tokens=2, scorer=same).generate(model, prompt, **GREEDY)
        assert found.sequences.tolist() == model.generate(prompt, **GREEDY).tolist()
    torch.manual_seed(1)
    wanted = Autoregressive().generate(model, prompt, **SAMPLE | {"top_k": 5}).sequences
    torch.manual_seed(1)  # rollouts draw from streams of their own
    same = reads("ids")(lambda texts: [1.0] * len(texts))
    found = TransferQ(k=5, rollout="sample", rollouts=3, rollout_tokens=2, scorer=same).generate(model, prompt, **SAMPLE | {"top_k": 5})
    assert found.sequences.tolist() == wanted.tolist()


def test_a_candidate_whose_reward_is_not_finite_is_out(model, prompt):
    first = int(model(prompt).logits[0, -1].argmax())
    veto = reads("ids")(lambda texts: [math.inf if text[0] == first else 0.0 for text in texts])
    found = TransferQ(k=5, rollout_tokens=2, scorer=veto).generate(model, prompt, **GREEDY)
    assert found.continuations[0][0] == model(prompt).logits[0, -1].topk(2).indices[1]


def test_direct_is_indirect_with_one_reward(model, prompt):
    for settings, rule in (({}, GREEDY), ({"rollout": "sample", "rollouts": 3}, SAMPLE)):
        common = {"k": 4, "alpha": 0.7, "rollout_tokens": 4, "scorer": parity} | settings
        torch.manual_seed(2)
        direct = TransferQ(**common).generate(model, prompt, **rule)
        torch.manual_seed(2)
        both = TransferQ(**common, baseline_scorer=parity, beta=0.3).generate(model, prompt, **rule)
        assert direct.sequences.tolist() == both.sequences.tolist()
        assert both.stats.search[0]["scorer_calls"] == 2 * direct.stats.search[0]["scorer_calls"]


def test_adding_a_constant_to_the_target_reward(model):
    def shifted(c):
        return reads("ids")(lambda texts: [v + c for v in parity(texts)])

    changed = Counter()
    ways = {"direct": {}, "normalised": {"baseline_scorer": remainder}, "official": {"baseline_scorer": remainder, "weights": "official"}}
    for ids in random_prompts(4, seed=8):
        for name, fields in ways.items():
            texts = []
            for c in (0.0, 8.0):
                torch.manual_seed(3)
                decoder = TransferQ(k=4, alpha=2.0, rollout="sample", rollouts=2, rollout_tokens=3, scorer=shifted(c), **fields)
                texts.append(decoder.generate(model, ids, **SAMPLE).sequences.tolist())
            changed[name] += texts[0] != texts[1]
    assert (changed["direct"], changed["normalised"]) == (0, 0)
    assert changed["official"] > 0


def test_rollouts_estimate_the_values_of_dynamic_programming():
    table = random_table(4, 1.0, torch.Generator().manual_seed(5))
    earns = torch.tensor([0.0, 1.0, 0.3, 0.7])
    scorer = reads("ids")(lambda texts: [float(earns[text].sum()) for text in texts])
    v = torch.zeros(4)
    for _ in range(3):  # expected reward of three further tokens
        v = (table * (earns + v)).sum(-1)
    q = earns + v
    decoder = WatchedTransferQ(k=4, alpha=0.5, rollouts=600, rollout="sample", rollout_tokens=None, scorer=scorer)
    torch.manual_seed(0)
    decoder.generate(table_model(table), torch.tensor([[2]]), max_new_tokens=4, do_sample=True, top_k=0, eos_token_id=99)
    tokens, log_p = decoder.kept[0]
    wanted = (table[2].double().log() + q.double() / 0.5).log_softmax(-1)[tokens]
    assert (log_p - wanted).abs().max() < 0.25  # the standard error of Q / alpha is below .06


@dataclass
class Repeated(TransferQ):
    "Draws the first token many times."

    draws: int = 20_000
    drawn: Counter = field(default_factory=Counter)

    def choose(self, search, frontier, new):
        if not self.drawn:
            self.drawn.update(super(Repeated, self).choose(search, frontier, new)[0].tokens[-1] for _ in range(self.draws))
        return super().choose(search, frontier, new)


def test_tokens_are_drawn_from_the_tilted_distribution():
    table = random_table(4, 1.0, torch.Generator().manual_seed(6))
    alpha, earns = 0.5, torch.tensor([0.0, 1.0, 0.3, 0.7])
    scorer = reads("ids")(lambda texts: [float(earns[text].sum()) for text in texts])
    q = earns + earns[table.argmax(-1)]  # greedy rollouts of one token
    decoder = Repeated(k=4, alpha=alpha, rollout_tokens=1, scorer=scorer)
    torch.manual_seed(0)
    decoder.generate(table_model(table), torch.tensor([[2]]), max_new_tokens=3, do_sample=True, top_k=0, eos_token_id=99)
    logits = table[2].double().log() + q.double() / alpha
    assert fit(decoder.drawn, dict(enumerate(logits.softmax(-1).tolist()))) > 1e-3
    for wrong in (table[2].double().log(), q.double() / alpha, table[2].double().log() + q.double()):  # negative controls
        assert fit(decoder.drawn, dict(enumerate(wrong.softmax(-1).tolist()))) < 1e-6


def test_costs_are_those_of_the_model(model, prompt):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        out = TransferQ(k=4, rollout_tokens=3, scorer=parity).generate(model, prompt, **GREEDY)
    finally:
        hook.remove()
    assert out.stats.target_forwards == len(calls)
    facts = out.stats.search[0]
    assert facts["forwards"] == len(calls)
    assert facts["generated"] == 6 + 4 * (3 + 3 + 3 + 2 + 1 + 0)  # rollouts stop where the text must
    assert facts["scorer_calls"] == 4 * 6


def test_a_budget_is_kept(model, prompt):
    decoder = TransferQ(k=4, rollout_tokens=3, scorer=parity, budget=Budget(tokens=30))
    out = decoder.generate(model, prompt, **GREEDY)
    assert out.stats.search[0]["generated"] <= 30
    assert out.stats.search[0]["stopped"] == "budget of tokens"
    whole = TransferQ(k=4, rollout_tokens=3, scorer=parity).generate(model, prompt, **GREEDY)
    new = out.continuations[0].tolist()
    assert 0 < len(new) < 6
    assert whole.continuations[0].tolist()[: len(new)] == new


def test_rows_are_independent(model):
    prompts = random_prompts(3, lengths=(2, 9), seed=4)
    decoder = TransferQ(k=4, alpha=0.5, rollout_tokens=3, scorer=parity)
    batch = decoder.generate(model, **left_pad(prompts), **GREEDY)
    for ids, new in zip(prompts, batch.continuations):
        assert decoder.generate(model, ids, **GREEDY).continuations[0].tolist() == new.tolist()


def test_presets():
    official, paper = TransferQ.preset("official", scorer=parity), TransferQ.preset("paper", scorer=parity, rollouts=7)
    assert (official.k, official.alpha, official.rollout, official.rollouts, official.rollout_tokens) == (10, 1.0, "greedy", 1, 20)
    assert (paper.rollout, paper.rollouts, paper.rollout_tokens) == ("sample", 7, None)
    other = TransferQ.preset("official", scorer=parity, baseline_scorer=remainder)
    assert (other.rollout_tokens, other.weights, 1 / other.beta) == (5, "official", 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k and rollouts must be at least 1"),
        ({"rollouts": 0}, "k and rollouts must be at least 1"),
        ({"rollout_tokens": -1}, "rollout_tokens at least 0"),
        ({"alpha": 0.0}, "alpha and beta must be positive"),
        ({"alpha": math.nan}, "alpha and beta must be positive"),
        ({"beta": -1.0}, "alpha and beta must be positive"),
        ({"rollout": "beam"}, "rollout"),
        ({"weights": "none"}, "weights"),
        ({"rollouts": 2}, "one and the same: set rollouts=1"),
        ({"baseline_scorer": parity}, "pass scorer=..., too"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TransferQ(**fields)


def test_what_is_refused_in_a_call(model, prompt):
    with pytest.raises(ValueError, match="call with do_sample=True"):
        TransferQ(rollout="sample", scorer=parity).generate(model, prompt, **GREEDY)
    with pytest.raises(ValueError, match='preset must be "official" or "paper"'):
        TransferQ.preset("ours")
    with pytest.raises(ValueError, match="pass tokenizer="):
        TransferQ(scorer=len).generate(model, prompt, **GREEDY)


# the experiment's arithmetic


def test_intervals_and_equal_divergence():
    x = np.arange(12.0).reshape(3, 4)
    value, low, high = resampled(lambda s, p: x[s][:, p].mean(), 3, 4)
    assert value == 5.5
    assert low < 5.5 < high
    flat = {"reward": [0.2] * 4, "kl": [0.0] * 4, "tokens": [1] * 4}
    names = ["aligned", "ARGS", "best of N", "k = 2", "k = 10", "rollout_tokens = 4"]
    names += [f"new reward: {n}" for n in ("aligned", "normalised", "uncorrected", "official")]
    run = {"unaligned": flat} | {name: flat | {"kl": [9.0] * 4} for name in names}
    for alpha, kl in ((0.3, 2.0), (0.1, 4.0), (0.03, 8.0)):
        run[f"CD {alpha}"] = flat | {"reward": [0.2 + 0.05 * kl] * 4, "kl": [kl] * 4}
        run[f"Transfer Q* {alpha}"] = flat | {"reward": [0.7] * 4, "kl": [kl - 1] * 4}
    found = summary([run, run])
    assert found["at equal divergence"]["0.1"][0] == pytest.approx(0.7 - 0.35)
    assert found["leads"]["Transfer Q* 0.3 - CD 0.3"] == pytest.approx([0.4, 0.4, 0.4])
