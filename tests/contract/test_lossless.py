"""Lossless methods: the target's own tokens when greedy, the target's own distribution when sampling, whatever a drafter drafts.

A scripted drafter knows the truth and tells it as often as it is told to; negative controls, walks that are broken on purpose, show that the tests can fail.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    METHODS,
    SAMPLING_RULES,
    TOY_PROMPT,
    StopsAt,
    SumBias,
    V,
    added,
    exact_probs,
    fit,
    left_pad,
    plain,
    random_prompts,
    sample_counts,
)
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
)

from decodelab.core import ends
from decodelab.core.session import Session
from decodelab.core.tree import Tree
from decodelab.core.warp import draw, greedy, probabilities, process
from decodelab.sampling.base import Autoregressive
from decodelab.speculative import base
from decodelab.speculative.base import Draft, SpeculativeDecoder
from decodelab.speculative.token_recycling import TokenRecycling

LOSSLESS = [name for name, m in METHODS.items() if m.lossless]
every_lossless = pytest.mark.parametrize("name", LOSSLESS)
TREE = [0, 0, 0, 1, 1, 2, 3, 3]  # two children, three grandchildren, two below them


def rules(kind):
    "Keyword arguments of `generate` for one way to process scores."
    return {
        "none": {},
        "penalty": {"repetition_penalty": 1.3},
        "custom": {"logits_processor": LogitsProcessorList([SumBias()])},
    }[kind]


every_rule = pytest.mark.parametrize("rule", ["none", "penalty", "custom"])


# the choice itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 4096])
def test_the_best_token_is_the_first_of_the_largest(size, dtype):
    rows = max(2, 2**17 // size)  # enough numbers to be searched by chunks
    scores = (3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))).round().to(dtype)  # full of ties
    scores[0] = -torch.inf
    scores[1, size // 2] = torch.nan
    for part in (scores, scores[:1], scores[:, None]):
        tokens, best = greedy(part)
        assert tokens.equal(part.max(-1).indices)
        assert best.nan_to_num(1e9).equal(part.amax(-1).nan_to_num(1e9))
    tokens = greedy(scores[2:])[0]
    assert all(row.tolist().index(max(row.tolist())) == int(token) for row, token in zip(scores[2:12], tokens))


# greedy identity, every lossless method

NEW = 20


@pytest.fixture(scope="module")
def references(llama, gpt2):
    "Transformers' greedy continuation of 100 and 40 prompts, or of their first quarter, for every rule and model, computed once."
    prompts = {"llama": random_prompts(100, seed=11), "gpt2": random_prompts(40, seed=12)}
    models, kept = {"llama": llama, "gpt2": gpt2}, {}

    def get(kind, rule, share="quarter"):
        some = prompts[kind][: len(prompts[kind]) // (4 if share == "quarter" else 1)]
        known = kept.setdefault((kind, rule), [])
        known += [plain(models[kind], p, NEW, **rules(rule)) for p in some[len(known) :]]
        return models[kind], some, known[: len(some)]

    return get


shares = pytest.mark.parametrize("share", ["quarter", pytest.param("all", marks=pytest.mark.slow)])


@every_lossless
@every_rule
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@shares
def test_greedy_is_transformers_greedy(name, rule, kind, share, references):
    model, prompts, expected = references(kind, rule, share)
    decoder = METHODS[name].example(model)
    got = [added(decoder.generate(model, p, max_new_tokens=NEW, do_sample=False, **rules(rule)))[0] for p in prompts]
    assert got == expected


LONG_TO_COMPILE = ("aded", "longspec", "rsd_c")  # many shapes


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG_TO_COMPILE)) for n in LOSSLESS])
def test_greedy_is_the_same_when_compiled(name, references):
    model, prompts, expected = references("llama", "none")
    decoder = METHODS[name].example(model)
    decoder.compile = True
    got = [added(decoder.generate(model, p, max_new_tokens=NEW, do_sample=False))[0] for p in prompts[:12]]
    assert got == expected[:12]


@every_lossless
def test_a_long_greedy_text(name, llama):
    "128 tokens, beyond the first capacity of the cache."
    prompts = random_prompts(4, seed=13)
    decoder = METHODS[name].example(llama)
    for prompt in prompts:
        assert added(decoder.generate(llama, prompt, max_new_tokens=128, do_sample=False))[0] == plain(llama, prompt, 128)


def cut_at(row, end):
    return row[: row.index(end) + 1] if end in row else row


@every_lossless
@every_rule
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@shares
def test_greedy_in_padded_batches_of_three(name, rule, kind, share, references):
    model, prompts, expected = references(kind, rule, share)
    decoder = METHODS[name].example(model)
    for i in range(0, len(prompts), 3):
        some, truth = (prompts + prompts)[i : i + 3], (expected + expected)[i : i + 3]
        end = truth[0][i % NEW]  # one row ends early
        kwargs = rules(rule) | {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end}
        assert added(decoder.generate(model, **left_pad(some), **kwargs)) == [cut_at(row, end) for row in truth]


@pytest.fixture(scope="module")
def tale_references(tales):
    "Transformers' greedy continuation of 42 openings, or of every third, computed once a rule."
    model, tokenizer = tales
    who = ["The old king", "A poor fisherman", "The youngest daughter", "Once a fox", "The witch", "A giant", "Two brothers"]
    what = ["went into the forest and", "said to the", "had three sons, and", "came to a river, where", "was so", "began to"]
    prompts = [tokenizer(f"{a} {b}", return_tensors="pt").input_ids for a in who for b in what]
    kept = {}

    def get(rule, share):
        some = prompts if share == "all" else prompts[::3]
        if (rule, share) not in kept:
            kept[rule, share] = [plain(model, p, 24, **rules(rule)) for p in some]
        return model, some, kept[rule, share]

    return get


@every_lossless
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["none", pytest.param("custom", marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", ["third", pytest.param("all", marks=pytest.mark.slow)])
def test_greedy_on_tales(name, rule, batch, share, tale_references):
    model, prompts, expected = tale_references(rule, share)
    decoder = METHODS[name].example(model)
    pad = model.generation_config.pad_token_id or 0
    got = []
    for i in range(0, len(prompts), batch):
        out = decoder.generate(model, **left_pad(prompts[i : i + batch], pad), max_new_tokens=24, do_sample=False, **rules(rule))
        got += added(out)
    assert got == expected


# the scripted drafter


@dataclass
class Scripted(SpeculativeDecoder):
    "Knows the truth: tells exactly `accept` tokens of it, or each token with probability `right`, and noise otherwise."

    truth: list[list[int]] = field(default_factory=list)  # of each row of the batch, its continuation
    parents: list[int] = field(default_factory=lambda: [0, 0, 1, 2, 3])
    accept: int | None = None
    right: float = 0.5
    seed: int = 0

    def __post_init__(self):
        self.tree = Tree(self.parents)
        self.random = random.Random(self.seed)

    def draft(self, call, roots):
        vocabulary = call.model.config.vocab_size
        tokens = [[root] + [0] * (len(self.tree) - 1) for root in roots.tolist()]
        for i, row in enumerate(call.rows):
            ahead = self.truth[row][call.counts[row] :]
            on_path, told = 0, 0
            for node in range(1, len(self.tree)):
                depth, parent = int(self.tree.depth[node]) - 1, int(self.tree.parents[node])
                true = ahead[depth] if depth < len(ahead) else None
                tell = self.random.random() < self.right if self.accept is None else told < self.accept
                if parent == on_path and tell and true is not None:
                    tokens[i][node], on_path, told = true, node, told + 1
                else:
                    wrong = [t for t in (self.random.randrange(vocabulary) for _ in range(3)) if t != true]
                    tokens[i][node] = wrong[0] if wrong else (true + 1) % vocabulary
        return Draft(torch.tensor(tokens, device=roots.device), self.tree)


@pytest.fixture(scope="module")
def case(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=21)[0]
    truth = plain(llama, prompt, 24, repetition_penalty=1.3)
    return prompt, truth


def scripted(model, prompt, truth, new, rule="penalty", **fields):
    decoder = Scripted(truth=[truth], **fields)
    settings = rules(rule) | fields.pop("settings", {})
    return decoder.generate(model, prompt, max_new_tokens=new, do_sample=False, **settings)


@pytest.mark.parametrize("accept", range(6))
def test_every_acceptance_length(accept, llama, case):
    prompt, truth = case
    for new in range(1, 15):
        out = scripted(llama, prompt, truth, new, accept=accept, parents=[0, 0, 1, 2, 3, 4])
        assert added(out) == [truth[:new]]
        whole, rest = divmod(new, accept + 1)
        assert out.stats.emitted == [[accept + 1] * whole + ([rest] if rest else [])]
        assert out.stats.target_forwards == 1 + len(out.stats.emitted[0])


@pytest.mark.parametrize("accept", range(5))
def test_every_cut_by_an_end_of_sequence(accept, llama, case):
    prompt, truth = case
    for position in range(12):
        end = truth[position]
        expected = truth[: truth.index(end) + 1]
        decoder = Scripted(truth=[truth], accept=accept)
        out = decoder.generate(llama, prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.3, eos_token_id=end)
        assert added(out) == [expected]
        assert out.sequences.shape[1] == 6 + len(expected)


@pytest.mark.parametrize("accept", range(5))
def test_every_cut_by_a_stopping_criterion(accept, llama, case):
    prompt, truth = case
    for n in range(1, 12):
        for stop in (StopsAt(length=6 + n), StopsAt(token=truth[n])):
            expected = truth[:n] if stop.length else truth[: truth.index(truth[n]) + 1]
            decoder = Scripted(truth=[truth], accept=accept)
            kwargs = {"repetition_penalty": 1.3, "stopping_criteria": StoppingCriteriaList([stop])}
            assert added(decoder.generate(llama, prompt, max_new_tokens=20, do_sample=False, **kwargs)) == [expected]


trees = st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.integers(0, i) for i in range(n)])).map(lambda p: [0, *p])


@settings(max_examples=70)
@given(
    parents=trees,
    right=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 999),
    rule=st.sampled_from(["none", "penalty", "custom"]),
)
def test_any_tree_any_drafter(parents, right, seed, rule, references):
    model, prompts, expected = references("llama", rule)
    truth = expected[seed % len(prompts)]
    end = truth[seed % NEW]
    decoder = Scripted(truth=[truth], parents=parents, right=right, seed=seed)
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | rules(rule)
    assert added(decoder.generate(model, prompts[seed % len(prompts)], **kwargs)) == [truth]
    out = decoder.generate(model, prompts[seed % len(prompts)], **kwargs, eos_token_id=end)
    assert added(out) == [cut_at(truth, end)]
    depth = int(Tree(parents).depth.max())
    assert all(1 <= n <= depth + 1 for n in out.stats.emitted[0])
    if right == 1.0:  # only the end of a branch, or of the text, ends a walk
        assert all(n > 1 for n in out.stats.emitted[0][:-1])


@every_rule
def test_any_tree_any_drafter_in_a_batch(rule, references):
    @settings(max_examples=25)
    @given(parents=trees, right=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=st.integers(0, 999))
    def check(parents, right, seed):
        chosen = [(seed * step + i) % len(prompts) for i, step in enumerate((1, 7, 13))]
        truth = [expected[i] for i in chosen]
        end = truth[0][seed % NEW]
        decoder = Scripted(truth=truth, parents=parents, right=right, seed=seed)
        kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end} | rules(rule)
        out = decoder.generate(model, **left_pad([prompts[i] for i in chosen]), **kwargs)
        assert added(out) == [cut_at(row, end) for row in truth]

    model, prompts, expected = references("llama", rule)
    check()


# the joint distribution of the first three tokens


@dataclass
class FixedDraft(SpeculativeDecoder):
    "Drafts a fixed set of tokens at every node, wherever it is: no truth is needed to test a distribution."

    parents: list[int] = field(default_factory=lambda: list(TREE))
    shift: int = 3

    def draft(self, call, roots):
        tree = Tree(self.parents)
        order = [[tree.children_of()[int(tree.parents[n])].index(n) for n in range(1, len(tree))]]
        tokens = (self.shift + torch.tensor(order) * 2 + tree.depth[1:] + 0 * roots[:, None]) % V
        return Draft(torch.cat([roots[:, None], tokens], 1), tree)


DRAFTERS = {
    "chain": lambda: FixedDraft(parents=[0, 0, 1, 2]),
    "tree": lambda: FixedDraft(),
    "recycled": lambda: TokenRecycling(k=3, template=["0", "1", "2", "00", "01", "10", "000"]),
}


@pytest.mark.parametrize("drafter", list(DRAFTERS))
@pytest.mark.parametrize("rule", list(SAMPLING_RULES))
def test_joint_distribution(drafter, rule, toy):
    torch.manual_seed(0)
    asked, processors = SAMPLING_RULES[rule]
    counts = sample_counts(DRAFTERS[drafter](), toy, 20_000, **asked)
    assert fit(counts, exact_probs(toy, processors)) > 1e-3


def test_joint_distribution_of_plain_decoding(toy):
    torch.manual_seed(0)
    for asked, processors in SAMPLING_RULES.values():
        assert fit(sample_counts(Autoregressive(), toy, 20_000, **asked), exact_probs(toy, processors)) > 1e-3


def test_joint_distribution_with_an_end(toy):
    torch.manual_seed(0)
    probs = exact_probs(toy, [], end=5)
    assert fit(sample_counts(DRAFTERS["tree"](), toy, 20_000, eos_token_id=5), probs) > 1e-3


def test_the_toy_is_worth_something(toy):
    probs = exact_probs(toy, [])
    assert len(probs) == 216
    assert sum(probs.values()) == pytest.approx(1)
    assert max(probs.values()) < 0.2
    accepted = DRAFTERS["tree"]().generate(toy, TOY_PROMPT.expand(500, -1), max_new_tokens=3, do_sample=True, top_k=0, eos_token_id=99)
    first = [row[0] for row in accepted.stats.emitted]
    assert {1, 2, 3} <= set(first)  # the walk ends at every depth


@pytest.mark.slow
@pytest.mark.parametrize("drafter", list(DRAFTERS))
@pytest.mark.parametrize("rule", list(SAMPLING_RULES))
def test_joint_distribution_with_many_draws(drafter, rule, toy):
    torch.manual_seed(1)
    asked, processors = SAMPLING_RULES[rule]
    assert fit(sample_counts(DRAFTERS[drafter](), toy, 200_000, **asked), exact_probs(toy, processors)) > 1e-3


# negative controls: broken walks, which the same tests must reject


def walk_with(choose_token, drafted_prefix=True):
    "A walk like `base.walk` whose choice at a node is `choose_token(p, depth, drafted)` for p [vocab]."

    def walk(call, draft, logits, rule):
        tokens, children = draft.tokens.tolist(), draft.tree.children_of()
        paths, emitted = [], []
        start = call.prompt.shape[1]
        histories = torch.stack([call.sequences[row, : start + call.counts[row]] for row in call.rows]) if equal(call) else None
        probs = {}
        for r, row in enumerate(call.rows):
            node, path, new = 0, [0], []
            while True:
                key = (row, node) if histories is None else node
                if key not in probs or histories is None:
                    probs[key] = probs_at(call, logits, histories, r, node, new if drafted_prefix else [], draft)
                p = probs[key] if histories is None else probs[key][r]
                drafted = [tokens[r][c] for c in children[node]]
                token = choose_token(p, len(new), drafted)
                new.append(token)
                hit = next((c for c in children[node] if tokens[r][c] == token), None)
                if hit is None:
                    break
                node = hit
                path.append(hit)
            paths.append(path)
            emitted.append(new)
        return paths, emitted

    def equal(call):
        return len({call.counts[row] for row in call.rows}) == 1

    def probs_at(call, logits, histories, r, node, new, draft):
        drafted = [n for n in torch.nonzero(draft.tree.mask[node]).flatten().tolist() if n] if new else []
        if histories is not None:  # for all rows at once; the drafted tokens of a row stand on its own path
            ids = torch.cat([histories, draft.tokens[:, drafted]], 1)
            return probabilities(process(logits[:, node], ids, call.processors))
        row = call.rows[r]
        ids = torch.cat([call.sequences[row, : call.prompt.shape[1] + call.counts[row]], draft.tokens[r, drafted]])
        return probabilities(process(logits[r : r + 1, node], ids[None], call.processors))[0]

    return walk


def honest(p, depth, drafted):
    return int(draw(p))


def greedy_inside(p, depth, drafted):
    return int(draw(p)) if depth == 0 else int(greedy(p)[0])


def draw_again_after_rejection(p, depth, drafted):
    token = int(draw(p))
    return token if token in drafted else int(draw(p))


def reused_number():
    "One random number a path: the same noise decides at all its nodes."
    kept = {}

    def choose(p, depth, drafted):
        if depth == 0:
            kept["u"] = random.random()
        return min(int(np.searchsorted(p.double().cumsum(0).numpy(), kept["u"])), len(p) - 1)

    return choose


def p_value_of(toy, monkeypatch, choose, rule="plain", **kwargs):
    torch.manual_seed(2)
    random.seed(2)
    monkeypatch.setattr(base, "walk", walk_with(choose, **kwargs))
    asked, processors = SAMPLING_RULES[rule]
    return fit(sample_counts(DRAFTERS["tree"](), toy, 8_000, **asked), exact_probs(toy, processors))


@pytest.mark.parametrize("rule", ["plain", "penalty"])
def test_the_honest_control_passes(rule, toy, monkeypatch):
    assert p_value_of(toy, monkeypatch, honest, rule) > 1e-3


@pytest.mark.parametrize(
    "choose", [greedy_inside, draw_again_after_rejection, reused_number()], ids=["argmax", "redraw", "one draw a path"]
)
def test_broken_draws_are_rejected(choose, toy, monkeypatch):
    assert p_value_of(toy, monkeypatch, choose) < 1e-9


def test_processors_without_the_drafted_prefix_are_rejected(toy, monkeypatch):
    assert p_value_of(toy, monkeypatch, honest, "penalty", drafted_prefix=False) < 1e-9


def test_processors_left_out_are_rejected(toy):
    torch.manual_seed(2)
    counts = sample_counts(DRAFTERS["tree"](), toy, 8_000)
    for rule in ("temperature", "top_k", "top_p", "penalty"):
        assert fit(counts, exact_probs(toy, SAMPLING_RULES[rule][1])) < 1e-9


def feed_tree_with_node_numbers(self, tokens, tree, **more):
    "Like `Session.feed_tree`, but position ids count nodes instead of depth."
    wrong = Tree(tree.parents)
    wrong.depth = torch.arange(len(tree))
    return feed_tree(self, tokens, wrong, **more)


feed_tree = Session.feed_tree


def test_wrong_position_ids_are_rejected(toy, llama, case, monkeypatch):
    monkeypatch.setattr(Session, "feed_tree", feed_tree_with_node_numbers)
    torch.manual_seed(2)
    assert fit(sample_counts(DRAFTERS["tree"](), toy, 8_000), exact_probs(toy, [])) < 1e-9
    prompt, truth = case
    assert added(scripted(llama, prompt, truth, 20, parents=TREE, right=0.9)) != [truth[:20]]
    assert added(scripted(llama, prompt, truth, 20, parents=[0, 0, 1, 2], right=0.9)) == [truth[:20]]  # in a chain they are right


def test_an_end_accepted_in_mid_draft_is_rejected(toy, llama, case, monkeypatch):
    prompt, truth = case
    cut = ends.Ends.cut

    def looks_at_the_last_token_only(self, count, new):
        n, done = cut(self, count, new)
        if n < len(new) and new[n - 1] in self.eos:
            n = min(len(new), self.budget - count)
            done = new[n - 1] in self.eos or count + n >= self.budget
        return n, done

    step = base.Walk.step

    def walks_on(self, tokens, nodes):
        ends, self.call.eos = self.call.eos, ()
        step(self, tokens, nodes)
        self.call.eos = ends

    monkeypatch.setattr(ends.Ends, "cut", looks_at_the_last_token_only)
    monkeypatch.setattr(base.Walk, "step", walks_on)
    end = truth[1]
    out = Scripted(truth=[truth], accept=3).generate(
        llama, prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.3, eos_token_id=end
    )
    assert added(out) != [truth[: truth.index(end) + 1]]
    torch.manual_seed(2)
    assert fit(sample_counts(DRAFTERS["tree"](), toy, 8_000, eos_token_id=5), exact_probs(toy, [], end=5)) < 1e-9


def test_a_drafter_that_is_believed_is_rejected(llama, case, monkeypatch):
    "The greedy tests, too, must be able to fail: a walk that follows the first child without looking."

    def trusting(call, draft, logits, rule):
        paths, emitted = [], []
        for r in range(len(draft.tokens)):
            path = [0, *draft.tree.children_of()[0][:1]]
            paths.append(path)
            emitted.append([int(draft.tokens[r, path[-1]]), int(logits[r, path[-1]].argmax())])
        return paths, emitted

    monkeypatch.setattr(base, "walk", trusting)
    prompt, truth = case
    assert added(scripted(llama, prompt, truth, 20, right=0.5)) != [truth[:20]]
