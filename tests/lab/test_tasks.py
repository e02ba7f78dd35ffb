"""Synthetic tasks and puzzles: own answers score 1, spoiled ones less, brute force agrees, and every error branch."""

import ast
import random
import re
import subprocess
import sys
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decodelab.lab import prompts as openings
from decodelab.lab.tasks import catalogue as t
from decodelab.lab.tasks import puzzles as p
from decodelab.lab.tasks import text as text_tasks

names = st.sampled_from(sorted(t.TASKS))


def spoiled(example):
    """The answer with its first character lost and one too many, or a result that is off by one."""
    return f"The answer is {example.meta['result'] + 1}." if example.task == "arithmetic" else example.answer[1:] + "@"


@given(names, st.integers(0, 10**6))
@settings(deadline=None, max_examples=150)
def test_own_answer_scores_one_and_spoiled_answers_less(name, seed):
    task = t.TASKS[name]
    (example,) = task.examples(1, seed)
    assert example.task == task.name == name
    assert example.text == f"{example.prompt} {example.answer}"
    for right in (example.answer, f"  {example.answer} \n\nand so on"):
        assert task.score(example, right) == 1.0
    for wrong in ("", "\n", "no", "?", "9999999999", "," * 5, "(" * 300, spoiled(example)):
        assert task.score(example, wrong) < 1.0


