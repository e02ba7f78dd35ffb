"""The loop of searches: shared prefixes, budgets, streams of randomness, what is counted, interrupts; and the classics on it."""

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from toys import EOS, METHODS, character_tokenizer, random_prompts, small_model
from transformers import LogitsProcessor, LogitsProcessorList, MambaConfig, MambaForCausalLM, TextStreamer

from decodelab.core.capability import require_tree
from decodelab.core.partials import whole_searches
from decodelab.core.prefix_tree import PrefixTree
from decodelab.core.session import tree_trial
from decodelab.lab.bench import compare
from decodelab.sampling.base import Autoregressive
from decodelab.sampling.cntp import CNTP
from decodelab.search.base import Budget, Partial, Samples, SearchDecoder
from decodelab.search.classics import BeamSearch, BestOfN, BudgetForcing, ParticleFiltering, SelfConsistency, last_number, majority
from decodelab.search.deal import DeAL
from decodelab.search.first_finish import FirstFinish
from decodelab.search.scorers import Judge, RewardModel, reads

SAMPLING = {"do_sample": True, "top_k": 0}


@pytest.fixture(scope="module")
def prompt():
    return random_prompts(1, lengths=(7, 7), seed=3)[0]


def new_tokens(out):
    return [c.tolist() for c in out.continuations]


def counted(model):
    "Calls of the model, and positions that it was given, as its own hook sees them."
    require_tree(model, tree_trial)  # once a model: these calls do not count
    seen = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    return seen, hook


# the prefix tree


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_every_node_has_the_logits_of_its_path(kind, prompt):
    model = small_model(kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), PrefixTree(model) as tree:
        tree.grow_from(prompt)
        nodes = [0]
        for step in range(50):
            parent = nodes[int(torch.randint(len(nodes), (), generator=generator))]
            nodes.append(tree.add(parent, int(torch.randint(2, 90, (), generator=generator))))
            if step % 4 == 3:
                tree.logits(nodes[-3:])
        for drop in (False, True):
            if drop:
                tree.keep(nodes[20:23])
            for node in nodes[1:]:
                plain = model(torch.cat([prompt, torch.tensor([tree.tokens(node)])], 1)).logits[0, -1]
                assert torch.allclose(tree.logits([node])[0], plain, atol=2e-4)


def test_what_is_shared_is_computed_once(llama, prompt):
    seen, hook = counted(llama)
    with torch.no_grad(), PrefixTree(llama) as tree:
        tree.grow_from(prompt)
        a = tree.add(0, 20)
        assert tree.add(0, 20) == a
        leaves = [tree.add(tree.add(a, 30), 40 + i) for i in range(5)]
        tree.logits(leaves)
        tree.logits(leaves)
        assert seen == [7, 7]  # the prompt; two shared tokens and five of their own
        assert len(tree) == tree.peak == 7
        tree.keep(leaves[:1])
        assert len(tree) == 3
    hook.remove()


def test_forgotten_logits_are_made_again_in_the_same_slot(llama, prompt):
    with torch.no_grad(), PrefixTree(llama, memory=0) as tree:
        tree.grow_from(prompt)
        a = tree.add(tree.add(0, 20), 30)
        first = tree.logits([a]).clone()
        b = tree.add(a, 40)
        before = tree.logits([b]).clone()
        assert torch.allclose(tree.logits([a]), first, atol=1e-5)
        assert len(tree) == 3
        assert torch.allclose(tree.logits([b]), before, atol=1e-5)


def test_compiled_trees_give_the_same_text(llama, prompt):
    plain = BeamSearch(beams=3).generate(llama, prompt, max_new_tokens=6, do_sample=False)
    fast = BeamSearch(beams=3, compile=True).generate(llama, prompt, max_new_tokens=6, do_sample=False)
    assert new_tokens(fast) == new_tokens(plain)


# budgets


@pytest.mark.parametrize(
    ("budget", "key"), [({"tokens": 30}, "generated"), ({"forwards": 6}, "forwards"), ({"scorer_calls": 5}, "scorer_calls")]
)
def test_a_budget_is_never_exceeded(budget, key, llama, prompt):
    limit = next(iter(budget.values()))
    decoder = ParticleFiltering(n=4, step_tokens=3, scorer=reads("ids")(lambda texts: [0.5] * len(texts)), budget=Budget(**budget))
    torch.manual_seed(0)
    out = decoder.generate(llama, prompt, max_new_tokens=20, **SAMPLING)
    facts = out.stats.search[0]
    assert 0 < facts[key] <= limit
    assert facts["stopped"] == f"budget of {next(iter(budget))}"
    assert 0 < out.stats.new_tokens < 20


