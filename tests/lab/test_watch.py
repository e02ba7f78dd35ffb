"""Watching a diffusion decoder: nothing is changed, and what is kept is what was decoded."""

from dataclasses import dataclass

import pytest
import torch
from toys import decode_batch, left_pad, random_prompts, same_steps, small_model

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.fast_dllm import Dream, EntropyBound, FastDLLM
from decodelab.diffusion.localleap import LocalLeap
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


@pytest.mark.parametrize(
    "decoder", [LLaDA(8), LLaDA(8, steps=16), FastDLLM(8), EntropyBound(12), LocalLeap(), Dream(8, alg="entropy", steps=16)]
)
def test_watching_changes_nothing(model, prompts, decoder):
    before = dict(vars(decoder))
    log = watch(decoder, model, **prompts, max_new_tokens=32, do_sample=False)
    assert same_steps(log.out, decode_batch(decoder, model, prompts))
    assert vars(decoder) == before
    assert torch.bincount(log.row).tolist() == [len(e) for e in log.out.stats.emitted]
    for row in range(6):
        mine = log.row == row
        assert log.index[mine].tolist() == list(range(int(mine.sum())))
        assert log.chosen[mine].sum(-1).tolist() == log.out.stats.emitted[row]
        text = log.out.continuations[row].tolist()
        for tokens, final, positions, masked in zip(log.tokens[mine], log.final[mine], log.position[mine], log.masked[mine]):
            assert [text[p] for p in positions[masked].tolist()] == final[masked].tolist()
            assert (tokens == final)[masked].tolist() == [t == text[p] for t, p in zip(tokens[masked].tolist(), positions[masked].tolist())]


@dataclass
class AllFromTheThird(LLaDA):
    "Two steps as LLaDA, then everything, what is not masked, too."

    def select(self, step):
        return torch.where((step.index < 2)[:, None], super().select(step), True)


def test_what_is_not_masked_is_not_taken(model, prompts):
    log = watch(AllFromTheThird(), model, **prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row in range(6):
        mine = log.row == row
        assert log.chosen[mine].sum(-1).tolist() == [1, 1, 6]
        assert log.chosen[mine].sum(0).tolist() == [1] * 8
        assert log.out.continuations[row].tolist() == [int(log.tokens[mine][log.chosen[mine][:, p], p]) for p in range(8)]


def test_positions_behind_the_end_are_left_out(model, prompts):
    ends = list(range(2, 97, 4))
    log = watch(LocalLeap(8, early_stop=False), model, **prompts, max_new_tokens=32, do_sample=False, eos_token_id=ends, pad_token_id=0)
    lengths = torch.tensor([len(t) for t in log.out.continuations])
    assert int(lengths.min()) < 16
    assert int((log.position - lengths[log.row][:, None])[log.masked].max()) == -1
    assert bool((log.confidence[~log.masked] > NOTHING).any())  # they were decoded
