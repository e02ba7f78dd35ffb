"""Learn2PD, its oracle and end-of-text prediction, against transcriptions of the rules in plain Python."""

import itertools
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from toys import EOS, PAD, left_pad, random_prompts, small_model
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

import decodelab.training.learn2pd as training
from decodelab.core.contract import decoders
from decodelab.diffusion.base import LLaDA, Unmasker
from decodelab.diffusion.canvas import CACHES, Canvas
from decodelab.diffusion.denoiser import Denoiser
from decodelab.diffusion.fast_dllm import FastDLLM
from decodelab.diffusion.learn2pd import (
    ConfidenceFilter,
    EndOfText,
    FilterConfig,
    Learn2PD,
    load_filter,
    threshold_filter,
)
from decodelab.lab.oracle import InHindsight
from decodelab.training.learn2pd import (
    FilterRecipe,
    FilterTrainer,
    Recorder,
    Records,
    auc,
    cached_records,
    filter_card,
    filter_figures,
    logistic_curve,
    record,
    split_by_prompt,
    static_texts,
    train_filter,
)

B = 8


# a model whose answers are written down, and the rules in plain Python


class Scripted(PreTrainedModel, GenerationMixin):
    "Proposes what `script(tokens)` says: for each place (token, confidence); the rest of the probability is spread evenly."

    config_class = PreTrainedConfig

    def __init__(self, script, vocab=20):
        ids = {"mask_token_id": 2, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
        super().__init__(PreTrainedConfig(vocab_size=vocab, num_hidden_layers=0, is_causal=False, **ids))
        self.embed, self.script, self.calls = torch.nn.Embedding(vocab, 1), script, []

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        vocab = self.config.vocab_size
        p = torch.zeros(*input_ids.shape, vocab)
        for row, ids in enumerate(input_ids.tolist()):
            self.calls.append(ids)
            for place, (token, confidence) in enumerate(self.script(ids)):
                p[row, place] = (1 - confidence) / (vocab - 2)
                p[row, place, token] = confidence
        return MaskedLMOutput(logits=p.log())


def proposals(model, canvas):
    "For each place of one canvas the token of largest probability and that probability."
    with torch.no_grad():
        p = Denoiser(model)(torch.tensor([canvas]))[0].softmax(-1)
    return p.argmax(-1).tolist(), p.amax(-1).tolist()


def answers(filter, confidences, block_length=B):
    "The filter's probabilities, by hand: fill up with zeros, two layers, sigmoid."
    row = confidences + [0.0] * (block_length - len(confidences))
    for number, layer in enumerate(filter.layers):
        row = [max(x, 0.0) for x in row] if number else row
        row = [sum(w * x for w, x in zip(weights, row)) + b for weights, b in zip(layer.weight.tolist(), layer.bias.tolist())]
    return [1 / (1 + math.exp(-z)) for z in row[: len(confidences)]]


def transcribed(model, prompt, N, filter=None, tau=1.0, eotp=None, ends=(EOS,), steps=None, block_length=B, cache="none"):
    "The block loop by its definition, one row: (answer, passes, columns fed); a dual cache sees positions behind the block at its first step only."
    mask, P = model.config.mask_token_id, len(prompt)
    x, passes, columns = list(prompt) + [mask] * N, 0, 0
    blocks = -(-N // block_length)
    for b in range(blocks):
        start, stop = P + b * block_length, min(P + (b + 1) * block_length, P + N)
        m = sum(t == mask for t in x[start:stop])
        s = steps // blocks if steps else stop - start
        quota = [k for k in (m // s + (i < m % s) for i in range(s)) if k] if m else []
        i = 0
        while mask in x[start:stop]:
            tokens, c = proposals(model, x)
            passes += 1
            known = 0 if cache == "none" or i == 0 else start - bool(getattr(model.config, "shift_logits", False))
            columns += (min(stop, len(x)) if cache == "dual" and i else len(x)) - known
            block = range(start, min(stop, len(x)))
            masked = [j for j in block if x[j] == mask]
            A = sorted(masked, key=lambda j: (-c[j], j))[: quota[i]]
            q = answers(filter, [c[j] for j in block], block_length) if tau < 1 else [0.0] * len(block)
            F = [j for j in masked if q[j - start] > tau]
            seen = [j for j in range(start, len(x)) if x[j] == mask and (cache != "dual" or i == 0 or j < stop)]
            for j in {*A, *F}:
                x[j] = tokens[j]
            e = None
            if eotp == "committed":
                e = next((j for j in range(P, len(x)) if x[j] in ends), None)
            elif eotp == "predicted":
                e = next((j for j in F if tokens[j] in ends), None)
                if e is None:
                    e = min((j for j in seen if tokens[j] in ends), key=lambda j: (-c[j], j), default=None)
            if e is not None:
                x = x[: e + 1]
            i += 1
    return x[P:], passes, columns


def hindsight(model, prompt, final, block_length=B):
    "The oracle by its definition, one row: (answer, passes)."
    mask, P = model.config.mask_token_id, len(prompt)
    x, passes = list(prompt) + [mask] * len(final), 0
    for start in range(P, P + len(final), block_length):
        stop = min(start + block_length, P + len(final))
        before = None
        while mask in x[start:stop]:
            tokens = proposals(model, x)[0][start:stop]
            passes += 1
            goal = final[start - P : stop - P]
            if tokens == before:
                x[start:stop] = goal
                break
            x[start:stop] = [y if x[start + j] == mask and t == y else x[start + j] for j, (t, y) in enumerate(zip(tokens, goal))]
            before = tokens
    return x[P:], passes


def cut_at_end(tokens, ends=(EOS,)):
    "Up to and including the first end."
    return next((tokens[: i + 1] for i, t in enumerate(tokens) if t in ends), tokens)


def random_filter(seed=0, block_length=B, scale=30.0):
    "A filter with weights large enough that its answers go both ways."
    torch.manual_seed(seed)
    made = ConfidenceFilter(FilterConfig(block_length)).eval()
    with torch.no_grad():
        made.layers[1].weight *= scale
    return made


def continuations(out):
    return [c.tolist() for c in out.continuations]


def passes(out):
    return [len(row) for row in out.stats.emitted]


@pytest.fixture(scope="module")
def model():
    return small_model(seed=3)


@pytest.fixture(scope="module")
def shallow():
    "One layer: keys depend on nothing but the token at their place, so that caches are exact."
    model = small_model(seed=5)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


@pytest.fixture(scope="module")
def ends(model):
    "Tokens that the model proposes often: they serve as ends."
    return often(model)


def often(model, count=3, N=20):
    texts = [t for p in random_prompts(6, seed=1) for t in transcribed(model, p[0].tolist(), N)[0]]
    return sorted(set(texts), key=lambda t: (-texts.count(t), t))[1 : 1 + count]


PROMPTS = random_prompts(6, seed=1)


# the filter


@pytest.mark.parametrize(("length", "depth"), [(32, 2), (8, 1), (4, 4)])
def test_filter_has_as_many_numbers_as_the_paper_says(length, depth):
    made = ConfidenceFilter(FilterConfig(length, depth))
    assert sum(p.numel() for p in made.parameters()) == depth * (length**2 + length)
    assert length != 32 or 2 * 32**2 + 2 * 32 == 2112 == sum(p.numel() for p in made.parameters())


def test_filter_answers_like_the_formula_also_for_a_short_block():
    made = random_filter()
    for positions in (1, 5, 8):
        c = torch.rand(3, positions)
        got = made.probability(c).tolist()
        for row, mine in zip(c.tolist(), got):
            assert mine == pytest.approx(answers(made, row), abs=1e-5)
    with pytest.raises(ValueError, match="blocks of at most 8 positions, not 9"):
        made.probability(torch.rand(1, 9))
    with pytest.raises(ValueError, match="block_length and depth must be positive, got 0 and 2"):
        FilterConfig(0)


def test_filter_is_saved_and_loaded_and_a_damaged_file_is_named(tmp_path):
    made = random_filter(4)
    made.config.backbone = "somebody"
    made.save_pretrained(tmp_path)
    again = load_filter(tmp_path)
    c = torch.rand(2, B)
    assert again.probability(c).equal(made.probability(c))
    assert (again.config.block_length, again.config.depth, again.config.backbone) == (B, 2, "somebody")
    assert not again.training
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors: file cut short"):
        load_filter(tmp_path)
    with pytest.raises(ValueError, match="unknown zoo model 'nobody'"):
        load_filter("nobody")


# the decoder


@pytest.mark.parametrize("N", [8, 20, 32])
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.8])
def test_decoder_equals_the_transcription(N, tau, model):
    fast = 0
    for seed, prompt in enumerate(PROMPTS):
        filter = random_filter(seed)
        out = Learn2PD(block_length=B, filter=filter, tau=tau).generate(model, prompt, max_new_tokens=N, do_sample=False)
        text, n, columns = transcribed(model, prompt[0].tolist(), N, filter, tau)
        assert continuations(out) == [text]
        assert passes(out) == [n]
        assert out.stats.target_tokens == columns
        fast += n < N
    assert fast  # the filter has taken something


def test_a_schedule_of_fewer_steps_is_kept(model):
    for seed, prompt in enumerate(PROMPTS):
        filter = random_filter(seed)
        out = Learn2PD(block_length=B, filter=filter, tau=0.8, steps=6).generate(model, prompt, max_new_tokens=24, do_sample=False)
        text, n, _ = transcribed(model, prompt[0].tolist(), 24, filter, 0.8, steps=6)
        assert (continuations(out), passes(out)) == ([text], [n])
        assert n <= 6


@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_from_one_on_it_is_the_static_decoder(tau, model):
    for prompt in PROMPTS:
        settings = {"max_new_tokens": 20, "do_sample": False}
        static = LLaDA(block_length=B).generate(model, prompt, **settings)
        for filter in (None, random_filter()):
            ours = Learn2PD(block_length=B, filter=filter, tau=tau).generate(model, prompt, **settings)
            assert ours.sequences.equal(static.sequences)
            assert passes(ours) == passes(static) == [20]


def test_below_zero_and_a_filter_that_always_agrees_take_one_pass_a_block(model):
    yes = threshold_filter(-1.0, block_length=B)
    for prompt in PROMPTS:
        for decoder in (Learn2PD(block_length=B, filter=random_filter(), tau=-0.1), Learn2PD(block_length=B, filter=yes)):
            out = decoder.generate(model, prompt, max_new_tokens=20, do_sample=False)
            assert out.stats.emitted == [[8, 8, 4]]


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.3])
def test_a_filter_that_reads_one_confidence_is_threshold_decoding(threshold, model):
    differs = 0
    for prompt in PROMPTS:
        settings = {"max_new_tokens": 20, "do_sample": False}
        ours = Learn2PD(block_length=B, filter=threshold_filter(threshold, block_length=B)).generate(model, prompt, **settings)
        theirs = FastDLLM(block_length=B, threshold=threshold).generate(model, prompt, **settings)
        assert ours.sequences.equal(theirs.sequences)
        assert ours.stats.emitted == theirs.stats.emitted
        differs += passes(ours) != [20]
    assert differs or threshold > 0.1


