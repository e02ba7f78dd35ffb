"""Experiments of exact extract: the three decoders, what is measured, questions of a data set, costs by hand."""

from types import SimpleNamespace

import pytest
import torch
from toys import character_tokenizer

from decodelab.experiments.structured import exact_extract as experiment
from decodelab.lab.tasks.passages import PassageTask
from decodelab.structured.exact_extract import passage_ids, span_scores
from decodelab.training.reader import ReaderRecipe, word_tokenizer

BEGIN, STOP = 3, 4  # <extra_id_0>, <extra_id_1>


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_reader(seed=0):
    tokenizer = word_tokenizer()
    model = ReaderRecipe(hidden_size=16, intermediate_size=16, layers=1, heads=2, seed=seed).model(tokenizer).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)
    return experiment.Reader(model, tokenizer, [STOP], (BEGIN,))


def step_by_step(reader, prompt, tokens, longest):
    "Greedy among the tokens that go on with a span, with a forward pass of the whole text at each step."
    inputs, written = reader.tokenizer(prompt, return_tensors="pt").input_ids, []
    while True:
        log_p = reader.model(inputs, decoder_input_ids=torch.tensor([[0, BEGIN, *written]])).logits[0, -1]
        k = len(written)
        follow = {tokens[i + k] for i in range(len(tokens) - k) if tokens[i : i + k] == written} if k < longest else set()
        token = max(follow | ({STOP} if k else set()), key=lambda t: float(log_p[t]))
        if token == STOP:
            return tuple(written)
        written.append(token)


def test_greedy_in_the_passage_is_greedy_step_by_step():
    lengths = set()
    for seed in range(12):
        reader, example = random_reader(seed), PassageTask(2).examples(1, seed)[0]
        tokens = passage_ids(reader.tokenizer, example.prompt, example.meta["passage"])
        for longest in (2, 8):
            inputs = {"input_ids": reader.tokenizer(example.prompt, return_tensors="pt").input_ids}
            kept = experiment.greedy_in_passage(span_scores(reader.model, inputs, tokens, STOP, begin=[BEGIN], longest=longest))
            assert kept == step_by_step(reader, example.prompt, tokens, longest)
            lengths.add(len(kept))
    assert len(lengths) > 1


def test_a_span_ends_with_a_word():
    assert experiment.is_span("red stone", "lamp is red stone .")
    assert not experiment.is_span("one", "lamp is red stone .")
    assert not experiment.is_span("", "lamp")
    assert experiment.is_span("(1998", "in (1998).")


def test_what_is_measured(monkeypatch):
    reader, questions = random_reader(1), experiment.asked(3, 5, facts=2)
    gold = [answer for _, _, answer in questions]
    monkeypatch.setattr(type(reader), "greedy", lambda self, prompt: ([BEGIN, *self.tokenizer(gold[0]).input_ids[:-1], STOP], -99.0))
    found = experiment.measured(reader, questions)
    assert found["greedy"][0] == 1.0
    assert found["extractive"] == [1.0, *(float(experiment.is_span(gold[0], p)) for _, p, _ in questions[1:])]
    assert all(0 < m <= 1 for m in found["mass"])
    assert found["greedy above exact"] == [0.0] * 3
    for (prompt, passage, answer), f1, optimal in zip(questions, found["exact"], found["optimal"]):
        inputs = {"input_ids": reader.tokenizer(prompt, return_tensors="pt").input_ids}
        tokens = passage_ids(reader.tokenizer, prompt, passage)
        best = reader.tokenizer.decode(span_scores(reader.model, inputs, tokens, STOP, begin=[BEGIN], longest=8).best()[0].tokens)
        assert f1 == experiment.token_f1(best, answer)
        assert optimal == (best == gold[0])
    monkeypatch.setattr(type(reader), "greedy", lambda self, prompt: ([BEGIN, *self.tokenizer(gold[0]).input_ids[:-1], STOP], 0.0))
    assert experiment.measured(reader, questions[:1])["greedy above exact"] == [1.0]  # such a greedy answer would have to be noticed


def test_greedy_answers_and_their_log_probability():
    reader, (prompt, _, _) = random_reader(2), experiment.asked(1, 0)[0]
    new, log_p = reader.greedy(prompt)
    ids = reader.tokenizer(prompt, return_tensors="pt").input_ids
    logits = reader.model(ids, decoder_input_ids=torch.tensor([[0, *new]])).logits[0, :-1].double().log_softmax(-1)
    assert logits.argmax(-1).tolist() == new
    assert log_p == pytest.approx(float(logits.max(-1).values.sum()), abs=1e-4)
    assert new[-1] == STOP or len(new) == 10
    assert reader.text([BEGIN, *reader.tokenizer("red stone").input_ids[:-1], STOP]) == "red stone"


