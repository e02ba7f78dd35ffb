"""What every registered decoder promises, whatever its method."""

import copy
import gc
import threading
from dataclasses import dataclass

import pytest
import torch
from toys import EOS, METHODS, PAD, VOCAB, StopsAt, SumBias, left_pad, random_prompts, small_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

import decodelab.core.registry as registry_module
from decodelab.core.contract import Decoder, Method, register
from decodelab.core.output import DecodeOutput
from decodelab.sampling.base import TokenDecoder

SAMPLERS = [name for name, m in METHODS.items() if m.samples]
every_method = pytest.mark.parametrize("name", list(METHODS))
DIFFUSION = {name for name, m in METHODS.items() if m.family == "diffusion"}  # what they write depends on how many positions they are given
SPANS = {"exact_extract"}  # what they write is a span of the prompt and a stop token, however many tokens are asked for: tests/structured
writes_on = pytest.mark.parametrize("name", [name for name in METHODS if name not in SPANS])
left_to_right = pytest.mark.parametrize("name", [name for name in METHODS if name not in DIFFUSION | SPANS])
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def make(name, model, **fields):
    decoder = METHODS[name].example(model)
    for field, value in fields.items():
        setattr(decoder, field, value)
    return decoder


def decode(name, model, ids, new=12, whole=False, **kwargs):
    "`whole`: with fields for which the text depends neither on what would end it nor on how many tokens may follow."
    settings = {"max_new_tokens": new, "do_sample": False} | kwargs
    decoder = make(name, model, **(METHODS[name].neutral if whole or "eos_token_id" in kwargs else {}))
    if isinstance(ids, dict):
        return decoder.generate(model, **ids, **settings)
    return decoder.generate(model, ids, **settings)


def continuations(out):
    return [c.tolist() for c in out.continuations]


class Only(LogitsProcessor):
    "Leaves only some tokens."

    def __init__(self, allowed):
        self.allowed = torch.tensor(allowed)

    def __call__(self, input_ids, scores):
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.allowed] = scores[:, self.allowed]
        return kept


class Breaks(LogitsProcessor):
    "Raises once the text is long enough."

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise RuntimeError("the processor broke")
        return scores


class Spoils(LogitsProcessor):
    "Replaces the scores by a constant once the text is long enough."

    def __init__(self, value, length):
        self.value, self.length = value, length

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, self.value) if input_ids.shape[1] >= self.length else scores


@pytest.fixture(scope="module")
def prompt():
    return random_prompts(1, lengths=(7, 7), seed=3)[0]


@pytest.fixture(scope="module")
def padded():
    return left_pad(random_prompts(4, lengths=(1, 9), seed=5))


# what comes back


@writes_on
def test_output_and_stats(name, llama, prompt):
    out = make(name, llama, trace=True).generate(llama, prompt, max_new_tokens=12, do_sample=False)
    assert isinstance(out, DecodeOutput)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out["sequences"] is out.sequences
    assert out.sequences.shape == (1, 7 + 12)
    assert out.sequences.dtype == torch.long
    assert out.sequences[:, :7].equal(prompt)
    assert out.prompt_length == 7
    stats = out.stats
    assert stats.new_tokens == sum(map(sum, stats.emitted)) == 12
    assert all(n >= (name not in DIFFUSION) for row in stats.emitted for n in row)  # a forward pass may fill nothing
    assert stats.target_forwards >= len(stats.emitted[0])
    assert stats.target_tokens >= 7 + 11
    every = stats.target_forwards if stats.search else len(stats.emitted[0])  # a search tries more than it emits
    assert stats.tokens_per_forward == pytest.approx(12 / every)
    assert stats.accepted_lengths == [[n - 1 for n in stats.emitted[0]]]
    assert 0 < stats.forward_seconds <= stats.seconds
    told = [t for step in out.trace.row(0) for t in step.tokens]
    assert told == out.continuations[0].tolist()
    assert all(len(step.roles) == len(step.tokens) for step in out.trace)
    assert all(len(step.notes) in (0, len(step.tokens)) for step in out.trace)


