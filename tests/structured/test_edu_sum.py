"""EDU plans against brute force: units that tile, plans that are all there are, beams of plans and texts, scores, and the decoder on T5 and BART."""

import copy
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB, StopsAt, SumBias, character_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LogitsProcessorList,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)

from decodelab.lab.tasks.news import JOINS, NewsTask
from decodelab.structured import plan_generator as plan_module
from decodelab.structured.edu import Document, edu_spans, edus, gain, grams, oracle_plan, pysbd_sentences, read_document
from decodelab.structured.edu_sum import PGA, candidate_scores, ranking_loss
from decodelab.structured.plan_generator import PlanConfig, PlanGenerator, document_plans, load_plan_generator, plan_beam, plan_loss
from decodelab.structured.text_beam import beam_texts

OPEN, CLOSE, END = 5, 6, 1
STOPS = [END, *range(10, 22)]  # many, for texts of several lengths
T5_SHAPE = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def small_t5(seed=0):
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**T5_SHAPE, decoder_start_token_id=0, pad_token_id=0, eos_token_id=END)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        model.shared.weight.mul_(2.0)
        for name, p in model.named_parameters():
            if "EncDecAttention" in name:
                p.mul_(3.0)  # what is written depends on what was read
    return model


def small_bart():
    torch.manual_seed(1)
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shape |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64, "init_std": 0.5, "forced_eos_token_id": None}
    special = {"decoder_start_token_id": 0, "pad_token_id": 2, "eos_token_id": END, "bos_token_id": 3}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, d_model=16, **shape, **special)).eval()


@pytest.fixture(scope="module")
def t5():
    return small_t5()


@pytest.fixture(scope="module")
def bart():
    return small_bart()


