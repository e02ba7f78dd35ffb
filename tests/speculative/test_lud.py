"""Lexical unit decoding: units, placeholders, the walk that is not lossless, and the lossless one."""

import copy
import itertools
import random
from dataclasses import replace

import pytest
import test_contract as contract
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    EOS,
    METHODS,
    PAD,
    VOCAB,
    StopsAt,
    SumBias,
    V,
    added,
    exact_probs,
    fit,
    left_pad,
    plain,
    random_prompts,
    sample_counts,
    small_model,
)
from transformers import LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor

from decodelab.speculative.acceptance import TypicalAcceptance
from decodelab.speculative.lud import LUD, is_confident, lexical_units, look_ahead, repeats_or_extends

P = VOCAB - 1  # the placeholder of the toys
WITHOUT = {"suppress_tokens": [P]}
BETAS = (0.0, 0.05, 0.1, 0.2, 1.5)


def lud(beta=0.1, k=4, **fields):
    return LUD(k=k, beta=beta, placeholder=P, **fields)


def greedy(decoder, model, ids, new=20, **kwargs):
    return decoder.generate(model, ids, max_new_tokens=new, do_sample=False, **kwargs)


@torch.no_grad()
def reference(model, prompt, new, k, beta, guard=True, ends=()):
    "Text and passes of one prompt, without a cache."
    text, passes = prompt[0].tolist(), []
    while (left := new - sum(map(len, passes))) > 0:
        K = min(k, left) - 1
        logits = model(torch.tensor([text + [P] * K])).logits[0, len(text) - 1 :].double()
        p, allowed = logits.softmax(-1), logits.clone()
        allowed[:, P] = -torch.inf
        kept = []
        for j, y in enumerate(allowed.argmax(-1).tolist()):
            if j and (p[j, y] < beta or p[j, P] > p[j, y] or (guard and y == kept[-1])):
                break
            kept.append(y)
            if y in ends:
                break
        text, passes = text + kept, [*passes, kept]
        if kept[-1] in ends:
            break
    return passes


def whole(passes):
    return [*itertools.chain(*passes)]


def lengths(passes):
    return [len(kept) for kept in passes]


# lexical units


def test_units_by_hand():
    q = [1.0, 0.2, 0.95, 0.99, 0.5, 0.91, 0.3, 0.92, 0.92, 0.92]
    assert lexical_units(q, 0.9) == [(2, 3), (7, 9)]  # a single confident token is no unit
    assert lexical_units(q, 0.9, start=3) == [(7, 9)]  # no unit reaches back into the prompt
    assert lexical_units(q, 0.9, start=8) == [(8, 9)]
    assert lexical_units(q, 0.9, first_token_confident=False) == [(1, 3), (4, 5), (6, 9)]
    assert lexical_units(q, 0.9, start=2, first_token_confident=False) == [(2, 3), (4, 5), (6, 9)]
    assert lexical_units(q, 0.92) == [(2, 3)]  # more than alpha
    assert lexical_units(q, 0.0) == [(1, 9)]
    assert lexical_units([], 0.5) == lexical_units([1.0], 0.5) == []


@given(q=st.lists(st.floats(0, 1), min_size=1, max_size=30), alpha=st.sampled_from([0.0, 0.3, 0.9]), start=st.integers(1, 5))
def test_units_are_maximal_runs(q, alpha, start):
    units = lexical_units(q, alpha, start)
    inside = {i for s, e in units for i in range(s, e + 1)}
    for s, e in units:
        assert start <= s < e < len(q)
        assert all(q[i] > alpha for i in range(s, e + 1))
        assert s == start or not q[s - 1] > alpha
        assert e == len(q) - 1 or not q[e + 1] > alpha
    for i in range(start, len(q) - 1):
        assert not (q[i] > alpha and q[i + 1] > alpha) or {i, i + 1} <= inside


