"""Rewards of completions that were made by hand, each worked out on paper from the rules."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decodelab.lab.tasks.rewards import (
    answer_block,
    arithmetic_value,
    countdown_reward,
    gsm8k_parts,
    gsm8k_reward,
    last_boxed,
    math_reward,
    normal_form,
    reward_function,
    sudoku_reward,
)

STRICT = "<reasoning>\n3 + 4 = 7\n</reasoning>\n<answer>\n7\n</answer>\n"
ONE_LINE = "<reasoning>3 + 4</reasoning> <answer>7</answer>"
# completion -> correct, digits, strict, soft, tags; the gold answer is 7
GSM8K = {
    STRICT: (2.0, 0.5, 0.5, 0.0, 0.5),
    STRICT.replace("7\n</a", "8\n</a"): (0.0, 0.5, 0.5, 0.0, 0.5),
    STRICT.replace("\n7\n", "\nseven\n"): (0.0, 0.0, 0.5, 0.0, 0.5),
    ONE_LINE: (2.0, 0.5, 0.0, 0.5, 0.0),
    # five characters behind the closing line, counted by both rules
    STRICT + "Good.": (2.0, 0.5, 0.0, 0.0, 0.5 - 0.005 - 0.005),
    # no closing line at all: the whole text of 12 + 9 characters counts as standing behind it, and one tag is there
    "12345678901\n<answer>\n": (0.0, 0.0, 0.0, 0.0, 0.125 - 0.021),
    "": (0.0, 0.0, 0.0, 0.0, 0.0),
    "7": (0.0, 0.0, 0.0, 0.0, 0.0),
    # two lines of reasoning: neither form
    STRICT.replace("3 + 4", "3\n4"): (2.0, 0.5, 0.0, 0.0, 0.5),
    # the last answer counts
    "<answer>9</answer>" + ONE_LINE: (2.0, 0.5, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("completion", GSM8K)
def test_gsm8k(completion):
    parts = gsm8k_parts(completion, "Three and four make seven. #### 7")
    assert tuple(parts.values()) == pytest.approx(GSM8K[completion], abs=1e-12)
    assert gsm8k_reward(completion, "7") == pytest.approx(sum(GSM8K[completion]))


@given(st.text(alphabet="7\n <>", max_size=12), st.text(alphabet="7\n <>", max_size=12))
def test_no_completion_has_both_forms(one, other):
    for text in (
        f"<reasoning>{one}</reasoning>\n<answer>{other}</answer>\n",
        f"<reasoning>\n{one}\n</reasoning>\n<answer>\n{other}\n</answer>\n",
    ):
        parts = gsm8k_parts(text, "7")
        assert not (parts["strict"] and parts["soft"])
        assert sum(parts.values()) <= 3.5


@pytest.mark.parametrize("solution", ["", "Three and four make seven. ####  "])
def test_a_solution_without_a_gold_answer_is_an_error(solution):
    with pytest.raises(ValueError, match="no gold answer"):
        gsm8k_reward("", solution)


COUNTDOWN = {  # numbers 3, 4, 5; target 23
    "<answer>3 + 4 * 5</answer>": 1.0,
    "so <answer>1</answer>, no: <answer>(5 * 4) + 3</answer> done": 1.0,
    "<answer>3 + 5 * 4 = 23</answer>": 0.1,
    "<answer>23</answer>": 0.1,
    "<answer>3 + 4 * 5 + 0</answer>": 0.1,
    "<answer>(3 + 4) * 5</answer>": 0.1,
    "<answer>3 + 4 * 5": 0.0,
    "3 + 4 * 5": 0.0,
    "<answer></answer>": 0.1,
    "<answer>__import__('os').abort() or 3 + 4 * 5</answer>": 0.1,
}


@pytest.mark.parametrize("completion", COUNTDOWN)
def test_countdown(completion):
    assert countdown_reward(completion, (3, 4, 5), 23) == COUNTDOWN[completion]


def test_digits_of_one_number_do_not_pass_for_two():
    assert countdown_reward("<answer>1.5 * 2</answer>", (1, 2, 5), 3) == 0.1
    assert countdown_reward("<answer>3 ** 2</answer>", (2, 3), 9) == 0.1
    assert countdown_reward("<answer>7 // 2</answer>", (2, 7), 3) == 0.1


def test_a_value_within_1e_5_is_the_target():
    assert countdown_reward("<answer>1 / 3</answer>", (1, 3), 0.33333) == 1.0
    assert countdown_reward("<answer>1 / 3</answer>", (1, 3), 0.333) == 0.1


PUZZLE, SOLUTION = "1204341021434320", "1234341221434321"  # three empty cells


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        (f"<answer>{SOLUTION}</answer>", 1.0),
        ("<answer>1234 3412\n2143 4321</answer>", 1.0),
        (f"<answer>{SOLUTION}999</answer>", 1.0),
        (f"<answer>9{SOLUTION[1:]}</answer>", 1.0),  # a given cell is not checked
        (f"<answer>{PUZZLE}</answer>", 0.0),
        (f"<answer>{SOLUTION[:15]}2</answer>", 2 / 3),
        ("<answer>123</answer>", 1 / 3),  # filled up with 0
        (SOLUTION, 0.0),
    ],
)
def test_sudoku(completion, share):
    assert sudoku_reward(completion, PUZZLE, SOLUTION) == pytest.approx(share)


@pytest.mark.parametrize(("puzzle", "solution"), [("12", SOLUTION), (PUZZLE, "12"), (SOLUTION, SOLUTION), ("x" * 16, SOLUTION)])
def test_a_bad_puzzle_is_an_error(puzzle, solution):
    with pytest.raises(ValueError, match="16 digits"):
        sudoku_reward("<answer>1</answer>", puzzle, solution)


MATH = {  # gold answer 1/2
    r"<answer>\boxed{\frac{1}{2}}</answer>": (2.75, 3.0),
    r"it is \boxed{0.5}": (2.25, 2.25),
    r"\boxed{3}, no, \boxed{\dfrac12}": (2.25, 2.25),
    r"<answer>\frac12</answer>": (0.75, 0.75),
    r"<answer>\boxed{2}</answer>": (0.75, 1.0),
    r"\boxed{\frac{1}{2}": (0.25, 0.25),
    "": (0.25, 0.25),
}


@pytest.mark.parametrize("completion", MATH)
def test_math(completion):
    for solution in (r"\frac{1}{2}", r"Halves: $\boxed{\frac12}$."):
        assert (math_reward(completion, solution), math_reward(completion, solution, boxed_inside=True)) == MATH[completion]


def test_normal_forms():
    same = [
        (r"\frac{a}{b}", r"\dfrac{a}{b}", r"\tfrac ab"),
        (r"3\sqrt{2}", r"3\sqrt2", r"3 \sqrt 2"),
        ("1,000", "1,000."),
        ("12", "12.0", "$12$", r"12\text{ cm}", r"12\mbox{ inches}", "x = 12", r"12^{\circ}", r"12\%", r"\$12", r"\left 12 \right"),
        ("0.25", ".25"),
        ("-1/2", r"-\frac{1}{2}"),
    ]
    for group in same:
        assert len({normal_form(text) for text in group}) == 1, [normal_form(text) for text in group]
    assert len({normal_form(group[0]) for group in same}) == len(same)
    assert normal_form("12") != normal_form("120") and normal_form("1/2") != normal_form("2/1")
    assert last_boxed(r"\boxed{\sqrt{2}}") == r"\sqrt{2}" and last_boxed("none") is None
    assert answer_block("<answer>1</answer> <answer>2") is None


NUMBERS = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(NUMBERS, lambda x: st.builds("({} {} {})".format, x, st.sampled_from("+-*/"), x), max_leaves=6)


@given(EXPRESSIONS)
def test_arithmetic_is_that_of_fractions(text):
    with_fractions = "".join(f"Fraction({part})" if part.isdigit() else part for part in __import__("re").split(r"(\d+)", text))
    try:
        expected = eval(with_fractions, {"Fraction": Fraction})  # of our own text
    except ZeroDivisionError:
        expected = None
    assert arithmetic_value(text) == expected


@given(st.text(alphabet="0123456789.+-*/() \n_abex=,", max_size=40))
def test_no_text_is_an_error(text):
    value = arithmetic_value(text)
    assert value is None or isinstance(value, Fraction)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 201,
        "(" * 21 + "1" + ")" * 21,
        "2 ** 2",
        "1 // 1",
        "1 / (2 - 2)",
        "1_0",
        "1e3",
        "0x1",
        "x",
        "1 if 1 else 2",
        ")1(",
        "007",
        "1.2.3",
        ".",
    ],
)
def test_what_has_no_value(text):
    assert arithmetic_value(text) is None


def test_limits_themselves_pass():
    assert arithmetic_value("(" * 20 + "1" + ")" * 20) == 1
    assert arithmetic_value("1+" * 99 + "1") == 100
    assert arithmetic_value("9" * 200) == 10**200 - 1
    assert (arithmetic_value("0.1 + 0.2"), arithmetic_value("1.")) == (Fraction(3, 10), 1)


def test_for_a_trainer():
    rewards = reward_function(countdown_reward, "numbers", "target")
    chat = [[{"role": "assistant", "content": "<answer>2 + 2</answer>"}], "4"]
    assert rewards(completions=chat, prompts=["", ""], numbers=[[2, 2]] * 2, target=[4, 4], trainer_state=None) == [1.0, 0.0]
    assert rewards.__name__ == "countdown_reward"
    with pytest.raises(ValueError, match="columns target"):
        rewards(completions=["4"], numbers=[[2, 2]])