@pytest.fixture(scope="module")
def planner():
    torch.manual_seed(2)
    config = T5Config(**T5_SHAPE, decoder_start_token_id=0, pad_token_id=0, eos_token_id=END).to_dict()
    model = PlanGenerator(PlanConfig(config, tags=(OPEN, CLOSE), heads=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def a_document(n, seed=0, longest=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return Document(tuple(tuple(torch.randint(10, VOCAB, (s,), generator=generator).tolist()) for s in sizes), (OPEN, CLOSE), (3,), (4,))


# units

pieces = st.sampled_from([*"aB. ,;:()!?\"'\n-1é", " and was ", " that ", ". The ", ", because "])
texts = st.lists(pieces, min_size=1, max_size=25).map("".join)


@given(text=texts, shortest=st.integers(1, 6))
@settings(max_examples=60)
def test_units_tile_the_text(text, shortest):
    if not text.strip():
        with pytest.raises(ValueError, match="empty text"):
            edu_spans(text)
        return
    spans = edu_spans(text, shortest=shortest)
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
    assert spans[-1][1] == len(text)
    assert all(text[a:b].strip() for a, b in spans)


def test_clauses_of_a_sentence():
    text = "The mayor, who had closed the mill in May, sold it to a baker because nobody wanted it. It cost 3,000 crowns and was old."
    assert edus(text, shortest=3) == [
        "The mayor, who had closed the mill in May,",
        "sold it to a baker",
        "because nobody wanted it.",
        "It cost 3,000 crowns",
        "and was old.",
    ]
    assert edus("One. Two. Three.", shortest=5) == ["One.", "Two.", "Three."]  # sentences are not merged with each other


def test_sentences_by_pysbd():
    pytest.importorskip("pysbd")
    text = "Dr. Ada met Mr. Ben at the mill. They talked for an hour."
    assert len(edus(text)) > len(edus(text, sentences=pysbd_sentences)) == 2
    spans = edu_spans(text, sentences=pysbd_sentences)
    assert "".join(text[a:b] for a, b in spans) == text


def test_the_facts_of_the_news_are_found_again():
    for example in NewsTask().examples(40, seed=3):
        units = [unit.rstrip(".,") for unit in edus(example.prompt)]
        units = [" ".join(unit.split()[1:]) if unit.split()[0] in JOINS else unit for unit in units]
        assert units == [event.told() for event in example.meta["events"]]


# oracle plans

sentences = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=4).map(" ".join)


@given(units=st.lists(sentences, min_size=1, max_size=7), summary=sentences)
@settings(max_examples=60)
def test_greedy_never_beats_exhaustive_search_and_rises(units, summary):
    parts, target = [grams(u) for u in units], grams(summary)
    every = {c: gain([parts[i] for i in c], target) for size in range(len(units) + 1) for c in combinations(range(len(units)), size)}
    plan = oracle_plan(units, summary)
    assert plan == sorted(set(plan))
    assert every[tuple(plan)] <= max(every.values()) + 1e-9
    values = [every[tuple(oracle_plan(units, summary, most=m))] for m in range(1, len(units) + 1)]
    steps = values[: max(1, len(plan))]
    assert all(a < b for a, b in zip(steps, steps[1:]))  # each unit makes it larger
    assert all(every[tuple(sorted((*plan, i)))] <= every[tuple(plan)] for i in range(len(units)) if i not in plan)


def test_greedy_can_miss_the_best_set():
    "It is greedy: sometimes two units together are better than what one at a time finds."
    units, summary = ["a b c x", "a b y", "c d z"], "a b c d"
    parts, target = [grams(u) for u in units], grams(summary)
    best = max((gain([parts[i] for i in c], target), c) for size in range(4) for c in combinations(range(3), size))
    assert gain([parts[i] for i in oracle_plan(units, summary)], target) <= best[0]
    assert gain([], target) == 0.0
    assert gain([target], target) == pytest.approx(2.0, abs=1e-6)
    assert gain([grams("a b")], target) == pytest.approx(2 * (2 / 2) * (2 / 4) / 1.5 + 2 * 1 * (1 / 3) / (4 / 3), abs=1e-6)
    assert oracle_plan(["b", "a", "a"], "a") == [1]  # of equals the first
    with pytest.raises(ValueError, match="a plan needs at least one unit"):
        oracle_plan([], "a")


# documents


@given(n=st.integers(1, 6), seed=st.integers(0, 9), plan=st.sets(st.integers(0, 5)))
@settings(max_examples=40)
def test_tags_taken_out_leave_the_document(n, seed, plan):
    document = a_document(n, seed)
    if any(i >= n for i in plan):
        with pytest.raises(ValueError, match=f"the document has {n} units, 0 to {n - 1}"):
            document.tagged(plan)
        return
    tagged = document.tagged(plan)
    assert [t for t in tagged if t not in document.tags] == document.tagged() == document.tagged([])
    inside, at = [], -1
    for token in tagged:
        at += token == OPEN
        if token == OPEN:
            inside.append([])
        elif token == CLOSE:
            inside[-1] = tuple(inside[-1])
        elif inside and isinstance(inside[-1], list):
            inside[-1].append(token)
    assert inside == [document.units[i] for i in sorted(plan)]


def news_like_tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<e>", "</e>"]})
    return tokenizer


def test_tokens_of_a_document_are_those_of_its_text():
    tokenizer = news_like_tokenizer()
    text = "Ada sold the old lamp today, while Ben hid the hat again. It rained in the evening there."
    document, units = read_document(tokenizer, text)
    assert document.tagged() == tokenizer(text).input_ids
    assert [tokenizer.decode(unit).strip() for unit in document.units] == units == edus(text)
    short, few = read_document(tokenizer, text, max_length=50)
    assert len(short.tagged(range(len(few)))) <= 50
    assert short.tagged() == document.tagged()[: len(short.tagged())]
    with pytest.raises(ValueError, match="the tokenizer does not know <e> and </e>"):
        read_document(character_tokenizer(), text)
    with pytest.raises(ValueError, match="empty text"):
        read_document(tokenizer, " ")
    with pytest.raises(ValueError, match="empty document"):
        read_document(tokenizer, text, max_length=2)


# plans


def brute_plans(planner, document, fewest=1, most=20):
    "Log-probability of every allowed plan, each step computed alone and normalised over what is allowed."
    n = len(document.units)
    h, known = planner.read_units(*(torch.tensor([x]) for x in (document.tagged(range(n)), [1] * len(document.tagged(range(n))))))
    least, found = min(fewest, n), {}
    for size in range(least, min(most, n) + 1):
        for plan in combinations(range(n), size):
            total = 0.0
            for k in range(size + 1):
                scores = planner.step_scores(h, known, torch.tensor([plan[:k]], dtype=torch.long))[0, -1].double()
                for j in range(n + 1):  # column 0: the stop
                    possible = (k >= least) if j == 0 else (k < min(most, n) and (n - j) >= least - k - 1)
                    scores[j] = scores[j] if possible else -math.inf
                total += float(scores.log_softmax(-1)[0 if k == size else plan[k] + 1])
            found[plan] = total
    return found


@pytest.mark.parametrize(("fewest", "most"), [(1, 20), (2, 4), (3, 3)])
def test_all_plans_in_their_exact_order(planner, fewest, most):
    document = a_document(6, seed=4)
    slow = brute_plans(planner, document, fewest, most)
    assert sum(map(math.exp, slow.values())) == pytest.approx(1.0, abs=1e-5)
    for penalty in (0.0, 1.0):
        plans = document_plans(planner, document, len(slow) + 5, fewest, most, penalty)
        assert {p.units: p.log_prob for p in plans} == pytest.approx(slow, abs=1e-4)
        order = sorted(slow.values(), reverse=True) if penalty == 0 else sorted((v / (len(u) + 1) for u, v in slow.items()), reverse=True)
        assert [p.score for p in plans] == pytest.approx(order, abs=1e-4)


@given(n=st.integers(1, 9), k=st.integers(1, 20), fewest=st.integers(1, 4), more=st.integers(0, 5), seed=st.integers(0, 20))
@settings(max_examples=60)
def test_plans_increase_differ_and_keep_their_limits(n, k, fewest, more, seed):
    table = torch.randn(10, 10, n + 1, generator=torch.Generator().manual_seed(seed))

    def scores(plans):
        return torch.stack([table[len(p), p[-1] if p else 9] for p in plans])

    plans = plan_beam(scores, n, k, fewest, fewest + more)
    legal = sum(math.comb(n, size) for size in range(min(fewest, n), min(fewest + more, n) + 1))
    assert 1 <= len(plans) <= min(k, legal)
    assert len({p.units for p in plans}) == len(plans)
    for p in plans:
        assert list(p.units) == sorted(set(p.units))
        assert min(fewest, n) <= len(p.units) <= fewest + more
        assert p.log_prob <= 0
    assert [p.score for p in plans] == sorted((p.score for p in plans), reverse=True)
    assert len(plan_beam(scores, n, legal, fewest, fewest + more)) == legal


def test_a_beam_that_allows_what_is_not_allowed_is_noticed(planner, monkeypatch):
    document = a_document(6, seed=4)
    monkeypatch.setattr(plan_module, "allowed", lambda plan, n, fewest, most: torch.ones(n + 1, dtype=torch.bool))
    planner_scores = PlanGenerator.step_scores

    def unmasked(self, h, known, plans):
        scores = planner_scores(self, h, known, plans)
        return torch.where(torch.tensor(plans.shape[1] < 6), scores.nan_to_num(neginf=0.0), scores)

    monkeypatch.setattr(PlanGenerator, "step_scores", unmasked)
    plans = document_plans(planner, document, 40)
    assert any(list(p.units) != sorted(set(p.units)) for p in plans)


def test_plan_loss_is_the_probability_of_the_plan(planner):
    documents, plans = [a_document(6, 1), a_document(4, 2)], [(0, 2, 5), (1,)]
    exact = []
    for document, plan in zip(documents, plans):
        found = {p.units: p.log_prob for p in document_plans(planner, document, 100, 1, 20)}
        free = planner.step_scores(*planner.read_units(*ids_of([document])), torch.tensor([[]], dtype=torch.long))[0, 0].log_softmax(-1)[0]
        exact.append(-(found[plan] + math.log1p(-math.exp(float(free)))) / (len(plan) + 1))  # the stop is possible at once in training
    loss = plan_loss(planner, *ids_of(documents), torch.tensor([[0, 2, 5], [1, -1, -1]]))
    assert float(loss) == pytest.approx(sum(exact) / 2, abs=1e-4)


def ids_of(documents):
    rows = [torch.tensor(d.tagged(range(len(d.units)))) for d in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)


def test_padding_changes_no_plan(planner):
    one, other = a_document(3, 1), a_document(6, 2)
    h, known = planner.read_units(*ids_of([one, other]))
    alone, _ = planner.read_units(*ids_of([one]))
    assert torch.allclose(h[:1, :5], alone, atol=1e-5)
    assert known[0].tolist() == [True] * 5 + [False] * 3
    together = planner.step_scores(h, known, torch.tensor([[1], [1]]))
    assert torch.isinf(together[0, :, 4:]).all()
    assert torch.allclose(together[:1, :, :4], planner.step_scores(alone, known[:1, :5], torch.tensor([[1]])), atol=1e-5)


def test_a_generator_is_saved_without_pickle(planner, tmp_path):
    planner.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = load_plan_generator(tmp_path)
    document = a_document(5, 3)
    assert document_plans(loaded, document, 5) == document_plans(planner, document, 5)


# beams of texts


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (4, 2.0), (3, 0.0)])
def test_one_group_is_the_beam_search_of_transformers(kind, beams, penalty, request):
    model = request.getfixturevalue(kind)
    documents = [a_document(n, n).tagged() for n in (1, 3, 5)]
    ours = beam_texts(model, documents, beams, 10, ends=STOPS, penalty=penalty)
    for ids, texts in zip(documents, ours):
        how = {"num_beams": beams, "max_new_tokens": 10, "no_repeat_ngram_size": 3, "do_sample": False, "eos_token_id": STOPS}
        how |= {"early_stopping": True, "length_penalty": penalty} if beams > 1 else {}
        theirs = model.generate(torch.tensor([ids]), **how)[0, 1:].tolist()
        assert theirs == list(texts[0].tokens)
        assert len(texts) == beams
        assert texts[0].log_prob == pytest.approx(float(log_probs(model, ids, texts[0].tokens).sum()), abs=1e-3)


