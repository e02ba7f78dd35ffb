"""Acceptance rules and drafters: exact distributions by enumeration and by sampling, limits, and negative controls that the same tests reject."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SAMPLING_RULES, TOY_PROMPT, V, added, exact_probs, fit, left_pad, plain, random_prompts, sample_counts, small_model

from decodelab.core.tree import Tree, trie
from decodelab.core.warp import draw
from decodelab.lab.cost import expected_tokens
from decodelab.sampling.base import Autoregressive
from decodelab.speculative import acceptance
from decodelab.speculative.acceptance import (
    KSeq,
    RecursiveRejection,
    SampleAndMatch,
    TypicalAcceptance,
    exact_rejection,
    kseq_acceptance,
    residual,
)
from decodelab.speculative.base import Draft, SpeculativeDecoder
from decodelab.speculative.drafters import DraftModel, NGram, PromptLookup
from decodelab.speculative.model_drafter import ModelDrafter, check_drafter, processed_scores

# acceptance at one node


def dirichlet(n, vocab, seed=0, power=2.0):
    "`n` random distributions [n, vocab], some of them peaked, none with an empty token."
    p = torch.rand(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.double) ** power + 1e-6
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("replacement", [True, False])
def test_recursive_rejection_is_exact_by_enumeration(replacement):
    for p, q in zip(dirichlet(60, 4, 1), dirichlet(60, 4, 2, 3.0)):
        rates = []
        for k in range(5):
            probs, rate = exact_rejection(p, q, k, replacement)
            assert float((probs - p).abs().max()) < 1e-12
            rates.append(rate)
        assert all(b >= a - 1e-12 for a, b in zip(rates, rates[1:]))
        assert rates[1] == pytest.approx(float(torch.minimum(p, q).sum()))
        if not replacement:
            assert rates[4] == pytest.approx(1.0, abs=1e-12)  # every token was offered


def test_without_replacement_accepts_at_least_as_much():
    for p, q in zip(dirichlet(100, 5, 3), dirichlet(100, 5, 4)):
        for k in (2, 3):
            assert exact_rejection(p, q, k)[1] >= exact_rejection(p, q, k, True)[1] - 1e-12


KNOWN = [  # p (target), q (drafter), acceptance of k = 1, 2, 3 without / with replacement / K-SEQ, from the literature's definitions
    ((0.2, 0.3, 0.5), (0.6, 0.3, 0.1), (0.6, 0.7, 1.0), (0.6, 0.64, 0.676), (0.6, 0.658443, 0.710003)),
    ((0.1, 0.2, 0.3, 0.4), (0.5, 0.2, 0.2, 0.1), (0.6, 0.78, 0.853333), (0.6, 0.72, 0.768), (0.6, 0.75, 0.793950)),
]


@pytest.mark.parametrize(("p", "q", "without", "with_", "kseq"), KNOWN)
def test_known_acceptance(p, q, without, with_, kseq):
    p, q = torch.tensor(p, dtype=torch.double), torch.tensor(q, dtype=torch.double)
    for k in (1, 2, 3):
        assert exact_rejection(p, q, k)[1] == pytest.approx(without[k - 1], abs=1e-6)
        assert exact_rejection(p, q, k, True)[1] == pytest.approx(with_[k - 1], abs=1e-6)
        assert kseq_acceptance(p, q, k)[0] == pytest.approx(kseq[k - 1], abs=1e-6)
    assert kseq_acceptance(torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.6, 0.3, 0.1]).double(), 2)[1] == pytest.approx(
        1.584429, abs=1e-5
    )


def drawn_tokens(q, k, rows, replacement):
    return q.expand(rows, -1).multinomial(k, replacement=replacement)


RULES = {
    "one draft token": (RecursiveRejection(), 1, True),
    "without replacement": (RecursiveRejection(), 3, False),
    "with replacement": (RecursiveRejection(replacement=True), 3, True),
    "k-seq": (KSeq(), 3, True),
    "one draft token, k-seq": (KSeq(), 1, True),
}


def emitted(rule, p, q, k, replacement, rows=60_000):
    torch.manual_seed(5)
    tokens, which = rule(p.expand(rows, -1), drawn_tokens(q, k, rows, replacement), q.expand(rows, -1))
    return torch.bincount(tokens, minlength=len(p)).tolist(), which


@pytest.mark.parametrize("name", list(RULES))
def test_the_rules_emit_the_target_distribution(name):
    rule, k, replacement = RULES[name]
    for seed in range(3):
        p, q = dirichlet(1, 5, seed)[0].float(), dirichlet(1, 5, seed + 50)[0].float()
        counts, which = emitted(rule, p, q, k, replacement)
        assert fit({(i,): c for i, c in enumerate(counts)}, {(i,): float(x) for i, x in enumerate(p)}) > 1e-3
        exact = kseq_acceptance(p.double(), q.double(), k)[0] if isinstance(rule, KSeq) else exact_rejection(p, q, k, replacement)[1]
        assert float((which >= 0).float().mean()) == pytest.approx(exact, abs=0.01)


def test_fixed_draft_tokens_are_matched_exactly():
    torch.manual_seed(6)
    p = dirichlet(1, 5, 7)[0].float()
    drafted = torch.tensor([3, 1, -1]).expand(60_000, 3)
    tokens, which = SampleAndMatch()(p.expand(60_000, -1), drafted, None)
    assert fit({(i,): int((tokens == i).sum()) for i in range(5)}, {(i,): float(x) for i, x in enumerate(p)}) > 1e-3
    assert float((which >= 0).float().mean()) == pytest.approx(float(p[3] + p[1]), abs=0.01)
    assert bool((tokens[which == 0] == 3).all() and (tokens[which == 1] == 1).all() and (which < 2).all())


@pytest.mark.parametrize("rule", [RecursiveRejection(), KSeq(), SampleAndMatch(), TypicalAcceptance()])
def test_a_node_without_draft_tokens_is_plain_sampling(rule):
    torch.manual_seed(7)
    p = torch.tensor([0.5, 0.3, 0.2])
    tokens, which = rule(p.expand(20_000, -1), torch.empty(20_000, 0, dtype=torch.long), None)
    assert bool((which == -1).all())
    if not isinstance(rule, TypicalAcceptance):
        assert fit({(i,): int((tokens == i).sum()) for i in range(3)}, {(i,): float(x) for i, x in enumerate(p)}) > 1e-3


# negative controls: broken rules


def not_renormalised(p, q):
    return (p - q).clamp_min(0)  # draw() scales by itself, but the next test compares a distribution that sums to less than 1


def target_instead(p, q):
    return p


class SameOrderTwice(RecursiveRejection):
    "Draft tokens drawn without replacement, tested as if they had been drawn independently."

    def __call__(self, p, drafted, q):
        return RecursiveRejection(replacement=True)(p, drafted, q)


class Reversed(RecursiveRejection):
    def __call__(self, p, drafted, q):
        tokens, which = super().__call__(p, drafted.flip(1), q)
        return tokens, torch.where(which >= 0, drafted.shape[1] - 1 - which, which)


P, Q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.55, 0.25, 0.15, 0.05])


def p_value(rule, replacement=False, k=3):
    counts, _ = emitted(rule, P, Q, k, replacement)
    return fit({(i,): c for i, c in enumerate(counts)}, {(i,): float(x) for i, x in enumerate(P)})


def test_the_pair_of_distributions_passes_with_the_honest_rule():
    assert p_value(RecursiveRejection()) > 1e-3


@pytest.mark.parametrize("rule", [SameOrderTwice(), Reversed()], ids=["as if independent", "reversed order"])
def test_broken_rules_are_rejected(rule):
    assert p_value(rule) < 1e-9


@pytest.mark.parametrize("broken", [not_renormalised, target_instead])
def test_broken_residuals_are_rejected(broken, monkeypatch):
    monkeypatch.setattr(acceptance, "residual", broken)
    assert p_value(RecursiveRejection()) < 1e-9


def test_the_best_draft_token_with_a_soft_q_is_rejected():
    torch.manual_seed(8)
    tokens, _ = RecursiveRejection()(P.expand(20_000, -1), Q.argmax().expand(20_000, 1), Q.expand(20_000, -1))
    assert fit({(i,): int((tokens == i).sum()) for i in range(4)}, {(i,): float(x) for i, x in enumerate(P)}) < 1e-9


def test_residual_of_equal_distributions():
    assert residual(P, P).equal(P)


# drafters on a model: the joint distribution


@pytest.fixture(scope="module")
def toy_drafter():
    model = small_model(vocab=V, hidden=16, spread=0.5, seed=31)
    torch.manual_seed(5)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.35)
    return model


@dataclass
class Siblings(ModelDrafter):
    "A draft model draws `width` siblings at the root and one more below each, in one of two ways; for rows that all stand alike."

    width: int = 2
    replacement: bool = False
    probs_before_processors: bool = False

    @property
    def rule(self):
        return RecursiveRejection(self.replacement)

    def draft(self, call, roots):
        raw = raw_root = call.state.open(roots)
        first = torch.softmax(processed_scores(call, raw, roots[:, None][:, :0]), -1)
        tokens = first.multinomial(self.width, replacement=self.replacement)
        raw = call.state.grow(tokens, [0] * self.width)
        second = torch.stack([torch.softmax(processed_scores(call, raw[:, i], tokens[:, i : i + 1]), -1) for i in range(self.width)], 1)
        below = draw(second)
        tree = Tree([-1, *[0] * self.width, *range(1, self.width + 1)])
        told = torch.softmax(raw_root.float(), -1) if self.probs_before_processors else first
        probs = torch.cat([told[:, None], second, torch.zeros_like(second)], 1)
        return Draft(torch.cat([roots[:, None], tokens, below], 1), tree, probs)


@pytest.mark.parametrize("rule", list(SAMPLING_RULES))
def test_joint_distribution_of_a_drafted_chain(rule, toy, toy_drafter):
    torch.manual_seed(0)
    asked, processors = SAMPLING_RULES[rule]
    assert fit(sample_counts(DraftModel(toy_drafter, gamma=3), toy, 20_000, **asked), exact_probs(toy, processors)) > 1e-3


@pytest.mark.parametrize("rule", ["plain", "penalty", "top_p"])
@pytest.mark.parametrize("replacement", [True, False])
def test_joint_distribution_of_a_drafted_tree(rule, replacement, toy, toy_drafter):
    torch.manual_seed(0)
    asked, processors = SAMPLING_RULES[rule]
    width = 2 if rule == "top_p" else 3  # siblings without replacement need as many possible tokens
    decoder = Siblings(toy_drafter, width=1 if rule == "top_p" and not replacement else width, replacement=replacement)
    assert fit(sample_counts(decoder, toy, 20_000, **asked), exact_probs(toy, processors)) > 1e-3


def test_q_taken_before_the_processors_is_rejected(toy, toy_drafter):
    torch.manual_seed(0)
    asked, processors = SAMPLING_RULES["penalty"]
    probs = exact_probs(toy, processors)
    assert fit(sample_counts(Siblings(toy_drafter, width=1), toy, 12_000, **asked), probs) > 1e-3
    control = Siblings(toy_drafter, width=1, probs_before_processors=True)
    assert fit(sample_counts(control, toy, 12_000, **asked), probs) < 1e-9


def test_typical_acceptance_is_not_lossless_and_says_so(toy, toy_drafter):
    torch.manual_seed(0)
    lossy = DraftModel(toy_drafter, gamma=3, lossy=TypicalAcceptance(0.05, 0.2))
    assert fit(sample_counts(lossy, toy, 12_000), exact_probs(toy, [])) < 1e-9


def test_typical_acceptance_is_greedy_without_sampling(llama):
    for prompt in random_prompts(5, seed=3):
        out = DraftModel(llama, gamma=3, lossy=TypicalAcceptance()).generate(llama, prompt, max_new_tokens=12, do_sample=False)
        assert added(out)[0] == plain(llama, prompt, 12)


def test_typical_walk_takes_the_longest_path(toy):
    "With epsilon 0 every draft token of positive probability stays, so the longest branch of any tree is taken."

    @dataclass
    class Fixed(SpeculativeDecoder):
        def draft(self, call, roots):
            return Draft(torch.cat([roots[:, None], torch.tensor([[1, 2, 3, 4, 5]]).expand(len(roots), -1)], 1), Tree([-1, 0, 0, 2, 3, 1]))

    out = Fixed(lossy=TypicalAcceptance(0.0, 0.0)).generate(toy, TOY_PROMPT, max_new_tokens=9, do_sample=True, top_k=0, eos_token_id=99)
    assert out.stats.emitted == [[4, 4, 1]]
    assert out.sequences[0, 4:7].tolist() == [2, 3, 4]


# limits


def test_the_target_as_its_own_drafter(llama):
    prompt = random_prompts(1, lengths=(6, 6), seed=3)[0]
    for gamma in (1, 3, 5):
        for sample in (False, True):
            torch.manual_seed(1)
            out = DraftModel(llama, gamma=gamma).generate(llama, prompt, max_new_tokens=12, do_sample=sample, top_k=0)
            assert all(n == gamma + 1 for n in out.stats.emitted[0][:-1])


def test_gamma_zero_is_plain_decoding(llama, gpt2):
    prompt = random_prompts(1, lengths=(6, 6), seed=4)[0]
    out = DraftModel(llama, gamma=0).generate(llama, prompt, max_new_tokens=8, do_sample=False)
    assert out.stats.emitted == [[1] * 8]
    assert added(out)[0] == added(Autoregressive().generate(llama, prompt, max_new_tokens=8, do_sample=False))[0]


def test_measured_acceptance_is_the_overlap(toy, toy_drafter):
    torch.manual_seed(3)
    ids = TOY_PROMPT.expand(20_000, -1)
    out = DraftModel(toy_drafter, gamma=1).generate(toy, ids, max_new_tokens=2, do_sample=True, top_k=0, eos_token_id=99)
    with torch.no_grad():
        p, q = (m(TOY_PROMPT).logits[0, -1].softmax(-1) for m in (toy, toy_drafter))
    beta = float(torch.minimum(p, q).sum())
    share = sum(row[0] == 2 for row in out.stats.emitted) / 20_000
    assert share == pytest.approx(beta, abs=3 * (beta * (1 - beta) / 20_000) ** 0.5)


@pytest.mark.parametrize(("gamma", "tokens"), [(2, 2.44), (4, 3.3616), (7, 4.1611)])
def test_expected_tokens(gamma, tokens):
    assert expected_tokens(0.8, gamma) == pytest.approx(tokens, abs=5e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 99), gamma=st.integers(1, 5), sample=st.booleans())
def test_the_books_of_a_draft_model(seed, gamma, sample, llama):
    "Drafted = emitted + discarded - verifications, whatever happens."
    prompts = random_prompts(3, seed=seed)
    torch.manual_seed(seed)
    out = DraftModel(small_model("llama", seed=seed % 5), gamma=gamma).generate(
        llama, **left_pad(prompts), max_new_tokens=11, do_sample=sample, top_k=0, eos_token_id=99
    )
    assert all(1 <= n <= gamma + 1 for row in out.stats.emitted for n in row)
    assert [sum(row) for row in out.stats.emitted] == [11] * 3
    assert out.stats.draft_forwards >= out.stats.target_forwards - 1


# tries


@given(texts=st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8), limit=st.integers(1, 12))
def test_a_trie_holds_its_texts(texts, limit):
    tokens, parents, positions = trie(9, texts, limit)
    assert len(tokens) == len(parents) <= max(limit, 1)
    below = {}
    for node, parent in enumerate(parents[1:], start=1):
        assert 0 <= parent < node
        assert (parent, tokens[node]) not in below  # siblings differ
        below[parent, tokens[node]] = node
    for text, place in zip(texts, positions):
        assert [tokens[n] for n in place] == text[: len(place)]
    whole, _, all_positions = trie(9, texts)
    assert [[whole[n] for n in place] for place in all_positions] == texts
    assert len(whole) == 1 + len({tuple(t[:n]) for t in texts for n in range(1, len(t) + 1)})


# what is refused


def test_drafters_are_checked(llama):
    other = small_model(vocab=50)
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, the target one of 97: use a drafter with the target's tokenizer"):
        check_drafter(other, llama)
    strange = small_model()
    strange.generation_config.eos_token_id = 5
    with pytest.raises(ValueError, match=r"ends a text with token \[5\], the target with \[1\]: their tokenizers differ"):
        DraftModel(strange).generate(llama, torch.tensor([[4, 5]]), max_new_tokens=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DraftModel(None, gamma=-1), "gamma must be at least 0, or .auto., got -1"),
        (lambda: PromptLookup(w_max=0), "w_max must be at least 1, got 0"),
        (lambda: NGram(gamma=0), "gamma must be at least 1, or .auto., got 0"),
        (lambda: TypicalAcceptance(epsilon=2), "epsilon and delta must lie in"),
    ],
)
def test_hyper_parameters_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_drafter_is_left_as_it_was(llama):
    drafter = small_model(seed=3).train()
    before = drafter.generation_config.to_dict()
    DraftModel(drafter).generate(llama, torch.tensor([[4, 5]]), max_new_tokens=5, do_sample=True)
    assert drafter.training
    assert all(m.training for m in drafter.modules())
    assert drafter.generation_config.to_dict() == before


# rules that several rows share: each row has its own draft tokens, distributions and end


def test_rows_with_different_numbers_of_draft_tokens():
    torch.manual_seed(9)
    p = dirichlet(3, 4, 11).float().repeat(20_000, 1)
    q = dirichlet(3, 4, 12).float().repeat(20_000, 1)
    drafted = q.multinomial(2, replacement=False)
    drafted[::3] = -1
    drafted[1::3, 1] = -1
    tokens, which = RecursiveRejection()(p, drafted, q)
    assert bool((which[::3] == -1).all() and (which[1::3] < 1).all())
    for row in range(3):
        probs = {(i,): float(x) for i, x in enumerate(p[row])}
        assert fit({(i,): int((tokens[row::3] == i).sum()) for i in range(4)}, probs) > 1e-3
