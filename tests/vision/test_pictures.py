"""Pictures beside the text: every lossless decoder writes what transformers' own `generate` writes about them, alone and in padded batches."""

from __future__ import annotations

from collections import Counter
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import DynamicCache

from decodelab import PromptLookup, TokenRecycling, decoders
from decodelab.core import call as call_module
from decodelab.core.session import Session
from decodelab.sampling.base import Autoregressive
from decodelab.search.classics import BeamSearch
from decodelab.speculative.drafters import DraftModel

VOCAB, PAD, IMAGE, START = 64, 0, 63, 62
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": VOCAB, "max_position_embeddings": 128, "initializer_range": 0.3, "tie_word_embeddings": False, "head_dim": 8}
TEXT |= {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD}


def _ready(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model.eval()


@lru_cache(maxsize=1)
def llava() -> Any:
    "CLIP-like tower, four cells a picture, in front of a tiny Llama."
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower, "initializer_range": 0.3},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return _ready(transformers.LlavaForConditionalGeneration(config))


@lru_cache(maxsize=1)
def qwen() -> Any:
    "Positions of a picture's cells in time, height and width."
    torch.manual_seed(1)
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [0], "initializer_range": 0.3}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    special = {"image_token_id": IMAGE, "vision_start_token_id": START, "video_token_id": 61, "vision_end_token_id": 60}
    config = transformers.Qwen2_5_VLConfig(vision_config=tower, text_config=text, **special, tie_word_embeddings=False)
    return _ready(transformers.Qwen2_5_VLForConditionalGeneration(config))


