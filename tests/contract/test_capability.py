"""What a trial of a few tokens cannot reach is told by the structure of a model; what it reaches, by the trial."""

import pytest
import torch
from architectures import build
from toys import small_model

from decodelab.core.capability import TRIAL, abilities, agree, evaluating, path_logits, trial_tokens
from decodelab.core.session import Session, tree_trial
from decodelab.sampling.base import Autoregressive, ContrastiveSearch
from decodelab.speculative.drafters import PromptLookup

BEYOND = {
    "doge:window": "chooses by a rule of its own what a token sees .keep_window_size.",
    "blt": "chooses by a rule of its own what a token sees",
    "moshi": "has a cache that forgets what its mask still shows",
    "phi3:longrope": "rotary embedding of Phi3ForCausalLM changes after 24 positions, within this text",
    "llama:dynamic": "rotary embedding of LlamaForCausalLM changes after 24 positions, within this text",
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_no_trial_reaches_is_refused_before_a_token_is_made(name):
    model = build(name).eval()
    prompt = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
    assert Autoregressive().generate(model, prompt, **settings).sequences.equal(model.generate(prompt, **settings))
    with pytest.raises(ValueError, match=BEYOND[name]):
        PromptLookup().generate(model, prompt, **settings)


def test_contrastive_search_wants_one_hidden_state_a_token():
    model = build("gemma3n_text").eval()
    with pytest.raises(ValueError, match="has no single hidden state a token to compare"):
        ContrastiveSearch().generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)


def test_errors_of_a_users_hook_are_the_users():
    model = small_model()
    hook = model.register_forward_hook(lambda *_: {}["mine"])
    with pytest.raises(KeyError, match="mine"):
        PromptLookup().generate(model, torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    hook.remove()
    assert abilities(model).tree_error is None
    Session(model)


def test_a_trial_sees_a_wrong_tree():
    model = small_model()
    text, nodes = trial_tokens(model, 9), trial_tokens(model, len(TRIAL), 20)
    with torch.no_grad():
        right = path_logits(model, text, nodes)
        chain = model(torch.cat([text, nodes], 1)).logits[:, 9:]  # all nodes in a row: a mask that was ignored
    assert agree(right + 1e-5, right)
    assert not agree(chain, right)
    assert tree_trial(model)


def test_logits_that_are_not_numbers_are_no_verdict():
    model = small_model()
    weights = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model returned NaN logits"):
        PromptLookup().generate(model, torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert abilities(model).tree_error is None
    with torch.no_grad():
        model.lm_head.weight.copy_(weights)
    Session(model)
    assert abilities(model).tree_error == ""


def test_evaluation_mode_lasts_until_the_last_user_has_left():
    model = small_model().train()
    with evaluating(model):
        with evaluating(model):
            assert not model.training
        assert not model.training
    assert all(module.training for module in model.modules())
