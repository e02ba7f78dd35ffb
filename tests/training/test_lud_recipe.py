"""Training for lexical unit decoding: marking, packing of units with placeholders, resumption."""

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import VOCAB, small_model

from decodelab.core.tree import Tree
from decodelab.core.zoo import load, zoo_path

pytest.importorskip("accelerate")
training = pytest.importorskip("decodelab.training.lud", exc_type=ImportError)
data = pytest.importorskip("decodelab.training.unit_data", exc_type=ImportError)
P = VOCAB - 1  # the placeholder of the toys


def some_text(seed, length=30, start=4):
    rng = random.Random(seed)
    return [rng.randrange(2, P) for _ in range(length)], start


def some_units(seed, length=30, start=4):
    rng, at, found = random.Random(seed), start, []
    while at < length - 2:
        size = rng.randint(2, 9)
        found.append((at, min(at + size - 1, length - 1)))
        at += size + rng.randint(1, 3)
    return [(s, e) for s, e in found if e > s]


def one_unit(text, piece, k):
    "The placeholders of one piece, by themselves: the text is cut before it. Ids, and target of each placeholder."
    (ids, _), (s, e) = text, piece
    return torch.tensor([ids[:s] + [P] * (k - 1)]), [ids[s + j] if s + j <= e else -100 for j in range(1, k)]


# packing


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [2, 4, 7])
def test_all_units_in_one_forward_are_as_each_alone(kind, k, request):
    "C1 = C2: logits, and with them the losses, of every placeholder and every token."
    model = request.getfixturevalue(kind)
    texts = [some_text(0), some_text(1, length=17)]
    units = [some_units(0), some_units(1, length=17)]
    batch = data.collate([data.packed(t, u, k, P) for t, u in zip(texts, units)])
    with torch.no_grad():
        packed = model(**{n: batch[n] for n in ("input_ids", "position_ids", "attention_mask")}).logits
        for row, (text, found) in enumerate(zip(texts, units)):
            n = len(text[0])
            plain = model(torch.tensor([text[0]])).logits[0]
            assert (packed[row, :n] - plain).abs().max() < 1e-5  # clean tokens never see a placeholder
            for b, piece in enumerate(data.pieces(found, k)):
                ids, targets = one_unit(text, piece, k)
                alone = model(ids).logits[0, -(k - 1) :]
                at = slice(n + b * (k - 1), n + (b + 1) * (k - 1))
                assert (packed[row, at] - alone).abs().max() < 1e-5
                assert batch["labels"][row, at].tolist() == targets
                loss, same = (
                    torch.nn.functional.cross_entropy(x, torch.tensor(targets), reduction="sum", ignore_index=-100)
                    for x in (packed[row, at], alone)
                )
                assert abs(float(loss - same)) < 1e-4


@given(seed=st.integers(0, 99), k=st.integers(2, 6))
def test_the_mask_is_that_of_a_tree(seed, k):
    text, units = some_text(seed), some_units(seed)
    row = data.packed(text, units, k, P)
    parents = [*range(-1, len(text[0]) - 1)]
    for s, _ in data.pieces(units, k):
        first = len(parents)
        parents += [s - 1, *range(first, first + k - 2)]
    tree = Tree(parents)
    assert data.block_mask(row["seen"], row["block"]).equal(tree.mask)
    assert row["position_ids"].equal(tree.depth)


