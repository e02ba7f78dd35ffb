"GRPO: advantage, loss and KL against TRL, finite differences and enumeration; killed and resumed; the arms of the experiment."

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from toys import character_tokenizer, small_model
from transformers import TrainerCallback

pytest.importorskip("trl")

from decodelab.core.zoo import load
from decodelab.experiments.training.grpo import CarelessAddition, RejectionTrainer, interval, shuffled
from decodelab.lab.tasks.text import Example, Task
from decodelab.training import grpo
from decodelab.training.checkpoints import fingerprint
from decodelab.training.grpo import GRPORecipe, RolloutGRPOTrainer, grpo_loss, grpo_trainer, kl_estimate, train_grpo, without_dropout
from decodelab.training.recipes import recipes
from decodelab.training.rewarded import exercises, group_advantages, held_out_exercises, verified_reward


@dataclass(frozen=True)
class Early(Task):
    "Write letters of the first half of the alphabet: a random model earns something, and can learn it."

    @property
    def name(self):
        return "early"

    def make(self, rng: random.Random):
        return Example(self.name, "".join(rng.choices("abcdefghij", k=rng.randint(3, 9))), "a")

    def score(self, example, output):
        return sum("!" <= c <= "O" for c in output) / max(1, len(output))


TOY = GRPORecipe(
    "toy",
    num_generations=4,
    batch_size=8,
    num_iterations=2,
    max_completion_length=6,
    steps=8,
    save_every=4,
    learning_rate=1e-3,
    held_out=4,
    samples=3,
)


@pytest.fixture(autouse=True)
def _no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A folder with a random model that ends a text now and then."
    folder = tmp_path_factory.mktemp("start")
    model = small_model(spread=0.15)
    model.generation_config.eos_token_id = [1, *range(80, 97)]
    del model.config.mask_token_id, model.config.shift_logits  # a causal model
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def a_trainer(start, tmp_path, recipe=TOY, **more):
    recipe = replace(recipe, model=str(start))
    model, tokenizer = load(recipe.model)
    examples = exercises(Early(), 8)
    return grpo_trainer(recipe, model, tokenizer, tmp_path, examples, verified_reward(Early(), examples), **more), examples


def rows(examples, n=2, G=4):
    return [{"prompt": e.prompt, "exercise": i} for i, e in enumerate(examples[:n]) for _ in range(G)]


# advantage, loss, KL


def test_advantages_are_those_of_trl_and_nothing_moves_a_group_without_spread():
    r = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    found, _ = group_advantages(r, 4, "group")
    first = (r[:4] - r[:4].mean()) / (torch.tensor([0.75, 0.25, 0.25, 0.25]).square().sum() / 3).sqrt()
    assert torch.allclose(found[:4], first, atol=1e-3)
    assert found[4:].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("control", [None, "no clip", "KL turned round", "advantage turned round"])
def test_value_and_gradient_are_those_of_trl(control, start, tmp_path):
    recipe = replace(TOY, epsilon=0.02, beta=0.5, temperature=0.7)
    trainer, examples = a_trainer(start, tmp_path, recipe)
    torch.manual_seed(3)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(rows(examples))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    on, mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), batch["completion_mask"]
    assert mask.float().mean() < 1  # completions of several lengths
    model = trainer.model
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)  # the policy has moved since the rollout
    theirs = trainer._compute_loss(model, batch)
    theirs.backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    new = mask.shape[1]
    logits = model(input_ids=ids, attention_mask=on).logits[:, -new - 1 : -1] / 0.7
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    old, ref = batch["old_per_token_logps"], batch["ref_per_token_logps"]
    ratio = ((logps - old).exp() * mask)[mask.bool()]
    assert ((ratio - 1).abs() > 0.02).any()  # clipping counts
    settings = {"epsilon": 1e9 if control == "no clip" else 0.02, "beta": 0.5}
    if control == "KL turned round":
        ref = 2 * logps.detach() - ref
    advantages = -batch["advantages"] if control == "advantage turned round" else batch["advantages"]
    ours = grpo_loss(logps, old, ref, advantages, mask, **settings)
    ours.backward()
    same = torch.isclose(ours, theirs, atol=1e-5) and all(
        torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(model.parameters(), gradient)
    )
    assert bool(same) == (control is None)


