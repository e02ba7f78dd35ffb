"""Early rejection of ends and ascending step sizes: plans and factors by arithmetic, the order by hand, reductions to LLaDA's decoder."""

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ENDS, EOS, PAD, canvases, left_pad, made_step, random_prompts, small_model

from decodelab.core.contract import decoders
from decodelab.diffusion import eoser_ass
from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.eoser_ass import ASS, EOSER, ascending_blocks, ascending_steps, eos_rejected
from decodelab.lab.watch import watch

WHOLE = {"early_stop": False}


@pytest.fixture(scope="module")
def model():
    "A random decoder-only model that is run in both directions; <pad> stands for a masked position."
    model = small_model()
    model.config.mask_token_id = PAD
    return model


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(4, lengths=(3, 9), seed=5)


def decode(decoder, model, prompt, new=16, **kwargs):
    inputs = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    return decoder.generate(model, **inputs, **({"max_new_tokens": new, "do_sample": False, "eos_token_id": ENDS} | kwargs))


def committed(lines, row=0):
    "how many positions each step of a row filled."
    return lines[lines["row"] == row].groupby("step")["committed"].sum().tolist()


# plans


@settings(max_examples=300)
@given(length=st.integers(4, 5000))
def test_step_sizes_double_until_the_last_takes_the_rest(length):
    sizes = ascending_steps(length)
    S = math.floor(math.log2(length))
    assert len(sizes) == S
    assert sum(sizes) == length
    assert sizes[:-1] == [2**s for s in range(S - 1)]
    assert sizes[-1] == length - (2 ** (S - 1) - 1)


def test_step_sizes_of_the_paper():
    assert ascending_steps(128) == [1, 2, 4, 8, 16, 32, 65]
    assert ascending_steps(256) == [1, 2, 4, 8, 16, 32, 64, 129]
    assert [ascending_steps(length) for length in (1, 2, 3, 4, 7, 8)] == [[1], [2], [3], [1, 3], [1, 6], [1, 2, 5]]


def blocks_from_the_right(length, n):
    "The paper's words: the last block, then halves of it going left, then what is left for the first."
    S = math.floor(math.log2(length))
    rem = length - 2**S
    if n == 1:
        return [length]
    last = 2 ** (S - 1) + 1 + rem
    between = [2 ** (S - 1 - i) for i in range(1, n - 1)]
    return [2 ** (S - n + 1) - 1, *between[::-1], last]


def test_block_sizes_for_every_length_and_number():
    for length in range(4, 301):
        for n in range(1, math.floor(math.log2(length)) + 1):
            blocks = ascending_blocks(length, n)
            assert blocks == blocks_from_the_right(length, n), (length, n)
            assert (sum(blocks), len(blocks)) == (length, n)
    assert ascending_blocks(128, 4) == [15, 16, 32, 65]


@pytest.mark.parametrize(("length", "n"), [(16, 0), (16, 5), (128, 8), (3, 2)])
def test_a_number_of_blocks_that_does_not_fit(length, n):
    with pytest.raises(ValueError, match=rf"{length} new tokens take \d ascending steps: block_num must be 1 to \d, got {n}"):
        ascending_blocks(length, n)


def test_no_length():
    with pytest.raises(ValueError, match="length must be positive, got 0"):
        ascending_steps(0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 16, 23, 32])
def test_passes_fill_what_the_plan_says(length, model, prompts):
    sizes = ascending_steps(length)
    for n in range(1, len(sizes) + 1):
        for decoder in (ASS(block_num=n, **WHOLE), ASS(block_num=n, eoser=True, **WHOLE)):
            _, lines = canvases(decoder, model, prompts[0], length)
            assert committed(lines) == sizes
            edges = [0, *torch.tensor(ascending_blocks(length, n)).cumsum(0).tolist()]
            seen = lines.groupby("step")["position"].agg(["min", "max"])
            first = len(sizes) - n + 1
            for s, (low, high) in enumerate(seen.values.tolist()):  # a step looks at its own block only
                block = max(0, s - first + 1)
                assert edges[block] <= low
                assert high == edges[block + 1] - 1 or s > 0
                assert high < edges[block + 1]
            assert lines["position"].max() == length - 1


