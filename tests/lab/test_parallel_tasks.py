"""ParallelBench's tasks and measures: scorers agree with their definition by brute force, measures with hand, scipy and properties."""

import json
import math
import random
import re
from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from decodelab.lab.data import has_data
from decodelab.lab.tasks import parallel_puzzles as p
from decodelab.lab.tasks import parallel_scores as m
from decodelab.lab.tasks import parallel_texts as t
from decodelab.lab.tasks.puzzles import sudoku_grids, sudoku_solutions

OWN = [name for name in t.PARALLEL_TASKS if not name.startswith("paraphrase")]
FIRST = {name: t.PARALLEL_TASKS[name].examples(1)[0] for name in OWN}
needs_files = pytest.mark.skipif(not has_data("parallel_bench"), reason="the files of ParallelBench are not here")

# how a right list is defined, apart from the way in which the scorers find it


def is_right(operation, items, word, index, found, key="last"):
    "The definition of each operation, as a predicate of the list that was written."
    if operation == "sort":
        keys = [(name.split(" ")[1], name) if key == "last" else name for name in found]
        return sorted(found) == sorted(items) and keys == sorted(keys)
    if operation == "insert_random":
        return any(found[p] == word and found[:p] + found[p + 1 :] == items for p in range(len(found)))
    if operation == "remove_random":
        return len(found) == len(items) - 1 and any(items[:p] + items[p + 1 :] == found for p in range(len(items)))
    if operation == "replace_random":
        return any(found[p] == word and [*items[:p], word, *items[p + 1 :]] == found for p in range(min(len(found), len(items))))
    return {
        "copy": found == items,
        "reverse": found[::-1] == items,
        "shuffle": Counter(found) == Counter(items) and found != items,
        "insert_index": len(found) == len(items) + 1 and found[index : index + 1] == [word] and found[:index] + found[index + 1 :] == items,
        "remove_index": len(found) == len(items) - 1 and found[:index] == items[:index] and found[index:] == items[index + 1 :],
        "replace_index": len(found) == len(items) and all(x == (word if i == index else items[i]) for i, x in enumerate(found)),
    }[operation]


def all_lists(items, word):
    "Every list of the people and the newcomer that is one shorter, as long, or one longer than the queue."
    return [list(x) for size in (-1, 0, 1) for x in product([*items, word], repeat=len(items) + size)]


def spoiled(task, ex):
    "Outputs that are wrong in a systematic way."
    if isinstance(task, t.QueueTask):
        items = json.loads(ex.answer)
        split = [name.split(" ") for name in items]
        other = next(i for i, name in enumerate(split) if name[1] != split[0][1])
        crossed = list(items)
        crossed[0], crossed[other] = f"{split[0][0]} {split[other][1]}", f"{split[other][0]} {split[0][1]}"
        lists = [
            items[1:],
            items[:-1],
            [*items, items[0]],
            [items[-1], *items[1:]],
            ["Nobody Else", *items],
            crossed,
            [x[:-1] for x in items],
        ]
        return ["", "[]", "[", "no list", *map(t.write_list, lists)]
    if isinstance(task, t.WritingTask):
        return ["", " \n", f"The the {ex.answer}", f"They is {ex.answer}", ex.answer.rstrip(".!?\"'") + " ,"]
    rows = ex.answer.splitlines()
    columns = "\n".join(row[::-1] for row in rows[:1]) + "\n" + "\n".join(rows[1:])
    return ["", rows[0] * 4, "\n".join(rows[:3]), "\n".join([rows[0], *rows[:3]]), columns, "\n".join([*rows[:3], rows[0]])]


# one form for all tasks


def test_the_seventeen_tasks():
    kinds = Counter(name.split("/")[0] for name in t.PARALLEL_TASKS)
    assert kinds == {"waiting_line": 10, "puzzle": 2, "words_to_sentence": 3, "paraphrase_summarize": 2}
    assert all(task.name == name for name, task in t.BENCH_TASKS.items())
    assert len(t.BENCH_TASKS) == 17 + 10 + 18


@pytest.mark.parametrize("name", OWN)
def test_own_answers_score_one_and_spoiled_ones_zero(name):
    task = t.PARALLEL_TASKS[name]
    for ex in task.examples(6 if "sudoku" in name else 25, seed=3):
        assert ex.task == name
        assert task.score(ex, ex.answer) == 1.0
        for wrong in spoiled(task, ex):
            assert task.score(ex, wrong) == 0.0, wrong


@pytest.mark.parametrize("name", OWN)
def test_examples_depend_on_the_seed_and_continue(name):
    task = t.PARALLEL_TASKS[name]
    assert task.examples(4, seed=3) == task.examples(6, seed=3)[:4]
    assert task.examples(4, seed=3) != task.examples(4, seed=4)
    assert len({ex.prompt for ex in task.examples(12)}) == 12


@given(st.text(max_size=80))
@settings(max_examples=60)
def test_any_output_gets_a_score(output):
    for name, ex in FIRST.items():
        task = t.PARALLEL_TASKS[name]
        options = {"metric": "combined"} if "words" in name else {"strict": True} if hasattr(task, "strict") else {}
        assert {task.score(ex, output), t.bench_task(name, **options).score(ex, output)} <= {0.0, 1.0}


