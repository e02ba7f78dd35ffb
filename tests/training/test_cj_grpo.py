"""CJ-GRPO: states, exact identities, the trainer's two methods, negative controls, runs that are killed."""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

pytest.importorskip("trl")

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.denoiser import Denoiser
from decodelab.diffusion.eoser_ass import ASS, EOSER
from decodelab.diffusion.remdm import ReMDM
from decodelab.experiments.diffusion.eoser_ass import toy_kind
from decodelab.experiments.training.cj_grpo import TinyPolicy, all_trajectories, gradients, policy_loss, trajectory_probs
from decodelab.training import cj_grpo, layout_toy
from decodelab.training.cj_grpo import CJGRPORecipe, CJGRPOTrainer, greedy_rewards, train_cj_grpo
from decodelab.training.layout_toy import layout_kind, layout_model, layout_prompts, layout_reward, layout_texts, layout_tokenizer
from decodelab.training.recipes import recipes
from decodelab.training.trajectory import (
    Rollout,
    Terms,
    denoise_with,
    recorded_rollout,
    rollout_logps,
    token_logps,
    token_weights,
    trajectory_loss,
    until_eos,
    views,
)

L, SAMPLED = 16, {"do_sample": True, "top_k": 0, "max_new_tokens": 16}
DECODERS = {
    "eoser + ass": (ASS(eoser=True), [1, 2, 4, 9]),
    "ass in blocks": (ASS(block_num=3), [1, 2, 4, 9]),
    "eoser": (EOSER(steps=4), [4] * 4),
    "random": (LLaDA(remasking="random"), [1] * 16),
    "blocks": (LLaDA(block_length=4, steps=8), [2] * 8),
    "left to right": (LLaDA(remasking="left_to_right"), [1] * 16),
}


@pytest.fixture(scope="module")
def tokenizer():
    return layout_tokenizer()


@pytest.fixture(scope="module")
def model():
    return layout_model(hidden_size=16, seed=3).eval()


@pytest.fixture(autouse=True)
def _in_peace(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("RANK", raising=False)
    torch.manual_seed(0)


def prompts(tokenizer, n=6):
    return tokenizer([row["prompt"] for row in layout_prompts(n)], return_tensors="pt").input_ids


def gradient(model, loss):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in found])


# states


@pytest.mark.parametrize("name", DECODERS)
def test_states_are_those_of_the_rollout(name, model, tokenizer, monkeypatch):
    decoder, sizes = DECODERS[name]
    seen = []
    plain = type(decoder).select

    def select(self, step):
        seen.append(step.canvas.ids.clone())
        return plain(self, step)

    monkeypatch.setattr(type(decoder), "select", select)
    rollout = recorded_rollout(decoder, model, prompts(tokenizer), **SAMPLED)
    assert len(seen) == len(sizes)
    for s, canvas in enumerate(seen):
        assert torch.equal(rollout.state(s), canvas)
    assert torch.equal(rollout.state(len(sizes)), rollout.ids)
    # the positions of the steps are disjoint and cover all
    counts = torch.stack([(rollout.step_map == s).sum(1) for s in range(len(sizes))], 1)
    assert counts.tolist() == [sizes] * len(rollout.ids)
    assert sum(asked.long() for _, asked in views(rollout)).eq(1).all()


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_probabilities_are_those_with_which_the_decoder_wrote(model, tokenizer, cfg_scale):
    decoder, ids = ASS(eoser=True, cfg_scale=cfg_scale, trace=True), prompts(tokenizer)
    torch.manual_seed(1)
    rollout = recorded_rollout(decoder, model, ids, **SAMPLED)
    torch.manual_seed(1)
    out = replace_early_stop(decoder).generate(model, ids, **SAMPLED)
    with torch.no_grad():
        p = rollout_logps(denoise_with(Denoiser(model), ids.shape[1], cfg_scale=cfg_scale), rollout).exp()
    off_by_one = rollout_logps_at_the_next_state(model, rollout, cfg_scale)
    for row, step in enumerate(out.trace):
        written = torch.tensor(step.info["confidence"])
        assert torch.allclose(p[row, : len(written)], written.float(), atol=1e-5)
    assert not torch.allclose(off_by_one, p, atol=1e-2)  # negative control


