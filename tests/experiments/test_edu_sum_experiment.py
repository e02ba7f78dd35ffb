"""Experiments of EDU plans: four ways to candidates, what is said of them, and means that can be checked by hand."""

import numpy as np
import pytest
from transformers import BartForConditionalGeneration

from decodelab.experiments.structured import edu_sum as experiment
from decodelab.training.summariser import NewsRows, SummariserRecipe, mean_rouge, news_tokenizer


@pytest.fixture(scope="module")
def models():
    return experiment.load_models()


@pytest.fixture(scope="module")
def rows(models):
    return [NewsRows(models[1], 2, seed=9)[i] for i in range(2)]


@pytest.mark.parametrize("method", experiment.METHODS)
def test_candidates_of_each_method(method, models, rows):
    found = experiment.candidates(method, models[0], rows, seed=3)
    assert [len(texts) for texts in found] == [experiment.K] * 2
    for texts, row in zip(found, rows):
        judged = experiment.judged(texts, row, *models)
        assert judged["rouge"] == [mean_rouge(models[1].decode(t, skip_special_tokens=True), row.summary) for t in texts]
        assert experiment.top(judged, by="rouge") == max(judged["rouge"])
        assert experiment.top(judged, 1) == judged["rouge"][0]
        assert experiment.top(judged) == judged["rouge"][judged["f"].index(max(judged["f"]))]
    assert found == experiment.candidates(method, models[0], rows, seed=3)


def test_the_models_of_the_zoo_can_summarise(models, rows):
    "A copy with random weights follows no plan."
    trained = experiment.obedience(models[0]["guided"], rows)
    torn = BartForConditionalGeneration(SummariserRecipe()._config(len(news_tokenizer()))).eval()
    assert min(trained) > 1.0
    assert max(map(abs, experiment.obedience(torn, rows))) < 1.0
    followed = experiment.adherence(models[0]["guided"], rows, [[row.oracle] for row in rows], models[1])
    assert np.mean([e["F1"] for e in followed]) > 0.7


def test_the_summary_by_hand():
    def document(rouge, f, plans):
        return {"rouge": rouge, "rouge1": rouge, "f": f, "plans": plans, "true": rouge}

    low, high = [0.5] * 8, [0.9, *[0.8] * 6, 0.7]
    found = {m: [document(low, list(range(8)), [(0,)] * 8)] * 2 for m in experiment.METHODS}
    found["PGA"] = [document(high, [1.0, *[0.0] * 7], [(i,) for i in range(8)])] * 2
    told = experiment.summary(found)
    assert told["unique"]["PGA"][0] == 8
    assert told["differences"]["unique: PGA - diverse"][0] == pytest.approx(7)
    assert told["differences"]["re-ranked: PGA - best baseline"] == pytest.approx([0.4] * 3)
    assert told["differences"]["fall: baseline - PGA"][0] == pytest.approx(-0.2)
    assert told["differences"]["last of PGA - first of the best baseline"][0] == pytest.approx(0.2)
    assert told["by index"]["PGA"] == pytest.approx(high)


def test_true_facts():
    units = ["Ada sold the lamp today,", "while Ada hid the hat again.", "Ben drew the boat gladly."]
    assert experiment.true_facts("Ada sold the lantern and hid the cap . Ben drew the ship .", units) == 1.0
    assert experiment.true_facts("Ada sold the cap . Ben drew the ship .", units) == 0.5
    assert experiment.true_facts("", units) == 0.0


def test_too_few_documents():
    with pytest.raises(ValueError, match="at least 2 documents"):
        experiment.experiment(documents=1)