@writes_on
def test_trace_and_stats_of_a_batch(name, llama, padded):
    out = make(name, llama, trace=True).generate(llama, **padded, max_new_tokens=9, do_sample=False)
    length = padded["input_ids"].shape[1]
    assert out.sequences[:, :length].equal(padded["input_ids"])
    for row, new in enumerate(continuations(out)):
        assert [t for step in out.trace.row(row) for t in step.tokens] == new
        assert sum(out.stats.emitted[row]) == len(new) == 9
    assert make(name, llama).generate(llama, **padded, max_new_tokens=9, do_sample=False).trace is None


@every_method
def test_custom_generate_is_the_same(name, llama, prompt):
    there = llama.generate(prompt, custom_generate=make(name, llama), max_new_tokens=12, do_sample=False)
    here = decode(name, llama, prompt)
    assert isinstance(there, DecodeOutput)
    assert there.sequences.equal(here.sequences)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    called = make(name, llama)(llama, prompt, generation_config=config)
    assert called.sequences.equal(here.sequences)


# limits


@writes_on
@pytest.mark.parametrize("new", [1, 2, 3, 8])
def test_max_length_is_prompt_and_new_tokens(name, new, llama, prompt):
    short = decode(name, llama, prompt, new).sequences
    assert short.shape == (1, 7 + new)
    assert make(name, llama).generate(llama, prompt, max_length=7 + new, do_sample=False).sequences.equal(short)


@left_to_right
@pytest.mark.parametrize("new", [1, 2, 3, 8])
def test_max_new_tokens_and_max_length(name, new, llama, prompt):
    whole = decode(name, llama, prompt, whole=True).sequences
    assert decode(name, llama, prompt, new, whole=True).sequences.equal(whole[:, : 7 + new])
    assert (
        make(name, llama, **METHODS[name].neutral)
        .generate(llama, prompt, max_length=7 + new, do_sample=False)
        .sequences.equal(whole[:, : 7 + new])
    )


@writes_on
@pytest.mark.parametrize("several", [False, True])
def test_end_of_sequence(name, several, llama, prompt):
    whole = decode(name, llama, prompt, 20, whole=True).continuations[0].tolist()
    for position in (0, 3, 7, 19):
        ends = [whole[position], whole[min(position + 2, 19)]] if several else whole[position]
        first = min(whole.index(e) for e in (ends if several else [ends]))
        new = continuations(decode(name, llama, prompt, 20, eos_token_id=ends))[0]
        assert new == whole[: first + 1]


@writes_on
def test_rows_finish_independently_and_pad(name, llama, padded):
    free = continuations(decode(name, llama, padded, 16, whole=True))
    end = free[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(e) for e in expected}) > 1
    out = decode(name, llama, padded, 16, eos_token_id=end, pad_token_id=5)
    assert continuations(out) == expected
    length = padded["input_ids"].shape[1]
    assert out.sequences.shape[1] == length + max(map(len, expected))
    for row, new in zip(out.sequences.tolist(), expected):
        assert set(row[length + len(new) :]) <= {5}


@writes_on
def test_batch_ends_with_its_longest_row(name, llama, padded):
    free = continuations(decode(name, llama, padded, 16, whole=True))
    ends = sorted({row[2] for row in free})
    out = decode(name, llama, padded, 16, eos_token_id=ends)
    assert out.sequences.shape[1] <= padded["input_ids"].shape[1] + 3
    assert all(new[-1] in ends for new in continuations(out))


@writes_on
def test_stopping_criteria(name, llama, prompt, padded):
    whole = decode(name, llama, prompt, 20, whole=True).continuations[0].tolist()
    for n in (1, 2, 5, 9):
        stop = StoppingCriteriaList([StopsAt(length=7 + n)])
        assert continuations(decode(name, llama, prompt, 20, whole=True, stopping_criteria=stop)) == [whole[:n]]
        stop = StoppingCriteriaList([StopsAt(token=whole[n])])
        assert continuations(decode(name, llama, prompt, 20, whole=True, stopping_criteria=stop)) == [whole[: whole.index(whole[n]) + 1]]
    free = continuations(decode(name, llama, padded, 16, whole=True))
    token = free[1][3]
    stopped = continuations(decode(name, llama, padded, 16, whole=True, stopping_criteria=StoppingCriteriaList([StopsAt(token=token)])))
    assert stopped == [row[: row.index(token) + 1] if token in row else row for row in free]


