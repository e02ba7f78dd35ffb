"""Formats as automata, the hidden Markov model, and the decoder that joins them."""

import json
import math
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from toys import EOS, PAD, VOCAB, StopsAt, character_tokenizer, left_pad, random_prompts, small_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from decodelab.lab.table_model import chi_square, random_table, table_model
from decodelab.sampling.base import Autoregressive
from decodelab.structured.automata import TokenAutomaton, Wildcard, from_json_schema, from_regex, join, lift, template, token_bytes
from decodelab.structured.deco_g import DecoG, LookAhead, log_weights
from decodelab.structured.hmm import HMM, load_hmm, occupancy, pruned, save_hmm

V, N, END = 4, 4, 0  # tokens, tokens of a text at most, the token that ends a text
TEXTS = torch.tensor(list(product(range(V), repeat=N)))


@pytest.fixture(scope="module")
def llama():
    return small_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def models(draw, states, vocabulary=V):
    zeros = draw(st.booleans())  # whether some emissions are impossible
    hmm = HMM.random(states, vocabulary, draw(st.integers(0, 10**6)), sharpness=2.0, dtype=torch.float64)
    if not zeros or vocabulary < 3:
        return hmm
    emission = hmm.emission.masked_fill(torch.rand(hmm.emission.shape, generator=torch.Generator().manual_seed(1)) < 0.2, 0.0)
    emission[:, -1] += 1e-3
    return HMM(hmm.initial, hmm.transition, emission / emission.sum(1, keepdim=True))


@st.composite
def cases(draw):
    "A random HMM and a random automaton, as a table of its own."
    size = draw(st.integers(1, 4))
    cell = st.integers(-1, size - 1)
    table = draw(st.lists(st.lists(cell, min_size=V, max_size=V), min_size=size, max_size=size))
    accepts = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return models(draw, draw(st.integers(1, 3))), table, accepts


def automaton_of(table, accepts):
    return TokenAutomaton.from_table([{v: t for v, t in enumerate(row) if t >= 0} for row in table], accepts, V)


def is_valid(text, table, accepts):
    "The definition: up to the end token, or to the horizon, the text leads to an accepting state."
    state = 0
    for v in text:
        if v == END:
            return state in accepts
        state = table[state][v]
        if state < 0:
            return False
    return state in accepts


# the recursion


@given(cases())
@settings(max_examples=60, deadline=None)
def test_look_ahead_equals_brute_force(case):
    hmm, table, accepts = case
    p = hmm.log_likelihood(TEXTS).exp()
    valid = torch.tensor([is_valid(text, table, accepts) for text in TEXTS.tolist()])
    try:
        tables = LookAhead(automaton_of(table, accepts), hmm, N, [END])
    except ValueError as error:
        assert "no text of the format fits" in str(error)  # noqa: PT017
        assert not valid.any()
        return
    assert float(tables.probability(torch.tensor([0]), hmm.initial[None], N)[0]) == pytest.approx(float(p[valid].sum()), abs=1e-10)
    for length in range(N):
        for prefix in product(range(1, V), repeat=length):
            states, f = torch.tensor([0]), hmm.initial[None]
            for v in prefix:
                states, f = tables.next(states, torch.tensor([v])), hmm.read(f, torch.tensor([v]))[0]
            here = (TEXTS[:, :length] == torch.tensor(prefix)).all(1)
            if int(states[0]) < 0 or float(p[here].sum()) < 1e-12:
                continue
            expected = {}
            for v in range(V):
                den, num = (float(p[here & (TEXTS[:, length] == v) & also].sum()) for also in (torch.ones_like(valid), valid))
                expected[v] = num / den if den > 0 else 0.0
            got = log_weights(tables, states, f, N - length)[0].exp()
            if any(expected.values()):
                assert got.tolist() == pytest.approx([expected[v] for v in range(V)], abs=1e-10)
            else:  # the HMM sees no way: what the graph allows
                possible = [any(is_valid(t, table, accepts) for t in TEXTS[here & (TEXTS[:, length] == v)].tolist()) for v in range(V)]
                assert got.tolist() == [float(x) for x in possible]