@pytest.mark.parametrize("name", OWN)
def test_turns_and_prompt_show_the_same_worked_example_and_question(name):
    task = t.PARALLEL_TASKS[name]
    (ex,) = task.examples(1, seed=5)
    turns = ex.meta["messages"]
    assert [turn["role"] for turn in turns] == (["user"] if "words" in name else ["user", "assistant", "user"])
    position = -1
    for turn in turns:
        position = ex.prompt.find(turn["content"].strip(), position + 1)
        assert position >= 0
    assert ex.answer not in ex.prompt or name in ("waiting_line/copy", "waiting_line/sort")
    assert ex.prompt.endswith(":")
    assert ex.text == f"{ex.prompt} {ex.answer}"
    if len(turns) == 3:
        shot = task.example(task.instance(random.Random(0)))
        assert re.sub(r"\W|\d", "", shot.meta["messages"][0]["content"])[:20] == re.sub(r"\W|\d", "", turns[0]["content"])[:20]
        assert turns[0]["content"] != turns[2]["content"]


def test_worked_example_is_right_itself():
    for name in OWN:
        task = t.PARALLEL_TASKS[name]
        rng = random.Random(9)
        drawn = [task.instance(rng) for _ in range(1 + task.shots)]
        ex = task.make(random.Random(9))
        for (facts, answer), said in zip(drawn[1:], ex.meta["messages"][1::2]):
            assert said["content"] == answer
            assert task.score(task.example((facts, answer)), answer) == 1.0


def test_canvas_sizes_of_the_benchmark():
    assert t.bench_task("waiting_line/copy").new_tokens == 32
    assert t.bench_task("waiting_line_n15/copy").new_tokens == 128
    assert {t.PARALLEL_TASKS[name].new_tokens for name in t.PARALLEL_TASKS if "waiting" not in name} == {64}


def test_base_task_is_abstract():
    task, rng = t.BenchTask(), random.Random(0)
    for call in (lambda: task.template, lambda: task.instance(rng), lambda: task.read({}, ""), lambda: task.examples(1)):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(NotImplementedError):
        t.WritingTask(metric="combined").score(t.Example("", "", ""), "")


# lists

names = st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=6), min_size=1, max_size=6)


@given(names, st.text(st.characters(exclude_characters="[]")), st.text(st.characters(exclude_characters="[")))
def test_a_list_survives_writing_and_parsing(items, before, after):
    for strict in (False, True):
        assert p.parse_list(f"{before}{t.write_list(items)}{after}", strict) == items


@given(st.text(st.sampled_from(list("ab[]\"', \n")), max_size=16))
@settings(max_examples=500)
def test_strict_accepts_exactly_what_is_written_like_json(text):
    found = p.parse_list(text, strict=True)
    last = text[text.rfind("[") :] if "[" in text else ""
    exact = "]" in last and any(
        last[: last.index("]") + 1] == "[" + ", ".join(f'"{x}"' for x in items) + "]" for items in ([], p.parse_list(text) or [])
    )
    assert (found is not None) == exact
    assert found in (None, p.parse_list(text))


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('The list is ["A B", "C D"].', ["A B", "C D"]),
        ('[A B,"C D" , E]', ["A B", "C D", "E"]),
        ('["A", "B",]', ["A", "B"]),  # a comma at the end and empty entries are overlooked,
        ('["A", , "", "B"]', ["A", "B"]),
        ("['A', \"B\"]", ["'A'", "B"]),  # single quotes and line breaks are not
        ('["A",\n"B"]', ["A", '\n"B']),
        ("A B, C D", ["A B", "C D"]),
        ('first ["A"], then ["B", "C"]', ["B", "C"]),
        ('["A", "B"', ["A", "B"]),
        ("[]", []),
        ("", []),
    ],
)
def test_loose_parsing(text, items):
    assert p.parse_list(text) == items


def test_a_queue_is_right_or_wrong_as_in_the_benchmark():
    task = t.QueueTask("copy")
    example = task.example((task._facts(["Ada Reed", "Ben Hale"], "", 0), ""))
    right = ['["Ada Reed", "Ben Hale"]', '["Ada Reed", "Ben Hale",]', '["Ada Reed", "", "Ben Hale"]', "[Ada Reed,Ben Hale]"]
    wrong = ["['Ada Reed', 'Ben Hale']", '["Ada Reed",\n"Ben Hale"]', '[\n"Ada Reed", "Ben Hale"]', '["Ada Reed"]', "[]"]
    assert [task.score(example, text) for text in right + wrong] == [1.0] * 4 + [0.0] * 5


@pytest.mark.parametrize("text", ['["A","B"]', '["A", B]', '["A", "B"', '"A", "B"]', "['A', 'B']", '[ "A", "B"]', '["A", "B",]'])
def test_strict_parsing_refuses(text):
    assert p.parse_list(text, strict=True) is None
    task = t.QueueTask("copy", strict=True)
    assert task.score(task.example(({**task._facts(["A", "B"], "", 0)}, "")), text) == 0.0


