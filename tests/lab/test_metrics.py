"""Metrics: formulas against naive loops and brute force, models with known distributions, and every error branch."""

import builtins
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decodelab.lab import mauve
from decodelab.lab import metrics as m

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
token_lists = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, eos_token_id=None, **SHAPE)).eval()


@pytest.fixture(scope="module")
def bigram():
    shape = {"hidden_size": 3, "intermediate_size": 4, "num_hidden_layers": 0, "num_attention_heads": 1, "max_position_embeddings": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=3, rms_norm_eps=1e-12, tie_word_embeddings=False, **shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(3))
        model.lm_head.weight.copy_((TABLE.log() / 3**0.5).T)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({"<unk>": 0, "once": 1, "upon": 2, "a": 3, "time": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


# repetition, diversity, distinct-n


@given(token_lists, st.integers(1, 4))
def test_repetition_equals_a_naive_loop(texts, n):
    total = again = 0
    for text in texts:
        seen = set()
        for i in range(len(text) - n + 1):
            gram = tuple(text[i : i + n])
            total, again = total + 1, again + (gram in seen)
            seen.add(gram)
    if total == 0:
        with pytest.raises(ValueError, match=f"no text has {n} tokens"):
            m.repetition(texts, n)
    else:
        assert m.repetition(texts, n) == pytest.approx(again / total)
        words = [" ".join(f"w{i}" for i in text) for text in texts]
        assert m.repetition(words, n) == m.repetition(texts, n)


@given(token_lists.filter(lambda texts: any(len(t) >= 4 for t in texts)))
def test_diversity_and_distinct(texts):
    expected = 1.0
    for n in (2, 3, 4):
        expected *= 1 - m.repetition(texts, n)
    assert m.diversity(texts) == pytest.approx(expected)
    assert 0 < m.distinct_n(texts, 2) <= 1 - m.repetition(texts, 2) + 1e-12


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_distinct_of_one_text_is_one_minus_repetition(text):
    assert m.distinct_n([text], 1) == pytest.approx(1 - m.repetition([text], 1))


def test_self_bleu_of_tokens_against_its_definition():
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 3, 9, 5, 6]]

    def bleu(row, others):
        product = 1.0
        for n in range(1, 5):
            own = Counter(zip(*(row[i:] for i in range(n))))
            seen = Counter()
            for other in others:
                seen |= Counter(zip(*(other[i:] for i in range(n))))  # of each n-gram as often as in the text that has most
            product *= (own & seen).total() / own.total()
        return product**0.25

    assert m.self_bleu(rows)[0] == pytest.approx(bleu(rows[0], rows[1:]))
    assert m.self_bleu([" ".join(map(str, row)) for row in rows]) == m.self_bleu(rows)
    assert m.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx([1, 1, 1])
    for few in ("one text", [], [[1, 2]]):
        with pytest.raises(ValueError, match="give a list of at least two"):
            m.self_bleu(few)


def test_repetition_refuses():
    with pytest.raises(ValueError, match="n must be positive"):
        m.repetition(["a b"], 0)
    for one in ("a b c", [1, 2, 3]):
        with pytest.raises(ValueError, match="not one text"):
            m.repetition(one, 2)
    with pytest.raises(ValueError, match="no text has 2 tokens"):
        m.distinct_n([], 2)


# what a model thinks


@given(st.lists(st.integers(0, 2), min_size=2, max_size=30), st.integers(2, 12))
@settings(deadline=None, max_examples=40)
def test_token_scores_of_a_known_distribution(bigram, ids, context):
    log_probs, first = m.token_scores(bigram, ids, context)
    assert log_probs.exp().tolist() == pytest.approx([TABLE[a, b].item() for a, b in pairwise(ids)], abs=1e-5)
    assert first.tolist() == [TABLE[a].argmax().item() == b for a, b in pairwise(ids)]


