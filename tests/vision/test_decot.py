"""DeCoT: answers of models checked and replaced, ambiguities by rule, budgets kept, the loop and its fallbacks."""

import itertools
import json

import pytest

from decodelab.lab.tasks.canvas import Canvas, Cell, ToyGenerator, canonical, holds, judge, read, scene, tokens, toy_profile, toy_verifier
from decodelab.lab.tasks.stories import RuleParser, long_instruction
from decodelab.vision.decompose import DIMENSIONS, SCHEMAS, Decomposition, Unit, ask, check_json, decompose, dimension, resolve, sentences
from decodelab.vision.decot import Phrase, Profile, assertions, decot, fill, generate, integrate, phrases, truncate

EMPTY = {"units": [], "relations": [], "scene": [], "open": [], "dropped": []}
CAT, DRUM = {"id": "c", "name": "cat", "count": 1, "source": [0]}, {"id": "d", "name": "drum", "count": 1, "source": [0]}
LEFT = {"subject": "c", "predicate": "left of", "object": "d", "source": [0]}


def says(answer):
    return lambda role, payload: json.dumps(answer)


def words(n, **kwargs):
    return Profile(n, lambda text: len(text.split()), **kwargs)


# answers of models


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "answer must be object"),
        (EMPTY | {"units": [{"id": "c", "source": [0]}]}, r"answer.units\[0\] lacks 'name'"),
        (EMPTY | {"units": [CAT | {"count": 1.5}]}, r"units\[0\].count must be integer or null, got '1.5'"),
        (EMPTY | {"units": [CAT | {"count": True}]}, "count must be integer or null"),
        (EMPTY | {"units": [CAT | {"attributes": {"smell": "fishy"}}]}, "has an unknown 'smell'"),
        (EMPTY | {"units": [CAT | {"priority": 4}]}, r"priority must be one of \[1, 2, 3\]"),
        (EMPTY | {"units": [CAT | {"source": ["0"]}]}, r"source\[0\] must be integer"),
        ({"units": []}, "lacks 'relations'"),
    ],
)
def test_a_schema_names_what_is_wrong(value, message):
    with pytest.raises(ValueError, match=message):
        check_json(value, SCHEMAS["scene analyst"])


def test_a_second_answer_is_asked_for_with_the_error():
    seen, log = [], []

    def llm(role, payload):
        seen.append(payload.get("error"))
        return "{" if len(seen) == 1 else json.dumps(EMPTY)

    assert ask(llm, "gap finder", {}, log) == EMPTY
    assert seen[0] is None and "Expecting" in seen[1] and len(log) == 1
    for bad in ("no", "[]", "{}", "[" * 100_000):
        log, calls = [], []
        assert ask(lambda role, payload: calls.append(1) or bad, "gap finder", {}, log) is None  # noqa: B023
        assert len(calls) == 2 and "two invalid answers" in log[-1]


@pytest.mark.parametrize(
    "answer",
    [
        EMPTY | {"units": [CAT, CAT]},
        EMPTY | {"units": [CAT], "relations": [LEFT]},
        EMPTY | {"units": [CAT | {"source": [7]}]},
        EMPTY | {"units": [CAT | {"source": []}]},
        EMPTY | {"units": [CAT, DRUM], "relations": [LEFT, LEFT | {"predicate": "right of"}]},
        EMPTY | {"units": [CAT], "open": [{"type": "number", "field": "count", "unit": "x", "candidates": [3], "source": [0]}]},
        EMPTY | {"units": [CAT], "open": [{"type": "number", "field": "count", "unit": "c", "candidates": [], "source": [0]}]},
    ],
)
def test_what_a_schema_cannot_say_is_refused_too(answer):
    dec = decompose("A cat. A drum.", says(answer))
    assert not dec.valid and len(dec.log) == 3
    assert integrate(dec, words(3)).prompts == ("A cat. A",)


def test_a_cycle_through_three_things_is_refused():
    units = [CAT, DRUM, {"id": "k", "name": "key", "source": [1]}]
    two = [LEFT, {"subject": "d", "predicate": "left of", "object": "k", "source": [0]}]
    three = [*two, {"subject": "c", "predicate": "right of", "object": "k", "source": [0]}]
    assert decompose("One. Two.", says(EMPTY | {"units": units, "relations": two})).valid
    assert not decompose("One. Two.", says(EMPTY | {"units": units, "relations": three})).valid


