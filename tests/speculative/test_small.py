"""Losslessness on a real instruction model, where it was fetched: SmolLM2-135M-Instruct, float32."""

import pytest

from decodelab import load
from decodelab.core.fetched import fetched_folder
from decodelab.speculative.aded import ADED
from decodelab.speculative.drafters import NGram, PromptLookup
from decodelab.speculative.lookahead import Lookahead
from decodelab.speculative.token_recycling import TokenRecycling

QUESTIONS = [
    "Repeat this twice: the old bridge stands beside the old mill, and the old mill beside the old bridge.",
    "What is 17 + 25? Think step by step, then repeat the sum.",
    "Translate into French: Good morning, my friend. Good evening, my friend.",
]
DECODERS = {
    "prompt_lookup": PromptLookup,
    "prompt_lookup, auto": lambda: PromptLookup(k="auto"),
    "ngram, auto": lambda: NGram(gamma="auto"),
    "token_recycling": TokenRecycling,
    "token_recycling, auto": lambda: TokenRecycling(template="auto"),
    "aded, auto": lambda: ADED(nodes="auto"),
    "lookahead": lambda: Lookahead(W=4, N=4, G=4),
}


@pytest.fixture(scope="module")
def asked():
    "The model, and its questions as one padded batch."
    try:
        fetched_folder("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load("smollm2")
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True) for q in QUESTIONS]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    rules = {"max_new_tokens": 20, "do_sample": False}
    return model, inputs, rules, model.generate(**inputs, **rules)


@pytest.mark.small
@pytest.mark.parametrize("name", list(DECODERS))
def test_greedy_output_is_the_models_own(name, asked):
    model, inputs, rules, expected = asked
    decoder = DECODERS[name]()
    for _ in range(2):  # the second call knows what the first has learnt
        assert decoder.generate(model, **inputs, **rules).sequences.equal(expected)
