"""Recursive speculative decoding: draws without replacement, stochastic beam search, and that no tree changes the distribution of the text."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from toys import random_prompts

from decodelab.core.warp import draw
from decodelab.experiments.speculative.rsd import two_level_trees
from decodelab.lab.table_model import chi_square, random_table, table_model, two_token_statistic
from decodelab.speculative.acceptance import RecursiveRejection, exact_rejection, residual
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.model_drafter import example_drafter
from decodelab.speculative.rsd import RSDC, RSDS, condition_maximum, draw_siblings, gumbel, keep_best, sbs_scores
from decodelab.speculative.sampled_tree import IIDChains

LIMIT = 1e-3  # an honest test fails once in a thousand seeds; the seeds are fixed


def p_value(counts, probs):
    "Of the chi-square test of counts against probabilities; 0 when a cell of probability zero was seen."
    return float(chi2.sf(chi_square(counts, probs), int((probs > 0).sum()) - 1))


def cells(tokens, vocab):
    "Counts of the ordered tuples in the rows of `tokens`."
    index = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        index = index * vocab + column
    return torch.bincount(index, minlength=vocab ** tokens.shape[1])


def plackett_luce(q, k):
    "Distribution of the first k draws without replacement, [vocab, ..., vocab]."
    probs = torch.zeros([len(q)] * k, dtype=torch.double)
    for order in itertools.permutations(range(len(q)), k):
        left, chance = 1.0, 1.0
        for x in order:
            chance, left = chance * float(q[x]) / left, left - float(q[x])
        probs[order] = chance
    return probs


# Gumbel top-k


def test_siblings_come_in_the_order_of_successive_draws():
    torch.manual_seed(0)
    q = torch.tensor([0.45, 0.3, 0.2, 0.05])
    drawn = draw_siblings(q.expand(200_000, -1), 3)
    probs = plackett_luce(q, 3)
    assert float(probs.sum()) == pytest.approx(1)
    assert p_value(cells(drawn, 4), probs) > LIMIT
    # negative controls
    for wrong in (drawn.sort(-1).values, drawn.flip(-1), q.multinomial(600_000, replacement=True).view(-1, 3)):
        assert p_value(cells(wrong, 4), probs) < 1e-9


@settings(max_examples=100)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.1, 1.0, 5.0]), min_size=1, max_size=6).filter(any),
    k=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_siblings_are_different_and_of_positive_probability(weights, k, seed):
    q = torch.tensor(weights) / sum(weights)
    drawn = draw_siblings(q.expand(5, -1), k, torch.Generator().manual_seed(seed))
    support = int((q > 0).sum())
    assert drawn.shape == (5, min(k, len(q)))
    for row in drawn.tolist():
        tokens = [t for t in row if t >= 0]
        assert len(tokens) == len(set(tokens)) == min(k, support)
        assert row[len(tokens) :] == [-1] * (len(row) - len(tokens))  # what is missing stands at the end
        assert all(q[t] > 0 for t in tokens)


def test_the_generator_is_the_only_source_of_randomness():
    q = torch.rand(3, 10).softmax(-1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = (draw_siblings(q, 4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert one.equal(two)
    assert torch.get_rng_state().equal(state)
    assert not draw_siblings(q, 4, torch.Generator().manual_seed(8)).equal(one)


# the conditional maximum


def test_the_conditional_maximum_by_hand():
    phi = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = condition_maximum(phi + torch.tensor([0.2, 1.1, -0.3, 2.0]), torch.tensor(0.0))
    assert found.tolist() == pytest.approx([-0.423889, 0, -2.184870, -0.954409], abs=1e-5)


@settings(max_examples=200)
@given(g=st.lists(st.floats(-6, 6), min_size=1, max_size=6, unique=True), top=st.floats(-5, 5))
def test_the_stable_form_is_the_formula(g, top):
    g, top = torch.tensor(g, dtype=torch.double), torch.tensor(top, dtype=torch.double)
    naive = -torch.log(torch.exp(-top) - torch.exp(-g.max()) + torch.exp(-g))
    assert torch.allclose(condition_maximum(g, top), naive, atol=1e-6)


@settings(max_examples=200)
@given(g=st.lists(st.one_of(st.floats(-1e6, 100), st.just(-float("inf"))), min_size=1, max_size=8), top=st.floats(-1e3, 1e3))
def test_the_maximum_is_the_given_one_and_the_order_stays(g, top):
    if all(x == -float("inf") for x in g):
        g = [*g, 0.0]
    g, top = torch.tensor(g, dtype=torch.double), torch.tensor(top, dtype=torch.double)
    found = condition_maximum(g, top)
    assert not found.isnan().any()
    assert float(found[g.argmax()]) == float(top)
    assert found.isneginf().equal(g.isneginf())
    order = g.argsort()
    assert bool((found[order].diff().nan_to_num(0) >= 0).all())


def test_nodes_that_are_not_to_be_expanded_have_no_children():
    q = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]])
    _, scores = sbs_scores(q, torch.zeros(1, 2), torch.tensor([[-torch.inf, -1.0]]))
    best, up, _ = keep_best(scores, 5)
    assert up.tolist() == [[1, 1, 1, -1, -1]]
    assert float(best[0, 0]) == -1.0


# stochastic beam search


START = torch.tensor([0.5, 0.3, 0.2])
NEXT = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])


def beam(rows, width, condition=True):
    phi = top = torch.zeros(rows, 1)
    phi, scores = sbs_scores(START.expand(rows, 1, 3), phi, top)
    top, _, first = keep_best(scores, width)
    phi, scores = sbs_scores(NEXT[first], phi[:, 0].gather(1, first), top)
    if not condition:
        scores = phi + gumbel(phi)
    _, up, second = keep_best(scores, width)
    return first, first.gather(1, up) * 3 + second


def test_survivors_are_sequences_drawn_without_replacement():
    torch.manual_seed(0)
    probs = plackett_luce((START[:, None] * NEXT).flatten(), 2)
    first, pairs = beam(200_000, 2)
    assert p_value(torch.bincount(first[:, 0], minlength=3), START) > LIMIT
    assert p_value(cells(pairs, 9), probs) > LIMIT
    sets = (probs + probs.T).triu()
    assert p_value(cells(pairs.sort(-1).values, 9), sets) > LIMIT
    assert p_value(cells(beam(200_000, 2, condition=False)[1], 9), probs) < 1e-9  # negative control


def test_a_beam_of_one_is_ancestral_sampling():
    torch.manual_seed(0)
    _, sequences = beam(200_000, 1)
    assert p_value(torch.bincount(sequences[:, 0], minlength=9), START[:, None] * NEXT) > LIMIT


def test_scores_never_exceed_those_of_the_parent():
    torch.manual_seed(0)
    q = torch.rand(50, 3, 20).softmax(-1)
    top = torch.randn(50, 3)
    _, scores = sbs_scores(q, torch.randn(50, 3), top)
    assert scores.amax(-1).equal(top)


# the joint distribution on tables


def tables():
    noise = torch.Generator().manual_seed(3)
    return random_table(4, 1.5, noise), table_model(random_table(4, 1.5, noise))


def test_two_tokens_of_every_tree():
    probs, drafter = tables()
    torch.manual_seed(0)
    for name, decoder in two_level_trees(drafter).items():
        assert chi2.sf(two_token_statistic(decoder, probs, 4000), 15) > LIMIT, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_tokens_of_every_tree_with_many_rows(seed):
    probs, drafter = tables()
    torch.manual_seed(seed)
    for name, decoder in two_level_trees(drafter).items():
        assert chi2.sf(two_token_statistic(decoder, probs, 60_000), 15) > LIMIT, name


class Reversed(RSDC):
    "Siblings are tested in reversed order."

    def branch(self, q, alive, level, sample, memory):
        return [t.view(*q.shape[:2], -1).flip(-1).flatten(1) for t in super().branch(q, alive, level, sample, memory)]


class Sorted(RSDC):
    "Siblings are tested from the most to the least probable one."

    def branch(self, q, alive, level, sample, memory):
        tokens, up = (t.view(*q.shape[:2], -1) for t in super().branch(q, alive, level, sample, memory))
        order = q.gather(-1, tokens).argsort(-1, descending=True)
        return [t.gather(-1, order).flatten(1) for t in (tokens, up)]


class WithReplacement(RSDC):
    "Siblings drawn without replacement, tested as if they had been drawn with it."

    rule = property(lambda self: RecursiveRejection(replacement=True))


class BestAsDrawn(RSDC):
    "The best siblings, tested as if they had been drawn."

    def branch(self, q, alive, level, sample, memory):
        return super().branch(q, alive, level, False, memory)


class KSeqUnmerged(IIDChains):
    "Chains are merged, but a token that several chains drew is tested once."

    def candidates(self, rows, memory):
        return None


def keeps_mass(p, candidates, q):
    "Recursive rejection that does not renormalise q after a rejection."
    which = torch.full((len(p),), -1)
    for k, x in enumerate(candidates.unbind(1)):
        there, x = (which < 0) & (x >= 0), x.clamp_min(0)[:, None]
        accept = torch.rand(len(p)) * q.gather(1, x)[:, 0] < p.gather(1, x)[:, 0]
        which = torch.where(there & accept, k, which)
        rejected = (there & ~accept)[:, None]
        p, q = torch.where(rejected, residual(p, q), p), torch.where(rejected, q.scatter(1, x, 0.0), q)
    return torch.cat([draw(p)[:, None], candidates], 1).gather(1, which[:, None] + 1)[:, 0], which


class KeepsMass(RSDC):
    rule = property(lambda self: keeps_mass)


@pytest.mark.parametrize("cls", [Reversed, Sorted, WithReplacement, BestAsDrawn, KeepsMass])
def test_broken_trees_are_rejected(cls):
    probs, drafter = tables()
    torch.manual_seed(0)
    assert chi2.sf(two_token_statistic(cls(drafter, (3, 2)), probs, 10_000), 15) < 1e-6


def test_a_merged_token_must_be_tested_as_often_as_it_was_drawn():
    probs, drafter = tables()
    torch.manual_seed(0)
    assert chi2.sf(two_token_statistic(KSeqUnmerged(drafter, 3, 2), probs, 10_000), 15) < 1e-6


def test_support_exhausted_means_accepted():
    probs, drafter = tables()
    out = RSDC(drafter, (4, 4)).generate(table_model(probs), torch.ones(50, 1).long(), max_new_tokens=3, do_sample=True, top_k=0)
    assert out.stats.emitted == [[3]] * 50


def test_one_sibling_accepts_as_exactly_enumerated():
    probs, drafter = tables()
    torch.manual_seed(0)
    other = random_table_of(drafter)
    for decoder, k, again in (
        (RSDC(drafter, (2,)), 2, False),
        (IIDChains(drafter, 2, 1, "recursive"), 2, True),
        (RSDS(drafter, 3, 1), 3, False),
    ):
        out = decoder.generate(table_model(probs), torch.ones(4000, 1).long(), max_new_tokens=2, do_sample=True, top_k=0)
        rate = sum(row[0] == 2 for row in out.stats.emitted) / 4000
        exact = exact_rejection(probs[1].double(), other[1].double(), k, again)[1]
        assert rate == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5)


@torch.no_grad()
def random_table_of(model):
    return torch.cat([model(torch.tensor([[t]])).logits[0].softmax(-1) for t in range(4)])


# reductions


def accepted_counts(decoder, probs, rows=4000):
    out = decoder.generate(table_model(probs), torch.ones(rows, 1).long(), max_new_tokens=4, do_sample=True, top_k=0)
    return torch.bincount(torch.tensor([row[0] - 1 for row in out.stats.emitted]), minlength=4)


def test_trees_of_width_one_are_chains():
    probs, drafter = tables()
    overlap, here, exact = torch.minimum(probs, random_table_of(drafter)), torch.eye(4)[1], []
    for _ in range(3):
        exact.append(float(here.sum() - (here @ overlap).sum()))
        here = here @ overlap
    exact = torch.tensor([*exact, float(here.sum())])
    torch.manual_seed(0)
    for decoder in (DraftModel(drafter, 3), RSDC(drafter, (1, 1, 1)), RSDS(drafter, 1, 3), IIDChains(drafter, 1, 3)):
        assert p_value(accepted_counts(decoder, probs), exact) > LIMIT
    assert p_value(accepted_counts(RSDC(drafter, (2, 1, 1)), probs), exact) < 1e-9  # negative control


@pytest.mark.parametrize("make", [lambda d: RSDC(d, ()), lambda d: RSDS(d, 2, 0), lambda d: IIDChains(d, 2, 0)])
def test_depth_zero_is_plain_sampling(make, llama):
    prompt = random_prompts(1, seed=1)[0]
    decoder = make(example_drafter(llama))
    torch.manual_seed(3)
    out = decoder.generate(llama, prompt, max_new_tokens=12, do_sample=True)
    assert set(out.stats.emitted[0]) == {1}
    assert out.stats.drafted == 0


# shapes


class Watched:
    "Keeps the drafts of a decoder."

    def draft(self, call, roots):
        draft = super().draft(call, roots)
        self.seen = [*getattr(self, "seen", []), draft]
        return draft


class WatchedC(Watched, RSDC):
    pass


class WatchedS(Watched, RSDS):
    pass


class WatchedI(Watched, IIDChains):
    pass


def drafts(cls, llama, *shape, rows=3, **kwargs):
    decoder = cls(example_drafter(llama), *shape)
    prompts = torch.cat([random_prompts(1, lengths=(4, 4), seed=s)[0] for s in range(rows)])
    decoder.generate(llama, prompts, **({"max_new_tokens": 12, "do_sample": True} | kwargs))
    return decoder.seen


def test_constant_branching_has_its_shape(llama):
    first = drafts(WatchedC, llama, (3, 2))[0]
    assert first.tree.parents.tolist() == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert first.probs.shape == (3, 10, 97)
    assert bool((first.probs[:, 4:] == 0).all())
    for row in range(3):
        for children in first.tree.children_of(row):
            tokens = first.tokens[row, children].tolist()
            assert len(set(tokens)) == len(tokens)


def test_a_beam_has_its_width_at_every_level(llama):
    for draft in drafts(WatchedS, llama, 4, 3)[:2]:
        depth = draft.tree.depth if draft.tree.depth.ndim == 2 else draft.tree.depth[None].expand(3, -1)
        for row in depth:
            assert torch.bincount(row).tolist() == [1, 4, 4, 4]
        for row in range(3):
            texts = {(parent, int(draft.tokens[row, c])) for parent, below in enumerate(draft.tree.children_of(row)) for c in below}
            assert len(texts) == 12


def test_a_small_support_leaves_nodes_out(llama):
    for draft in drafts(WatchedS, llama, 5, 2, top_k=2)[:1]:
        assert [len(draft.tree.children_of(row)[0]) for row in range(3)] == [2, 2, 2]
        assert sum(draft.lengths) == 3 * (2 + 4)
    for draft in drafts(WatchedC, llama, (3, 3), top_k=2)[:1]:
        assert sum(draft.lengths) == 3 * (2 + 4)


def test_the_last_rounds_are_shallower(llama):
    for draft in drafts(WatchedC, llama, (2, 2, 2), rows=1, max_new_tokens=3)[:1]:
        assert int(draft.tree.depth.max()) == 2


def test_an_eos_token_has_no_children(llama):
    end = list(range(2, 97, 2))  # half of the vocabulary ends the text
    found = 0
    for cls, shape in ((WatchedC, (3, 2)), (WatchedS, (4, 2)), (WatchedI, (4, 2))):
        for draft in drafts(cls, llama, *([shape] if cls is WatchedC else shape), eos_token_id=end, pad_token_id=0):
            for row, tokens in enumerate(draft.tokens.tolist()):
                for node, below in enumerate(draft.drafted(row)):
                    if node and tokens[node] in end:
                        found += 1
                        assert below == []
    assert found


def test_merged_chains_are_tested_with_multiplicity(llama):
    repeated = 0
    for draft in drafts(WatchedI, llama, 4, 3, temperature=0.3):
        for row in range(len(draft.tokens)):
            candidates, seen = draft.drafted(row), draft.tree.children_of(row)
            for node, below in enumerate(candidates):
                assert set(below) == set(seen[node])
                tokens = draft.tokens[row, sorted(set(below))].tolist()
                assert len(set(tokens)) == len(tokens)
                repeated += len(below) - len(set(below))
            assert len(candidates[0]) == (4 if draft.tokens.shape[1] > 1 else 0)  # the last round has no remaining length for a draft
    assert repeated


# greedy


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    tree=st.one_of(
        st.lists(st.integers(1, 4), max_size=3).map(lambda b: lambda d: RSDC(d, b)),
        st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda s: lambda d: RSDS(d, *s)),
        st.tuples(st.integers(1, 3), st.integers(0, 4)).map(lambda s: lambda d: IIDChains(d, *s)),
    ),
)
def test_no_tree_and_no_seed_changes_the_greedy_text(llama, seed, tree):
    prompt = random_prompts(1, lengths=(1, 8), seed=seed)[0]
    torch.manual_seed(seed)
    out = tree(example_drafter(llama)).generate(llama, prompt, max_new_tokens=16, do_sample=False)
    assert out.sequences.equal(llama.generate(prompt, max_new_tokens=16, do_sample=False))


def test_greedy_uses_no_randomness_and_the_best_siblings(llama):
    state = torch.get_rng_state()
    first = drafts(WatchedC, llama, (3,), rows=1, do_sample=False)[0]
    assert torch.get_rng_state().equal(state) or first.probs is None
    assert first.probs is None
    again = drafts(WatchedC, llama, (3,), rows=1, do_sample=False)[0]
    assert first.tokens.equal(again.tokens)


# fields


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RSDC(None, (2, 0)), r"b must list whole numbers of at least 1, one a level, such as \(2, 1, 1\); got \(2, 0\)"),
        (lambda: RSDC(None, 3), "RSDC: b must be a list such as .2, 1. or 'auto', got 3"),
        (lambda: RSDC(None, (1.5,)), "RSDC: b must be a list such as .2, 1. or 'auto', got "),
        (lambda: RSDS(None, W=0), "W must be at least 1, got 0"),
        (lambda: RSDS(None, L=-1), "L must be at least 0, or .auto., got -1"),
        (lambda: IIDChains(None, K=0), "K must be at least 1 and L at least 0, got 0 and 3"),
        (lambda: IIDChains(None, L=-2), "K must be at least 1 and L at least 0, got 2 and -2"),
        (lambda: IIDChains(None, test="best"), "test must be one of 'kseq', 'recursive', got 'best'"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