@given(cases())
@settings(max_examples=40, deadline=None)
def test_hard_mask_is_what_is_possible(case):
    _, table, accepts = case
    valid = torch.tensor([is_valid(text, table, accepts) for text in TEXTS.tolist()])
    if not valid.any():
        return
    tables = LookAhead(automaton_of(table, accepts), None, N, [END])
    for length in range(N):
        for prefix in product(range(1, V), repeat=length):
            states = torch.tensor([0])
            for v in prefix:
                states = tables.next(states, torch.tensor([v]))
            if int(states[0]) < 0:
                continue
            here = valid & (TEXTS[:, :length] == torch.tensor(prefix)).all(1)
            possible = [bool((here & (TEXTS[:, length] == v)).any()) for v in range(V)]
            got = log_weights(tables, states, torch.ones(1, 1), N - length)[0]
            assert (got > -torch.inf).tolist() == possible
            assert set(got.tolist()) <= {0.0, -math.inf}


def test_probabilities_far_below_the_smallest_number():
    pivot = "a" * 250
    tokens = [b""] * 2 + [bytes([c]) for c in range(32, 127)]
    blank = HMM(torch.ones(1), torch.ones(1, 1), torch.full((1, len(tokens)), 1 / len(tokens)))
    tables = LookAhead(lift(template(pivot), tokens), blank, 260, [EOS])
    exact = -250 * math.log(len(tokens)) + math.log1p(0)  # each character, and then its end
    assert float(tables.log_R[250, 0, 0]) == pytest.approx(exact, rel=1e-5)
    assert float(tables.log_R[260, 0, 0]) == pytest.approx(exact - math.log(len(tokens)), rel=1e-5)
    assert log_weights(tables, torch.tensor([0]), torch.ones(1, 1), 260).isfinite().sum() == 1


def test_a_filter_far_from_the_likeliest_ending():
    # hidden state 0 writes token 0 only; in state 1, where the filter is, two of them have a probability below the smallest number
    hmm = HMM(torch.tensor([0.0, 1.0]), torch.eye(2), torch.tensor([[1.0, 0.0], [1e-30, 1.0]]))
    grammar = TokenAutomaton.from_table([{0: 1, 1: 2}, {0: 3}, {1: 3}, {}], [3], 2)
    got = log_weights(LookAhead(grammar, hmm, 2), torch.tensor([0]), hmm.initial[None], 2)[0]
    assert got.tolist() == pytest.approx([math.log(1e-30), 0.0], rel=1e-4)


# the decoder's distribution


def exact_distribution(table, start, grammar, accepts, horizon):
    "Texts of a bigram model given that they are valid, by listing all."
    found = {}
    for text in product(range(len(table)), repeat=horizon):
        cut = text[: text.index(END) + 1] if END in text else text
        if cut in found or not is_valid(cut, grammar, accepts):
            continue
        p, last = 1.0, start
        for v in cut:
            p, last = p * float(table[last, v]), v
        found[cut] = p
    return {text: p / sum(found.values()) for text, p in found.items()}


def sampled_texts(decoder, model, start, rows, horizon):
    ids = torch.full((rows, 1), start)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0, "eos_token_id": END, "pad_token_id": END}
    new = decoder.generate(model, ids, max_new_tokens=horizon, **given).sequences[:, 1:].tolist()
    return [tuple(row[: row.index(END) + 1] if END in row else row) for row in new]


def test_with_the_model_as_hmm_the_text_has_its_conditional_distribution():
    table = random_table(V, 1.0, torch.Generator().manual_seed(5)).double()
    table = table / table.sum(1, keepdim=True)
    grammar, accepts, start, horizon = [[-1, 1, 0, 0], [-1, -1, 0, 1]], {0}, 2, 4
    hmm = HMM(table[start], table, torch.eye(V, dtype=torch.float64))
    wanted = exact_distribution(table, start, grammar, accepts, horizon)
    model, automaton, cells = table_model(table.float()), automaton_of(grammar, accepts), list(wanted)
    probs, rows = torch.tensor(list(wanted.values())), 6000

    def statistic(decoder, seed=0):
        torch.manual_seed(seed)
        texts = sampled_texts(decoder, model, start, rows, horizon)
        assert set(texts) <= set(cells)
        return chi_square(torch.tensor([texts.count(cell) for cell in cells]), probs)

    limit = float(chi2.ppf(1 - 1e-4, len(cells) - 1))
    assert statistic(DecoG(automaton, hmm)) < limit
    # negative controls: the hard mask, and an HMM that knows nothing
    blank = HMM(torch.ones(1), torch.ones(1, 1), torch.full((1, V), 1 / V))
    assert statistic(DecoG(automaton)) > 3 * limit
    assert statistic(DecoG(automaton, blank)) > limit


