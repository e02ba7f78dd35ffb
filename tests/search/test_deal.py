"""DeAL against an independent minimal version, its limits, costs, constraints, and what must not be done."""

import math
from collections import Counter

import pytest
import torch
from toys import EOS, fit, left_pad, random_prompts
from transformers.generation.streamers import BaseStreamer

from decodelab.lab.table_model import random_table, table_model
from decodelab.search.base import Budget, SearchDecoder
from decodelab.search.classics import BestOfN
from decodelab.search.deal import DeAL, SegmentDeAL
from decodelab.search.heuristics import Forbidden, KeywordCoverage, stem
from decodelab.search.scorers import reads

LETTERS = 12  # vocabulary of the table models
END = 3  # token that ends their texts


def value(ids):
    "A heuristic in [0, 1) that depends on the whole text."
    return (sum((i + 1) * (t + 2) ** 2 for i, t in enumerate(ids)) % 37) / 37


scorer = reads("ids")(lambda texts: [value(ids) for ids in texts])


def table(seed, sharpness=1.0):
    return random_table(LETTERS, sharpness, torch.Generator().manual_seed(seed))


def decoded(decoder, probs, start=1, new=10, **settings):
    settings = {"do_sample": False, "eos_token_id": END, "max_new_tokens": new} | settings
    return decoder.generate(table_model(probs), torch.tensor([[start]]), **settings)


def written(decoder, probs, **settings):
    return decoded(decoder, probs, **settings).continuations[0].tolist()


def reference(log_probs, k, lookahead, lam, new, h=value, beams=1, penalty=0.0, end=END, fault=""):
    "DeAL in plain Python; `log_probs(tokens)` is a list. A `fault` is a mistake that somebody could make."
    frontier, finished = [([], 0.0)], []
    while frontier and len(finished) < beams:
        candidates = []
        for text, log_p in frontier:
            p = log_probs(text)
            for z in sorted(range(len(p)), key=lambda z: (-p[z], z))[:k]:
                ahead, far = [*text, z], 0.0
                limit = len(text) + 1 + (0 if fault == "prefix only" else lookahead)
                limit = limit if fault == "beyond the budget" else min(limit, new)
                while len(ahead) < limit and (ahead[-1] != end or fault == "beyond EOS"):
                    q = log_probs(ahead)
                    best = max(range(len(q)), key=lambda t: (q[t], -t))
                    far += q[best]
                    ahead.append(best)
                total = log_p + p[z] + (far if fault == "log P of the look-ahead" else 0.0)
                c = total / len([*text, z]) ** penalty + lam * h(ahead)
                after = ahead if fault == "look-ahead kept" else [*text, z]
                candidates.append((-c, -(log_p + p[z]), z, after))
        candidates.sort()
        frontier = []
        for c, log_p, _, text in candidates[:beams]:
            (finished.append((c, text)) if text[-1] == end or len(text) >= new else frontier.append((text, -log_p)))
    return min(finished)[1]


def of_table(probs, start=1):
    rows = probs.double().log().tolist()
    return lambda tokens: rows[tokens[-1] if tokens else start]


# equality with the minimal version


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_it_is_the_minimal_version(beams, penalty):
    for seed in range(6):
        probs, k, lookahead, lam = table(seed), 2 + seed % 4, seed % 6, (0.5, 3.0, 20.0)[seed % 3]
        expected = reference(of_table(probs), k, lookahead, lam, 10, beams=beams, penalty=penalty)
        assert written(DeAL(scorer, None, k, lookahead, lam, beams, penalty), probs) == expected


@pytest.mark.parametrize("fault", ["prefix only", "look-ahead kept", "log P of the look-ahead", "beyond EOS", "beyond the budget"])
def test_mistakes_are_seen(fault):
    settings = {"k": 4, "lookahead": 5, "lam": 5.0}
    differ = 0
    for seed in range(8):
        right, wrong = (reference(of_table(table(seed)), **settings, new=10, fault=f) for f in ("", fault))
        assert written(DeAL(scorer, **settings), table(seed)) == right
        differ += right != wrong
    assert differ >= 2


@torch.no_grad()
def test_a_transformer_with_its_cache(llama):
    for prompt in random_prompts(3, seed=2):

        def log_probs(tokens, prompt=prompt):
            return llama(torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], 1)).logits[0, -1].log_softmax(-1).tolist()

        out = DeAL(scorer, k=3, lookahead=4, lam=4.0).generate(llama, prompt, max_new_tokens=9, do_sample=False)
        assert out.continuations[0].tolist() == reference(log_probs, 3, 4, 4.0, 9, end=EOS)


