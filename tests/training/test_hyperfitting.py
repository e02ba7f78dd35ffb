"""Hyperfitting: the plain loop, exact claims, killed runs, bad input. Citation blocker: against brute force, in batches, with draft tokens."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import PAD, character_tokenizer, left_pad, plain, random_prompts, small_model
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList, TemperatureLogitsWarper, TrainerCallback

pytest.importorskip("trl")

from decodelab.experiments.training.hyperfitting import (
    entropy_at,
    hyperfitted,
    matched_temperature,
    orders,
    overlap_lengths,
    ranks,
    static_bias,
)
from decodelab.sampling.base import Autoregressive
from decodelab.sampling.citation_blocker import CitationBlocker, followers
from decodelab.speculative.drafters import PromptLookup
from decodelab.training import hyperfitting
from decodelab.training.hyperfitting import (
    HyperfittingRecipe,
    HyperfittingTrainer,
    batch_order,
    epoch_losses,
    exact_sequences,
    fixed_length_text,
    own_texts,
    sharpness,
    train_hyperfitting,
    type_token_ratio,
    without_dropout,
)
from decodelab.training.recipes import recipes

MINI = HyperfittingRecipe(
    "mini", "nobody", N=8, T=12, N_val=4, b=2, steps=8, learning_rate=3e-3, C=4, M=6, N_gen=2, eval_every=4, save_every=4
)


@pytest.fixture(autouse=True)
def _in_peace(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path / "no-data"))
    monkeypatch.setattr(hyperfitting, "fast_bfloat16", lambda: False)


def data(N=8, T=12, N_val=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (N, T), generator=generator), torch.randint(2, 97, (N_val, T), generator=generator)


def train(out, recipe=MINI, model=None, pair=None):
    return train_hyperfitting(
        recipe, out, (model or small_model(hidden=16), character_tokenizer()), pair or data(recipe.N, recipe.T, recipe.N_val)
    )


def weights(out):
    return (out / "model.safetensors").read_bytes()


# citation blocker

texts = st.lists(st.lists(st.integers(2, 4), max_size=9), max_size=4)


def in_data(D, gram):
    return any(list(gram) == d[i : i + len(gram)] for d in D for i in range(len(d)))


@given(D=texts, history=st.lists(st.integers(2, 4), min_size=1, max_size=7), n_b=st.integers(1, 4), prompt=st.integers(0, 4))
@settings(deadline=None, max_examples=150)
def test_the_blocker_forbids_what_brute_force_forbids(D, history, n_b, prompt):
    key = history[prompt:][-n_b:]
    expected = {v for v in range(6) if len(key) == n_b and in_data(D, [*key, v])}
    scores = torch.randn(1, 6)
    out = CitationBlocker(D, n_b, prompt_length=prompt)(torch.tensor([history]), scores)
    cut = {v for v in range(6) if out[0, v] == -math.inf}
    assert cut == (expected if len(expected) < 6 else set())
    assert all(out[0, v] == scores[0, v] for v in range(6) if v not in cut)


@given(D=texts, n_b=st.integers(1, 3), seed=st.integers(0, 5), context=st.booleans())
@settings(deadline=None, max_examples=25)
def test_no_generated_text_of_more_than_n_b_tokens_stands_in_the_data(D, n_b, seed, context):
    model, prompt = small_model(vocab=6, hidden=8, seed=seed), torch.tensor([[2, 3, 4]])
    rule = CitationBlocker(D, n_b, prompt_length=None if context else 3)
    whole = [2, 3, 4, *plain(model, prompt, 10, logits_processor=LogitsProcessorList([rule]), eos_token_id=99)]
    first = 3 if context else 3 + n_b  # where a forbidden n-gram may end
    assert not any(in_data(D, whole[i - n_b : i + 1]) for i in range(max(first, n_b), len(whole)))


def test_where_all_is_forbidden_nothing_is():
    D = [[2, v] for v in range(5)]
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0], [0.0, 3.0, 1.0, 2.0, -1.0]])
    out = CitationBlocker(D, n_b=1)(torch.tensor([[2], [3]]), scores)
    assert out.tolist() == scores.tolist()
    cut = scores.clone()
    cut[:, 4] = -math.inf  # another processor forbids the only token that D leaves
    assert CitationBlocker(D[:4], n_b=1)(torch.tensor([[2], [2]]), cut).tolist() == cut.tolist()


@pytest.mark.parametrize("rule", [CitationBlocker([]), CitationBlocker([[2, 3]], 1, prompt_length=30), CitationBlocker(data()[0], n_b=50)])
def test_without_texts_or_with_long_n_grams_it_is_greedy_search(rule):
    model, (prompt,) = small_model(), random_prompts(1)
    assert plain(model, prompt, 16, logits_processor=LogitsProcessorList([rule])) == plain(model, prompt, 16)


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("decoder", [Autoregressive(), PromptLookup()])
def test_padded_batches_and_draft_tokens(decoder, context):
    model, prompts = small_model(vocab=12, hidden=16), random_prompts(4, vocab=12)
    D = [p[0].tolist() + plain(model, p, 20) for p in prompts]  # what it would write; padding never stands in it
    batch = left_pad(prompts)
    width = batch["input_ids"].shape[1]
    rule = CitationBlocker(D, 2, prompt_length=None if context else width, pad_token_id=PAD)
    rows = decoder.generate(model, **batch, max_new_tokens=20, do_sample=False, logits_processor=LogitsProcessorList([rule])).continuations
    assert any(row.tolist() != plain(model, p, 20) for row, p in zip(rows, prompts))
    for row, p in zip(rows, prompts):
        alone = CitationBlocker(D, 2, prompt_length=None if context else p.shape[1])
        assert row.tolist() == plain(model, p, 20, logits_processor=LogitsProcessorList([alone]))


def test_padding_is_no_text():
    "An EOS token that pads also stands in D: only where it is text does it count."
    D = [[1, 1, 5, 6], [1, 7, 8, 9]]
    rule = CitationBlocker(D, 2, pad_token_id=1)
    assert rule.blocked(torch.tensor([[1, 1, 1], [1, 1, 5], [7, 1, 1], [1, 7, 8]])) == [[], [], [5], [9]]
    assert CitationBlocker(D, 2).blocked(torch.tensor([[1, 1, 1]])) == [[5]]


def test_followers_and_bad_settings():
    assert followers(torch.tensor([[1, 2, 3], [1, 2, 4]]), 2) == {(1, 2): [3, 4]}
    with pytest.raises(ValueError, match="n_b must be at least 1"):
        CitationBlocker([], 0)
    with pytest.raises(ValueError, match="prompt_length must not be negative"):
        CitationBlocker([], prompt_length=-1)
    for wrong in ([1, 2], "a text"):
        with pytest.raises(ValueError, match="lists of token ids"):
            CitationBlocker(wrong)


# training


def by_hand(model, D, order, learning_rate, **adam):
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, **adam)
    for batch in order:
        model.train()(D[batch], labels=D[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def furthest(model, out):
    other = type(model).from_pretrained(out)
    return max(float((a - b).abs().max()) for a, b in zip(model.parameters(), other.parameters()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run of eight updates."
    out = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setattr(hyperfitting, "fast_bfloat16", lambda: False)
        return out, train(out)


def test_the_recipe_is_the_plain_loop_and_nothing_else(whole):
    order = batch_order(8, 2, 8)
    assert furthest(by_hand(small_model(hidden=16), data()[0], order, 3e-3), whole[0]) < 1e-5
    assert furthest(by_hand(small_model(hidden=16), data()[0], order.flip(0), 3e-3), whole[0]) > 1e-3  # another order
    assert furthest(by_hand(small_model(hidden=16), data()[0], order, 3e-3, weight_decay=0.01), whole[0]) > 1e-3


def test_figures_and_curve(whole):
    out, figures = whole
    assert json.loads((out / "training.json").read_text()) == figures
    assert [p["step"] for p in figures["curve"] if "eval_ttr" in p] == [4, 8]
    assert {"loss", "eval_loss", "eval_entropy", "eval_ttr"} <= set(figures["curve"][-1])
    assert len(figures["epoch_losses"]) == 2
    held = sharpness(small_model(hidden=16), data()[1])
    assert figures["held_out_entropy_before"] == pytest.approx(float(held["entropy"].mean()))
    assert figures["curve"][-1]["eval_loss"] == pytest.approx(figures["held_out_loss"], rel=1e-5)
    assert figures["tokens_seen"] == 8 * 2 * 12


class Killed(BaseException):
    pass


class KilledAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("lora", [0, 2])
def test_a_killed_run_ends_like_one_that_was_not(lora, whole, tmp_path, monkeypatch):
    recipe = replace(MINI, lora=lora)
    straight, figures = whole if not lora else (tmp_path / "straight", train(tmp_path / "straight", recipe))
    with monkeypatch.context() as patch:
        patch.setattr(hyperfitting, "HyperfittingTrainer", lambda *a, **k: HyperfittingTrainer(*a, **k, callbacks=[KilledAt(6)]))
        with pytest.raises(Killed):
            train(tmp_path / "killed", recipe)
    again = train(tmp_path / "killed", recipe)
    assert weights(tmp_path / "killed") == weights(straight)
    assert [(s["from_step"], s["to_step"]) for s in again["segments"]] == [(0, 4), (4, 8)]
    assert {k: v for k, v in again.items() if k not in ("segments", "seconds_this_run")} == {
        k: v for k, v in figures.items() if k not in ("segments", "seconds_this_run")
    }
    assert train(tmp_path / "killed", recipe) == again  # over: nothing is trained


def test_other_data_or_another_order_are_refused(whole):
    with pytest.raises(ValueError, match="the training text differs"):
        train(whole[0], pair=data(seed=1))
    with pytest.raises(ValueError, match="order_seed was 0 and is 1"):
        train(whole[0], replace(MINI, order_seed=1))


def test_adapters_train_few_parameters_and_are_merged(tmp_path):
    figures = train(tmp_path, replace(MINI, lora=2, steps=4))
    base, merged = small_model(hidden=16), type(small_model(hidden=16)).from_pretrained(tmp_path)
    assert figures["parameters"] == sum(p.numel() for p in base.parameters())
    assert torch.equal(base.get_input_embeddings().weight, merged.get_input_embeddings().weight)
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)


def test_a_loss_target_ends_the_run_and_a_finished_run_stays_finished(tmp_path):
    figures = train(tmp_path, replace(MINI, steps=40, tau_stop=2.0, learning_rate=1e-2))
    assert figures["epoch_losses"][-1] < 2.0 <= min(figures["epoch_losses"][:-1])
    assert figures["steps"] == 4 * len(figures["epoch_losses"]) < 40
    assert train(tmp_path, replace(MINI, steps=40, tau_stop=2.0, learning_rate=1e-2)) == figures
    further = train(tmp_path, replace(MINI, steps=figures["steps"] + 4, tau_stop=0.0, learning_rate=1e-2))
    assert further["steps"] == figures["steps"] + 4


@pytest.mark.parametrize("killed_at", [4, 5, 11])
def test_a_killed_run_reaches_its_loss_target_at_the_same_step(killed_at, tmp_path, monkeypatch):
    "Checkpoints lie in the middle of epochs (3, 6, 9, ... of 4 updates each)."
    recipe = replace(MINI, steps=40, tau_stop=2.0, learning_rate=1e-2, save_every=3)
    straight = train(tmp_path / "straight", recipe)
    assert killed_at < straight["steps"] < 40
    with monkeypatch.context() as patch:
        patch.setattr(hyperfitting, "HyperfittingTrainer", lambda *a, **k: HyperfittingTrainer(*a, **k, callbacks=[KilledAt(killed_at)]))
        with pytest.raises(Killed):
            train(tmp_path / "killed", recipe)
    again = train(tmp_path / "killed", recipe)
    assert again["segments"][-1]["from_step"] == killed_at // 3 * 3 > 0
    assert again["steps"] == straight["steps"]
    assert again["epoch_losses"] == pytest.approx(straight["epoch_losses"])
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


@pytest.mark.parametrize("lora", [0, 2])
def test_figures_are_those_of_the_written_weights_in_float32(lora, tmp_path, monkeypatch):
    "Also where the training ran under bfloat16 autocast."
    monkeypatch.setattr(hyperfitting, "fast_bfloat16", lambda: True)
    figures = train(tmp_path, replace(MINI, lora=lora, learning_rate=1e-2))
    written = sharpness(type(small_model()).from_pretrained(tmp_path), data()[1])
    plain = sharpness(small_model(hidden=16), data()[1])
    for name in ("loss", "entropy", "P@1"):
        assert figures[f"held_out_{name}"] == pytest.approx(float(written[name].mean()), rel=1e-6)
        assert figures[f"held_out_{name}_before"] == pytest.approx(float(plain[name].mean()), rel=1e-6)
    seen = figures["curve"][-1]["eval_loss"]  # along the run: in bfloat16
    assert seen == pytest.approx(figures["held_out_loss"], rel=0.02)
    assert seen != pytest.approx(figures["held_out_loss"], rel=1e-6)


def test_epoch_losses_from_uneven_lines():
    lines = [
        {"step": 3, "loss": 4.0},
        {"step": 4, "eval_loss": 9.0},
        {"step": 4, "loss": 8.0},
        {"step": 8, "loss": 1.0},
        {"step": 9, "loss": 0.0},
    ]
    assert epoch_losses(lines, 4) == [5.0, 1.0]


def test_dropout_is_off():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    ids = data()[0]
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model.train()(ids).logits, model(ids).logits)
    llama = small_model()
    llama.model.layers[0].self_attn.attention_dropout = 0.5
    assert without_dropout(llama).model.layers[0].self_attn.attention_dropout == 0.0


def test_the_loss_goes_to_zero_and_distributions_are_sharper(tmp_path):
    figures = train(tmp_path, replace(MINI, steps=160, learning_rate=1e-2, eval_every=80, save_every=160))
    assert figures["epoch_losses"][-1] < 0.1
    assert figures["held_out_loss"] > 1.3 * figures["held_out_loss_before"]
    assert figures["held_out_P@1"] <= figures["held_out_P@3"] <= figures["held_out_P@5"]


# exact claims


def test_a_temperature_changes_no_fixed_length_text():
    model, contexts = small_model(), data(6, 8)[0]
    for temperature in (0.3, 0.7, 1.9):
        rule = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        assert torch.equal(fixed_length_text(model, contexts, 12, logits_processor=rule), fixed_length_text(model, contexts, 12))


def test_the_temperature_of_equal_entropy():
    model, (ids, _) = small_model(), data()
    logits = model(ids).logits[:, :-1].detach()
    assert entropy_at(logits, 1.0) == pytest.approx(float(sharpness(model, ids)["entropy"].mean()), rel=1e-5)
    wanted = entropy_at(logits, 0.6)
    assert matched_temperature(model, ids, wanted) == pytest.approx(0.6, abs=1e-3)


def test_a_static_bias_is_that_of_the_tokens_whose_rank_rises_most():
    base, (ids, _) = small_model(), data()
    changed = copy.deepcopy(base)
    changed.set_output_embeddings(torch.nn.Linear(base.config.hidden_size, base.config.vocab_size))
    with torch.no_grad():
        changed.lm_head.weight.copy_(base.lm_head.weight)
        changed.lm_head.bias.zero_()
        changed.lm_head.bias[[7, 30]] = 1.5  # these rise everywhere, and nothing else does
        rule = static_bias(base, changed, ids, tokens=2, alpha=2.0)
        before, after = (model(ids).logits[:, :-1].log_softmax(-1).mean((0, 1)) for model in (base, changed))
    assert {token for (token,) in rule.sequence_bias} == {7, 30}
    added = rule(ids[:1], torch.zeros(1, base.config.vocab_size))[0]
    assert torch.allclose(added[[7, 30]], 2 * (after - before)[[7, 30]], atol=1e-5) and int((added != 0).sum()) == 2


def test_same_order_same_model_and_one_swap_another():
    base, (D, held_out), tokenizer = small_model(hidden=16), data(), character_tokenizer()
    three = orders(MINI)
    assert torch.equal(three["one swap"] == 0, three["reference"] == 1)
    assert torch.equal(three["one swap"] > 1, three["reference"] > 1)
    runs = [hyperfitted(base, tokenizer, D, held_out, MINI, o, watched=False)[0] for o in (None, three["reference"], three["one swap"])]
    same, reference, swapped = ([p.detach() for p in m.parameters()] for m in runs)
    assert all(torch.equal(a, b) for a, b in zip(same, reference))
    assert not all(torch.equal(a, b) for a, b in zip(swapped, reference))
    untouched = small_model(hidden=16)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), untouched.parameters()))


@pytest.mark.parametrize("lora", [0, 2])
def test_the_early_stopped_copy_has_the_lowest_held_out_loss_after_the_start(lora):
    (D, held_out), recipe = data(), replace(MINI, steps=16, learning_rate=1e-2, lora=lora)
    known = replace(MINI, N=4, steps=60, learning_rate=1e-2)
    base, *_ = hyperfitted(small_model(hidden=16), character_tokenizer(), held_out, held_out, known, watched=False)  # it knows them
    model, early, curve, last = hyperfitted(base, character_tokenizer(), D, held_out, recipe)
    losses = {p["step"]: p["eval_loss"] for p in curve if "eval_loss" in p}
    assert list(losses) == [0, 4, 8, 12, 16]
    original, best, final = (float(sharpness(m, held_out)["loss"].mean()) for m in (base, early, model))
    assert losses.pop(0) == pytest.approx(original, rel=1e-5)
    assert min(losses.values()) == pytest.approx(best, rel=1e-5)
    assert losses[16] == pytest.approx(final, rel=1e-5)
    assert original < best < final  # the lowest of all is not what early stopping keeps
    assert last < curve[1]["loss"]
    for m in (model, early):  # plain models, adapters merged
        assert m.state_dict().keys() == base.state_dict().keys()
        assert not m.training


# measures


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.integers(1, 12))
@settings(deadline=None)
def test_type_token_ratio(row, w):
    assert float(type_token_ratio(torch.tensor([row]), w)[0]) == pytest.approx(len(set(row[-w:])) / len(row[-w:]))


@given(
    st.lists(st.integers(2, 4), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(2, 4), min_size=5, max_size=5), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_overlap_lengths(row, D):
    found = overlap_lengths(torch.tensor(row), torch.tensor(D)).tolist()
    for i, length in enumerate(found):
        assert length == max(n for n in range(i + 2) if n == 0 or in_data(D, row[i + 1 - n : i + 1]))


def test_sharpness_is_what_it_says():
    model, (ids, _) = small_model(), data()
    found = sharpness(model, ids, batch_size=3)
    p = model(ids).logits[:, :-1].softmax(-1).detach()
    assert found["loss"].tolist() == pytest.approx([float(model(r[None], labels=r[None]).loss) for r in ids], rel=1e-4)
    assert found["entropy"].tolist() == pytest.approx((-p * p.log()).sum(-1).mean(-1).tolist(), rel=1e-4)
    assert found["P@3"].tolist() == pytest.approx(p.sort(-1, descending=True).values[..., :3].sum(-1).mean(-1).tolist(), rel=1e-4)
    assert torch.equal(found["top1"], p.argmax(-1))


def test_ranks_of_greedy_text_are_one():
    model, contexts = small_model(), data(4, 6)[0]
    assert ranks(model, contexts, fixed_length_text(model, contexts, 8)).eq(1).all()
    assert ranks(small_model(seed=1), contexts, fixed_length_text(model, contexts, 8)).gt(1).any()


def test_batch_order():
    order = batch_order(9, 2, 11, order_seed=3)
    assert order.shape == (11, 2)
    for epoch in order[:8].split(4):
        assert epoch.flatten().unique().numel() == 8
    assert torch.equal(batch_order(9, 2, 5, 3), order[:5])
    assert not torch.equal(batch_order(9, 2, 11, 4), order)


# data and bad input


def test_exact_sequences():
    tokenizer = character_tokenizer()
    found = exact_sequences(["abcdef", "abc", "abcd", "", "xyzw", "abcde"], tokenizer, 2, 4)
    assert {tokenizer.decode(row) for row in found} == {"abcd", "xyzw"}  # the first four letters, each text once
    for texts in (["abc", ""], [], ["abcd", "abcde"]):
        with pytest.raises(ValueError, match=r"only \d different texts of \d have 4 tokens, and 2 are asked for"):
            exact_sequences(texts, tokenizer, 2, 4)


def test_own_texts_have_one_length_and_leave_the_random_state_alone():
    model, tokenizer = small_model(), character_tokenizer()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = own_texts(model, tokenizer, 3, 20)
    assert found.shape == (3, 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, own_texts(model, tokenizer, 3, 20))


class Writer:
    "A model that writes the given tokens, one a text, after whatever it is given."

    device = torch.device("cpu")

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def generate(self, input_ids, max_new_tokens, **_):
        return torch.cat([input_ids, torch.full((1, max_new_tokens), self.tokens.pop(0))], 1)


def test_own_texts_are_different(monkeypatch):
    monkeypatch.setattr("decodelab.lab.prompts.tale_prompts", lambda n, seed: ["Once upon a time"] * n)
    tokenizer = character_tokenizer()
    start = tokenizer("Onc", add_special_tokens=False).input_ids
    found = own_texts(Writer(5, 5, 6, 5, 7, 8), tokenizer, 3, 6)
    assert found.tolist() == [start + [token] * 3 for token in (5, 6, 7)]
    with pytest.raises(ValueError, match="wrote only 2 different texts of 6 tokens, and 3 are asked for"):
        own_texts(Writer(5, 5, 6, 5, 6, 6), tokenizer, 3, 6)


def test_without_books(tmp_path):
    model, tokenizer = small_model(), character_tokenizer()
    with pytest.raises(FileNotFoundError, match="source=samples"):
        MINI.data(model, tokenizer)
    D, held_out = replace(MINI, source="samples").data(model, tokenizer)
    assert (D.shape, held_out.shape) == ((8, 12), (4, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": 9}, "a batch of b = 9 needs as many sequences, got N = 8"),
        ({"T": 1, "C": 1}, "T must be at least 2"),
        ({"C": 13}, "C at most T"),
        ({"N_gen": 5}, "N_gen at most N_val"),
        ({"tau_stop": -1.0}, "must not be negative"),
        ({"lora": -1}, "must not be negative"),
        ({"source": "web"}, "source must be books or samples"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"N": 0}, "must be positive"),
        ({"steps": 1.5}, "steps must be"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MINI, **change)


def test_texts_that_do_not_fit_into_the_model(tmp_path):
    with pytest.raises(ValueError, match="must fit into the model's context of 16"):
        train(tmp_path, replace(MINI, M=13), model=small_model(hidden=16, context=16))


def test_the_recipe_is_registered():
    found = recipes()["hyperfitting"]
    assert (found.year, found.notebook) == (2025, "training/hyperfitting")
    assert found.url.startswith("https://arxiv.org/abs/2412.04318")


def test_the_card(tmp_path, monkeypatch):
    "Through the registered function, with a model of our own."
    monkeypatch.setattr(hyperfitting, "load_causal", lambda *a, **k: (small_model(hidden=16), character_tokenizer()))
    figures = recipes()["hyperfitting"].train(replace(MINI, source="samples", steps=4), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "texts that the model itself sampled" in text
    assert "--set learning_rate=0.003" in text
    assert f"{figures['held_out_ttr']:.3f}" in text