def test_a_mask_in_which_blocks_see_each_other_is_noticed(llama):
    "A negative control for C1 = C2."
    text, units = some_text(2), some_units(2)
    row = data.packed(text, units, 4, P)
    right = data.collate([row])
    wrong = right | {
        "attention_mask": right["attention_mask"]
        .new_zeros(right["attention_mask"].shape)
        .masked_fill(~torch.ones(right["attention_mask"].shape[-2:], dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    }
    with torch.no_grad():
        good, bad = (training.unit_losses(llama, b, P)[1] for b in (right, wrong))
    assert abs(float(good - bad)) > 1e-3


def test_by_hand():
    text = ([10, 11, 12, 13, 14, 15], 2)
    row = data.packed(text, [(2, 4)], 3, P)  # 12 13 14: the last token before it predicts 12, two placeholders 13 and 14
    assert row["input_ids"].tolist() == [10, 11, 12, 13, 14, 15, P, P]
    assert row["labels"].tolist() == [-100, 12, 13, 14, 15, -100, 13, 14]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3]
    row = data.packed(text, [(2, 3)], 4, P)  # a short unit: no loss behind it
    assert row["labels"].tolist()[6:] == [13, -100, -100]
    row = data.in_place(text, [(2, 4)], 3, P)
    assert row["input_ids"].tolist() == [10, 11, P, P, 14, 15]
    assert row["labels"].tolist() == [-100, 12, 13, 14, 15, -100]
    assert data.pieces([(2, 8)], 3) == [(2, 4), (5, 7)]  # the seventh token needs no placeholder
    assert data.pieces([(2, 3)], 4) == [(2, 3)]


def test_losses_by_hand(llama):
    text, units = some_text(3), some_units(3)
    batch = data.collate([data.packed(text, units, 4, P)])
    with torch.no_grad():
        ordinary, ahead = training.unit_losses(llama, batch, P)
        plain = llama(torch.tensor([text[0]])).logits[0, text[1] - 1 : -1].log_softmax(-1)
    expected = -plain.gather(-1, torch.tensor(text[0][text[1] :])[:, None]).mean()
    assert abs(float(ordinary - expected)) < 1e-5
    found = []
    for piece in data.pieces(units, 4):
        ids, targets = one_unit(text, piece, 4)
        with torch.no_grad():
            p = llama(ids).logits[0, -3:].log_softmax(-1)
        found += [-float(p[j, t]) for j, t in enumerate(targets) if t >= 0]
    assert float(ahead) == pytest.approx(sum(found) / len(found), abs=1e-4)


# marking


def test_probabilities_of_tokens(llama):
    texts = [some_text(4, length=9), some_text(5, length=20)]
    q = training.token_probs(llama, texts).split([9, 20])
    for (ids, _), row in zip(texts, q):
        with torch.no_grad():
            p = llama(torch.tensor([ids])).logits[0].softmax(-1)
        assert row[0] == 1
        assert row[1:].tolist() == pytest.approx([float(p[i, t]) for i, t in enumerate(ids[1:])], abs=1e-5)


def test_a_placeholder_of_its_own(llama, tokenizer):
    model = small_model()
    model.config.placeholder_token_id = None
    import copy

    own = copy.deepcopy(tokenizer)
    assert own.mask_token_id is None
    new = training.with_placeholder(model, own)
    assert new == VOCAB == own.mask_token_id == model.config.placeholder_token_id
    assert model.get_input_embeddings().num_embeddings == VOCAB + 1
    assert training.with_placeholder(model, own) == new  # once is enough
    programs, words = load("programs")
    assert training.with_placeholder(programs, words) == words.convert_tokens_to_ids("<mask>")
    assert programs.get_input_embeddings().num_embeddings == 459


# texts


def test_kinds_of_text(tmp_path):
    _, tokenizer = load("programs")
    words = data.kind_texts("words", tokenizer, 3, 40)
    assert all(len(ids) == 40 and start == 1 for ids, start in words)
    assert data.kind_texts("words", tokenizer, 2, 40) == words[:2]
    assert data.kind_texts("words", tokenizer, 3, 40, seed=1) != words
    programs = data.kind_texts("programs", tokenizer, 4, 96)
    for ids, start in programs:
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:start]).endswith('"""\n   ')
        assert len(ids) <= 96
    with pytest.raises(ValueError, match="exercises do not fit in blocks of 9 tokens: raise block"):
        data.kind_texts("programs", tokenizer, 2, 9)
    file = tmp_path / "own.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    own = data.kind_texts(str(file), tokenizer, 5, 30)
    assert {len(ids) for ids, _ in own} == {30}
    file.write_text("short")
    with pytest.raises(ValueError, match="too short for texts of 30 tokens"):
        data.kind_texts(str(file), tokenizer, 5, 30)
    with pytest.raises(ValueError, match="cannot read 'nowhere.txt'"):
        data.kind_texts("nowhere.txt", tokenizer, 5, 30)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 1}, "k must be at least 2"),
        ({"alpha": 1.0}, r"alpha lie in \[0, 1\)"),
        ({"weight": -1.0}, "weight and first_steps not be negative"),
        ({"packing": "other"}, "packing must be one of packed, in_place"),
        ({"steps": 0}, "must be positive"),
    ],
)
def test_bad_recipes(fields, message):
    with pytest.raises(ValueError, match=message):
        training.LUDRecipe(**fields)


# runs

SMALL = training.LUDRecipe(
    "small", texts="words,programs", count=24, held_out=8, block=80, alpha=0.3, first_steps=4, batch_size=4, steps=4, warmup=1, save_every=2, eval_every=4
)  # fmt: skip


def test_a_killed_run_ends_like_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    whole = training.train_lud(SMALL, tmp_path / "whole")

    class Killed(Exception):
        pass

    kept = training.UnitTrainer._save_checkpoint

    def save_then_die(self, *args, **kwargs):
        kept(self, *args, **kwargs)
        if self.args.run_name == dying[-1]:
            raise Killed

    monkeypatch.setattr(training.UnitTrainer, "_save_checkpoint", save_then_die)
    dying = []
    for name in ("small-first", "small"):
        dying.append(name)
        with pytest.raises(Killed):
            training.train_lud(SMALL, tmp_path / "killed")
    monkeypatch.setattr(training.UnitTrainer, "_save_checkpoint", kept)
    with monkeypatch.context() as patch:  # what was marked need not be marked again
        patch.setattr(training, "token_probs", None)
        again = training.train_lud(SMALL, tmp_path / "killed")
    assert again["after"] == whole["after"]
    assert whole["before"] != whole["after"]
    a, b = (load(tmp_path / n)[0] for n in ("whole", "killed"))
    assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters()))
    assert a.config.placeholder_token_id == 3
    first = load(tmp_path / "whole/first")[0]
    assert any(not x.equal(y) for x, y in zip(a.parameters(), first.parameters()))
    card = (tmp_path / "whole/README.md").read_text()
    assert "decodelab train" in card
    assert "programs ahead loss after" in card
    assert json.loads((tmp_path / "whole/training.json").read_text())["recipe"]["alpha"] == 0.3
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        training.train_lud(replace(SMALL, k=3), tmp_path / "whole")


def test_the_command():
    from decodelab.cli import _recipe

    recipe, train = _recipe("lud", ["alpha=0.5", "first_steps=0"])
    assert (recipe.alpha, recipe.first_steps) == (0.5, 0)
    assert train is training.train_lud


def test_the_shipped_model():
    folder = zoo_path("lud")
    assert (folder / "model.safetensors").stat().st_size < 1.5e6
    model, tokenizer = load("lud")
    assert model.config.placeholder_token_id == tokenizer.mask_token_id
    figures = json.loads((folder / "training.json").read_text())
    assert figures["recipe"]["packing"] == "packed"
    before, after = (figures[when]["programs"]["ahead_right"] for when in ("before", "after"))
    assert before < 0.1  # an untaught placeholder knows nothing
    assert after > 0.5
    assert training.LUDRecipe() == training.LUDRecipe(**figures["recipe"])  # `decodelab train lud` makes this model
