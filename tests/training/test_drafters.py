"""Training a drafter: the loss against hand counts, the target's states against its logits, kill and resume, bad input."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from toys import character_tokenizer, small_model

drafters = pytest.importorskip("decodelab.training.drafters", exc_type=ImportError)
pytest.importorskip("peft")
from decodelab.speculative.layer_drafter import layer_drafter, load_drafter
from decodelab.training import target_texts, teacher

MINI = drafters.DrafterRecipe(
    layers="0", tokens=20, r=2, alpha=4, prompts=12, held_out=3, new_tokens=6, batch_size=2, steps=8, warmup=1, save_every=4, eval_every=4
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_DATA", "")
    monkeypatch.setattr(drafters, "fast_bfloat16", lambda: False)


@pytest.fixture(scope="module")
def pair():
    tokenizer = character_tokenizer()
    model = small_model(vocab=len(tokenizer.get_vocab()), context=512, seed=3)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def train(settings, out, pair):
    return drafters.train_drafter(settings, out, pair)


@pytest.mark.parametrize("kind", drafters.LOSSES)
def test_the_loss_against_its_definition_and_differences(kind):
    torch.manual_seed(0)
    z = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    log_p = torch.randn(2, 5, dtype=torch.double).log_softmax(-1)

    def loss(z):
        return drafters.distance(log_p, z.log_softmax(-1), kind)

    p, q = log_p.exp(), z.detach().softmax(-1)
    terms = {"kl": p * (p / q).log(), "reverse_kl": q * (q / p).log(), "tv": (p - q).abs() / 2}[kind]
    assert float(loss(z)) == pytest.approx(float(terms.sum(-1).mean()))
    assert torch.autograd.gradcheck(loss, z)


def test_probability_outside_the_kept_tokens_counts_as_rejected():
    log_p = torch.tensor([[0.4, 0.2]]).log()  # 0.4 on tokens that are not kept
    assert float(drafters.distance(log_p, torch.tensor([[0.5, 0.5]]).log(), "tv")) == pytest.approx(1 - 0.4 - 0.2)


def test_states_give_the_targets_distribution(pair):
    model, tokenizer = pair
    texts = target_texts.written_by(model, tokenizer, ["a king", "once upon a time"], 5)
    states, logs = teacher.teacher_states(model, texts)
    at = 0
    for prompt, answer in texts:
        exact = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        mine = states[at : at + len(answer)].float() @ model.lm_head.weight.T - logs[at : at + len(answer), None]
        assert torch.allclose(mine, exact, atol=2e-2)  # the states are rounded
        assert torch.allclose(mine.exp().sum(-1), torch.ones(len(answer)), atol=1e-5)  # but Z is theirs
        at += len(answer)
    assert at == len(states)


def test_a_model_that_changes_its_logits_is_refused(pair, monkeypatch):
    model, tokenizer = pair
    texts = target_texts.written_by(model, tokenizer, ["a king"], 3)
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 2
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="it cannot be distilled so"):
        teacher.teacher_states(model, texts)


def test_a_head_with_a_bias_is_refused(pair):
    model, tokenizer = copy.deepcopy(pair)
    texts = target_texts.written_by(model, tokenizer, ["a king"], 3)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    with pytest.raises(ValueError, match="it cannot be distilled so"):
        teacher.teacher_states(model, texts)


def test_layers_are_checked_before_anything_is_written(pair, tmp_path):
    with pytest.raises(ValueError, match="layers must be numbers from 0 to 1"):
        train(replace(MINI, layers="7"), tmp_path / "d", pair)
    size = pair[0].config.vocab_size
    with pytest.raises(ValueError, match=f"tokens must be at most {size}, the target's vocabulary, got {size + 1}: 0 keeps all"):
        train(replace(MINI, tokens=size + 1), tmp_path / "d", pair)
    assert not list((tmp_path / "d/run").glob("texts*"))


def test_prompts_of_a_file(pair, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a fox {i} came" for i in range(12)) + "\n\na fox 0 came\n")
    assert sorted(target_texts.file_prompts(file, 99)) == sorted(f"a fox {i} came" for i in range(12))
    texts, *_ = teacher.build_texts(*pair, replace(MINI, prompts_file=str(file)), tmp_path / "t.safetensors")
    assert all(pair[1].decode(prompt).startswith("a fox") for prompt, _ in texts)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        target_texts.file_prompts(file, 3)
    with pytest.raises(ValueError, match="name a text file in UTF-8"):
        target_texts.file_prompts(tmp_path / "none.txt", 3)


def test_figures_of_the_target_itself(pair):
    model, tokenizer = pair
    texts = target_texts.written_by(model, tokenizer, ["a king", "a fox"], 5)
    data = teacher.DrafterData(texts, *teacher.teacher_states(model, texts))
    head = model.lm_head.weight.detach()
    whole = drafters.drafter_figures(layer_drafter(model, range(2)), data, head, torch.arange(len(head)), head)
    assert whole == pytest.approx({"acceptance": 1.0, "agreement": 1.0, "covered": 1.0}, abs=3e-3)


def test_a_run_improves_and_its_adapter_is_what_was_measured(pair, tmp_path):
    model, _ = pair
    before = [p.requires_grad for p in model.parameters()]
    figures = train(replace(MINI, steps=60, learning_rate=0.02, prompts=40, save_every=30, eval_every=30, tokens=0), tmp_path / "d", pair)
    assert figures["held_out"]["acceptance"] > figures["untrained"]["acceptance"] + 0.02
    assert [p.requires_grad for p in model.parameters()] == before  # the target is left as it is
    healed = load_drafter(tmp_path / "d", model)
    texts, states, logs = teacher.build_texts(*pair, replace(MINI, prompts=40, tokens=0), tmp_path / "d/run/texts.safetensors")
    cut = sum(len(b) for _, b in texts[:3])
    head = model.lm_head.weight.detach()
    held_out = teacher.DrafterData(texts[:3], states[:cut], logs[:cut])
    again = drafters.drafter_figures(healed, held_out, head, torch.arange(len(head)), head)
    assert again == pytest.approx(figures["held_out"], abs=2e-3)  # merged by hand as by PEFT; stored in bfloat16


def test_killed_and_resumed_is_uninterrupted(pair, tmp_path, monkeypatch):
    train(MINI, tmp_path / "whole", pair)
    step = drafters.DrafterTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(drafters.DrafterTrainer, "training_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(MINI, tmp_path / "cut", pair)
    figures = train(MINI, tmp_path / "cut", pair)
    assert [s["from_step"] for s in figures["segments"]] == [0, 4]
    for file in ("adapter_model.safetensors", "tokens.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    with pytest.raises(ValueError, match="loss was kl and is tv"):
        train(replace(MINI, loss="tv"), tmp_path / "cut", pair)


def test_what_a_finished_run_was_trained_on_is_never_written_again(pair, tmp_path):
    file, out = tmp_path / "prompts.txt", tmp_path / "d"
    file.write_text("\n".join(f"a fox {i} came" for i in range(12)))
    settings = replace(MINI, prompts_file=str(file))
    train(settings, out, pair)
    before = {f: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}
    for change in ({"new_tokens": 5}, {"seed": 1}, {"prompts": 11}, {"r": 3}):
        (name,) = change
        with pytest.raises(ValueError, match=f"another run .{name} was "):
            train(replace(settings, **change), out, pair)
    other = copy.deepcopy(pair[0])
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"texts\.safetensors was made with another target"):
        train(settings, out, (other, pair[1]))
    file.write_text("\n".join(f"a hen {i} came" for i in range(12)))
    with pytest.raises(ValueError, match=r"texts\.safetensors was made with another data set or setting"):
        train(settings, out, pair)
    assert {f: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()} == before


def test_texts_are_kept_and_cut(pair, tmp_path):
    model, tokenizer = pair
    file = tmp_path / "texts.safetensors"
    first = teacher.build_texts(model, tokenizer, MINI, file)
    stamp = file.stat().st_mtime_ns
    again = teacher.build_texts(model, tokenizer, replace(MINI, loss="tv", steps=3), file)  # what they do not depend on
    assert file.stat().st_mtime_ns == stamp and again[0] == first[0]
    assert teacher.build_texts(model, tokenizer, replace(MINI, seed=1), file)[0] != first[0]
    figures = train(replace(MINI, texts=4), tmp_path / "few", pair)
    assert figures["texts"] == 4


def test_a_run_killed_while_the_target_writes_goes_on_behind_the_last_whole_part(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "PART", 4)
    settings, asked, written_by = replace(MINI, prompts=11), [], teacher.written_by
    whole = teacher.build_texts(*pair, settings, tmp_path / "whole.safetensors")

    def dies(model, tokenizer, prompts, *rest, **more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(prompts)
        return written_by(model, tokenizer, prompts, *rest, **more)

    file = tmp_path / "cut.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "written_by", dies)
        with pytest.raises(KeyboardInterrupt):
            teacher.build_texts(*pair, settings, file)
    assert len(list(tmp_path.glob("cut.*.part"))) == 2 and not file.exists()
    last = []
    monkeypatch.setattr(
        teacher, "written_by", lambda m, t, prompts, *rest, **more: last.extend(prompts) or written_by(m, t, prompts, *rest, **more)
    )
    texts, states, logs = teacher.build_texts(*pair, settings, file)
    assert len(last) == 3 and texts == whole[0] and torch.equal(states, whole[1]) and torch.equal(logs, whole[2])
    assert not list(tmp_path.glob("*.part"))
    assert not set(last) & {prompt for part in asked for prompt in part}


def test_batches_of_like_length():
    lengths = [7, 90, 11, 50, 8, 88, 12, 52, 9]
    sampler = teacher.LikeLengths(lengths, 2, seed=3)
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert len(sampler) == 9 and all(sorted(rows) == list(range(9)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4  # a new order each epoch
    sampler.set_epoch(2)
    assert list(sampler) == epochs[2]
    for rows in epochs:  # all but the row that is left over are paired with their neighbours by length
        paired = sorted(rows[:8], key=lengths.__getitem__)
        assert {frozenset(rows[i : i + 2]) for i in range(0, 8, 2)} == {frozenset(paired[i : i + 2]) for i in range(0, 8, 2)}


def test_a_card(pair, tmp_path):
    train(MINI, tmp_path / "d", pair)
    text = drafters.drafter_card(tmp_path / "d")
    assert "| acceptance |" in text and "decodelab train drafter" in text and "--set layers=0" in text
    assert json.loads((tmp_path / "d/config.json").read_text())["layers"] == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "mse"}, "loss must be one of kl, reverse_kl, tv"),
        ({"layers": "a"}, "layers must be numbers with commas between"),
        ({"layers": ""}, "layers must be numbers with commas between"),
        ({"layers": "\N{SUPERSCRIPT TWO}"}, "layers must be numbers with commas between"),
        ({"held_out": 12, "prompts": 12}, "held_out must be less than prompts"),
        ({"tokens": -1}, "temperature, tokens and texts must not be negative"),
        ({"r": 0}, "must be positive"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        drafters.DrafterRecipe(**fields)


def test_questions_that_are_held_out_are_not_asked_again(monkeypatch):
    rows = [{"task": t, "turns": [f"{t} {i}"]} for t in ("qa", "math") for i in range(10)]
    monkeypatch.setattr("decodelab.lab.data.load_data", lambda name: rows)
    asked = target_texts.chat_prompts(25, seed=1, once=3)
    assert len(asked) == 25 and not set(asked[:3]) & set(asked[3:])
    assert {text.split()[1] for text in asked} == {"1", "3", "5", "7", "9"}  # comparisons take even ones
    with pytest.raises(ValueError, match="there are 10 questions"):
        target_texts.chat_prompts(25, once=10)


def test_questions_of_other_data_sets_come_by_turns(monkeypatch):
    data = {
        "spec_bench": [{"task": "qa", "turns": [f"spec {i}"]} for i in range(8)],
        "gsm8k/train": [{"question": f"sum {i} of many words"} for i in range(5)],
        "squad_fewshot": [{"context": f"long text {i}", "question": "who?"} for i in range(3)],
    }
    monkeypatch.setattr("decodelab.lab.data.load_data", data.get)
    monkeypatch.setattr("decodelab.lab.data.has_data", lambda name: name in data)
    asked = target_texts.chat_prompts(14, once=1, words=4)
    assert sorted(asked[:4]) == [f"spec {i}" for i in (1, 3, 5, 7)]
    assert all(text.startswith("spec") for text in asked[4::2]) and asked[0] not in asked[4:]
    others = asked[5::2]
    assert not any(text.startswith("spec") for text in others)
    assert {len(text.split()) for text in others} == {4} and len(set(others)) == 5
    assert {text.endswith("who?") for text in others} == {True, False}
