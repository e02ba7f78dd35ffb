"""The recipe of the model of list programs: rows, resumption, figures, the shipped model."""

import json
from dataclasses import replace

import pytest

from decodelab.core.zoo import load, zoo_path
from decodelab.lab.tasks.programs import ListProgramTask
from decodelab.training.language_model import train_tokenizer
from decodelab.training.programs import PROGRAMS, ProgramRows, program_accuracy, program_example, train_list_programs


@pytest.fixture(scope="module")
def words():
    return train_tokenizer([program_example(i, seed=-1).text for i in range(200)], vocab_size=380)


def test_rows_depend_on_seed_and_number_alone(words):
    some, more = ProgramRows(words, 120, 5), ProgramRows(words, 120, 500)
    assert some[3]["input_ids"].equal(more[3]["input_ids"])
    assert not some[3]["input_ids"].equal(ProgramRows(words, 120, 5, seed=1)[3]["input_ids"])
    row = some[3]
    learnt = row["labels"] >= 0
    assert words.decode(row["input_ids"][learnt]) == f" {program_example(3).answer}<eos>"
    assert row["labels"][learnt].equal(row["input_ids"][learnt])
    with pytest.raises(ValueError, match="raise block"):
        ProgramRows(words, 8, 5)[0]


def test_a_short_run_can_be_taken_up_and_says_that_it_ended_early(tmp_path, words):
    tiny = replace(
        PROGRAMS, hidden_size=32, intermediate_size=32, layers=1, heads=2, batch_size=2, steps=4, save_every=2, eval_every=4, warmup=1
    )
    first = train_list_programs(tiny, tmp_path, evaluate=0)
    assert first["steps"] == 4
    assert "remarks" not in first or not first["remarks"]
    again = train_list_programs(replace(tiny, steps=2), tmp_path, evaluate=0)  # nothing is trained
    assert again["steps"] == 4
    model, _ = load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == first["parameters"]


def test_the_shipped_model_writes_programs():
    folder = zoo_path("programs")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5e6
    figures = json.loads((folder / "training.json").read_text())
    model, tokenizer = load("programs")
    found = program_accuracy(model, tokenizer, n=4)
    assert set(found) == set(figures["accuracy"])
    example = ListProgramTask().examples(1)[0]
    ids = tokenizer(f"{example.prompt} {example.answer}").input_ids
    assert tokenizer.decode(ids) == example.text
