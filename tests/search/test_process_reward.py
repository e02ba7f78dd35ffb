"""The process reward model: its features, its answers as a scorer, its training recipe."""

import json
import shutil

import pytest
import torch
from toys import small_model

from decodelab.lab.tasks.text import ArithmeticTask
from decodelab.search.a_star import AStar
from decodelab.search.process_reward import ProcessHead, ProcessHeadConfig, ProcessReward, step_features
from decodelab.training.prm import (
    Labels,
    PRMRecipe,
    cached_labels,
    head_figures,
    is_sound,
    prefixes,
    prm_card,
    split_labels,
    train_process_head,
)

TASK = ArithmeticTask(steps=2)
SMALL = {"name": "small-prm", "operations": 2, "prompts": 20, "rollouts": 2, "new_tokens": 12, "width": 8, "steps": 6, "save_every": 2}


@pytest.fixture(scope="module")
def pair(tokenizer):
    return small_model("llama"), tokenizer


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("prm")
    return out, train_process_head(PRMRecipe(**SMALL), out, pair)


# features and scorer


def test_features_are_those_of_each_text_alone(pair):
    model, _ = pair
    prompts, texts = [[5, 9, 33], [7]], [[40, 41, 50, 3], []]
    found = step_features(model, prompts, texts)
    for prompt, text, row in zip(prompts, texts, found):
        ids = torch.tensor([prompt + text])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        log_p = out.logits[0].log_softmax(-1)
        gained = [float(log_p[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1])]
        numbers = [sum(gained) / len(gained), min(gained), sum(gained)] if gained else [0.0] * 3
        assert row[:-3].tolist() == pytest.approx(out.hidden_states[-1][0, -1].tolist(), abs=1e-4)
        assert row[-3:].tolist() == pytest.approx(numbers, abs=1e-4)


def test_the_scorer_answers_probabilities_and_drives_a_search(pair):
    model, tokenizer = pair
    torch.manual_seed(0)
    reward = ProcessReward(ProcessHead(ProcessHeadConfig(35, 8)), model, tokenizer, batch_size=2)
    pairs = [("ab", "c"), ("abcd", ""), ("x", "yz")]
    values = reward(pairs)
    assert all(0 < r < 1 for r in values)
    assert values == pytest.approx([reward([p])[0] for p in pairs], abs=1e-5)
    ids = torch.tensor([tokenizer("ab").input_ids])
    out = AStar(scorer=reward, tokenizer=tokenizer, k=2, step_tokens=3).generate(model, ids, max_new_tokens=9, do_sample=True)
    assert out.stats.search[0]["scorer_calls"] > 0


