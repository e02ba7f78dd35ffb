"""The sweep: every decoder-only architecture of the installed transformers is decoded exactly, or refused in a sentence.

For each tiny random model of `architectures.py` the greedy text of transformers' own `generate` is compared with the decoders' texts, for
prompts alone and for a left-padded batch of which one row ends early. `python tests/test_architectures.py` prints the whole table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from architectures import FIRST, NOT_BUILT, PAD, VOCAB, architectures, build

from decodelab import NGram, PromptLookup, TokenRecycling
from decodelab.sampling.base import Autoregressive, ContrastiveSearch
from decodelab.speculative.drafters import DraftModel

NEW = 24
SINGLES, ROWS = (12, 9, 20), (20, 7, 3)  # lengths of the prompts alone, of the rows of the batch; windows are 16 long
TIE = 1e-4  # a gap of logits below which either token is right

# Decoder -> how to make it for a model; the drafter is another tiny model of the same architecture.
DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "Autoregressive": lambda model, draft: Autoregressive(),
    "PromptLookup": lambda model, draft: PromptLookup(),
    "TokenRecycling": lambda model, draft: TokenRecycling(),
    "NGram": lambda model, draft: NGram(),
    "DraftModel": lambda model, draft: DraftModel(drafter=draft()),
    "ContrastiveSearch": lambda model, draft: ContrastiveSearch(),
}
NOT_COMPARED = frozenset({"ContrastiveSearch"})  # its text is its own: it must run or be refused

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
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, **more)
    return out if isinstance(out, torch.Tensor) else out.sequences


def _until(text: list[int], eos: int | None) -> list[int]:
    return text[: text.index(eos) + 1] if eos in text else text


def _random_prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(FIRST, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def _early_end(texts: list[list[int]]) -> int | None:
    # a token that first occurs early in one text and late or never in another one
    best, gain = None, 0
    for text in texts:
        for token in dict.fromkeys(text[3:12]):
            ends = [len(_until(other, token)) for other in texts]
            if max(ends) - min(ends) > gain and min(ends) > 2:
                best, gain = token, max(ends) - min(ends)
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


def main() -> None:
    "The table on the terminal."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="architectures, separated by commas")
    parser.add_argument("--decoders", help="decoders, separated by commas")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    sweep(*(x.split(",") if x else None for x in (asked.only, asked.decoders)), say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
