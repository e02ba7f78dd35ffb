"""ActQKV's measurements: texts with known answers, the memory that is watched, costs; and the model that recalls."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import small_model

from decodelab.core.zoo import load
from decodelab.experiments.memory.act_qkv import (
    SIZES,
    ask,
    compare,
    costs,
    facts_of,
    passkey_text,
    passkeys,
    planted,
    read,
    sliding_cache,
    started,
    texts_of,
)
from decodelab.lab.tasks.recall import ASK, KEY, RECALL_WORDS, VALUE, recall_text, recall_tokenizer
from decodelab.memory.act_qkv import ActQKV, BlockMemory
from decodelab.memory.base import forward, frequencies
from decodelab.training.recall import RECALL, RecallRows, recall_accuracy, train_recall

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def words():
    "A random model for the words of the task."
    return small_model("llama", vocab=len(RECALL_WORDS))


@pytest.mark.parametrize("seed", range(5))
def test_answers_stand_in_the_text(seed):
    text = recall_text(400, facts=20, asks=12, apart=90, seed=seed)
    assert len(text.ids) == 400
    assert text.answers
    for asked, stated in text.answers:
        assert text.ids[asked - 2] == ASK
        assert text.ids[asked - 1 : asked + 1] == text.ids[stated - 1 : stated + 1]
        assert KEY <= text.ids[asked - 1] < VALUE <= text.ids[asked] < VALUE + 32
        assert asked - stated >= 90
    assert recall_text(400, facts=20, asks=12, apart=90, seed=seed) == text
    assert recall_tokenizer()(text.text).input_ids == text.ids
    once = recall_text(400, facts=20, asks=20, once=True, seed=seed)
    assert len({stated for _, stated in once.answers}) == len(once.answers) > 5


def test_the_last_question_is_about_the_fact_at_a_depth():
    for depth in (0.0, 0.5, 1.0):
        text = recall_text(300, facts=20, asks=0, open_end=True, depth=depth, seed=1)
        key = text.ids[-1]
        at = text.ids.index(key)
        assert text.ids[-2] == ASK
        assert text.ids[at + 1] == text.value
        assert abs(at / 300 - depth) < 0.15
    for wrong in ({"length": 10}, {"length": 400, "facts": 33}, {"length": 400, "facts": 0}, {"length": 400, "asks": -1}):
        with pytest.raises(ValueError, match="do not fit into|or are not within 1 to 32 facts"):
            recall_text(**wrong)


def test_recall_counts_blocks_by_brute_force(words):
    text = texts_of(512, 1)[0]
    of = ActQKV(**SIZES)
    memory = BlockMemory(of, 2, frequencies(words))
    fetched, said = {}, []
    for at in range(0, 512, of.w):
        said += forward(words, [memory], torch.tensor([text.ids[at : at + of.w]]), False, logits_to_keep=0).logits[0].argmax(-1).tolist()
        fetched[at // of.w] = list(memory.fetched[-1])
    expected = [
        int(stated < 4 or any(4 + 8 * i <= stated < 12 + 8 * i for i in fetched[(asked - 1) // of.w])) for asked, stated in text.answers
    ]
    found = read(words, of, text)
    assert found["fetched"] == expected
    assert 0 < sum(expected) < len(expected)
    assert found["right"] == [int(said[asked - 1] == text.ids[asked]) for asked, _ in text.answers]
    assert set(read(words, replace(of, k=80), text)["fetched"]) == {1}
    assert read(words, of, text, fetch=False)["fetched"] == [int(stated < 4) for _, stated in text.answers]


def test_representatives_matter(words):
    text = texts_of(512, 1)[0]
    found = compare(words, [text], ("ActQKV", "ActQKV, random tokens", "ActQKV, last tokens"))
    assert len({tuple(run["flat"]) for run in found.values()}) == 3


def test_full_attention_reads_with_the_model_itself(words):
    text = texts_of(512, 1)[0]
    best = words(torch.tensor([text.ids])).logits[0].argmax(-1)
    assert compare(words, [text], ("full attention",))["full attention"]["accuracy"] == [
        sum(int(best[asked - 1]) == text.ids[asked] for asked, _ in text.answers) / len(text.answers)
    ]


def test_decoded_questions_are_about_facts_far_back(words):
    text = recall_text(400, 20, 0, seed=3)
    facts = facts_of(text)
    assert len(facts) == 20
    assert all(text.ids[at - 1] == key and text.ids[at] == value for key, value, at in facts)
    of = ActQKV(**SIZES | {"k": 2, "k_min": 0, "history": 4, "tau": 0.02})
    found = ask(words, of, text, asks=6)
    assert [len(found[name]) for name in ("right", "fetched", "blocks")] == [6, 6, 6]
    assert all(0 < sum(blocks) <= 4 for blocks in found["blocks"])
    assert len({tuple(blocks) for blocks in found["blocks"]}) > 1  # the budget moves
    assert {tuple(blocks) for blocks in ask(words, replace(of, cut_off=False), text, asks=6)["blocks"]} == {(2, 2)}
    assert set(ask(words, replace(of, k=80), text, asks=6)["fetched"]) == {1}


def test_the_probe_finds_planted_questions():
    ranks = {probe: [planted(4, probe, seed) for seed in range(20)] for probe in ("mean", "activation")}
    assert sum(ranks["activation"]) < sum(ranks["mean"]) / 5


def test_the_key_stands_once_at_its_depth():
    class Words:
        def __call__(self, text):
            return SimpleNamespace(input_ids=text.split())

    for depth in (0.1, 0.9):
        text, key = passkey_text(Words(), 400, depth, seed=5)
        assert text.count(f"The secret number is {key}.") == 1
        assert abs(text.index(key) / len(text) - depth) < 0.1
    assert passkey_text(Words(), 400, 0.1, seed=6)[1] != key


def test_a_passkey_is_asked_for_in_every_way(tales):
    model, tokenizer = tales
    found = passkeys(model, tokenizer, (500,), 2)
    assert set(found) == {"InfLLM", "ActQKV", "both ends"}
    assert all(set(run) == {"right", "tokens", "held"} and run["held"] < run["tokens"] for runs in found.values() for run in runs["500"])


def test_costs_have_every_method_and_length(words):
    found = costs(words, (40, 80), new=2, turns=2, sizes={"n_init": 4, "n_loc": 16, "b": 8, "k": 2, "r": 2, "w": 8})
    assert set(found) == {"40", "80"}
    for runs in found.values():
        assert set(runs) == {"full attention", "sliding window", "InfLLM", "ActQKV"}
        assert all(run["prompt"] > 0 and len(run["token"]) == 2 and min(run["token"]) > 0 for run in runs.values())


def test_what_is_timed_reads_the_prompt(words):
    ids = torch.randint(3, 90, (1, 40))
    for name, (prompt, feed) in started(words, ids, {"n_init": 4, "n_loc": 16, "b": 8, "k": 2, "r": 2, "w": 8}).items():
        prompt()
        said = getattr(feed(), "logits", None)
        if name == "full attention":
            torch.testing.assert_close(said[0, -1], words(torch.cat([ids, ids[:, -1:]], 1)).logits[0, -1], atol=1e-4, rtol=1e-3)


def test_the_sliding_cache_keeps_a_window(words):
    cache = sliding_cache(words, 24)
    for part in torch.randint(3, 90, (1, 96)).split(32, 1):
        words(part, past_key_values=cache)
    assert {layer.keys.shape[2] for layer in cache.layers} == {23}  # and the new token makes 24


# the model


def test_rows_depend_on_seed_and_number_alone():
    rows, again = RecallRows(256, 100, 4), RecallRows(256, 100, 4)
    assert rows[3]["input_ids"].equal(again[3]["input_ids"])
    assert not rows[3]["input_ids"].equal(RecallRows(256, 100, 4, seed=1)[3]["input_ids"])
    lengths = [len(rows[i]["input_ids"]) for i in range(100)]
    assert lengths == sorted(lengths)
    assert all(len(set(lengths[i : i + 4])) == 1 for i in range(0, 100, 4))  # a step's rows fit into one batch
    assert {lengths[0], lengths[-1]} == {44, 256}
    for row in (rows[0], rows[99]):
        learnt = row["labels"] >= 0
        assert row["labels"][learnt].equal(row["input_ids"][learnt])
        assert (row["labels"][learnt] >= VALUE).all()
        assert learnt.sum() >= 12


def test_a_short_run_can_be_taken_up(tmp_path):
    tiny = replace(RECALL, hidden_size=16, intermediate_size=16, layers=1, heads=2, block=48, batch_size=2, steps=2, save_every=1, warmup=1)
    with torch.enable_grad():
        first = train_recall(tiny, tmp_path, evaluate=0)
        again = train_recall(tiny, tmp_path, evaluate=0)  # nothing is trained
    assert first["steps"] == again["steps"] == 2
    model, _ = load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == first["parameters"]


def test_the_zoos_model_recalls():
    model, tokenizer = load("recall")
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(RECALL_WORDS)}
    assert recall_accuracy(model, n=8, seed=7) > 0.95
