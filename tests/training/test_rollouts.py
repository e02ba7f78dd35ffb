"Rollouts and scores: any decoder, the policy's own distribution whatever its configuration says, pass@k by enumeration."

import itertools
from types import SimpleNamespace

import pytest
import torch
from toys import SAMPLING_RULES, TOY_PROMPT, V, character_tokenizer, exact_probs, fit, small_model
from transformers import BatchEncoding

from decodelab.lab.tasks.text import Example, Task
from decodelab.sampling.base import Autoregressive
from decodelab.sampling.min_p import MinP
from decodelab.speculative.drafters import NGram, PromptLookup
from decodelab.training.rollouts import (
    UNPROCESSED,
    Rollouts,
    held_out_scores,
    pass_at_k,
    rollout_decoder,
    rollout_method,
    score_columns,
    score_means,
    usual_text,
)


def test_pass_at_k_counts_subsets():
    for n, c in itertools.product(range(1, 6), range(6)):
        for k in range(1, n + 1):
            if c <= n:
                draws = [i < c for i in range(n)]
                share = [any(s) for s in itertools.combinations(draws, k)]
                assert pass_at_k([c], n, k)[0] == pytest.approx(sum(share) / len(share))
    with pytest.raises(ValueError, match="k must be 1 to n = 8"):
        pass_at_k([0], 8, 9)


def as_trainer(model, processing_class):
    return SimpleNamespace(model=model, processing_class=processing_class, accelerator=SimpleNamespace(unwrap_model=lambda m: m))


@pytest.mark.parametrize("decoder", [Autoregressive(), PromptLookup(), NGram()], ids=lambda d: type(d).__name__)
def test_the_hook_returns_prompts_and_completions_without_padding(decoder):
    model, tokenizer = small_model(spread=0.15), character_tokenizer()
    prompts = ["abc", "abcabcabc", "x"]
    torch.manual_seed(0)
    out = Rollouts(decoder, temperature=0.5, max_completion_length=20)(prompts * 8, as_trainer(model, tokenizer))
    assert out["prompt_ids"] == tokenizer(prompts * 8).input_ids
    assert out["logprobs"] is None
    written = out["completion_ids"]
    assert all(0 < len(row) <= 20 and tokenizer.eos_token_id not in row[:-1] for row in written)
    assert 0 < sum(row[-1] == tokenizer.eos_token_id for row in written) < len(written)


LOUD = {  # settings of a configuration, each of which changes what is drawn
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.05,
    "typical_p": 0.05,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(2, 60)),
    "begin_suppress_tokens": list(range(2, 60)),
    "bad_words_ids": [[i] for i in range(2, 60)],
    "sequence_bias": [[[i], 9.0] for i in range(2, 6)],
    "exponential_decay_length_penalty": (0, 4.0),
    "min_new_tokens": 3,
    "min_length": 9,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "guidance_scale": 4.0,
    "watermarking_config": {"bias": 9.0},
}


def written(model, tokenizer):
    "Rollouts of one seed, and scores of another task."
    torch.manual_seed(0)
    out = Rollouts(Autoregressive(), max_completion_length=8)(["abc"] * 24, as_trainer(model, tokenizer))["completion_ids"]
    return out, held_out_scores(model, tokenizer, Letters(), Letters().examples(6, 0), SETTINGS)


class Letters(Task):
    "How many letters of the first half of the alphabet a text has."

    @property
    def name(self):
        return "letters"

    def make(self, rng):
        return Example(self.name, "".join(rng.choices("abcdefghij", k=5)), "a")

    def score(self, example, output):
        return float(sum(map(ord, output)))  # tells texts from one another


SETTINGS = SimpleNamespace(samples=3, temperature=1.0, max_completion_length=8, seed=0)


@pytest.mark.parametrize("setting", LOUD)
def test_what_a_models_configuration_asks_for_is_switched_off(setting):
    model, tokenizer = small_model(spread=0.15), character_tokenizer()
    plain = written(model, tokenizer)
    model.generation_config.update(**{setting: LOUD[setting]})
    assert setting in UNPROCESSED
    assert written(model, tokenizer) == plain


def test_a_setting_that_is_not_switched_off_is_seen(monkeypatch):  # the negative control
    model, tokenizer = small_model(spread=0.15), character_tokenizer()
    plain = written(model, tokenizer)
    model.generation_config.update(min_p=0.9)
    monkeypatch.delitem(UNPROCESSED, "min_p")
    now = written(model, tokenizer)
    assert now[0] != plain[0] and now[1] != plain[1]


def test_dropout_is_off_in_rollouts_and_scores():
    model, tokenizer = small_model(spread=0.15), character_tokenizer()
    plain = written(model, tokenizer)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert written(model, tokenizer) == plain and model.training


def test_scores_leave_the_random_state_alone_and_the_most_frequent_answer_counts():
    model, tokenizer = small_model(spread=0.15), character_tokenizer()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    scores = held_out_scores(model, tokenizer, Letters(), Letters().examples(6, 0), SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert {len(values) for values in scores.values()} == {6}
    assert usual_text(["x\na", "b", "b ", "y\na"]) == "x\na"  # two lines twice each: the one drawn first
    assert usual_text(["x\na", "b", "b ", "c"]) == "b"
    assert usual_text(["", "b"]) == ""


def test_columns_and_means():
    scores = {"greedy": [1.0, 0.0], "majority": [1.0, 1.0], "right": [4.0, 1.0]}
    assert score_columns(scores, 4) == {"greedy": [1, 0], "maj": [1, 1], "pass@1": [1, 0.25], "pass@n": [1, 1]}
    assert score_means(scores, 4) == {"greedy": 0.5, "maj": 1, "pass@1": 0.625, "pass@4": 1}


def drawn(decoder, temperature, draws=4000):
    "Counts of the first three tokens that the hook returns, and their exact distribution at temperature 0.6."
    model = small_model(vocab=V)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def encode(prompts, **_):
        ids = TOY_PROMPT.expand(len(prompts), -1)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    torch.manual_seed(5)
    counts = {}
    for _ in range(draws // 4000):
        for row in Rollouts(decoder, temperature, 3)(["-"] * 4000, as_trainer(model, encode))["completion_ids"]:
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    return counts, exact_probs(model, SAMPLING_RULES["temperature"][1])


@pytest.mark.parametrize(
    ("decoder", "temperature", "same"),
    [
        (Autoregressive(), 0.6, True),
        (PromptLookup(), 0.6, True),
        (NGram(), 0.6, True),
        (PromptLookup(), 0.8, False),  # negative controls
        (MinP(0.2), 0.6, False),
    ],
)
def test_rollouts_of_a_lossless_decoder_have_the_policys_distribution(decoder, temperature, same):
    assert (fit(*drawn(decoder, temperature)) > 1e-3) == same


def test_decoders_that_cannot_write_rollouts_are_refused():
    for name, why in (("momentum", "is deterministic"), ("llada", "decodes masked models"), ("nobody", "is not registered")):
        with pytest.raises(ValueError, match=f"decoder '{name}' {why}, .*choose one of .*autoregressive"):
            rollout_method(name)
    with pytest.warns(UserWarning, match="min_p does not draw from the model's own distribution"):
        rollout_decoder("min_p", small_model())
    assert rollout_decoder("prompt_lookup", small_model(), auto=True).k == "auto"