def test_rows_of_a_batch(llama):
    prompts = random_prompts(3, seed=4)
    decoder, settings = DeAL(scorer, k=3, lookahead=4, lam=4.0, beams=2), {"max_new_tokens": 9, "do_sample": False}
    batch = decoder.generate(llama, **left_pad(prompts), **settings)
    alone = [decoder.generate(llama, prompt, **settings).continuations[0].tolist() for prompt in prompts]
    assert [c.tolist() for c in batch.continuations] == alone


# limits


def test_no_weight_or_one_candidate_is_greedy_search(llama):
    for prompt in random_prompts(3, seed=6):
        greedy = llama.generate(prompt, max_new_tokens=12, do_sample=False)
        for decoder in (
            DeAL(scorer, k=7, lookahead=5, lam=0.0),
            DeAL(scorer, k=2, lookahead=0, lam=0.0),
            DeAL(scorer, k=1, lookahead=5, lam=50.0),
            DeAL(scorer, k=1, lookahead=0, lam=3.0),
        ):
            assert decoder.generate(llama, prompt, max_new_tokens=12, do_sample=False).sequences.equal(greedy)


def beam(log_probs, width, new, end=END):
    "Beam search: the best of all continuations are kept, those that have ended leave the beam, the best sum of log-probabilities wins."
    running, ended = [(0.0, [])], []
    while running and len(ended) < width:
        grown = [(log_p + q, [*text, z]) for log_p, text in running for z, q in enumerate(log_probs(text))]
        best = sorted(grown, key=lambda g: -g[0])[:width]
        ended += [g for g in best if g[1][-1] == end or len(g[1]) == new]
        running = [g for g in best if g not in ended]
    return max(ended)[1]


def test_no_weight_and_k_beams_is_beam_search():
    texts = []
    for seed in range(20):
        texts.append(beam(of_table(table(seed)), 3, 8))
        assert written(DeAL(scorer, k=3, lookahead=4, lam=0.0, beams=3), table(seed), new=8) == texts[-1]
    assert len({len(t) for t in texts}) > 2


def test_a_constant_and_a_scale_of_the_heuristic_change_nothing():
    shifted = reads("ids")(lambda texts: [value(ids) + 16.0 for ids in texts])
    scaled = reads("ids")(lambda texts: [4.0 * value(ids) for ids in texts])
    constant = reads("ids")(lambda texts: [0.25] * len(texts))
    for seed in range(4):
        settings = {"k": 4, "lookahead": 3, "beams": 1 + seed % 2}
        plain = written(DeAL(scorer, lam=8.0, **settings), table(seed))
        # with an end in sight both would have to choose among the same numbers, up to rounding
        assert written(DeAL(shifted, lam=8.0, **settings), table(seed)) == plain
        assert written(DeAL(scaled, lam=2.0, **settings), table(seed)) == plain
        assert written(DeAL(constant, lam=8.0, k=4, lookahead=3), table(seed)) == written(DeAL(lam=0.0), table(seed))


# constraints


def test_a_hard_constraint_is_kept_where_a_candidate_can():
    forbidden = reads("ids")(lambda texts: [-math.inf if {5, 7} & set(ids) else 0.0 for ids in texts])
    greedy_breaks = kept = 0
    for seed in range(10):
        probs = table(seed)
        greedy_breaks += bool({5, 7} & set(written(DeAL(lam=0.0), probs)))
        out = decoded(DeAL(forbidden, k=3, lookahead=0), probs)  # two tokens are forbidden, so one of three candidates is not
        kept += not {5, 7} & set(out.continuations[0].tolist())
        assert out.stats.search[0]["stopped"] == "done"
    assert greedy_breaks >= 2
    assert kept == 10


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}])
def test_without_a_feasible_candidate_the_order_of_the_model_stands(sampling):
    never = reads("ids")(lambda texts: [-math.inf] * len(texts))
    out = decoded(DeAL(never, k=4, lookahead=2, tau=1e-4 if sampling else 0.0), table(1), **sampling)
    assert out.continuations[0].tolist() == written(DeAL(lam=0.0), table(1))
    assert out.stats.search[0]["stopped"] == "constraint violated"


