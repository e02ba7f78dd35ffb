"""The reader of passages: gaps that can be filled, words that are known, a run that ends in a model that loads."""

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import T5ForConditionalGeneration

from decodelab.core.zoo import load, zoo_path
from decodelab.lab.tasks.passages import WORDS, PassageTask, draw_facts
from decodelab.training.reader import (
    GapRows,
    ReaderRecipe,
    corrupted,
    gap_figures,
    gap_pair,
    padded,
    question_pair,
    random_spans,
    told_twice,
    train_reader_recipe,
    word_tokenizer,
)
from decodelab.training.recipes import load_causal

MINI = ReaderRecipe(hidden_size=16, intermediate_size=16, layers=1, heads=2, facts=1, batch_size=2, steps=2, save_every=1, eval_every=2)


def filled(text, label):
    "A text with its gaps, and what stands in them: the text itself."
    words, parts = text.split(), label.split()
    cuts = [i for i, word in enumerate(parts) if word.startswith("<extra_id_")]
    gaps = {parts[a]: parts[a + 1 : b] for a, b in zip(cuts, cuts[1:])}
    return [w for word in words for w in gaps.get(word, [word])]


def test_what_is_cut_out_can_be_put_back():
    for seed in range(60):
        rng = random.Random(seed)
        words, values = told_twice(rng, rng.randint(1, 5))
        spans = random_spans(rng, len(words))
        text, label = corrupted(words, spans)
        assert filled(text, label) == words
        assert sum(n for _, n in spans) == max(1, round(0.15 * len(words)))
        assert all(a + n < b for (a, n), (b, _) in zip(spans, spans[1:]))
        told = [" ".join(words[a : a + n]) for a, n in values]
        assert all(told.count(value) == 2 for value in told)


def test_the_gap_of_a_recurring_span_can_be_copied():
    copied = dict.fromkeys(("recurring", "random"), 0)
    for seed in range(60):
        for kind in copied:
            text, label = gap_pair(kind, random.Random(seed))
            assert text.count("<extra_id_") == 1
            copied[kind] += " " + " ".join(label.split()[1:-1]) + " ." in text
    assert copied["recurring"] == 60
    assert copied["random"] < 30


@pytest.mark.parametrize("whole", [0.0, 0.5, 1.0])
def test_a_share_of_the_passages_has_one_gap_at_a_value(whole):
    rows, tokenizer, copied = GapRows(word_tokenizer(), 200, whole=whole, seed=4), word_tokenizer(), 0
    for row in (rows[i] for i in range(len(rows))):
        text, label = (tokenizer.decode(row[name]) for name in ("input_ids", "labels"))
        copied += label.count("<extra_id_") == 2 and f" {label.split('>', 1)[1].rsplit('<', 1)[0].strip()} ." in text
    by_chance = 0.15
    assert whole - 0.1 <= copied / 200 <= whole + (1 - whole) * by_chance + 0.1


def test_every_word_is_a_token():
    tokenizer = word_tokenizer()
    for seed in range(20):
        for kind in ("corruption", "recurring", "random"):
            text, label = gap_pair(kind, random.Random(seed))
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == f"{text} </s>"
            assert tokenizer.decode(tokenizer(label, add_special_tokens=False).input_ids) == label
    example = PassageTask().examples(1, seed=3)[0]
    assert question_pair(example) == (example.prompt, f"<extra_id_0> {example.answer} <extra_id_1>")
    assert len(set(WORDS)) == len(WORDS)


def test_the_answer_stands_in_the_passage_once():
    for example in PassageTask(facts=6).examples(40):
        assert example.prompt.startswith(example.meta["passage"])
        assert f" {example.answer} ." in example.meta["passage"]
        assert example.meta["passage"].split().count(example.meta["asked"]) == 1
        assert PassageTask().score(example, f" {example.answer}\n") == 1.0
        assert PassageTask().score(example, example.answer + " more") == 0.0
    assert len({f.value for f in draw_facts(random.Random(0), 30)}) == 30


def test_rows_depend_on_seed_and_number_alone():
    rows = GapRows(word_tokenizer(), 5, seed=1)
    assert rows[3] == GapRows(word_tokenizer(), 9, seed=1)[3]
    assert rows[3] != GapRows(word_tokenizer(), 9, seed=2)[3]
    batch = padded([rows[0], {"input_ids": [7, 1], "labels": [3, 8, 4]}])
    assert batch["attention_mask"][1].sum() == 2
    assert batch["labels"][1].tolist()[:3] == [3, 8, 4]
    assert set(batch["labels"][1].tolist()[3:]) <= {-100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": 30}, "must be a multiple of heads"), ({"facts": 0}, "must be positive"), ({"steps": 0}, "positive")],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ReaderRecipe(), **changes)


def test_a_run_ends_in_a_model_that_loads(tmp_path):
    figures = train_reader_recipe(MINI, tmp_path)
    model, tokenizer = load(tmp_path)
    assert isinstance(model, T5ForConditionalGeneration)
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert tokenizer("what is the").input_ids == word_tokenizer()("what is the").input_ids
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 2
    assert "decodelab train reader" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="is an encoder-decoder model, no causal language model: choose one, such as tales or tasks"):
        load_causal(str(tmp_path))
    assert torch.isfinite(model(**padded([GapRows(tokenizer, 1)[0]])).loss)


def test_the_reader_of_the_zoo_finds_values_again():
    try:
        folder = zoo_path("reader")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the zoo model reader is not here: {error}")
    model, tokenizer = load("reader", dtype="float32")
    shipped = json.loads((folder / "training.json").read_text())
    found = gap_figures(model, tokenizer, 3)
    for name in ("held_out_nats_per_token", "held_out_top1"):  # its weights are rounded to bfloat16
        assert found[name] == pytest.approx(shipped[name], abs=0.02)
    assert found["held_out_tokens"] == shipped["held_out_tokens"]
    assert sum(p.numel() for p in model.parameters()) == shipped["parameters"]
