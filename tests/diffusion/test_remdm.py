"""ReMDM: the plan of numbers, the decoder against a plain loop, its limits; and the loop's `remask` for any policy."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import PAD, left_pad, made_step, random_prompts, small_model

from decodelab.diffusion.base import LLaDA, Unmasker
from decodelab.diffusion.canvas import CACHES
from decodelab.diffusion.denoiser import Denoiser
from decodelab.diffusion.remdm import SCHEDULES, ReMDM, remask_plan, visible_shares
from decodelab.diffusion.step import top

MASK = PAD


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def batch():
    return left_pad(random_prompts(4, lengths=(1, 9), seed=5))


def decode(decoder, model, ids, new=12, **settings):
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None} | settings
    return decoder.generate(model, **ids, **settings) if isinstance(ids, dict) else decoder.generate(model, ids, **settings)


def new_ids(out):
    return [c.tolist() for c in out.continuations]


def singles(batch):
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]


LOOPS = st.one_of(st.none(), st.tuples(st.floats(0.5, 0.9), st.floats(0.05, 0.4), st.floats(0.1, 1.0)))


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from(SCHEDULES), st.floats(0, 1), LOOPS)
def test_a_plan_fills_everything_and_never_more_than_is_masked(count, steps, schedule, eta, loop):
    shares = visible_shares(steps, loop)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    visible, total = 0, 0.0
    for i, (fill, again) in enumerate(remask_plan(count, steps, schedule, eta, loop)):
        assert 0 <= fill <= count - visible
        assert 0 <= again <= visible  # what the step itself has filled is not taken back
        most = min(1, (1 - shares[i + 1]) / shares[i]) if shares[i] else 0
        total += min(eta, most) * visible if schedule == "cap" else eta * most * visible
        visible += fill - again
        assert visible == int(count * shares[i + 1] + 0.5)
    assert visible == count
    assert sum(again for _, again in remask_plan(count, steps, schedule, eta, loop)) <= total + 1e-6


def plain_remdm(model, ids, n, block, steps, eta):
    "ReMDM row by row, position by position; tokens, step of each and how often it was masked again."
    denoiser, P = Denoiser(model), ids.shape[1]
    canvas = torch.cat([ids, torch.full((1, n), MASK)], 1)
    psi, when, times, clock = [0.0] * n, [0] * n, [0] * n, 0
    for start in range(0, n, block):
        for fill, again in remask_plan(block, steps, "cap", eta):
            masked = [j for j in range(start, start + block) if canvas[0, P + j] == MASK]
            visible = [j for j in range(start, start + block) if j not in masked]
            with torch.no_grad():
                p = denoiser(canvas)[0, P:].double().softmax(-1)
            for j in sorted(masked, key=lambda j: (-p[j].max().item(), j))[:fill]:
                canvas[0, P + j], psi[j], when[j] = p[j].argmax(), p[j].max().item(), clock
            for j in sorted(visible, key=lambda j: (psi[j], j))[:again]:
                canvas[0, P + j] = MASK
                times[j] += 1
            clock += 1
    return canvas[0, P:].tolist(), when, times


@pytest.mark.parametrize(("block", "steps", "eta"), [(12, 12, 0.2), (12, 6, 0.5), (6, 6, 0.3), (12, 24, 0.1)])
def test_remdm_against_a_plain_loop(block, steps, eta, model, batch):
    decoder = ReMDM(block_length=block, steps=steps * (12 // block), eta=eta, trace=True)
    together = decode(decoder, model, batch)
    again = 0
    for row, ids in enumerate(singles(batch)):
        tokens, when, times = plain_remdm(model, ids, 12, block, steps, eta)
        alone = decode(decoder, model, ids)
        assert new_ids(alone)[0] == new_ids(together)[row] == tokens
        info = [step.info for step in together.trace.row(row)]
        assert [t for facts in info for t in facts["step"]] == when
        assert [t for facts in info for t in facts.get("remasked", [0] * block)] == times
        emitted = together.stats.emitted[row]
        assert emitted == alone.stats.emitted[0] == [when.count(i) for i in range(len(emitted))]
        again += sum(times)
    assert again > 0


def test_without_remasking_it_is_llada(model, batch):
    plain, other = decode(LLaDA(steps=6), model, batch), decode(ReMDM(eta=0.0, steps=6), model, batch)
    assert new_ids(plain) == new_ids(other)
    assert plain.stats.emitted == other.stats.emitted
    assert not ReMDM(eta=0.0).remasks
    assert not LLaDA().remasks
    assert ReMDM().remasks


def test_a_draw_prefers_tokens_of_low_confidence_and_obeys_the_seed(model, batch):
    def write(seed):
        torch.manual_seed(seed)
        return new_ids(decode(ReMDM(eta=0.3, draw=True), model, batch))

    assert write(1) == write(1)
    assert write(1) != write(2)
    torch.manual_seed(0)
    p, rows = torch.tensor([0.1, 0.5, 0.9]), 20_000
    canvas = SimpleNamespace(confidence=p.expand(rows, -1))
    step = made_step(torch.zeros(rows, 3, 2), torch.zeros(rows, 3, dtype=torch.bool), canvas=canvas, count=torch.full((rows,), 3), index=1)
    decoder = ReMDM(draw=True)
    decoder.counts = lambda step: (1, 1)
    share = decoder.remask(step).double().mean(0)
    assert torch.allclose(share, (-p).softmax(-1).double(), atol=0.015)
    decoder.draw = False
    assert decoder.remask(step).all(0).tolist() == [True, False, False]


@dataclass
class Rewrites(LLaDA):
    "Masks everything that was visible before the step again, as long as it is asked."

    def remask(self, step):
        return ~step.masked


def test_decoding_ends_however_much_is_masked_again(model, batch):
    for block in (None, 4):
        out = decode(Rewrites(block_length=block), model, batch)
        assert MASK not in [t for row in new_ids(out) for t in row]
        blocks, size = 12 // (block or 12), block or 12
        assert out.stats.target_forwards <= blocks * 2 * size  # the planned steps, and one a position behind them


@dataclass
class Never(Unmasker):
    "Fills one position and takes it back: only the bound ends it."

    def select(self, step):
        return step.best()

    def remask(self, step):
        return torch.ones_like(step.masked)


def test_a_policy_that_takes_everything_back_ends_too(model, batch):
    out = decode(Never(trace=True), model, batch)
    assert MASK not in [t for row in new_ids(out) for t in row]
    assert sum(t for step in out.trace for t in step.info["remasked"]) == 12 * 4  # one in each of twelve planned steps, four rows


@dataclass
class TakesBack(LLaDA):
    "Takes the first written token back once, in its third step."

    def remask(self, step):
        return top(torch.where(step.masked, -torch.inf, step.written_confidence), 1) if step.block.index == 2 else None


def test_a_position_masked_again_counts_as_masked(model, batch):
    free = decode(TakesBack(steps=6, trace=True), model, batch)
    plain = decode(LLaDA(steps=6), model, batch)
    assert free.stats.target_forwards == plain.stats.target_forwards + 1  # the position that is masked again needs one more
    assert [sum(row) for row in free.stats.emitted] == [12] * 4
    end = new_ids(free)[0][3]
    early = decode(TakesBack(steps=6), model, batch, eos_token_id=end)
    late = decode(TakesBack(steps=6, early_stop=False), model, batch, eos_token_id=end)
    assert new_ids(early) == new_ids(late)
    assert new_ids(early)[0] == new_ids(free)[0][: new_ids(free)[0].index(end) + 1]


@dataclass
class Declines(LLaDA):
    remasks = True

    def remask(self, step):
        return torch.zeros_like(step.masked)


def test_masking_nothing_again_changes_nothing(model, batch):
    out, plain = decode(Declines(block_length=4), model, batch), decode(LLaDA(block_length=4), model, batch)
    assert new_ids(out) == new_ids(plain)
    assert out.stats.emitted == plain.stats.emitted


@pytest.mark.parametrize("cache", CACHES[1:])
def test_a_cache_that_is_never_stale_changes_nothing(cache, batch):
    shallow = small_model()
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    plain = decode(ReMDM(block_length=6, eta=0.3), shallow, batch)
    cached = decode(ReMDM(block_length=6, eta=0.3, cache=cache), shallow, batch)
    assert new_ids(cached) == new_ids(plain)
    assert cached.stats.target_tokens < plain.stats.target_tokens


@pytest.mark.parametrize("again", [torch.ones(1, 3, dtype=torch.bool), torch.ones(4, 12)])
def test_remask_must_return_a_bool_for_each_position(again, model, batch):
    @dataclass
    class Wrong(LLaDA):
        def remask(self, step):
            return again

    with pytest.raises(ValueError, match=r"remask must return a bool for each of \[4, 12\] positions"):
        decode(Wrong(), model, batch)


def test_an_eos_token_may_be_taken_back(model, batch):
    "A row does not leave at an EOS token that a later step may mask again."
    free = new_ids(decode(ReMDM(eta=0.4), model, batch, 16))
    for row in free:
        out = decode(ReMDM(eta=0.4), model, batch, 16, eos_token_id=row[5])
        assert new_ids(out) == [r[: r.index(row[5]) + 1] if row[5] in r else r for r in free]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "max"}, "unknown schedule 'max'"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\]"),
        ({"eta": float("nan")}, r"eta must lie in \[0, 1\]"),
        ({"loop": (0.2, 0.5, 0.9)}, "1 > t_on > t_off > 0"),
        ({"loop": (0.5, 0.2, 0.0)}, r"alpha_on in \(0, 1\]"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        ReMDM(**fields)
