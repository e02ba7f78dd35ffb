"""The loop of diffusion decoders, its canvas and its plainest policies, against plain transcriptions."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import EOS, PAD, VOCAB, left_pad, made_step, random_prompts, small_model
from transformers import BertConfig, BertForMaskedLM, LogitsProcessor, LogitsProcessorList, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from decodelab.core.contract import decoders
from decodelab.diffusion.base import LLaDA, Unmasker, with_generate
from decodelab.diffusion.canvas import CACHES, Canvas
from decodelab.diffusion.denoiser import Denoiser, mask_token, shifts_logits
from decodelab.diffusion.fast_dllm import Dream, EntropyBound, FastDLLM, factor_count
from decodelab.diffusion.ideal import Distribution, IdealDenoiser
from decodelab.diffusion.step import ORDERS, confidence_score, order_score, schedule, top
from decodelab.lab.frontier import loop_overheads
from decodelab.lab.lab import Lab

POLICIES = [m for m in decoders().values() if m.family == "diffusion"]
every_policy = pytest.mark.parametrize("method", POLICIES, ids=lambda m: m.name)
MASK = PAD


def decode(decoder, model, ids, new=12, **settings):
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None} | settings
    return decoder.generate(model, **ids, **settings) if isinstance(ids, dict) else decoder.generate(model, ids, **settings)


def new_ids(out):
    return [c.tolist() for c in out.continuations]


@pytest.fixture(scope="module")
def prompt():
    return random_prompts(1, lengths=(7, 7), seed=3)[0]


@pytest.fixture(scope="module")
def batch():
    return left_pad(random_prompts(4, lengths=(1, 9), seed=5))


@pytest.fixture(scope="module")
def shallow():
    "A model of one layer: keys do not depend on other positions, so a cache is never stale."
    model = small_model()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.3}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=PAD, mask_token_id=MASK, **shape)).eval()


# models from the hub, in miniature: the same interface, random weights


class HubConfig(PretrainedConfig):
    model_type = "hub"

    def __init__(self, vocab_size=VOCAB, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, 16


class HubModel(PreTrainedModel):
    "Mean over the visible positions plus the place itself and a little of its neighbour: looks both ways, no `generate`."

    config_class = HubConfig

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(config.vocab_size, 16)
        self.head = torch.nn.Linear(16, config.vocab_size, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def mix(self, ids, visible):
        x = self.embed(ids)
        mean = (x * visible[..., None]).sum(1, keepdim=True) / visible.sum(1)[:, None, None]
        return self.head(x + mean + 0.5 * torch.roll(x, 1, 1) * torch.roll(visible, 1, 1)[..., None])


class LikeLLaDA(HubModel):
    def forward(self, input_ids, inputs_embeds=None, attention_mask=None, attention_bias=None, return_dict=None, **kwargs):
        assert not kwargs
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return MaskedLMOutput(logits=self.mix(input_ids, visible.float()))


class LikeDream(HubModel):
    "Answers one place too far to the left; takes a four-dimensional mask and positions."

    def forward(self, input_ids, attention_mask=None, position_ids=None, return_dict=None, **kwargs):
        assert not kwargs
        assert attention_mask.shape == (len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
        visible = (attention_mask[:, 0, -1] == 0).float()
        assert position_ids.amax(-1).tolist() == (visible.sum(-1) - 1).tolist()
        return MaskedLMOutput(logits=torch.roll(self.mix(input_ids, visible), -1, 1))


def hub_model(cls, kind):
    config = HubConfig(pad_token_id=PAD)
    config.mask_token_id, config.model_type = MASK, kind
    return cls(config).eval()


@pytest.fixture(scope="module", params=["llada", "Dream"])
def hub(request):
    return hub_model(LikeLLaDA if request.param == "llada" else LikeDream, request.param)


def test_checkpoints_of_the_hub_decode_unchanged(hub, prompt, batch):
    assert not hasattr(hub, "generate")
    state = sorted(vars(hub))
    together = decode(LLaDA(block_length=4), hub, batch)
    alone = [decode(LLaDA(block_length=4), hub, i[m.bool()][None]) for i, m in zip(batch["input_ids"], batch["attention_mask"])]
    assert new_ids(together) == [new_ids(a)[0] for a in alone]
    assert sorted(vars(hub)) == state
    assert not hasattr(hub, "generate")
    assert decode(FastDLLM(threshold=0.2), hub, prompt).sequences.shape == (1, 19)


def test_a_dream_like_model_is_read_one_place_to_the_left(prompt):
    plain, dream = hub_model(LikeLLaDA, "llada"), hub_model(LikeDream, "Dream")
    assert shifts_logits(dream)
    assert not shifts_logits(plain)
    with torch.no_grad():
        here, there = Denoiser(plain)(prompt), Denoiser(dream)(prompt)
        unshifted = Denoiser(dream, shift_logits=False)(prompt)
    finite = here.isfinite()
    assert torch.allclose(here[:, 1:][finite[:, 1:]], there[:, 1:][finite[:, 1:]], atol=1e-6)
    assert not torch.allclose(here[:, 1:][finite[:, 1:]], unshifted[:, 1:][finite[:, 1:]], atol=1e-2)


def test_a_model_with_a_masked_head_decodes(bert, prompt):
    out = decode(LLaDA(), bert, prompt)
    assert out.sequences.shape == (1, 19)
    assert out.stats.target_forwards == 12
    assert with_generate(bert).training == bert.training


# the denoiser


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("shift", [False, True])
def test_padding_changes_no_logit(kind, shift, request, batch):
    denoiser = Denoiser(request.getfixturevalue(kind), shift_logits=shift)
    with torch.no_grad():
        together = denoiser(batch["input_ids"], batch["attention_mask"])
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
            alone = denoiser(ids[mask.bool()][None])[0]
            n = len(alone) - shift  # the first place of a shifted model has nobody to its left
            assert torch.allclose(together[row, -n:].nan_to_num(0, 0, 0), alone[-n:].nan_to_num(0, 0, 0), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_every_place_sees_every_other(kind, request, prompt):
    denoiser = Denoiser(request.getfixturevalue(kind))
    with torch.no_grad():
        before = denoiser(prompt)
        for place in (0, 3, 6):
            changed = prompt.clone()
            changed[0, place] = 50 if prompt[0, place] != 50 else 51
            difference = (denoiser(changed) - before).nan_to_num(0, 0, 0).abs().amax(-1)
            assert bool((difference > 1e-4).all())


def test_the_mask_is_never_proposed(llama, prompt):
    with torch.no_grad():
        logits = Denoiser(llama)(prompt)
    assert bool((logits[..., MASK] == -torch.inf).all())
    hot = decode(LLaDA(), llama, prompt, 60, do_sample=True, temperature=50.0, top_k=0)
    assert MASK not in new_ids(hot)[0]


def test_a_model_without_a_mask_is_refused(prompt):
    model = small_model()
    del model.config.mask_token_id
    with pytest.raises(ValueError, match=r"set model.config.mask_token_id, or pass mask_token_id"):
        decode(LLaDA(), model, prompt)
    assert decode(LLaDA(mask_token_id=MASK), model, prompt).sequences.shape == (1, 19)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        mask_token(model, VOCAB)


def test_a_prompt_with_a_mask_is_refused(llama, prompt):
    token = int(prompt[0, 2])
    with pytest.raises(ValueError, match=f"a prompt holds the mask token {token}"):
        decode(LLaDA(mask_token_id=token), llama, prompt)


# caches


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cfg", [0.0, 0.7])
def test_a_cache_that_is_never_stale_changes_nothing(cache, shift, cfg, shallow, batch):
    fields = {"block_length": 5, "shift_logits": shift, "cfg_scale": cfg}
    plain = decode(LLaDA(**fields), shallow, batch)
    cached = decode(LLaDA(**fields, cache=cache), shallow, batch)
    assert new_ids(cached) == new_ids(plain)
    assert cached.stats.emitted == plain.stats.emitted
    assert cached.stats.target_tokens < plain.stats.target_tokens


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("shift", [False, True])
def test_renewed_every_pass_a_cache_changes_nothing(cache, shift, llama, gpt2, batch):
    for model in (llama, gpt2):
        plain = decode(LLaDA(block_length=1, shift_logits=shift), model, batch)
        assert new_ids(decode(LLaDA(block_length=1, cache=cache, shift_logits=shift), model, batch)) == new_ids(plain)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_what_a_cached_pass_computes(cache, shift, llama, batch):
    "Against a forward that is given the old keys and values by hand."
    ids, mask = batch["input_ids"], batch["attention_mask"]
    canvas = Canvas(Denoiser(llama, shift_logits=shift), ids, 8, mask, cache=cache)
    rows, length = torch.arange(len(ids)), ids.shape[1]
    canvas.open(length + 2, length + 5, rows)
    old = canvas.ids.clone()
    with torch.no_grad():
        canvas.logits()
        canvas.ids[:, length + 3] = 40
        got = canvas.logits()
        # layer by layer: new states at the columns that are fed, the first denoising step's at the others
        fed = torch.zeros(canvas.length, dtype=torch.bool)
        first = length + 2 - shift
        fed[{"none": slice(None), "prefix": slice(first, None), "dual": slice(first, length + 5)}[cache]] = True
        arguments = canvas.denoiser.arguments(canvas.exists, torch.arange(canvas.length), canvas.ids)
        position = llama.model.rotary_emb(llama.model.embed_tokens(canvas.ids), arguments["position_ids"])
        before, after = (llama.model.embed_tokens(x) for x in (old, canvas.ids))
        for layer in llama.model.layers:
            mixed = torch.where(fed[None, :, None], after, before)
            after = _with_keys_of(layer, after, mixed, arguments["attention_mask"], position)
            before = _with_keys_of(layer, before, before, arguments["attention_mask"], position)
        expected = canvas.denoiser.align(llama.lm_head(llama.model.norm(after)))[:, length + 2 : length + 5]
    assert torch.allclose(got.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0), atol=2e-5)


def _with_keys_of(layer, x, keys_from, mask, position):
    "A decoder layer in which keys and values come from other states than queries."
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    attention, (cos, sin) = layer.self_attn, position
    normed, other = layer.input_layernorm(x), layer.input_layernorm(keys_from)
    split = (len(x), x.shape[1], -1, attention.head_dim)
    q = attention.q_proj(normed).view(split).transpose(1, 2)
    k, v = (p(other).view(split).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k, v = (repeat_kv(s, attention.num_key_value_groups) for s in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def test_dual_is_cheapest_and_stats_are_right(llama, prompt):
    fed = {c: decode(LLaDA(block_length=4, cache=c), llama, prompt).stats.target_tokens for c in CACHES}
    assert fed == {"none": 12 * 19, "prefix": 3 * 19 + 3 * (12 + 8 + 4), "dual": 3 * 19 + 9 * 4}


def test_guidance_against_two_forwards(llama, prompt):
    canvas = Canvas(Denoiser(llama), prompt, 6, cfg_scale=0.5)
    canvas.open(7, 13, torch.tensor([0]))
    blind = canvas.ids.clone()
    blind[:, :7] = MASK
    with torch.no_grad():
        seen, unseen = (Denoiser(llama)(x)[:, 7:].nan_to_num(0, 0, 0) for x in (canvas.ids, blind))
        got = canvas.logits().nan_to_num(0, 0, 0)
    assert torch.allclose(got, unseen + 1.5 * (seen - unseen), atol=1e-4)
    assert canvas.stats.target_tokens == 26


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_compiled_decoding_writes_the_same(cache, batch):
    model = small_model(seed=3)
    for decoder in (LLaDA(block_length=4, cache=cache), LLaDA(block_length=4, cache=cache, shift_logits=True)):
        plain = decode(decoder, model, batch)
        compiled = decode(replace(decoder, compile=True), model, batch)
        assert new_ids(compiled) == new_ids(plain)
        assert compiled.stats.emitted == plain.stats.emitted
    assert decode(replace(decoder, compile=True), model, batch).stats.compilations == 0


def test_what_needs_a_decoder_only_model(bert, prompt):
    for fields, words in (({"cache": "dual"}, "cache='dual'"), ({"compile": True}, "compile=True")):
        with pytest.raises(ValueError, match=f"{words} needs a decoder-only model of transformers, not BertForMaskedLM"):
            decode(LLaDA(**fields), bert, prompt)


# schedule, orders, counts


@given(st.integers(1, 64), st.integers(1, 80))
def test_schedule(m, s):
    plan = [int(schedule(torch.tensor([m]), s, i)) for i in range(s)]
    assert sum(plan) == m
    assert plan == sorted(plan, reverse=True)
    assert plan[: min(m, s)].count(0) == 0
    if s <= m:
        assert plan == [m // s + (i < m % s) for i in range(s)]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("-inf")]), min_size=1, max_size=12), st.integers(0, 14))
def test_top_takes_the_best_and_ties_from_the_left(scores, count):
    taken = top(torch.tensor([scores]), torch.tensor([count]))[0].tolist()
    order = sorted((i for i, s in enumerate(scores) if s > float("-inf")), key=lambda i: (-scores[i], i))
    assert taken == [i in order[:count] for i in range(len(scores))]


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=10), st.floats(-1, 6))
def test_factor_count_is_the_formula(confidences, factor):
    c = torch.tensor([confidences])
    ordered = sorted(c[0].tolist(), reverse=True)
    passes = [r for r in range(1, len(ordered) + 1) if (r + 1) * (1 - torch.tensor(ordered[r - 1])) < factor]
    assert int(factor_count(c, factor)) == max(passes, default=1)


def step_of(p, masked, **facts):
    "A step on distributions of our own, [rows, block, vocab], that proposes the best tokens."
    return made_step(p.log(), masked, p.argmax(-1), eos_ids=[EOS], **facts)


def test_nearly_certain_proposals_keep_their_order():
    # the best token leads by 15, 25, 30 at logits of 40: 1 - p is 3.1e-7, 1.4e-11, 9.4e-14, far less than the rounding of the logits
    scores = torch.full((1, 3, 8), -20.0)
    scores[..., 5] = 40.0
    scores[0, :, 2] = 40 - torch.tensor([15.0, 25.0, 30.0])
    step = made_step(scores)
    LLaDA().propose(step)
    missing = (1 - step.raw_confidence[0]).tolist()
    assert missing == pytest.approx([1 / (1 + math.exp(lead)) for lead in (15, 25, 30)], rel=2e-3)
    assert step.tokens.tolist() == [[5, 5, 5]]
    for order in ("low_confidence", "margin", "entropy"):
        assert order_score(step, order)[0].argsort(descending=True).tolist() == [2, 1, 0]


@given(st.integers(0, 10**6), st.sampled_from(ORDERS))
def test_orders_are_their_formulas(seed, order):
    g = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(2, 5, 7, generator=g)).softmax(-1)
    masked = torch.rand(2, 5, generator=g) < 0.6
    got = order_score(step_of(p, masked), order)
    assert bool((got[~masked] == -torch.inf).all())
    for i, j in masked.nonzero().tolist():
        probs = sorted(p[i, j].tolist(), reverse=True)
        expected = {
            "low_confidence": probs[0],
            "margin": probs[0] - probs[1],
            "entropy": sum(x * torch.tensor(x).log().item() for x in probs),
            "left_to_right": -j,
        }
        if order != "random":
            assert got[i, j].item() == pytest.approx(expected[order], abs=1e-4)
    if order == "random":
        assert bool(((got[masked] >= 0) & (got[masked] <= 1)).all())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.3, 1.0, 5.0]))
def test_the_entropy_bound_is_a_prefix_of_the_most_confident(seed, bound):
    g = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(1, 6, 5, generator=g)).softmax(-1)
    masked = torch.rand(1, 6, generator=g) < 0.7
    masked[0, 0] = True
    chosen = EntropyBound(entropy_bound=bound).select(step_of(p, masked))[0]
    entropies = -(p[0] * p[0].log()).sum(-1)
    total, expected = 0.0, []
    for j in sorted(masked[0].nonzero()[:, 0].tolist(), key=lambda j: entropies[j]):
        if not expected or total <= bound:
            expected.append(j)
        total += float(entropies[j])
    assert chosen.nonzero()[:, 0].tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("n", "s", "expected"), [(32, 32, [0] + [1] * 30 + [2]), (32, 16, [1] + [2] * 14 + [3]), (8, 8, [0] + [1] * 6 + [2])]
)
def test_counts_of_dream(n, s, expected, llama, prompt):
    for alg in ("maskgit_plus", "topk_margin", "entropy"):
        assert decode(Dream(alg=alg, steps=s), llama, prompt, n).stats.emitted == [expected]
    assert decode(Dream(alg="entropy", eps=0.0), llama, prompt, n).stats.emitted == [[1] * n]


def test_dreams_origin_reveals_masked_independently():
    torch.manual_seed(0)
    p, rows = torch.full((4000, 6, 4), 0.25), 4000
    step = step_of(p, torch.ones(rows, 6, dtype=torch.bool), steps=4, index=1)
    chosen = Dream(alg="origin", eps=0.0).select(step).double()
    share = 1 - (2 / 4) / (3 / 4)  # tau goes from 3/4 to 2/4
    assert abs(chosen.mean().item() - share) < 4 * (share * (1 - share) / (rows * 6)) ** 0.5
    counts = chosen.sum(-1).long().bincount(minlength=7).double()
    binomial = torch.distributions.Binomial(6, torch.tensor(share)).log_prob(torch.arange(7.0)).exp() * rows
    assert float(((counts - binomial) ** 2 / binomial)[:5].sum()) < 25


def test_dream_may_draw_positions():
    torch.manual_seed(0)
    rows = 20_000
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]).expand(rows, -1, -1)
    step = step_of(p, torch.ones(rows, 3, dtype=torch.bool), steps=3)
    chosen = Dream(alg="maskgit_plus", alg_temp=0.2, eps=0.0).select(step)
    assert chosen.sum(-1).unique().tolist() == [1]
    expected = (torch.tensor([0.7, 0.6, 0.9]) / 0.2).softmax(-1)
    assert torch.allclose(chosen.double().mean(0), expected.double(), atol=0.02)


def answers(rows, decoder, probs, **settings):
    "What a decoder writes on an ideal denoiser of a distribution, [rows, m]."
    model = IdealDenoiser(probs)
    torch.manual_seed(0)
    return decoder.generate(model, model.start.expand(rows, -1), max_new_tokens=probs.length, eos_token_id=None, **settings)


def test_dream_filters_by_top_p_before_top_k():
    probs = Distribution(torch.arange(4)[:, None], torch.tensor([0.4, 0.3, 0.2, 0.1]))
    rows, filters = 4000, {"top_p": 0.5, "top_k": 2}
    # top-p keeps two of the four, and top-k both; the other way round top-p finds 0.4 / 0.7 > 0.5 and keeps one
    calls = [
        (Dream(alg="entropy"), filters),
        (Dream(alg="entropy", **filters), {"top_k": 0}),
        (Dream(alg="entropy", top_p=0.5), {"top_k": 2}),
    ]
    for decoder, settings in calls:
        drawn = answers(rows, decoder, probs, do_sample=True, **settings).sequences[:, -1]
        share = float((drawn == 0).double().mean())
        assert set(drawn.tolist()) == {0, 1}
        assert abs(share - 4 / 7) < 4 * (4 / 7 * 3 / 7 / rows) ** 0.5
    drawn = answers(rows, Dream(alg="entropy", top_p=1.0, top_k=0), probs, do_sample=True, **filters).sequences[:, -1]
    assert set(drawn.tolist()) == {0, 1, 2, 3}  # the fields come before the call's
    assert set(answers(400, LLaDA(), probs, do_sample=True, **filters).sequences[:, -1].tolist()) == {0}  # transformers' order


def test_dreams_filters_shape_the_entropy_without_sampling():
    flat = [0.55] + [0.05 + 0.001 * i for i in range(-4, 5)]  # 1.68 nats, the other 0.96; of the best two: 0.29 and 0.69
    narrow = [0.45, 0.44, 0.11]
    strings = torch.cartesian_prod(torch.arange(10), torch.arange(10, 13))
    probs = Distribution(strings, torch.tensor([a * b for a in flat for b in narrow]))
    for filters, first in (({}, 1), ({"top_p": 0.5}, 0), ({"top_k": 2}, 0), ({"top_p": 1.0, "top_k": 0}, 1)):
        out = answers(1, Dream(alg="entropy", eps=0.0, trace=True, **filters), probs, do_sample=False)
        assert out.continuations[0].tolist() == [0, 10]
        assert out.trace[0].info["step"].index(0) == first


def test_without_ends_the_other_tokens_share_their_probability():
    p = torch.tensor([[[0.01, EOS_SHARE := 0.45, 0.5, 0.04], [0.3, 0.4, 0.2, 0.1]]])
    assert EOS == 1 and EOS_SHARE < 0.5
    step = step_of(p, torch.ones(1, 2, dtype=torch.bool))
    LLaDA(suppress_eos_confidence=True).propose(step)
    assert step.tokens.tolist() == [[2, EOS]]  # an end may still be proposed
    assert step.raw_confidence[0].tolist() == pytest.approx([0.5 / 0.55, 0.0], abs=1e-6)
    step = step_of(p, torch.ones(1, 2, dtype=torch.bool))
    LLaDA().propose(step)
    assert step.raw_confidence[0].tolist() == pytest.approx([0.5, 0.4], abs=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([2, 5, 50]), st.floats(0, 40))
def test_how_confident_a_probs_is_has_all_digits(seed, vocab, lead):
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    scores[seed % vocab] += lead
    p, exact = scores.softmax(-1), scores.double().softmax(-1)
    best = int(exact.argmax())
    left = float(exact.sum() - exact[best]) if lead < 15 else float(torch.cat([exact[:best], exact[best + 1 :]]).sum())
    assert 1 - float(confidence_score(p, "max_prob")) == pytest.approx(left, rel=1e-5, abs=3e-16)
    minus = math.log1p(1e-10 - left) * (1 - left) + sum(q * math.log(q + 1e-10) for i, q in enumerate(exact.tolist()) if i != best)
    assert float(confidence_score(p)) == pytest.approx(minus, rel=1e-4, abs=1e-12)


# the loop


def plain_llada(model, ids, n, block, passes, score):
    "LLaDA's decoder, row by row, place by place."
    denoiser, length = Denoiser(model), ids.shape[1]
    canvas = torch.cat([ids, torch.full((1, n), MASK)], 1)
    for start in range(length, length + n, block):
        stop = min(start + block, length + n)
        for i in range(passes):
            masked = [j for j in range(start, stop) if canvas[0, j] == MASK]
            k = (stop - start) // passes + (i < (stop - start) % passes)
            with torch.no_grad():
                p = denoiser(canvas)[0].softmax(-1)
            for j in sorted(masked, key=lambda j: (-score(p[j]), j))[:k]:
                canvas[0, j] = p[j].argmax()
    return canvas[0, length:].tolist()


SCORES = {
    "low_confidence": lambda p: p.max().item(),
    "margin": lambda p: (p.topk(2).values[0] - p.topk(2).values[1]).item(),
    "entropy": lambda p: (p * (p + 1e-10).log()).sum().item(),
}


@pytest.mark.parametrize("order", list(SCORES))
@pytest.mark.parametrize(("n", "block", "passes"), [(12, 12, 12), (12, 4, 4), (12, 6, 2), (12, 4, 3), (8, 8, 1)])
def test_llada_against_a_transcription(order, n, block, passes, llama, prompt):
    decoder = LLaDA(block_length=block, steps=passes * (n // block), remasking=order)
    assert new_ids(decode(decoder, llama, prompt, n))[0] == plain_llada(llama, prompt, n, block, passes, SCORES[order])


@pytest.mark.parametrize("gamma", [1.1, 0.3, 0.1, 0.0])
def test_the_threshold_against_a_transcription(gamma, llama, prompt):
    denoiser, canvas, passes = Denoiser(llama), torch.cat([prompt, torch.full((1, 12), MASK)], 1), []
    for start in (7, 13):
        while bool((canvas[0, start : start + 6] == MASK).any()):
            with torch.no_grad():
                p = denoiser(canvas)[0].softmax(-1)
            masked = [j for j in range(start, start + 6) if canvas[0, j] == MASK]
            best = max(masked, key=lambda j: (p[j].max().item(), -j))
            chosen = [j for j in masked if p[j].max() >= gamma or j == best]
            for j in chosen:
                canvas[0, j] = p[j].argmax()
            passes.append(len(chosen))
    out = decode(FastDLLM(block_length=6, threshold=gamma), llama, prompt)
    assert new_ids(out)[0] == canvas[0, 7:].tolist()
    assert out.stats.emitted == [passes]


@every_policy
def test_rows_are_independent(method, llama, batch):
    decoder = method.example(llama)
    free = new_ids(decode(decoder, llama, batch, 16))
    end = free[0][4]
    together = decode(decoder, llama, batch, 16, eos_token_id=end)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        alone = decode(decoder, llama, ids[mask.bool()][None], 16, eos_token_id=end)
        assert new_ids(together)[row] == new_ids(alone)[0]
        assert together.stats.emitted[row] == alone.stats.emitted[0]


@pytest.fixture(scope="module")
def other():
    "A model of another vocabulary."
    return small_model(vocab=61, seed=8)


@every_policy
def test_two_threads_on_one_decoder_write_what_one_writes_after_the_other(method, llama, other):
    decoder = method.example(llama)
    before = {name: repr(value) for name, value in vars(decoder).items()}
    work = [(m, left_pad(random_prompts(2, (1, 9), vocab=61, seed=seed))) for seed in range(4) for m in (llama, other)]

    def write(job):
        return [row for size in (8, 12) for row in new_ids(decode(decoder, *job, size, eos_token_id=EOS))]

    one_by_one = [write(job) for job in work]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, work)) == one_by_one
    assert {name: repr(value) for name, value in vars(decoder).items()} == before


@every_policy
@pytest.mark.parametrize("block", [None, 4])
def test_leaving_early_changes_no_text(method, block, llama, batch):
    try:
        decoder = replace(method.example(llama), block_length=block)
    except (TypeError, ValueError):
        pytest.skip("its blocks are its own")
    free = new_ids(decode(decoder, llama, batch, 16))
    end = free[0][4]
    early = decode(decoder, llama, batch, 16, eos_token_id=end)
    late = decode(replace(decoder, early_stop=False), llama, batch, 16, eos_token_id=end)
    assert new_ids(early) == new_ids(late)
    assert early.stats.target_forwards <= late.stats.target_forwards
    assert all(len(a) <= len(b) for a, b in zip(early.stats.emitted, late.stats.emitted))
    if block:  # in one block the end may be the last that is filled
        assert sum(map(len, early.stats.emitted)) < sum(map(len, late.stats.emitted))


@every_policy
def test_what_is_filled_stays_and_nothing_is_left(method, llama, prompt, monkeypatch):
    seen, again, write = [], [], Canvas.write

    def spy(canvas, tokens, chosen, confidence=None):
        before = canvas.ids.clone()
        write(canvas, tokens, chosen, confidence)
        filled = before != MASK
        filled[:, : canvas.prompt] = True
        assert canvas.ids[filled].equal(before[filled])
        seen.append(int(chosen.sum()))
        again[:] = [] if canvas.remasked is None else [int(canvas.remasked.sum())]

    monkeypatch.setattr(Canvas, "write", spy)
    out = decode(method.example(llama), llama, prompt, 14)
    assert sum(seen) == 14 + sum(again)
    assert MASK not in new_ids(out)[0]
    assert out.sequences[:, :7].equal(prompt)


def test_an_end_costs_no_more_passes(llama, prompt):
    free = new_ids(decode(LLaDA(remasking="left_to_right"), llama, prompt, 20))[0]
    end = free[3]
    out = decode(LLaDA(remasking="left_to_right"), llama, prompt, 20, eos_token_id=end)
    assert out.stats.target_forwards == free.index(end) + 1


def test_min_new_tokens(llama, prompt):
    end = new_ids(decode(LLaDA(remasking="left_to_right"), llama, prompt, 12))[0][2]
    short = decode(LLaDA(), llama, prompt, 12, eos_token_id=end, logits_processor=LogitsProcessorList([Favours(end)]))
    assert len(new_ids(short)[0]) == 1
    for block in (None, 4):
        out = decode(
            LLaDA(block_length=block),
            llama,
            prompt,
            12,
            eos_token_id=end,
            min_new_tokens=7,
            logits_processor=LogitsProcessorList([Favours(end)]),
        )
        assert new_ids(out)[0].index(end) == 7


class Favours(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += 50.0
        return scores


def test_processors_see_the_whole_canvas(llama, prompt):
    seen = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            return scores

    decode(LLaDA(block_length=3), llama, prompt, 6, logits_processor=LogitsProcessorList([Looks()]))
    assert all(x.shape == (1, 13) for x in seen)
    masked = [int((x[0, 7:] == MASK).sum()) for x in seen]
    assert masked == sorted(masked, reverse=True)
    assert masked[0] == 6
    assert masked[-1] == 1


def test_score_from_looks_at_the_other_probs(llama, prompt):
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 0.3, "top_k": 0}
    seen = {}
    for kind in ("raw", "sampled"):

        class Keeps(LLaDA):
            def select(self, step, kind=kind):
                expected = (
                    (step.scores if kind == "raw" else step.scores / 0.3).double().softmax(-1).gather(-1, step.tokens[..., None])[..., 0]
                )
                seen.setdefault(kind, []).append(torch.allclose(step.confidence[step.masked], expected[step.masked], atol=1e-6))
                return super().select(step)

        decode(Keeps(score_from=kind), llama, prompt, 6, **settings)
    assert all(seen["raw"])
    assert all(seen["sampled"])


def test_suppressed_ends(llama, prompt):
    free = new_ids(decode(LLaDA(), llama, prompt, 12))[0]
    end = max(set(free), key=free.count)
    never = decode(LLaDA(suppress_eos_logits=True), llama, prompt, 12, eos_token_id=end)
    assert end not in new_ids(never)[0]
    out = decode(LLaDA(suppress_eos_confidence=True, early_stop=False, trace=True), llama, prompt, 12, eos_token_id=end)
    step = out.trace[0]
    assert all(c == 0 for t, c in zip(step.tokens, step.info["confidence"]) if t == end)


@dataclass
class Cuts(LLaDA):
    "Cuts every text behind the first place of the second block, once that is filled."

    def stop(self, step, chosen):
        place = step.canvas.prompt + 4
        if step.start != place:
            return None
        filled = step.canvas.ids[step.rows, place] != MASK
        return torch.where(filled, place + 1, step.canvas.length)


def test_a_text_that_is_cut_off(llama, batch):
    whole = decode(LLaDA(block_length=4, remasking="left_to_right"), llama, batch, 12)
    end = next(t for t in range(2, VOCAB) if not any(t in row for row in new_ids(whole)))
    out = decode(Cuts(block_length=4, remasking="left_to_right"), llama, batch, 12, eos_token_id=end)
    assert new_ids(out) == [[*row[:5], end] for row in new_ids(whole)]
    assert out.stats.target_forwards == 5


def test_trace_tells_pass_and_confidence(llama, prompt):
    out = decode(LLaDA(block_length=6, trace=True), llama, prompt)
    order = [p for step in out.trace for p in step.info["step"]]
    assert sorted(order) == list(range(12))
    assert all(p < 6 for p in order[:6])
    assert all(0 < c <= 1 for step in out.trace for c in step.info["confidence"])
    assert [step.info["block"] for step in out.trace] == [(0, 6), (6, 12)]


@dataclass
class Idle(Unmasker):
    def select(self, step):
        return torch.zeros_like(step.masked)


@dataclass
class Remasks(Unmasker):
    "Fills positions with the mask, pass after pass."

    def select(self, step):
        step.tokens = torch.full_like(step.tokens, MASK)
        return step.masked


def test_the_loop_counts_what_is_left_not_what_was_chosen(llama, batch):
    with pytest.raises(RuntimeError, match="Remasks.select has filled nothing for"):
        decode(Remasks(), llama, batch, 6)


def test_a_policy_that_fills_nothing_is_found_out(llama, prompt):
    with pytest.raises(RuntimeError, match="Idle.select has filled nothing for"):
        decode(Idle(), llama, prompt)
    with pytest.raises(NotImplementedError, match="Unmasker must define select"):
        decode(Unmasker(), llama, prompt)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LLaDA(block_length=0), "block_length must be positive or None, got 0"),
        (lambda: LLaDA(steps=-1), "steps must be positive or None, got -1"),
        (lambda: LLaDA(cache="all"), "unknown cache 'all': use one of none, prefix, dual"),
        (lambda: LLaDA(cfg_scale=-0.5), "cfg_scale must be finite and not negative"),
        (lambda: LLaDA(score_from="x"), "unknown score_from 'x'"),
        (lambda: LLaDA(remasking="x"), "unknown remasking 'x'"),
        (lambda: Dream(alg="x"), "unknown alg 'x'"),
        (lambda: Dream(eps=1.0), r"eps must lie in \[0, 1\)"),
        (lambda: Dream(alg_temp=-1.0), "alg_temp not be negative"),
        (lambda: Dream(alg_temp=math.nan), "alg_temp not be negative"),
        (lambda: Dream(top_p=0.0), r"top_p must lie in \(0, 1\] and top_k not be negative, got 0.0 and None"),
        (lambda: Dream(top_p=math.nan), "top_p must lie in"),
        (lambda: Dream(top_k=-1), "top_k not be negative"),
        (lambda: LLaDA(cfg_scale=math.nan), "cfg_scale must be finite"),
        (lambda: LLaDA(cfg_scale=math.inf), "cfg_scale must be finite"),
        (lambda: LLaDA(suppress_eos_confidence=True, remasking="margin"), "which remasking='margin' does not order by"),
        (lambda: EntropyBound(entropy_bound=math.nan), "entropy_bound must not be negative"),
        (lambda: FastDLLM(threshold=math.nan), "threshold and factor must be numbers"),
        (lambda: FastDLLM(factor=math.nan), "threshold and factor must be numbers"),
        (lambda: EntropyBound(entropy_bound=-1.0), "entropy_bound must not be negative"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_must_divide(llama, prompt):
    for n, fields in ((12, {"block_length": 5, "steps": 6}), (12, {"block_length": 4, "steps": 5})):
        with pytest.raises(ValueError, match="cannot be dealt out evenly to 3 blocks"):
            decode(LLaDA(**fields), llama, prompt, n)
    assert decode(LLaDA(block_length=5), llama, prompt, 12).sequences.shape == (1, 19)


def test_overhead_is_what_is_spent_outside_the_model():
    model, tokenizer = Lab("test").load("diffusion_tasks")

    @dataclass
    class Slow(LLaDA):
        def select(self, step):
            time.sleep(0.2)
            return super().select(step)

    ready = {"plain": LLaDA(steps=2), "slow": Slow(steps=2)}
    found = loop_overheads(model, tokenizer, ready, max_new_tokens=16, repeats=3, tasks=["list_copy"])
    assert 1 < found["median"]["plain"] < 2 < found["median"]["slow"]
    assert (found["largest"] >= found["median"]).all()