def test_higher_thresholds_give_shorter_units():
    rng = random.Random(0)
    q = [rng.random() ** 0.1 for _ in range(400)]
    covered = [sum(e - s + 1 for s, e in lexical_units(q, alpha)) for alpha in (0.5, 0.8, 0.9, 0.95)]
    assert covered == sorted(covered, reverse=True)
    assert covered[0] > covered[-1]


# the guard


def test_repeats_and_extensions():
    text = {1: "an", 2: "and", 3: "nd", 4: "", 5: "an"}.get
    assert repeats_or_extends(1, 1)
    assert not repeats_or_extends(1, 2)  # without texts only equal tokens count
    assert repeats_or_extends(1, 2, text)
    assert repeats_or_extends(1, 5, text)
    assert not repeats_or_extends(2, 1, text)
    assert not repeats_or_extends(1, 3, text)
    assert not repeats_or_extends(4, 2, text)  # a token without a text is extended by none


def test_the_guard_stops_repeats(llama, tokenizer):
    prompts, doubled = random_prompts(12, seed=21), {}
    for guard in (False, True):
        out = greedy(lud(0.0, guard=guard), llama, left_pad(prompts)["input_ids"], attention_mask=left_pad(prompts)["attention_mask"])
        starts = [list(itertools.accumulate([0, *row])) for row in out.stats.emitted]
        pairs = [
            (row[i], row[i + 1]) for row, cuts in zip(added(out), starts) for i in range(len(row) - 1) if i + 1 not in cuts
        ]  # within a forward pass
        doubled[guard] = sum(a == b for a, b in pairs)
        assert min(n for row in out.stats.emitted for n in row) >= 1
    assert doubled[True] == 0 < doubled[False]
    stricter = greedy(lud(0.0, tokenizer=tokenizer), llama, prompts[0])
    assert stricter.stats.tokens_per_forward <= greedy(lud(0.0), llama, prompts[0]).stats.tokens_per_forward


# the loop


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("beta", BETAS)
def test_text_and_passes_of_the_reference(kind, k, beta, request):
    model = request.getfixturevalue(kind)
    accepted = 0
    for seed, prompt in enumerate(random_prompts(4, seed=3)):
        for guard in (True, False):
            expected = reference(model, prompt, 16, k, beta, guard)
            out = greedy(lud(beta, k, guard=guard), model, prompt, 16)
            assert added(out)[0] == whole(expected), (seed, guard)
            assert out.stats.emitted[0] == lengths(expected)
            assert all(1 <= n <= k for n in out.stats.emitted[0])
            accepted += 16 - len(expected)
    assert accepted > 0 or k == 1 or beta >= 0.2


@pytest.mark.parametrize("verify", [False, True])
def test_a_threshold_above_one_is_plain_decoding(llama, verify):
    for k in (1, 2, 5):
        for prompt in random_prompts(5, seed=4):
            out = greedy(lud(1.5, k, verify=verify), llama, prompt)
            assert added(out)[0] == plain(llama, prompt, 20, **WITHOUT)
            assert out.stats.emitted[0] == [1] * 20


def test_no_placeholder_is_plain_decoding_at_its_cost(llama):
    prompt = random_prompts(1, lengths=(7, 7), seed=5)[0]
    out = greedy(lud(0.0, 1), llama, prompt)
    assert out.stats.target_tokens == 7 - 1 + 20  # the prompt's last token opens the first forward pass
    assert greedy(lud(0.0, 1, verify=True), llama, prompt).stats.target_tokens == 7 - 1 + 20


class Watching(LUD):
    "Keeps the logits behind the last certain token of each forward pass."

    def walk(self, call, draft, logits):
        start = call.prompt.shape[1]
        for i, row in enumerate(call.rows):
            text = torch.cat([call.prompt[row][call.mask[row].bool()], call.sequences[row, start : start + call.counts[row]]])
            seen.append((text, logits[i, draft.sizes[i] - 1].clone()))
        return super().walk(call, draft, logits)


seen: list = []