@pytest.mark.parametrize("operation", t.QUEUE_QUESTIONS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_scorer_accepts_exactly_the_right_lists(operation, n):
    task = t.QueueTask(operation, (n,))
    for ex in task.examples(3 if n < 4 else 1, seed=1):
        items, word, index = (ex.meta[key] for key in ("items", "word", "index"))
        accepted = 0
        for found in all_lists(items, word):
            assert task.score(ex, t.write_list(found)) == is_right(operation, items, word, index, found), found
            accepted += is_right(operation, items, word, index, found)
        expected = {"shuffle": math.factorial(n) - 1, "insert_random": n + 1, "remove_random": n, "replace_random": n}
        assert accepted == expected.get(operation, 1)


def test_all_right_answers_are_generated():
    for operation, right in (("insert_random", 4), ("remove_random", 3), ("replace_random", 3), ("shuffle", 5)):
        task = t.QueueTask(operation, (3,))
        positions = {
            tuple(ex.meta["items"].index(x) if x in ex.meta["items"] else -1 for x in json.loads(ex.answer)) for ex in task.examples(120)
        }
        assert len(positions) == right


def test_lists_of_fifteen():
    task = t.bench_task("waiting_line_n15/shuffle")
    for ex in task.examples(5):
        items = ex.meta["items"]
        assert len(items) == 15
        assert task.score(ex, ex.answer) == task.score(ex, t.write_list(items[::-1])) == 1.0
        assert task.score(ex, t.write_list(items)) == task.score(ex, t.write_list([items[0], *items[:-1]])) == 0.0


def test_first_and_last_names_of_a_queue_differ_and_the_newcomer_is_new():
    for ex in t.QueueTask("replace_random", (6, 15)).examples(100):
        people = [name.split(" ") for name in [*ex.meta["items"], ex.meta["word"]]]
        assert len({a for a, _ in people}) == len({b for _, b in people}) == len(people)


def test_lengths_and_positions_are_drawn_evenly():
    examples = t.QueueTask("insert_index").examples(2000)
    lengths = Counter(len(ex.meta["items"]) for ex in examples)
    assert set(lengths) == {3, 4, 5, 6}
    assert stats.chisquare(list(lengths.values())).pvalue > 1e-3
    positions = Counter(ex.meta["index"] for ex in examples if len(ex.meta["items"]) == 3)
    assert set(positions) == {0, 1, 2, 3}  # counted from 0, the end included
    assert stats.chisquare(list(positions.values())).pvalue > 1e-3
    assert {ex.meta["index"] for ex in t.QueueTask("remove_index", (3,)).examples(100)} == {0, 1, 2}


def test_sort_has_one_key_in_question_worked_example_and_answer():
    for key, other in (("last", "first"), ("first", "last")):
        task = t.QueueTask("sort", key=key)
        for ex in task.examples(20):
            assert f"of the {key} names" in ex.prompt
            assert is_right("sort", ex.meta["items"], "", 0, json.loads(ex.answer), key)
            shot = json.loads(ex.meta["messages"][1]["content"])
            assert is_right("sort", shot, "", 0, shot, key)
            theirs = p.sort_queue(ex.meta["items"], other)
            assert task.score(ex, t.write_list(theirs)) == float(theirs == json.loads(ex.answer))
    people = ["Clara Adler", "Ada Reed", "Ben Hale", "Ada Hale"]
    assert p.sort_queue(people) == ["Clara Adler", "Ada Hale", "Ben Hale", "Ada Reed"]
    assert p.sort_queue(people, "first") == ["Ada Hale", "Ada Reed", "Ben Hale", "Clara Adler"]


# puzzles


def test_latin_squares_are_all_576():
    squares = p.latin_squares()
    assert len(set(squares)) == 576
    assert all(len(set(line)) == 4 for square in squares for line in (*square, *zip(*square)))


def test_latin_scorer_accepts_exactly_the_squares():
    task = t.LatinSquareTask()
    (ex,) = task.examples(1)
    letters = ex.meta["letters"]
    rows = list(permutations(range(4)))
    squares = set(p.latin_squares())
    for rest in product(rows, repeat=3):
        square = (rows[5], *rest)
        text = "\n".join(",".join(letters[i] for i in row) for row in square)
        assert task.score(ex, text) == (square in squares)


def test_latin_lines_that_count():
    task = t.LatinSquareTask()
    (ex,) = task.examples(1)
    talk = f"Here it is:\n\n{ex.answer.replace(',', ' , ')}\n{ex.answer.splitlines()[0]}\nDone, at last"
    assert task.score(ex, talk) == task.score(ex, ex.answer.replace("\n", "\n\n")) == 1.0
    long = "\n".join(f"{row},{row[0]}" for row in ex.answer.splitlines())  # five cells, right set of symbols
    assert task.score(ex, long) == 0.0
    with pytest.raises(ValueError, match="puzzle/latin_square_n4 has no option strict"):  # it changes nothing in the benchmark
        t.bench_task(task.name, strict=True)


def test_sudoku_has_one_right_grid():
    task = t.GridSudokuTask()
    for ex in task.examples(5):
        puzzle = ex.meta["sudoku"].replace("\n", "")
        assert 16 - puzzle.count("0") == 12
        accepted = [grid for grid in sudoku_grids() if task.score(ex, "\n".join(re.findall("....", grid)))]
        assert accepted == sudoku_solutions(puzzle)
        assert len(accepted) == 1


def test_sudoku_digits_are_read_leniently_or_strictly():
    task, strict = t.GridSudokuTask(), t.GridSudokuTask(strict=True)
    (ex,) = task.examples(1)
    talk = "Grid (4x4), 1 answer:\n" + "\n".join(" | ".join(row) for row in ex.answer.splitlines()) + "\nDone in 1 step"
    assert [task.score(ex, talk), strict.score(ex, talk)] == [1.0, 0.0]
    assert [task.score(ex, f"{ex.answer}\n1234"), strict.score(ex, f"{ex.answer}\n1234")] == [0.0, 0.0]  # a fifth row
    first, rest = ex.answer.split("\n", 1)
    assert strict.score(ex, f"\n {first}\n\n  \n{rest}\n") == 1.0  # blank lines are none
    assert strict.score(ex, f"{first}\n {rest}") == 0.0
    assert task.score(ex, ex.answer.replace("\n", "")) == 0.0


# texts


def test_words_of_the_three_levels():
    easy, hard = ([set(v.split()) for v in topics.values()] for topics in (t._TOPICS, t._FIELDS))
    for level, topics, touched in (("easy", easy, 1), ("medium", easy, 2), ("hard", hard, 4)):
        for ex in t.WordsTask(level=level).examples(30):
            words = ex.meta["wanted"]
            assert len(set(words)) == 4
            assert sum(bool(topic & set(words)) for topic in topics) == touched
    assert [len(t.WordsTask(level="medium", count=n).examples(1)[0].meta["wanted"]) for n in range(1, 8)] == [1, 2, 3, 4, 5, 6, 7]
    assert t.enumerate_words(["a"]) == "a"
    assert t.enumerate_words(["a", "b"]) == "a and b"
    assert t.enumerate_words(["a", "b", "c"]) == "a, b, and c"


def test_words_measures_and_metric():
    task = t.WordsTask()
    facts, answer = task.read({}, {"words": ["owl", "fox"], "example": None})
    ex = task.example((facts, answer))
    assert task.measure(ex, "An owl saw the foxes.") == {"grammar": 1.0, "inclusion": 1.0, "combined": 1.0}
    assert task.measure(ex, "An owl saw me.") == {"grammar": 1.0, "inclusion": 0.0, "combined": 0.0}
    assert task.measure(ex, "A owl saw the fox.") == {"grammar": 0.0, "inclusion": 1.0, "combined": 0.0}
    assert task.score(ex, "An owl saw me.") == 1.0
    assert t.bench_task("words_to_sentence/easy", metric="combined").score(ex, "An owl saw me.") == 0.0


def test_paraphrase_and_summary_measures():
    task = t.ParaphraseTask(metric="combined")
    source = "The old man walked slowly to the market."
    ex = task.example(task.read({"text": source}, {"examples": "['Slowly, the old man went to the market.', 'b']"}))
    assert ex.answer == "Slowly, the old man went to the market."
    assert source in ex.prompt
    assert task.score(ex, source) == 0.0
    found = task.measure(ex, ex.answer)
    assert found["combined"] == pytest.approx(found["novelty"] * m.token_f1(ex.answer, source))
    assert 0 < found["combined"] < 1
    task = t.SummaryTask(metric="combined")
    ex = task.example(task.read({"text": "A: Hi.\nB: Hello."}, {"summary": "A and B greet each other. "}))
    assert task.score(ex, "A and B greet each other.") == 1.0
    assert task.measure(ex, "A and B greet.")["combined"] == pytest.approx(2 * 4 / (4 + 6))
    assert task.measure(ex, "a and B greet.")["grammar"] == 0.0


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: t.QueueTask("rotate"), "unknown list operation 'rotate'; known: copy"),
        (lambda: t.QueueTask(key="middle"), "key must be 'last' or 'first'"),
        (lambda: t.QueueTask(lengths=()), "at least one"),
        (lambda: t.QueueTask(lengths=(1,)), "lengths 2 to 29"),
        (lambda: t.QueueTask(lengths=(30,)), "lengths 2 to 29"),
        (lambda: t.GridSudokuTask(clues=4), "clues must be 5 to 15"),
        (lambda: t.GridSudokuTask(clues=16), "clues must be 5 to 15"),
        (lambda: t.WordsTask(metric="bleu"), "metric must be 'grammar' or 'combined'"),
        (lambda: t.WordsTask(level="odd"), "level must be easy, medium or hard"),
        (lambda: t.WordsTask(count=0), "count 1 to 7"),
        (lambda: t.WordsTask(count=8), "count 1 to 7"),
        (lambda: t.bench_task("waiting_line/rotate"), "unknown task 'waiting_line/rotate'; known: waiting_line/copy"),
        (lambda: t.bench_task("puzzle/latin_square_n4", key="first"), "no option key; it has none"),
        (lambda: t.bench_task("puzzle/sudoku_n4_12", key="first"), "no option key; it has clues, strict"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_without_the_files_the_error_says_how_to_get_them(monkeypatch):
    monkeypatch.setenv("DECODELAB_DATA", "")
    for call in (
        lambda: t.ParaphraseTask().examples(1),
        lambda: t.SummaryTask().examples(1),
        lambda: t.bench_examples("waiting_line/copy"),
    ):
        with pytest.raises(FileNotFoundError, match=r"parallel_bench.*DECODELAB_DATA"):
            call()
    assert len(t.QueueTask().examples(3)) == 3


# the benchmark's files


@needs_files
@pytest.mark.parametrize("folder", ["waiting_line", "waiting_line_n15", "puzzle", "words_to_sentence", "paraphrase_summarize"])
def test_every_sample_has_a_right_answer_and_wrong_ones(folder):
    for name, task in t.BENCH_TASKS.items():
        if name.split("/")[0] == folder:
            examples = t.bench_examples(task)
            assert len(examples) == (108 if "sudoku" in name else 100)
            for ex in examples:
                assert task.score(ex, ex.answer) == 1.0, (name, ex.answer)
                for wrong in spoiled(task, ex):
                    assert task.score(ex, wrong) == 0.0, (name, wrong)


@needs_files
def test_every_file_of_the_benchmark_has_its_task():
    assert set(t._samples(str(t.data_root()))) == set(t.BENCH_TASKS)
    assert sum(len(t.bench_samples(name)) for name in t.BENCH_TASKS) == 4508
    with pytest.raises(ValueError, match="the benchmark has no task 'words_to_sentence/easy_n2'; it has"):
        t.bench_samples("words_to_sentence/easy_n2")


@needs_files
@pytest.mark.parametrize("operation", t.QUEUE_QUESTIONS)
def test_files_agree_with_the_definition_of_each_operation(operation):
    for key in ("last", "first") if operation == "sort" else ("last",):
        task = t.QueueTask(operation, key=key)
        for ex in t.bench_examples(task, 3):  # lists of three
            items, word, index = (ex.meta[k] for k in ("items", "word", "index"))
            for found in all_lists(items, word or "Nobody Else"):
                assert task.score(ex, t.write_list(found)) == is_right(operation, items, word, index, found, key)
        for name in ("waiting_line", "waiting_line_n15"):
            for sample in t.bench_samples(f"{name}/{operation}"):
                facts, answer = task.read(sample["input"], sample["answer"])
                assert is_right(operation, facts["items"], facts["word"], facts["index"], json.loads(answer), key)


@needs_files
def test_stored_answers_have_the_strict_form():
    for name, task in t.BENCH_TASKS.items():
        if hasattr(task, "strict"):
            strict = t.bench_task(name, strict=True)
            assert all(strict.score(ex, ex.answer) == 1.0 for ex in t.bench_examples(strict))


@needs_files
def test_stored_answers_of_sort_are_in_order_of_first_names():
    for name, same_by_last in (("waiting_line/sort", 5), ("waiting_line_n15/sort", 0)):
        stored = [sample["answer"] for sample in t.bench_samples(name)]
        shown = [sample["input"]["icl_examples"][0]["answer"] for sample in t.bench_samples(name)]
        first, last = (t.bench_examples(t.bench_task(name, key=key)) for key in ("first", "last"))
        assert [ex.answer for ex in first] == stored
        assert [ex.meta["messages"][1]["content"] for ex in first] == shown
        assert sum(ex.answer == a for ex, a in zip(last, stored)) == same_by_last
        assert all("by last name" in ex.prompt for ex in last)


@needs_files
def test_questions_of_the_files_are_filled_in():
    for task in t.BENCH_TASKS.values():
        for ex in t.bench_examples(task, 5):
            asked = ex.meta["messages"][-1]["content"]
            assert "\\n" not in asked
            assert not re.search(r"\{[a-z]+\}", asked)
            for key in ("context", "sudoku", "symbols", "text"):
                assert str(ex.meta.get(key, "")) in asked
            assert ex.meta.get("operation") is None
            if isinstance(task, t.QueueTask) and task.operation.endswith("index"):
                assert re.search(rf"\b{ex.meta['index']}\b", asked)


@needs_files
@pytest.mark.parametrize("operation", t.QUEUE_QUESTIONS)
def test_our_questions_have_the_form_of_the_files(operation):
    def shape(ex):
        meta, lines = ex.meta, [line for line in ex.meta["messages"][-1]["content"].splitlines() if line.strip()]
        named = [meta["word"], str(meta["index"])] if operation != "copy" else []
        return [
            "list" if line == meta["context"] else [bool(re.search(rf"(?<!\w){re.escape(x)}(?!\w)", line)) and bool(x) for x in named]
            for line in lines
        ]

    task = t.QueueTask(operation)
    theirs, ours = t.bench_examples(task), task.examples(100)
    assert {str(shape(ex)) for ex in theirs} == {str(shape(ex)) for ex in ours}
    assert {len(ex.meta["items"]) for ex in theirs} == {len(ex.meta["items"]) for ex in ours}
    assert {len(ex.meta["messages"]) for ex in theirs} == {len(ex.meta["messages"]) for ex in ours}
    assert {len(json.loads(ex.answer)) - len(ex.meta["items"]) for ex in theirs} == {
        len(json.loads(ex.answer)) - len(ex.meta["items"]) for ex in ours
    }


@needs_files
def test_rewriting_tasks_draw_from_the_files():
    for task in (t.ParaphraseTask(), t.SummaryTask()):
        texts = {sample["input"]["text"] for sample in t.bench_samples(task.name)}
        examples = task.examples(10)
        assert {ex.meta["text"] for ex in examples} <= texts
        assert len({ex.meta["text"] for ex in examples}) > 5
        assert all(task.score(ex, ex.answer) == 1.0 for ex in examples)


# speed


def test_tokens_per_step_by_hand():
    assert m.tokens_per_step(32, [4, 16]) == 5.0
    assert m.tokens_per_step([10, 30], [4, 16]) == pytest.approx((2.5 + 1.875) / 2)


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 64)), min_size=1, max_size=12))
def test_tokens_per_step_is_a_mean_of_ratios(pairs):
    tokens, passes = zip(*pairs)
    value = m.tokens_per_step(tokens, passes)
    assert value == pytest.approx(sum(n / k for n, k in pairs) / len(pairs))
    assert min(n / k for n, k in pairs) - 1e-9 <= value <= max(n / k for n, k in pairs) + 1e-9


points = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=7)


@given(points, st.integers(0, 100))
@example([(1, 50), (1, 80), (2, 20)], 50)
def test_pb_of_fixed_steps_is_the_fastest_good_point(pairs, level):
    tps, score = zip(*pairs)
    assert m.SpeedCurve(tps, score).pb(level) == max([x for x, y in pairs if y >= level], default=0)


@given(st.lists(st.integers(0, 20).map(lambda x: 5 * x), min_size=2, max_size=6), st.integers(0, 20).map(lambda x: 5 * x))
@settings(max_examples=60)
def test_interpolated_pb_is_the_last_good_place_of_the_line(score, level):
    tps = np.arange(1, len(score) + 1)
    grid = np.linspace(1, len(score), 4000 * (len(score) - 1) + 1)
    good = grid[np.interp(grid, tps, score) >= level - 1e-9]
    assert m.SpeedCurve(tps, score, True).pb(level) == pytest.approx(good[-1] if len(good) else 0, abs=5e-4)


@given(points, st.permutations(range(7)), st.integers(0, 100), st.integers(0, 100))
def test_pb_does_not_depend_on_the_order_and_falls_with_the_level(pairs, order, a, b):
    again = [pairs[i] for i in order if i < len(pairs)]
    for interpolate in (False, True):
        curve, same = (m.SpeedCurve(*zip(*p), interpolate) for p in (pairs, again))
        assert curve.pb(a) == same.pb(a)
        assert curve.pb(max(a, b)) <= curve.pb(min(a, b))
    assert m.SpeedCurve(*zip(*pairs), True).pb(a) >= m.SpeedCurve(*zip(*pairs)).pb(a)


