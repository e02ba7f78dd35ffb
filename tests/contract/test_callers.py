"""Callers who use the whole of transformers' interface: criteria and processors of their own, caches, threads, streamers, wrong types."""

import copy
import threading
import warnings
from dataclasses import fields, replace

import pytest
import torch
from toys import PAD, VOCAB, left_pad, random_prompts, small_model
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from decodelab.core.contract import decoders, field_types
from decodelab.core.session import Session
from decodelab.sampling.base import Autoregressive
from decodelab.speculative.acceptance import TypicalAcceptance
from decodelab.speculative.aded import ADED
from decodelab.speculative.drafters import DraftModel, NGram, PromptLookup
from decodelab.speculative.token_recycling import TokenRecycling

METHODS = {name: m for name, m in decoders().items() if m.decoder.takes != ("encoder-decoder",)}
CAUSAL = [name for name, m in METHODS.items() if m.family != "diffusion"]
LOSSLESS = [name for name in CAUSAL if METHODS[name].lossless]
TREES = [name for name in LOSSLESS if name != "autoregressive"]
causal = pytest.mark.parametrize("name", CAUSAL)
writes_on = pytest.mark.parametrize(
    "name", [name for name in CAUSAL if METHODS[name].family != "structured"]
)  # as many tokens as asked for
lossless = pytest.mark.parametrize("name", LOSSLESS)
trees = pytest.mark.parametrize("name", TREES)
GREEDY = {"do_sample": False, "max_new_tokens": 16}


def make(name, model):
    return METHODS[name].example(model)


def steady(name, model):
    "A decoder whose text, up to its end, does not depend on what ends it."
    return replace(make(name, model), **METHODS[name].neutral)


@pytest.fixture(scope="module")
def padded():
    return left_pad(random_prompts(4, lengths=(2, 9), seed=5))


def greedy_rows(model, inputs, new=16):
    "What each row says when nothing stops it."
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)[:, inputs["input_ids"].shape[1] :].tolist()


# criteria


@writes_on
def test_criteria_of_a_type_that_generate_makes_too(name, llama):
    prompt = random_prompts(1, lengths=(7, 7), seed=3)[0]
    whole = steady(name, llama).generate(llama, prompt, **GREEDY).continuations[0].tolist()
    for criterion, n in ((EosTokenCriteria(eos_token_id=whole[4]), whole.index(whole[4]) + 1), (MaxLengthCriteria(max_length=10), 3)):
        out = steady(name, llama).generate(llama, prompt, **GREEDY, stopping_criteria=[criterion])
        assert out.continuations[0].tolist() == whole[:n]


class Notes(StoppingCriteria):
    "Keeps a flag for each row, and every text that it was shown."

    def __init__(self, word, rows):
        self.word, self.done, self.shown = word, [False] * rows, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids.tolist())
        self.done = [done or row[-1] == self.word for done, row in zip(self.done, input_ids.tolist(), strict=True)]
        return torch.tensor(self.done)


@lossless
def test_criteria_are_asked_as_generate_asks_them(name, llama, padded):
    "The whole batch, padded, once a new token; a row that had run ahead loses what it wrote behind its end."
    free, length = greedy_rows(llama, padded), padded["input_ids"].shape[1]
    ends = {"eos_token_id": free[1][4], "pad_token_id": PAD}
    theirs, ours = Notes(free[0][6], 4), Notes(free[0][6], 4)
    expected = llama.generate(**padded, **GREEDY, **ends, stopping_criteria=[theirs])
    out = make(name, llama).generate(llama, **padded, **GREEDY, **ends, stopping_criteria=[ours])
    stop = [min([row.index(e) for e in (free[1][4], free[0][6]) if e in row] or [15]) + 1 for row in free]
    assert len(set(stop)) > 1
    assert out.sequences.shape == expected.shape
    assert [c.tolist() for c in out.continuations] == [row[:n] for row, n in zip(free, stop)]
    assert [sum(row) for row in out.stats.emitted] == stop
    assert len(ours.shown) == len(theirs.shown)
    for ours_, theirs_ in zip(ours.shown, theirs.shown):  # `generate` writes on behind a row that a criterion has stopped: not compared
        for row, end in enumerate(stop):
            assert ours_[row][: length + end] == theirs_[row][: length + end]


