"""LocalLeap's experiments: delays, decay and the control of positions against their definitions; the experiment on a small scale."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import left_pad, random_prompts, small_model

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.localleap import LocalLeap, dilate
from decodelab.diffusion.step import top
from decodelab.experiments.diffusion import localleap
from decodelab.experiments.diffusion.localleap import PlacedExtras, arms, decay, delays, distance, principles, share
from decodelab.lab.provenance import to_plain
from decodelab.lab.tasks.catalogue import CountdownTask
from decodelab.lab.tasks.text import ListTask
from decodelab.lab.watch import watch

NOTHING = -float("inf")
pytestmark = pytest.mark.usefixtures("no_gradients")


LEVELS = [0.05, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1.0]


confidences = st.lists(st.one_of(st.none(), st.sampled_from(LEVELS)), min_size=1, max_size=14).filter(any)


@pytest.fixture(scope="module")
def model():
    "A random model whose confidences lie on both sides of both thresholds."
    return small_model(spread=0.7)


@pytest.fixture(scope="module")
def prompts():
    return left_pad(random_prompts(6, seed=3))


def leap(c, kappa, tau, w, cls=LocalLeap, **fields):
    "What the decoder commits in a step with these confidences, [rows, block], bool."
    c = torch.as_tensor(c, dtype=torch.float32)
    decoder = cls(threshold=kappa, relaxed_threshold=tau, radius=w, **fields)
    masked = c > NOTHING
    step = SimpleNamespace(confidence=c, masked=masked, best=lambda: top(c, torch.ones(len(c))))
    return decoder.select(step) & masked


def tensor(row):
    return torch.tensor([[NOTHING if x is None else x for x in row]])


@pytest.fixture(scope="module")
def log(model, prompts):
    return watch(LLaDA(16), model, **prompts, max_new_tokens=40, do_sample=False)  # the last block is shorter


def story(log):
    "Proposals by row and place: (pass, token), in order of steps; and the final tokens."
    seen = {}
    for i in range(len(log.row)):
        for j in range(log.tokens.shape[1]):
            if float(log.confidence[i, j]) > NOTHING:
                seen.setdefault((int(log.row[i]), int(log.position[i, j])), []).append((int(log.index[i]), int(log.tokens[i, j])))
    return seen, [t.tolist() for t in log.out.continuations]


def test_delays_by_the_definition(log):
    seen, texts = story(log)
    expected = {}
    for (row, place), proposals in seen.items():
        right = [token == texts[row][place] for _, token in proposals]
        commit = proposals[-1][0]
        stable = min(t for k, (t, _) in enumerate(proposals) if all(right[k:]))
        expected[row, place] = (commit, stable, commit - stable)
    found = delays(log)
    assert len(found["row"]) == len(expected) == 6 * 40
    for row, place, *facts in zip(*(found[k].tolist() for k in ("row", "position", "written", "stable", "delay"))):
        assert tuple(facts) == expected[row, place]
    assert found["delay"].max() > 3
    assert (found["delay"] == 0).any()


def test_decay_by_the_definition(log):
    c, right, counts = log.confidence.tolist(), log.consistent.tolist(), {}
    for i in range(len(c)):
        marks = [k for k, x in enumerate(c[i]) if x >= 0.7]
        for j, x in enumerate(c[i]):
            if x > NOTHING and marks and j not in marks:
                counts.setdefault(min(abs(j - k) for k in marks), []).append((int(log.row[i]), right[i][j]))
    curve = decay(log, 0.7, reach=6)
    assert [s.n for s in curve] == [len(counts.get(d, [])) for d in range(1, 7)]
    for d, s in enumerate(curve, 1):
        assert s.value == pytest.approx(np.mean([r for _, r in counts[d]]))
        assert s.texts == len({row for row, _ in counts[d]})


def test_principles_are_plain_numbers(log):
    found = principles(log, threshold=0.8)
    assert sum(found["delays"]) == 240
    assert len(found["decay"]) == len(found["shuffled"]) == 16
    c, right = log.confidence, log.consistent
    far, pool = distance(c >= 0.8), log.masked & (c < 0.8) & (c >= 0.8).any(-1, keepdim=True)
    shares = [float(right[pool & where].double().mean()) for where in (far <= 4, far > 8)]
    assert found["fall"]["as it is"]["value"] == pytest.approx(shares[0] - shares[1])
    waits = delays(log)
    late = [np.mean(waits["delay"][waits["row"] == row] > 0) for row in range(6)]
    assert found["share that waited"]["value"] == pytest.approx(np.mean(late))
    assert found["share that waited"]["error"] == pytest.approx(np.std(late, ddof=1) / 6**0.5)


def test_the_shuffled_control_is_the_mean_of_many_shuffles(log):
    rng = np.random.default_rng(0)
    c, right = log.confidence.numpy(), log.consistent.numpy()
    far = distance(log.confidence >= 0.9).numpy()
    counted = (c >= 0) & (c < 0.9) & (far > 0) & (far <= 5)
    runs = []
    for _ in range(400):
        shuffled = right.copy()
        for i in range(len(c)):
            shuffled[i, counted[i]] = rng.permutation(right[i, counted[i]])
        runs.append([shuffled[counted & (far == d)].mean() for d in range(1, 6)])
    found = [s.value for s in decay(log, reach=5, shuffled=True)]
    assert found == pytest.approx(np.mean(runs, 0), abs=4 * np.std(runs, 0).max() / 20)
    assert found != pytest.approx([s.value for s in decay(log, reach=5)], abs=0.01)


def test_errors_are_taken_over_texts():
    # three texts, all proposals of a text alike: what counts is three, not three hundred
    row = torch.tensor([0, 1, 2])
    chosen = torch.zeros(3, 100, dtype=torch.bool)
    fake = SimpleNamespace(row=row, masked=~chosen, consistent=chosen.clone(), out=SimpleNamespace(continuations=[None] * 3))
    fake.consistent[0] = True
    found = share(fake, ~chosen)
    assert (found.value, found.n, found.texts) == (pytest.approx(1 / 3), 300, 3)
    assert found.error == pytest.approx(np.std([1, 0, 0], ddof=1) / 3**0.5)
    half = torch.arange(100).expand(3, -1) < 50
    gap = share(fake, half) - share(fake, ~half)
    assert (gap.value, gap.error) == (0, 0)  # the two halves rise and fall together
    one = share(fake, ~chosen & (row == 0)[:, None])
    assert one.value == 1
    assert np.isnan(one.error)
    assert np.isnan(share(fake, chosen).value)


def test_no_mark_is_infinitely_far():
    assert int(distance(torch.zeros(2, 5, dtype=torch.bool)).min()) > 10**6


@settings(max_examples=300)
@given(row=confidences, w=st.integers(0, 3))
def test_both_sides_of_the_control_add_the_same_number_of_masked_positions_of_the_band(row, w):
    c = tensor(row)
    near, far = (leap(c, 0.9, 0.6, w, PlacedExtras, side=side) for side in ("near", "far"))
    plain = leap(c, 0.9, 0.9, 0)
    reached = dilate(c >= 0.9, w)
    assert int(near.sum()) == int(far.sum())
    for chosen, side in ((near & ~plain, reached), (far & ~plain, ~reached)):
        assert bool((side & (c >= 0.6) & (c < 0.9))[chosen].all())
        assert not bool((plain & ~(near & far)).any())
    full = leap(c, 0.9, 0.6, w)
    assert not bool((near & ~full).any())  # near is what LocalLeap commits, cut to what the other side has
    if int(near.sum()) > int(plain.sum()):
        left = side_of(c, reached) & ~near
        assert not bool(left.any()) or float(c[left].max()) <= float(c[near & ~plain].min())  # the most confident ones


def side_of(c, reached):
    return reached & (c >= 0.6) & (c < 0.9)


def test_the_control_does_something():
    c = [[0.95, 0.7, 0.65, 0.1, 0.8, 0.1, 0.61, 0.7]]
    assert leap(c, 0.9, 0.6, 2, PlacedExtras, side="near").nonzero()[:, 1].tolist() == [0, 1, 2]
    assert leap(c, 0.9, 0.6, 2, PlacedExtras, side="far").nonzero()[:, 1].tolist() == [0, 4, 7]
    with pytest.raises(ValueError, match="unknown side 'up'"):
        PlacedExtras(side="up")


def test_the_experiment_on_a_small_scale(monkeypatch):
    few = ("1 per step", "threshold 0.9", "localleap", "threshold 0.8", "extras near", "extras far", "kappa 0.95, tau 0.9")
    monkeypatch.setattr(localleap, "EXERCISES", (CountdownTask(2), ListTask("copy", 2)))
    monkeypatch.setattr(localleap, "BASELINES", few[:3])
    monkeypatch.setattr(localleap, "arms", lambda model: {name: d for name, d in arms(model).items() if name in few})
    try:
        found = to_plain(localleap.experiment(per_task=2, watched=2, prompts=2))
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the masked models of the zoo are not here: {error}")
    assert json.loads(json.dumps(found)) == found
    assert set(found["arms"]) == set(few)
    assert set(found["kinds"]) == {"the rest"}
    assert found["exercises"] == 4
    assert found["pairs"]["localleap / 1 per step"]["steps"] == pytest.approx(
        found["arms"]["localleap"]["steps"] / found["arms"]["1 per step"]["steps"]
    )