def drawn(h, rows=200, k=4, tau=0.7):
    "First tokens that DeAL draws from the four most probable ones, best first, and their probabilities under the model."
    probs = table(5)
    best = probs[1].topk(k)
    scorer = reads("ids")(lambda texts: [h[best.indices.tolist().index(ids[0])] for ids in texts])
    ids = torch.ones(rows, 1, dtype=torch.long)
    settings = {"attention_mask": ids, "max_new_tokens": 1, "do_sample": True, "top_k": 0, "eos_token_id": 99}
    torch.manual_seed(0)
    out = DeAL(scorer, k=k, lookahead=0, tau=tau).generate(table_model(probs), ids, **settings)
    return Counter(best.indices.tolist().index(t) for t in out.sequences[:, 1].tolist()), best.values.double()


def test_an_infinite_heuristic_wins_a_draw():
    for h in ([0.0, 0.0, math.inf, 0.0], [0.0, -math.inf, math.inf, 5.0]):
        assert set(drawn(h)[0]) == {2}
    counts, p = drawn([0.0, math.inf, -math.inf, math.inf])  # two of them: the model's own probabilities decide
    expected = (p[[1, 3]].log() / 0.7).softmax(0).tolist()
    assert fit(Counter({(i,): n for i, n in counts.items()}), {(1,): expected[0], (3,): expected[1]}) > 0.001


def test_a_forbidden_candidate_is_never_drawn():
    assert set(drawn([-math.inf, 0.0, -math.inf, 0.0])[0]) == {1, 3}
    counts, p = drawn([-math.inf] * 4)  # nothing is left to choose by
    expected = dict(enumerate((p.log() / 0.7).softmax(0).tolist()))
    assert fit(Counter({(i,): n for i, n in counts.items()}), {(i,): q for i, q in expected.items()}) > 0.001


def test_a_temperature_near_zero_draws_the_best():
    assert set(drawn([0.0, 9.0, 0.0, 3.0], rows=20, tau=1e-320)[0]) == {1}


# streaming


class Parts(BaseStreamer):
    "What the streamer gets, put by put, without the prompt."

    def __init__(self):
        self.parts = []

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.parts = self.parts[1:]


@pytest.mark.parametrize(("beams", "tau"), [(1, 0.0), (1, 1.0), (3, 0.0)])
def test_what_is_streamed_is_the_text(beams, tau, llama):
    for prompt in random_prompts(3, seed=11):
        streamer = Parts()
        torch.manual_seed(1)
        rules = {"max_new_tokens": 9, "do_sample": tau > 0, "top_k": 0} if tau else {"max_new_tokens": 9, "do_sample": False}
        out = DeAL(scorer, k=3, lookahead=3, lam=4.0, beams=beams, tau=tau).generate(llama, prompt, streamer=streamer, **rules)
        assert [t for part in streamer.parts for t in part] == out.continuations[0].tolist()
        if beams == 1:  # every choice is final, and a look-ahead is never shown
            assert [len(part) for part in streamer.parts] == [1] * 9


# words


def test_a_word_counts_when_it_is_whole(llama, tokenizer):
    coverage = KeywordCoverage(["ring", "sea"])
    seen = []

    def watched(texts):
        seen.extend(zip(texts, coverage(texts)))
        return coverage(texts)

    prompt = tokenizer("the ring ", return_tensors="pt", return_token_type_ids=False)
    DeAL(watched, tokenizer, k=3, lookahead=2, lam=5.0).generate(llama, **prompt, max_new_tokens=6, do_sample=False)
    assert all("the ring" not in text for text, _ in seen)  # words of the prompt do not count
    partly = [tokenizer.decode(tokenizer("the ring").input_ids[:n]) for n in (6, 7, 8)]  # a character a token
    assert partly == ["the ri", "the rin", "the ring"]
    assert coverage(partly) == [0.0, 0.0, 0.5]


def test_stems():
    for group in ("ring rings ringing", "dance danced dances dancing", "cry cries cried", "stop stopped", "king king's", "dress dresses"):
        assert len({stem(w) for w in group.split()}) == 1, group
    assert stem("spring") != stem("spr") and stem("bring") == "bring"
    assert Forbidden(["wolf"])(["no Wolfs here", "a golf ball"]) == [-math.inf, 0.0]


# cost