# reductions


def everything(size=VOCAB):
    return TokenAutomaton.from_table([dict.fromkeys(range(size), 0)], [0], size)


def test_without_a_format_it_is_plain_decoding(llama):
    batch = left_pad(random_prompts(4, seed=1))
    for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_p": 0.8, "temperature": 0.7}):
        texts = []
        for decoder in (Autoregressive(), DecoG(None), DecoG(everything()), DecoG(everything(), HMM.random(5, VOCAB, sharpness=3.0))):
            torch.manual_seed(3)
            texts.append(decoder.generate(llama, **batch, max_new_tokens=20, **sampling).sequences.tolist())
        assert texts[1:] == texts[:1] * 3


def test_hard_mask_equals_a_loop_that_masks(llama, tokenizer):
    pattern = re.compile(r"\([ab]{2,4}\)")
    texts = [f"({''.join(x)})" for n in range(2, 5) for x in product("ab", repeat=n)]
    prompt, horizon = random_prompts(1, seed=2)[0], 6
    ids, new = prompt, ""
    for r in range(horizon, 0, -1):
        with torch.no_grad():
            logits = llama(ids).logits[0, -1]
        follow = {t[len(new)] if len(t) > len(new) else "eos" for t in texts if t.startswith(new) and len(t) - len(new) <= r}
        allowed = [EOS if c == "eos" else tokenizer(c, add_special_tokens=False).input_ids[0] for c in follow]
        token = max(allowed, key=lambda v: float(logits[v]))
        if token == EOS:
            break
        ids, new = torch.cat([ids, torch.tensor([[token]])], 1), new + tokenizer.decode([token])
    out = DecoG(lift(from_regex(pattern.pattern), tokenizer)).generate(llama, prompt, max_new_tokens=horizon, do_sample=False)
    assert tokenizer.decode(out.continuations[0], skip_special_tokens=True) == new
    assert pattern.fullmatch(new)


# validity


TEMPLATES = {
    "record": (template('{"why":"', Wildcard(without='"'), '","n":', ["1", "12", "7"], "}"), r'\{"why":"[^"]*","n":(1|12|7)\}'),
    "steps": (template("Step 1: ", Wildcard(), "; Final: ", from_regex("[0-9]{1,3}")), r"Step 1: (?:(?!; Final: ).)*; Final: [0-9]{1,3}"),
    "choice": (template(["yes", "no", "not"]), "yes|no|not"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_text_is_valid(name, llama, tokenizer):
    automaton, pattern = TEMPLATES[name]
    automaton = lift(automaton, tokenizer)
    whole = HMM.random(12, VOCAB, seed=1, sharpness=3.0)
    blank = HMM(torch.ones(1), torch.ones(1, 1), torch.full((1, VOCAB), 1 / VOCAB))
    never = whole.emission.clone()  # thinks that nothing of a format is possible
    never[:, 2:] = 1e-30
    batch = left_pad(random_prompts(6, seed=4))
    for hmm in (
        None,
        whole,
        blank,
        pruned(whole, 0.1, occupancy(whole, 40)),
        HMM(whole.initial, whole.transition, never / never.sum(1, keepdim=True)),
    ):
        for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 0, "temperature": 3.0}):
            for horizon in (32, 40):
                torch.manual_seed(0)
                out = DecoG(automaton, hmm).generate(llama, **batch, max_new_tokens=horizon, **sampling)
                for new in out.continuations:
                    assert re.fullmatch(pattern, tokenizer.decode(new, skip_special_tokens=True), re.DOTALL)


def test_a_batch_is_its_rows_also_when_the_prompt_is_read(llama, tokenizer):
    prompts = random_prompts(5, seed=6)
    hmm = HMM.random(6, VOCAB, seed=2, sharpness=4.0)
    for reads in (False, True):
        decoder = DecoG(lift(TEMPLATES["record"][0], tokenizer), HMM(hmm.initial, hmm.transition, hmm.emission, reads))
        together = decoder.generate(llama, **left_pad(prompts), max_new_tokens=40, do_sample=False).continuations
        alone = [decoder.generate(llama, prompt, max_new_tokens=40, do_sample=False).continuations[0] for prompt in prompts]
        assert [row.tolist() for row in together] == [row.tolist() for row in alone]
        assert len({len(row) for row in alone}) > 1
    f = hmm.initial[None]
    for v in prompts[0][0]:
        f = hmm.read(f, v[None])[0]
    read = HMM(f[0], hmm.transition, hmm.emission)  # what reading the prompt comes to
    expected = DecoG(decoder.automaton, read).generate(llama, prompts[0], max_new_tokens=40, do_sample=False).sequences
    assert decoder.generate(llama, prompts[0], max_new_tokens=40, do_sample=False).sequences.equal(expected)