def test_the_ordinary_token_is_that_of_plain_decoding(llama):
    "Behind the last certain token stand the logits of the text alone: no placeholder is left in the cache."
    seen.clear()
    inputs = left_pad(random_prompts(4, seed=6))
    Watching(beta=0.05, placeholder=P).generate(llama, **inputs, max_new_tokens=18, do_sample=False)
    assert len(seen) > 20
    with torch.no_grad():
        assert max(float((llama(text[None]).logits[0, -1] - logits).abs().max()) for text, logits in seen) < 1e-4


class KeepsPlaceholders(LUD):
    "WRONG: leaves the placeholders in the cache."

    def walk(self, call, draft, logits):
        paths, emitted = super().walk(call, draft, logits)
        return [[*path, *range(len(path), len(path) + draft.K)] for path in paths], emitted


class SkipsDoubtful(LUD):
    "WRONG: goes on behind a token that did not stay."

    def walk(self, call, draft, logits):
        paths, emitted = super().walk(call, draft, logits)
        nodes = draft.placeholders([0])[0]
        if draft.K > 1 and len(emitted[0]) == 1 and float(logits[0, nodes[1]].softmax(-1).max()) >= self.beta:
            emitted[0].append(int(logits[0, nodes[1], :P].argmax()))
        return paths, emitted


@pytest.mark.parametrize(("wrong", "beta"), [(KeepsPlaceholders, 1.5), (KeepsPlaceholders, 0.1), (SkipsDoubtful, 0.1)])
def test_broken_copies_are_noticed(llama, wrong, beta):
    differ = 0
    for prompt in random_prompts(6, seed=7):
        expected = reference(llama, prompt, 16, 4, beta)
        right, broken = (greedy(cls(beta=beta, placeholder=P), llama, prompt, 16) for cls in (LUD, wrong))
        assert right.stats.emitted[0] == lengths(expected)
        differ += added(broken)[0] != whole(expected) or broken.stats.emitted[0] != lengths(expected)
    assert differ > 0


def test_thresholds_trade_speed_for_agreement(llama):
    inputs, speed, agreement = left_pad(random_prompts(24, seed=8)), [], []
    expected = added(greedy(lud(1.5), llama, inputs["input_ids"], 16, attention_mask=inputs["attention_mask"]))
    for beta in (1.5, 0.25, 0.15, 0.1, 0.0):
        out = lud(beta).generate(llama, **inputs, max_new_tokens=16, do_sample=False)
        speed.append(out.stats.tokens_per_forward)
        agreement.append(sum(a == b for x, y in zip(added(out), expected) for a, b in zip(x, y)))
    assert speed == sorted(speed)
    assert speed[0] == 1 < speed[-1]
    assert agreement == sorted(agreement, reverse=True)
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight[P] = 0.0  # as after training: the placeholder is never the best
    everything = lud(0.0, guard=False).generate(model, **inputs, max_new_tokens=16, do_sample=False)
    assert everything.stats.emitted == [[4, 4, 4, 4]] * 24


def test_rows_accept_different_numbers(llama):
    prompts = random_prompts(7, lengths=(1, 11), seed=9)
    alone = [greedy(lud(), llama, p, 17) for p in prompts]
    ends = added(alone[2])[0][5]
    for eos in (EOS, ends):
        together = lud().generate(llama, **left_pad(prompts), max_new_tokens=17, do_sample=False, eos_token_id=eos)
        single = [greedy(lud(), llama, p, 17, eos_token_id=eos) for p in prompts]
        assert added(together) == [added(out)[0] for out in single]
        assert together.stats.emitted == [out.stats.emitted[0] for out in single]
        assert len({tuple(row) for row in together.stats.emitted}) > 3


def test_eos_ends_a_row_wherever_it_is_predicted(llama):
    inside = 0
    for prompt in random_prompts(12, seed=10):
        passes = reference(llama, prompt, 16, 4, 0.0)
        for at, kept in enumerate(passes):
            for end in kept[1:]:
                out = greedy(lud(0.0), llama, prompt, 16, eos_token_id=end)
                expected = reference(llama, prompt, 16, 4, 0.0, ends=(end,))
                assert added(out)[0] == whole(expected)
                inside += at == len(expected) - 1
    assert inside > 3


