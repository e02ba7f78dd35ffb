"""Scaling laws of drafters: fits against known curves, counting and acceptance by enumeration, the roofline by force."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from decodelab.core.verify_curve import VerifyCurve
from decodelab.lab.cost import predict_speedup
from decodelab.theory.scylla import (
    SHAPES,
    Fit,
    Machine,
    Plan,
    Planner,
    best_widths,
    chain_acceptance,
    chain_tokens,
    extrapolation,
    fit,
    resampled_tau,
    saturated,
    shapes_by_aic,
    slope_interval,
    speedups,
    tau_of,
    weighted_line,
)

X = np.geomspace(1e4, 1e6, 6)
KNOWN = {
    "line": {"slope": 0.4, "intercept": -0.1},
    "power": {"tau_max": 3.0, "c": 30.0, "r": 0.3},
    "logistic": {"height": 3.0, "middle": 5.2, "steepness": 3.0},
}


# counting


def test_tau_is_all_tokens_over_all_forwards():
    counts = [[[10, 5], [12, 10]], [[9, 3], [9, 9]]]
    assert tau_of(counts) == pytest.approx([22 / 15, 18 / 12])
    assert tau_of(counts, bonus=False) == pytest.approx([7 / 15, 6 / 12])
    assert tau_of(counts)[0] != pytest.approx((10 / 5 + 12 / 10) / 2)  # not the mean over prompts
    with pytest.raises(ValueError, match="at least one forward"):
        tau_of([[0, 0]])


def test_resampling_draws_the_same_prompts_at_every_point():
    rng = np.random.default_rng(1)
    forwards = rng.integers(5, 20, (12, 1))
    counts = np.stack([np.concatenate([k * forwards + rng.integers(0, 9, (12, 1)), forwards], 1) for k in (1, 1, 3)])
    counts[1] = counts[0]
    again = resampled_tau(counts, 500)
    assert again.shape == (500, 3)
    assert np.array_equal(again[:, 0], again[:, 1]) and again[:, 0].std() > 0
    assert again.mean(0) == pytest.approx(tau_of(counts), abs=0.05)
    by_hand = [tau_of(counts[0][pick]) for pick in rng.integers(0, 12, (4000, 12))]
    assert resampled_tau(counts[0], 4000).std() == pytest.approx(np.std(by_hand), rel=0.1)


def test_no_spread_where_all_prompts_are_alike():
    assert resampled_tau([[[8, 4]] * 5] * 3, 50) == pytest.approx(np.full((50, 3), 2.0))


# fits


def test_the_line_worked_by_hand():
    found = fit([1e4, 1e5, 1e6], [1.5, 2.0, 2.3])
    assert found.slope == pytest.approx(0.4)
    assert found.parameters["intercept"] == pytest.approx(5.8 / 3 - 2)
    assert found.residuals == pytest.approx([-1 / 30, 1 / 15, -1 / 30])
    assert found.r2 == pytest.approx(1 - (6 / 900) / (0.98 / 3))
    assert found(1e7) == pytest.approx(5.8 / 3 + 0.8)


@given(
    slope=st.floats(-2, 2),
    intercept=st.floats(-3, 3),
    us=st.lists(st.floats(0, 9), min_size=3, max_size=8, unique=True),
    seed=st.integers(0, 99),
)
def test_a_known_slope_is_found_under_any_weights(slope, intercept, us, seed):
    assume(np.ptp(us) > 0.5 and len({10.0**u for u in us}) > 2)
    error = np.random.default_rng(seed).uniform(0.01, 1, len(us))
    found = fit(10.0 ** np.array(us), slope * np.array(us) + intercept, error)
    assert found.slope == pytest.approx(slope, abs=1e-8)
    assert found.parameters["intercept"] == pytest.approx(intercept, abs=1e-7)
    assert found.residuals == pytest.approx(np.zeros(len(us)), abs=1e-8)


@given(seed=st.integers(0, 200), n=st.integers(3, 9))
def test_weighted_squares_are_least(seed, n):
    "Against numpy's polynomial fit, and against moving the line."
    rng = np.random.default_rng(seed)
    x, tau, error = 10 ** rng.uniform(3, 7, n), rng.uniform(1, 5, n), rng.uniform(0.01, 0.5, n)
    found = fit(x, tau, error)
    assert list(found.parameters.values()) == pytest.approx(np.polyfit(np.log10(x), tau, 1, w=1 / error), rel=1e-6, abs=1e-8)
    least = ((found.residuals / error) ** 2).sum()
    assert found.aic == pytest.approx(least + 4)
    for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        moved = tau - (found.slope + a) * np.log10(x) - found.parameters["intercept"] - b
        assert ((moved / error) ** 2).sum() > least


def test_many_lines_at_once():
    rng = np.random.default_rng(0)
    u, tau, weights = np.arange(4.0), rng.normal(size=(7, 4)), rng.uniform(1, 2, 4)
    slopes, intercepts = weighted_line(u, tau, weights)
    each = [weighted_line(u, row, weights) for row in tau]
    assert slopes == pytest.approx([s for s, _ in each]) and intercepts == pytest.approx([b for _, b in each])


@pytest.mark.parametrize("kind", list(SHAPES))
def test_each_shape_finds_its_own_numbers_and_wins(kind):
    tau = SHAPES[kind](np.log10(X), **KNOWN[kind])
    found = fit(X, tau, np.full(len(X), 0.01), kind)
    assert found.parameters == pytest.approx(KNOWN[kind], rel=1e-3)
    assert found.r2 == pytest.approx(1, abs=1e-6) and found(X) == pytest.approx(tau, abs=1e-4)
    ranked = shapes_by_aic(X, tau, np.full(len(X), 0.01))
    assert next(iter(ranked)) == kind
    assert [f.aic for f in ranked.values()] == sorted(f.aic for f in ranked.values())


def test_akaike_without_errors():
    tau = [1.5, 2.0, 2.3, 3.0]
    found = fit([1e3, 1e4, 1e5, 1e6], tau)
    assert found.aic == pytest.approx(4 * math.log((found.residuals**2).sum() / 4) + 6)


def test_r2_of_a_constant_is_not_a_number():
    assert math.isnan(fit(X, np.full(len(X), 5.0)).r2)
    assert fit(X, np.full(len(X), 5.0)).slope == pytest.approx(0, abs=1e-12)


def test_interval_covers_the_slope():
    "240 made experiments: a 95 % interval of 24 prompts covers 85 to 99 of 100 times."
    rng, hits, slope = np.random.default_rng(3), 0, 0.3
    for _ in range(240):
        forwards = rng.integers(20, 40, (1, 24))
        luck = rng.normal(0, 0.3, (1, 24))  # of a prompt, at every x
        mean = 1.2 + slope * (np.log10(X[:4]) - 4)[:, None] + luck
        tokens = forwards * (mean + rng.normal(0, 0.1, (4, 24)))
        value, low, high = slope_interval(X[:4], np.stack([tokens, np.broadcast_to(forwards, tokens.shape)], -1))
        hits += low < slope < high
        assert low < value < high
    assert 0.85 < hits / 240 < 0.99


def test_extrapolation():
    line = SHAPES["line"](np.log10(X), **KNOWN["line"])
    assert extrapolation(X, line) == pytest.approx(0, abs=1e-12)
    bent = SHAPES["power"](np.log10(X), **KNOWN["power"])
    assert extrapolation(X, bent) > extrapolation(X, bent, first=5) > 0  # a line promises more than a curve that bends keeps
    assert extrapolation(X, bent, np.full(6, 0.1), 4) == pytest.approx(np.polyval(np.polyfit(np.log10(X[:4]), bent[:4], 1), 6) - bent[-1])


def test_saturation():
    assert saturated([4.89, 4.9, 5.0], 4).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("x", "tau", "more", "message"),
    [
        ([1, 10], [1.0, 2.0], {}, "at least 3 points with different x, got 2"),
        ([1, 10, 10], [1.0, 2.0, 2.0], {}, "got 2"),
        ([1, 10, 100], [1.0, 2.0], {}, "lists of one length"),
        ([0, 10, 100], [1.0, 2.0, 3.0], {}, "x and error positive"),
        ([1, 10, 100], [1.0, np.nan, 3.0], {}, "finite"),
        ([1, 10, 100], [1.0, 2.0, 3.0], {"error": [0.1, 0.0, 0.1]}, "x and error positive"),
        ([1, 10, 100], [1.0, 2.0, 3.0], {"kind": "cubic"}, "kind must be one of line, power, logistic"),
    ],
)
def test_what_cannot_be_fitted(x, tau, more, message):
    with pytest.raises(ValueError, match=message):
        fit(x, tau, **more)


@pytest.mark.parametrize("first", [None, 2, 3])
def test_what_cannot_be_extrapolated(first):
    with pytest.raises(ValueError, match="at least 3 points and predicts another"):
        extrapolation([1, 10, 100], [1.0, 2.0, 3.0], first=first)


# acceptance


@given(alpha=st.floats(0, 1), g=st.integers(0, 7))
def test_tokens_of_a_chain_by_enumeration(alpha, g):
    "Every pattern of accepted and rejected draft tokens, with its probability."
    total = 0.0
    for pattern in itertools.product((True, False), repeat=g):
        accepted = next((i for i, ok in enumerate(pattern) if not ok), g)
        total += math.prod(alpha if ok else 1 - alpha for ok in pattern) * (accepted + 1)
    assert float(chain_tokens(alpha, g + 1)) == pytest.approx(total, rel=1e-9)


@given(alpha=st.floats(0, 1), g=st.integers(1, 10))
def test_acceptance_of_a_chain(alpha, g):
    tau = float(chain_tokens(alpha, g + 1))
    assert chain_acceptance(min(max(tau, 1.0), g + 1.0), g) == pytest.approx(alpha, abs=1e-6)


def test_what_no_chain_can_do():
    with pytest.raises(ValueError, match="bonus token"):
        chain_acceptance(0.9, 4)
    with pytest.raises(ValueError, match="between 1 and 5"):
        chain_acceptance(5.1, 4)
    with pytest.raises(ValueError, match="alpha must lie"):
        chain_tokens(1.1, 2)
    with pytest.raises(ValueError, match="width be at least 1"):
        chain_tokens(0.5, [1, 0])


# the machine

TIMES = {"t_mem": st.floats(0, 50), "t_tok": st.floats(0.05, 5), "t_0": st.floats(0, 20), "d": st.floats(0, 20)}
WIDTHS = np.arange(1, 33)


def drafting(d):
    return lambda B, W: (W - 1) * d


def test_speedups_by_force():
    machine, tau = Machine(10.0, 0.7, 1.5), [1.0, 1.8, 2.5]
    S = speedups(machine, tau, (1, 3, 20), (1, 2, 5), lambda B, W: 0.1 * B * (W - 1))
    for i, B in enumerate((1, 3, 20)):
        for j, W in enumerate((1, 2, 5)):
            plain, verify = (max(10.0, n * 0.7) + 1.5 for n in (B, B * W))
            assert S[i, j] == pytest.approx(tau[j] * plain / (verify + 0.1 * B * (W - 1)))
    assert machine.critical_tokens == pytest.approx(10 / 0.7)


@given(**TIMES, alpha=st.floats(0.01, 0.99), B=st.integers(1, 200))
def test_one_maximum_over_the_width(t_mem, t_tok, t_0, d, alpha, B):
    S = speedups(Machine(t_mem, t_tok, t_0), chain_tokens(alpha, WIDTHS), [B], WIDTHS, drafting(d))[0]
    steps = np.diff(S)
    falls = np.flatnonzero(steps < -1e-9)
    assert not len(falls) or (steps[falls[0] :] < 1e-9).all()


@given(**TIMES, alpha=st.floats(0.01, 0.99))
def test_best_width_never_grows_with_the_batch(t_mem, t_tok, t_0, d, alpha):
    batches = list(range(1, 60))
    S = speedups(Machine(t_mem, t_tok, t_0), chain_tokens(alpha, WIDTHS), batches, WIDTHS, drafting(d))
    best = best_widths(S, WIDTHS)
    for b in range(len(batches) - 1):  # up to ties
        assert best[b + 1] <= best[b] or S[b + 1, best[b + 1] - 1] - S[b + 1, best[b] - 1] < 1e-9


@given(t_mem=st.floats(1, 50), t_tok=st.floats(0.05, 5), alpha=st.floats(0.01, 0.99), B=st.integers(1, 40))
def test_two_regimes_without_overhead(t_mem, t_tok, alpha, B):
    "Below the critical tokens verification is free and S is tau; where plain decoding fills the machine, speculation loses."
    machine, tau = Machine(t_mem, t_tok), chain_tokens(alpha, WIDTHS)
    free = machine.critical_tokens >= B * WIDTHS
    S = speedups(machine, tau, [B], WIDTHS)[0]
    assert S[free] == pytest.approx(tau[free])
    full = math.ceil(machine.critical_tokens)
    assert (speedups(machine, tau, [full], WIDTHS, drafting(0.01))[0, 1:] < 1).all()


def test_optimum_of_a_logarithmic_tau():
    "Where computing dominates: tau'(W) (W B t_tok + t_0 + t_draft) = tau(W) B t_tok at the best W."
    W, c1, c2, B, t_tok, t_0, spent = np.arange(1.0, 40, 0.001), 0.8, 1.0, 4, 1.0, 30.0, 5.0
    S = speedups(Machine(0.0, t_tok, t_0), c1 * np.log(W) + c2, [B], W, lambda B, W: spent)
    best = float(best_widths(S, W)[0])
    assert 1 < best < 39
    assert c1 / best * (best * B * t_tok + t_0 + spent) == pytest.approx((c1 * np.log(best) + c2) * B * t_tok, rel=1e-3)


def test_a_measured_curve_in_place_of_the_roofline():
    curve = VerifyCurve([1, 4, 8], [1.0, 1.5, 3.0])
    S = speedups(curve, [1.0, 2.0], [1, 2], [1, 4])
    assert S[0] == pytest.approx([1, 2 / 1.5])
    assert S[1, 1] == pytest.approx(2 * float(curve.seconds(2)) / 3.0)


def test_no_speculation_is_width_one_and_the_smaller_of_equals_is_taken():
    assert best_widths(np.array([[1.0, 0.9], [1.0, 1.1], [1.0, 1.0]]), [1, 4]).tolist() == [1, 4, 1]


@pytest.mark.parametrize("times", [(-1, 1, 0), (1, 0, 0), (1, 1, -1), (1, math.nan, 0)])
def test_no_such_machine(times):
    with pytest.raises(ValueError, match="t_tok positive"):
        Machine(*times)


def test_no_such_batch():
    with pytest.raises(ValueError, match="at least 1"):
        speedups(Machine(1, 1), 1.0, [0], [1])
    with pytest.raises(ValueError, match="at least 1"):
        speedups(Machine(1, 1), 1.0, [1], [1, 0])


# the planner


@pytest.fixture
def planner():
    data, depth = fit([1e4, 1e5, 1e6], [1.5, 2.0, 2.5]), fit([1, 2, 4], [2.0, 2.2, 2.4])
    return Planner(data, depth, 2, 4, Machine(10.0, 1.0, 0.5), lambda layers, batch: 0.2 * layers + 0.01 * batch)


def test_a_plan_by_hand(planner):
    "2.5 from the data, 0.2 more from depth; the same width as measured."
    found = planner.predict(Plan(1e6, 4, width=5, batch=3))
    assert found.tau == pytest.approx(2.7) and found.accepted == pytest.approx(1.7) and not found.saturated
    assert found.speedup == pytest.approx(2.7 * 10.5 / (15.5 + 4 * 0.83))


def test_a_plan_of_another_width_against_the_laboratory(planner):
    tau = 2.0  # at 1e5 tokens and 2 layers
    alpha = next(a for a in np.linspace(0, 1, 100_001) if sum(a**i for i in range(5)) >= tau)
    found = planner.predict(Plan(1e5, 2, width=8))
    curve = {n: (max(10.0, n) + 0.5) / 10.5 for n in range(1, 20)}
    other = predict_speedup(float(alpha), 0.41 / 10.5, curve, draft_length=7)
    assert found.tau == pytest.approx(other.tokens_per_round, rel=1e-3)
    assert found.speedup == pytest.approx(other.speedup, rel=1e-3)


def test_the_best_plan(planner):
    plans = [Plan(n, D, W, B) for n in (1e4, 1e6) for D in (1, 8) for W in (1, 3, 6) for B in (1, 12)]
    every = [planner.predict(p) for p in plans]
    assert planner.best(plans).speedup == max(p.speedup for p in every) > 1
    assert len({p.speedup for p in every}) > 12
    assert all(p.speedup == pytest.approx(1) and p.tau == 1 for p in every if p.plan.width == 1)
    with pytest.raises(ValueError, match="no plan"):
        planner.best([])
    assert planner.best(plan for plan in plans).plan == planner.best(plans).plan


def test_impossible_plans_and_measurements_are_refused(planner):
    for bad in ((0, 2), (1e6, 0), (-5, 2), (np.nan, 2)):
        with pytest.raises(ValueError, match="training tokens and layers must be positive"):
            Plan(*bad)
    for bad in ({"width": 2.5}, {"width": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="width and batch must be whole numbers of at least 1"):
            Plan(1e6, 2, **bad)
    with pytest.raises(ValueError, match="g must be a whole number"):
        replace(planner, g=0)
    for seconds in (np.nan, -1.0, np.inf):
        with pytest.raises(ValueError, match="draft_seconds must give a time of at least 0"):
            replace(planner, draft_seconds=lambda layers, batch, seconds=seconds: seconds).best([Plan(1e6, 1), Plan(1e6, 2)])


def test_plans_beyond_the_lines(planner):
    assert planner.predict(Plan(1e12, 2)).saturated and planner.predict(Plan(1e12, 2)).tau == pytest.approx(5)
    assert planner.predict(Plan(1.0, 1)).tau == pytest.approx(1)


def test_a_fit_is_a_function():
    made = Fit("line", {"slope": 2.0, "intercept": 1.0}, np.zeros(3), 1.0, 0.0)
    assert made([10, 100]) == pytest.approx([3, 5])
