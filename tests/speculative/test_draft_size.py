"""Draft sizes that fit themselves: the choice by hand, what is learnt, and that no choice changes a token or a distribution.

The verify curve of the tests is given, not measured: a forward of n tokens costs 1 + slope (n - 1).
"""

import numpy as np
import pytest
import torch
from toys import added, exact_probs, fit, left_pad, plain, random_prompts, sample_counts, small_model

from decodelab.core.verify_curve import VerifyCurve, verify_curve
from decodelab.sampling.base import Autoregressive
from decodelab.speculative import base, model_drafter
from decodelab.speculative.aded import ADED
from decodelab.speculative.base import Draft
from decodelab.speculative.draft_size import Acceptance, DraftSize, _Walk, chain_length, check_size, reaches, trim
from decodelab.speculative.drafters import DraftModel, NGram, PromptLookup
from decodelab.speculative.model_drafter import example_drafter
from decodelab.speculative.rsd import RSDC, RSDS
from decodelab.speculative.token_recycling import TokenRecycling

AUTO = {
    "token_recycling": lambda model: TokenRecycling(template="auto"),
    "aded": lambda model: ADED(nodes="auto"),
    "prompt_lookup": lambda model: PromptLookup(k="auto"),
    "ngram": lambda model: NGram(gamma="auto"),
    "draft_model": lambda model: DraftModel(example_drafter(model), gamma="auto"),
    "rsd_c": lambda model: RSDC(example_drafter(model), b="auto"),
    "rsd_s": lambda model: RSDS(example_drafter(model), W=3, L="auto"),
}
every_auto = pytest.mark.parametrize("name", list(AUTO))


def curve(slope):
    return VerifyCurve([1, 1001], [1.0, 1.0 + 1000 * slope])


@pytest.fixture
def costs(monkeypatch):
    "Sets what a further token of a forward costs, for target and drafter."

    def choose(slope):
        for module in (base, model_drafter):
            monkeypatch.setattr(module, "verify_curve", lambda model: curve(slope))

    return choose


# the curve


def test_between_and_beyond_the_sizes():
    by_hand = VerifyCurve([1, 2, 4], [2.0, 3.0, 5.0])
    assert by_hand.seconds([1, 3, 4, 7]) == pytest.approx([2, 4, 5, 8])
    assert by_hand.relative(2, 2) == pytest.approx([1, 5 / 3])  # T(4) / T(2)
    assert by_hand.plain(2) == 3.0


@pytest.mark.parametrize(("tokens", "seconds"), [([2, 4], [1.0, 2.0]), ([], []), ([1, 2], [1.0]), ([1, 2], [1.0, 0.0])])
def test_a_curve_needs_positive_seconds(tokens, seconds):
    with pytest.raises(ValueError, match="positive seconds for ascending numbers of tokens from 1 on"):
        VerifyCurve(tokens, seconds)


def test_a_curve_is_measured_once_and_respects_the_context(llama):
    found = verify_curve(llama, budget=0.05)
    assert verify_curve(llama) is found
    assert found.tokens[0] == 1 and (found.measured > 0).all()
    small = small_model(context=16)
    assert verify_curve(small, budget=0.05).tokens[-1] <= 16


def test_sizes_are_numbers_or_auto():
    assert (chain_length("auto"), chain_length(3)) == (24, 3)
    check_size("k", "auto")
    for bad in (0, "many"):
        with pytest.raises(ValueError, match='k must be at least 1, or "auto"'):
            check_size("k", bad)


# what is learnt


def test_rates_by_hand():
    counts = Acceptance([0.5, 0.2])
    for hit in (True, True, False):
        counts.note(0, hit)
    assert counts.rate() == pytest.approx([(2 + 1) / (3 + 2), 0.2])
    for _ in range(1000):
        counts.note(1, True)
    assert counts.tries[1] == pytest.approx(64, abs=1)
    assert counts.rate()[1] > 0.95
    small = counts.shrunk(16)
    assert (small.tries[0], small.tries[1]) == (3, pytest.approx(16))
    assert counts.tries[1] > 60  # the original is untouched


