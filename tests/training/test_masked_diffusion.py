"""The masked-diffusion objective against enumeration, its data, and a run in miniature."""

import json
import math
from dataclasses import asdict
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import VOCAB, character_tokenizer, small_model

from decodelab.core.zoo import load, zoo_path
from decodelab.diffusion.denoiser import Denoiser
from decodelab.lab.tasks.text import ListTask
from decodelab.training.denoising_data import Examples, TaskBatches, TextBatches, task_example, task_examples
from decodelab.training.language_model import cosine_adamw
from decodelab.training.masked_diffusion import (
    MDM_RECIPES,
    DenoiserTrainer,
    MaskedDiffusionRecipe,
    accuracy,
    denoiser_card,
    evaluation_tasks,
    held_out_bound,
    train_masked_diffusion,
)
from decodelab.training.masked_loss import likelihood_bound, mask_answers, mask_exactly, masked_loss, stratified_counts
from decodelab.training.runs import training_arguments


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# the masks


def test_masked_are_answers_and_weights_are_one_over_q_and_length():
    answers = torch.tensor([[False, True, True, True, False]] * 4000)
    masked, weights = mask_answers(answers, generator(), eps=0.2)
    assert not bool((masked & ~answers).any())
    assert bool((weights[~masked] == 0).all())
    q = 1 / (3 * weights[masked])  # by hand: the weight is 1 / (q A) with A = 3
    assert 0.2 <= float(q.min()) <= float(q.max()) <= 1
    # a masked position is seen with probability q, and q is uniform on [0.2, 1]: mean of the masked positions 0.6
    assert float(masked[:, 1:4].float().mean()) == pytest.approx(0.6, abs=4 * 0.5 / math.sqrt(12_000))


def test_levels_cover_the_batch_evenly():
    answers = torch.ones(64, 5000, dtype=torch.bool)
    share = mask_answers(answers, generator())[0].float().mean(1).sort().values
    middle = (torch.arange(64) + 0.5) / 64
    assert float((share - middle).abs().max()) < 0.5 / 64 + 0.03  # one level an interval, and the noise of 5,000 coins


def test_exact_numbers_of_masked_are_uniform_sets():
    answers = torch.tensor([[True, True, False, True, True]] * 6000)
    masked, weights = mask_exactly(answers, torch.full((6000,), 2), generator())
    assert bool((masked.sum(1) == 2).all())
    assert set(weights.unique().tolist()) == {0.0, 0.5}
    sets = masked[:, [0, 1, 3, 4]].long() @ torch.tensor([1, 2, 4, 8])
    counts = torch.bincount(sets, minlength=16)[[3, 5, 9, 6, 10, 12]].float()
    assert int(counts.sum()) == 6000
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 25  # chi-square, 5 degrees of freedom: 25 is p = 1.4e-4


def test_numbers_of_masked_are_stratified():
    counts = stratified_counts(torch.tensor([4, 3, 1]), 12, generator())
    assert counts[0].bincount().tolist() == [0, 3, 3, 3, 3]
    assert counts[1].bincount().tolist() == [0, 4, 4, 4]
    assert counts[2].tolist() == [1] * 12


@pytest.mark.parametrize("count", [0, 3])
def test_impossible_numbers_of_masked_are_refused(count):
    with pytest.raises(ValueError, match="at least one masked position and no more masked positions than answers"):
        mask_exactly(torch.tensor([[True, True, False]]), torch.tensor([count]))


def table_loss(masked, table):
    # any function of (set of masked positions, position) stands in for the cross entropy
    return table[(masked.long() * 2 ** torch.arange(masked.shape[1])).sum(1)]