def test_intervals_over_seeds_and_questions():
    assert experiment.over_seeds([[1.0, 1.0], [1.0, 1.0]]) == [1.0, 1.0, 1.0]
    mean, low, high = experiment.over_seeds([[0.0] * 50, [1.0] * 50])  # seeds disagree, questions do not
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    runs = [{"exact": [1.0, 0.5], "greedy": [0.5, 0.5], "greedy in the passage": [1.0, 1.0]}]
    found = experiment.summary(runs)
    assert found["exact - greedy"][0] == 0.25
    assert found["exact - greedy in the passage"][0] == -0.25


def test_pairs_to_learn_from():
    for kind in ("questions", "recurring", "random"):
        pairs = experiment.pairs_for(kind, 4, 1)
        assert pairs == experiment.pairs_for(kind, 6, 1)[:4]
        assert pairs != experiment.pairs_for(kind, 4, 2)
        assert all(text.count("<extra_id_0>") == 1 and label.startswith("<extra_id_0> ") for text, label in pairs)
    assert not {p for p, _ in experiment.pairs_for("questions", 50, 0)} & {p for p, _, _ in experiment.asked(50, 77)}


def test_costs_by_hand():
    reader = random_reader(3)
    (prompt, passage, _), n = experiment.asked(1, 78, 1)[0], 0
    n = len(passage.split())
    found = experiment.cost_of(reader, (1,), 1)["1"]
    assert found["tokens"] == n == len(passage_ids(reader.tokenizer, prompt, passage))
    assert found["each span alone"] == sum(2 + j - i for i in range(n) for j in range(i + 1, n + 1))
    assert found["shared suffixes"] == sum(range(1, n + 1))
    assert 0 < found["branch and bound"] <= found["shared suffixes"]


ROWS = [
    {"context": f"{name} lives in {town}. ", "question": "Who?", "answers": [name], "seeds": [seed]}
    for name, town, seed in (
        ("Anna", "Rome", 42),
        ("Bo", "Bonn", 46),
        ("Bo", "Bonn", 46),
        ("Cy", "Oslo", 46),
        ("Di", "a very long name", 46),
    )
]


def test_questions_of_a_data_set(monkeypatch):
    monkeypatch.setattr(experiment, "load_data", lambda name: ROWS)
    assert [r["answers"][0] for r in experiment.rows_of("squad_fewshot", 9, 46, characters=20)] == ["Bo", "Cy"]
    assert [r["answers"][0] for r in experiment.rows_of("xquad", 2)] == ["Anna", "Bo"]
    assert experiment.shown(ROWS[0], answer=True) == "Text: Anna lives in Rome.\nQuestion: Who?\nAnswer: Anna\n\n"


def test_answers_of_a_language_model(llama):
    tokenizer = character_tokenizer()
    reader = experiment.Reader(llama, tokenizer, [tokenizer.encode("?")[0]], longest=5)
    rows = [{"context": "a bc. d", "question": "x", "answers": ["bc"]}, {"context": "efgh", "question": "y", "answers": ["e"]}]
    found = experiment.answers_of(reader, rows, "example ", whole=1)
    assert (found["questions"], found["scored whole"], found["the same answer"]) == (2, 1, 1)
    assert found["all spans, branch and bound"][0] == sum(min(5, 7 - i) for i in range(7))
    assert 0 < found["all spans, branch and bound"][1] <= found["all spans, branch and bound"][0]
    assert found["tokens"][0] == (7 + 4) / 2
    assert found["exact - greedy"][0] == pytest.approx(found["exact"][0] - found["greedy"][0])
    assert 0 < found["mass"][0] <= 1


def test_without_the_data_the_run_says_what_to_do(llama, monkeypatch):
    monkeypatch.setenv("DECODELAB_DATA", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lab = SimpleNamespace(target=lambda: (llama, character_tokenizer()), names={"target": "toy"})
    with pytest.raises(FileNotFoundError, match=r"data set 'squad_fewshot' not found: put .* below a folder named by DECODELAB_DATA"):
        experiment.real_readers(lab, 2)
