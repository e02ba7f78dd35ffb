"""The comparison of unmasking rules: rules against their definitions, exercises of single tokens, infilling against closed forms, figures by hand."""

import json
import math
import random
from dataclasses import dataclass, replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from toys import small_model
from transformers.modeling_outputs import MaskedLMOutput

from decodelab.core.zoo import load
from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.fast_dllm import FastDLLM
from decodelab.diffusion.ideal import Distribution, IdealDenoiser
from decodelab.diffusion.parallelbench import sampled_accuracy
from decodelab.experiments.diffusion import strategies
from decodelab.experiments.diffusion.strategies import (
    ADAPTIVE,
    LLADA_15,
    LLADA_15_ADAPTIVE,
    STATIC,
    Infill,
    averages,
    compare,
    curve,
    exercises,
    experiment,
    first_look,
    infilled,
    list_template,
    lists,
    pack,
    paired,
    positions_of,
    rewritten,
    rules,
    single_words,
    unpack,
)
from decodelab.lab.provenance import to_plain
from decodelab.lab.tasks.catalogue import TASKS
from decodelab.lab.tasks.text import LIST_PROMPTS, SHORT_WORDS, ListTask

MASK, EOS = 3, 2


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def words_of(tales):
    "The zoo's tokenizer and its words of one token."
    return tales[1], single_words(tales[1])


@pytest.fixture(scope="module")
def model():
    "A random masked model with the zoo's vocabulary."
    made = small_model(vocab=4096, spread=0.5)
    made.config.mask_token_id, made.config.eos_token_id, made.generation_config.eos_token_id = MASK, EOS, EOS
    return made


def zoo(name):
    try:
        return load(name)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the zoo model {name} is not here: {error}")


# rules


def decode(rule, model, tokenizer, prompts=("Copy the list.", "Sort it, please, now."), positions=16):
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    return rule.generate(model, **inputs, max_new_tokens=positions, do_sample=False)


@pytest.mark.parametrize("positions", [16, 32])
def test_a_static_rule_takes_positions_over_k_steps_and_fills_everything(model, words_of, positions):
    for name, rule in rules(positions, ("confidence", "random", "left to right")).items():
        out = decode(rule, model, words_of[0], positions=positions)
        k = float(name.rpartition(" ")[2])
        assert {len(passes) for passes in out.stats.emitted} == {positions / k}, name
        assert rule.early_stop is False


def test_a_name_says_what_its_rule_does():
    for name, rule in rules(32, most=32).items():
        kind, _, setting = name.rpartition(" ")
        x, whole = float(setting), rule.block_length is None
        if kind in STATIC:
            assert (type(rule), rule.remasking, rule.steps, rule.cache) == (LLaDA, STATIC[kind], 32 / x, "none") and whole
        else:
            assert type(rule) is FastDLLM and whole
            assert (rule.threshold if kind == "threshold" else rule.factor) == x and (rule.factor is None) == (kind == "threshold")


def test_a_laxer_threshold_takes_fewer_steps(words_of):
    dist = Distribution.uniform([[20 + x for x in (i, j, (i + j) % 2, *[5] * 13)] for i, j in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0))])
    ideal = IdealDenoiser(dist, ties="random")

    def steps(kind):
        found = rules(16, [kind]).values()
        return [len(r.generate(ideal, ideal.start, max_new_tokens=16, do_sample=False, eos_token_id=None).stats.emitted[0]) for r in found]

    thresholds = steps("threshold")
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[-1]