def test_processors_and_criteria(llama, tokenizer):
    automaton, prompt = lift(TEMPLATES["record"][0], tokenizer), random_prompts(1, seed=7)[0]
    decoder = DecoG(automaton, HMM.random(4, VOCAB))
    seven = tokenizer("7", add_special_tokens=False).input_ids
    free = decoder.generate(llama, prompt, max_new_tokens=40, do_sample=False, suppress_tokens=seven)
    assert re.fullmatch(TEMPLATES["record"][1], tokenizer.decode(free.continuations[0], skip_special_tokens=True))
    assert seven[0] not in free.continuations[0]
    stop = StoppingCriteriaList([StopsAt(length=prompt.shape[1] + 5)])
    assert (
        decoder.generate(llama, prompt, max_new_tokens=40, do_sample=False, stopping_criteria=stop).continuations[0].tolist()
        == (decoder.generate(llama, prompt, max_new_tokens=40, do_sample=False).continuations[0].tolist()[:5])
    )


class Forces(LogitsProcessor):
    "Only one token, whatever the scores."

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([40]), 0.0)


def test_what_contradicts_the_format_is_refused(llama, tokenizer):
    prompt = random_prompts(1, seed=7)[0]
    decoder = DecoG(lift(template("ab"), tokenizer))
    with pytest.raises(ValueError, match="a token was forced that the format does not allow: leave out the logits processor"):
        decoder.generate(llama, prompt, max_new_tokens=5, do_sample=False, logits_processor=LogitsProcessorList([Forces()]))
    digit = DecoG(lift(template(["1", "2"]), tokenizer))  # the last token is looked at, too
    for sample in (False, True):
        with pytest.raises(ValueError, match="a token was forced that the format does not allow"):
            digit.generate(llama, prompt, max_new_tokens=1, do_sample=sample, logits_processor=LogitsProcessorList([Forces()]))
    long = DecoG(lift(template("abc"), tokenizer))
    with pytest.raises(ValueError, match="a token was forced that the format does not allow"):
        long.generate(llama, prompt, max_new_tokens=3, do_sample=False, forced_eos_token_id=EOS, eos_token_id=EOS)
    with pytest.raises(ValueError, match="leave at least one token"):
        decoder.generate(llama, prompt, max_new_tokens=5, do_sample=False, suppress_tokens=tokenizer("a").input_ids)
    with pytest.raises(ValueError, match="no text of the format fits in 1 new tokens: the shortest has 2, raise max_new_tokens"):
        decoder.generate(llama, prompt, max_new_tokens=1, do_sample=False)
    nothing = TokenAutomaton.from_table([{3: 0}], [], VOCAB)
    with pytest.raises(ValueError, match="no text of the format fits in 5 new tokens: nothing satisfies it"):
        DecoG(nothing).generate(llama, prompt, max_new_tokens=5)
    with pytest.raises(ValueError, match="give the model an EOS token so that it can end"):
        LookAhead(decoder.automaton, None, 5)
    with pytest.raises(ValueError, match="the HMM has 5 tokens and the format 97: make both with one tokenizer"):
        DecoG(decoder.automaton, HMM.random(2, 5)).generate(llama, prompt, max_new_tokens=5)
    with pytest.raises(ValueError, match="the format has 97 tokens, the model 60: lift the format with the model's tokenizer"):
        decoder.generate(small_model(vocab=60), torch.tensor([[5]]), max_new_tokens=5)
    with pytest.raises(TypeError, match="hmm must be an object of the class HMM or none"):
        DecoG(decoder.automaton, hmm="x")


def test_a_model_with_more_logits_than_tokens():
    tokens = [b"", b"", *[bytes([c]) for c in range(97, 107)]]
    automaton = lift(template(Wildcard(), "a"), tokens)
    for hmm in (None, HMM.random(3, len(tokens))):
        new = DecoG(automaton, hmm).generate(small_model(), torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=True, top_k=0)
        assert all(v < len(tokens) for v in new.continuations[0].tolist())


