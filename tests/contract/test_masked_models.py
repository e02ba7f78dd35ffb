"""Diffusion decoders on all masked-LM heads of transformers, and on models that only look to the left."""

import contextlib
import copy

import pytest
import torch
from toys import left_pad, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.denoiser import Denoiser, check_model, ignores_padding, looks_both_ways, sees_ahead

VOCAB, MASK = 64, 3
# every architecture takes of these what it has
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "embedding_size": 32, "d_model": 32, "dim": 32, "n_embd": 32, "intermediate_size": 48}
SHAPE |= {"hidden_dim": 48, "n_inner": 48, "num_hidden_layers": 2, "n_layers": 2, "n_layer": 2, "num_layers": 2, "num_attention_heads": 4}
SHAPE |= {
    "num_key_value_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
}
SHAPE |= {"n_positions": 64, "initializer_range": 0.3, "embed_init_std": 0.3, "init_std": 0.3}
SHAPE |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 0, "image_token_id": 6}
MORE = {
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "d_head": 8, "d_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"alibi": True},
    "layoutlm": {"max_2d_position_embeddings": 16},
    "longformer": {"attention_window": [16, 16]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "neomme": {"hidden_size": 64, "head_dim": 16, "embedding_rank": 8, "embedding_dim": 8, "per_layer_config": {}},
    "perceiver": {"num_latents": 4, "d_latents": 32, "num_self_attends_per_block": 1},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_vocab_size": 9, "shape_vocab_size": 9},
    "xmod": {"default_language": "en_XX"},
}
ENCODER_DECODER = ("bart", "mbart", "mvp")
OTHER_INPUTS = ("perceiver",)  # reads `inputs` of one length
MIXES_COLUMNS = ("convbert", "fnet", "funnel", "mra", "nystromformer", "yoso")  # by convolution, Fourier transform, pooling, blocks
EXACT = sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - {*ENCODER_DECODER, *OTHER_INPUTS, *MIXES_COLUMNS})


def shaped(config, changes):
    kinds = getattr(config, "layer_types", None) or []
    for name, value in (changes | {"layer_types": [*kinds[:1], *kinds[-1:]] or None}).items():
        if hasattr(config, name):
            with contextlib.suppress(NotImplementedError, AttributeError):  # what follows from other fields cannot be set
                setattr(config, name, value)
    for part in ("text_config", "vision_config"):
        if hasattr(config, part):
            shaped(getattr(config, part), changes)
    return config


def tiny(name, auto=AutoModelForMaskedLM, **changes):
    "A random model of an architecture, with small numbers wherever its config has a place for them."
    config = shaped(AutoConfig.for_model(name), SHAPE | {"num_buckets": 4} | MORE.get(name, {}) | changes)
    config.mask_token_id = MASK
    torch.manual_seed(0)
    return auto.from_config(config).eval()


PROMPTS = [torch.randint(7, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 6)]
BATCH = left_pad(PROMPTS, pad=1)


def written(model, ids, **fields):
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    decoder = LLaDA(block_length=3, **fields)
    out = decoder.generate(model, **ids, **settings) if isinstance(ids, dict) else decoder.generate(model, ids, **settings)
    return [c.tolist() for c in out.continuations]


def canvases():
    "The batch with six masks behind it, and what exists of it."
    ids = torch.nn.functional.pad(BATCH["input_ids"], (0, 6), value=MASK)
    return ids, torch.nn.functional.pad(BATCH["attention_mask"], (0, 6), value=1).bool()


@pytest.mark.parametrize("name", EXACT)
def test_a_padded_row_is_the_row_alone(name):
    model = tiny(name)
    (ids, exists), denoiser = canvases(), Denoiser(model)
    with torch.no_grad():
        own = model(input_ids=ids[:1]).logits
        together = denoiser(ids, exists.long())
        for row, here, answer in zip(ids, exists, together):
            alone = denoiser(row[here][None])[0]
            assert float((answer[here].softmax(-1) - alone.softmax(-1)).abs().max()) < 1e-5
            finite = alone.isfinite()
            assert float((answer[here] - alone)[finite].abs().max()) < 1e-5 * max(1.0, float(alone[finite].abs().max()))
        unpadded = denoiser(ids[:1])
    own[..., MASK] = -torch.inf
    assert torch.equal(own, unpadded)  # a whole text is read as the model itself reads it
    assert looks_both_ways(model)