def prompt(before: int, pictures: int, after: int, seed: int, cells: int = 4) -> torch.Tensor:
    "Ids [length]: text, pictures of `cells` placeholders each with a word between them, text."
    words = torch.randint(5, 60, (before + pictures + after,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = words[:before]
    for i in range(pictures):
        ids += [IMAGE] * cells + [words[before + i]]
    return torch.tensor(ids + words[before + pictures :])


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    "Left-padded ids and mask."
    width = max(map(len, prompts))
    rows = [torch.nn.functional.pad(p, (width - len(p), 0), value=PAD) for p in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_by_llava(prompts: list[torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    "Inputs of the model: a picture for every four placeholders."
    given = padded(prompts)
    n = int((given["input_ids"] == IMAGE).sum()) // 4
    return {**given, **({"pixel_values": _noise(n, 3, 8, 8, seed=seed)} if n else {})}


def seen_by_qwen(prompts: list[torch.Tensor], grids: list[tuple[int, int]], seed: int = 8) -> dict[str, torch.Tensor]:
    "Inputs of the model; `grids`: height and width of each picture, in patches of which four make a cell."
    given = padded(prompts)
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    if grids:
        given["image_grid_thw"] = torch.tensor([(1, h, w) for h, w in grids])
        given["pixel_values"] = _noise(sum(h * w for h, w in grids), 3 * 2 * 4 * 4, seed=seed)
    return given


CALLS = {
    "llava": (llava, lambda: seen_by_llava([prompt(3, 1, 5, 1)])),
    "llava, two pictures": (llava, lambda: seen_by_llava([prompt(2, 2, 4, 2)])),
    "llava, batch": (llava, lambda: seen_by_llava([prompt(2, 1, 4, 3), prompt(5, 0, 3, 4), prompt(1, 2, 6, 5)])),
    "qwen": (qwen, lambda: seen_by_qwen([prompt(3, 1, 5, 1, cells=6)], [(4, 6)])),
    "qwen, batch": (
        qwen,
        lambda: seen_by_qwen([prompt(2, 1, 4, 3, cells=6), prompt(5, 0, 3, 4), prompt(1, 2, 6, 5)], [(6, 4), (4, 4), (2, 8)]),
    ),
}

METHODS = {
    name: m for name, m in decoders().items() if m.lossless and m.family != "diffusion" and name != "exact_extract"
}  # an extracted answer must be able to end
every_method = pytest.mark.parametrize("name", sorted(METHODS))
ENGINES = [Autoregressive(), PromptLookup(), TokenRecycling()]


@cache
def expected(call: str) -> torch.Tensor:
    "Greedy text of transformers' own generate."
    make, inputs = CALLS[call]
    return make().generate(**inputs(), **GREEDY)


@pytest.mark.parametrize("call", CALLS)
def test_pictures_matter(call):
    make, inputs = CALLS[call]
    given = inputs()
    assert not make().generate(**{**given, "pixel_values": -given["pixel_values"]}, **GREEDY).equal(expected(call))


@pytest.mark.parametrize("call", CALLS)
@every_method
def test_greedy_text_is_that_of_generate(name, call):
    make, inputs = CALLS[call]
    model = make()
    out = model.generate(**inputs(), **GREEDY, custom_generate=METHODS[name].example(model))
    assert out.sequences.equal(expected(call))


@pytest.mark.parametrize("call", ["llava, batch", "qwen, batch"])
@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].samples))
def test_sampling_with_one_choice_is_greedy(name, call):
    make, inputs = CALLS[call]
    out = METHODS[name].example(make()).generate(make(), **inputs(), **{**GREEDY, "do_sample": True, "top_k": 1})
    assert out.sequences.equal(expected(call))


def _joint(model: Any, inputs: dict[str, torch.Tensor], k: int) -> dict[tuple[int, int], float]:
    "Exact probabilities of the first two tokens when each is drawn from the best `k`."

    def best(ids: torch.Tensor) -> dict[int, float]:
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            more["mm_token_type_ids"] = (ids == IMAGE).int()
        logits = model(**{**inputs, **more}).logits[0, -1].double().topk(k)
        return dict(zip(logits.indices.tolist(), logits.values.softmax(0).tolist()))

    ids = inputs["input_ids"]
    first = best(ids)
    return {(a, b): p * q for a, p in first.items() for b, q in best(torch.cat([ids, torch.tensor([[a]])], 1)).items()}


@pytest.mark.parametrize("decoder", ENGINES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("call", ["llava", "qwen"])
def test_samples_have_the_distribution_of_the_model(call, decoder):
    make, inputs = CALLS[call]
    model, given, n = make(), inputs(), 200
    many = {name: torch.cat([value] * n) for name, value in given.items()}
    torch.manual_seed(5)
    out = decoder.generate(model, **many, max_new_tokens=3, do_sample=True, top_k=3, pad_token_id=PAD)
    counts = Counter(map(tuple, out.sequences[:, -3:-1].tolist()))
    right = _joint(model, given, 3)
    wrong = _joint(model, {**given, "pixel_values": -given["pixel_values"]}, 3)
    assert set(counts) <= set(right)
    assert chisquare([counts[pair] for pair in right], [n * p for p in right.values()]).pvalue > 1e-3
    assert not set(counts) <= set(wrong)  # of another picture


@pytest.mark.parametrize("decoder", ENGINES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("call", ["llava, batch", "qwen, batch"])
def test_a_row_that_ends_early(call, decoder):
    make, inputs = CALLS[call]
    text = expected(call)[:, -GREEDY["max_new_tokens"] :]
    end = next(int(t) for t in text[0, 3:] if t not in text[1, :12])  # the first row ends, the second goes on
    asked = {**inputs(), **GREEDY, "eos_token_id": end}
    theirs = make().generate(**asked)
    out = decoder.generate(make(), **asked)
    assert (theirs == end).any() and out.sequences.equal(theirs)
    if isinstance(decoder, Autoregressive) and call.startswith("llava"):  # rows that have ended cost nothing
        assert out.stats.target_tokens == inputs()["input_ids"].numel() + sum(len(row) - 1 for row in out.continuations)


def test_a_drafter_that_agrees_sees_no_picture_and_may_be_refuted():
    model, inputs = llava(), CALLS["llava, batch"][1]()
    drafter = _ready(transformers.LlamaForCausalLM(model.config.text_config))
    drafter.model.load_state_dict(model.model.language_model.state_dict())
    drafter.lm_head.load_state_dict(model.lm_head.state_dict())
    out = DraftModel(drafter=drafter).generate(model, **inputs, **GREEDY)
    assert out.sequences.equal(expected("llava, batch"))
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert DraftModel(drafter=drafter).generate(model, **text, **GREEDY).stats.target_forwards < out.stats.target_forwards


@pytest.mark.parametrize("call", ["llava", "qwen"])
def test_pictures_are_shown_once_and_nothing_stays(call):
    make, inputs = CALLS[call]
    model, given, shown, towers = make(), inputs(), [], []
    tower = model.model.visual if call == "qwen" else model.model.vision_tower
    PromptLookup().generate(model, **given, **GREEDY)  # the trial is over
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = expected(call)  # `generate` writes on the model
    deltas = model.model.rope_deltas = torch.tensor([[5]]) if call == "qwen" else None
    hooks = [
        model.register_forward_pre_hook(lambda _, args, more: shown.append(bool(more.get("mm_encoder_outputs"))), with_kwargs=True),
        tower.register_forward_pre_hook(lambda *_: towers.append(1)),
    ]
    for decoder in ENGINES:
        shown.clear(), towers.clear()
        first = decoder.generate(model, **given, **GREEDY).sequences
        assert len(towers) == 1 and shown[0] and not any(shown[1:]) and len(shown) > 2
        other = decoder.generate(model, **{**given, "pixel_values": -given["pixel_values"]}, **GREEDY).sequences
        assert first.equal(wanted) and not other.equal(first)
        assert decoder.generate(model, **given, **GREEDY).sequences.equal(first)
        if call == "qwen":
            assert model.model.rope_deltas is deltas
    for hook in hooks:
        hook.remove()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("decoder", [*ENGINES, DraftModel], ids=lambda d: getattr(d, "__name__", type(d).__name__))
@pytest.mark.parametrize("call", ["llava", "qwen", "llava, batch"])
def test_a_second_turn_behind_pictures_in_a_passed_cache(call, decoder):
    make, inputs = CALLS[call]
    model, given = make(), inputs()
    decoder = decoder if not isinstance(decoder, type) else METHODS["draft_model"].example(model)

    def second_turn(**more: Any) -> Any:
        cache = DynamicCache()
        first = model.generate(**given, **{**GREEDY, "max_new_tokens": 4}, past_key_values=cache)
        ids = torch.cat([first, torch.arange(7, 11).expand(len(first), -1)], 1)
        mask = torch.nn.functional.pad(given["attention_mask"], (0, 8), value=1)
        out = model.generate(ids, attention_mask=mask, **GREEDY, past_key_values=cache, **more)
        return getattr(out, "sequences", out)

    assert second_turn(custom_generate=decoder).equal(second_turn())


def test_windows_count_tokens_not_turns():
    text = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    config = transformers.Qwen2_5_VLConfig.from_dict(qwen().config.to_dict())
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention", "sliding_attention"]
    torch.manual_seed(2)
    model, inputs = _ready(transformers.Qwen2_5_VLForConditionalGeneration(config)), CALLS["qwen, batch"][1]()
    theirs = model.generate(**inputs, **GREEDY)
    for decoder in ENGINES:
        assert decoder.generate(model, **inputs, **GREEDY).sequences.equal(theirs)


def test_up_to_the_end_of_the_context(monkeypatch):
    model, inputs = qwen(), CALLS["qwen, batch"][1]()
    length = inputs["input_ids"].shape[1]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + GREEDY["max_new_tokens"])
    for decoder in ENGINES:
        assert decoder.generate(model, **inputs, **GREEDY).sequences.equal(expected("qwen, batch"))
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + 5)
    with pytest.raises(ValueError, match="exceed the model's context"):
        TokenRecycling().generate(model, **inputs, **GREEDY)


def test_a_prompt_that_ends_in_a_picture():
    model, inputs = llava(), seen_by_llava([prompt(3, 1, 0, 1)[:-1]])
    theirs = model.generate(**inputs, **GREEDY)
    assert Autoregressive().generate(model, **inputs, **GREEDY).sequences.equal(theirs)
    for decoder in (TokenRecycling(), BeamSearch()):
        with pytest.raises(ValueError, match="the prompt ends in a picture, behind which no draft can begin: put text behind it"):
            decoder.generate(model, **inputs, **GREEDY)


def test_what_is_refused():
    model, inputs = llava(), CALLS["llava, batch"][1]()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        PromptLookup().generate(model, **{**inputs, "pixel_values": inputs["pixel_values"][1:]}, **GREEDY)
    with pytest.raises(ValueError, match="cross_mask cannot be given to a tree of tokens"):
        Session(model, cross_mask=torch.zeros(1))
    cache, ids = DynamicCache(), inputs["input_ids"][:1, 8:]
    model(ids[:, :-1], past_key_values=cache)
    session = Session(model, cache=cache, pixel_values=inputs["pixel_values"][:1])
    session.resume(ids[:, :-1])
    with pytest.raises(ValueError, match="holds all of the prompt that could show its pictures"):
        session.feed(ids[:, -1:])


class Forgetful(transformers.LlavaForConditionalGeneration):
    "Once it has seen a picture, several tokens at a time confuse it; on text it is as any other."

    seen = False

    def forward(self, input_ids=None, mm_encoder_outputs=None, past_key_values=None, **more):
        out = super().forward(input_ids=input_ids, mm_encoder_outputs=mm_encoder_outputs, past_key_values=past_key_values, **more)
        if mm_encoder_outputs:
            self.seen = True
        elif self.seen and input_ids.shape[1] > 1:
            out.logits = out.logits.roll(1, -1)
        return out

    forward.__signature__ = __import__("inspect").signature(transformers.LlavaForConditionalGeneration.forward)


def test_a_model_that_does_not_bear_drafts_behind_pictures(monkeypatch):
    model, inputs = _ready(Forgetful(llava().config)), CALLS["llava"][1]()
    theirs = model.generate(**inputs, **GREEDY)
    assert Autoregressive().generate(model, **inputs, **GREEDY).sequences.equal(theirs)
    for _ in range(2):  # the second answer is remembered
        with pytest.raises(ValueError, match="Forgetful gives other logits when several tokens behind an image are fed at once"):
            TokenRecycling().generate(model, **inputs, **GREEDY)
    model = _ready(Forgetful(llava().config))
    monkeypatch.setattr(call_module, "require_pictures", lambda *_: None)  # without the trial its texts would be wrong
    assert not TokenRecycling().generate(model, **inputs, **GREEDY).sequences.equal(model.generate(**inputs, **GREEDY))


def test_a_search_looks_at_the_pictures_of_its_row():
    for call in ("llava, batch", "qwen, batch"):
        make, inputs = CALLS[call]
        model, given = make(), inputs()
        out = BeamSearch(beams=3).generate(model, **given, **GREEDY)
        assert out.sequences.shape == expected(call).shape
        n, rows = 0, []
        for row in range(3):  # each alone, without its padding
            real, pictures = given["attention_mask"][row].bool(), int((given["input_ids"][row] == IMAGE).sum())
            alone = {"input_ids": given["input_ids"][row : row + 1, real], "attention_mask": given["attention_mask"][row : row + 1, real]}
            if call.startswith("llava"):
                count = pictures // 4
                alone |= {"pixel_values": given["pixel_values"][n : n + count]} if count else {}
                n += count
            else:
                alone["mm_token_type_ids"] = (alone["input_ids"] == IMAGE).int()
                grids = [[(6, 4)], [], [(4, 4), (2, 8)]][row]
                if grids:
                    patches = sum(h * w for h, w in grids)
                    alone |= {
                        "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids]),
                        "pixel_values": given["pixel_values"][n : n + patches],
                    }
                    n += patches
            rows.append(BeamSearch(beams=3).generate(model, **alone, **GREEDY).sequences[0, -GREEDY["max_new_tokens"] :])
        assert out.sequences[:, -GREEDY["max_new_tokens"] :].equal(torch.stack(rows))
