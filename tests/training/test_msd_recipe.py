"""Training of a drafter for pictures and text, and of its small target: the same run after a stop, losses, shares, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decodelab.lab.tasks.shapes import IMAGE, PICTURED, WORDED, shapes_processor, talk
from decodelab.training.msd import CURRICULA, Curriculum, MSDRecipe, load_target, msd_losses, target_features, train_msd, train_msd_recipe
from decodelab.training.shapes_vlm import ShapesRecipe, Talks, collate_talks, pretrain_tower, talk_row, train_shapes_vlm
from decodelab.vision.msd_drafter import new_msd_drafter

SIZE = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "vision_size": 32, "vision_layers": 1}
SHAPES = ShapesRecipe("trial", **SIZE, tower_steps=2, batch_size=4, steps=8, warmup=2, save_every=4, eval_every=4)
MSD = MSDRecipe("trial", intermediate_size=32, batch_size=4, steps=8, warmup=2, save_every=4, eval_every=4, epochs=8)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def processor():
    return shapes_processor()


@pytest.fixture
def pair(processor):
    return SHAPES.model(processor).eval(), processor


def train_drafter(settings: Any, out: Any, pair: Any) -> dict[str, Any]:
    return train_msd(settings, out, pair)


CASES = {"shapes-vlm": (SHAPES, lambda settings, out, pair: train_shapes_vlm(settings, out)), "msd": (MSD, train_drafter)}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_lost_its_last_checkpoint_ends_like_one_that_did_not(name, pair, tmp_path):
    settings, run = CASES[name]
    whole = run(settings, tmp_path / "whole", pair)
    shutil.copytree(tmp_path / "whole/run", tmp_path / "again/run")
    shutil.rmtree(tmp_path / "again/run/checkpoint-8")
    again = run(settings, tmp_path / "again", pair)
    weights = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("whole", "again")]
    assert weights[0] == weights[1]
    key = "held_out" if "held_out" in whole else "accuracy"
    assert again[key] == whole[key]


def test_a_checkpoint_without_the_weights_of_the_model_is_an_error(pair, tmp_path):
    CASES["msd"][1](MSD, tmp_path, pair)
    shutil.rmtree(tmp_path / "run/checkpoint-8")
    file = tmp_path / "run/checkpoint-4/model.safetensors"
    save_file({f"old.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"the checkpoint does not hold body\.layers\.0\..* and \d+ other weights"):
        CASES["msd"][1](MSD, tmp_path, pair)


def test_the_share_of_pictures_follows_the_two_stages():
    settings = MSDRecipe(steps=400, epochs=40, batch_size=4)
    shares = [settings.share(step) for step in range(400)]
    assert set(shares[:200]) == {0.0}
    assert shares[-10:] == [1.0] * 10
    assert shares == sorted(shares)
    assert {round(s, 12) for s in shares} == {round(2 * max(0, e - 20) / 40, 12) for e in range(1, 41)}
    for other, expected in (("text", 0.0), ("pictures", 1.0)):
        assert {replace(settings, curriculum=other).share(step) for step in range(400)} == {expected}
    assert abs(replace(settings, curriculum="mixed").share(7) - sum(shares) / 400) < 1e-12


def test_rows_have_pictures_as_often_as_the_share_says():
    settings = MSDRecipe(steps=20, epochs=20, batch_size=500)
    rows = Curriculum(settings, range(10), range(10))
    for step in range(20):
        found = sum(rows.pictured(500 * step + j) for j in range(500)) / 500
        share = settings.share(step)
        assert abs(found - share) <= 4 * (share * (1 - share) / 500) ** 0.5
    again = Curriculum(replace(settings), range(10), range(10))
    assert [rows.pictured(i) for i in range(6000, 7000)] == [again.pictured(i) for i in range(6000, 7000)]
    other = Curriculum(replace(settings, seed=1), range(10), range(10))
    assert [rows.pictured(i) for i in range(6000, 7000)] != [other.pictured(i) for i in range(6000, 7000)]


def batch_of(processor: Any, kinds: Any, n: int = 4, seed: str = "test") -> dict[str, torch.Tensor]:
    rows = Talks(processor, n, kinds, seed)
    return collate_talks([*rows])


def test_the_losses_are_those_of_a_plain_loop(pair):
    model, processor = pair
    drafter = new_msd_drafter(model, 32).float()
    rows = [talk_row(processor, talk(kind, 3), 3) for kind in ("row", "story", "caption")]
    near, same, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for row in rows:
            one = collate_talks([row])
            e, cells, h = target_features(model, one)
            g = drafter(e, h[:, :-1], cells).logits
            for i in range(len(row["input_ids"]) - 1):
                if row["labels"][i] == -100:
                    continue
                p, q = (model.lm_head(x).softmax(-1) for x in (h[0, i + 1], g[0, i]))
                d = (g[0, i] - h[0, i + 1]).abs()
                near += float(torch.where(d < 1, 0.5 * d**2, d - 0.5).mean())
                same -= float((p * q.log()).sum())
                tokens += 1
        found = msd_losses(drafter, model, collate_talks(rows))
    assert [float(x) for x in found] == pytest.approx([near / tokens, same / tokens], rel=1e-4)


def test_without_pictures_losses_and_gradients_are_those_of_eagle(pair):
    model, processor = pair

    def learnt(decoupled: bool, kinds: Any) -> tuple[float, list[torch.Tensor]]:
        drafter = new_msd_drafter(model, 32, decoupled).float()
        loss = sum(msd_losses(drafter, model, batch_of(processor, kinds)))
        loss.backward()
        return float(loss.detach()), [p.grad for p in drafter.parameters() if p.grad is not None]

    (a, ours), (b, eagle) = learnt(True, WORDED), learnt(False, WORDED)
    assert a == b
    assert all(x.equal(y) for x, y in zip(ours, eagle))
    (a, ours), (b, eagle) = learnt(True, PICTURED), learnt(False, PICTURED)
    assert a != b


def test_the_target_sees_the_picture_when_its_states_are_made(pair):
    model, processor = pair
    batch = batch_of(processor, ["caption"])
    e, cells, h = target_features(model, batch)
    blank = {**batch, "pixel_values": -batch["pixel_values"]}
    other, _, dark = target_features(model, blank)
    assert not torch.allclose(e[cells], other[cells])
    assert torch.equal(e[~cells], other[~cells])
    assert not torch.allclose(h[:, -1], dark[:, -1])


def test_a_batch_of_talks_holds_its_pictures_in_order(processor):
    rows = [talk_row(processor, talk(kind, 1), 1) for kind in ("story", "caption", "repeat", "count")]
    batch = collate_talks(rows)
    cells = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)).sum(1).tolist()
    assert cells == [0, 16, 0, 16]
    assert batch["pixel_values"].equal(torch.cat([rows[1]["pixel_values"], rows[3]["pixel_values"]]))
    assert "pixel_values" not in collate_talks([rows[0], rows[2]])


def test_the_tower_learns_to_name_cells(processor):
    losses = pretrain_tower(ShapesRecipe().model(processor), processor, 60)
    assert losses[0] > 3 and sum(losses[-5:]) / 5 < 0.5


def test_own_talks(pair, tmp_path):
    _, processor = pair
    own = tuple([talk_row(processor, talk(kinds, i), i) for i in range(34)] for kinds in (WORDED, PICTURED))
    figures = train_msd(MSD, tmp_path, pair, own)
    assert set(figures["held_out"]) == {"words", "pictures"}
    with pytest.raises(ValueError, match="at least 32 talks of each kind, got 5 without and 34 with"):
        train_msd(MSD, tmp_path / "few", pair, (own[0][:5], own[1]))


def test_a_run_on_other_talks_is_another_run(pair, tmp_path):
    _, processor = pair
    own = tuple([talk_row(processor, talk(kinds, i), i) for i in range(34)] for kinds in (WORDED, PICTURED))
    train_msd(MSD, tmp_path, pair, own)
    with pytest.raises(ValueError, match="checkpoints of another run \\(the talks differs\\)"):
        train_msd(MSD, tmp_path, pair, (own[0][::-1], own[1]))


def test_a_curriculum_of_words_needs_no_pictures(pair, tmp_path):
    _, processor = pair
    words = [talk_row(processor, talk(WORDED, i), i) for i in range(34)]
    figures = train_msd(replace(MSD, curriculum="text"), tmp_path, pair, (words, []))
    assert "words" in figures["held_out"]


def test_rows_of_a_batch_may_lack_a_field_of_tokens(processor):
    rows = [talk_row(processor, talk(kind, 1), 1) for kind in ("story", "caption")]
    rows[1]["mm_token_type_ids"] = (rows[1]["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)).long()
    batch = collate_talks([{name: v.tolist() if v.ndim == 1 else v for name, v in row.items()} for row in rows])
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape and batch["mm_token_type_ids"].sum(1).tolist() == [0, 16]
    del rows[0]["labels"]
    with pytest.raises(ValueError, match="a row lacks labels"):
        collate_talks(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curriculum": "both"}, f"curriculum must be one of {', '.join(CURRICULA)}"),
        ({"epochs": 0}, "must be positive"),
        ({"noise": -0.1}, "must not be negative"),
        ({"regression": 0.0, "distillation": 0.0}, "one of the weights not 0"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MSD, **change)


def test_a_target_that_reads_text_alone_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="tales has no processor of pictures"):
        train_msd_recipe(replace(MSD, target="tales"), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_the_recipe_writes_a_card_whose_command_trains_it_again(tmp_path, monkeypatch):
    small = replace(MSD, steps=2, epochs=2)
    monkeypatch.setattr("decodelab.training.msd.load_target", lambda name: (SHAPES.model(made).eval(), made))
    made = shapes_processor()
    train_msd_recipe(small, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "decodelab train msd --set name=trial" in card and f'load_msd_drafter("{tmp_path / "out"}")' in card
    assert set(json.loads((tmp_path / "out/training.json").read_text())["held_out"]) == {*PICTURED, *WORDED}


def test_the_zoo_s_target_knows_shapes_and_colours():
    model, processor = load_target("shapes-vlm")
    batch = batch_of(processor, ["row"], 20, "a test")
    with torch.no_grad():
        best = model(**batch).logits[:, :-1].argmax(-1)
    want = batch["labels"][:, 1:]
    assert float(((best == want) | (want < 0)).all(1).float().mean()) > 0.8