def replace_early_stop(decoder):
    found = copy.copy(decoder)
    found.early_stop = False
    return found


@torch.no_grad()
def rollout_logps_at_the_next_state(model, rollout, cfg_scale=0.0):
    denoise, found = denoise_with(Denoiser(model), rollout.prompt_length, cfg_scale=cfg_scale), torch.zeros(rollout.step_map.shape)
    for s in range(int(rollout.step_map.max()) + 1):
        logps = token_logps(denoise(rollout.state(s + 1)), rollout.tokens)
        found = torch.where(rollout.step_map == s, logps, found)
    return found.exp()


def test_padding_changes_nothing(model, tokenizer):
    short, denoiser = prompts(tokenizer, 2), Denoiser(model)
    padded = torch.nn.functional.pad(short, (3, 0), value=tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(short), (3, 0))
    torch.manual_seed(2)
    alone = recorded_rollout(ASS(), model, short, **SAMPLED)
    torch.manual_seed(2)
    together = recorded_rollout(ASS(), model, padded, mask, **SAMPLED)
    assert torch.equal(alone.step_map, together.step_map) and torch.equal(alone.tokens, together.tokens)
    whole = torch.nn.functional.pad(mask, (0, L), value=1)
    with torch.no_grad():
        one = rollout_logps(denoise_with(denoiser, 5), alone)
        other = rollout_logps(denoise_with(denoiser, 8, whole), together)
    assert torch.allclose(one, other, atol=1e-5)


def test_decoders_whose_states_one_map_does_not_tell(model, tokenizer):
    with pytest.raises(ValueError, match="masks positions again"):
        recorded_rollout(ReMDM(), model, prompts(tokenizer), **SAMPLED)

    class Cutting(LLaDA):
        def stop(self, step, chosen):
            return torch.full_like(step.rows, step.canvas.prompt + 8)

    with pytest.raises(ValueError, match="cuts texts off"):
        recorded_rollout(Cutting(), model, prompts(tokenizer), **SAMPLED)


# exact identities


@pytest.mark.parametrize("rule", ["random", "best"])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_enumerated_reward(rule, seed):
    policy = TinyPolicy(seed)
    reward = torch.randn(27, dtype=torch.double).repeat_interleave(6)
    assert float(trajectory_probs(policy, all_trajectories(), rule).sum().detach()) == pytest.approx(1, abs=1e-12)
    found = gradients(policy, reward, rule)
    assert float((found["cj"] - found["exact"]).abs().max()) < 1e-10
    assert float((found["one_step"] - found["exact"]).abs().max()) > 1e-4


def test_the_confidence_of_the_drawn_token_biases_the_gradient():
    policy, reward = TinyPolicy(0), torch.randn(27, dtype=torch.double).repeat_interleave(6)
    assert float(trajectory_probs(policy, all_trajectories(), "drawn").sum().detach()) == pytest.approx(1, abs=1e-12)
    found = gradients(policy, reward, "drawn")
    assert float((found["cj"] - found["exact"]).abs().max()) > 1e-4


def test_a_state_too_late_has_another_gradient():
    class Late(Rollout):
        def state(self, s):
            return super().state(s + 1)

    policy, rollout = TinyPolicy(1), all_trajectories()
    late = Late(rollout.ids, rollout.step_map, rollout.mask_id)
    reward = torch.randn(27, dtype=torch.double).repeat_interleave(6)
    P = trajectory_probs(policy, rollout, "random").detach()
    terms = Terms(P * (reward - (P * reward).sum()) * len(P))
    right, wrong = (gradient(policy, -3 * trajectory_loss(policy, r, terms)[0]) for r in (rollout, late))
    assert torch.allclose(right, gradients(policy, reward, "random")["exact"], atol=1e-10)
    assert float((right - wrong).abs().max()) > 1e-4


