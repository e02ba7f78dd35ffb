"""ActQKV: the attention of its memory against a reference in loops, limits at which it is full attention or InfLLM, budgets, refusals."""

import copy
import math
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import PAD, VOCAB, left_pad, random_prompts, small_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StoppingCriteriaList,
)

from decodelab.memory.act_qkv import ActQKV, BlockMemory, block_scores, flatness, layer_budget, represent, token_weights
from decodelab.memory.base import Everything, MemorySession, forward, frequencies, require_memory, rotate, turns

pytestmark = pytest.mark.usefixtures("no_gradients")

HEADS, KV_HEADS, SIZE = 4, 2, 8
OMEGA = 10_000.0 ** -(torch.arange(4) / 4)
SMALL = {"n_init": 2, "n_loc": 8, "b": 4, "k": 2, "r": 2, "w": 4}
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def stream(n, seed=0):
    "Queries, keys and values of one layer, without positions."
    torch.manual_seed(seed)
    return torch.randn(HEADS, n, SIZE), torch.randn(KV_HEADS, n, SIZE), torch.randn(KV_HEADS, n, SIZE)


def answer(of, q, k, v, sizes=None, omega=OMEGA, memory=None):
    "What a memory of one layer answers when it is fed in forwards of these sizes."
    memory = memory or BlockMemory(of, 1, omega)
    out = []
    for a, b, c in zip(*(x.split(sizes or [q.shape[1]], 1) for x in (q, k, v))):
        memory.begin(a.shape[1], decoding=False)
        out.append(memory.attend(0, a, b, c, SIZE**-0.5))
    return torch.cat(out, 1), memory


# the reference: one token, one head, one key at a time


def turned(x, t):
    "Rotated by complex multiplication."
    half = len(OMEGA)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * t * OMEGA.double())
    return torch.cat([pairs.real, pairs.imag], -1)


