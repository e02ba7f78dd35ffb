"""Exact extract against brute force: every span fed alone, on encoder-decoder and decoder-only models."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB, character_tokenizer, left_pad, random_prompts, small_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from decodelab.core.cross_session import CrossSession
from decodelab.core.session import Session
from decodelab.lab.table_model import table_model
from decodelab.structured import exact_extract
from decodelab.structured.exact_extract import ExactExtract, passage_ids, span_scores

BEGIN, STOP = 5, 6
T5_SHAPE = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def small_t5(seed=0):
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**T5_SHAPE, decoder_start_token_id=0, pad_token_id=0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.fixture(scope="module")
def t5():
    return small_t5()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def answer_log_probs(model, inputs, answer):
    "Log-probability of each token of an answer, in one teacher-forced forward of a fresh text."
    if model.config.is_encoder_decoder:
        log_p = model(**inputs, decoder_input_ids=torch.tensor([[0, *answer]])).logits.double().log_softmax(-1)[0, :-1]
    else:
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        log_p = model(ids).logits.double().log_softmax(-1)[0, inputs["input_ids"].shape[1] - 1 : -1]
    return log_p.gather(1, torch.tensor(answer)[:, None])[:, 0]


def brute_force(model, inputs, passage, begin=(), longest=None):
    "Score of every span, each fed alone."
    n = len(passage)
    spans = [(i, k) for i in range(n) for k in range(1, min(n - i, longest or n) + 1)]
    return {(i, k): float(answer_log_probs(model, inputs, [*begin, *passage[i : i + k], STOP]).sum()) for i, k in spans}


def spans_of(scores):
    rows, columns = (scores.total > -torch.inf).nonzero(as_tuple=True)
    return {(int(i), int(k) + 1): float(scores.total[i, k]) for i, k in zip(rows, columns)}


def extract(model, inputs, new=40, **fields):
    begin = [BEGIN] if model.config.is_encoder_decoder else []
    decoder = ExactExtract(begin=begin, **fields)
    return model.generate(**inputs, custom_generate=decoder, max_new_tokens=new, do_sample=False, eos_token_id=STOP)


def text(out):
    return tuple(out.continuations[0].tolist())


passages = st.lists(st.integers(7, 20), min_size=1, max_size=9)
KINDS = ["t5", "llama", "gpt2"]


def case(kind, request, seed=0):
    model = request.getfixturevalue(kind)
    ids = torch.randint(7, VOCAB, (1, 6), generator=torch.Generator().manual_seed(seed))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [BEGIN] if kind == "t5" else []


@pytest.mark.parametrize("kind", KINDS)
@given(passage=passages, chunk=st.sampled_from([1, 3, 100]), longest=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=8)
def test_all_spans_equal_brute_force(kind, request, passage, chunk, longest, seed):
    model, inputs, begin = case(kind, request, seed)
    scores = span_scores(model, inputs, passage, STOP, begin=begin, chunk=chunk, longest=longest)
    found, expected = spans_of(scores), brute_force(model, inputs, passage, begin, longest)
    assert found.keys() == expected.keys()
    assert max(abs(found[span] - expected[span]) for span in found) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalised", [False, True])
@given(passage=passages, chunk=st.sampled_from([1, 2, 100]), top=st.integers(1, 4), longest=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=6)
def test_the_answer_is_the_best_span_also_with_branch_and_bound(kind, normalised, request, passage, chunk, top, longest, seed):
    model, inputs, begin = case(kind, request, seed)
    slow = brute_force(model, inputs, passage, begin, longest)
    values = {tuple(passage[i : i + k]): s / (k + 1 + len(begin) if normalised else 1) for (i, k), s in slow.items()}
    expected = sorted(values.values(), reverse=True)[:top]
    for prune in (False, True):
        fields = {"passage": passage, "chunk": chunk, "top": top, "normalised": normalised, "prune": prune}
        out = extract(model, inputs, longest + 1 + len(begin), **fields)
        facts = out.stats.search[0]
        assert [s.score for s in facts["spans"]] == pytest.approx(expected, abs=1e-4)
        best = facts["spans"][0]
        assert text(out) == (*begin, *best.tokens, STOP)
        assert values[best.tokens] == pytest.approx(expected[0], abs=1e-4)
        first = next(i for i in range(len(passage)) if tuple(passage[i : i + len(best.tokens)]) == best.tokens)
        assert best.start == facts["start"] == first
        assert len({s.tokens for s in facts["spans"]}) == len(facts["spans"])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_a_fresh_forward(kind, request):
    model, inputs, begin = case(kind, request)
    out = extract(model, inputs, passage=list(range(7, 16)))
    fresh = answer_log_probs(model, inputs, list(text(out)))
    facts = out.stats.search[0]
    assert facts["log_probs"] == pytest.approx(fresh[len(begin) :].tolist(), abs=1e-4)
    assert facts["log_prob"] == pytest.approx(float(fresh.sum()), abs=1e-4)


def test_suffixes_share_their_tokens(t5):
    "n rows and n (n + 1) / 2 tokens of suffixes; with the two tokens before them in each row, n (n + 5) / 2."
    inputs, n = {"input_ids": torch.tensor([[9, 8, 7]])}, 12
    out = extract(t5, inputs, passage=list(range(7, 7 + n)), chunk=n)
    facts = out.stats.search[0]
    assert (facts["rows"], facts["fed"]) == (n, n * (n + 1) // 2)
    assert facts["fed"] + 2 * n == n * (n + 5) // 2
    assert out.stats.target_forwards == 3  # the start token, `begin`, all suffixes


# branch and bound: what must be fed, and no more


def close_race(margin):
    """A model and a passage *a b c d* in which everything is decided by a little.

    Behind the prompt b has probability .2; in multiples of the margin, in nats below ln .2: *b c* is fed up to 1/2 and scores 1, *a* scores 2, and d has 3.
    """
    a, b, c, d, stop, start, other = range(1, 8)
    probs = torch.full((8, 8), 1e-9)
    probs[start, [a, b, d]] = torch.tensor([0.5, 0.2, 0.2 * math.exp(-3 * margin)])
    probs[a, stop] = 0.4 * math.exp(-2 * margin)
    probs[b, c] = probs[c, stop] = math.exp(-margin / 2)
    probs[d, stop] = 0.5
    probs[:, other] += 1 - probs.sum(1)
    return table_model(probs), torch.tensor([[start]]), [a, b, c, d], stop


def race(margin, **fields):
    model, prompt, passage, stop = close_race(margin)
    decoder = ExactExtract(passage, prune=True, chunk=1, **fields)
    out = model.generate(prompt, custom_generate=decoder, max_new_tokens=9, do_sample=False, eos_token_id=stop)
    return text(out)[:-1], out.stats.search[0]


@pytest.mark.parametrize("margin", [0.001, 0.01, 0.1, 0.5])
def test_branch_and_bound_feeds_what_may_win_and_nothing_else(margin):
    "a, b and b c lie above the best score, so no exact search can do without them; d lies below it and is not begun."
    answer, facts = race(margin)
    assert answer == (2, 3)
    assert facts["log_prob"] == pytest.approx(math.log(0.2) - margin, abs=1e-5)
    assert (facts["fed"], facts["rows"]) == (3, 2)


@pytest.mark.parametrize("nats", [-2.0, -0.05, 0.05, 2.0])
def test_a_bound_that_is_off_is_noticed(nats, monkeypatch):
    "Too tight: another answer. Too loose: more is fed."
    tighten = exact_extract._Scan.tighten

    def off(scan):
        tighten(scan)
        scan.bound += nats

    monkeypatch.setattr(exact_extract._Scan, "tighten", off)
    answer, facts = race(0.01)
    assert answer == (1,) if nats > 0 else facts["fed"] > 3


def fed_by_hand(passage, log_p, before, longest, chunk, top, normalised):
    """Tokens that branch and bound feeds, and those that every exact search must feed, from the scores of all spans.

    Rows by the probability of their first token, `chunk` of them together, in pieces of 1, 1, 2, 4, ... tokens; after each piece, rows whose beginning is below the
    bound are dropped. A beginning that is not below the final bound must be fed.
    """
    n, size = len(passage), lambda k: k + 1 + before if normalised else 1
    reach = [min(n - i, longest) for i in range(n)]
    prefix = {(i, k): float(p[:-1].sum()) for (i, k), p in log_p.items()}
    value = {(i, k): float(p.sum()) / size(k) for (i, k), p in log_p.items()}
    known, fed = {}, 0

    def bound():
        found = sorted(known.values(), reverse=True)
        return found[top - 1] if len(found) >= top else -math.inf

    def may_win(i, k):
        return k <= reach[i] and prefix[i, k] / size(reach[i]) >= bound()

    first = {passage[i]: prefix[i, 1] for i in reversed(range(n))}
    order = sorted(range(n), key=lambda i: -first[passage[i]])
    for at in range(0, n, chunk):
        rows, done = [i for i in order[at : at + chunk] if may_win(i, 1)], 0
        while rows:
            piece = range(done + 1, done + max(1, done) + 1)
            for cell in [(i, k) for i in rows for k in piece if k <= reach[i]]:
                known[tuple(passage[cell[0] : sum(cell)])] = value[cell]
                fed += 1
            done = piece[-1]
            rows = [i for i in rows if may_win(i, done + 1)]
    needed = sum(prefix[i, k] / size(reach[i]) > bound() + 1e-4 for i, k in prefix)
    return fed, needed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top", "normalised"), [(1, False), (3, False), (1, True), (2, True)])
def test_tokens_that_branch_and_bound_feeds(kind, top, normalised, request):
    needed_of_all = fed_of_all = every = 0
    for seed, chunk, longest in ((0, 1, 10), (1, 3, 5), (2, 100, 10)):
        model, inputs, begin = case(kind, request, seed)
        passage = torch.randint(7, 20, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
        spans = [(i, k) for i in range(10) for k in range(1, min(10 - i, longest) + 1)]
        log_p = {(i, k): answer_log_probs(model, inputs, [*begin, *passage[i : i + k], STOP]) for i, k in spans}
        fed, needed = fed_by_hand(passage, log_p, len(begin), longest, chunk, top, normalised)
        fields = {"chunk": chunk, "top": top, "normalised": normalised}
        out = extract(model, inputs, longest + 1 + len(begin), passage=passage, prune=True, **fields)
        assert out.stats.search[0]["fed"] == fed >= needed
        whole = extract(model, inputs, longest + 1 + len(begin), passage=passage, **fields)
        assert whole.stats.search[0]["fed"] == len(spans)
        assert text(out) == text(whole)
        needed_of_all, fed_of_all, every = needed_of_all + needed, fed_of_all + fed, every + len(spans)
    if not normalised:
        assert needed_of_all <= fed_of_all < 0.6 * every


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"input_ids": torch.ones(2, 4, dtype=torch.long)}}, "give one prompt"),
        ({"longest": 0}, "a longest span of at least 1, got 1, 3, 1 and 0"),
        ({"stop": []}, "an id that stops"),
        ({"passage": []}, "a passage"),
        ({"inputs": {"input_ids": torch.ones(1, 255, dtype=torch.long)}}, "exceed the model's context of 256"),
    ],
)
def test_span_scores_refuses(llama, change, message):
    fields = {"inputs": {"input_ids": torch.ones(1, 4, dtype=torch.long)}, "passage": [9, 8, 7], "stop": STOP} | change
    assert llama.config.max_position_embeddings == 256
    with pytest.raises(ValueError, match=message):
        span_scores(llama, fields.pop("inputs"), fields.pop("passage"), fields.pop("stop"), **fields)


@given(passage=passages, extra=passages, seed=st.integers(0, 5))
@settings(max_examples=8)
def test_more_candidates_never_lower_the_best(t5, passage, extra, seed):
    inputs = {"input_ids": torch.randint(7, VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed))}

    def best(tokens, longest=None):
        return span_scores(t5, inputs, tokens, STOP, begin=[BEGIN], longest=longest).best()[0].score

    assert best(passage + extra) >= best(passage) - 1e-5
    assert best(passage) >= best(passage, longest=1) - 1e-5


def test_a_copy_of_the_passage_changes_nothing(t5, request):
    _, inputs, begin = case("t5", request)
    passage = [9, 12, 9, 15]
    once = span_scores(t5, inputs, passage, STOP, begin=begin).best(3)
    twice = span_scores(t5, inputs, [*passage, 96, *passage], STOP, begin=begin, longest=4)
    kept = [s for s in twice.best(100) if 96 not in s.tokens][:3]
    assert [(s.start, s.tokens) for s in kept] == [(s.start, s.tokens) for s in once]


def test_a_passage_of_one_token_and_spans_of_one_token(t5, request):
    _, inputs, begin = case("t5", request)
    assert text(extract(t5, inputs, passage=[33])) == (BEGIN, 33, STOP)
    scores = span_scores(t5, inputs, [8, 9, 8, 10], STOP, begin=begin, longest=1)
    single = {t: float(answer_log_probs(t5, inputs, [BEGIN, t, STOP]).sum()) for t in (8, 9, 10)}
    assert scores.best()[0].tokens == (max(single, key=single.get),)
    assert len(scores.best(9)) == 3


@pytest.mark.parametrize("prune", [False, True])
def test_a_span_that_holds_a_stop_token_cannot_be_written(t5, prune, request):
    _, inputs, begin = case("t5", request)
    scores = span_scores(t5, inputs, [8, 9, STOP, 10, 11], STOP, begin=begin)
    assert spans_of(scores).keys() == {(0, 1), (0, 2), (1, 1), (3, 1), (3, 2), (4, 1)}
    assert STOP not in text(extract(t5, inputs, passage=[STOP, 9, STOP, 10], prune=prune))[:-1]
    with pytest.raises(ValueError, match="no span of the passage is possible: all hold a stop token"):
        extract(t5, inputs, passage=[STOP, STOP], prune=prune)


@pytest.mark.parametrize("kind", KINDS)
def test_extractive_mass(kind, request):
    model, inputs, begin = case(kind, request)
    passage = [8, 9, 8, 9, 10]
    scores = span_scores(model, inputs, passage, STOP, begin=begin)
    slow = brute_force(model, inputs, passage, begin)
    distinct = {tuple(passage[i : i + k]): s for (i, k), s in slow.items()}
    assert scores.mass() == pytest.approx(sum(map(math.exp, distinct.values())), rel=1e-4)
    assert scores.mass() < sum(map(math.exp, slow.values()))  # equal spans count once
    assert scores.mass() <= math.exp(scores.before) <= 1


def test_greedy_restricted_to_spans_is_never_better(t5):
    "A decoder that follows the passage greedily, and stops when that is more probable, scores at most what exact extract finds."
    for seed in range(8):
        inputs = {"input_ids": torch.randint(7, VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed))}
        passage = torch.randint(7, 30, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        written, open_starts = [BEGIN], list(range(len(passage)))
        while True:
            k = len(written) - 1
            log_p = t5(**inputs, decoder_input_ids=torch.tensor([[0, *written]])).logits[0, -1].log_softmax(-1)
            allowed = {passage[i + k] for i in open_starts if i + k < len(passage)} | ({STOP} if k else set())
            token = max(allowed, key=lambda t: float(log_p[t]))
            written.append(token)
            if token == STOP:
                break
            open_starts = [i for i in open_starts if i + k < len(passage) and passage[i + k] == token]
        exact = span_scores(t5, inputs, passage, STOP, begin=[BEGIN]).best()[0].score
        assert exact >= float(answer_log_probs(t5, inputs, written).sum()) - 1e-5


# negative controls: brute force must notice


@pytest.mark.parametrize("fault", ["stop one column early", "the EOS token in place of the stop", "begin left out", "length forgotten"])
def test_broken_scores_are_noticed(t5, fault, request):
    _, inputs, begin = case("t5", request)
    passage = [8, 9, 10, 11, 12]
    stop, before = (1 if "EOS" in fault else STOP), ([] if "begin" in fault else begin)
    scores = span_scores(t5, inputs, passage, stop, begin=before)
    if "early" in fault:
        scores.stop = torch.cat([scores.stop[:, :1], scores.stop[:, :-1]], 1)
    if "length" in fault:
        scores.token = scores.token.flip(1)
    slow, found = brute_force(t5, inputs, passage, begin), spans_of(scores)
    assert max(abs(found[s] - slow[s]) for s in found.keys() & slow.keys()) > 1e-2


# the call


class Bias(LogitsProcessor):
    "Favours a token that depends on the whole text so far."

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        favoured = 7 + input_ids.sum(-1, keepdim=True) % 20
        return scores.scatter_add(1, favoured, torch.full_like(favoured, 3.0, dtype=scores.dtype))


class Only(LogitsProcessor):
    "Leaves only some tokens."

    def __init__(self, allowed):
        self.allowed = torch.tensor(allowed)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, self.allowed, scores[:, self.allowed])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prune", [False, True])
def test_processors_are_asked_behind_every_beginning(kind, prune, request):
    model, inputs, begin = case(kind, request)
    passage, start = [8, 9, 8, 10, 11], [0] if begin else inputs["input_ids"][0].tolist()
    values = {}
    for i in range(5):
        for k in range(1, 6 - i):
            answer, total = [*begin, *passage[i : i + k], STOP], 0.0
            for j, token in enumerate(answer):
                written = torch.tensor([[*start, *answer[:j]]])
                logits = model(**inputs, decoder_input_ids=written).logits if begin else model(written).logits
                total += float(Bias()(written, logits[:, -1].float()).log_softmax(-1)[0, token])
            values[tuple(answer)] = total
    out = model.generate(
        **inputs,
        custom_generate=ExactExtract(passage, begin, prune=prune, chunk=2),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=STOP,
        logits_processor=LogitsProcessorList([Bias()]),
    )
    assert text(out) == max(values, key=values.get)
    assert out.stats.search[0]["log_prob"] == pytest.approx(max(values.values()), abs=1e-4)


def test_processors_that_forbid_all_spans(llama, request):
    _, inputs, _ = case("llama", request)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": STOP}
    only = LogitsProcessorList([Only([9, STOP])])
    out = llama.generate(**inputs, custom_generate=ExactExtract([8, 9, 10]), logits_processor=only, **settings)
    assert text(out) == (9, STOP)
    with pytest.raises(ValueError, match="no span of the passage is possible"):
        llama.generate(**inputs, custom_generate=ExactExtract([8, 10]), logits_processor=only, **settings)


def test_rows_of_a_batch_are_alone(t5, llama):
    batch = left_pad(random_prompts(3, lengths=(3, 8), seed=2))
    passages = [[8, 9, 10], [11, 12], [13, 14, 15, 16]]
    for model, flip in ((t5, True), (llama, False)):
        inputs = {k: v.flip(1) for k, v in batch.items()} if flip else batch  # an encoder's text is padded on the right
        together = extract(model, inputs, passage=passages)
        for i, row in enumerate(together.continuations):
            ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()][None]
            alone = extract(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, passage=passages[i])
            assert tuple(row.tolist()) == text(alone)
            assert together.stats.search[i]["log_prob"] == pytest.approx(alone.stats.search[0]["log_prob"], abs=1e-4)


def test_several_stop_tokens_end_an_answer_together(llama, request):
    _, inputs, _ = case("llama", request)
    scores = span_scores(llama, inputs, [8, 9], [STOP, 50])
    log_p = llama(torch.cat([inputs["input_ids"], torch.tensor([[8]])], 1)).logits[0, -1].log_softmax(-1)
    assert float(scores.stop[0, 0]) == pytest.approx(float(log_p[[STOP, 50]].logsumexp(0)), abs=1e-5)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": [STOP, 50]}
    out = llama.generate(**inputs, custom_generate=ExactExtract([8]), **settings)
    assert text(out) == (8, (STOP, 50)[int(log_p[50] > log_p[STOP])])


def test_trace_criteria_and_length(t5, request):
    _, inputs, _ = case("t5", request)
    out = extract(t5, inputs, passage=[8, 9, 10], trace=True)
    step = out.trace[0]
    assert step.roles[0] == "begin"
    assert step.roles[-1] == "stop"
    assert set(step.roles[1:-1]) == {"span"}
    assert step.tokens == out.continuations[0].tolist()

    class AfterTwo:
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 3)

    cut = t5.generate(
        **inputs,
        custom_generate=ExactExtract([8, 9, 10], [BEGIN]),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=STOP,
        stopping_criteria=StoppingCriteriaList([AfterTwo()]),
    )
    assert text(cut) == text(out)[:2]


BAD = [
    ({"passage": []}, {}, "empty passage"),
    ({"passage": [[8], []]}, {}, "2 passages for 1 rows"),
    ({"passage": [8, VOCAB]}, {}, f"token id {VOCAB} of passage or begin is outside"),
    ({"passage": [8], "begin": [-1]}, {}, "token id -1 of passage or begin is outside"),
    ({"passage": [8]}, {"do_sample": True}, "do_sample=False"),
    ({"passage": [8]}, {"eos_token_id": None}, "pass eos_token_id"),
    ({"passage": [8], "begin": [5]}, {"max_new_tokens": 2}, "set max_new_tokens >= 3"),
    ({}, {}, "give the passage, passage=passage_ids"),
    ({"passage": [8], "compile": True}, {}, "encoder-decoder models are not compiled"),
]


@pytest.mark.parametrize(("fields", "settings", "message"), BAD)
def test_bad_calls(t5, fields, settings, message):
    ids = torch.tensor([[9, 8, 7]])
    model = copy.copy(t5)
    model.generation_config = copy.deepcopy(t5.generation_config)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=message):
        model.generate(
            ids, custom_generate=ExactExtract(**fields), **{"max_new_tokens": 9, "do_sample": False, "eos_token_id": STOP} | settings
        )


def test_bad_fields_and_a_context_that_is_too_short():
    with pytest.raises(ValueError, match="top and chunk must be at least 1"):
        ExactExtract(top=0)
    with pytest.raises(TypeError, match="passage must be"):
        ExactExtract(passage="a text")
    model = small_model(context=16)
    with pytest.raises(ValueError, match="exceed the model's context of 16"):
        extract(model, {"input_ids": torch.full((1, 10), 9)}, 12, passage=[8])


def test_logits_that_are_not_numbers(t5):
    broken = copy.deepcopy(t5)
    broken.decoder.final_layer_norm.weight[:] = torch.nan
    with pytest.raises(ValueError, match="NaN logits"):
        extract(broken, {"input_ids": torch.tensor([[9, 8]])}, passage=[8, 9])


# the tokens of a passage


def test_passage_tokens_are_those_of_the_prompt():
    tokenizer = character_tokenizer()
    prompt = "Text: a bc. Question?"
    ids = passage_ids(tokenizer, prompt, "a bc.")
    assert tokenizer.decode(ids) == "a bc."
    assert passage_ids(tokenizer, prompt, "  a bc.\n") == ids
    with pytest.raises(ValueError, match="does not stand in the prompt word for word"):
        passage_ids(tokenizer, prompt, "a cb")
    with pytest.raises(ValueError, match="empty passage"):
        passage_ids(tokenizer, prompt, "  ")


def test_a_tokenizer_that_merges_across_the_border(tales):
    _, tokenizer = tales
    apart = passage_ids(tokenizer, "Text: the king. Question", "the king")
    assert tokenizer.decode(apart).strip() == "the king"
    with pytest.raises(ValueError, match="reaches beyond a border of the passage: put a space or a line break there"):
        passage_ids(tokenizer, "Text: the kings", "the king")


# encoder-decoder sessions


def small_bart():
    torch.manual_seed(1)
    shape = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shape |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64, "init_std": 0.5}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, d_model=16, decoder_start_token_id=0, pad_token_id=1, **shape)).eval()


def test_another_encoder_decoder_model():
    model, inputs = small_bart(), {"input_ids": torch.tensor([[9, 8, 7, 20]])}
    passage = [8, 9, 10, 8]
    scores = span_scores(model, inputs, passage, STOP, begin=[BEGIN], chunk=2)
    found, slow = spans_of(scores), brute_force(model, inputs, passage, [BEGIN])
    assert max(abs(found[s] - slow[s]) for s in slow) < 1e-4
    assert text(extract(model, inputs, passage=passage, prune=True))[1:-1] == scores.best()[0].tokens
    with pytest.raises(ValueError, match="exceed the model's context of 64"):
        extract(model, inputs, 80, passage=passage)


def test_a_session_of_two_parts_refuses_a_decoder_that_does_not_add_up(t5, monkeypatch):
    model = copy.deepcopy(t5)
    encoded = model.get_encoder()(input_ids=torch.tensor([[9, 8]]), return_dict=True)
    forward = CrossSession._forward
    monkeypatch.setattr(CrossSession, "_forward", lambda self, tokens, cache: forward(self, tokens, None))  # forgets what was fed
    with pytest.raises(ValueError, match="gives other logits when a text is fed in pieces"):
        CrossSession(model, encoder_outputs=encoded)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("row", [0, 1])
def test_repeated_rows_of_a_session(kind, row, request):
    model, batch = request.getfixturevalue(kind), left_pad(random_prompts(2, lengths=(4, 9), seed=4))
    with Session(model, batch["attention_mask"]) as session:
        session.prefill(batch["input_ids"])
        session.feed(torch.tensor([[7], [8]]))
        with pytest.raises(ValueError, match="a row can be repeated behind its prompt"):
            Session(model).repeat(0, 2)
        texts = torch.tensor([[11, 12, 13], [14, 15, 16], [11, 20, 21]])
        before = torch.cat([batch["input_ids"][row][batch["attention_mask"][row].bool()], torch.tensor([7 + row])])
        whole = model(torch.cat([before.expand(3, -1), texts], 1)).logits[:, -3:]
        rows = session.repeat(row, 3)
        first = rows.feed(texts[:, :1])
        rows.keep_rows(torch.tensor([2, 0]))
        rest = rows.feed(texts[[2, 0], 1:])
        assert torch.allclose(torch.cat([first[[2, 0]], rest], 1), whole[[2, 0]], atol=1e-4)
        after = session.feed(torch.tensor([[30], [31]]))  # the session has stayed where it was
        alone = model(torch.cat([before, torch.tensor([30 + row])])[None]).logits[0, -1]
        assert torch.allclose(after[row, -1], alone, atol=1e-4)