def test_costs_are_what_the_model_sees(llama):
    calls = []
    handle = llama.register_forward_hook(lambda module, args, kwargs, out: calls.append(kwargs["input_ids"].numel()), with_kwargs=True)
    k, lookahead, new = 4, 5, 12
    try:
        out = DeAL(scorer, k=k, lookahead=lookahead, lam=4.0).generate(
            llama, random_prompts(1, seed=8)[0], max_new_tokens=new, do_sample=False
        )
    finally:
        handle.remove()
    facts = out.stats.search[0]
    assert (out.stats.target_forwards, out.stats.target_tokens) == (len(calls), sum(calls))
    assert facts["scorer_calls"] == k * new
    ahead = [min(lookahead, new - t) for t in range(1, new + 1)]  # tokens of each look-ahead, by step
    assert facts["generated"] == k * new + k * sum(ahead)
    assert facts["forwards"] == 1 + sum(ahead)  # the chosen token has been fed by its look-ahead
    assert facts["stored"] <= new + k * (lookahead + 1)


class Forgetful(DeAL):
    "Keeps no look-ahead."

    def nodes_kept(self, search, frontier):
        return SearchDecoder.nodes_kept(self, search, frontier)


def test_the_kept_look_ahead_changes_no_text(llama):
    prompt, settings = random_prompts(1, seed=9)[0], {"max_new_tokens": 16, "do_sample": False}
    ours, plain = (d(scorer, k=4, lookahead=6, lam=4.0).generate(llama, prompt, **settings) for d in (DeAL, Forgetful))
    assert ours.sequences.equal(plain.sequences)
    assert ours.stats.target_tokens < plain.stats.target_tokens


def test_budget(llama):
    prompt = random_prompts(1, seed=8)[0]
    free = DeAL(scorer, k=4, lookahead=3, lam=4.0).generate(llama, prompt, max_new_tokens=12, do_sample=False)
    for limit in (Budget(tokens=60), Budget(scorer_calls=20), Budget(forwards=14)):
        out = DeAL(scorer, k=4, lookahead=3, lam=4.0, budget=limit).generate(llama, prompt, max_new_tokens=12, do_sample=False)
        facts, new = out.stats.search[0], out.continuations[0].tolist()
        assert facts["stopped"].startswith("budget")
        assert 0 < len(new) < 12
        assert free.continuations[0].tolist()[: len(new)] == new
        assert all(facts[name] <= getattr(limit, name) for name in ("scorer_calls", "forwards") if getattr(limit, name))


# sampling


def two_tokens(decoder, probs, rows):
    "p-value of the first two drawn tokens against their joint distribution."
    ids = torch.ones(rows, 1, dtype=torch.long)
    settings = {"attention_mask": ids, "max_new_tokens": 2, "do_sample": True, "top_k": 0, "eos_token_id": 99}
    out = decoder.generate(table_model(probs), ids, **settings).sequences[:, 1:]
    joint = (probs[1][:, None] * probs).tolist()
    exact = {(a, b): p for a, row in enumerate(joint) for b, p in enumerate(row)}
    return fit(Counter(map(tuple, out.tolist())), exact)


