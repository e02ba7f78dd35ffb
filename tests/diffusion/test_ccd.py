"""Coherent contextual decoding: against a transcription in plain Python, its reductions, bounds, and the trap."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from scipy.stats import chisquare
from toys import PAD, Wandering, left_pad, made_step, random_prompts, small_model
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.ccd import CCD, History
from decodelab.diffusion.ccd_agreement import Agreement
from decodelab.diffusion.ideal import Distribution, IdealDenoiser
from decodelab.diffusion.step import confidence_score

MASK, VOCAB = 0, 9


@dataclass
class Spy(CCD):
    "Notes what each step saw, row by row, and what it filled."

    seen: list = field(default_factory=list, init=False, repr=False)
    opened: int = field(default=0, init=False, repr=False)

    def remember(self, call, rows):
        self.opened += 1
        return super().remember(call, rows)

    def select(self, step):
        dist, proposals = step.warped.softmax(-1), step.tokens.clone()
        masked, quota, steps = step.masked.clone(), step.quota, step.plan.block_steps
        chosen = super().select(step)
        for i, row in enumerate(step.rows.tolist()):
            facts = {"row": row, "block": self.opened, "masked": masked[i].tolist(), "p": dist[i].tolist(), "best": proposals[i].tolist()}
            facts |= {"quota": int(quota[i]), "index": step.block.index, "steps": steps, "masks": int(step.block.initial_count[i])}
            facts |= {
                "chosen": chosen[i].nonzero()[:, 0].tolist(),
                "tokens": step.tokens[i].tolist(),
                "trust": step.raw_confidence[i].tolist(),
            }
            self.seen.append(facts)
        return chosen


def stories(spy):
    "The steps of each row and block, in order."
    found = {}
    for facts in spy.seen:
        found.setdefault((facts["row"], facts["block"]), []).append(facts)
    return list(found.values())


# the definition, word by word


def h(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def conf_of(p, kind):
    return max(p) if kind == "max_prob" else -h(p)


def best_first(positions, score):
    return sorted(positions, key=lambda i: (-score[i], i))


def by_definition(decoder, passes):
    "Sections A and B: (filled positions, token of each) for every step of one row and block."
    history = []
    for facts in passes:
        p, b = facts["p"], facts["quota"]
        masked = [i for i, m in enumerate(facts["masked"]) if m]
        conf = {i: conf_of(p[i], decoder.conf) for i in masked}
        top = best_first(masked, conf)[: decoder.V]
        consistent = [i for i in top if all(i in record for record in history)]
        mean = {i: [sum(x) / (1 + len(history)) for x in zip(p[i], *(record[i] for record in history))] for i in consistent}
        if not decoder.adaptive:
            score = {i: conf_of(mean[i], decoder.rank) for i in consistent}
            new = sorted(consistent, key=lambda i: -score[i])[:b]
        elif decoder.eps is not None:
            new = [i for i in consistent if h(mean[i]) <= decoder.eps]
        else:
            new = [i for i in consistent if history and p[i].index(max(p[i])) == history[-1][i].index(max(history[-1][i]))]
        written = {i: p[i] if decoder.token_from == "step" else mean[i] for i in new}
        tokens = {i: written[i].index(max(written[i])) for i in new}
        trust = {i: max(written[i]) for i in new}
        for i in best_first([i for i in masked if i not in new], conf)[: max(0, b - len(new))]:
            tokens[i], trust[i] = p[i].index(max(p[i])), max(p[i])
        yield tokens, trust
        if decoder.d:
            history = [*history, {i: p[i] for i in top if i not in tokens}][-decoder.d :]


def by_the_released_code(decoder, passes):
    "Section C."
    width, remembered, previous = 1, [], {}
    for facts in passes:
        p, b, t = facts["p"], facts["quota"], facts["index"]
        masked = [i for i, m in enumerate(facts["masked"]) if m]
        conf = {i: conf_of(p[i], decoder.conf) for i in masked}
        order = best_first(masked, conf)
        if len(masked) <= facts["masks"] / 10:
            width = 1
        if t >= 4:
            width = min(width + 1, b + math.floor(b * decoder.expand_ratio))
        now = {i: p[i].index(max(p[i])) for i in masked}
        new = order[:b]
        if 5 <= t < facts["steps"] - 1 and set(order[:b]) & set(remembered):
            kept = [i for i in order[:width] if i in remembered and now[i] == previous[i]]
            if len(kept) >= b:
                new = kept if decoder.adaptive else kept[:b]
        yield {i: now[i] for i in new}, {i: max(p[i]) for i in new}
        remembered, previous = [i for i in order if i not in new][:width], now


def compare(decoder, model, inputs, new, rule, **settings):
    "Decode with a spy; every step of every row must be what the rule says."
    spy = Spy(**{k: v for k, v in vars(decoder).items() if k not in ("seen", "blocks", "looks_beyond")})
    spy.generate(model, **inputs, max_new_tokens=new, do_sample=False, **settings)
    counts = []
    for passes in stories(spy):
        for facts, (tokens, trust) in zip(passes, rule(decoder, passes), strict=True):
            assert facts["chosen"] == sorted(tokens)
            assert [facts["tokens"][i] for i in sorted(tokens)] == [tokens[i] for i in sorted(tokens)]
            assert [facts["trust"][i] for i in sorted(tokens)] == pytest.approx([trust[i] for i in sorted(tokens)], abs=1e-5)
            counts.append(len(tokens))
    return counts


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (4, 3), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, 0] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


FIXED = [{}, {"V": 1}, {"V": 2, "d": 1}, {"V": 6, "d": 2}, {"d": 0}, {"V": 30, "d": 5}, {"rank": "max_prob"}]


FIXED += [
    {"token_from": "step"},
    {"conf": "max_prob", "d": 2},
    {"steps": 6},
    {"steps": 3, "V": 5},
    {"block_length": 6},
    {"block_length": 9, "steps": 4},
]


@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("fields", FIXED, ids=str)
def test_fixed_budget_is_the_definition_word_by_word(fields, noise, prompts):
    counts = compare(CCD(**fields), Wandering(noise), prompts, 18, by_definition)
    assert max(counts) == {6: 3, 3: 6, 4: 5}.get(fields.get("steps"), 1)


ADAPTIVE = [{}, {"d": 1}, {"V": 6, "d": 2}, {"steps": 6}, {"steps": 6, "V": 2}, {"block_length": 6}, {"eps": 1.2}, {"eps": 1.0, "d": 0}]


@pytest.mark.parametrize("noise", [0.2, 0.5])
@pytest.mark.parametrize("fields", ADAPTIVE, ids=str)
def test_adaptive_budget_is_the_definition_word_by_word(fields, noise, prompts):
    decoder = CCD(adaptive=True, **fields)
    counts = compare(decoder, Wandering(noise), prompts, 18, by_definition)
    assert max(counts) > 1
    assert max(counts) <= max(decoder.V, 3 if "steps" in fields else 1)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("fields", [{}, {"steps": 16}, {"conf": "max_prob"}, {"expand_ratio": 1.5}, {"block_length": 24}], ids=str)
def test_the_official_codes_behaviour_is_transcribed(fields, adaptive, prompts):
    counts = compare(CCD(variant="agreement", adaptive=adaptive, **fields), Wandering(0.3), prompts, 48, by_the_released_code)
    budget = 3 if "steps" in fields else 1
    assert max(counts) > budget if adaptive else max(counts) == budget


def test_rows_that_end_early_leave_the_history_in_order(prompts):
    model = Wandering(0.5, eos=4)
    model.base[:, 4] += 1.0
    counts = compare(CCD(adaptive=True), model, prompts, 18, by_definition)
    rows = [len(e) for e in CCD(adaptive=True).generate(model, **prompts, max_new_tokens=18, do_sample=False).stats.emitted]
    assert len(set(rows)) > 1
    assert len(counts) == sum(rows)
    compare(CCD(variant="agreement", adaptive=True), model, prompts, 18, by_the_released_code)


def test_scores_of_a_distribution():
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert confidence_score(p).tolist() == pytest.approx([-1.5 * math.log(2), 0.0], abs=1e-6)
    assert confidence_score(p, "max_prob").tolist() == [0.5, 1.0]


def test_distributions_are_averaged_not_logits():
    memory = History(1)
    a, b = torch.tensor([0.98, 0.01, 0.01]), torch.tensor([0.3, 0.69, 0.01])
    memory.record(torch.tensor([[7]]), a[None, None])
    everywhere, mean = memory.compare(torch.tensor([[7]]), b[None, None])
    assert everywhere.tolist() == [[True]]
    assert memory.unchanged(torch.tensor([[7]]), b[None, None]).tolist() == [[False]]
    assert memory.unchanged(torch.tensor([[7]]), a[None, None]).tolist() == [[True]]
    assert memory.unchanged(torch.tensor([[6]]), a[None, None]).tolist() == [[False]]
    assert mean[0, 0].tolist() == pytest.approx([0.64, 0.35, 0.01])


# reductions


@pytest.mark.parametrize("fields", [{}, {"steps": 6}, {"block_length": 8}, {"block_length": 8, "steps": 9}], ids=str)
def test_without_history_it_is_the_baseline_of_the_same_score(fields):
    model = small_model()
    model.config.mask_token_id = PAD
    inputs = left_pad(random_prompts(5, seed=4))
    for conf, remasking in (("entropy", "entropy"), ("max_prob", "low_confidence")):
        plain = LLaDA(remasking=remasking, **fields).generate(model, **inputs, max_new_tokens=24, do_sample=False)
        ours = CCD(d=0, V=6, conf=conf, rank=conf, **fields).generate(model, **inputs, max_new_tokens=24, do_sample=False)
        assert ours.sequences.tolist() == plain.sequences.tolist()
        other = CCD(d=3, V=16, conf=conf, rank=conf, **fields).generate(model, **inputs, max_new_tokens=24, do_sample=False)
        assert other.sequences.tolist() != plain.sequences.tolist()


def order(decoder, model, inputs, new):
    out = decoder.generate(model, **inputs, max_new_tokens=new, do_sample=False)
    return [[s.info["step"] for s in out.trace.row(i)] for i in range(len(inputs["input_ids"]))], out.sequences.tolist()


@pytest.mark.parametrize("conf", ["entropy", "max_prob"])
def test_a_wide_buffer_and_distributions_that_never_change_give_the_baselines_order(conf, prompts):
    still = Wandering(noise=0.0)
    baseline = LLaDA(remasking="entropy" if conf == "entropy" else "low_confidence", trace=True)
    assert order(CCD(V=20, d=3, conf=conf, rank=conf, trace=True), still, prompts, 18) == order(baseline, still, prompts, 18)


def step_of(dists, masked=None, quota=1, memory=None, **fields):
    "A first step of a block with given distributions [n, block, vocab]."
    dists = torch.as_tensor(dists)
    step = made_step(dists.log(), masked, steps=dists.shape[1] // quota, **fields)
    step.memory = memory
    return step


def filled(decoder, step):
    decoder.propose(step)
    return decoder.select(step)


def test_entropy_and_largest_probability_rank_differently_even_without_history():
    dists = [[[0.52, 0.48, 0.0, 0.0], [0.55, 0.15, 0.15, 0.15]]]  # 0.69 nats, and 1.18 nats
    found = {}
    for rank in ("entropy", "max_prob"):
        step = step_of(dists, memory=History(0))
        found[rank] = filled(CCD(d=0, conf="max_prob", rank=rank), step).tolist()
    assert found == {"entropy": [[True, False]], "max_prob": [[False, True]]}


@pytest.mark.parametrize("score", ["max_prob", "entropy"])
@pytest.mark.parametrize("d", [0, 2])
def test_nearly_certain_distributions_are_told_apart(score, d):
    # the best token leads by 16, 18, 20: 1 - p is 1.1e-7, 1.5e-8, 2.1e-9; float32 rounds the last two to 1
    scores = torch.zeros(1, 3, 2)
    scores[0, :, 1] = torch.tensor([16.0, 18.0, 20.0])
    memory = History(d)
    for taken in (2, 1, 0):
        masked = torch.arange(3)[None] <= taken
        step = made_step(scores, masked, steps=3)
        step.memory = memory
        chosen = filled(CCD(V=3, d=d, conf=score, rank=score), step)
        assert chosen.nonzero().tolist() == [[0, taken]]
        assert step.memory.conf[0, : taken + 1].argsort(descending=True).tolist() == list(range(taken, -1, -1))


@pytest.mark.parametrize("d", [1, 3])
def test_a_buffer_of_one_is_the_baseline(d, prompts):
    # the only masked position remembered is the one that is filled: from the second step on no record holds the champion
    model = Wandering()
    baseline = LLaDA(remasking="entropy", trace=True)
    assert order(CCD(V=1, d=d, trace=True), model, prompts, 18) == order(baseline, model, prompts, 18)


def test_a_buffer_of_one_fills_only_champions_of_all_remembered_passes_when_nothing_was_filled():
    memory = History(2)
    dist = torch.tensor([[[0.9, 0.1]]])
    for champion in (3, 3):
        memory.record(torch.tensor([[champion]]), dist)
    assert memory.compare(torch.tensor([[3]]), dist)[0].tolist() == [[True]]
    assert memory.compare(torch.tensor([[2]]), dist)[0].tolist() == [[False]]
    memory.record(torch.tensor([[2]]), dist)  # drops the first 3; 3 is now missing from the newest
    assert memory.compare(torch.tensor([[3]]), dist)[0].tolist() == [[False]]
    memory.record(torch.tensor([[2]]), dist)
    assert memory.compare(torch.tensor([[2]]), dist)[0].tolist() == [[True]]


# bounds


@pytest.mark.parametrize("fields", [{}, {"V": 2}, {"V": 6, "d": 1}, {"steps": 6}, {"eps": 0.9}, {"variant": "agreement"}], ids=str)
def test_adaptive_budgets_stay_between_the_plan_and_the_buffer(fields, prompts):
    new, model = 24, Wandering(0.5)
    out = CCD(adaptive=True, early_stop=False, **fields).generate(model, **prompts, max_new_tokens=new, do_sample=False)
    least = new // fields.get("steps", new)
    most = 5 if "variant" in fields else max(fields.get("V", 4), least)
    for emitted in out.stats.emitted:
        assert sum(emitted) == new
        assert len(emitted) <= fields.get("steps", new)
        assert least <= min(emitted[:-1])
        assert max(emitted) <= most
    assert (out.sequences[:, 3:] != MASK).all()


def test_adaptive_choices_come_from_all_records(prompts):
    spy = Spy(adaptive=True, V=4, d=2)
    spy.generate(Wandering(0.5), **prompts, max_new_tokens=18, do_sample=False)
    several = 0
    for passes in stories(spy):
        tops = []
        for facts in passes:
            masked = [i for i, m in enumerate(facts["masked"]) if m]
            top = best_first(masked, {i: -h(facts["p"][i]) for i in masked})[:4]
            if len(facts["chosen"]) > 1:
                several += 1
                assert all(set(facts["chosen"]) <= set(t) for t in [top, *tops[-2:]])
            tops.append([i for i in top if i not in facts["chosen"]])
    assert several > 5


@pytest.mark.parametrize("V", [2, 4, 6])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_at_most_V_masked_positions_are_filled_by_consistency_in_d_plus_1_passes(V, d, prompts):
    for noise in (0.0, 0.1, 0.3):
        spy = Spy(adaptive=True, V=V, d=d)
        spy.generate(Wandering(noise), **prompts, max_new_tokens=30, do_sample=False)
        for passes in stories(spy):
            filled = [len(facts["chosen"]) for facts in passes]
            windows = [filled[i : i + d + 1] for i in range(len(filled) - d)]
            # a step without consistent positions fills one by the ordinary rule
            assert all(sum(w) <= V + d for w in windows)
            assert len(filled) >= 30 * (d + 1) / (V + d) - d


def consistent(decoder, passes):
    "Consistent positions of every step of one row."
    records = []
    for facts in passes:
        masked = [i for i, m in enumerate(facts["masked"]) if m]
        top = best_first(masked, {i: -h(facts["p"][i]) for i in masked})[: decoder.V]
        yield [i for i in top if all(i in record for record in records[-decoder.d :])]
        records.append(top)


@pytest.mark.parametrize(("V", "d"), [(4, 3), (4, 2), (6, 3), (4, 1)])
def test_after_d_consistent_passes_at_most_V_minus_d_masked_positions_are_consistent(V, d, prompts):
    spy, full = Spy(V=V, d=d), 0
    spy.generate(Wandering(0.3), **prompts, max_new_tokens=30, do_sample=False)
    for passes in stories(spy):
        sets = list(consistent(spy, passes))
        for t in range(d, len(sets)):
            if all(sets[t - d : t]):
                assert len(sets[t]) <= V - d
                full += len(sets[t]) == V - d
    assert full > 10


@pytest.mark.parametrize("V", range(1, 7))
@pytest.mark.parametrize("d", range(1, 5))
def test_when_distributions_never_change_budgets_follow_the_recursion(V, d, prompts):
    spy = Spy(adaptive=True, V=V, d=d)
    spy.generate(Wandering(0.0), **prompts, max_new_tokens=30, do_sample=False)
    expected = []
    while sum(expected) < 30:
        expected.append(min(30 - sum(expected), max(1, V - sum(expected[-d:]) if expected else 1)))
    assert all([len(facts["chosen"]) for facts in passes] == expected for passes in stories(spy))


def test_fixed_budget_takes_exactly_the_planned_passes(prompts):
    for fields in ({}, {"variant": "agreement"}):
        for steps, each in ((24, 1), (8, 3), (5, None)):
            out = CCD(steps=steps, early_stop=False, **fields).generate(Wandering(), **prompts, max_new_tokens=24, do_sample=False)
            assert all(e == ([each] * steps if each else [5, 5, 5, 5, 4]) for e in out.stats.emitted)


# rows, blocks, sampling, trace


@pytest.mark.parametrize("fields", [{}, {"adaptive": True}, {"variant": "agreement", "adaptive": True}, {"block_length": 6}], ids=str)
def test_a_row_decodes_in_a_batch_as_alone(fields, prompts):
    model = Wandering(0.5, eos=4)
    model.base[:, 4] += 0.5
    together = CCD(**fields).generate(model, **prompts, max_new_tokens=18, do_sample=False)
    for i in range(4):
        real = prompts["attention_mask"][i].bool()
        alone = CCD(**fields).generate(model, prompts["input_ids"][i : i + 1, real], max_new_tokens=18, do_sample=False)
        assert alone.continuations[0].tolist() == together.continuations[i].tolist()
        assert alone.stats.emitted[0] == together.stats.emitted[i]


def test_every_block_starts_with_an_empty_history(prompts):
    spy = Spy(adaptive=True, block_length=6)
    spy.generate(Wandering(0.3), **prompts, max_new_tokens=18, do_sample=False)
    firsts = [passes[0] for passes in stories(spy)]
    assert len(firsts) == 12
    assert all(len(facts["chosen"]) == 1 for facts in firsts)  # nothing is settled before a second step


def test_sampling_draws_from_the_average_and_not_from_this_pass():
    rows = 20_000
    past, now = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    memory = History(1)
    memory.record(torch.zeros(rows, 1, dtype=torch.long), past.expand(rows, 1, 3))
    torch.manual_seed(0)
    step = step_of(now.expand(rows, 1, 3), memory=memory, do_sample=True)
    assert filled(CCD(d=1), step).all()
    counts = torch.bincount(step.tokens[:, 0], minlength=3).tolist()
    assert chisquare(counts, [rows * p for p in (0.4, 0.2, 0.4)]).pvalue > 1e-3
    assert chisquare(counts, [rows * p for p in (0.1, 0.2, 0.7)]).pvalue < 1e-9


class TwoPlaces(PreTrainedModel, GenerationMixin):
    "The second place is certain; the first has the distribution `past` until that one is filled, then `now`."

    config_class = PreTrainedConfig

    def __init__(self, past, now):
        config = {
            "vocab_size": 5,
            "num_hidden_layers": 0,
            "mask_token_id": 2,
            "eos_token_id": None,
            "max_position_embeddings": 9,
            "is_causal": False,
        }
        super().__init__(PreTrainedConfig(**config))
        self.dists, self.embed = (past, now), torch.nn.Embedding(5, 1).requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        p = torch.zeros(*input_ids.shape, 5)
        p[:, :, 3] = 1.0
        p[:, 1, 3], p[:, 1, :2] = 0.0, torch.where((input_ids[:, 2] == 2)[:, None], *self.dists)
        return MaskedLMOutput(logits=p.log())


def test_warpers_come_before_the_average_or_behind_it():
    past, now = torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.6])
    seen, model = {}, TwoPlaces(past, now)
    for score_from in ("sampled", "raw"):
        torch.manual_seed(0)
        prompts = torch.full((20_000, 1), 3)
        decoder = CCD(d=1, score_from=score_from)
        out = decoder.generate(model, prompts, max_new_tokens=2, do_sample=True, temperature=0.5, top_k=0)
        assert (out.sequences[:, 2] == 3).all()
        seen[score_from] = torch.bincount(out.sequences[:, 1], minlength=2).tolist()
    tempered = [p**2 / (p**2).sum() for p in (past, now, (past + now) / 2)]
    expected = {"sampled": (tempered[0] + tempered[1]) / 2, "raw": tempered[2]}
    for score_from, counts in seen.items():
        assert chisquare(counts, (20_000 * expected[score_from]).double().numpy(), sum_check=False).pvalue > 1e-3
    assert chisquare(seen["raw"], (20_000 * expected["sampled"]).double().numpy(), sum_check=False).pvalue < 1e-9


def test_with_a_temperature_unchanged_means_the_best_token_not_the_drawn_one():
    dist = torch.tensor([0.55, 0.45]).expand(200, 2, 2)
    memory = History(1)
    memory.record(torch.tensor([0, 1]).expand(200, 2), dist)
    step = step_of(dist, memory=memory, do_sample=True)
    torch.manual_seed(0)
    assert filled(CCD(d=1, adaptive=True), step).all()
    assert 0 < int(step.tokens.sum()) < 400


def test_confidence_of_a_sampled_step_is_that_of_the_tempered_distribution():
    tempered = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]])
    plain = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]])
    for conf in ("entropy", "max_prob"):
        step = step_of(plain, memory=History(0), do_sample=True, score_from="sampled")
        step.warped = tempered.log()  # what temperature and filters leave of the scores
        CCD(conf=conf).propose(step)
        assert step.memory.conf.argmax().item() == 1


def test_it_works_as_custom_generate_and_on_a_causal_architecture():
    model = small_model("qwen3")
    model.config.mask_token_id = PAD
    ids = random_prompts(1, seed=2)[0]
    direct = CCD(adaptive=True, trace=True).generate(model, ids, max_new_tokens=12, do_sample=False)
    passed = model.generate(ids, custom_generate=CCD(adaptive=True), max_new_tokens=12, do_sample=False)
    assert direct.sequences.tolist() == passed.sequences.tolist()
    assert direct.trace.roles() == {"filled": 12}


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_it_runs_on_cached_keys_and_values(cache):
    model = small_model()
    model.config.mask_token_id = PAD
    inputs = left_pad(random_prompts(3, seed=7))
    out = CCD(adaptive=True, cache=cache, block_length=8).generate(model, **inputs, max_new_tokens=16, do_sample=False)
    assert all(sum(e) == 16 for e in out.stats.emitted)


def test_on_exact_marginals_the_average_may_write_what_has_become_impossible():
    # the last place is 1 with probability 0.48 in three records; then the fourth place becomes 2, and it is 2 with 0.27 / 0.52
    dist = Distribution(torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 2, 2], [0, 0, 0, 2, 3]]), torch.tensor([0.48, 0.27, 0.25]))
    assert 3 * 0.48 > 3 * 0.27 + 0.27 / 0.52
    model = IdealDenoiser(dist)
    for fields, text in (({}, [0, 0, 0, 2, 1]), ({"token_from": "step"}, [0, 0, 0, 2, 2]), ({"d": 1}, [0, 0, 0, 2, 2])):
        out = CCD(**fields).generate(model, model.start, max_new_tokens=5, do_sample=False)
        assert out.sequences[0, 1:].tolist() == text


# official code and paper


@dataclass
class WithHistory(Agreement):
    history: History = field(default_factory=lambda: History(1))

    def keep_rows(self, keep):
        super().keep_rows(keep)
        self.history.keep_rows(keep)


@dataclass
class Both(CCD):
    "The official code's choice, beside the paper's with d = 1 and the same buffer."

    pairs: list = field(default_factory=list, init=False, repr=False)

    def remember(self, call, rows):
        memory = WithHistory.empty(rows, call.prompt.device)
        memory.width += self.V - 1
        return memory

    def select(self, step):
        conf, p = step.memory.conf, step.probs
        positions = conf.argsort(descending=True)[:, : self.V]
        dist = p.gather(1, positions[..., None].expand(-1, -1, p.shape[-1]))
        known = step.memory.history.compare(positions, dist)[0]
        settled = known & step.memory.history.unchanged(positions, dist) & step.masked.gather(1, positions)
        paper = torch.zeros_like(step.masked).scatter(1, positions, settled)
        paper = torch.where(settled.any(-1, keepdim=True), paper, conf == conf.amax(-1, keepdim=True))
        code = super().select(step)
        champion_known = known[:, 0]
        self.pairs += [(bool(k), a.tolist() == b.tolist(), bool(s)) for k, a, b, s in zip(champion_known, paper, code, settled.any(-1))]
        rest = conf.masked_fill(code, -torch.inf)
        after = rest.argsort(descending=True)[:, : self.V]
        dists = p.gather(1, after[..., None].expand(-1, -1, p.shape[-1]))
        step.memory.history.record(after.masked_fill(rest.gather(1, after) == -torch.inf, -1), dists)
        return code


def test_code_and_paper_agree_whenever_the_champion_was_remembered(prompts):
    both = Both(variant="agreement", adaptive=True, V=4, warm_up=1, expand_ratio=3)
    for seed in range(6):  # nine positions: the code's last phase, of at most 10 %, never begins
        both.generate(Wandering(0.5, seed=seed), **prompts, max_new_tokens=9, do_sample=False)
    known = [same for champion, same, _ in both.pairs if champion]
    new = [same for champion, same, settled in both.pairs if not champion and settled]
    assert len(known) > 30
    assert all(known)
    assert len(new) > 3
    assert not any(new)


# bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conf": "margin"}, "unknown conf 'margin': use one of entropy, max_prob"),
        ({"rank": "x"}, "unknown rank 'x'"),
        ({"variant": "x"}, "unknown variant 'x': use one of average, agreement"),
        ({"token_from": "x"}, "unknown token_from 'x': use one of average, step"),
        ({"score_from": "x"}, "unknown score_from 'x'"),
        ({"V": 0}, "V must be positive and d not negative, got 0 and 3"),
        ({"d": -1}, "V must be positive and d not negative, got 4 and -1"),
        ({"warm_up": -1}, "warm_up and expand_ratio must not be negative, got -1 and 4.0"),
        ({"expand_ratio": -0.5}, "warm_up and expand_ratio must not be negative"),
        ({"expand_ratio": math.nan}, "warm_up and expand_ratio must not be negative"),
        ({"eps": math.nan, "adaptive": True}, "eps must not be negative"),
        ({"eps": 0.1}, "eps must not be negative and needs adaptive=True"),
        ({"eps": -0.1, "adaptive": True}, "eps must not be negative"),
        ({"eps": 0.1, "adaptive": True, "variant": "agreement"}, "needs adaptive=True and variant='average'"),
        ({"d": 0, "adaptive": True}, "with d=0 there is no earlier step to compare best tokens with"),
        ({"block_length": 0}, "block_length must be positive"),
    ],
)
def test_bad_settings_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        CCD(**fields)