# processors and sampling


@writes_on
def test_processors_are_honoured(name, llama, prompt, padded):
    allowed = [20, 21, 22]
    only = LogitsProcessorList([Only(allowed)])
    for ids in (prompt, padded):
        out = decode(name, llama, ids, 12, logits_processor=only)
        assert {t for row in continuations(out) for t in row} <= set(allowed)
    assert continuations(decode(name, llama, prompt, 6, logits_processor=LogitsProcessorList([Only([33])]))) == [[33] * 6]
    free = decode(name, llama, prompt).sequences
    assert not decode(name, llama, prompt, logits_processor=LogitsProcessorList([SumBias(50.0)])).sequences.equal(free)
    banned = free[0, 7:].unique().tolist()
    out = decode(name, llama, prompt, suppress_tokens=banned)
    assert not set(continuations(out)[0]) & set(banned)


@every_method
def test_do_sample(name, llama, prompt):
    settings = {"max_new_tokens": 12, "do_sample": True}
    if not METHODS[name].samples:
        with pytest.raises(ValueError, match="do_sample=False"):
            make(name, llama).generate(llama, prompt, **settings)
        return
    greedy = decode(name, llama, prompt).sequences
    raw = {"score_from": "raw"} if name in DIFFUSION else {}  # or the order of the positions depends on the warpers
    for warper in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4, "top_k": 0}):
        assert make(name, llama, **raw).generate(llama, prompt, **settings, **warper).sequences.equal(greedy)
    penalised = decode(name, llama, prompt, repetition_penalty=1.7).sequences
    assert not penalised.equal(greedy)
    assert make(name, llama, **raw).generate(llama, prompt, **settings, top_k=1, repetition_penalty=1.7).sequences.equal(penalised)
    only = LogitsProcessorList([Only([20, 21, 22])])
    out = make(name, llama).generate(llama, prompt, **settings, logits_processor=only)
    assert set(continuations(out)[0]) <= {20, 21, 22}


@every_sampler
def test_reproducible(name, llama, padded):
    def run(seed):
        torch.manual_seed(seed)
        return make(name, llama).generate(llama, **padded, max_new_tokens=12, do_sample=True, top_k=0).sequences

    assert run(1).equal(run(1))
    assert not run(1).equal(run(2))


@every_sampler
def test_several_samples_of_a_prompt(name, llama, prompt):
    torch.manual_seed(0)
    out = make(name, llama).generate(llama, prompt, max_new_tokens=8, do_sample=True, top_k=0, num_return_sequences=4)
    assert out.sequences.shape[0] == 4
    assert len({tuple(row) for row in continuations(out)}) > 1


# streaming and stop strings


class Collects(TextStreamer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.text, self.ended = "", 0

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        self.ended += stream_end


@writes_on
def test_streamed_text_is_the_decoded_text(name, llama, tokenizer, prompt):
    for skip, start in ((True, 7), (False, 0)):
        streamer = Collects(tokenizer, skip_prompt=skip)
        out = decode(name, llama, prompt, whole=True, streamer=streamer)
        assert streamer.text == tokenizer.decode(out.sequences[0, start:])
        assert streamer.ended == 1
    end = out.continuations[0][5].item()
    streamer = Collects(tokenizer, skip_prompt=True)
    out = decode(name, llama, prompt, streamer=streamer, eos_token_id=end)
    assert streamer.text == tokenizer.decode(out.continuations[0])


@every_method
def test_streaming_from_a_thread(name, llama, tokenizer, prompt):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    expected = tokenizer.decode(decode(name, llama, prompt).continuations[0])
    thread = threading.Thread(target=decode, args=(name, llama, prompt), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


@every_method
def test_streamer_ends_after_an_exception(name, llama, tokenizer, prompt):
    streamer = Collects(tokenizer, skip_prompt=True)
    with pytest.raises(RuntimeError, match="the processor broke"):
        decode(name, llama, prompt, streamer=streamer, logits_processor=LogitsProcessorList([Breaks(10)]))
    assert streamer.ended == 1


@writes_on
def test_stop_strings(name, llama, tokenizer, prompt):
    whole = decode(name, llama, prompt, 20, whole=True).continuations[0].tolist()
    characters = [tokenizer.decode([t]) for t in whole]
    before = tokenizer.decode(prompt[0])
    for at, size in ((2, 1), (5, 2), (9, 3)):
        stop = "".join(characters[at : at + size])
        expected = next(n for n in range(1, 21) if (before + "".join(characters[:n])).endswith(stop))
        out = decode(name, llama, prompt, 20, whole=True, stop_strings=[stop], tokenizer=tokenizer)
        assert continuations(out) == [whole[:expected]]
    with pytest.raises(ValueError, match="pass tokenizer="):
        decode(name, llama, prompt, stop_strings="a")


# invariance


@writes_on
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}], ids=["plain", "penalty"])
def test_a_batch_is_its_rows(name, kind, settings, request, padded):
    model = request.getfixturevalue(kind)
    free = continuations(decode(name, model, padded, 14, **settings))
    end = free[0][5]
    together = continuations(decode(name, model, padded, 14, eos_token_id=end, **settings))
    alone = []
    for ids, mask in zip(padded["input_ids"], padded["attention_mask"]):
        alone += continuations(decode(name, model, ids[mask.bool()][None], 14, eos_token_id=end, **settings))
    assert together == alone


