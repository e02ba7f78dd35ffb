"""ADED: the table of trigrams, the search, the draft trees and every draft of a decoding, against plain versions written from the paper."""

import copy
import itertools
import math
import random
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toys import EOS, VOCAB, left_pad, random_prompts, small_model
from transformers import LogitsProcessor, LogitsProcessorList

from decodelab.speculative import aded
from decodelab.speculative.aded import (
    ADED,
    Node,
    best_first,
    fit_budget,
    most_visited,
    search,
)
from decodelab.speculative.trigram_table import TrigramTable

# Weights and adaptation steps are multiples of 1/4096 wherever a reference is compared: all sums are exact, in whatever order.

token = st.integers(0, 3)
weight = st.one_of(st.integers(1, 12).map(lambda n: n / 4), st.integers(1, 12288).map(lambda n: n / 4096))  # up to the cap of 3
pairs = st.tuples(token, token)
tables = st.dictionaries(pairs, st.dictionaries(token, weight, min_size=1, max_size=4), max_size=16)
rich = st.dictionaries(pairs, st.dictionaries(token, weight, min_size=1, max_size=4), min_size=8, max_size=16)


def table_of(R, branching=None):
    table = TrigramTable(branching=branching)
    table.weights = copy.deepcopy(R)
    return table


def random_weights(seed, vocab=4, share=0.8):
    "A random table on `share` of the pairs."
    rng = random.Random(seed)
    return {
        pair: {w: rng.randint(1, 12288) / 4096 for w in rng.sample(range(vocab), rng.randint(1, min(vocab, 5)))}
        for pair in itertools.product(range(vocab), repeat=2)
        if rng.random() < share
    }


def heaviest(row, n=None):
    "Successors, heaviest first, among equals the smaller token first."
    return sorted(row, key=lambda w: (-row[w], w))[:n]


# the table


@settings(max_examples=50)
@given(texts=st.lists(st.lists(token, max_size=12), max_size=4))
def test_count(texts):
    table = TrigramTable.count(texts)
    expected = {}
    for u, v in itertools.product(range(4), repeat=2):
        after = [t[i + 2] for t in texts for i in range(len(t) - 2) if t[i : i + 2] == [u, v]]
        if after:
            expected[u, v] = {w: after.count(w) / len(after) for w in after}
    assert table.weights == expected
    assert len(table) == sum(map(len, expected.values()))
    assert repr(table) == f"TrigramTable({len(expected)} pairs, {len(table)} successors)"


def test_documents_may_be_tensors():
    ids = torch.tensor([[1, 2, 3, 1, 2, 3], [1, 2, 1, 2, 1, 2]])
    assert TrigramTable.count(ids).weights == TrigramTable.count(ids.tolist()).weights
    assert TrigramTable.count(ids).weights[1, 2] == {3: 0.5, 1: 0.5}


@settings(max_examples=50)
@given(R=tables, kp=st.integers(1, 5))
def test_prune(R, kp):
    table = table_of(R)
    pruned = table.prune(kp)
    assert pruned.weights == {pair: {w: row[w] for w in heaviest(row, kp)} for pair, row in R.items()}
    for pair in R:
        pruned.adapt([*pair, 0], 0.5, 3.0)
    assert table.weights == R  # though short rows are shared


def test_prune_keeps_the_smaller_of_equals():
    table = table_of({(0, 0): {7: 0.25, 3: 0.25, 5: 0.25, 1: 0.125, 9: 0.5}})
    assert set(table.prune(3).weights[0, 0]) == {9, 3, 5}


@settings(max_examples=40)
@given(old=tables, middle=tables, new=tables, kp=st.integers(1, 4))
def test_a_table_knows_what_its_ancestors_know(old, middle, new, kp):
    table = None
    for R in (old, middle, new):
        table = TrigramTable(table)
        table.weights = copy.deepcopy(R)
    known = old | middle | new
    for pair in itertools.product(range(4), repeat=2):
        row = table.row(pair)
        assert (row and dict(zip(row.tokens, row.weights))) == known.get(pair)
    assert table.prune(kp).weights == table_of(known).prune(kp).weights
    assert [table.parent.parent.weights, table.parent.weights, table.weights] == [old, middle, new]


@settings(max_examples=50)
@given(R=tables, branching=st.one_of(st.none(), st.integers(1, 5)))
def test_rows(R, branching):
    table = table_of(R, branching)
    for pair in itertools.product(range(4), repeat=2):
        row = table.row(pair)
        if pair not in R:
            assert row is None
            continue
        assert row.tokens == heaviest(R[pair], branching)
        assert row.weights == [R[pair][w] for w in row.tokens]
        assert row.cumulative == [sum(row.weights[: i + 1]) for i in range(len(row.tokens))]
        assert row.again == R[pair].get(pair[1], 0.0)
        assert table.row(pair) is row  # sorted once


def test_a_row_without_successors_is_none():
    table = TrigramTable(table_of({(1, 1): {}}))
    table.weights[2, 2] = {}
    assert table.row((1, 1)) is table.row((2, 2)) is None
    assert search(table, (1, 1)) is None


def learnt(R, text, eta, cap):
    "R after every trigram of the text has gained eta."
    R = copy.deepcopy(R)
    for i in range(len(text) - 2):
        row = R.setdefault((text[i], text[i + 1]), {})
        row[text[i + 2]] = min(cap, row.get(text[i + 2], 0.0) + eta)
    return R


def check_adapt(cls, R, texts, eta, cap):
    "The table, and every row that is read from it, is R with the texts learnt; its parent stays R."
    table = cls(table_of(R))
    sofar = R
    for text in texts:
        for pair in itertools.product(range(4), repeat=2):
            table.row(pair)  # now all rows are cached
        table.adapt(text, eta, cap)
        sofar = learnt(sofar, text, eta, cap)
        touched = {(u, v) for t in texts[: texts.index(text) + 1] for u, v in zip(t, t[1:-1])}
        assert set(table.weights) == touched
        for pair in itertools.product(range(4), repeat=2):
            row = table.row(pair)
            assert (row and dict(zip(row.tokens, row.weights))) == sofar.get(pair)
            assert row is None or row.tokens == heaviest(sofar[pair])
    assert table.parent.weights == R