def log_probs(model, document, text):
    start = model.config.decoder_start_token_id
    logits = model(torch.tensor([document]), decoder_input_ids=torch.tensor([[start, *text[:-1]]])).logits[0]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]


def test_groups_differ_where_they_cost_each_other(t5):
    documents = [a_document(4, 1).tagged()]
    alike = beam_texts(t5, documents, 4, 8, ends=[2], groups=4)[0]
    apart = beam_texts(t5, documents, 4, 8, ends=[2], groups=4, diversity=50.0)[0]  # a stop costs nothing
    assert len({t.tokens for t in alike}) == 1
    assert len({t.tokens[0] for t in apart}) == 4
    with pytest.raises(ValueError, match="multiple of groups"):
        beam_texts(t5, documents, 4, 8, ends=[END], groups=3)


# scores


@given(seed=st.integers(0, 30), alpha=st.sampled_from([0.0, 0.6, 2.0]))
@settings(max_examples=10)
def test_f_is_the_log_probability_over_a_power_of_the_length(t5, seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    texts = [(*torch.randint(7, VOCAB, (n,), generator=generator).tolist(), END) for n in (1, 4, 7)]
    document = a_document(3, seed).tagged()
    scores = candidate_scores(t5, document, texts, alpha)
    exact = [float(log_probs(t5, document, text).sum()) / len(text) ** alpha for text in texts]
    assert scores.tolist() == pytest.approx(exact, abs=1e-4)
    assert candidate_scores(t5, document, texts[::-1], alpha).tolist() == pytest.approx(exact[::-1], abs=1e-4)


@given(values=st.lists(st.floats(-1, 1), min_size=2, max_size=6), margin=st.sampled_from([0.0, 0.001, 0.1]))
def test_ranking_loss_is_zero_just_when_all_gaps_exceed_the_margins(values, margin):
    n, exact = len(values), 0.0
    for g in range(1, n):
        exact += sum(max(0.0, values[i + g] - values[i] + g * margin) for i in range(n - g)) / (n - g)
    loss = float(ranking_loss(torch.tensor([values], dtype=torch.float64), margin))
    assert loss == pytest.approx(exact, abs=1e-9)
    leads = all(values[i] - values[j] >= (j - i) * margin for i in range(n) for j in range(i + 1, n))
    assert (loss <= 1e-12) == leads or exact < 1e-9


# the decoder


def run(model, document, new=8, **fields):
    ids = torch.tensor([document.tagged()])
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": STOPS}
    return model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=PGA(document, **fields), **how)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_answer_has_the_largest_f_of_one_summary_a_plan(kind, planner, request):
    model, other = request.getfixturevalue(kind), small_t5(7)
    document = a_document(5, 2)
    out = run(model, document, planner=planner, scorer=other, k=6, beams=3, trace=True, chunk=4)
    candidates = out.stats.search[0]["candidates"]
    assert [c.plan for c in candidates] == document_plans(planner, document, 6)
    assert len({c.text.tokens for c in candidates}) > 2  # a choice
    for c in candidates:
        how = {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "eos_token_id": STOPS}
        theirs = model.generate(torch.tensor([document.tagged(c.plan.units)]), max_new_tokens=8, do_sample=False, **how)
        assert theirs[0, 1:].tolist() == list(c.text.tokens)
        assert c.score == pytest.approx(float(log_probs(other, document.tagged(), c.text.tokens).sum()) / len(c.text.tokens) ** 2, abs=1e-4)
    best = max(candidates, key=lambda c: c.score)
    assert out.continuations[0].tolist() == list(best.text.tokens)
    assert out.trace[0].tokens == list(best.text.tokens)
    assert set(out.trace[0].roles) <= {"planned", "unplanned", "new"}
    assert out.stats.new_tokens == len(best.text.tokens)
    assert out.stats.target_forwards > 0


