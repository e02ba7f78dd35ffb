"""The session against the model run path by path, without a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB, left_pad, random_prompts, small_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from decodelab import PromptLookup, TokenRecycling
from decodelab.core.session import Session
from decodelab.core.tree import Tree

KINDS = [(kind, attention) for kind in ("llama", "gpt2", "qwen3") for attention in ("eager", "sdpa")]
trees = st.integers(1, 8).flatmap(lambda n: st.tuples(*[st.integers(0, i) for i in range(n)])).map(lambda p: [0, *p])


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    kind, attention = request.param
    model = small_model(kind, attention, seed=1)
    assert model.config._attn_implementation == attention
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def alone(model, tokens):
    "Logits of the last token of a text that is run alone."
    return model(torch.tensor([tokens])).logits[0, -1]


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def ancestors(parents, node):
    path = [node]
    while path[-1]:
        path.append(parents[path[-1]])
    return path[::-1]


# trees


@settings(max_examples=200)
@given(parents=trees)
def test_the_shape_of_a_tree(parents):
    tree = Tree(parents)
    paths = [ancestors(parents, n) for n in range(len(parents))]
    assert len(tree) == len(parents)
    assert tree.depth.tolist() == [len(p) - 1 for p in paths]
    assert [torch.nonzero(row).flatten().tolist() for row in tree.mask] == [sorted(p) for p in paths]
    assert [[c for c in range(1, len(parents)) if parents[c] == n] for n in range(len(parents))] == tree.children_of()
    assert [level.tolist() for level in tree.levels()] == [
        [n for n, p in enumerate(paths) if len(p) == d + 1] for d in range(1, max(map(len, paths)))
    ]
    added = tree.additive(torch.float32, torch.device("cpu"))
    assert added.dtype == torch.float32
    assert (added == 0).equal(tree.mask)
    assert added[~tree.mask].unique().tolist() in ([], [torch.finfo(torch.float32).min])
    assert tree.additive(torch.float32, torch.device("cpu")) is added
    assert tree.additive(torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16


def test_shapes_with_a_name():
    assert Tree.chain(3).parents.tolist() == [-1, 0, 1, 2]
    siblings = Tree.siblings(3)
    assert siblings.mask.equal(torch.eye(3, dtype=torch.bool))
    assert siblings.depth.tolist() == [0, 0, 0]
    assert Tree([7]).parents.tolist() == [-1]
    given_parents = torch.tensor([5, 0, 1])
    Tree(given_parents)
    assert given_parents.tolist() == [5, 0, 1]


@pytest.mark.parametrize("parents", [[0, 1], [0, 2, 1], [0, 0, 3]])
def test_parents_stand_before_children(parents):
    with pytest.raises(ValueError, match="every parent stands before its children"):
        Tree(parents)


# trees in a session


@settings(max_examples=15)
@given(
    rounds=st.lists(st.tuples(trees, st.lists(st.integers(0, 8), min_size=3, max_size=3)), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
def test_trees_are_their_paths(model, rounds, lengths, seed):
    "Several rounds of tree, uneven commit and chain, with padded rows, against every path run alone."
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    inputs = left_pad([torch.tensor([t]) for t in texts])
    with Session(model, inputs["attention_mask"]) as session:
        first = session.prefill(inputs["input_ids"])
        for row, text in enumerate(texts):
            assert_close(first[row, -1], alone(model, text))
        for parents, ends in rounds:
            nodes = torch.randint(2, VOCAB, (len(texts), len(parents)), generator=generator)
            logits = session.feed_tree(nodes, Tree(parents))
            assert logits.shape == (len(texts), len(parents), VOCAB)
            kept = []
            for row, text in enumerate(texts):
                for node in range(len(parents)):
                    assert_close(logits[row, node], alone(model, text + nodes[row, ancestors(parents, node)].tolist()))
                kept.append(ancestors(parents, ends[row] % len(parents)))
            session.commit(kept)
            texts = [text + nodes[row, path].tolist() for row, (text, path) in enumerate(zip(texts, kept))]
        chain = torch.randint(2, VOCAB, (len(texts), 2), generator=generator)
        ahead = session.feed(chain)
        for row, text in enumerate(texts):
            assert_close(ahead[row, 0], alone(model, text + chain[row, :1].tolist()))
            assert_close(ahead[row, 1], alone(model, text + chain[row].tolist()))
        positions = session.positions
        fed = [len(text) + 2 for text in texts]
        assert (positions.tolist() if isinstance(positions, torch.Tensor) else [positions] * len(fed)) == fed


def test_within_1e_5(model):
    text = random_prompts(1, lengths=(9, 9), seed=2)[0]
    parents = [0, 0, 0, 1, 1, 3]
    nodes = torch.tensor([[3, 10, 20, 11, 12, 13]])
    session = Session(model)
    session.prefill(text)
    logits = session.feed_tree(nodes, Tree(parents))
    scale = logits.abs().max()
    for node in range(6):
        expected = alone(model, text[0].tolist() + nodes[0, ancestors(parents, node)].tolist())
        assert (logits[0, node] - expected).abs().max() < 1e-5 * max(1.0, float(scale))


def test_a_row_that_keeps_nothing(model):
    texts = [[4, 5, 6], [7, 8, 9]]
    session = Session(model)
    session.prefill(torch.tensor(texts))
    session.feed_tree(torch.tensor([[3, 10, 11], [3, 10, 11]]), Tree([0, 0, 1]))
    session.commit([[0, 1, 2], []])
    ahead = session.feed(torch.tensor([[20], [21]]))
    assert_close(ahead[0, -1], alone(model, [4, 5, 6, 3, 10, 11, 20]))
    assert_close(ahead[1, -1], alone(model, [7, 8, 9, 21]))


def test_siblings(model):
    text = random_prompts(1, lengths=(6, 6), seed=4)[0]
    session = Session(model)
    session.prefill(text)
    logits = session.feed_tree(torch.tensor([[5, 6, 7]]), Tree.siblings(3))
    for i, token in enumerate((5, 6, 7)):
        assert_close(logits[0, i], alone(model, [*text[0].tolist(), token]))
    session.commit([[2]])
    assert_close(session.feed(torch.tensor([[9]]))[0, -1], alone(model, [*text[0].tolist(), 7, 9]))


# chains


@settings(max_examples=15)
@given(
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    back=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_rollback(model, pieces, back, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = left_pad(random_prompts(2, lengths=(1, 5), seed=seed))
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    session = Session(model, inputs["attention_mask"])
    session.prefill(inputs["input_ids"])
    for n in pieces:
        tokens = torch.randint(2, VOCAB, (2, n), generator=generator)
        session.feed(tokens)
        texts = [text + new for text, new in zip(texts, tokens.tolist())]
    back = [min(n, sum(pieces)) for n in back]
    session.rollback(back if seed % 2 else back[0])
    texts = [text[: len(text) - n] for text, n in zip(texts, back if seed % 2 else back[:1] * 2)]
    ahead = session.feed(torch.tensor([[5], [6]]))
    assert_close(ahead[0, -1], alone(model, [*texts[0], 5]))
    assert_close(ahead[1, -1], alone(model, [*texts[1], 6]))


def test_prefill_keeps_what_is_asked(model):
    text = random_prompts(1, lengths=(8, 8), seed=6)[0]
    whole = model(text).logits
    for keep, shape in ((1, 1), (3, 3), (0, 8)):
        logits = Session(model).prefill(text, keep=keep)
        assert logits.shape[1] == shape
        assert_close(logits, whole[:, -shape:])


def test_prefill_on_a_passed_cache(model):
    text = random_prompts(1, lengths=(8, 8), seed=7)[0]
    cache = DynamicCache()
    model(text[:, :5], past_key_values=cache, use_cache=True)
    session = Session(model, cache=cache)
    assert_close(session.prefill(text, keep=0), model(text).logits[:, 5:])
    assert session.stats.target_tokens == 3
    with pytest.raises(ValueError, match="the passed cache holds 8 positions, the prompt only 8: pass the whole text as input_ids"):
        session.prefill(text)


def test_select(model):
    texts = [[4, 5, 6], [8, 9], [10, 11, 12]]
    inputs = left_pad([torch.tensor([t]) for t in texts])
    session = Session(model, inputs["attention_mask"])
    session.prefill(inputs["input_ids"])
    session.feed_tree(torch.tensor([[3, 10, 20]] * 3), Tree([0, 0, 0]))
    session.commit([[0], [0, 2], [0, 1]])
    session.keep_rows(torch.tensor([2, 1]))
    logits = session.feed_tree(torch.tensor([[30, 31], [40, 41]]), Tree.chain(1))
    assert_close(logits[0, 1], alone(model, [10, 11, 12, 3, 10, 30, 31]))
    assert_close(logits[1, 1], alone(model, [8, 9, 3, 20, 40, 41]))
    session.commit([[0, 1], [0]])
    session.keep_rows(torch.tensor([1]))
    assert_close(session.feed(torch.tensor([[50]]))[0, -1], alone(model, [8, 9, 3, 20, 40, 50]))


def test_uneven_commits_take_no_more_slots_than_the_longest_row(model):
    texts = [[4, 5], [7], [8, 9, 10]]
    inputs = left_pad([torch.tensor([t]) for t in texts])
    session = Session(model, inputs["attention_mask"])
    session.prefill(inputs["input_ids"])
    tree, nodes = Tree([0, 0, 1, 2]), torch.tensor([[3, 10, 11, 12], [20, 21, 22, 23], [30, 31, 32, 33]])
    for i in range(45):  # beyond the first capacity
        session.feed_tree(nodes, tree)
        paths = [[0, 1, 2, 3] if i % 3 == row else [] for row in range(3)]  # one row at a time
        session.commit(paths)
        texts = [text + nodes[row, path].tolist() for row, (text, path) in enumerate(zip(texts, paths))]
        assert session.slots <= 3 + max(map(len, texts)) + 4
    ahead = session.feed(torch.tensor([[8], [9], [11]]))
    for row, token in enumerate((8, 9, 11)):
        assert_close(ahead[row, -1], alone(model, [*texts[row], token]))


def test_the_cache_grows_when_it_is_full(model):
    text = random_prompts(1, lengths=(5, 5), seed=8)[0][0].tolist()
    session = Session(model)
    session.prefill(torch.tensor([text]))
    first = session.cache.place.capacity
    for i in range(75):
        session.feed_tree(torch.tensor([[2 + i, 90, 3 + i]]), Tree([0, 0, 0]))
        session.commit([[0, 2]])
        text += [2 + i, 3 + i]
    assert session.cache.place.capacity > first
    assert_close(session.feed(torch.tensor([[9]]))[0, -1], alone(model, [*text, 9]))


@settings(max_examples=15)
@given(shapes=st.lists(trees, min_size=2, max_size=3), ends=st.lists(st.integers(0, 8), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_every_row_has_its_own_tree(model, shapes, ends, seed):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, VOCAB, (3 + row,), generator=generator).tolist() for row in range(len(shapes))]
    inputs = left_pad([torch.tensor([t]) for t in texts])
    nodes = max(map(len, shapes))
    tree = Tree([parents + [-1] * (nodes - len(parents)) for parents in shapes])
    tokens = torch.randint(2, VOCAB, (len(shapes), nodes), generator=generator)
    session = Session(model, inputs["attention_mask"])
    session.prefill(inputs["input_ids"])
    logits = session.feed_tree(tokens, tree)
    kept = []
    for row, parents in enumerate(shapes):
        assert tree.children_of(row)[: len(parents)] == Tree(parents).children_of()
        for node in range(len(parents)):
            assert_close(logits[row, node], alone(model, texts[row] + tokens[row, ancestors(parents, node)].tolist()))
        kept.append(ancestors(parents, ends[row] % len(parents)))
    session.commit(kept)
    ahead = session.feed(torch.full((len(shapes), 1), 5))
    for row, path in enumerate(kept):
        assert_close(ahead[row, -1], alone(model, texts[row] + tokens[row, path].tolist() + [5]))


@settings(max_examples=15)
@given(parents=trees, cuts=st.sets(st.integers(1, 8), max_size=3), end=st.integers(0, 8), seed=st.integers(0, 99))
def test_a_tree_that_grows(model, parents, cuts, end, seed):
    "Feeding a tree in pieces is feeding it at once."
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(2, VOCAB, (1, 4), generator=generator)
    tokens = torch.randint(2, VOCAB, (1, len(parents)), generator=generator)
    bounds = [0, *sorted(c for c in cuts if c < len(parents)), len(parents)]
    session = Session(model)
    session.prefill(text)
    pieces = [session.feed_tree(tokens[:, a:b], Tree(parents[:b])) for a, b in zip(bounds, bounds[1:])]
    logits = torch.cat(pieces, 1)
    for node in range(len(parents)):
        assert_close(logits[0, node], alone(model, text[0].tolist() + tokens[0, ancestors(parents, node)].tolist()))
    path = ancestors(parents, end % len(parents))
    session.commit([path])
    assert_close(session.feed(torch.tensor([[9]]))[0, -1], alone(model, [*text[0].tolist(), *tokens[0, path].tolist(), 9]))


# compiled


@pytest.fixture(scope="module")
def llama_model():
    return small_model("llama", seed=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_compiled_session_is_the_session(rows, llama_model):
    "Prefill, trees with a shape for each row, growth, chains, rollback and a row that leaves: the same logits."
    generator = torch.Generator().manual_seed(3)
    inputs = left_pad(random_prompts(rows, lengths=(3, 6), seed=5))
    sessions = [Session(llama_model, inputs["attention_mask"], compiled=c, remaining=40) for c in (False, True)]
    one, other = (s.prefill(inputs["input_ids"]) for s in sessions)
    assert_close(one, other)
    shapes = [[-1, 0, 0, 1, -1], [-1, 0, 1, 2, 3], [-1, 0, 0, 0, 0]][:rows]
    tokens = torch.randint(2, VOCAB, (rows, 5), generator=generator)
    for cut in (5, 2):
        for part, upto in ((tokens[:, :cut], cut), (tokens[:, cut:], 5)):
            if part.shape[1]:
                assert_close(*(s.feed_tree(part, Tree([p[:upto] for p in shapes])) for s in sessions))
        for s in sessions:
            s.commit([[0, 1], [0, 1, 2], [0]][:rows])
    chain = torch.randint(2, VOCAB, (rows, 3), generator=generator)
    assert_close(*(s.feed(chain) for s in sessions))
    for s in sessions:
        s.rollback(2)
    if rows > 1:
        for s in sessions:
            s.keep_rows(torch.tensor([2, 0]))
        chain = chain[[2, 0]]
    assert_close(*(s.feed(chain[:, :1]) for s in sessions))
    plain, fast = sessions
    assert plain.stats.target_tokens == fast.stats.target_tokens  # what fills up a shape is not billed
    assert fast.stats.compilations >= 1
    again = Session(llama_model, inputs["attention_mask"], compiled=True, remaining=40)
    again.prefill(inputs["input_ids"])
    again.feed(chain[:1].expand(rows, -1))
    assert again.stats.compilations <= 1  # shapes are kept with the model


def test_compiled_code_is_made_anew_when_the_model_changes():
    model = small_model("llama", seed=7)
    for change in (lambda: None, lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(-model.lm_head.weight.detach()))):
        change()
        session = Session(model, compiled=True)
        session.prefill(torch.tensor([[4, 5, 6]]))
        assert_close(session.feed(torch.tensor([[9]]))[0, -1], alone(model, [4, 5, 6, 9]))
    other = small_model("llama", seed=8)  # same shapes, other numbers
    session = Session(other, compiled=True)
    session.prefill(torch.tensor([[4, 5, 6]]))
    assert_close(session.feed(torch.tensor([[9]]))[0, -1], alone(other, [4, 5, 6, 9]))


# stats, refusals, end


def test_the_stats_of_a_session(model):
    session = Session(model)
    session.prefill(torch.tensor([[4, 5, 6], [7, 8, 9]]))
    session.feed(torch.tensor([[1], [2]]))
    session.feed_tree(torch.tensor([[3, 4, 5]] * 2), Tree([0, 0, 0]))
    assert session.stats.target_forwards == 3
    assert session.stats.target_tokens == 6 + 2 + 6
    assert session.stats.forward_seconds > 0


def test_close_lets_go(model):
    with Session(model) as session:
        session.prefill(torch.tensor([[4, 5, 6]]))
        assert session.slots == 3
    assert session.slots == 0
    assert session.output is None


def test_what_is_refused(model):
    with pytest.raises(
        ValueError, match="a cache with Static.* cannot be rolled back: leave out cache_implementation, or pass a plain DynamicCache"
    ):
        Session(model, cache=StaticCache(config=model.config, max_cache_len=16))
    session = Session(model)
    session.prefill(torch.tensor([[4, 5, 6]]))
    for n in (-1, 4):
        for asked in (n, [n]):
            with pytest.raises(ValueError, match=f"cannot roll back {n} of 3 tokens"):
                session.rollback(asked)


def test_a_passed_cache_is_left_as_it_is(model):
    cache = DynamicCache()
    model(torch.tensor([[4, 5]]), past_key_values=cache, use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]
    session = Session(model, cache=cache)
    session.prefill(torch.tensor([[4, 5, 6, 7]]))
    session.feed(torch.tensor([[8]]))
    assert cache.get_seq_length() == 2
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, before, strict=True))


SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE |= {"initializer_range": 0.3, "pad_token_id": 0}
LOCAL = {
    "window everywhere": lambda: MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=2, sliding_window=5)),
    "window in one layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, num_hidden_layers=2, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "chunks": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SHAPE, num_hidden_layers=2, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=6, no_rope_layers=[1, 0]
        )
    ),
}


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_see_a_part_of_the_text(kind, compiled):
    "Rows of different length, far beyond window and chunk, whose slots are used again: each node has the logits of its path."
    torch.manual_seed(0)
    model = LOCAL[kind]().eval()
    texts = [[4, 5, 6, 7, 8, 9, 10], [8, 9, 11]]
    inputs = left_pad([torch.tensor([t]) for t in texts])
    session = Session(model, inputs["attention_mask"], compiled=compiled, remaining=40)
    assert session.local
    session.prefill(inputs["input_ids"])
    tree, generator = Tree([0, 0, 0, 1, 2, 4]), torch.Generator().manual_seed(1)
    for paths in ([[0, 2, 4, 5], [0]], [[0], [0, 1, 3]], [[0, 1], [0, 2, 4]], [[0, 2], [0]]):
        tokens = torch.randint(2, VOCAB, (2, 6), generator=generator)
        logits = session.feed_tree(tokens, tree)
        for row in range(2):
            for node in range(6):
                assert_close(logits[row, node], alone(model, texts[row] + tokens[row, tree.mask[node]].tolist()))
        session.commit(paths)
        texts = [text + tokens[row, path].tolist() for row, (text, path) in enumerate(zip(texts, paths))]


def test_nodes_must_follow_those_that_wait(model):
    session = Session(model)
    session.prefill(torch.tensor([[4, 5, 6]]))
    with pytest.raises(ValueError, match="2 nodes were given for a tree of 3, of which 0 have been fed"):
        session.feed_tree(torch.tensor([[3, 4]]), Tree([0, 0, 0]))


# what other parts may read of it


@settings(max_examples=12)
@given(
    rounds=st.lists(st.tuples(trees, st.lists(st.integers(0, 8), min_size=3, max_size=3)), min_size=0, max_size=3),
    lengths=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    back=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_states_of_a_layer_are_those_of_the_kept_text(model, rounds, lengths, back, seed):
    "Padded rows, trees of which uneven paths stay, a rollback and a row that leaves, against each row's text read at once."
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    inputs = left_pad([torch.tensor([t]) for t in texts])
    with Session(model, inputs["attention_mask"]) as session:
        session.prefill(inputs["input_ids"])
        for parents, ends in rounds:
            nodes = torch.randint(2, VOCAB, (3, len(parents)), generator=generator)
            session.feed_tree(nodes, Tree(parents))
            paths = [ancestors(parents, end % len(parents)) for end in ends]
            session.commit(paths)
            for text, row, path in zip(texts, nodes.tolist(), paths):
                text += [row[node] for node in path]
        session.rollback(back)
        session.feed_tree(torch.full((3, 2), 5), Tree([0, 0]))  # nodes that wait do not count
        texts = [text[: len(text) - back] for text in texts]
        session.keep_rows(torch.tensor([2, 0]))
        for layer in (-1, 0):
            keys, values, kept = session.layer_states(layer)
            unordered = session.layer_states(layer, ordered=False)
            assert kept.sum(1).tolist() == unordered[2].sum(1).tolist() == [len(texts[2]), len(texts[0])]
            for row, text in enumerate((texts[2], texts[0])):
                if not text:
                    continue
                alone = model(torch.tensor([text]), use_cache=True).past_key_values.layers[layer]
                assert kept[row].tolist() == [i < len(text) for i in range(kept.shape[1])]
                assert_close(keys[row, :, : len(text)], alone.keys[0])
                assert_close(values[row, :, : len(text)], alone.values[0])
                for found, states in zip(unordered, (alone.keys, alone.values)):
                    assert_close(found[row][:, unordered[2][row]].sum(1), states[0].sum(1))
                assert session.layer_states(layer, ordered=False)[0].data_ptr() == unordered[0].data_ptr()  # nothing was copied


def test_states_of_a_layer_before_and_behind_a_passed_cache(model):
    text = random_prompts(1, (9, 9), seed=3)[0]
    with Session(model) as session, pytest.raises(ValueError, match="nothing has been fed yet, so there are no keys and values"):
        session.layer_states()
    cache = DynamicCache()
    model(text[:, :8], past_key_values=cache, use_cache=True)
    whole = model(text, use_cache=True).past_key_values.layers[-1]
    with Session(model, cache=cache) as session:
        session.resume(text[:, :8])
        keys, _, kept = session.layer_states()
        assert kept.all() and kept.shape == (1, 8)
        assert_close(keys, whole.keys[:, :, :8])
        session.feed(text[:, 8:])
        assert_close(session.layer_states()[1], whole.values)


@pytest.mark.parametrize("decoder", [PromptLookup(), TokenRecycling()], ids=lambda d: type(d).__name__)
def test_types_of_tokens_stay_with_their_tokens(decoder):
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**shape, is_decoder=True, initializer_range=0.5, max_position_embeddings=64, pad_token_id=0)
    model = BertLMHeadModel(config).eval()
    ids, types = torch.randint(5, 60, (1, 9)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 0]])
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, token_type_ids=types, **asked)
    assert not theirs.equal(model.generate(ids, token_type_ids=types.roll(-1, 1), **asked))
    assert decoder.generate(model, ids, token_type_ids=types, **asked).sequences.equal(theirs)