def test_gaps_are_filled_in_a_bounded_number_of_rounds():
    asked = []

    def llm(role, payload):
        asked.append((role, payload.get("missed")))
        return json.dumps(EMPTY | {"units": [CAT]} if role == "scene analyst" else EMPTY | {"dropped": []})

    dec = decompose("A cat. A drum.", llm, rounds=2)
    assert asked == [("scene analyst", None), ("gap finder", [1]), ("gap finder", [1])] and len(dec.units) == 1

    def helpful(role, payload):
        found = {"units": [CAT]} if role == "scene analyst" else {"units": [DRUM | {"source": [1]}]}
        return json.dumps(EMPTY | found)

    assert [u.id for u in decompose("A cat. A drum.", helpful).units] == ["c", "d"]
    assert [u.id for u in decompose("A cat. A drum.", helpful, rounds=0).units] == ["c"]
    broken = decompose("A cat. A drum.", lambda role, payload: helpful(role, payload) if role == "scene analyst" else "no")
    assert broken.valid and [u.id for u in broken.units] == ["c"]


def test_sentences_keep_quoted_text_whole():
    text = 'A sign says "STOP. NOW". It rains! Why?'
    assert [text[a:b] for a, b in sentences(text)] == ['A sign says "STOP. NOW".', "It rains!", "Why?"]
    assert sentences("") == [] and decompose("", says(EMPTY)).units == ()


# ambiguities


def two(**attributes):
    return Unit("c", "cat", 1, attributes.get("c", {})), Unit("d", "drum", 1, attributes.get("d", {}))


def it(value, candidates=("d", "c"), field="colour"):
    return {"type": "coreference", "unit": None, "field": field, "value": value, "candidates": list(candidates), "source": [1]}


def test_the_reading_that_contradicts_nothing():
    done = resolve(Decomposition("", two(d={"colour": "red"}), open=(it("grey"),)))
    assert done.units[0].attributes == {"colour": "grey"} and done.choices[0]["rule"] == "contradicts nothing"
    unclear = resolve(Decomposition("", two(), open=(it("grey"),)))
    assert unclear.units[1].attributes == {"colour": "grey"} and unclear.choices[0]["rule"] == "first candidate"
    both = resolve(Decomposition("", two(c={"colour": "red"}, d={"colour": "red"}), open=(it("grey"),)))
    assert [u.attributes for u in both.units] == [{"colour": "red"}] * 2  # a stated fact is never overwritten


def test_answers_narrow_later_questions():
    "Whichever order the questions come in, the one with a single reading goes first."
    for items in itertools.permutations([it("grey"), it("black", ("d",))]):
        done = resolve(Decomposition("", two(), open=tuple(items)))
        assert [u.attributes["colour"] for u in done.units] == ["grey", "black"]


def test_a_model_may_choose_but_not_contradict():
    dec = Decomposition("", two(d={"colour": "red"}), open=(it("grey"),))
    for choice, confidence in (("d", 1.0), ("x", 1.0), ("c", 0.2)):
        answer = {"choices": [{"item": 0, "choice": choice, "confidence": confidence}], "added": []}
        done = resolve(dec, says(answer))
        assert done.units[0].attributes == {"colour": "grey"} and done.choices[0]["rule"] == "contradicts nothing"
    few = {"type": "number", "unit": "c", "field": "count", "candidates": [3, 2], "source": [0]}
    free = Decomposition("", two(), open=(few,))
    assert resolve(free).units[0].count == 3
    chosen = resolve(free, says({"choices": [{"item": 0, "choice": 2, "confidence": 0.9}], "added": []}))
    assert chosen.units[0].count == 2 and chosen.choices[0]["rule"] == "model"


def test_added_facts_are_few_marked_and_contradict_nothing():
    added = [{"unit": "c", "field": f, "value": "x"} for f in ("colour", "size", "texture", "pose")] + [
        {"unit": "?", "field": "pose", "value": "x"}
    ]
    done = resolve(Decomposition("", two(c={"colour": "red"})), says({"choices": [], "added": added}))
    assert done.units[0].attributes == {"colour": "red", "size": "x", "texture": "x"} and done.units[0].invented == ("size", "texture")
    assert len([line for line in done.log if "not added" in line]) == 3
    assert assertions(done)["texture", "cat", "x"] == 3 and assertions(done)["colour", "cat", "red"] == 1


# budget