def test_blocks_that_do_not_fit_the_new_tokens(model, prompts):
    with pytest.raises(ValueError, match="16 new tokens take 4 ascending steps: block_num must be 1 to 4, got 5"):
        decode(ASS(block_num=5), model, prompts[0], 16)


# the factor


def test_the_factor_of_uniform_steps():
    for S in (2, 3, 8, 64, 128):
        for low, high in ((0, 1), (0.4, 1), (0.01, 0.9)):
            found = EOSER(gamma_min=low, gamma_max=high).gamma(torch.arange(S), S)
            exact = [Fraction(low) + (Fraction(high) - Fraction(low)) * Fraction(s, S - 1) for s in range(S)]
            assert found.tolist() == pytest.approx([float(g) for g in exact], abs=1e-15)
    assert EOSER(gamma_min=0.4, gamma_max=0.8).gamma(torch.tensor([0, 0]), 1).tolist() == [0.8, 0.8]


def test_the_factor_of_ascending_steps_follows_the_share_that_is_committed():
    for S in range(2, 9):
        found = ASS(eoser=True, gamma_min=0.01).gamma(torch.arange(S), S)
        done = torch.tensor(ascending_steps(2**S)).cumsum(0)
        assert found[:-1].tolist() == pytest.approx([0.01 + 0.99 * float(n) / 2**S for n in done[:-1]], abs=1e-15)
        assert float(found[-1]) == pytest.approx(1 * (1 - 2.0**-S) + 0.01 * 2.0**-S, abs=1e-15)


@dataclass
class Watched(EOSER):
    "Keeps what the factor was asked for."

    asked: list = field(default_factory=list, kw_only=True)

    def gamma(self, s, steps):
        self.asked.append((s.tolist(), steps))
        return super().gamma(s, steps)


@pytest.mark.parametrize(("fields", "S"), [({}, 16), ({"steps": 8}, 8), ({"block_length": 4}, 16), ({"block_length": 4, "steps": 8}, 8)])
def test_the_step_number_counts_through_the_whole_text(fields, S, model, prompts):
    decoder = Watched(**fields, **WHOLE)
    decode(decoder, model, prompts[0])
    assert decoder.asked == [([s], S) for s in range(S)]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_step_number_of_ascending_blocks_counts_through_the_whole_text(n, model, prompts, monkeypatch):
    used = []
    monkeypatch.setattr(eoser_ass, "eos_rejected", lambda step, gamma: used.append(gamma.tolist()) or eos_rejected(step, gamma))
    decoder = ASS(block_num=n, eoser=True, **WHOLE)
    decode(decoder, model, prompts[0])
    assert used == [[pytest.approx(0.01 + 0.99 * (2 ** (s + 1) - 1) / 2**4)] for s in range(4)]


def test_the_order_of_two_passes_by_hand():
    # positions: 0 x .5, 1 end .9, 2 x .3, 3 end .6, 4 visible end; gamma = 0.5: .5, .45, .3, .3, -
    step = by_hand([0.5, 0.9, 0.3, 0.6, 1.0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 0])
    score = eos_rejected(step, torch.tensor([0.5], dtype=torch.double))
    assert score[0].tolist() == pytest.approx([0.5, 0.45, 0.3, 0.3, -math.inf])
    decoder = EOSER(gamma_min=0.5, gamma_max=0.5)
    assert decoder.select(step).tolist() == [[True, False, False, False, False]]
    step.block.initial_count, step.plan.block_steps = torch.tensor([4]), 2
    assert decoder.select(step).tolist() == [[True, True, False, False, False]]
    assert LLaDA().select(step).tolist() == [[False, True, False, True, False]]


def by_hand(confidence, ends, masked):
    "A first step with given proposals: token 1 is an end."
    masked, tokens = torch.tensor([masked]).bool(), torch.tensor([ends]).long()
    canvas = SimpleNamespace(steps_taken=torch.zeros(1, dtype=torch.long))
    step = made_step(torch.zeros(*masked.shape, 2), masked, tokens, canvas, steps=int(masked.sum()), eos_ids=[1])
    step.raw_confidence = torch.tensor([confidence])
    return step


