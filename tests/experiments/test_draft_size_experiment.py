"""The experiment on draft sizes: batches, masks and medians by hand."""

import pytest
from toys import added, plain, random_prompts, small_model

from decodelab.experiments.speculative.draft_size import bandwidth, by_task, methods, padded
from decodelab.lab.bench import BenchResult, BenchRow


def test_padding_and_its_mask(llama):
    prompts = random_prompts(3, seed=3)
    batch = padded(prompts, 1)
    assert batch.shape == (3, max(p.shape[1] for p in prompts))
    assert [row[-1].item() for row in batch] == [p[0, -1].item() for p in prompts]
    calls = methods(llama, {"max_new_tokens": 8, "do_sample": False}, 1, 3)
    assert "prompt lookup (hf)" not in calls
    expected = [plain(llama, p, 8) for p in prompts]
    assert calls["generate"](batch)[:, batch.shape[1] :].tolist() == expected
    for name, call in calls.items():
        if name != "generate":
            assert added(call(batch)) == expected, name


def test_with_a_draft_model_all_take_part(llama):
    draft = small_model("llama", seed=4)
    calls = methods(llama, {"max_new_tokens": 6, "do_sample": False}, 1, 1, draft)
    assert {"assisted (hf)", "prompt lookup (hf)", "draft_model, auto", "rsd_c, auto", "rsd_s, auto"} <= set(calls)
    ids = random_prompts(1, seed=1)[0]
    assert added(calls["draft_model, auto"](ids)) == [plain(llama, ids, 6)]


def row(method, prompt, cpu, tokens=10):
    return BenchRow(method, prompt, 0, 99.0, tokens, ids=[[0] * tokens], cpu_seconds=cpu)


def test_medians_of_tasks_by_hand():
    rows = [row("generate", p, 1.0) for p in range(4)] + [row("x", p, s) for p, s in enumerate((0.5, 1.0, 2.0, 0.25))]
    found = by_task(BenchResult(rows, "generate"), ["a", "a", "a", "b"])
    assert found["x"] == {"a": 1.0, "b": 4.0}
    assert found["generate"] == {"a": 1.0, "b": 1.0}
    rows.append(row("y", 3, 1.0, tokens=20))  # twice the tokens in the same time
    assert by_task(BenchResult(rows, "generate"), ["a", "a", "a", "b"])["y"]["b"] == pytest.approx(2.0)


def test_bandwidth_is_a_speed():
    assert 1e8 < bandwidth(8, 2) < 1e13
