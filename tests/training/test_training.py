"""Training runs: killed at every stage, in the wrong folder, diverged, on a full disk, with odd tokenizers and empty texts."""

import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import character_tokenizer, small_model
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState
from typer.testing import CliRunner

from decodelab.cli import app
from decodelab.core.zoo import load, model_card, zoo_path
from decodelab.training import checkpoints as kept
from decodelab.training import language_model, learn2pd, longspec, masked_diffusion, msd, runs, specdec_pp
from decodelab.training.checkpoints import checkpoint_fault, fingerprint, keep_tensors, kept_tensors, newest_whole_checkpoint
from decodelab.training.denoising_data import TaskBatches, TextBatches, task_examples
from decodelab.training.language_model import LanguageModelRecipe, Windows, encode_stream, held_out_figures, train_language_model
from decodelab.training.learn2pd import FilterRecipe, cached_records, train_filter
from decodelab.training.longspec import LongSpecRecipe, train_longspec
from decodelab.training.masked_diffusion import MaskedDiffusionRecipe, held_out_bound, train_masked_diffusion
from decodelab.training.recipes import load_causal, recipes
from decodelab.training.runs import RunTrainer, TrainingRun, check_recipe
from decodelab.training.specdec_pp import AcceptanceHeadRecipe, cached_data, train_acceptance_head
from decodelab.training.tracking import progress

pytest.importorskip("accelerate")

TALE, OTHER = "once upon a time there was a king. " * 40, "the old woman saw a fox and a hen. " * 20
MINI = LanguageModelRecipe(
    "mini",
    hidden_size=8,
    intermediate_size=8,
    layers=1,
    heads=1,
    context=32,
    block=16,
    batch_size=2,
    steps=8,
    warmup=1,
    save_every=4,
    eval_every=4,
)


class Killed(BaseException):
    "Nobody catches this, as nobody catches a kill."


@pytest.fixture(autouse=True)
def _in_peace(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path / "no-data"))
    monkeypatch.delenv("RANK", raising=False)


def with_marks():
    tokenizer = character_tokenizer()
    tokenizer.mask_token, tokenizer.bos_token = "~", "^"
    return tokenizer


def train(out, recipe=MINI, tokenizer=None, text=TALE, held_out=OTHER):
    return train_language_model(recipe, tokenizer or character_tokenizer(), [text], [held_out], out)


def weights(out):
    return (out / "model.safetensors").read_bytes()


def contents(folder):
    "Every file below a folder, apart from the lock."
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock"}


def strict_json(path):
    "JSON as the standard has it: no NaN, no Infinity."
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path.name} holds {name}"))


