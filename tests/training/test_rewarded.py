"""Advantages against hand counts, exercises, and prompts of one's own."""

import json
import random
from dataclasses import dataclass

import pytest
import torch

from decodelab.lab.tasks.text import Example, Task
from decodelab.training.rewarded import (
    GRPO_TASKS,
    REWARDS,
    check_rewarded,
    exercises,
    file_rows,
    group_advantages,
    held_out_exercises,
    rewarded_rows,
)


def test_advantages():
    nan = torch.nan
    A, flat = group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1]), 3)
    assert A.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0]) and flat.tolist() == [False, True]
    A, _ = group_advantages(torch.tensor([1.0, 3, nan, nan]), 4)
    assert A.tolist() == [-1, 1, 0, 0]
    scaled, _ = group_advantages(torch.tensor([0.0, 2, 5, 5]), 2, "group")
    assert scaled.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-4)
    rewards = torch.randn(12)
    batch, _ = group_advantages(rewards, 4, "batch")
    expected = (rewards.view(3, 4) - rewards.view(3, 4).mean(1, keepdim=True)).flatten() / rewards.std()
    assert torch.allclose(batch, expected, atol=1e-3)
    with pytest.raises(ValueError, match="scale must be"):
        group_advantages(rewards, 4, "std")
    with pytest.raises(ValueError, match="12 rewards cannot be dealt out to groups of 5"):
        group_advantages(rewards, 5)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_have_no_spread(scale):
    # 0.1 is no sum of powers of two, so that the mean of eight is not 0.1
    rewards = torch.cat([torch.full((8,), 0.1), torch.full((8,), torch.nan), torch.linspace(0, 1, 8)])
    assert (rewards[:8].mean() != rewards[:8]).all()
    A, flat = group_advantages(rewards, 8, scale)
    assert flat.tolist() == [True, True, False] and (A[:16] == 0).all() and (A[16:] != 0).all()


def test_exercises_are_new_and_a_longer_list_goes_on():
    task = GRPO_TASKS["arithmetic"]
    held = exercises(task, 30, seed=1)
    some, more = exercises(task, 20, 0, held), exercises(task, 40, 0, held)
    assert more[:20] == some
    assert not {e.prompt for e in more} & {e.prompt for e in held}

    @dataclass(frozen=True)
    class One(Task):
        name = "one"

        def make(self, rng: random.Random):
            return Example("one", "a", "a")

    with pytest.raises(ValueError, match="too few exercises for 3 new ones"):
        exercises(One(), 3, 0, exercises(One(), 1))


def test_held_out_exercises_have_a_sequence_of_their_own():
    task = GRPO_TASKS["countdown"]
    held = [held_out_exercises(task, 20, seed) for seed in range(4)]
    assert all(a != b for a in held for b in [*(h for h in held if h is not a), *(exercises(task, 20, seed) for seed in range(6))])
    _, test, _ = rewarded_rows("countdown", "", "answer", n=6, held_out=20, seed=2)
    assert [row["prompt"] for row in test] == [e.prompt for e in held[2]]


def written(tmp_path, rows):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_rows_of_a_file_are_dealt_out_once(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(10)]
    file = written(tmp_path, rows)
    train, test, reward = rewarded_rows("arithmetic", str(file), "answer", n=5, held_out=3, seed=1)
    assert len(train) == 5 and len(test) == 3
    assert len({row["prompt"] for row in train + test}) == 8 and all(row in rows for row in train + test)
    assert reward(completions=[" 4 \nmore", "4 more"], answer=[4, 4]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="10 prompts and 10 are held out"):
        rewarded_rows("arithmetic", str(file), "answer", n=5, held_out=10)


def test_exercises_as_rows():
    train, test, reward = rewarded_rows("countdown", "", "answer", n=6, held_out=4)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    known = {e.prompt: e.answer for e in [*GRPO_TASKS["countdown"].examples(200, 0), *GRPO_TASKS["countdown"].examples(200, -1)]}
    for rows in (train, test):
        answers = [known[row["prompt"]] for row in rows]
        assert reward(completions=answers, exercise=[row["exercise"] for row in rows]) == [1.0] * len(rows)


@pytest.mark.parametrize(
    ("reward", "columns", "right"),
    [
        ("gsm8k", {"solution": "2 + 2 = 4 #### 4"}, "<answer>4</answer>"),
        ("math", {"solution": "\\boxed{4}"}, "\\boxed{4}"),
        ("countdown", {"numbers": [3, 4], "target": 7}, "<answer>3 + 4</answer>"),
        ("sudoku", {"puzzle": "0" + "1" * 15, "solution": "2" + "1" * 15}, "<answer>2</answer>"),
    ],
)
def test_every_reward_can_be_named(reward, columns, right, tmp_path):
    file = written(tmp_path, [{"prompt": "a", **columns}] * 2)
    assert len(file_rows(file, reward)) == 2
    given = {name: [value, value] for name, value in columns.items()}
    good, bad = REWARDS[reward](completions=[right, ""], **given)
    assert good > bad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "cannot read .*: name a file of JSON lines in UTF-8"),
        (b"no json", "cannot read .*: name a file of JSON lines in UTF-8"),
        (b"", "must hold one JSON object a line"),
        (b'["a"]', "must hold one JSON object a line"),
        (b'{"answer": 1}', "must hold one JSON object a line, all with the same keys, `prompt` among them"),
        (b'{"prompt": "a", "answer": 1}\n{"prompt": "b"}', "all with the same keys"),
        (b'{"prompt": "a", "solution": 1}', "does not fit the reward 'answer': .* reads the columns answer"),
    ],
)
def test_files_that_hold_no_prompts(text, message, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        file_rows(file)
    with pytest.raises(ValueError, match="cannot read"):
        file_rows(tmp_path / "none.jsonl")


def test_an_impossible_column_is_seen_before_training(tmp_path):
    for row in ({"puzzle": "12", "solution": "12"}, {"puzzle": 12, "solution": 12}):
        with pytest.raises(ValueError, match="does not fit the reward 'sudoku'"):
            file_rows(written(tmp_path, [{"prompt": "a", **row}]), "sudoku")


def test_names():
    check_rewarded("layouts", "math", ("layouts",))
    with pytest.raises(ValueError, match="unknown task 'layouts'; known: arithmetic, countdown"):
        check_rewarded("layouts", "math")
    with pytest.raises(ValueError, match="unknown reward 'luck'; known: answer, gsm8k"):
        check_rewarded("arithmetic", "luck")