def test_both_forms_of_the_loss_have_the_expectation_that_enumeration_gives():
    length = 4
    table = torch.rand(2**length, length, generator=generator(1))
    exact = 0.0  # E over u of (1 / u) sum over a uniform set of u masked positions, by enumeration
    for u in range(1, length + 1):
        for chosen in combinations(range(length), u):
            code = sum(2**j for j in chosen)
            exact += float(table[code, list(chosen)].sum()) / u / math.comb(length, u) / length
    rows = 200_000
    answers = torch.ones(rows, length, dtype=torch.bool)
    counts = stratified_counts(torch.full((1,), length), rows, generator(2))[0]
    for masked, weights in (mask_answers(answers, generator(3), eps=1e-6), mask_exactly(answers, counts, generator(4))):
        values = (table_loss(masked, table) * weights).sum(1)
        assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / math.sqrt(rows))


# the bound


class Distribution:
    "A distribution of strings of three letters from {4, 5}, and denoisers that read it."

    def __init__(self, seed=0):
        self.strings = torch.tensor(list(product((4, 5), repeat=3)))
        self.p = torch.rand(8, generator=generator(seed)) ** 3
        self.p /= self.p.sum()
        self.mask_id = 3

    @property
    def entropy(self):
        return -float((self.p * self.p.log()).sum())

    def __call__(self, ids, attention_mask=None, sharpen=1.0):
        fits = ((ids[:, None] == self.strings) | (ids[:, None] == self.mask_id)).all(-1)
        posterior = fits * self.p
        posterior = posterior / posterior.sum(1, keepdim=True)
        of_letter = torch.nn.functional.one_hot(self.strings, 6).float()
        return sharpen * torch.einsum("rs,sjv->rjv", posterior, of_letter).clamp_min(1e-30).log()


def exact_bound(denoiser, probs):
    # every string, every number of masked positions, every set
    total = 0.0
    for string, p in zip(probs.strings, probs.p):
        for u in (1, 2, 3):
            for chosen in combinations(range(3), u):
                masked = torch.zeros(1, 3, dtype=torch.bool)
                masked[0, list(chosen)] = True
                text = string[None]
                loss = masked_loss(denoiser(text.masked_fill(masked, 3)), text, masked / u)  # the weight of `mask_exactly`
                total += float(p) * 3 * float(loss) / math.comb(3, u) / 3
    return total


def test_an_exact_denoiser_reaches_the_entropy_and_no_other_goes_below():
    probs = Distribution()
    assert exact_bound(probs, probs) == pytest.approx(probs.entropy, abs=1e-5)
    for seed in range(1, 6):
        assert exact_bound(Distribution(seed), probs) > probs.entropy + 1e-3
    for sharpen in (0.5, 2.0):
        assert exact_bound(lambda ids, s=sharpen: probs(ids, sharpen=s).log_softmax(-1), probs) > probs.entropy + 1e-3


def test_likelihood_bound_estimates_the_enumerated_bound():
    probs, other = Distribution(), Distribution(1)
    answers = torch.ones_like(probs.strings, dtype=torch.bool)
    found = likelihood_bound(other, probs.strings, answers, draws=3000, generator=generator(), batch_size=1000)
    assert float((found * probs.p).sum()) == pytest.approx(exact_bound(other, probs), abs=0.05)
    # a single unknown letter: no randomness is left, the bound is its negative log-likelihood
    answers = torch.tensor([[False, True, False]])
    text = probs.strings[5:6]
    visible = text.masked_fill(answers, 3)
    by_hand = -float(probs(visible).log_softmax(-1)[0, 1, text[0, 1]])
    assert float(likelihood_bound(probs, text, answers, draws=2)) == pytest.approx(by_hand, abs=1e-5)


def test_loss_by_hand():
    logits = torch.zeros(2, 2, 4)
    logits[..., 3] = -torch.inf
    ids = torch.tensor([[0, 3], [1, 2]])  # a visible mask token costs nothing
    loss = masked_loss(logits, ids, torch.tensor([[0.5, 0.0], [0.25, 1.0]]))
    assert float(loss) == pytest.approx((0.5 + 1.25) * math.log(3) / 2)


# the data


