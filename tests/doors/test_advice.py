"""What `advise` says: who is tried, what is promised, and when it says that plain decoding is best."""

import json

import numpy as np
import pytest
from toys import character_tokenizer, small_model

from decodelab import advice as advice_module
from decodelab import advise
from decodelab.advice import Advice, Option, _code, _held
from decodelab.core.registry import decoders, fitted
from decodelab.core.verify_curve import verify_curve

TEXTS = ["once upon a time", "the old bridge", "a fox said"]


@pytest.fixture(scope="module")
def model():
    found = small_model(vocab=97, context=256)
    verify_curve(found, budget=0.05)
    return found


def test_who_is_tried(llama):
    assert set(fitted()) == {"aded", "ngram", "prompt_lookup", "token_recycling"}
    with_draft = fitted(llama)
    assert set(with_draft) == {*fitted(), "draft_model", "rsd_c", "rsd_s"}
    for name, (method, fields) in with_draft.items():
        assert method.lossless
        assert method.decoder(**fields).auto, name
        assert not method.example(llama).auto, f"the paper's sizes are the defaults of {name}"


def test_every_decoder_with_sizes_that_fit_says_so(llama):
    for name, method in decoders().items():
        if method.auto:
            fields = {k: v for k, v in vars(method.example(llama)).items() if k == "drafter"}
            assert method.decoder(**fields, **method.auto).auto, name


def test_advice_is_a_table_and_three_lines(model):
    told = []
    advice = advise(model, character_tokenizer(), TEXTS, max_new_tokens=12, tell=told.append)
    names = {o.name for o in advice.options}
    assert names == {"greedy (transformers)", "prompt lookup (transformers)", *fitted()}
    assert advice.prompts == 3
    base = next(o for o in advice.options if o.name == "greedy (transformers)")
    assert (base.measured, base.expected) == (1.0, None)
    for option in advice.options:
        assert option.low <= option.measured <= option.high
        if option.expected is not None:
            assert option.expected > 0.3 and option.tokens_per_forward >= 1 and option.memory > 0
    assert "T(n)/T(1)" in str(advice) and advice.code in str(advice)
    assert json.loads(json.dumps(advice.as_dict()))["batch"] == 1
    assert told[0] == "measuring the verify curve ..."


def test_a_batch_and_few_prompts(model):
    advice = advise(model, character_tokenizer(), [*TEXTS, "a mill", "a fifth, left over"], batch=2, max_new_tokens=8)
    assert (advice.batch, advice.prompts) == (2, 4)
    assert "prompt lookup (transformers)" not in {o.name for o in advice.options}


def line(name, low):
    return Option(name, low + 0.1, low, low + 0.2, 1.2, 1.3, 10, "nothing")


def test_only_what_is_shown_to_be_faster_is_advised():
    plain = Option("greedy (transformers)", 1.0, 1.0, 1.0, None, None, None, "")
    slow = Advice("m", 1, 6, 64, "", [line("ngram", 0.95), plain])
    assert slow.best is None
    assert "No decoder is shown to be faster" in _code(slow, fitted())
    fast = Advice("m", 1, 6, 64, "", [line("ngram", 1.05), plain])
    assert fast.best.name == "ngram"
    code = _code(fast, fitted())
    assert code.splitlines()[:2] == [
        "from decodelab import NGram",
        "decoder = NGram(gamma='auto')  # keep it: it learns from call to call",
    ]
    exec(code.rpartition("\n")[0], {})  # the lines run


def test_memory_counts_what_a_decoder_holds():
    import torch

    from decodelab import TokenRecycling

    decoder = TokenRecycling(template="auto")
    before = _held(decoder, set())
    decoder.table = torch.zeros(1000, 8, dtype=torch.long)
    assert 64_000 <= _held(decoder, set()) - before < 70_000
    assert _held(torch.nn.Linear(100, 100), set()) == 0
    assert np.isfinite(before)


@pytest.mark.parametrize(("prompts", "batch"), [([], 1), (["one"], 1), (["one", "one"], 1), ("a text", 1), (TEXTS, 2), (TEXTS, 0)])
def test_too_few_prompts_are_refused(prompts, batch, model):
    with pytest.raises(ValueError, match="needs two batches of different prompts: give a list of at least [24] texts"):
        advise(model, character_tokenizer(), prompts, batch=batch, max_new_tokens=4)


def test_nothing_is_timed_that_a_decoder_has_met(model, monkeypatch):
    seen = []
    take = advice_module._take

    def noted(call, group, n):
        seen.append(group["input_ids"].tolist())
        return take(call, group, n)

    monkeypatch.setattr(advice_module, "_take", noted)
    advise(model, character_tokenizer(), TEXTS, max_new_tokens=4)
    each = 2 + len(fitted())
    rounds = [seen[i] for i in range(0, len(seen), each)]
    assert len(rounds) == 4
    assert len({str(ids) for ids in rounds}) == 4


def test_an_interrupt_keeps_what_was_measured(model, monkeypatch):
    take, calls = advice_module._take, []

    def interrupted(call, group, n):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return take(call, group, n)

    monkeypatch.setattr(advice_module, "_take", interrupted)
    each = 2 + len(fitted())
    stop = 3 * each + 2
    assert advise(model, character_tokenizer(), TEXTS, max_new_tokens=4).prompts == 2
    calls.clear()
    stop = each + 1
    with pytest.raises(KeyboardInterrupt):
        advise(model, character_tokenizer(), TEXTS, max_new_tokens=4)


def test_a_faster_lookup_of_transformers_is_told():
    theirs = Option("prompt lookup (transformers)", 2.0, 1.5, 2.5, None, None, None, "")
    advice = Advice("m", 1, 6, 64, "", [theirs, line("ngram", 1.05)])
    assert "transformers' own prompt lookup was faster" in _code(advice, fitted())


def test_a_prompt_that_is_empty_is_named(model):
    with pytest.raises(ValueError, match="prompt 2 of 2 is empty"):
        advise(model, character_tokenizer(), ["once", ""], max_new_tokens=4)
