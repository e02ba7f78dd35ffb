"""What several test files share: small models that are random and need no network, prompts, processors, and a toy whose joint distribution is known."""

from dataclasses import replace

import numpy as np
import torch
from scipy.stats import chi2 as chi2_distribution
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import MaskedLMOutput

from decodelab.core.contract import decoders
from decodelab.diffusion.canvas import Block
from decodelab.diffusion.step import Plan, Step
from decodelab.lab.watch import watch
from decodelab.memory.act_qkv import ActQKV

VOCAB = 97  # <pad>, <eos> and the 95 printable ASCII characters


PAD, EOS = 0, 1


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
    tokenizer.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False, padding_side="left"
    )


def _in_blocks(model):
    "ActQKV with windows so narrow that short texts lie in blocks; a model that has no rotary positions is decoded within its local window."
    return ActQKV(**({} if isinstance(model, GPT2LMHeadModel) else {"n_init": 2, "n_loc": 8, "b": 4, "k": 2, "r": 2, "w": 4}))


METHODS = {name: m for name, m in decoders().items() if m.decoder.takes != ("encoder-decoder",)}  # others have tests of their own
METHODS["act_qkv"] = replace(METHODS["act_qkv"], example=_in_blocks)


class SumBias(LogitsProcessor):
    "Favours a token that depends on the sum of the history, which padding with 0 does not change."

    def __init__(self, bonus=8.0):
        self.bonus = bonus

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        favoured = 2 + input_ids.sum(-1, keepdim=True) % (scores.shape[-1] - 2)
        return scores.scatter_add(1, favoured, torch.full_like(favoured, self.bonus, dtype=scores.dtype))


class StopsAt(StoppingCriteria):
    "Stops a row at a length or at a token."

    def __init__(self, length=None, token=None):
        self.length, self.token = length, token

    def __call__(self, input_ids, scores, **kwargs):
        if self.length is not None:
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
        return input_ids[:, -1] == self.token


def plain(model, ids, new, **kwargs):
    "What transformers' greedy search adds to one prompt."
    out = model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)
    return out[0, ids.shape[1] :].tolist()


def added(out):
    return [c.tolist() for c in out.continuations]


V = 6


PER_BATCH = 4000


SAMPLING_RULES = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "penalty": ({"repetition_penalty": 3.0}, [RepetitionPenaltyLogitsProcessor(3.0)]),
}


TOY_PROMPT = torch.tensor([[2, 5, 3, 4]])


@torch.no_grad()
def exact_probs(model, processors, end=None):
    "Probability of every sequence of three tokens, by running all prefixes."
    processors = LogitsProcessorList(processors)
    probs = {(): 1.0}
    for _ in range(3):
        prefixes = list(probs)
        ids = torch.cat([torch.cat([TOY_PROMPT, torch.tensor([p], dtype=torch.long)], 1) for p in prefixes])
        p = torch.softmax(processors(ids, model(ids).logits[:, -1].float()).double(), -1).tolist()
        longer = {}
        for prefix, row in zip(prefixes, p):
            if end is not None and end in prefix:
                longer[(*prefix, 0)] = probs[prefix]  # padding
            else:
                longer |= {(*prefix, t): probs[prefix] * q for t, q in enumerate(row)}
        probs = longer
    return probs


def sample_counts(decoder, model, draws, **kwargs):
    "Counts of every sequence of three tokens; the rows of a batch are independent draws."
    counts = {}
    ids = TOY_PROMPT.expand(PER_BATCH, -1)
    kwargs = {"top_k": 0, "eos_token_id": 99} | kwargs
    for _ in range(draws // PER_BATCH):
        out = decoder.generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True, **kwargs)
        for row in out.sequences[:, 4:].tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    return counts


def fit(counts, probs):
    "p-value of the chi-square test of counts against a distribution; cells that expect fewer than five are pooled."
    draws = sum(counts.values())
    if any(probs.get(cell, 0.0) == 0.0 for cell in counts):
        return 0.0
    seen = np.array([counts.get(cell, 0) for cell in probs], dtype=float)
    expected = draws * np.array(list(probs.values()))
    rare = expected < 5
    if rare.any():
        seen, expected = np.append(seen[~rare], seen[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    return float(chi2_distribution.sf(((seen - expected) ** 2 / expected).sum(), len(seen) - 1))


def made_step(scores, masked=None, tokens=None, canvas=None, index=0, count=None, steps=None, eos_ids=(), **plan):
    "A denoising step on scores of our own, [rows, block, vocab]; all positions are masked, and a step is planned for each, unless told otherwise."
    n, length = scores.shape[:2]
    masked = torch.ones(n, length, dtype=torch.bool) if masked is None else masked
    count = masked.sum(-1) if count is None else count
    block = Block(0, length, torch.arange(n), masked, count, index)
    plan = Plan(steps or length, length, torch.tensor(eos_ids, dtype=torch.long), **plan)
    return Step(canvas, block, masked, scores, scores, plan, tokens=torch.empty(0) if tokens is None else tokens)


def decode_batch(decoder, model, prompts, new=32, **kwargs):
    return decoder.generate(model, **prompts, max_new_tokens=new, **({"do_sample": False} | kwargs))


def same_steps(a, b):
    return a.sequences.equal(b.sequences) and a.stats.emitted == b.stats.emitted


ENDS = list(range(3, VOCAB, 3))  # a third of the vocabulary ends a text: EOS tokens are proposed all the time


def canvases(decoder, model, prompt, new=16, eos_token_id=ENDS, **kwargs):
    "What was written to each position of each row, EOS tokens and what follows them included, [rows][positions]."
    inputs = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": eos_token_id} | kwargs
    lines = watch(decoder, model, **inputs, **settings).lines()
    written = lines[lines["committed"]].sort_values(["row", "position"])
    return [rows["token"].tolist() for _, rows in written.groupby("row")], lines


class Wandering(PreTrainedModel, GenerationMixin):
    "Each position has a distribution of its own, disturbed by noise that depends on what the row shows; nothing is ever tied."

    config_class = PreTrainedConfig

    def __init__(self, noise=1.0, sharpness=2.0, eos=None, seed=0, size=9):
        config = {
            "vocab_size": size,
            "num_hidden_layers": 0,
            "mask_token_id": PAD,
            "eos_token_id": eos,
            "pad_token_id": 1,
            "is_causal": False,
        }
        super().__init__(PreTrainedConfig(**config, max_position_embeddings=512))
        generator = torch.Generator().manual_seed(seed)
        self.base = sharpness * torch.randn(64, size, generator=generator)
        self.noise, self.embed = noise, torch.nn.Embedding(size, 1).requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        exists = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, self.base.shape[1])
        for i, (row, there) in enumerate(zip(input_ids.tolist(), exists.tolist())):
            real = [token for token, on in zip(row, there) if on]
            own = torch.Generator().manual_seed(hash(tuple(real)) % 2**31)
            dist = self.base[: len(real)] + self.noise * torch.randn(len(real), self.base.shape[1], generator=own)
            logits[i, torch.tensor(there).bool()] = dist
        return MaskedLMOutput(logits=logits)
