"""Experiments of DeAL: the minimal version on a table, re-ranked samples, the classifiers."""

import torch

from decodelab.experiments.search.deal import NaiveBayes, interval, table_best_of, table_deal, toy_instance, violent
from decodelab.lab.table_model import table_model
from decodelab.search.deal import DeAL
from decodelab.search.scorers import reads


def test_the_version_on_a_table_is_the_decoder():
    for seed, beams in ((0, 1), (1, 2), (2, 3)):
        probs, required, start = instance = toy_instance(seed)
        h = reads("ids")(lambda texts, required=required: [len(set(ids) & required) / len(required) for ids in texts])
        ids = torch.tensor([[start]])
        call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        out = DeAL(h, None, 4, 3, 10.0, beams).generate(table_model(torch.tensor(probs, dtype=torch.float32)), ids, **call)
        assert table_deal(instance, 4, 3, 10.0, beams, 8)[0] == out.continuations[0].tolist()


def test_more_samples_never_cover_less():
    instance = toy_instance(3)
    for n in (1, 8, 64):
        text, log_p = table_best_of(instance, n, seed=0)
        assert len(text) == 16
        assert log_p < 0
    covered = [len(set(table_best_of(instance, n, seed=0)[0]) & instance[1]) for n in (1, 256)]
    assert covered[0] <= covered[1] == 3


def test_the_classifier_learns_the_words_that_differ():
    reward = NaiveBayes(["gentle rain falls softly"] * 20, ["cruel rain falls hard"] * 20)
    good, bad, neutral, empty = reward(["Gentle and softly", "cruel, hard", "unknown words", ""])
    assert good > 0 > bad
    assert neutral == empty == 0.0


def test_words_of_violence_count_inflected():
    assert violent("He was wounded in the fights.")
    assert not violent("a quiet day")
    assert interval([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
