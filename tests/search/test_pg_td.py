"""PG-TD against an independent search on tables, and its limits: greedy, one path, exploitation, priors, beams."""

import math
import random

import pytest
import torch
from toys import small_model

from decodelab.lab.table_model import random_table, table_model
from decodelab.search.base import Budget
from decodelab.search.pg_td import PGTD, p_ucb
from decodelab.search.scorers import reads

LENGTH, VOCAB = 8, 6


def toy(seed):
    """A table, a target among its likely texts, and the reward: the share of the target that is a prefix of the text."""
    table = random_table(VOCAB, 1.0, torch.Generator().manual_seed(seed))
    rng, target, last = random.Random(seed), [], 0
    for _ in range(LENGTH):
        last = rng.choice(table[last].topk(3).indices.tolist())
        target.append(last)

    def reward(text):
        right = next((i for i, (a, b) in enumerate(zip(text, target)) if a != b), min(len(text), LENGTH))
        return right / LENGTH

    return table, reward


class Watched(PGTD):
    """Keeps the search of the last row."""

    def begin(self, search):
        self.search = search
        return super().begin(search)

    @property
    def programs(self):
        return [tuple(self.search.tree.tokens(node)) for _, node, _ in self.search.state.history]


def search(seed=0, table=None, reward=None, **settings):
    if table is None:
        table, reward = toy(seed)
    calls = []

    @reads("ids")
    def scorer(texts):
        calls.extend(map(tuple, texts))
        return [reward(text) for text in texts]

    decoder = Watched(scorer=scorer, **settings)
    start = torch.zeros(1, 1, dtype=torch.long)
    decoder.out = decoder.generate(table_model(table), start, attention_mask=torch.ones_like(start), max_new_tokens=LENGTH, do_sample=False)
    decoder.calls = calls
    return decoder


def reference(table, reward, rollouts, k=3, c=4.0, c_base=10.0, prior="children", selection="p_ucb", backup="max", eos=None):
    """The search again, on the table itself: no model, no cache, no tree of tokens."""
    rows = [sorted(((p, -a) for a, p in enumerate(row)), reverse=True) for row in table.double().tolist()]
    ends = lambda s: len(s) == LENGTH or (s and s[-1] == eos)  # noqa: E731
    N, returns, tried = {(): 1}, {}, []

    def edges(s):
        best = rows[s[-1] if s else 0][:k]
        total = sum(p for p, _ in best) if prior == "children" else 1.0
        return [(-a, p / total) for p, a in best]

    def finish(s):
        while not ends(s):
            s = (*s, edges(s)[0][0])
        return s

    def value(s, a, p):
        got = returns.get((s, a), [])
        q = 0.0 if not got else max(got) if backup == "max" else sum(got) / len(got)
        ln = math.log(N[s])
        if selection == "uct":
            return q + c * math.sqrt(ln / (1 + len(got)))
        beta = c if selection == "p_uct" else math.log((N[s] + c_base + 1) / c_base) + c
        return q + beta * p * math.sqrt(ln) / (1 + len(got))

    for _ in range(rollouts):
        s, path = (), []
        while s in N and not ends(s):
            values = [value(s, a, p) for a, p in edges(s)]
            a = edges(s)[values.index(max(values))][0]
            path.append((s, a))
            s = (*s, a)
        if not ends(s):
            N[s] = 1
        tried.append(finish(s))
        for t, a in path:
            returns.setdefault((t, a), []).append(reward(tried[-1]))
            N[t] += 1
        if s in N:
            N[s] += 1
    return tried, N, returns


@pytest.mark.parametrize("seed", range(8))
def test_visits_exactly_the_programs_of_an_independent_search(seed):
    table, reward = toy(seed)
    assert search(seed, rollouts=48).programs == reference(table, reward, 48)[0]


@pytest.mark.parametrize(
    "settings",
    [{"k": 2}, {"k": 6}, {"c": 1.0}, {"c_base": 1.0}, {"prior": "full"}, {"backup": "mean"}, {"selection": "uct"}, {"selection": "p_uct"}],
    ids=str,
)
def test_variants_visit_what_the_independent_search_visits(settings):
    table, reward = toy(11)
    found = search(11, rollouts=48, **settings).programs
    assert found == reference(table, reward, 48, **settings)[0]
    if settings.keys() & {"k", "c", "backup", "selection"}:  # each setting matters here, so the comparison can fail
        assert found != reference(table, reward, 48)[0]


def test_p_ucb_by_hand():
    assert p_ucb(Q=0.5, P=0.4, N=5, n=2, c=4.0, c_base=10.0) == pytest.approx(0.5 + (math.log(1.6) + 4) * 0.4 * math.sqrt(math.log(5)) / 3)
    assert p_ucb(Q=0.5, P=0.4, N=5, n=2) == pytest.approx(1.2561, abs=1e-4)
    assert p_ucb(Q=0.25, P=0.9, N=1, n=0) == 0.25