def test_seconds_stop_a_search(llama, prompt):
    out = BestOfN(n=2, budget=Budget(seconds=1e-9)).generate(llama, prompt, max_new_tokens=20, **SAMPLING)
    assert out.stats.search[0]["stopped"] == "budget of seconds"
    assert out.stats.new_tokens == 0


def test_budgets_are_checked():
    for name in ("tokens", "forwards", "scorer_calls", "seconds"):
        with pytest.raises(ValueError, match=f"Budget: {name} must be positive, or None"):
            Budget(**{name: 0})


@pytest.mark.parametrize(
    "decoder",
    [BestOfN(n=3), SelfConsistency(n=3), BeamSearch(beams=3), ParticleFiltering(n=3, step_tokens=4), BudgetForcing(waits=0)],
    ids=lambda d: type(d).__name__,
)
def test_counted_forwards_are_calls_of_the_model(decoder, llama, prompt):
    seen, hook = counted(llama)
    out = decoder.generate(llama, prompt, max_new_tokens=9, do_sample=type(decoder) is not BeamSearch)
    hook.remove()
    assert out.stats.target_forwards == len(seen) == out.stats.search[0]["forwards"]
    assert out.stats.target_tokens == sum(seen)


# streams


def test_one_sample_is_plain_sampling_and_more_samples_change_no_old_one(llama, prompt):
    torch.manual_seed(4)
    plain = Autoregressive().generate(llama, prompt, max_new_tokens=15, **SAMPLING).sequences[0, 7:].tolist()
    state = torch.get_rng_state()

    texts = {}
    for n in (1, 2, 5):
        kept = []

        @dataclass
        class Keep(Samples):
            "Keeps all samples."

            def choose(self, search, frontier, new, kept=kept):
                kept[:] = new
                return super().choose(search, frontier, new)

        torch.manual_seed(4)
        Keep(n=n).generate(llama, prompt, max_new_tokens=15, eos_token_id=None, **SAMPLING)
        texts[n] = [p.tokens for p in kept]
        assert torch.get_rng_state().equal(state) == (n == 1)  # one sample leaves the global source where plain sampling does
    assert texts[1] == [plain]
    assert texts[2] == texts[5][:2]
    assert len({tuple(t) for t in texts[5]}) == 5


def test_samples_have_the_models_distribution(prompt):
    model = small_model(vocab=11)
    ids = prompt % 9 + 2
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    drawn = Counter()

    @dataclass
    class First(Samples):
        "Counts first tokens."

        def choose(self, search, frontier, new):
            drawn.update(part.tokens[0] for part in new)
            return super().choose(search, frontier, new)

    torch.manual_seed(0)
    First(n=4000).generate(model, ids, max_new_tokens=1, **SAMPLING)
    expected = p * 4000
    statistic = sum((drawn[v] - float(e)) ** 2 / float(e) for v, e in enumerate(expected))
    assert statistic < 29.6  # chi-square, 10 degrees of freedom, 0.1 %


def test_streams_given_later_are_new_ones(llama, prompt):
    seeds = []

    @dataclass
    class Twice(SearchDecoder):
        "Asks for streams twice."

        def expand(self, search, frontier):
            seeds.extend(s.initial_seed() for s in search.streams(3) + search.streams(3) if s is not None)
            new = [frontier[0].fork()]
            search.grow(new)
            return new

    Twice().generate(llama, prompt, max_new_tokens=2, **SAMPLING)
    assert len(seeds) == len(set(seeds)) == 5


# the loop


def test_an_interrupt_returns_the_best_so_far(llama, prompt):
    @dataclass
    class Interrupted(BestOfN):
        "The user loses patience after five tokens."

        def expand(self, search, frontier):
            if len(frontier[0].tokens) == 5:
                raise KeyboardInterrupt
            return super().expand(search, frontier)

    out = Interrupted(n=2).generate(llama, prompt, max_new_tokens=20, **SAMPLING)
    assert out.stats.new_tokens == 5
    assert out.stats.search[0]["stopped"] == "interrupt"