# only the order changes


PLACE = st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), st.booleans(), st.booleans())


@settings(max_examples=300)
@given(positions=st.lists(PLACE, min_size=1, max_size=10), gammas=st.lists(st.floats(0, 1), min_size=2, max_size=2), k=st.integers(1, 10))
def test_a_smaller_factor_never_commits_more_ends_in_the_first_pass(positions, gammas, k):
    positions[0] = (*positions[0][:2], True)
    step = by_hand(*(list(column) for column in zip(*positions)))
    step.block.initial_count, step.plan.block_steps = torch.tensor([k]), 1  # the schedule commits k positions
    low, high = sorted(gammas)
    ends = step.proposes_eos()
    counts = [int((EOSER(gamma_min=g, gamma_max=1).select(step) & ends).sum()) for g in (low, high)]
    plain = int((LLaDA().select(step) & ends).sum())
    assert counts[0] <= counts[1] <= plain
    others = int(((step.confidence > 0) & ~ends).sum())
    if others >= k:
        assert int((EOSER(gamma_min=0.0).select(step) & ends).sum()) == 0
    # nothing but masked positions, and as many as the schedule says
    for g in gammas:
        chosen = EOSER(gamma_min=g).select(step)
        assert not bool((chosen & ~step.masked).any())
        assert int(chosen.sum()) == min(k, int(step.masked.sum()))


def test_proposals_stay_what_the_model_says(model, prompts):
    first = []
    for decoder in (LLaDA(**WHOLE), EOSER(gamma_min=0, **WHOLE), ASS(**WHOLE), ASS(eoser=True, gamma_min=0, **WHOLE)):
        _, lines = canvases(decoder, model, prompts[1])
        assert lines["end"].equals(lines["token"].isin(ENDS))
        start = lines[lines["step"] == 0]
        assert start["end"].any()
        first.append(start[["token", "confidence"]].values.tolist())
    assert all(f == first[0] for f in first)


def test_ends_wait_and_are_committed_in_the_end(model, prompts):
    for prompt in prompts:
        tokens, lines = canvases(EOSER(gamma_min=0, gamma_max=0, **WHOLE), model, prompt)
        assert len(tokens[0]) == 16
        assert PAD not in tokens[0]
        for _, now in lines.groupby("step"):
            if not now["end"].all():
                assert not now[now["committed"]]["end"].any()
    assert any(token in ENDS for token in tokens[0])


# reductions


PLAIN = [
    {},
    {"steps": 4},
    {"block_length": 4},
    {"block_length": 8, "steps": 4},
    {"steps": 5, "suppress_eos_confidence": True},
    {"suppress_eos_logits": True},
    {"block_length": 8, "cache": "dual"},
    {"early_stop": False},
]


@pytest.mark.parametrize("fields", PLAIN, ids=str)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_factor_of_one_is_llada(fields, do_sample, model, prompts):
    batch = left_pad(prompts)
    texts = []
    for decoder in (LLaDA(**fields), EOSER(gamma_min=1, **fields)):
        torch.manual_seed(2)
        texts.append(canvases(decoder, model, batch, do_sample=do_sample)[0])
    assert texts[0] == texts[1]


def test_a_factor_below_one_is_not(model, prompts):
    batch = left_pad(prompts)
    assert canvases(LLaDA(**WHOLE), model, batch)[0] != canvases(EOSER(**WHOLE), model, batch)[0]


class Zeroed(LLaDA):
    "The confidence of proposed ends is 0, that of all others what it was."

    def propose(self, step):
        super().propose(step)
        step.raw_confidence = step.raw_confidence.masked_fill(step.proposes_eos(), 0.0)


def test_a_factor_of_zero_commits_ends_last(model, prompts):
    batch = left_pad(prompts)
    for steps in (None, 4):
        last = canvases(Zeroed(steps=steps, **WHOLE), model, batch)[0]
        assert canvases(EOSER(steps=steps, gamma_min=0, gamma_max=0, **WHOLE), model, batch)[0] == last