def test_whole_words_within_the_budget():
    text = "one two three four"
    for n in range(1, 6):
        assert truncate(text, words(n)) == " ".join(text.split()[:n])
        assert truncate(text, words(n), end=True) == " ".join(text.split()[-n:])
    assert truncate("", words(3)) == "" and truncate("abc", Profile(1, len)) == ""


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("B", [16, 32, 64])
def test_the_budget_counts_the_generators_own_tokens(seed, B):
    truth, profile = scene(seed=seed), toy_profile(B)
    plan = integrate(truth, profile, front=[("nothing",)])
    assert profile.count(plan.prompts[0]) <= B
    assert set(plan.kept) | set(plan.cut) == set(assertions(truth)) and not set(plan.kept) & set(plan.cut)
    assert set(read(plan.prompts[0])) == set(plan.kept)  # what the plan says it keeps is what a reader finds
    first = {a for a, priority in assertions(truth).items() if priority == 1}
    assert len(first & set(plan.kept)) >= len(first & set(read(truncate(long_instruction(truth, seed=seed), profile))))


def test_all_fits_and_all_is_said():
    for seed in range(12):
        truth = scene(seed=seed)
        assert set(read(canonical(truth))) == set(assertions(truth))
        for u in truth.units:
            assert u.text is None or f'"{u.text}"' in canonical(truth)


def test_new_dimensions_then_cheap_phrases_then_shorter_forms():
    def phrase(text, *said, priority=1):
        return Phrase(((text, said),), priority)

    a, b, c = phrase("cat", ("exists", "cat")), phrase("drum", ("exists", "drum")), phrase("red light", ("light", "red"))
    assert fill([a, b, c], words(3))[0] == "cat. red light."  # a new dimension before the cheaper drum
    assert fill([phrase("x y z", ("exists", "x")), b], words(3))[0] == "drum."
    low = phrase("drum", ("exists", "drum"), priority=2)
    assert fill([low, phrase("x y z", ("exists", "x"))], words(3))[0] == "x y z."  # priority before cost
    long = Phrase((("one red cat", (("exists", "cat"), ("colour", "cat", "red"))), ("one cat", (("exists", "cat"),))), 1)
    assert fill([long], words(2)) == ("one cat.", (("exists", "cat"),))
    assert fill([a, phrase("wall", ("exists", "wall"), priority=0)], words(5))[0] == "wall. cat."
    sign = phrase('sign reading "A B C"', ("text", "A B C"))
    assert fill([sign], words(4)) == ("", ())


def test_short_and_clear_instructions_stay_as_they_are():
    dec = decompose("A cat. A drum.", says(EMPTY | {"units": [CAT, DRUM | {"source": [1]}]}))
    assert integrate(dec, words(4)).prompts == ("A cat. A drum.",) and integrate(dec, words(4)).mode == "unchanged"
    assert integrate(dec, words(3)).prompts != ("A cat. A drum.",)
    assert integrate(resolve(Decomposition("It is grey.", two(), open=(it("grey"),))), words(40)).mode == "single"


def test_a_hierarchy_draws_relations_when_both_ends_are_there():
    truth, profile = scene(objects=6, signs=1, seed=2), toy_profile(48, supports_edit=True, max_objects=2)
    plan = integrate(truth, profile)
    assert plan.mode == "hierarchical" and all(profile.count(p) <= 48 for p in plan.prompts)
    assert set(plan.kept) == {a for prompt in plan.prompts for a in read(prompt)}
    drawn = set()
    for prompt in plan.prompts:
        found = read(prompt)
        names = [p.forms[0][1][0][1] for p in phrases(truth) if p.forms[0][1][0][0] == "exists" and p.forms[0][0] in prompt]
        assert len(names) <= 2
        drawn |= set(names)
        assert all({a[1], a[3]} <= drawn for a in found if a[0] == "relation")


# the loop


def test_missing_facts_come_first_and_the_best_image_is_kept():
    dec, seen = Decomposition("", two()), []

    def t2i(prompt, seed, image):
        seen.append((prompt, seed))
        return seed

    answers = {0: [True, True, False, False], 1: [True, True, True, False], 2: [True, False, False, False]}
    out = generate(dec, words(40), t2i, lambda image, checklist: answers[image], R_max=2)
    assert out.image == 1 and out.calls == 3 and out.satisfied == 0.75
    assert [p for p, _ in seen[1:]] == ["one drum. one cat."] * 2 and [s for _, s in seen] == [0, 1, 2]
    done = generate(dec, words(40), t2i, lambda image, checklist: [True] * 4, R_max=2)
    assert done.calls == 1 and done.satisfied == 1