adaptations = {
    "R": tables,
    "texts": st.lists(st.lists(token, max_size=8), max_size=3, unique_by=tuple),
    "eta": st.sampled_from([1 / 32, 0.5, 2.0]),
    "cap": st.sampled_from([0.75, 3.0]),
}


@settings(max_examples=60)
@given(**adaptations)
def test_adapt(R, texts, eta, cap):
    check_adapt(TrigramTable, R, texts, eta, cap)


class Uncapped(TrigramTable):
    def adapt(self, tokens, eta, cap):
        super().adapt(tokens, eta, math.inf)


class Stale(TrigramTable):
    "Rows once sorted stay."

    def adapt(self, tokens, eta, cap):
        rows = dict(self._rows)
        super().adapt(tokens, eta, cap)
        self._rows = rows


class WritesOnTheParent(TrigramTable):
    def adapt(self, tokens, eta, cap):
        super().adapt(tokens, eta, cap)
        for u, v, w in zip(tokens, tokens[1:], tokens[2:]):
            if (u, v) in self.parent.weights:
                self.parent.weights[u, v][w] = self.weights[u, v][w]


class OncePerText(TrigramTable):
    "A trigram that occurs twice in a window gains once."

    def adapt(self, tokens, eta, cap):
        for trigram in set(zip(tokens, tokens[1:], tokens[2:])):
            super().adapt(trigram, eta, cap)


class KnownPairsOnly(TrigramTable):
    def adapt(self, tokens, eta, cap):
        for trigram in zip(tokens, tokens[1:], tokens[2:]):
            if self.row(trigram[:2]):
                super().adapt(trigram, eta, cap)


class Swapped(TrigramTable):
    "The pair the other way round."

    def adapt(self, tokens, eta, cap):
        for u, v, w in zip(tokens, tokens[1:], tokens[2:]):
            super().adapt((v, u, w), eta, cap)


class ForgetsTheParent(TrigramTable):
    "A row that is written starts from nothing."

    def adapt(self, tokens, eta, cap):
        for u, v, w in zip(tokens, tokens[1:], tokens[2:]):
            self.weights.setdefault((u, v), {w: 0.0})
            super().adapt((u, v, w), eta, cap)


ADAPT_CASE = {"R": {(0, 1): {0: 0.5, 2: 1.0}, (2, 3): {0: 2.75}}, "texts": [[0, 1, 2, 3, 0, 1, 2], [3, 3, 0, 1, 3]], "eta": 0.5, "cap": 3.0}


def test_the_case_for_broken_tables_is_honest():
    check_adapt(TrigramTable, **ADAPT_CASE)


@pytest.mark.parametrize("cls", [Uncapped, Stale, WritesOnTheParent, OncePerText, KnownPairsOnly, Swapped, ForgetsTheParent])
def test_broken_tables_are_rejected(cls):
    with pytest.raises(AssertionError):
        check_adapt(cls, **ADAPT_CASE)


def test_from_nothing_to_the_cap():
    table, weights = TrigramTable(), []
    for _ in range(100):
        table.adapt([5, 6, 7], eta=1 / 32, cap=3.0)
        weights.append(table.weights[5, 6][7])
    assert weights.index(3.0) + 1 == math.ceil(3.0 / (1 / 32))
    assert weights == sorted(weights)
    assert weights[-1] == 3.0


# the search


def reference_search(R, pair, iterations, depth, c1, c2, score, seed, branching=None):
    "Visits and summed scores of every path, and the paths that were expanded; None when nothing follows."
    if pair not in R:
        return None
    rng, visits, scores, children = random.Random(seed), Counter(), defaultdict(float), {}

    def state(path):
        return (*pair, *path)[-2:]

    def grows(path):
        return 1 + len(path) < depth and state(path) in R  # a path of n moves holds n + 1 states

    def puct(path, w):
        child, N = (*path, w), visits[path]
        P = R[state(path)][w]
        # in this order of operations, so that values which are equal stay equal
        return scores[child] / visits[child] + (c1 + math.log((N + c2 + 1) / c2)) * math.sqrt(N) * P / (1 + visits[child])

    def best(path):
        for w in children[path]:
            if visits[*path, w] == 0:
                return w
        return max(children[path], key=lambda w: puct(path, w))  # the first of equals

    for _ in range(iterations):
        path = ()
        while path in children and grows(path):  # select
            path = (*path, best(path))
        if grows(path):  # expand
            children[path] = heaviest(R[state(path)], branching)
            path = (*path, children[path][0])
        reached = path
        while grows(path):  # roll out
            known = heaviest(R[state(path)], branching)
            x = rng.random() * sum(R[state(path)][w] for w in known)
            for w in known:
                x -= R[state(path)][w]
                if x < 0:
                    break
            path = (*path, w)
        text, value = (*pair, *path), 1.0
        for a, b, w in zip(text, text[1:], text[2:]):
            value += R[a, b].get(w if score == "intended" else b, 0.0)
        for n in range(len(reached) + 1):  # back up
            visits[reached[:n]] += 1
            scores[reached[:n]] += value
    return dict(visits), dict(scores), children


def unfold(root):
    "Visits and scores of every path of a search tree, and the paths that were expanded."
    visits, scores, children = {}, {}, {}

    def add(node, path):
        children[path] = node.row.tokens
        for i, w in enumerate(node.row.tokens):
            if node.visits[i]:
                visits[*path, w], scores[*path, w] = node.visits[i], node.scores[i]
            if node.below[i] is not None:
                add(node.below[i], (*path, w))

    add(root, ())
    return visits, scores, children


def check_search(R, pair, branching=None, **fields):
    root = search(table_of(R, branching), pair, **fields)
    expected = reference_search(R, pair, branching=branching, **fields)
    if expected is None:
        assert root is None
        return
    visits, scores, children = unfold(root)
    assert sum(root.visits) == expected[0].pop(()) == fields["iterations"]
    expected[1].pop(())
    assert visits == expected[0]
    assert scores == expected[1]
    assert children == expected[2]