@pytest.mark.parametrize("context", [8, 9])
def test_windows_give_at_least_half_a_context(llama, context):
    ids = torch.randint(50, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    found, _ = m.token_scores(llama, ids, context)
    assert len(found) == 29
    full = [llama(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1)[ids[t]].item() for t in range(1, context)]
    assert found[: context - 1].tolist() == pytest.approx(full, abs=1e-4)
    for t in range(1, 30):
        scores = []
        for begin in range(max(0, t - context + 1), max(1, t - context // 2 + 1)):
            scores.append(llama(torch.tensor([ids[begin:t]])).logits[0, -1].log_softmax(-1)[ids[t]].item())
        assert min(abs(s - found[t - 1].item()) for s in scores) < 1e-4


def test_a_text_longer_than_the_model_is_read_in_windows(llama):
    assert math.isfinite(m.perplexity(llama, None, list(range(50)) * 3))


@given(st.integers(2, 40), st.integers(2, 30))
@settings(deadline=None, max_examples=15)
def test_uniform_model_has_perplexity_of_its_vocabulary(size, length):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, pad_token_id=None, **SHAPE)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = [i % size for i in range(length)]
    assert m.perplexity(model, None, ids) == pytest.approx(size, rel=1e-4)
    assert m.coherence(model, ids[:1], ids[1:]) == pytest.approx(-math.log(size), rel=1e-4)
    assert m.greedy_ratio(model, [ids[0]], ids[1:]) == pytest.approx(ids[1:].count(0) / (length - 1))


def test_perplexity_agrees_with_the_loss_of_transformers(llama):
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    assert m.perplexity(llama, None, ids) == pytest.approx(math.exp(llama(ids, labels=ids).loss.item()), rel=1e-5)
    assert m.perplexity(llama, None, [ids[0], ids[1], ids[2]]) == m.perplexity(llama, None, ids.tolist())


def test_perplexity_of_strings(llama, tokenizer):
    assert m.perplexity(llama, tokenizer, "once upon a time") == m.perplexity(llama, None, [1, 2, 3, 4])
    assert m.perplexity(llama, tokenizer, ["once upon a time"]) == m.perplexity(llama, None, [[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        m.perplexity(llama, None, "once upon")


def test_coherence_and_greedy_ratio_by_hand(bigram):
    prompts, continuations = [[0], [1, 1]], [[0, 1, 2], [0]]
    first = (math.log(0.5) + math.log(0.25) + math.log(0.1)) / 3
    assert m.coherence(bigram, prompts, continuations) == pytest.approx((first + math.log(0.1)) / 2, abs=1e-5)
    assert m.greedy_ratio(bigram, prompts, continuations) == pytest.approx(1 / 4)


def test_greedy_text_has_greedy_ratio_one(llama):
    prompt = torch.tensor([[3, 4], [5, 6]])
    out = llama.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert m.greedy_ratio(llama, prompt, out[:, 2:]) == 1.0


def test_scoring_changes_nothing(llama):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    state = torch.get_rng_state()
    m.coherence(llama, [1, 2], [3, 4])
    assert torch.equal(state, torch.get_rng_state())
    assert not llama.training
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def test_scoring_refuses(llama):
    with pytest.raises(ValueError, match="two tokens and a context of two, got 1 and 64"):
        m.token_scores(llama, [1])
    with pytest.raises(ValueError, match="context of two, got 3 and 1"):
        m.token_scores(llama, [1, 2, 3], context=1)
    with pytest.raises(ValueError, match="neither may be empty"):
        m.continuation_scores(llama, [], [1])
    with pytest.raises(ValueError, match="2 prompts and 1 continuations"):
        m.coherence(llama, [[1], [2]], [[3]])
    for bad in ([], [torch.tensor([[1, 2]])], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="texts must be token ids"):
            m.perplexity(llama, None, bad)
    llama.train()
    try:
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            m.token_scores(llama, [1, 2])
    finally:
        llama.eval()


# MAUVE


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(sum), st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(sum))
def test_divergence_area_is_symmetric_and_one_for_equals(p, q):
    a = np.array(p) / sum(p)
    assert mauve.divergence_area(a, a) == pytest.approx(1.0)
    if sum(q[: len(p)]):
        b = np.array(q[: len(p)]) / sum(q[: len(p)])
        assert mauve.divergence_area(a, b) == pytest.approx(mauve.divergence_area(b, a))
        assert 0 <= mauve.divergence_area(a, b) <= 1 + 1e-9


def test_divergence_area_is_the_one_of_the_package():
    package = pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 1, (80, 4)).astype("float32"), rng.normal(0.4, 1, (60, 4)).astype("float32")
    theirs = package.compute_mauve(p, q, num_buckets=6, verbose=False)
    ours = mauve.mauve_score(p, q, bins=6)
    assert ours.score == pytest.approx(theirs.mauve, abs=1e-6)
    assert ours.smoothed == pytest.approx(theirs.mauve_star, abs=1e-6)


def test_mauve_prints_its_settings():
    pytest.importorskip("mauve")
    p = np.random.default_rng(0).normal(size=(40, 3))
    score = mauve.mauve_score(p, p, seed=7)
    assert (score.score, score.smoothed) == pytest.approx((1.0, 1.0))
    assert str(score) == "MAUVE 1.000, smoothed 1.000 (40 and 40 texts, 4 bins, c = 5, seed 7, 3-dimensional features)"
    assert mauve.mauve_score(p, p + 0.1, seed=7) == mauve.mauve_score(p, p + 0.1, seed=7)


def test_mauve_of_texts_uses_the_featuriser():
    pytest.importorskip("mauve")
    texts = [f"{i} tales" for i in range(20)]
    featuriser = lambda texts: np.array([[float(t.split()[0]), 1.0] for t in texts])  # noqa: E731
    assert mauve.mauve_score(texts, texts, featuriser, bins=2) == mauve.mauve_score(featuriser(texts), featuriser(texts), bins=2)


def test_mauve_refuses(monkeypatch):
    p = np.ones((5, 2))
    with pytest.raises(ValueError, match="give a featuriser"):
        mauve.mauve_score(["a", "b"], p)
    with pytest.raises(ValueError, match=r"p must be at least two texts or finite features \[n, d\], got shape \(1, 2\)"):
        mauve.mauve_score(p[:1], p)
    with pytest.raises(ValueError, match="finite"):
        mauve.mauve_score(p, p * np.nan)
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        mauve.mauve_score(p, np.ones((5, 3)))
    for bad in ({"bins": 1}, {"bins": 11}, {"scaling": 0}):
        with pytest.raises(ValueError, match="bins between 2 and"):
            mauve.mauve_score(p, p, **bad)
    real = builtins.__import__

    def without_mauve(name, *args, **kwargs):
        if name == "mauve":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mauve)
    with pytest.raises(ImportError, match=r"pip install decodelab\[metrics\]"):
        mauve.mauve_score(p, p)


def test_featuriser_batches_and_cuts(llama, tokenizer):
    texts = ["once", "once upon a time", "upon a", "time time time time time"]
    alone = np.concatenate([mauve.hidden_state_featuriser(llama, tokenizer, batch_size=1)([t]) for t in texts])
    assert np.allclose(mauve.hidden_state_featuriser(llama, tokenizer, batch_size=3)(texts), alone, atol=1e-5)
    cut = mauve.hidden_state_featuriser(llama, tokenizer, max_length=2)
    assert np.allclose(cut(["once upon a time"]), cut(["once upon"]), atol=1e-6)
    last = llama(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states[-1][0, -1]
    assert np.allclose(cut(["once upon"])[0], last.detach().numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="without tokens"):
        cut(["once", ""])
    for bad in ({"max_length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            mauve.hidden_state_featuriser(llama, tokenizer, **bad)


# references

short_words = st.lists(st.sampled_from(["king", "frog", "the", "Frog!", "queen"]), max_size=6).map(" ".join)


@given(short_words, short_words)
def test_token_f1_equals_a_naive_count(a, b):
    x, y = m.normalise_answer(a).split(), m.normalise_answer(b).split()
    common = sum(min(x.count(w), y.count(w)) for w in set(x))
    expected = float(x == y) if not x or not y else (0 if not common else 2 / (len(x) / common + len(y) / common))
    assert m.token_f1(a, b) == pytest.approx(expected)
    assert m.token_f1(a, b) == m.token_f1(b, a)
    assert m.exact_match(a, b) == float(x == y)


@given(st.text(max_size=30))
def test_normalisation_is_idempotent_and_rouge_is_bounded(text):
    assert m.normalise_answer(m.normalise_answer(text)) == m.normalise_answer(text)
    assert all(0 <= v <= 1 for v in m.rouge(text, "once upon a time").values())


def test_references():
    assert m.exact_match("x", ["y", "X."]) == 1.0
    assert m.token_f1("a frog king", ["queen", "frog"]) == pytest.approx(2 / 3)
    assert m.rouge("kings running", "king runs")["rouge1"] == 0.0
    assert m.rouge("kings running", "king runs", stemmer=True)["rouge1"] == 1.0
    for metric in (m.exact_match, m.token_f1):
        with pytest.raises(ValueError, match="at least one reference"):
            metric("x", [])


# bootstrap and ranks


def test_bootstrap_of_two_values_is_the_exact_distribution():
    drawn = Counter()
    for seed in range(300):
        drawn[m.bootstrap_interval([0, 1], confidence=0.5, seed=seed, resamples=1).low] += 1
    assert stats.chisquare([drawn[0.0], drawn[0.5], drawn[1.0]], [75, 150, 75]).pvalue > 1e-3


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_bootstrap_interval_properties(values, seed):
    found = m.bootstrap_interval(values, seed=seed, resamples=50)
    assert found == m.bootstrap_interval(values, seed=seed, resamples=50)
    assert found.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    narrow = m.bootstrap_interval(values, confidence=0.5, seed=seed, resamples=50)
    assert found.low <= narrow.low <= narrow.high <= found.high


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=60)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)).confidence_interval
    ours = m.bootstrap_interval(values, resamples=4000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert ours.value in ours
    assert 100 not in ours


@given(st.lists(st.floats(0.5, 10), min_size=2, max_size=10), st.floats(0.5, 4))
@settings(deadline=None, max_examples=30)
def test_ratio_of_proportional_pairs_is_certain(b, factor):
    for statistic in (np.mean, np.median):
        found = m.bootstrap_ratio([factor * x for x in b], b, statistic, resamples=30)
        assert (found.low, found.value, found.high) == pytest.approx((factor,) * 3)


def test_interval_shows_itself():
    assert str(m.bootstrap_interval([1, 1, 1])) == "1 [1, 1] (95%, n = 3)"


def test_bootstrap_refuses():
    for bad in ([1], [], [1, float("nan")], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match="at least two values, all finite"):
            m.bootstrap_interval(bad)
    for bad in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="confidence must lie in"):
            m.bootstrap_interval([1, 2], **bad)
    for a, b in (([1, 2], [1]), ([1, 2], [1, 0])):
        with pytest.raises(ValueError, match="must be pairs and b positive"):
            m.bootstrap_ratio(a, b)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_the_one_of_scipy(pairs):
    a, b = map(list, zip(*pairs))
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert m.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    else:
        with pytest.raises(ValueError, match="not constant"):
            m.rank_correlation(a, b)