@trees
def test_a_trace_ends_where_a_criterion_stops(name, llama, padded):
    free = greedy_rows(llama, padded)
    decoder = make(name, llama)
    decoder.trace = True
    out = decoder.generate(llama, **padded, **GREEDY, stopping_criteria=[Notes(free[2][5], 4)])
    for row, new in enumerate(out.continuations):
        steps = out.trace.row(row)
        assert [t for s in steps for t in s.tokens] == new.tolist()
        assert all(len(s.tokens) == len(s.roles) for s in steps)


# processors


class Remembers(LogitsProcessor):
    "Favours a token that depends on how often it has been asked, and keeps the texts that it was shown."

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids.tolist())
        favoured = 2 + (len(self.shown) * 31 + torch.arange(len(scores))) % (VOCAB - 2)
        return scores.scatter_add(1, favoured[:, None], torch.full((len(scores), 1), 2.0))


@lossless
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("criterion", [False, True])
def test_processors_are_asked_once_a_token_in_order(name, batch, criterion, llama, padded):
    inputs = padded if batch else {"input_ids": padded["input_ids"][:1], "attention_mask": padded["attention_mask"][:1]}
    free = llama.generate(**inputs, **GREEDY, logits_processor=[Remembers()])[:, inputs["input_ids"].shape[1] :].tolist()
    more = {"eos_token_id": free[-1][5], "pad_token_id": PAD}
    if criterion:
        more["stopping_criteria"] = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= inputs["input_ids"].shape[1] + 9)]
    theirs, ours = Remembers(), Remembers()
    expected = llama.generate(**inputs, **GREEDY, **more, logits_processor=[theirs])
    out = make(name, llama).generate(llama, **inputs, **GREEDY, **more, logits_processor=[ours])
    assert out.sequences.tolist() == expected.tolist()
    assert ours.shown == theirs.shown


@lossless
def test_a_watermark_with_a_memory(name, llama, padded):
    mark = SynthIDTextWatermarkingConfig(keys=[11, 22, 33, 44], ngram_len=3, context_history_size=8)
    expected = llama.generate(**padded, **GREEDY, watermarking_config=mark)
    plain = llama.generate(**padded, **GREEDY)
    assert not expected.equal(plain)
    assert make(name, llama).generate(llama, **padded, **GREEDY, watermarking_config=mark).sequences.equal(expected)


@lossless
def test_prefix_functions_see_real_prefixes_only(name, llama, padded):
    prompts, free = padded["input_ids"].tolist(), greedy_rows(llama, padded)
    end = free[1][3]

    def allowed(row, text):
        text = text.tolist()
        assert text[: len(prompts[row])] == prompts[row]
        new = text[len(prompts[row]) :]
        cut = new.index(end) + 1 if end in new else len(new)
        assert new[cut:] == [PAD] * (len(new) - cut)
        assert all(t == end or t % 4 == (row + i) % 4 for i, t in enumerate(new[:cut]))
        return [t for t in range(2, VOCAB) if t % 4 == (row + len(new)) % 4] + [end]

    more = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": end, "pad_token_id": PAD}
    expected = llama.generate(**padded, **GREEDY, **more)
    assert make(name, llama).generate(llama, **padded, **GREEDY, **more).sequences.equal(expected)


def test_typical_acceptance_refuses_processors_with_a_memory(llama):
    decoder = PromptLookup(lossy=TypicalAcceptance())
    with pytest.raises(ValueError, match="typical acceptance asks the processors about several texts at once"):
        decoder.generate(
            llama, torch.tensor([[5, 6]]), do_sample=True, max_new_tokens=4, logits_processor=LogitsProcessorList([Remembers()])
        )


# caches and forward arguments


