"GRPO: advantage, loss and KL against TRL, finite differences and enumeration; rollouts by any decoder; killed and resumed."

import itertools
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from toys import SAMPLING_RULES, TOY_PROMPT, V, character_tokenizer, exact_probs, fit, small_model
from transformers import BatchEncoding, TrainerCallback

pytest.importorskip("trl")

from decodelab.experiments.training.grpo import CarelessAddition, RejectionTrainer, interval, shuffled
from decodelab.lab.tasks.text import Example, Task
from decodelab.sampling.base import Autoregressive
from decodelab.sampling.min_p import MinP
from decodelab.speculative.drafters import NGram, PromptLookup
from decodelab.training import grpo
from decodelab.training.checkpoints import fingerprint
from decodelab.training.grpo import (
    GRPORecipe,
    Rollouts,
    exercises,
    group_advantages,
    grpo_loss,
    grpo_trainer,
    kl_estimate,
    pass_at_k,
    rollout_decoder,
    sampled_logps,
    train_grpo,
    verified_reward,
)
from decodelab.training.recipes import recipes


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
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def a_trainer(start, tmp_path, recipe=TOY, **more):
    recipe = replace(recipe, model=str(start))
    model, tokenizer = grpo.load(recipe.model)
    examples = exercises(Early(), 8)
    return grpo_trainer(recipe, model, tokenizer, tmp_path, examples, verified_reward(Early(), examples), **more), examples


def rows(examples, n=2, G=4):
    return [{"prompt": e.prompt, "exercise": i} for i, e in enumerate(examples[:n]) for _ in range(G)]


# advantage, loss, KL


def test_advantages_are_those_of_trl_and_nothing_moves_a_group_without_spread():
    r = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    found = group_advantages(r, 4)
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
    assert torch.allclose(batch["advantages"], group_advantages(scores[0][:, 0], 4), atol=1e-4)


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


def test_pass_at_k_counts_subsets():
    for n, c in itertools.product(range(1, 6), range(6)):
        for k in range(1, n + 1):
            if c <= n:
                draws = [i < c for i in range(n)]
                share = [any(s) for s in itertools.combinations(draws, k)]
                assert pass_at_k([c], n, k)[0] == pytest.approx(sum(share) / len(share))
    with pytest.raises(ValueError, match="k must be 1 to n = 8"):
        pass_at_k([0], 8, 9)


# rollouts


def as_trainer(model, processing_class):
    return SimpleNamespace(model=model, processing_class=processing_class, accelerator=SimpleNamespace(unwrap_model=lambda m: m))


@pytest.mark.parametrize("decoder", [Autoregressive(), PromptLookup(), NGram()], ids=lambda d: type(d).__name__)
def test_the_hook_returns_ids_and_their_log_probabilities_at_the_temperature(decoder):
    model, tokenizer = small_model(spread=0.15), character_tokenizer()
    prompts = ["abc", "abcabcabc", "x"]
    torch.manual_seed(0)
    out = Rollouts(decoder, temperature=0.5, max_completion_length=20)(prompts * 8, as_trainer(model, tokenizer))
    assert out["prompt_ids"] == tokenizer(prompts * 8).input_ids
    ended = 0
    for asked, written, logps in zip(*(out[k] for k in ("prompt_ids", "completion_ids", "logprobs"))):
        ids = torch.tensor([asked + written])
        p = (model(ids).logits[0, len(asked) - 1 : -1] / 0.5).log_softmax(-1)
        assert torch.allclose(torch.tensor(logps), p.gather(-1, ids[0, len(asked) :, None])[:, 0], atol=1e-4)
        assert tokenizer.eos_token_id not in written[:-1]
        ended += written[-1] == tokenizer.eos_token_id
    assert ended > 0
    at_one = torch.tensor(sampled_logps(model, out["prompt_ids"], out["completion_ids"], 1.0)[0])
    assert not torch.allclose(at_one, torch.tensor(out["logprobs"][0]), atol=1e-2)


def test_what_a_models_configuration_cuts_is_not_cut_here():
    model, tokenizer = small_model(), character_tokenizer()
    model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=9.0)
    out = Rollouts(Autoregressive(), max_completion_length=4)(["abc"] * 12, as_trainer(model, tokenizer))
    assert len({tuple(c) for c in out["completion_ids"]}) > 6


def drawn(decoder, temperature, draws=4000):
    "Counts of the first three tokens that the hook returns, and their exact distribution at temperature 0.6."
    model = small_model(vocab=V)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def encode(prompts, **_):
        ids = TOY_PROMPT.expand(len(prompts), -1)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    torch.manual_seed(5)
    counts = {}
    for _ in range(draws // 4000):
        for row in Rollouts(decoder, temperature, 3)(["-"] * 4000, as_trainer(model, encode))["completion_ids"]:
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    return counts, exact_probs(model, SAMPLING_RULES["temperature"][1])


@pytest.mark.parametrize(
    ("decoder", "temperature", "same"),
    [
        (Autoregressive(), 0.6, True),
        (PromptLookup(), 0.6, True),
        (NGram(), 0.6, True),
        (PromptLookup(), 0.8, False),  # negative controls
        (MinP(0.2), 0.6, False),
    ],
)
def test_rollouts_of_a_lossless_decoder_have_the_policys_distribution(decoder, temperature, same):
    assert (fit(*drawn(decoder, temperature)) > 1e-3) == same


def test_decoders_that_cannot_write_rollouts_are_refused():
    for name, why in (("momentum", "is deterministic"), ("llada", "decodes masked models"), ("nobody", "is not registered")):
        with pytest.raises(ValueError, match=f"decoder '{name}' {why}, .*choose one of .*autoregressive"):
            GRPORecipe(decoder=name)
    with pytest.warns(UserWarning, match="min_p does not draw from the model's own distribution"):
        rollout_decoder("min_p", small_model())
    assert rollout_decoder("prompt_lookup", small_model(), auto=True).k == "auto"


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
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        GRPORecipe(**change)


def test_exercises_are_new_and_a_longer_list_goes_on():
    task = grpo.GRPO_TASKS["arithmetic"]
    held = exercises(task, 30, seed=1)
    some, more = exercises(task, 20, 0, held), exercises(task, 40, 0, held)
    assert more[:20] == some
    assert not {e.prompt for e in more} & {e.prompt for e in held}

    class One(Early):
        def make(self, rng):
            return Example("early", "a", "a")

    with pytest.raises(ValueError, match="too few exercises for 3 new ones"):
        exercises(One(), 3, 0, exercises(One(), 1))


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
    kept = grpo.load(str(tmp_path))[0]
    assert fingerprint(kept) != fingerprint(grpo.load(str(start))[0])


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
    model, tokenizer = grpo.load(recipe.model)
    examples = exercises(Early(), 8)
    trainer = grpo_trainer(
        recipe, model, tokenizer, tmp_path, examples, lambda completions, **_: [1.0, 0, 0, 0, 0, 0, 1, 1], RejectionTrainer
    )
    assert trainer._generate_and_score_completions(rows(examples))["advantages"].tolist() == [1, 0, 0, 0, 0, 0, 1, 1]


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