def test_the_placeholder_is_never_emitted(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight[P] = 3 * model.lm_head.weight.mean(0) + 0.3 * torch.randn(32)
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        model.lm_head.weight[P] += hidden  # now it is the best token there
    assert plain(model, torch.tensor([[5, 6, 7]]), 1) == [P]
    for beta, verify in itertools.product((0.0, 0.1, 1.5), (False, True)):
        out = greedy(lud(beta, verify=verify), model, torch.tensor([[5, 6, 7]]))
        assert P not in added(out)[0]
        if verify or beta > 1:
            assert added(out)[0] == plain(model, torch.tensor([[5, 6, 7]]), 20, **WITHOUT)


def test_confidence_is_that_of_the_model_at_temperature_one():
    logits = torch.tensor([[4.0, 1.0, 0.0], [1.0, 4.0, 5.0]])
    tokens = logits[:, :2].argmax(-1)
    p = logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
    assert is_confident(logits, tokens, p[0] - 1e-6, 2).tolist() == [True, False]
    assert is_confident(logits, tokens, p[0] + 1e-6, 2).tolist() == [False, False]
    assert is_confident(logits, tokens, 0.0, 2).tolist() == [True, False]  # the second would rather be the placeholder
    near = torch.tensor([[40.0, 0.0, 0.0]])
    assert is_confident(near, torch.tensor([0]), 1.0 - 1e-16, 2).tolist() == [True]  # all digits


def test_a_temperature_does_not_change_what_stays(llama):
    "Top-1 sampling at any temperature is the greedy text."
    prompt = random_prompts(1, seed=11)[0]
    expected = greedy(lud(), llama, prompt)
    for temperature in (0.3, 1.0, 3.0):
        out = lud().generate(llama, prompt, max_new_tokens=20, do_sample=True, top_k=1, temperature=temperature)
        assert out.sequences.equal(expected.sequences)
        assert out.stats.emitted == expected.stats.emitted


def test_a_processor_with_a_memory_is_asked_about_certain_tokens_only(llama):
    processors = LogitsProcessorList([SumBias()])
    for prompt in random_prompts(3, seed=12):
        out = greedy(lud(0.0), llama, prompt, logits_processor=processors)
        assert added(out)[0] == plain(llama, prompt, 20, logits_processor=processors, **WITHOUT)
        assert out.stats.emitted[0] == [1] * 20


def test_traces(llama):
    for verify in (False, True):
        out = greedy(lud(trace=True, verify=verify), llama, random_prompts(1, seed=13)[0])
        for step in out.trace:
            names = {"accepted", "bonus"} if verify else {"token", "accepted"}
            assert set(step.roles) <= names
            assert verify or (step.roles[0] == "token" and step.tokens[1:] == step.info["predicted"][: len(step.tokens) - 1])
            assert len(step.info["predicted"]) == len(step.info["confidence"]) <= 3


# the trees that are fed


def test_trees():
    draft = look_ahead([[7, 8], [9]], 2, P)
    assert draft.tokens.tolist() == [[7, 8, P, P], [9, P, P, 0]]
    assert draft.tree.parents.tolist() == [[-1, 0, 1, 2], [-1, 0, 1, -1]]
    assert draft.placeholders([0, 0]).tolist() == [[2, 3], [1, 2]]
    draft = look_ahead([[7, 8]], 2, P, every=True)
    assert draft.tokens.tolist() == [[7, 8, P, P, P, P]]
    assert draft.tree.parents.tolist() == [-1, 0, 0, 2, 1, 4]
    assert draft.placeholders([1]).tolist() == [[4, 5]]
    assert look_ahead([[7], [8]], 0, P).tree.shared


# verified: lossless


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"logits_processor": LogitsProcessorList([SumBias()])}])
def test_verified_text_is_plain_text(kind, settings, request):
    model = request.getfixturevalue(kind)
    prompts = random_prompts(6, seed=14)
    expected = [plain(model, p, 20, **WITHOUT, **settings) for p in prompts]
    drafted = 0
    for beta in (0.0, 0.1, 1.5):
        for k in (1, 4, 6):
            decoder = lud(beta, k, verify=True)
            assert [added(greedy(decoder, model, p, **settings))[0] for p in prompts] == expected
            end = expected[1][4]
            out = decoder.generate(model, **left_pad(prompts), max_new_tokens=20, do_sample=False, eos_token_id=end, **settings)
            assert added(out) == [row[: row.index(end) + 1] if end in row else row for row in expected]
            drafted += out.stats.drafted
    assert drafted > 0