def test_a_measurement_never_gets_a_text_that_was_cut(llama, prompt):
    @dataclass
    class Impatient(BestOfN):
        "The user loses patience after five tokens."

        def expand(self, search, frontier):
            if len(frontier[0].tokens) == 5:
                raise KeyboardInterrupt
            return super().expand(search, frontier)

    def method(ids):
        return Impatient(n=2).generate(llama, ids, max_new_tokens=20, **SAMPLING)

    for call in (lambda: compare({"search": method}, [prompt], repeats=1, warmup=0), lambda: compare({"search": method}, [prompt])):
        with pytest.raises(KeyboardInterrupt):
            call()
    with pytest.raises(KeyboardInterrupt), whole_searches():
        method(prompt)
    assert method(prompt).stats.new_tokens == 5  # outside, the best so far comes back again


def test_an_interrupt_before_anything_was_found_goes_through(llama, prompt):
    @dataclass
    class AtOnce(SearchDecoder):
        "Interrupted at once."

        def expand(self, search, frontier):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AtOnce().generate(llama, prompt, max_new_tokens=3, do_sample=False)


@dataclass
class Completes(SearchDecoder):
    "Stops after one token, and writes on to the end when the search is over."

    interrupted: bool = False  # the user loses patience after four tokens

    def expand(self, search, frontier):
        search.step(frontier)
        return frontier

    def stop(self, search, frontier):
        return bool(frontier[0].tokens)

    def complete(self, search, frontier):
        def impatient(partial):
            if self.interrupted and len(partial.tokens) == 4:
                raise KeyboardInterrupt
            return False

        search.grow(frontier, impatient)


@pytest.mark.parametrize(
    ("fields", "new", "why"),
    [
        ({}, 9, "done"),
        ({"budget": Budget(tokens=6)}, 6, "budget of tokens"),
        ({"budget": Budget(forwards=3)}, 3, "budget of forwards"),
        ({"budget": Budget(tokens=1)}, 1, "budget of tokens"),
        ({"interrupted": True}, 4, "interrupt"),
    ],
    ids=str,
)
def test_what_is_written_after_the_search_keeps_the_budget(fields, new, why, llama, prompt):
    plain = llama.generate(prompt, max_new_tokens=9, do_sample=False)[0, 7:].tolist()
    out = Completes(**fields).generate(llama, prompt, max_new_tokens=9, do_sample=False)
    assert new_tokens(out) == [plain[:new]]
    assert out.stats.search[0]["stopped"] == why


def test_nothing_is_written_after_a_spent_budget(llama, prompt):
    class Spends(Completes):
        def expand(self, search, frontier):
            super().expand(search, frontier)
            search.afford(tokens=99)

        def complete(self, search, frontier):
            raise AssertionError("the budget was spent before")

    out = Spends(budget=Budget(tokens=5)).generate(llama, prompt, max_new_tokens=9, do_sample=False)
    assert out.stats.search[0]["stopped"] == "budget of tokens"


def test_a_method_must_expand(llama, prompt):
    with pytest.raises(NotImplementedError, match=r"SearchDecoder must define expand\(search, frontier\)"):
        SearchDecoder().generate(llama, prompt, max_new_tokens=3, do_sample=False)


def test_what_is_certain_is_streamed_early(llama, prompt):
    class Watches(TextStreamer):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)
            self.parts = []

        def put(self, value):
            self.parts.append(value.flatten().tolist())

    streamer = Watches(character_tokenizer())
    out = BeamSearch(beams=2).generate(llama, prompt, max_new_tokens=30, do_sample=False, streamer=streamer)
    assert [t for part in streamer.parts[1:] for t in part] == new_tokens(out)[0]
    assert len(streamer.parts) > 3  # not all at the end


def test_the_trace_is_a_tree_of_all_that_was_tried(llama, prompt):
    out = BestOfN(n=3, trace=True).generate(llama, prompt, max_new_tokens=6, **SAMPLING)
    info = out.trace[0].info["tree"]
    assert [info["tokens"][n] for n in info["path"]] == new_tokens(out)[0]
    assert all(parent < node for node, parent in enumerate(info["parents"][1:], start=1))
    assert len(info["values"]) == 3
    shown = out.trace._repr_html_()
    assert shown.count("[") == 3
    assert "18 tokens generated" in shown


