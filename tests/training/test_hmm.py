"""Expectation maximisation of hidden Markov models, and the recipe that distils one from a language model."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, VOCAB, character_tokenizer, small_model

from decodelab.structured.hmm import HMM, load_hmm
from decodelab.training.hmm import Counts, HMMRecipe, Texts, clustered, em_step, expected_counts, loss, train_hidden_markov
from decodelab.training.recipes import recipes

H, V = 2, 3


@given(
    st.integers(0, 10**6),
    st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
@settings(max_examples=20, deadline=None)
def test_expected_counts_equal_the_sum_over_hidden_states(seed, rows, unseen):
    hmm = HMM.random(H, V, seed, sharpness=2.0, dtype=torch.float64)
    texts = Texts.of(rows)
    missing = torch.tensor(unseen).reshape(3, 4)[: len(rows), : texts.ids.shape[1]]
    wanted = Counts(torch.zeros(H).double(), torch.zeros(H, H).double(), torch.zeros(H, V).double())
    for i, row in enumerate(rows):
        weights = {}
        for z in product(range(H), repeat=len(row)):
            for x in product(*[range(V) if missing[i, t] else [row[t]] for t in range(len(row))]):
                p = hmm.initial[z[0]] * hmm.emission[z[0], x[0]]
                for t in range(1, len(row)):
                    p = p * hmm.transition[z[t - 1], z[t]] * hmm.emission[z[t], x[t]]
                weights[z, x] = float(p)
        total = sum(weights.values())
        for (z, x), p in weights.items():
            wanted.initial[z[0]] += p / total
            for t in range(len(row)):
                wanted.emission[z[t], x[t]] += p / total
                if t:
                    wanted.transition[z[t - 1], z[t]] += p / total
        wanted.log_likelihood += float(torch.tensor(total).log())
    got = expected_counts(hmm, texts, missing)
    for name in ("initial", "transition", "emission"):
        assert getattr(got, name).flatten().tolist() == pytest.approx(getattr(wanted, name).flatten().tolist(), abs=1e-9)
    assert got.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-6)


def drawn(hmm, n, length, seed=0):
    g, rows = torch.Generator().manual_seed(seed), []
    z = torch.multinomial(hmm.initial.expand(n, -1), 1, generator=g)[:, 0]
    for _ in range(length):
        rows.append(torch.multinomial(hmm.emission[z], 1, generator=g)[:, 0])
        z = torch.multinomial(hmm.transition[z], 1, generator=g)[:, 0]
    return torch.stack(rows, 1).tolist()


def test_the_likelihood_never_falls():
    truth = HMM.random(3, 8, seed=0, sharpness=3.0, dtype=torch.float64)
    rows = [row[: 1 + i % 12] for i, row in enumerate(drawn(truth, 300, 12))]
    texts, model, before = Texts.of(rows), HMM.random(4, 8, seed=1, dtype=torch.float64), float("inf")
    start = loss(model, texts)
    for _ in range(30):
        model = expected_counts(model, texts).model(pseudocount=0.0)
        now = loss(model, texts)
        assert now <= before + 1e-12
        before = now
    assert before < start - 0.05


def test_batches_change_nothing():
    texts = Texts.of(drawn(HMM.random(3, 8, sharpness=3.0), 50, 6))
    model = HMM.random(4, 8, seed=1, dtype=torch.float64)
    plan = HMMRecipe(dropout=0.0, chunks=1, steps=3)
    (a, before), (b, other) = (em_step(model, texts, replace(plan, batch_size=size), 3) for size in (7, 256))
    assert before == pytest.approx(other)
    assert a.emission.flatten().tolist() == pytest.approx(b.emission.flatten().tolist(), abs=1e-12)
    assert loss(model, texts, 7) == pytest.approx(loss(model, texts))


def test_clusters_of_separate_clouds():
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.arange(300) % 3
    found = clustered(centres[truth] + 0.1 * torch.randn(300, 2, generator=g), 3, seed=1)
    groups = {(int(a), int(b)) for a, b in zip(truth, found)}
    assert len(groups) == 3
    assert len({b for _, b in groups}) == 3


@pytest.fixture(scope="module")
def models():
    model = small_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] = 0.05  # it ends now and then
    return model, character_tokenizer()


MINI = HMMRecipe(prompts="none", states=5, texts=60, held_out=20, new_tokens=8, steps=4, chunks=2, batch_size=32)


def test_a_run_learns_and_a_killed_one_ends_alike(models, tmp_path):
    figures = train_hidden_markov(MINI, tmp_path / "whole", models)
    assert [point["step"] for point in figures["curve"]] == [0, 1, 2, 3, 4]
    assert figures["held_out_loss"] < figures["curve"][0]["eval_loss"]

    def killed(step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_hidden_markov(MINI, tmp_path / "cut", models, on_step=killed)
    assert not (tmp_path / "cut" / "hmm.safetensors").exists()
    steps = []
    again = train_hidden_markov(MINI, tmp_path / "cut", models, on_step=steps.append)
    assert steps == [3, 4]
    assert again["curve"] == figures["curve"]
    assert load_hmm(tmp_path / "cut").emission.equal(load_hmm(tmp_path / "whole").emission)
    with pytest.raises(ValueError, match="holds the model of another run, or a damaged one: name another folder"):
        train_hidden_markov(replace(MINI, states=6), tmp_path / "cut", models)


def test_the_beginning_from_clusters_is_better_than_a_random_one(models, tmp_path):
    starts = []
    for clusters in (True, False):
        plan = replace(MINI, clusters=clusters, steps=1)
        starts.append(train_hidden_markov(plan, tmp_path / str(clusters), models)["curve"][0]["loss"])
    assert starts[0] < starts[1]


def test_pairs_learn_prompts_and_answers(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("one two\nthree\nfour five\n")
    plan = replace(MINI, prompts=str(tmp_path / "prompts.txt"), pairs=True)
    pairs = train_hidden_markov(plan, tmp_path / "pairs", models)
    answers = train_hidden_markov(replace(plan, pairs=False), tmp_path / "answers", models)
    assert load_hmm(tmp_path / "pairs").reads_prompt
    assert not load_hmm(tmp_path / "answers").reads_prompt
    assert pairs["tokens"] > answers["tokens"]
    assert load_hmm(tmp_path / "pairs").vocabulary == VOCAB


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": 0}, "must be positive"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"pseudocount": -1.0}, "pseudocount be at least 0"),
        ({"learning_rate": 1.5}, r"learning_rate lie in \(0, 1\]"),
        ({"steps": "x"}, "steps must be a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(HMMRecipe(), **settings)


def test_bad_texts(models, tmp_path):
    with pytest.raises(ValueError, match="there are no texts, or empty ones"):
        Texts.of([[1], []])
    with pytest.raises(ValueError, match="cannot read"):
        train_hidden_markov(replace(MINI, prompts=str(tmp_path / "none.txt")), tmp_path / "out", models)


def test_the_recipe_is_registered():
    assert recipes()["hmm"].settings == HMMRecipe()
