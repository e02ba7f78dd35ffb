"""Markov kernels and what they say of drafters: identities to machine precision, closed forms against brute force, wrong versions that must fail."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decodelab.theory.kernels import (
    KINDS,
    Kernel,
    copy,
    discard,
    divergence,
    entropy,
    function,
    kernel_entropy,
    mutual_information,
    sampled_once,
    sampled_twice,
    swap,
)
from decodelab.theory.markov_categories import (
    Source,
    best_losses,
    coding,
    conditional_entropy,
    counted_entropy,
    counted_surplus,
    dirichlet_energy,
    head_metric,
    information,
    participation,
    random_source,
    segment,
    similarity,
    softmax,
    spectrum,
    surplus,
)

ORDERS = [*((kind, 0.5) for kind in KINDS if kind != "Renyi"), ("Renyi", 0.5), ("Renyi", 1.5), ("Renyi", 2.0)]
SEEDS = st.integers(0, 10_000)


def rows(rng, *shape, concentration=0.6):
    return rng.dirichlet(np.full(shape[-1], concentration), shape[:-1])


def same(a, b):
    assert np.abs(getattr(a, "matrix", a) - getattr(b, "matrix", b)).max() < 1e-12


# kernels


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_axioms(seed):
    rng = np.random.default_rng(seed)
    k, l, r, s = (Kernel(rows(rng, *shape)) for shape in ((3, 4), (4, 2), (2, 3), (3, 2)))
    one = lambda n: function(range(n), n)  # noqa: E731
    same(k.then(l).then(r), k.then(l.then(r)))
    same(one(3).then(k), k)
    same(k.then(one(4)), k)
    same(k.beside(r).then(l.beside(s)), k.then(l).beside(r.then(s)))
    same(k.then(discard(4)), discard(3))
    same(copy(3).then(swap(3, 3)), copy(3))
    same(copy(3).then(discard(3).beside(one(3))), one(3))
    same(copy(3).then(copy(3).beside(one(3))), copy(3).then(one(3).beside(copy(3))))
    same(copy(6), copy(2).beside(copy(3)).then(one(2).beside(swap(2, 3)).beside(one(3))))
    same(k.beside(l).then(swap(4, 2)), swap(3, 4).then(l.beside(k)))
    assert k.joint(rows(rng, 3)).sum() == pytest.approx(1)


def test_composition_by_hand():
    k, l = Kernel([[0.5, 0.5], [1, 0]]), Kernel([[0.2, 0.8], [0.6, 0.4]])
    same(k.then(l), np.array([[0.4, 0.6], [0.2, 0.8]]))
    assert k.push([0.25, 0.75]) == pytest.approx([0.875, 0.125])
    assert k.joint([0.25, 0.75]).tolist() == [[0.125, 0.125], [0.75, 0]]
    assert np.abs(k.then(l).matrix - l.then(k).matrix).max() > 0.1  # the order matters


def test_only_functions_commute_with_copying():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, m = rng.integers(1, 5, 2)
        assert function(rng.integers(0, m, n), m).commutes_with_copy()
        noisy = rows(rng, n, m, concentration=2.0)
        assert Kernel(noisy).commutes_with_copy() == bool((noisy.max(-1) > 1 - 1e-12).all())
    mixed = np.array([[1.0, 0.0], [0.0, 1.0], [0.999, 0.001]])
    assert not Kernel(mixed).commutes_with_copy()


# divergences and entropies


@pytest.mark.parametrize(("kind", "alpha"), ORDERS)
def test_data_processing(kind, alpha):
    rng = np.random.default_rng(1)
    p, q, k = rows(rng, 3000, 4, concentration=1), rows(rng, 3000, 4, concentration=1), rows(rng, 3000, 4, 3, concentration=1)
    before = divergence(p, q, kind, alpha)
    after = divergence(*(np.einsum("ni,nij->nj", x, k) for x in (p, q)), kind, alpha)
    assert (after <= before * (1 + 1e-12)).all() and (after < 0.99 * before).mean() > 0.9
    shuffled = rng.permutation(4)
    assert divergence(p[:, shuffled], q[:, shuffled], kind, alpha) == pytest.approx(before, rel=1e-10)
    assert (divergence(p, p, kind, alpha) == pytest.approx(0, abs=1e-12)) and (before > 0).all()


def test_squared_euclid_is_no_such_divergence():
    "Negative control: the check above must reject a distance without data processing."
    rng = np.random.default_rng(1)
    p, q = rows(rng, 3000, 6), rows(rng, 3000, 6)
    merged = [np.stack([x[:, :3].sum(1), x[:, 3:].sum(1)], 1) for x in (p, q)]
    assert (((merged[0] - merged[1]) ** 2).sum(1) > ((p - q) ** 2).sum(1)).any()


@pytest.mark.parametrize(("kind", "alpha"), ORDERS)
def test_closed_forms_by_brute_force(kind, alpha):
    rng = np.random.default_rng(2)
    p = rows(rng, 40, 5)
    p[:10, 1] = 0
    p /= p.sum(1, keepdims=True)
    brute = divergence(sampled_once(p), sampled_twice(p), kind, alpha)
    assert entropy(p, kind, alpha) == pytest.approx(brute, rel=1e-12)
    assert entropy(np.eye(3), kind, alpha) == pytest.approx(np.zeros(3), abs=1e-12)
    swapped = divergence(sampled_twice(p), sampled_once(p), kind, alpha)
    assert not np.allclose(swapped, brute) or kind in ("TV", "Hellinger", "JS") or (kind, alpha) == ("Renyi", 0.5)  # symmetric ones
    assert kind != "KL" or np.isinf(swapped).all()


def test_known_values():
    p = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    known = [1.213008, 0.65625, 0.866117, None, 3, 1.134997, 1.298614, 1.386294]
    for (kind, alpha), value in zip(ORDERS, known):
        assert value is None or float(entropy(p, kind, alpha)) == pytest.approx(value, abs=1e-6)
    assert float(entropy(p, "Renyi", 1 - 1e-7)) == pytest.approx(1.213008, abs=1e-5)


def test_divergences_by_hand():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]
    assert float(divergence(p, q)) == pytest.approx(0.5 * math.log(2))
    assert float(divergence(p, q, "TV")) == pytest.approx(0.25)
    assert float(divergence(p, q, "chi2")) == pytest.approx(0.5)
    assert float(divergence(p, q, "Renyi", 2.0)) == pytest.approx(math.log(1.5))
    for kind, alpha in (("KL", 0.5), ("chi2", 0.5), ("Renyi", 2.0)):
        assert np.isinf(divergence(q, p, kind, alpha))
    assert np.isfinite([divergence(q, p, kind) for kind in ("TV", "Hellinger", "JS", "Renyi")]).all()


def test_entropy_of_a_kernel():
    k = Kernel([[0.5, 0.5], [1.0, 0.0]])
    assert kernel_entropy(k, [0.25, 0.75]) == pytest.approx(0.25 * math.log(2))
    assert kernel_entropy(k) == pytest.approx(math.log(2))
    joint = k.joint([0.25, 0.75])
    assert kernel_entropy(k, [0.25, 0.75]) == pytest.approx(conditional_entropy(joint, (1,), (0,)), abs=1e-12)


def test_mutual_information():
    rng = np.random.default_rng(3)
    joint = rows(rng, 12).reshape(3, 4)
    assert mutual_information(joint) == pytest.approx(information(joint, (0,), (1,)), abs=1e-12)
    assert mutual_information(np.outer(joint.sum(1), joint.sum(0)), "TV") == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.eye(3) / 3) == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Kernel([[0.5, 0.6]]), "must sum to 1 along its last axis, it is off by 0.1"),
        (lambda: Kernel([[1.5, -0.5]]), "not negative"),
        (lambda: Kernel([[np.nan, 1.0]]), "finite numbers"),
        (lambda: Kernel([0.5, 0.5]), "is a matrix"),
        (lambda: Kernel(np.eye(2)).then(Kernel(np.eye(3))), "has 2 outputs, the later one 3 inputs"),
        (lambda: Kernel(np.eye(2)).push([1.0, 0.0, 0.0]), "shape \\(2,\\), got \\(3,\\)"),
        (lambda: function([0, 3], 3), "numbers from 0 to 2"),
        (lambda: divergence([1.0], [0.5, 0.5]), "p has 1 outcomes, q has 2"),
        (lambda: divergence([1.0], [1.0], "L2"), "kind must be one of KL"),
        (lambda: divergence([1.0], [1.0], "Renyi", 1.0), "alpha must be positive, finite and not 1"),
        (lambda: entropy([1.0], "Renyi", -0.5), "alpha must be positive"),
        (lambda: entropy([1.0], "Renyi", math.inf), "alpha must be positive"),
        (lambda: mutual_information([0.5, 0.5]), "is a matrix"),
        (lambda: Source([[0.5, 0.6], [0.5, 0.5]]), "sum to 1"),
        (lambda: Source(np.full((2, 3), 1 / 3)), "m \\+ 1 axes of one length"),
        (lambda: Source(np.eye(2)).joint(0), "K must be at least 1"),
        (lambda: random_source(1, 2, np.random.default_rng(0)).joint(2, [0]), "each of the 2 pasts, got 1"),
        (lambda: best_losses(np.full((2, 2), 0.25)), "K of at least 2, got 1"),
        (lambda: surplus(np.array([1.0])), "needs the hidden state"),
        (lambda: counted_entropy([0, 0]), "at least one positive"),
        (lambda: counted_surplus([[1, 2]]), "axes hidden state, first token, second token"),
        (lambda: coding([1.0], [[0.5, 0.5]], [1], [[0.5, 0.5]]), "one row a context"),
        (lambda: coding([1.0], [[0.5, 0.5]], [0], [[1.0]]), "one row a context"),
        (lambda: head_metric([0.5, 0.5], np.ones((3, 2))), "p has 2 tokens, the head 3"),
        (lambda: similarity([[1.0]], "cosine"), "kind must be Bhattacharyya"),
        (lambda: similarity([[1.0]], beta=0.0), "beta positive"),
        (lambda: spectrum(np.array([[1.0, 0.0], [1.0, 1.0]]), [0.5, 0.5]), "symmetric matrix over the 2 contexts"),
        (lambda: dirichlet_energy(np.ones((3, 2)), np.eye(2), [0.5, 0.5]), "one row for each of the 2 contexts, got shapes \\(3, 2\\)"),
        (lambda: dirichlet_energy(np.ones(2), np.ones((2, 3)), [0.5, 0.5]), "one row for each of the 2 contexts"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# sources and surplus


@given(order=st.integers(1, 3), seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_joint_distribution_by_enumeration(order, seed):
    source = random_source(order, 3, np.random.default_rng(seed))
    pi, joint = source.stationary(), source.joint(2)
    assert (pi[..., None] * source.table).sum(0) == pytest.approx(pi, abs=1e-10)
    for past in itertools.product(range(3), repeat=order):
        for a, b in itertools.product(range(3), repeat=2):
            then = (*past[1:], a)
            number = sum(t * 3 ** (order - 1 - i) for i, t in enumerate(past))
            assert joint[number, a, b] == pytest.approx(pi[past] * source.table[(*past, a)] * source.table[(*then, b)], abs=1e-12)


@given(order=st.integers(1, 3), seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_surplus(order, seed):
    source = random_source(order, 3, np.random.default_rng(seed))
    S = [surplus(source.joint(K)) for K in (1, 2, 3, 4)]
    for K, value in enumerate(S, 1):
        joint = source.joint(K)
        chain = information(joint, (0,), range(1, K + 1)) - information(joint, (0,), (1,))
        assert value == pytest.approx(chain, abs=1e-10)
        assert -1e-10 <= value <= (conditional_entropy(joint, range(2, K + 1), (1,)) if K > 1 else 0) + 1e-10
    assert all(b >= a - 1e-10 for a, b in itertools.pairwise(S))
    assert S[order - 1 :] == pytest.approx([S[order - 1]] * len(S[order - 1 :]), abs=1e-10)
    if order > 1:  # negative control: at K below m it still grows
        assert S[order - 1] > S[order - 2] + 1e-6


def test_surplus_by_brute_force():
    "The sum of p log p(h, w2 | w1) / (p(h | w1) p(w2 | w1)), term by term."
    joint, total = random_source(2, 3, np.random.default_rng(5)).joint(2), 0.0
    for h, a, b in itertools.product(range(9), range(3), range(3)):
        total += joint[h, a, b] * math.log(joint[h, a, b] * joint[:, a].sum() / (joint[h, a].sum() * joint[:, a, b].sum()))
    assert surplus(joint) == pytest.approx(total, abs=1e-12) and total > 0.1
    assert information(joint, (0,), (1,), (2,)) != pytest.approx(total, abs=1e-3)  # tokens swapped: another number


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_drafters(seed):
    rng = np.random.default_rng(seed)
    joint = random_source(2, 3, rng).joint(2)
    losses = best_losses(joint)
    assert losses["bigram"] - losses["feature and token"] == pytest.approx(surplus(joint), abs=1e-10)
    assert losses["parallel head"] - losses["feature and token"] == pytest.approx(information(joint, (1,), (2,), (0,)), abs=1e-10)
    target, seen = joint / joint.sum(2, keepdims=True), joint.sum(2)
    for _ in range(20):  # no drafter on hidden state and token is better
        q = rows(rng, *joint.shape)
        assert -(joint * np.log(q + 1e-300)).sum() >= losses["feature and token"] - 1e-10
    q = rows(rng, 3, 3, concentration=2.0)[None]
    excess = float(seen.ravel() @ divergence(target, np.broadcast_to(q, target.shape)).ravel())
    assert (seen * np.minimum(target, q).sum(2)).sum() >= 1 - math.sqrt(excess / 2) - 1e-12  # Pinsker


def test_a_coarser_encoder_knows_less():
    rng = np.random.default_rng(6)
    for _ in range(30):
        source = random_source(2, 3, rng)
        codes = [*range(3), *rng.integers(0, 3, 6)]
        for K in (1, 2, 3):
            future = range(1, K + 1)
            assert information(source.joint(K, codes), (0,), future) <= information(source.joint(K), (0,), future) + 1e-12
    assert source.joint(2, [0] * 9).shape == (1, 3, 3) and surplus(source.joint(2, [0] * 9)) == pytest.approx(0, abs=1e-12)


def test_sources_of_the_exercise():
    cycle = Source(np.eye(4)[[1, 2, 3, 0]])
    joint = cycle.joint(3)
    assert information(joint, (0,), (1,)) == pytest.approx(math.log(4)) and surplus(joint) == pytest.approx(0, abs=1e-12)
    coins = np.zeros((2, 2, 2))
    for h, a in itertools.product(range(2), repeat=2):
        coins[h, a, h] = 0.25
    assert information(coins, (0,), (1,)) == pytest.approx(0, abs=1e-12) and surplus(coins) == pytest.approx(math.log(2))


def test_counting():
    assert counted_entropy([2, 2], False) == pytest.approx(math.log(2))
    assert counted_entropy([2, 2]) == pytest.approx(math.log(2) + 1 / 8)
    assert counted_entropy([4, 0]) == pytest.approx(0)
    joint, rng = random_source(2, 3, np.random.default_rng(7)).joint(2), np.random.default_rng(8)
    assert counted_surplus(joint * 1e9, False) == pytest.approx(surplus(joint), abs=1e-9)
    draws = [rng.multinomial(1000, joint.ravel()).reshape(joint.shape) for _ in range(60)]
    raw, corrected = (np.mean([counted_surplus(c, how) for c in draws]) - surplus(joint) for how in (False, True))
    assert raw > 0.01 and abs(corrected) < 0.6 * raw


# coding


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_coding(seed):
    rng = np.random.default_rng(seed)
    mu, p, codes, head = rows(rng, 8), rows(rng, 8, 4), [0, *rng.integers(0, 3, 7)], rows(rng, 4, 4, concentration=2.0)
    parts = coding(mu, p, codes, head)
    brute = -sum(mu[x] * p[x, w] * math.log(head[codes[x], w]) for x in range(8) for w in range(4))
    assert parts["cross-entropy"] == pytest.approx(brute, abs=1e-10)
    assert sum([*parts.values()][1:]) == pytest.approx(brute, abs=1e-10) and min(parts.values()) >= -1e-12
    joint = mu[:, None] * p
    seen = np.stack([joint[np.array(codes) == c].sum(0) for c in range(4)])
    assert parts["lost by the encoder"] == pytest.approx(information(joint, (0,), (1,)) - information(seen, (0,), (1,)), abs=1e-10)
    finer = coding(mu, p, range(8), p)
    assert [finer["lost by the encoder"], finer["misfit of the head"]] == pytest.approx([0, 0], abs=1e-12)


# geometry


def test_the_metric_is_the_second_order_of_kl():
    rng = np.random.default_rng(9)
    G, h, v = rng.normal(size=(7, 3)), rng.normal(size=3), rng.normal(size=3)
    p = softmax(G @ h)
    g, sizes = head_metric(p, G), np.array([0.1, 0.03, 0.01])
    brute = sum(p[w] * np.outer(G[w] - p @ G, G[w] - p @ G) for w in range(7))
    assert g == pytest.approx(brute, abs=1e-12)

    def slope(metric):
        rest = [abs(float(divergence(softmax(G @ (h + s * v)), p)) - s**2 / 2 * v @ metric @ v) for s in sizes]
        return np.polyfit(np.log(sizes), np.log(rest), 1)[0]

    assert slope(g) == pytest.approx(3, abs=0.1)
    assert slope(1.1 * g) == pytest.approx(2, abs=0.3)  # negative control: a wrong metric leaves a second-order rest
    several = softmax(rng.normal(size=(5, 3)) @ G.T)
    assert head_metric(several, G) == pytest.approx(np.mean([head_metric(p, G) for p in several], 0), abs=1e-12)


@pytest.mark.parametrize(("d", "vocab", "rank"), [(3, 7, 3), (7, 3, 2), (4, 4, 3)])
def test_rank_of_the_metric(d, vocab, rank):
    rng = np.random.default_rng(10)
    G = rng.normal(size=(vocab, d))
    assert np.linalg.matrix_rank(head_metric(softmax(G @ rng.normal(size=d)), G), tol=1e-10) == rank


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_segments(seed):
    rng = np.random.default_rng(seed)
    G, a, b = rng.normal(size=(6, 3)), rng.normal(size=3), rng.normal(size=3)
    found = segment(G, a, b)
    assert found["integral"] == pytest.approx(found["Jeffreys"], rel=1e-5)
    assert found["Fisher-Rao"] <= found["length"] + 1e-6 and found["length"] ** 2 <= found["integral"] + 1e-9
    middle = head_metric(softmax(G @ (a + b) / 2), G)
    assert segment(G, a, b, 1)["integral"] == pytest.approx((b - a) @ middle @ (b - a))


def test_similarity_and_its_spectrum():
    rng = np.random.default_rng(11)
    p, mu = rows(rng, 9, 4), rows(rng, 9, concentration=3.0)
    for kind in ("Bhattacharyya", "linear", "Hellinger"):
        K = similarity(p, kind, 0.7)
        values = spectrum(K, mu)
        assert values.min() > -1e-12 and (np.diff(values) <= 0).all()
        assert values.sum() == pytest.approx(mu @ np.diag(K))
    assert similarity(p)[0, 1] == pytest.approx(sum(math.sqrt(a * b) for a, b in zip(p[0], p[1])))
    one = float(divergence(p[0], p[1]) + divergence(p[1], p[0]))
    assert similarity(p, "Jeffreys", 0.5)[0, 1] == pytest.approx(math.exp(-0.5 * one))
    same_context = similarity(np.repeat(p[:2], 3, 0))
    assert spectrum(same_context, np.full(6, 1 / 6))[2:] == pytest.approx(np.zeros(4), abs=1e-12)
    assert participation([1, 1, 0]) == 2 and participation([5, 0]) == 1


def test_the_kernel_of_jeffreys_may_have_a_negative_eigenvalue():
    "Three contexts, two tokens; the paper calls every spectrum non-negative."
    x, beta = [0.001, 0.1, 0.5], 0.1
    far = lambda a, b: (a - b) * (math.log(a / (1 - a)) - math.log(b / (1 - b)))  # noqa: E731
    a, b, c = (math.exp(-beta * far(x[i], x[j])) for i, j in ((0, 1), (0, 2), (1, 2)))
    determinant = 1 + 2 * a * b * c - a * a - b * b - c * c
    assert determinant < -1e-3
    assert math.sqrt(far(x[0], x[2])) > math.sqrt(far(x[0], x[1])) + math.sqrt(far(x[1], x[2])) + 0.2  # why
    p, mu = np.array([[v, 1 - v] for v in x]), np.full(3, 1 / 3)
    values = spectrum(similarity(p, "Jeffreys", beta), mu)
    assert np.prod(3 * values) == pytest.approx(determinant, abs=1e-12) and values[-1] < -1e-3 and values[1] > 0
    js = np.exp(-beta * divergence(p[:, None], p[None], "JS"))
    others = [similarity(p, "Bhattacharyya"), similarity(p, "linear"), similarity(p, "Hellinger", beta), js]
    assert min(spectrum(K, mu)[-1] for K in others) > -1e-12


@given(seed=SEEDS, kind=st.sampled_from(["Bhattacharyya", "linear", "Hellinger", "Jeffreys"]))
@settings(max_examples=25, deadline=None)
def test_dirichlet_energy(seed, kind):
    rng = np.random.default_rng(seed)
    p, mu, phi = rows(rng, 7, 4), rows(rng, 7, concentration=2.0), rng.normal(size=(7, 3))
    K = similarity(p, kind, 0.7)
    brute = [
        sum(mu[x] * mu[y] * K[x, y] * (phi[x, k] - phi[y, k]) ** 2 for x, y in itertools.product(range(7), repeat=2)) / 2 for k in range(3)
    ]
    assert dirichlet_energy(phi, K, mu) == pytest.approx(brute, abs=1e-12)
    assert dirichlet_energy(phi[:, 0], K, mu) == pytest.approx(brute[:1], abs=1e-12)
    assert dirichlet_energy(phi + 5, K, mu) == pytest.approx(brute, abs=1e-10)
    assert dirichlet_energy(np.full(7, 3.0), K, mu) == pytest.approx([0], abs=1e-12)  # a collapsed encoder
    variance = mu @ phi**2 - (mu @ phi) ** 2
    assert dirichlet_energy(phi, np.ones((7, 7)), mu) == pytest.approx(variance, abs=1e-12)  # all contexts alike: the variance


def energy_share(h, G, K, mu):
    # mean energy over variance of the hidden states along the two top directions of the average metric
    top = np.linalg.eigh(head_metric(softmax(h @ G.T), G))[1][:, -2:]
    phi = h @ top
    return float((dirichlet_energy(phi, K, mu) / phi.var(0)).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_lowers_the_dirichlet_energy(seed):
    "NLL on four kinds of context: hidden states vary less between similar contexts than before, and than random functions do."
    rng = np.random.default_rng(seed)
    kinds = rng.dirichlet(np.full(12, 0.3), 4)
    p = 0.9 * kinds[np.arange(40) % 4] + 0.1 * rng.dirichlet(np.ones(12), 40)
    mu, K = np.full(40, 1 / 40), similarity(p)
    h, G = (torch.tensor(rng.normal(size=shape), requires_grad=True) for shape in ((40, 3), (12, 3)))
    numbers = lambda: (h.detach().numpy().copy(), G.detach().numpy().copy())  # noqa: E731
    before, nll = energy_share(*numbers(), K, mu), []
    optimiser = torch.optim.Adam([h, G], 0.05)
    with torch.enable_grad():
        for _ in range(300):
            optimiser.zero_grad()
            loss = -(torch.tensor(p) * (h @ G.T).log_softmax(-1)).sum(-1).mean()
            loss.backward()
            optimiser.step()
            nll.append(loss.item())
    after = energy_share(*numbers(), K, mu)
    random = rng.normal(size=(40, 200))
    shares = dirichlet_energy(random, K, mu) / random.var(0)
    assert nll[-1] < nll[0] - 0.5
    assert after < before and after < shares.min()