@every_method
def test_row_order_is_irrelevant(name, llama, padded):
    order = torch.tensor([2, 0, 3, 1])
    straight = continuations(decode(name, llama, padded, 14))
    mixed = continuations(decode(name, llama, {k: v[order] for k, v in padded.items()}, 14))
    assert mixed == [straight[i] for i in order.tolist()]


@every_method
def test_more_padding_changes_nothing(name, llama, prompt):
    wide = {"input_ids": torch.nn.functional.pad(prompt, (5, 0), value=PAD)}
    wide["attention_mask"] = torch.nn.functional.pad(torch.ones_like(prompt), (5, 0))
    assert continuations(decode(name, llama, wide)) == continuations(decode(name, llama, prompt))


def refuses_cache(name, call):
    "True when the method says that it cannot use a passed cache; the only alternative to using it rightly."
    try:
        return call(), False
    except ValueError as error:
        if METHODS[name].lossless:
            raise
        assert "past_key_values" in str(error), error  # noqa: PT017
        return None, True


@every_method
def test_a_prompt_split_over_a_passed_cache(name, llama, prompt):
    for split in (1, 3, 5):
        check_split(name, llama, prompt, split)


@every_method
def test_a_prompt_whose_last_token_alone_is_not_cached(name, llama, prompt):
    check_split(name, llama, prompt, prompt.shape[1] - 1)


def check_split(name, llama, prompt, split):
    expected = decode(name, llama, prompt, 10).sequences
    cache = DynamicCache()
    with torch.no_grad():
        llama(prompt[:, :split], past_key_values=cache, use_cache=True)
    out, refused = refuses_cache(name, lambda: decode(name, llama, prompt, 10, past_key_values=cache))
    assert refused or out.sequences.equal(expected)


@every_method
def test_a_padded_batch_split_over_a_passed_cache(name, llama, padded):
    expected = continuations(decode(name, llama, padded, 10))
    ids, mask = padded["input_ids"], padded["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache()
    with torch.no_grad():
        llama(ids[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], past_key_values=cache, use_cache=True)
    out, refused = refuses_cache(name, lambda: decode(name, llama, padded, 10, past_key_values=cache))
    assert refused or continuations(out) == expected


@every_method
def test_one_token_prompts(name, llama):
    ids = torch.tensor([[7], [8]])
    together = continuations(decode(name, llama, ids))
    assert together == continuations(decode(name, llama, ids[:1])) + continuations(decode(name, llama, ids[1:]))


@writes_on
def test_up_to_the_end_of_the_context(name, prompt):
    for kind in ("gpt2", "llama"):
        model = small_model(kind, context=24)
        free = small_model(kind, context=24)
        out = decode(name, model, prompt, 17, whole=True)
        assert out.sequences.shape[1] == 24
        fewer = 17 if name in DIFFUSION else 13
        assert out.sequences[:, : 7 + fewer].equal(decode(name, free, prompt, fewer, whole=True).sequences)


@writes_on
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype, llama, padded):
    model = copy.deepcopy(llama).to(dtype)
    out = decode(name, model, padded, 10)
    assert all(len(new) == 10 for new in continuations(out))
    if dtype is torch.float64:
        assert continuations(out) == continuations(decode(name, llama, padded, 10))