def test_processors_see_every_candidate_with_its_own_text(llama, prompt):
    class Never(LogitsProcessor):
        "No token twice in a row."

        def __call__(self, ids, scores):
            return scores.scatter(1, ids[:, -1:], -torch.inf)

    out = BeamSearch(beams=4).generate(llama, prompt, max_new_tokens=20, do_sample=False, logits_processor=LogitsProcessorList([Never()]))
    text = new_tokens(out)[0]
    assert all(a != b for a, b in zip(text, text[1:]))


def test_partials_of_different_lengths_are_processed_together(llama, prompt):
    found = []

    @dataclass
    class Uneven(SearchDecoder):
        "Two partial outputs of different lengths in one forward pass."

        def expand(self, search, frontier):
            a, b = Partial(), Partial()
            search.append(a, 20)
            for token in (21, 22, 23):
                search.append(b, token)
            found.append((search.scores([a, b]), search.scores([a])[0], search.scores([b])[0]))
            a.end = "eos"
            return [a]

    Uneven().generate(llama, prompt, max_new_tokens=5, do_sample=False, repetition_penalty=1.7)
    both, first, second = found[0]
    assert both[0].equal(first)
    assert both[1].equal(second)


# the classics


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beam_search_is_transformers_beam_search(beams, penalty, llama):
    for ids in random_prompts(6, seed=beams):
        more = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": [EOS, 40, 41]}
        theirs = llama.generate(ids, num_beams=beams, length_penalty=penalty, **more)
        assert BeamSearch(beams=beams, length_penalty=penalty).generate(llama, ids, **more).sequences.equal(theirs)