@given(names, st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_output_gets_a_score(name, output):
    (example,) = t.TASKS[name].examples(1)
    assert 0.0 <= t.TASKS[name].score(example, output) <= 1.0


@pytest.mark.parametrize("name", sorted(t.TASKS))
def test_seed_and_length(name):
    task = t.TASKS[name]
    assert task.examples(5, seed=3) == task.examples(8, seed=3)[:5]
    assert task.examples(5, seed=3) != task.examples(5, seed=4)
    assert len({e.prompt for e in task.examples(30)}) >= 25
    assert task.examples(0) == []
    with pytest.raises(ValueError, match="n must not be negative"):
        task.examples(-1)


def test_examples_do_not_depend_on_the_hash_seed():
    code = (
        "from decodelab.lab.prompts import tale_prompts; from decodelab.lab.tasks.catalogue import TASKS; "
        "print([t.examples(2) for t in TASKS.values()], tale_prompts(5))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_base_task_is_abstract():
    with pytest.raises(NotImplementedError):
        text_tasks.Task().examples(1)
    with pytest.raises(NotImplementedError):
        text_tasks.Task().make(random.Random(0))


# lists


@given(st.sampled_from(sorted(text_tasks.LIST_PROMPTS)), st.sampled_from(["names", "words"]), st.integers(2, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_list_scores_equal_the_answers_by_brute_force(operation, entries, length, seed):
    task = text_tasks.ListTask(operation, length, entries)
    (example,) = task.examples(1, seed)
    meta = example.meta
    words = [*meta["items"], meta["word"]]
    right = {tuple(a) for a in text_tasks.list_answers(operation, **meta)}
    for size in (length - 1, length, length + 1):
        for output in product(words, repeat=size):
            assert task.score(example, ", ".join(output)) == float(output in right)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("copy", [["c", "a", "b"]]),
        ("reverse", [["b", "a", "c"]]),
        ("sort", [["a", "b", "c"]]),
        ("shuffle", [list(x) for x in permutations("cab")]),
        ("insert_index", [["c", "x", "a", "b"]]),
        ("insert_random", [["x", "c", "a", "b"], ["c", "x", "a", "b"], ["c", "a", "x", "b"], ["c", "a", "b", "x"]]),
        ("remove_index", [["c", "b"]]),
        ("remove_random", [["a", "b"], ["c", "b"], ["c", "a"]]),
        ("replace_index", [["c", "x", "b"]]),
        ("replace_random", [["x", "a", "b"], ["c", "x", "b"], ["c", "a", "x"]]),
    ],
)
def test_list_answers(operation, expected):
    assert list(text_tasks.list_answers(operation, ["c", "a", "b"], "x", 1)) == expected


def test_list_prompts_count_from_one():
    task = text_tasks.ListTask("remove_index", length=5)
    for example in task.examples(20):
        gone = example.meta["items"][example.meta["index"]]
        assert f"Remove number {example.meta['index'] + 1} from" in example.prompt
        assert gone not in example.answer.split(", ")


def test_longest_shuffle_is_scored_at_once():
    task = text_tasks.ListTask("shuffle", length=29, entries="words")
    (example,) = task.examples(1)
    assert task.score(example, example.answer + ".") == 1.0


def test_lists_refuse():
    with pytest.raises(ValueError, match="unknown list operation 'rotate'; known: copy"):
        text_tasks.ListTask("rotate")
    for bad in ({"entries": "numbers"}, {"length": 1}, {"length": 30}):
        with pytest.raises(ValueError, match="length 2 to 29"):
            text_tasks.ListTask("copy", **bad)
    for words in (text_tasks.FIRST_NAMES, text_tasks.SURNAMES, text_tasks.SHORT_WORDS):
        assert len(set(words)) == len(words) >= 30


# arithmetic, keys


@given(st.integers(1, 8), st.integers(2, 30), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_arithmetic_steps_are_true(steps, largest, seed):
    task = text_tasks.ArithmeticTask(steps, largest, limit=200)
    (example,) = task.examples(1, seed)
    value = example.meta["start"]
    lines = example.answer.splitlines()
    assert len(lines) == steps + 1
    for line in lines[:-1]:
        left, right = line.split(" = ")
        assert left.startswith(f"{value} ")
        value = int(right)
        assert eval(left) == value
        assert 0 <= value <= 200
    assert lines[-1] == f"The answer is {value}."
    assert task.right_steps(example, example.answer) == [True] * steps
    assert task.score(example, f"so we get {value}") == 1.0
    assert task.score(example, f"The answer is {value + 1}. Or {value}.") == 0.0
    assert task.score(example, f"-{value + 1}") == 0.0
    assert task.right_steps(example, "1 + 1 = 3\n" + "\n".join(lines[1:])) == [False] + [True] * (steps - 1)


def test_arithmetic_refuses():
    for bad in ({"steps": 0}, {"largest": 1}, {"limit": 10}):
        with pytest.raises(ValueError, match="steps >= 1 and 2 <= largest <= limit"):
            text_tasks.ArithmeticTask(**bad)


@given(st.integers(2, 60), st.integers(4, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_only_the_key_asked_for_is_right(facts, digits, seed):
    task = text_tasks.KeyValueTask(facts, digits)
    (example,) = task.examples(1, seed)
    keys = example.meta["keys"]
    assert len(keys) == len(set(keys.values())) == facts
    assert [who for who, key in keys.items() if task.score(example, f"The key is {key}.")] == [example.meta["asked"]]
    assert list(keys)[example.meta["place"]] == example.meta["asked"]
    assert f"The key of {example.meta['asked']} is {example.answer}." in example.prompt


def test_keys_refuse():
    for bad in ({"facts": 1}, {"facts": 1201}, {"digits": 3}, {"digits": 10}):
        with pytest.raises(ValueError, match="facts must be 2 to 1200 and digits 4 to 9"):
            text_tasks.KeyValueTask(**bad)
    assert len(text_tasks.KeyValueTask(1200).examples(1)[0].meta["keys"]) == 1200


# sudoku


def naive_solutions(puzzle):
    """All fillings of the empty cells by backtracking, cell by cell."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    row, column = divmod(cell, 4)
    seen = {puzzle[i] for i in range(16) if i // 4 == row or i % 4 == column or (i // 8 == cell // 8 and i % 4 // 2 == column // 2)}
    return [s for d in "1234" if d not in seen for s in naive_solutions(puzzle[:cell] + d + puzzle[cell + 1 :])]


def test_there_are_288_grids():
    assert sorted(p.sudoku_grids()) == naive_solutions("0" * 16)
    assert len(p.sudoku_grids()) == 288


@given(st.integers(5, 15), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_puzzles_have_their_clues_and_one_solution(clues, seed):
    task = t.SudokuTask(clues)
    (example,) = task.examples(1, seed)
    puzzle, solution = example.meta["puzzle"], example.meta["solution"]
    assert 16 - puzzle.count("0") == clues
    assert naive_solutions(puzzle) == p.sudoku_solutions(puzzle) == [solution]
    assert task.score(example, f"{solution[:8]}\n{solution[8:]}") == 1.0
    other = next(g for g in p.sudoku_grids() if g != solution)
    assert task.score(example, other) == 0.0


def test_sudoku_refuses():
    for bad in ("123", "5" * 16, "1" * 17, "123412341234123x"):
        with pytest.raises(ValueError, match="a puzzle is 16 digits"):
            p.sudoku_solutions(bad)
    for clues in (4, 16):
        with pytest.raises(ValueError, match=f"clues must be 5 to 15, got {clues}"):
            t.SudokuTask(clues)
        with pytest.raises(ValueError, match=f"clues must be 5 to 15, got {clues}"):
            p.sudoku_puzzle(random.Random(0), clues)


# expressions, countdown


def exact(text):
    """Value of an expression with its numbers as fractions."""
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})


expressions = st.recursive(
    st.integers(0, 20).map(str) | st.sampled_from(["x", "y"]),
    lambda e: (
        st.tuples(e, st.sampled_from(["+", "-", "*", "//", "%", "<", "==", ">=", "!="]), e).map("({0[0]} {0[1]} {0[2]})".format)
        | st.tuples(e, e, e).map("({0[0]} if {0[1]} else {0[2]})".format)
        | e.map("(-{})".format)
    ),
    max_leaves=6,
)


@given(expressions, st.integers(-9, 9), st.integers(-9, 9))
@settings(deadline=None)
def test_evaluation_agrees_with_python(text, x, y):
    tree = p.parse_expression(text)
    try:
        expected = eval(text, {"x": x, "y": y})
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="cannot be evaluated"):
            p.evaluate_arithmetic(tree, {"x": x, "y": y})
    else:
        assert p.evaluate_arithmetic(tree, {"x": x, "y": y}) == expected


@pytest.mark.parametrize(
    "text",
    ["2 ** 3", "1 << 9", "print(1)", "'a'", "True", "1.5", "[1]", "x", "1 < 2 < 3", "not 1", "lambda: 1", "(x := 1)", "1 / 0", "1 % 0"],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"only arithmetic|cannot be evaluated"):
        p.evaluate_arithmetic(p.parse_expression(text))


@pytest.mark.parametrize("text", ["", "1 +", "import os", "(" * 150, "a\0b", "\ud800"])
def test_no_expression(text):
    with pytest.raises(ValueError):
        p.parse_expression(text)


def test_expression_length():
    with pytest.raises(ValueError, match="201 characters: 200 are allowed"):
        p.parse_expression("1" * 201)
    assert p.evaluate_arithmetic(p.parse_expression("-" * 199 + "1")) == -1
    assert isinstance(p.parse_expression(" 1"), ast.Expression)


@given(st.lists(st.integers(1, 12), min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_countdown_values_by_brute_force(numbers):
    expected = set()
    for a, b, c in permutations(numbers):
        for f, g in product("+-*/", repeat=2):
            for text in (f"({a} {f} {b}) {g} {c}", f"{a} {f} ({b} {g} {c})"):
                try:
                    expected.add(exact(text))
                except ZeroDivisionError:
                    continue
    found = p.countdown_values(numbers)
    assert set(found) == expected
    for value, text in found.items():
        assert p.evaluate_arithmetic(p.parse_expression(text)) == value


@given(st.integers(2, 4), st.integers(10, 60), st.integers(0, 30))
@settings(deadline=None, max_examples=25)
def test_countdown_is_reachable(count, largest, seed):
    task = t.CountdownTask(count, largest)
    (example,) = task.examples(1, seed)
    assert 1 <= example.meta["target"] <= largest
    assert Fraction(example.meta["target"]) in p.countdown_values(example.meta["numbers"])
    assert exact(example.answer) == example.meta["target"]
    assert task.score(example, str(example.meta["target"])) == 0.0
    assert task.score(example, f"{example.answer} + 0") == 0.0
    assert task.score(example, f"({example.answer}) = {example.meta['target']}") == 1.0


def test_countdown_wants_four_operations_only():
    task = t.CountdownTask()
    example = text_tasks.Example("countdown", "", "", {"numbers": [7, 2, 1], "target": 3})
    assert task.score(example, "(7 - 1) / 2") == 1.0
    assert [task.score(example, x) for x in ("7 // 2 * 1", "7 // 2 // 1", "-(1 - 7) / 2", "7 if 2 else 1", "7 / (2 - 2)")] == [0.0] * 5


def test_countdown_refuses():
    for bad in ({"count": 1}, {"count": 5}, {"largest": 9}):
        with pytest.raises(ValueError, match="count must be 2 to 4"):
            t.CountdownTask(**bad)
    for numbers in ([1], [1] * 5):
        with pytest.raises(ValueError, match="two to four numbers"):
            p.countdown_values(numbers)


# shapes, programs


@given(st.integers(2, 6), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_scene_and_grid_agree(size, shapes, seed):
    task = t.ShapesTask(size, min(shapes, size**2))
    (example,) = task.examples(1, seed)
    grid = [row.split() for row in example.answer.split(" / ")]
    assert [len(row) for row in grid] == [size] * size
    for row, column in product(range(size), repeat=2):
        thing = example.meta["scene"].get((row, column))
        assert grid[row][column] == ("".join(w[0] for w in thing.split()) if thing else "..")
    where = {thing: cell for cell, thing in example.meta["scene"].items()}
    assert len(where) == len(example.meta["sentences"]) == min(shapes, size**2)
    steps = {"right": (0, 1), "left": (0, -1), "above": (-1, 0), "below": (1, 0)}
    for sentence in example.meta["sentences"][1:]:
        words = sentence.rstrip(".").split()
        (r, c), (dr, dc), (ar, ac) = where[" ".join(words[1:3])], steps[words[5]], where[" ".join(words[-2:])]
        assert (r, c) == (ar + dr, ac + dc)


def test_letters_name_colours_and_forms():
    for words in (t.COLOURS, t.FORMS):
        assert len({word[0] for word in words}) == len(words)


def test_shapes_refuse():
    for bad in ({"size": 1}, {"size": 7}, {"shapes": 0}, {"shapes": 10}, {"size": 6, "shapes": 31}):
        with pytest.raises(ValueError, match="shapes fit the grid"):
            t.ShapesTask(**bad)


def test_programs_pass_their_tests_in_python():
    seen = set()
    for example in t.ProgramTask(tests=5).examples(80):
        space = {}
        exec(example.text, space)
        for test in example.meta["tests"]:
            exec(test, space)
        seen.add(example.meta["entry_point"])
        assert len(example.meta["tests"]) == len(example.meta["cases"]) == 5
        assert all(f"# {test}\n" in example.prompt for test in example.meta["tests"][:2])
    assert len(seen) == len(t._PROGRAMS)


def test_program_score_is_the_share_of_tests():
    task = t.ProgramTask(tests=4)
    cases = [((x,), x + 1 if x < 3 else 0) for x in range(4)]
    example = text_tasks.Example("programs", "", "", {"parameters": ["x"], "cases": cases})
    assert task.score(example, "x + 1") == 0.75
    assert task.score(example, "return 1") == 0.25
    assert task.score(example, "6 // x - 9") == 0.0
    assert task.score(example, "x + z") == 0.0
    assert task.score(example, "x + 1 if x < 3 else 0\nprint(x)") == 1.0


def test_constants_do_not_pass_a_program():
    task = t.ProgramTask()
    for example in task.examples(60):
        assert all(task.score(example, str(k)) < 1 for _, k in example.meta["cases"])


def test_programs_refuse():
    for tests in (2, 31):
        with pytest.raises(ValueError, match=f"tests must be 3 to 30, got {tests}"):
            t.ProgramTask(tests)


# tales


@given(st.integers(0, 50))
@settings(deadline=None, max_examples=15)
def test_tale_prompts(seed):
    prompts = openings.tale_prompts(500, seed)
    assert len(set(prompts)) == 500
    assert all(12 <= len(prompt.split()) <= 25 for prompt in prompts)
    assert prompts[:60] == openings.tale_prompts(60, seed)
    assert prompts[:60] != openings.tale_prompts(60, seed + 1)


def test_tale_lists_are_coprime_and_distinct():
    lists = tuple(openings.openings().values())
    assert [len(x) for x in lists] == [len(set(x)) for x in lists] == [7, 13, 16, 11]


def test_tale_prompts_refuse():
    for n in (0, 16_017):
        with pytest.raises(ValueError, match="n must be 1 to 16,016"):
            openings.tale_prompts(n)
