"""Processors that look at the scores alone are asked without a text, and give what their list gives."""

from dataclasses import dataclass

import pytest
import torch
from toys import VOCAB, random_prompts, small_model

from decodelab.core.contract import Decoder
from decodelab.sampling.base import Autoregressive


class Odd:
    "A processor of the user's: nobody knows what it looks at."

    def __call__(self, ids, scores):
        return scores + ids[:, -1:] % 2


def call_of(**rules):
    "The call that a decoder is handed."
    seen = []

    @dataclass
    class Spy(Autoregressive):
        def check(self, call):
            seen.append(call)

    Spy().generate(small_model("llama", seed=1), random_prompts(1, seed=3)[0], max_new_tokens=2, do_sample=True, **rules)
    assert issubclass(Spy, Decoder)
    return seen[0]


@pytest.mark.parametrize(
    ("rules", "blind"),
    [
        ({"top_k": 0}, True),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01}, True),
        ({"top_k": 0, "repetition_penalty": 1.3}, False),
        ({"top_k": 0, "no_repeat_ngram_size": 2}, False),
        ({"top_k": 0, "min_new_tokens": 2, "eos_token_id": 5}, False),
        ({"temperature": 0.7, "logits_processor": [Odd()]}, False),
    ],
    ids=["plain", "filters", "repetition", "no_repeat", "minimum", "processor"],
)
def test_who_looks_at_the_text(rules, blind):
    call = call_of(**rules)
    assert call.blind == blind
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    before, ids = logits.clone(), torch.cat([call.prompt, torch.tensor([[7]])], 1)
    expected = logits if call.processors is None else call.processors(ids, logits.clone())
    assert call.processed(logits, ids, [0]).equal(expected)
    assert logits.equal(before)
    if blind:
        assert call.processed(logits.expand(3, -1), ids, [0, 0, 0]).equal(expected.expand(3, -1))
