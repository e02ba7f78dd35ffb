"""A*-decoding: finite trees against brute force, identities of the edge costs, limits, budgets."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, PAD

from decodelab.core.fetched import fetched_folder
from decodelab.core.zoo import load
from decodelab.lab.table_model import table_model
from decodelab.sampling.base import Autoregressive
from decodelab.search.a_star import AStar, OpenList, edge_cost
from decodelab.search.base import Budget
from decodelab.search.scorers import reads

DEPTH = 4
NODES = [path for n in range(1, DEPTH + 1) for path in itertools.product((0, 1), repeat=n)]
LEAVES = [path for path in NODES if len(path) == DEPTH]
unit = st.floats(0, 1, allow_nan=False)
KINDS = ("rise", "fall", "none", "step", "neglogp")
COIN = table_model(torch.tensor([[0.7, 0.3], [0.4, 0.6]]))
START = torch.zeros(1, 1, dtype=torch.long)
PROMPT = torch.tensor([[5, 9, 33, 70]])


class Enumerated(AStar):
    "Every state has all its successors, one token each; notes f of what leaves the queue."

    def successors(self, search, state):
        return search.top([state], search.tree.logits([0]).shape[-1])[0]

    def begin(self, search):
        self.left = []
        return super().begin(search)

    def expand(self, search, frontier):
        self.left.append(search.state.best().info["f"])
        return super().expand(search, frontier)

    def answer(self, search, frontier):
        found = super().answer(search, frontier)
        self.left.append(found.info["f"])
        return found


def table_scorer(rewards):
    return reads("ids")(lambda texts: [rewards[tuple(t)] for t in texts])


def enumerated(rewards, depth=DEPTH, **fields):
    "The answer of a search through all texts of `depth` coins, and f of what left the queue."
    decoder = Enumerated(scorer=table_scorer(rewards), expansions=1000, **fields)
    out = decoder.generate(COIN, START, attention_mask=torch.ones_like(START), max_new_tokens=depth, do_sample=False)
    return tuple(out.continuations[0].tolist()), decoder.left


def path_f(path, rewards, kind):
    "f of a path from the definition."
    h = [1 - rewards[path[:n]] for n in range(1, len(path) + 1)]
    change = [b - a for a, b in itertools.pairwise(h)]
    return h[-1] + {"rise": sum(max(0, d) for d in change), "fall": sum(max(0, -d) for d in change), "none": 0}[kind]


def sampled(decoder, model, ids, seed=0, **kwargs):
    torch.manual_seed(seed)
    return decoder.generate(model, ids, **({"max_new_tokens": 20, "do_sample": True, "top_k": 0} | kwargs))


# finite trees against brute force


@settings(max_examples=30)
@given(st.lists(unit, min_size=len(NODES), max_size=len(NODES)))
def test_fall_returns_the_text_of_least_f(values):
    rewards = dict(zip(NODES, values))
    found, left = enumerated(rewards, edge_cost="fall")
    assert path_f(found, rewards, "fall") == pytest.approx(min(path_f(leaf, rewards, "fall") for leaf in LEAVES), abs=1e-9)
    assert left[-1] == pytest.approx(path_f(found, rewards, "fall"), abs=1e-9)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(left[1:]))  # the first one is the prompt


def test_rise_may_return_another_one():
    rewards = {(0,): 0.5, (1,): 0.4, (0, 0): 0.48, (0, 1): 0.1, (1, 0): 1.0, (1, 1): 0.1}
    found, _ = enumerated(rewards, depth=2, edge_cost="rise")
    best = min((p for p in rewards if len(p) == 2), key=lambda p: path_f(p, rewards, "rise"))
    assert (found, best) == ((0, 0), (1, 0))
    assert enumerated(rewards, depth=2, edge_cost="fall")[0] == (0, 0)  # f = 0.52 against 0.6


def test_rise_may_go_down():
    rewards = {(0,): 0.5, (1,): 0.1, (0, 0): 1.0, (0, 1): 0.2, (1, 0): 0.2, (1, 1): 0.2}
    _, left = enumerated(rewards, depth=2, edge_cost="rise")
    assert left == pytest.approx([0.0, 0.5, 0.0])


@settings(max_examples=25)
@given(st.lists(unit, min_size=len(LEAVES), max_size=len(LEAVES)), st.sampled_from(("rise", "fall", "none")))
def test_a_perfect_reward_finds_the_best_text_in_one_dive(values, kind):
    "r of a prefix is the value of the best text that begins with it."
    rewards = dict(zip(LEAVES, values))
    rewards |= {p: max(rewards[leaf] for leaf in LEAVES if leaf[: len(p)] == p) for p in NODES if len(p) < DEPTH}
    found, left = enumerated(rewards, edge_cost=kind)
    assert rewards[found] == max(values)
    assert len(left) == DEPTH + 1


# identities


@given(st.lists(unit, min_size=1, max_size=30))
def test_identities_of_the_edge_costs(h):
    rises, falls = (math.fsum(edge_cost(kind, a, b) for a, b in itertools.pairwise(h)) for kind in ("rise", "fall"))
    assert rises - falls == pytest.approx(h[-1] - h[0], abs=1e-12)
    f_rise, f_fall = rises + h[-1], falls + h[-1]
    assert f_rise == pytest.approx(f_fall + h[-1] - h[0], abs=1e-12)
    assert f_fall == pytest.approx(h[0] + rises, abs=1e-12)


@given(unit, unit)
def test_fall_is_consistent(before, after):
    assert before <= edge_cost("fall", before, after) + after + 1e-15


def test_other_edge_costs():
    assert [edge_cost(kind, 0.2, 0.5, 3.0, 0.1) for kind in KINDS] == pytest.approx([0.3, 0, 0, 0.1, 0.3])
    assert [edge_cost(kind, None, 0.5, 3.0, 0.1) for kind in KINDS] == pytest.approx([0, 0, 0, 0.1, 0.3])


@pytest.mark.parametrize("kind", ["step", "neglogp"])
def test_costs_that_do_not_read_the_reward(kind):
    "All texts have the same length and reward: `step` takes the first, `neglogp` the most probable one."
    _, left = enumerated(dict.fromkeys(NODES, 0.5), edge_cost=kind, c=0.3)
    table = [[0.7, 0.3], [0.4, 0.6]]
    probability = {p: math.prod(table[a][b] for a, b in itertools.pairwise((0, *p))) for p in LEAVES}
    least = 0.3 * DEPTH if kind == "step" else -0.3 * math.log(max(probability.values()))
    assert left[-1] == pytest.approx(0.5 + least, abs=1e-5)


# a perfect reward on sampled steps

SOUND = (0, 1)  # tokens of a right step
STEPS = table_model(torch.tensor([0.25, 0.15, 0.3, 0.3]).expand(4, -1).contiguous())  # right with probability 0.4


@reads("ids")
def perfect(texts):
    return [float(all(t in SOUND for t in text)) for text in texts]


class Kept(AStar):
    "Keeps the whole texts that were written."

    def answer(self, search, frontier):
        found = super().answer(search, frontier)
        self.whole.append(([p.tokens for p in search.finished], found.tokens))
        return found


def dives(k, expansions, rows=120, steps=3, **fields):
    decoder = Kept(scorer=perfect, k=k, expansions=expansions, step_tokens=1, **fields)
    decoder.whole = []
    out = sampled(decoder, STEPS, torch.zeros(rows, 1).long(), attention_mask=torch.ones(rows, 1).long(), max_new_tokens=steps)
    return decoder.whole, [row["stopped"] for row in out.stats.search]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_accuracy_of_one_dive_is_the_product_over_levels(k):
    steps, rows = 3, 120
    whole, stopped = dives(k, expansions=steps, rows=rows, steps=steps)
    right = sum(perfect([answer])[0] for (_, answer), why in zip(whole, stopped) if why == "done")
    expected = (1 - 0.6**k) ** steps
    assert abs(right / rows - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5


def test_a_right_text_that_was_written_is_returned():
    accuracies = []
    for k in (1, 2, 4):
        whole, _ = dives(k, expansions=12, rows=40)
        assert all(any(perfect(texts)) == bool(perfect([answer])[0]) for texts, answer in whole if texts)
        accuracies.append(sum(perfect([answer])[0] for _, answer in whole))
    assert accuracies == sorted(accuracies)
    assert accuracies[0] < accuracies[-1]


# limits


@pytest.mark.parametrize("fields", [{"k": 1}, {"k": 4, "scorer": reads("ids")(lambda texts: [0.3] * len(texts))}])
@pytest.mark.parametrize("step_tokens", [1, 3, 1024])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_one_chain_is_the_plain_sample(fields, step_tokens, kind, llama):
    "One successor, or a reward that says nothing: the first chain is followed, and it draws what plain sampling draws."
    for seed in range(3):
        torch.manual_seed(seed)
        plain = Autoregressive().generate(llama, PROMPT, max_new_tokens=20, do_sample=True, top_k=0).sequences
        decoder = AStar(step_tokens=step_tokens, edge_cost=kind, **fields)
        assert sampled(decoder, llama, PROMPT, seed).sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("expansions", [2, 40])
def test_greedy_is_plain_greedy_and_draws_nothing(expansions, llama, tokenizer):
    plain = llama.generate(PROMPT, max_new_tokens=20, do_sample=False)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    out = AStar(step_tokens=4, expansions=expansions).generate(llama, PROMPT, max_new_tokens=20, do_sample=False)
    assert out.sequences.equal(plain)
    assert torch.get_rng_state().equal(before)
    assert out.stats.search[0]["generated"] == 20


def test_a_reward_matters_with_several_successors(llama):
    evens = reads("ids")(lambda texts: [sum(t % 2 == 0 for t in text) / len(text) for text in texts])
    shares = {k: [] for k in (1, 6)}
    for k, seed in itertools.product(shares, range(6)):
        new = sampled(AStar(scorer=evens, k=k, step_tokens=2), llama, PROMPT, seed).continuations[0]
        shares[k].append(float((new % 2 == 0).float().mean()))
    assert min(shares[6]) > 0.7 > sum(shares[1]) / 6


def test_local_never_goes_back():
    "The first level's second best state is needed, which only the global queue still has."
    rewards = {(0,): 0.9, (1,): 0.8, (0, 0): 0.1, (0, 1): 0.2, (1, 0): 0.9, (1, 1): 0.1}
    assert enumerated(rewards, depth=2, edge_cost="none")[0] == (1, 0)
    assert enumerated(rewards, depth=2, edge_cost="none", frontier="local")[0] == (0, 1)
    assert enumerated(rewards, depth=2, edge_cost="none", max_open=1)[0] == (0, 1)


def test_a_whole_text_is_accepted_when_popped_or_when_generated():
    rewards = {(0,): 0.9, (1,): 0.8, (0, 0): 0.1, (0, 1): 0.2, (1, 0): 0.9, (1, 1): 0.1}
    assert enumerated(rewards, depth=2, edge_cost="none", goal="generated")[0] == (0, 1)


# budgets


@pytest.mark.parametrize("expansions", [1, 3, 7])
def test_expansions_are_limited_and_the_text_is_whole(expansions, llama):
    noise = reads("ids")(lambda texts: [(sum(t) * 37 % 100) / 100 for t in texts])
    for seed in range(4):
        out = sampled(AStar(scorer=noise, k=3, step_tokens=2, expansions=expansions), llama, PROMPT, seed)
        facts = out.stats.search[0]
        assert facts["generated"] <= expansions * 3 * 2 + 20
        assert facts["scorer_calls"] <= expansions * 3
        new = out.continuations[0].tolist()
        assert len(new) == 20 or new[-1] == EOS
        assert facts["stopped"] == "budget of expansions" or new[-1] == EOS  # ten steps are needed


@pytest.mark.parametrize("limit", [{"tokens": 13}, {"forwards": 5}, {"scorer_calls": 7}, {"tokens": 2}, {"seconds": 1e-9}])
def test_a_budget_is_never_exceeded(limit, llama):
    scorer = reads("ids")(lambda texts: [0.5] * len(texts))
    out = sampled(AStar(scorer=scorer, k=3, step_tokens=2, budget=Budget(**limit)), llama, PROMPT)
    facts = out.stats.search[0]
    assert facts["stopped"] == f"budget of {next(iter(limit))}"
    assert all(facts["generated" if name == "tokens" else name] <= n for name, n in limit.items() if name != "seconds")


def test_a_budget_that_is_spent_in_the_final_sample(llama):
    "One expansion of two steps of two tokens; of the sample that finishes the deeper one five tokens are paid."
    out = sampled(AStar(k=2, step_tokens=2, expansions=1, budget=Budget(tokens=9)), llama, PROMPT, suppress_tokens=[EOS])
    facts = out.stats.search[0]
    assert (facts["generated"], facts["stopped"]) == (9, "budget of tokens")
    assert out.continuations[0].numel() == 2 + 5


def test_forward_passes_are_those_of_the_model(llama):
    calls = []
    hook = llama.register_forward_hook(lambda *_: calls.append(1))
    try:
        for decoder in (AStar(k=3, step_tokens=3), AStar(k=3, step_tokens=3, expansions=2)):
            calls.clear()
            out = sampled(decoder, llama, PROMPT)
            assert len(calls) == out.stats.target_forwards == out.stats.search[0]["forwards"]
    finally:
        hook.remove()


def test_max_steps_makes_a_text_whole(llama):
    out = sampled(AStar(k=2, step_tokens=2, max_steps=3), llama, PROMPT)
    assert out.continuations[0].numel() == 6


# steps of text


def test_steps_end_at_the_delimiter_and_are_judged_whole(llama, tokenizer):
    seen = []

    def scorer(texts):
        seen.extend(texts)
        return [0.5] * len(texts)

    letter = "e"
    sampled(AStar(scorer=scorer, tokenizer=tokenizer, delimiter=letter, k=8), llama, PROMPT, max_new_tokens=60, suppress_tokens=[PAD, EOS])
    whole = max(map(len, seen))
    assert len(seen) > 5
    assert all(text.endswith(letter) for text in seen if len(text) < whole)


class Told(AStar):
    "Writes given steps."

    def successors(self, search, state):
        new = [state.fork() for _ in self.steps]
        for partial, text in zip(new, self.steps):
            for token in self.tokenizer.encode(text, add_special_tokens=False):
                search.append(partial, token)
        return new


@pytest.mark.parametrize(
    ("steps", "judged"),
    [(["ab", "ab ", "cd"], ["ab", "cd"]), (["  ", "ab", " "], ["ab"]), (["  ", " "], ["  "])],
    ids=["doubled", "empty", "all empty"],
)
def test_doubled_and_empty_steps_are_dropped(steps, judged, llama, tokenizer):
    seen = []

    def scorer(texts):
        seen.append(list(texts))
        return [0.5] * len(texts)

    decoder = Told(scorer=scorer, tokenizer=tokenizer, expansions=1)
    decoder.steps = steps
    decoder.generate(llama, PROMPT, max_new_tokens=8, do_sample=False)
    assert seen == [judged]


# the queue, values, errors


def test_equals_leave_the_queue_by_depth_then_by_age():
    queue = OpenList()
    for i, (f, depth) in enumerate([(0.5, 1), (0.5, 2), (0.2, 0), (0.5, 2)]):
        queue.push({"number": i}, f, depth)  # dictionaries cannot be compared
    assert queue.best() == {"number": 2}
    queue.keep(3)
    assert len(queue) == 3
    assert sorted(s["number"] for s in queue) == [1, 2, 3]
    assert [queue.pop()["number"] for _ in range(3)] == [2, 1, 3]
    assert queue.best() is None
    assert queue.expanded == 3


def test_a_forbidden_text_counts_as_zero():
    rewards = dict.fromkeys(NODES, 0.5) | {(0,): -math.inf}
    found, left = enumerated(rewards, edge_cost="none")
    assert found[0] == 1
    assert left[-1] == 0.5


@pytest.mark.parametrize("value", [1.5, -0.1, math.inf])
def test_a_reward_outside_the_unit_interval_is_refused(value):
    with pytest.raises(ValueError, match="a process reward lies between 0 and 1, the scorer said .*: rescale it"):
        enumerated(dict.fromkeys(NODES, value))


def test_wrong_settings():
    for wrong in ({"k": 0}, {"expansions": 0}, {"step_tokens": 0}, {"max_steps": 0}, {"max_open": 0}):
        with pytest.raises(ValueError, match="k, expansions, step_tokens, max_steps and max_open must be at least 1, got "):
            AStar(**wrong)
    for wrong in ({"delimiter": ""}, {"c": -1.0}, {"c": math.inf}):
        with pytest.raises(ValueError, match="give a delimiter that is not empty and a finite c of at least 0"):
            AStar(**wrong)
    for wrong in ({"edge_cost": "fare"}, {"frontier": "wide"}, {"goal": "seen"}):
        with pytest.raises(ValueError, match="must be one of"):
            AStar(**wrong)


@pytest.mark.small
def test_an_instruction_model():
    try:
        fetched_folder("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load("smollm2")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 + 25?"}], add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(asked, return_tensors="pt")
    digits = lambda texts: [float("42" in text) for text in texts]  # noqa: E731
    decoder = AStar(scorer=digits, tokenizer=tokenizer, delimiter="\n", k=3, expansions=6)
    torch.manual_seed(0)
    out = decoder.generate(
        model, inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=48, do_sample=True, temperature=0.8
    )
    facts = out.stats.search[0]
    assert 0 < facts["scorer_calls"] <= 18
    assert facts["forwards"] == out.stats.target_forwards