searches = {
    "iterations": st.integers(1, 60),
    "depth": st.integers(2, 5),
    "c1": st.sampled_from([0.0, 0.3, 2.0, 32.0]),
    "c2": st.sampled_from([0.5, 8.0]),
    "score": st.sampled_from(["intended", "official"]),
    "seed": st.integers(0, 99),
    "branching": st.sampled_from([None, None, 1, 2]),
}


@settings(max_examples=100)
@given(R=rich, pair=pairs, fields=st.fixed_dictionaries(searches))
def test_search(R, pair, fields):
    check_search(R, pair, **fields)


SEARCH_CASES = [
    {"R": random_weights(n, 5), "iterations": 80, "depth": 4, "c1": c1, "c2": c2, "score": score, "seed": n}
    for n, (c1, c2, score) in enumerate(
        [(0.3, 8.0, "intended"), (0.3, 0.5, "official"), (2.0, 0.5, "intended"), (32.0, 8.0, "intended")] * 4
    )
]


def check_searches():
    for case in SEARCH_CASES:
        check_search(pair=next(iter(case["R"])), **case)


def test_the_cases_for_broken_searches_are_honest():
    check_searches()


def choosing(value, patient=False, first=0):
    "A choice by `value(Q, pull, P, N)`; of the successors that were never tried the `first`."

    def choose(node, pull):
        fresh = [i for i, n in enumerate(node.visits) if not n]
        if fresh and not patient:
            return fresh[first]
        values = [value(s / max(n, 1), pull, p, n) for s, n, p in zip(node.scores, node.visits, node.row.weights)]
        return values.index(max(values))

    return choose


def puct(Q, pull, P, N):
    return Q + pull * P / (1 + N)


def one_pull(of):
    return lambda iterations, c1, c2: [of(n, c1, c2) for n in range(iterations + 1)]


def uniform_roll_out(table, state, moves, intended, generator):
    value = 0.0
    for _ in range(moves):
        row = table.row(state)
        if row is None:
            break
        i = generator.randrange(len(row.tokens))
        value += row.weights[i] if intended else row.again
        state = (state[1], row.tokens[i])
    return value


HONEST_ROLL_OUT = aded._roll_out
BROKEN_SEARCHES = {
    "no prior": (Node, "choose", choosing(lambda Q, pull, P, N: Q + pull / (1 + N))),
    "no score": (Node, "choose", choosing(lambda Q, pull, P, N: pull * P / (1 + N))),
    "visits not counted": (Node, "choose", choosing(lambda Q, pull, P, N: Q + pull * P)),
    "unvisited successors wait": (Node, "choose", choosing(puct, patient=True)),
    "lightest first": (Node, "choose", choosing(puct, first=-1)),
    "no root of N": (aded, "_pulls", one_pull(lambda n, c1, c2: c1 + math.log((n + c2 + 1) / c2))),
    "no logarithm": (aded, "_pulls", one_pull(lambda n, c1, c2: c1 * math.sqrt(n))),
    "one visit too many": (aded, "_pulls", one_pull(lambda n, c1, c2: (c1 + math.log((n + c2 + 2) / c2)) * math.sqrt(n + 1))),
    "uniform roll-outs": (aded, "_roll_out", uniform_roll_out),
    "roll-outs one move too long": (aded, "_roll_out", lambda t, s, moves, i, g: HONEST_ROLL_OUT(t, s, moves + 1, i, g)),
    "roll-outs that score nothing": (aded, "_roll_out", lambda *args: 0.0 * HONEST_ROLL_OUT(*args)),
    "the scores mixed up": (aded, "_roll_out", lambda t, s, m, intended, g: HONEST_ROLL_OUT(t, s, m, not intended, g)),
}


@pytest.mark.parametrize("name", list(BROKEN_SEARCHES))
def test_broken_searches_are_rejected(name, monkeypatch):
    monkeypatch.setattr(*BROKEN_SEARCHES[name])
    with pytest.raises(AssertionError):
        check_searches()


@settings(max_examples=60)
@given(R=rich, pair=pairs, iterations=st.integers(1, 80), depth=st.integers(2, 5), seed=st.integers(0, 9))
def test_visits_add_up(R, pair, iterations, depth, seed):
    state = random.getstate(), torch.get_rng_state()
    one, two = (search(table_of(R), pair, iterations, depth, seed=seed) for _ in range(2))
    assert random.getstate() == state[0]
    assert torch.get_rng_state().equal(state[1])
    if pair not in R:
        assert one is two is None
        return
    visits, scores, children = unfold(one)
    assert (visits, scores, children) == unfold(two)
    assert sum(one.visits) == iterations
    assert max(map(len, visits)) <= depth - 1
    for path, n in visits.items():
        below = sum(visits.get((*path, w), 0) for w in children.get(path, ()))
        assert below in (n, n - 1) if path in children else below == 0  # one visit before it was expanded, but for the root
        assert n <= scores[path] <= n * (1 + 3.0 * (depth - 1))


def test_the_seed_is_used():
    R = random_weights(5, 6, 1.0)
    found = {tuple(search(table_of(R), (0, 1), 60, 5, c1=0.3, seed=seed).scores) for seed in range(5)}
    assert len(found) == 5


@settings(max_examples=100)
@given(weights=st.lists(weight, min_size=1, max_size=8).map(lambda w: sorted(w, reverse=True)), iterations=st.integers(1, 60))
def test_constant_scores_share_the_visits_by_the_method_of_dhondt(weights, iterations):
    "All successors get a seat, every further one goes where P / (1 + N) is largest."
    seats = [0] * len(weights)
    for _ in range(iterations):
        quotients = [Fraction(p) / (1 + n) for p, n in zip(weights, seats)]
        largest = [i for i, q in enumerate(quotients) if q == max(quotients)]
        if 0 in seats:
            seats[seats.index(0)] += 1
        else:
            assume(len({(weights[i], seats[i]) for i in largest}) == 1)
            seats[largest[0]] += 1
    root = search(table_of({(0, 1): dict(enumerate(weights, start=10))}), (0, 1), iterations, depth=2, score="official")
    assert root.visits == seats


