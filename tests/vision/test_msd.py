"""MSD: the rules of the drafter, its tree, and exact texts with and without pictures."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from decodelab.core.tree import Tree
from decodelab.core.zoo import load
from decodelab.speculative.base import walk
from decodelab.vision.msd import MSD, prune
from decodelab.vision.msd_drafter import MSDConfig, MSDDrafter, draft_logits, load_msd_drafter, new_msd_drafter, pairs

pictures = importlib.import_module("test_pictures")
CALLS, GREEDY, llava, qwen, expected = pictures.CALLS, pictures.GREEDY, pictures.llava, pictures.qwen, pictures.expected
SHAPES = [{}, {"k": 1, "nodes": 4, "depth": 2}, {"k": 3, "nodes": 200, "depth": 2}, {"k": 64, "nodes": 20, "depth": 0}, {"nodes": 2}]


def minimal(model: Any, drafter: Any, inputs: dict[str, Any], n: int, depth: int) -> tuple[torch.Tensor, list[int]]:
    "Greedy text of up to n new tokens and accepted lengths of a chain, without a cache; one row."
    ids, end, accepted = inputs["input_ids"], inputs["input_ids"].shape[1] + n, []
    seen = {name: v for name, v in inputs.items() if name in ("pixel_values", "image_grid_thw")}

    def target(ids: torch.Tensor) -> Any:
        types = {"mm_token_type_ids": (ids == pictures.IMAGE).int()} if "image_grid_thw" in seen else {}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **seen, **types)

    with torch.no_grad():
        out = target(ids)
        while ids.shape[1] < end:
            e, cells = pairs(model, ids, out.hidden_states[0])
            h, draft = out.hidden_states[-1][:, : ids.shape[1] - 1], ids[:, :0]
            for _ in range(depth + 1):
                g = drafter(e, h, cells).logits[:, -1:]
                draft = torch.cat([draft, draft_logits(model, g).argmax(-1)], 1)
                e, h = torch.cat([e, model.get_input_embeddings()(draft[:, -1:])], 1), torch.cat([h, g], 1)
                cells = torch.nn.functional.pad(cells, (0, 1), value=False)
            if bool((draft == pictures.IMAGE).any()):  # a target without a cache would look for its picture
                break
            out = target(torch.cat([ids, draft], 1))
            best = out.logits[0, ids.shape[1] - 1 :].argmax(-1)
            accepted.append(int((draft[0] == best[:-1]).long().cumprod(0).sum()))
            ids = torch.cat([ids, draft[:, : accepted[-1]], best[None, accepted[-1], None]], 1)
    return ids[:, :end], accepted


def aware(model: Any, seed: int = 0) -> MSDDrafter:
    "A drafter that is right now and then: the target's states pass through, with a little noise."
    drafter = new_msd_drafter(model, 32, seed=seed)
    with torch.no_grad():
        for part in (drafter.body.layers[0].self_attn.o_proj, drafter.body.layers[0].mlp.down_proj):
            part.weight.mul_(0.3)
    return drafter


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_any_tree_of_a_random_drafter_gives_the_text_of_generate(call, shape):
    make, inputs = CALLS[call]
    out = make().generate(**inputs(), **GREEDY, custom_generate=MSD(new_msd_drafter(make()), **shape))
    assert out.sequences.equal(expected(call))


@pytest.mark.parametrize("call", ["llava", "llava, two pictures", "qwen"])
def test_a_chain_accepts_what_the_minimal_version_accepts(call):
    make, inputs = CALLS[call]
    model, given = make(), inputs()
    rounds: list[int] = []
    for seed in range(6):
        drafter = aware(model, seed)
        text, accepted = minimal(model, drafter, given, 16, depth=2)
        out = MSD(drafter, k=1, depth=2, nodes=4).generate(model, **given, **GREEDY)
        assert text.equal(out.sequences[:, : text.shape[1]])
        lengths = out.stats.accepted_lengths[0]
        n = min(len(accepted), len(lengths) - 2)  # the last drafts are cut
        assert lengths[:n] == accepted[:n]
        rounds += accepted
    assert len(rounds) > 20 and max(rounds) > 0


def drafts_of(decoder: MSD, model: Any, inputs: dict[str, Any], monkeypatch: Any) -> list[list[tuple[list[int], list[int]]]]:
    "Of every row, tokens and parents of each round's tree."
    found: dict[int, list[tuple[list[int], list[int]]]] = {}
    original = MSD.draft

    def draft(self, call, roots):
        made = original(self, call, roots)
        parents = torch.atleast_2d(made.tree.parents).expand(len(made.tokens), -1).tolist()
        for row, tokens, above in zip(call.rows, made.tokens.tolist(), parents):
            found.setdefault(row, []).append((tokens, above))
        return made

    monkeypatch.setattr(MSD, "draft", draft)
    decoder.generate(model, **inputs, **GREEDY)
    monkeypatch.setattr(MSD, "draft", original)
    return [found[row] for row in sorted(found)]


def test_a_row_of_a_padded_batch_drafts_what_it_drafts_alone(monkeypatch):
    model = llava()
    rows = [pictures.prompt(2, 1, 4, 3), pictures.prompt(5, 0, 3, 4), pictures.prompt(1, 2, 6, 5)]
    batch = pictures.seen_by_llava(rows)
    decoder, at = MSD(aware(model), k=3, depth=2, nodes=9), 0
    together = drafts_of(decoder, model, batch, monkeypatch)
    for row, made in zip(rows, together):
        n = int((row == pictures.IMAGE).sum()) // 4
        alone = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        alone |= {"pixel_values": batch["pixel_values"][at : at + n]} if n else {}
        at += n
        (own,) = drafts_of(decoder, model, alone, monkeypatch)
        n = min(len(made), len(own)) - 3  # the depth of the last trees depends on how far the others are
        assert n > 4 and made[:n] == own[:n]
    assert len({len(made) for made in together}) > 1  # rows move at different speeds


def test_without_pictures_it_is_the_drafter_of_eagle():
    torch.manual_seed(0)
    shape = MSDConfig(16, 24, 4, 2, 4)
    ours = MSDDrafter(shape)
    eagle = MSDDrafter(MSDConfig(16, 24, 4, 2, 4, decoupled=False))
    eagle.load_state_dict(ours.state_dict())
    e, h, none = torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
    for drafter in (ours, eagle):
        drafter(e, h, none).logits.square().sum().backward()
    assert ours(e, h, none).logits.equal(eagle(e, h).logits)
    assert all(a.grad.equal(b.grad) for a, b in zip(ours.parameters(), eagle.parameters()) if a.grad is not None)


def test_states_at_cells_are_never_read_and_embeddings_are():
    torch.manual_seed(0)
    drafter = MSDDrafter(MSDConfig(16, 24, 4, 2, 4)).eval()
    e, h = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    cells = torch.tensor([[False, True, True, True, False, False, False, False]])
    noisy = torch.where(cells[..., None], torch.full_like(h, 1e3), h)
    assert drafter(e, h, cells).logits.equal(drafter(e, noisy, cells).logits)
    moved = e.clone()
    moved[0, 2] += 1
    assert not drafter(e, h, cells).logits[0, 3:].equal(drafter(moved, h, cells).logits[0, 3:])
    assert drafter(e, h, cells).logits[0, :2].equal(drafter(moved, h, cells).logits[0, :2])  # nothing sees ahead
    last = h.clone()
    last[0, 4] += 1  # the state of the last cell, behind which a word stands
    assert not drafter(e, h, cells).logits[0, 4:].equal(drafter(e, last, cells).logits[0, 4:])


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_fusion_learns_nothing_at_cells(decoupled):
    torch.manual_seed(0)
    drafter = MSDDrafter(MSDConfig(16, 24, 4, 2, 4, decoupled=decoupled))
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    drafter.fc.register_forward_hook(keep)
    cells = torch.tensor([[False, True, True, False, False]])
    drafter(torch.randn(1, 5, 16), torch.randn(1, 5, 16), cells).logits.square().sum().backward()
    assert bool((kept[0].grad[cells] == 0).all()) is decoupled
    assert not bool((kept[0].grad[~cells] == 0).any())


def test_the_mask_of_pictures_is_shifted_with_the_embeddings():
    model, given = llava(), CALLS["llava"][1]()
    merged = model(**given, output_hidden_states=True).hidden_states[0]
    e, cells = pairs(model, given["input_ids"], merged)
    assert cells[0].tolist() == (given["input_ids"][0, 1:] == pictures.IMAGE).tolist()
    assert torch.allclose(e, merged[:, 1:])
    assert not torch.allclose(e, model.get_input_embeddings()(given["input_ids"][:, 1:]))


@pytest.mark.parametrize("seed", range(20))
def test_pruned_trees_hold_parents_with_their_children(seed):
    generator = torch.Generator().manual_seed(seed)
    k, depth, nodes = 3, 3, int(torch.randint(1, 34, (1,), generator=generator))
    steps = -torch.randint(0, 3, (2, k + depth * k * k), generator=generator).float()  # with many ties
    parents, scores = [torch.full((2, k), -1)], [steps[:, :k]]
    frontier, first = torch.arange(k).expand(2, -1), k
    for level in range(depth):
        above = frontier.repeat_interleave(k, 1)
        parents.append(above)
        at = k + level * k * k
        scores.append(torch.cat(scores, 1).gather(1, above) + steps[:, at : at + k * k])
        frontier, first = first + scores[-1].topk(k).indices, first + k * k
    pool = torch.cat(parents, 1), torch.cat(scores, 1)
    numbers = torch.arange(pool[0].shape[1]).expand(2, -1)
    chosen, up, kept = prune(numbers, *pool, nodes)
    assert chosen.shape[1] == min(nodes - 1, pool[0].shape[1])
    for row in range(2):
        names = [-1, *chosen[row].tolist()]
        assert [names[u] for u in up[row].tolist()] == [int(pool[0][row, c]) for c in chosen[row]]
        left = sorted(set(range(pool[0].shape[1])) - set(chosen[row].tolist()))
        if left and chosen.shape[1]:
            assert kept[row].min() >= pool[1][row, left].max()
    if chosen.shape[1]:
        tree = Tree(torch.nn.functional.pad(up, (1, 0), value=-1))
        assert int(tree.depth.max()) <= depth + 1


@pytest.mark.parametrize(("k", "depth", "nodes"), [(10, 5, 60), (1, 5, 60), (4, 2, 9), (2, 0, 60)])
def test_sizes_of_the_tree(k, depth, nodes, monkeypatch):
    model = llava()
    (rounds,) = drafts_of(MSD(aware(model), k=k, depth=depth, nodes=nodes), model, CALLS["llava"][1](), monkeypatch)
    tokens, parents = rounds[0]
    assert len(tokens) == min(nodes, 1 + k + depth * k * k)
    assert int(Tree(parents).depth.max()) <= depth + 1
    if k == 1:
        assert parents == [-1, *range(depth + 1)]


def samples(model: Any, inputs: dict[str, Any], decoder: Any, n: int, **settings: Any) -> Counter:
    "Counts of the first three sampled tokens."
    many = {name: torch.cat([value] * n) for name, value in inputs.items()}
    torch.manual_seed(3)
    out = decoder.generate(model, **many, max_new_tokens=3, do_sample=True, pad_token_id=pictures.PAD, **settings)
    return Counter(map(tuple, out.sequences[:, -3:-1].tolist()))


def joint(model: Any, inputs: dict[str, Any], k: int, temperature: float) -> dict[tuple[int, int], float]:
    "Exact probabilities of two tokens."

    def best(ids: torch.Tensor) -> dict[int, float]:
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**given).logits[0, -1].double().topk(k)
        return dict(zip(logits.indices.tolist(), (logits.values / temperature).softmax(0).tolist()))

    ids = inputs["input_ids"]
    return {(a, b): p * q for a, p in best(ids).items() for b, q in best(torch.cat([ids, torch.tensor([[a]])], 1)).items()}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_about_a_picture_have_the_distribution_of_the_model(temperature):
    model, given, n = llava(), CALLS["llava"][1](), 400
    right = joint(model, given, 4, temperature)
    counts = samples(model, given, MSD(aware(model), k=4, depth=2, nodes=12), n, top_k=4, temperature=temperature)
    assert set(counts) <= set(right)
    assert chisquare([counts[pair] for pair in right], [n * p for p in right.values()]).pvalue > 1e-3


class Untempered(MSD):
    "The last token of a round is drawn without temperature, as in the released code."

    def walk(self, call, draft, logits):
        paths, emitted = walk(call, draft, logits, self.rule)
        for row, path in enumerate(paths):
            last = logits[row, path[-1]].double()
            best = last.topk(4)
            children = {draft.tokens[row, c].item() for c in draft.drafted(row)[path[-1]]}
            weights = torch.tensor([0.0 if t.item() in children else 1.0 for t in best.indices]) * best.values.softmax(0)
            if float(weights.sum()):
                emitted[row][-1] = int(best.indices[torch.multinomial(weights, 1)])
        return paths, emitted


def test_a_last_token_without_temperature_is_noticed():
    model, given, n = llava(), CALLS["llava"][1](), 400
    right = joint(model, given, 4, 0.7)
    counts = samples(model, given, Untempered(new_msd_drafter(model), k=1, depth=1, nodes=3), n, top_k=4, temperature=0.7)
    shares = [counts[pair] for pair in right]
    assert chisquare(shares, [sum(shares) * p for p in right.values()]).pvalue < 1e-3


def test_a_passed_cache_with_all_but_the_last_token_goes_on():
    model = llava()
    text = pictures.prompt(6, 0, 3, 11)[None]
    given = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    plain = model.generate(**given, **GREEDY)
    for held in (text.shape[1] - 1, 4):
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=text[:, :held], past_key_values=cache, use_cache=True)
        out = MSD(aware(model)).generate(model, **given, **GREEDY, past_key_values=cache)
        assert out.sequences.equal(plain)
        assert out.stats.drafted > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MSD(None, k=0), "k and nodes must be at least 1"),
        (lambda: MSD(None, depth=-1), "depth not negative"),
        (lambda: MSDConfig(num_attention_heads=3, num_key_value_heads=2), "heads a multiple of key heads"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_drafter_of_another_target_is_refused():
    model = llava()
    with pytest.raises(ValueError, match="made for a target of width 16"):
        MSD(MSDDrafter(MSDConfig(16, 24, 4, 2, 4))).generate(model, **CALLS["llava"][1](), **GREEDY)
    with pytest.raises(ValueError, match="drafter must be an MSDDrafter"):
        MSD(model).generate(model, **CALLS["llava"][1](), **GREEDY)


def test_an_encoder_decoder_model_is_refused():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        new_msd_drafter(load("reader")[0])


def test_a_target_whose_embeddings_are_narrower_than_its_states_is_refused():
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    with pytest.raises(ValueError, match="no hidden states as wide as its embeddings"):
        new_msd_drafter(model)


def test_a_folder_that_holds_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tales holds no MSDDrafter \(its config.json says 'llama', not 'msd_drafter'\)"):
        load_msd_drafter("tales")
    with pytest.raises(FileNotFoundError):
        load_msd_drafter(tmp_path)


def test_a_drafter_that_says_nan_costs_nothing_but_time():
    model, inputs = llava(), CALLS["llava, batch"][1]
    drafter = new_msd_drafter(model)
    drafter.fc.bias.data.fill_(torch.nan)
    out = MSD(drafter, k=3, depth=2).generate(model, **inputs(), **GREEDY)
    assert out.sequences.equal(expected("llava, batch"))