def test_several_tokens_a_step_are_weighed_by_one_over_k():
    # random pairs, then the rest: with w_i = 1 / L the gradient is proportional to the exact one, with 1 / (S k) it is not
    policy = TinyPolicy(2)
    texts = all_trajectories().ids.unique(dim=0)
    ids, maps = texts.repeat(3, 1), torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).repeat_interleave(27, 0)
    rollout, reward = Rollout(ids, maps, 3), torch.randn(27, dtype=torch.double).repeat(3)
    logps = rollout_logps(policy, rollout)
    P = logps.sum(1).exp() / 3  # each pair is chosen with probability 1 / 3
    exact = gradient(policy, (P * reward).sum())
    A = (P * (reward - (P * reward).sum())).detach()
    even = gradient(policy, (A * rollout_logps(policy, rollout).sum(1)).sum())
    weighed = gradient(policy, -trajectory_loss(policy, rollout, Terms(A * len(A)))[0])
    assert float(P.sum().detach()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(even, exact, atol=1e-10)
    assert float(torch.cosine_similarity(weighed, exact, 0)) < 1 - 1e-6
    expected = gradient(policy, (A[:, None] * rollout_logps(policy, rollout) * token_weights(maps, dtype=torch.double)).sum())
    assert torch.allclose(weighed, expected, atol=1e-12)


def random_terms(rollout, scale=0.3, **more):
    "Advantages and old log-probabilities far enough away to be clipped."
    logps = rollout_logps(TinyPolicy(0), rollout).detach()
    return Terms(torch.randn(len(logps), dtype=torch.double), logps + scale * torch.randn_like(logps), **more)


def test_one_step_for_all_tokens_is_the_objective_at_once():
    texts = all_trajectories().ids.unique(dim=0)
    rollout, policy = Rollout(texts, torch.zeros_like(texts), 3), TinyPolicy(0)
    for counted in (None, torch.rand(texts.shape) < 0.7):
        terms = random_terms(rollout, counted=counted)
        along, at_once = (trajectory_loss(policy, rollout, terms, objective)[0] for objective in ("cj", "one_step"))
        assert float(along) == float(at_once)
        assert torch.equal(gradient(policy, along), gradient(policy, at_once))
    walked = all_trajectories()  # and not when there are several steps
    terms = random_terms(walked)
    assert float(trajectory_loss(policy, walked, terms)[0]) != float(trajectory_loss(policy, walked, terms, "one_step")[0])


def test_left_to_right_is_grpo_of_an_autoregressive_model():
    texts = all_trajectories().ids.unique(dim=0)
    rollout, policy = Rollout(texts, torch.arange(3).expand_as(texts), 3), TinyPolicy(0)
    terms = random_terms(rollout, epsilon=(0.2, 0.2))
    total = 0.0
    for row, text in enumerate(texts):  # p(x_t | x_<t), token by token
        for t in range(3):
            context = torch.tensor([*text[:t].tolist(), *[3] * (3 - t)])
            p = policy(context[None])[0, t].softmax(-1)[text[t]]
            rho, A = p / terms.old[row, t].exp(), terms.advantages[row]
            total = total - torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A) / 3 / len(texts)
    loss, facts = trajectory_loss(policy, rollout, terms)
    assert float(loss) == pytest.approx(float(total), abs=1e-12)
    assert torch.allclose(gradient(policy, loss), gradient(policy, total), atol=1e-12)
    assert 0 < float(facts["clip_ratio"]) < 1


def test_kl_term():
    rollout, policy = all_trajectories(), TinyPolicy(0)
    now = rollout_logps(policy, rollout).detach()
    ref = now + 0.2
    with_kl, facts = trajectory_loss(policy, rollout, Terms(torch.zeros(162, dtype=torch.double), now, ref, beta=0.5))
    assert float(facts["kl"]) == pytest.approx(math.exp(0.2) - 1.2, abs=1e-12)
    assert float(with_kl) == pytest.approx(0.5 * float(facts["kl"]), abs=1e-12)
    same, _ = trajectory_loss(policy, rollout, Terms(torch.zeros(162, dtype=torch.double), now, now, beta=0.5))
    assert float(same) == 0 and float(gradient(policy, same).abs().max()) < 1e-15