# from visits to candidates


@settings(max_examples=50)
@given(R=rich, pair=pairs, iterations=st.integers(1, 60), depth=st.integers(2, 5), ktop=st.integers(1, 30))
def test_most_visited(R, pair, iterations, depth, ktop):
    assume(pair in R)
    table = table_of(R)
    root = search(table, pair, iterations, depth)
    visits, _, children = unfold(root)
    assert most_visited(table, pair, root, ktop) == reference_paths(R, pair, all_nodes(visits, children), ktop)


def all_nodes(visits, children):
    "Visits of every node of a search, also of those that were never visited."
    return {(*path, w): visits.get((*path, w), 0) for path, below in children.items() for w in below}


def reference_paths(R, pair, visits, ktop, branching=None):
    "The most visited nodes, the root counted, each with its heaviest successor; among equals the higher node, then the heavier one."
    visits = {path: n for path, n in visits.items() if path}

    def ranks(path):
        text = (*pair, *path)
        return [heaviest(R[text[i : i + 2]], branching).index(w) for i, w in enumerate(path)]

    found = []
    for path in sorted(visits, key=lambda path: (-visits[path], len(path), ranks(path)))[: ktop - 1]:
        state = (*pair, *path)[-2:]
        found.append([*path, *(heaviest(R[state])[:1] if state in R else [])])
    return [path for i, path in enumerate(found) if path not in found[:i]]


def test_most_visited_by_hand():
    table = table_of({(1, 2): {3: 1.0, 4: 0.5}, (2, 3): {5: 1.0}, (3, 5): {6: 1.0, 7: 0.5}})
    root = Node(table.row((1, 2)))
    root.visits, root.below = [5, 2], [Node(table.row((2, 3))), None]
    root.below[0].visits = [5]
    assert most_visited(table, (1, 2), root) == [[3, 5], [3, 5, 6], [4]]
    assert most_visited(table, (1, 2), root, 3) == [[3, 5], [3, 5, 6]]
    root.visits = [5, 0]  # unvisited nodes fill up what the visited ones leave
    assert most_visited(table, (1, 2), root) == [[3, 5], [3, 5, 6], [4]]
    assert most_visited(table, (1, 2), root, 3) == [[3, 5], [3, 5, 6]]
    assert most_visited(table, (1, 2), root, 1) == []


def nodes_of(paths):
    return {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}


def reference_budget(paths, nodes, budget):
    if budget == "trie":  # as many paths, from the first on, as fit
        fits = [k for k in range(len(paths) + 1) if len(nodes_of([p[:nodes] for p in paths[:k]])) <= nodes]
        return [p[:nodes] for p in paths[: max(fits)]]
    cost = [len(set(path)) for path in paths]
    order = sorted(range(len(paths)), key=lambda i: (cost[i], i))  # what is dropped last comes first
    while sum(cost[i] for i in order) > nodes:
        order.pop()
    return [paths[i] for i in sorted(order)]


def check_budget(paths, nodes, budget, fit=fit_budget):
    before = copy.deepcopy(paths)
    found = fit(paths, nodes, budget)
    assert paths == before
    assert found == reference_budget(paths, nodes, budget)
    if budget == "trie":
        assert len(nodes_of(found)) <= nodes
        assert found or not paths
    else:
        assert sum(len(set(path)) for path in found) <= nodes


def check_budgets(budget, fit):
    for nodes in range(2, 12):
        check_budget([[1, 2, 3], [1, 2, 4], [5, 6, 7], [1, 2, 5], [1, 1, 1], [8]], nodes, budget, fit)


some_paths = st.lists(st.lists(token, min_size=1, max_size=4), max_size=14, unique_by=tuple)


@settings(max_examples=100)
@given(paths=some_paths, nodes=st.integers(1, 20), budget=st.sampled_from(["trie", "official"]))
def test_fit_budget(paths, nodes, budget):
    check_budget(paths, nodes, budget)


def test_budgets_by_hand():
    paths = [[1, 2, 3], [1, 2, 4], [1, 1, 1], [5, 6, 7, 8]]
    assert fit_budget(paths, 6) == paths[:3]  # 1 12 123 124 11 111
    assert fit_budget(paths, 5) == paths[:2]
    assert fit_budget(paths, 11, "official") == paths  # 3 + 3 + 1 + 4
    assert fit_budget(paths, 10, "official") == paths[:3]
    assert fit_budget(paths, 6, "official") == [paths[0], paths[2]]  # of equals the later one goes
    assert fit_budget(paths, 2) == [[1, 2], [1, 2]]  # a path is never longer than the budget


def skips(paths, nodes, budget):
    "Goes on behind a path that does not fit."
    kept = []
    for path in paths:
        if len(nodes_of([*kept, path[:nodes]])) <= nodes:
            kept.append(path[:nodes])
    return kept


def drops_the_first_of_equals(paths, nodes, budget):
    kept = list(paths)
    while sum(len(set(p)) for p in kept) > nodes:
        kept.remove(max(kept, key=lambda p: len(set(p))))
    return kept


def counts_all_tokens(paths, nodes, budget):
    kept = list(paths)
    while sum(map(len, kept)) > nodes:
        del kept[max(range(len(kept)), key=lambda i: (len(kept[i]), i))]
    return kept


@pytest.mark.parametrize(
    ("budget", "broken"),
    [
        ("trie", lambda paths, nodes, budget: fit_budget(paths, nodes + 1, budget)),
        ("trie", lambda paths, nodes, budget: fit_budget(paths, nodes - 1, budget)),
        ("trie", skips),
        ("official", lambda paths, nodes, budget: fit_budget(paths, nodes + 1, budget)),
        ("official", drops_the_first_of_equals),
        ("official", counts_all_tokens),
    ],
)
def test_broken_budgets_are_rejected(budget, broken):
    check_budgets(budget, fit_budget)
    with pytest.raises(AssertionError):
        check_budgets(budget, broken)


