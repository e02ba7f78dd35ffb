"""PEARL: one rule for both states, exact against plain decoding and exact probabilities, a negative control, and two processes."""

import gc
import json
import os
import signal

import pytest
import torch
from toys import EOS, SAMPLING_RULES, TOY_PROMPT, added, exact_probs, fit, left_pad, plain, random_prompts, sample_counts, small_model
from transformers.generation.logits_process import EtaLogitsWarper, MinPLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from decodelab.core.warp import draw
from decodelab.lab.metrics import mean_interval
from decodelab.speculative.acceptance import RecursiveRejection, residual
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.model_drafter import example_drafter
from decodelab.speculative.pearl import PEARL, tokens_per_round
from decodelab.speculative.pearl_process import DraftProcess, packed, unpacked

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def other(llama):
    "A draft model that has nothing to do with the target."
    return small_model("llama", seed=77)


@pytest.fixture(scope="module")
def toy_drafter():
    model = small_model(vocab=6, hidden=16, spread=0.5, seed=31)
    torch.manual_seed(5)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.35)
    return model


# greedy text


@pytest.mark.parametrize("gamma", range(1, 9))
def test_greedy_text_for_any_window_and_drafter(gamma, llama, other):
    prompts = random_prompts(5, lengths=(1, 20), seed=gamma)
    for drafter in (other, example_drafter(llama), llama):
        for ids in prompts:
            out = PEARL(drafter, gamma).generate(llama, ids, max_new_tokens=21, **GREEDY)
            assert added(out)[0] == plain(llama, ids, 21)
        batch = left_pad(prompts)
        wanted = llama.generate(**batch, max_new_tokens=21, **GREEDY)
        assert PEARL(drafter, gamma).generate(llama, **batch, max_new_tokens=21, **GREEDY).sequences.tolist() == wanted.tolist()


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_an_end_at_any_place(gamma, llama):
    ids = random_prompts(1, lengths=(6, 6), seed=3)[0]
    text = plain(llama, ids, 24)
    drafter = example_drafter(llama)
    for token in set(text):
        for model in (drafter, llama):
            out = PEARL(model, gamma).generate(llama, ids, max_new_tokens=24, eos_token_id=token, pad_token_id=0, **GREEDY)
            assert added(out)[0] == text[: text.index(token) + 1]


@pytest.mark.parametrize("gamma", [1, 2, 4, 7])
def test_a_perfect_drafter_is_never_interrupted(gamma, llama):
    "After the first round each reads gamma - 1 drafted tokens and commits gamma."
    ids = random_prompts(1, lengths=(6, 6), seed=4)[0]
    new = 4 * gamma + 1
    stats = PEARL(llama, gamma).generate(llama, ids, max_new_tokens=new, eos_token_id=None, **GREEDY).stats
    assert stats.draft_lengths[0] == [0, *[gamma - 1] * 4]
    assert stats.emitted[0] == [1, *[gamma] * 4]


class Wrong(PEARL):
    "Every draft token is another one than the target's."

    def complete(self, call, draft):
        draft = super().complete(call, draft)
        own = call.model(call.sequences[:, : call.prompt.shape[1] + call.counts[0]]).logits[:, -1].argmax(-1)
        other = (own + 1)[:, None]
        draft.ahead = other
        call.state.tails = [[int(other[0]), *tail[1:]] for tail in call.state.tails]
        return draft


def test_a_drafter_that_is_never_right_costs_no_forward(llama):
    ids = random_prompts(1, lengths=(6, 6), seed=5)[0]
    out = Wrong(example_drafter(llama), 4).generate(llama, ids, max_new_tokens=12, eos_token_id=None, **GREEDY)
    assert added(out)[0] == plain(llama, ids, 12, eos_token_id=None)
    assert out.stats.draft_lengths[0] == [0] * 12 and out.stats.emitted[0] == [1] * 12