def test_what_does_not_fit_is_refused(pair):
    model, tokenizer = pair
    with pytest.raises(ValueError, match="pass the tokenizer of the model"):
        ProcessReward(ProcessHead(ProcessHeadConfig(35)), model)
    with pytest.raises(ValueError, match="the head reads 7 numbers and this model gives 35: use tasks, or train a head for it"):
        ProcessReward(ProcessHead(ProcessHeadConfig(7)), model, tokenizer)
    for wrong in ({"features": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="features and width must be positive"):
            ProcessHeadConfig(**wrong)


# labels


@pytest.mark.parametrize(("text", "parts"), [("a\nb", ["a\n", "a\nb"]), ("a\n", ["a\n"]), ("a", ["a"]), ("\na", ["\n", "\na"])])
def test_prefixes(text, parts):
    assert prefixes(text) == parts


def test_soundness():
    example = TASK.examples(1)[0]
    right = example.answer.splitlines()
    assert all(is_sound(TASK, example, "\n".join(right[:n])) for n in range(4))
    assert not is_sound(TASK, example, right[0] + "1\n")
    assert not is_sound(TASK, example, example.answer + "\nmore")


def test_a_split_keeps_exercises_apart():
    n = 60
    labels = Labels(torch.zeros(n, 2), torch.zeros(n), torch.zeros(n).bool(), torch.arange(n) // 3, torch.arange(n) % 3)
    parts = split_labels(labels)
    assert [len(p) for p in parts] == [42, 9, 9]
    sets = [set(p.prompt.tolist()) for p in parts]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 20


def test_figures_of_a_head_that_knows_and_of_one_that_does_not():
    sound = torch.arange(40) % 2 == 0
    features = torch.stack([sound * 8.0 - 4.0, torch.zeros(40), torch.zeros(40)], 1)
    labels = Labels(features, sound.double(), sound, torch.arange(40), torch.ones(40, dtype=torch.long))
    head = ProcessHead(ProcessHeadConfig(3, 2))
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        blind = head_figures(head, labels)
        head.first.weight[0, 0], head.first.weight[1, 0], head.last.weight[0, 0], head.last.weight[0, 1] = 1.0, -1.0, 1.0, -1.0
        knows = head_figures(head, labels)
    assert blind["auc"] == blind["auc_smallest_log_prob"] == 0.5
    assert blind["cross_entropy"] == pytest.approx(blind["cross_entropy_constant"])
    assert knows["auc"] == 1.0
    assert knows["cross_entropy"] < 0.05


# the recipe


def test_training_writes_a_head_that_loads(trained, pair):
    out, figures = trained
    assert figures["parameters"] == 35 * 8 + 8 + 8 + 1
    assert sum(figures["prefixes"].values()) == len(cached_labels(PRMRecipe(**SMALL), out / "run", pair))
    assert 0 < ProcessReward(out, *pair)([("ab", "c")])[0] < 1
    assert "decodelab train prm --set" in prm_card(out)


def test_a_run_that_stopped_goes_on_to_the_same_head(trained, pair, tmp_path):
    out, _ = trained
    for steps in (2, 6):
        train_process_head(PRMRecipe(**SMALL | {"steps": steps}), tmp_path, pair)
    read = [json.loads((folder / "training.json").read_text()) for folder in (out, tmp_path)]
    assert read[0]["held_out"] == read[1]["held_out"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_labels_of_other_data_are_not_read(trained, pair, tmp_path):
    out, _ = trained
    made = (out / "run/labels.safetensors").stat().st_mtime_ns
    cached_labels(PRMRecipe(**SMALL), out / "run", pair)
    assert (out / "run/labels.safetensors").stat().st_mtime_ns == made
    shutil.copy(out / "run/labels.safetensors", tmp_path)
    other = cached_labels(PRMRecipe(**SMALL | {"rollouts": 1, "prompts": 10}), tmp_path, pair)
    assert len(other.prompt.unique()) == 10


def test_labels_of_a_finished_run_are_never_written_again(trained, pair):
    out, _ = trained
    before = {f: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}
    for change in ({"rollouts": 1}, {"width": 9}):
        (name,) = change
        with pytest.raises(ValueError, match=f"another run .{name} was "):
            train_process_head(PRMRecipe(**SMALL | change), out, pair)
    with pytest.raises(ValueError, match=r"labels\.safetensors was made with another model"):
        train_process_head(PRMRecipe(**SMALL), out, (small_model("llama", seed=5), pair[1]))
    assert {f: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()} == before


def test_a_head_names_the_model_that_it_reads_as_it_was_given():
    labels = Labels(torch.rand(4, 5), torch.zeros(4), torch.zeros(4).bool(), torch.arange(4), torch.ones(4))
    for name in ("tasks", "runs/mine", "somebody/model"):  # what `ProcessReward(folder)` loads
        assert PRMRecipe(model=name).head(labels).config.backbone == name


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match="at least 10 prompts are needed"):
        PRMRecipe(prompts=9)
    with pytest.raises(ValueError, match="temperature must be positive"):
        PRMRecipe(temperature=0.0)
    with pytest.raises(ValueError, match="must be positive"):
        PRMRecipe(rollouts=0)
    with pytest.raises(FileNotFoundError, match="holds no training.json"):
        prm_card(tmp_path)
