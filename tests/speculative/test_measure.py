"""The measuring page of the speculative family, counted baselines and repeated models."""

import copy
from dataclasses import replace

import pytest
import torch
from toys import added, plain, random_prompts, small_model

from decodelab.experiments.speculative.measure import growth
from decodelab.lab.bench import BenchResult, BenchRow, compare, counted
from decodelab.lab.repeat import repeat
from decodelab.lab.speeds import baselines, by_group, family, speeds, target_texts
from decodelab.speculative.drafters import DraftModel, PromptLookup


def test_counted_is_generate_and_counts(llama):
    prompt = random_prompts(1, seed=1)[0]
    out = counted(llama, {"max_new_tokens": 9, "do_sample": False})(prompt)
    assert out.sequences.equal(llama.generate(prompt, max_new_tokens=9, do_sample=False))
    assert out.stats.target_forwards == 9
    assert out.stats.emitted == [[1] * 9]
    assert not llama._forward_pre_hooks
    same = counted(llama, {"max_new_tokens": 9, "do_sample": False})({"input_ids": prompt})
    assert same.sequences.equal(out.sequences)


def test_counted_sees_fewer_forwards_of_an_assistant(llama):
    prompt = random_prompts(1, seed=1)[0]
    double = copy.deepcopy(llama)
    double.generation_config.num_assistant_tokens, double.generation_config.assistant_confidence_threshold = 5, 0
    out = counted(llama, {"max_new_tokens": 12, "do_sample": False, "assistant_model": double})(prompt)
    assert out.stats.new_tokens == 12
    assert out.stats.tokens_per_forward == 6  # every draft token of its double is right


def test_baselines(llama):
    prompts = random_prompts(2, lengths=(5, 8), seed=2)
    methods = baselines(llama, {"lookup": PromptLookup()}, {"max_new_tokens": 6, "do_sample": False})
    assert list(methods) == ["generate", "prompt lookup (hf)", "lookup"]
    table = speeds(compare(methods, prompts, repeats=1, warmup=0))
    assert table["identical"].tolist() == [1.0, 1.0, 1.0]


def test_the_family_is_the_registry(llama):
    ready = family(llama)
    assert {"plain", "draft_model", "prompt_lookup", "ngram", "token_recycling"} <= set(ready)
    assert all(d.compile for d in family(llama, compile=True).values())
    assert not any(d.compile for d in ready.values())


def test_who_is_left_out_of_the_family_is_named(llama, monkeypatch):
    import decodelab.lab.speeds as page

    def of_another_model(model):
        raise ValueError("made for another target")

    known = page.decoders()
    monkeypatch.setattr(page, "decoders", lambda: known | {"ngram": replace(known["ngram"], example=of_another_model)})
    with pytest.warns(UserWarning, match="ngram is left out of the family: made for another target"):
        assert "ngram" not in family(llama)


def test_target_texts():
    texts = target_texts()
    assert [t["do_sample"] for t in texts.values()] == [False, True, True, False]
    assert texts["T = 0.7"]["temperature"] == 0.7
    assert all(t["top_k"] == 0 for t in texts.values() if t["do_sample"])


def test_by_group():
    rows = [
        BenchRow(m, i, 0, s * (1 + i), 10, f, ids=[[1, 2, 3, 4, 5]]) for m, s, f in (("a", 2.0, 1.0), ("b", 1.0, 2.0)) for i in range(4)
    ]
    table = by_group(BenchResult(rows, "a"), ["x", "x", "y", "y"])
    assert table.loc["b", ("ratio", "x")] == table.loc["b", ("ratio", "y")] == 2.0
    assert table.loc["b", ("tokens_per_forward", "y")] == 2.0
    with pytest.raises(ValueError, match="2 groups were given for 4 prompts: name one for each"):
        by_group(BenchResult(rows, "a"), ["x", "y"])


def test_growth(llama):
    frame = growth(llama, {"lookup": PromptLookup()}, "batch", (1, 2), tokens=3, repeats=1)
    assert set(frame["method"]) == {"generate", "lookup"}
    assert (frame["seconds_per_token"] > 0).all()


# inflation


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_inflation_changes_no_logit(kind):
    model = small_model(kind, seed=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    big = repeat(model, layers=3, intermediate_size=128)
    prompt = random_prompts(1, lengths=(7, 7), seed=5)[0]
    with torch.no_grad():
        assert big(prompt).logits.equal(model(prompt).logits)
    assert big.config.num_hidden_layers == 5
    assert model.config.num_hidden_layers == 2
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert sum(p.numel() for p in big.parameters()) > 1.5 * sum(p.numel() for p in model.parameters())
    assert big.generate(prompt, max_new_tokens=9, do_sample=False).equal(model.generate(prompt, max_new_tokens=9, do_sample=False))
    assert added(DraftModel(model, gamma=3).generate(big, prompt, max_new_tokens=9, do_sample=False))[0] == plain(model, prompt, 9)


def test_what_cannot_be_repeated(gpt2, llama):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layers with self_attn.o_proj and mlp.down_proj: repeat a Llama"):
        repeat(gpt2)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        repeat(llama, layers=0)