def test_the_advantages_in_trls_batch_are_ours(start, tmp_path):
    trainer, examples = a_trainer(start, tmp_path)
    scores = []
    inner = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a: scores.append(inner(*a)) or scores[-1]
    batch = trainer._generate_and_score_completions(rows(examples))
    assert torch.allclose(batch["advantages"], group_advantages(scores[0][:, 0], 4, "group")[0], atol=1e-4)


def test_gradient_against_finite_differences():
    torch.manual_seed(0)
    logps, old, ref = (-torch.rand(3, 5, dtype=torch.double) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    A = torch.tensor([1.3, -0.4, 0.2], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, ref, A, mask), logps.requires_grad_())


def test_at_the_first_update_it_is_the_plain_policy_gradient():
    logps = (-torch.rand(2, 3)).requires_grad_()
    mask, A = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([2.0, -1.0])
    grpo_loss(logps, logps.detach(), logps.detach(), A, mask).backward()
    expected = torch.tensor([[-2 / 3] * 3, [1.0, 0, 0]]) / 2
    assert torch.allclose(logps.grad, expected)


def test_the_kl_estimate_is_unbiased_and_never_negative():
    torch.manual_seed(1)
    log_p, log_ref = (torch.randn(50, 7, dtype=torch.double).log_softmax(-1) for _ in range(2))
    estimate = kl_estimate(log_p, log_ref)
    assert (estimate >= 0).all()
    exact = (log_p.exp() * (log_p - log_ref)).sum(-1)
    assert torch.allclose((log_p.exp() * estimate).sum(-1), exact)
    turned = kl_estimate(log_ref, log_p)  # the negative control: d with the wrong sign
    assert not torch.allclose((log_p.exp() * turned).sum(-1), exact, atol=1e-2)


def test_the_gradient_of_the_kl_estimate_is_another_divergence_unless_the_ratio_stands_before_it():
    torch.manual_seed(2)
    logits, log_ref = torch.randn(7, dtype=torch.double).requires_grad_(), torch.randn(7, dtype=torch.double).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    p = log_p.detach().exp()
    exact, turned = (log_p.exp() * (log_p - log_ref)).sum(), (log_ref.exp() * (log_ref - log_p)).sum()
    estimate = kl_estimate(log_p, log_ref)
    mean, with_factor = (p * estimate).sum(), (p * (log_p - log_p.detach()).exp() * estimate).sum()
    of = {
        name: torch.autograd.grad(x, logits, retain_graph=True)[0]
        for name, x in locals().items()
        if name in ("exact", "turned", "mean", "with_factor")
    }
    assert torch.allclose(of["mean"], of["turned"]) and not torch.allclose(of["mean"], of["exact"], atol=1e-2)
    assert torch.allclose(of["with_factor"], of["exact"])


def test_a_group_weighs_most_at_one_half_and_more_than_undivided_elsewhere():
    groups = torch.stack([(torch.arange(8) < k).float() for k in range(1, 8)]).flatten()
    divided, plain = (group_advantages(groups, 8, scale)[0].view(7, 8).abs().sum(1) for scale in ("group", "none"))
    share = torch.arange(1, 8) / 8
    assert torch.allclose(divided, 2 * (8 * 7 * share * (1 - share)).sqrt(), rtol=1e-3)
    assert divided.argmax() == 3
    gain = divided / plain
    assert gain.argmin() == 3 and gain[0] > 1.4 * gain[3]


# the policy


def dropping(model, rate=0.5):
    "The model with dropout in its attention, in training mode."
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = rate
    return model.train()


