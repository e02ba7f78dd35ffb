"""The parser of stories: facts of sentences, windows that are put together again, answers that are none, a run that ends in a model."""

import json
from dataclasses import replace

import pytest

from decodelab.core.zoo import load, zoo_path
from decodelab.lab.tasks.canvas import scene
from decodelab.lab.tasks.stories import RuleParser, long_instruction
from decodelab.lab.tasks.story_facts import ModelParser, read_window, sentence_facts, to_analysis, window_answer, window_prompt
from decodelab.training.story_parser import StoryParserRecipe, StoryRows, story_tokenizer, story_windows, train_story_parser_model
from decodelab.vision.answers import SCHEMAS, check_json
from decodelab.vision.decompose import decompose, resolve, sentences
from decodelab.vision.decot import decot
from decodelab.vision.phrases import Profile, assertions

MINI = StoryParserRecipe(
    hidden_size=16, intermediate_size=16, layers=1, heads=2, vocab_size=300, batch_size=2, steps=2, save_every=1, eval_every=2
)


def split(text):
    return [text[a:b] for a, b in sentences(text)]


def test_facts_of_a_sentence_look_one_sentence_back():
    before = "The kittens are left of the tambours."
    assert sentence_facts("", before) == [["left of", "cat", "drum"]]
    assert sentence_facts(before, "They are scarlet.") == [["colour", ["cat", "drum"], "red"]]
    assert sentence_facts("", "They are scarlet.") == [] and sentence_facts(before, "Some would have called it luck.") == []
    assert sentence_facts("", 'A sign says "AB".') == [["text", "AB"]]
    assert sentence_facts("", "There are a few oaks to be seen.") == [["count", "tree", None]]


@pytest.mark.parametrize("seed", range(8))
def test_right_windows_put_together_are_the_whole_story(seed):
    "Cut into windows and put together, the labels say what the rule-based reader finds, and what the scene holds."

    class Told(ModelParser):
        def write(self, texts, windows):
            return [window_answer(texts[w[0] - 1] if w[0] else "", [texts[i] for i in w]) for w in windows]

    truth = scene(seed=seed)
    for ambiguous in (True, False):
        text, parser = long_instruction(truth, 0.5, ambiguous, seed), Told(None, None)
        ours, rules = (resolve(decompose(text, reader)) for reader in (parser, RuleParser()))
        assert assertions(ours) == assertions(rules) and ours.dropped == rules.dropped
        assert ambiguous or assertions(ours).keys() == assertions(truth).keys()
        assert parser.seen["windows"] == parser.seen["valid"] == -(-len(split(text)) // 4)


@pytest.mark.parametrize(
    "text",
    [
        *("", "no", "[]", "{}", '{"1":[]}', '{"1":[],"3":[]}', '{"1":[],"2":{}}', '{"1":[],"2":["a"]}', "[" * 100_000),
        *(
            json.dumps({"1": [], "2": [fact]})
            for fact in ([], ["colour"], ["colour", [], "red"], ["colour", "cat", 3], ["smell", "cat", "x"])
        ),
        *(
            json.dumps({"1": [], "2": [f]})
            for f in (["count", "cat", "2"], ["count", "cat", True], ["left of", ["a"], "b"], ["text", 3], ["light", "a", "b"])
        ),
    ],
)
def test_windows_that_are_none(text):
    assert read_window(text, 2) is None
    assert read_window('{"1":[["text","A"]],"2":[]}', 2) == {1: [["text", "A"]], 2: []}


def test_sentences_of_invalid_windows_come_back_to_the_gap_finder():
    class Half(ModelParser):
        def write(self, texts, windows):
            return [
                "{" if len(w) > 1 and w[0] == 0 else window_answer(texts[w[0] - 1] if w[0] else "", [texts[i] for i in w]) for w in windows
            ]

    text = "There is a cat to be seen. It is red. The cat is left of the drum. Hope. There is a drum to be seen. There is dim light."
    parser = Half(None, None)
    dec, rules = decompose(text, parser), decompose(text, RuleParser())
    assert parser.seen == {"windows": 2 + 4, "valid": 1 + 4}
    assert assertions(dec) == assertions(rules)
    assert not assertions(decompose(text, Half(None, None), rounds=0)).keys() >= assertions(rules).keys()


def test_analyses_are_the_schemas():
    for seed in range(5):
        for prompt, answer in story_windows(seed):
            facts = read_window(answer, len(json.loads(answer)))
            assert facts is not None and prompt.count("\n") == len(facts) + 1
            check_json(to_analysis(facts), SCHEMAS["scene analyst"])


def test_rows_learn_the_json_only():
    tokenizer = story_tokenizer(stories=40)
    rows = StoryRows(tokenizer, 40)
    for i in range(40):
        row, (prompt, answer) = rows[i], story_windows(i // 8)[i % 8]
        learnt = [label for label in row["labels"] if label >= 0]
        assert tokenizer.decode(learnt) == answer + "<eos>" and learnt == row["input_ids"][-len(learnt) :]
        assert tokenizer.decode(row["input_ids"]) == "<bos>" + prompt + answer + "<eos>"
    assert rows[3] == StoryRows(tokenizer, 999)[3] != StoryRows(tokenizer, 40, seed=1)[3]
    letters = tokenizer('"ABX"').input_ids
    assert [tokenizer.decode([i]) for i in letters] == ['"', "A", "B", "X", '"']


def test_a_run_ends_in_a_model_that_loads(tmp_path):
    figures = train_story_parser_model(MINI, tmp_path / "mini")
    assert figures["steps"] == 2 and set(figures["accuracy"]) == {"valid JSON", "right, of all windows", "right, of windows with a sign"}
    parser = ModelParser(*load(str(tmp_path / "mini"), dtype="float32"), max_new_tokens=5)
    text = "There is a cat to be seen. It is red. Hope."
    dec = decompose(text, parser)  # it writes no JSON yet
    assert dec.valid and not dec.units and parser.seen["valid"] == 0
    assert decot(text, parser, lambda p, s, i: p, Profile(5, lambda t: len(t.split()))).plan.mode == "truncated"
    assert "decodelab train story-parser --set" in (tmp_path / "mini" / "README.md").read_text()
    with pytest.raises(ValueError, match="multiple of heads"):
        replace(MINI, heads=3)


def test_the_shipped_parser_reads_new_stories():
    "Most windows of a new story are right, and all are JSON."
    model, tokenizer = load("story-parser", dtype="float32")
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    assert (zoo_path("story-parser") / "model.safetensors").stat().st_size < 3_000_000
    parser = ModelParser(model, tokenizer)
    truth = scene(seed=5)
    story = split(long_instruction(truth, seed=5))
    windows = [range(i, min(i + 4, len(story))) for i in range(0, len(story), 4)]
    labels = [window_answer(story[w[0] - 1] if w[0] else "", [story[i] for i in w]) for w in windows]
    written = parser.write(story, windows)
    assert sum(map(str.__eq__, written, labels)) > len(windows) / 2
    assert all(read_window(text, len(w)) is not None for text, w in zip(written, windows))
    alone = parser.write(story, windows[3:4])  # padding changes nothing
    assert alone == written[3:4]
    assert window_prompt("", ["A."]) == "0 \n1 A.\n"