def test_published_pb_values_follow_from_published_averages():
    steps = (1, 2, 4, 8, 16, 32)
    for averages, published in (
        ((86.4, 74.4, 58.9, 41.1, 29.9, 14.4), (1, 1, 2)),
        ((74.5, 69.6, 60.3, 49.6, 28.8, 18.3), (0, 0, 1)),
        ((86.6, 80.4, 60.2, 44.6, 29.6, 24.5), (2, 2, 2)),
    ):
        assert tuple(m.SpeedCurve(steps, averages).pb(x) for x in (80, 75, 70)) == published
    dream = m.SpeedCurve((1.40, 4.12, 5.50, 6.81, 8.02, 9.81), (89.8, 87.4, 80.8, 72.5, 64.7, 56.2), True)
    assert [dream.pb(x) for x in (80, 75, 70)] == pytest.approx([5.63, 6.42, 7.20], abs=0.005)


def test_measured_and_average_curves_by_hand():
    easy = m.measured_curve([[1, 1], [1, 0]], 32, [[32, 32], [8, 16]])
    hard = m.measured_curve([[1, 0, 0], [0, 0, 0]], [[32] * 3, [16, 8, 0]], [[32] * 3, [8, 8, 8]])
    assert (easy.tps, easy.score) == ([1, 3], [1, 0.5])
    assert hard.tps == pytest.approx([1, 1])
    both = m.average_curve([easy, hard])  # tasks count alike, whatever their number of samples
    assert both.tps == pytest.approx([1, 2])
    assert both.score == pytest.approx([2 / 3, 1 / 4])
    assert m.average_curve([m.SpeedCurve([1], [2], True)]).interpolate


