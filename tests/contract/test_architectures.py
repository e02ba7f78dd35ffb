"""The sweep: every decoder-only architecture of the installed transformers is decoded exactly, or refused in a sentence.

For each tiny random model of `architectures.py` the greedy text of transformers' own `generate` is compared with the decoders' texts, for
prompts alone and for a left-padded batch of which one row ends early. `python tests/test_architectures.py` prints the whole table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from architectures import FIRST, NOT_BUILT, PAD, VOCAB, architectures, build, names, small_config
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from decodelab import NGram, PromptLookup, TokenRecycling
from decodelab.memory.act_qkv import ActQKV
from decodelab.sampling.base import Autoregressive, ContrastiveSearch
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.rsd import RSDC, RSDS
from decodelab.speculative.sampled_tree import IIDChains

NEW = 24
SINGLES, ROWS = (12, 9, 30), (30, 7, 3)  # lengths of the prompts alone, of the rows of the batch; windows are 24 long
TIE = 1e-4  # a gap of logits below which either token is right

# Decoder -> how to make it for a model; the drafter is another tiny model of the same architecture.
DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "Autoregressive": lambda model, draft: Autoregressive(),
    "PromptLookup": lambda model, draft: PromptLookup(),
    "TokenRecycling": lambda model, draft: TokenRecycling(),
    "NGram": lambda model, draft: NGram(),
    "DraftModel": lambda model, draft: DraftModel(drafter=draft()),
    "ContrastiveSearch": lambda model, draft: ContrastiveSearch(),
    "ActQKV": lambda model, draft: ActQKV(n_init=2, n_loc=8, b=4, k=2, r=2, w=4),
}
NOT_COMPARED = frozenset({"ContrastiveSearch", "ActQKV"})  # its text is its own: it must run or be refused

# exact: the text of transformers' generate. tie: but for tokens that the model finds equally good. padded: a batch comes out as transformers
# decodes that batch, which is not what it makes of the rows alone. refused: in one sentence, before the first token. runs: was not compared.
GOOD = frozenset({"exact", "tie", "padded", "refused", "runs"})


@dataclass
class Outcome:
    "What came of one decoder in one situation."

    kind: str  # one of GOOD, or: wrong, crash, late (refused after tokens were made)
    detail: str = ""  # message of a refusal or a crash, place of a difference
    where: str = ""  # file and line of a crash


@dataclass
class Reference:
    "What transformers' own generate makes of an architecture."

    model: Any
    prompts: list[torch.Tensor]  # [1, length]
    texts: list[list[int]]  # greedy continuation of each prompt alone
    batch: dict[str, torch.Tensor] = field(default_factory=dict)  # a left-padded batch of prompts of different length
    rows: list[list[int]] = field(default_factory=list)  # greedy continuation of each row alone, up to and with EOS
    eos: int | None = None  # ends one row early
    own_batch: list[list[int]] | str = ""  # transformers' own padded batch, or why it failed


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    for module in model.modules():  # a dynamic rotary embedding remembers the longest text of earlier calls
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, **more)
    return out if isinstance(out, torch.Tensor) else out.sequences


def _until(text: list[int], eos: int | None) -> list[int]:
    return text[: text.index(eos) + 1] if eos in text else text


def _random_prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(FIRST, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def _early_end(texts: list[list[int]]) -> int | None:
    # a token that ends one text early and another one late or never; not at once, if that can be had
    best, score = None, (False, 0)
    for token in dict.fromkeys(token for text in texts for token in text[1:12]):
        ends = [len(_until(text, token)) for text in texts]
        if max(ends) > min(ends) > 1:
            best, score = max((best, score), (token, (min(ends) > 2, max(ends) - min(ends))), key=lambda found: found[1])
    return best


def reference(name: str) -> Reference:
    "Greedy texts of transformers' own generate, prompts alone and as a padded batch."
    model = build(name)
    prompts = [_random_prompt(n, n) for n in SINGLES]
    ref = Reference(model, prompts, [_text(model, p) for p in prompts])
    rows = [_random_prompt(n, n) for n in ROWS]
    texts = [_text(model, p) for p in rows]
    ref.eos = _early_end(texts)
    ref.rows = [_until(text, ref.eos) for text in texts]
    width = max(ROWS)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=PAD) for p in rows])
    ref.batch = {"ids": ids, "mask": torch.stack([torch.arange(width) >= width - n for n in ROWS]).long()}
    try:
        out = _generate(model, **ref.batch, eos_token_id=ref.eos)[:, width:].tolist()
        ref.own_batch = [_until(text, ref.eos) for text in out]
    except Exception as error:
        ref.own_batch = f"{type(error).__name__}: {error}"
    return ref


def _text(model: Any, prompt: torch.Tensor, **more: Any) -> list[int]:
    return _generate(model, prompt, **more)[0, prompt.shape[1] :].tolist()


def _gap(model: Any, prompt: torch.Tensor, expected: list[int], got: list[int]) -> tuple[int, float]:
    # where two texts part, and by how much the model prefers its own token there
    n = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
    if n >= len(got) or n >= len(expected):
        return n, float("inf")
    ids = torch.cat([prompt, torch.tensor([expected[:n]], dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float()
    return n, float(logits[expected[n]] - logits[got[n]])


def _compare(ref: Reference, prompts: list[torch.Tensor], expected: list[list[int]], got: list[list[int]]) -> Outcome:
    tie = False
    for i, (prompt, e, g) in enumerate(zip(prompts, expected, got)):
        if e != g:
            place, gap = _gap(ref.model, prompt, e, g)
            if abs(gap) >= TIE:
                return Outcome("wrong", f"row {i} parts at token {place} of {len(e)}, logit gap {gap:.3g}")
            tie = True
    return Outcome("tie" if tie else "exact")


def _failure(error: Exception) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "decodelab" in Path(f.filename).parts]
    last = frames[-1]
    message = " ".join(str(error).split())
    where = f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"
    if isinstance(error, ValueError) and ours and last is ours[-1] and message and "\n" not in str(error):
        return Outcome("refused", message)
    return Outcome("crash", f"{type(error).__name__}: {message}", where)


def _decode(name: str, ref: Reference, decoder: str, situation: str, **more: Any) -> list[list[int]]:
    made = DECODERS[decoder](ref.model, lambda: build(name, seed=1))
    if situation == "single":
        return [_text(ref.model, p, custom_generate=made, **more) for p in ref.prompts]
    out = _generate(ref.model, **ref.batch, eos_token_id=ref.eos, custom_generate=made, **more)
    return [_until(text, ref.eos) for text in out[:, ref.batch["ids"].shape[1] :].tolist()]


def _is_late(name: str, ref: Reference, decoder: str, situation: str) -> bool:
    # the same call with a criterion that is asked at each new token and never stops
    asked: list[int] = []

    def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        asked.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    with contextlib.suppress(ValueError):
        _decode(name, ref, decoder, situation, stopping_criteria=[watch])
    return bool(asked)


def run(name: str, ref: Reference, decoder: str, situation: str) -> Outcome:
    "One decoder on one architecture in one situation."
    try:
        got = _decode(name, ref, decoder, situation)
    except Exception as error:
        outcome = _failure(error)
        if outcome.kind == "refused" and _is_late(name, ref, decoder, situation):
            return Outcome("late", outcome.detail)
        return outcome
    if decoder in NOT_COMPARED:
        return Outcome("runs")
    if situation == "single":
        return _compare(ref, ref.prompts, ref.texts, got)
    rows = [row[mask.bool()][None] for row, mask in zip(ref.batch["ids"], ref.batch["mask"])]
    outcome = _compare(ref, rows, ref.rows, got)
    return Outcome("padded", outcome.detail) if outcome.kind == "wrong" and got == ref.own_batch else outcome


def _own_batch(ref: Reference) -> str:
    if isinstance(ref.own_batch, str):
        return f"transformers' own padded batch fails: {ref.own_batch[:60]}"
    return "" if ref.own_batch == ref.rows else "transformers' own padded batch differs from its rows alone"


def sweep(only: list[str] | None = None, decoders: list[str] | None = None, say: Callable[[str], None] = print) -> Counter[Any]:
    "The table: architecture x decoder x situation, and its totals."
    totals: Counter[Any] = Counter()
    columns = [(decoder, situation) for decoder in decoders or list(DECODERS) for situation in ("single", "batch")]
    started, details = time.perf_counter(), []
    say(f"{'':28} " + " ".join(f"{d[:8]:8}" for d, _ in columns) + "\n" + f"{'':28} " + " ".join(f"{s:8}" for _, s in columns))
    for name in only or architectures():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some models print
                ref = reference(name)
                outcomes = [run(name, ref, *column) for column in columns]
        except Exception as error:
            failure = _failure(error)
            say(f"{name:28} transformers' generate fails: {failure.detail[:150]} ({failure.where})")
            totals["transformers"] += 1
            continue
        totals.update((*column, o.kind) for column, o in zip(columns, outcomes))
        details += [(o.kind, name, *column, o) for column, o in zip(columns, outcomes) if o.kind not in ("exact", "runs")]
        variety = len({token for text in ref.texts for token in text})
        say(
            f"{name:28} {' '.join(f'{o.kind:8}' for o in outcomes)} {variety:3} kinds, rows of {list(map(len, ref.rows))} {_own_batch(ref)}"
        )
    say(f"\n{'decoder':20} {'situation':9} outcomes")
    for column in columns:
        counts = {key[2]: n for key, n in totals.items() if key[:2] == column}
        say(f"{column[0]:20} {column[1]:9} {', '.join(f'{kind} {n}' for kind, n in sorted(counts.items()))}")
    say(f"transformers' own generate fails on {totals['transformers']}; {time.perf_counter() - started:.0f} s\n")
    for kind, name, decoder, situation, outcome in sorted(details, key=lambda d: d[:4]):
        say(f"{kind:8} {name:28} {decoder:18} {situation:7} {outcome.detail[:260]} {outcome.where}")
    for name, reason in NOT_BUILT.items():
        say(f"not built {name}: {reason}")
    return totals


# The sweep as tests: a dozen architectures at every change, all of them nightly.

QUICK = frozenset(
    (
        "llama",
        "gpt2",
        "gpt_neo",
        "gemma3_text",
        "llama4_text",
        "mistral",
        "mamba",
        "lfm2",
        "jamba",
        "falcon:alibi",
        "bloom",
        "rwkv",
        "qwen3_next",
    )
)
# Token-by-token decoding is exact wherever transformers' generate works. Excused, with the reason:
EXCUSED: dict[str, str] = {}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _marked(chosen: Iterable[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in chosen]


@pytest.mark.parametrize("name", _marked(architectures()))
def test_every_architecture_is_exact_or_refused(name):
    ref = reference(name)
    assert len(set(map(len, ref.rows))) > 1  # a row ends early
    bad = []
    for decoder in DECODERS:
        for situation in ("single", "batch"):
            outcome = run(name, ref, decoder, situation)
            refused = decoder == "Autoregressive" and outcome.kind == "refused" and name not in EXCUSED
            if refused or outcome.kind not in GOOD:
                bad.append(f"{decoder}, {situation}: {outcome.kind}: {outcome.detail} {outcome.where}")
    assert not bad, "\n".join([name, *bad])


def test_no_architecture_is_left_out():
    reached = {*NOT_BUILT, *(name.partition(":")[0] for name in architectures())}
    reached |= {other for name in reached if name in names() for other in names()[name]}
    assert reached == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(architectures()) >= QUICK
    assert set(EXCUSED) <= set(architectures())


@pytest.mark.parametrize("name", sorted(set(NOT_BUILT) - {"gemma3n"}))
def test_what_is_not_built_writes_no_text(name):
    with pytest.raises(Exception, match="."):  # should one be a text decoder one day, it joins the sweep
        reference(name)


@pytest.mark.parametrize(
    ("name", "open_windows"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma3_text", {"sliding_window": 512}),
        ("llama4_text", {"attention_chunk_size": 512}),
        ("gpt_neo", {"window_size": 512}),
        ("recurrent_gemma", {"attention_window_size": 512}),
        ("modernbert-decoder", {"local_attention": 1024, "sliding_window": 512}),
    ],
)
def test_windows_of_the_tiny_models_cut(name, open_windows):
    # the same weights with wide windows write another text: a decoder that forgets the window would be found out
    prompt = _random_prompt(20, 20)
    assert _text(build(name), prompt) != _text(build(name, **open_windows), prompt)


@pytest.mark.parametrize("name", ["lfm2", "jamba", "bamba", "falcon_h1", "qwen3_next", "granitemoehybrid", "recurrent_gemma", "zamba2"])
def test_hybrids_mix_attention_and_states(name):
    cache = DynamicCache(config=build(name).config)
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert any("Linear" in kind for kind in kinds) and any("Linear" not in kind or "And" in kind for kind in kinds), kinds


class _Broken(Autoregressive):
    "Plain decoding with a fault: negative controls of the sweep."

    fault: ClassVar[Callable[[int], int | None]]

    def pick(self, call: Any, scores: torch.Tensor) -> Any:
        tokens, roles, notes = super().pick(call, scores)
        made = int(call.history().shape[1] - call.prompt.shape[1])
        return (tokens if made != 3 else type(self).fault(tokens)), roles, notes


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (lambda tokens: tokens % (VOCAB - FIRST) + FIRST, "wrong"),
        (lambda tokens: ContrastiveSearch(k=0), "late"),  # a ValueError of ours, but after tokens were made
        (lambda tokens: torch.zeros(3).view(7), "crash"),
        (lambda tokens: int("seven"), "crash"),  # a ValueError of somebody else's
        (lambda tokens: tokens, "exact"),
    ],
)
def test_sweep_finds_broken_decoders(fault, kind, monkeypatch):
    broken = type("Broken", (_Broken,), {"fault": staticmethod(fault)})
    monkeypatch.setitem(DECODERS, "Broken", lambda model, draft: broken())
    ref = reference("llama")
    assert [run("llama", ref, "Broken", situation).kind for situation in ("single", "batch")] == [kind, kind]


# Wrapped models, precisions, devices and caches that users bring.

ENGINES = (Autoregressive, PromptLookup)  # token by token, and several tokens a forward
LOSSLESS = (*ENGINES, TokenRecycling)


def _prompts(*lengths: int) -> dict[str, torch.Tensor]:
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(_random_prompt(n, n), (width - n, 0), value=PAD) for n in lengths])
    return {"input_ids": ids, "attention_mask": torch.stack([torch.arange(width) >= width - n for n in lengths]).long()}


GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}


def _exact_or_refused(expected: torch.Tensor, decode: Callable[[], Any], names: str) -> bool:
    "The call gives the expected tokens (True), or one sentence that matches `names`."
    try:
        got = decode()
    except Exception as error:
        outcome = _failure(error)
        assert outcome.kind == "refused", f"{outcome.detail} {outcome.where}"
        assert re.search(names, outcome.detail, re.IGNORECASE), outcome.detail
        return False
    assert torch.equal(got.sequences, expected)
    return True


@torch.no_grad()
def _trained(config: Any, name: str = "llama", seed: int = 0) -> Any:
    # adapter weights as after a training that moved them
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(name, seed), config(peft)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(0.0, 1.0, generator=generator)
    return model


def _lora(peft: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


PROMPT_LEARNING = {
    "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("decoder", LOSSLESS)
@pytest.mark.parametrize("lengths", [(12,), (12, 7, 3)])
def test_peft_lora_is_exact(decoder, lengths):
    model, inputs = _trained(_lora), _prompts(*lengths)
    expected = model.generate(**inputs, **GREEDY)
    assert not torch.equal(expected, build("llama").generate(**inputs, **GREEDY))
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=decoder()).sequences, expected)
    assert torch.equal(decoder().generate(model, **inputs, **GREEDY).sequences, expected)


@pytest.mark.parametrize("decoder", ENGINES)
@pytest.mark.parametrize("method", PROMPT_LEARNING)
@pytest.mark.parametrize("lengths", [(12,), (12, 7, 3)])
def test_peft_learnt_prompt_is_not_dropped(decoder, method, lengths):
    model, inputs = _trained(PROMPT_LEARNING[method]), _prompts(*lengths)
    expected = model.generate(**inputs, **GREEDY)
    assert not torch.equal(expected, build("llama").generate(**inputs, **GREEDY))
    words = "prompt|prefix|peft|virtual"
    _exact_or_refused(expected, lambda: model.generate(**inputs, **GREEDY, custom_generate=decoder()), words)
    _exact_or_refused(expected, lambda: decoder().generate(model, **inputs, **GREEDY), words)


def _bfloat16_ties(model: Any, prompt: torch.Tensor, expected: torch.Tensor, got: torch.Tensor) -> bool:
    "Whether two texts part only where the logits, rounded to bfloat16, are a tie."
    if torch.equal(expected, got):
        return True
    place = int((expected != got).int().argmax())
    ids = torch.cat([prompt, expected[:place]])[None]
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()
    ulp = float(logits.abs().max()) * torch.finfo(torch.bfloat16).eps
    return abs(float(logits[expected[place]] - logits[got[place]])) <= 4 * ulp


@pytest.mark.parametrize("decoder", LOSSLESS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast_in_bfloat16(decoder, name):
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        for length in (12, 9, 20):
            inputs = _prompts(length)
            expected = model.generate(**inputs, **GREEDY)[0, length:]
            got = model.generate(**inputs, **GREEDY, custom_generate=decoder()).sequences[0, length:]
            assert _bfloat16_ties(model, inputs["input_ids"][0], expected, got)


@pytest.mark.parametrize("decoder", ENGINES)
def test_offloaded_model_works_or_is_refused_by_name(decoder):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("llama"), _prompts(12)
    expected = model.generate(**inputs, **GREEDY)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    _exact_or_refused(expected, lambda: model.generate(**inputs, **GREEDY, custom_generate=decoder()), "offload")


@pytest.mark.parametrize("decoder", [DraftModel, RSDC, RSDS, IIDChains])
@pytest.mark.parametrize("lengths", [(12,), (12, 7, 3)])
def test_drafter_with_lora(decoder, lengths):
    _drafts_exactly(decoder(drafter=_trained(_lora, seed=1)), lengths)


@pytest.mark.parametrize("decoder", [DraftModel, RSDC, RSDS, IIDChains])
def test_compiled_drafter(decoder):
    drafter = torch.compile(build("llama", seed=1), backend="eager")
    with torch.compiler.set_stance("force_eager"):  # what counts is the wrapper
        _drafts_exactly(decoder(drafter=drafter), (12, 7, 3))


def _drafts_exactly(decoder: Any, lengths: tuple[int, ...]) -> None:
    model, inputs = build("llama"), _prompts(*lengths)
    expected = model.generate(**inputs, **GREEDY)
    out = model.generate(**inputs, **GREEDY, custom_generate=decoder)
    assert torch.equal(out.sequences, expected)
    assert out.stats.draft_forwards > 0


@dataclass
class _Chat:
    "A conversation of several turns over one cache that starts with the first tokens; rows of the batch end at different lengths."

    model: Any
    eos: int
    cache: Any = field(init=False)
    sequences: torch.Tensor = field(init=False)
    mask: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        inputs = _prompts(*CHAT)
        self.sequences, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self.cache = _prefilled(self.model, inputs, 6)

    def turn(self, number: int, **more: Any) -> torch.Tensor:
        "The model's answer to what the users say next."
        if number:
            said = torch.cat([_random_prompt(4, 100 * number + row) for row in range(len(self.sequences))])
            self.sequences, self.mask = torch.cat([self.sequences, said], 1), torch.cat([self.mask, torch.ones_like(said)], 1)
        start = self.sequences.shape[1]
        asked = {"attention_mask": self.mask, "past_key_values": self.cache, "eos_token_id": self.eos}
        out = self.model.generate(self.sequences, **asked, **{**GREEDY, "max_new_tokens": 12}, **more)
        self.sequences = out if isinstance(out, torch.Tensor) else out.sequences
        answer = self.sequences[:, start:]
        ended = (answer == self.eos).long().cumsum(-1) - (answer == self.eos).long()  # what stands behind EOS does not count
        self.mask = torch.cat([self.mask, (ended == 0).long()], 1)
        return answer


CHAT = (12, 9, 7)


@torch.no_grad()
def _prefilled(model: Any, inputs: dict[str, torch.Tensor], length: int) -> Any:
    cache, part = DynamicCache(config=model.config), {k: v[:, :length] for k, v in inputs.items()}
    model(**part, position_ids=(part["attention_mask"].cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    return cache


def _eos_of_chat(model: Any) -> int:
    eos = _early_end([_text(model, _random_prompt(n, n))[:12] for n in CHAT])
    assert eos is not None
    return eos


@pytest.mark.parametrize("decoder", ENGINES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_own_cache_over_three_turns(decoder, name):
    model = build(name)
    theirs, ours = (_Chat(model, _eos_of_chat(model)) for _ in range(2))
    for number in range(3):
        expected = theirs.turn(number)
        assert torch.equal(ours.turn(number, custom_generate=decoder()), expected), f"turn {number + 1}"
        if not number:
            assert len(set((expected != PAD).sum(-1).tolist())) > 1  # rows did end at different lengths


def test_own_cache_with_windows_over_three_turns():
    model = build("mistral")
    theirs, ours = (_Chat(model, _eos_of_chat(model)) for _ in range(2))
    for number in range(3):
        assert torch.equal(ours.turn(number, custom_generate=Autoregressive()), theirs.turn(number)), f"turn {number + 1}"


@pytest.mark.parametrize("decoder", ENGINES)
@pytest.mark.parametrize("lengths", [(12,), CHAT])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_own_cache_that_holds_a_part_of_the_prompt(decoder, lengths, name):
    model, inputs = build(name), _prompts(*lengths)
    expected = model.generate(**inputs, **GREEDY)
    cache = _prefilled(model, inputs, 6)
    _exact_or_refused(
        expected, lambda: model.generate(**inputs, **GREEDY, past_key_values=cache, custom_generate=decoder()), "cache|window"
    )


@pytest.mark.parametrize("decoder", ENGINES)
@pytest.mark.parametrize("kind", ["offloaded", "static", "offloaded_static", "quantized"])
def test_cache_implementation_is_honoured_or_refused(decoder, kind):
    model, inputs = build("llama"), _prompts(12)
    asked = {**GREEDY, "cache_implementation": kind}
    seen: set[tuple[type, bool]] = set()  # caches that forwards were given

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        seen.add((type(cache), getattr(cache, "offloading", False)))

    model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        expected = model.generate(**inputs, **asked)
    except Exception as error:  # needs a GPU, or a package that is not here: nor may we give another cache in its place
        with pytest.raises((type(error), ValueError)):
            model.generate(**inputs, **asked, custom_generate=decoder())
        return
    theirs = set(seen)
    seen.clear()
    decoded = _exact_or_refused(expected, lambda: model.generate(**inputs, **asked, custom_generate=decoder()), "cache")
    assert theirs <= seen or not decoded


@pytest.mark.parametrize("decoder", ENGINES)
def test_input_embeddings_are_exact_or_refused_by_name(decoder):
    model, inputs = build("llama"), _prompts(12)
    embeddings = model.get_input_embeddings()(_random_prompt(12, 99)).detach()
    asked = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"], **GREEDY}
    expected = model.generate(**asked)
    _exact_or_refused(expected, lambda: model.generate(**asked, custom_generate=decoder()), "inputs_embeds")
    both = {**asked, "input_ids": inputs["input_ids"]}
    expected = model.generate(**both)
    _exact_or_refused(expected, lambda: model.generate(**both, custom_generate=decoder()), "inputs_embeds")


def _llava() -> tuple[Any, dict[str, torch.Tensor]]:
    "A tiny model of images and text, and a prompt that holds an image of four patches."
    torch.manual_seed(0)
    image = VOCAB - 1
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision, "initializer_range": 0.3},
        text_config=small_config("llama"),
        image_token_id=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ids = _random_prompt(12, 3) % (image - FIRST) + FIRST - FIRST
    ids[ids < FIRST] = FIRST
    ids[0, 2:6] = image
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": 3 * pixels}


@pytest.mark.parametrize("decoder", ENGINES)
def test_images_with_text_are_exact_or_refused_by_name(decoder):
    model, inputs = _llava()
    expected = model.generate(**inputs, **GREEDY)
    other = model.generate(**{**inputs, "pixel_values": -inputs["pixel_values"]}, **GREEDY)
    assert not torch.equal(expected, other)  # the image matters
    _exact_or_refused(expected, lambda: model.generate(**inputs, **GREEDY, custom_generate=decoder()), "pixel_values|image")


@pytest.mark.parametrize("decoder", ENGINES)
def test_image_for_a_text_model_is_refused_by_name(decoder):
    pixels = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="pixel_values"):
        decoder().generate(build("llama"), **_prompts(12), pixel_values=pixels, **GREEDY)


def main() -> None:
    "The table on the terminal."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="architectures, separated by commas")
    parser.add_argument("--decoders", help="decoders, separated by commas")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sweep(*(x.split(",") if x else None for x in (asked.only, asked.decoders)), say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