def test_turns_of_a_chat_on_one_cache(llama):
    "Rows that end early stay in a user's cache, so that the next turn finds all of them."
    inputs = left_pad(random_prompts(3, lengths=(4, 7), seed=2))
    end = greedy_rows(llama, inputs)[1][3]
    ends = {"eos_token_id": end, "pad_token_id": PAD}
    theirs, ours = DynamicCache(), DynamicCache()
    text = inputs
    for turn in range(3):
        expected = llama.generate(**text, **GREEDY, **ends, past_key_values=theirs)
        out = Autoregressive().generate(llama, **text, **GREEDY, **ends, past_key_values=ours).sequences
        new = out[:, text["input_ids"].shape[1] :]
        assert out.equal(expected)
        question = torch.randint(2, VOCAB, (3, 4), generator=torch.Generator().manual_seed(turn))
        real = torch.cat([text["attention_mask"], (new != PAD).long(), torch.ones_like(question)], 1)
        text = {"input_ids": torch.cat([out, question], 1), "attention_mask": real}
        assert all(len(layer.keys) == 3 for layer in ours.layers)


@trees
def test_speculation_leaves_a_passed_cache_alone(name, llama):
    prompt = random_prompts(1, lengths=(9, 9), seed=1)[0]
    cache = DynamicCache()
    with torch.no_grad():
        llama(prompt[:, :6], past_key_values=cache, use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]
    out = make(name, llama).generate(llama, prompt, **GREEDY, past_key_values=cache)
    assert out.sequences.equal(llama.generate(prompt, **GREEDY))
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, before, strict=True))


@lossless
def test_token_types(name):
    model = small_model("gpt2")
    inputs = left_pad(random_prompts(3, lengths=(4, 8), seed=2))
    inputs["token_type_ids"] = torch.arange(inputs["input_ids"].shape[1]).remainder(2).expand(3, -1).clone()
    inputs["token_type_ids"][1] = 5
    expected = model.generate(**inputs, **GREEDY)
    assert not expected.equal(model.generate(**{**inputs, "token_type_ids": None}, **GREEDY))
    assert make(name, model).generate(model, **inputs, **GREEDY).sequences.equal(expected)


@lossless
def test_positions_of_the_user(name, llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=4)[0]
    positions = torch.tensor([[0, 1, 2, 7, 8, 30]])
    expected = llama.generate(prompt, position_ids=positions, **GREEDY)
    assert not expected.equal(llama.generate(prompt, **GREEDY))
    assert make(name, llama).generate(llama, prompt, position_ids=positions, **GREEDY).sequences.equal(expected)


def test_tensors_that_a_tree_does_not_know(llama):
    call = {"input_ids": torch.tensor([[5, 6, 7]]), **GREEDY, "inputs_embeds": torch.zeros(1, 3, 32)}
    with pytest.raises(ValueError, match="decodelab decoders read token ids, not inputs_embeds: pass input_ids"):
        Autoregressive().generate(llama, **call)
    with pytest.raises(ValueError, match="pixel_values cannot be given to a tree of tokens: leave it out, or use a token-by-token decoder"):
        Session(llama, pixel_values=torch.zeros(1, 3))


def test_without_a_cache(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=4)[0]
    out = Autoregressive().generate(llama, prompt, **GREEDY, use_cache=False)
    assert out.sequences.equal(llama.generate(prompt, **GREEDY))
    assert out.stats.target_tokens == sum(range(6, 22))  # the whole text, again and again
    with pytest.raises(ValueError, match="verified with the KV cache: leave out use_cache=False"):
        PromptLookup().generate(llama, prompt, **GREEDY, use_cache=False)


@trees
def test_caches_that_cannot_be_rolled_back(name, llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=4)[0]
    offloaded = DynamicCache()
    offloaded.offloading = True  # as `cache_implementation="offloaded"` makes it, which needs an accelerator
    with pytest.raises(ValueError, match="an offloaded cache cannot be rolled back: leave out cache_implementation"):
        make(name, llama).generate(llama, prompt, **GREEDY, past_key_values=offloaded)
    with pytest.raises(ValueError, match="a cache with StaticLayer cannot be rolled back: leave out cache_implementation"):
        make(name, llama).generate(llama, prompt, **GREEDY, cache_implementation="static")