def test_no_token_is_returned_unverified(llama, other):
    for new in range(1, 14):
        out = PEARL(example_drafter(llama), 5).generate(
            llama, random_prompts(1, seed=new)[0], max_new_tokens=new, eos_token_id=None, **GREEDY
        )
        assert sum(out.stats.emitted[0]) == len(added(out)[0]) == new


# sampled text


@pytest.mark.parametrize("gamma", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("rule", ["plain", "temperature", "top_p", "penalty"])
def test_joint_distribution(rule, gamma, toy, toy_drafter):
    torch.manual_seed(0)
    asked, processors = SAMPLING_RULES[rule]
    assert fit(sample_counts(PEARL(toy_drafter, gamma), toy, 20_000, **asked), exact_probs(toy, processors)) > 1e-3


class SameNumberAgain(RecursiveRejection):
    "Tests the first token of a round with the uniform number that has accepted the last one of the round before."

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "kept", None)

    def __call__(self, p, drafted, q):
        fresh = torch.rand(len(p))
        again = self.kept is not None and len(self.kept[0]) == len(p)
        u = torch.where(self.kept[1], self.kept[0], fresh) if again else fresh
        x = drafted.clamp_min(0)
        accept = (drafted[:, 0] >= 0) & (u * q.gather(1, x)[:, 0] < p.gather(1, x)[:, 0])
        object.__setattr__(self, "kept", None if again else (u, accept))
        own = draw(torch.where(((drafted[:, 0] >= 0) & ~accept)[:, None], residual(p, q), p))
        return torch.where(accept, x[:, 0], own), torch.where(accept, 0, -1)


@pytest.mark.parametrize("again", [False, True])
def test_a_uniform_number_that_is_used_twice_is_noticed(again, toy, toy_drafter, monkeypatch):
    "The fault of the released two-process code."
    torch.manual_seed(0)
    decoder = PEARL(toy_drafter, 4)
    if again:
        monkeypatch.setattr(PEARL, "rule", property(lambda self: self.__dict__.setdefault("_rule", SameNumberAgain())))
        start = PEARL.start

        def fresh(self, call, logits):
            self.__dict__.pop("_rule", None)
            start(self, call, logits)

        monkeypatch.setattr(PEARL, "start", fresh)
    value = fit(sample_counts(decoder, toy, 20_000), exact_probs(toy, []))
    assert value < 1e-6 if again else value > 1e-3


def test_sampled_rows_have_their_own_sources(llama):
    "What a row's drafter draws does not depend on how far other rows are."
    drafter = example_drafter(llama)
    out = [PEARL(drafter, 3).generate(llama, random_prompts(1, seed=9)[0], max_new_tokens=12, do_sample=True, top_k=0) for _ in range(2)]
    assert added(out[0]) != added(out[1])
    texts = []
    for _ in range(2):
        torch.manual_seed(4)
        texts.append(added(PEARL(drafter, 3).generate(llama, **left_pad(random_prompts(3, seed=9)), max_new_tokens=12, do_sample=True)))
    assert texts[0] == texts[1]


# theory


@pytest.mark.parametrize(("alpha", "gamma", "tokens"), [(0.6, 4, 1.480), (0.0, 3, 1.0), (1.0, 6, 6.0)])
def test_tokens_per_round(alpha, gamma, tokens):
    assert tokens_per_round(alpha, gamma) == pytest.approx(tokens, abs=5e-4)


def test_tokens_per_round_of_independent_acceptance(toy):
    "A drafter and a target without context: each token is accepted with the overlap of two fixed distributions."
    target, drafter = (small_model(vocab=6, hidden=16, spread=0.5, seed=s) for s in (1, 2))
    for model, bias in ((target, [0.0, 0.4, 0.8, 1.2, 1.6, 0.2]), (drafter, [1.2, 0.0, 0.8, 0.4, 1.5, 0.9])):
        model.lm_head = torch.nn.Linear(16, 6, bias=True)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.copy_(torch.tensor(bias))
    alpha = float(torch.minimum(*(m.lm_head.bias.detach().softmax(0) for m in (target, drafter))).sum())
    torch.manual_seed(0)
    for gamma in (2, 4):
        rates = []
        for _ in range(12):
            ids = TOY_PROMPT.expand(16, -1)
            stats = (
                PEARL(drafter, gamma)
                .generate(target, ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=True, top_k=0, eos_token_id=99)
                .stats
            )
            rates += [sum(row[:-4]) / len(row[:-4]) for row in stats.emitted]  # the last rounds are cut by the length
        mean, low, high = mean_interval(rates)
        assert low - 0.01 < tokens_per_round(alpha, gamma) < high + 0.01, (mean, tokens_per_round(alpha, gamma))


