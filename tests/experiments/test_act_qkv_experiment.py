"""ActQKV's measurements: texts with known answers, the memory that is watched, costs; and the model that recalls."""

from dataclasses import replace

import pytest
import torch
from toys import small_model

from decodelab.core.zoo import load
from decodelab.experiments.memory.act_qkv import SIZES, WatchedMemory, compare, costs, read, texts_of
from decodelab.lab.tasks.recall import ASK, KEY, RECALL_WORDS, VALUE, recall_text, recall_tokenizer
from decodelab.memory.act_qkv import ActQKV, BlockMemory
from decodelab.memory.base import forward, frequencies
from decodelab.training.recall import RECALL, RecallRows, train_recall

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
        assert KEY <= text.ids[asked - 1] < VALUE <= text.ids[asked] < VALUE + 60
        assert asked - stated >= 90
    assert recall_text(400, facts=20, asks=12, apart=90, seed=seed) == text
    assert recall_tokenizer()(text.text).input_ids == text.ids


def test_the_last_question_is_about_the_fact_at_a_depth():
    for depth in (0.0, 0.5, 1.0):
        text = recall_text(300, facts=20, asks=0, open_end=True, depth=depth, seed=1)
        key = text.ids[-1]
        at = text.ids.index(key)
        assert text.ids[-2] == ASK
        assert text.ids[at + 1] == text.value
        assert abs(at / 300 - depth) < 0.15
    for wrong in ({"length": 10}, {"length": 400, "facts": 61}, {"length": 400, "facts": 0}, {"length": 400, "asks": -1}):
        with pytest.raises(ValueError, match="do not fit into|or are not within 1 to 60 facts"):
            recall_text(**wrong)


def test_a_watched_memory_answers_as_any_other(words):
    ids = torch.tensor([texts_of(512, 1)[0].ids])
    of = ActQKV(**SIZES)
    memories = [kind(of, 2, frequencies(words)) for kind in (BlockMemory, WatchedMemory)]
    one, other = (forward(words, [memory], ids, False, logits_to_keep=0).logits for memory in memories)
    assert one.equal(other)
    assert sorted(memories[1].log[-1].pop(max(memories[1].log[-1]))) == memories[0].fetched[-1]


def test_recall_counts_blocks_by_brute_force(words):
    text = texts_of(512, 1)[0]
    of = ActQKV(**SIZES)
    memory = WatchedMemory(of, 2, frequencies(words))
    fetched = {}
    for at in range(0, 512, of.w):
        forward(words, [memory], torch.tensor([text.ids[at : at + of.w]]), False)
        fetched[at // of.w] = list(memory.fetched[-1])
    expected = [
        int(stated < 4 or any(4 + 8 * i <= stated < 12 + 8 * i for i in fetched[(asked - 1) // of.w])) for asked, stated in text.answers
    ]
    assert read(words, of, text)["fetched"] == expected
    assert 0 < sum(expected) < len(expected)
    assert set(read(words, replace(of, k=80), text)["fetched"]) == {1}
    assert read(words, of, text, fetch=False)["fetched"] == [int(stated < 4) for _, stated in text.answers]


def test_representatives_matter(words):
    text = texts_of(512, 1)[0]
    found = compare(words, [text], ("ActQKV", "ActQKV, random tokens", "ActQKV, last tokens"))
    assert len({tuple(run["flat"]) for run in found.values()}) == 3


def test_costs_have_every_method_and_length(words):
    found = costs(words, (40, 80), new=2, repeats=1, vocabulary=100, n_init=4, n_loc=16, b=8, k=2, r=2, w=8)
    assert set(found) == {"full attention", "sliding window", "InfLLM", "ActQKV"}
    assert all(
        set(runs) == {"40", "80"} and all(x > 0 for pairs in runs.values() for pair in pairs for x in pair) for runs in found.values()
    )


# the model


def test_rows_depend_on_seed_and_number_alone():
    some, more = RecallRows(64, 5), RecallRows(64, 500)
    assert some[3]["input_ids"].equal(more[3]["input_ids"])
    assert not some[3]["input_ids"].equal(RecallRows(64, 5, seed=1)[3]["input_ids"])
    row = some[3]
    learnt = row["labels"] >= 0
    assert row["labels"][learnt].equal(row["input_ids"][learnt])
    assert (row["labels"][learnt] >= VALUE).all()


def test_a_short_run_can_be_taken_up(tmp_path):
    tiny = replace(RECALL, hidden_size=16, intermediate_size=16, layers=1, heads=2, block=48, batch_size=2, steps=2, save_every=1, warmup=1)
    with torch.enable_grad():
        first = train_recall(tiny, tmp_path, evaluate=0)
        again = train_recall(tiny, tmp_path, evaluate=0)  # nothing is trained
    assert first["steps"] == again["steps"] == 2
    model, _ = load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == first["parameters"]
