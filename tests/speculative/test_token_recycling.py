"""Token recycling: the table, the tree, and that the table never changes the text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB, left_pad, random_prompts, small_model
from transformers import LogitsProcessor, LogitsProcessorList

from decodelab.speculative.token_recycling import (
    TEMPLATES,
    TokenRecycling,
    learn_template,
    rank_paths,
    read_table,
    template_levels,
    template_tree,
    write_table,
)

TEMPLATE = ["0", "1", "2", "00", "01", "10", "000"]


def decode(decoder, model, ids, new=24, **kwargs):
    return decoder.generate(model, ids, max_new_tokens=new, do_sample=False, **kwargs)


# the table


@settings(max_examples=300)
@given(entries=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 50)), min_size=1, max_size=30), last=st.booleans())
def test_write_table_is_a_dictionary(entries, last):
    tokens = torch.tensor([t for t, _ in entries])
    successors = torch.tensor([[v, v + 1] for _, v in entries])
    table = torch.full((8, 2), -1)
    write_table(table, tokens, successors, last)
    known = {}
    for t, v in entries:
        if last or t not in known:
            known[t] = [v, v + 1]
    assert table.tolist() == [known.get(t, [-1, -1]) for t in range(8)]


def test_write_table_leaves_its_arguments():
    tokens, successors = torch.tensor([1, 2, 1]), torch.tensor([[1], [2], [3]])
    write_table(torch.zeros(4, 1, dtype=torch.long), tokens, successors)
    assert tokens.tolist() == [1, 2, 1]
    assert successors.tolist() == [[1], [2], [3]]


ranks = st.sets(st.text("012", min_size=1, max_size=4), min_size=1, max_size=12)


def closed(paths):
    return sorted({p[:n] for p in paths for n in range(1, len(p) + 1)})


@settings(max_examples=200)
@given(paths=ranks.map(closed), seed=st.integers(0, 999), rows=st.integers(1, 3))
def test_read_table_is_a_walk(paths, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 11, (11, 3), generator=generator)
    roots = torch.randint(0, 11, (rows,), generator=generator)
    paths = rank_paths(paths)
    tokens = read_table(table, roots, template_levels(paths))
    for row in range(rows):
        assert tokens[row, 0] == roots[row]
        for node, path in enumerate(paths, start=1):
            token = int(roots[row])
            for rank in path:
                token = int(table[token, int(rank)])
            assert tokens[row, node] == token


# templates


@given(paths=ranks.map(closed), seed=st.randoms())
def test_templates_in_any_order(paths, seed):
    seed.shuffle(paths)
    found = rank_paths(paths)
    tree = template_tree(found)
    assert sorted(found) == sorted(paths)
    assert [len(p) for p in found] == sorted(map(len, paths))
    assert tree.depth.tolist() == [0, *map(len, found)]
    for node, path in enumerate(found, start=1):
        parent = int(tree.parents[node])
        assert ("" if parent == 0 else found[parent - 1]) == path[:-1]


@pytest.mark.parametrize("bad", [["00"], ["0", "0"], ["a"], [], ["0", "01", "012", "0234"], ["0", ""]])
def test_bad_templates(bad):
    with pytest.raises(ValueError, match="a template needs distinct digit paths with all their prefixes"):
        rank_paths(bad)


def test_unknown_template():
    with pytest.raises(ValueError, match=r"unknown template 'wide'; known: 2\.2\.2, or give a list of rank paths"):
        TokenRecycling(template="wide")
    assert "2.2.2" in TEMPLATES


def test_ranks_beyond_k_are_left_out(llama):
    assert TokenRecycling(k=1).paths == ["0" * n for n in range(1, 7)]
    assert len(TokenRecycling(k=8).tree) == 81
    bare = decode(TokenRecycling(k=2, template=["2", "20"]), llama, torch.tensor([[5, 6]]), 8)  # only the root is left
    assert bare.stats.emitted == [[1] * 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, r"k must lie in 1..10, got 0"),
        ({"k": 11}, r"k must lie in 1..10, got 11"),
        ({"start_from": "warm"}, "start_from must be one of 'hot', 'cold', got 'warm'"),
        ({"update": "some"}, "update must be one of 'all', 'accepted', got 'some'"),
        ({"writes": "both"}, "writes must be one of 'last', 'first', got 'both'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenRecycling(**fields)


def test_k_beyond_the_vocabulary():
    model = small_model(vocab=6, hidden=16)
    with pytest.raises(ValueError, match="k = 8 successors do not exist in a vocabulary of 6: set k <= 6"):
        decode(TokenRecycling(), model, torch.tensor([[2, 3]]))


# the decoder


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    k=st.integers(1, 8),
    template=st.sampled_from(["2.2.2", TEMPLATE]),
    update=st.sampled_from(["all", "accepted"]),
    writes=st.sampled_from(["last", "first"]),
    update_prompt=st.booleans(),
)
def test_no_table_changes_the_text(llama, seed, k, template, update, writes, update_prompt):
    prompt = random_prompts(1, lengths=(1, 8), seed=seed)[0]
    expected = llama.generate(prompt, max_new_tokens=20, do_sample=False)
    decoder = TokenRecycling(k=k, template=template, update=update, writes=writes, update_prompt=update_prompt)
    decoder.table = torch.randint(0, VOCAB, (VOCAB, k), generator=torch.Generator().manual_seed(seed))
    out = decode(decoder, llama, prompt, 20)
    assert out.sequences.equal(expected)
    assert decode(decoder, llama, prompt, 20).sequences.equal(expected)  # the table it has learnt
    depth = int(decoder.tree.depth.max())
    assert all(1 <= n <= 1 + depth for n in out.stats.emitted[0])
    assert 1.0 <= out.stats.tokens_per_forward <= 1 + depth


class Follows(LogitsProcessor):
    "Token t is followed by t + 1."

    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, 2 + (input_ids[:, -1:] - 1) % (scores.shape[-1] - 2), 0.0)


def test_the_best_and_the_worst_table(llama):
    "A table of the truth gives depth + 1 tokens a forward, a table that is always wrong gives one."
    prompt = torch.tensor([[5]])
    rule = LogitsProcessorList([Follows()])
    for add, tokens in ((1, 7), (3, 1)):
        decoder = TokenRecycling(k=1, update="accepted")
        decoder.observe = lambda *args: None  # keeps the table as it is
        decoder.table = 2 + (torch.arange(VOCAB)[:, None] - 2 + add) % (VOCAB - 2)
        out = decode(decoder, llama, prompt, 21, logits_processor=rule)
        assert out.continuations[0].tolist() == [*range(6, 27)]
        assert out.stats.emitted == [[tokens] * (21 // tokens)]


def test_a_text_that_repeats_itself_is_learnt():
    model = small_model(spread=0.02, seed=3)
    with torch.no_grad():  # every token is followed by itself
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    out = decode(TokenRecycling(), model, torch.tensor([[5, 6]]), 60)
    assert set(out.continuations[0].tolist()) == {6}
    assert out.stats.tokens_per_forward > 5


def test_the_table_after_a_call_by_hand(llama):
    prompt = torch.tensor([[5, 6, 7]])
    decoder = TokenRecycling(k=2, template=["0"], update="accepted")
    out = decode(decoder, llama, prompt, 1)
    with torch.no_grad():
        top = llama(prompt).logits[0, -1].topk(2).indices
    assert out.continuations[0].tolist() == [int(top[0])]
    expected = torch.zeros(VOCAB, 2, dtype=torch.long)
    expected[7] = top
    assert decoder.table.equal(expected)


def test_update_prompt_files_the_prompt(llama):
    prompt = torch.tensor([[5, 6, 7]])
    decoder = TokenRecycling(k=2, template=["0"], update="accepted", update_prompt=True)
    decode(decoder, llama, prompt, 1)
    with torch.no_grad():
        top = llama(prompt).logits[0].topk(2).indices
    assert decoder.table[[5, 6, 7]].equal(top)


def test_update_prompt_skips_padding(llama):
    inputs = left_pad([torch.tensor([[5, 6, 7]]), torch.tensor([[8]])])
    decoder = TokenRecycling(k=2, template=["0"], update="accepted", update_prompt=True)
    decoder.generate(llama, **inputs, max_new_tokens=1, do_sample=False)
    assert decoder.table[0].tolist() == [0, 0]


def test_hot_cold_reset_and_another_model(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=1)[0]
    hot, cold = TokenRecycling(), TokenRecycling(start_from="cold")
    first, again = decode(hot, llama, prompt).stats, decode(hot, llama, prompt).stats
    assert again.target_forwards < first.target_forwards
    one, two = decode(cold, llama, prompt).stats, decode(cold, llama, prompt).stats
    assert one.emitted == two.emitted == first.emitted
    hot.reset()
    assert hot.table is None
    assert sum(hot.hits) == 0
    assert decode(hot, llama, prompt).stats.emitted == first.emitted
    other = small_model(vocab=50)
    assert decode(hot, other, prompt.clamp_max(49)).sequences.shape == (1, 30)
    assert hot.table.shape == (50, 8)


def test_hits(llama):
    decoder = TokenRecycling()
    out = decode(decoder, llama, random_prompts(1, seed=2)[0])
    assert decoder.hits[0] == len(out.stats.emitted[0])
    accepted = sum(out.stats.accepted_lengths[0])
    assert accepted <= sum(decoder.hits[1:]) <= accepted + int(decoder.tree.depth.max())  # the last walk may be cut


# a tree for a machine


@settings(max_examples=100)
@given(
    falls=st.lists(st.integers(0, 3), min_size=80, max_size=80), slope=st.floats(0, 0.5), known=st.sampled_from([(1, 81), (1, 2, 9, 40)])
)
def test_the_learnt_template_is_the_fastest(falls, slope, known):
    decoder, hits = TokenRecycling(), [60]
    for node, fall in enumerate(falls, start=1):  # a node is accepted only with its parent
        hits.append(max(0, hits[int(decoder.tree.parents[node])] - 5 * fall))
    decoder.hits = hits
    curve = {n: 1 + slope * (n - 1) for n in known}
    found = learn_template(decoder, curve)
    assert rank_paths(found) == sorted(found, key=len)  # closed under prefixes

    def cost(n):
        last = known[-1]
        return 1 + slope * (n - 1) if n <= last else curve[last] * n / last

    best = sorted(hits[1:], reverse=True)
    speeds = [(1 + sum(best[:n]) / 60) / cost(n + 1) for n in range(1, 81)]
    assert speeds[len(found) - 1] == pytest.approx(max(speeds))
    accepted = dict(zip(decoder.paths, hits[1:]))
    assert sorted((accepted[p] for p in found), reverse=True) == best[: len(found)]


def test_no_template_without_use():
    with pytest.raises(ValueError, match="the decoder has not verified anything yet"):
        learn_template(TokenRecycling(), {1: 1.0})
