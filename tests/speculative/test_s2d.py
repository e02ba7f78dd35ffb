"""S2D: blocks against truncated models, reading late under random thresholds and rollbacks, losslessness, the official sampling rule as a negative control."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, SAMPLING_RULES, VOCAB, V, added, exact_probs, fit, left_pad, plain, random_prompts, sample_counts, small_model
from transformers import LlamaConfig, LlamaForCausalLM

from decodelab.core.output import DecodeStats
from decodelab.core.tree import Tree
from decodelab.speculative import exit_thresholds, s2d
from decodelab.speculative.base import Draft
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.exit_thresholds import Work, choose_tau, threshold_grid, total, work
from decodelab.speculative.layer_drafter import layer_drafter
from decodelab.speculative.nested import EarlyExitSession, check_exits, exit_logits, final_norm, split
from decodelab.speculative.s2d import S2D

EXITS = (1, 2, 4)
TOY = {"tau": (0.5, 0.6), "gamma": 3, "exits": EXITS}
GREEDY = {"do_sample": False}


def nested_model(vocab=VOCAB, hidden=32, layers=4, spread=0.3, seed=5, context=256):
    "A random Llama of several layers."
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=vocab, num_key_value_heads=2, max_position_embeddings=context, initializer_range=spread, pad_token_id=0, eos_token_id=EOS, **shape
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.4, 1.6)  # a norm of a norm is then another
        model.lm_head.weight[[0, EOS]] = 0.0  # never the best of many, as in `small_model`
    return model


@pytest.fixture(scope="module")
def drafter():
    return nested_model()


@pytest.fixture(scope="module")
def alone(drafter):
    "The truncated models, by hand."
    models = []
    for depth in EXITS:
        model = copy.deepcopy(drafter)
        model.model.layers = model.model.layers[:depth]
        model.config.num_hidden_layers = depth
        models.append(model)
    return models


@pytest.fixture(scope="module")
def small_drafter():
    "Of six tokens, for the toy; rows leave it at different exits."
    model = nested_model(vocab=V, hidden=16, spread=0.4, seed=2)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)
    return model


# nesting


def test_exits_are_truncated_models(drafter, alone, no_gradients):
    ids = random_prompts(1, lengths=(12, 12))[0]
    given = {"input_ids": ids}
    for block, model in zip(split(drafter, EXITS), alone):
        out = block(**given, output_hidden_states=True)
        assert torch.allclose(out.logits[:, -1], model(ids).logits[:, -1], atol=1e-5)
        given = {"inputs_embeds": out.hidden_states[-1]}
    parent, name = final_norm(drafter)
    out = drafter(ids, output_hidden_states=True)
    for logits, model in zip(exit_logits(out, EXITS, getattr(parent, name), drafter.lm_head), alone):
        assert torch.allclose(logits, model(ids).logits, atol=1e-5)


def test_blocks_cost_no_memory_and_leave_the_model_as_it_is():
    model = nested_model()
    before, names = {k: v.clone() for k, v in model.state_dict().items()}, [n for n, _ in model.named_modules()]
    blocks = split(model, EXITS)
    assert split(model, EXITS) is blocks
    own = {*map(id, model.parameters())}
    assert all(id(p) in own for block in blocks for p in block.parameters())
    assert names == [n for n, _ in model.named_modules()]
    assert all(before[k].equal(v) for k, v in model.state_dict().items())
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    with torch.no_grad():  # weights that change in place change in the blocks, too
        model.lm_head.weight.mul_(2)
    assert split(model, EXITS) is blocks
    model.to(torch.float64)
    assert {p.dtype for block in split(model, EXITS) for p in block.parameters()} == {torch.float64}
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert split(model, EXITS) is not blocks


def test_the_norm_is_not_applied_twice(drafter, no_gradients):
    ids = random_prompts(1)[0]
    out = drafter(ids, output_hidden_states=True)
    twice = drafter.lm_head(drafter.model.norm(out.hidden_states[-1]))
    assert not torch.allclose(twice, exit_logits(out, EXITS, drafter.model.norm, drafter.lm_head)[-1], atol=1e-2)


@pytest.mark.parametrize("exits", [(), (0, 4), (2, 2, 4), (4, 2), (1, 2), (1, 5)])
def test_bad_exits(drafter, exits):
    with pytest.raises(ValueError, match="exits must be ascending numbers of layers that end with all 4 of the drafter"):
        split(drafter, exits)
    assert check_exits([1, 4], 4) == (1, 4)


def test_models_that_cannot_be_left_early(llama):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot be cut between its layers \(exit 2 differs from the first 2 layers\)"):
        split(small_model("gpt2"), (1, 2))  # each block would add its positions anew
    without = small_model()
    without.model.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="is not made of layers, one norm and a head"):
        split(without, (1, 2))
    assert len(split(small_model("qwen3"), (1, 2))) == 2


@pytest.mark.slow
def test_every_architecture_is_cut_exactly_or_refused():
    architectures = pytest.importorskip("architectures")
    cut = []
    for name in architectures.architectures():
        model = architectures.build(name)
        depth = model.config.get_text_config().num_hidden_layers
        try:
            S2D.method.example(model)  # what cannot be cut drafts with a small Llama
            blocks = split(model, tuple(range(1, depth + 1)))
        except ValueError as error:
            assert "\n" not in str(error) and str(error)  # noqa: PT017
            continue
        cut.append((name, len(blocks)))
    assert {"llama", "mistral", "qwen3"} <= {name for name, _ in cut}


# reading late


def session(cls, model, prompts, tau=(0.0, 0.0)):
    inputs = left_pad(prompts)
    call = SimpleNamespace(prompt=inputs["input_ids"], mask=inputs["attention_mask"], budget=64, stats=DecodeStats())
    return cls(split(model, EXITS), list(tau), call)


def walk_at_random(cls, model, alone, seed, rows, rounds=7):
    "Random thresholds, drafts, rollbacks, rounds without a draft and rows that end; the largest error of an exit, and the exits that were seen."
    rng, prompts = np.random.default_rng(seed), random_prompts(rows, lengths=(1, 9), seed=seed)
    state, texts = session(cls, model, prompts), [p[0].tolist() for p in prompts]
    worst, seen, fed = 0.0, set(), [0] * len(EXITS)
    state.write(torch.tensor([text[-1] for text in texts]))
    for _ in range(rounds):
        drafted, on = [[] for _ in texts], rng.random(len(texts)) < 0.8
        nodes = [[0] for _ in texts]
        tokens = [torch.tensor([text[-1] for text in texts])]
        parents = [torch.full((len(texts),), -1)]
        for k in range(1, int(rng.integers(1, 5)) + 1):
            if not on.any():
                break
            state.tau = rng.choice([0.0, 0.15, 0.3, 1.0], len(EXITS) - 1)
            before = state.lens.copy()
            logits = state.answer(on)
            assert (np.diff(state.lens, axis=0) <= 0).all()  # len_1 >= len_2 >= ...
            for b in range(len(EXITS)):
                fed[b] += int((state.lens[b + 1] - before[b + 1]).sum())
            for row in np.flatnonzero(on):
                with torch.no_grad():
                    expected = alone[state.exits[row] - 1](torch.tensor([texts[row] + drafted[row]])).logits[0, -1]
                worst = max(worst, float((logits[row] - expected).abs().max()))
                seen.add(int(state.exits[row]))
            drawn = torch.tensor(rng.integers(2, VOCAB, len(texts)))
            for row in np.flatnonzero(on):
                drafted[row].append(int(drawn[row]))
                nodes[row].append(k)
            tokens.append(torch.where(torch.tensor(on), drawn, 0))
            parents.append(torch.where(torch.tensor(on), k - 1, -1))
            on = on & (rng.random(len(texts)) < 0.8)
            if on.any() and k < 4 and rng.random() < 0.8:
                state.write(drawn, on, draft=True)
            else:
                break
        accepted = [int(rng.integers(0, len(d) + 1)) for d in drafted]
        state.keep(Draft(torch.stack(tokens, 1), Tree(torch.stack(parents, 1))), [n[: a + 1] for n, a in zip(nodes, accepted)])
        own = rng.integers(2, VOCAB, (len(texts), 2)).tolist()
        plain_round = rng.random() < 0.3
        for row, text in enumerate(texts):
            text += drafted[row][: accepted[row]] + own[row][: 1 + plain_round]
        if plain_round:
            state.skip(torch.tensor([o[0] for o in own]))
        if len(texts) > 1 and rng.random() < 0.2:
            rows_kept = np.sort(rng.permutation(len(texts))[:-1])
            state.keep_rows(torch.tensor(rows_kept))
            texts = [texts[row] for row in rows_kept]
        state.write(torch.tensor([text[-1] for text in texts]))
        assert state.lens[0].tolist() == [len(text) - n + 1 for text, n in zip(texts, state.prompt_lengths)]
    return worst, seen, fed


class Watched(EarlyExitSession):
    "Remembers how long the prompts of its rows are."

    def __init__(self, blocks, tau, call):
        super().__init__(blocks, tau, call)
        self.prompt_lengths = call.mask.sum(1).tolist()

    def keep_rows(self, rows):
        super().keep_rows(rows)
        self.prompt_lengths = [self.prompt_lengths[row] for row in rows.tolist()]


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4))
def test_every_answer_is_that_of_a_truncated_model(drafter, alone, seed, rows):
    worst, _, fed = walk_at_random(Watched, drafter, alone, seed, rows)
    assert worst < 2e-4
    assert fed[0] >= fed[1] >= fed[2]


def test_all_exits_were_used(drafter, alone):
    assert walk_at_random(Watched, drafter, alone, 1, 4, rounds=12)[1] == {1, 2, 3}


class NoCatchUp(Watched):
    "WRONG: a deeper block reads the new token only, and never what it has missed."

    def _read(self, block, wanted):
        if block:
            self.lens[block + 1] = np.where(wanted, self.lens[block] - 1, self.lens[block + 1])
        return super()._read(block, wanted)


class DropsOne(Watched):
    "WRONG: loses one of the states that a block has still to read when a draft is taken back."

    def keep(self, draft, paths):
        super().keep(draft, paths)
        self.lens[2:] = np.minimum(self.lens[2:] + 1, self.lens[1:-1])


class NormsStates(Watched):
    "WRONG: hands the state on behind the norm."

    def _keep_states(self, block, states, real, at):
        norm = self.sessions[0].model.get_output_embeddings().norm
        super()._keep_states(block, norm(states), real, at)


class MixesRows(Watched):
    "WRONG: writes the states of all rows where the first row's belong."

    def _keep_states(self, block, states, real, at):
        super()._keep_states(block, states, real, np.broadcast_to(at[:1], at.shape))


@pytest.mark.parametrize("broken", [NoCatchUp, DropsOne, NormsStates, MixesRows])
def test_broken_sessions_are_found_out(drafter, alone, broken):
    worst = 0.0
    for seed in range(12):
        try:
            worst = max(worst, walk_at_random(broken, drafter, alone, seed, rows=3)[0])
        except (AssertionError, IndexError, ValueError, RuntimeError):
            worst = 1.0
        if worst > 0.05:
            break
    assert worst > 0.05


# the chain


def run(decoder, model, prompt, seed=0, new=24, **kwargs):
    torch.manual_seed(seed)
    return decoder.generate(model, prompt, max_new_tokens=new, **(kwargs or GREEDY))


@settings(max_examples=12)
@given(
    seed=st.integers(0, 999),
    tau=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    gamma=st.sampled_from([0, 1, 4, "heuristic", "auto"]),
    ends=st.booleans(),
)
def test_no_threshold_changes_the_text(llama, drafter, seed, tau, gamma, ends):
    prompts = random_prompts(2, lengths=(1, 8), seed=seed)
    free = [plain(llama, ids, 16) for ids in prompts]
    end = {"eos_token_id": free[0][9]} if ends else {}
    expected = [text[: text.index(free[0][9]) + 1] if ends and free[0][9] in text else text for text in free]
    out = S2D(drafter, tau=tau, gamma=gamma, exits=EXITS).generate(llama, **left_pad(prompts), max_new_tokens=16, **GREEDY, **end)
    assert added(out) == expected


@pytest.mark.parametrize(("tau", "which"), [(0.0, 0), ((0.0, 1.0), 0), ((1.0, 0.0), 1), (1.0, 2), ((7.0, 7.0), 2)])
def test_limits_are_fixed_exits(llama, drafter, alone, tau, which):
    for seed, prompt in enumerate(random_prompts(3, seed=3)):
        ours = run(S2D(drafter, tau=tau, exits=EXITS, trace=True), llama, prompt, seed)
        theirs = run(DraftModel(alone[which], 5, trace=True), llama, prompt, seed)
        assert [s.info["tokens"] for s in ours.trace] == [s.info["tokens"] for s in theirs.trace]
        assert {e for s in ours.trace for e in s.info["exits"]} == {which + 1}
        sampled = {"do_sample": True, "top_k": 0, "eos_token_id": None}
        a, b = (run(d, llama, prompt, seed, **sampled) for d in (S2D(drafter, tau=tau, exits=EXITS), DraftModel(alone[which], 5)))
        assert a.sequences.equal(b.sequences)


def test_one_exit_is_a_plain_drafter(llama, drafter):
    prompt = random_prompts(1, seed=4)[0]
    ours, theirs = run(S2D(drafter, exits=(4,)), llama, prompt), run(DraftModel(drafter, 5), llama, prompt)
    assert ours.stats.emitted == theirs.stats.emitted
    assert ours.stats.draft_lengths == theirs.stats.draft_lengths


def test_a_drafter_that_is_right(llama):
    "The target as its own drafter: everything is accepted from the last exit."
    whole = layer_drafter(llama, range(2), copies=False)
    out = run(S2D(whole, tau=1.0, gamma=4, exits=(1, 2)), llama, random_prompts(1)[0], new=21)
    assert out.stats.emitted == [[5, 5, 5, 5, 1]]


def test_a_compiled_drafter(llama, drafter):
    wrapped = torch.compile(drafter, backend="eager")
    prompt = random_prompts(1, seed=7)[0]
    with torch.compiler.set_stance("force_eager"):  # what counts is the wrapper
        assert added(run(S2D(wrapped, exits=EXITS), llama, prompt)) == [plain(llama, prompt, 24)]


def test_a_drafter_with_an_adapter_is_refused(llama, drafter):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(drafter), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="without adapters: merge them first"):
        run(S2D(adapted, exits=EXITS), llama, torch.tensor([[5, 6]]))


def exits_of(out):
    return [step.info["exits"] for step in out.trace]


def test_rows_leave_where_they_would_alone(llama, drafter):
    prompts = random_prompts(5, lengths=(1, 9), seed=8)
    decoder = S2D(drafter, tau=(0.3, 0.15), exits=EXITS, trace=True)
    together = decoder.generate(llama, **left_pad(prompts), max_new_tokens=20, **GREEDY)
    for row, prompt in enumerate(prompts):
        out = run(decoder, llama, prompt, new=20)
        assert [s.info["exits"] for s in together.trace.row(row)] == exits_of(out)
        assert together.continuations[row].equal(out.continuations[0])
    assert len({tuple(step.info["exits"]) for step in together.trace}) > 5


def test_exits_follow_the_confidence(llama, drafter, alone, no_gradients):
    "Token by token: the first exit whose largest probability at temperature 1 is above its threshold, whatever the call's temperature."
    tau, prompt = (0.3, 0.15), random_prompts(1, seed=9)[0]
    settings = {"do_sample": True, "top_k": 0, "temperature": 0.2, "eos_token_id": None}
    out = run(S2D(drafter, tau=tau, exits=EXITS, trace=True), llama, prompt, **settings)
    text, cold = prompt[0].tolist(), 0
    for step in out.trace:
        for k, (exit_, confidence) in enumerate(zip(step.info["exits"], step.info["confidences"]), 1):
            ids = torch.tensor([text + step.info["tokens"][1:k]])
            scores = [model(ids).logits[0, -1] for model in alone]
            best = [float(s.softmax(-1).max()) for s in scores]
            assert exit_ == next((b for b, (q, t) in enumerate(zip(best, tau), 1) if q > t), 3)
            assert confidence == pytest.approx(best[exit_ - 1], abs=1e-4)
            cold += exit_ != next((b for b, (s, t) in enumerate(zip(scores, tau), 1) if float((s / 0.2).softmax(-1).max()) > t), 3)
        text += step.tokens
    assert cold > 0  # confidence after temperature would leave elsewhere


def test_a_confidence_of_tau_is_not_enough(drafter):
    state = session(EarlyExitSession, drafter, random_prompts(1))
    state.write(state.call.prompt[:, -1])
    state.answer(np.ones(1, dtype=bool))
    confidence = float(state.confidence[0])
    for tau, exit_ in ((confidence, 2), (np.nextafter(confidence, 0), 1)):
        state = session(EarlyExitSession, drafter, random_prompts(1), (tau, 0.0))
        state.write(state.call.prompt[:, -1])
        state.answer(np.ones(1, dtype=bool))
        assert state.exits[0] == exit_


def test_higher_thresholds_go_deeper(llama, drafter):
    for seed, prompt in enumerate(random_prompts(6, seed=11)):
        depths = []
        for tau in ((0.0, 0.0), (0.1, 0.0), (0.2, 0.1), (0.2, 0.3), (0.5, 0.3), (1.0, 1.0)):
            out = run(S2D(drafter, tau=tau, exits=EXITS, trace=True), llama, prompt, seed)
            depths.append(exits_of(out)[0][0])  # of one text: later ones depend on what was drafted before
        assert depths == sorted(depths)


def test_the_heuristic_schedule(llama):
    whole = layer_drafter(llama, range(2), copies=False)
    for tau, exits in ((1.0, (1, 2)), (0.0, (1, 2))):
        prompts = random_prompts(3, seed=5)
        decoder = S2D(whole, tau=tau, gamma="heuristic", exits=exits)
        out = decoder.generate(llama, **left_pad(prompts), max_new_tokens=60, eos_token_id=None, **GREEDY)
        for row in range(3):
            gamma, left = 5, 60
            for n, emitted in zip(out.stats.draft_lengths[row], out.stats.emitted[row], strict=True):
                assert n == min(gamma, left - 1)
                gamma, left = (gamma + 2 if emitted - 1 == n else max(1, gamma - 1)), left - emitted
        assert (tau == 0.0) == (1 in {n for row in out.stats.draft_lengths for n in row[:-1]})


def test_a_draft_ends_with_the_text(llama, drafter):
    ending = copy.deepcopy(drafter)
    with torch.no_grad():
        ending.lm_head.weight.zero_()
        ending.lm_head.weight[EOS] = 1.0
    only = run(S2D(ending, exits=EXITS), llama, torch.tensor([[5, 6, 7]]), logits_processor=[Prefer()], do_sample=False)
    assert only.stats.draft_lengths == [[1]]
    assert only.continuations[0].tolist() == [EOS]


class Prefer:
    "Leaves the end of sequence only."

    rowwise = True

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([EOS]), 0.0)


def test_auto_prices_what_was_drafted(llama, drafter):
    out = run(S2D(drafter, gamma="auto", exits=EXITS), llama, random_prompts(1, seed=6)[0], new=40)
    assert out.stats.auto["rounds"] == len(out.stats.emitted[0])
    assert out.stats.new_tokens == 40


# sampling


@pytest.mark.parametrize("greedy_draft", [False, True])
@pytest.mark.parametrize("rule", ["plain", pytest.param("temperature", marks=pytest.mark.slow), "penalty"])
def test_joint_distribution(toy, small_drafter, rule, greedy_draft):
    given_, processors = SAMPLING_RULES[rule]
    torch.manual_seed(1)
    decoder = S2D(small_drafter, **TOY, greedy_draft=greedy_draft)
    assert fit(sample_counts(decoder, toy, 20_000, **given_), exact_probs(toy, processors)) > 1e-3


def test_rows_of_the_toy_leave_at_all_exits(toy, small_drafter):
    out = S2D(small_drafter, **TOY, trace=True).generate(
        toy, torch.tensor([[2, 5, 3, 4]]).expand(40, -1), max_new_tokens=3, do_sample=True, top_k=0, eos_token_id=99
    )
    assert {e for exits in exits_of(out) for e in exits} == {1, 2, 3}


def test_the_official_rule_is_caught(toy, small_drafter, monkeypatch):
    "The argmax, tested as if it had been drawn from q."
    monkeypatch.setattr(s2d, "draw", lambda q, *_: q.argmax(-1))
    torch.manual_seed(1)
    decoder = S2D(small_drafter, **TOY)
    assert fit(sample_counts(decoder, toy, 20_000), exact_probs(toy, [])) < 1e-12


# thresholds


def test_the_grid_has_no_vector_twice():
    grid = threshold_grid(3)
    assert len(grid) == len(set(grid)) == 31
    assert (0.0, 0.0) in grid and not any(a == 0.0 and b for a, b in grid)
    assert threshold_grid(1) == [()]


def test_work_counts_what_was_done(llama, drafter):
    prompts = left_pad(random_prompts(3, seed=2))
    decoder = S2D(drafter, tau=(0.3, 0.15), exits=EXITS)
    parts = work(decoder, llama, prompts, max_new_tokens=20, eos_token_id=None, **GREEDY)
    found = total(parts)
    assert [part.tokens for part in parts] == [20, 20, 20]
    out = decoder.generate(llama, **prompts, max_new_tokens=20, eos_token_id=None, **GREEDY)
    assert (found.tokens, found.rounds, found.drafted) == (60, sum(map(len, out.stats.emitted)), out.stats.drafted)
    assert found.drafted == found.runs[0] > found.runs[1] > found.runs[2] > 0
    assert found.speed((0.1, 0.2, 0.4), 1.0) == pytest.approx(
        60 / (0.1 * found.runs[0] + 0.2 * found.runs[1] + 0.4 * found.runs[2] + found.rounds)
    )
    assert found.speed((0.0, 0.0, 0.0), 1.0, 2.0) == pytest.approx(30 / found.rounds)


def test_expensive_targets_want_deeper_drafts():
    shallow, deep = Work((0.0,), 100, 60, 180, (180, 0)), Work((1.0,), 100, 40, 120, (120, 120))
    best = {t: max((shallow, deep), key=lambda w: w.speed((1.0, 3.0), t)).tau for t in (1.0, 100.0)}
    assert best == {1.0: (0.0,), 100.0: (1.0,)}


def test_chosen_thresholds(llama, monkeypatch):
    "The target is its own last exit: deep drafts are all accepted. Costs decide."
    whole, prompts = layer_drafter(llama, range(2), copies=False), left_pad(random_prompts(2, seed=2))

    blocks = split(whole, (1, 2))

    def chosen(second, target):
        seconds = {id(blocks[0]): 1.0, id(blocks[1]): second, id(llama): target}
        curve = lambda model: SimpleNamespace(plain=lambda rows: seconds[id(model)], seconds=lambda n: target)  # noqa: E731
        monkeypatch.setattr(exit_thresholds, "verify_curve", curve)
        return choose_tau(S2D(whole, exits=(1, 2), gamma=3), llama, prompts, grid=(0.0, 1.0), max_new_tokens=16)

    assert chosen(1.0, 100.0) == (1.0,)
    assert chosen(1000.0, 1.0) == (0.0,)
    with pytest.raises(ValueError, match="a draft length that is a number, got gamma = 'heuristic'"):
        choose_tau(S2D(whole, exits=(1, 2), gamma="heuristic"), llama, prompts)


# fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": -0.1}, "it must be at least 0, got -0.1"),
        ({"tau": (0.5, float("nan"))}, "it must be at least 0"),
        ({"gamma": -1}, 'gamma must be at least 0, or "auto", got -1'),
    ],
)
def test_bad_fields(drafter, fields, message):
    with pytest.raises(ValueError, match=message):
        S2D(drafter, **fields)


def test_a_draft_length_that_is_no_number(drafter):
    with pytest.raises(TypeError, match="gamma must be a whole number or one of 'auto', 'heuristic', got 'best'"):
        S2D(drafter, gamma="best")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exits": EXITS, "tau": (0.5,)}, "tau has 1 thresholds for 3 exits: give one number, or 2"),
        ({}, r"the drafter does not say where it can be left: give exits, or train it"),
        ({"exits": (1, 3)}, "end with all 4 of the drafter"),
    ],
)
def test_bad_calls(llama, drafter, fields, message):
    with pytest.raises(ValueError, match=message):
        run(S2D(drafter, **fields), llama, torch.tensor([[5, 6]]))


def test_exits_of_the_configuration(llama, drafter, tmp_path):
    trained = copy.deepcopy(drafter)
    trained.config.exits = list(EXITS)
    trained.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert S2D(again).depths == EXITS
    assert S2D(again).thresholds == (0.5, 0.5)
    with pytest.raises(ValueError, match="a vocabulary of 97 tokens, the target one of 12"):
        run(S2D(again), small_model(vocab=12), torch.tensor([[5, 6]]))


def test_example(llama, gpt2):
    state = torch.get_rng_state()
    assert S2D.method.example(llama).depths == (1, 2)
    made = S2D.method.example(gpt2)
    assert made.drafter.config.vocab_size == VOCAB
    assert torch.equal(torch.get_rng_state(), state)
    prompt = random_prompts(1, seed=1)[0]
    assert added(run(made, gpt2, prompt, new=12)) == [plain(gpt2, prompt, 12)]


def test_nan_is_left_to_the_call():
    broken = nested_model()
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    assert split(broken, EXITS) is not split(broken, EXITS)  # nothing is remembered of it
    with pytest.raises(ValueError, match="NaN logits"):
        run(S2D(broken, exits=EXITS), broken, torch.tensor([[5, 6]]))