def all_paths(R, pair, depth):
    "Every path of at most `depth` tokens with its product of weights, each at most 0.99, and its last token's rank."
    found, level = {}, [((), 1.0)]
    for _ in range(depth):
        longer = []
        for path, value in level:
            row = R.get((*pair, *path)[-2:], {})
            longer += [((*path, w), value * min(row[w], 0.99)) for w in row]
        found |= dict(longer)
        level = longer
    return found


def check_best_first(find, R, pair, nodes, depth):
    values = all_paths(R, pair, depth)
    paths = [tuple(path) for path in find(table_of(R), pair, nodes, depth)]
    assert len(set(paths)) == len(paths) == min(nodes, len(values))
    assert [values[p] for p in paths] == sorted(values.values(), reverse=True)[:nodes]
    place = {(): -1} | {path: i for i, path in enumerate(paths)}
    assert all(place.get(path[:-1], len(paths)) < place[path] for path in paths)

    def found(path):  # when a path was first seen: with its beginning, heavier successors first
        return place[path[:-1]], heaviest(R[(*pair, *path)[-3:-1]]).index(path[-1])

    for a, b in zip(paths, paths[1:]):
        assert values[a] > values[b] or found(a) < found(b)


@settings(max_examples=60)
@given(R=tables, pair=pairs, nodes=st.integers(1, 70), depth=st.integers(1, 4), unit=st.sampled_from([1.0, 0.25]))
def test_best_first(R, pair, nodes, depth, unit):
    R = {state: {w: unit * x for w, x in row.items()} for state, row in R.items()}
    check_best_first(best_first, R, pair, nodes, depth)


def check_expansions(find):
    R = {pair: {w: x / 3 for w, x in row.items()} for pair, row in random_weights(3).items()}
    pair = next(pair for pair in R if pair[0] != pair[1] and pair[::-1] in R and len(all_paths(R, pair, 2)) > 8)
    for nodes in (8, 100):
        check_best_first(find, R, pair, nodes, 2)


def breadth_first(table, pair, nodes, depth):
    paths, level = [], [[]]
    for _ in range(depth):
        rows = [(path, table.row((*pair, *path)[-2:])) for path in level]
        level = [[*path, w] for path, row in rows if row for w in row.tokens]
        paths += level
    return paths[:nodes]


@pytest.mark.parametrize(
    "broken",
    [
        breadth_first,
        lambda table, pair, nodes, depth: best_first(table, pair, nodes + 1, depth),
        lambda table, pair, nodes, depth: best_first(table, pair, nodes, depth + 1),
        lambda table, pair, nodes, depth: best_first(table, pair[::-1], nodes, depth),
        lambda table, pair, nodes, depth: best_first(table, pair, nodes, depth)[::-1],
    ],
)
def test_broken_expansions_are_rejected(broken):
    check_expansions(best_first)
    with pytest.raises(AssertionError):
        check_expansions(broken)


def test_equal_products_come_in_the_order_of_discovery():
    R = {(0, 0): {1: 0.5, 2: 0.5, 3: 0.25}, (0, 1): {1: 0.5, 2: 0.5}, (0, 2): {1: 0.5}}
    assert best_first(table_of(R), (0, 0)) == [[1], [2], [3], [1, 1], [1, 2], [2, 1]]


def test_weights_beyond_one_count_as_almost_certain():
    R = {(0, 0): {1: 3.0, 2: 1.0, 3: 0.985}, (0, 1): {1: 2.0}, (1, 1): {1: 3.0}}
    # 0.99, 0.99, 0.985, 0.99^2 = 0.9801, 0.99^3, 0.99^4
    assert best_first(table_of(R), (0, 0), depth=4) == [[1], [2], [3], [1, 1], [1, 1, 1], [1, 1, 1, 1]]


# one draft


def reference_tree(R, text, longest, *, branching, maker, nodes, budget, depth, ktop, **fields):
    "Nodes of the draft tree, spelled from the pending token on, in the order of the tree."
    paths = []
    pair = tuple(text[-2:])
    if len(pair) == 2 and pair in R and longest > 0:
        if maker == "mcts":
            visits, _, children = reference_search(R, pair, depth=depth, branching=branching, **fields)
            paths = reference_paths(R, pair, all_nodes(visits, children), ktop, branching)
        else:
            shown = {state: {w: row[w] for w in heaviest(row, branching)} for state, row in R.items()}
            values, place = all_paths(shown, pair, depth), {(): -1}
            while len(paths) < min(nodes, len(values)):
                open_ = [p for p in values if p not in place and p[:-1] in place]
                rank = {p: heaviest(shown[(*pair, *p)[-3:-1]]).index(p[-1]) for p in open_}
                best = min(open_, key=lambda p: (-values[p], place[p[:-1]], rank[p]))
                place[best] = len(paths)
                paths.append(list(best))
    paths = [tuple(path[:longest]) for path in reference_budget(paths, nodes, budget)]
    tree = [path[:d] for d in range(1, depth + 1) for path in paths if len(path) >= d]
    return list(dict.fromkeys(tree))[:nodes]


def spell(tokens, parents):
    "What the nodes of a tree spell below its root; nodes that only fill up are left out."
    texts = {0: ()}
    for node in range(1, len(tokens)):
        if parents[node] >= 0:
            texts[node] = (*texts[parents[node]], tokens[node])
    return list(texts.values())[1:]


BASE = {"iterations": 40, "depth": 4, "c1": 2.0, "c2": 8.0, "score": "intended", "seed": 0}
BASE |= {"ktop": 12, "nodes": 14, "budget": "trie", "maker": "mcts", "branching": None}

drafts = {
    "ktop": st.integers(2, 14),
    "nodes": st.integers(1, 20),
    "budget": st.sampled_from(["trie", "official"]),
    "maker": st.sampled_from(["mcts", "mcts", "best_first"]),
}


@settings(max_examples=60)
@given(
    R=rich,
    text=st.lists(token, min_size=1, max_size=5),
    longest=st.integers(0, 6),
    fields=st.fixed_dictionaries({**searches, **drafts}),
)
def test_draft_tree(R, text, longest, fields):
    expected = reference_tree(R, text, longest, **fields)
    tokens, parents = ADED(table_of(R), **fields).draft_tree(text, longest)
    assert (tokens[0], parents[0]) == (text[-1], -1)
    assert all(0 <= up < node for node, up in enumerate(parents[1:], start=1))
    assert spell(tokens, parents) == expected
    assert len(tokens) - 1 <= fields["nodes"]


