"""Cautious next token prediction: how many trials, what they cost, which one is taken, and the limits at which it is sampling or greedy search."""

import math
from collections import Counter

import pytest
import torch
from toys import EOS, character_tokenizer, random_prompts, small_model

from decodelab.core.capability import require_tree
from decodelab.core.session import tree_trial
from decodelab.core.warp import draw
from decodelab.sampling.base import Autoregressive
from decodelab.sampling.cntp import CNTP, PUNCTUATION, punctuation_test, trials

SAMPLING = {"do_sample": True, "top_k": 0}
MARKS = list(range(7, 97, 9))


@pytest.fixture(scope="module")
def prompt():
    return random_prompts(1, lengths=(7, 7), seed=3)[0]


def text_of(out):
    return out.continuations[0].tolist()


# trials from entropy


@pytest.mark.parametrize(
    ("how", "expected"),
    [("code", [1, 1, 1, 2, 3, 6, 10, 10]), ("paper", [1, 1, 1, 1, 2, 6, 10, 10])],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_trials_of_the_paper_and_of_its_code(how, expected):
    assert [trials(h, how=how) for h in (0, 0.01, 0.1, 0.1756, 0.43, 0.92, 1.5, 3)] == expected


def test_first_entropies_with_two_trials():
    for how, first in (("code", 0.01 + 1.49 / 9), ("paper", 0.01 + 2 * 1.49 / 10)):
        assert trials(first - 1e-9, how=how) == 1
        assert trials(first + 1e-9, how=how) == 2


def test_trials_never_fall_with_entropy_and_the_controls_do_what_they_say():
    values = [trials(h / 100) for h in range(300)]
    assert values == sorted(values)
    assert {trials(h / 100, how="fixed") for h in range(300)} == {10}
    inverse = [trials(h / 100, how="inverse") for h in range(300)]
    assert inverse == sorted(inverse, reverse=True)
    assert (inverse[0], inverse[-1]) == (10, 1)


# limits


@pytest.mark.parametrize(
    "settings",
    [{"n_max": 1}, {"h_low": math.log(97), "h_high": 9.0, "punctuation": MARKS}, {"h_high": math.inf, "punctuation": MARKS}],
    ids=["one trial", "never unsure", "never unsure enough"],
)
def test_without_trials_it_is_sampling(settings, llama, prompt):
    for seed in range(3):
        torch.manual_seed(seed)
        plain = Autoregressive().generate(llama, prompt, max_new_tokens=20, **SAMPLING).sequences
        torch.manual_seed(seed)
        assert CNTP(**settings).generate(llama, prompt, max_new_tokens=20, **SAMPLING).sequences.equal(plain)


def test_without_sampling_it_is_greedy_search(llama, prompt):
    plain = llama.generate(prompt, max_new_tokens=20, do_sample=False)
    assert CNTP().generate(llama, prompt, max_new_tokens=20, do_sample=False).sequences.equal(plain)


def test_one_possible_token_is_greedy_search(llama, prompt):
    plain = llama.generate(prompt, max_new_tokens=20, do_sample=False)
    out = CNTP(punctuation=MARKS).generate(llama, prompt, max_new_tokens=20, do_sample=True, top_k=1)
    assert out.sequences.equal(plain)


# decisions


def test_distribution_of_one_decision():
    "All tokens are punctuation: a decision is the most probable of N draws."
    model = small_model(vocab=8, spread=0.2)
    ids, n, draws = torch.tensor([[3, 4]]), 3, 4000
    with torch.no_grad():
        p = model(ids).logits[0, -1].index_fill(0, torch.tensor([0, 1]), -torch.inf).softmax(-1)  # these two would have equal probabilities
    order = p.argsort(descending=True)
    tail = torch.cat([p[order].flip(0).cumsum(0).flip(0), torch.zeros(1)])
    expected = tail[:-1] ** n - tail[1:] ** n
    decoder = CNTP(n_max=n, how="fixed", punctuation=range(8))
    torch.manual_seed(0)
    out = decoder.generate(model, ids, max_new_tokens=1, num_return_sequences=draws, suppress_tokens=[0, 1], **SAMPLING)
    counts = Counter(c.item() for c in out.continuations)
    statistic = sum((counts[int(v)] - draws * float(q)) ** 2 / (draws * float(q)) for v, q in zip(order, expected) if draws * q > 5)
    assert sum(draws * q > 5 for q in expected) == 5
    assert statistic < 18.5  # chi-square, 4 degrees of freedom, 0.1 %


def test_it_is_the_minimal_version(llama, prompt):
    "The same streams, trial by trial without a cache."

    def minimal(seed, limit):
        torch.manual_seed(seed)
        copy = torch.Generator()
        copy.set_state(torch.get_rng_state())
        base, given = None, 1
        text = prompt
        while text.shape[1] < 7 + limit:
            p = llama(text).logits[0, -1].softmax(-1)
            n = trials(float(-(p * p.log()).sum()), 6, 0.01, 4.0)
            best = (math.inf, None)
            if n > 1 and base is None:
                now = torch.Generator()
                now.set_state(torch.get_rng_state())
                base = int(torch.randint(2**62, (), generator=now))
            streams = [None] if n == 1 else [torch.Generator().manual_seed(base + given + i) for i in range(n)]
            given += 0 if n == 1 else n
            for stream in streams:
                trial, logs = text, []
                while trial.shape[1] < 7 + limit:
                    q = llama(trial).logits[0, -1].softmax(-1)
                    token = draw(q[None], stream)
                    trial, logs = torch.cat([trial, token[None]], 1), [*logs, float(q[token].log())]
                    if n == 1 or int(token) in MARKS:
                        break
                best = min(best, (-sum(logs) / len(logs), trial), key=lambda pair: pair[0])
            text = best[1]
        return text

    for seed in range(3):
        with torch.no_grad():
            expected = minimal(seed, 16)
        torch.manual_seed(seed)
        out = CNTP(n_max=6, h_high=4.0, punctuation=MARKS).generate(llama, prompt, max_new_tokens=16, eos_token_id=None, **SAMPLING)
        assert out.sequences.equal(expected)


def test_the_trial_of_lowest_perplexity_is_taken_whole(llama, prompt):
    out = CNTP(punctuation=MARKS, trace=True).generate(llama, prompt, max_new_tokens=60, eos_token_id=None, **SAMPLING)
    text, at, step = text_of(out), 0, out.trace[0]
    assert out.stats.search[0]["decisions"]
    for decision in out.stats.search[0]["decisions"]:
        while step.roles[at] == "sampled":
            at += 1
        block = text[at : at + decision["tokens"]]
        at += decision["tokens"]
        assert not set(block[:-1]) & set(MARKS)
        assert block[-1] in MARKS or at == 60
        logits = llama(torch.cat([prompt, torch.tensor([text[:at]])], 1)).logits[0]
        p = logits.detach().log_softmax(-1)[7 + at - len(block) - 1 : 7 + at - 1].gather(1, torch.tensor(block)[:, None])
        assert math.exp(-p.mean()) == pytest.approx(min(decision["perplexities"]), rel=1e-3)
    assert set(step.roles) == {"sampled", "best trial"} or set(step.roles) == {"best trial"}


def test_an_end_in_the_best_trial_ends_the_text(llama, prompt):
    ends = list(range(20, 90))  # nearly every token
    out = CNTP(punctuation=MARKS).generate(llama, prompt, max_new_tokens=40, eos_token_id=ends, **SAMPLING)
    text = text_of(out)
    assert text[-1] in ends or len(text) == 40
    assert not set(text[:-1]) & set(ends)


def test_a_trial_can_be_cut(llama, prompt):
    out = CNTP(punctuation=[EOS], max_trial_len=3, how="fixed", n_max=2).generate(
        llama, prompt, max_new_tokens=12, eos_token_id=None, **SAMPLING
    )
    assert [d["tokens"] for d in out.stats.search[0]["decisions"]] == [3, 3, 3, 3]


def test_costs(llama, prompt):
    require_tree(llama, tree_trial)
    seen = []
    hook = llama.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    out = CNTP(punctuation=MARKS).generate(llama, prompt, max_new_tokens=30, eos_token_id=None, **SAMPLING)
    hook.remove()
    facts = out.stats.search[0]
    assert out.stats.target_forwards == len(seen) == facts["forwards"]
    assert out.stats.target_tokens == sum(seen)
    assert facts["generated"] / out.stats.new_tokens >= 1
    costs = []
    for h_low in (0.01, 2.0, 4.5):
        torch.manual_seed(0)
        decoder = CNTP(punctuation=MARKS, h_low=h_low, h_high=h_low + 2)
        costs.append(decoder.generate(llama, prompt, max_new_tokens=60, eos_token_id=None, **SAMPLING).stats.search[0]["generated"])
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_processors_change_entropy_and_perplexity(llama, prompt):
    out = CNTP(punctuation=MARKS, h_low=0.2, h_high=1.5).generate(
        llama, prompt, max_new_tokens=20, eos_token_id=None, do_sample=True, top_k=2
    )
    assert all(d["entropy"] <= math.log(2) + 1e-6 for d in out.stats.search[0]["decisions"])


# punctuation


def test_which_tokens_are_punctuation():
    tokenizer = character_tokenizer()
    by_id = punctuation_test(PUNCTUATION, tokenizer)
    by_text = punctuation_test(PUNCTUATION, tokenizer, "text")
    known = {tokenizer.decode([t]) for t in range(2, 97) if by_id(t)}
    assert known == set(".,?!:;)]}")  # the newline has no token of its own here
    assert all(by_id(t) == by_text(t) for t in range(2, 97))
    assert punctuation_test([5, 6])(5)
    assert not punctuation_test([5, 6])(7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNTP(n_max=0), "n_max and max_trial_len must be at least 1, got 0 and None"),
        (lambda: CNTP(max_trial_len=0), "got 10 and 0"),
        (lambda: CNTP(h_low=-math.inf), "h_low must be a finite number of nats, got -inf"),
        (lambda: CNTP(h_low=math.nan), "h_low must be a finite number of nats, got nan"),
        (lambda: CNTP(h_high=math.nan), "h_low must lie below h_high, got 0.01 and nan"),
        (lambda: CNTP(h_low=1.5), "h_low must lie below h_high, got 1.5 and 1.5"),
        (lambda: punctuation_test(".,"), "punctuation is given as characters: pass tokenizer="),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_characters_need_a_tokenizer(llama, prompt):
    with pytest.raises(ValueError, match="pass tokenizer="):
        CNTP().generate(llama, prompt, max_new_tokens=3, do_sample=True)