def test_verified_drafts_are_what_was_predicted(llama):
    "Each draft is the model's answer at the placeholders below the last accepted node, in the forward pass before."
    out = greedy(lud(0.05, verify=True, trace=True, guard=False), llama, random_prompts(1, seed=15)[0], 30)
    steps = out.trace
    for before, after in zip(steps, steps[1:]):
        chain = 1 + out.stats.draft_lengths[0][steps.index(after)]
        wanted = [t for t, c in zip(before.info["predicted"], before.info["confidence"]) if c >= 0.05]
        assert after.info["tokens"][1:chain] == wanted[: chain - 1]


def test_verified_sampling_has_the_models_distribution(toy):
    decoder = LUD(k=3, beta=0.0, placeholder=V - 1, verify=True, guard=False)
    probs = exact_probs(toy, [SuppressTokensLogitsProcessor([V - 1])])
    assert fit(sample_counts(decoder, toy, 20_000), probs) > 0.001
    lossy = LUD(k=3, beta=0.0, placeholder=V - 1, guard=False)
    assert fit(sample_counts(lossy, toy, 8_000), probs) < 1e-6  # as it says of itself


def test_a_lossy_rule_needs_drafts():
    with pytest.raises(ValueError, match="lossy= is a rule for draft tokens that are verified: set verify=True"):
        lud(lossy=TypicalAcceptance())
    assert lud(lossy=TypicalAcceptance(), verify=True).verify


# refusals


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"placeholder": None}, {}, "names no placeholder_token_id: train a model .*or give LUD"),
        ({"placeholder": VOCAB}, {}, f"placeholder {VOCAB} is outside the model's vocabulary of {VOCAB}"),
        ({"placeholder": -1}, {}, "placeholder -1 is outside"),
        ({"placeholder": EOS}, {}, f"placeholder {EOS} is also the EOS or padding token"),
        ({"placeholder": 50}, {"eos_token_id": [EOS, 50]}, "placeholder 50 is also the EOS"),
        ({"placeholder": PAD}, {}, f"placeholder {PAD} is also the EOS or padding token"),
        ({"placeholder": 50}, {"pad_token_id": 50}, "needs an id of its own"),
    ],
)
def test_placeholders_that_are_none(llama, fields, settings, message):
    with pytest.raises(ValueError, match=message):
        greedy(LUD(**fields), llama, torch.tensor([[5, 6, 7]]), **settings)


def test_the_placeholder_of_the_config(llama):
    model = copy.deepcopy(llama)
    model.config.placeholder_token_id = P
    prompt = random_prompts(1, seed=16)[0]
    assert greedy(LUD(beta=0.1), model, prompt).sequences.equal(greedy(lud(), llama, prompt).sequences)
    assert METHODS["lud"].example(model) == LUD()
    ready = METHODS["lud"].example(llama)
    assert ready.verify
    assert ready.placeholder == P


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"k": 0}, "k must be at least 1"), ({"beta": -0.1}, "beta at least 0"), ({"beta": float("nan")}, "beta at least 0")],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        LUD(**fields)


@pytest.mark.parametrize("name", ["bloom", "mamba"])
@pytest.mark.parametrize("verify", [False, True])
def test_models_that_cannot_look_ahead_are_refused(name, verify):
    model = build(name)
    with pytest.raises(ValueError, match="several draft tokens cannot be verified in one forward pass"):
        LUD(placeholder=5, verify=verify).generate(model, torch.tensor([[7, 8, 9]]), max_new_tokens=4, do_sample=False)