# nothing left behind


def everything(model):
    "All that a call could change in a model."
    hooks = {
        f"{n}.{kind}": list(getattr(m, kind))
        for n, m in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    }
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "generation_config": copy.deepcopy(model.generation_config.to_dict()),
        "attention": model.config._attn_implementation,
        "hooks": hooks,
        "training": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "weights": {n: (p.double().sum().item(), p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture
def caches():
    "How many caches are alive that were not when the test began."
    gc.freeze()  # what is there already is looked at no more: a look at all of it takes most of a second

    def count():
        gc.collect()
        return sum(issubclass(type(o), Cache) for o in gc.get_objects())

    yield count
    gc.unfreeze()


@every_method
@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
@pytest.mark.parametrize("breaks", [False, True], ids=["returns", "raises"])
def test_nothing_is_left_behind(name, mode, breaks, padded, caches):
    model = small_model("gpt2")  # it has dropout
    model.train(mode == "train")
    if mode == "mixed":
        model.train()
        model.transformer.h[1].eval()
    decoder = make(name, model)
    model(padded["input_ids"][:, -1:], output_hidden_states=True)  # transformers installs its capturing hooks once a model, for good
    before, state = everything(model), torch.get_rng_state()
    decoder.generate(model, **padded, max_new_tokens=2, do_sample=False)
    assert everything(model) == before
    alive = caches()
    processors = LogitsProcessorList([Breaks(padded["input_ids"].shape[1] + 3)]) if breaks else None
    try:
        decoder.generate(model, **padded, max_new_tokens=8, do_sample=False, logits_processor=processors)
    except RuntimeError:
        assert breaks
    else:
        assert not breaks
    assert everything(model) == before
    assert torch.get_rng_state().equal(state)  # greedy decoding draws no random number
    assert caches() == alive


@every_method
def test_dropout_is_off(name, prompt):
    model = small_model("gpt2")
    expected = decode(name, model, prompt).sequences
    model.train()
    assert decode(name, model, prompt).sequences.equal(expected)


@every_method
def test_dropout_is_off_in_a_model_that_trains_in_part(name, prompt):
    model = small_model("gpt2")
    expected = decode(name, model, prompt).sequences
    model.transformer.train()  # the model itself stays in evaluation mode
    got = decode(name, model, prompt).sequences
    assert model.transformer.training
    assert not model.training
    assert got.equal(expected)


@every_method
def test_the_output_holds_no_cache_and_no_graph(name, llama, prompt):
    out = decode(name, llama, prompt)
    assert out.past_key_values is None
    assert not out.sequences.requires_grad
    assert out.sequences.untyped_storage().nbytes() == out.sequences.numel() * 8


@every_method
def test_inputs_are_not_changed(name, llama, padded):
    before = {k: v.clone() for k, v in padded.items()}
    decode(name, llama, padded)
    assert all(padded[k].equal(v) for k, v in before.items())


@every_method
def test_a_decoder_can_be_used_again_and_copied(name, llama, gpt2, prompt, padded):
    decoder = make(name, llama)
    expected = decode(name, llama, prompt).sequences
    assert decoder.generate(llama, prompt, max_new_tokens=12, do_sample=False).sequences.equal(expected)
    decoder.generate(llama, **padded, max_new_tokens=5, do_sample=False)
    assert copy.deepcopy(decoder).generate(llama, prompt, max_new_tokens=12, do_sample=False).sequences.equal(expected)
    with pytest.raises(RuntimeError):
        decoder.generate(llama, prompt, max_new_tokens=12, do_sample=False, logits_processor=LogitsProcessorList([Breaks(9)]))
    assert decoder.generate(llama, prompt, max_new_tokens=12, do_sample=False).sequences.equal(expected)


# bad input: the type and the message of every refusal


@every_method
def test_bad_prompts(name, llama, prompt):
    with pytest.raises(ValueError, match="empty prompt"):
        decode(name, llama, torch.zeros(1, 0, dtype=torch.long))
    masked = {"input_ids": torch.cat([prompt, prompt]), "attention_mask": torch.stack([torch.ones(7), torch.zeros(7)]).long()}
    with pytest.raises(ValueError, match="empty prompt"):
        decode(name, llama, masked)
    right = {"input_ids": prompt, "attention_mask": torch.tensor([[1] * 5 + [0] * 2])}
    with pytest.raises(ValueError, match="padded on the right: use padding_side='left'"):
        decode(name, llama, right)
    beyond = prompt.clone()
    beyond[0, 2] = VOCAB + 3
    with pytest.raises(ValueError, match=f"token id {VOCAB + 3} is outside the model's vocabulary of {VOCAB}"):
        decode(name, llama, beyond)
    if METHODS[name].decoder.beyond_context:
        return
    with pytest.raises(ValueError, match="prompt of 7 and 250 new tokens exceed the model's context of 256.*max_new_tokens <= 249"):
        decode(name, llama, prompt, 250)
    with pytest.raises(ValueError, match="the prompt of 300 tokens exceeds the model's context of 256: shorten the prompt"):
        decode(name, llama, torch.full((1, 300), 5), 1)


@every_method
def test_negative_ids(name, llama, prompt):
    ids = prompt.clone()
    ids[0, 2] = -4
    with pytest.raises(ValueError, match="token id -4 is outside the model's vocabulary"):
        decode(name, llama, ids)


@every_method
def test_wrong_device(name, llama, prompt):
    config = GenerationConfig(max_new_tokens=3, max_length=10)
    with pytest.raises(ValueError, match=r"input_ids are on meta, the model on cpu: move them with input_ids.to\(model.device\)"):
        make(name, llama)(llama, prompt.to("meta"), LogitsProcessorList(), StoppingCriteriaList(), config)


@every_method
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "another decoder would have to do: reset num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "another decoder would have to do"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores are not returned"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits are not returned"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states are not returned"),
        ({"guidance_scale": 2.0}, "guidance_scale runs a second model"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_what_the_generation_config_may_not_ask(name, settings, message, llama, prompt):
    with pytest.raises(ValueError, match=message):
        decode(name, llama, prompt, **settings)


@every_method
def test_encoder_decoder(name, prompt, llama):
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    takes = METHODS[name].decoder.takes
    if "encoder-decoder" in takes:  # whether they decode it rightly is tested where they are
        with pytest.raises(ValueError, match="an encoder-decoder model has read its prompt before the call"):
            make(name, llama).generate(model, prompt, max_new_tokens=4, do_sample=False)
        return
    kind = "masked" if name in DIFFUSION else "decoder-only"
    assert takes == (kind,)
    with pytest.raises(ValueError, match=f"T5ForConditionalGeneration is an encoder-decoder model; this decoder needs a {kind} one"):
        make(name, llama).generate(model, prompt, max_new_tokens=4, do_sample=False)


@every_method
def test_weights_that_are_not_numbers(name, prompt, padded):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight[:] = float("nan")
    for ids in (prompt, padded):
        with pytest.raises(ValueError, match="the model returned NaN logits: check its weights and dtype"):
            decode(name, model, ids)
    if METHODS[name].samples:
        with pytest.raises(ValueError, match="the model returned NaN logits"):
            decode(name, model, prompt, do_sample=True)


@every_method
def test_one_logit_that_is_not_a_number(name, prompt):
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[41] = float("nan")
    with pytest.raises(ValueError, match="NaN logits"):
        decode(name, model, prompt)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_processors_that_leave_nothing(name, value, llama, prompt):
    processors = LogitsProcessorList([Spoils(value, 9)])
    with pytest.raises(ValueError, match="leave at least one token"):
        decode(name, llama, prompt, logits_processor=processors)


@every_method
def test_unknown_hyper_parameter(name):
    cls = METHODS[name].decoder
    with pytest.raises(TypeError, match=f"{cls.__name__} has no hyper-parameter 'no_such'; it has: .*trace"):
        cls(no_such=1)


@every_method
def test_streamer_with_a_batch(name, llama, tokenizer, padded):
    with pytest.raises(ValueError, match="a streamer follows one row only: call with batch size 1"):
        decode(name, llama, padded, streamer=Collects(tokenizer))


STEPS = [  # token by token: any cache will do, or none; a method of family memory keeps one of its own
    name for name, m in METHODS.items() if issubclass(m.decoder, TokenDecoder) and m.family != "memory"
]


@every_method
def test_caches_of_another_kind(name, llama, prompt):
    expected = decode(name, llama, prompt).sequences
    for settings, message in (
        ({"use_cache": False}, "KV cache: leave out use_cache=False"),
        ({"cache_implementation": "static"}, "(cannot be rolled back|in blocks of its own): leave out cache_implementation"),
    ):
        if name in STEPS or (name in DIFFUSION and "use_cache" in settings):
            assert decode(name, llama, prompt, **settings).sequences.equal(expected)
        else:
            with pytest.raises(ValueError, match=message):
                decode(name, llama, prompt, **settings)


@every_method
def test_a_cache_that_is_too_long(name, llama, prompt):
    cache = DynamicCache()
    with torch.no_grad():
        llama(prompt, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="pass the whole text as input_ids|past_key_values"):
        decode(name, llama, prompt, past_key_values=cache)


@every_method
def test_assistant_model(name, llama, prompt):
    with pytest.raises(ValueError, match="assistant_model"):
        decode(name, llama, prompt, assistant_model=llama)


# the registry


@every_method
def test_the_entry_is_whole(name):
    method = METHODS[name]
    assert isinstance(method, Method)
    assert method.name == name
    assert method.decoder.method is registry_module.decoders()[name]
    assert method.family in registry_module.FAMILIES
    assert method.url.startswith("https://")
    assert method.paper
    assert 1950 < method.year < 2100
    assert method.decoder.__doc__


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_METHODS", dict(registry_module._METHODS))
    return registry_module._METHODS


ENTRY = {"paper": "P", "url": "https://x", "year": 2024, "lossless": False}


def test_registering(registry):
    @register("test_only", family="sampling", **ENTRY)
    @dataclass
    class First(Decoder):
        "A decoder."

    assert registry["test_only"].decoder is First
    assert First.method.notebook == "sampling/test_only"
    assert isinstance(First.method.example(None), First)
    register("test_only", family="sampling", **ENTRY)(First)  # running its cell again

    with pytest.raises(ValueError, match="two decoders want the name 'test_only': .*First and .*Second"):

        @register("test_only", family="sampling", **ENTRY)
        @dataclass
        class Second(Decoder):
            "Another."

    with pytest.raises(ValueError, match="unknown family 'cooking'; known: sampling, search"):
        register("test_other", family="cooking", **ENTRY)


def test_a_decoder_needs_a_loop(llama, prompt):
    @dataclass
    class Empty(Decoder):
        "No loop."

    with pytest.raises(NotImplementedError, match=r"Empty must define decode\(call\)"):
        Empty().generate(llama, prompt, max_new_tokens=3)


def test_every_streamer_of_a_call_ends(llama, tokenizer, prompt):
    decoder, bound, lost = METHODS["token_recycling"].example(llama), Collects(tokenizer), Collects(tokenizer)
    call = {"max_new_tokens": 3, "do_sample": False}
    with pytest.warns(UserWarning, match="decoder.generate"):
        llama.generate(prompt, custom_generate=decoder.bind(streamer=bound), streamer=lost, **call)
    assert (bound.ended, lost.ended) == (1, 1)
    same = Collects(tokenizer)
    llama.generate(prompt, custom_generate=decoder.bind(streamer=same), streamer=same, **call)
    assert same.ended == 1
    unread = Collects(tokenizer)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        llama.generate(prompt, custom_generate=decoder.bind(streamer=unread, stop_strings=[1], tokenizer=tokenizer), **call)
    assert unread.ended == 1


def test_a_refused_call_ends_the_stream(llama, tokenizer, prompt):
    streamer = TextIteratorStreamer(tokenizer, timeout=5)
    with pytest.raises(ValueError, match="max_new_tokens <="):
        METHODS["autoregressive"].example(llama).generate(llama, prompt, streamer=streamer, max_new_tokens=100_000)
    assert list(streamer) == [""]  # a reader in another thread does not wait for ever