@pytest.mark.parametrize("seed", range(6))
def test_the_sequence_cache_is_exact_and_halves_the_generations(seed):
    cached, plain = (search(seed, rollouts=64, sequence_cache=on) for on in (True, False))
    assert cached.programs == plain.programs
    ours, theirs = cached.search.state.generations, plain.search.state.generations
    assert ours <= len(set(cached.programs)) <= theirs <= 64
    assert ours < 0.75 * theirs
    for found in (cached, plain):  # no program is tested twice
        assert len(found.calls) == len(set(found.calls)) == len(set(found.programs)) == found.out.stats.search[0]["scorer_calls"]
    assert cached.out.stats.target_forwards == plain.out.stats.target_forwards  # known tokens cost no forward either way


@pytest.mark.parametrize("seed", range(6))
def test_the_first_program_is_the_greedy_one(seed):
    table, reward = toy(seed)
    start = torch.zeros(1, 1, dtype=torch.long)
    plain = table_model(table).generate(start, attention_mask=torch.ones_like(start), max_new_tokens=LENGTH, do_sample=False)
    found = search(seed, rollouts=20)
    assert found.programs[0] == tuple(plain[0, 1:].tolist())
    assert reward(found.out.sequences[0, 1:].tolist()) >= reward(plain[0, 1:].tolist())
    assert search(seed, rollouts=1).out.sequences.tolist() == plain.tolist()


def test_best_reward_never_falls_and_searches_are_nested():
    _, reward = toy(3)
    long = search(3, rollouts=60)
    best = 0.0
    for rollouts in (1, 5, 20, 60):
        found = search(3, rollouts=rollouts)
        assert found.programs == long.programs[:rollouts]
        now = reward(found.out.sequences[0, 1:].tolist())
        assert now == max(map(reward, found.programs)) >= best
        best = now


def test_one_child_is_the_greedy_path():
    found = search(2, rollouts=30, k=1)
    assert len(set(found.programs)) == 1
    assert found.search.state.generations == 1
    assert found.out.stats.target_forwards == LENGTH


def test_without_exploration_it_never_leaves_the_best_known_branch():
    table, reward = toy(0)
    rewarding = lambda text: (1 + reward(text)) / 2  # noqa: E731
    found = search(table=table, reward=rewarding, rollouts=40, selection="p_uct", c=0.0)
    assert set(found.programs) == {found.programs[0]}  # its value is positive from the first rollout on
    assert found.search.state.root.returns == [40, 0, 0]
    little = search(table=table, reward=rewarding, rollouts=40, c=0.0)  # the logarithm in beta still explores
    assert len(set(little.programs)) > 1
    assert little.programs == reference(table, rewarding, 40, c=0.0)[0]


def test_with_much_exploration_visits_follow_the_priors():
    table, _ = toy(5)
    found = search(table=table, reward=lambda text: 0.5, rollouts=400, c=1e6)
    root = found.search.state.root
    for n, p in zip(root.returns, root.prior):
        assert (n + 1) / (400 + len(root.prior)) == pytest.approx(p, abs=0.01)


def test_ends_in_the_tree_give_their_reward_once_a_return():
    table, _ = toy(4)
    table[:, 5] = table.max(1).values  # end of sequence is likely everywhere
    table = table / table.sum(1, keepdim=True)
    rewarding = lambda text: len(set(text)) / VOCAB  # noqa: E731
    calls = []

    @reads("ids")
    def scorer(texts):
        calls.extend(map(tuple, texts))
        return [rewarding(t) for t in texts]

    decoder = Watched(scorer=scorer, rollouts=50)
    start = torch.zeros(1, 1, dtype=torch.long)
    decoder.generate(
        table_model(table), start, attention_mask=torch.ones_like(start), max_new_tokens=LENGTH, do_sample=False, eos_token_id=5
    )
    tried, N, returns = reference(table, rewarding, 50, eos=5)
    assert decoder.programs == tried
    assert any(len(p) < LENGTH for p in tried)
    assert len(calls) == len(set(tried))
    nodes = [((), decoder.search.state.root)]
    while nodes:
        s, node = nodes.pop()
        assert node.visits == N[s] == 1 + sum(node.returns) + (s != ())  # a new node's own visit counts, too
        for i, child in enumerate(node.children):
            got = returns.get((s, child.tokens[-1]), [])
            assert node.returns[i] == len(got)
            assert node.best[i] == max(got, default=0.0) <= 1
            assert node.total[i] == pytest.approx(sum(got))
            if i in node.below:
                nodes.append(((*s, child.tokens[-1]), node.below[i]))