def test_a_draw_of_all_candidates_without_weight_is_sampling():
    probs = random_table(4, 1.0, torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    assert two_tokens(DeAL(lam=0.0, k=4, tau=1.0), probs, 250) > 0.001
    assert two_tokens(DeAL(lam=0.0, k=4, tau=0.5), probs, 250) < 1e-3  # a control


def test_the_first_token_is_drawn_by_c():
    probs, k, lookahead, lam, tau = table(4), 4, 2, 2.0, 0.7
    log_p = of_table(probs)([])
    best = sorted(range(LETTERS), key=lambda z: -log_p[z])[:k]
    c = []
    for z in best:
        ahead = [z]
        while len(ahead) < 1 + lookahead and ahead[-1] != END:
            ahead.append(max(range(LETTERS), key=lambda t: of_table(probs)(ahead)[t]))
        c.append(log_p[z] + lam * value(ahead))
    expected = torch.tensor(c).div(tau).softmax(0).tolist()
    torch.manual_seed(1)
    ids = torch.ones(250, 1, dtype=torch.long)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": True, "top_k": 0, "eos_token_id": END}
    out = DeAL(scorer, None, k, lookahead, lam, tau=tau).generate(table_model(probs), ids, **settings)
    counts = Counter((row[1],) for row in out.sequences.tolist())
    assert fit(counts, {(z,): p for z, p in zip(best, expected)}) > 0.001


def test_draws_follow_the_seed_and_greedy_draws_nothing():
    def run(seed):
        torch.manual_seed(seed)
        ids = torch.ones(4, 1, dtype=torch.long)
        settings = {"attention_mask": ids, "max_new_tokens": 8, "do_sample": True, "top_k": 0}
        return DeAL(scorer, tau=2.0, lookahead=2).generate(model, ids, **settings).sequences.tolist()

    model = table_model(table(2))

    assert run(1) == run(1)
    assert run(1) != run(2)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DeAL(scorer, lookahead=2, tau=1.0).generate(model, torch.ones(1, 1, dtype=torch.long), max_new_tokens=8, do_sample=False)
    assert torch.get_rng_state().equal(before)


# segments


def segments(log_probs, length, n, keep, new, end=END):
    "Segment search in plain Python."
    frontier, ended = [([], 0.0)], []
    while frontier:
        found = []
        for start in frontier:
            width = [start]
            for _ in range(length):
                still = [w for w in width if w[0] and (w[0][-1] == end or len(w[0]) == new)]
                for text, log_p in [w for w in width if w not in still]:
                    p = log_probs(text)
                    still += [([*text, z], log_p + p[z]) for z in range(len(p))]
                width = sorted(still, key=lambda w: -w[1])[:n]
            found += width
        over = [w for w in found if w[0][-1] == end or len(w[0]) == new]
        ended += over
        frontier = sorted((w for w in found if w not in over), key=lambda w: (-value(w[0]), -w[1]))[:keep]
    return min(ended, key=lambda w: (-value(w[0]), -w[1]))[0]


def test_segments_are_the_minimal_version():
    for seed in range(12):
        length, n, keep = 1 + seed % 4, 2 + seed % 3, 1 + seed % 2
        expected = segments(of_table(table(seed)), length, n, keep, 9)
        assert written(SegmentDeAL(scorer, None, length, n, keep), table(seed), new=9) == expected


def test_one_segment_of_samples_is_best_of_n(llama):
    settings = {"max_new_tokens": 10, "do_sample": True, "top_k": 0}
    texts = []
    for decoder in (BestOfN(5, scorer), SegmentDeAL(scorer, segment_len=None, n_proposals=5, propose="sample")):
        torch.manual_seed(7)
        texts.append(decoder.generate(llama, random_prompts(1, seed=3)[0], **settings).sequences.tolist())
    assert texts[0] == texts[1]


def test_iterations_end_the_search(llama):
    out = SegmentDeAL(scorer, segment_len=3, iterations=2).generate(llama, random_prompts(1, seed=3)[0], max_new_tokens=12, do_sample=False)
    assert len(out.continuations[0]) == 6


# refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DeAL(k=0), "at least 1"),
        (lambda: DeAL(beams=0), "at least 1"),
        (lambda: DeAL(lookahead=-1), "lookahead at least 0"),
        (lambda: DeAL(lam=-1.0), "finite and at least 0"),
        (lambda: DeAL(lam=math.inf), "finite and at least 0"),
        (lambda: DeAL(tau=math.nan), "finite and at least 0"),
        (lambda: DeAL(tau=1.0, beams=2), "set beams=1"),
        (lambda: DeAL(length_penalty=math.nan), "length_penalty must lie in"),
        (lambda: DeAL(length_penalty=-400.0), "length_penalty must lie in"),
        (lambda: SegmentDeAL(segment_len=0), "segment_len must be at least 1"),
        (lambda: SegmentDeAL(n_proposals=0), "n_proposals must be at least 1"),
        (lambda: SegmentDeAL(keep=0), "keep must be at least 1"),
        (lambda: SegmentDeAL(iterations=0), "iterations must be at least 1"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_what_cannot_be_done(llama):
    prompt = random_prompts(1)[0]
    with pytest.raises(ValueError, match="set tau > 0"):
        DeAL().generate(llama, prompt, do_sample=True, max_new_tokens=2)
    for propose, do_sample in (("beam", True), ("sample", False)):
        with pytest.raises(ValueError, match="call with do_sample=False"):
            SegmentDeAL(propose=propose).generate(llama, prompt, do_sample=do_sample, max_new_tokens=2)
    with pytest.raises(ValueError, match="pass tokenizer="):
        DeAL(KeywordCoverage(["ring"])).generate(llama, prompt, do_sample=False, max_new_tokens=2)