# tasks


@given(st.lists(st.integers(0, 100), min_size=6, max_size=6), st.integers(1, 9))
def test_parallelizability_is_a_weighted_mean(scores, factor):
    assume(sum(scores))
    table = dict(zip((1, 2, 4, 8, 16, 32), scores))
    value = m.parallelizability(table)
    assert 1 <= value <= 32
    assert value == pytest.approx(sum(k * s for k, s in table.items()) / sum(scores))
    assert value == pytest.approx(m.parallelizability({k: factor * s for k, s in table.items()}))


def test_parallelizability_by_hand():
    assert m.parallelizability(dict.fromkeys((1, 2, 4, 8, 16, 32), 7)) == 63 / 6
    assert m.parallelizability({1: 100, 2: 25, 4: 18, 8: 0, 16: 3, 32: 0}) == pytest.approx((100 + 50 + 72 + 48) / 146)
    assert math.isnan(m.parallelizability({1: 0, 2: 0}))


@given(st.dictionaries(st.integers(1, 64), st.integers(0, 100), min_size=2, max_size=7))
def test_order_preference_is_minus_the_slope(scores):
    slope = stats.linregress(list(scores), list(scores.values())).slope
    assert m.order_preference(scores) == pytest.approx(-slope, abs=1e-9)


def test_order_preference_is_positive_where_freedom_hurts():
    assert m.order_preference({2: 90, 4: 86, 8: 78}) == pytest.approx(2)
    assert m.order_preference({2: 10, 32: 40}) == pytest.approx(-1)


# oracle

tables = st.integers(1, 4).flatmap(
    lambda settings: st.integers(1, 4).flatmap(
        lambda samples: st.tuples(
            *(
                st.lists(st.lists(st.integers(low, 3), min_size=samples, max_size=samples), min_size=settings, max_size=settings)
                for low in (0, 1)
            )
        )
    )
)


@given(tables)
@settings(max_examples=200)
def test_oracle_is_the_best_of_all_assignments(table):
    s, n = map(np.array, table)
    found = m.oracle(s, n)
    samples = range(s.shape[1])
    every = [
        (sum(s[c, i] for i, c in enumerate(choice)), -sum(n[c, i] for i, c in enumerate(choice)))
        for choice in product(range(len(s)), repeat=s.shape[1])
    ]
    score, passes = max(every)
    assert found.score == pytest.approx(score / len(samples))
    assert found.forwards == pytest.approx(-passes / len(samples))
    assert found.score == pytest.approx(np.mean([s[found.setting[i], i] for i in samples]))


@given(tables)
@settings(max_examples=200)
def test_no_fixed_setting_beats_the_oracle(table):
    s, n = map(np.array, table)
    best = m.oracle(s, n)
    for score, passes in zip(s.mean(1), n.mean(1)):
        assert score <= best.score + 1e-12
        assert passes >= best.forwards - 1e-12 or score < best.score - 1e-12