def test_the_order_of_plans_changes_nothing(t5):
    document, plans = a_document(5, 2), [(0, 1), (2,), (1, 3, 4), ()]
    first = run(t5, document, plans=plans)
    second = run(t5, document, plans=plans[::-1])
    assert first.sequences.equal(second.sequences)
    assert first.stats.search[0]["score"] == pytest.approx(second.stats.search[0]["score"], abs=1e-6)
    many = {c.plan.units: c.text for c in first.stats.search[0]["candidates"]}
    for plan in plans:
        assert run(t5, document, plans=[plan]).continuations[0].tolist() == list(many[plan].tokens)


def test_the_empty_plan_comes_last(t5, planner):
    document = a_document(5, 2)
    plans = [c.plan.units for c in run(t5, document, planner=planner, k=4, empty=True).stats.search[0]["candidates"]]
    assert plans == [*[p.units for p in document_plans(planner, document, 4)][:3], ()]


def test_rows_of_a_batch_are_alone(t5, planner):
    documents = [a_document(3, 1), a_document(6, 2)]
    rows = [torch.tensor(d.tagged()) for d in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    decoder = PGA(documents, planner=planner, k=3)
    out = t5.generate(ids, attention_mask=mask, custom_generate=decoder, max_new_tokens=6, do_sample=False, eos_token_id=STOPS)
    for document, row in zip(documents, out.continuations):
        assert row.tolist() == run(t5, document, 6, planner=planner, k=3).continuations[0].tolist()
    assert len(out.stats.search) == 2


def test_processors_criteria_length_and_stop_tokens(t5):
    document = a_document(4, 5)
    ids = torch.tensor([document.tagged()])
    call = {"custom_generate": PGA(document, plans=[(0, 1)], no_repeat=0, beams=1), "do_sample": False}
    biased = t5.generate(ids, **call, max_new_tokens=6, logits_processor=LogitsProcessorList([SumBias()]))
    plain = t5.generate(
        torch.tensor([document.tagged((0, 1))]), max_new_tokens=6, do_sample=False, logits_processor=LogitsProcessorList([SumBias()])
    )
    assert biased.sequences.equal(plain)
    free = t5.generate(ids, **call, max_new_tokens=6).continuations[0].tolist()
    cut = t5.generate(ids, **call, max_new_tokens=6, stopping_criteria=StoppingCriteriaList([StopsAt(length=3)]))
    assert cut.continuations[0].tolist() == free[:2]
    assert t5.generate(ids, **call, max_new_tokens=2).sequences.shape == (1, 3)
    ended = t5.generate(ids, **call, max_new_tokens=6, eos_token_id=[END, free[2]]).continuations[0].tolist()
    assert ended == free[: free.index(free[2]) + 1]


class Kept(TextStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming_reproducibility_and_an_unchanged_model(t5, planner):
    document, streamer = a_document(4, 5), Kept()
    before = copy.deepcopy(t5.state_dict())
    decoder = PGA(document, planner=planner, k=3)
    ids = torch.tensor([document.tagged()])
    outs = [decoder.generate(t5, ids, max_new_tokens=6, do_sample=False, streamer=streamer) for streamer in (streamer, None)]
    assert outs[0].sequences.equal(outs[1].sequences)
    assert streamer.ended
    assert streamer.tokens[-len(outs[0].continuations[0]) :] == outs[0].continuations[0].tolist()
    assert all(v.equal(before[k]) for k, v in t5.state_dict().items())
    assert not t5._forward_hooks
    half = copy.deepcopy(t5).bfloat16()
    assert run(half, document, planner=planner, k=2).stats.new_tokens > 0


BAD = [
    ({"k": 0}, {}, "must be at least 1"),
    ({"fewest": 3, "most": 2}, {}, "most at least fewest"),
    ({"plans": None}, {}, "give a planner"),
    ({"plans": [(0, 9)]}, {}, "unit 9 of the plan does not exist: the document has 4 units, 0 to 3"),
    ({"documents": None}, {}, "give documents=read_document"),
    ({"documents": [a_document(4, 5)] * 2}, {}, "2 documents for 1 rows"),
    ({"documents": a_document(5, 5)}, {}, "call with document.tagged\\(\\) as the prompt"),
    ({"documents": Document(((VOCAB,),) * 4, (5, 6))}, {}, "outside the model's vocabulary"),
    ({}, {"do_sample": True}, "do_sample=False"),
    ({"alpha": math.nan}, {}, "must be finite"),
    ({"length_penalty": math.inf}, {}, "must be finite"),
    ({"plans": []}, {}, "plans is empty"),
    ({"planner": "summariser-plan"}, {}, "planner must be a PlanGenerator, .* got str"),
    ({"scorer": ("model", "tokenizer")}, {}, "scorer must be an encoder-decoder model, .* got tuple"),
    ({}, {"logits_processor": LogitsProcessorList([lambda ids, scores: scores * 0 - math.inf])}, "leave no token"),
]


@pytest.mark.parametrize(("fields", "settings", "message"), BAD)
def test_bad_calls(t5, fields, settings, message):
    document = a_document(4, 5)
    fields, settings = {"documents": document, "plans": [(0,)]} | fields, {"max_new_tokens": 4, "do_sample": False} | settings
    with pytest.raises(ValueError, match=message):
        PGA(**fields).generate(t5, torch.tensor([document.tagged()]), **settings)


def test_models_and_planners_that_do_not_fit(t5, planner, llama):
    document = a_document(4, 5)
    with pytest.raises(ValueError, match="is a decoder-only model; this decoder needs an encoder-decoder one"):
        llama.generate(torch.tensor([document.tagged()]), custom_generate=PGA(document, planner=planner), max_new_tokens=4, do_sample=False)
    other = copy.deepcopy(planner)
    other.config.tags = [7, 8]
    with pytest.raises(ValueError, match=r"the planner's tags are \[7, 8\], the document's \[5, 6\]"):
        run(t5, document, planner=other)
    with pytest.raises(ValueError, match="1 to 128 units in tags, got 0"):
        planner.read_units(torch.tensor([[9, 9]]), torch.ones(1, 2))
    broken = copy.deepcopy(t5)
    broken.decoder.final_layer_norm.weight[:] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        run(broken, document, plans=[(0,)])
    with pytest.raises(ValueError, match="the scorer returned NaN or infinite scores"):
        run(t5, document, plans=[(0,)], scorer=broken)
    with pytest.raises(ValueError, match="scorer must be an encoder-decoder model, .* got Llama"):
        PGA(document, planner=planner, scorer=llama)
    short = copy.deepcopy(t5)
    short.config.max_position_embeddings = len(document.tagged()) + 1
    with pytest.raises(ValueError, match="tags included, the model reads"):
        run(short, document, plans=[(0,)])