def test_steps_are_sent_backward_one_by_one():
    rollout, policy, events = all_trajectories(), TinyPolicy(0), []
    terms = random_terms(rollout)
    whole = gradient(policy, trajectory_loss(policy, rollout, terms)[0])

    def denoise(canvas):
        events.append("forward")
        return policy(canvas)

    def backward(loss):
        events.append("backward")
        loss.backward()

    loss, _ = trajectory_loss(denoise, rollout, terms, backward=backward)
    loss.backward()
    assert events == ["forward", "backward"] * 2 + ["forward"]
    assert torch.allclose(torch.cat([p.grad.flatten() for p in policy.parameters()]), whole, atol=1e-12)
    assert float(loss) == pytest.approx(float(trajectory_loss(policy, rollout, terms)[0]), abs=1e-12)


def test_learning_raises_the_expected_reward():
    policy, rollout = TinyPolicy(0), all_trajectories()
    reward = (rollout.ids == rollout.ids[:, :1]).all(1).double()
    optimizer = torch.optim.Adam(policy.parameters(), 0.02)
    rewards = []
    for _ in range(30):
        loss, J = policy_loss(policy, rollout, reward, "random", "cj")
        rewards.append(float(J))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert rewards[-1] > rewards[0] + 0.2


# weights and advantages


def test_weights_and_what_they_leave_out():
    steps = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
    w = token_weights(steps, dtype=torch.double)
    assert w.tolist() == [[pytest.approx(x) for x in row] for row in ([1 / 3, 1 / 6, 1 / 6, 1 / 3], [1 / 4] * 4)]
    counted = torch.tensor([[True, True, False, False], [False] * 4])
    assert token_weights(steps, counted).tolist() == [[0.5, 0.5, 0, 0], [0] * 4]
    text = torch.tensor([[5, 1, 7, 1], [5, 6, 7, 8], [1, 1, 1, 1]])
    assert until_eos(text, torch.tensor([1, 8])).sum(1).tolist() == [2, 4, 1]


def test_arguments_of_the_loss():
    rollout, policy, hidden = all_trajectories(), TinyPolicy(0), torch.zeros(162, 0, dtype=torch.bool)
    for words, objective, more in (
        ("unknown objective 'all': use one of cj", "all", {}),
        ("hidden_prompt is needed", "diffu", {}),
        ("no meaning for the others; got 'cj'", "cj", {"hidden_prompt": hidden}),
    ):
        with pytest.raises(ValueError, match=words):
            trajectory_loss(policy, rollout, Terms(torch.ones(162)), objective, **more)
    with pytest.raises(ValueError, match="beta=0.1 needs"):
        trajectory_loss(policy, rollout, Terms(torch.ones(162), beta=0.1))


# the trainer

TINY = CJGRPORecipe(
    name="tiny", batch_size=8, G=4, mu=2, steps=8, save_every=4, eval_every=4, held_out=4, learning_rate=3e-3, pretrain_steps=1
)


def digits_reward(completions, **_):
    "A reward with spread on a random model."
    return [float(sum(c.count(d) for d in "02468")) for c in completions]


class Seen(CJGRPOTrainer):
    "Keeps the batches, losses and gradients of its updates, and stops when there are enough."

    kept = []
    wanted = 1

    def _compute_loss(self, model, inputs):
        model.zero_grad()
        loss = super()._compute_loss(model, inputs)
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        facts = {k: v[-1] for k, v in self._metrics["train"].items()}
        Seen.kept.append((inputs, float(loss), grad.clone(), facts))
        if len(Seen.kept) == Seen.wanted:
            raise Enough
        model.zero_grad()
        return (sum(p.sum() for p in model.parameters() if p.requires_grad) - loss.detach()) * 1e-3 + loss.detach()