def names(run):
    return sorted(p.name for p in run.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run of eight steps, with its checkpoints of steps 4 and 8."
    out = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        figures = train(out)
    assert names(out / "run") == ["checkpoint-4", "checkpoint-8"]
    return out, figures


@pytest.fixture
def copy(whole, tmp_path):
    "A copy of it, to be damaged."
    shutil.copytree(whole[0] / "run", tmp_path / "copy/run")
    return tmp_path / "copy"


# killed while a checkpoint is written


def cut(file, keep=0.5):
    os.truncate(file, int(file.stat().st_size * keep))


def after(*files):
    "What lies there when the process died before these files."

    def damage(checkpoint):
        for file in files:
            (checkpoint / file).unlink()

    return damage


LAST = ("rng_state.pth", "trainer_state.json")
STAGES = {
    "empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
    "configuration only": after("model.safetensors", "optimizer.pt", "scheduler.pt", *LAST),
    "cut weights": lambda c: (cut(c / "model.safetensors"), after("optimizer.pt", "scheduler.pt", *LAST)(c)),
    "weights of no length": lambda c: cut(c / "model.safetensors", 0),
    "no optimizer": after("optimizer.pt", "scheduler.pt", *LAST),
    "cut optimizer": lambda c: (cut(c / "optimizer.pt"), after("scheduler.pt", *LAST)(c)),
    "nearly whole optimizer": lambda c: cut(c / "optimizer.pt", 0.99),
    "no schedule": after("scheduler.pt", *LAST),
    "cut random state": lambda c: (cut(c / "rng_state.pth"), after("trainer_state.json")(c)),
    "no trainer state": after("trainer_state.json"),
    "cut trainer state": lambda c: cut(c / "trainer_state.json"),
    "trainer state of no length": lambda c: cut(c / "trainer_state.json", 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_a_checkpoint_was_written(stage, whole, copy, capsys):
    assert checkpoint_fault(copy / "run/checkpoint-8") == ""
    STAGES[stage](copy / "run/checkpoint-8")
    assert checkpoint_fault(copy / "run/checkpoint-8")
    assert newest_whole_checkpoint(copy / "run").name == "checkpoint-4"
    figures = train(copy)
    assert weights(copy) == weights(whole[0])
    assert (figures["steps"], figures["tokens_seen"]) == (8, 8 * 2 * 16)
    assert [(s["from_step"], s["to_step"]) for s in figures["segments"]] == [(0, 4), (4, 8)]
    assert figures["curve"] == whole[1]["curve"]
    assert "the run goes on from checkpoint-4" in capsys.readouterr().err


def test_nothing_whole_is_left(whole, copy, capsys):
    cut(copy / "run/checkpoint-4/model.safetensors")
    after("trainer_state.json")(copy / "run/checkpoint-8")
    figures = train(copy)
    assert weights(copy) == weights(whole[0])
    assert [(s["from_step"], s["to_step"]) for s in figures["segments"]] == [(0, 8)]
    assert capsys.readouterr().err.count("the run goes on from the beginning") == 2


def test_an_old_checkpoint_that_was_half_removed_is_not_counted_among_those_kept(copy):
    husk = copy / "run/checkpoint-2"
    shutil.copytree(copy / "run/checkpoint-4", husk)
    (husk / "model.safetensors").unlink()
    train(copy, replace(MINI, steps=12))
    assert names(copy / "run") == ["checkpoint-12", "checkpoint-8"]


class KilledAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("step", [1, 4, 6])
def test_killed_between_checkpoints(step, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "RunTrainer", lambda *a, **k: RunTrainer(*a, **k, callbacks=[KilledAt(step)]))
        with pytest.raises(Killed):
            train(tmp_path)
    assert names(tmp_path / "run") == (["checkpoint-4"] if step == 6 else [])
    figures = train(tmp_path)
    assert weights(tmp_path) == weights(whole[0])
    assert [(s["from_step"], s["to_step"]) for s in figures["segments"]] == ([(0, 4), (4, 8)] if step == 6 else [(0, 8)])


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import signal, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r} + "/training")
import test_training as t
save, calls = torch.save, []
def killed(content, file, *rest, **more):
    save(content, file, *rest, **more)
    if str(file).endswith("optimizer.pt"):
        calls.append(1)
        if len(calls) == 2:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
t.train(t.Path({out!r}))
"""


def test_a_process_that_was_really_killed(whole, tmp_path):
    out = tmp_path / "model"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert checkpoint_fault(out / "run/checkpoint-8")
    assert (out / "run/.lock").is_file()  # stale: whose process is dead
    train(out)
    assert weights(out) == weights(whole[0])


# the same for every recipe


@pytest.fixture(scope="module")
def pair():
    return small_model(hidden=16, context=128), small_model(hidden=16, context=128, seed=1)


HEAD = AcceptanceHeadRecipe("head", D=1, prompts=6, held_out=4, new_tokens=6, batch_size=2, steps=8, save_every=4, eval_every=4)
MASKED = MaskedDiffusionRecipe("masked", data="tales", batch_size=4, block=16, steps=8, warmup=1, save_every=4, eval_every=4)
LONGSPEC = LongSpecRecipe(
    "longspec", window=8, block=12, long_block=16, long_steps=3, offset_max=64, batch_size=2, steps=8, warmup=1, save_every=4, eval_every=4
)
FILTER = FilterRecipe("filter", "nobody", block_length=4, prompts=14, new_tokens=8, batch_size=5, steps=8, save_every=4)


@dataclass
class Case:
    "How to train one recipe in miniature."

    recipe: object
    run: object  # (recipe, out, models) -> figures
    trainer: type

    def __call__(self, out, pair, **changes):
        return self.run(replace(self.recipe, **changes), out, pair)


CASES = {
    "masked": Case(
        MASKED,
        lambda recipe, out, pair: train_masked_diffusion(
            recipe, out, (small_model(hidden=16, context=64), with_marks()), ([TALE], [OTHER]), evaluate=2
        ),
        masked_diffusion.DenoiserTrainer,
    ),
    "head": Case(
        HEAD, lambda recipe, out, pair: train_acceptance_head(recipe, out, (*pair, character_tokenizer())), specdec_pp.HeadTrainer
    ),
    "longspec": Case(
        LONGSPEC,
        lambda recipe, out, pair: train_longspec(recipe, out, (deepcopy(pair[0]), character_tokenizer()), ([TALE], [OTHER])),
        longspec.LongSpecTrainer,
    ),
    "filter": Case(FILTER, lambda recipe, out, pair: train_filter(recipe, out, (pair[0], character_tokenizer())), learn2pd.FilterTrainer),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pair):
    "Each of them, uninterrupted."
    outs = {name: tmp_path_factory.mktemp("finished") / name for name in CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DECODELAB_DATA", str(tmp_path_factory.mktemp("no-data")))
        return {name: (out, CASES[name](out, pair)) for name, out in outs.items()}


def counted(patch, trainer):
    steps, plain = [], trainer.training_step
    patch.setattr(trainer, "training_step", lambda *args, **kwargs: steps.append(1) or plain(*args, **kwargs))
    return steps


@pytest.mark.parametrize("name", CASES)
def test_every_recipe_falls_back_to_the_newest_whole_checkpoint(name, finished, pair, tmp_path, monkeypatch):
    out, figures = finished[name]
    shutil.copytree(out / "run", tmp_path / "run")
    cut(tmp_path / "run/checkpoint-8/model.safetensors")
    steps = counted(monkeypatch, CASES[name].trainer)
    again = CASES[name](tmp_path, pair)
    assert len(steps) == 4
    assert weights(tmp_path) == weights(out)
    assert (
        again["held_out" if "held_out" in again else "held_out_nats_per_token"]
        == figures["held_out" if "held_out" in again else "held_out_nats_per_token"]
    )
    assert [(s["from_step"], s["to_step"]) for s in again["segments"]] == [(0, 4), (4, 8)]


@pytest.mark.parametrize("name", CASES)
def test_a_finished_run_is_not_trained_again_also_where_an_epoch_is_not_over(name, finished, pair, tmp_path, monkeypatch):
    # six texts, two a step: eight steps end in the middle of an epoch
    out, figures = finished[name]
    shutil.copytree(out / "run", tmp_path / "run")
    steps = counted(monkeypatch, CASES[name].trainer)
    again = CASES[name](tmp_path, pair)
    assert steps == []
    assert weights(tmp_path) == weights(out)
    assert again == figures == strict_json(tmp_path / "training.json")
    for file in ("model.safetensors", "training.json"):  # killed while the result was written
        cut(tmp_path / file)
    assert CASES[name](tmp_path, pair) == strict_json(tmp_path / "training.json") == figures
    assert weights(tmp_path) == weights(out)


@pytest.mark.parametrize("name", CASES)
def test_every_recipe_says_what_it_was_made_of(name, finished):
    figures = finished[name][1]
    assert figures["recipe"]["name"] == CASES[name].recipe.name
    (segment,) = figures["segments"]
    assert {"seed", "commit", "dirty", "versions", "machine", "command", "date"} <= set(segment)
    assert (segment["from_step"], segment["to_step"], segment["planned_steps"]) == (0, 8, 8)
    assert [p["step"] for p in figures["curve"] if "eval_loss" in p] == [4, 8]
    assert all(len(p) > 1 for p in figures["curve"])


def test_a_folder_that_was_moved_still_knows_its_best_weights(finished, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, recipe = learn2pd.FilterTrainer.compute_loss, FILTER

    def compute_loss(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        return loss if model.training else (loss[0] + self.state.global_step, loss[1])  # the first checkpoint is the best

    monkeypatch.setattr(learn2pd.FilterTrainer, "compute_loss", compute_loss)
    first = train_filter(recipe, "here", (pair[0], character_tokenizer()))
    assert first["kept_step"] == 4
    best = weights(tmp_path / "here")
    (tmp_path / "here/run").rename(tmp_path / "aside")
    (tmp_path / "there").mkdir()
    (tmp_path / "aside").rename(tmp_path / "there/run")
    second = train_filter(recipe, "there", (pair[0], character_tokenizer()))
    assert (second["kept_step"], weights(tmp_path / "there")) == (4, best)
    shutil.rmtree(tmp_path / "there/run/checkpoint-8")  # and while it goes on
    third = train_filter(recipe, "there", (pair[0], character_tokenizer()))
    assert (third["kept_step"], weights(tmp_path / "there")) == (4, best)
    cut(tmp_path / "there/run/checkpoint-4/model.safetensors")  # the last is whole, its best is not
    assert newest_whole_checkpoint(tmp_path / "there/run") is None
    assert "model.safetensors is cut short" in checkpoint_fault(tmp_path / "there/run/checkpoint-8")


# another run


CHANGES = [
    ({"learning_rate": 1e-3}, "learning_rate was 0.003 and is 0.001"),
    ({"seed": 1}, "seed was 0 and is 1"),
    ({"hidden_size": 16}, "hidden_size was 8 and is 16"),
    ({"batch_size": 4}, "batch_size was 2 and is 4"),
    ({"warmup": 2, "weight_decay": 0.0}, "warmup was 1 and is 2, weight_decay was 0.1 and is 0.0"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda c: "-".join(c) if isinstance(c, dict) else "")
def test_checkpoints_of_another_recipe_are_refused(change, message, copy):
    before = fingerprint((copy / "run/checkpoint-8/model.safetensors").read_bytes().hex())
    with pytest.raises(ValueError, match=message) as refused:
        train(copy, replace(MINI, **change))
    assert "name another folder, or delete this one to train anew" in str(refused.value)
    assert fingerprint((copy / "run/checkpoint-8/model.safetensors").read_bytes().hex()) == before
    assert not (copy / "model.safetensors").exists()


def test_checkpoints_of_other_data_or_another_tokenizer_are_refused(copy):
    with pytest.raises(ValueError, match="another run .the training text differs."):
        train(copy, text=TALE.replace("king", "ring"))
    with pytest.raises(ValueError, match="the held out text differs"):
        train(copy, held_out=OTHER.replace("fox", "box"))
    with pytest.raises(ValueError, match="the tokenizer differs, the training text differs"):
        train(copy, tokenizer=with_marks())
    swapped = character_tokenizer()
    swapped.pad_token = "~"  # the same ids of the same text
    with pytest.raises(ValueError, match="another run .the tokenizer differs."):
        train(copy, tokenizer=swapped)


def test_what_changes_no_result_may_change(whole, copy):
    cut(copy / "run/checkpoint-8/optimizer.pt")
    figures = train(copy, replace(MINI, name="other", save_every=2, eval_every=3))
    assert weights(copy) == weights(whole[0])
    assert names(copy / "run") == ["checkpoint-6", "checkpoint-8"]  # the new rhythm, not that of the checkpoint
    assert [p["step"] for p in figures["curve"] if "eval_loss" in p] == [4, 6, 8]


def test_a_run_that_has_no_checkpoint_yet_may_become_another(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "RunTrainer", lambda *a, **k: RunTrainer(*a, **k, callbacks=[KilledAt(2)]))
        with pytest.raises(Killed):
            train(tmp_path)
    assert train(tmp_path, replace(MINI, learning_rate=1e-3))["recipe"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_checkpoints_of_nobody_are_refused(damage, copy):
    damage(copy / "run/run.json")
    with pytest.raises(ValueError, match=r"run\.json, which says of which, is missing"):
        train(copy)


def test_weights_to_start_from_and_arguments_belong_to_the_run(finished, pair, tmp_path):
    shutil.copytree(finished["masked"][0] / "run", tmp_path / "run")
    call = {"texts": ([TALE], [OTHER]), "evaluate": 0}
    start = (small_model(hidden=16, context=64), with_marks())
    with pytest.raises(ValueError, match="the start differs"):
        train_masked_diffusion(MASKED, tmp_path, (small_model(hidden=16, context=64, seed=9), with_marks()), **call)
    with pytest.raises(ValueError, match="adam_beta2 was 0.95 and is 0.5"):
        train_masked_diffusion(MASKED, tmp_path, start, **call, adam_beta2=0.5)
    train_masked_diffusion(MASKED, tmp_path, start, **call, disable_tqdm=True, logging_steps=3)


def test_the_drafter_of_a_head_belongs_to_the_run(finished, pair, tmp_path):
    shutil.copytree(finished["head"][0] / "run", tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"another run .data\.safetensors was made with another models.: name another folder"):
        train_acceptance_head(HEAD, tmp_path, (pair[0], small_model(hidden=16, context=128, seed=5), character_tokenizer()))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "change"), [("masked", {"seed": 1}), ("head", {"temperature": 0.5}), ("filter", {"prompts": 15}), ("filter", {"depth": 1})]
)
def test_another_setting_is_refused_before_data_are_made(name, change, finished, pair, tmp_path, monkeypatch):
    shutil.copytree(finished[name][0], tmp_path / "model")
    before = contents(tmp_path / "model")
    for module, made in ((specdec_pp, "build_data"), (learn2pd, "record"), (learn2pd, "kept_tensors"), (masked_diffusion, "encode_stream")):
        monkeypatch.setattr(module, made, lambda *_, **__: pytest.fail("data are looked at"))
    (setting,) = change
    with pytest.raises(ValueError, match=f"holds checkpoints of another run .{setting} was "):
        CASES[name](tmp_path / "model", pair, **change)
    assert contents(tmp_path / "model") == before
    with TrainingRun(tmp_path / "model/run", CASES[name].recipe, free=runs.FREE[:2] + runs.FREE[3:] if name == "filter" else runs.FREE):
        pass  # the lock was given back


def test_when_a_filter_is_evaluated_decides_what_is_kept(finished, pair, tmp_path):
    shutil.copytree(finished["filter"][0] / "run", tmp_path / "run")
    with pytest.raises(ValueError, match="save_every was 4 and is 2"):
        CASES["filter"](tmp_path, pair, save_every=2)


# other numbers of steps


def test_fewer_steps_than_there_are_train_nothing_and_count_what_the_weights_have_seen(whole, copy, capsys):
    figures = train(copy, replace(MINI, steps=4))
    assert "holds 8 steps, more than the 4 asked for: nothing is trained" in capsys.readouterr().err
    assert weights(copy) == weights(whole[0])
    assert (figures["steps"], figures["tokens_seen"], figures["recipe"]["steps"]) == (8, 8 * 2 * 16, 8)
    assert "remarks" not in figures


def test_more_steps_go_on_and_name_both_plans(copy):
    figures = train(copy, replace(MINI, steps=12))
    assert (figures["steps"], figures["tokens_seen"], figures["recipe"]["steps"]) == (12, 12 * 2 * 16, 12)
    assert [(s["from_step"], s["to_step"], s["planned_steps"]) for s in figures["segments"]] == [(0, 8, 8), (8, 12, 12)]
    assert figures["remarks"] == ["The run was planned for 8 steps, from step 8 on for 12."]
    again = train(copy, replace(MINI, steps=12))
    assert again == figures
    shorter = train(copy, replace(MINI, steps=6))  # asked for less again: the record does not change
    assert shorter == figures
    assert "planned for 8 steps, from step 8 on for 12" in model_card(copy)


def test_steps_that_were_lost_are_not_counted_twice(copy):
    cut(copy / "run/checkpoint-8/trainer_state.json")
    figures = train(copy, replace(MINI, steps=12))
    assert figures["tokens_seen"] == 12 * 2 * 16
    assert [(s["from_step"], s["to_step"], s["planned_steps"]) for s in figures["segments"]] == [(0, 4, 8), (4, 12, 12)]


def test_tokens_of_a_masked_run_are_those_of_its_steps(finished, pair, tmp_path):
    out, figures = finished["masked"]
    assert figures["tokens_seen"] == 8 * 4 * 16
    shutil.copytree(out / "run", tmp_path / "run")
    assert CASES["masked"](tmp_path, pair, steps=2)["tokens_seen"] == 8 * 4 * 16


# divergence


def test_a_diverged_run_stops_and_saves_nothing(tmp_path):
    with pytest.raises(
        ValueError, match=r"the loss is (nan|inf) at step \d+: the run has diverged, and there is no checkpoint yet; .*below 1e\+30"
    ):
        train(tmp_path, replace(MINI, learning_rate=1e30, steps=40, save_every=100))
    assert not (tmp_path / "training.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def poisoned(patch, step, what="loss"):
    "From `step` on the loss, a gradient or the held-out loss is no number."
    plain = RunTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = plain(self, model, inputs, *args, **kwargs)
        late = self.state.global_step + model.training >= step
        if late and what == "gradient" and model.training:
            next(model.parameters()).register_hook(lambda grad: grad * math.nan)
        if late and what == ("loss" if model.training else "held-out"):
            return loss * math.nan if model.training else (loss[0] * math.nan, loss[1])
        return loss

    patch.setattr(RunTrainer, "compute_loss", compute_loss)


def test_a_loss_that_is_no_number_stops_the_run_at_once(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, 6)
        with pytest.raises(
            ValueError, match="the loss is nan at step 6: the run has diverged, and checkpoint-4 is the last good checkpoint"
        ):
            train(tmp_path)
    assert names(tmp_path / "run") == ["checkpoint-4"]
    assert not (tmp_path / "training.json").exists()
    train(tmp_path)  # whatever it was has gone
    assert weights(tmp_path) == weights(whole[0])


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    poisoned(monkeypatch, 4, "gradient")  # the loss of this step is still finite, and nothing is evaluated before it is saved
    with pytest.raises(
        ValueError, match="the weights are not finite after step 4: the run has diverged, and checkpoint-2 is the last good"
    ):
        train(tmp_path, replace(MINI, save_every=2, eval_every=8))
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_held_out_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    poisoned(monkeypatch, 8, "held-out")
    with pytest.raises(ValueError, match="the held-out loss is nan at step 8: the run has diverged"):
        train(tmp_path)
    assert names(tmp_path / "run") == ["checkpoint-4"]


@pytest.mark.parametrize("name", CASES)
def test_every_recipe_stops_when_it_diverges(name, pair, tmp_path, monkeypatch):
    plain = CASES[name].trainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        return loss * math.inf if model.training and self.state.global_step == 5 else loss

    monkeypatch.setattr(CASES[name].trainer, "compute_loss", compute_loss)
    with pytest.raises(ValueError, match="the loss is inf at step 6: the run has diverged, and checkpoint-4 is the last good checkpoint"):
        CASES[name](tmp_path, pair)
    assert not list(tmp_path.glob("*.*"))


# odd tokenizers


def words_tokenizer(words, **marks):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def test_a_vocabulary_of_seventy_thousand(tmp_path):
    words = [f"w{i}" for i in range(70_000)]
    tokenizer = words_tokenizer([*words, "<bos>", "<eos>"], bos_token="<bos>", eos_token="<eos>")
    text = " ".join(words[-200:])
    stream = encode_stream(tokenizer, [text])
    assert stream.tolist() == [70_000, *range(69_800, 70_000), 70_001]
    window = Windows(stream, 16, 1)[0]["input_ids"].tolist()
    assert window == list(range(window[0], window[0] + 16))
    figures = train(tmp_path, replace(MINI, steps=1), tokenizer, text, text)
    assert figures["recipe"]["vocab_size"] == load(tmp_path)[0].config.vocab_size == 70_002
    assert figures["held_out_nats_per_token"] == pytest.approx(math.log(70_002), rel=0.05)
    assert figures["held_out_tokens"] == 201


@pytest.mark.parametrize("marks", [{}, {"bos_token": "a"}, {"eos_token": "b"}, {"pad_token": "c"}], ids=lambda m: "".join(m) or "none")
def test_tokenizers_without_some_marks(marks, tmp_path):
    tokenizer = words_tokenizer(["a", "b", "c", "d"], **marks)
    begin, end = ([tokenizer.convert_tokens_to_ids(marks[m])] if m in marks else [] for m in ("bos_token", "eos_token"))
    assert encode_stream(tokenizer, ["a d", "c"]).tolist() == [*begin, 0, 3, *end, *begin, 2, *end]
    text = "a b c d " * 20
    figures = train(tmp_path, replace(MINI, steps=2), tokenizer, text, text)
    assert figures["held_out_tokens"] == 80 + len(begin) + len(end) - 1
    config = load(tmp_path)[0].config
    assert (config.bos_token_id, config.eos_token_id) == tuple(m[0] if m else None for m in (begin, end))


def test_a_vocabulary_with_gaps(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 9}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = "a b b a " * 20
    train(tmp_path, replace(MINI, steps=1), PreTrainedTokenizerFast(tokenizer_object=tokenizer), text, text)
    assert load(tmp_path)[0].config.vocab_size == 10


def test_masked_recipes_say_which_mark_they_need(tmp_path):
    model = small_model(hidden=16, context=64)
    with pytest.raises(ValueError, match="the tokenizer has no mask token: start from a model that has one"):
        train_masked_diffusion(MASKED, tmp_path, (model, character_tokenizer()), ([TALE], [OTHER]))
    larger = with_marks()
    larger.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="the tokenizer has ids up to 97, the model only 97 embeddings: resize them"):
        train_masked_diffusion(MASKED, tmp_path, (model, larger), ([TALE], [OTHER]))
    endless = with_marks()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no token for the end of a sequence, with which every answer ends: set its eos_token"):
        train_masked_diffusion(replace(MASKED, data="tasks", examples=4), tmp_path, (model, endless))


def test_padding_falls_back_to_the_end_of_sequence():
    tokenizer = with_marks()
    examples = task_examples(tokenizer, 4)
    with_pad = TaskBatches(examples, tokenizer, 1, 4, prompt_length=128)[0]
    tokenizer.pad_token = None
    without = TaskBatches(examples, tokenizer, 1, 4, prompt_length=128)[0]
    assert bool((~with_pad["valid"]).any())
    assert torch.equal(without["ids"], with_pad["ids"].masked_fill(~with_pad["valid"], tokenizer.eos_token_id))


def test_a_model_loaded_for_a_recipe_can_be_padded(monkeypatch):
    lame, model = character_tokenizer(), small_model()
    del model.config.mask_token_id, model.config.shift_logits  # a causal model
    lame.pad_token = None
    monkeypatch.setattr("decodelab.core.zoo.load", lambda name, device: (model, lame))
    assert learn2pd._load("x")[1].pad_token == "<eos>"
    lame.pad_token = None
    assert load_causal("x")[1].pad_token == "<eos>"


# models that are not causal

CAUSAL = [  # recipe, and the field that names a causal model
    ("grpo", "model"),
    ("dpo", "model"),
    ("hyperfitting", "model"),
    ("drafter", "target"),
    ("specdec-pp", "target"),
    ("specdec-pp", "drafter"),
    ("prm", "model"),
    ("tasks", "start_from"),
    ("s2d", "target"),
    ("longspec", "target"),
    ("lud", "model"),
    ("hmm", "target"),
]


@pytest.mark.parametrize(("name", "field"), CAUSAL)
def test_a_masked_model_is_refused_before_anything_starts(name, field, tmp_path):
    found = recipes()[name]
    with pytest.raises(ValueError, match=r"^tasks-mdm is no causal language model .*choose one, such as tales or tasks$"):
        found.train(replace(found.settings, **{field: "tasks-mdm"}), tmp_path)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"] == []


def test_every_recipe_that_names_a_causal_model_is_tried():
    masked = {"cj-grpo", "tasks-learn2pd", "tales-mdm", "tasks-mdm"}  # these start from masked models, or make them
    masked.add("msd")  # which needs one that sees pictures
    named = ("model", "target", "drafter", "start_from")
    fields = {(name, f) for name, found in recipes().items() for f in named if isinstance(getattr(found.settings, f, None), str)}
    assert {pair for pair in fields if pair[0] not in masked} == set(CAUSAL)


def test_a_bert_without_a_word_in_its_configuration_is_refused(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 97}
    for is_decoder in (True, False):
        torch.manual_seed(0)
        BertLMHeadModel(BertConfig(**shape, is_decoder=is_decoder, initializer_range=0.5)).save_pretrained(tmp_path)
        character_tokenizer().save_pretrained(tmp_path)
        if is_decoder:
            assert not load_causal(str(tmp_path))[0].training
        else:
            with pytest.raises(ValueError, match="is no causal language model"):
                load_causal(str(tmp_path))


# texts


@pytest.mark.parametrize(
    ("text", "held_out", "message"),
    [
        ("short", OTHER, "the training text has 6 tokens, too few for blocks of 16: give more text or a smaller block"),
        (TALE, "short", "the held-out text has 6 tokens, too few for blocks of 16"),
        ("", OTHER, "the training text has 1 tokens, too few"),
        (TALE, "", "the held-out text has 1 tokens, too few"),
        ("x" * 15, OTHER, "the training text has 16 tokens, too few for blocks of 16"),
    ],
)
def test_texts_that_are_too_short(text, held_out, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, text=text, held_out=held_out)
    assert not (tmp_path / "run").exists()  # at the door
    with pytest.raises(ValueError, match=message):
        train_masked_diffusion(MASKED, tmp_path, (small_model(hidden=16, context=64), with_marks_but_no_bos()), ([text], [held_out]))


def with_marks_but_no_bos():
    tokenizer = character_tokenizer()
    tokenizer.mask_token = "~"
    return tokenizer


def test_no_text_at_all(tmp_path):
    with pytest.raises(ValueError, match="the training text has 0 tokens"):
        train_language_model(MINI, character_tokenizer(), [], [OTHER], tmp_path)
    with pytest.raises(ValueError, match="no held-out text to score"):
        held_out_figures(small_model(), character_tokenizer(), [""])
    with pytest.raises(ValueError, match="the held-out text has 6 tokens, too few for blocks of 16"):
        held_out_bound(small_model(), with_marks_but_no_bos(), ["short"], block=16)
    with pytest.raises(ValueError, match="too few for blocks of 256"):
        TextBatches(np.arange(256), 1, 1)


# the folder


def test_two_runs_in_one_folder(tmp_path):
    with TrainingRun(tmp_path / "run", MINI):
        with pytest.raises(ValueError, match=r"another process is training in .*run: wait for it, or name another folder"):
            train(tmp_path)
        with TrainingRun(tmp_path / "other", MINI):
            pass
    (tmp_path / "run/.lock").write_text("999999")  # a file alone is no lock
    train(tmp_path)


def test_the_lock_is_given_back_after_an_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "RunTrainer", lambda *a, **k: RunTrainer(*a, **k, callbacks=[KilledAt(1)]))
        for _ in range(2):
            with pytest.raises(Killed):
                train(tmp_path)


def test_the_lock_is_given_back_while_the_run_is_still_known(tmp_path):
    # at once, not when the object is collected as garbage
    refused, killed, run = (TrainingRun(tmp_path / "run", MINI) for _ in range(3))
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model that this run has not written"):
        refused.__enter__()
    (tmp_path / "config.json").unlink()
    with pytest.raises(Killed), killed:
        raise Killed
    with run:
        pass
    with TrainingRun(tmp_path / "run", MINI):
        assert not (refused.lock.is_locked or killed.lock.is_locked or run.lock.is_locked)


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    (tmp_path / "kept").mkdir()
    for folder, left in ((tmp_path / "new" / "run", []), (tmp_path / "kept" / "run", ["kept"])):
        with pytest.raises(ValueError, match="bad data"), TrainingRun(folder, MINI):
            raise ValueError("bad data")
        assert sorted(p.name for p in tmp_path.iterdir() if p.name == folder.parent.name) == left
        assert not folder.exists()
    data = tmp_path / "new" / "run" / "data"
    with pytest.raises(ValueError, match="bad data"), TrainingRun(data.parent, MINI):
        raise ValueError(f"bad data of {data.write_text('made')} characters")
    assert data.exists()


RECIPES = ["cj-grpo", "dpo", "drafter", "dupmae", "grpo", "hyperfitting", "prm", "specdec-pp", "tasks", "tasks-learn2pd", "tasks-mdm"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_a_model_of_another_origin_is_left_alone(name, file, tmp_path):
    # the only copy of what the recipe starts from, say
    found, before = recipes()[name], {Path(file): b"weights", Path("config.json"): b"{}"}
    for path, content in before.items():
        (tmp_path / path).write_bytes(content)
    start = {"model": "tasks-mdm"} if name == "cj-grpo" else {}
    for _ in range(2):  # the first try leaves no trace that the second could take for a run
        with pytest.raises(ValueError, match="holds a model that this run has not written: name another folder, or move the model away"):
            found.train(replace(found.settings, **start), tmp_path)
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_a_folder_whose_run_was_deleted_is_left_alone(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "model")
    train(tmp_path / "model")  # the same command finds everything done
    shutil.rmtree(tmp_path / "model/run")
    before = contents(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model that this run has not written"):
        train(tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_a_finished_run_whose_checkpoints_are_all_damaged_begins_again(whole, tmp_path, monkeypatch):
    out = tmp_path / "model"
    shutil.copytree(whole[0], out)
    for checkpoint in (out / "run").glob("checkpoint-*"):
        cut(checkpoint / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "RunTrainer", lambda *a, **k: RunTrainer(*a, **k, callbacks=[KilledAt(2)]))
        with pytest.raises(Killed):
            train(out)
    assert names(out / "run") == []
    train(out)
    assert weights(out) == weights(whole[0])


def test_a_second_process_of_the_same_run_needs_no_lock(tmp_path, monkeypatch):
    with TrainingRun(tmp_path / "run", MINI):
        monkeypatch.setenv("RANK", "1")
        with TrainingRun(tmp_path / "run", MINI):
            pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError, match=r"cannot write to .*file.*: name another folder"):
            train(place)


class Disk:
    def __init__(self, free):
        self.free = free


def test_a_disk_that_is_too_small_is_seen_before_the_first_step(tmp_path, monkeypatch):
    size = 12 * sum(p.numel() for p in MINI.model(character_tokenizer()).parameters())
    for free, checkpoints in ((3 * size - 1, 0), (size - 1, 2)):
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder, free=free: Disk(free))
        for step in range(1, checkpoints + 1):
            (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
            monkeypatch.setattr(runs, "_remove_damaged", lambda folder: None)
            monkeypatch.setattr(runs, "_refuse_others", lambda *a: None)
        with pytest.raises(OSError, match="MB left and its checkpoints need .* MB: make space, or name another folder"):
            train(tmp_path)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: Disk(size))
    train(tmp_path)


@pytest.mark.parametrize("how", ["error number", "safetensors", "torch"])
def test_a_disk_that_is_full_later_is_named(how, whole, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    errors = {
        "error number": OSError(errno.ENOSPC, "No space left on device"),
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "torch": RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"),
    }
    plain = RunTrainer._save_optimizer_and_scheduler

    def save(self, folder):
        if self.state.global_step == 8:
            monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: Disk(100))
            raise errors[how]
        plain(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_save_optimizer_and_scheduler", save)
        with pytest.raises(OSError, match=r"no space left for .*run \(checkpoint-4 is kept\): make space, and the same command goes on"):
            train(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tmp_path)
    assert weights(tmp_path) == weights(whole[0])


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(RunTrainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(tmp_path)


# Ctrl-C


class Interrupted(TrainerCallback):
    "Ctrl-C in step 3, and once more when asked."

    def __init__(self, times=1):
        self.times = times

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interrupted(monkeypatch):
    "Runs that meet Ctrl-C."
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)  # as in a process of its own

    def patch(times=1):
        monkeypatch.setattr(language_model, "RunTrainer", lambda *a, **k: RunTrainer(*a, **k, callbacks=[Interrupted(times)]))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield patch
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_the_step_it_came_in(interrupted, whole, tmp_path, capsys, monkeypatch):
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert "stopping after this step, with a checkpoint; Ctrl-C again stops at once" in capsys.readouterr().err
    assert names(tmp_path / "run") == ["checkpoint-3"]
    assert not (tmp_path / "training.json").exists()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.default_int_handler  # as before
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    figures = train(tmp_path)
    assert weights(tmp_path) == weights(whole[0])
    assert [(s["from_step"], s["to_step"]) for s in figures["segments"]] == [(0, 3), (3, 8)]


def test_ctrl_c_waits_for_the_last_step_on_the_same_rollouts():
    # a checkpoint between them would make a resumed run draw others
    interrupt, stops = runs._Interrupt(), []
    interrupt.asked = True
    for step in range(1, 7):
        control = TrainerControl()
        interrupt.on_step_end(SimpleNamespace(num_iterations=3), SimpleNamespace(global_step=step), control)
        assert control.should_save == control.should_training_stop
        stops.append(control.should_save)
    assert stops == [False, False, True, False, False, True]


def test_ctrl_c_twice_stops_at_once(interrupted, tmp_path):
    interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert names(tmp_path / "run") == []


# data that take long to make


def test_kept_tensors_are_whole_and_of_what_was_asked_for(tmp_path, monkeypatch):
    path, made = tmp_path / "run/data.safetensors", torch.arange(5)
    assert kept_tensors(path, model="a") is None
    keep_tensors(path, {"made": made}, model="a", seed="0")
    for asked in ({"model": "a"}, {"model": None, "seed": "0"}, {}):
        assert torch.equal(kept_tensors(path, **asked)["made"], made)
    assert kept_tensors(path, model="b") is None
    assert kept_tensors(path, other="c") is None

    def killed(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kept, "save_file", killed)
        with pytest.raises(Killed):
            keep_tensors(path, {"made": made + 1}, model="a")
    assert torch.equal(kept_tensors(path, model="a")["made"], made)
    (path.parent / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"run holds checkpoints of another run .data\.safetensors was made with another model, seed."):
        kept_tensors(path, model="b", seed="1")
    cut(path, 0.8)
    assert kept_tensors(path, model="a") is None


def test_data_that_were_cut_are_made_again(finished, pair, tmp_path):
    for name, files in (("head", ["data"]), ("filter", ["records", "final"])):
        out = finished[name][0]
        shutil.copytree(out / "run", tmp_path / name / "run")
        shutil.rmtree(tmp_path / name / "run/checkpoint-8")
        for file in files:
            cut(tmp_path / name / f"run/{file}.safetensors")
        CASES[name](tmp_path / name, pair)
        assert weights(tmp_path / name) == weights(out)


def test_examples_of_another_tokenizer_of_the_same_size_are_not_taken(tmp_path):
    path = tmp_path / "examples.safetensors"
    first = task_examples(with_marks(), 3, path=path)
    cut(path, 0.9)
    assert torch.equal(task_examples(with_marks(), 3, path=path).tokens, first.tokens)
    mirrored = with_marks()
    words = mirrored.get_vocab()
    again = Tokenizer(models.BPE(vocab={w: len(words) - 1 - i for w, i in words.items()}, merges=[]))
    again.pre_tokenizer = mirrored.backend_tokenizer.pre_tokenizer
    other = PreTrainedTokenizerFast(tokenizer_object=again, pad_token="<pad>", eos_token="<eos>")
    assert len(other) == len(mirrored)
    assert torch.equal(task_examples(other, 3, path=path).tokens, task_examples(other, 3).tokens)


def test_data_of_another_model_of_the_same_name_are_not_taken(pair, tmp_path):
    tokenizer, third = character_tokenizer(), small_model(hidden=16, context=128, seed=7)
    path = tmp_path / "data.safetensors"
    first, _ = cached_data(*pair, tokenizer, HEAD, path)
    for models_ in ((third, pair[1]), (pair[0], third)):
        other, _ = cached_data(*models_, tokenizer, HEAD, path)
        assert not torch.equal(other.labels.nan_to_num(), first.labels.nan_to_num())
    records = cached_records(FILTER, tmp_path, (pair[0], tokenizer))
    assert not torch.equal(cached_records(FILTER, tmp_path, (third, tokenizer)).c, records.c)


@pytest.mark.parametrize(
    "other",
    [
        lambda m: small_model(hidden=16, seed=1),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.lm_head,
        lambda m: {"lm_head.weight": 1},
    ],
)
def test_fingerprints_tell_models_apart(other):
    first = fingerprint(small_model(hidden=16))
    assert first == fingerprint(small_model(hidden=16))
    assert first != fingerprint(other(small_model(hidden=16)))


# what is written and said


def test_json_holds_no_word_for_no_number(tmp_path):
    figures = {"a": math.nan, "b": [1.0, math.inf, (-math.inf, "nan")], "c": {"d": np.float64("nan"), "e": np.float32(0.5)}}
    expected = {"a": None, "b": [1.0, None, [None, "nan"]], "c": {"d": None, "e": 0.5}}
    assert kept.write_training(tmp_path, figures) == expected
    assert strict_json(tmp_path / "training.json") == expected


def test_cards_show_figures_that_are_none(finished, tmp_path):
    # one held-out record has no area under a curve, a constant answer no correlation
    for name, card, change in (
        ("head", specdec_pp.head_card, lambda f: f["held_out"].update(correlation=None)),
        ("filter", learn2pd.filter_card, lambda f: f["held_out"]["masked"].update(auc=None)),
    ):
        figures = strict_json(finished[name][0] / "training.json")
        change(figures)
        (tmp_path / "training.json").write_text(json.dumps(figures))
        text = card(tmp_path)
        assert "correlation: -\n" in text if name == "head" else " | - | " in text


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("tales", model_card),
        ("tasks-mdm", masked_diffusion.denoiser_card),
        ("tales-specdec-pp", specdec_pp.head_card),
        ("tasks-learn2pd", learn2pd.filter_card),
        ("tales-longspec", longspec.longspec_card),
        ("shapes-vlm", model_card),
        ("shapes-msd", msd.msd_card),
    ],
)
def test_cards_of_the_zoo_can_be_written_again(name, card, tmp_path):
    try:
        stored = zoo_path(name) / "training.json"
    except ValueError as error:
        pytest.skip(str(error))
    figures = json.loads(stored.read_text()) | {"remarks": ["It was stopped twice."]}
    (tmp_path / "training.json").write_text(json.dumps(figures))
    assert "It was stopped twice." in card(tmp_path)


@pytest.mark.parametrize("bar", [True, False])
def test_training_says_nothing_on_standard_output(bar, tmp_path, capsys, pair):
    call = (small_model(hidden=16, context=64), with_marks()), ([TALE], [OTHER])
    train_masked_diffusion(replace(MASKED, steps=2), tmp_path, *call, evaluate=0, disable_tqdm=not bar)
    said = capsys.readouterr()
    assert said.out == ""
    assert "step 2 of 2: loss " in said.err
    assert "step 2 of 2: eval loss " in said.err


@pytest.mark.parametrize(("seconds", "terminal", "shown"), [(1.0, True, True), (0.01, True, False), (1.0, False, False)])
def test_what_takes_long_before_the_first_step_has_a_bar_on_a_terminal(seconds, terminal, shown, monkeypatch):
    clock, screen = itertools.count(0.0, seconds), io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress(range(20), "texts")) == list(range(20))
    assert ("texts" in screen.getvalue()) == shown


# recipes


@pytest.mark.parametrize("recipe", [MINI, MASKED, HEAD, FILTER], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": math.nan}, "learning_rate must be a number, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be a number, got inf"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"name": 3}, "name must be a text, got 3"),
        ({"steps": 0}, "steps, batch_size, save_every.* must be positive"),
        ({"save_every": 0}, "steps, batch_size, save_every.* must be positive"),
    ],
)
def test_settings_that_no_run_can_have(recipe, setting, message):
    with pytest.raises(ValueError, match=message):
        replace(recipe, **setting)


@pytest.mark.parametrize("name", list(recipes()))
def test_seeds_and_names_that_no_recipe_can_have(name):
    settings = recipes()[name].settings
    for seed in [f for f in vars(settings) if f.endswith("seed")]:
        for value in (-1, 2**31, 2**64, 10**30):
            with pytest.raises(ValueError, match=f"{seed} must be from 0 to 2147483647, got {value}"):
                replace(settings, **{seed: value})
        replace(settings, **{seed: 2**31 - 1})
    with pytest.raises(ValueError, match="steps must be at most 2147483647"):
        replace(settings, steps=2**31)
    for text in ("", " ", "../../x", "a/b", "a\\b", "..", ".x", "-x", "two words", "x\n"):
        with pytest.raises(ValueError, match="name must be letters, digits, '_', '-' and '.', such as my-model, got "):
            replace(settings, name=text)
    replace(settings, name="Modèle_2.1-b")


def test_the_largest_seed_trains(tmp_path):
    assert train(tmp_path, replace(MINI, seed=2**31 - 1, steps=1))["steps"] == 1


@pytest.mark.parametrize("text", ["\N{SUPERSCRIPT TWO}", "1,\N{CIRCLED DIGIT ONE}", "a", "", "1,", "-1", "1.5", "1_0", "9" * 5000])
def test_lists_of_numbers(text):
    assert runs.whole_numbers("layers", " 0, 12,\N{ARABIC-INDIC DIGIT THREE}") == [0, 12, 3]
    with pytest.raises(ValueError, match="layers must be numbers with commas between, such as 0,1, got "):
        runs.whole_numbers("layers", text)


def test_folders_that_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-4", "checkpoint-\N{SUPERSCRIPT TWO}", "checkpoint-x", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert [c.name for c in kept.checkpoints(tmp_path)] == ["checkpoint-4"]


def test_settings_of_one_recipe():
    with pytest.raises(ValueError, match="compile must be true or false, got 'false'"):
        replace(MINI, compile="false")
    with pytest.raises(ValueError, match="layers, heads, vocab_size and block must be positive"):
        replace(MINI, layers=0)
    for field in ("warmup", "weight_decay"):
        with pytest.raises(ValueError, match="warmup and weight_decay not negative"):
            replace(MINI, **{field: -1})
    with pytest.raises(ValueError, match="w_rej must be positive and D at least 0, got 0.0 and 1"):
        replace(HEAD, w_rej=0.0)
    check_recipe(replace(MINI, steps=np.int64(3), learning_rate=np.float64(0.1)))


# the command


def command(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    return result


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books/tales"
    folder.mkdir(parents=True)
    for number, text in ((1, TALE), (7128, OTHER)):
        (folder / f"{number}.txt").write_text(text)
    manifest = [{"gutenberg_id": n, "title": f"Book {n}", "file": f"tales/{n}.txt"} for n in (1, 7128)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.parent


SMALL = "hidden_size=8 intermediate_size=8 layers=1 heads=1 vocab_size=300 block=16 batch_size=2 warmup=1 save_every=4 eval_every=4"


def arguments(books, out, *more):
    settings = [a for s in SMALL.split() for a in ("--set", s)]
    return ["train", "tales-draft", "--data-dir", books, "--out", out, *settings, *more]


def test_the_result_of_the_command_is_all_there_is_on_standard_output(books, tmp_path):
    done = command(*arguments(books, tmp_path / "model", "--steps", 8, "--json"))
    figures = json.loads(done.stdout)
    assert figures == strict_json(tmp_path / "model/training.json")
    assert figures["tokens_seen"] == 256
    less = command(*arguments(books, tmp_path / "model", "--steps", 4, "--json"))
    assert json.loads(less.stdout)["tokens_seen"] == 256
    refused = command(*arguments(books, tmp_path / "model", "--set", "seed=1", "--json"), code=2)
    assert refused.stdout == ""
    assert "error: " in refused.stderr and "seed was 0 and is 1" in refused.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_says_what_is_kept_after_ctrl_c(as_json, interrupted, books, tmp_path):
    interrupted()
    out = tmp_path / "model"
    done = command(*arguments(books, out, "--steps", 8, *(["--json"] if as_json else [])), code=130)
    assert f"stopped: the checkpoint of step 3 of 8 is in {out / 'run'}; the same command goes on from there" in " ".join(
        done.stderr.split()
    )
    if as_json:
        found = json.loads(done.stdout)
        (point,) = found.pop("curve")
        assert found == {"interrupted": True, "step": 3, "planned_steps": 8}
        assert point["step"] == 3 and 0 < point["loss"] < 10
    else:
        assert "loss" in done.stdout and "held-out loss" in done.stdout


def test_the_command_shows_the_curve_so_far(interrupted, books, tmp_path, monkeypatch):
    out = tmp_path / "model"
    command(*arguments(books, out, "--steps", 4))
    monkeypatch.setattr(
        Interrupted,
        "on_step_begin",
        lambda self, args, state, control, **_: os.kill(os.getpid(), signal.SIGINT) if state.global_step == 6 else None,
    )
    interrupted()
    done = command(*arguments(books, out, "--steps", 8), code=130)
    state = TrainerState.load_from_json(str(out / "run/checkpoint-7/trainer_state.json"))
    (loss,) = (r["eval_loss"] for r in state.log_history if "eval_loss" in r)
    assert "held-out loss" in done.stdout and f"{loss:.2f}" in done.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_does_not_speak_of_checkpoints_that_are_not_there(as_json, books, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "encode_stream", interrupt)
    done = command(*arguments(books, tmp_path / "model", *(["--json"] if as_json else [])), code=130)
    assert "stopped before the first checkpoint: the same command begins again" in done.stderr
    assert "checkpoint of step" not in done.stderr and str(tmp_path / "model/run") not in done.stderr
    assert json.loads(done.stdout) == {"interrupted": True, "step": 0, "planned_steps": None, "curve": []} if as_json else done.stdout == ""


def test_the_command_refuses_in_one_line(books, tmp_path):
    out = tmp_path / "model"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for more, message in (
        (("--set", "magic=1"), "recipe tales-draft has no setting 'magic'; it has: name, hidden_size"),
        (("--set", "steps=2.5"), "steps=2.5 does not fit: steps is a whole number"),
        (("--set", "block=1000", "--set", "context=1000"), "the training text has"),
        (("--set", "learning_rate=1e30", "--steps", "40", "--set", "save_every=100"), "the run has diverged"),
        (("--tokenizer", tmp_path / "empty"), "empty holds no tokenizer that transformers can read"),
    ):
        done = command(*arguments(books, out, *more), code=2)
        assert done.stdout == ""
        (line,) = (text for text in done.stderr.splitlines() if text.startswith("error: "))
        assert message in line
    done = command(*arguments(books, tmp_path / "file/model", "--steps", "1"), code=2)
    assert "cannot write to" in done.stderr