def test_a_draft_is_read_behind_the_last_two_tokens():
    table = table_of({(1, 2): {3: 1.0}, (2, 1): {4: 1.0}, (2, 2): {5: 1.0}})
    for maker in ("mcts", "best_first"):
        assert ADED(table, maker=maker).draft_tree([1, 2], 9) == ([2, 3], [-1, 0])
        assert ADED(table, maker=maker).draft_tree([9, 2, 1], 9) == ([1, 4], [-1, 0])
        assert ADED(table, maker=maker).draft_tree([3, 3], 9) == ([3], [-1])
        assert ADED(table, maker=maker).draft_tree([2], 9) == ([2], [-1])


def test_a_path_that_repeats_itself_stays_within_the_budget():
    "Officially a path costs its distinct tokens: this one costs 1 and has four nodes."
    decoder = ADED(table_of({(1, 1): {1: 1.0}}), budget="official", nodes=3)
    assert decoder.draft_tree([1, 1], 9) == ([1, 1, 1, 1], [-1, 0, 1, 2])


# every draft of a decoding


@pytest.fixture(scope="module")
def toy():
    "Eight tokens: the table is soon full, and rows have many successors."
    return small_model(vocab=8, hidden=16, spread=0.5, seed=2)


PROMPTS = [[3, 5, 3, 5, 2], [4], [6, 2, 7, 4, 3, 5, 3, 2, 6, 6, 4, 2, 7, 4, 3, 5, 2, 5, 6, 7]]


def check_story(
    cls, model, fields=(), rows=(0, 1, 2), calls=2, new=26, corpus=None, eta=164 / 4096, cap=3.0, window=16, start_from="hot", **gen
):
    "Every draft of some calls is the one that the reference makes from its own table."
    fields = {**BASE, **dict(fields)}
    R0 = random_weights(7, 8, 0.6) if corpus is None else corpus
    given_corpus = table_of(R0)
    decoder = cls(given_corpus, kp=4, eta=eta, cap=cap, window=window, start_from=start_from, trace=True, **fields)
    pruned = {pair: {w: row[w] for w in heaviest(row, 4)} for pair, row in R0.items()}
    R = pruned
    for n in range(calls):
        torch.manual_seed(n)
        inputs = left_pad([torch.tensor([PROMPTS[r]]) for r in rows])
        out = decoder.generate(model, **inputs, max_new_tokens=new, **({"do_sample": True, "top_k": 0} | gen))
        texts, left, trace = [list(PROMPTS[r]) for r in rows], [new] * len(rows), iter(out.trace)
        R = pruned if start_from == "cold" else R
        running = list(range(len(rows)))
        while running:
            for row in running:
                R = learnt(R, texts[row][-window:], eta, cap) if eta else R
            for row, step in zip(list(running), [next(trace) for _ in running]):
                assert step.row == row
                found = spell(step.info["tokens"], step.info["parents"])
                assert step.info["tokens"][0] == texts[row][-1]
                assert len(found) <= fields["nodes"]
                assert found == reference_tree(R, texts[row], left[row] - 1, **fields)
                assert 1 <= len(step.tokens) <= 1 + fields["depth"]
                texts[row] += step.tokens
                left[row] -= len(step.tokens)
                if left[row] == 0 or (step.tokens[-1] == EOS and "eos_token_id" not in gen):
                    running.remove(row)
        assert next(trace, None) is None
        table = {pair: dict(zip(r.tokens, r.weights)) for pair in itertools.product(range(8), repeat=2) if (r := decoder.table.row(pair))}
        shown = {pair: {w: row[w] for w in heaviest(row, fields["branching"])} for pair, row in R.items()}
        assert table == shown
        assert all(0 < w <= max(cap, 3.0) for row in table.values() for w in row.values())
    assert given_corpus.weights == R0
    return decoder


STORIES = {
    "as in the paper": {},
    "one row": {"rows": (0,)},
    "one-token prompt": {"rows": (1,)},
    "official": {"fields": {"score": "official", "budget": "official", "nodes": 9}},
    "best first": {"fields": {"maker": "best_first", "nodes": 7}},
    "few successors": {"fields": {"branching": 2, "seed": 3}},
    "deep": {"fields": {"depth": 6, "c1": 32.0}},
    "two states": {"fields": {"depth": 2}},
    "narrow window": {"window": 4, "cap": 1.0},
    "no adaptation": {"eta": 0.0},
    "an empty table": {"corpus": {}},
    "cold": {"start_from": "cold"},
    "greedy": {"do_sample": False},
    "no end": {"eos_token_id": None, "calls": 1, "new": 40},
}


@pytest.mark.parametrize("name", list(STORIES))
def test_every_draft(name, toy):
    check_story(ADED, toy, **STORIES[name])


class WithoutThePendingToken(ADED):
    "Drafts behind the pair before the last."

    def draft_tree(self, text, longest, table=None):
        tokens, parents = super().draft_tree(text[:-1] or text, longest)
        return [text[-1], *tokens[1:]], parents


class SwappedPair(ADED):
    def draft_tree(self, text, longest, table=None):
        tokens, parents = super().draft_tree([*text[:-2], *text[:-3:-1]], longest)
        return [text[-1], *tokens[1:]], parents


class LearnsLate(ADED):
    "Learns behind the draft, not before it."

    def learn(self, text, table=None):
        self.texts = [*getattr(self, "texts", []), text]

    def draft(self, call, roots):
        draft = super().draft(call, roots)
        for text in self.texts:
            super().learn(text, call.state.table)
        self.texts = []
        return draft


class LearnsWithoutThePendingToken(ADED):
    def learn(self, text, table=None):
        super().learn(text[:-1], table)


class ShorterWindow(ADED):
    def learn(self, text, table=None):
        super().learn(text[-self.window + 1 :], table)


class LearnsPadding(ADED):
    def start(self, call, prompt_logits):
        super().start(call, prompt_logits)
        call.state.first = [0] * len(call.state.first)


