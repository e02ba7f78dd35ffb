"""Measuring: taking turns removes drift, figures and intervals are right on made-up timings, and every error with its message."""

import json
import math
import random
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decodelab.core.output import DecodeOutput, DecodeStats
from decodelab.lab import bench as bench_module
from decodelab.lab import cost as cost_module
from decodelab.lab.bench import (
    BenchResult,
    BenchRow,
    compare,
    count_new_tokens,
    forgetful,
    loop_overhead,
    new_token_ids,
    ratio_interval,
    timed_rows,
)
from decodelab.lab.cost import (
    cost_growth,
    draft_cost,
    expected_tokens,
    forward_curve,
    interleaved_seconds,
    plot_cost_growth,
    predict_speedup,
    timed,
    turns,
)
from decodelab.lab.metrics import bootstrap_ratio

matplotlib.use("Agg")
PROMPT = torch.zeros(1, 3, dtype=torch.long)


class Machine:
    """A clock that only work moves; the machine slows down linearly with the number of calls."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.calls, self.log = 0.0, drift, 0, []

    def clock(self):
        return self.now

    def work(self, cost, tokens=10, name="", stats=None, ids=None):
        def method(prompt):
            spent = cost(prompt) if callable(cost) else cost
            self.now += spent * (1 + self.drift * self.calls)
            self.calls += 1
            self.log.append(name)
            ids_ = prompt["input_ids"] if isinstance(prompt, dict) else prompt
            new = torch.tensor([ids]) if ids else torch.arange(1, tokens + 1)[None]
            sequences = torch.cat([ids_, new], 1)
            return SimpleNamespace(sequences=sequences, stats=stats) if stats else sequences

        return method


# counting


def test_tokens_are_counted_without_prompt_padding_and_what_follows_the_end():
    rows = torch.tensor([[9, 9, 5, 1, 7, 1], [9, 0, 5, 6, 0, 0], [9, 9, 0, 5, 0, 6], [9, 9, 1, 0, 0, 0]])
    assert new_token_ids(rows, 2, [1], 0) == [[5, 1], [5, 6], [0, 5, 0, 6], [1]]
    assert count_new_tokens(rows, 2, [1], 0) == 9
    assert count_new_tokens(rows, 2) == 16
    assert count_new_tokens(torch.tensor([9, 9, 5, 8, 6]), 2, (8, 1)) == 2
    assert count_new_tokens(torch.tensor([[9, 9]]), 2, [1], 0) == 0


def test_padding_that_equals_the_end_is_counted_once():
    assert new_token_ids(torch.tensor([[9, 4, 2, 2, 2]]), 1, [2], 2) == [[4, 2]]


# turns


def test_everybody_has_one_turn_a_round():
    played = list(turns("ABC", 40, random.Random(0)))
    for r in range(40):
        assert sorted(name for i, name in played if i == r) == ["A", "B", "C"]
    assert len({tuple(n for i, n in played if i == r) for r in range(40)}) == 6
    assert played == list(turns("ABC", 40, random.Random(0)))


def test_order_of_calls_in_a_comparison():
    machine = Machine()
    methods = {n: machine.work(1.0, name=n) for n in "ABC"}
    compare(methods, [PROMPT, PROMPT], repeats=2, warmup=1, clock=machine.clock)
    assert len(machine.log) == 3 * (1 + 2 * 2)
    for i in range(0, len(machine.log), 3):
        assert sorted(machine.log[i : i + 3]) == ["A", "B", "C"]


def test_taking_turns_removes_drift():
    machine = Machine(drift=3 / 240)
    methods = {"slow": machine.work(1.0), "fast": machine.work(0.5)}
    found = compare(methods, [PROMPT] * 30, repeats=4, warmup=0, clock=machine.clock).figures("fast")
    assert abs(found["ratio"] - 2) < 0.03
    assert found["low"] <= 2 <= found["high"]
    machine = Machine(drift=3 / 240)
    one_by_one = [sum(timed(lambda c=c: machine.work(c)(PROMPT), machine.clock)[0] for _ in range(120)) for c in (1.0, 0.5)]
    assert one_by_one[0] / one_by_one[1] < 1.2


# figures


def test_ratio_and_interval_on_known_timings():
    costs = np.random.default_rng(0).uniform(1, 3, size=(2, 40))
    prompts = [torch.full((1, 2), i) for i in range(40)]
    machine = Machine()
    methods = {
        "base": machine.work(lambda p: costs[0, int(p[0, 0])], tokens=8),
        "method": machine.work(lambda p: costs[1, int(p[0, 0])] / 2, tokens=16),
    }
    found = compare(methods, prompts, repeats=3, warmup=2, clock=machine.clock)
    table = found.table()
    expected = (costs[0] / 8).sum() / (costs[1] / 32).sum()
    assert table.loc["method", "ratio"] == pytest.approx(expected)
    assert table.loc["base", ["ratio", "low", "high"]].tolist() == [1.0, 1.0, 1.0]
    # the interval agrees with a bootstrap over pairs
    a, b = costs[0] / 8, costs[1] / 32
    boot = bootstrap_ratio(a, b, statistic=np.sum)
    assert table.loc["method", "high"] - table.loc["method", "low"] == pytest.approx(boot.high - boot.low, rel=0.15)
    assert table.loc["method", "tokens_per_second"] == pytest.approx(16 * 40 / (costs[1] / 2).sum())
    assert table.loc["method", "tokens"] == 640


@pytest.mark.parametrize("n", [2, 3, 6, 24])
def test_an_interval_of_few_prompts_holds_what_it_promises(n):
    generator = np.random.default_rng(n)
    true = np.exp((0.15**2 - 0.3**2) / 2)
    found = [ratio_interval(generator.lognormal(0, 0.15, n), generator.lognormal(0, 0.3, n)) for _ in range(3000)]
    assert np.mean([low <= true <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.02)
    wide = [ratio_interval(generator.lognormal(0, 0.15, n), generator.lognormal(0, 0.3, n), 0.8) for _ in range(3000)]
    assert np.mean([low <= true <= high for _, low, high in wide]) == pytest.approx(0.8, abs=0.03)


def test_student_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 11, 100):
        for confidence in (0.5, 0.8, 0.95, 0.995):
            assert bench_module._student(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=2e-3)


def test_an_interval_of_equal_ratios_is_a_point_and_none_is_negative():
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.0), pytest.approx(2.0))
    assert ratio_interval([1.0, 30.0], [20.0, 1.0])[1] == 0.0


def test_processor_time_has_a_ratio_of_its_own():
    machine, busy = Machine(), iter([0.0, 4.0, 4.0, 5.0, 5.0, 9.0, 9.0, 10.0])
    methods = {"a": machine.work(8.0), "b": machine.work(8.0)}
    rows = list(timed_rows({"a": methods["a"]}, [PROMPT], 1, 0, clock=machine.clock, cpu_clock=lambda: next(busy)))
    rows += list(timed_rows({"b": methods["b"]}, [PROMPT], 1, 0, clock=machine.clock, cpu_clock=lambda: next(busy)))
    assert [(r.method, r.seconds, r.cpu_seconds) for r in rows] == [("a", 8.0, 4.0), ("b", 8.0, 1.0)]
    found = BenchResult(rows, "a").figures("b")
    assert (found["ratio"], found["cpu_ratio"]) == (1.0, 4.0)  # the clock on the wall saw another program, too
    assert found["cpu_seconds_per_token"] == pytest.approx(0.1)


def test_rows_come_one_by_one_and_the_random_state_is_put_back():
    def method(prompt):
        made.append(torch.rand(1).item())
        return torch.cat([prompt, torch.ones(1, 4, dtype=torch.long)], 1)

    made = []
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    rows = timed_rows({"a": method}, [PROMPT] * 3, 1, 0)
    next(rows)
    assert len(made) == 1
    rows.close()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_figures_of_a_run_that_was_stopped_before_the_baseline():
    found = BenchResult([BenchRow("b", 0, 0, 2.0, 10, 1.0, ids=[[1] * 10], cpu_seconds=1.0)], "a")
    assert found.methods() == ["b"]
    figures = found.figures("b")
    assert figures["tokens_per_second"] == 5
    assert all(math.isnan(figures[f]) for f in ("ratio", "low", "high", "cpu_ratio", "identical", "efficiency"))


def test_the_median_round_counts():
    spent = iter([1.0, 100.0, 1.0] * 2)
    machine = Machine()
    found = compare({"a": machine.work(lambda _: next(spent))}, [PROMPT, PROMPT], repeats=3, warmup=0, clock=machine.clock)
    assert found.table().loc["a", "tokens_per_second"] == pytest.approx(10.0)


def test_reported_stats_become_tokens_per_forward_and_efficiency():
    stats = SimpleNamespace(tokens_per_forward=2.5, target_forwards=4, draft_forwards=8, forward_seconds=0.3)
    machine = Machine()
    methods = {"plain": machine.work(1.0), "spec": machine.work(0.5, stats=stats)}
    found = compare(methods, [PROMPT, PROMPT], clock=machine.clock, repeats=1)
    row = next(r for r in found.rows if r.method == "spec")
    assert (row.tokens_per_forward, row.target_forwards, row.draft_forwards, row.forward_seconds) == (2.5, 4, 8, 0.3)
    table = found.table()
    assert table.loc["spec", "tokens_per_forward"] == pytest.approx(2.5)
    assert table.loc["spec", "efficiency"] == pytest.approx(2 / 2.5)
    assert math.isnan(table.loc["plain", "tokens_per_forward"])
    assert math.isnan(table.loc["plain", "efficiency"])


def test_tokens_per_forward_is_weighted_by_forwards():
    rows = [BenchRow("a", 0, 0, 1.0, 30, 3.0, ids=[[1] * 30]), BenchRow("a", 1, 0, 1.0, 10, 1.0, ids=[[1] * 10])]
    assert BenchResult(rows, "a").figures("a")["tokens_per_forward"] == pytest.approx(40 / 20)


def test_repetition_and_identity():
    machine = Machine()
    methods = {"a": machine.work(1.0, tokens=8), "loop": machine.work(1.0, ids=[5] * 8), "short": machine.work(1.0, ids=[1, 2])}
    table = compare(methods, [PROMPT, PROMPT], clock=machine.clock).table()
    assert table["identical"].tolist() == [1.0, 0.0, 0.0]
    assert table.loc["a", "rep_4"] == 0
    assert table.loc["loop", "rep_4"] == pytest.approx(1 - 1 / 5)
    assert math.isnan(table.loc["short", "rep_4"])


def test_one_prompt_gives_no_interval():
    machine = Machine()
    found = compare({"a": machine.work(1.0), "b": machine.work(0.25)}, [PROMPT], clock=machine.clock).figures("b")
    assert found["ratio"] == pytest.approx(4)
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def test_another_baseline_comes_first():
    machine = Machine()
    found = compare({"a": machine.work(1.0), "b": machine.work(0.25)}, [PROMPT], baseline="b", clock=machine.clock)
    assert found.methods() == ["b", "a"]
    assert found.table().loc["a", "ratio"] == pytest.approx(0.25)


def test_sampling_repeats_itself_and_leaves_the_random_state():
    def sample(prompt):
        return torch.cat([prompt, torch.randint(0, 1000, (1, 8))], 1)

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found = compare({"a": sample, "b": sample}, [PROMPT, PROMPT], repeats=2, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.table()["identical"].tolist() == [1.0, 1.0]
    assert found.ids("a")[0] != found.ids("a")[1]
    assert len({tuple(r.ids[0]) for r in found.rows if r.prompt == 0}) == 1


def test_prompts_from_a_tokenizer():
    machine = Machine()
    found = compare({"a": machine.work(1.0)}, [{"input_ids": PROMPT}], clock=machine.clock)
    assert found.rows[0].tokens == 10


def test_saved_file_table_and_plot(tmp_path):
    machine = Machine()
    found = compare({"a": machine.work(1.0), "b": machine.work(0.5)}, [PROMPT, PROMPT], repeats=2, clock=machine.clock, seed=4)
    saved = json.loads(found.save(tmp_path / "x" / "bench.json").read_text())
    assert saved["table"]["b"]["ratio"] == pytest.approx(2)
    assert len(saved["rows"]) == 8
    assert "ids" not in saved["rows"][0]
    assert saved["provenance"]["seed"] == 4
    assert saved["provenance"]["repeats"] == 2
    assert saved["provenance"]["prompts"]["count"] == 2
    assert "<table" in found._repr_html_()
    bars = found.plot()
    assert [b.get_width() for b in bars.patches] == pytest.approx([1, 2])
    assert found.plot(bars) is bars


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": {}}, "nothing to compare: give at least one method and one prompt"),
        ({"prompts": []}, "nothing to compare"),
        ({"baseline": "c"}, "unknown baseline 'c': use one of a"),
        ({"repeats": 0}, "repeats must be positive and warmup not negative, got 0 and 1"),
        ({"warmup": -1}, "repeats must be positive and warmup not negative, got 3 and -1"),
        ({"prompts": ["Once"]}, r"a prompt of type str has no ids: pass token ids \[1, length\]"),
        ({"methods": {"a": lambda p: "text"}}, r"method 'a' returned str: return token ids \[1, length\] or an output with `sequences`"),
        ({"methods": {"a": lambda p: p}}, "method 'a' gave no new token for prompt 0: leave such prompts out"),
    ],
)
def test_wrong_comparisons(arguments, message):
    def method(prompt):
        return torch.zeros(1, 9, dtype=torch.long)

    with pytest.raises(ValueError, match=message):
        compare(**{"methods": {"a": method}, "prompts": [PROMPT], **arguments})


# loop overhead


def test_loop_overhead():
    assert loop_overhead(SimpleNamespace(stats=DecodeStats(seconds=1.1, forward_seconds=1.0))) == pytest.approx(1.1)
    assert loop_overhead(SimpleNamespace(stats=DecodeStats(seconds=1.2, forward_seconds=0.7, draft_seconds=0.3))) == pytest.approx(1.2)
    for output in (object(), SimpleNamespace(stats=None), SimpleNamespace(stats=DecodeStats(seconds=1.0))):
        with pytest.raises(ValueError, match="the output holds no time of its forwards"):
            loop_overhead(output)


# forwards


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    return LlamaForCausalLM(config).eval()


def test_first_round_is_not_timed():
    machine, costs = Machine(), iter([50.0, 1.0, 2.0, 9.0])
    assert interleaved_seconds({"a": lambda: machine.work(next(costs))(PROMPT)}, repeats=3, clock=machine.clock) == {"a": 2.0}
    with pytest.raises(ValueError, match="repeats must be positive, got 0"):
        interleaved_seconds({"a": lambda: None}, repeats=0)


def test_forward_curve_is_relative_to_one_token(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(cost_module, "_probe", lambda model, n, context: lambda: machine.work(2.0 + n)(PROMPT))
    assert forward_curve(None, ns=(4, 10), clock=machine.clock) == pytest.approx({1: 1.0, 4: 2.0, 10: 4.0})


def test_draft_cost_is_relative_to_the_target(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(cost_module, "_probe", lambda model, n, context: lambda: machine.work(model)(PROMPT))
    assert draft_cost(1.0, 4.0, clock=machine.clock) == pytest.approx(0.25)


def test_a_probe_feeds_n_tokens_on_an_unchanged_context(model):
    seen = []

    def hook(module, arguments, options):
        seen.append((options["input_ids"].shape[1] if "input_ids" in options else arguments[0].shape[1]) if module is model else 0)
        seen.append(options["past_key_values"].get_seq_length())

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    forward = cost_module._probe(model, 5, 12)
    forward()
    forward()
    handle.remove()
    assert seen == [12, 0, 5, 12, 5, 12]
    curve = forward_curve(model, ns=(2, 8), context=16, repeats=2)
    assert list(curve) == [1, 2, 8]
    assert curve[1] == 1.0


@pytest.mark.parametrize(("ns", "context"), [([64], 8), ([0], 8), ([1], 0), ([-2], 8)])
def test_forwards_that_do_not_fit(model, ns, context):
    with pytest.raises(ValueError, match="do not fit: both must be positive and their sum at most 64"):
        forward_curve(model, ns=ns, context=context)


# prediction


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("g", [0, 1, 5])
def test_expected_tokens_follow_leviathan(a, g):
    assert expected_tokens(a, g) == pytest.approx((1 - a ** (g + 1)) / (1 - a))


def test_expected_tokens_by_position_and_by_simulation():
    each = (0.9, 0.5, 0.2)
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(each, 3) == pytest.approx(1 + 0.9 + 0.45 + 0.09)
    hits = np.random.default_rng(0).random((40_000, 3)) < each
    assert expected_tokens(each, 3) == pytest.approx(1 + np.cumprod(hits, 1).sum(1).mean(), abs=0.02)


def test_prediction():
    curve = {1: 1.0, 5: 1.4, 9: 2.0}
    one = predict_speedup(0.8, 0.1, curve, draft_length=4)
    assert one.tokens_per_round == pytest.approx((1 - 0.8**5) / 0.2)
    assert one.round_cost == pytest.approx(0.4 + 1.4)
    assert one.speedup == pytest.approx(one.tokens_per_round / one.round_cost)
    assert predict_speedup(0.8, 0.1, curve, draft_length=2).round_cost == pytest.approx(0.2 + 1.2)
    best = predict_speedup(0.8, 0.1, curve)
    assert best.speedup == max(best.by_length.values())
    assert best.by_length[best.draft_length] == best.speedup
    assert list(best.by_length) == list(range(9))


def test_drafting_that_does_not_pay_is_said():
    none = predict_speedup(0.1, 0.9, {1: 1.0, 8: 2.0})
    assert (none.draft_length, none.speedup) == (0, 1.0)


def test_a_tree_verifies_more_tokens():
    tree = predict_speedup([0.9, 0.8], 0.0, {1: 1.0, 9: 1.8}, draft_length=2, width=4)
    assert tree.round_cost == pytest.approx(1.8)
    assert tree.tokens_per_round == pytest.approx(1 + 0.9 + 0.72)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"acceptance": 1.2}, r"acceptance must lie in \[0, 1\]"),
        ({"acceptance": []}, r"acceptance must lie in \[0, 1\]"),
        ({"draft_cost": -0.1}, "draft_cost be at least 0"),
        ({"width": 0}, "width at least 1"),
        ({"verify_curve": {}}, "verify_curve must begin at one token: measure it with `forward_curve`"),
        ({"verify_curve": {2: 1.0}}, "verify_curve must begin at one token"),
        ({"draft_length": 4}, "draft_length 4 is outside what acceptance and verify_curve cover: 0 to 3"),
        ({"draft_length": -1}, "draft_length -1 is outside"),
        ({"acceptance": [0.5], "draft_length": 2}, "draft_length 2 is outside what acceptance and verify_curve cover: 0 to 1"),
    ],
)
def test_wrong_predictions(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict_speedup(**{"acceptance": 0.5, "draft_cost": 0.1, "verify_curve": {1: 1.0, 4: 1.2}, **arguments})


# growth


def test_cost_growth_finds_the_exponent():
    machine = Machine()

    def power(exponent):
        def run(size):
            machine.now += 4 * 0.1 * size**exponent
            return 4

        return run

    frame = cost_growth({"flat": power(0), "square": power(2)}, [4, 1, 2], clock=machine.clock)
    assert frame["size"].tolist() == [1, 2, 4, 1, 2, 4]
    assert frame["seconds_per_token"].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.4, 1.6])
    assert frame.groupby("method")["slope"].first().tolist() == pytest.approx([0, 2])
    axes = plot_cost_growth(frame, "context")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert plot_cost_growth(frame, ax=axes) is axes


@pytest.mark.parametrize("sizes", [[4], [4, 4], [0, 4], []])
def test_growth_needs_sizes(sizes):
    with pytest.raises(ValueError, match="growth needs at least two different positive sizes"):
        cost_growth({"a": lambda size: 1}, sizes)


def test_compiling_is_kept_apart():
    "Two calls do two seconds of work; the first also compiles for eight."
    ticks, spent = iter((0.0, 10.0, 10.0, 12.0)), iter((8.0, 0.0))

    def method(prompt):
        stats = DecodeStats(target_forwards=1, emitted=[[1]], compile_seconds=next(spent))
        return DecodeOutput(sequences=torch.cat([prompt, prompt[:, :1]], 1), stats=stats, prompt_length=prompt.shape[1])

    rows = compare({"late": method}, [torch.tensor([[5, 6]])], repeats=2, warmup=0, clock=lambda: next(ticks)).rows
    assert [(r.seconds, r.compile_seconds) for r in rows] == [(2.0, 8.0), (2.0, 0.0)]
    assert [r.cpu_seconds is None for r in rows] == [True, False]  # what compiling took of the processor is not known


def test_a_second_round_begins_with_decoders_that_have_learnt_nothing(llama):
    "With a memory of the text every round after the first would be nearly free."
    from decodelab.speculative.drafters import NGram

    ids = torch.tensor([[5, 9, 14, 3]])
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}

    def forwards(method):
        rows = timed_rows({"a": method}, [ids], repeats=3)
        return [row.tokens_per_forward for row in rows]

    decoder = NGram()
    fair = forwards(forgetful(lambda x: decoder.generate(llama, x, **settings), decoder))
    other = NGram()
    known = forwards(lambda x: other.generate(llama, x, **settings))
    alone = NGram(start_from="cold").generate(llama, ids, **settings).stats.tokens_per_forward
    assert fair == [alone] * 3 and min(known) > alone
