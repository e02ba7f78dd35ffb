"""Settings of all tests, and fixtures that several files use."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from toys import V, character_tokenizer, small_model

from decodelab.core.zoo import load

_common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", derandomize=True, **_common)
settings.register_profile("nightly", max_examples=400, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama():
    return small_model("llama")


@pytest.fixture(scope="session")
def gpt2():
    return small_model("gpt2")


@pytest.fixture(scope="session")
def qwen3():
    return small_model("qwen3")


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="session")
def tales():
    "The zoo model `tales` and its tokenizer."
    try:
        return load("tales")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the zoo model tales is not here: {error}")


@pytest.fixture(scope="module")
def toy():
    "Six tokens; a distribution far from uniform that depends on positions."
    model = small_model(vocab=V, hidden=16, spread=0.6, seed=8)
    torch.manual_seed(4)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.35)
    return model


@pytest.fixture(scope="module")
def no_gradients():
    with torch.no_grad():
        yield
