"""DeCoT's measurements: arms within the budget, scores by hand, a verifier that errs, resampled means."""

import json

import numpy as np
import pytest

from decodelab.experiments.vision.decot import (
    ARMS,
    experiment,
    interval,
    kept_of,
    mean_score,
    prompts_of,
    resampled,
    scores_of,
    uncertain_verifier,
)
from decodelab.lab.tasks.canvas import Canvas, canonical, judge, scene, toy_profile
from decodelab.lab.tasks.stories import RuleParser, long_instruction
from decodelab.vision.decompose import DIMENSIONS, decompose, resolve


def test_every_arm_keeps_the_budget():
    for seed in range(4):
        truth = scene(seed=seed)
        prompts = prompts_of(truth, long_instruction(truth, seed=seed), 32)
        assert tuple(prompts) == ARMS and max(map(toy_profile().count, prompts.values())) <= 32
        assert prompts["reference"] == canonical(truth, 32)


def test_scores_of_a_prompt():
    truth = scene(objects=3, signs=0, seed=1)
    found = scores_of(canonical(truth), truth, range(2), 1000)
    assert found[DIMENSIONS.index("text")] is None and len(found) == 9
    nothing = scores_of("", truth, range(1), 48)
    assert nothing[DIMENSIONS.index("object")] == 1 == judge(Canvas(), truth)["object"]
    assert mean_score([[1, None, 3], [5, 5, 5]]).tolist() == [2, 5]


def test_a_verifier_that_errs():
    checklist = [("exists", "cat"), ("light", "warm")] * 200
    image = Canvas(scene={"light": "warm"})
    right = [False, True] * 200
    assert uncertain_verifier(0.0)(image, checklist) == right
    assert uncertain_verifier(1.0)(image, checklist) == [not yes for yes in right]
    share = np.mean(np.array(uncertain_verifier(0.3)(image, checklist)) != right)
    assert 0.2 < share < 0.4


def test_what_is_kept():
    text = long_instruction(scene(seed=2), seed=2)
    dec = resolve(decompose(text, RuleParser()))
    assert kept_of(dec, text, 1000)[0] == 1 and kept_of(dec, text, 1)[:3] == [0, 0, 0]


def test_resampled_means():
    values = np.array([[0.0, 1.0], [2.0, np.nan]])
    again = resampled(np.repeat(values, 50, axis=0))
    assert again.shape == (2000, 2) and again[:, 0].mean() == pytest.approx(1, abs=0.02) and (again[:, 1] == 1).all()
    low, high = interval(again[:, 0])
    assert low < 1 < high


def test_a_small_run_can_be_stored_and_made_again():
    found = experiment(2, pictures=1)
    assert np.array(found["arms"], dtype=float).shape == (2, len(ARMS) * len(DIMENSIONS)) and np.array(found["noise"]).shape == (2, 2, 4)
    assert (
        np.array(found["kept"]).shape == (2, 4 * 3)
        and found["over"] == [0, 0]
        and len(found["loop names"]) == np.array(found["loops"]).shape[1] == 5
    )
    assert json.dumps(found) == json.dumps(experiment(2, pictures=1))
