"""Training of a nested drafter: the loss by hand, gradients of every exit, the control with one exit, kill and resume, what is stored, bad input."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toys import character_tokenizer, left_pad, plain, random_prompts, small_model
from transformers import LlamaConfig, LlamaForCausalLM

training = pytest.importorskip("decodelab.training.s2d", exc_type=ImportError)
pytest.importorskip("peft")
from decodelab.speculative.layer_drafter import layer_drafter, load_drafter
from decodelab.speculative.nested import exit_logits, final_norm, split
from decodelab.speculative.s2d import S2D

MINI = training.S2DRecipe(
    "mini", exits="1,2", r=2, alpha=4, block=16, batch_size=2, steps=8, warmup=1, save_every=4, eval_every=4
)  # fmt: skip
TALE, OTHER = "once upon a time a fox met a wolf in the wood. " * 30, "a king had three sons, and the youngest was a fool. " * 6


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    from decodelab.training import language_model

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_DATA", "")
    monkeypatch.setattr(language_model, "fast_bfloat16", lambda: False)


@pytest.fixture(scope="module")
def pair():
    tokenizer = character_tokenizer()
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer.get_vocab()), eos_token_id=1, pad_token_id=0, **shape)).eval()
    return model, tokenizer


def train(settings, out, pair):
    return training.train_nested(settings, out, pair, ([TALE], [OTHER]))


# the loss


def test_the_loss_by_hand():
    torch.manual_seed(0)
    logits, labels = [torch.randn(2, 5, 7) for _ in range(3)], torch.randint(0, 7, (2, 5))
    labels[1, 2:] = -100
    each = []
    for z in logits:
        terms = [-z[b, t].log_softmax(-1)[labels[b, t + 1]] for b in range(2) for t in range(4) if labels[b, t + 1] >= 0]
        each.append(torch.stack(terms).mean())
    assert float(training.sorted_loss(logits, labels)) == pytest.approx(float(sum(each) / 3), rel=1e-6)
    assert float(training.sorted_loss(logits[2:], labels)) == pytest.approx(float(each[2]), rel=1e-6)


def test_every_exit_teaches_the_layers_below_it_and_only_those(pair):
    model = copy.deepcopy(pair[0])
    norm = model.model.norm
    labels = torch.randint(2, 90, (2, 9))

    def touched(exits):
        model.zero_grad()
        logits = exit_logits(model(labels, output_hidden_states=True), exits, norm, model.lm_head)
        training.sorted_loss(logits[:1] if len(exits) > 1 else logits, labels).backward()
        return [layer.mlp.up_proj.weight.grad is not None and bool(layer.mlp.up_proj.weight.grad.any()) for layer in model.model.layers]

    assert touched((1, 3)) == [True, False, False]
    assert touched((2, 3)) == [True, True, False]
    assert touched((3,)) == [True, True, True]


def test_the_trainers_loss_is_the_mean_of_the_truncated_models(pair, tmp_path):
    model, ids = pair[0], torch.randint(2, 90, (2, 9))
    trainer = training.SortedTrainer(copy.deepcopy(model), training._arguments(MINI, tmp_path, model), eval_dataset=[{}])
    trainer.exits, trainer.place = (1, 2, 3), final_norm(trainer.model)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
        parts = [layer_drafter(model, range(d), copies=False)(ids, labels=ids).loss for d in (1, 2, 3)]
    assert float(loss) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-4)


# runs


def test_a_run_improves_every_exit_and_its_control_the_last(pair, tmp_path):
    longer = replace(MINI, steps=40, learning_rate=0.02, save_every=20, eval_every=20)
    before = {k: v.clone() for k, v in pair[0].state_dict().items()}
    sorted_ = train(longer, tmp_path / "soft", pair)
    plain_ = train(replace(longer, exits="2"), tmp_path / "sft", pair)
    nats = {name: {e: f["nats_per_token"] for e, f in run["held_out"].items()} for name, run in (("soft", sorted_), ("sft", plain_))}
    assert nats["soft"]["1"] < sorted_["untrained"]["1"]["nats_per_token"] - 0.1
    assert nats["soft"]["2"] < sorted_["untrained"]["2"]["nats_per_token"] - 0.1
    assert list(nats["sft"]) == ["2"]
    tokenizer = pair[1]
    truncated = training.exit_figures(load_drafter(tmp_path / "sft", pair[0]), (1, 2), tokenizer, [OTHER], 16)
    assert truncated["1"]["nats_per_token"] > nats["soft"]["1"]
    assert all(before[k].equal(v) for k, v in pair[0].state_dict().items())  # the model that gave its layers
    assert sorted_["tokens_seen"] == 40 * 2 * 16


def test_what_is_stored_is_what_was_measured(pair, tmp_path):
    figures = train(MINI, tmp_path, pair)
    made = json.loads((tmp_path / "config.json").read_text())
    assert (made["layers"], made["exits"], made["all_tokens"]) == ([0, 1], [1, 2], True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == MINI.target
    drafter = load_drafter(tmp_path, pair[0])
    assert drafter.config.exits == [1, 2]
    assert S2D(drafter).depths == (1, 2)
    assert drafter.get_input_embeddings().weight.data_ptr() == pair[0].get_input_embeddings().weight.data_ptr()
    assert {w.dtype for w in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = training.exit_figures(drafter, (1, 2), pair[1], [OTHER], MINI.block)
    assert again == figures["held_out"]
    prompts = random_prompts(2, vocab=90, seed=2)
    out = S2D(drafter, tau=0.1).generate(pair[0], **left_pad(prompts), max_new_tokens=12, do_sample=False)
    assert [c.tolist() for c in out.continuations] == [plain(pair[0], p, 12) for p in prompts]


def test_killed_and_resumed_is_uninterrupted(pair, tmp_path, monkeypatch):
    whole = train(MINI, tmp_path / "whole", pair)
    step = training.SortedTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.SortedTrainer, "training_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(MINI, tmp_path / "killed", pair)
    again = train(MINI, tmp_path / "killed", pair)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(a[k].equal(b[k]) for k in a)
    assert again["held_out"] == whole["held_out"]
    assert [(s["from_step"], s["to_step"]) for s in again["segments"]] == [(0, 4), (4, 8)]
    with pytest.raises(ValueError, match="another run"):
        train(replace(MINI, exits="2"), tmp_path / "whole", pair)


def test_the_card(pair, tmp_path):
    train(MINI, tmp_path, pair)
    card = training.nested_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    assert "decodelab train s2d --set name=mini --set exits=1,2 --set r=2" in card
    assert "It can be left after 1,2 layers" in card
    with pytest.raises(FileNotFoundError, match=r"holds no training\.json"):
        training.nested_card(tmp_path / "nowhere")


# bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exits": "1;2"}, "exits must be numbers with commas between, such as 0,1, got '1;2'"),
        ({"exits": ""}, "exits must be numbers with commas between"),
        ({"r": 0}, "r, alpha and block must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        training.S2DRecipe(**fields)


@pytest.mark.parametrize(("exits", "message"), [("2,1", "exits must be ascending"), ("1,9", "layers must be numbers from 0 to 2")])
def test_exits_that_the_model_does_not_have(pair, tmp_path, exits, message):
    with pytest.raises(ValueError, match=message):
        train(replace(MINI, exits=exits), tmp_path, pair)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_model_that_cannot_be_cut(tmp_path):
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be cut between its layers"):
        train(MINI, tmp_path, (small_model("gpt2", vocab=len(tokenizer.get_vocab())), tokenizer))
    with pytest.raises(ValueError, match="too few for blocks of 16"):
        training.train_nested(MINI, tmp_path, (small_model(), tokenizer), (["a"], [OTHER]))


def test_the_zoo(tales):
    "The shipped drafter: exits, size, and that every exit is better than before."
    from decodelab.core.zoo import zoo_path

    folder = zoo_path("tales-s2d")
    figures = json.loads((folder / "training.json").read_text())
    assert (folder / "adapter_model.safetensors").stat().st_size < 1.5e6
    assert all(figures["held_out"][e]["nats_per_token"] < raw["nats_per_token"] for e, raw in figures["untrained"].items())
    drafter = load_drafter("tales-s2d", tales[0])
    assert len(split(drafter, drafter.config.exits)) == len(figures["held_out"]) == 3


def test_the_command():
    from decodelab.cli import _recipe

    recipe, train_ = _recipe("s2d", ["exits=4", "steps=7"])
    assert (recipe.depths, recipe.steps) == ((4,), 7)
    assert train_ is training.train_s2d