# two processes


@pytest.fixture(scope="module")
def apart(llama):
    with DraftProcess(example_drafter(llama)) as process:
        yield process


@pytest.mark.parametrize(
    "settings", [GREEDY, {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "top_k": 5}, {"do_sample": True, "top_k": 0}]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_two_processes_write_the_same_text(rows, settings, llama, apart):
    batch = left_pad(random_prompts(rows, lengths=(1, 9), seed=rows))
    texts = []
    for drafter in (apart.draft_model, apart):
        torch.manual_seed(3)
        out = PEARL(drafter, 3).generate(llama, **batch, max_new_tokens=17, eos_token_id=EOS, **settings)
        texts.append((added(out), out.stats.draft_lengths, out.stats.draft_forwards))
    assert texts[0] == texts[1]


def test_an_interrupted_call_leaves_the_process_ready(llama, apart):
    ids = random_prompts(1, lengths=(5, 5), seed=2)[0]
    rounds = []

    class Interrupted(PEARL):
        def observe(self, call, draft, logits, paths):
            rounds.append(1)
            if len(rounds) == 2:
                call.state.partner.begin(3, [0], [5])  # on its way when the call ends
                raise KeyboardInterrupt
            super().observe(call, draft, logits, paths)

    with pytest.raises(KeyboardInterrupt):
        Interrupted(apart, 3).generate(llama, ids, max_new_tokens=20, **GREEDY)
    assert added(PEARL(apart, 3).generate(llama, ids, max_new_tokens=20, **GREEDY))[0] == plain(llama, ids, 20)


def test_processors_that_look_at_the_text_are_refused(llama, apart):
    with pytest.raises(ValueError, match="takes temperature, top-k, top-p, min-p and the like only"):
        PEARL(apart, 3).generate(llama, random_prompts(1)[0], max_new_tokens=4, repetition_penalty=1.3, **GREEDY)


def test_one_call_at_a_time(llama, apart):
    ids = random_prompts(1, lengths=(5, 5), seed=2)[0]

    class Nested(PEARL):
        def observe(self, call, draft, logits, paths):
            PEARL(apart, self.other).generate(llama, ids, max_new_tokens=4, **GREEDY)

    for Nested.other in (3, "auto"):
        with pytest.raises(RuntimeError, match="this DraftProcess serves another call"):
            Nested(apart, 3).generate(llama, ids, max_new_tokens=8, **GREEDY)
    assert added(PEARL(apart, 3).generate(llama, ids, max_new_tokens=8, **GREEDY))[0] == plain(llama, ids, 8)


def test_an_error_of_the_other_process_is_told(llama, apart, monkeypatch):
    ids = random_prompts(1, lengths=(5, 5), seed=2)[0]
    monkeypatch.setattr("decodelab.speculative.pearl_process.packed", lambda processors: [["NoSuchProcessor", {}]])
    with pytest.raises(RuntimeError, match="the draft process failed: AttributeError.*NoSuchProcessor"):
        PEARL(apart, 3).generate(llama, ids, max_new_tokens=8, **GREEDY)
    monkeypatch.undo()
    assert added(PEARL(apart, 3).generate(llama, ids, max_new_tokens=8, **GREEDY))[0] == plain(llama, ids, 8)


def test_processors_travel_with_their_fields():
    scores, ids = torch.randn(2, 9), torch.zeros(2, 3, dtype=torch.long)
    for made in (EtaLogitsWarper(0.1), MinPLogitsWarper(0.2), TopPLogitsWarper(0.7), TypicalLogitsWarper(0.6)):
        again = unpacked(json.loads(json.dumps(packed([made]))))
        assert torch.equal(again(ids, scores.clone()), made(ids, scores.clone()))
    assert unpacked(packed(None)) is None


def test_the_ratio_is_measured_where_the_drafter_runs(llama, apart, monkeypatch):
    monkeypatch.setattr(apart, "seconds", lambda rows: 1e-9)
    assert PEARL(apart, "auto").window_size(llama) > 1000
    monkeypatch.undo()
    assert 1e-5 < apart.seconds(2) < 10


def test_a_message_that_was_cut_off(llama):
    with DraftProcess(example_drafter(llama)) as process:
        process._whole = False  # as after an interrupt in the middle of one
        with pytest.raises(RuntimeError, match="cut off by an interrupt"):
            PEARL(process, 3).generate(llama, random_prompts(1)[0], max_new_tokens=4, **GREEDY)


def test_a_process_that_was_killed(llama):
    process = DraftProcess(example_drafter(llama))
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    with pytest.raises(RuntimeError, match="the draft process has ended with status -9"):
        PEARL(process, 3).generate(llama, random_prompts(1)[0], max_new_tokens=4, **GREEDY)
    process.close()
    with pytest.raises(RuntimeError, match="this DraftProcess is closed: start a new one"):
        PEARL(process, 3).generate(llama, random_prompts(1)[0], max_new_tokens=4, **GREEDY)


def test_a_process_that_nobody_holds_ends(llama):
    process = DraftProcess(example_drafter(llama))
    running, folder = process._process, process._folder.name
    del process
    gc.collect()
    assert running.poll() == 0 and not os.path.exists(folder)


def test_only_a_model_can_draft_apart():
    with pytest.raises(ValueError, match="draft_model must be a loaded model, .* got str"):
        DraftProcess("tales-draft")


# settings


def test_settings(llama):
    for gamma in (0, -1):
        with pytest.raises(ValueError, match='gamma must be at least 1, or "auto"'):
            PEARL(llama, gamma)
    with pytest.raises(ValueError, match="drafter must be a causal language model"):
        PEARL("tales-draft").generate(llama, random_prompts(1)[0], max_new_tokens=2)


def test_auto_takes_the_speed_ratio(llama, monkeypatch):
    import decodelab.speculative.pearl as module

    times = {id(llama): 0.030, 1: 0.008}

    class Curve:
        def __init__(self, seconds):
            self.seconds = seconds

        def plain(self, rows):
            return self.seconds * (1 + rows)

    drafter = example_drafter(llama)
    monkeypatch.setattr(module, "verify_curve", lambda model: Curve(times.get(id(model), times[1])))
    decoder = PEARL(drafter, "auto")
    assert decoder.window_size(llama) == 4 and PEARL(llama, "auto").window_size(llama) == 1
    ids = random_prompts(1, lengths=(5, 5))[0]
    out = decoder.generate(llama, ids, max_new_tokens=12, **GREEDY)
    assert added(out)[0] == plain(llama, ids, 12)
    assert out.stats.draft_lengths == PEARL(drafter, 4).generate(llama, ids, max_new_tokens=12, **GREEDY).stats.draft_lengths


def test_more_rounds_than_ordinary_speculation_but_shorter_ones(llama):
    "On the clock of two devices PEARL is never behind plain decoding."
    drafter, t_p, gamma = example_drafter(llama), 4.0, 4
    for seed in range(4):
        ids = random_prompts(1, lengths=(5, 9), seed=seed)[0]
        own = PEARL(drafter, gamma).generate(llama, ids, max_new_tokens=24, eos_token_id=None, **GREEDY).stats
        other = DraftModel(drafter, gamma).generate(llama, ids, max_new_tokens=24, eos_token_id=None, **GREEDY).stats
        assert len(own.draft_lengths[0]) * t_p <= 24 * t_p
        assert len(own.draft_lengths[0]) * t_p <= len(other.draft_lengths[0]) * (gamma + t_p)