class LearnsTheFirstRow(ADED):
    def draft(self, call, roots):
        self.done = False
        return super().draft(call, roots)

    def learn(self, text, table=None):
        if not self.done:
            super().learn(text, table)
        self.done = True


class OneNodeMore(ADED):
    def draft_tree(self, text, longest, table=None):
        self.nodes += 1
        found = super().draft_tree(text, longest, table)
        self.nodes -= 1
        return found


class AlwaysCold(ADED):
    def start(self, call, prompt_logits):
        self.reset()
        super().start(call, prompt_logits)


class NeverPruned(ADED):
    def __post_init__(self):
        super().__post_init__()
        self._start = self.corpus
        self.reset()


class TeachesTheCorpus(ADED):
    def learn(self, text, table=None):
        super().learn(text, table)
        self.corpus.adapt(text, self.eta, self.cap)


class BeyondTheLimit(ADED):
    "Drafts that no call could take."

    def draft_tree(self, text, longest, table=None):
        return super().draft_tree(text, longest + 1)


@pytest.mark.parametrize(
    "cls",
    [
        WithoutThePendingToken,
        SwappedPair,
        LearnsLate,
        LearnsWithoutThePendingToken,
        ShorterWindow,
        LearnsPadding,
        LearnsTheFirstRow,
        OneNodeMore,
        AlwaysCold,
        NeverPruned,
        TeachesTheCorpus,
        BeyondTheLimit,
    ],
)
def test_broken_decoders_are_rejected(cls, toy):
    with pytest.raises(AssertionError):
        check_story(cls, toy)


def test_a_step_touches_at_most_window_minus_two_entries(llama):
    class Watched(ADED):
        def learn(self, text, table=None):
            before = copy.deepcopy(self.table.weights)
            super().learn(text, table)
            self.touched = [*getattr(self, "touched", []), len(entries(self.table.weights) - entries(before))]

    def entries(weights):
        return {(pair, w, x) for pair, row in weights.items() for w, x in row.items()}

    decoder = Watched(window=6)
    decoder.generate(llama, random_prompts(1, lengths=(9, 9))[0], max_new_tokens=20, do_sample=True)
    assert max(decoder.touched) == 4


def test_rows_with_shorter_drafts_are_filled_up(llama):
    "Nodes that fill up a row are nobody's children and do not count."
    found = []

    class Watched(ADED):
        def draft(self, call, roots):
            found.append(super().draft(call, roots))
            return found[-1]

    corpus = table_of({(5, 6): {7: 0.5, 8: 0.5}, (6, 7): {9: 1.0}})
    inputs = left_pad([torch.tensor([[5, 6]]), torch.tensor([[3, 4]]), torch.tensor([[6, 7]])])
    Watched(corpus, eta=0.0).generate(llama, **inputs, max_new_tokens=8, do_sample=False)
    draft = found[0]
    assert draft.tokens.tolist() == [[6, 7, 8, 9], [4, 0, 0, 0], [7, 9, 0, 0]]
    assert draft.tree.parents.tolist() == [[-1, 0, 0, 1], [-1] * 4, [-1, 0, -1, -1]]
    assert [draft.drafted(row) for row in range(3)] == [[[1, 2], [3], [], []], [[], [], [], []], [[1], [], [], []]]
    assert sum(draft.lengths) == 4


# limits


class Follows(LogitsProcessor):
    "Token t is followed by t + 1."

    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, 2 + (input_ids[:, -1:] - 1) % (scores.shape[-1] - 2), 0.0)


def counting_up(add=1):
    after = lambda t, n=1: 2 + (t - 2 + n) % (VOCAB - 2)  # noqa: E731
    return table_of({(t, after(t)): {after(t, 1 + add): 1.0} for t in range(2, VOCAB)})


@pytest.mark.parametrize("fields", [{}, {"depth": 2}, {"depth": 6}, {"maker": "best_first"}, {"score": "official"}, {"iterations": 1}])
def test_the_best_and_the_worst_table(llama, fields):
    "A table of the truth gives depth + 1 tokens a forward, one that is always wrong gives one."
    most = 3 if "iterations" in fields else 1 + fields.get("depth", 4)  # a single line of play: one move, and its heaviest successor
    for add, tokens in ((1, most), (2, 1)):
        decoder = ADED(counting_up(add), eta=0.0, **fields)
        rule = LogitsProcessorList([Follows()])
        out = decoder.generate(llama, torch.tensor([[5, 6]]), max_new_tokens=42, do_sample=False, logits_processor=rule)
        assert out.continuations[0].tolist() == [*range(7, 49)]
        full, rest = divmod(42, tokens)
        assert out.stats.emitted == [[tokens] * full + [rest] * (rest > 0)]
        assert decoder.table.weights == {}


def test_an_empty_table_that_does_not_learn_is_plain_decoding(llama):
    for prompt in random_prompts(2, seed=1):
        out = ADED(eta=0.0).generate(llama, prompt, max_new_tokens=12, do_sample=False)
        assert out.stats.emitted == [[1] * 12]
        assert out.stats.drafted == 0


def test_a_text_that_repeats_itself_is_learnt():
    model = small_model(spread=0.02, seed=3)
    with torch.no_grad():  # every token is followed by itself
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    prompt = torch.tensor([[5, 6]])
    learns = ADED().generate(model, prompt, max_new_tokens=60, do_sample=False)
    assert set(learns.continuations[0].tolist()) == {6}
    # 5 6 | 6 | 6: three forwards until the pair (6, 6) has been followed by something
    assert learns.stats.emitted == [[1, 1, *[5] * 11, 3]]
    assert ADED(eta=0.0).generate(model, prompt, max_new_tokens=60, do_sample=False).stats.emitted == [[1] * 60]


def test_one_node_is_one_draft_token(llama):
    for maker in ("mcts", "best_first"):
        decoder = ADED(counting_up(), eta=0.0, nodes=1, maker=maker)
        rule = LogitsProcessorList([Follows()])
        out = decoder.generate(llama, torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=False, logits_processor=rule)
        assert out.stats.emitted == [[2] * 6]
        assert out.stats.drafted == 6


