"""The summariser that follows plans: rows that depend on their number alone, losses by hand, five stages that run one behind the other."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import BartForConditionalGeneration

from decodelab.core.zoo import load, load_part
from decodelab.lab.tasks.news import CUES, THINGS, WORDS, Event, NewsTask, summary
from decodelab.structured.plan_generator import PlanConfig, PlanGenerator
from decodelab.training.summariser import (
    STAGES,
    NewsRows,
    SummariserRecipe,
    guided_loss,
    mean_rouge,
    news_batch,
    news_tokenizer,
    ranked_rows,
    token_loss,
    train_summariser_recipe,
)

MINI = SummariserRecipe(
    hidden_size=16, intermediate_size=16, layers=1, heads=2, batch_size=2, steps=2, save_every=1, eval_every=2, documents=2, candidates=2
)


def test_the_reference_tells_facts_that_have_a_cue():
    for example in NewsTask().examples(60, seed=1):
        events, plan = example.meta["events"], example.meta["plan"]
        assert 6 <= len(events) <= 8
        assert 4 <= sum(event.manner in CUES for event in events) <= 5
        assert len(plan) == 2
        assert all(events[i].manner in CUES for i in plan)
        assert example.answer == summary([events[i] for i in plan])
        assert [event.told() in example.prompt for event in events] == [True] * len(events)
    with pytest.raises(ValueError, match="told 1 to 4, got 6, 8, 5"):
        NewsTask(told=5)
    assert summary([Event("Ada", "sold", "lamp", "today")] * 2) == "Ada sold the lantern and sold the lantern ."
    assert not set(THINGS) & set(THINGS.values())


def test_every_word_is_a_token_and_rows_depend_on_seed_and_number():
    tokenizer = news_tokenizer()
    rows = NewsRows(tokenizer, 30, seed=1)
    for row in rows:
        assert tokenizer.unk_token_id not in (*row.document.tagged(range(len(row.units))), *row.labels)
        assert tokenizer.decode(row.labels) == f"{row.summary} </s>"
        assert not set(row.oracle) & set(row.other)
        assert len(row.other) == min(len(row.oracle), len(row.units) - len(row.oracle))
    assert rows[3] == NewsRows(tokenizer, 9, seed=1)[3] != NewsRows(tokenizer, 9, seed=2)[3]
    sizes = [len(NewsRows(tokenizer, 10**6, grow=100)[i].units) for i in (*range(99), 10_000, 10_001)]
    assert set(sizes[:-2]) == {2, 3}
    assert min(sizes[-2:]) >= 6
    assert len(set(WORDS)) == len(WORDS)


def test_a_batch_holds_three_ways_to_tag_a_document():
    rows = [NewsRows(news_tokenizer(), 4, seed=3)[i] for i in range(4)]
    batch = news_batch(rows)
    oracle, other, none = batch["read"].chunk(3)
    for i, row in enumerate(rows):
        for ids, plan in ((oracle, row.oracle), (other, row.other), (none, ())):
            assert [t for t in ids[i].tolist() if t] == row.document.tagged(plan)
        assert [t for t in batch["labels"][i].tolist() if t >= 0] == list(row.labels)
        assert [p for p in batch["plans"][i].tolist() if p >= 0] == list(row.oracle)


def test_losses_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    labels = torch.tensor([[0, 2]])
    plain = -(math.log(0.7) + math.log(0.8)) / 2
    unlike = -(math.log(0.3) + math.log(0.2)) / 2
    assert float(token_loss(p.log()[None], labels, 0.0)) == pytest.approx(plain, abs=1e-6)
    assert float(token_loss(p.log()[None], labels, 0.0, unlike=True)) == pytest.approx(unlike, abs=1e-6)
    smooth = [sum(-math.log(1 - x) for x in row) / 3 for row in p.tolist()]
    assert float(token_loss(p.log()[None], labels, 0.1, unlike=True)) == pytest.approx(0.9 * unlike + 0.1 * sum(smooth) / 2, abs=1e-5)
    cut = torch.tensor([[0, -100]])
    assert float(token_loss(p.log()[None], cut, 0.0)) == pytest.approx(-math.log(0.7), abs=1e-6)
    assert cut.tolist() == [[0, -100]]  # labels stay as they are
    certain = torch.tensor([[[100.0, 0.0]]])
    assert math.isfinite(float(token_loss(certain, torch.tensor([[0]]), 0.0, unlike=True)))  # 1 - p = 0


def test_the_loss_is_the_weighted_sum_of_its_parts():
    tokenizer = news_tokenizer()
    model = MINI.model(tokenizer).eval()
    batch = news_batch([NewsRows(tokenizer, 2)[i] for i in range(2)])
    with torch.no_grad():
        parts = [float(guided_loss(model, batch, *weights)) for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
        assert float(guided_loss(model, batch, 2.0, 3.0, 10.0)) == pytest.approx(2 * parts[0] + 3 * parts[1] + 10 * parts[2], rel=1e-4)
        alone = [float(guided_loss(model, news_batch([NewsRows(tokenizer, 2)[i]]), 0, 0, 1)) for i in range(2)]
    sizes = [len(NewsRows(tokenizer, 2)[i].labels) for i in range(2)]
    assert parts[2] == pytest.approx(sum(a * n for a, n in zip(alone, sizes)) / sum(sizes), rel=1e-4)  # padding changes nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "other"}, "stage must be one of base, plain, guided, plan, rank"),
        ({"stage": "plain"}, "leave it out for base, and give it for the others"),
        ({"start": "x"}, "leave it out for base, and give it for the others"),
        ({"hidden_size": 30, "heads": 4}, "must be a multiple of heads"),
        ({"grow": -1}, "grow must not be negative"),
        ({"steps": 0}, "positive"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MINI, **changes)


def test_the_stages_run_one_behind_the_other(tmp_path):
    begins = {"plain": "base", "guided": "plain", "plan": "guided", "rank": "plain"}
    for stage in STAGES:
        start = str(tmp_path / begins[stage]) if stage in begins else ""
        figures = train_summariser_recipe(replace(MINI, name=f"mini-{stage}", stage=stage, start=start), tmp_path / stage)
        assert math.isfinite(figures["held_out_loss"])
        assert json.loads((tmp_path / stage / "training.json").read_text())["steps"] == 2
        assert f"--set stage={stage}" in (tmp_path / stage / "README.md").read_text() or stage == "base"
        if stage == "plan":
            assert isinstance(load_part(tmp_path / stage, PlanGenerator, PlanConfig), PlanGenerator)
            assert str(tmp_path) not in (tmp_path / stage / "config.json").read_text()
        else:
            assert isinstance(load(tmp_path / stage)[0], BartForConditionalGeneration)


def test_candidates_are_sorted_by_rouge():
    tokenizer = news_tokenizer()
    rows = ranked_rows(MINI.model(tokenizer), tokenizer, replace(MINI, candidates=4), 2, seed=0)
    summaries = [NewsRows(tokenizer, 2, seed=1000)[i].summary for i in range(2)]
    for row, reference in zip(rows, summaries):
        scores = [mean_rouge(tokenizer.decode(text, skip_special_tokens=True), reference) for text in row["candidates"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
    assert mean_rouge("Ada sold the lantern", "Ada sold the lantern .") == 1.0