def test_examples_depend_on_seed_and_number_alone(tmp_path):
    tokenizer = character_tokenizer()
    few, more = task_examples(tokenizer, 3), task_examples(tokenizer, 5, processes=2, path=tmp_path / "kept.safetensors")
    again = task_examples(tokenizer, 5, path=tmp_path / "kept.safetensors")
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(few[i], more[i]))
    assert all(torch.equal(a, b) for i in range(5) for a, b in zip(again[i], more[i]))
    prompt, answer = more[4]
    example = task_example(4)
    assert tokenizer.decode(prompt) == example.prompt.replace("\n", "")  # this tokenizer has no line ends
    assert tokenizer.decode(answer[:-1]) == " " + example.answer.replace("\n", "")
    assert int(answer[-1]) == tokenizer.eos_token_id
    other = task_examples(tokenizer, 5, seed=1, path=tmp_path / "kept.safetensors")  # the file is of another seed
    assert not torch.equal(other[0][0], more[0][0])


@pytest.fixture
def pair():
    "Two examples: prompt 10 11 12 with answer 20 eos, prompt 13 with answer 21 22 eos; eos is 1."
    tokens = torch.tensor([10, 11, 12, 20, 1, 13, 21, 22, 1], dtype=torch.int32)
    return Examples(tokens, torch.tensor([0, 5, 9]), torch.tensor([3, 6]))


TOKENS = SimpleNamespace(pad_token_id=0, eos_token_id=1)


def test_prompts_end_and_answers_begin_in_one_column(pair):
    widths, regions = set(), set()
    for b in range(30):
        batch = TaskBatches(pair, TOKENS, 30, 64, prompt_length=4, answer_length=3, long_share=0.3)[b]
        width = batch["ids"].shape[1]
        widths.add(width)
        for ids, valid, masked, weights in zip(*batch.values()):
            prompt, answer = ([10, 11, 12], [20]) if int(ids[3]) == 12 else ([13], [21, 22])
            region = int(valid[4:].sum())
            regions.add((width, region - len(answer) - 1))
            text = [0] * (4 - len(prompt)) + prompt + answer + [1] * (region - len(answer)) + [0] * (width - 4 - region)
            assert ids.tolist() == text
            assert valid.tolist() == [False] * (4 - len(prompt)) + [True] * (len(prompt) + region) + [False] * (width - 4 - region)
            assert not bool((masked & ~(valid & (torch.arange(width) >= 4))).any())
            assert torch.equal(weights > 0, masked)
    assert widths == {7, 16}
    assert regions == {(7, k) for k in range(2)} | {(16, k) for k in range(11)}  # answers of 2 and 3 tokens: up to 1 or 10 more


def test_causal_rows_begin_with_the_prompt_and_only_answers_count(pair):
    batch = TaskBatches(pair, TOKENS, 2, 16, causal=True, prompt_length=4, answer_length=4, long_share=1.0)[
        1
    ]  # a causal batch is never long
    assert not bool(batch["masked"].any())
    rows = {tuple(i): w for i, w in zip(batch["ids"].tolist(), batch["weights"].tolist())}
    assert set(rows) == {(10, 11, 12, 20, 1, 0, 0, 0), (13, 21, 22, 1, 0, 0, 0, 0)}
    assert rows[(13, 21, 22, 1, 0, 0, 0, 0)] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0])


def test_batches_depend_on_seed_and_number_alone(pair):
    stream = np.arange(500, dtype=np.uint16)
    tasks = {"prompt_length": 4, "answer_length": 6}
    for make in (lambda n, s: TaskBatches(pair, TOKENS, n, 8, s, **tasks), lambda n, s: TextBatches(stream, n, 8, s, block=16)):
        short, long, other = make(2, 0)[1], make(50, 0)[1], make(2, 1)[1]
        assert all(torch.equal(short[k], long[k]) for k in short)
        assert not torch.equal(short["masked"], other["masked"])
        assert not torch.equal(short["masked"], make(2, 0)[0]["masked"])