def test_left_to_right_is_confidence_order_in_blocks_of_k(model, words_of):
    for k in (2, 4):
        ours = decode(rules(16, ["left to right"])[f"left to right {k}"], model, words_of[0])
        blocks = decode(LLaDA(k, 16 // k, early_stop=False), model, words_of[0])
        assert ours.sequences.equal(blocks.sequences)


@pytest.mark.parametrize(("arguments", "message"), [((24,), "power of two"), ((8,), "power of two"), ((16, ["luck"]), "unknown kinds")])
def test_wrong_canvases_and_kinds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rules(*arguments)


def test_the_papers_figures_have_the_settings_of_ours():
    assert set(LLADA_15) == set(STATIC) and {len(v) for v in LLADA_15.values()} == {6}
    assert {k: sorted(v) for k, v in LLADA_15_ADAPTIVE.items()} == {k: sorted(v) for k, v in ADAPTIVE.items()}


# exercises


def test_single_words_are_those_of_one_token_behind_a_space():
    sizes = {" a": 1, " bb": 2, " c": 1}
    tokenizer = lambda text, add_special_tokens: SimpleNamespace(input_ids=[0] * sizes[text])  # noqa: E731
    assert single_words(tokenizer, ["a", "bb", "c"]) == ["a", "c"]


@given(operation=st.sampled_from(list(LIST_PROMPTS)), length=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_a_rewritten_exercise_is_an_exercise_with_the_new_words(operation, length, seed):
    pool = [f"word{i:02d}" for i in range(12)]
    task = ListTask(operation, length, "words")
    old = task.make(random.Random(seed))
    new = rewritten(old, pool, random.Random(seed + 1))
    facts = new.meta
    assert task.score(new, new.answer) == 1.0
    assert {*facts["items"], facts["word"]} <= set(pool) and len({*facts["items"], facts["word"]}) == length + 1
    asked = LIST_PROMPTS[operation].format(word=facts["word"], number=facts["index"] + 1)
    assert new.prompt == f"{asked}\nList: {', '.join(facts['items'])}\nAnswer:"
    assert (new.task, facts["index"]) == (old.task, old.meta["index"])


def test_rewriting_has_the_distribution_of_drawing_from_the_words_at_once():
    pool, task, seen = ["a", "b", "c", "d"], ListTask("sort", 2, "words"), {}
    for i in range(4800):
        new = rewritten(task.make(random.Random(i)), pool, random.Random(f"words {i}"))
        key = (*new.meta["items"], new.meta["word"])
        seen[key] = seen.get(key, 0) + 1
        assert new.answer.split(", ") == sorted(new.meta["items"])
    assert set(seen) == set(permutations(pool, 3))
    assert chisquare(list(seen.values())).pvalue > 0.001


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="use a shorter list"):
        rewritten(ListTask("copy", 4, "words").make(random.Random(0)), list("abcd"), random.Random(0))


def test_exercises_fit_their_canvases_and_their_entries_are_single_tokens(words_of):
    tokenizer, words = words_of
    found = exercises(tokenizer, 8, seed=3)
    counts = pd.Series([e.task for e in found]).value_counts()
    assert len(counts) == 13 and set(counts) == {8}
    for e in found:
        ids = tokenizer(f" {e.answer}", add_special_tokens=False).input_ids
        assert len(ids) + 1 <= positions_of(e)
        assert TASKS[e.task].score(e, e.answer) == 1.0
        if e.task.startswith("list_"):
            assert len(ids) == 2 * len(e.answer.split(", ")) - 1 and set(e.answer.split(", ")) <= set(words)
    assert {len(e.meta["items"]) for e in found if e.task == "list_copy"} == {4, 5, 6, 7}
    assert exercises(tokenizer, 2, seed=3)[0] == found[0] != exercises(tokenizer, 2, seed=4)[0]
    assert len(words) < len(SHORT_WORDS)


# figures


def frame_of(scores, passes, kind="threshold", task="a", positions=16):
    "A frame from scores and passes by setting."
    lines = [
        {"kind": kind, "setting": s, "task": task, "example": i, "score": v, "steps": n, "positions": positions}
        for s in scores
        for i, (v, n) in enumerate(zip(scores[s], passes[s]))
    ]
    return pd.DataFrame(lines)


def two_tasks():
    a = frame_of({0.5: [1, 0], 0.9: [1, 1]}, {0.5: [2, 4], 0.9: [8, 16]})
    b = frame_of({0.5: [0, 0, 0, 1], 0.9: [0, 1, 1, 0]}, {0.5: [1] * 4, 0.9: [4] * 4}, task="b", positions=32)
    return pd.concat([a, b], ignore_index=True)


def test_averages_and_curves_by_hand_weigh_tasks_alike():
    frame = two_tasks()
    assert averages(frame).loc["threshold"].to_dict() == {0.5: (1 / 2 + 1 / 4) / 2, 0.9: (1 + 1 / 2) / 2}
    line = curve(frame, "threshold")
    assert line.tps == pytest.approx([((8 + 4) / 2 + 32) / 2, ((2 + 1) / 2 + 8) / 2])
    assert line.score == pytest.approx([0.375, 0.75]) and line.interpolate
    assert not curve(frame.assign(kind="confidence"), "confidence").interpolate
    with pytest.raises(ValueError, match="unknown kind"):
        curve(frame, "luck")


def test_paired_differences_by_hand():
    gap, error = paired(two_tasks(), ("threshold", 0.9), ("threshold", 0.5))
    gaps = [0, 1, 0, 1, 1, -1]
    assert gap == pytest.approx(np.mean(gaps)) and error == pytest.approx(np.std(gaps, ddof=1) / 6**0.5)
    assert paired(two_tasks(), ("threshold", 0.9), ("threshold", 0.5), ["a"]) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="at least two"):
        paired(two_tasks(), ("threshold", 0.9), ("threshold", 0.4))


def test_packing_and_unpacking_keep_every_figure():
    frame = pd.concat([two_tasks(), two_tasks().assign(kind="random", setting=2.0).head(2)], ignore_index=True)
    back = unpack(json.loads(json.dumps(pack(frame))))
    columns = ["kind", "setting", "task", "example", "score", "steps", "positions"]
    sort = columns[:4]
    pd.testing.assert_frame_equal(
        back[columns].sort_values(sort).reset_index(drop=True), frame[columns].sort_values(sort).reset_index(drop=True), check_dtype=False
    )


def test_halves_survive_packing():
    assert pack(frame_of({0.5: [0.5, 1]}, {0.5: [1, 1]}))["threshold 0.5"]["a"] == {
        "score": [0.5, 1],
        "steps": 1,
        "positions": 16,
    }


def test_compare_decodes_every_exercise_with_every_rule_on_its_canvas(model, words_of):
    tokenizer, _ = words_of
    examples = [e for e in exercises(tokenizer, 2) if e.task in ("list_copy", "arithmetic")]
    frame = compare(model, tokenizer, lambda n: dict(list(rules(n, ("confidence", "random")).items())[2:]), examples)
    counts = frame.groupby(["kind", "setting", "task"]).size()
    assert set(counts) == {2} and len(counts) == 2 * 8
    assert frame.groupby("task")["positions"].unique().map(list).to_dict() == {"arithmetic": [32], "list_copy": [16]}
    assert (frame["positions"] / frame["steps"] == frame["setting"]).all()
    assert set(frame["kind"]) == {"confidence", "random"}
    assert (frame["score"] == 0).all()  # the model is random


# infilling, against closed forms


COMMA, END, PAD_ID = 20, 21, 22


def written_with_commas(operation, n):
    "Distribution of the answers to a list 0, ..., n - 1 with a comma between entries and an end behind them; n is the new word."
    if operation == "shuffle":
        answers = list(permutations(range(n)))
    else:
        answers = [[n if j == i else j for j in range(n)] for i in range(n)]
    return Distribution.uniform([[*[t for x in answer for t in (x, COMMA)][:-1], END] for answer in answers])


TEMPLATE = {n: [*[t for _ in range(n) for t in (-1, COMMA)][:-1], END] for n in (4, 5)}


@pytest.mark.parametrize("operation", ["shuffle", "replace_random"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_an_ideal_denoiser_infills_as_the_formula_says(operation, k):
    n, rows = 4, 1500
    dist = written_with_commas(operation, n)
    model = IdealDenoiser(dist)
    torch.manual_seed(k)
    decoder = Infill(template=TEMPLATE[n], entries=k, remasking="random")
    out = decoder.generate(model, model.start.expand(rows, -1), max_new_tokens=2 * n, do_sample=True, top_k=0, eos_token_id=END)
    sizes = [min(k, n - i) for i in range(0, n, k)]
    left = [n - sum(sizes[:i]) for i in range(len(sizes))]
    shuffle = math.prod(math.perm(r, s) / r**s for r, s in zip(left, sizes))
    expected = shuffle if operation == "shuffle" else sampled_accuracy(n, k)
    right = float(model.possible(out.sequences).float().mean())
    assert abs(right - expected) <= 4 * math.sqrt(expected * (1 - expected) / rows) + 1e-9
    assert {len(passes) for passes in out.stats.emitted} == {1 + len(sizes)}  # the first step writes what is given


@dataclass
class Watched(Infill):
    "Keeps the canvas before each step."

    def select(self, step):
        self.__dict__.setdefault("seen", []).append(step.ids.clone())
        return super().select(step)


def test_what_is_given_stands_there_from_the_first_step_on_whatever_the_model_thinks(model):
    decoder = Watched(template=[-1, 500, -1, 501, -1, 502], entries=2)
    out = decoder.generate(model, torch.tensor([[30, 31], [32, 33]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [b.tolist() for b in decoder.seen[:2]] == [[[MASK] * 6] * 2, [[MASK, 500, MASK, 501, MASK, 502]] * 2]
    assert len(decoder.seen) == 3 and [(b == MASK).sum(1).tolist() for b in decoder.seen] == [[6, 6], [3, 3], [1, 1]]
    assert out.sequences[:, 3::2].tolist() == [[500, 501, 502]] * 2


@pytest.mark.parametrize(
    ("fields", "message"), [({"template": [5, 6]}, "marked -1"), ({}, "marked -1"), ({"template": [-1], "entries": 0}, "must be positive")]
)
def test_impossible_templates_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Infill(**fields)


def test_a_template_of_another_length_than_the_canvas_is_refused(model):
    with pytest.raises(ValueError, match="set max_new_tokens"):
        Infill(template=[-1, 5]).generate(model, torch.tensor([[20]]), max_new_tokens=4, do_sample=False)


def test_a_template_is_the_answer_without_its_entries(words_of):
    tokenizer, words = words_of
    example = lists(words, "insert_index", (3,), 1)[0]
    comma = tokenizer(" a, b", add_special_tokens=False).input_ids[1]
    assert list_template(tokenizer, example) == [-1, comma, -1, comma, -1, comma, -1, tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="one token each"):
        list_template(tokenizer, replace(example, answer="umbrella, zebra"))


# the first look, against sums by hand


class Told:
    "A masked model that says the same at every position: the distributions of the entries, punctuation ignored."

    dtype, device, training = torch.float32, torch.device("cpu"), False

    def __init__(self, p):
        self.p = p  # [n, vocab]
        self.config = SimpleNamespace(mask_token_id=MASK, model_type="told")

    def get_input_embeddings(self):
        return SimpleNamespace(num_embeddings=self.p.shape[1])

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        n = len(self.p)
        assert (input_ids[:, -2 * n :: 2] == MASK).all() and not (input_ids[:, -2 * n + 1 :: 2] == MASK).any()
        assert attention_mask[:, -2 * n :].all()
        logits = torch.zeros(*input_ids.shape, self.p.shape[1])
        logits[:, -2 * n :: 2] = self.p.clamp_min(1e-30).log()
        return MaskedLMOutput(logits=logits)

    __call__ = forward


def distributions_over(tokenizer, rows, vocab=4096):
    "Distributions [n, vocab] from one dictionary word -> probability an entry."
    p = torch.zeros(len(rows), vocab)
    for j, row in enumerate(rows):
        for word, share in row.items():
            p[j, tokenizer(f" {word}", add_special_tokens=False).input_ids[0]] = share
    return p


@pytest.mark.parametrize("n", [3, 4, 6])
def test_exact_marginals_give_the_closed_forms_of_one_step(words_of, n):
    tokenizer, words = words_of
    example = lists(words, "replace_random", (n,), 1)[0]
    items, word = example.meta["items"], example.meta["word"]
    seen = first_look(Told(distributions_over(tokenizer, [{x: 1 - 1 / n, word: 1 / n} for x in items])), tokenizer, [example]).iloc[0]
    assert seen["one step"] == pytest.approx((1 - 1 / n) ** (n - 1), rel=1e-5) and seen["new words"] == pytest.approx(1.0)
    assert seen["favourites"] == n and seen["any two alike"] == 0
    mixed = lists(words, "shuffle", (n,), 1)[0]
    seen = first_look(Told(distributions_over(tokenizer, [dict.fromkeys(mixed.meta["items"], 1 / n)] * n)), tokenizer, [mixed]).iloc[0]
    assert seen["one step"] == pytest.approx(math.factorial(n) / n**n, rel=1e-5)


def test_favourites_and_likeness_by_hand(words_of):
    tokenizer, words = words_of
    example = lists(words, "shuffle", (3,), 1)[0]
    a, b, c = example.meta["items"]
    p = [{a: 0.9, b: 0.1}, {a: 0.6, b: 0.2, c: 0.2}, {c: 0.7, a: 0.3}]
    seen = first_look(Told(distributions_over(tokenizer, p)), tokenizer, [example]).iloc[0]
    right = sum(p[0].get(x, 0) * p[1].get(y, 0) * p[2].get(z, 0) for x, y, z in permutations((a, b, c)))
    assert seen["one step"] == pytest.approx(right, rel=1e-5)
    assert (seen["favourites"], seen["most confident alike"], seen["any two alike"]) == (2, 0.0, pytest.approx(1 / 3))
    p[1], p[2] = {a: 0.8, b: 0.2}, {c: 0.7, a: 0.3}
    assert first_look(Told(distributions_over(tokenizer, p)), tokenizer, [example])["most confident alike"].item() == 1.0


# the trained model, the whole


def test_the_trained_model_copies_at_any_speed_and_cannot_shuffle_in_one_step(words_of):
    model, tokenizer = zoo("tasks-mdm")
    copy, shuffle = (lists(words_of[1], operation, (6,), 16) for operation in ("copy", "shuffle"))
    assert infilled(model, tokenizer, copy, (1, 6)) == {1: 1.0, 6: 1.0}
    assert infilled(model, tokenizer, shuffle, (1, 6), sample=False, remasking="low_confidence") == {1: 1.0, 6: 0.0}
    assert first_look(model, tokenizer, copy)["one step"].mean() > 0.98


def test_the_full_experiment_returns_figures_that_can_be_stored(monkeypatch):
    zoo("tasks-mdm")
    whole, made = strategies.rules, strategies.exercises
    few = lambda positions, kinds=(), most=16: {n: r for n, r in whole(positions, kinds, most).items() if n in ("confidence 4", "random 4")}  # noqa: E731
    monkeypatch.setattr(strategies, "rules", few)
    monkeypatch.setattr(strategies, "exercises", lambda tokenizer, n, seed: made(tokenizer, n, seed)[::5])
    found = json.loads(json.dumps(to_plain(experiment(1, 8, 5)), allow_nan=False))
    assert set(found) == {"per_task", "tasks", "infilled", "first look", "arithmetic", "lists of 6"}
    assert set(unpack(found["lists of 6"])["kind"]) == {"confidence", "random"}
    assert set(found["infilled"]["drawn"]["shuffle"]) == {"1", "2", "3", "6"}
    assert {op: list(by_n) for op, by_n in found["first look"].items()}["shuffle"] == ["4", "5", "6"]
