"""Experiments of Deco-G: formats, what is counted of an arm, the losses of hidden Markov models."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import EOS, VOCAB, character_tokenizer, small_model

from decodelab.experiments.structured import deco_g as experiment
from decodelab.structured.automata import lift
from decodelab.structured.deco_g import DecoG
from decodelab.structured.hmm import HMM
from decodelab.training.hmm import HMMRecipe, Texts, loss


@pytest.fixture(scope="module")
def models():
    return small_model(), character_tokenizer()


VALID = {
    "record": r' \{"steps": "[^"\\\n]*", "answer": (0|[1-9][0-9]{0,2})\}',
    "line": r"(?:(?! => )[^\n])* => (0|[1-9][0-9]{0,2})",
    "marked": r"(?:(?!\n#### )(?:.|\n))*\n#### (0|[1-9][0-9]{0,2})",
    "short": r"(?:(?!The answer is )(?:.|\n))*The answer is (0|[1-9][0-9]{0,2})\.",
}


@pytest.mark.parametrize("name", experiment.FORMATS)
def test_formats(name):
    pattern, found = re.compile(VALID[name]), experiment.automaton_of(name)
    pieces = [' {"steps": "', '", "answer": ', "}", " => ", "\n", "\n#### ", "The answer is ", ".", "7", "12", "007", "x"]
    texts = [a + b + c + d for a in pieces for b in pieces for c in [*pieces, ""] for d in ("}", ".", "", "1")]
    wanted = [bool(pattern.fullmatch(text)) for text in texts]
    assert any(wanted)
    assert not all(wanted)
    assert [found.matches(text) for text in texts] == wanted
    first = texts[wanted.index(True)]
    assert experiment.answer_in(first, experiment.FORMATS[name][0]) == pattern.fullmatch(first).group(1)


def test_a_record_of_a_chat_begins_with_its_brace():
    chat = experiment.automaton_of("record", "")
    assert chat.matches('{"steps": "", "answer": 7}')
    assert not chat.matches(' {"steps": "", "answer": 7}')


def test_questions():
    plain = ["Start with 1. What is the result?\nAnswer:"]
    tokenizer = SimpleNamespace(apply_chat_template=lambda turn, tokenize, add_generation_prompt: f"<{turn[0]['content']}>")
    assert experiment.asked_as(plain, "", tokenizer, chat=False) == plain
    assert experiment.asked_as(plain, "Short.", tokenizer, chat=False) == ["Start with 1. What is the result?\nShort.\nAnswer:"]
    assert experiment.asked_as(plain, "", tokenizer, chat=True) == ["<Start with 1. What is the result?>"]
    assert experiment.asked_as(plain, "Short.", tokenizer, chat=True) == ["<Start with 1. What is the result?\nShort.>"]


class Says:
    "Writes given texts."

    automaton = None

    def __init__(self, rows):
        self.rows = rows

    def generate(self, model, input_ids, **settings):
        return SimpleNamespace(continuations=[torch.tensor(self.rows.pop(0)) for _ in input_ids])


@torch.no_grad()
def test_what_is_counted(models):
    _, tokenizer = models
    texts = [" => 7", "7", " => 8", "8 => 7"]
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, *([EOS] * (i % 2))] for i, text in enumerate(texts)]
    line, prompts = lift(experiment.automaton_of("line"), tokenizer), ["ab", "abc", "a", "b"]
    found = experiment.arm(Says(list(rows)), models, [7] * 4, prompts, prompts, line, 24, experiment.FORMATS["line"][0])
    assert found["valid"].tolist() == [1, 0, 1, 1]
    assert found["accuracy"].tolist() == [1, 0, 0, 1]  # what is not valid is not right
    assert found["last number"].tolist() == [1, 1, 0, 1]
    assert found["tokens"].tolist() == [len(row) for row in rows]
    assert found["first"] == texts[0]
    free = experiment.arm(Says(list(rows)), models, [7] * 4, prompts, prompts, None, 24, None)
    assert free["valid"].all()
    assert free["accuracy"].tolist() == free["last number"].tolist() == [1, 1, 0, 1]
    for prompt, row, value in zip(prompts, rows, found["log_probability"]):
        ids, total = tokenizer(prompt, add_special_tokens=False).input_ids, 0.0
        for v in row:
            total += float(models[0](torch.tensor([ids])).logits[0, -1].log_softmax(-1)[v])
            ids = [*ids, v]
        assert value == pytest.approx(total, rel=1e-4)


def test_arms_of_a_format_are_valid(models):
    tokenizer = models[1]
    automaton, (pattern, horizon, _) = lift(experiment.automaton_of("record"), tokenizer), experiment.FORMATS["record"]
    for hmm in (None, HMM.random(4, VOCAB, sharpness=2.0)):
        found = experiment.arm(DecoG(automaton, hmm), models, [7, 8], ["ab", "c"], ["ab", "c"], automaton, horizon, pattern)
        assert found["valid"].tolist() == [1, 1]
        assert found["table seconds"] > 0
        assert found["tokens"].max() <= horizon


def values(*accuracy):
    zeros = np.zeros(len(accuracy))
    return dict.fromkeys(experiment.KEYS, zeros) | {"accuracy": np.array(accuracy, dtype=float), "table seconds": 1.0}


def test_differences_are_paired():
    found = {"hard mask": values(0, 1, 0, 1), "Deco-G": values(1, 1, 0, 1)}
    table = experiment.table_of(found)
    assert table["Deco-G"]["accuracy"][0] == 0.75
    assert table["Deco-G"]["accuracy - hard mask"][0] == 0.25
    assert table["hard mask"]["accuracy - hard mask"] == [0, 0, 0]
    assert "accuracy - prompt" not in table["Deco-G"]
    joined = experiment.pooled([found, {"hard mask": values(0, 0), "Deco-G": values(1, 1)}])
    assert joined["Deco-G"]["accuracy"].tolist() == [1, 1, 0, 1, 1, 1]
    assert joined["Deco-G"]["table seconds"] == 2.0


def test_a_sweep_compares_with_its_first(monkeypatch):
    hmms = {str(h): HMM.random(h, 4) for h in (1, 3)}
    found = experiment.sweep(hmms, lambda form, hmm: values(*([float(hmm.states == 3)] * 4)), ("marked",))
    assert found["3"]["accuracy - 1"] == [1, 1, 1]
    assert found["1"]["accuracy - 1"] == [0, 0, 0]
    assert [row["states"] for row in found.values()] == [1, 3]


def test_losses_of_pairs_are_conditional():
    answers, prompts = [[1, 2], [3]], [[0], [2, 2]]
    hmm = HMM.random(3, 4, seed=1, sharpness=2.0, dtype=torch.float64)
    pairs = HMM(hmm.initial, hmm.transition, hmm.emission, reads_prompt=True)
    whole = [p + a for p, a in zip(prompts, answers)]
    found = experiment.losses({"answers": hmm, "pairs": pairs}, Texts.of(answers), Texts.of(whole), [1, 2])

    def log_p(row):
        return float(hmm.log_likelihood(torch.tensor([row]))[0])

    alone = [-log_p(a) / len(a) for a in answers]
    given = [-(log_p(p + a) - log_p(p)) / len(a) for p, a in zip(prompts, answers)]
    assert found["answers"]["loss"][0] == pytest.approx(np.mean(alone))
    assert found["pairs"]["loss"][0] == pytest.approx(np.mean(given))
    assert found["pairs"]["more than answers"][0] == pytest.approx(np.mean(given) - np.mean(alone))
    assert abs(np.mean(given) - np.mean(alone)) > 1e-3


PLAN = HMMRecipe(prompts="none", states=4, texts=24, held_out=6, new_tokens=8, steps=4, chunks=1, batch_size=16)


def test_texts_are_used_again(models, tmp_path):
    model = small_model()
    tokenizer = models[1]
    first, _ = experiment.distilled(PLAN, (model, tokenizer), tmp_path / "a")
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    plan = HMMRecipe(**{**vars(PLAN), "states": 6, "clusters": False})  # no forward of the language model at all
    again, _ = experiment.distilled(plan, (model, tokenizer), tmp_path / "b", tmp_path / "a")
    hook.remove()
    assert not calls
    assert [first.states, again.states] == [4, 6]


def test_masked_texts_are_learnt(models):
    tokenizer = models[1]
    line = lift(experiment.automaton_of("line"), tokenizer)
    answers = Texts.of([[5, 6, 7, EOS]] * 10)
    before = HMM.random(4, VOCAB, seed=2)
    after = experiment.with_masked_texts(before, answers, PLAN, line, models, ["ab"] * 20, 12)
    written = Texts.of([tokenizer(" => 7", add_special_tokens=False).input_ids])
    assert loss(after, written) < loss(before, written) - 0.5
    assert loss(after, answers) < loss(before, answers) - 0.5