def test_drafts_count_as_long_as_the_text_follows_them():
    # root - 1 - 2 - 3, and beside 1 a node 9
    noted = []
    walk = _Walk([0, 1, 9, 2, 3], [[1, 2], [3], [], [4], []], [0, 10, 11, 20, 30])
    assert walk.follows([1], lambda kind, hit: noted.append((kind, hit)))
    assert noted == [(10, True), (11, False)]
    assert walk.follows([2], lambda kind, hit: noted.append((kind, hit)))  # a round later
    assert not walk.follows([7], lambda kind, hit: noted.append((kind, hit)))
    assert noted[2:] == [(20, True), (30, False)]


# the choice


def size_with(slope, rate=1.0, kinds=(0.5,)):
    size = DraftSize(curve(slope), Acceptance(kinds))
    size.flow = rate, 1.0
    return size


def test_best_number_of_nodes_by_hand():
    assert size_with(0.2).nodes(1, [np.array([0.9, 0.5, 0.1])]) == 2
    assert size_with(0.2, rate=3.0).nodes(1, [np.array([0.9, 0.5, 0.1])]) == 1
    assert size_with(0.2).nodes(1, [np.array([0.1])]) == 0
    assert size_with(0.2).nodes(1, [np.array([])]) == 0
    assert size_with(0.0).nodes(1, [np.array([0.9, 0.5, 0.1])]) == 3
    # two rows: T(4) - T(2) = 0.4 of T(2) = 1.2, and the mean gain counts
    assert size_with(0.2).nodes(2, [np.array([0.9, 0.5]), np.array([])]) == 1


def test_the_choice_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        reach = [np.sort(rng.random(rng.integers(0, 6)))[::-1] for _ in range(rng.integers(1, 4))]
        size, rows = size_with(float(rng.random()) / 3, rate=1 + float(rng.random())), len(reach)
        most = max(map(len, reach))
        cost = [(1 + size.curve.slope * (rows * (n + 1) - 1)) / (1 + size.curve.slope * (rows - 1)) for n in range(most + 1)]
        gains = [np.mean([row[:n].sum() for row in reach]) - size.rate * (cost[n] - 1) for n in range(most + 1)]
        assert gains[size.nodes(rows, reach)] == pytest.approx(max(gains))


def test_reaches_are_products_and_fillers_are_below_all():
    assert reaches([-1, 0, 1, 0, -1], [1.0, 0.5, 0.4, 0.1, 0.9]) == [1.0, 0.5, 0.2, 0.1, -1.0]


def test_trimming_keeps_a_tree():
    tree = base.Tree([0, 0, 0, 1, 2, 3])
    draft = Draft(torch.tensor([[5, 6, 7, 8, 9, 10]]), tree, kinds=np.array([[0, 1, 0, 1, 1, 0]]))
    size = size_with(0.15, kinds=(0.1, 0.9))
    size.acceptance.tries += 1000
    size.acceptance.hits += [100, 900]
    kept = trim(size, draft)
    # reach: .9, .1, .81, .09, .081: the first two of the longest path pay 0.15 each
    assert kept.tokens.tolist() == [[5, 6, 8]]
    assert kept.tree.parents.tolist() == [-1, 0, 1]
    assert kept.kinds.tolist() == [[0, 1, 1]]
    assert size.whole is draft


def test_rows_are_trimmed_each_to_its_best():
    draft = Draft(torch.tensor([[5, 6, 7], [5, 8, 9]]), base.Tree([0, 0, 0]), kinds=np.array([[0, 1, 0], [0, 0, 1]]))
    size = size_with(0.1, kinds=(0.05, 0.95))
    kept = trim(size, draft)
    assert kept.tokens.tolist() == [[5, 6], [5, 9]]


def test_drafting_rests_where_it_does_not_pay():
    size = size_with(0.5)
    rounds = []
    for _ in range(200):
        rests = size.rests()
        rounds.append(rests)
        size.note(1, 0, 1, 0.0 if rests else 0.1)  # to draft takes a tenth of a forward pass
    assert 0.02 < 1 - np.mean(rounds) < 0.25


def test_drafting_that_costs_nothing_never_rests():
    size = size_with(0.5)
    for _ in range(200):
        assert not size.rests()
        size.note(1, 0, 1, 0.0)


# nothing changes the text


