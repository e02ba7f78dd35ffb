"""LocalLeap: its rule against a plain transcription, its limits, its rows, and the measurement of its two principles."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, decode_batch, left_pad, random_prompts, same_steps, small_model
from transformers import LogitsProcessorList, TopPLogitsWarper

from decodelab.core.contract import decoders
from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.denoiser import Denoiser
from decodelab.diffusion.fast_dllm import FastDLLM
from decodelab.diffusion.ideal import Distribution, IdealDenoiser
from decodelab.diffusion.localleap import LocalLeap, dilate
from decodelab.diffusion.step import top
from decodelab.experiments.diffusion.localleap import distance
from decodelab.lab.tasks.ideal_lists import list_distribution
from decodelab.lab.watch import watch

NOTHING = -float("inf")
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    "A random model whose confidences lie on both sides of both thresholds."
    return small_model(spread=0.7)


@pytest.fixture(scope="module")
def prompts():
    return left_pad(random_prompts(6, seed=3))


# the rule, word by word


def plain_rule(c, kappa, tau, w):
    "Positions that one row commits; c holds None where nothing is masked."
    masked = [j for j, x in enumerate(c) if x is not None]
    anchors = [i for i in masked if c[i] >= kappa]
    chosen = set()
    for j in masked:
        near = any(i - w <= j <= i + w for i in anchors)
        if c[j] >= (tau if near else kappa):
            chosen.add(j)
    best = max(masked, key=lambda j: (c[j], -j))
    return sorted(chosen | {best})


def leap(c, kappa, tau, w, cls=LocalLeap, **fields):
    "What the decoder commits in a step with these confidences, [rows, block], bool."
    c = torch.as_tensor(c, dtype=torch.float32)
    decoder = cls(threshold=kappa, relaxed_threshold=tau, radius=w, **fields)
    masked = c > NOTHING
    step = SimpleNamespace(confidence=c, masked=masked, best=lambda: top(c, torch.ones(len(c))))
    return decoder.select(step) & masked


# few values, so that ties and equality with a threshold are common


LEVELS = [0.05, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1.0]


confidences = st.lists(st.one_of(st.none(), st.sampled_from(LEVELS)), min_size=1, max_size=14).filter(any)


levels = st.sampled_from(LEVELS)


radii = st.integers(0, 16)


def tensor(row):
    return torch.tensor([[NOTHING if x is None else x for x in row]])


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
    c = [[0.30, NOTHING, 0.80, 0.40, 0.95, 0.10, 0.76, 0.82]]
    assert leap(c, 0.9, 0.75, 2).nonzero()[:, 1].tolist() == [2, 4, 6]  # 7 is three positions away: no second hop from 6
    assert leap(c, 0.9, 0.75, 3).nonzero()[:, 1].tolist() == [2, 4, 6, 7]


def test_without_an_anchor_one_masked_position_is_filled():
    assert leap([[0.85, 0.88, 0.88, 0.80]], 0.9, 0.75, 4).nonzero()[:, 1].tolist() == [
        1
    ]  # the first of equals, and no masked position beside it


def test_both_thresholds_are_reached_by_equality():
    assert leap([[0.9, 0.75, 0.1]], 0.9, 0.75, 1).nonzero()[:, 1].tolist() == [0, 1]
    assert leap([[1.0, 1.0, 0.99]], 1.0, 1.0, 1).nonzero()[:, 1].tolist() == [0, 1]


def test_visible_tokens_are_no_anchors():
    shown = torch.tensor([[0.99, 0.8, 0.78, 0.2]])  # the visible one would be an anchor
    c = shown.masked_fill(torch.tensor([[True, False, False, False]]), NOTHING)
    step = SimpleNamespace(raw_confidence=shown, confidence=c, best=lambda: top(c, torch.ones(1)))
    assert LocalLeap().select(step).nonzero()[:, 1].tolist() == [1]
    step.confidence = shown
    assert LocalLeap().select(step).nonzero()[:, 1].tolist() == [0, 1, 2]


@settings(max_examples=200)
@given(marks=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), w=radii)
def test_dilation_is_all_positions_within_the_radius(marks, w):
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
    "One text by the rule, pass by pass: new tokens, and tokens written in each step."
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
        reference = decode_batch(FastDLLM(block, threshold=gamma), model, prompts)
        assert same_steps(decode_batch(LocalLeap(block, threshold=gamma, relaxed_threshold=0.3, radius=0), model, prompts), reference)
        assert same_steps(decode_batch(LocalLeap(block, threshold=gamma, relaxed_threshold=gamma), model, prompts), reference)
        assert not same_steps(decode_batch(LocalLeap(block, threshold=gamma, relaxed_threshold=0.3), model, prompts), reference)


@pytest.mark.parametrize("block", [32, 8])
def test_a_threshold_above_one_is_one_masked_position_a_pass(model, prompts, block):
    out = decode_batch(LocalLeap(block, threshold=1.01, relaxed_threshold=0.1), model, prompts)
    assert same_steps(out, decode_batch(LLaDA(block), model, prompts))
    assert out.stats.emitted == [[1] * 32] * 6


def test_a_radius_of_the_block_is_the_relaxed_threshold_wherever_there_is_an_anchor(model, prompts):
    log = watch(LocalLeap(8, threshold=0.8, relaxed_threshold=0.5, radius=8), model, **prompts, max_new_tokens=32, do_sample=False)
    c, anchored = log.confidence, (log.confidence >= 0.8).any(-1)
    assert 5 < int(anchored.sum()) < len(c)
    assert log.chosen[anchored].equal((c >= 0.5)[anchored])
    assert log.chosen[~anchored].sum(-1).tolist() == [1] * int((~anchored).sum())


@settings(max_examples=15)
@given(seed=st.integers(0, 99), block=st.sampled_from([4, 7, 32]), w=st.integers(0, 6), tau=st.sampled_from([0.2, 0.5, 0.75]))
def test_every_pass_fills_a_masked_position_and_no_token_changes(model, seed, block, w, tau):
    prompt = random_prompts(1, seed=seed)[0]
    log = watch(LocalLeap(block, radius=w, relaxed_threshold=tau), model, prompt, max_new_tokens=20, do_sample=False)
    assert bool((log.chosen.sum(-1) >= 1).all())
    for first in range(0, 20, block):
        assert int((log.start == first).sum()) <= min(block, 20 - first)
    written = log.position[log.chosen].tolist()
    assert sorted(written) == list(range(20))
    assert log.tokens[log.chosen][np.argsort(written)].tolist() == log.out.continuations[0].tolist()


def test_a_row_is_what_it_would_be_alone(model):
    singles = random_prompts(5, seed=8)
    decoder = LocalLeap(16, threshold=0.8, relaxed_threshold=0.5)
    together = decode_batch(decoder, model, left_pad(singles))
    for row, prompt in enumerate(singles):
        alone = decoder.generate(model, prompt, max_new_tokens=32, do_sample=False)
        assert together.continuations[row].equal(alone.continuations[0])
        assert together.stats.emitted[row] == alone.stats.emitted[0]
    assert len({tuple(e) for e in together.stats.emitted}) == 5  # each row has its own anchors


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_it_works_on_cached_passes(model, prompts, cache):
    pair = {"threshold": 0.8, "cache": cache}
    assert same_steps(
        decode_batch(LocalLeap(8, relaxed_threshold=0.5, radius=0, **pair), model, prompts),
        decode_batch(FastDLLM(8, **pair), model, prompts),
    )
    log = watch(LocalLeap(8, relaxed_threshold=0.5, **pair), model, **prompts, max_new_tokens=32, do_sample=False)
    for c, chosen in zip(log.confidence.tolist(), log.chosen):
        assert chosen.nonzero()[:, 0].tolist() == plain_rule([None if x == NOTHING else x for x in c], 0.8, 0.5, 4)


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
    plain = decode_batch(LocalLeap(8, threshold=0.8, relaxed_threshold=0.5), model, prompts)
    assert same_steps(decode_batch(decoder, rolled(model), prompts), plain)
    assert not same_steps(decode_batch(decoder, model, prompts), plain)


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
            assert chosen.nonzero()[:, 0].tolist() == plain_rule([None if x == NOTHING else x for x in c], 0.9, 0.8, 4)


# the end of a text


def test_early_stop_writes_the_same_text_in_fewer_passes(model, prompts):
    ends = list(range(2, 97, 4))  # a quarter of the vocabulary ends a text
    runs = {}
    for early in (True, False):
        decoder = LocalLeap(8, relaxed_threshold=0.5, early_stop=early)
        runs[early] = decode_batch(decoder, model, prompts, eos_token_id=ends, pad_token_id=0)
    for a, b, few, many in zip(runs[True].continuations, runs[False].continuations, *(runs[e].stats.emitted for e in (True, False))):
        assert a.equal(b)
        assert len(few) <= len(many)
    assert sum(map(len, runs[True].stats.emitted)) < 0.7 * sum(map(len, runs[False].stats.emitted))


def test_early_stop_changes_nothing_where_there_is_no_end(model, prompts):
    runs = [decode_batch(LocalLeap(8, early_stop=early), model, prompts) for early in (True, False)]
    assert same_steps(*runs)
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


# the cliff


def replace_one(entries, commas):
    dist = list_distribution("replace_random", entries)
    if commas:
        spread = torch.full((entries, 2 * entries - 1), 20)
        spread[:, ::2] = dist.strings
        dist = Distribution.uniform(spread)
    return IdealDenoiser(dist, 24, ties="random"), dist.length


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
    denoiser, length = replace_one(entries, commas)
    out = LocalLeap(**fields).generate(denoiser, denoiser.start.expand(40, 1), max_new_tokens=length, do_sample=False)
    assert float(denoiser.possible(out.sequences).double().mean()) == accuracy