def test_failures_of_generator_and_verifier():
    def t2i(prompt, seed, image):
        if seed == 0:
            raise OSError("no memory")
        return seed

    dec = Decomposition("", two())
    out = generate(dec, words(40), t2i, lambda image, checklist: "yes", N_seed=3)
    assert out.image == 1 and out.satisfied == 0 and "no memory" in out.log[0] and "expected 4 booleans" in out.log[1]
    with pytest.raises(RuntimeError, match="drew no image: generator, seed 0: no memory"):
        generate(dec, words(40), t2i)
    for settings in ({"N_seed": 0}, {"R_max": -1}, {"N_seed": 2}, {"R_max": 1}):
        with pytest.raises(ValueError, match="needs a verifier"):
            generate(dec, words(40), t2i, **settings)
    with pytest.raises(ValueError, match="at least 1"):
        words(0)
    with pytest.raises(ValueError, match="mode must be"):
        integrate(dec, words(4), "both")


def test_an_edit_changes_the_best_image_only_where_something_is_missing():
    truth, profile = scene(objects=5, seed=4), toy_profile(48, supports_edit=True, max_objects=2)
    draw = ToyGenerator(48, 2)
    one = generate(truth, profile, draw, toy_verifier)
    more = generate(truth, profile, draw, toy_verifier, R_max=3)
    assert more.satisfied >= one.satisfied and more.calls >= one.calls


# the toy world


def test_a_perfect_generator_and_an_empty_canvas():
    for seed in range(8):
        truth = scene(seed=seed)
        image = ToyGenerator(10_000, 9, 0)(canonical(truth), seed)
        assert set(judge(image, truth).values()) == {5} and set(judge(Canvas(), truth).values()) == {1}
        assert all(holds(image, a) for a in assertions(truth))


def test_one_wrong_fact_lowers_only_its_dimension():
    truth = scene(objects=3, signs=1, seed=1)
    image = ToyGenerator(10_000, 9, 0)(canonical(truth), 0)
    name = truth.units[0].name
    for key in ("colour", "texture", "pose"):
        cells = {p: Cell(**(vars(c) | {key: "other"})) if c.shape == name else c for p, c in image.cells.items()}
        wrong = judge(Canvas(cells, image.scene), truth)
        assert wrong[key] < 5 and {d for d, s in wrong.items() if s < 5} == {key}
    for key in image.scene:
        wrong = judge(Canvas(image.cells, image.scene | {key: "other"}), truth)
        assert {d for d, s in wrong.items() if s < 5} == {dimension((key, ""))}
    assert set(judge(image, truth)) <= set(DIMENSIONS)


def test_the_rule_based_reader_inverts_the_stories():
    for seed in range(10):
        truth = scene(seed=seed)
        dec = decompose(long_instruction(truth, 0.5, False, seed), RuleParser())
        assert dec.valid and dec.open == () and assertions(dec).keys() == assertions(truth).keys()
        cited = {s for u in dec.units for s in u.source}
        assert cited and not cited & set(dec.dropped)
    with_errors = [decompose(long_instruction(scene(seed=s), seed=s), RuleParser(1.0, s)) for s in range(10)]
    assert any(assertions(resolve(d)).keys() != assertions(scene(seed=s)).keys() for s, d in enumerate(with_errors))


def test_more_sentences_that_show_nothing_change_nothing():
    truth = scene(seed=5)
    text = long_instruction(truth, 0, True, 5)
    noisy = "Hope is a strange thing, and so is waiting. " + text + " Some would have called it luck."
    a, b = (resolve(decompose(t, RuleParser())) for t in (text, noisy))
    assert assertions(a) == assertions(b)


def test_tokens_are_not_words():
    assert tokens('sign reading "AB".') == ["sign", "readin", "g", '"', "A", "B", '"', "."]
    with pytest.raises(ValueError, match="noise is a share"):
        long_instruction(scene(), noise=1)


def test_the_same_seed_draws_the_same_picture_and_errors_of_the_model_are_survived():
    truth, profile, draw = scene(seed=6), toy_profile(48), ToyGenerator(48)
    text = long_instruction(truth, seed=6)
    assert decot(text, RuleParser(), draw, profile).image == decot(text, RuleParser(), draw, profile).image
    assert decot(text, lambda role, payload: "no", draw, profile).image == draw(truncate(text, profile), 0, None)