def test_without_ends_nothing_is_rejected(model, prompts):
    batch = left_pad(prompts)
    assert decode(EOSER(), model, batch, eos_token_id=None).sequences.equal(decode(LLaDA(), model, batch, eos_token_id=None).sequences)
    both = (decode(ASS(eoser=e), model, batch, eos_token_id=None).sequences for e in (True, False))
    assert next(both).equal(next(both))


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy", "left_to_right"])
def test_ascending_steps_differ_from_llada_in_their_sizes_only(remasking, model, prompts):
    @dataclass
    class Uniform(ASS):
        "Every step fills as many as LLaDA's schedule says."

        def select(self, step):
            step.plan.block_steps = len(ascending_steps(16))
            return LLaDA.select(self, step)

    batch = left_pad(prompts)
    assert canvases(Uniform(remasking=remasking), model, batch)[0] == canvases(LLaDA(steps=4, remasking=remasking), model, batch)[0]
    for length in (1, 2, 3):  # one step is one step
        one = canvases(LLaDA(steps=1, remasking=remasking), model, batch, length)[0]
        assert canvases(ASS(remasking=remasking), model, batch, length)[0] == one


def test_ascending_steps_with_a_factor_of_one_reject_nothing(model, prompts):
    batch = left_pad(prompts)
    for n in (1, 3):
        plain = canvases(ASS(block_num=n, **WHOLE), model, batch)[0]
        assert canvases(ASS(block_num=n, eoser=True, gamma_min=1, **WHOLE), model, batch)[0] == plain
        if n == 1:
            assert canvases(ASS(eoser=True, **WHOLE), model, batch)[0] != plain


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_blocks_of_one_pass_each_gain_and_lose_nothing_by_a_cache(cache, model, prompts):
    batch = left_pad(prompts)
    decoder = {"block_num": 4, "eoser": True, "early_stop": False}  # L = 16: blocks 1, 2, 4, 9
    assert canvases(ASS(cache=cache, **decoder), model, batch)[0] == canvases(ASS(**decoder), model, batch)[0]


# rows, stopping, books


EVERY = [EOSER(), EOSER(gamma_min=0, steps=4), EOSER(block_length=4), ASS(), ASS(eoser=True), ASS(block_num=3, eoser=True)]


@pytest.mark.parametrize("decoder", EVERY, ids=repr)
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_batch_is_its_rows(decoder, early_stop, model, prompts):
    decoder = type(decoder)(**{f.name: getattr(decoder, f.name) for f in fields(decoder) if f.init} | {"early_stop": early_stop})
    together = decode(decoder, model, left_pad(prompts), eos_token_id=ENDS[:6])
    for row, prompt in enumerate(prompts):
        alone = decode(decoder, model, prompt, eos_token_id=ENDS[:6])
        assert together.continuations[row].tolist() == alone.continuations[0].tolist()
        assert together.stats.emitted[row] == alone.stats.emitted[0]


@pytest.mark.parametrize("decoder", EVERY, ids=repr)
def test_early_stopping_writes_the_same_text_with_fewer_passes(decoder, model, prompts):
    settings = {f.name: getattr(decoder, f.name) for f in fields(decoder) if f.init}
    saved = 0
    for prompt in prompts:
        early, whole = (decode(type(decoder)(**settings | {"early_stop": e}), model, prompt) for e in (True, False))
        assert early.sequences.equal(whole.sequences)
        saved += len(whole.stats.emitted[0]) - len(early.stats.emitted[0])
        assert len(early.stats.emitted[0]) <= len(whole.stats.emitted[0]) == (decoder.steps or (4 if isinstance(decoder, ASS) else 16))
    assert saved > 0 or decoder != EOSER()


