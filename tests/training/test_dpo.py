"DPO: the loss against TRL and by hand, pairs, a run that is killed and resumed."

import math
from dataclasses import replace

import pytest
import torch
from toys import character_tokenizer, small_model

pytest.importorskip("trl")

from decodelab.training.dpo import DPO_REWARDS, DPORecipe, SentenceReward, dpo_loss, dpo_trainer, drawn, pairs_of, train_dpo
from decodelab.training.recipes import recipes

TOY = DPORecipe(
    "toy", prompts=6, samples=4, max_completion_length=5, batch_size=2, steps=4, save_every=2, held_out=4, learning_rate=1e-3, stop="a"
)


@pytest.fixture(autouse=True)
def _no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(DPO_REWARDS, "people", remainder)


def remainder(texts):
    "A reward that differs among random texts."
    return [float(sum(map(ord, text)) % 5) for text in texts]


def test_loss_by_hand():
    found = dpo_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), beta=0.5)
    assert float(found) == pytest.approx((math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(1.0))) / 2)


@pytest.mark.parametrize("control", [None, "pair turned round", "another beta"])
def test_value_and_gradient_are_those_of_trl(control, tmp_path):
    model, reference, tokenizer = small_model(), small_model(), character_tokenizer()
    texts = drawn(model, tokenizer, ["once upon", "a king who"], replace(TOY, samples=6), seed=1)
    pairs = pairs_of(texts, tokenizer, remainder)
    assert len(pairs) == 2
    trainer = dpo_trainer(TOY, model, tokenizer, tmp_path, pairs)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    theirs = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
    theirs.backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    def ratio(pair, key):
        ids, start = torch.tensor([pair["prompt_ids"] + pair[key]]), len(pair["prompt_ids"])
        p, q = (m(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).sum() for m in (model, reference))
        return p - q.detach()

    sides = [torch.stack([ratio(pair, key) for pair in pairs]) for key in ("chosen_ids", "rejected_ids")]
    ours = dpo_loss(*(sides[::-1] if control == "pair turned round" else sides), 0.5 if control == "another beta" else TOY.beta)
    ours.backward()
    same = torch.allclose(ours, theirs, rtol=1e-4) and all(
        torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(model.parameters(), gradient)
    )
    assert same == (control is None)


def test_pairs():
    tokenizer = character_tokenizer()
    new = [tokenizer(t).input_ids for t in ("b", "bb", "bbb", "bb")]
    found = pairs_of([([5], new), ([6], [new[0], new[0]])], tokenizer, remainder)
    assert found == [{"prompt_ids": [5], "chosen_ids": new[2], "rejected_ids": new[1]}]


def test_rewards():
    reward = SentenceReward(("son", "wife"), wanted=2)
    assert reward(["A son, a wife.", "a son.", "a son, a wife", "sons."]) == [1.0, 0.5, 0.0, 0.0]
    assert SentenceReward(("son",), 1, finished=False)(["a son", "."]) == [1.0, 0.0]


class Killed(BaseException):
    "What ends the process."


def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    from decodelab.training import dpo

    whole = train_dpo(TOY, tmp_path / "whole", models=(small_model(), character_tokenizer()))
    step = dpo.PairTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(dpo.PairTrainer, "training_step", dies)
    with pytest.raises(Killed):
        train_dpo(TOY, tmp_path / "cut", models=(small_model(), character_tokenizer()))
    monkeypatch.setattr(dpo.PairTrainer, "training_step", step)
    again = train_dpo(TOY, tmp_path / "cut", models=(small_model(), character_tokenizer()))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert again["steps"] == whole["steps"] == 4
    assert again["reward_after"] == whole["reward_after"]
    assert whole["pairs"] > 1
    card = (tmp_path / "whole/README.md").read_text(encoding="utf-8")
    assert f"| reward | {whole['reward_before']:.3f} | {whole['reward_after']:.3f} |" in card and "decodelab train dpo --set" in card


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": "kindness"}, "unknown reward 'kindness'; known: people"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"samples": 1}, "samples at least 2"),
        ({"prompts": 0}, "must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DPORecipe(**fields)


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="wanted must be at least 1"):
        SentenceReward((), 1)
    with pytest.raises(ValueError, match="draw more samples"):
        dpo_trainer(TOY, small_model(), character_tokenizer(), tmp_path, [])
    assert recipes()["dpo"].notebook == "training/dpo"