class Enough(Exception):
    "All that a test wants to see."


def seen(tmp_path, model, tokenizer, recipe=TINY, updates=1, **changes):
    Seen.kept, Seen.wanted = [], updates
    with pytest.raises(Enough):
        train_cj_grpo(
            recipe, tmp_path, start=(copy.deepcopy(model), tokenizer), reward=digits_reward, kind=Seen, eval_strategy="no", **changes
        )
    return Seen.kept


@pytest.mark.parametrize("objective", ["cj", "one_step", "diffu"])
def test_first_update(objective, tmp_path, model, tokenizer):
    (batch, loss, grad, facts), (_, _, _, later) = seen(tmp_path, model, tokenizer, replace(TINY, objective=objective), 2)
    A = batch["advantages"]
    assert abs(float(A.mean())) < 1e-6 and A.abs().max() > 0  # the trainer has shuffled the groups
    assert facts["ratio"] == pytest.approx(1, abs=1e-6) and facts["clip_ratio"] == 0
    assert loss == pytest.approx(0, abs=1e-6)
    assert later["ratio"] != pytest.approx(1, abs=1e-6)  # negative control
    # the gradient is that of all rollouts, in one graph
    rollout = Rollout(torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["step_map"], tokenizer.mask_token_id)
    hidden = batch["hidden_prompt"][:, 0] if objective == "diffu" else None
    terms = Terms(A, counted=None if objective == "cj" else batch["text"])
    whole = trajectory_loss(denoise_with(Denoiser(model), 5), rollout, terms, objective, hidden)[0]
    assert torch.allclose(grad, gradient(model, whole), atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_accumulated_gradients_are_those_of_all_rollouts(beta, tmp_path, model, tokenizer):
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    batches = seen(tmp_path, model, tokenizer, replace(TINY, beta=beta), 2, **more)
    inputs = {k: torch.cat([b[k] for b, *_ in batches]) for k in ("prompt_ids", "completion_ids", "step_map", "advantages")}
    rollout = Rollout(torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), inputs["step_map"], tokenizer.mask_token_id)
    whole = trajectory_loss(denoise_with(Denoiser(model), 5), rollout, Terms(inputs["advantages"]))[0]
    assert len(rollout.ids) == 8 and inputs["advantages"].abs().max() > 0
    assert torch.allclose(batches[0][2] + batches[1][2], gradient(model, whole), atol=1e-6)


def with_dropout(tokenizer):
    found = layout_model(hidden_size=16, seed=3)
    for layer in found.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.3))
    return found


def test_dropout_is_off_and_the_mode_restored(tmp_path, tokenizer, monkeypatch):
    model = with_dropout(tokenizer)
    ((_, loss, _, facts),) = seen(tmp_path / "right", model, tokenizer)
    assert facts["ratio"] == pytest.approx(1, abs=1e-6) and loss == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(cj_grpo, "evaluating", lambda model: nullcontext())  # negative control
    ((_, loss, _, facts),) = seen(tmp_path / "wrong", model, tokenizer)
    assert abs(facts["ratio"] - 1) > 1e-3


def test_prompts_are_hidden_anew_in_each_inner_update(tmp_path, model, tokenizer):
    recipe = replace(TINY, objective="diffu", p_mask_prompt=0.5, batch_size=64)
    ((batch, _, _, _),) = seen(tmp_path, model, tokenizer, recipe)
    hidden = batch["hidden_prompt"]
    assert hidden.shape == (64, 2, 5) and batch["old_logps"].shape == (64, 2, L)
    assert abs(float(hidden.float().mean()) - 0.5) < 0.1 and not torch.equal(hidden[:, 0], hidden[:, 1])


def test_reference_and_beta(tmp_path, model, tokenizer):
    recipe = replace(TINY, beta=0.1)
    (batch, _, _, facts), (_, _, _, later) = seen(tmp_path, model, tokenizer, recipe, 2)
    assert torch.allclose(batch["ref_logps"], batch["old_logps"], atol=1e-5)
    assert facts["kl"] == pytest.approx(0, abs=1e-7) and later["kl"] > 1e-6