def test_sets_shrink_as_tau_rises(model):
    chosen = {}

    @dataclass
    class Watched(Learn2PD):
        def select(self, step):
            if self.tau not in chosen:
                chosen[self.tau] = super().select(step)[0]
            return step.masked

    filter = random_filter(2)
    taus = [-1.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    for tau in taus:
        Watched(block_length=B, filter=filter, tau=tau).generate(model, PROMPTS[0], max_new_tokens=B, do_sample=False)
    sizes = [int(chosen[tau].sum()) for tau in taus]
    assert all(bool((chosen[b] <= chosen[a]).all()) for a, b in zip(taus, taus[1:]))
    assert sizes[0] == B and sizes[-1] == 1 and len(set(sizes)) > 2


def test_filter_sees_the_model_at_positions_that_are_filled(model):
    rows = []

    class Spy(ConfidenceFilter):
        def forward(self, c):
            rows.append(c[0].tolist())
            return torch.full_like(c, -9.0)

    prompt = PROMPTS[0]
    out = Learn2PD(block_length=B, filter=Spy(FilterConfig(B))).generate(model, prompt, max_new_tokens=B, do_sample=False)
    x, first = prompt[0].tolist() + [PAD] * B, prompt.shape[1]
    assert len(rows) == B
    for seen in rows:
        tokens, c = proposals(model, x)
        assert seen == pytest.approx(c[first:], abs=1e-5)
        masked = [j for j in range(first, len(x)) if x[j] == PAD]
        best = max(masked, key=lambda j: c[j])
        x[best] = tokens[best]
    assert x[first:] == continuations(out)[0]


@pytest.mark.parametrize("tau", [0.3, 0.5])
def test_sampling_at_a_temperature_near_zero_takes_greedys_steps(tau, model):
    decoder, seen = Learn2PD(block_length=B, filter=random_filter(), tau=tau), 0
    for prompt in PROMPTS:
        greedy = decoder.generate(model, prompt, max_new_tokens=20, do_sample=False)
        torch.manual_seed(0)
        drawn = decoder.generate(model, prompt, max_new_tokens=20, do_sample=True, temperature=1e-4, top_k=0)
        assert continuations(drawn) == continuations(greedy)
        assert drawn.stats.emitted == greedy.stats.emitted
        seen += len(greedy.stats.emitted[0]) < 20
    assert seen > 3  # the filter takes part


def test_sampled_proposals_stand_at_masked_positions_only(model):
    "At visible positions the filter sees the model's largest probability, whatever the temperature."
    seen = []

    class Spy(ConfidenceFilter):
        def forward(self, c):
            seen.append(c[0].tolist())
            return torch.full_like(c, -9.0)

    class Watched(Learn2PD):
        def select(self, step):
            best = step.scores.double().softmax(-1).amax(-1)
            visible.append(torch.where(step.masked, -1, best)[0].tolist())
            return super().select(step)

    visible = []
    torch.manual_seed(0)
    decoder = Watched(block_length=B, filter=Spy(FilterConfig(B)))
    decoder.generate(model, PROMPTS[0], max_new_tokens=B, do_sample=True, temperature=2.0, top_k=0)
    pairs = [(c, best) for row, rest in zip(seen, visible) for c, best in zip(row, rest) if best >= 0]
    assert len(pairs) == sum(range(B))
    assert [c for c, _ in pairs] == pytest.approx([best for _, best in pairs], abs=1e-6)


def test_errors_say_what_to_do(model, tmp_path):
    with pytest.raises(ValueError, match="a filter is needed: train one"):
        Learn2PD()
    with pytest.raises(ValueError, match="tau must be a number, got nan"):
        Learn2PD(tau=math.nan)
    for wrong in (ConfidenceFilter, "tasks-learn2pd", random_filter().state_dict()):
        with pytest.raises(ValueError, match="filter must be a ConfidenceFilter, as from `load_filter`, got"):
            Learn2PD(filter=wrong)
    for tau, steepness in ((1.0, 1.0), (math.nan, 1.0), (0.9, 0.0)):
        with pytest.raises(ValueError, match="tau must lie between 0 and 1 and steepness be positive"):
            threshold_filter(tau=tau, steepness=steepness)
    with pytest.raises(ValueError, match="unknown eotp 'early': use 'committed', 'predicted' or None"):
        Learn2PD(tau=1.0, eotp="early")
    with pytest.raises(ValueError, match="blocks of at most 8 positions, not 16: set block_length=8"):
        Learn2PD(block_length=16, filter=random_filter()).generate(model, PROMPTS[0], max_new_tokens=16)
    with pytest.raises(ValueError, match="blocks of at most 8 positions, not 12"):
        Learn2PD(block_length=None, filter=random_filter()).generate(model, PROMPTS[0], max_new_tokens=12)
    Learn2PD(block_length=16, filter=random_filter()).generate(model, PROMPTS[0], max_new_tokens=8)
    with pytest.raises(ValueError, match=r"the filter is on meta, the prompt on cpu: move it with filter\.to"):
        Learn2PD(block_length=8, filter=random_filter().to("meta")).generate(model, PROMPTS[0], max_new_tokens=8)


def test_example_of_an_unknown_model_is_a_threshold(model):
    decoder = decoders()["learn2pd"].example(model)
    assert isinstance(decoder, Learn2PD) and decoder.tau == 0.96 and decoder.block_length == 32
    c = torch.tensor([[0.89, 0.91]])
    assert (decoder.filter.probability(c) > 0.96).tolist() == [[False, True]]


# end-of-text prediction


@pytest.mark.parametrize("eotp", ["committed", "predicted"])
@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("N", [16, 30])
def test_cutting_equals_the_transcription(eotp, tau, N, model, ends):
    lengths = set()
    for seed, prompt in enumerate(PROMPTS):
        filter = random_filter(seed)
        settings = {"max_new_tokens": N, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
        decoder = Learn2PD(block_length=B, filter=filter, tau=tau, eotp=eotp, early_stop=False)
        out = decoder.generate(model, prompt, **settings)
        text, n, columns = transcribed(model, prompt[0].tolist(), N, filter, tau, eotp, ends)
        expected = cut_at_end(text, ends)
        if len(text) < N and expected[-1] not in ends:
            expected = [*expected, ends[0]]  # cut off before its end was written
        assert continuations(out) == [expected]
        assert passes(out) == [n]
        assert out.stats.target_tokens == columns
        lengths.add(len(text))
        decoder.early_stop = True
        quick = decoder.generate(model, prompt, **settings)
        assert continuations(quick) == [expected]
        assert passes(quick)[0] <= n
    assert len(lengths) > 2 and min(lengths) < N  # cuts at several positions


@pytest.mark.parametrize("eotp", ["committed", "predicted"])
def test_a_text_without_an_end_is_not_touched(eotp, model):
    for seed, prompt in enumerate(PROMPTS):
        settings = {"max_new_tokens": 20, "do_sample": False}
        outs = [
            Learn2PD(block_length=B, filter=random_filter(seed), tau=0.5, eotp=e).generate(model, prompt, **settings) for e in (None, eotp)
        ]
        assert outs[0].sequences.equal(outs[1].sequences)
        assert outs[0].stats.emitted == outs[1].stats.emitted
        assert outs[0].stats.target_tokens == outs[1].stats.target_tokens


@pytest.mark.parametrize("eotp", ["committed", "predicted"])
@pytest.mark.parametrize("early_stop", [False, True])
def test_rows_with_different_cuts_are_like_single_calls(eotp, early_stop, model, ends):
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
    decoder = Learn2PD(block_length=B, filter=random_filter(1), tau=0.6, eotp=eotp, early_stop=early_stop)
    alone = [decoder.generate(model, prompt, **settings) for prompt in PROMPTS]
    together = decoder.generate(model, **left_pad(PROMPTS), **settings)
    assert continuations(together) == [continuations(out)[0] for out in alone]
    assert together.stats.emitted == [out.stats.emitted[0] for out in alone]
    assert len({len(c) for c in continuations(together)}) > 2


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("eotp", ["committed", "predicted"])
@pytest.mark.parametrize("shift", [False, True])
def test_caches_and_cuts_where_caches_are_exact(cache, eotp, shift, shallow):
    shallow.config.shift_logits = shift
    ends = often(shallow)
    cuts = 0
    for seed, prompt in enumerate(PROMPTS):
        filter = random_filter(seed)
        settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
        decoder = Learn2PD(block_length=B, filter=filter, tau=0.7, eotp=eotp, early_stop=False, cache=cache)
        out = decoder.generate(shallow, prompt, **settings)
        text, n, columns = transcribed(shallow, prompt[0].tolist(), 30, filter, 0.7, eotp, ends, cache=cache)
        expected = cut_at_end(text, ends)
        assert continuations(out)[0][: len(expected)] == expected
        assert passes(out) == [n]
        assert out.stats.target_tokens == columns
        cuts += len(text) < 30
    assert cuts > 2
    together = decoder.generate(shallow, **left_pad(PROMPTS), **settings)
    assert continuations(together) == [continuations(decoder.generate(shallow, p, **settings))[0] for p in PROMPTS]


def test_columns_that_are_fed_after_a_cut_by_cache():
    # tokens 9 are right; at its second pass the first block knows an end at its fifth place
    def script(ids):
        first = ids[3:7]
        return [(9, 0.5)] * 3 + [(9, 0.99) if j < 4 else (EOS, 0.9 if first[0] != 2 else 0.3) for j in range(len(ids) - 3)]

    fed = {}
    for eotp in (None, "committed"):
        model = Scripted(script)
        out = Learn2PD(block_length=8, filter=threshold_filter(0.8, block_length=8), eotp=eotp, early_stop=False).generate(
            model, torch.tensor([[5, 6, 7]]), max_new_tokens=24, do_sample=False
        )
        assert continuations(out) == [[9, 9, 9, 9, EOS]]
        fed[eotp] = [len(ids) for ids in model.calls]
    assert fed == {None: [27, 27, 27, 27], "committed": [27, 27]}


def test_committed_end_is_cut_behind_and_masked_positions_before_it_are_decoded():
    # 1 per step, the end first: then three columns are left, and what stood behind is never read again
    def script(ids):
        return [(9, 0.5)] * 2 + [(EOS, 0.9) if j == 2 else (8, 0.6 - 0.1 * j) for j in range(len(ids) - 2)]

    model = Scripted(script)
    out = Learn2PD(block_length=4, tau=1, eotp="committed").generate(model, torch.tensor([[5, 6]]), max_new_tokens=6, do_sample=False)
    assert continuations(out) == [[8, 8, EOS]]
    assert [len(ids) for ids in model.calls] == [8, 5, 5]
    assert model.calls[1:] == [[5, 6, 2, 2, EOS], [5, 6, 8, 2, EOS]]


def test_predicted_end_behind_the_block_cuts_but_need_not_be_written():
    # the most confident masked position of all proposes an end in the second block; once that block is reached, another token is written there
    def script(ids):
        late = ids[2] != 2
        return [(9, 0.5)] * 2 + [(8, 0.5) if j != 5 else ((7, 0.9) if late else (EOS, 0.95)) for j in range(len(ids) - 2)]

    for early_stop in (False, True):
        model = Scripted(script)
        decoder = Learn2PD(block_length=4, tau=1, eotp="predicted", early_stop=early_stop, trace=True)
        out = decoder.generate(model, torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=False)
        assert continuations(out) == [[8, 8, 8, 8, 8, 7, EOS]]
        assert [len(ids) for ids in model.calls] == [14, 8, 8, 8, 8, 8]
        assert out.stats.emitted == [[1, 1, 1, 1, 1, 2]]
        assert [t for step in out.trace.row(0) for t in step.tokens] == continuations(out)[0]


def test_predicted_end_at_the_last_place_of_a_block():
    # the place behind the cut would be the next block's first: there is none any more, and the text is closed
    def script(ids):
        late = ids[2] != 2
        return [(9, 0.5)] * 2 + [(8, 0.5) if j != 3 else ((7, 0.9) if late else (EOS, 0.4)) for j in range(len(ids) - 2)]

    for early_stop in (False, True):
        model = Scripted(script)
        decoder = Learn2PD(block_length=4, tau=1, eotp="predicted", early_stop=early_stop, trace=True)
        out = decoder.generate(model, torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=False)
        assert continuations(out) == [[8, 8, 8, 7, EOS]]
        assert [len(ids) for ids in model.calls] == [14, 6, 6, 6]


def test_trusted_ends_go_before_more_confident_ones():
    # F holds the end at place 1 (0.6 > 0.55) and not the more confident ones behind the block
    def script(ids):
        return [(9, 0.5)] * 2 + [(EOS, 0.6) if j == 1 else (EOS, 0.9) if j > 3 else (8, 0.5) for j in range(len(ids) - 2)]

    for tau, filter, expected in ((0.96, threshold_filter(0.55, block_length=4), [8, EOS]), (1.0, None, [8, EOS])):
        model = Scripted(script)
        decoder = Learn2PD(block_length=4, filter=filter, tau=tau, eotp="predicted", early_stop=False)
        out = decoder.generate(model, torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)
        assert continuations(out) == [expected]
        assert len(model.calls[1]) == (4 if filter else 7)


def test_filter_sees_zeros_where_the_block_was_cut():
    # it believes everything while the last place is unsure: that is so once the place is cut off, also beside a row that keeps it
    made = ConfidenceFilter(FilterConfig(4, depth=1)).eval()
    with torch.no_grad():
        made.layers[0].weight.zero_()
        made.layers[0].weight[:, 3] = -40.0
        made.layers[0].bias.fill_(10.0)

    def script(ids):
        ends = ids[1] == 6
        return [(9, 0.5)] * 2 + [(EOS, 0.9) if ends and j == 2 else (8, 0.5) for j in range(len(ids) - 2)]

    prompts, settings = torch.tensor([[5, 6], [5, 7]]), {"max_new_tokens": 4, "do_sample": False}
    decoder = Learn2PD(block_length=4, filter=made, eotp="committed", early_stop=False)
    together = decoder.generate(Scripted(script), prompts, **settings)
    assert continuations(together) == [[8, 8, EOS], [8, 8, 8, 8]]
    assert together.stats.emitted == [[1, 2], [1, 1, 1, 1]]
    alone = decoder.generate(Scripted(script), prompts[:1], **settings)
    assert alone.stats.emitted == [[1, 2]]


def test_cutting_is_a_part_for_other_decoders(model, ends):
    @dataclass
    class Short(EndOfText, FastDLLM):
        pass

    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
    cheaper = 0
    for prompt in PROMPTS:
        whole = Short(block_length=B, threshold=0.05, early_stop=False).generate(model, prompt, **settings)
        plain = FastDLLM(block_length=B, threshold=0.05, early_stop=False).generate(model, prompt, **settings)
        assert whole.sequences.equal(plain.sequences) and whole.stats.emitted == plain.stats.emitted
        for eotp in ("committed", "predicted"):
            short = Short(block_length=B, threshold=0.05, eotp=eotp, early_stop=False).generate(model, prompt, **settings)
            cheaper += short.stats.target_tokens < whole.stats.target_tokens
    assert cheaper > 4


def test_sampling_with_cuts_ends_and_repeats(model, ends):
    settings = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "eos_token_id": ends, "pad_token_id": PAD}
    for eotp in ("committed", "predicted"):
        outs, decoder = [], Learn2PD(block_length=B, filter=random_filter(), tau=0.5, eotp=eotp)
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(continuations(decoder.generate(model, **left_pad(PROMPTS), **settings)))
        assert outs[0] == outs[1] != outs[2]
        assert all(set(row[:-1]).isdisjoint(ends) for row in outs[0])


# what a policy sees behind its block, and the canvas below


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_positions_behind_the_block_are_what_the_whole_question_says(cache, shift, shallow):
    shallow.config.shift_logits = shift
    seen = []

    @dataclass
    class Looks(Unmasker):
        looks_beyond = True

        def select(self, step):
            whole = Denoiser(shallow)(step.canvas.ids, step.canvas.exists)[step.rows]
            seen.append((step.start, step.beyond is not None))
            for part in (step, *filter(None, [step.beyond])):
                self.propose(part)
                there = part.canvas.exists[step.rows, part.start : part.stop]
                assert part.masked.equal((part.canvas.ids[step.rows, part.start : part.stop] == PAD) & there)
                right = whole[:, part.start : part.stop]
                assert (part.scores - right)[part.masked].nan_to_num().abs().max() < 1e-4
                assert part.tokens.shape == part.masked.shape == part.confidence.shape
            return step.best()

        def stop(self, step, chosen):
            if int(step.index[0]) == 1:  # rows are cut at different positions
                return torch.tensor([17, 13, 20])[step.rows] + step.canvas.prompt
            return None

    out = Looks(block_length=B, cache=cache).generate(shallow, **left_pad(PROMPTS[:3]), max_new_tokens=24, do_sample=False)
    assert sorted({s for s, _ in seen}) == [12, 20, 28] or len({s for s, _ in seen}) == 3
    assert [b for _, b in seen][:2] == [True, cache != "dual"]
    assert [len(c) - 1 for c in continuations(out)] == [17, 13, 20]


def test_a_cut_canvas_feeds_only_what_is_left(shallow):
    shallow.config.shift_logits = False
    for cache in CACHES:
        prompt = left_pad(PROMPTS[:2])
        canvas = Canvas(Denoiser(shallow), prompt["input_ids"], 12, prompt["attention_mask"], cache=cache)
        P = canvas.prompt
        canvas.open(P, P + 4, torch.arange(2))
        with torch.no_grad():
            canvas.logits()
            canvas.cut(torch.tensor([P + 3, P + 6]))
            canvas.ids[:, P] = 11
            before = canvas.stats.target_tokens
            logits = canvas.logits()
            assert canvas.stats.target_tokens - before == 2 * {"none": P + 6, "prefix": 6, "dual": 4}[cache]
            whole = Denoiser(shallow)(canvas.ids, canvas.exists)
            assert (logits - whole[:, P : P + 4])[:, :3].nan_to_num().abs().max() < 1e-4
            canvas.keep_rows(torch.tensor([True, False]))
            before = canvas.stats.target_tokens
            logits = canvas.logits()
            assert canvas.stats.target_tokens - before == {"none": P + 3, "prefix": 3, "dual": 3}[cache]
            assert logits.shape[1] == 4
            assert (logits - whole[:1, P : P + 4])[:, :3].nan_to_num().abs().max() < 1e-4


# the oracle


def test_oracle_equals_the_transcription(model):
    for prompt in PROMPTS:
        oracle = InHindsight(block_length=B)
        final = oracle.prepare(model, prompt, max_new_tokens=20)[0].tolist()
        assert final == transcribed(model, prompt[0].tolist(), 20)[0]
        out = oracle.generate(model, prompt, max_new_tokens=20, do_sample=False)
        text, n = hindsight(model, prompt[0].tolist(), final)
        assert continuations(out) == [text] == [final]
        assert passes(out) == [n]
        assert n <= 9 + 9 + 5  # B + 1 a block


def test_oracle_of_a_batch_is_that_of_its_rows(model, ends):
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
    for early_stop in (False, True):
        alone = []
        for prompt in PROMPTS:
            oracle = InHindsight(block_length=B, early_stop=early_stop)
            oracle.prepare(model, prompt, None, 20, eos_token_id=ends, pad_token_id=PAD)
            assert PAD not in oracle.final  # also what stands behind the end is known
            alone.append(oracle.generate(model, prompt, **settings))
        batch = left_pad(PROMPTS)
        oracle.prepare(model, **batch, max_new_tokens=20, eos_token_id=ends, pad_token_id=PAD)
        together = oracle.generate(model, **batch, **settings)
        static = LLaDA(block_length=B).generate(model, **batch, **settings)
        assert continuations(together) == [continuations(out)[0] for out in alone] == continuations(static)
        assert together.stats.emitted == [out.stats.emitted[0] for out in alone]


def test_oracle_leaves_a_block_that_is_stuck():
    # the model says 9 when everything is open, and 8 for the last two masked: y* is [9, 9, 8, 8], reached from left to right
    def script(ids):
        filled = sum(t == 9 for t in ids[2:])
        return [(9, 0.5)] * 2 + [(9 if filled < 2 else 8, 0.9 - 0.1 * j) for j in range(len(ids) - 2)]

    model = Scripted(script)
    oracle = InHindsight(block_length=4)
    assert oracle.prepare(model, torch.tensor([[5, 6]]), max_new_tokens=4).tolist() == [[9, 9, 8, 8]]
    out = oracle.generate(model, torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert (continuations(out), passes(out)) == ([[9, 9, 8, 8]], [2])

    # told a text that the model never proposes, it proposes the same twice and writes the text
    oracle.prepare(model, torch.tensor([[5, 6]]), final=torch.tensor([[9, 9, 7, 8]]))
    out = oracle.generate(model, torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert (continuations(out), out.stats.emitted) == ([[9, 9, 7, 8]], [[2, 1, 1]])


def test_oracle_takes_no_more_passes_than_decoders_with_the_same_text(model):
    compared = 0
    for prompt in PROMPTS:
        oracle = InHindsight(block_length=B)
        oracle.prepare(model, prompt, max_new_tokens=B)
        best = oracle.generate(model, prompt, max_new_tokens=B, do_sample=False)
        baselines = [
            LLaDA(block_length=B),
            *(Learn2PD(block_length=B, filter=random_filter(s), tau=t) for s in range(8) for t in (0.5, 0.9)),
        ]
        for baseline in baselines:
            out = baseline.generate(model, prompt, max_new_tokens=B, do_sample=False)
            if out.sequences.equal(best.sequences):
                compared += 1
                assert passes(best) <= passes(out)
    assert compared > 10


def test_oracle_is_greedy_and_not_always_the_shortest():
    # y* is all 9; with positions 0 and 1 filled together the model goes wrong for as long as a masked position is left, with place 0 alone it knows everything
    def script(ids):
        filled = [t == 9 for t in ids[2:]]
        right = (
            [0, 1] if not any(filled) else range(4) if filled == [True, False, False, False] else [] if filled[:2] == [True, True] else [1]
        )
        return [(9, 0.5)] * 2 + [(9 if j in right else 8, 0.9 - 0.1 * j) for j in range(len(ids) - 2)]

    model, prompt = Scripted(script), torch.tensor([[5, 6]])
    oracle = InHindsight(block_length=4)
    oracle.prepare(model, prompt, final=torch.tensor([[9, 9, 9, 9]]))

    @dataclass
    class FirstOneThenAll(Unmasker):
        def select(self, step):
            return step.masked if step.block.index else step.best()

    outs = [d.generate(model, prompt, max_new_tokens=4, do_sample=False) for d in (oracle, FirstOneThenAll())]
    assert [continuations(out) for out in outs] == [[[9, 9, 9, 9]]] * 2
    assert [passes(out) for out in outs] == [[3], [2]]


def test_oracle_says_what_it_lacks(model):
    oracle = InHindsight(block_length=B)
    with pytest.raises(ValueError, match=r"does not know how these prompts end: call prepare\(model"):
        oracle.generate(model, PROMPTS[0], max_new_tokens=8, do_sample=False)
    oracle.prepare(model, PROMPTS[0], max_new_tokens=8)
    for prompt, N in ((PROMPTS[1], 8), (PROMPTS[0], 9)):
        with pytest.raises(ValueError, match="does not know how these prompts end"):
            oracle.generate(model, prompt, max_new_tokens=N, do_sample=False)
    with pytest.raises(ValueError, match="decode with do_sample=False"):
        oracle.generate(model, PROMPTS[0], max_new_tokens=8, do_sample=True)


# records and training


@pytest.fixture(scope="module")
def wide():
    return small_model(seed=3, context=512)


@pytest.fixture(scope="module")
def recipe():
    sizes = {"block_length": 4, "prompts": 14, "new_tokens": 8, "batch_size": 5}
    return FilterRecipe("toy", "somewhere/nobody", steps=40, save_every=10, **sizes)


def recorded(model, prompt, final, length, block_length):
    "Lines of the oracle on a canvas of `length` positions: {(block, pass): (c, correct, masked, there)}, blocks filled up to `block_length`."
    x, P, found = [*prompt, *[PAD] * length], len(prompt), {}
    for b, start in enumerate(range(P, P + length, block_length)):
        stop, before, step = min(start + block_length, P + length), None, 0
        while PAD in x[start:stop]:
            tokens, c = (row[start:stop] for row in proposals(model, x))
            goal, gone = final[start - P : stop - P], block_length - (stop - start)
            line = c, [t == y for t, y in zip(tokens, goal)], [t == PAD for t in x[start:stop]], [True] * (stop - start)
            found[b, step] = tuple(column + [0.0 if k == 0 else False] * gone for k, column in enumerate(line))
            stuck = tokens == before
            x[start:stop] = [y if stuck or (t == PAD and a == y) else t for t, a, y in zip(x[start:stop], tokens, goal)]
            before, step = tokens, step + 1
    return found


def test_records_are_what_the_oracle_sees(wide, tokenizer):
    prompts = ["copy: a, b", "no", "the longest of the three prompts"]
    final = static_texts(wide, tokenizer, prompts, new_tokens=12, block_length=4, batch_size=2)
    texts = [transcribed(wide, tokenizer(text).input_ids, 12, block_length=4)[0] for text in prompts]
    assert final.tolist() == texts
    end = texts[0][5]  # in the second block of the first text
    wide.generation_config.eos_token_id = end
    try:
        records = record(wide, tokenizer, prompts, final, block_length=4, batch_size=2)
    finally:
        wide.generation_config.eos_token_id = EOS
    lengths = [row.index(end) + 1 if end in row else 12 for row in texts]
    assert lengths[0] <= 6 and len(set(lengths)) > 1
    lines = {}
    for i, text in enumerate(prompts):
        for cut, length in ((False, 12), (True, lengths[i])):
            found = recorded(wide, tokenizer(text).input_ids, texts[i], length, 4)
            lines |= {(i, b, step, cut): line for (b, step), line in found.items()}
    assert len(records) == len(lines) > 12
    for c, correct, masked, there, *key in zip(*(x.tolist() for x in vars(records).values())):
        mine = lines.pop(tuple(key))
        assert c == pytest.approx(mine[0], abs=1e-5)
        assert (correct, masked, there) == mine[1:]
    with pytest.raises(ValueError, match="new_tokens must be a multiple of block_length, got 8 and 3"):
        static_texts(wide, tokenizer, prompts, new_tokens=8, block_length=3)


def test_filled_positions_count_as_right_and_cut_ones_do_not():
    # first two positions are right, then all; the canvas of the second run ends at the third
    def script(ids):
        known = ids[2] == 9
        return [(5, 0.5)] * 2 + [(9 if j < 2 else EOS if known and j == 2 else 8, 0.9 - 0.1 * j) for j in range(len(ids) - 2)]

    for cut, pads in ((False, 0), (True, 1)):
        oracle, prompt = Recorder(block_length=4, cut=cut), torch.tensor([[5, 6]])
        oracle.prepare(Scripted(script), prompt, final=torch.tensor([[9, 9, EOS, 8]]))
        oracle.generate(Scripted(script), prompt, max_new_tokens=4, do_sample=False)
        c, right, masked, there, _, _, step = (torch.cat(column).tolist() for column in zip(*oracle.lines))
        gone = slice(4 - pads, 4)
        assert step == [0, 1]
        assert [row[: 4 - pads] for row in right] == [[True, True, False, True][: 4 - pads], [True] * (4 - pads)]
        assert [row[: 4 - pads] for row in masked] == [[True] * (4 - pads), [False, False, True, False][: 4 - pads]]
        assert all(row[gone] == [0.0] * pads for row in c)
        assert all(row[gone] == [False] * pads for rows in (right, masked, there) for row in rows)


def test_static_texts_go_on_where_they_were_stopped(wide, tokenizer, tmp_path, monkeypatch):
    prompts, asked = ["a", "bc", "def", "ghij", "klmno"], []
    plain = InHindsight.prepare

    def prepare(self, model, ids, *args, **settings):
        asked.append(len(ids))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(self, model, ids, *args, **settings)

    monkeypatch.setattr(InHindsight, "prepare", prepare)
    call = {"new_tokens": 8, "block_length": 4, "batch_size": 2, "path": tmp_path / "run" / "final.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        static_texts(wide, tokenizer, prompts, **call, made_from={"key": "a"})
    resumed = static_texts(wide, tokenizer, prompts, **call, made_from={"key": "a"})
    assert asked == [2, 2, 2, 1]  # the first batch was not decoded again
    assert static_texts(wide, tokenizer, prompts, **call, made_from={"key": "a"}).equal(resumed)
    assert len(asked) == 4
    assert static_texts(wide, tokenizer, prompts, **call, made_from={"key": "b"}).equal(resumed)
    assert asked[4:] == [2, 2, 1]


def made_up(prompts=20, passes=3, length=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(prompts * passes, length, generator=g)
    correct = torch.rand(c.shape, generator=g) < c
    masked = torch.rand(c.shape, generator=g) < 0.5
    prompt, step = torch.arange(prompts).repeat_interleave(passes), torch.arange(passes).repeat(prompts)
    return Records(c, correct, masked, torch.ones_like(masked), prompt, torch.zeros_like(prompt), step, step > 5)


def test_no_prompt_is_on_two_sides():
    records = made_up()
    parts = split_by_prompt(records, seed=3)
    sets = [set(part.prompt.tolist()) for part in parts]
    assert [len(s) for s in sets] == [16, 2, 2]
    assert set.union(*sets) == set(range(20))
    assert sum(map(len, parts)) == len(records)
    assert {tuple(row) for part in parts for row in part.c.tolist()} == {tuple(row) for row in records.c.tolist()}
    assert [set(part.prompt.tolist()) for part in split_by_prompt(records, seed=4)] != sets


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    g = torch.Generator().manual_seed(1)
    score = torch.randint(0, 6, (60,), generator=g).float()  # many ties
    label = torch.rand(60, generator=g) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(score[label].tolist(), score[~label].tolist())]
    assert auc(score, label) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc(score, torch.ones(60, dtype=torch.bool)))


def test_logistic_curve_is_the_best_of_a_grid():
    g = torch.Generator().manual_seed(2)
    c = torch.rand(500, generator=g)
    label = torch.rand(500, generator=g) < (4 * c - 1).sigmoid()

    def loss(a, b):
        return float(torch.nn.functional.binary_cross_entropy_with_logits(a * c + b, label.float()))

    a, b = logistic_curve(c, label)
    assert all(loss(a, b) <= loss(a + x, b + y) + 1e-7 for x in (-0.2, 0, 0.2) for y in (-0.2, 0, 0.2))
    assert abs(a - 4) < 1.5


def test_figures_by_hand():
    filter = threshold_filter(0.5, tau=0.5, block_length=2, steepness=20)
    c = torch.tensor([[0.9, 0.4], [0.6, 0.2], [0.0, 0.0]])
    correct = torch.tensor([[True, False], [False, True], [True, True]])
    masked = torch.tensor([[True, True], [True, False], [False, False]])
    there = torch.tensor([[True, True], [True, True], [False, False]])
    records = Records(c, correct, masked, there, *(torch.tensor([0, 1, 2]) for _ in range(3)), torch.tensor([False, False, True]))
    found = filter_figures(filter, records, (1.0, 0.0), taus=(0.5, 0.99))
    q = [1 / (1 + math.exp(-20 * (x - 0.5))) for x in (0.9, 0.4, 0.6, 0.2)]
    bce = [-math.log(q[0]), -math.log(1 - q[1]), -math.log(1 - q[2]), -math.log(q[3])]
    assert found["all"]["bce"] == pytest.approx(sum(bce) / 4, rel=1e-4)
    assert found["masked"]["bce"] == pytest.approx(sum(bce[:3]) / 3, rel=1e-4)
    mean = sum(bce[:3]) / 3  # two prompts: the first has two of the three masked
    pulls = (bce[0] + bce[1] - 2 * mean, bce[2] - mean)
    assert found["masked"]["bce_se"] == pytest.approx(math.hypot(*pulls) / 3, rel=1e-4)
    assert (found["all"]["positions"], found["masked"]["positions"]) == (4, 3)
    assert found["all"]["tau 0.5"] == {"taken": 0.5, "wrong": 0.5, "right_taken": 0.5}
    assert found["masked"]["tau 0.99"]["wrong"] == 0.0
    assert found["masked"]["accuracy"] == pytest.approx(2 / 3)
    assert found["masked"]["auc"] == 1.0
    assert found["own confidence, masked positions"]["auc"] == 1.0
    assert [line[1:] for line in sorted(found["reliability"])] == [[0.0, 1], [0.0, 1], [1.0, 1]]


def test_training_learns_resumes_and_says_what_it_did(tmp_path, wide, tokenizer, recipe, monkeypatch):
    monkeypatch.setattr(wide.generation_config, "eos_token_id", list(range(2, 30)))  # texts end early, canvases are cut
    steps, plain = [], FilterTrainer.training_step
    monkeypatch.setattr(FilterTrainer, "training_step", lambda *args, **kwargs: steps.append(1) or plain(*args, **kwargs))
    whole = train_filter(recipe, tmp_path / "whole", (wide, tokenizer))
    train_filter(replace(recipe, steps=20), tmp_path / "parts", (wide, tokenizer))
    assert len(steps) == 40 + 20
    parts = train_filter(recipe, tmp_path / "parts", (wide, tokenizer))
    assert len(steps) == 40 + 40
    assert whole["held_out"] == parts["held_out"]
    a, b = (load_filter(tmp_path / name) for name in ("whole", "parts"))
    assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters()))
    assert (a.config.backbone, a.config.block_length, a.config.depth) == ("nobody", 4, 2)
    losses = [float(p["eval_loss"]) for p in whole["curve"] if "eval_loss" in p]
    assert whole["kept_step"] == 10 * (1 + losses.index(min(losses)))
    first = recipe.filter()
    train, validation, test = split_by_prompt(cached_records(recipe, tmp_path / "whole/run"), seed=0)
    assert not validation.there.all()

    def loss(filter, part):
        z = filter(part.c).detach()[part.there]
        return float(torch.nn.functional.binary_cross_entropy_with_logits(z, part.correct[part.there].float()))

    assert loss(a, train) < loss(first, train) - 1e-3
    assert loss(a, validation) == pytest.approx(min(losses), rel=1e-3)
    assert loss(a, test[~test.cut]) == pytest.approx(whole["held_out"]["all"]["bce"], rel=1e-4)
    assert loss(a, test[test.cut]) == pytest.approx(whole["held_out_cut"]["all"]["bce"], rel=1e-4)
    assert whole["prompts"] == {"train": 11, "validation": 1, "test": 2}
    assert json.loads((tmp_path / "whole/training.json").read_text()) == json.loads(json.dumps(whole))
    card = filter_card(tmp_path / "whole")
    assert card == (tmp_path / "whole/README.md").read_text()
    assert "40 numbers in float32" in card and "--set block_length=4" in card


def test_records_are_made_once_and_belong_to_a_recipe(tmp_path, wide, tokenizer, recipe, monkeypatch):
    first = cached_records(recipe, tmp_path, (wide, tokenizer))
    asked = []
    monkeypatch.setattr(training, "_load", lambda name: asked.append(name) or (wide, tokenizer))
    monkeypatch.setattr(training, "record", lambda *_: pytest.fail("made again"))
    for other in (recipe, replace(recipe, depth=1, steps=3, learn_from="list", cuts=False)):
        for models in (None, (wide, tokenizer)):
            again = cached_records(other, tmp_path, models)
            assert all(x.equal(y) for x, y in zip(vars(first).values(), vars(again).values()))
    assert asked == []  # no model is loaded
    monkeypatch.undo()
    monkeypatch.setattr(training, "_load", lambda name: asked.append(name) or (wide, tokenizer))
    assert len(cached_records(replace(recipe, prompts=12), tmp_path).prompt.unique()) == 12
    assert asked == ["somewhere/nobody"]


def test_recipes_and_cards_say_what_is_wrong(tmp_path, wide, tokenizer, recipe):
    with pytest.raises(ValueError, match="new_tokens must be a multiple of block_length, got 40 and 32"):
        FilterRecipe(new_tokens=40)
    with pytest.raises(ValueError, match="depth and new_tokens must be positive"):
        FilterRecipe(depth=0)
    with pytest.raises(ValueError, match="at least 10 prompts are needed to hold some out, got 9"):
        FilterRecipe(prompts=9)
    with pytest.raises(ValueError, match="no prompt of a task that begins with 'chess' is among those to learn from"):
        train_filter(replace(recipe, learn_from="chess"), tmp_path / "none", (wide, tokenizer))
    with pytest.raises(FileNotFoundError, match=r"holds no training\.json: train with `decodelab train tasks-learn2pd`"):
        filter_card(tmp_path)


def test_command_line_knows_the_recipe(monkeypatch, tmp_path):
    from decodelab.cli import _recipe
    from decodelab.training.learn2pd import train_confidence_filter

    recipe, train = _recipe("tasks-learn2pd", ["depth=1", "cuts=false"])
    assert (recipe, train) == (FilterRecipe(depth=1, cuts=False), train_confidence_filter)
    with pytest.raises(ValueError, match="recipe tasks-learn2pd has no setting 'tau'"):
        _recipe("tasks-learn2pd", ["tau=1.0"])
    done = []
    monkeypatch.setattr(training, "train_filter", lambda plan, folder: done.append((plan, folder)) or {"parameters": 40})
    monkeypatch.setattr(training, "filter_card", done.append)
    assert train(recipe, tmp_path) == {"parameters": 40}
    assert done == [(recipe, tmp_path), tmp_path]
