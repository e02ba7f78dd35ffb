"""Momentum decoding: r(v) against its definition, the resistance table, the limits of the method."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB, left_pad, random_prompts
from transformers import LogitsProcessor, LogitsProcessorList

from decodelab.sampling.momentum import (
    RESISTANCE,
    Momentum,
    MomentumLogitsProcessor,
    extend_path_lengths,
    path_lengths,
    repetition_lengths,
    resistance_table,
)


def brute_force(history, v, longest):
    "Largest i such that the last i - 1 tokens followed by v occur in the history; 0 when v does not."
    best = 0
    for i in range(1, longest + 1):
        if i - 1 > len(history):
            break
        gram = [*history[len(history) - i + 1 :], v]
        if any(history[j : j + i] == gram for j in range(len(history) - i + 1)):
            best = i
    return best


histories = st.integers(1, 5).flatmap(lambda symbols: st.lists(st.integers(0, symbols), min_size=1, max_size=16))


@settings(max_examples=500)
@given(history=histories, longest=st.integers(1, 7))
def test_repetition_lengths(history, longest):
    got = repetition_lengths(torch.tensor([history]), 7, longest)
    assert got.tolist() == [[brute_force(history, v, longest) for v in range(7)]]


@settings(max_examples=200)
@given(rows=st.lists(histories, min_size=1, max_size=4), longest=st.integers(1, 6))
def test_repetition_lengths_of_padded_rows(rows, longest):
    width = max(map(len, rows))
    padded = torch.tensor([[-1] * (width - len(r)) + r for r in rows])
    got = repetition_lengths(padded, 7, longest)
    assert got.tolist() == [[brute_force(r, v, longest) for v in range(7)] for r in rows]


@settings(max_examples=200)
@given(
    rows=st.lists(histories, min_size=1, max_size=4),
    new=st.lists(st.integers(0, 6), max_size=8),
    kept=st.lists(st.booleans(), min_size=4, max_size=4),
    longest=st.integers(1, 6),
)
def test_path_lengths_token_by_token(rows, new, kept, longest):
    "Extended by one token at a time, also when rows are dropped on the way, they give the r(v) of the whole history."
    width = max(map(len, rows))
    rows = [[-1] * (width - len(r)) + r for r in rows]
    lengths = path_lengths(torch.tensor(rows), longest)
    for i, token in enumerate(new):
        rows = [[*r, (token + j) % 7] for j, r in enumerate(rows)]
        lengths = extend_path_lengths(lengths, torch.tensor(rows))
        if i == 2:
            stay = [j for j in range(len(rows)) if kept[j]] or [0]
            rows, lengths = [rows[j] for j in stay], lengths[stay]
    got = repetition_lengths(torch.tensor(rows), 7, longest, lengths)
    assert got.tolist() == [[brute_force([t for t in r if t >= 0], v, longest) for v in range(7)] for r in rows]


def test_padding_inside_a_history_matches_nothing():
    "A processor takes a padding token for padding wherever it stands; no path leads through it."
    history = [3, -1, 5, 6, -1, 5]
    assert repetition_lengths(torch.tensor([history]), 7).tolist() == [[0, 0, 0, 1, 0, 1, 2]]


def test_repetition_lengths_leaves_its_arguments():
    history = torch.tensor([[1, 2, 1]])
    assert repetition_lengths(history, 6).tolist() == [[0, 1, 2, 0, 0, 0]]
    assert history.tolist() == [[1, 2, 1]]
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        repetition_lengths(history, 6, 0)


# the table


@pytest.mark.parametrize("name", list(RESISTANCE))
def test_every_named_table(name):
    f = resistance_table(name)
    assert len(f) == 6
    assert f[0] == 0
    assert list(f) == sorted(f)


def test_tables_of_ones_own():
    assert resistance_table([1, 1, 2]) == (0.0, 1.0, 1.0, 2.0)
    assert resistance_table({2: 3, 1: 1}) == (0.0, 1.0, 3.0)
    assert resistance_table([0, math.inf]) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("no such", "unknown resistance 'no such'; known: table, linear"),
        ([], "non-negative and non-decreasing, got"),
        ([2, 1], r"non-negative and non-decreasing, got \[2.0, 1.0\]"),
        ([-1.0], "non-negative and non-decreasing"),
        ([math.nan], "non-negative and non-decreasing"),
        ({2: 1.0}, r"needs the keys 1, 2, ..., M, got \[2\]"),
        ({0: 0.0, 1: 1.0}, "needs the keys 1, 2"),
    ],
)
def test_bad_tables(bad, message):
    with pytest.raises(ValueError, match=message):
        resistance_table(bad)
    with pytest.raises(ValueError, match=message):
        Momentum(resistance=bad)


@pytest.mark.parametrize(
    ("fields", "message"), [({"alpha": -0.1}, "alpha must be at least 0"), ({"alpha": math.nan}, "alpha"), ({"k": 0}, "k must be")]
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Momentum(**fields)


# one step, by hand


def step(decoder, logits, history):
    "The token that the decoder picks for hand-made logits: a processor replaces the model's."

    class Fixed(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.tensor([logits]).expand_as(scores).clone()

    decoder, model = decoder
    out = decoder.generate(
        model, torch.tensor([history]), max_new_tokens=1, do_sample=False, logits_processor=LogitsProcessorList([Fixed()])
    )
    return int(out.continuations[0][0])


@settings(max_examples=150)
@given(
    history=st.lists(st.integers(2, 7), min_size=1, max_size=14),
    values=st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6),
    alpha=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    k=st.integers(1, 6),
    name=st.sampled_from(list(RESISTANCE)),
)
def test_a_step_is_the_formula(llama, history, values, alpha, k, name):
    "Ties go to the more probable token; among equally probable ones any may be taken; -inf is never chosen."
    logits = [-math.inf] * VOCAB
    logits[2:8] = values
    finite = [v for v in values if v > -math.inf]
    if not finite:
        return
    p = torch.softmax(torch.tensor(logits), 0)
    token = step((Momentum(alpha=alpha, k=k, resistance=name), llama), logits, history)
    assert p[token] > 0
    f = resistance_table(name)
    penalty = {v: alpha * f[brute_force(history, v, 5)] if alpha else 0.0 for v in range(2, 8)}
    scored = {v: float(p[v]) - penalty[v] for v in range(2, 8) if p[v] > 0}
    ranked = sorted(scored, key=lambda v: -float(p[v]))
    threshold = float(p[ranked[min(k, len(ranked)) - 1]])
    surely = [v for v in ranked if float(p[v]) > threshold]  # candidates whatever topk does with ties at the border
    assert float(p[token]) >= threshold
    assert all(scored[token] >= scored[v] - 1e-6 for v in surely)
    if len(ranked) <= k:
        best = max(scored.values())
        assert scored[token] == pytest.approx(best, abs=1e-6)
        if best > -math.inf:
            tied = [v for v in ranked if scored[v] > best - 1e-9]
            assert float(p[token]) >= max(float(p[v]) for v in tied) - 1e-6 or len(tied) == 1


def test_cut_and_blocked_tokens():
    "Cut tokens stay cut; when every candidate is blocked the most probable one is the last resort, and the only one."
    history = torch.tensor([[2, 3, 4]])
    scores = torch.full((1, VOCAB), -math.inf)
    scores[0, [4, 3, 5]] = torch.tensor([3.0, 2.0, 1.0])
    rule = MomentumLogitsProcessor(k=VOCAB, resistance=[math.inf])
    got = rule(history, scores)
    assert got[0, 5] > 0
    assert got[0, 4] == -1e9
    assert (got[0].isneginf()).sum() == VOCAB - 2
    scores[0, 5] = -math.inf
    got = rule(history, scores)
    assert int(got.argmax()) == 4
    assert got[0].isneginf().sum() == VOCAB - 1


@pytest.mark.parametrize("resistance", ["table", "4-gram block", [math.inf] * 5], ids=str)
@pytest.mark.parametrize("k", [1, 3, VOCAB])
def test_decoder_and_processor_agree(resistance, k, llama):
    "One rule in two forms, for rows that end at different times and with a processor before it."
    inputs = left_pad([torch.cat([p] * n, 1) for n, p in enumerate(random_prompts(5, lengths=(3, 6), seed=35), start=1)], 0)
    settings_ = {"max_new_tokens": 40, "do_sample": False, "bad_words_ids": [[5], [9]], "pad_token_id": 0}
    free = Momentum(alpha=1.0, k=k, resistance=resistance).generate(llama, **inputs, **settings_)
    ends = [int(free.continuations[0][3])]
    decoder = Momentum(alpha=1.0, k=k, resistance=resistance)
    ours = decoder.generate(llama, **inputs, **settings_, eos_token_id=ends)
    assert min(map(len, ours.continuations)) <= 4 < 20 < max(map(len, ours.continuations))
    rule = LogitsProcessorList([decoder.processor(pad_token_id=0)])
    theirs = llama.generate(**inputs, **settings_, eos_token_id=ends, logits_processor=rule)
    assert ours.sequences.tolist() == theirs.tolist()


# reductions


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0.0},
        {"alpha": 0.0, "resistance": "4-gram block"},
        {"k": 1},
        {"k": 1, "alpha": 5.0},
        {"resistance": [0.0]},
        {"resistance": [0, 0, 0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_limits_are_greedy_search(fields, rule, llama):
    for prompt in random_prompts(6, seed=31):
        plain = llama.generate(prompt, max_new_tokens=20, do_sample=False, **rule)
        assert Momentum(**fields).generate(llama, prompt, max_new_tokens=20, do_sample=False, **rule).sequences.equal(plain)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_block_is_no_repeat_ngram_size(n, llama, gpt2):
    blocked = [0.0] * (n - 1) + [math.inf]
    differ = 0
    for model in (llama, gpt2):
        for prompt in random_prompts(10, seed=32):
            settings_ = {"max_new_tokens": 30, "do_sample": False}
            plain = model.generate(prompt, **settings_, no_repeat_ngram_size=n)
            assert Momentum(k=VOCAB, resistance=blocked).generate(model, prompt, **settings_).sequences.equal(plain)
            differ += not model.generate(prompt, **settings_).equal(plain)
    assert differ > 0


def test_a_block_on_tales(tales):
    model, tokenizer = tales
    block = Momentum(k=len(tokenizer), resistance=[0, 0, 0, math.inf, math.inf])
    for text in ("The old king", "Once upon a time there was"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        plain = model.generate(ids, max_new_tokens=48, do_sample=False, no_repeat_ngram_size=4)
        assert block.generate(model, ids, max_new_tokens=48, do_sample=False).sequences.equal(plain)


def test_it_does_something(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=33)[0]
    ids = torch.cat([prompt] * 4, 1)
    plain = llama.generate(ids, max_new_tokens=30, do_sample=False)
    assert not Momentum(alpha=1.0).generate(llama, ids, max_new_tokens=30, do_sample=False).sequences.equal(plain)


def test_the_trace_tells_the_story(llama):
    ids = torch.cat([random_prompts(1, lengths=(6, 6), seed=33)[0]] * 4, 1)
    out = Momentum(alpha=1.0, trace=True).generate(llama, ids, max_new_tokens=30, do_sample=False)
    roles = out.trace.roles()
    assert set(roles) <= {"new", "seen", "resisted"}
    assert roles.get("resisted", 0) > 0
    history = ids[0].tolist()
    for token_step in out.trace:
        (token,), (role,), (note,) = token_step.tokens, token_step.roles, token_step.notes
        with torch.no_grad():
            best = int(llama(torch.tensor([history])).logits[0, -1].argmax())
        assert (role == "resisted") == (token != best)
        assert f"r = {brute_force(history, token, 5)};" in note
        if role != "resisted":
            assert role == ("seen" if token in history else "new")
        history.append(token)


def test_padding_is_no_part_of_the_walk(llama):
    "A padding token that is an ordinary token of the text must not count as visited."
    prompts = random_prompts(3, lengths=(2, 9), seed=34)
    settings_ = {"max_new_tokens": 16, "do_sample": False}
    alone = [Momentum(alpha=1.0).generate(llama, p, **settings_).continuations[0].tolist() for p in prompts]
    for pad in (0, alone[0][0], alone[1][1]):
        out = Momentum(alpha=1.0).generate(llama, **left_pad(prompts, pad), **settings_, pad_token_id=pad)
        assert [c.tolist() for c in out.continuations] == alone