def test_a_hidden_markov_model_with_more_tokens_than_the_format():
    # a model's output layer is often wider than its tokenizer: what no text holds changes nothing but `den`
    tokens = [b"", b"", *[bytes([c]) for c in range(97, 107)]]
    automaton, wide = lift(template(Wildcard(), "a"), tokens), HMM.random(3, VOCAB, sharpness=2.0)
    w = log_weights(LookAhead(automaton, wide, 4, [EOS]), torch.tensor([0]), wide.initial[None], 4)
    same = TokenAutomaton(automaton.source, automaton.token, automaton.target, automaton.accepts, VOCAB)
    padded = log_weights(LookAhead(same, wide, 4, [EOS]), torch.tensor([0]), wide.initial[None], 4)
    assert w[0].tolist() == pytest.approx(padded[0, : len(tokens)].tolist(), abs=1e-6)
    assert not padded[0, len(tokens) :].isfinite().any()
    new = DecoG(automaton, wide).generate(small_model(), torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=True, top_k=0)
    assert all(v < len(tokens) for v in new.continuations[0].tolist())


def test_trace_says_what_the_format_did(llama, tokenizer):
    decoder = DecoG(lift(TEMPLATES["record"][0], tokenizer), HMM.random(4, VOCAB), trace=True)
    out = decoder.generate(llama, random_prompts(1, seed=8)[0], max_new_tokens=40, do_sample=False)
    roles = [step.roles[0] for step in out.trace.row(0)]
    assert roles[0] == "forced"  # the first character of the pivot
    assert set(roles) <= {"forced", "steered", "free"}
    assert out.trace.row(0)[0].notes[0].startswith("valid ending ")


# the HMM


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_likelihood_equals_the_sum_over_hidden_states(data):
    hmm = models(data.draw, 3, 3)
    text = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    total = 0.0
    for z in product(range(3), repeat=len(text)):
        p = float(hmm.initial[z[0]] * hmm.emission[z[0], text[0]])
        for t in range(1, len(text)):
            p *= float(hmm.transition[z[t - 1], z[t]] * hmm.emission[z[t], text[t]])
        total += p
    if total > 0:
        assert float(hmm.log_likelihood(torch.tensor([text])).exp()[0]) == pytest.approx(total, rel=1e-9)
        padded = torch.tensor([[*text, 2, 1]])
        mask = torch.tensor([[1] * len(text) + [0, 0]])
        assert float(hmm.log_likelihood(padded, mask).exp()[0]) == pytest.approx(total, rel=1e-9)


@given(cases(), st.sampled_from([0.3, 0.6, 0.9, 0.99]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_pruning_loses_no_more_than_its_bound(case, rho, seed):
    _, table, accepts = case
    hmm = HMM.random(9, V, seed, sharpness=4.0, dtype=torch.float64)
    o = occupancy(hmm, N)
    valid = torch.tensor([is_valid(text, table, accepts) for text in TEXTS.tolist()])
    pi, A, B = pruned(hmm, rho, o, renormalise=False)
    f = pi.expand(len(TEXTS), -1)
    for t in range(N):
        joint = f * B.T[TEXTS[:, t]]
        f = joint @ A
    gap = float((hmm.log_likelihood(TEXTS).exp() - joint.sum(1))[valid].sum())
    assert -1e-12 <= gap <= N * (1 - rho) + 1e-12
    kept = pruned(hmm, rho, o)
    assert kept.states == len(pi)
    assert float(o.sort(descending=True).values[: kept.states].sum()) >= rho - 1e-12
    assert float(o.sort(descending=True).values[: kept.states - 1].sum()) < rho
    assert pruned(hmm, 1.0, o) is hmm


def test_pruning_keeps_the_state_that_writes_the_end(llama, tokenizer):
    hmm = HMM.random(6, VOCAB, seed=1, sharpness=3.0)
    emission = hmm.emission.clone()
    emission[:, EOS] = 0
    emission[5] = torch.nn.functional.one_hot(torch.tensor(EOS), VOCAB)
    hmm = HMM(hmm.initial, hmm.transition, emission / emission.sum(1, keepdim=True))
    weights = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.04, 0.01])
    for rho, states, with_end in ((0.7, 2, 3), (0.405, 2, 2), (1e-9, 1, 1), (1.0, 6, 6)):
        assert pruned(hmm, rho, weights).states == states
        kept = pruned(hmm, rho, weights, eos_ids=[EOS])
        assert kept.states == with_end
        assert float(kept.emission[:, EOS].max()) == 1.0
    # all states kept: the same text, bit for bit, also from tables that are not shared
    automaton, prompt = lift(TEMPLATES["record"][0], tokenizer), random_prompts(1, seed=3)[0]
    whole = HMM(hmm.initial.clone(), hmm.transition.clone(), hmm.emission.clone())
    tables = [LookAhead(automaton, model, 30, [EOS]) for model in (whole, pruned(hmm, 1.0, weights))]
    w = [log_weights(t, torch.zeros(1).long(), hmm.initial[None], 30) for t in tables]
    assert w[0].equal(w[1])
    texts = [
        DecoG(automaton, m).generate(llama, prompt, max_new_tokens=40, do_sample=False).sequences
        for m in (whole, pruned(hmm, 1.0, weights))
    ]
    assert texts[0].equal(texts[1])


