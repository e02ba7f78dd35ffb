"""DupMAE: masks and losses against explicit loops, leaks that are caught, the two-part score, three stages, killed runs, bad input, export."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, PreTrainedTokenizerFast, TrainerCallback

pytest.importorskip("accelerate")

from decodelab.experiments.training import dupmae as measured
from decodelab.experiments.training.dupmae import as_part, seed_interval, vector_gap, word_recall
from decodelab.lab.retrieval import RetrievalSet, bm25_ranking, collection, ndcg, ranked, reciprocal_ranks, topic_corpus
from decodelab.training import encoder_pretraining, retriever
from decodelab.training.dupmae import (
    DupMAE,
    TwoPart,
    TwoPartEncoder,
    WeakDecoder,
    bag_of_words_loss,
    decoder_mask,
    encoder_mask,
    kept_terms,
    max_pool,
    ordinary_tokens,
    two_part_scores,
)
from decodelab.training.encoder_pretraining import (
    DupMAERecipe,
    PretrainingBatches,
    bare_encoder,
    pretrain,
    pretraining_batch,
    retrieval_tokenizer,
)
from decodelab.training.recipes import recipes
from decodelab.training.retriever import (
    RetrieverRecipe,
    TwoPartIndex,
    contrastive_loss,
    cross_encoder,
    distillation_loss,
    encode_texts,
    export_sentence_transformer,
    fine_tune,
    hard_negatives,
    load_encoder,
    retrieval_scores,
)

CORPUS = topic_corpus(n_docs=60, topics=4, concepts=20, entities=20, n_test=10, length=(8, 14))
MINI = DupMAERecipe(
    "mini",
    vocabulary=200,
    hidden_size=16,
    layers=1,
    heads=2,
    reduced_size=8,
    max_length=20,
    batch_size=4,
    steps=8,
    warmup=1,
    save_every=4,
    eval_every=4,
)
TUNE = RetrieverRecipe(
    "tune", "nobody", k=8, n=2, top=12, max_length=20, max_query=10, batch_size=4, steps=4, warmup=1, teacher_steps=3, save_every=4
)


@pytest.fixture(autouse=True)
def _in_peace(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path / "no-data"))


@pytest.fixture(scope="module")
def tokenizer():
    return retrieval_tokenizer(CORPUS.docs, 200)


def model(spread=0.3, **more):
    "A random DupMAE whose weights are large enough that everything matters."
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return DupMAE(BertConfig(vocab_size=120, initializer_range=spread, reduced_size=8, **shape, **dropout, **more)).eval()


def batch(tokenizer, n=3, seed=0, **more):
    return pretraining_batch(CORPUS.docs[:n], tokenizer, 20, generator=torch.Generator().manual_seed(seed), **more)


def words_of(*texts):
    "Word numbers of texts given as lengths of their words, between two special tokens, padded."
    rows = [[-1, *(w for w, size in enumerate(sizes) for _ in range(size)), -1] for sizes in texts]
    longest = max(map(len, rows))
    real = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return torch.tensor([r + [-1] * (longest - len(r)) for r in rows]), real


sizes = st.lists(st.lists(st.integers(1, 3), max_size=7), min_size=1, max_size=3)
ratios = st.sampled_from([0.0, 0.15, 0.3, 0.5, 0.9, 1.0])


# masks


def hidden_words(lengths, draws, ratio):
    "The words that are hidden when they are taken in the order of their draws: one loop."
    n, before, found = round(ratio * sum(lengths)), 0, set()
    for w in sorted(range(len(lengths)), key=lambda w: draws[w]):
        if before + before + lengths[w] <= 2 * n:
            found.add(w)
        before += lengths[w]
    return found


@given(texts=sizes, ratio=ratios, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_decoder_masks_are_those_of_an_explicit_loop(texts, ratio, seed):
    words, real = words_of(*texts)
    visible = decoder_mask(words, real, ratio, torch.Generator().manual_seed(seed))
    L = words.shape[1]
    draws = torch.rand(len(texts), L, max(1, max(map(len, texts))), generator=torch.Generator().manual_seed(seed)).tolist()
    for b, lengths in enumerate(texts):
        for i in range(L):
            hidden = hidden_words(lengths, draws[b][i], ratio)
            for j in range(L):
                seen = bool(real[b, i]) and bool(real[b, j]) and i != j and int(words[b, j]) not in hidden
                assert bool(visible[b, i, j]) == seen


@given(texts=sizes, ratio=st.sampled_from([0.15, 0.3, 0.6, 0.99]), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_encoder_masks_are_whole_words_at_least_one_and_never_all(texts, ratio, seed):
    words, _ = words_of(*texts)
    selected = encoder_mask(words, ratio, torch.Generator().manual_seed(seed))
    draws = torch.rand(len(texts), 1, max(1, max(map(len, texts))), generator=torch.Generator().manual_seed(seed))[:, 0].tolist()
    for b, lengths in enumerate(texts):
        order = sorted(range(len(lengths)), key=lambda w: draws[b][w])
        expected = (hidden_words(lengths, draws[b], ratio) | set(order[:1])) - set(order[-1:])
        assert {int(w) for w in words[b][selected[b]]} == expected
        for w in range(len(lengths)):
            assert len(set(selected[b][words[b] == w].tolist())) == 1


def test_a_row_sees_the_expected_share_and_rows_differ():
    words, real = words_of([1] * 20)
    visible = decoder_mask(words.expand(1000, -1), real.expand(1000, -1), 0.5, torch.Generator().manual_seed(0))
    others = visible[:, 1:-1, 1:-1].float().sum(-1) / 19
    assert float(others.mean()) == pytest.approx(0.5, abs=0.03)
    assert not visible.diagonal(dim1=1, dim2=2).any()
    assert visible[:, 1:, 0].all() and not visible[:, 0, 0].any()
    assert visible[:, 1:-1, -1].all()  # [SEP] is never masked
    assert all(len({tuple(r) for r in rows.tolist()}) > 15 for rows in visible[:20, 1:-1, 1:-1])
    pieces, real = words_of([3, 1, 2, 2, 1, 3, 1, 2, 3, 2])
    hidden = ~decoder_mask(pieces.expand(1000, -1), real.expand(1000, -1), 0.5, torch.Generator().manual_seed(0))
    assert float(hidden[:, 0, 1:-1].float().mean()) == pytest.approx(0.5, abs=0.03)  # also where words have several tokens


# leaks


def decoder_outputs(m, ids, h, visible, decoder=None):
    place = m.bert.embeddings.position_embeddings.weight[: ids.shape[1]]
    return (decoder or m.weak_decoder)(h, place, m.bert.embeddings(ids), visible)


class ContextResidual(WeakDecoder):
    "Broken: the residual comes from the stream that holds the tokens."

    def forward(self, h, positions, context, visible):
        right = super().forward(h, positions, context, visible)
        return right + torch.cat([h[:, None], context[:, 1:]], 1)


def leaks(m, visible, decoder=None):
    "Rows whose output changes with their own token, rows that change with a token they do not see, and rows that ignore one that they see."
    ids = torch.randint(5, 120, (1, 12), generator=torch.Generator().manual_seed(1))
    h = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    before, own, unseen, ignored = decoder_outputs(m, ids, h, visible, decoder), [], [], []
    for j in range(1, 12):
        other = ids.clone()
        other[0, j] = 5 + (ids[0, j] - 4) % 115
        changed = (decoder_outputs(m, other, h, visible, decoder) != before).any(-1)[0]
        own += [j] if changed[j] else []
        unseen += [(i, j) for i in range(12) if changed[i] and not visible[0, i, j] and i != j]
        ignored += [(i, j) for i in range(12) if not changed[i] and visible[0, i, j]]
    return own, unseen, ignored


def test_no_row_knows_its_own_token_or_one_that_it_does_not_see():
    m = model()
    words, real = words_of([1] * 10)
    visible = decoder_mask(words, real, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert leaks(m, visible) == ([], [], [])
        ids, h = torch.randint(5, 120, (1, 12)), torch.randn(1, 16)
        assert (decoder_outputs(m, ids, h, visible) != decoder_outputs(m, ids, 0 * h, visible)).any(-1).all()


def test_leaks_are_caught():
    m = model()
    words, real = words_of([1] * 10)
    visible = decoder_mask(words, real, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert leaks(m, visible | torch.eye(12, dtype=torch.bool))[0] == list(range(1, 12))  # the diagonal is not hidden
        torch.manual_seed(0)
        broken = ContextResidual(m.config).eval()
        assert leaks(m, visible, broken)[0] == list(range(1, 12))
        one = visible[:, 3:4].expand(-1, 12, -1)  # one mask for all rows
        assert leaks(m, one)[0] != []


# losses against explicit loops


def looped_decoder(layer, h, positions, context, visible):
    "One text, one row, one head at a time."
    L, d = context.shape
    size = d // layer.heads
    KV = [h if j == 0 else context[j] for j in range(L)]
    rows = []
    for i in range(L):
        Q, seen = h + positions[i], []
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            q = layer.query(Q)[part]
            logits = [float(q @ layer.key(KV[j])[part]) / math.sqrt(size) for j in range(L) if visible[i, j]]
            values = [layer.value(KV[j])[part] for j in range(L) if visible[i, j]]
            weights = [math.exp(x - max(logits)) for x in logits]
            seen.append(sum(w / sum(weights) * v for w, v in zip(weights, values)))
        x = layer.norm1(Q + layer.out(torch.cat(seen)))
        rows.append(layer.norm2(x + layer.down(torch.nn.functional.gelu(layer.up(x)))))
    return torch.stack(rows)


@torch.no_grad()
def looped_losses(m, made, pool_masked=False):
    mlm, dec, bow = [], [], []
    for b, ids in enumerate(made["input_ids"]):
        n = int(made["attention_mask"][b].sum())
        H = m.bert(made["masked_ids"][b : b + 1, :n]).last_hidden_state[0]
        rebuilt = looped_decoder(
            m.weak_decoder, H[0], m.bert.embeddings.position_embeddings.weight[:n], m.bert.embeddings(ids[None, :n])[0], made["visible"][b]
        )
        best = [-math.inf] * m.config.vocab_size
        for i in range(1, n):
            if i < n - 1:
                dec.append(-float(m.cls(rebuilt[i]).log_softmax(-1)[ids[i]]))
            if made["selected"][b, i]:
                mlm.append(-float(m.cls(H[i]).log_softmax(-1)[ids[i]]))
            if pool_masked or (i < n - 1 and not made["selected"][b, i]):
                best = [max(x, y) for x, y in zip(best, (m.cls(H[i]) if m.lpu is None else m.lpu(H[i])).tolist())]
        total = math.log(sum(math.exp(x - max(best)) for x in best)) + max(best)
        bow.append(sum(total - best[x] for x in set(ids[1 : n - 1].tolist())) / (n - 2))
    return [sum(x) / len(x) for x in (mlm, dec, bow)]


@pytest.mark.parametrize("more", [{}, {"lpu": "linear"}, {"pool_masked": True}, {"w_bow": 1.0, "w_dec": 0.5}], ids=str)
def test_the_three_losses_are_those_of_explicit_loops(more, tokenizer):
    m, made = model(**more), batch(tokenizer)
    with torch.no_grad():
        found = m(**made)
    expected = looped_losses(m, made, more.get("pool_masked", False))
    assert [float(found[k]) for k in ("mlm", "dec", "bow")] == pytest.approx(expected, abs=1e-5)
    weights = (1.0, more.get("w_dec", 1.0), more.get("w_bow", 0.1))
    assert float(found["loss"]) == pytest.approx(sum(w * x for w, x in zip(weights, expected)), abs=1e-5)


def test_a_broken_loss_is_not_that_of_the_loops(tokenizer):
    "One mask for all rows; a maximum that takes in masked tokens: both are far from the loops."
    m, made = model(), batch(tokenizer)
    _, dec, bow = looped_losses(m, made)
    with torch.no_grad():
        shared = m(**made | {"visible": made["visible"][:, 2:3].expand(-1, made["visible"].shape[1], -1)})
        assert abs(float(shared["dec"]) - dec) > 1e-3
        m.pool_masked = True
        assert abs(float(m(**made)["bow"]) - bow) > 1e-3


@pytest.mark.parametrize("name", ["mlm", "dec", "bow"])
def test_each_loss_reaches_the_encoder(name, tokenizer):
    m = model()
    m(**batch(tokenizer))[name].backward()
    first = m.bert.encoder.layer[0].attention.self.query.weight.grad
    assert first is not None and float(first.abs().max()) > 0
    layer = m.weak_decoder.out.weight.grad
    assert (layer is not None and float(layer.abs().max()) > 0) == (name == "dec")


def test_every_token_gives_a_signal_to_the_first_decoder(tokenizer):
    made = batch(tokenizer, n=50)
    inner = ordinary_tokens(made["attention_mask"])
    assert int(inner.sum()) == sum(len(t.split()) for t in CORPUS.docs[:50])
    assert float(made["selected"].sum() / inner.sum()) == pytest.approx(0.3, abs=0.03)
    assert not (made["selected"] & ~inner).any()
    same = made["masked_ids"] == made["input_ids"]
    assert same[~made["selected"]].all()
    assert float((made["masked_ids"] == tokenizer.mask_token_id)[made["selected"]].float().mean()) == pytest.approx(0.8, abs=0.08)
    always = batch(tokenizer, corruption="mask")
    assert (always["masked_ids"] == tokenizer.mask_token_id)[always["selected"]].all()


# the second decoder


def test_the_maximum_ignores_order_and_copies():
    torch.manual_seed(0)
    scores, pooled = torch.randn(2, 7, 30), torch.rand(2, 7) < 0.7
    mu = max_pool(scores, pooled)
    order = torch.randperm(7)
    assert torch.equal(max_pool(scores[:, order], pooled[:, order]), mu)
    assert torch.equal(max_pool(torch.cat([scores, scores], 1), torch.cat([pooled, pooled], 1)), mu)
    assert torch.equal(max_pool(scores, torch.zeros(2, 7, dtype=torch.bool)), torch.zeros(2, 30))
    assert not torch.equal(scores.mean(1), torch.cat([scores, scores[:, :1]], 1).mean(1))  # the mean would not


@given(ids=st.lists(st.integers(0, 8), min_size=1, max_size=9), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_the_set_of_words_counts_each_once(ids, seed):
    torch.manual_seed(seed)
    mu, row = 3 * torch.randn(1, 9), torch.tensor([ids])
    found = float(bag_of_words_loss(mu, row, torch.ones_like(row, dtype=torch.bool)))
    log_p = mu[0].log_softmax(-1).tolist()
    assert found == pytest.approx(-sum(log_p[x] for x in set(ids)) / len(ids), rel=1e-4)
    distinct = len(set(ids))
    assert found >= distinct / len(ids) * math.log(distinct) - 1e-5  # a softmax shared equally
    if distinct < len(ids):
        assert found != pytest.approx(-sum(log_p[x] for x in ids) / len(ids), rel=1e-4)  # duplicates counted


# edge cases


def test_short_texts_and_padding_stay_finite(tokenizer):
    word = CORPUS.docs[0].split()[0]
    made = pretraining_batch(["", word, CORPUS.docs[1]], tokenizer, 20, generator=torch.Generator().manual_seed(0))
    assert not made["selected"][:2].any()  # nothing to mask, or all of it
    assert made["visible"][1, 1].tolist()[:3] == [True, False, True]  # [CLS] and [SEP]
    m = model()
    found = m(**made)
    found["loss"].backward()
    assert all(bool(v.isfinite()) for v in found.values())
    assert all(bool(p.grad.isfinite().all()) for p in m.parameters() if p.grad is not None)
    padding = m.weak_decoder(torch.randn(1, 16), torch.randn(4, 16), torch.randn(1, 4, 16), torch.zeros(1, 4, 4, dtype=torch.bool))
    assert padding.isfinite().all()
    empty = pretraining_batch(["", ""], tokenizer, 20)
    assert {k: v.item() for k, v in m(**empty).items()} == {"loss": 0.0, "mlm": 0.0, "dec": 0.0, "bow": 0.0}


def test_padding_stays_finite_in_half_precision(tokenizer):
    made = pretraining_batch([CORPUS.docs[0], CORPUS.docs[0].split()[0]], tokenizer, 20, generator=torch.Generator().manual_seed(0))
    m = model()
    with torch.autocast("cpu", torch.bfloat16):
        found = m(**made)
    found["loss"].backward()
    assert all(bool(v.isfinite()) for v in found.values())
    assert all(bool(p.grad.isfinite().all()) for p in m.parameters() if p.grad is not None)


def test_texts_padded_on_the_left_are_refused(tokenizer):
    with pytest.raises(ValueError, match="texts must be padded on the right: set tokenizer.padding_side = 'right'"):
        bare_encoder(model()).encode(torch.tensor([[0, 2, 9, 3], [2, 8, 9, 3]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))


def test_the_decoder_layer_drops_only_in_training():
    config = BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5
    )
    layer, given = (
        WeakDecoder(config),
        (torch.randn(2, 16), torch.randn(6, 16), torch.randn(2, 6, 16), torch.ones(2, 6, 6, dtype=torch.bool)),
    )
    assert not torch.equal(layer(*given), layer(*given))
    layer.eval()
    assert torch.equal(layer(*given), layer(*given))


def test_padding_and_neighbours_change_nothing(tokenizer):
    m = bare_encoder(model())
    with torch.no_grad():
        together = encode_texts(m, tokenizer, CORPUS.docs[:5], 20)
        alone = encode_texts(m, tokenizer, CORPUS.docs[2:3], 20)
    assert torch.allclose(together.cls[2], alone.cls[0], atol=1e-5)
    assert torch.allclose(together.terms[2], alone.terms[0], atol=1e-5)


# the representation


def random_parts(n, seed=0):
    torch.manual_seed(seed)
    return TwoPart(torch.randn(n, 5), torch.randn(n, 40))


@pytest.mark.parametrize("k", [0, 1, 7, 40])
def test_the_score_is_an_inner_product_of_the_joined_vectors(k):
    q, d = random_parts(4), random_parts(9, 1)
    scores = two_part_scores(q, d, k)
    for a in range(4):
        for b in range(9):
            kept = sorted(range(40), key=lambda v: -float(d.terms[b, v]))[:k]
            joined = [float(q.cls[a] @ d.cls[b]), *(float(q.terms[a, v] * d.terms[b, v]) for v in kept)]
            assert float(scores[a, b]) == pytest.approx(sum(joined), abs=1e-4)
    assert torch.allclose(TwoPartIndex(d, k).scores(q), scores, atol=1e-4)
    assert torch.equal(TwoPartIndex(d, k).search(q, 3), ranked(TwoPartIndex(d, k).scores(q), 3))


def test_the_score_at_its_limits():
    q, d = random_parts(4), random_parts(9, 1)
    assert torch.allclose(two_part_scores(q, d, 40), q.cls @ d.cls.T + q.terms @ d.terms.T, atol=1e-4)
    assert torch.equal(two_part_scores(q, d, 0), q.cls @ d.cls.T)
    assert torch.equal(two_part_scores(q, d, 7, "cls"), q.cls @ d.cls.T)
    assert torch.equal(two_part_scores(q, d, 7, "terms"), q.terms @ kept_terms(d.terms, 7).T)


def test_the_largest_entries_stay_not_the_largest_absolute_values():
    assert kept_terms(torch.tensor([[-9.0, -1.0, -2.0]]), 1).tolist() == [[0.0, -1.0, 0.0]]


def test_with_positive_entries_the_score_nears_the_whole_as_k_grows():
    q, d = (TwoPart(x.cls, x.terms.relu()) for x in (random_parts(4), random_parts(9, 1)))
    whole = two_part_scores(q, d, 40)
    gaps = [(whole - two_part_scores(q, d, k)).abs() for k in range(0, 41, 5)]
    assert all((later <= before + 1e-5).all() for before, later in zip(gaps, gaps[1:]))


def test_gradients_go_through_the_kept_values_alone():
    terms = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    kept_terms(terms, 2).sum().backward()
    assert terms.grad.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize("activation", ["none", "relu", "log1p_relu"])
def test_activations(activation, tokenizer):
    plain, other = (bare_encoder(model(activation=a)) for a in ("none", activation))
    terms = encode_texts(plain, tokenizer, CORPUS.docs[:3], 20).terms
    expected = {"none": terms, "relu": terms.clamp_min(0), "log1p_relu": (1 + terms.clamp_min(0)).log()}[activation]
    assert torch.allclose(encode_texts(other, tokenizer, CORPUS.docs[:3], 20).terms, expected, atol=1e-5)


# pre-training


class Killed(BaseException):
    "Nobody catches this, as nobody catches a kill."


class KilledAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def weights(out):
    return (out / "model.safetensors").read_bytes()


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch):
    pretrain(MINI, tmp_path / "straight", CORPUS.docs)
    usual = encoder_pretraining._Trainer
    with monkeypatch.context() as patch:
        patch.setattr(encoder_pretraining, "_Trainer", lambda *a, **k: usual(*a, **k, callbacks=[KilledAt(6)]))
        with pytest.raises(Killed):
            pretrain(MINI, tmp_path / "killed", CORPUS.docs)
    figures = pretrain(MINI, tmp_path / "killed", CORPUS.docs)
    assert figures["segments"][-1]["from_step"] == 4
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_pre_training_lowers_all_three_losses_and_leaves_the_decoder_behind(tmp_path):
    recipe = replace(MINI, steps=150, batch_size=16, learning_rate=5e-3, save_every=150, eval_every=150)
    m, tokenizer = recipe.model(CORPUS.docs)
    held_out = PretrainingBatches(CORPUS.docs[::20], tokenizer, recipe, 4, 10**6)
    before = encoder_pretraining.held_out_losses(m, held_out)
    recall = word_recall(m, tokenizer, CORPUS.docs[:20])
    figures = pretrain(recipe, tmp_path, CORPUS.docs, (m, tokenizer))
    assert all(figures[f"held_out_{k}"] < before[k] for k in ("mlm", "dec", "bow"))
    assert word_recall(m, tokenizer, CORPUS.docs[:20]) > recall + 0.2
    encoder = TwoPartEncoder.from_pretrained(tmp_path)
    assert not any("weak_decoder" in name for name in encoder.state_dict())
    text = CORPUS.docs[:2]
    assert torch.allclose(encode_texts(encoder, tokenizer, text).terms, encode_texts(m, tokenizer, text).terms, atol=1e-5)
    assert encoder.cls.predictions.decoder.weight is encoder.bert.embeddings.word_embeddings.weight  # still one matrix


def test_a_decoder_that_ignores_the_vector_has_no_gap(tokenizer):
    m = model()
    probe = PretrainingBatches(CORPUS.docs, tokenizer, MINI, 2)
    assert abs(vector_gap(m, probe)) > 0
    real = m.weak_decoder.forward
    m.weak_decoder.forward = lambda h, *rest: real(0 * h, *rest)
    assert vector_gap(m, probe) == 0


def test_parts_left_out_cost_nothing(tokenizer):
    found = model(w_dec=0.0, w_bow=0.0)(**batch(tokenizer))
    assert set(found) == {"loss", "mlm"}
    assert float(found["mlm"]) == pytest.approx(float(model()(**batch(tokenizer))["mlm"]), rel=1e-5)


def test_it_goes_on_from_an_ordinary_bert(tmp_path, tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    bert = BertForMaskedLM(BertConfig(**shape))
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    m, _ = replace(MINI, encoder=str(tmp_path), lpu="linear").model([])
    assert torch.equal(m.bert.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)
    assert torch.equal(m.cls.predictions.decoder.weight, bert.bert.embeddings.word_embeddings.weight)
    assert m.lpu.weight.shape == (len(tokenizer), 16) and m.config.reduced_size == 8


def test_words_of_pieces_are_masked_whole():
    pieces = retrieval_tokenizer([" ".join(f"stem{i}ing" for i in range(200))] * 3, 60)
    made = pretraining_batch(["stem11ing stem7ing stem190ing stem3ing"] * 40, pieces, 60)
    words = pieces(["stem11ing stem7ing stem190ing stem3ing"]).word_ids(0)
    assert len(words) > 8
    for row in made["selected"].tolist():
        assert {w for w, s in zip(words, row) if s}.isdisjoint({w for w, s in zip(words, row) if not s})


# fine-tuning


def test_the_contrastive_loss_by_a_loop():
    torch.manual_seed(0)
    scores, numbers = torch.randn(3, 9), torch.tensor([5, 1, 2, 7, 5, 3, 8, 4, 7])
    expected = []
    for b in range(3):
        positive = int(numbers[3 * b])
        others = [j for j in range(9) if j != 3 * b and int(numbers[j]) != positive]
        top = math.exp(scores[b, 3 * b])
        expected.append(-math.log(top / (top + sum(math.exp(scores[b, j]) for j in others))))
    assert float(contrastive_loss(scores, numbers)) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_the_distillation_loss_by_a_loop():
    torch.manual_seed(0)
    scores, teacher, total = torch.randn(3, 9), torch.randn(3, 3), 0.0
    for b in range(3):
        own = [float(scores[b, 3 * b + j]) for j in range(3)]
        norm, sigma = sum(map(math.exp, own)), [math.exp(float(t)) for t in teacher[b]]
        total -= sum(s / sum(sigma) * math.log(math.exp(o) / norm) for s, o in zip(sigma, own))
    assert float(distillation_loss(scores, teacher)) == pytest.approx(total / 3, rel=1e-5)
    assert not torch.isclose(
        distillation_loss(scores, teacher), torch.tensor(total / 9)
    )  # a mean over elements would shrink with the group


def test_hard_negatives_are_among_the_best_and_never_positives():
    scores, positives = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)), [{1}, {2, 3}, set(), {29}]
    found = hard_negatives(scores, positives, 5, top=10)
    for row, score, known in zip(found.tolist(), scores, positives):
        best = [d for d in score.argsort(descending=True).tolist() if d not in known][:10]
        assert len(set(row)) == 5 and set(row) <= set(best)
    with pytest.raises(ValueError, match="has only 28 documents that are no positives, and 29 negatives are asked for"):
        hard_negatives(scores, positives, 29)


def small_encoder():
    m, tokenizer = MINI.model(CORPUS.docs)
    return bare_encoder(m), tokenizer


@pytest.mark.parametrize("part", ["both", "cls", "terms"])
def test_stage_one_learns_its_pairs(part, tmp_path):
    pair = small_encoder()
    few = replace(TUNE, steps=60, batch_size=8, learning_rate=5e-3, save_every=60, part=part)
    found = RetrievalSet("few", CORPUS.docs, *zip(*[(q, {d: 1}) for q, d in CORPUS.pairs[:8]]), CORPUS.pairs[:8])
    before = np.mean(reciprocal_ranks(ranked(retrieval_scores(*pair, found, few)), found.relevant))
    figures = fine_tune(few, tmp_path, pair, found)
    assert figures["held_out_MRR@10"] > before + 0.15


def test_stage_three_follows_its_teacher(tmp_path):
    "A teacher that prefers documents by their first letter, not the positives."
    pair, seen = small_encoder(), []

    def teacher(queries, docs):
        seen.extend(zip(queries, docs))
        return torch.tensor([5.0 if d[0] < "m" else -5.0 for d in docs])

    pair_before = encode_texts(*pair, CORPUS.training_docs, 20)
    fine_tune(replace(TUNE, stage=3, steps=60, learning_rate=5e-3, save_every=60), tmp_path, pair, CORPUS, teacher)
    liked = torch.tensor([d[0] < "m" for d in CORPUS.training_docs])
    asked = encode_texts(*pair, [q for q, _ in CORPUS.pairs], 10)
    scores = two_part_scores(asked, encode_texts(*pair, CORPUS.training_docs, 20), TUNE.k)
    assert float(scores[:, liked].mean()) > float(scores[:, ~liked].mean()) + 1.0
    assert not torch.equal(pair_before.cls, encode_texts(*pair, CORPUS.training_docs, 20).cls)
    own = {(q, CORPUS.training_docs[d]) for q, d in CORPUS.pairs}
    assert own <= set(seen) and len(seen) == len(CORPUS.pairs) * (1 + 8)


def test_the_cross_encoder_learns_which_is_right(tmp_path):
    encoder, tokenizer = small_encoder()
    found = RetrievalSet("few", CORPUS.docs, ["x"], [{0: 1}], CORPUS.pairs[:6])
    negatives = torch.stack([torch.tensor([d for d in range(12) if d != p][:4]) for _, p in found.pairs])
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    scored = cross_encoder(
        encoder,
        tokenizer,
        found,
        negatives,
        replace(TUNE, batch_size=6, teacher_steps=120, teacher_learning_rate=5e-3, save_every=120),
        tmp_path,
    )
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    right = 0
    for (q, p), row in zip(found.pairs, negatives.tolist()):
        scores = scored([q] * 5, [CORPUS.docs[d] for d in (p, *row)])
        right += int(scores.argmax()) == 0
    assert right >= 5


def test_negatives_come_from_the_miner_and_weights_from_the_encoder(tmp_path, monkeypatch):
    miner, tokenizer = small_encoder()
    with torch.no_grad():
        miner.bert.embeddings.word_embeddings.weight.normal_()
    miner.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    given = []
    usual = retriever._Groups
    monkeypatch.setattr(retriever, "_Groups", lambda *a, **k: given.append(a) or usual(*a, **k))
    encoder, _ = small_encoder()
    before = encoder.bert.embeddings.word_embeddings.weight.clone()
    fine_tune(
        replace(TUNE, stage=2, miner=str(tmp_path / "one"), steps=1, learning_rate=1e-6), tmp_path / "two", (encoder, tokenizer), CORPUS
    )
    assert torch.allclose(encoder.bert.embeddings.word_embeddings.weight, before, atol=1e-4)
    queries = encode_texts(miner, tokenizer, [q for q, _ in CORPUS.pairs], TUNE.max_query)
    scores = two_part_scores(queries, encode_texts(miner, tokenizer, CORPUS.training_docs, TUNE.max_length), TUNE.k)
    asked = {d for _, d in CORPUS.pairs}
    for (_, positive), row, chosen in zip(CORPUS.pairs, scores, given[0][3].tolist(), strict=True):
        best = [d for d in row.argsort(descending=True).tolist() if d != positive and d in asked][: TUNE.top]
        assert set(chosen) <= set(best)


@pytest.mark.parametrize("stage", [2, 3])
def test_documents_that_no_pair_asks_for_are_no_negatives(stage, tmp_path, monkeypatch):
    "Else a document of the test is seen as a negative only, and encoder and teacher learn that it is never the answer."
    given, read, asked = [], set(), {d for _, d in CORPUS.pairs}
    usual = retriever._Groups
    monkeypatch.setattr(retriever, "_Groups", lambda *a, **k: given.append(a[3]) or usual(*a, **k))

    def teacher(queries, docs):
        read.update(docs)
        return torch.tensor([float((q, d) in own) for q, d in zip(queries, docs)])

    own = {(q, CORPUS.training_docs[d]) for q, d in CORPUS.pairs}
    figures = fine_tune(replace(TUNE, stage=stage, steps=1), tmp_path, small_encoder(), CORPUS, teacher)
    assert len(asked) == 50 and len(CORPUS.docs) == 60
    assert set(given[0].flatten().tolist()) <= asked
    assert len(set(given[0].flatten().tolist())) > 20
    assert read <= {CORPUS.training_docs[d] for d in asked}
    assert figures.get("teacher_first") == (1.0 if stage == 3 else None)


def test_a_killed_stage_goes_on_with_the_same_negatives(tmp_path, monkeypatch):
    recipe, usual = replace(TUNE, stage=2, save_every=2), retriever._Trainer
    fine_tune(recipe, tmp_path / "straight", small_encoder(), CORPUS)
    with monkeypatch.context() as patch:
        patch.setattr(retriever, "_Trainer", lambda *a, **k: usual(*a, **k, callbacks=[KilledAt(3)]))
        with pytest.raises(Killed):
            fine_tune(recipe, tmp_path / "killed", small_encoder(), CORPUS)
    again = fine_tune(recipe, tmp_path / "killed", small_encoder(), CORPUS)
    assert again["segments"][-1]["from_step"] == 2
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_the_registered_recipes(tmp_path):
    found = recipes()
    assert (found["dupmae"].year, found["dupmae"].notebook) == (2023, "training/dupmae")
    (tmp_path / "texts.txt").write_text("\n".join(CORPUS.docs))
    found["dupmae"].train(replace(MINI, data=str(tmp_path / "texts.txt")), tmp_path / "pre")
    card = (tmp_path / "pre/README.md").read_text()
    seen = 8 * 4 * sum(len(t.split()) + 2 for i, t in enumerate(CORPUS.docs) if i % 20) / 57
    assert "Texts of the user" in card and "--set hidden_size=16" in card and f"{round(seen):,} tokens seen" in card
    encoder, _ = load_encoder(str(tmp_path / "pre"))
    assert encoder.config.reduced_size == 8 and not encoder.training
    figures = found["retriever"].train(replace(TUNE, encoder=str(tmp_path / "pre"), steps=1), tmp_path / "one")
    assert 0 <= figures["held_out_MRR@10"] <= 1
    assert "Stage 1" in (tmp_path / "one/README.md").read_text()
    for folder in ("pre", "one"):
        exec((tmp_path / folder / "README.md").read_text().split("## Use\n\n```python\n")[1].split("```")[0], used := {})
        assert type(used["encoder"]).__name__ == "TwoPartEncoder"


def test_another_width_keeps_the_weights():
    m = model()
    made = as_part(m, "CLS", 0)
    assert made.reduce.weight.shape == (64, 16)
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in m.state_dict().items() if not k.startswith(("weak_decoder", "reduce")))


# export


def test_the_export_holds_the_cls_part(tmp_path):
    encoder, tokenizer = small_encoder()
    export_sentence_transformer(encoder, tokenizer, tmp_path / "out", max_length=12)
    kinds = [part["type"].rpartition(".")[2] for part in json.loads((tmp_path / "out/modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense"]
    assert json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())["similarity_fn_name"] == "dot"


def test_sentence_transformers_load_the_export(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers (extra `encoders`) is not installed")
    encoder, tokenizer = small_encoder()
    folder = export_sentence_transformer(encoder, tokenizer, tmp_path / "out", max_length=12)
    found = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    texts = [*CORPUS.docs[:4], " ".join(CORPUS.docs[:3])]  # the last is cut off
    vectors = torch.as_tensor(found.encode(texts))
    expected = encode_texts(encoder, tokenizer, texts, 12).cls
    assert vectors.shape == (5, 8) and torch.allclose(vectors, expected, atol=1e-5)
    assert torch.allclose(found.similarity(vectors, vectors), expected @ expected.T, atol=1e-4)


# collections and measures


def test_measures_by_a_loop():
    rng = np.random.default_rng(0)
    ranking = [rng.permutation(12)[:6].tolist() for _ in range(20)]
    relevant = [{int(d): int(g) for d, g in zip(rng.permutation(12)[:3], rng.integers(1, 3, 3))} for _ in range(20)]
    for row, judged, rr, found in zip(ranking, relevant, reciprocal_ranks(ranking, relevant, 4), ndcg(ranking, relevant, 4)):
        hits = [r for r in range(1, 5) if row[r - 1] in judged]
        assert rr == (1 / hits[0] if hits else 0.0)
        gain = sum(judged.get(row[r - 1], 0) / math.log2(r + 1) for r in range(1, 5))
        best = sum(g / math.log2(r + 1) for r, g in enumerate(sorted(judged.values(), reverse=True)[:4], start=1))
        assert found == pytest.approx(gain / best)


def test_bm25_finds_rare_words_and_no_synonyms():
    pytest.importorskip("bm25s", reason="bm25s (extra `metrics`) is not installed")
    found = topic_corpus(n_docs=200, n_test=80)
    best = reciprocal_ranks(bm25_ranking(found.docs, found.queries), found.relevant)
    means = {kind: np.mean([v for v, k in zip(best, found.kinds) if k == kind]) for kind in ("rare", "synonym")}
    assert means["rare"] > 0.8 and means["synonym"] < 0.1
    assert bm25_ranking(["one two", "three four"], ["four"], 5).tolist()[0][0] == 1


def test_an_experiment_without_cranfield_says_so(monkeypatch, capsys):
    monkeypatch.setattr(measured, "_differences", lambda *_: [0.0, 0.0, 0.0])
    kinds = ["rare", "synonym"]
    one = {
        "ranks": {"BM25": [1.0, 0.0]},
        "kinds": kinds,
        "probes": {a: {} for a in measured.ARMS},
        "seconds": dict.fromkeys(measured.ARMS, 0.0),
    }
    monkeypatch.setattr(measured, "on_topics", lambda seed, stages: one)
    found = measured.experiment(2)
    assert "cranfield" not in found and "Cranfield is skipped: there is no cranfield/ in the data folder" in capsys.readouterr().out
    assert found["MRR@10"] == {"BM25": [0.5, 0.5, 0.5]} and found["by_kind"]["synonym"] == {"BM25": [0.0, 0.0, 0.0]}
    with pytest.raises(ValueError, match="at least 2 seeds are needed for an interval, got 1"):
        measured.experiment(1)


def test_without_bm25s(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"BM25 needs the package bm25s: pip install 'decodelab\[metrics\]'"):
        bm25_ranking(["a"], ["a"])


def test_intervals_over_seeds():
    assert seed_interval([[1.0] * 5, [1.0] * 5]) == [1.0, 1.0, 1.0]
    half = 4.3027 * 1.0 / math.sqrt(3)  # t of two degrees of freedom, deviation 1
    assert seed_interval([[0.0] * 9, [0.5, 1.5], [2.0] * 4]) == pytest.approx([1.0, 1.0 - half, 1.0 + half], abs=1e-3)
    rng = np.random.default_rng(0)
    covered = [low < 0 < high for _, low, high in (seed_interval(rng.normal(size=(3, 1)) + rng.normal(size=(3, 20))) for _ in range(400))]
    assert 0.92 < np.mean(covered) < 0.98  # seeds that differ are not many queries


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r_e": 0.0}, r"r_e must lie in \(0, 1\)"),
        ({"r_d": 1.5}, r"r_d in \[0, 1\]"),
        ({"corruption": "noise"}, "corruption must be bert or mask"),
        ({"lpu": "mlp"}, "lpu mlm_head or linear"),
        ({"activation": "gelu"}, "activation one of none, relu, log1p_relu"),
        ({"w_bow": -1.0}, "weights must not be negative"),
        ({"max_length": 3}, "max_length at least 4"),
        ({"heads": 3}, "hidden_size must be a multiple of heads"),
        ({"layers": 0}, "must be positive"),
        ({"steps": 1.5}, "steps must be"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MINI, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 4}, "stage must be 1, 2 or 3"),
        ({"part": "half"}, "part both, cls or terms"),
        ({"data": "web"}, "data must be one of topics, cranfield"),
        ({"n": 13}, "n must not be above top"),
        ({"k": 0}, "must be positive"),
        ({"teacher_learning_rate": 0.0}, "teacher_learning_rate must be positive, got 0.0"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_bad_settings_of_a_stage(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TUNE, **change)


def test_models_and_texts_that_do_not_fit(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="at least 20 texts are needed, one of them to be held out, got 3"):
        pretrain(MINI, tmp_path, CORPUS.docs[:3])
    with pytest.raises(FileNotFoundError, match="no file nowhere: data must be topics, cranfield or a file with a text a line"):
        replace(MINI, data="nowhere").texts()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="is a model of type gpt2: start from a BERT"):
        replace(MINI, encoder=str(tmp_path / "gpt2")).model([])
    BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="must be a fast one with a mask token"):
        replace(MINI, encoder=str(tmp_path / "bert")).model([])
    for name, value in (("lpu", "mlp"), ("activation", "gelu")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            model(**{name: value})


def test_a_stage_on_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without `accelerate launch`"):
        fine_tune(TUNE, tmp_path, small_encoder(), CORPUS)


def test_encoders_and_collections_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no encoder in nowhere: pre-train one with `decodelab train dupmae`"):
        fine_tune(replace(TUNE, encoder="nowhere"), tmp_path)
    with pytest.raises(ValueError, match="unknown collection 'web': use one of topics, cranfield"):
        collection("web")
    with pytest.raises(FileNotFoundError, match="DECODELAB_DATA"):
        collection("cranfield")
    bare = RetrievalSet("bare", CORPUS.docs, ["x"], [{0: 1}], [])
    with pytest.raises(ValueError, match="bare has no pairs of a query and a document to learn from"):
        fine_tune(TUNE, tmp_path, small_encoder(), bare)
    with pytest.raises(ValueError, match="are no collection"):
        RetrievalSet("odd", CORPUS.docs, ["x"], [], [])
    with pytest.raises(ValueError, match="k must lie between 0 and the 40 entries"):
        TwoPartIndex(random_parts(3), 41)
    with pytest.raises(ValueError, match="no text to encode"):
        encode_texts(*small_encoder(), [])
    with pytest.raises(ValueError, match="at least 20 documents are needed"):
        topic_corpus(n_docs=30, n_test=20)


def test_pieces_have_the_same_numbers_every_time():
    "The trainer numbers pieces in the order of a hash table, another one for each tokenizer: a run could not go on."
    texts = [" ".join(f"stem{i}ing other{i}" for i in range(100))] * 2
    first = retrieval_tokenizer(texts, 60).get_vocab()
    assert all(retrieval_tokenizer(texts, 60).get_vocab() == first for _ in range(5))
    assert [first[mark] for mark in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]


def test_parts_of_a_score_are_known_by_name():
    both = TwoPart(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="part must be 'both', 'cls' or 'terms' and k not negative, got 'foo' and 3"):
        two_part_scores(both, both, 3, "foo")
    with pytest.raises(ValueError, match="got 'both' and -1"):
        two_part_scores(both, both, -1)