def test_the_last_token_needs_no_draft(llama):
    out = ADED(counting_up()).generate(llama, torch.tensor([[5, 6]]), max_new_tokens=1, do_sample=False)
    assert out.stats.emitted == [[1]]
    assert out.stats.drafted == 0


# what is kept from call to call


def as_dict(table):
    return copy.deepcopy(table.weights)


def test_hot_cold_and_reset(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=1)[0]

    def run(decoder):
        return decoder.generate(llama, prompt, max_new_tokens=24, do_sample=False).stats.emitted

    hot, cold = ADED(), ADED(start_from="cold")
    first = run(hot)
    after = as_dict(hot.table)
    assert run(cold) == run(cold) == first
    assert as_dict(cold.table) == after
    assert len(run(hot)[0]) < len(first[0])
    assert as_dict(hot.table) != after
    hot.reset()
    assert as_dict(hot.table) == {}
    assert run(hot) == first


def test_reset_keeps_the_corpus():
    R = {(1, 2): {3: 0.5, 4: 0.25}}
    decoder = ADED(table_of(R), eta=0.5)
    decoder.learn([1, 2, 4, 1, 2])
    assert decoder.table.row((1, 2)).tokens == [4, 3]
    assert decoder.table.row((2, 4)).tokens == [1]
    decoder.reset()
    assert decoder.table.row((1, 2)).tokens == [3, 4]
    assert decoder.table.row((2, 4)) is None


def test_decoders_of_one_corpus_do_not_teach_each_other():
    R = {(1, 2): {3: 0.5}}
    corpus = table_of(R)
    one, two = ADED(corpus), ADED(corpus)
    one.learn([1, 2, 4])
    corpus.adapt([1, 2, 5], 1.0, 3.0)
    assert one.table.row((1, 2)).tokens == [3, 4]
    assert two.table.row((1, 2)).tokens == [3]
    assert corpus.weights == {(1, 2): {3: 0.5, 5: 1.0}}


def test_a_learnt_table_can_be_the_corpus_of_another_decoder():
    first = ADED(table_of({(1, 2): {3: 0.5}, (2, 3): {4: 0.5}}), eta=0.25)
    first.learn([1, 2, 5])
    assert ADED(first.table)._start.weights == {(1, 2): {3: 0.5, 5: 0.25}, (2, 3): {4: 0.5}}


def test_what_is_learnt_before_the_first_call_is_kept(llama):
    decoder = ADED(counting_up().prune(12), eta=0.0)
    warm, prompt = ADED(eta=0.5), torch.tensor([[5, 6]])
    rule = {"logits_processor": LogitsProcessorList([Follows()]), "max_new_tokens": 10, "do_sample": False}
    for end in range(7, 18):
        warm.learn([*range(5, end)])
    assert warm.generate(llama, prompt, **rule).stats.emitted == decoder.generate(llama, prompt, **rule).stats.emitted == [[5, 5]]


def test_another_vocabulary_starts_anew(llama, toy):
    decoder = ADED()
    prompt = torch.tensor([[5, 6, 5, 6, 5]])
    decoder.generate(llama, prompt, max_new_tokens=8, do_sample=False)
    assert max(w for row in decoder.table.weights.values() for w in row) > 7
    out = decoder.generate(toy, prompt, max_new_tokens=8, do_sample=False)
    assert max(w for row in decoder.table.weights.values() for w in row) < 8
    assert out.stats.emitted == ADED().generate(toy, prompt, max_new_tokens=8, do_sample=False).stats.emitted


def test_tokens_the_model_does_not_have(llama, toy):
    prompt = torch.tensor([[5, 6]])
    message = "the table holds token 8, the model's vocabulary ends at 7: use the model's own tokenizer"
    decoder = ADED(table_of({(1, 2): {7: 0.5, 8: 0.5}}))
    with pytest.raises(ValueError, match=message):
        decoder.generate(toy, prompt, max_new_tokens=4)
    decoder.generate(llama, prompt, max_new_tokens=8, do_sample=False)
    kept = as_dict(decoder.table)
    with pytest.raises(ValueError, match=message):
        decoder.generate(toy, prompt, max_new_tokens=4)
    assert as_dict(decoder.table) == kept != {}  # a refused call changes nothing
    decoder = ADED()
    decoder.learn([1, 2, 8])
    with pytest.raises(ValueError, match=message):
        decoder.generate(toy, prompt, max_new_tokens=4)
    ADED(table_of({(1, 2): {7: 0.5}, (8, 9): {3: 1.0}})).generate(toy, prompt, max_new_tokens=4)  # a pair that never comes up does no harm


# fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kp": 0}, "kp must be at least 1, got 0"),
        ({"window": 2}, "window must be at least 3, got 2"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"depth": 1}, "depth must be at least 2, got 1"),
        ({"ktop": 1}, "ktop must be at least 2, got 1"),
        ({"nodes": 0}, "nodes must be at least 1, or .auto., got 0"),
        ({"branching": 0}, "branching must be at least 1, or None for all successors, got 0"),
        ({"eta": -0.1}, "eta and c1 must be at least 0, cap and c2 above 0, got eta -0.1"),
        ({"eta": math.nan}, "got eta nan"),
        ({"cap": 0.0}, "cap and c2 above 0, .* cap 0.0"),
        ({"c1": -1.0}, "eta and c1 must be at least 0, .* c1 -1.0"),
        ({"c2": 0.0}, "cap and c2 above 0, .* c2 0.0"),
        ({"score": "paper"}, "score must be one of 'intended', 'official', got 'paper'"),
        ({"budget": "nodes"}, "budget must be one of 'trie', 'official', got 'nodes'"),
        ({"maker": "beam"}, "maker must be one of 'mcts', 'best_first', got 'beam'"),
        ({"start_from": "warm"}, "start_from must be one of 'hot', 'cold', got 'warm'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ADED(**fields)


def test_the_least_fields():
    ADED(kp=1, window=3, iterations=1, depth=2, ktop=2, nodes=1, branching=1, eta=0.0, cap=1e-9, c1=0.0, c2=1e-9)
