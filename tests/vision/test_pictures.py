"""Pictures beside the text: every lossless decoder writes what transformers' own `generate` writes about them, alone and in padded batches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers

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