def test_a_static_cache_is_used_as_it_is(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=4)[0]
    out = Autoregressive().generate(llama, prompt, **GREEDY, cache_implementation="static")
    assert out.sequences.equal(llama.generate(prompt, **GREEDY))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prompt_beyond_the_drafters_context(kind):
    model, drafter = small_model(kind), small_model(kind, context=32, hidden=16)
    prompt = torch.randint(2, VOCAB, (1, 48), generator=torch.Generator().manual_seed(0))
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match="the prompt of 48 tokens exceeds the drafter's context of 32"):
        DraftModel(drafter).generate(model, prompt, **GREEDY)
    with pytest.raises(ValueError, match="exceed the drafter's context of 32: .* max_new_tokens <= 12"):
        DraftModel(drafter).generate(model, prompt[:, :20], **GREEDY)
    assert not forwards


def test_a_drafter_that_is_no_model(llama):
    with pytest.raises(ValueError, match="drafter must be a causal language model, such as load"):
        DraftModel("gpt2").generate(llama, torch.tensor([[5, 6]]), **GREEDY)


# what is learnt across calls


@pytest.mark.parametrize("cls", [NGram, TokenRecycling, ADED])
def test_two_vocabularies(cls, llama):
    small, decoder = small_model("llama", vocab=40, seed=3), cls()
    for model in (llama, small, llama, small):
        prompt = torch.randint(2, 40, (1, 6), generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            assert decoder.generate(model, prompt, **GREEDY).sequences.equal(model.generate(prompt, **GREEDY))


def test_what_an_ngram_table_remembers_is_bounded(llama):
    decoder = NGram(n=3, capacity=20)
    for prompt in random_prompts(5, lengths=(8, 12), seed=3):
        assert decoder.generate(llama, prompt, **GREEDY).sequences.equal(llama.generate(prompt, **GREEDY))
    (table,) = decoder.learnt.values()
    assert len(table) == 20


@pytest.mark.parametrize("cls", [NGram, TokenRecycling, ADED])
def test_cold_tables_give_the_same_samples_again(cls, llama, padded):
    def sample(decoder):
        torch.manual_seed(4)
        return decoder.generate(llama, **padded, max_new_tokens=16, do_sample=True, top_k=0).sequences.tolist()

    cold = cls(start_from="cold")
    first = sample(cold)
    assert sample(cold) == first
    hot = cls()
    assert sample(hot) == first
    sample(hot)
    hot.reset()
    assert sample(hot) == first


# threads and modes


@causal
def test_two_threads_two_models_two_vocabularies(name):
    models = [small_model("llama"), small_model("qwen3", vocab=60, seed=2)]
    models[0].train()  # evaluation mode must last until the last thread has left
    for module in models[0].modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    decoder = make(name, models[0])
    if any(hasattr(decoder, part) for part in ("drafter", "space", "placeholder", "automaton")):  # made for one model
        jobs = [(models[0], seed) for seed in range(4)]
    else:
        jobs = [(models[i % 2], i) for i in range(4)]
    prompts = [torch.randint(2, 60, (1, 6), generator=torch.Generator().manual_seed(seed)) for _, seed in jobs]
    alone = [make(name, model).generate(model, p, **GREEDY).sequences for (model, _), p in zip(jobs, prompts)]
    found: list = [None] * len(jobs)

    def work(i):
        try:
            found[i] = decoder.generate(jobs[i][0], prompts[i], **GREEDY).sequences
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f.tolist() if isinstance(f, torch.Tensor) else repr(f) for f in found] == [a.tolist() for a in alone]
    assert models[0].training