@pytest.mark.parametrize("name", EXACT)
def test_every_masked_head_decodes_a_batch_like_its_rows(name):
    if name == "ibert" and not hasattr(tiny(name).get_input_embeddings(), "num_embeddings"):
        pytest.xfail("the engine asks an embedding table for num_embeddings")
    model = tiny(name)
    assert written(model, BATCH) == [written(model, prompt)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", MIXES_COLUMNS)
def test_a_padded_batch_is_refused_where_padding_shows(name):
    model = tiny(name)
    assert len(written(model, PROMPTS[0])[0]) == 6
    with pytest.raises(ValueError, match="answers differently when a row is padded: decode prompts of one length together"):
        written(model, BATCH)


@pytest.mark.parametrize(
    ("name", "message"), [*((n, "is an encoder-decoder model") for n in ENCODER_DECODER), ("perceiver", "reads inputs, not")]
)
def test_models_of_another_kind_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        written(tiny(name), PROMPTS[0])


@pytest.mark.parametrize("name", ["roberta", "xlm", "esm"])
def test_a_padding_token_in_a_text_is_a_token(name):
    "RoBERTa numbers positions, and XLM counts tokens, by what is not the padding token: not so when a text holds one."
    model, denoiser = (m := tiny(name)), Denoiser(m)
    text = torch.tensor([[9, 1, 8, MASK, 10, MASK]])
    padded = torch.nn.functional.pad(text, (2, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(text), (2, 0))
    with torch.no_grad():
        alone, wide = denoiser(text), denoiser(padded, mask)[:, 2:]
        changed = denoiser(torch.tensor([[9, 1, 8, MASK, 11, MASK]]))
    assert torch.allclose(alone.softmax(-1), wide.softmax(-1), atol=1e-5)
    assert float((alone.softmax(-1) - changed.softmax(-1))[0, 3].abs().max()) > 1e-3  # what follows is seen
    assert model.config.pad_token_id == 1


def test_positions_that_a_table_does_not_have():
    model = tiny("roberta", max_position_embeddings=16)  # 14 positions: the first two rows are for padding
    assert len(written(model, PROMPTS[0][:, :8])[0]) == 6
    with pytest.raises(ValueError, match="a text of 15 tokens exceeds the 14 positions of RobertaForMaskedLM"):
        written(model, PROMPTS[0])


# models that look to the left


def causal_cases():
    yield "llama", small_model(vocab=VOCAB), lambda m: delattr(m.config, "shift_logits")
    yield "bert as a decoder", tiny("bert", is_decoder=True), None
    yield "xlm as a decoder", tiny("xlm", causal=True), None


@pytest.mark.parametrize("case", causal_cases(), ids=lambda c: c[0])
def test_a_causal_model_with_a_mask_is_refused(case):
    _, model, change = case
    if change:
        change(model)
    assert not looks_both_ways(model)
    with pytest.raises(ValueError, match=r"is not known to look both ways, .* set bidirectional=True on the decoder"):
        written(model, PROMPTS[0])


def test_what_makes_a_model_bidirectional():
    model = small_model(vocab=VOCAB)
    del model.config.shift_logits
    asked = written(model, PROMPTS[0], bidirectional=True)
    for name, value in (("is_causal", False), ("shift_logits", False)):
        told = copy.copy(model)
        told.config = copy.deepcopy(model.config)
        setattr(told.config, name, value)
        assert looks_both_ways(told)
        assert written(told, PROMPTS[0]) == asked
        told.config.is_causal = True
        assert not looks_both_ways(told)


@pytest.mark.parametrize("name", ["gpt_neo", "rwkv", "bloom", "falcon", "openai-gpt", "mamba"])
def test_a_claim_that_the_architecture_cannot_keep_is_refused(name):
    model = tiny(name, AutoModelForCausalLM)
    with pytest.raises(ValueError, match=r"(looks only to the left, whatever mask|cannot be shown all positions at once)"):
        check_model(Denoiser(model), PROMPTS[0], bidirectional=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text", "llama4_text", "gptj", "roberta"])
def test_a_claim_that_the_architecture_can_keep_is_kept(name):
    model = tiny(name, AutoModelForCausalLM)
    assert sees_ahead(Denoiser(model))
    assert ignores_padding(Denoiser(model), *canvases())
    assert written(model, BATCH, bidirectional=True) == [written(model, p, bidirectional=True)[0] for p in PROMPTS]


def test_a_decoder_only_model_is_tried_once():
    model = small_model(vocab=VOCAB)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    counts = []
    for _ in range(2):
        forwards.clear()
        written(model, BATCH)
        counts.append(len(forwards))
    assert counts == [10, 6]  # two to see ahead, two for the padding, six to decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_refuse(dtype):
    for model in (small_model(vocab=VOCAB), tiny("roberta")):
        assert len(written(model.to(dtype), BATCH)) == 3
    model = tiny("bert")
    with torch.autocast("cpu", torch.bfloat16):
        assert len(written(model, BATCH)) == 3


def test_segments_of_a_tokenizer():
    config = BertConfig(**{k: v for k, v in SHAPE.items() if hasattr(BertConfig(), k)}, mask_token_id=MASK)
    model = BertForMaskedLM(config).eval()
    zeros = torch.zeros_like(BATCH["input_ids"])
    assert written(model, BATCH | {"token_type_ids": zeros}) == written(model, BATCH)
    with pytest.raises(ValueError, match="token_type_ids says nothing about the masked positions behind the prompt: leave it out"):
        written(model, BATCH | {"token_type_ids": zeros + 1})