# the contract, for the walk that is not lossless; the suite itself runs the example, which verifies


@pytest.fixture
def lossy(monkeypatch):
    monkeypatch.setitem(METHODS, "lud", replace(METHODS["lud"], example=lambda model: lud(0.05)))


PROMPT, ROWS = random_prompts(1, lengths=(7, 7), seed=3)[0], left_pad(random_prompts(4, lengths=(1, 9), seed=5))
KEPT = {
    "test_output_and_stats": [{"prompt": PROMPT}],
    "test_trace_and_stats_of_a_batch": [{"padded": ROWS}],
    "test_custom_generate_is_the_same": [{"prompt": PROMPT}],
    "test_max_new_tokens_and_max_length": [{"new": new, "prompt": PROMPT} for new in (1, 2, 3, 8)],
    "test_end_of_sequence": [{"several": several, "prompt": PROMPT} for several in (False, True)],
    "test_rows_finish_independently_and_pad": [{"padded": ROWS}],
    "test_batch_ends_with_its_longest_row": [{"padded": ROWS}],
    "test_stopping_criteria": [{"prompt": PROMPT, "padded": ROWS}],
    "test_processors_are_honoured": [{"prompt": PROMPT, "padded": ROWS}],
    "test_do_sample": [{"prompt": PROMPT}],
    "test_reproducible": [{"padded": ROWS}],
    "test_row_order_is_irrelevant": [{"padded": ROWS}],
    "test_more_padding_changes_nothing": [{"prompt": PROMPT}],
    "test_a_prompt_split_over_a_passed_cache": [{"prompt": PROMPT}],
    "test_a_padded_batch_split_over_a_passed_cache": [{"padded": ROWS}],
    "test_one_token_prompts": [{}],
    "test_other_dtypes": [{"dtype": dtype, "padded": ROWS} for dtype in (torch.bfloat16, torch.float64)],
    "test_one_logit_that_is_not_a_number": [{"prompt": PROMPT}],
    "test_weights_that_are_not_numbers": [{"prompt": PROMPT, "padded": ROWS}],
    "test_processors_that_leave_nothing": [{"value": value, "prompt": PROMPT} for value in (float("nan"), float("-inf"))],
}


@pytest.mark.parametrize("rule", KEPT)
def test_the_contract(rule, lossy, llama):
    test = getattr(contract, rule)
    for arguments in KEPT[rule]:
        models = {"llama": llama} if "llama" in test.__code__.co_varnames[: test.__code__.co_argcount] else {}
        test("lud", **models, **arguments)


def test_the_contract_has_something_to_accept(llama):
    out = greedy(lud(0.05), llama, PROMPT, 12)
    assert max(out.stats.emitted[0]) > 1


def test_the_contract_for_strings_and_streams(lossy, llama, tokenizer):
    contract.test_streamed_text_is_the_decoded_text("lud", llama, tokenizer, PROMPT)
    contract.test_stop_strings("lud", llama, tokenizer, PROMPT)
    contract.test_streamer_ends_after_an_exception("lud", llama, tokenizer, PROMPT)


@settings(max_examples=15)
@given(seed=st.integers(0, 999), k=st.integers(1, 6), beta=st.sampled_from(BETAS), at=st.integers(1, 15))
def test_criteria_cut_where_they_would_cut_plain_text(llama, seed, k, beta, at):
    prompt = random_prompts(1, lengths=(2, 8), seed=seed)[0]
    text = whole(reference(llama, prompt, 16, k, beta))
    stop = StoppingCriteriaList([StopsAt(length=prompt.shape[1] + at)])
    assert added(greedy(lud(beta, k), llama, prompt, 16, stopping_criteria=stop))[0] == text[:at]
    model = small_model(context=prompt.shape[1] + 16)  # placeholders reach the end of the context and not beyond
    assert len(added(greedy(lud(beta, k), model, prompt, 16))[0]) == 16