@pytest.mark.parametrize("decoder", [EOSER(trace=True, **WHOLE), ASS(eoser=True, block_num=2, trace=True, **WHOLE)], ids=repr)
def test_every_state_follows_from_the_pass_of_each_place(decoder, model, prompts):
    out = decode(decoder, model, prompts[2])
    tokens, lines = canvases(decoder, model, prompts[2])
    when = torch.tensor(lines[lines["committed"]].sort_values("position")["step"].tolist())  # one number a position
    told = [w for step in out.trace for w in step.info["step"]]
    assert told == when[: len(told)].tolist()
    passes = len(out.stats.emitted[0])
    assert len(when) == 16
    assert sorted(set(when.tolist())) == list(range(passes))
    for s in range(passes):
        masked = lines[lines["step"] == s]["position"].tolist()  # the recorded state: which positions of the block are masked
        block = [p for p in range(16) if p in masked or when[p] < s]
        assert masked == [p for p in block if when[p] >= s]
        filled = lines[(lines["step"] == s) & lines["committed"]]
        assert filled["position"].tolist() == (when == s).nonzero()[:, 0].tolist()
        assert filled["token"].tolist() == [tokens[0][p] for p in filled["position"]]


def test_watching_changes_nothing(model, prompts):
    decoder = EOSER()
    before = decode(decoder, model, prompts[0])
    log = watch(decoder, model, input_ids=prompts[0], max_new_tokens=16, do_sample=False, eos_token_id=ENDS)
    out, lines = log.out, log.lines()
    assert type(decoder) is EOSER
    assert out.sequences.equal(before.sequences)
    assert out.stats.emitted == before.stats.emitted
    assert len(lines) == sum(16 - s for s in range(len(out.stats.emitted[0])))
    assert set(lines.columns) == {"row", "step", "position", "token", "confidence", "end", "committed"}


# what the decoders are and refuse


def test_defaults_are_the_papers():
    methods = decoders()
    eoser, ass = methods["eoser"], methods["ass"]
    assert (eoser.decoder, ass.decoder) == (EOSER, ASS)
    for method in (eoser, ass):
        assert (method.url, method.year, method.notebook, method.lossless) == (
            "https://arxiv.org/abs/2509.23924",
            2025,
            "diffusion/eoser_ass",
            False,
        )
    assert (EOSER().gamma_min, EOSER().gamma_max, EOSER().block_length) == (0.4, 1.0, None)
    assert (ASS().block_num, ASS().eoser, ASS().gamma_min, ASS().gamma_max) == (1, False, 0.01, 1.0)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 1.0), (0.5, 0.4), (0.4, 1.1), (math.nan, 1.0), (0.1, math.nan)])
def test_factors_out_of_range(low, high):
    for make in (EOSER, lambda **g: ASS(eoser=True, **g)):
        with pytest.raises(ValueError, match="need 0 <= gamma_min <= gamma_max <= 1, got"):
            make(gamma_min=low, gamma_max=high)


@pytest.mark.parametrize("remasking", ["random", "margin", "entropy", "left_to_right"])
def test_other_orders_are_refused_where_ends_are_rejected(remasking):
    for make in (EOSER, lambda **r: ASS(eoser=True, **r)):
        with pytest.raises(
            ValueError, match=f"EOSER weighs confidences, which remasking='{remasking}' does not order by: use 'low_confidence'"
        ):
            make(remasking=remasking)
    ASS(remasking=remasking)


def test_more_steps_than_new_tokens(model, prompts):
    with pytest.raises(ValueError, match="17 steps for 16 new tokens: gamma would not reach gamma_max"):
        decode(EOSER(steps=17), model, prompts[0])


def test_a_plan_of_its_own():
    with pytest.raises(ValueError, match="block_num must be positive, got 0"):
        ASS(block_num=0)
    for name in ("steps", "block_length"):
        with pytest.raises(TypeError, match=f"ASS has no hyper-parameter '{name}'; it has: .*block_num"):
            ASS(**{name: 4})


def test_one_end_among_several(model, prompts):
    "All ids that end a text are rejected, not only the first."
    _, lines = canvases(EOSER(gamma_min=0, gamma_max=0, **WHOLE), model, prompts[0], eos_token_id=[EOS, *ENDS])
    first = lines[lines["step"] == 0]
    assert first["end"].sum() > 0
    assert not first[first["committed"]]["end"].any()
