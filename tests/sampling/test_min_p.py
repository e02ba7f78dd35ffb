"""Min-p sampling: transformers' own warper, its limits, and what it refuses."""

import pytest
import torch
from toys import random_prompts, small_model

from decodelab.sampling.base import Autoregressive
from decodelab.sampling.min_p import MinP, min_p


@pytest.mark.parametrize(
    ("fields", "message"), [({"p_base": -1}, "p_base must be between 0 and 1, got -1"), ({"p_base": 1.5}, "p_base must be between 0 and 1")]
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        MinP(**fields)


def test_at_its_limit_it_is_greedy_search():
    model = small_model()
    ids = random_prompts(1)[0]
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert MinP(p_base=1.0).generate(model, ids, max_new_tokens=8, do_sample=True, top_k=0).sequences.tolist() == greedy.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_it_is_the_warper_of_transformers(temperature):
    model, ids = small_model(), random_prompts(1)[0]
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "temperature": temperature}
    torch.manual_seed(0)
    ours = MinP(p_base=0.1).generate(model, ids, **settings).sequences
    torch.manual_seed(0)
    theirs = Autoregressive().generate(model, ids, min_p=0.1, **settings).sequences
    assert ours.tolist() == theirs.tolist()


def test_zero_is_plain_sampling():
    p = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.allclose(min_p(p, 0.0), p)