def test_examples_that_do_not_fit_are_refused(pair):
    with pytest.raises(ValueError, match="longest prompt has 3 tokens and the longest answer 3: raise prompt_length or answer_length"):
        TaskBatches(pair, TOKENS, 1, 1, prompt_length=2)
    with pytest.raises(ValueError, match="raise prompt_length or answer_length"):
        TaskBatches(pair, TOKENS, 1, 1, answer_length=2)


def test_windows_keep_their_first_token_and_prefixes_stay_visible(monkeypatch):
    monkeypatch.setattr(
        "decodelab.training.denoising_data.mask_answers", lambda answers, g: (answers, answers / 1)
    )  # all that may be hidden is
    lengths, counts = set(), []
    for b in range(20):
        batch = TextBatches(np.arange(300, dtype=np.uint16), 20, 200, block=12, prefix_share=0.5, short_share=0.5)[b]
        ids, masked, length = batch["ids"], batch["masked"], int(batch["valid"][0].sum())
        lengths.add(length)
        assert bool((ids[:, 1:] - ids[:, :-1] == 1).all())
        assert not bool(masked[:, 0].any() or masked[:, length:].any())
        if length == 12:
            counts += masked.sum(1).tolist()
    assert len(lengths) > 3
    # 11 positions may be hidden in half of the windows, 1 ... 11 evenly in the others
    share = np.bincount(counts, minlength=12) / len(counts)
    assert share[11] == pytest.approx(0.5 + 0.5 / 11, abs=0.05)
    assert share[1:11] == pytest.approx(np.full(10, 0.5 / 11), abs=0.03)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="too few for blocks of 256"):
        TextBatches(np.arange(100, dtype=np.uint16), 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "books"}, "data must be 'tasks' or 'tales'"),
        ({"data": "tales", "causal": True}, "trained by `train_language_model`"),
        ({"steps": 0}, "must be positive"),
        ({"block": 1}, "block must be at least 2, got 1"),
    ],
)
def test_impossible_recipes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionRecipe(**settings)


# a run in miniature


@pytest.fixture
def miniature():
    recipe = MaskedDiffusionRecipe("mini", data="tales", batch_size=4, block=16, steps=4, warmup=1, save_every=2, eval_every=2)
    texts = (["once upon a time there was a fox and a hen " * 12], ["a hen and a fox " * 12])
    return recipe, lambda: (small_model(hidden=16, context=64), with_mask()), texts


def with_mask():
    tokenizer = character_tokenizer()
    tokenizer.mask_token, tokenizer.bos_token = "~", "^"
    return tokenizer