def test_a_fixed_setting_may_take_fewer_passes_than_the_oracle_and_score_less():
    s, n = [[0], [1]], [[1], [9]]
    assert (m.oracle(s, n).score, m.oracle(s, n).forwards) == (1, 9)


# order


@given(
    st.integers(1, 5).flatmap(lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=5))
)
def test_first_visible_is_the_first_true_of_each_position(visible):
    expected = [next((step for step, row in enumerate(visible) if row[i]), -1) for i in range(len(visible[0]))]
    assert m.first_visible(visible).tolist() == expected


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12))
@settings(max_examples=200)
def test_order_agreement_is_that_of_scipy(steps):
    tau, rho = m.order_agreement(steps)
    if len(set(steps)) == 1:
        assert math.isnan(tau) and math.isnan(rho)
    else:
        assert tau == pytest.approx(stats.kendalltau(steps, range(len(steps))).statistic)
        assert rho == pytest.approx(stats.spearmanr(steps, range(len(steps))).statistic)


def test_order_agreement_by_hand():
    assert m.order_agreement([0, 1, 2, 3]) == (1.0, 1.0)
    assert m.order_agreement([3, 2, 1, 0]) == (-1.0, -1.0)
    assert m.order_agreement([0, 0, 1])[0] == pytest.approx(2 / math.sqrt(6))
    for n in (3, 5, 9):  # exercise: the first position last, the others in order
        assert m.order_agreement([n, *range(1, n)])[0] == pytest.approx(1 - 4 / n)


# grammar

RIGHT = [
    "She has eaten an apple, and he was late.",
    "Did she have time, or does it have to wait?",
    "If he were rich, he would buy a house.",
    "He and she have met twice.",
    "I am here; they are not.",
    "The university has a unique hour of silence.",
    "An honest man and a European met an heir.",
    "He said that that was fine.",
    "They had had enough of it.",
    "It was a very, very long day.",
    "She arrived at 8 a.m. and left at 5.30 p.m. on Monday.",
    "He lives in the US, and it is an MS that he wants.",
    '"Where are they?" she asked (twice).',
    "“Well,” he said, “it can wait.”",
    "What can it do? It can do a lot.",
    "The can is empty, but his will is strong.",
    "Ulysses got an A, and Julia got a B.",
    "Part I is longer than Part II.",
    "Visit Alexa.com for 1,000 offers!",
    "He took an x-ray, and she made a U-turn.",
    "Mary's mother's house isn't far, is it?",
    "She used to be a doctor; it lets him be.",
    "We were told to go, and we went…",
    "iPhones are expensive.",
    "AI is everywhere, and A and B agree.",
    "The people in IT are kind, and at 6 AM does the train leave.",
    "Once upon a time, an old king had a uniform.",
    "Hmm, that is odd.",
    "First sentence. Second one! Third?\nA new line.",
]
WRONG = [
    ("She have eaten.", "agreement"),
    ("They was late.", "agreement"),
    ("We has gone home.", "agreement"),
    ("I is happy.", "agreement"),
    ("This are my friends.", "agreement"),
    ("It don't work.", "agreement"),
    ("He are old.", "agreement"),
    ("She can goes home.", "verb form"),
    ("They didn't went home.", "verb form"),
    ("He should of known.", "verb form"),
    ("I want to went home.", "verb form"),
    ("She has went home.", "verb form"),
    ("They are goes home.", "verb form"),
    ("He put it in the of house.", "determiner"),
    ("We saw a the dog.", "determiner"),
    ("My the dog barks.", "determiner"),
    ("She ate a apple.", "a or an"),
    ("He has an dog.", "a or an"),
    ("It took a hour.", "a or an"),
    ("An university is big.", "a or an"),
    ("The the dog barks.", "doubled words"),
    ("It is in the in the house.", "doubled words"),
    ("Tom's Tom's dog barks.", "doubled words"),
    ("she is here.", "small first letter"),
    ("She is here. they are not.", "small first letter"),
    ("She is here", "no end"),
    ("She is here,", "no end"),
    ("She is here , and he is not.", "space before punctuation"),
    ("She is here,and he is not.", "no space after punctuation"),
    ("She is here.He is not.", "no space after punctuation"),
    ("She is  here.", "doubled space"),
    ("She is here,, and he is not.", "doubled punctuation"),
    ("She is here..", "doubled punctuation"),
    ("She (is here.", "unpaired"),
    ('She said "no.', "unpaired"),
    ("She is [MASK] here.", "left-over marker"),
    ("She is here.<|endoftext|>", "left-over marker"),
    ("The dgtr is here.", "no vowel"),
    ("", "no text"),
    (" \n", "no text"),
    ("... 12 !", "no text"),
]


@pytest.mark.parametrize("text", RIGHT)
def test_right_sentences_pass(text):
    assert m.grammar_errors(text) == []
    assert m.grammar_score(text) == 1.0


@pytest.mark.parametrize(("text", "rule"), WRONG)
def test_wrong_sentences_are_found_by_the_rule_meant(text, rule):
    assert rule in {error.split(":")[0] for error in m.grammar_errors(text)}
    assert m.grammar_score(text) == 0.0


@given(st.text(max_size=60))
def test_grammar_of_any_text_is_zero_or_one_and_always_the_same(text):
    assert m.grammar_score(text) in (0.0, 1.0)
    assert m.grammar_errors(text) == m.grammar_errors(text)


