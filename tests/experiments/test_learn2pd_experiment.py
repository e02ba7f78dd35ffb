"""Learn2PD's experiments on a size that a random model carries."""

import json
from pathlib import Path

import pytest
from toys import character_tokenizer, small_model

import decodelab.experiments.diffusion.learn2pd as page
from decodelab.diffusion.learn2pd import threshold_filter


def test_the_full_experiment_on_a_tiny_size(monkeypatch):
    asked, model = [], small_model(seed=3, context=512)
    monkeypatch.setattr("decodelab.lab.lab.Lab.load", lambda self, role: asked.append(role) or (model, character_tokenizer()))
    monkeypatch.setattr(page, "zoo_path", lambda name: Path(name))
    monkeypatch.setattr(page, "load_filter", lambda place, device: threshold_filter(0.05, block_length=32))
    found = json.loads(json.dumps(page.experiment(per_task=2, max_new_tokens=8, lengths=(8, 12), tasks=("list_sort", "sudoku"))))
    assert (asked, found["exercises"]) == (["diffusion_tasks"], 4)
    static, oracle = (found["methods"][name] for name in ("1 per step", "oracle"))
    assert (static["steps"], static["agreement"], oracle["agreement"], static["difference_interval"]) == (8, 1.0, 1.0, [0, 0])
    # a filter that is a threshold is the same whatever its name, also at equal steps
    one, two = (found["methods"][f"{name}, tau 0.96"] for name in ("one layer", "learn2pd"))
    assert {k: v for k, v in one.items() if k != "time_ratio"} == {k: v for k, v in two.items() if k != "time_ratio"}
    assert all(abs(line["difference"]) < 1e-9 for line in found["against one layer"].values())
    cuts = dict(zip(zip(found["cuts"]["variant"], found["cuts"]["positions"]), zip(found["cuts"]["steps"], found["cuts"]["gain"])))
    assert (cuts["static", 12], cuts["static, early stop", 8][0]) == ((12, 1.0), 8)
    assert cuts["learn2pd, cut", 12] == cuts["whole canvases only, cut", 12]
    assert found["growth"]["canvases"] == [8, 12]


def test_agreement_counts_positions_of_the_longer_text():
    assert page.agreement([1, 2, 3], [1, 9, 3, 4]) == 0.5
    assert page.agreement([1, 9, 3, 4], [1, 2, 3]) == 0.5
    assert page.agreement([], []) == 1.0


def test_equal_steps_are_compared_on_the_interpolated_curve():
    import pandas as pd

    facts = {"a": (2, 0.5), "b": (4, 0.9), "ours": (3, 0.8)}  # at 3 steps their curve is at 0.7
    lines = [{"method": m, "example": i, "steps": n, "agreement": y} for m, (n, y) in facts.items() for i in range(3)]
    line = page.matched(pd.DataFrame(lines), ["ours"], ["b", "a"], draws=20)["ours"]
    assert line["difference"] == pytest.approx(0.1) and line["interval"] == pytest.approx((0.1, 0.1))
