"""LocalLeap: its rule against a plain transcription, its limits, its rows, and the measurement of its two principles."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, left_pad, random_prompts, small_model
from transformers import LogitsProcessorList, TopPLogitsWarper

from decodelab.core.contract import decoders
from decodelab.diffusion import localleap
from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.denoiser import Denoiser
from decodelab.diffusion.fast_dllm import Dream, EntropyBound, FastDLLM
from decodelab.diffusion.ideal import Distribution, IdealDenoiser
from decodelab.diffusion.localleap import (
    BANDS,
    LocalLeap,
    PlacedExtras,
    agreement,
    cautious,
    decay,
    delays,
    dilate,
    distance,
    exercises,
    principles,
    race,
    rivals,
    share,
    sides,
    sweeps,
)
from decodelab.diffusion.step import top
from decodelab.lab.frontier import table
from decodelab.lab.provenance import to_plain
from decodelab.lab.tasks.catalogue import CountdownTask
from decodelab.lab.tasks.ideal_lists import list_distribution
from decodelab.lab.tasks.text import ListTask
from decodelab.lab.watch import watch

HOLE = -float("inf")


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    "A random model whose confidences lie on both sides of both thresholds."
    return small_model(spread=0.7)


@pytest.fixture(scope="module")
def prompts():
    return left_pad(random_prompts(6, seed=3))


def decode(decoder, model, prompts, new=32, **kwargs):
    return decoder.generate(model, **prompts, max_new_tokens=new, **({"do_sample": False} | kwargs))


def same(a, b):
    return a.sequences.equal(b.sequences) and a.stats.emitted == b.stats.emitted


# the rule, word by word


def plain_rule(c, kappa, tau, w):
    "Places that one row commits; c holds None where there is no hole."
    holes = [j for j, x in enumerate(c) if x is not None]
    anchors = [i for i in holes if c[i] >= kappa]
    chosen = set()
    for j in holes:
        near = any(i - w <= j <= i + w for i in anchors)
        if c[j] >= (tau if near else kappa):
            chosen.add(j)
    best = max(holes, key=lambda j: (c[j], -j))
    return sorted(chosen | {best})


def leap(c, kappa, tau, w, cls=LocalLeap, **fields):
    "What the decoder commits in a pass with these confidences, [rows, block], bool."
    c = torch.as_tensor(c, dtype=torch.float32)
    decoder = cls(threshold=kappa, relaxed_threshold=tau, radius=w, **fields)
    masked = c > HOLE
    step = SimpleNamespace(confidence=c, masked=masked, best=lambda: top(c, torch.ones(len(c))))
    return decoder.select(step) & masked


# few values, so that ties and equality with a threshold are common
LEVELS = [0.05, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1.0]
confidences = st.lists(st.one_of(st.none(), st.sampled_from(LEVELS)), min_size=1, max_size=14).filter(any)
levels = st.sampled_from(LEVELS)
radii = st.integers(0, 16)


def tensor(row):
    return torch.tensor([[HOLE if x is None else x for x in row]])


@settings(max_examples=400)
@given(row=confidences, pair=st.tuples(levels, levels).map(sorted), w=radii)
def test_a_pass_commits_what_the_rule_says(row, pair, w):
    tau, kappa = pair
    assert leap(tensor(row), kappa, tau, w)[0].nonzero()[:, 0].tolist() == plain_rule(row, kappa, tau, w)


@settings(max_examples=200)
@given(rows=st.lists(confidences, min_size=2, max_size=4), pair=st.tuples(levels, levels).map(sorted), w=radii)
def test_rows_of_a_pass_do_not_see_each_other(rows, pair, w):
    tau, kappa = pair
    width = max(map(len, rows))
    rows = [r + [None] * (width - len(r)) for r in rows]
    together = leap(torch.cat([tensor(r) for r in rows]), kappa, tau, w)
    for chosen, row in zip(together, rows):
        assert chosen.nonzero()[:, 0].tolist() == plain_rule(row, kappa, tau, w)


def test_a_pass_by_hand():
    c = [[0.30, HOLE, 0.80, 0.40, 0.95, 0.10, 0.76, 0.82]]
    assert leap(c, 0.9, 0.75, 2).nonzero()[:, 1].tolist() == [2, 4, 6]  # 7 is three places away: no second hop from 6
    assert leap(c, 0.9, 0.75, 3).nonzero()[:, 1].tolist() == [2, 4, 6, 7]


def test_without_an_anchor_one_hole_is_filled():
    assert leap([[0.85, 0.88, 0.88, 0.80]], 0.9, 0.75, 4).nonzero()[:, 1].tolist() == [1]  # the first of equals, and no hole beside it


def test_both_thresholds_are_reached_by_equality():
    assert leap([[0.9, 0.75, 0.1]], 0.9, 0.75, 1).nonzero()[:, 1].tolist() == [0, 1]
    assert leap([[1.0, 1.0, 0.99]], 1.0, 1.0, 1).nonzero()[:, 1].tolist() == [0, 1]


def test_visible_tokens_are_no_anchors():
    shown = torch.tensor([[0.99, 0.8, 0.78, 0.2]])  # the visible one would be an anchor
    c = shown.masked_fill(torch.tensor([[True, False, False, False]]), HOLE)
    step = SimpleNamespace(raw_confidence=shown, confidence=c, best=lambda: top(c, torch.ones(1)))
    assert LocalLeap().select(step).nonzero()[:, 1].tolist() == [1]
    step.confidence = shown
    assert LocalLeap().select(step).nonzero()[:, 1].tolist() == [0, 1, 2]


@settings(max_examples=200)
@given(marks=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), w=radii)
def test_dilation_is_all_places_within_the_radius(marks, w):
    marks = torch.tensor(marks)
    expected = [[any(m[i] for i in range(max(0, j - w), min(9, j + w + 1))) for j in range(9)] for m in marks.tolist()]
    assert dilate(marks, w).tolist() == expected
    assert (distance(marks) <= w).tolist() == expected


# per state


@settings(max_examples=300)
@given(row=confidences, three=st.tuples(levels, levels, levels).map(sorted), w=radii, more=st.integers(0, 5))
def test_the_committed_sets_are_nested(row, three, w, more):
    lowest, tau, kappa = three
    c = tensor(row)
    ours = leap(c, kappa, tau, w)
    for smaller, larger in (
        (leap(c, kappa, kappa, 0), ours),  # threshold kappa
        (ours, leap(c, tau, tau, 0)),  # threshold tau
        (ours, leap(c, kappa, tau, w + more)),
        (ours, leap(c, kappa, lowest, w)),
        (leap(c, kappa, lowest, w), leap(c, tau, lowest, w)),  # kappa falls
    ):
        assert not bool((smaller & ~larger).any())


# whole texts


def plain_decoding(denoiser, prompt, new, block, kappa, tau, w):
    "One text by the rule, pass by pass: new tokens, and tokens written in each pass."
    ids, start = torch.cat([prompt, torch.full((1, new), denoiser.mask_id)], 1), prompt.shape[1]
    written = []
    for first in range(start, start + new, block):
        columns = range(first, min(first + block, start + new))
        while any(ids[0, j] == denoiser.mask_id for j in columns):
            p = denoiser(ids)[0].softmax(-1)
            c = [float(p[j].max()) if ids[0, j] == denoiser.mask_id else None for j in columns]
            chosen = plain_rule(c, kappa, tau, w)
            for j in chosen:
                ids[0, columns[j]] = p[columns[j]].argmax()
            written.append(len(chosen))
    return ids[0, start:].tolist(), written


@pytest.mark.parametrize(("block", "w", "kappa", "tau"), [(32, 4, 0.9, 0.75), (8, 2, 0.8, 0.5), (12, 1, 0.6, 0.4)])
def test_a_whole_text_is_that_of_the_transcription(model, block, w, kappa, tau):
    relaxed = 0
    for prompt in random_prompts(4, seed=11):
        decoder = LocalLeap(block, threshold=kappa, relaxed_threshold=tau, radius=w)
        log = watch(decoder, model, prompt, max_new_tokens=32, do_sample=False)
        tokens, written = plain_decoding(Denoiser(model), prompt, 32, block, kappa, tau, w)
        assert log.out.continuations[0].tolist() == tokens
        assert log.out.stats.emitted[0] == written
        relaxed += int((log.chosen & (log.confidence < kappa) & (log.confidence >= decoder.theta(log.confidence))).sum())
    assert relaxed > 5  # or the rule has not been tried


@pytest.mark.parametrize("block", [32, 8])
def test_radius_zero_and_equal_thresholds_are_threshold_decoding(model, prompts, block):
    for gamma in (0.5, 0.9):
        reference = decode(FastDLLM(block, threshold=gamma), model, prompts)
        assert same(decode(LocalLeap(block, threshold=gamma, relaxed_threshold=0.3, radius=0), model, prompts), reference)
        assert same(decode(LocalLeap(block, threshold=gamma, relaxed_threshold=gamma), model, prompts), reference)
        assert not same(decode(LocalLeap(block, threshold=gamma, relaxed_threshold=0.3), model, prompts), reference)


@pytest.mark.parametrize("block", [32, 8])
def test_a_threshold_above_one_is_one_hole_a_pass(model, prompts, block):
    out = decode(LocalLeap(block, threshold=1.01, relaxed_threshold=0.1), model, prompts)
    assert same(out, decode(LLaDA(block), model, prompts))
    assert out.stats.emitted == [[1] * 32] * 6


def test_a_radius_of_the_block_is_the_relaxed_threshold_wherever_there_is_an_anchor(model, prompts):
    log = watch(LocalLeap(8, threshold=0.8, relaxed_threshold=0.5, radius=8), model, **prompts, max_new_tokens=32, do_sample=False)
    c, anchored = log.confidence, (log.confidence >= 0.8).any(-1)
    assert 5 < int(anchored.sum()) < len(c)
    assert log.chosen[anchored].equal((c >= 0.5)[anchored])
    assert log.chosen[~anchored].sum(-1).tolist() == [1] * int((~anchored).sum())


@settings(max_examples=15)
@given(seed=st.integers(0, 99), block=st.sampled_from([4, 7, 32]), w=st.integers(0, 6), tau=st.sampled_from([0.2, 0.5, 0.75]))
def test_every_pass_fills_a_hole_and_no_token_changes(model, seed, block, w, tau):
    prompt = random_prompts(1, seed=seed)[0]
    log = watch(LocalLeap(block, radius=w, relaxed_threshold=tau), model, prompt, max_new_tokens=20, do_sample=False)
    assert bool((log.chosen.sum(-1) >= 1).all())
    for first in range(0, 20, block):
        assert int((log.start == first).sum()) <= min(block, 20 - first)
    written = log.place[log.chosen].tolist()
    assert sorted(written) == list(range(20))
    assert log.tokens[log.chosen][np.argsort(written)].tolist() == log.out.continuations[0].tolist()


def test_a_row_is_what_it_would_be_alone(model):
    singles = random_prompts(5, seed=8)
    decoder = LocalLeap(16, threshold=0.8, relaxed_threshold=0.5)
    together = decode(decoder, model, left_pad(singles))
    for row, prompt in enumerate(singles):
        alone = decoder.generate(model, prompt, max_new_tokens=32, do_sample=False)
        assert together.continuations[row].equal(alone.continuations[0])
        assert together.stats.emitted[row] == alone.stats.emitted[0]
    assert len({tuple(e) for e in together.stats.emitted}) == 5  # each row has its own anchors


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_it_works_on_cached_passes(model, prompts, cache):
    pair = {"threshold": 0.8, "cache": cache}
    assert same(decode(LocalLeap(8, relaxed_threshold=0.5, radius=0, **pair), model, prompts), decode(FastDLLM(8, **pair), model, prompts))
    log = watch(LocalLeap(8, relaxed_threshold=0.5, **pair), model, **prompts, max_new_tokens=32, do_sample=False)
    for c, chosen in zip(log.confidence.tolist(), log.chosen):
        assert chosen.nonzero()[:, 0].tolist() == plain_rule([None if x == HOLE else x for x in c], 0.8, 0.5, 4)


def test_sampling_scores_the_drawn_token_before_temperature(model, prompts):
    torch.manual_seed(4)
    log = watch(LocalLeap(8, relaxed_threshold=0.5), model, **prompts, max_new_tokens=8, do_sample=True, temperature=3.0, top_k=0)
    first = log.index == 0
    ids = torch.cat([prompts["input_ids"], torch.full((6, 8), model.config.mask_token_id)], 1)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 8), value=1)
    p = Denoiser(model)(ids, mask)[:, -8:].double().softmax(-1)
    assert torch.allclose(log.confidence[first], p.gather(-1, log.tokens[first][..., None])[..., 0], atol=1e-4)
    assert not log.tokens[first].equal(p.argmax(-1))


# Dream


def rolled(model):
    "The same model with its logits one place too far left, as Dream gives them."
    head = model.get_output_embeddings()

    class Left(type(model)):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.roll(-1, 1)
            if isinstance(logits_to_keep, torch.Tensor):
                out.logits = out.logits[:, logits_to_keep]
            return out

    assert head is not None
    view = object.__new__(Left)
    view.__dict__ = dict(model.__dict__)
    return view


def test_shifted_logits_are_put_right(model, prompts):
    decoder = LocalLeap(8, threshold=0.8, relaxed_threshold=0.5, shift_logits=True)
    plain = decode(LocalLeap(8, threshold=0.8, relaxed_threshold=0.5), model, prompts)
    assert same(decode(decoder, rolled(model), prompts), plain)
    assert not same(decode(decoder, model, prompts), plain)


def test_the_dream_variant_takes_confidence_after_top_p(model, prompts):
    filtered = LogitsProcessorList([TopPLogitsWarper(0.7)])
    dream, raw = (LocalLeap(8, relaxed_threshold=0.8, score_from=s) for s in ("sampled", "raw"))
    logs = [watch(d, model, **prompts, max_new_tokens=8, do_sample=False, logits_processor=filtered) for d in (dream, raw)]
    first = [log.confidence[log.index == 0] for log in logs]
    p = first[1][:, :, None].new_tensor([0.7])
    # a best token of probability c is left alone with at least 0.7, else it is raised
    assert bool((first[0] >= first[1] - 1e-6).all())
    assert bool((first[0][first[1] >= p] == 1).all())
    assert int((logs[0].chosen.sum(-1)[logs[0].index == 0]).sum()) > int(logs[1].chosen.sum(-1)[logs[1].index == 0].sum())
    for log in logs:
        for c, chosen in zip(log.confidence.tolist(), log.chosen):
            assert chosen.nonzero()[:, 0].tolist() == plain_rule([None if x == HOLE else x for x in c], 0.9, 0.8, 4)


# the end of a text


def test_early_stop_writes_the_same_text_in_fewer_passes(model, prompts):
    ends = list(range(2, 97, 4))  # a quarter of the vocabulary ends a text
    runs = {}
    for early in (True, False):
        decoder = LocalLeap(8, relaxed_threshold=0.5, early_stop=early)
        runs[early] = decode(decoder, model, prompts, eos_token_id=ends, pad_token_id=0)
    for a, b, few, many in zip(runs[True].continuations, runs[False].continuations, *(runs[e].stats.emitted for e in (True, False))):
        assert a.equal(b)
        assert len(few) <= len(many)
    assert sum(map(len, runs[True].stats.emitted)) < 0.7 * sum(map(len, runs[False].stats.emitted))


def test_early_stop_changes_nothing_where_there_is_no_end(model, prompts):
    runs = [decode(LocalLeap(8, early_stop=early), model, prompts) for early in (True, False)]
    assert same(*runs)
    assert EOS not in runs[0].sequences


# fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.7}, "0 < relaxed_threshold <= threshold is needed, got 0.75 and 0.7"),
        ({"relaxed_threshold": 0.0}, "0 < relaxed_threshold <= threshold is needed, got 0.0 and 0.9"),
        ({"radius": -1}, "radius must not be negative, got -1"),
        ({"block_length": 0}, "block_length must be positive or None, got 0"),
        ({"score_from": "both"}, "unknown score_from 'both'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        LocalLeap(**fields)


def test_the_papers_values_are_the_defaults():
    decoder = decoders()["localleap"].decoder()
    assert type(decoder) is LocalLeap
    assert (decoder.threshold, decoder.relaxed_threshold, decoder.radius, decoder.block_length) == (0.9, 0.75, 4, 32)


# watching


@pytest.mark.parametrize(
    "decoder", [LLaDA(8), LLaDA(8, steps=16), FastDLLM(8), EntropyBound(12), LocalLeap(), Dream(8, alg="entropy", steps=16)]
)
def test_watching_changes_nothing(model, prompts, decoder):
    before = dict(vars(decoder))
    log = watch(decoder, model, **prompts, max_new_tokens=32, do_sample=False)
    assert same(log.out, decode(decoder, model, prompts))
    assert vars(decoder) == before
    assert torch.bincount(log.row).tolist() == [len(e) for e in log.out.stats.emitted]
    for row in range(6):
        mine = log.row == row
        assert log.index[mine].tolist() == list(range(int(mine.sum())))
        assert log.chosen[mine].sum(-1).tolist() == log.out.stats.emitted[row]
        text = log.out.continuations[row].tolist()
        for tokens, final, places, holes in zip(log.tokens[mine], log.final[mine], log.place[mine], log.holes[mine]):
            assert [text[p] for p in places[holes].tolist()] == final[holes].tolist()
            assert (tokens == final)[holes].tolist() == [t == text[p] for t, p in zip(tokens[holes].tolist(), places[holes].tolist())]


@dataclass
class AllFromTheThird(LLaDA):
    "Two passes as LLaDA, then everything, what is no hole, too."

    def select(self, step):
        return torch.where((step.index < 2)[:, None], super().select(step), True)


def test_what_is_no_hole_is_not_taken(model, prompts):
    log = watch(AllFromTheThird(), model, **prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row in range(6):
        mine = log.row == row
        assert log.chosen[mine].sum(-1).tolist() == [1, 1, 6]
        assert log.chosen[mine].sum(0).tolist() == [1] * 8
        assert log.out.continuations[row].tolist() == [int(log.tokens[mine][log.chosen[mine][:, p], p]) for p in range(8)]


def test_places_behind_the_end_are_no_holes(model, prompts):
    ends = list(range(2, 97, 4))
    log = watch(LocalLeap(8, early_stop=False), model, **prompts, max_new_tokens=32, do_sample=False, eos_token_id=ends, pad_token_id=0)
    lengths = torch.tensor([len(t) for t in log.out.continuations])
    assert int(lengths.min()) < 16
    assert int((log.place - lengths[log.row][:, None])[log.holes].max()) == -1
    assert bool((log.confidence[~log.holes] > HOLE).any())  # they were decoded


@pytest.fixture(scope="module")
def log(model, prompts):
    return watch(LLaDA(16), model, **prompts, max_new_tokens=40, do_sample=False)  # the last block is shorter


def story(log):
    "Proposals by row and place: (pass, token), in order of passes; and the final tokens."
    seen = {}
    for i in range(len(log.row)):
        for j in range(log.tokens.shape[1]):
            if float(log.confidence[i, j]) > HOLE:
                seen.setdefault((int(log.row[i]), int(log.place[i, j])), []).append((int(log.index[i]), int(log.tokens[i, j])))
    return seen, [t.tolist() for t in log.out.continuations]


def test_delays_by_the_definition(log):
    seen, texts = story(log)
    expected = {}
    for (row, place), proposals in seen.items():
        right = [token == texts[row][place] for _, token in proposals]
        commit = proposals[-1][0]
        stable = min(t for k, (t, _) in enumerate(proposals) if all(right[k:]))
        expected[row, place] = (commit, stable, commit - stable)
    found = delays(log)
    assert len(found["row"]) == len(expected) == 6 * 40
    for row, place, *facts in zip(*(found[k].tolist() for k in ("row", "place", "commit", "stable", "delay"))):
        assert tuple(facts) == expected[row, place]
    assert found["delay"].max() > 3
    assert (found["delay"] == 0).any()


def test_decay_by_the_definition(log):
    c, right = log.confidence.tolist(), log.consistent.tolist()
    anchors, own, counts = (0.7, 0.95), (0.1, 0.8), {}
    for i in range(len(c)):
        marks = [k for k, x in enumerate(c[i]) if anchors[0] <= x < anchors[1]]
        for j, x in enumerate(c[i]):
            if own[0] <= x < own[1] and marks and j not in marks:
                counts.setdefault(min(abs(j - k) for k in marks), []).append((int(log.row[i]), right[i][j]))
    curve = decay(log, anchors, own, reach=6)
    assert [s.n for s in curve] == [len(counts.get(d, [])) for d in range(1, 7)]
    for d, s in enumerate(curve, 1):
        assert s.value == pytest.approx(np.mean([r for _, r in counts[d]]))
        assert s.texts == len({row for row, _ in counts[d]})


def test_the_shuffled_control_is_the_mean_of_many_shuffles(log):
    rng = np.random.default_rng(0)
    c, right = log.confidence.numpy(), log.consistent.numpy()
    far = distance(log.confidence >= 0.9).numpy()
    counted = (c >= 0) & (c < 0.9) & (far > 0) & (far <= 5)
    runs = []
    for _ in range(400):
        shuffled = right.copy()
        for i in range(len(c)):
            shuffled[i, counted[i]] = rng.permutation(right[i, counted[i]])
        runs.append([shuffled[counted & (far == d)].mean() for d in range(1, 6)])
    found = [s.value for s in decay(log, reach=5, shuffled=True)]
    assert found == pytest.approx(np.mean(runs, 0), abs=4 * np.std(runs, 0).max() / 20)
    assert found != pytest.approx([s.value for s in decay(log, reach=5)], abs=0.01)


def test_errors_are_taken_over_texts():
    # three texts, all proposals of a text alike: what counts is three, not three hundred
    row = torch.tensor([0, 1, 2])
    chosen = torch.zeros(3, 100, dtype=torch.bool)
    fake = SimpleNamespace(row=row, holes=~chosen, consistent=chosen.clone(), out=SimpleNamespace(continuations=[None] * 3))
    fake.consistent[0] = True
    found = share(fake, ~chosen)
    assert (found.value, found.n, found.texts) == (pytest.approx(1 / 3), 300, 3)
    assert found.error == pytest.approx(np.std([1, 0, 0], ddof=1) / 3**0.5)
    half = torch.arange(100).expand(3, -1) < 50
    gap = share(fake, half) - share(fake, ~half)
    assert (gap.value, gap.error) == (0, 0)  # the two halves rise and fall together
    one = share(fake, ~chosen & (row == 0)[:, None])
    assert one.value == 1
    assert np.isnan(one.error)
    assert np.isnan(share(fake, chosen).value)


def test_no_mark_is_infinitely_far():
    assert int(distance(torch.zeros(2, 5, dtype=torch.bool)).min()) > 10**6


def test_principles_are_plain_numbers(log):
    found = principles(log, threshold=0.8, relaxed_threshold=0.5)
    assert json.loads(json.dumps(to_plain(found)))["delays"] == found["delays"]
    assert sum(found["delays"]) == 240
    assert len(found["decay by anchor"]) == len(found["beside by anchor"]) == len(BANDS)
    c, right = log.confidence, log.consistent
    anchors, far = c >= 0.8, distance(c >= 0.8)
    beside = dilate(anchors, 4)
    assert to_plain(found["decay"]) == [to_plain(s.plain()) for s in decay(log, (0.8, 1.01), (0.0, 0.8))]
    assert to_plain(found["shuffled"]) == [to_plain(s.plain()) for s in decay(log, (0.8, 1.01), (0.0, 0.8), shuffled=True)]
    pool = (c >= 0) & (c < 0.8) & anchors.any(-1, keepdim=True)
    near, away = pool & (far <= 4), pool & (far > 8)
    assert int(away.sum()) > 20
    parts = [[float(x[mask].double().mean()) for mask in (near, away)] for x in (right, passwise(right, pool))]
    falls = [a - b for a, b in parts]
    assert found["fall"]["as it is"]["value"] == pytest.approx(falls[0])
    assert found["fall"]["shuffled"]["value"] == pytest.approx(falls[1])
    assert found["fall"]["difference"]["value"] == pytest.approx(falls[0] - falls[1])
    for (low, high), facts in zip(BANDS, found["beside by anchor"].values()):
        places = (c >= 0) & (c < 0.8) & dilate((c >= low) & (c < high), 4)
        assert facts["n"] == int(places.sum())
        assert facts["value"] == pytest.approx(float(right[places].double().mean()), nan_ok=True)
    assert sum(facts["n"] > 20 for facts in found["beside by anchor"].values()) >= 3
    waits = delays(log)
    third = waits["delay"][waits["row"] == 2]
    assert found["median delay of each text"][2] == np.median(third)
    assert found["share that waited, of each text"][2] == pytest.approx(np.mean(third > 0))
    band = (c >= 0.5) & (c < 0.8)
    assert found["band"]["beside"]["n"] == int((band & beside).sum()) > 20
    assert found["band"]["beside"]["value"] == pytest.approx(float(right[band & beside].double().mean()))
    away = band & ~beside & (c >= 0.8).any(-1, keepdim=True)
    assert found["band"]["away"]["value"] == pytest.approx(float(right[away].double().mean()))
    assert found["band"]["no anchor"]["n"] == int(band.sum()) - int((band & beside).sum()) - int(away.sum())


def passwise(right, pool):
    "The mean over the pool of each pass, at every place."
    rows = [[float(r[p].double().mean()) if bool(p.any()) else 0.0] * len(r) for r, p in zip(right, pool)]
    return torch.tensor(rows)


# the control of places


@settings(max_examples=300)
@given(row=confidences, w=st.integers(0, 3))
def test_both_sides_of_the_control_add_the_same_number_of_holes_of_the_band(row, w):
    c = tensor(row)
    near, far = (leap(c, 0.9, 0.6, w, PlacedExtras, side=side) for side in ("near", "far"))
    plain = leap(c, 0.9, 0.9, 0)
    reached = dilate(c >= 0.9, w)
    assert int(near.sum()) == int(far.sum())
    for chosen, side in ((near & ~plain, reached), (far & ~plain, ~reached)):
        assert bool((side & (c >= 0.6) & (c < 0.9))[chosen].all())
        assert not bool((plain & ~(near & far)).any())
    full = leap(c, 0.9, 0.6, w)
    assert not bool((near & ~full).any())  # near is what LocalLeap commits, cut to what the other side has
    if int(near.sum()) > int(plain.sum()):
        left = side_of(c, reached) & ~near
        assert not bool(left.any()) or float(c[left].max()) <= float(c[near & ~plain].min())  # the surest ones


def side_of(c, reached):
    return reached & (c >= 0.6) & (c < 0.9)


def test_the_control_does_something():
    c = [[0.95, 0.7, 0.65, 0.1, 0.8, 0.1, 0.61, 0.7]]
    assert leap(c, 0.9, 0.6, 2, PlacedExtras, side="near").nonzero()[:, 1].tolist() == [0, 1, 2]
    assert leap(c, 0.9, 0.6, 2, PlacedExtras, side="far").nonzero()[:, 1].tolist() == [0, 4, 7]
    with pytest.raises(ValueError, match="unknown side 'up'"):
        PlacedExtras(side="up")


# races


def test_agreement_by_hand():
    a, b = ([torch.tensor(x) for x in texts] for texts in ([[1, 2, 3], [1, 2], [5, 6, 7, 8]], [[1, 9, 3], [1, 2, 3, 4], [5, 6]]))
    outs = [SimpleNamespace(continuations=x) for x in (a, b)]
    assert agreement(*outs).tolist() == pytest.approx([2 / 3, 2 / 4, 1])


def test_agreement_of_texts_of_different_length():
    short, long = (SimpleNamespace(continuations=[torch.tensor(x)]) for x in ([1, 2], [1, 2, 3, 4]))
    assert agreement(short, long).tolist() == [0.5]
    assert agreement(long, short).tolist() == [1.0]


def test_a_race_counts_passes_agreement_and_score(model, tokenizer):
    texts, seen = ["ab", "what is that", "c", "no more than this"], []

    def judge(i, text):
        seen.append((i, text))
        return float(len(text) + 100 * i)

    found = race(model, tokenizer, texts, rivals(), 16, judge, batch_size=3)
    assert list(found) == list(rivals())
    for name, decoder in rivals().items():
        for i, text in enumerate(texts):
            ids = tokenizer(text, return_tensors="pt").input_ids
            out, reference = (d.generate(model, ids, max_new_tokens=16, do_sample=False) for d in (decoder, LLaDA(32)))
            assert found[name]["passes"][i] == len(out.stats.emitted[0])
            assert found[name]["agreement"][i] == pytest.approx(agreement(out, reference)[0])
            assert (i, out.text(tokenizer)[0]) in seen
            assert found[name]["score"][i] == len(out.text(tokenizer)[0]) + 100 * i
    assert found["1 per step"]["agreement"] == [1.0] * 4
    assert found["threshold 0.75"]["passes"] != found["1 per step"]["passes"]
    assert "score" not in race(model, tokenizer, texts[:1], {"1 per step": LLaDA(32)}, 4)["1 per step"]


def test_sweeps_hold_the_papers_setting_and_the_limits():
    found = sweeps((1, 4))
    assert found["W = 4, tau = 0.75"] == LocalLeap()
    assert found["W = 0, tau = 0.75"].radius == 0
    assert {d.relaxed_threshold for n, d in found.items() if n.startswith("W = 1,")} == {0.5, 0.6, 0.7, 0.75, 0.8, 0.9}
    assert found["threshold 0.9"] == FastDLLM()
    assert [d.side for d in sides().values()] == ["near", "far"]
    careful = cautious()
    assert all(0.8 <= d.relaxed_threshold < d.threshold for n, d in careful.items() if n.startswith("kappa"))
    assert all(n == f"threshold {d.threshold}" or n == f"kappa = {d.threshold}, tau = {d.relaxed_threshold}" for n, d in careful.items())


def test_exercises_are_as_many_of_each_task():
    found = exercises(2, seed=5)
    assert len(found) == 2 * 13
    assert {e.task for e in found} >= {"list_sort", "arithmetic", "sudoku", "countdown"}
    assert found == exercises(2, seed=5) != exercises(2, seed=6)


def test_the_experiment_on_a_small_scale(monkeypatch):
    monkeypatch.setattr(localleap, "EXERCISES", (CountdownTask(2), ListTask("copy", 2)))
    monkeypatch.setattr(localleap, "sweeps", lambda: {"W = 4, tau = 0.75": LocalLeap()})
    monkeypatch.setattr(localleap, "cautious", lambda: {"threshold 0.95": FastDLLM(threshold=0.95)})
    try:
        found = to_plain(localleap.experiment(per_task=2, watched=2, prompts=2))
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the masked models of the zoo are not here: {error}")
    assert json.loads(json.dumps(found)) == found
    assert set(found["principles"]) == {"exercises", "stories"}
    frame = pd.DataFrame(found["rivals"])
    assert frame.groupby("method").size().to_dict() == dict.fromkeys(rivals(), 4)
    assert list(table(frame).index) == list(rivals())
    assert list(found["exercises"]) == ["1 per step", "W = 4, tau = 0.75", "threshold 0.95", "band, near", "band, far"]
    assert all(len(run[m]) == 4 for run in found["exercises"].values() for m in ("passes", "agreement", "score"))
    assert all(len(run["passes"]) == 2 for run in found["stories"].values())
    ours = frame[frame.method == "localleap"].sort_values("example")
    assert ours.passes.tolist() == found["exercises"]["W = 4, tau = 0.75"]["passes"]
    assert ours.score.tolist() == found["exercises"]["W = 4, tau = 0.75"]["score"]


# the cliff


def replace_one(entries, commas):
    law = list_distribution("replace_random", entries)
    if commas:
        spread = torch.full((entries, 2 * entries - 1), 20)
        spread[:, ::2] = law.strings
        law = Distribution.uniform(spread)
    return IdealDenoiser(law, 24, ties="random"), law.length


@pytest.mark.parametrize(
    ("entries", "commas", "fields", "accuracy"),
    [
        (5, False, {}, 1.0),  # 4/5 lies between the thresholds, and nothing is an anchor
        (5, False, {"threshold": 0.78}, 0.0),  # every place is an anchor
        (12, False, {}, 0.0),
        (5, True, {}, 0.0),  # the commas are anchors
        (5, True, {"radius": 0}, 1.0),
        (5, True, {"relaxed_threshold": 0.81}, 1.0),
    ],
)
def test_a_certain_neighbour_is_no_reason(entries, commas, fields, accuracy):
    denoiser, room = replace_one(entries, commas)
    out = LocalLeap(**fields).generate(denoiser, denoiser.start.expand(40, 1), max_new_tokens=room, do_sample=False)
    assert float(denoiser.possible(out.sequences).double().mean()) == accuracy