def test_independent_mixtures_of_two_sentences():
    mixed = [" ".join(words) for words in product(*zip(*(s.split() for s in ("He is an old friend.", "They are a new family."))))]
    for text in mixed:
        agree = ("He" in text) == (" is " in text) and (" an " in text) == ("old" in text)
        assert m.grammar_score(text) == agree
    assert sum(map(m.grammar_score, mixed)) == 8


@needs_files
def test_sentences_that_languagetool_passed_pass():
    texts = [sample["input"]["text"] for sample in t.bench_samples("paraphrase_summarize/chatgpt-paraphrases")]
    assert sum(map(m.grammar_score, texts)) >= 98


# likeness


def longest_common(a, b):
    return max((len(x) for n in range(len(a) + 1) for x in combinations_of(a, n) if contains(b, x)), default=0)


def combinations_of(a, n):
    return [[a[i] for i in range(len(a)) if mask >> i & 1] for mask in range(1 << len(a)) if bin(mask).count("1") == n]


def contains(b, x):
    rest = iter(b)
    return all(word in rest for word in x)


few_words = st.lists(st.sampled_from(["the", "cat", "dog", "sat", "mat"]), min_size=1, max_size=6)


@given(few_words, few_words)
@settings(max_examples=60)
def test_rouge_l_by_brute_force(a, b):
    common = longest_common(a, b)
    assert m.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * common / (len(a) + len(b)))


def test_rouge_l_compares_stems():
    assert m.rouge_l("she walks home", "she walked home") == 1.0
    assert m.rouge_l("she runs home", "she walked home") == pytest.approx(2 / 3)


long_words = st.lists(st.sampled_from(["the", "cat", "dog"]), min_size=1, max_size=8)


@given(long_words, long_words)
@settings(max_examples=150)
def test_novelty_is_one_minus_bleu(a, b):
    bleu = min(1, math.exp(1 - len(b) / len(a)))
    for n in range(1, 5):
        ours, theirs = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (a, b))
        bleu *= (sum((ours & theirs).values()) / max(1, sum(ours.values()))) ** (1 / 4)
    assert m.novelty(" ".join(a), " ".join(b)) == pytest.approx(1 - bleu)


def test_novelty_by_hand():
    assert m.novelty("the cat sat on the mat", "the cat sat on a mat") == pytest.approx(1 - 12**-0.25)
    assert m.novelty("a b c d", "a b c d e f g h") == pytest.approx(1 - math.exp(-1))  # too short
    assert m.novelty("We go home.", "We go home.") == 0.0  # the full stop is a token of its own
    assert m.novelty("We go home", "We go home") == m.novelty("we go home.", "We go home.") == 1.0  # no four in a row; capitals count
    assert m.novelty("", "go home") == m.novelty(" \n", "go home") == 0.0


def test_inclusion_and_combined_scores():
    assert m.inclusion("The cats sat at a party.", ["cat", "art"]) == 1.0
    assert m.inclusion("Cats sat.", ["cat"]) == 0.0
    assert m.inclusion("The dog sat.", ["dog", "cat"]) == 0.0
    assert m.words_score("An owl.", ["owl"]) == 1.0
    assert m.words_score("A owl.", ["owl"]) == m.words_score("An owl.", ["fox"]) == 0.0
    assert m.summary_score("The cat sat.", "The cat sat on the mat.") == pytest.approx(2 * 3 / 9)
    assert m.summary_score("the cat sat.", "The cat sat on the mat.") == 0.0
    assert m.paraphrase_score("The cat sat.", "The cat sat.") == pytest.approx(0)
    other = m.paraphrase_score("A cat was sitting.", "The cat sat.", similarity=lambda a, b: 0.5)
    assert other == pytest.approx(0.5 * m.novelty("A cat was sitting.", "The cat sat."))
    assert m.paraphrase_score("a cat was sitting.", "The cat sat.") == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.tokens_per_step(32, []), "forwards must be finite numbers with 1 dimension"),
        (lambda: m.tokens_per_step(32, [0]), "give one pair a sample"),
        (lambda: m.tokens_per_step([1, 2], [1]), "give one pair a sample"),
        (lambda: m.tokens_per_step([-1], [1]), "give one pair a sample"),
        (lambda: m.tokens_per_step([math.nan], [1]), "tokens must be finite"),
        (lambda: m.SpeedCurve([1, 2], [1]), "a positive TPS and a score; got 2 speeds and 1 scores"),
        (lambda: m.SpeedCurve([0], [1]), "a positive TPS and a score"),
        (lambda: m.SpeedCurve([], []), "at least one of them"),
        (lambda: m.measured_curve([[1, 0]], 32, [[1], [2]]), "every score needs its forward passes"),
        (lambda: m.average_curve([]), "curves of the same settings"),
        (lambda: m.average_curve([m.SpeedCurve([1], [1]), m.SpeedCurve([1], [1], True)]), "curves of the same settings"),
        (lambda: m.parallelizability({1: -1}), "scores not negative"),
        (lambda: m.parallelizability({}), "at least one of them"),
        (lambda: m.order_preference({1: 1}), "two block lengths or more"),
        (lambda: m.oracle([[1]], [[1], [2]]), "every score needs its forward passes"),
        (lambda: m.first_visible([1, 0]), "[steps, length]"),
        (lambda: m.first_visible([[]]), "[steps, length]"),
        (lambda: m.order_agreement([]), "steps must be finite numbers with 1 dimension"),
    ],
)
def test_measures_refuse_what_makes_no_sense(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
