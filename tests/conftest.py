"""Small models for the tests of the contract. All are random, run on one thread, and need no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from decodelab.core.zoo import load

VOCAB = 97  # <pad>, <eos> and the 95 printable ASCII characters
PAD, EOS = 0, 1

_common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", derandomize=True, **_common)
settings.register_profile("nightly", max_examples=400, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def small_model(kind="llama", attention="sdpa", vocab=VOCAB, hidden=32, context=256, spread=0.3, seed=0):
    "A random causal language model that never chooses <pad> or <eos> by itself when decoded greedily."
    torch.manual_seed(seed)
    common = {"vocab_size": vocab, "initializer_range": spread, "attn_implementation": attention, "pad_token_id": PAD, "eos_token_id": EOS}
    common |= {"bos_token_id": None}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=context, n_embd=hidden, n_layer=2, n_head=4, **common))
    else:
        config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
        common |= {"head_dim": hidden // 4} if kind == "qwen3" else {}
        shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
        model = cls(
            config(
                **shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=False, **common
            )
        )
    with torch.no_grad():
        model.get_output_embeddings().weight[[PAD, EOS]] = 0.0  # logit 0: never the best of many
    model.config.mask_token_id, model.config.shift_logits = PAD, False  # for diffusion decoders: a masked language model, not shifted
    return model.eval()


def random_prompts(n, lengths=(2, 12), vocab=VOCAB, seed=0):
    "`n` prompts [1, length] without special tokens."
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (n,), generator=generator).tolist()
    return [torch.randint(2, vocab, (1, size), generator=generator) for size in sizes]


def left_pad(prompts, pad=PAD):
    "Prompts [1, length] as one left-padded batch: input_ids and attention_mask."
    longest = max(p.shape[1] for p in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, longest - p.shape[1] :] = p[0]
        mask[i, longest - p.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def character_tokenizer():
    "One token a printable character."
    characters = ["Ġ", *map(chr, range(33, 127))]
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {c: i for i, c in enumerate(characters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False, padding_side="left"
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama():
    return small_model("llama")


@pytest.fixture(scope="session")
def gpt2():
    return small_model("gpt2")


@pytest.fixture(scope="session")
def qwen3():
    return small_model("qwen3")


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="session")
def tales():
    "The zoo model `tales` and its tokenizer."
    try:
        return load("tales")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the zoo model tales is not here: {error}")