@every_auto
@pytest.mark.parametrize("slope", [0.0, 0.1, 10.0])
def test_greedy_output_is_the_models_own(name, slope, llama, costs):
    costs(slope)
    decoder = AUTO[name](llama)
    for seed in range(3):
        prompts = random_prompts(4, seed=seed)
        expected = [plain(llama, ids, 40) for ids in prompts]
        out = decoder.generate(llama, **left_pad(prompts), max_new_tokens=40, do_sample=False)
        assert added(out) == expected
        alone = decoder.generate(llama, prompts[0], max_new_tokens=40, do_sample=False)
        assert added(alone) == expected[:1]
        assert set(out.stats.auto) >= {"rounds", "rounds_without_draft", "draft_tokens", "tokens", "cost", "curve"}
        assert out.stats.auto["rounds_without_draft"] <= out.stats.auto["rounds"]


@every_auto
def test_with_processors_and_an_end(name, llama, costs):
    costs(0.02)
    prompts, rules = random_prompts(3, seed=5), {"repetition_penalty": 1.3}
    whole = [plain(llama, ids, 30, **rules) for ids in prompts]
    ends = [text[n] for text, n in zip(whole, (6, 11, 17))]
    rules["eos_token_id"] = ends
    out = AUTO[name](llama).generate(llama, **left_pad(prompts), max_new_tokens=30, do_sample=False, **rules)
    assert added(out) == [text[: 1 + next(i for i, t in enumerate(text) if t in ends)] for text in whole]


@every_auto
def test_nothing_is_drafted_where_it_cannot_pay(name, llama, costs):
    costs(10.0)
    out = AUTO[name](llama).generate(llama, random_prompts(1)[0], max_new_tokens=40, do_sample=False)
    assert out.stats.drafted == 0
    assert out.stats.target_forwards == 40  # as plain decoding: the prompt's last token needs no forward of its own


FIXED = {"prompt_lookup": PromptLookup, "ngram": NGram, "token_recycling": TokenRecycling, "aded": ADED}


@pytest.mark.parametrize("name", list(FIXED))
def test_drafts_are_as_long_as_the_papers_where_they_are_free(name, llama, costs, monkeypatch):
    costs(0.001)
    note = DraftSize.note  # the drafter's own work is free, too: on a busy machine its clock would decide
    monkeypatch.setattr(DraftSize, "note", lambda self, rows, verified, emitted, seconds=None: note(self, rows, verified, emitted, 0.0))
    ids, rules = random_prompts(1, seed=6)[0], {"max_new_tokens": 160, "do_sample": False, "eos_token_id": None}
    found = {}
    for kind, decoder in (("auto", AUTO[name](llama)), ("fixed", FIXED[name]())):
        outs = [decoder.generate(llama, ids, **rules) for _ in range(2)]
        assert added(outs[0]) == added(outs[1]) == [plain(llama, ids, 160, eos_token_id=None)]
        found[kind] = outs[1].stats.tokens_per_forward
    assert found["fixed"] > 1.4
    assert found["auto"] > 0.85 * found["fixed"]


@every_auto
def test_a_seed_gives_the_same_text_again(name, llama, costs):
    costs(0.05)
    prompts = left_pad(random_prompts(3, seed=2))
    decoder = AUTO[name](llama)

    def sampled():
        if hasattr(decoder, "reset"):
            decoder.reset()
        torch.manual_seed(3)
        return decoder.generate(llama, **prompts, max_new_tokens=24, do_sample=True, temperature=0.8).sequences

    assert sampled().equal(sampled())


LOOKED_UP = ("token_recycling", "aded", "prompt_lookup", "ngram")


def test_sampled_text_does_not_depend_on_looked_up_drafts(llama, costs):
    "Each row draws one token after the other from its own source, whatever is drafted, whatever earlier calls have taught."
    prompts, rules = left_pad(random_prompts(3, seed=2)), {"max_new_tokens": 24, "do_sample": True, "temperature": 0.3}
    found = {}
    for name in LOOKED_UP:
        decoder = AUTO[name](llama)
        for slope in (0.0, 0.05, 10.0):
            costs(slope)
            torch.manual_seed(3)
            out = decoder.generate(llama, **prompts, **rules)
            found[name, slope] = added(out), out.stats.drafted
    assert len({str(text) for text, _ in found.values()}) == 1
    assert len({drafted for _, drafted in found.values()}) > 4  # the drafts did differ
    torch.manual_seed(4)
    assert added(decoder.generate(llama, **prompts, **rules)) != found["ngram", 0.0][0]


