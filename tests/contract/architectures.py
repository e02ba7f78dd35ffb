"""Tiny random models of every decoder-only architecture that the installed transformers knows, for the sweep in `test_architectures.py`.

A configuration is made small by one table of field names (`SMALL`), one entry for each architecture that needs more (`OWN`),
and one rule for lists with an entry a layer: every kind of layer that the default configuration has occurs. Windows and chunks
are shorter than the texts of the sweep, so that they really cut.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, PAD, FIRST = 160, 0, 5  # size of the vocabulary, padding id, first ordinary id
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE, LAYERS, CONTEXT = 32, 4, 2, 8, 64, 2, 256
WINDOW, CHUNK, EXPERTS = 24, 24, 4  # sliding window and attention chunk, which a trial of a few tokens does not reach; experts of a layer
TOP = 8  # keys that sparse attention looks at, length of its blocks
SPREAD = 0.3  # standard deviation of the weights: logits far from flat

# Field of a configuration -> its small value. An entry is used where the configuration has such a field.
SMALL: dict[str, Any] = {
    # sizes
    **dict.fromkeys(
        ("hidden_size", "hidden_size_global", "n_embd", "d_model", "emb_dim", "embedding_dim", "lru_width", "attention_hidden_size"), HIDDEN
    ),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "d_head", "dim_head", "kv_channels", "attention_head_dim", "attention_head_size"), HEAD_DIM
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff", "d_inner"), WIDE),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "feed_forward_size", "dense_intermediate_size", "n_inner"), WIDE),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), HIDDEN),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size"), HIDDEN),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length"), CONTEXT),
    **dict.fromkeys(("max_target_positions", "rel_extent", "original_max_position_embeddings"), CONTEXT),
    # windows and chunks
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    "local_attention": 2 * WINDOW,
    **dict.fromkeys(("attention_chunk_size", "floor_scale"), CHUNK),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_dense_layers", "first_k_dense_replace"), 1),
    # low-rank attention and its indexer
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "rotary_dim", "d_rel"), HEAD_DIM),
    "index_n_heads": 2,
    "index_topk": TOP,
    "index_block_size": TOP,
    "index_topk_blocks": 2,
    # states of recurrent and convolution layers
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "conv1d_width", "linear_conv_kernel_dim", "short_conv_kernel_size"), 4),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "linear_num_key_heads", "mamba_d_ssm_groups"), 2),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size", "log_scaling_n_floor"), 16),
    # special tokens: nothing ends a text by itself
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id")),
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "is_decoder": True,  # BERT-like models
    # weights
    **dict.fromkeys(("initializer_range", "init_std", "embed_init_std", "initializer_factor", "embedding_initializer_range"), SPREAD),
    "tie_word_embeddings": False,  # a tied random head repeats its last token for ever
}

# Architectures that need more than the table above.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED_KV = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": WINDOW,
        "num_hidden_layers": LAYERS,  # `generate` asks for it
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {key: {**_ROPE, "mrope_section": [2, 1, 1]} for key in ("sliding_attention", "full_attention")},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": HIDDEN, "num_experts_per_tok": 2}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "dots3_note_text": {
        "head_dim": 2 * HEAD_DIM,
        **{f"swa_{f}": HEADS for f in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{f}": 16 for f in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{f}": HEAD_DIM for f in ("qk_nope_head_dim", "v_head_dim")},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **_SHARED_KV,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "intermediate_size": [WIDE] * 4,
    },
    "gemma4_text": {**_SHARED_KV, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": _SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": TOP,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "eos_token_id": 2,
    },
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "hash_seed": 0,
        "local_attn_chunk_length": TOP,
        "lsh_attn_chunk_length": TOP,
    },
    "roc_bert": {"pronunciation_vocab_size": 32, "pronunciation_embed_dim": 16, "shape_vocab_size": 32, "shape_embed_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlm": {"mask_token_id": 3},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2}
    | {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
    | {"attention_hidden_size": 64, "attention_head_dim": 16, "kv_channels": 16},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW, "router_hidden_size": 16},
}

# Settings of an architecture that change what a decoder can do with it: "architecture:setting".
VARIANTS: dict[str, dict[str, Any]] = {
    "doge:window": {"keep_window_size": WINDOW},
    "falcon:alibi": {"alibi": True, "multi_query": False},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    "gemma2:eager": {"attn_implementation": "eager"},
    "gpt2:eager": {"attn_implementation": "eager"},
    "gpt_neo:global": {"attention_types": [[["global"], LAYERS]]},
    "gpt_bigcode:heads": {"multi_query": False},
    "llama:eager": {"attn_implementation": "eager"},
    "llama:dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "max_position_embeddings": 24},
    "llama4_text:rope": {"no_rope_layers": [1, 1]},
    "ministral3:scaled": {
        "rope_parameters": {
            **transformers.Ministral3Config().rope_parameters,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": CONTEXT,
        }
    },
    "mistral:full": {"sliding_window": None},
    "mixtral:window": {"sliding_window": WINDOW},
    "mpt:cache": {"use_cache": True},
    "phi3:longrope": {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        "original_max_position_embeddings": 24,
    },
    "qwen2:window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3_moe:window": {"use_sliding_window": True, "sliding_window": WINDOW},
    "starcoder2:window": {"sliding_window": WINDOW},
}

# Architectures that are no text decoder by themselves, and why.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm; its text decoder is gemma3n_text",
    "gemma4_assistant": "a draft head that reads the KV cache of its target: no decoder by itself",
    "gemma4_unified_assistant": "a draft head that reads the KV cache of its target: no decoder by itself",
    "musicgen": "writes several audio codebooks at once, not one text",
    "musicgen_melody": "writes several audio codebooks at once, not one text",
}

_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types", "attn_layers")


def model_class(name: str) -> Any:
    "Class of an architecture's causal language model."
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name.partition(":")[0]])


def config_class(name: str) -> Any:
    "Configuration class of the model: of the text part where the causal model is that part alone."
    return model_class(name).config_class


@lru_cache(maxsize=1)
def names() -> dict[str, list[str]]:
    "Every architecture of the mapping once, with the other names of the same classes."
    groups: dict[Any, list[str]] = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        groups.setdefault((model_class(name), config_class(name)), []).append(name)
    found = {}
    for (_, config), group in groups.items():
        first = config.model_type if config.model_type in group else group[0]
        found[first] = [name for name in group if name != first]
    return found


def architectures() -> list[str]:
    "All that the sweep runs over: architectures that can be built, and their variants."
    return sorted([name for name in names() if name not in NOT_BUILT] + list(VARIANTS))


def _kinds(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _layered(default: dict[str, Any]) -> dict[str, Any]:
    # every kind of layer occurs: the kinds of each list, repeated up to the longest one
    lists = {f: _kinds(default[f]) for f in _PER_LAYER if isinstance(default.get(f), list) and default[f]}
    depth = max([LAYERS, *map(len, lists.values())])
    small: dict[str, Any] = {f: (kinds * depth)[:depth] for f, kinds in lists.items()}
    if depth != LAYERS:
        small["num_hidden_layers"] = depth
    return small


def small_config(name: str, **changes: Any) -> Any:
    "Configuration of a tiny model of an architecture."
    return _shrink(config_class(name), {**OWN.get(name.partition(":")[0], {}), **VARIANTS.get(name, {}), **changes})


def _default(cls: Any) -> dict[str, Any]:
    try:
        return cls().to_dict()
    except Exception:  # a default that does not pass its own check: the annotations tell the fields
        return dict.fromkeys(f for c in cls.__mro__ for f in getattr(c, "__annotations__", {}))


def _shrink(cls: Any, own: dict[str, Any]) -> Any:
    default = _default(cls)
    small = {f: v for f, v in SMALL.items() if f in default and (default[f] is not None or f not in OPTIONAL)}
    if "kv_lora_rank" in default:  # latent attention has as many key heads as query heads
        small["num_key_value_heads"] = HEADS
    parts = {f: _shrink(c, own.get(f, {})) for f, c in _parts(cls).items() if not isinstance(own.get(f), transformers.PretrainedConfig)}
    return cls(**{**small, **_layered(default), **own, **parts})


def _parts(cls: Any) -> dict[str, Any]:
    # nested configurations and their classes
    try:
        whole = cls()
    except Exception:
        return {}
    return {f: type(v) for f, v in vars(whole).items() if isinstance(v, transformers.PretrainedConfig)}


# fields that stay None where that is their default: None means that the part does not exist
OPTIONAL = frozenset(
    {"n_group", "topk_group", "num_experts", "top_k_experts", "moe_intermediate_size", "n_shared_experts", "sliding_window", "q_lora_rank"}
    | {"unpadded_vocab_size"}
)


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    "A tiny random model of an architecture or a variant, the same for the same seed."
    torch.manual_seed(seed)
    config = small_config(name, **changes)
    model = model_class(name)(config).eval()
    _spread(model, seed)
    return model


@torch.no_grad()
def _spread(model: Any, seed: int) -> None:
    # weights that the configuration's initialiser left tiny would make every logit the same
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and (not bool(parameter.isfinite().all()) or float(parameter.std()) < SPREAD / 3):
            parameter.normal_(0.0, SPREAD, generator=generator)
    # padding is never chosen, nothing ends a text
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), torch.Tensor):
        head.weight[:FIRST] = 0.0
        if getattr(head, "bias", None) is not None:
            head.bias[:FIRST] = -math.inf
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