def test_adapters_are_switched_off_for_the_reference(tmp_path, model, tokenizer):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.add_(0.3)
    recipe = replace(TINY, beta=0.1)
    trainer_model = adapted
    Seen.kept, Seen.wanted = [], 1
    with pytest.raises(Enough):
        train_cj_grpo(recipe, tmp_path, start=(trainer_model, tokenizer), reward=digits_reward, kind=Seen, eval_strategy="no")
    batch = Seen.kept[0][0]
    # an adapter that comes with the model is the reference: TRL keeps a copy of it
    assert torch.allclose(batch["ref_logps"], batch["old_logps"], atol=1e-5)
    assert Seen.kept[0][3]["ratio"] == pytest.approx(1, abs=1e-6)


def test_mask_after_eos(tmp_path, model, tokenizer):
    grads = {}
    for choice in ("yes", "no"):
        ((batch, _, grads[choice], _),) = seen(tmp_path / choice, model, tokenizer, replace(TINY, mask_after_eos=choice))
    assert not bool(batch["text"].all())
    assert not torch.allclose(grads["yes"], grads["no"], atol=1e-6)


def test_evaluation_is_greedy(tmp_path, model, tokenizer):
    figures = train_cj_grpo(TINY, tmp_path, start=(copy.deepcopy(model), tokenizer), reward=digits_reward)
    last = [p["eval_reward"] for p in figures["rewards"] if "eval_reward" in p][-1]
    assert last == pytest.approx(figures["greedy_after"])
    trained = type(model).from_pretrained(tmp_path)
    rows = layout_prompts(4, 0, held_out=True)
    assert sum(greedy_rewards(ASS(eoser=True), trained, tokenizer, rows, reward=digits_reward)) / 4 == pytest.approx(last)
    assert trained.config.mask_token_id == tokenizer.mask_token_id