def test_costs_are_those_that_a_hook_counts():
    model, calls = small_model(), []
    PGTD(rollouts=1).generate(
        model, torch.ones(1, 3, dtype=torch.long) * 5, max_new_tokens=3, do_sample=False
    )  # what the model can do is found out once
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    prompt = torch.randint(2, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    out = PGTD(generations=6, rollouts=20).generate(
        model, prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False
    )
    hook.remove()
    assert out.stats.target_forwards == len(calls) == sum(row["forwards"] for row in out.stats.search)


@pytest.mark.parametrize("b", [2, 3, 5])
def test_beams_complete_as_transformers_does(b):
    model = small_model()
    for seed in range(4):
        prompt = torch.randint(2, 97, (1, 6), generator=torch.Generator().manual_seed(seed))
        more = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": list(range(2, 20))}
        first = model.generate(prompt, max_new_tokens=1, **more)
        if int(first[0, -1]) < 20:
            continue
        theirs = model.generate(first, num_beams=b, max_new_tokens=11, **more | {"attention_mask": torch.ones_like(first)})
        ours = PGTD(b=b, rollouts=1).generate(model, prompt, max_new_tokens=12, **more)
        assert ours.sequences.tolist() == theirs.tolist()


def test_the_sequence_cache_serves_beams_only_when_asked():
    hits = {}
    for approx in (False, True):
        found = search(1, rollouts=40, b=2, approx_cache=approx)
        hits[approx] = len(found.programs) - found.search.state.generations
    ends = sum(len(p.tokens) == LENGTH for p in found.search.finished)
    assert ends == len(found.search.finished)
    assert hits[True] > hits[False]


def test_sampled_completions():
    model = small_model()
    prompt = torch.randint(2, 97, (1, 5), generator=torch.Generator().manual_seed(1))
    more = {"attention_mask": torch.ones_like(prompt), "do_sample": True, "top_k": 3, "max_new_tokens": 10}

    def run(seed, **settings):
        torch.manual_seed(seed)
        decoder = Watched(sampled=True, rollouts=12, **settings)
        decoder.out = decoder.generate(model, prompt, **more)
        return decoder

    one, again, other = run(0), run(0), run(1)
    assert one.programs == again.programs != other.programs
    assert one.search.state.generations == 12  # no completion is taken over
    assert not one.search.state.completions
    assert run(0, generations=5).programs == one.programs[:5]  # streams do not depend on how many there are


def test_budgets_and_goal_stop_it():
    found = search(0, budget=Budget(tokens=5))
    assert found.out.stats.search[0]["stopped"] == "budget of tokens"
    assert found.out.sequences.shape == (1, 1 + 5)  # the unfinished program: the prompt, the child, four tokens
    found = search(0, budget=Budget(scorer_calls=3))
    assert found.out.stats.search[0]["scorer_calls"] == 3
    assert search(0, generations=7).search.state.generations == 7
    assert search(0, generations=7).out.stats.search[0]["stopped"] == "generations"
    found = search(0, goal=0.25, rollouts=200)
    assert found.out.stats.search[0]["stopped"] == "goal"
    assert found.search.finished[-1].score >= 0.25 > max((p.score for p in found.search.finished[:-1]), default=0)


@pytest.mark.parametrize("settings", [{}, {"b": 2}, {"b": 3, "k": 2}, {"sequence_cache": False}], ids=str)
def test_a_budget_of_tokens_is_kept_exactly(settings):
    whole = search(3, rollouts=4, **settings).out.stats.search[0]["generated"]
    for tokens in range(1, whole + 2):
        found = search(3, rollouts=4, budget=Budget(tokens=tokens), **settings)
        facts = found.out.stats.search[0]
        assert facts["generated"] <= tokens
        assert found.out.stats.new_tokens <= tokens
        assert (facts["stopped"] == "budget of tokens") == (tokens < whole)


def test_every_token_of_the_tree_counts_once():
    for b in (1, 2, 3):  # the child, and b tokens a step
        assert search(0, rollouts=1, b=b).out.stats.search[0]["generated"] == 1 + b * (LENGTH - 1)
    found = search(0, rollouts=30)
    nodes = {node for _, last, _ in found.search.state.history for node in found.search.tree.shape.path(last)}
    assert found.out.stats.search[0]["generated"] == len(nodes)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *[({name: 0}, "must be at least 1") for name in ("k", "b", "generations", "rollouts")],
        ({"c": -1.0}, "c must not be negative"),
        ({"c": math.inf}, "both finite"),
        ({"c_base": 0.0}, "c_base positive"),
        ({"goal": math.nan}, "goal must be a reward, or None"),
        ({"prior": "flat"}, "prior must be one of children, full"),
        ({"selection": "puct"}, "selection must be one of p_ucb, p_uct, uct"),
        ({"backup": "median"}, "backup must be one of max, mean"),
        ({"sampled": True, "b": 2}, "set b=1 or sampled=False"),
    ],
    ids=str,
)
def test_settings_are_checked(wrong, says):
    with pytest.raises(ValueError, match=says):
        PGTD(**wrong)


def test_sampling_has_to_be_asked_for_twice():
    model, prompt = small_model(), torch.ones(1, 3, dtype=torch.long) * 5
    for decoder, do_sample in ((PGTD(), True), (PGTD(sampled=True), False)):
        with pytest.raises(ValueError, match="call with do_sample=False, or draw completions"):
            decoder.generate(model, prompt, max_new_tokens=3, do_sample=do_sample)