def reference(of, q, k, v, broken=""):
    "Attention of every token [heads, n, head_dim], and the blocks that each window fetched."
    n, out, fetched = q.shape[1], torch.zeros(HEADS, q.shape[1], SIZE, dtype=torch.double), []
    first, latest, blocks, m, received = [], [], [], [], torch.zeros(HEADS, n, dtype=torch.double)
    far = of.n_loc - (broken != "position")
    for start in range(0, n, of.w):
        window = list(range(start, min(start + of.w, n)))
        latest += window
        at_afar = torch.stack([turned(q[:, t], far) for t in window])  # [w, heads, head_dim]
        if of.probe == "mean":
            a = torch.full((len(window),), 1 / len(window), dtype=torch.double)
        else:
            z = at_afar.flatten(1)
            mean, spread = z.mean(0), ((z - z.mean(0)) ** 2).mean(0)
            phi = ((z - mean) ** 2 / (spread + spread.mean() / 100)).mean(1) if len(window) > 1 else torch.ones(1, dtype=torch.double)
            a = phi / phi.sum()
        p = sum(x * y for x, y in zip(a, at_afar.flatten(1)))
        dot = [float(p @ block) for block in m]
        scores = dot if of.similarity == "dot" else [s / float(p.norm() * block.norm()) for s, block in zip(dot, m)]
        chosen = sorted(sorted(range(len(m)), key=lambda i: (-scores[i], i))[: of.k])
        fetched.append(chosen)
        for j, t in enumerate(window):
            for h in range(HEADS):
                kv = h // (HEADS // KV_HEADS)
                near = [i for i in latest if 0 <= t - i < of.n_loc]
                outside = [i for c in chosen for i in blocks[c]] + first + [i for i in latest if t - i >= of.n_loc]
                keys = [turned(k[kv, i], i) for i in near]
                keys_far = [turned(k[kv, i], i) if broken == "turned" else k[kv, i].double() for i in outside]
                logits = [float(turned(q[h, t], t) @ key) for key in keys] + [float(at_afar[j, h] @ key) for key in keys_far]
                logits = torch.tensor(logits, dtype=torch.double) / math.sqrt(SIZE)
                share = logits.softmax(0)
                if broken == "softmax" and outside:
                    share = torch.cat([logits[: len(near)].softmax(0), logits[len(near) :].softmax(0)]) / 2
                out[h, t] = share @ v[kv, near + outside].double()
                received[h, near] += share[: len(near)]
        while len(latest) > of.n_loc and len(first) < of.n_init:
            first.append(latest.pop(0))
        while len(latest) - of.b >= of.n_loc:
            blocks.append(latest[: of.b])
            latest = latest[of.b :]
            best = [sorted(blocks[-1], key=lambda i: -float(received[h, i]))[: of.r] for h in range(HEADS)]
            m.append(torch.cat([k[h // (HEADS // KV_HEADS), best[h]].double().mean(0) for h in range(HEADS)]))
    return out, fetched


CASES = {
    "small": ActQKV(**SMALL),
    "infllm": ActQKV.infllm(**SMALL),
    "cosine of the mean": ActQKV(**SMALL, probe="mean"),
    "no first tokens": ActQKV(**{**SMALL, "n_init": 0}),
    "uneven": ActQKV(n_init=3, n_loc=7, b=5, k=1, r=1, w=3),
    "one by one": ActQKV(**{**SMALL, "w": 1}),
    "window as wide as the local one": ActQKV(**{**SMALL, "w": 8}),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("n", [5, 9, 61])
def test_the_memory_is_the_reference(name, n):
    q, k, v = stream(n, seed=n)
    expected, _ = reference(CASES[name], q, k, v)
    found, _ = answer(CASES[name], q, k, v)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("broken", ["position", "turned", "softmax"])
def test_the_reference_tells_broken_memories_apart(broken):
    q, k, v = stream(61)
    found, _ = answer(CASES["small"], q, k, v)
    wrong, _ = reference(CASES["small"], q, k, v, broken)
    assert float((found - wrong).abs().max()) > 0.05
    torch.testing.assert_close(found[:, :8].double(), wrong[:, :8], atol=1e-5, rtol=1e-4)  # while all is near, they agree


def test_infllm_fetches_by_mean_query_and_dot_product():
    q, k, v = stream(80, seed=3)
    fetched = {name: reference(CASES[name], q, k, v)[1] for name in ("small", "infllm")}
    assert fetched["small"] != fetched["infllm"]
    for name, expected in fetched.items():
        memory, found = BlockMemory(CASES[name], 1, OMEGA), []
        for at in range(0, 80, 4):
            answer(CASES[name], q[:, at : at + 4], k[:, at : at + 4], v[:, at : at + 4], memory=memory)
            found.append(list(memory.fetched[0]))
        assert found == expected


@pytest.mark.parametrize("sizes", [[61], [4] * 15 + [1], [8, 12, 40, 1], [60, 1]])
def test_chunks_change_nothing(sizes):
    q, k, v = stream(61)
    whole, _ = answer(CASES["small"], q, k, v)
    parts, _ = answer(CASES["small"], q, k, v, sizes)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


# limits


def test_every_earlier_token_is_seen_once_when_all_blocks_are_fetched():
    q, k, _ = stream(61)
    v = torch.eye(61).expand(KV_HEADS, -1, -1)
    for of in (CASES["small"], CASES["uneven"]):
        found, memory = answer(ActQKV(**{**vars(of), "k": 20, "k_min": None}), 0 * q, k, v)
        seen = found * torch.arange(1, 62)[:, None]  # equal logits: each token that is seen gets the same share
        torch.testing.assert_close(seen, torch.ones(61, 61).tril().expand(HEADS, -1, -1), atol=1e-5, rtol=0)
        assert len(memory.layers[0].index) > 9
        fewer, _ = answer(of, 0 * q, k, v)
        assert int((fewer[0, -1] > 0).sum()) == min(61, of.n_init + of.n_loc + of.k * of.b + (61 - of.n_init - of.n_loc) % of.b)


def test_without_positions_all_blocks_are_full_attention_at_any_length():
    q, k, v = stream(200, seed=5)
    none = torch.zeros(4)
    full = Everything(none)
    full.begin(200, False)
    expected = full.attend(0, q, k, v, SIZE**-0.5)
    found, _ = answer(ActQKV(**{**SMALL, "k": 60}), q, k, v, omega=none)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    few, _ = answer(ActQKV(**SMALL), q, k, v, omega=none)
    assert float((few - expected).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_texts_within_the_local_window_are_full_attention(kind, request):
    model = request.getfixturevalue(kind)
    ids = random_prompts(1, lengths=(60, 60))[0]
    memory = BlockMemory(ActQKV(n_init=4, n_loc=60, b=4, k=2, r=2, w=16), 2, frequencies(model))
    logits = torch.cat([forward(model, [memory], part, logits_to_keep=0).logits for part in ids.split(23, 1)], 1)
    torch.testing.assert_close(logits, model(ids).logits, atol=3e-5, rtol=1e-4)
    out = ActQKV(n_loc=72, w=8).generate(model, ids, **GREEDY)
    assert out.sequences.equal(model.generate(ids, **GREEDY))
    assert out.stats.memory == {}


def test_beyond_it_the_text_is_another(llama):
    ids = random_prompts(1, lengths=(60, 60))[0]
    assert not ActQKV(**SMALL).generate(llama, ids, **GREEDY).sequences.equal(llama.generate(ids, **GREEDY))


# probe


@settings(max_examples=40)
@given(st.integers(2, 40), st.floats(0.2, 5), st.floats(-3, 3), st.integers(0, 10**6))
def test_weights(w, scale, shift, seed):
    q = torch.randn(2, w, 3, generator=torch.Generator().manual_seed(seed))
    a = token_weights(q)
    assert float(a.min()) >= 0
    assert float(a.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(token_weights(scale * q + shift), a, atol=2e-4, rtol=2e-3)
    p, again = (torch.einsum("w,hwd->hd", token_weights(x), x) for x in (q, q.repeat_interleave(2, 1)))
    torch.testing.assert_close(again, p, atol=1e-4, rtol=1e-3)


def test_a_window_without_bias_is_the_plain_mean():
    same = torch.randn(2, 1, 3)
    assert token_weights(same).tolist() == [1.0]
    torch.testing.assert_close(token_weights(same.expand(-1, 5, -1)), torch.full((5,), 0.2), atol=1e-6, rtol=0)
    assert token_weights(torch.zeros(2, 4, 3)).tolist() == [0.25] * 4
    q, m = torch.randn(HEADS, 1, SIZE), torch.randn(7, HEADS * SIZE)
    for similarity in ("cosine", "dot"):
        torch.testing.assert_close(block_scores(q, m, "activation", similarity), block_scores(q, m, "mean", similarity))


def test_scores_by_brute_force():
    q, m = torch.randn(HEADS, 9, SIZE), torch.randn(7, HEADS * SIZE)
    a = token_weights(q)
    for probe, weights in (("activation", a), ("mean", torch.full((9,), 1 / 9))):
        p = torch.stack([sum(weights[j] * q[h, j] for j in range(9)) for h in range(HEADS)])
        heads = [sum(float(p[h] @ block[h * SIZE : (h + 1) * SIZE]) for h in range(HEADS)) for block in m]
        torch.testing.assert_close(block_scores(q, m, probe, "dot"), torch.tensor(heads), atol=1e-5, rtol=1e-4)
        cosine = [x / float(p.norm() * block.norm()) for x, block in zip(heads, m)]
        torch.testing.assert_close(block_scores(q, m, probe, "cosine"), torch.tensor(cosine), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("share", "features"), [(1 / 4, 1.0), (1 / 16, 1.0), (1 / 16, 0.5), (1 / 64, 0.25)])
def test_share_of_the_anchors(share, features):
    "Two clusters that differ in a share g of the features: the anchors weigh g (1 - e) + (1 - g) e."
    torch.manual_seed(0)
    w, size = 256, 4000
    anchors = torch.arange(w) < share * w
    q = math.sqrt(share * (1 - share)) * torch.randn(1, w, size)  # as varied as the features that tell the clusters apart
    g = int(features * size)
    q[0, :, :g] = torch.where(anchors, 1.0, 0.0)[:, None]
    weight = float(token_weights(q)[anchors].sum())
    assert weight == pytest.approx(features * (1 - share) + (1 - features) * share, abs=0.015)


def rank(anchors, probe, seed):
    "How many of 64 blocks are before the one that the anchors ask for."
    torch.manual_seed(seed)
    m = torch.nn.functional.normalize(torch.randn(64, 64), dim=-1)
    q = torch.randn(64) + 0.3 * torch.randn(256, 64)
    q[:anchors] = 12 * m[0] + 0.3 * torch.randn(anchors, 64)
    scores = block_scores(q[None], m, probe)
    return int((scores > scores[0]).sum())


def test_planted_anchors():
    ranks = {(anchors, probe): [rank(anchors, probe, s) for s in range(40)] for anchors in (4, 64) for probe in ("activation", "mean")}
    means = {key: sum(found) / 40 for key, found in ranks.items()}
    assert means[4, "activation"] < 1
    assert means[4, "mean"] > 10
    assert means[4, "mean"] - means[4, "activation"] > means[64, "mean"] - means[64, "activation"]  # the rarer, the more it helps


# blocks


def test_a_block_is_what_got_most_attention_in_each_query_head():
    keys, received = torch.randn(KV_HEADS, 8, SIZE), torch.rand(HEADS, 8)
    found = represent(keys, received, b=4, r=2)
    assert found.shape == (2, HEADS * SIZE)
    for block in range(2):
        for h in range(HEADS):
            part = range(4 * block, 4 * block + 4)
            best = sorted(part, key=lambda i: -float(received[h, i]))[:2]
            expected = (keys[h // 2, best[0]] + keys[h // 2, best[1]]) / 2
            torch.testing.assert_close(found[block, h * SIZE : (h + 1) * SIZE], expected)


@pytest.mark.parametrize("name", list(CASES))
def test_what_lies_on_the_device_is_bounded(name):
    of = CASES[name]
    q, k, v = stream(400)
    memory = BlockMemory(of, 1, OMEGA)
    sizes = []
    for n in (100, 400):
        answer(of, q[:, :n], k[:, :n], v[:, :n], memory=memory)
        sizes.append(memory.seen["positions a layer"])
        layer = memory.layers[0]
        assert all(line.buffer.shape[1] <= 4 * (of.n_loc + of.w + of.b) for line in (layer.k, layer.v, layer.turned, layer.received))
    assert sizes[0] == sizes[1] <= of.n_init + of.n_loc + of.w + 2 * of.k * of.b + of.b
    assert memory.seen["blocks"] >= (500 - of.n_init - of.n_loc) // of.b - of.w // of.b - 1


def test_blocks_lie_on_the_cpu_and_hold_each_old_token_once():
    of = CASES["small"]
    q, k, v = stream(61)
    _, memory = answer(of, q, k, v)
    layer = memory.layers[0]
    held = torch.cat([layer.first[0].all, layer.blocks[0].all, layer.k.all], 1)
    assert held.equal(k)
    assert len(layer.k) >= of.n_loc  # no block reaches into the local window
    assert len(layer.blocks[0]) == of.b * len(layer.index)
    assert layer.blocks[0].all.device.type == "cpu"


# budget


@settings(max_examples=80)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=12), st.integers(1, 50))
def test_shares_follow_the_entropies(h, k):
    left, found = k * len(h), []
    for layer in range(len(h)):
        found.append(layer_budget(left, h[layer:]))
        left -= found[-1]
    assert sum(found) == k * len(h)
    exact = [k * len(h) * x / sum(h) for x in h]
    # rounding of a layer is made good by those behind it
    assert all(abs(a - b) <= 0.5 + 0.5 * len(h) for a, b in zip(found, exact))
    assert [layer_budget(k * (len(h) - i), [0.5] * (len(h) - i)) for i in range(len(h))] == [k] * len(h)


def test_a_flatter_layer_gets_more_and_the_others_less():
    def shares(h):
        left, found = 400, []
        for layer in range(4):
            found.append(layer_budget(left, h[layer:]))
            left -= found[-1]
        return found

    plain = shares([0.5] * 4)
    for layer in range(4):
        h = [0.5] * 4
        h[layer] = 0.9
        assert all((a > b) if i == layer else (a < b) for i, (a, b) in enumerate(zip(shares(h), plain)))


@settings(max_examples=80)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 50), st.data())
def test_limits_of_the_shares(h, k, data):
    least = data.draw(st.integers(0, k))
    left, found = k * len(h), []
    for layer in range(len(h)):
        found.append(layer_budget(left, h[layer:], least, 2 * k))
        left -= found[-1]
    assert sum(found) <= k * len(h)  # a floor raises no total
    assert all(least <= x <= 2 * k for x in found)


def test_flatness():
    assert flatness(torch.zeros(9)) == pytest.approx(1)
    assert flatness(torch.tensor([100.0, 0, 0])) == pytest.approx(0, abs=1e-6)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert flatness(p.log()) == pytest.approx(1.5 * math.log(2) / math.log(3), abs=1e-6)
    assert flatness(p.log() * 3, tau=3) == pytest.approx(flatness(p.log()), abs=1e-6)
    assert flatness(torch.tensor([2.0])) == 1.0
    assert 0 <= flatness(torch.tensor([float("nan"), 1.0])) <= 1  # whatever a model says, there is a number of blocks


@pytest.mark.parametrize("n", [20, 200, 2000])
def test_cosines_are_always_flat_at_tau_one(n):
    "The flattest possible case of the bound: a fifth of the blocks at 1, the others at -1."
    worst = min(flatness(torch.where(torch.arange(n) < m, 1.0, -1.0)) for m in range(1, n))
    assert worst == pytest.approx(1 - 0.4745 / math.log(n), abs=3e-3)


class Noted(BlockMemory):
    "Keeps how many blocks each layer fetched when decoding."

    def begin(self, n, decoding):
        super().begin(n, decoding)
        if decoding:
            self.many = [*getattr(self, "many", []), []]

    def choose(self, layer, q):
        chosen = super().choose(layer, q)
        if self.decoding:
            self.many[-1].append(len(chosen))
        return chosen


def noted(model, of, ids, new):
    memory = Noted(of, 2, frequencies(model))
    with MemorySession(model, [memory], chunk=of.w) as session:
        logits = session.prefill(ids)
        for _ in range(new):
            logits = session.feed(logits[:, -1].argmax(-1, keepdim=True))
    return memory.many


def test_cut_off_moves_blocks_between_layers_once_there_is_a_history(llama):
    ids = random_prompts(1, lengths=(90, 90), seed=4)[0]
    sizes = {**SMALL, "k": 4, "k_min": 1, "tau": 0.05}
    assert noted(llama, ActQKV(**sizes, history=100), ids, 6) == [[4, 4]] * 7  # too few windows so far
    moved = noted(llama, ActQKV(**sizes, history=10), ids, 12)
    assert any(a != b for a, b in moved)
    assert all(a + b <= 8 and min(a, b) >= 1 for a, b in moved)
    assert noted(llama, ActQKV(**{**sizes, "cut_off": False}, history=10), ids, 6) == [[4, 4]] * 7


def test_a_single_block_is_fetched_and_not_counted():
    of = ActQKV(**{**SMALL, "n_init": 0})
    q, k, v = stream(20)
    memory = BlockMemory(of, 1, OMEGA)
    for n, blocks, noted in ((12, [], 0), (4, [0], 0), (4, [0, 1], 1)):
        part = slice(memory.end, memory.end + n)
        answer(of, q[:, part], k[:, part], v[:, part], memory=memory)
        assert memory.fetched[0] == blocks
        assert len(memory.layers[0].flat) == noted


# in use


@pytest.fixture
def long(llama):
    return left_pad(random_prompts(3, lengths=(20, 50), seed=8))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("sample", [False, True])
def test_rows_of_a_batch_have_blocks_of_their_own(kind, sample, request, long):
    model, decoder = request.getfixturevalue(kind), ActQKV(**SMALL)
    rule = {"do_sample": True, "top_k": 1} if sample else {"do_sample": False}
    free = decoder.generate(model, **long, **rule, max_new_tokens=12)
    end = int(free.continuations[1][4])
    together = [c.tolist() for c in decoder.generate(model, **long, **rule, max_new_tokens=12, eos_token_id=end).continuations]
    alone = [
        decoder.generate(model, ids[mask.bool()][None], **rule, max_new_tokens=12, eos_token_id=end).continuations[0].tolist()
        for ids, mask in zip(long["input_ids"], long["attention_mask"])
    ]
    assert together == alone
    assert len(set(map(len, together))) > 1


def test_samples_follow_the_seed_and_the_warpers(llama, long):
    def draw(seed, **more):
        torch.manual_seed(seed)
        return ActQKV(**SMALL).generate(llama, **long, max_new_tokens=8, do_sample=True, **more).sequences

    assert draw(1, top_k=0).equal(draw(1, top_k=0))
    assert not draw(1, top_k=0).equal(draw(2, top_k=0))
    assert draw(1, temperature=1e-4).equal(draw(2, temperature=1e-4))


def test_beyond_the_models_context(llama):
    ids = random_prompts(1, lengths=(300, 300), seed=1)[0]  # the model has 256 positions
    out = ActQKV(**SMALL).generate(llama, ids, **GREEDY)
    assert out.stats.new_tokens == 12
    assert out.stats.memory["positions a layer"] <= 2 + 8 + 4 + 4 * 4 + 4
    with pytest.raises(ValueError, match="n_loc = 512 exceeds the model's context of 256: set n_loc <= 256"):
        ActQKV().generate(llama, torch.cat([ids, ids], 1), **GREEDY)


def test_the_trace_tells_where_the_attention_went(llama):
    ids = random_prompts(1, lengths=(60, 60))[0]
    out = ActQKV(**SMALL, trace=True).generate(llama, ids, **GREEDY)
    assert set(out.trace.roles()) <= {"from blocks", "from near"}
    assert all("of the attention on blocks [" in step.notes[0] for step in out.trace)


def test_nothing_is_left_behind(llama):
    ids = random_prompts(1, lengths=(60, 60))[0]
    before = llama.generate(ids, **GREEDY)
    config, names = copy.deepcopy(llama.config.to_dict()), {n: sorted(vars(m)) for n, m in llama.named_modules()}
    decoder = ActQKV(**SMALL)
    decoder.generate(llama, ids, **GREEDY)
    with pytest.raises(RuntimeError, match="broke"):
        decoder.generate(llama, ids, **GREEDY, stopping_criteria=[lambda *_: (_ for _ in ()).throw(RuntimeError("broke"))])
    assert llama.config.to_dict() == config
    assert {n: sorted(vars(m)) for n, m in llama.named_modules()} == names
    assert llama.generate(ids, **GREEDY).equal(before)


def test_another_thread_keeps_its_own_attention(llama):
    ids = random_prompts(1, lengths=(60, 60))[0]
    plain, ours = llama.generate(ids, **GREEDY), ActQKV(**SMALL).generate(llama, ids, **GREEDY).sequences
    assert not plain.equal(ours)
    found = {}

    def work(name, call):
        found[name] = [call() for _ in range(4)]

    threads = [
        threading.Thread(target=work, args=("plain", lambda: llama.generate(ids, **GREEDY))),
        threading.Thread(target=work, args=("ours", lambda: ActQKV(**SMALL).generate(llama, ids, **GREEDY).sequences)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(x.equal(plain) for x in found["plain"])
    assert all(x.equal(ours) for x in found["ours"])


def test_hooks_of_the_user_are_called(llama):
    ids, seen = random_prompts(1, lengths=(60, 60))[0], []
    hook = llama.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    try:
        out = ActQKV(**SMALL).generate(llama, ids, **GREEDY)
    finally:
        hook.remove()
    assert len(seen) == out.stats.target_forwards


# refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0: the budget is below one block of b = 32 tokens"),
        ({"n_loc": 0}, "n_loc, b, history and chunk must be at least 1, and n_init at least 0"),
        ({"n_init": -1}, "and n_init at least 0"),
        ({"b": 0}, "must be at least 1"),
        ({"history": 0}, "must be at least 1"),
        ({"chunk": 0}, "must be at least 1"),
        ({"r": 33}, "r must be between 1 and b = 32, got 33"),
        ({"r": 0}, "r must be between 1 and b = 32, got 0"),
        ({"w": 513}, "w must be between 1 and n_loc = 512, got 513"),
        ({"k_min": 47}, "k_min must be between 0 and k = 46, got 47"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": math.nan}, "tau must be positive"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        ActQKV(**fields)
    with pytest.raises(ValueError, match="probe must be"):
        ActQKV(probe="median")


def tiny(config, cls, **more):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return cls(
        config(vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=PAD, eos_token_id=1, bos_token_id=None, **shape, **more)
    ).eval()


def test_models_that_are_not_rotary_as_in_llama_are_refused_in_one_sentence():
    ids = random_prompts(1, lengths=(40, 40))[0]
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    refused = {
        "GPT2LMHeadModel has no rotary positions": small_model("gpt2"),
        "MistralForCausalLM has layers that see only a window": tiny(MistralConfig, MistralForCausalLM, sliding_window=24),
        "LlamaForCausalLM has a rotary embedding that changes with the length": tiny(LlamaConfig, LlamaForCausalLM, **dynamic),
        "LlamaForCausalLM runs its attention as 'eager'": tiny(LlamaConfig, LlamaForCausalLM, attn_implementation="eager"),
        "SmolLM3ForCausalLM gives other logits when its positions": tiny(SmolLM3Config, SmolLM3ForCausalLM, no_rope_layers=[1, 0]),
    }
    for message, model in refused.items():
        with pytest.raises(ValueError, match=message) as error:
            ActQKV(**SMALL).generate(model, ids, **GREEDY)
        assert str(error.value).endswith("keep prompt and new tokens within n_loc = 8, or use a decoder such as Autoregressive")
        assert "\n" not in str(error.value)
        short = ActQKV().generate(model, ids, **GREEDY)  # within n_loc every model is itself
        assert short.sequences.equal(model.generate(ids, **GREEDY))


def test_scaled_rotary_embeddings_are_taken_as_they_are():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny(LlamaConfig, LlamaForCausalLM, rope_parameters=rope, initializer_range=0.3)
    ids = random_prompts(1, lengths=(60, 60))[0]
    assert require_memory(model).shape == (4,)
    memory = BlockMemory(ActQKV(n_loc=60, w=16), 2, frequencies(model))
    torch.testing.assert_close(forward(model, [memory], ids).logits, model(ids).logits[:, -1:], atol=3e-5, rtol=1e-4)


def test_calls_that_cannot_be(llama):
    ids = random_prompts(1, lengths=(40, 40))[0]
    cache = DynamicCache()
    llama(ids[:, :20], past_key_values=cache, use_cache=True)
    for more, message in (
        ({"past_key_values": cache}, "must see the whole prompt to make blocks of it: call without past_key_values"),
        ({"use_cache": False}, "keeps blocks of the KV cache: leave out use_cache=False"),
        ({"cache_implementation": "static"}, "in blocks of its own: leave out cache_implementation"),
        ({"position_ids": torch.arange(40)[None] * 2}, "gives tokens positions of its own: call without position_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            ActQKV(**SMALL)(llama, ids, generation_config=None, **more, max_new_tokens=4, do_sample=False)
    config = GenerationConfig(max_new_tokens=4, max_length=44)
    with pytest.raises(ValueError, match="pixel_values cannot be put into blocks: use a token-by-token decoder"):
        ActQKV(**SMALL)(llama, ids, LogitsProcessorList(), StoppingCriteriaList(), config, pixel_values=torch.zeros(1, 3))
    with pytest.raises(
        ValueError, match="blocks have no fixed shapes to compile: leave out compile=True, or keep prompt and new tokens within"
    ):
        ActQKV(**SMALL, compile=True).generate(llama, ids, **GREEDY)


# rotation


def test_a_product_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, SIZE), torch.randn(1, 1, SIZE)
    at = [
        float((rotate(q, turns(torch.tensor([t + 3]), OMEGA)) * rotate(k, turns(torch.tensor([t]), OMEGA))).sum()) for t in (0, 50, 10**6)
    ]
    assert all(abs(a - b) < 1e-4 for a, b in pairwise(at))
    torch.testing.assert_close(rotate(q, turns(torch.tensor([7]), OMEGA)).double(), turned(q, 7), atol=1e-5, rtol=1e-5)