def test_a_run_saves_a_model_that_knows_its_mask_and_resumes_where_it_stopped(tmp_path, miniature, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipe, start, texts = miniature
    options = {"start": start(), "texts": texts, "evaluate": 2, "disable_tqdm": True}
    whole = train_masked_diffusion(recipe, tmp_path / "whole", **options)
    assert json.loads((tmp_path / "whole/training.json").read_text()) == whole
    assert whole["held_out_nats_per_token"] > 0
    model, tokenizer = load(tmp_path / "whole")
    assert (model.config.mask_token_id, model.config.shift_logits) == (tokenizer.mask_token_id, True)
    assert Denoiser(model).shift
    card = denoiser_card(tmp_path / "whole")
    assert "upper bounds, from the first 2 windows of 16 tokens" in card
    assert "Project Gutenberg" in card
    # stopped after two of four steps: what is left is the same as without the stop
    interrupted = tmp_path / "resumed"
    (tmp_path / "whole/run/checkpoint-4").rename(tmp_path / "aside")
    (tmp_path / "whole/run").rename(tmp_path / "run")
    interrupted.mkdir()
    (tmp_path / "run").rename(interrupted / "run")
    steps, plain = [], DenoiserTrainer.training_step
    monkeypatch.setattr(DenoiserTrainer, "training_step", lambda *args, **kwargs: steps.append(1) or plain(*args, **kwargs))
    resumed = train_masked_diffusion(recipe, interrupted, **options | {"start": start()})
    assert len(steps) == 2
    first, second = (load(tmp_path / n)[0].state_dict() for n in ("whole", "resumed"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert resumed["held_out_nats_per_token"] == whole["held_out_nats_per_token"]
    assert resumed["curve"][-1]["step"] == 4


def trainer_of(recipe, dataset, folder):
    model = small_model(hidden=16)
    settings = cosine_adamw(recipe) | {"report_to": [], "bf16": False, "use_cpu": True, "per_device_train_batch_size": 1}
    arguments = training_arguments(recipe, folder, **settings)
    arguments.remove_unused_columns = False
    denoiser = Denoiser(model, 0, shift_logits=True)
    trainer = DenoiserTrainer(recipe, denoiser, args=arguments, train_dataset=dataset, eval_dataset=dataset)
    trainer.bfloat16 = False  # to compare with float32
    return model, trainer


@torch.no_grad()
def test_the_trained_loss_is_that_of_the_whole_text_seen_both_ways(tmp_path, pair):
    pytest.importorskip("accelerate")
    model, trainer = trainer_of(
        MaskedDiffusionRecipe(), TaskBatches(pair, TOKENS, 4, 6, prompt_length=4, answer_length=6, long_share=0.0), tmp_path
    )
    for batch in (trainer.train_dataset[b] for b in range(4)):
        found = trainer.compute_loss(model, batch).item()
        by_hand = 0.0
        for ids, valid, masked, weights in zip(*batch.values()):  # each row alone, without its padding
            text = ids[valid]
            logits = Denoiser(model, 0, shift_logits=False)(text.masked_fill(masked[valid], 0)[None])[0].log_softmax(-1)
            by_hand -= sum(float(weights[valid][j] * logits[j - 1, text[j]]) for j in range(1, len(text)) if masked[valid][j])
        assert found == pytest.approx(by_hand / 6, rel=1e-4)


@torch.no_grad()
def test_the_causal_loss_is_that_of_the_next_token_of_the_answer(tmp_path, pair):
    pytest.importorskip("accelerate")
    dataset = TaskBatches(pair, TOKENS, 1, 6, causal=True, prompt_length=4, answer_length=6)
    model, trainer = trainer_of(MaskedDiffusionRecipe(causal=True), dataset, tmp_path)
    by_hand = 0.0
    for ids, valid, _, weights in zip(*dataset[0].values()):
        text, answer = ids[valid][None], weights[valid] > 0
        logits = model(text).logits[0].float()
        logits[:, 0] = -torch.inf  # the mask is never an answer
        nll = torch.nn.functional.cross_entropy(logits[:-1], text[0, 1:], reduction="none")
        by_hand += float(nll[answer[1:]].mean()) / 6
    assert trainer.compute_loss(model, dataset[0]).item() == pytest.approx(by_hand, rel=1e-4)


def test_batches_are_seen_in_order(tmp_path, pair):
    pytest.importorskip("accelerate")
    dataset = TaskBatches(pair, TOKENS, 5, 2, prompt_length=4, answer_length=6)
    _, trainer = trainer_of(MaskedDiffusionRecipe(), dataset, tmp_path)
    seen = list(trainer.get_train_dataloader())
    assert len(seen) == 5
    assert all(
        torch.equal(got["ids"], dataset[b]["ids"]) and torch.equal(got["masked"], dataset[b]["masked"]) for b, got in enumerate(seen)
    )


def test_held_out_bound_leaves_the_first_token_of_a_window_out():
    model, tokenizer = small_model(hidden=16), with_mask()
    model.config.mask_token_id = tokenizer.mask_token_id
    text = "the fox and the hen went on and on"  # a token a byte; with its beginning, two windows of 16 and a rest
    found = held_out_bound(model, tokenizer, [text], block=16, draws=4)
    windows = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])[:32].view(2, 16)
    answers = torch.arange(16).repeat(2, 1) > 0
    bound = likelihood_bound(Denoiser(model), windows, answers, draws=4, generator=torch.Generator().manual_seed(0))
    assert found["held_out_tokens"] == 30
    assert found["held_out_nats_per_token"] == pytest.approx(float(bound.sum()) / 30)
    assert found["held_out_bits_per_byte"] == pytest.approx(float(bound.sum()) / 30 / math.log(2))
    assert held_out_bound(model, tokenizer, [text], block=16, limit=1)["held_out_tokens"] == 15


def test_training_on_tasks_lowers_the_loss_in_both_objectives(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("decodelab.training.denoising_data.task_example", lambda i, seed=0: ListTask("copy", 2).examples(3)[i % 3])
    for causal in (True, False):
        recipe = MaskedDiffusionRecipe(
            "mini",
            causal=causal,
            examples=6,
            answer_length=24,
            batch_size=8,
            steps=40,
            warmup=4,
            eval_every=20,
            learning_rate=1e-2,
            save_every=100,
        )
        start = small_model(hidden=32, context=256), with_mask()
        figures = train_masked_diffusion(recipe, tmp_path / str(causal), start=start, evaluate=0, disable_tqdm=True, logging_steps=5)
        losses = [float(r["loss"]) for r in figures["curve"] if "loss" in r]
        assert losses[-1] < 0.5 * losses[0]
        assert losses[0] < 2 * math.log(VOCAB)


def test_a_finished_run_knows_how_many_answers_are_right(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("decodelab.training.masked_diffusion.evaluation_tasks", lambda: {"mine": Anything()})
    recipe = MaskedDiffusionRecipe("mini", examples=6, answer_length=64, batch_size=1, steps=1, warmup=0)
    monkeypatch.setattr("decodelab.training.denoising_data.task_example", lambda i, seed=0: ListTask("copy", 2).examples(3)[i % 3])
    figures = train_masked_diffusion(recipe, tmp_path, (small_model(hidden=16), with_mask()), evaluate=2, disable_tqdm=True)
    assert (figures["accuracy"], figures["examples_a_task"]) == ({"mine": 0.5}, 2)
    assert json.loads((tmp_path / "training.json").read_text()) == figures
    card = denoiser_card(tmp_path)
    assert "| mine | 0.50 |" in card
    assert "start from those of `tasks`" in card
    assert "decodelab train mini" in card


class Anything(ListTask):
    "Counts every second answer as right, whatever it is; its first answer is read, too."

    def score(self, example, output):
        assert isinstance(output, str)
        return float(example == self.examples(1, seed=1)[0])


def test_evaluation_holds_every_kind_of_the_mixture():
    names = {task_example(i).task for i in range(400)}
    assert names <= set(evaluation_tasks())
    assert evaluation_tasks()["list_copy of 8"].length == 8


@pytest.fixture(scope="module")
def solvers():
    try:
        return load("tasks"), load("tasks-mdm")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the zoo's task models are not here: {error}")


def test_each_model_answers_in_its_own_way_only(solvers, monkeypatch):
    tasks = {"copy": ListTask("copy", 3)}
    for model, causal in zip(solvers, (True, False)):
        assert accuracy(*model, causal=causal, n=2, answer_length=24, tasks=tasks) == {"copy": 1.0}
    for name, value in (("mask_token_id", 3), ("shift_logits", True)):
        monkeypatch.setattr(solvers[0][0].config, name, value, raising=False)
    assert accuracy(*solvers[0], causal=False, n=2, answer_length=24, tasks=tasks | {"sort": ListTask("sort", 3)}) == {
        "copy": 0.0,
        "sort": 0.0,
    }


@pytest.mark.parametrize("name", ["tasks", "tasks-mdm"])
def test_the_recipe_is_that_of_the_zoo_model(name, solvers):
    stored = json.loads((zoo_path(name) / "training.json").read_text())["recipe"]
    speed = {"compile": False, "save_every": 0}  # what changes no result
    assert stored | speed == asdict(MDM_RECIPES[name]) | speed
    assert MaskedDiffusionRecipe(**stored).name == name
