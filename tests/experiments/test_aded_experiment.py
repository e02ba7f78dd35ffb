"""What the experiments of ADED are made of: a replay is a decoding, corpora have the size they are named after, arms are what they are called."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import small_model

from decodelab.experiments.speculative.aded import SETTINGS, arms, corpora, draft_size, per_forward, replay, replays, sweep
from decodelab.speculative.aded import ADED
from decodelab.speculative.trigram_table import TrigramTable


def noise(seed, vocab=8, share=0.7):
    "A random table on `share` of the pairs."
    rng, table = random.Random(seed), TrigramTable()
    for pair in [(u, v) for u in range(vocab) for v in range(vocab) if rng.random() < share]:
        table.weights[pair] = {w: rng.randint(1, 12288) / 4096 for w in rng.sample(range(vocab), rng.randint(1, 5))}
    return table


def chain(*tokens):
    "A table in which every pair is followed by the next token."
    table = TrigramTable()
    table.weights = {(u, v): {w: 1.0} for u, v, w in zip(tokens, tokens[1:], tokens[2:])}
    return table


@pytest.fixture(scope="module")
def toy():
    "Eight tokens: the table is soon full, and rows have many successors."
    return small_model(vocab=8, hidden=16, spread=0.5, seed=2)


def both(decoder, other, model, prompt, new, seed=0, **gen):
    "Tokens of each forward pass of a decoding, and of its replay."
    torch.manual_seed(seed)
    out = decoder.generate(model, torch.tensor([prompt]), max_new_tokens=new, **({"do_sample": True, "top_k": 0} | gen))
    return out.stats.emitted[0], replay(other, prompt, out.continuations[0].tolist())


@settings(max_examples=15)
@given(
    fields=st.fixed_dictionaries(
        {
            "iterations": st.integers(1, 60),
            "depth": st.integers(2, 5),
            "nodes": st.integers(1, 20),
            "maker": st.sampled_from(["mcts", "best_first"]),
            "eta": st.sampled_from([0.0, 0.04, 0.5]),
            "window": st.integers(3, 18),
        }
    ),
    prompts=st.lists(st.lists(st.integers(2, 7), min_size=1, max_size=20), min_size=1, max_size=2),
    new=st.integers(1, 30),
    sample=st.booleans(),
)
def test_replay_is_what_a_decoding_emits(toy, fields, prompts, new, sample):
    decoder, other = (ADED(noise(11), **fields) for _ in range(2))
    for seed, prompt in enumerate(prompts):
        real, replayed = both(decoder, other, toy, prompt, new, seed, do_sample=sample)
        assert replayed == real
    assert other.table.weights == decoder.table.weights


def test_a_replay_with_another_table_differs(toy):
    for broken in (ADED(noise(11), eta=0.0), ADED(), ADED(noise(12)), ADED(noise(11), nodes=2)):
        real, replayed = both(ADED(noise(11)), broken, toy, [3, 5, 4], 60, eos_token_id=None)
        assert real != replayed
        assert sum(real) == sum(replayed) == 60


def test_replay_by_hand():
    fixed = ADED(chain(1, 2, 3, 4, 5, 6, 7), eta=0.0)
    assert replay(fixed, [1, 2], [3, 4, 5, 6, 7]) == [5]
    assert replay(fixed, [1, 2], [3, 4, 5, 6]) == [4]
    assert replay(fixed, [1, 2], [3, 4, 9, 9, 9]) == [3, 1, 1]
    assert replay(fixed, [2], [3, 4, 5, 6, 7]) == [1, 4]
    assert replay(fixed, [1, 2], [9, 9]) == [1, 1]
    assert replay(fixed, [1, 2], []) == []
    assert replay(ADED(), [1, 2, 3], [1, 2, 3, 1, 2, 3]) == [1, 1, 4]  # (3, 1) and (1, 2) must have been followed by something


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), sizes=st.sets(st.integers(1, 40), min_size=1, max_size=4))
def test_corpora(lengths, sizes):
    rng = random.Random(0)
    documents = [[rng.randrange(4) for _ in range(n)] for n in lengths]
    found = corpora(iter(documents), list(sizes))
    assert set(found) == sizes
    for size, table in found.items():
        enough = [k for k in range(len(documents) + 1) if sum(lengths[:k]) >= size] or [len(documents)]
        assert table.weights == TrigramTable.count(documents[: enough[0]]).weights


def test_arms():
    "Names under which results are stored; each is what its name says."
    corpus = noise(1)
    found = arms(corpus)
    assert {n: (d.corpus is corpus, d.nodes, d.maker) for n, d in found.items() if isinstance(d, ADED)} == {
        "aded, empty start": (False, 64, "mcts"),
        "aded, corpus": (True, 64, "mcts"),
        "aded, corpus, 12 nodes": (True, 12, "mcts"),
        "best first, corpus, 12 nodes": (True, 12, "best_first"),
    }
    assert found["aded, empty start"].corpus is None
    others = {n: type(d).__name__ for n, d in found.items() if not isinstance(d, ADED)}
    assert others == {"plain loop": "Autoregressive", "token recycling": "TokenRecycling"}


def test_figures_of_a_sweep():
    assert per_forward([[2, 2], [4]], [[1, 1, 1, 1], [2, 2]])[0] == pytest.approx(2.0)
    prompts, texts = [[1, 2], [1, 2]], [[3, 4, 5, 6, 7], [3, 4, 9, 9, 9]]
    found = sweep({"empty": ADED(eta=0.0), "chain": ADED(chain(1, 2, 3, 4, 5, 6, 7), eta=0.0)}, prompts, texts)
    assert found["empty"] == {"tokens": 1.0, "over the first": [1.0, 1.0, 1.0]}
    assert found["chain"]["tokens"] == 10 / 4  # 5 and 3, 1, 1
    assert found["chain"]["over the first"][0] == pytest.approx(2 / (1 / 5 + 3 / 5))
    assert draft_size(ADED(chain(3, 4, 5, 6, 7, 8, 9), eta=0.0), [[1]], [[2, 3, 3, 4, 5, 6]]) == 4


def test_replays_hold_every_setting():
    text = [1, 2, 3, 1, 2, 4] * 4
    found = replays({0: TrigramTable(), 24: TrigramTable.count([text])}, [[1, 2], [2, 3]], [text[2:], text[3:]])
    assert list(found["settings"]) == list(SETTINGS)
    assert found["sources"]["0 tokens, frozen"]["tokens"] == 1.0
    assert found["sources"]["24 tokens, adapted"]["tokens"] == found["settings"]["default"]["tokens"]
    assert found["settings"]["default"]["over the first"] == [1.0, 1.0, 1.0]
