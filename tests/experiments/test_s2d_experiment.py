"""Experiments of S2D: arms, counts, speeds, the baseline with trained exit heads."""

from types import SimpleNamespace

import pytest
import torch
from toys import VOCAB, left_pad, random_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from decodelab.experiments.speculative import s2d as experiment
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.layer_drafter import layer_drafter
from decodelab.speculative.s2d import S2D

GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, eos_token_id=1, pad_token_id=0, max_position_embeddings=256, **shape)).eval()
    with torch.no_grad():
        model.lm_head.weight[[0, 1]] = 0.0  # never the best of many: a draft ends with an end of sequence
    model.config.exits = list(experiment.DEPTHS)
    return model


def test_arms(nested):
    own = {depth: layer_drafter(nested, range(depth), copies=False) for depth in experiment.DEPTHS}
    arms = experiment.arms_of(nested, own, {1: own[1]})
    assert [*arms][:9] == ["exit 1", "exit 2", "exit 4", "own 1", "own 2", "own 4", "SFT exit 1", "SFT exit 2", "head 1"]
    assert len(arms) == 9 + 21
    assert arms["S2D (0.5, 0.5)"].thresholds == (0.5, 0.5)


def test_a_fixed_exit_is_a_plain_drafter(llama, nested):
    for prompt in random_prompts(2, seed=1):
        for depth in experiment.DEPTHS:
            counts = experiment.counts_of(experiment.fixed(nested, depth), llama, left_pad([prompt]), **GREEDY)
            out = DraftModel(layer_drafter(nested, range(depth), copies=False), experiment.GAMMA).generate(llama, prompt, **GREEDY)
            assert counts == [[sum(e), len(e), sum(d), sum(d)] for e, d in zip(out.stats.emitted, out.stats.draft_lengths)]


def test_counts_of_a_text_do_not_depend_on_appended_layers(llama, nested):
    from decodelab.lab.repeat import repeat

    inputs, arm = left_pad(random_prompts(3, seed=2)), S2D(nested, tau=(0.3, 0.15))
    assert experiment.counts_of(arm, llama, inputs, **GREEDY) == experiment.counts_of(arm, repeat(llama, 3), inputs, **GREEDY)


def test_speed_is_tokens_over_time():
    seconds = {"targets": {"8": [2.0, 3.0]}, "blocks": [0.1, 0.2, 0.4], "depths": {"1": 0.5, "2": 0.7, "4": 1.0}}
    assert experiment.speed("S2D (0.5, 0.5)", [60, 20, 100, 100, 50, 10], seconds, 8) == pytest.approx(120 / (10 + 10 + 4 + 60))
    for arm, k in (("exit 1", 0.5), ("own 2", 0.7), ("SFT exit 2", 0.7), ("head 1", 0.5), ("exit 4", 1.0)):
        assert experiment.speed(arm, [60, 20, 100, 100], seconds, 8) == pytest.approx(120 / (100 * k + 60))


def test_thresholds_come_from_the_other_half_of_the_prompts():
    seconds = {"targets": {"8": [1.0, 1.0]}, "blocks": [0.5], "depths": {}}
    lucky, steady = [[30, 10, 10, 10]] * 2 + [[10, 10, 10, 10]] * 2, [[18, 10, 10, 10]] * 4
    runs = {"S2D lucky": lucky * 2, "S2D steady": steady * 2, "exit 1": [[99, 1, 1, 1]] * 8}
    counts = experiment.cross_fitted(runs, seconds, 8)
    assert counts == ([[18, 10, 10, 10]] * 2 + [[10, 10, 10, 10]] * 2) * 2  # each half with what was best for the other


def test_bootstrap():
    value, (low, high) = experiment.bootstrap({"a": [[1, 2]] * 5 + [[3, 2]] * 5}, lambda c: c["a"][0] / c["a"][1], draws=400)
    assert value == 1.0
    assert 0.6 < low < 0.9 and 1.1 < high < 1.4
    assert experiment.bootstrap({"a": [[2, 1]] * 4}, lambda c: float(c["a"][0]), draws=10) == (8.0, (8.0, 8.0))


def test_exit_heads_learn_and_the_rest_stays(nested):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 12, (64, 16), generator=generator)  # ten of the tokens only
    windows = [{"input_ids": row} for row in tokens]
    before = {k: v.clone() for k, v in nested.state_dict().items()}
    part = experiment.train_exit_head(nested, 2, windows, 4, learning_rate=0.02)
    assert part.config.num_hidden_layers == 2
    assert all(before[k].equal(v) for k, v in nested.state_dict().items())
    changed = {k for k, v in part.state_dict().items() if k not in ("lm_head.weight",) and not v.equal(before[k])}
    assert changed == {"model.norm.weight"}
    raw = layer_drafter(nested, range(2), copies=False)
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(m(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())) for m in (raw, part)
        ]
    assert losses[1] < losses[0] - 0.3


def test_calibration_counts_tokens_that_were_asked(llama, nested):
    inputs = left_pad(random_prompts(3, seed=3))
    decoder = S2D(nested, tau=(0.3, 0.15), gamma=3)
    table = experiment.calibration_of(decoder, llama, inputs, **GREEDY)
    out = decoder.generate(llama, **inputs, **GREEDY)
    accepted = sum(n - 1 for row in out.stats.emitted for n in row)
    asked = sum(min(d, e) for ds, es in zip(out.stats.draft_lengths, out.stats.emitted) for d, e in zip(ds, es))
    cells = [cell for bins in table.values() for cell in bins]
    assert (sum(n for n, _ in cells), sum(hits for _, hits in cells)) == (asked, accepted)


def test_seconds(llama, nested, monkeypatch):
    curve = lambda model, _: SimpleNamespace(plain=lambda rows: float(model.config.num_hidden_layers), seconds=lambda n: 10.0 * n)  # noqa: E731
    monkeypatch.setattr(experiment, "verify_curve", curve)
    assert experiment.seconds_of(nested, {2: llama}) == {
        "blocks": [1.0, 1.0, 2.0],
        "depths": {"1": 1.0, "2": 2.0, "4": 4.0},
        "targets": {"2": [2.0, 60.0]},
    }