def test_hmm_files_and_bad_input(tmp_path):
    hmm = HMM(*(getattr(HMM.random(3, 5), part) for part in ("initial", "transition", "emission")), reads_prompt=True)
    save_hmm(hmm, tmp_path / "a")
    again = load_hmm(tmp_path / "a")
    assert again.reads_prompt
    assert again.emission.equal(hmm.emission)
    (tmp_path / "a" / "hmm.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="is no whole file of a hidden Markov model"):
        load_hmm(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="train one with `decodelab train hmm --out"):
        load_hmm(tmp_path)
    with pytest.raises(ValueError, match=r"must be \[H\], \[H, H\] and \[H, vocab\]"):
        HMM(torch.ones(1), torch.ones(2, 2) / 2, torch.ones(1, 3) / 3)
    with pytest.raises(ValueError, match="transition must hold probabilities"):
        HMM(torch.ones(1), torch.ones(1, 1) * float("nan"), torch.ones(1, 3) / 3)
    with pytest.raises(ValueError, match=r"rho must lie in \(0, 1\]"):
        pruned(hmm, 1.5, hmm.initial)


# automata


LETTERS = "abc"


def strings(most):
    return ["".join(x) for n in range(most + 1) for x in product(LETTERS, repeat=n)]


@given(
    st.text(LETTERS, min_size=1, max_size=4),
    st.sets(st.sampled_from(LETTERS), max_size=1),
    st.sets(st.text(LETTERS, min_size=1, max_size=2), min_size=1),
)
@settings(max_examples=60, deadline=None)
def test_templates_equal_regular_expressions(pivot, without, options):
    barred = "".join(sorted(without))
    found = template(Wildcard(without=barred), pivot, sorted(options))
    free = f"[^{barred}]" if barred else "."
    written = re.compile(f"(?:(?!{pivot}){free})*{pivot}(?:{'|'.join(sorted(options))})")
    for text in strings(6):
        assert found.matches(text) == bool(written.fullmatch(text)), text


@pytest.mark.parametrize(("a", "b"), [("[ab]*", "(abc?)*"), ("a|bc", "b[abc]*"), ("(a|b)*c", "[abc]{2,3}")])
def test_combinations(a, b):
    first, second = from_regex(a), from_regex(b)
    cases = {"and": first & second, "or": first | second, "join": join(first, second)}
    for text in strings(5):
        in_a, in_b = re.fullmatch(a, text), re.fullmatch(b, text)
        assert cases["and"].matches(text) == bool(in_a and in_b)
        assert cases["or"].matches(text) == bool(in_a or in_b)
        assert cases["join"].matches(text) == bool(re.fullmatch(f"(?:{a})(?:{b})", text))


@given(st.sets(st.text(LETTERS, min_size=2, max_size=3), max_size=5))
@settings(max_examples=25, deadline=None)
def test_every_way_to_cut_an_allowed_text_is_allowed(longer):
    tokens = [b"", *[t.encode() for t in [*LETTERS, *sorted(longer)]]]
    automaton = template(Wildcard(without="c"), "ab", ["c", "cc"])
    lifted = lift(automaton, tokens)
    for n in range(1, 4):
        for ids in product(range(1, len(tokens)), repeat=n):
            assert lifted.matches(ids) == automaton.matches(b"".join(tokens[i] for i in ids))
    assert not lifted.matches([0])  # special tokens never


def test_one_cut_alone_is_a_strict_part_and_never_more_probable(llama):
    tokens = [b"", b"", *[bytes([c]) for c in b'{}"abc.'], b'."', b'{"', b'"}', b'."}', b"ab"]
    text = b'{"ab."}'

    def cuts_of(text):
        if not text:
            return [()]
        return [(v, *more) for v, token in enumerate(tokens) if token and text.startswith(token) for more in cuts_of(text[len(token) :])]

    cuts = cuts_of(text)
    lifted, prompt = lift(template(text.decode()), tokens), [5, 6, 7]
    assert len(cuts) > 10
    assert all(map(lifted.matches, cuts))

    def score(ids):
        logs = llama(torch.tensor([prompt + list(ids)])).logits[0].log_softmax(-1)
        return sum(float(logs[len(prompt) - 1 + i, v]) for i, v in enumerate(ids))

    with torch.no_grad():
        scores = [score(ids) for ids in cuts]
        usual = score(min(cuts, key=len))  # longest tokens, as a tokenizer writes
    assert max(scores) >= usual
    single = TokenAutomaton.from_table(
        [*({v: i + 1} for i, v in enumerate(min(cuts, key=len))), {}], [len(min(cuts, key=len))], len(tokens)
    )
    assert [single.matches(ids) for ids in cuts].count(True) == 1


def test_bytes_of_tokens(tokenizer):
    written = token_bytes(tokenizer)
    assert written[PAD] == written[EOS] == b""
    for text in ("a b", '{"x"}'):
        assert b"".join(written[i] for i in tokenizer(text, add_special_tokens=False).input_ids) == text.encode()


def test_schemas():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"]}
    automaton = from_json_schema(schema)
    assert from_json_schema(json.dumps(schema)).matches('{"n": -3, "ok": true}')
    assert not automaton.matches('{"n": 3.5, "ok": true}')
    assert not automaton.matches('{"n": 3}')
    assert not from_json_schema(schema, whitespace="").matches('{"n": 3, "ok": true}')
    for bad, message in (
        ({}, "the schema is empty"),
        ("[1]", "the schema is empty"),
        ("{", "the schema is no JSON"),
        ({"type": "no such"}, "outlines-core does not support this schema"),
        ({"enum": []}, "a choice among nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json_schema(bad)


def test_formats_that_nothing_satisfies(tokenizer):
    with pytest.raises(ValueError, match="no text satisfies this format"):
        from_regex("a+") & from_regex("b+")
    with pytest.raises(ValueError, match="is no regular expression that outlines-core compiles"):
        from_regex("(a")
    with pytest.raises(ValueError, match="these tokens cannot write any text of the format"):
        lift(template("é"), tokenizer)
    with pytest.raises(ValueError, match="the template is empty"):
        template()
    with pytest.raises(ValueError, match="a choice is a list of at least one text"):
        template([])
    with pytest.raises(ValueError, match="free text needs a pivot behind it"):
        template(Wildcard(), Wildcard())
    with pytest.raises(ValueError, match="two edges leave a state with the same token"):
        TokenAutomaton(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([True]), 3)
    with pytest.raises(ValueError, match="does not belong to a vocabulary of 5 tokens"):
        TokenAutomaton.from_table([{9: 0}], [0], 5)
    with pytest.raises(ValueError, match="the table has 1 states"):
        TokenAutomaton.from_table([{1: 4}], [0], 5)


def test_the_compiler_is_missed_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "outlines_core", None)
    with pytest.raises(ImportError, match=r"pip install 'decodelab\[structured\]'"):
        from_regex("a")


@pytest.mark.parametrize(
    "pattern", ["(ab)*", "(abc?)+", "a|bc", "[^a]*", "(a|bc)+c?", "((ab)*|ca{2,3})b?", "^ab+$", "(a*)(bc)*", "a.c", r"(-?[ab])?(\.c+)?"]
)
def test_regular_expressions_equal_pythons(pattern):
    found = from_regex(pattern)
    for text in strings(6):
        assert found.matches(text) == bool(re.fullmatch(pattern, text)), text
    for text in ("é", "a\u20acc", "-a.cc", ".c", "a."):
        assert found.matches(text) == bool(re.fullmatch(pattern, text)), text
