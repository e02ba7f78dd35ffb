"""LongSpec: the exact merge, what the drafter sees, a memory that does not grow, and that no drafter changes the text."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, TOY_PROMPT, VOCAB, added, exact_probs, fit, left_pad, plain, random_prompts, sample_counts, small_model
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from decodelab.core.tree import Tree
from decodelab.experiments.speculative.longspec import ReleasedChain, emitted
from decodelab.speculative.acceptance import RecursiveRejection
from decodelab.speculative.longspec import NEVER, LongSpec, load_drafter
from decodelab.speculative.longspec_drafter import (
    LongSpecConfig,
    LongSpecDrafter,
    attend,
    check_longspec,
    lagged,
    last_layer,
    merge,
    new_drafter,
    target_states,
    teacher_forced,
    turned,
)

GREEDY = {"do_sample": False}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return small_model("llama", seed=3)


def sharp(model, window=6, seed=0, scale=4.0):
    "A random drafter whose answers depend strongly on what it sees."
    drafter = new_drafter(model, window, seed=seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale if "cross" in name else scale / 2)
    return drafter


# the merge


def parts_and_whole(seed, cuts, size, dtype, groups=2):
    "Attention in parts that end at `cuts`, and one softmax over all keys in float64."
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5  # noqa: E731
    n = 24
    q, keys, values = new(2, 2 * groups, 3, 8), new(2, 2, n, 8), new(2, 2, n, 8)
    seen = torch.rand(2, 3, n, generator=generator) < 0.7
    seen[..., -1] = True
    k, v = (part.repeat_interleave(groups, 1) for part in (keys, values))
    scores = q @ k.mT / 8**0.5
    scale = size / scores.abs().max()
    whole = (scores * scale).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v
    bounds = [0, *sorted(cuts), n]
    q, keys, values = ((part * s).to(dtype) for part, s in ((q, scale), (keys, 1), (values, 1)))
    return [attend(q, keys[:, :, a:b], values[:, :, a:b], seen[..., a:b]) for a, b in zip(bounds, bounds[1:])], whole


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 24), max_size=4),  # equal cuts, and cuts at the ends, make empty parts
    size=st.sampled_from([1.0, 20.0, 80.0]),
    groups=st.sampled_from([1, 3]),
)
def test_merged_parts_are_one_softmax(seed, cuts, size, groups):
    parts, whole = parts_and_whole(seed, cuts, size, torch.float64, groups)
    assert float((merge(*parts)[0] - whole).abs().max()) < 1e-12
    assert float((merge(*parts[::-1])[0] - whole).abs().max()) < 1e-12
    if len(parts) > 2:  # the order of the merges does not matter
        assert float((merge(parts[0], merge(*parts[1:]))[0] - whole).abs().max()) < 1e-12
    mean = torch.stack([out for out, _ in parts]).mean(0)  # negative control
    assert len(parts) == 1 or float((mean - whole).abs().max()) > 1e-3


def test_merge_in_float32():
    for size, bound in ((1.0, 1e-6), (80.0, 1e-4)):
        parts, whole = parts_and_whole(1, [7, 15], size, torch.float32)
        assert float((merge(*parts)[0] - whole).abs().max()) < bound
        assert parts[0][0].dtype == torch.float32
    parts, _ = parts_and_whole(1, [7], 1.0, torch.bfloat16)
    assert all(part.dtype == torch.float32 for pair in parts for part in pair)


def test_what_sees_nothing_is_zero():
    q, keys = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
    nothing = attend(q, keys, keys, torch.zeros(1, 3, 5, dtype=torch.bool))
    for out, lse in (nothing, attend(q, keys[:, :, :0], keys[:, :, :0]), merge(nothing, nothing)):
        assert not out.any()
        assert (lse == -torch.inf).all()
    assert torch.equal(merge(attend(q, keys, keys), nothing)[0], attend(q, keys, keys)[0])


# what the drafter sees


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_the_lag_hides_the_newest_keys(model, lag):
    "With lag j the state at t does not change with the target's states from t - j + 1 on; with lag j - 1 it would."
    ids = torch.randint(2, VOCAB, (1, 10))
    drafter = sharp(model)
    keys, values, _ = target_states(model, ids)
    before = teacher_forced(drafter, model, ids, keys, values, lag=lag)
    for t in range(lag, 10):
        k, v = keys.clone(), values.clone()
        k[:, :, t - lag + 1 :] += 3.0
        v[:, :, t - lag + 1 :] -= 2.0
        assert torch.equal(before[:, t], teacher_forced(drafter, model, ids, k, v, lag=lag)[:, t])
        if lag > 1:  # negative control
            wrong = [teacher_forced(drafter, model, ids, *states, lag=lag - 1)[:, t] for states in ((keys, values), (k, v))]
            assert (wrong[0] - wrong[1]).abs().max() > 1e-3
    assert not lagged(torch.randn(1, 4, 10, 8), keys, values, 10).any()


def test_the_lag_is_a_mask(model):
    ids = torch.randint(2, VOCAB, (2, 9))
    keys, values, _ = target_states(model, ids)
    q, t = torch.randn(2, 4, 9, 8), torch.arange(9)
    for lag in (1, 3, 8):
        torch.testing.assert_close(lagged(q, keys, values, lag), attend(q, keys, values, (t <= t[:, None] - lag)[None])[0])


def test_shifted_positions_are_one_text(model):
    "A jump of positions must not cut the text: the last logits depend on the anchors."
    ids = torch.randint(2, VOCAB, (1, 12))
    positions = torch.arange(12)
    positions[4:] += 100
    keys, _, logits = target_states(model, ids, positions)
    other = ids.clone()
    other[0, 1] = (ids[0, 1] - 1) % (VOCAB - 2) + 2
    assert (logits[0, -1] - target_states(model, other, positions)[2][0, -1]).abs().max() > 1e-4
    ordinary = target_states(model, ids)[0]
    torch.testing.assert_close(keys[:, :, :4], ordinary[:, :, :4])
    assert (keys[:, :, 4:] - ordinary[:, :, 4:]).abs().max() > 1e-2


class Watched(LongSpec):
    "Keeps the logits of every level, and the session."

    def draft(self, call, roots):
        state = self.session = call.state
        grow, self.logits = state.grow, []
        state.grow = lambda *level: self.logits.append(grow(*level)) or self.logits[-1]
        draft = super().draft(call, roots)
        state.grow = grow
        self.seen.append(
            (call.sequences.clone(), list(call.rows), list(call.counts), draft, torch.cat(self.logits, 1) if self.logits else None)
        )
        return draft

    def observe(self, call, draft, logits, paths):
        super().observe(call, draft, logits, paths)
        ring = self.session.ring
        self.rings.append((ring.keys.clone(), ring.values.clone(), ring.at.clone(), self.session.nbytes))


def watched(drafter, widths=(2, 3, 3)):
    decoder = Watched(drafter, widths=widths)
    decoder.seen, decoder.rings = [], []
    return decoder


def node_logits(drafter, model, text, path):
    "The drafter's logits behind a path, the text read anew without a cache."
    ids = torch.tensor([text + path])
    keys, values, _ = target_states(model, torch.tensor([text[:-1]]))
    filled = [torch.nn.functional.pad(part, (0, 0, 0, len(path) + 1)) for part in (keys, values)]
    hidden = teacher_forced(drafter, model, ids, *filled, lag=len(path) + 1)
    return model.lm_head(hidden)[0, -1]


@pytest.mark.parametrize("window", [2, 6, 64])
def test_every_node_has_the_logits_of_its_path(model, window):
    "Ring, tree and target's keys against one text a path: a padded batch, windows shorter than the tree, than the text, and longer."
    drafter, prompts = sharp(model, window), random_prompts(3, (3, 12), seed=5)
    decoder, batch = watched(drafter), left_pad(prompts)
    decoder.generate(model, **batch, max_new_tokens=9, **GREEDY)
    start = batch["input_ids"].shape[1]
    for sequences, rows, counts, draft, logits in decoder.seen[1:3]:
        for i, row in enumerate(rows):
            text = sequences[row, start - prompts[row].shape[1] : start + counts[row]].tolist()
            tree = draft.tree if draft.tree.shared else Tree(draft.tree.parents[i])
            for node in (0, 1, logits.shape[1] - 1):
                path = [draft.tokens[i, n].item() for n in tree.mask[node].nonzero()[1:, 0]]
                torch.testing.assert_close(logits[i, node], node_logits(drafter, model, text, path), rtol=1e-3, atol=1e-3)


def test_the_drafters_states_are_free_of_context(model):
    "The ring holds what token and position give, bit for bit, whatever stood before."
    drafter, prompt = sharp(model, 5), random_prompts(1, (11, 11), seed=7)[0]
    decoder = watched(drafter)
    out = decoder.generate(model, prompt, max_new_tokens=12, **GREEDY)
    keys, values, at, _ = decoder.rings[-1]
    known = [(slot, p) for slot, p in enumerate(at[0].tolist()) if p != NEVER]
    assert len(known) == 5
    for slot, p in known:
        assert slot == p % 5
        z = model.model.embed_tokens(out.sequences[:, p : p + 1])
        again = drafter.keys_values(z, turned(model, torch.tensor([[p]]), z))
        torch.testing.assert_close(again[0][0, :, 0], keys[0, :, slot], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again[1][0, :, 0], values[0, :, slot], rtol=1e-6, atol=1e-6)


def test_beyond_the_window_only_the_targets_states_count(model):
    ids = torch.randint(2, VOCAB, (1, 14))
    other = ids.clone()
    other[0, :8] = torch.randint(2, VOCAB, (8,))
    drafter = sharp(model, 5)
    keys, values, _ = target_states(model, ids)
    same, wide = ([teacher_forced(d, model, text, keys, values)[0, -1] for text in (ids, other)] for d in (drafter, sharp(model, 14)))
    assert torch.equal(*same)
    assert not torch.equal(*wide)  # negative control: a window that reaches the change
    states = target_states(model, other)[:2]
    assert not torch.equal(same[0], teacher_forced(drafter, model, ids, *states)[0, -1])


def test_memory_does_not_grow(model):
    drafter, widths, most = new_drafter(model, 8), (2, 3, 3), []
    for length in (3, 30, 150):
        decoder = watched(drafter, widths)
        decoder.generate(model, random_prompts(1, (length, length), seed=1)[0], max_new_tokens=40, **GREEDY)
        most.append(max(nbytes for *_, nbytes in decoder.rings))
    assert len(set(most)) == 1
    assert most[0] <= 2 * 4 * (8 + 1 + sum(widths)) * 2 * 8  # keys and values, 4 bytes, two heads of 8


# exactness


@pytest.mark.parametrize("widths", [(4, 16, 16, 16, 16), (1, 1, 1, 1), (3,), ()])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_greedy_text_is_the_targets_own(kind, widths, request):
    target = request.getfixturevalue(kind)
    for seed, window in ((0, 4), (1, 64)):
        decoder, prompts = LongSpec(sharp(target, window, seed), widths=widths), random_prompts(4, (1, 30), seed=seed)
        alone = [decoder.generate(target, p, max_new_tokens=20, **GREEDY) for p in prompts]
        together = decoder.generate(target, **left_pad(prompts), max_new_tokens=20, **GREEDY)
        expected = [plain(target, p, 20) for p in prompts]
        assert [added(out)[0] for out in alone] == added(together) == expected
        assert all(n <= len(widths) for out in alone for n in out.stats.accepted_lengths[0])


def test_a_good_drafter_is_accepted(model):
    "Weights with which the layer leaves embeddings as they are: it repeats the last token, and so does a target that is made to."
    target = copy.deepcopy(model)
    target.lm_head.weight.copy_(target.model.embed_tokens.weight)
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    drafter = new_drafter(target)
    for part in (drafter.o, drafter.cross_o, drafter.down):
        part.weight.zero_()
    out = LongSpec(drafter, widths=(1, 1, 1)).generate(target, torch.tensor([[5, 9]]), max_new_tokens=13, eos_token_id=None, **GREEDY)
    assert added(out) == [plain(target, torch.tensor([[5, 9]]), 13, eos_token_id=None)]
    assert out.stats.accepted_lengths == [[3, 3, 3, 0]]


class SoftTest(LongSpec):
    "Wrong: the best tokens are tested as if they had been drawn from q, p - q is the residual (the released tree)."

    rule = property(lambda self: RecursiveRejection())

    def draft(self, call, roots):
        state, found = call.state, []
        grow = state.grow
        state.grow = lambda *level: found.append(grow(*level)) or found[-1]
        draft = super().draft(call, roots)
        state.grow = grow
        rows = torch.cat(found, 1).softmax(-1) if found else torch.zeros(len(roots), 0, call.model.config.vocab_size)
        lack = draft.tokens.shape[1] - rows.shape[1]
        draft.probs = torch.cat([rows, rows.new_zeros(len(rows), lack, rows.shape[2])], 1)
        return draft


@pytest.mark.parametrize("widths", [(2, 3), (1, 1)])
def test_sampled_text_has_the_targets_distribution(toy, widths):
    drafter, probs = sharp(toy, 3), exact_probs(toy, [])
    assert fit(sample_counts(LongSpec(drafter, widths=widths), toy, 16_000), probs) > 0.001


@pytest.mark.parametrize(("wrong", "widths"), [(SoftTest, (2, 3)), (SoftTest, (1, 1)), (ReleasedChain, (1, 1))])
def test_the_released_rules_are_not_exact(toy, wrong, widths):
    drafter, probs = sharp(toy, 3), exact_probs(toy, [])
    assert fit(sample_counts(wrong(drafter, widths=widths), toy, 16_000), probs) < 1e-6


def test_the_released_chain_emits_what_is_computed(toy):
    "The decoder against the formula of the experiments: the first token, drawn 8,000 times."
    drafter = sharp(toy, 3)
    counts = sample_counts(ReleasedChain(drafter, widths=(1, 1)), toy, 8_000)
    keys, values, logits = target_states(toy, TOY_PROMPT)
    hidden = teacher_forced(drafter, toy, TOY_PROMPT, keys, values)
    p, q = (part[:, -1].double().softmax(-1) for part in (logits, toy.lm_head(hidden)))
    first = torch.zeros(toy.config.vocab_size).double()
    for (token, *_), n in counts.items():
        first[token] += n / 8_000
    assert float((first - emitted(p, q, "released chain")[0]).abs().sum() / 2) < 0.03
    assert float((first - p[0]).abs().sum() / 2) > 0.06  # negative control


# doors


def test_rotary_embeddings_are_found(model, gpt2, qwen3):
    assert last_layer(model).rotary
    assert last_layer(qwen3).rotary
    assert not last_layer(gpt2).rotary


def small(config, cls, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": EOS}
    return cls(config(**sizes | more)).eval()


def test_targets_without_ordinary_states_are_refused(model):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    for target, words in (
        (small(MistralConfig, MistralForCausalLM, sliding_window=8, **heads), "sees a part of the text only"),
        (small(MambaConfig, MambaForCausalLM, state_size=8), "cannot be verified in one forward pass"),
    ):
        for refused in (
            lambda t=target: new_drafter(t),
            lambda t=target: LongSpec(new_drafter(model)).generate(t, torch.tensor([[5, 6]]), max_new_tokens=4),
        ):
            with pytest.raises(ValueError, match=words) as error:
                refused()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("own", [1, 3])
def test_a_last_layer_without_keys_of_its_own_is_refused(own):
    "Gemma 3n's last layers take keys and values from earlier ones of their kind."
    kinds = {"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 4 - own, "intermediate_size": [64] * 4}
    more = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    target = small(Gemma3nTextConfig, Gemma3nForCausalLM, num_hidden_layers=4, **kinds, **more, **heads)
    with pytest.raises(ValueError, match="keeps no ordinary keys and values in its last layer"):
        new_drafter(target)


def test_bad_input(model, gpt2):
    with pytest.raises(ValueError, match="widths must be positive"):
        LongSpec(new_drafter(model), widths=(4, 0))
    with pytest.raises(ValueError, match="drafter must be a LongSpecDrafter"):
        LongSpec(model).generate(model, torch.tensor([[5]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="this one has"):
        check_longspec(new_drafter(gpt2), model)
    with pytest.raises(ValueError, match="heads a multiple of kv_heads"):
        LongSpecConfig(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="unknown zoo model"):
        load_drafter("tales-longspek")


def test_save_and_load(model, tmp_path):
    drafter = sharp(model, 7)
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert again.config.window == 7
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), again.parameters(), strict=True))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match="file cut short"):
        load_drafter(tmp_path)


def test_a_passed_cache_and_a_single_token(model):
    decoder, prompt = LongSpec(sharp(model, 4), widths=(2, 2)), random_prompts(1, (9, 9), seed=2)[0]
    cache = DynamicCache()
    model(prompt[:, :8], past_key_values=cache, use_cache=True)
    out = model.generate(prompt, custom_generate=decoder, past_key_values=cache, max_new_tokens=10, **GREEDY)
    assert out.sequences[0, 9:].tolist() == plain(model, prompt, 10)
    one = prompt[:, :1]
    assert added(decoder.generate(model, one, max_new_tokens=10, **GREEDY)) == [plain(model, one, 10)]


def test_the_drafter_is_left_as_it_was(model):
    drafter = sharp(model).train()
    before = copy.deepcopy(drafter.state_dict())
    LongSpec(drafter).generate(model, torch.tensor([[5, 6]]), max_new_tokens=6, **GREEDY)
    assert drafter.training
    assert all(torch.equal(before[name], value) for name, value in drafter.state_dict().items())
    assert isinstance(drafter, LongSpecDrafter)