@pytest.mark.parametrize("name", list(METHODS))
def test_inference_mode_in_any_order(name):
    model, decoder = small_model("llama"), None
    prompt = torch.tensor([[5, 6, 7, 5, 6]])
    expected = make(name, model).generate(model, prompt, **GREEDY).sequences
    for order in ((True, False, True), (False, True, False)):
        decoder = make(name, model)
        for inference in order:
            with torch.inference_mode(inference):
                assert decoder.generate(model, prompt.clone(), **GREEDY).sequences.equal(expected)


@causal
def test_nothing_of_a_call_stays_on_the_decoder(name, llama, padded):
    decoder = make(name, llama)
    decoder.generate(llama, **padded, **GREEDY)
    before = {k: id(v) for k, v in vars(decoder).items()}
    decoder.generate(llama, **padded, **GREEDY)
    learnt = {"table", "_tables", "hits", "learnt", "_vocabulary"}  # what a method learns across calls
    assert {k for k, v in vars(decoder).items() if before.get(k) != id(v)} <= learnt
    kept = set(vars(decoder)) - {f.name for f in fields(decoder)}
    assert not any("call" in k or "session" in k for k in kept)


# streaming


@pytest.mark.parametrize("name", list(METHODS))
def test_a_bound_streamer_streams(name, llama, tokenizer):
    prompt = random_prompts(1, lengths=(7, 7), seed=3)[0]
    decoder = make(name, llama)
    expected = decoder.generate(llama, prompt, **GREEDY)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    bound = make(name, llama).bind(streamer=streamer, tokenizer=tokenizer)
    thread = threading.Thread(target=llama.generate, args=(prompt,), kwargs={"custom_generate": bound, **GREEDY})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected.continuations[0])


@writes_on
def test_bound_stop_strings(name, llama, tokenizer):
    prompt = random_prompts(1, lengths=(7, 7), seed=3)[0]
    whole = steady(name, llama).generate(llama, prompt, **GREEDY).continuations[0]
    word = tokenizer.decode(whole[3:5])
    bound = steady(name, llama).bind(stop_strings=word, tokenizer=tokenizer)
    text = tokenizer.decode(llama.generate(prompt, custom_generate=bound, **GREEDY).continuations[0])
    assert text == tokenizer.decode(whole)[: tokenizer.decode(whole).index(word) + len(word)]
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        steady(name, llama).bind(stop_strings=word)


def test_a_streamer_that_transformers_drops_is_told(llama, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    with pytest.warns(UserWarning, match=r"use decoder\.generate\(model, streamer=\.\.\.\) or custom_generate=decoder\.bind"):
        llama.generate(torch.tensor([[5, 6]]), streamer=streamer, custom_generate=PromptLookup(), **GREEDY)
    assert "".join(streamer) == ""  # it ends: nobody waits for ever
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(torch.tensor([[5, 6]]), custom_generate=PromptLookup(), **GREEDY)


# types


@pytest.mark.parametrize("name", list(METHODS))
def test_fields_of_the_wrong_type(name, llama):
    cls = METHODS[name].decoder
    needed = {"drafter": llama} if "drafter" in field_types(cls) else {}
    wrong = {int: 2.5, float: "x", bool: "false"}
    for field, kind in field_types(cls).items():
        for plain, value in wrong.items():
            if kind in (plain, plain | None):
                with pytest.raises(TypeError, match=rf"{cls.__name__}: {field} must be "):
                    cls(**{**needed, field: value})


def test_a_class_in_place_of_a_decoder(llama):
    with pytest.raises(TypeError, match=r"pass a decoder, custom_generate=TokenRecycling\(\)"):
        llama.generate(torch.tensor([[5, 6]]), custom_generate=TokenRecycling, **GREEDY)


def test_decoders_can_be_copied(llama):
    for name in CAUSAL:
        decoder = copy.deepcopy(make(name, llama))
        prompt = torch.tensor([[5, 6, 7]])
        assert decoder.generate(llama, prompt, **GREEDY).sequences.equal(make(name, llama).generate(llama, prompt, **GREEDY).sequences)