def test_dropout_is_off_in_old_probabilities_and_in_the_loss(start, tmp_path):
    recipe = replace(TOY, model=str(start), temperature=0.7)
    model, tokenizer = load(recipe.model)
    dropping(model)
    examples = exercises(Early(), 8)
    trainer = grpo_trainer(recipe, model, tokenizer, tmp_path, examples, verified_reward(Early(), examples))
    trainer.model.train()
    torch.manual_seed(3)
    batch = trainer._generate_and_score_completions(rows(examples))
    assert "sampling_per_token_logps" not in batch
    ids, on = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask"))
    logits = load(recipe.model)[0](input_ids=ids, attention_mask=on).logits[:, -batch["completion_ids"].shape[1] - 1 : -1] / 0.7
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    mask = batch["completion_mask"].bool()
    assert torch.allclose(batch["old_per_token_logps"][mask], logps[mask], atol=1e-4)
    assert model.training


def test_dropout_of_modules_and_of_functions_is_switched_off():
    model = small_model("gpt2").train()
    model.transformer.drop.p = 0.9
    ids = torch.arange(2, 12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    llama = dropping(small_model())
    assert not torch.equal(llama(ids).logits, llama(ids).logits)
    without_dropout(llama)
    assert torch.equal(llama(ids).logits, llama(ids).logits)


def test_optimiser_and_means_are_those_of_the_page(start, tmp_path):
    args = a_trainer(start, tmp_path)[0].args
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.0, 1.0)
    assert args.optim.startswith("adamw_torch") and args.lr_scheduler_type == "constant"
    assert (args.loss_type, args.scale_rewards, args.importance_sampling_level, args.use_bias_correction_kl) == (
        "grpo",
        "group",
        "token",
        False,
    )
    assert not args.mask_truncated_completions and not args.sync_ref_model


# runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "poetry"}, "unknown task 'poetry'; known: arithmetic, countdown"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"batch_size": 10, "num_generations": 4}, "divide batch_size, got 4 and 10"),
        ({"beta": -0.1}, "beta must not be negative"),
        ({"epsilon": 1.0}, "epsilon lie in"),
        ({"temperature": 0.0}, "temperature be positive"),
        ({"num_iterations": 3, "steps": 6, "save_every": 4}, "multiples of num_iterations = 3: checkpoints hold no rollouts"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"samples": 0}, "must be positive"),
        ({"decoder": "momentum"}, "decoder 'momentum' is deterministic"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        GRPORecipe(**change)


class KilledAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise SystemError("killed")


@pytest.mark.parametrize("decoder", ["autoregressive", "prompt_lookup"])
def test_killed_and_resumed_is_uninterrupted(decoder, start, tmp_path, monkeypatch):
    recipe = replace(TOY, model=str(start), decoder=decoder)
    whole = train_grpo(recipe, tmp_path / "whole", Early())
    assert [line["step"] for line in whole["history"]] == list(range(1, 9))
    with monkeypatch.context() as patch:
        made = grpo.grpo_trainer

        def with_killer(*args):
            trainer = made(*args)
            trainer.add_callback(KilledAt(6))
            return trainer

        patch.setattr(grpo, "grpo_trainer", with_killer)
        with pytest.raises(SystemError, match="killed"):
            train_grpo(recipe, tmp_path / "killed", Early())
    resumed = train_grpo(recipe, tmp_path / "killed", Early())
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert [s["from_step"] for s in resumed["segments"]] == [0, 4]
    assert [h.get("reward") for h in resumed["history"]] == [h.get("reward") for h in whole["history"]]
    assert resumed["after"] == whole["after"]
    assert resumed["before"] == whole["before"]


def test_held_out_exercises_are_no_seeds_training_exercises(start, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(grpo, "held_out_exercises", lambda *a: seen.append(held_out_exercises(*a)) or seen[-1])
    train_grpo(replace(TOY, model=str(start), steps=2, save_every=2, num_iterations=1), tmp_path, Early())
    assert len(seen[0]) == TOY.held_out
    for seed in range(3):
        assert seen[0] != exercises(Early(), TOY.held_out, seed)


def test_another_setting_is_another_run(start, tmp_path):
    recipe = replace(TOY, model=str(start), steps=4)
    train_grpo(recipe, tmp_path, Early())
    with pytest.raises(ValueError, match="beta was 0.04 and is 0.1"):
        train_grpo(replace(recipe, beta=0.1), tmp_path, Early())


def test_it_learns_and_says_where_the_time_went(start, tmp_path):
    recipe = replace(TOY, model=str(start), num_iterations=1, batch_size=32, num_generations=8, steps=25, save_every=25, learning_rate=3e-3)
    figures = train_grpo(replace(recipe, held_out=16), tmp_path, Early())
    reward = [line["reward"] for line in figures["history"]]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.15
    assert figures["after"]["pass@1"] > figures["before"]["pass@1"]
    for line in figures["history"]:
        assert all(line[f"seconds/{part}"] > 0 for part in ("rollout", "scoring", "update"))
    kept = load(str(tmp_path))[0]
    assert fingerprint(kept) != fingerprint(load(str(start))[0])


def test_the_command_line_finds_it():
    found = recipes()["grpo"]
    assert (found.notebook, found.year) == ("training/grpo", 2024)
    assert isinstance(found.settings, GRPORecipe)


# what the experiment compares


def test_shuffled_rewards_stay_in_their_group():
    dealt = shuffled(lambda completions: [float(c) for c in completions], 4, seed=0)
    found = [dealt(completions="12345678") for _ in range(50)]
    assert all(sorted(f[:4]) == [1, 2, 3, 4] and sorted(f[4:]) == [5, 6, 7, 8] for f in found)
    assert len({f[0] for f in found}) == 4


def test_rejection_sampling_follows_right_completions_only(start, tmp_path):
    recipe = replace(TOY, model=str(start))
    model, tokenizer = load(recipe.model)
    examples = exercises(Early(), 8)
    trainer = grpo_trainer(
        recipe, model, tokenizer, tmp_path, examples, lambda completions, **_: [1.0, 0, 0, 0, 0, 0, 1, 1], RejectionTrainer
    )
    assert trainer._generate_and_score_completions(rows(examples))["advantages"].tolist() == [1, 0, 0, 0, 0, 0, 1, 1]


def test_rejection_sampling_reads_the_rewards_of_its_own_process(start, tmp_path, monkeypatch):
    trainer, examples = a_trainer(start, tmp_path, kind=RejectionTrainer)
    trainer.earned = torch.arange(16.0)[:, None]  # gathered: 8 of each process
    monkeypatch.setattr(RolloutGRPOTrainer, "_generate_and_score_completions", lambda *_: {"advantages": torch.zeros(8)})
    trainer.accelerator = SimpleNamespace(process_index=1)
    assert trainer._generate_and_score_completions(rows(examples))["advantages"].tolist() == list(range(8, 16))


def test_the_careless_teacher_forgets_half_of_the_carries():
    task = CarelessAddition()
    made = task.examples(2000, seed=0)
    right = {carry: [task.score(e, e.answer) for e in made if e.meta["carry"] == carry] for carry in (False, True)}
    assert set(right[False]) == {1.0}
    assert 0.45 < sum(right[True]) / len(right[True]) < 0.55
    assert task.score(Example(task.name, "47+85=", ""), "231") == 1
    assert task.score(Example(task.name, "47+85=", ""), "132") == 0


def test_intervals_know_seeds_and_exercises():
    x = torch.zeros(3, 200)
    assert interval(x + 0.5) == [0.5, 0.5, 0.5]
    x[0] = 1.0  # one seed alone
    value, low, high = interval(x)
    assert (value, low) == (pytest.approx(1 / 3), 0.0) and high >= 2 / 3


def test_a_trained_policy_has_a_card(start, tmp_path):
    small = replace(TOY, model=str(start), num_iterations=1, steps=2, save_every=2, task="arithmetic")
    figures = recipes()["grpo"].train(small, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| pass@1 | {figures['before']['pass@1']:.3f} | {figures['after']['pass@1']:.3f} |" in card
    assert "decodelab train grpo --set name=toy" in card and f'load("{tmp_path}")' in card