@pytest.mark.parametrize("name", LOOKED_UP)
def test_one_sampled_row_is_what_plain_decoding_samples(name, llama, costs):
    costs(0.01)
    ids, rules = random_prompts(1, seed=2)[0], {"max_new_tokens": 24, "do_sample": True, "temperature": 0.3}
    found = []
    for decoder in (Autoregressive(), AUTO[name](llama)):
        torch.manual_seed(3)
        found.append(added(decoder.generate(llama, ids, **rules)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "fresh"), [("prompt_lookup", False), ("token_recycling", False), ("draft_model", True), ("rsd_c", True)])
def test_a_sampling_call_begins_anew_where_drafts_are_drawn(name, fresh, llama, costs, monkeypatch):
    costs(0.01)
    begun, clocks = [], []
    monkeypatch.setattr(base, "DraftSize", lambda *arguments: begun.append(arguments[-1]) or DraftSize(*arguments))
    note = DraftSize.note
    monkeypatch.setattr(DraftSize, "note", lambda self, *facts: clocks.append(facts[-1]) or note(self, *facts))
    decoder = AUTO[name](llama)
    for _ in range(2):
        decoder.generate(llama, random_prompts(1, seed=8)[0], max_new_tokens=10, do_sample=True)
    assert [before is None for before in begun] == [True, fresh]
    assert {seconds is None for seconds in clocks} == {fresh}


@every_auto
def test_joint_distribution(name, toy, costs):
    costs(0.02)
    torch.manual_seed(0)
    decoder = TokenRecycling(k=3, template="auto") if name == "token_recycling" else AUTO[name](toy)
    counts = sample_counts(decoder, toy, 20_000)
    assert fit(counts, exact_probs(toy, [])) > 1e-3


def test_the_drafter_catches_up_after_rounds_without_a_draft(llama, costs, monkeypatch):
    "What the drafter says after a rest is what it would say had it read every token in turn."
    costs(2.0)
    seen, drafted = [], []
    original = model_drafter.DraftModelSession.open

    def opened(self, roots):
        drafted.append(len(self.missed))
        logits = original(self, roots)
        text = self.call.sequences[:1, : self.call.prompt.shape[1] + self.call.counts[0]]
        seen.append(float((logits[0] - self.session.model(text).logits[0, -1]).abs().max()))
        return logits

    note = DraftSize.note  # a round of drafting takes as long as a forward pass of the target
    monkeypatch.setattr(DraftSize, "note", lambda self, rows, verified, emitted, seconds=None: note(self, rows, verified, emitted, 1.0))
    monkeypatch.setattr(model_drafter.DraftModelSession, "open", opened)
    decoder = DraftModel(example_drafter(llama), gamma="auto")
    decoder.generate(llama, random_prompts(1, seed=4)[0], max_new_tokens=200, do_sample=False, eos_token_id=None)
    assert max(seen) < 1e-4
    assert max(drafted) >= 8  # it did rest


@pytest.mark.parametrize("W", [5, 17, 80])
def test_wide_beams(W, llama, costs):
    costs(0.0)
    ids = random_prompts(1, seed=8)[0]
    decoder = RSDS(example_drafter(llama), W=W, L="auto")
    out = decoder.generate(llama, ids, max_new_tokens=20, do_sample=False)
    assert added(out) == [plain(llama, ids, 20)]
    assert {n % W for n in out.stats.draft_lengths[0][:-3]} == {0}
    assert out.stats.drafted > 0


def test_a_changed_field_begins_anew(llama, costs):
    costs(0.05)
    ids, decoder = random_prompts(1, seed=8)[0], PromptLookup(k="auto")
    decoder.generate(llama, ids, max_new_tokens=20, do_sample=False)
    decoder.w_max = 5
    assert added(decoder.generate(llama, ids, max_new_tokens=20, do_sample=False)) == [plain(llama, ids, 20)]


@pytest.mark.parametrize("start_from", ["hot", "cold"])
def test_a_cold_decoder_keeps_no_counts(start_from, llama, costs, monkeypatch):
    costs(0.01)
    begun = []
    monkeypatch.setattr(base, "DraftSize", lambda *arguments: begun.append(arguments[-1]) or DraftSize(*arguments))
    for decoder in (NGram(gamma="auto", start_from=start_from), TokenRecycling(template="auto", start_from=start_from)):
        for _ in range(2):
            decoder.generate(llama, random_prompts(1, seed=8)[0], max_new_tokens=10, do_sample=False)
    assert [before is None for before in begun] == [True, start_from == "cold"] * 2