def test_a_wide_beam_finds_the_most_probable_text():
    model = small_model(vocab=6)
    ids = torch.tensor([[2, 3]])
    best = (-math.inf, ())
    with torch.no_grad():
        for i in range(6**3):
            text = (i // 36, i // 6 % 6, i % 6)
            logits = model(torch.cat([ids, torch.tensor([text])], 1)).logits[0, 1:-1].log_softmax(-1)
            best = max(best, (float(logits.gather(1, torch.tensor(text)[:, None]).sum()), text))
    out = BeamSearch(beams=36, length_penalty=0.0).generate(model, ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tuple(new_tokens(out)[0]) == best[1]


def test_best_of_n_takes_the_best(llama, prompt):
    scored = []

    @reads("ids")
    def scorer(texts):
        scored.extend(sum(text) for text in texts)
        return [sum(text) for text in texts]

    torch.manual_seed(0)
    out = BestOfN(n=6, scorer=scorer).generate(llama, prompt, max_new_tokens=5, eos_token_id=None, **SAMPLING)
    assert len(scored) == 6
    assert sum(new_tokens(out)[0]) == max(scored)


def test_a_majority_vote_reads_answers():
    assert [last_number(t) for t in ("a 3, then -4.5", "1,000", "-", "x2")] == ["-4.5", "1000", None, "2"]
    assert majority([None, "b", "a", "b"]) == 1
    assert majority(["a", "b"]) == 0
    assert majority([None]) == 0


def test_self_consistency_votes_on_what_it_reads(llama, prompt):
    read = []
    decoder = SelfConsistency(n=7, read=lambda text: read.append(text[0] % 3) or text[0] % 3)
    torch.manual_seed(0)
    out = decoder.generate(llama, prompt, max_new_tokens=4, eos_token_id=None, **SAMPLING)
    assert len(read) == 7
    top = Counter(read).most_common()
    assert Counter(read)[new_tokens(out)[0][0] % 3] == top[0][1]


def test_particles_follow_the_weights():
    "Two kinds of first tokens with rewards 0.8 and 0.2: after one step the kinds stand 16 : 1 (ratio of the odds)."
    model = small_model(vocab=11)
    share = []

    @dataclass
    class Watched(ParticleFiltering):
        "Notes the kinds before and after resampling."

        def choose(self, search, frontier, new):
            before = sum(p.tokens[0] % 2 for p in new) / len(new)
            kept = super().choose(search, frontier, new)
            share.append((before, sum(p.tokens[0] % 2 for p in kept) / len(kept)))
            raise KeyboardInterrupt

    scorer = reads("ids")(lambda texts: [0.8 if t[0] % 2 else 0.2 for t in texts])
    torch.manual_seed(0)
    Watched(n=4000, step_tokens=1, scorer=scorer).generate(model, torch.tensor([[3, 4]]), max_new_tokens=3, eos_token_id=None, **SAMPLING)
    before, after = share[0]
    expected = 16 * before / (16 * before + 1 - before)
    assert abs(after - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_finished_particles_are_kept(llama, prompt):
    decoder = ParticleFiltering(n=5, step_tokens=2, max_steps=3)
    torch.manual_seed(0)
    out = decoder.generate(llama, prompt, max_new_tokens=20, eos_token_id=None, **SAMPLING)
    assert out.stats.new_tokens == 6  # three steps of two tokens
    assert out.stats.search[0]["finished"] == 5


def test_budget_forcing_puts_the_wait_in_place_of_the_answer(llama, prompt):
    tokenizer = character_tokenizer()
    plain = llama.generate(prompt, max_new_tokens=30, do_sample=False)[0, 7:].tolist()
    stop = tokenizer.decode([plain[4]])
    at = tokenizer.decode(plain).index(stop)
    wait = tokenizer.decode([50, 51])
    decoder = BudgetForcing(waits=1, tokenizer=tokenizer, stop_text=stop, wait_text=wait, reserve=2)
    text = new_tokens(decoder.generate(llama, prompt, max_new_tokens=30, do_sample=False))[0]
    assert text[:at] == plain[:at]
    assert text[at : at + 2] == [50, 51]
    forced = llama.generate(torch.cat([prompt, torch.tensor([text[: at + 2]])], 1), max_new_tokens=30 - at - 2, do_sample=False)
    assert text == forced[0, 7:].tolist()
    ended = BudgetForcing(waits=2, tokenizer=tokenizer, stop_text="no such text", wait_text=wait, reserve=2)
    text = new_tokens(ended.generate(llama, prompt, max_new_tokens=30, do_sample=False, eos_token_id=plain[4]))[0]
    assert text[plain.index(plain[4])] == 50  # an end of sequence is taken back, too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Samples(n=0), "n must be at least 1, got 0"),
        (lambda: BeamSearch(beams=0), "beams must be at least 1, got 0"),
        (lambda: ParticleFiltering(step_tokens=0), "step_tokens and max_steps must be at least 1"),
        (lambda: ParticleFiltering(tau=0.0), "tau positive and finite, got .* 0.0"),
        (lambda: ParticleFiltering(tau=math.inf), "tau positive and finite, got .* inf"),
        (lambda: ParticleFiltering(tau=math.nan), "tau positive and finite, got .* nan"),
        (lambda: ParticleFiltering(delimiter=""), "an empty delimiter would end a step at every token"),
        (lambda: BeamSearch(length_penalty=math.nan), r"length_penalty must lie in \[-10, 10\], got nan"),
        (lambda: BeamSearch(length_penalty=400.0), r"length_penalty must lie in \[-10, 10\], got 400.0"),
        (lambda: BudgetForcing(), "pass tokenizer="),
        (lambda: BudgetForcing(waits=-1), "must not be negative"),
        (lambda: Judge(len), "pass tokenizer="),
        (lambda: reads("minds"), 'a scorer reads "text", "ids" or "pair"'),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NO_VALUES = {
    "None": (None, TypeError, "returned None for 2 texts: it must return a list with one number for each"),
    "a float": (0.5, TypeError, "returned 0.5 for 2 texts"),
    "a tensor without dimension": (torch.tensor(0.5), TypeError, r"returned a Tensor of shape \[\] for 2 texts"),
    "a matrix": (torch.zeros(2, 2), TypeError, r"returned a Tensor of shape \[2, 2\] for 2 texts"),
    "a dictionary": ({"good": 1.0, "bad": 0.0}, TypeError, "returned {'good': 1.0, 'bad': 0.0} for 2 texts"),
    "a set": ({1.0, 2.0}, TypeError, "returned {1.0, 2.0} for 2 texts"),
    "a text": ("12", TypeError, "returned '12' for 2 texts"),
    "texts": (["1", "2"], TypeError, r"returned \['1', '2'\] for 2 texts"),
    "a value and None": ([1.0, None], TypeError, r"returned \[1.0, None\] for 2 texts"),
    "too few": ([1.0], ValueError, "returned 1 values for 2 texts: it must return one number for each"),
    "too many": ([1.0, 2.0, 3.0], ValueError, "returned 3 values for 2 texts"),
}


@pytest.mark.parametrize("name", list(NO_VALUES))
def test_what_a_scorer_must_not_return(name):
    returned, error, message = NO_VALUES[name]
    with pytest.raises(error, match=f"the scorer {message}"):
        Judge(reads("ids")(lambda texts: returned))(torch.tensor([1]), [[1], [2]])


def test_nan_counts_as_the_worst():
    with pytest.warns(UserWarning, match="the scorer returned NaN: such a text counts as the worst"):
        assert Judge(reads("ids")(lambda texts: [1.0, math.nan]))(torch.tensor([1]), [[1], [2]]) == [1.0, -math.inf]


def test_what_a_scorer_may_return():
    for returned in ((1, True), torch.tensor([1.0, 1.0]), np.ones(2), (v for v in (1, 1)), torch.ones(2, 1)):
        assert Judge(reads("ids")(lambda texts, found=returned: found))(torch.tensor([1]), [[1], [2]]) == [1.0, 1.0]
    assert Judge(reads("ids")(lambda texts: [math.inf, -math.inf]))(torch.tensor([1]), [[1], [2]]) == [math.inf, -math.inf]


SCORED = {name: m for name, m in METHODS.items() if m.family == "search" and "scorer" in m.decoder.__dataclass_fields__}


@pytest.mark.parametrize("name", list(SCORED))
def test_every_search_says_what_is_wrong_with_its_scorer(name, llama, prompt):
    assert len(SCORED) >= 7
    decoder = replace(SCORED[name].example(llama), scorer=reads("ids")(lambda texts: {tuple(t): 1.0 for t in texts}))
    rules = {"max_new_tokens": 5, "do_sample": SCORED[name].samples}
    with pytest.raises(TypeError, match="the scorer returned {.* for . texts: it must return a list with one number for each"):
        decoder.generate(llama, prompt, **rules)


@pytest.mark.parametrize("answer", [[1, 2], {"x": 1}, torch.tensor(3), ("x", [1])], ids=lambda a: type(a).__name__)
def test_answers_that_cannot_be_counted(answer, llama, prompt):
    decoder = SelfConsistency(n=2, read=lambda text: answer)
    with pytest.raises(TypeError, match="which cannot be counted: return a text, a number, a tuple of them, or None"):
        decoder.generate(llama, prompt, max_new_tokens=3, **SAMPLING)


@pytest.mark.parametrize("decoder", [BestOfN(n=2), BeamSearch(beams=2), CNTP(punctuation=[5])], ids=lambda d: type(d).__name__)
def test_a_recurrent_model_is_refused_in_the_words_of_a_search(decoder, prompt):
    shape = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=1)).eval()
    said = "MambaForCausalLM .*, so several continuations of one prompt cannot be written on one shared cache: use a token-by-token decoder"
    with pytest.raises(ValueError, match=said) as refused:
        decoder.generate(model, prompt, max_new_tokens=3, do_sample=type(decoder) is not BeamSearch)
    assert "draft" not in str(refused.value)


def test_a_scorer_must_be_callable():
    with pytest.raises(TypeError, match="a scorer is a callable on a list of texts, or the name of a reward model, got int"):
        Judge(3)


def test_reward_models(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(**shape, num_labels=1)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [("abc", "de"), ("a", "longer text than the other"), ("", "x")]
    by_name = RewardModel(str(tmp_path), batch_size=2)(pairs)
    alone = [RewardModel(model, tokenizer)([pair])[0] for pair in pairs]
    assert by_name == pytest.approx(alone, abs=1e-5)  # padding changes nothing
    judge = Judge(str(tmp_path), tokenizer)
    ids = tokenizer.encode("de", add_special_tokens=False)
    assert judge(torch.tensor(tokenizer.encode("abc", add_special_tokens=False)), [ids])[0] == pytest.approx(alone[0], abs=1e-5)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        RewardModel(model)
    two = BertForSequenceClassification(BertConfig(**shape, num_labels=2))
    with pytest.raises(ValueError, match="has 2 outputs: say which one is the value"):
        RewardModel(two, tokenizer)
    assert isinstance(RewardModel(two, tokenizer, label=1)([("a", "b")])[0], float)


def test_an_interrupt_ends_the_whole_call(llama, prompt):
    @dataclass
    class Once(BestOfN):
        "The user loses patience in the first row."

        def expand(self, search, frontier):
            if len(frontier[0].tokens) == 3:
                raise KeyboardInterrupt
            return super().expand(search, frontier)

    out = Once(n=2).generate(llama, prompt.repeat(3, 1), max_new_tokens=9, **SAMPLING)
    assert [len(row) for row in new_tokens(out)] == [3, 0, 0]
    assert len(out.stats.search) == 1


def test_one_forward_pass_gives_one_token(llama, prompt):
    for passes in (1, 2, 5):
        out = BestOfN(n=1, budget=Budget(forwards=passes)).generate(llama, prompt, max_new_tokens=12, do_sample=False)
        assert (out.stats.new_tokens, out.stats.target_forwards) == (passes, passes)


def test_rewards_of_particles_are_shares(llama, prompt):
    scorer = reads("ids")(lambda texts: [3.0] * len(texts))
    with pytest.raises(ValueError, match="must return numbers from 0 to 1"):
        ParticleFiltering(n=2, step_tokens=2, scorer=scorer).generate(llama, prompt, max_new_tokens=6, **SAMPLING)


def test_a_reserve_must_leave_something(llama, prompt):
    decoder = BudgetForcing(waits=1, tokenizer=character_tokenizer(), reserve=30)
    with pytest.raises(ValueError, match="set reserve below max_new_tokens"):
        decoder.generate(llama, prompt, max_new_tokens=30, do_sample=False)


def test_samples_without_sampling_warn(llama, prompt):
    with pytest.warns(UserWarning, match="all 3 samples of BestOfN are the greedy text"):
        BestOfN(n=3).generate(llama, prompt, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BestOfN(budget=100), "budget must be an object of the class Budget or none, got 100"),
        (lambda: FirstFinish(valid=3), "valid must be a function or none, got 3"),
    ],
)
def test_what_only_code_can_give_is_named(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_a_budget_that_ends_all_samples_leaves_the_best_of_them(llama, prompt):
    judged = []

    @reads("ids")
    def by_sum(texts):
        judged.extend(texts)
        return [float(sum(tokens)) for tokens in texts]

    for budget, n in ((Budget(tokens=20), 4), (Budget(tokens=20, scorer_calls=3), 3), (Budget(tokens=20, scorer_calls=1), 1)):
        judged.clear()
        out = BestOfN(n=4, scorer=by_sum, budget=budget).generate(llama, prompt, max_new_tokens=30, min_new_tokens=30, **SAMPLING)
        assert (len(judged), out.stats.search[0]["scorer_calls"], out.stats.search[0]["generated"]) == (n, n, 20)
        assert new_tokens(out)[0] == max(map(list, judged), key=sum)


def test_tokens_per_forward_of_a_search_counts_all_its_forwards(llama, prompt):
    out = BestOfN(n=4, budget=Budget(tokens=20)).generate(llama, prompt, max_new_tokens=30, min_new_tokens=30, **SAMPLING)
    assert (out.stats.new_tokens, out.stats.target_forwards, out.stats.tokens_per_forward) == (5, 5, 1.0)
    out = DeAL(lambda texts: [0.0] * len(texts), character_tokenizer(), k=2, lookahead=3).generate(
        llama, prompt, max_new_tokens=5, do_sample=False
    )
    assert out.stats.target_forwards >= 2 * out.stats.new_tokens
    assert out.stats.tokens_per_forward == out.stats.new_tokens / out.stats.target_forwards <= 0.5


def test_a_budget_that_suffices_for_no_token_says_so(llama, prompt):
    decoder = DeAL(lambda texts: [0.0] * len(texts), character_tokenizer(), k=2, lookahead=3, budget=Budget(forwards=1))
    with pytest.warns(UserWarning, match="the budget of forwards was spent before DeAL had chosen a token: allow more"):
        out = decoder.generate(llama, prompt, max_new_tokens=5, do_sample=False)
    assert out.stats.new_tokens == 0