class Killed(BaseException):
    "Nobody catches this, as nobody catches a kill."


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def test_killed_and_resumed_is_as_if_nothing_had_happened(tmp_path, model, tokenizer, monkeypatch):
    def run(folder):
        return train_cj_grpo(TINY, folder, start=(copy.deepcopy(model), tokenizer), reward=digits_reward)

    whole = run(tmp_path / "whole")

    class Mortal(CJGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(KillAt(6))

    with pytest.raises(Killed):
        train_cj_grpo(TINY, tmp_path / "cut", start=(copy.deepcopy(model), tokenizer), reward=digits_reward, kind=Mortal)
    torch.manual_seed(99)
    resumed = run(tmp_path / "cut")
    assert [(s["from_step"], s["to_step"]) for s in resumed["segments"]] == [(0, 4), (4, 8)]
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert resumed["rewards"] == whole["rewards"] and resumed["curve"] == whole["curve"]
    assert whole["curve"] and len(whole["rewards"]) >= 4


WRONG = {
    "unknown objective": {"objective": "all"},
    "p_mask_prompt": {"p_mask_prompt": 1.0},
    "divide batch_size": {"G": 3},
    "multiple of mu": {"mu": 3},
    "epsilon and temperature": {"temperature": 0.0},
    "scale_rewards must be": {"scale_rewards": "std"},
    "unknown decoder": {"decoder": "greedy"},
    "unknown task 'poetry'; known: layouts, arithmetic, countdown": {"task": "poetry"},
    "unknown reward 'mine'": {"reward": "mine"},
    "the toy knows its two layouts only": {"task": "countdown"},
    "decoder_settings must be": {"decoder_settings": "eoser"},
    "remdm' masks positions again": {"decoder": "remdm", "decoder_settings": "{}"},
    "fields of ass": {"decoder_settings": '{"colour": 1}'},
    "must be positive": {"mu": 0},
    "learning_rate must be positive": {"learning_rate": 0.0},
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_settings(words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **WRONG[words])


@pytest.mark.parametrize(
    "changes",
    [{"importance_sampling_level": "sequence"}, {"delta": 4.0}, {"temperature": 0.0}, {"loss_type": "grpo"}, {"log_completions": True}],
)
def test_what_the_trainer_cannot_do(changes, tmp_path, model, tokenizer):
    with pytest.raises(ValueError, match="no meaning|temperature must be positive"):
        train_cj_grpo(TINY, tmp_path, start=(copy.deepcopy(model), tokenizer), reward=digits_reward, **changes)


# the toy


def test_layouts(tokenizer):
    ids, answers = layout_texts(500, torch.Generator().manual_seed(0))
    asked, said = (tokenizer.batch_decode(x, skip_special_tokens=True) for x in (ids, answers))
    kinds = [layout_kind(p, c) for p, c in zip(asked, said)]
    assert "wrong" not in kinds and abs(kinds.count("long") / 500 - 0.7) < 0.07
    assert layout_reward(asked, said) == [float(k == "long") for k in kinds]
    assert torch.equal(tokenizer(asked, return_tensors="pt").input_ids, ids)
    # the distribution is that of the toy of EOSER and ASS
    wrong = torch.where(torch.rand(answers.shape) < 0.1, 4, answers)
    for said in (answers, wrong):
        shown = tokenizer.batch_decode([row[: row.index(1)] if 1 in row else row for row in said.tolist()])
        theirs = [toy_kind(p[:4], t) for p, t in zip(ids.tolist(), said.tolist())]
        assert [layout_kind(p, c) for p, c in zip(asked, shown)] == theirs
    train, test = layout_prompts(4000, seed=1), layout_prompts(500, held_out=True)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    for n, held_out, words in ((501, True, "500 held-out prompts"), (4541, False, "4540 training prompts"), (0, True, "got 0")):
        with pytest.raises(ValueError, match=words):
            layout_prompts(n, held_out=held_out)


def test_the_recipe_pretrains_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(layout_toy, "pretrain_layout", lambda model, steps, seed: calls.append(steps))
    figures = train_cj_grpo(replace(TINY, steps=2, save_every=2, eval_every=2), tmp_path, reward=digits_reward)
    train_cj_grpo(replace(TINY, steps=2, save_every=2, eval_every=2), tmp_path, reward=digits_reward)
    assert calls == [1] and figures["steps"] == 2
    before = (tmp_path / "run/start.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another run .pretrain_steps was 1 and is 2"):
        train_cj_grpo(replace(TINY, steps=2, save_every=2, eval_every=2, pretrain_steps=2), tmp_path, reward=digits_reward)
    assert calls == [1] and (tmp_path / "run/start.safetensors").read_bytes() == before


def test_the_reference_of_a_run_is_not_written_again(tmp_path, model, tokenizer):
    settings = replace(TINY, steps=2, save_every=2, eval_every=2, beta=0.1)
    train_cj_grpo(settings, tmp_path, start=(copy.deepcopy(model), tokenizer), reward=digits_reward)
    before = (tmp_path / "run/reference/model.safetensors").read_bytes()
    other = copy.deepcopy(model)
    next(other.parameters()).data += 1
    with pytest.raises(ValueError, match="another run .the start differs"):
        train_cj_grpo(settings, tmp_path, start=(other, tokenizer), reward=digits_reward)
    assert (tmp_path / "run/reference/model.safetensors").read_bytes() == before


def test_a_model_and_prompts_of_ones_own(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": row["prompt"], "answer": "="} for row in layout_prompts(12)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = replace(TINY, model=str(tmp_path / "model"), prompts_file=str(file), held_out=4, steps=2, save_every=2, eval_every=2)
    figures = recipes()["cj-grpo"].train(own, tmp_path / "out")
    assert figures["steps"] == 2 and 0 <= figures["greedy_after"] <= 1
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"| greedy reward | {figures['greedy_before']:.3f} | {figures['greedy_after']:.3f} |" in card and "--set held_out=4" in card
    with pytest.raises(ValueError, match="12 prompts and 12 are held out"):
        train_cj_grpo(replace(own, held_out=12), tmp_path / "few")
