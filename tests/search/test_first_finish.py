"""First Finish Search: what is streamed, and settings that are refused."""

import math

import pytest
import torch
from toys import random_prompts
from transformers.generation.streamers import BaseStreamer

from decodelab.search.first_finish import FirstFinish

SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}


class Streamed(BaseStreamer):
    "All tokens that are streamed, without the prompt."

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.tokens = [t for part in self.tokens[1:] for t in part]


@pytest.mark.parametrize(
    "fields", [{}, {"k": 2}, {"valid": lambda ids: False}, {"valid": lambda ids: len(ids) > 3}], ids=["first", "vote", "none", "long"]
)
def test_what_is_streamed_is_the_text(fields, llama):
    "Where no sample counts the first one comes back, which may have ended long before the others."
    ends, returned = list(range(2, 30)), set()
    for seed, prompt in enumerate(random_prompts(6, seed=5)):
        streamer = Streamed()
        torch.manual_seed(seed)
        out = FirstFinish(n=2, **fields).generate(llama, prompt, streamer=streamer, eos_token_id=ends, **SAMPLING)
        assert streamer.tokens == out.continuations[0].tolist()
        returned.add(len(streamer.tokens))
    assert len(returned) > 1


@pytest.mark.parametrize("rates", [[1.0], [1.0, 0.0], [1.0, math.nan], [math.inf, 1.0]], ids=str)
def test_rates_are_positive_numbers(rates):
    with pytest.raises(ValueError, match="rates must be 2 positive numbers, finite, one a sample"):
        FirstFinish(n=2, rates=rates)
