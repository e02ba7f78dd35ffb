"""Ideal denoisers, exact distributions of the output, and the theory of parallel decoding: closed forms, brute force, negative controls."""

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from toys import left_pad

from decodelab.diffusion.base import LLaDA
from decodelab.diffusion.exact import ONE_BY_ONE, greedy_distribution, one_by_one_distribution, schedule_distribution
from decodelab.diffusion.fast_dllm import FastDLLM
from decodelab.diffusion.ideal import TIE_NOISE, UNKNOWN, Distribution, IdealDenoiser, coins, distinct_rows, latin_squares
from decodelab.diffusion.parallelbench import (
    best_schedules,
    closed_correlation,
    entropy,
    factor,
    greedy_run,
    sampled_accuracy,
    schedule_kl,
    schedule_loss,
    schedules,
    shuffle_loss,
    threshold,
    top_k,
    total_correlation,
)
from decodelab.experiments.diffusion.parallelbench import ReleasedFactor, harness
from decodelab.lab.tasks.ideal_lists import LIST_OPERATIONS, ListWorld, list_distribution

RANDOM_TASKS = ("shuffle", "insert_random", "remove_random", "replace_random")


@st.composite
def distributions(draw, tokens=3, most=4):
    "A distribution over some of the strings of 2 to `most` tokens."
    m = draw(st.integers(2, most))
    everything = list(product(range(tokens), repeat=m))
    chosen = draw(st.lists(st.sampled_from(everything), min_size=1, max_size=20, unique=True))
    weights = torch.tensor(draw(st.lists(st.integers(1, 50), min_size=len(chosen), max_size=len(chosen)))).double()
    return Distribution(torch.tensor(chosen), weights / weights.sum())


@st.composite
def distributions_and_schedules(draw):
    "A distribution, and an ordered partition of its positions."
    dist = draw(distributions())
    order = draw(st.permutations(range(dist.length)))
    cuts = [0, *[i for i in range(1, dist.length) if draw(st.booleans())], dist.length]
    return dist, [list(order[a:b]) for a, b in zip(cuts, cuts[1:])]


def as_dict(dist):
    "String -> probability, for computations that share no code with the package."
    return {tuple(s): float(p) for s, p in zip(dist.strings.tolist(), dist.p)}


def plain_marginals(table, visible, tokens):
    "p_j(v | visible) by adding up, [m][v]; None where nothing agrees."
    fits = {s: p for s, p in table.items() if all(v in (UNKNOWN, t) for v, t in zip(visible, s))}
    mass = sum(fits.values())
    return mass and [[sum(p for s, p in fits.items() if s[j] == v) / mass for v in range(tokens)] for j in range(len(visible))]


def plain_bits(table, positions):
    "Entropy of some positions by adding up."
    sums = {}
    for s, p in table.items():
        key = tuple(s[j] for j in positions)
        sums[key] = sums.get(key, 0.0) + p
    return -sum(p * math.log2(p) for p in sums.values())


# the dist and its marginals


@given(distributions(), st.data())
def test_marginals_are_sums_over_agreeing_strings(dist, data):
    rows = data.draw(
        st.lists(st.lists(st.sampled_from([UNKNOWN, 0, 1, 2]), min_size=dist.length, max_size=dist.length), min_size=1, max_size=4)
    )
    p, mass = dist.marginals(torch.tensor(rows))
    table = as_dict(dist)
    for row, mine, weight in zip(rows, p, mass):
        expected = plain_marginals(table, row, 3)
        if not expected:
            assert weight == 0
            known = [{s[j] for s in table} for j in range(dist.length)]
            expected = [[(v in k) / len(k) for v in range(3)] for k in known]
        assert mine.sum(-1).allclose(torch.ones(1, dtype=torch.double))
        assert mine.allclose(torch.tensor(expected, dtype=torch.double)[:, dist.alphabet], atol=1e-12)


@given(st.lists(st.lists(st.integers(-1, 50), min_size=3, max_size=3), min_size=1, max_size=8), st.sampled_from([1, 10**9]))
def test_distinct_rows_are_those_of_unique(rows, scale):
    rows = torch.tensor(rows)
    rows = torch.where(rows > 0, rows * scale, rows)
    found, which = distinct_rows(rows)
    assert found[which].equal(rows)
    assert len(found) == len(rows.unique(dim=0))


@pytest.mark.parametrize("operation", LIST_OPERATIONS)
def test_list_distributions_hold_the_right_answers(operation):
    items, word, index = (7, 4, 9, 5), 6, 2
    before, after = items[:index], items[index + 1 :]
    expected = {
        "copy": [items],
        "reverse": [items[::-1]],
        "sort": [(4, 5, 7, 9)],
        "shuffle": list(permutations(items)),
        "insert_index": [(*before, word, *items[index:])],
        "remove_index": [(*before, *after)],
        "replace_index": [(*before, word, *after)],
        "insert_random": [(*items[:i], word, *items[i:]) for i in range(5)],
        "remove_random": [(*items[:i], *items[i + 1 :]) for i in range(4)],
        "replace_random": [(*items[:i], word, *items[i + 1 :]) for i in range(4)],
    }[operation]
    dist = list_distribution(operation, items, word, index)
    assert as_dict(dist) == pytest.approx({s: 1 / len(expected) for s in expected})


def test_latin_squares_are_those_of_a_filter():
    rows = list(permutations(range(3)))
    right = {sum(square, ()) for square in product(rows, repeat=3) if all(len({row[c] for row in square}) == 3 for c in range(3))}
    assert {tuple(s) for s in latin_squares(3).strings.tolist()} == right
    assert len(latin_squares().strings) == 576


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distribution(torch.tensor([[0], [1]]), torch.tensor([0.5, 0.6])), "sum to 1"),
        (lambda: Distribution(torch.tensor([[0], [1]]), torch.tensor([1.5, -0.5])), "at least 0"),
        (lambda: Distribution.uniform([[0, 1], [0, 1]]), "different from each other"),
        (lambda: Distribution.uniform([[0, -1]]), "token ids of at least 0"),
        (lambda: Distribution(torch.tensor([0, 1]), torch.tensor([0.5, 0.5])), "needs strings"),
        (lambda: list_distribution("rotate", 3), "unknown list operation"),
        (lambda: list_distribution("shuffle", 9), "at most 8"),
        (lambda: list_distribution("copy", 1), "at least 2 items"),
        (lambda: list_distribution("insert_index", 3, index=4), "outside the list"),
        (lambda: latin_squares(5), "1 to 4 rows"),
        (lambda: ListWorld().prompt("copy", "a"), "no word of this world"),
        (lambda: IdealDenoiser(lambda prompt: coins([0.5])), "needs vocab_size"),
        (lambda: IdealDenoiser(coins([0.5]), ties="fair"), "ties must be"),
        (lambda: IdealDenoiser(coins([0.5]))(torch.tensor([[0]])), "no separator"),
        (lambda: IdealDenoiser(coins([0.5]))(torch.tensor([[3, 2, 2]])), "the canvas has 2 positions, the answer 1"),
        (lambda: IdealDenoiser(coins([0.5]), 4, mask_token_id=1)(torch.tensor([[3, 1]])), "writes the mask or the separator"),
        (lambda: schedule_distribution(coins([0.5, 0.5]), [[0]]), "each of the 2 positions once"),
        (lambda: schedule_distribution(coins([0.5, 0.5]), [[0, 1], []]), "no empty set"),
        (lambda: one_by_one_distribution(coins([0.5]), "sideways"), "unknown order"),
        (lambda: greedy_distribution(coins([0.5]), len, "entropy"), "must be 'confidence' or 'random'"),
        (lambda: total_correlation(coins([0.5, 0.5]), [0], [0]), "must be different"),
        (lambda: total_correlation(coins([0.5, 0.5]), [2]), "lie in 0, ..., 1"),
        (lambda: best_schedules(latin_squares()), "at most 8 positions"),
        (lambda: closed_correlation("shuffle", 1), "at least 2 items"),
        (lambda: greedy_run("copy", 3, len), "the argument holds for"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# the model


@given(distributions(most=3), st.data())
def test_logits_are_logarithms_of_the_marginals(dist, data):
    model = IdealDenoiser(dist)
    visible = data.draw(st.lists(st.sampled_from([UNKNOWN, *dist.alphabet.tolist()]), min_size=dist.length, max_size=dist.length))
    canvas = torch.tensor([[model.separator, *(model.config.mask_token_id if v == UNKNOWN else v for v in visible)]])
    p = model(canvas).logits[0, 1:].exp()
    expected = dist.marginals(torch.tensor([visible]))[0][0]
    for j, v in enumerate(visible):
        wanted = torch.zeros(model.config.vocab_size, dtype=torch.double)
        wanted[dist.alphabet if v == UNKNOWN else v] = expected[j] if v == UNKNOWN else 1.0
        assert p[j].double().allclose(wanted, atol=1e-6)
    possible = plain_marginals(as_dict(dist), visible, 3) != 0
    assert bool(model.possible(canvas)) == possible


def test_padding_and_neighbours_change_nothing():
    world = ListWorld()
    model = world.denoiser(ties="first")
    texts = [world.prompt("replace_random", "ABCD"), world.prompt("reverse", "AB"), world.prompt("insert_index", "ABC", "Q", index=3)]
    prompts = [world.tokenizer(t, return_tensors="pt").input_ids for t in texts]
    batch = left_pad(prompts, world.ids["<pad>"])
    together = LLaDA().generate(model, **batch, max_new_tokens=5, do_sample=False)
    right = model.possible(together.sequences, batch["attention_mask"]).tolist()
    for i, prompt in enumerate(prompts):
        alone = LLaDA().generate(model, prompt, max_new_tokens=5, do_sample=False)
        assert alone.continuations[0].equal(together.continuations[i])
        assert model.possible(alone.sequences).tolist() == [right[i]]
    assert together.text(world.tokenizer)[1:] == ["B A", "A B C Q"]
    assert right == [True] * 3


def test_without_a_mask_padding_in_front_is_left_out():
    world = ListWorld()
    model = world.denoiser(ties="first")
    ids = world.tokenizer(world.prompt("shuffle", "ABC"), return_tensors="pt").input_ids
    canvas = torch.cat([ids, torch.full((1, 3), world.ids["<mask>"])], 1)
    padded = torch.cat([torch.full((1, 2), world.ids["<pad>"]), canvas], 1)
    assert model(padded).logits[:, -3:].equal(model(canvas).logits[:, -3:])


def test_wrong_answers_are_not_possible():
    world = ListWorld()
    model = world.denoiser()
    prompt = [world.ids[w] for w in world.prompt("remove_random", "ABC").split()]
    ends = {"A C": True, "A B": True, "A A": False, "C A": False, "A <mask>": True, "B <mask>": True, "C <mask>": False}
    ends |= {"A C <eos>": True, "A C <eos> <pad>": True, "A C A": False}
    for text, right in ends.items():
        assert bool(model.possible(torch.tensor([prompt + [world.ids[w] for w in text.split()]]))) == right, text


def test_random_ties_lower_confidence_by_little_and_leave_certainty():
    model = IdealDenoiser(list_distribution("replace_random", 4), ties="random")
    canvas = torch.tensor([[model.separator] + [model.config.mask_token_id] * 4]).expand(500, -1)
    torch.manual_seed(0)
    p = model(canvas).logits[:, 1:].exp()
    best = p.amax(-1)
    assert float(best.max()) < 0.75
    assert float(best.min()) > 0.75 * (1 - 1.01 * TIE_NOISE)
    decided = canvas.clone()
    decided[:, 1] = 4  # the new word stands at the first place: all others are certain
    assert model(decided).logits[:, 2:].exp().amax(-1).eq(1).all()


def test_random_ties_are_fair_and_first_ties_are_not():
    dist = list_distribution("shuffle", 4)
    for ties, fair in (("random", True), ("first", False)):
        model = IdealDenoiser(dist, ties=ties)
        canvas = torch.tensor([[model.separator] + [model.config.mask_token_id] * 4]).expand(4000, -1)
        torch.manual_seed(1)
        p = model(canvas).logits[:, 1:].softmax(-1)
        first = torch.bincount(p[:, 2].argmax(-1), minlength=4)[:4]
        positions = torch.bincount(p.amax(-1).argmax(-1), minlength=4)
        assert (min(chisquare(first).pvalue, chisquare(positions).pvalue) > 1e-3) == fair


def test_the_model_runs_on_double_columns_of_blocks():
    dist = list_distribution("reverse", 6)
    model = IdealDenoiser(dist)
    for decoder in (LLaDA(block_length=2), LLaDA(block_length=4), FastDLLM(block_length=3)):
        out = model.generate(model.start, custom_generate=decoder, max_new_tokens=6, do_sample=False)
        assert out.sequences[0, 1:].tolist() == [5, 4, 3, 2, 1, 0]


# exact distributions of the output


def plain_score(order, j, dist, of_token):
    "Score of a place: the highest is committed."
    first, second = sorted(dist)[::-1][:2]
    scores = {"random": 0, "left_to_right": -j, "max_probability": first, "margin": first - second, "low_confidence": of_token}
    return scores[order] if order in scores else sum(x * math.log(x) for x in dist if x)  # minus the entropy


def plain_one_by_one(dist, order, state=None):
    "Output distribution of one token a step, by recursion over proposals: nothing is shared with the package."
    table, state = as_dict(dist), state or (UNKNOWN,) * dist.length
    if UNKNOWN not in state:
        return {state: 1.0}
    p = plain_marginals(table, state, 3)
    masked = [j for j, t in enumerate(state) if t == UNKNOWN]
    result = {}
    for tokens in product(range(3), repeat=len(masked)):
        chance = math.prod(p[j][t] for j, t in zip(masked, tokens))
        if not chance:
            continue
        scores = [plain_score(order, j, p[j], p[j][t]) for j, t in zip(masked, tokens)]
        best = [i for i, s in enumerate(scores) if s > max(scores) - 1e-9]
        for i in best:
            new = list(state)
            new[masked[i]] = tokens[i]
            for s, q in plain_one_by_one(dist, order, tuple(new)).items():
                result[s] = result.get(s, 0.0) + chance * q / len(best)
    return result


@settings(max_examples=12)
@given(distributions(most=3), st.sampled_from(ONE_BY_ONE))
def test_one_by_one_distribution_is_that_of_all_proposals(dist, order):
    q = plain_one_by_one(dist, order)
    mine = one_by_one_distribution(dist, order)
    assert mine.tolist() == pytest.approx([q.get(tuple(s), 0.0) for s in dist.strings.tolist()], abs=1e-9)
    assert float(mine.sum()) == pytest.approx(1)


@given(distributions())
def test_orders_that_do_not_look_at_the_draw_keep_the_distribution(dist):
    for order in set(ONE_BY_ONE) - {"low_confidence"}:
        assert one_by_one_distribution(dist, order).allclose(dist.p, atol=1e-12)


def test_confidence_of_the_draw_bends_two_coins():
    # proposals 11 (.48) and 10 (.32) commit a 1 at the first place, 01 (.12) a 1 at the second, 00 (.08) a 0 at the second
    bent = one_by_one_distribution(coins([0.8, 0.6]), "low_confidence")
    assert bent.tolist() == pytest.approx([0.08 * 0.2, 0.12 * 0.2, 0.8 * 0.4 + 0.08 * 0.8, 0.8 * 0.6 + 0.12 * 0.8])


@given(distributions_and_schedules())
def test_schedule_distribution_is_the_product_along_the_path(case):
    dist, schedule = case
    table = as_dict(dist)
    for string, mine in zip(dist.strings.tolist(), schedule_distribution(dist, schedule).tolist()):
        seen, q = [UNKNOWN] * dist.length, 1.0
        for step in schedule:
            p = plain_marginals(table, seen, 3)
            q *= math.prod(p[j][string[j]] for j in step)
            for j in step:
                seen[j] = string[j]
        assert mine == pytest.approx(q, abs=1e-12)


def test_greedy_distribution_on_cases_counted_by_hand():
    # all of three letters at once: 6 of 27 strings are permutations, each with 1/27
    q, passes = greedy_distribution(list_distribution("shuffle", 3), top_k(3))
    assert (q.tolist(), passes) == (pytest.approx([1 / 27] * 6), 1.0)
    # insert anywhere into 5, two at a time: both ends (5/6), then their neighbours (3/4), then a tie of two against two
    assert float(greedy_distribution(list_distribution("insert_random", 5), top_k(2))[0].sum()) == pytest.approx(0.5)
    assert float(greedy_distribution(list_distribution("insert_random", 5), top_k(6))[0].sum()) == 0
    # remove any: the best tokens leave out the middle item; one by one, ties let others go, too
    for k in (2, 4):
        assert greedy_distribution(list_distribution("remove_random", 5), top_k(k))[0].tolist() == pytest.approx([0, 0, 1, 0, 0])
    one_by_one = greedy_distribution(list_distribution("remove_random", 5), top_k(1))[0]
    assert float(one_by_one.sum()) == pytest.approx(1)
    assert one_by_one.max() < 1


def test_greedy_distribution_counts_passes_until_finished_or_impossible():
    # shuffle of 4 by pairs: the first pair is wrong with 1/4 and stops there
    q, passes = greedy_distribution(list_distribution("shuffle", 4), top_k(2))
    assert float(q.sum()) == pytest.approx(3 / 8)
    assert passes == pytest.approx(1 + 3 / 4)


# bits


@given(distributions(), st.data())
def test_total_correlation_is_the_sum_of_its_entropies(dist, data):
    positions = data.draw(st.permutations(range(dist.length)))
    a, b = sorted(data.draw(st.tuples(st.integers(0, dist.length), st.integers(0, dist.length))))
    seen, chosen = list(positions[:a]), list(positions[a:b])
    table = as_dict(dist)
    h = plain_bits(table, seen)
    expected = sum(plain_bits(table, [*seen, j]) - h for j in chosen) - (plain_bits(table, [*seen, *chosen]) - h)
    assert total_correlation(dist, chosen, seen) == pytest.approx(expected, abs=1e-9)
    assert expected > -1e-9


@given(distributions(), st.data())
def test_lemma_splitting_a_set_never_costs(dist, data):
    # C(A u B | Z) >= C(A | Z) + E_A C(B | Z, A)
    positions = data.draw(st.permutations(range(dist.length)))
    z, a = sorted(data.draw(st.tuples(st.integers(0, dist.length), st.integers(0, dist.length))))
    seen, first, second = list(positions[:z]), list(positions[z:a]), list(positions[a:])
    together = total_correlation(dist, [*first, *second], seen)
    assert together >= total_correlation(dist, first, seen) + total_correlation(dist, second, [*seen, *first]) - 1e-9


@given(distributions_and_schedules())
def test_theorem_1_the_divergence_of_exact_marginals_is_the_loss(case):
    dist, schedule = case
    loss = schedule_loss(dist, schedule)
    assert schedule_kl(dist, schedule) == pytest.approx(loss, abs=1e-9)
    for temperature in (0.5, 2.0):
        assert schedule_kl(dist, schedule, temperature) >= loss - 1e-9


@settings(max_examples=15)
@given(distributions())
def test_theorem_2_by_brute_force_over_schedules(dist):
    best = best_schedules(dist)
    everything = [(len(s), schedule_loss(dist, s)) for s in schedules(dist.length)]
    for t, (loss, schedule) in enumerate(best, start=1):
        assert loss == pytest.approx(min(v for k, v in everything if k == t), abs=1e-9)
        assert schedule_loss(dist, schedule) == pytest.approx(loss, abs=1e-9)
        assert len(schedule) == t
    losses = [loss for loss, _ in best]
    assert all(a >= b - 1e-9 for a, b in zip(losses, losses[1:]))
    assert losses[0] == pytest.approx(total_correlation(dist), abs=1e-9)
    assert losses[-1] == pytest.approx(0, abs=1e-9)


def test_schedules_are_all_ordered_partitions():
    found = [tuple(frozenset(step) for step in s) for s in schedules(4)]
    assert len(found) == len(set(found)) == 75  # ordered Bell number
    assert all(sum(map(len, s)) == 4 and frozenset().union(*s) == {0, 1, 2, 3} for s in found)


def test_the_staircase_of_a_shuffle():
    best = best_schedules(list_distribution("shuffle", 6))
    assert [[len(s) for s in schedule] for _, schedule in best] == [[6], [4, 2], [3, 2, 1], [2, 2, 1, 1], [2, 1, 1, 1, 1], [1] * 6]
    by_hand = [6 * math.log2(6), 4 * math.log2(6) + 2, 3 * math.log2(6) + 2 * math.log2(3), 2 * math.log2(6) + 4 + 1]
    by_hand += [2 * math.log2(6) + 2 + math.log2(3) + 1, math.log2(720)]
    assert [loss for loss, _ in best] == pytest.approx([bits - math.log2(720) for bits in by_hand], abs=1e-9)


@pytest.mark.parametrize("operation", LIST_OPERATIONS)
@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_closed_forms_are_the_counted_entropies(operation, n):
    if operation == "remove_random" and n == 2:  # one item is left: nothing can depend on anything
        assert closed_correlation(operation, n) == pytest.approx(0, abs=1e-12)
    assert closed_correlation(operation, n) == pytest.approx(total_correlation(list_distribution(operation, n)), abs=1e-9)


def test_limits_of_the_closed_forms():
    assert closed_correlation("replace_random", 10**6) == pytest.approx(math.log2(math.e), abs=1e-5)
    n = 2000
    assert closed_correlation("insert_random", n) / n == pytest.approx(1 / (2 * math.log(2)), rel=0.02)
    assert (closed_correlation("remove_random", n) + math.log2(n)) / n == pytest.approx(1 / (2 * math.log(2)), rel=0.02)
    assert closed_correlation("shuffle", n) / n == pytest.approx(math.log2(math.e), rel=0.02)
    assert total_correlation(latin_squares()) == pytest.approx(32 - math.log2(576), abs=1e-9)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_loss_of_a_shuffle_by_set_sizes(sizes):
    n = sum(sizes)
    if not 2 <= n <= 6:
        return
    positions = list(range(n))
    schedule = [positions[sum(sizes[:t]) : sum(sizes[: t + 1])] for t in range(len(sizes))]
    assert shuffle_loss(sizes) == pytest.approx(schedule_loss(list_distribution("shuffle", n), schedule), abs=1e-9)


@pytest.mark.parametrize("n", [4, 6, 10])
def test_loss_of_a_shuffle_by_pairs(n):
    double_factorials = math.prod(range(n, 0, -2)) / math.prod(range(n - 1, 0, -2))
    assert shuffle_loss([2] * (n // 2)) == pytest.approx(math.log2(double_factorials), abs=1e-9)


# negative controls: each computation that theorem 1 must reject


def broken_nats(dist, schedule):
    "The loss in nats."
    return schedule_loss(dist, schedule) * math.log(2)


def broken_reversed(dist, schedule):
    "The loss of the same sets in the opposite order."
    return schedule_loss(dist, schedule[::-1])


def broken_not_renormalised(dist, schedule):
    "KL of marginals that were not divided by the mass of what is visible."
    table, total = as_dict(dist), 0.0
    for string, p in table.items():
        seen, q = [UNKNOWN] * dist.length, 1.0
        for step in schedule:
            fits = {s: w for s, w in table.items() if all(v in (UNKNOWN, t) for v, t in zip(seen, s))}
            for j in step:
                q *= sum(w for s, w in fits.items() if s[j] == string[j])
            for j in step:
                seen[j] = string[j]
        total += p * math.log2(p / q)
    return total


def broken_blind(dist, schedule):
    "The loss without what was committed before."
    return sum(total_correlation(dist, step) for step in schedule)


def broken_joint_entropy(dist, schedule):
    "The conditional joint entropies left out."
    seen, total = [], 0.0
    for step in schedule:
        total += sum(entropy(dist, [*seen, j]) - entropy(dist, seen) for j in step)
        seen += step
    return total


@pytest.mark.parametrize("broken", [broken_nats, broken_reversed, broken_not_renormalised, broken_blind, broken_joint_entropy])
def test_theorem_1_rejects_negative_controls(broken):
    dist, schedule = list_distribution("shuffle", 4), [[0], [1, 2, 3]]
    noisy = Distribution(dist.strings, torch.arange(1, 25).double() / 300)
    for example in (dist, noisy):
        kl = schedule_kl(example, schedule)
        assert kl == pytest.approx(schedule_loss(example, schedule), abs=1e-9)
        assert abs(broken(example, schedule) - kl) > 1e-3


# right answers


RULES = {f"{k} a denoising step": top_k(k) for k in (1, 2, 3, 5)}
RULES |= {f"{'above' if s else 'from'} {g}": threshold(g, s) for g in (0.3, 0.5, 0.75, 0.8, 0.9) for s in (True, False)}
RULES |= {f"{'released ' if c else ''}factor {f}": factor(f, c) for f in (0.5, 1.0, 1.3, 1.9) for c in (True, False)}


@pytest.mark.parametrize("operation", ["shuffle", "replace_random"])
@pytest.mark.parametrize("rule", RULES)
def test_the_argument_by_items_left_is_exact(operation, rule):
    for n in (3, 4, 5):
        q, _ = greedy_distribution(list_distribution(operation, n), RULES[rule])
        assert greedy_run(operation, n, RULES[rule])[0] == pytest.approx(float(q.sum()), abs=1e-9)


@pytest.mark.parametrize(("n", "k"), [(6, 1), (6, 2), (6, 3), (6, 6), (4, 2), (8, 4)])
def test_products_of_the_shuffle(n, k):
    left = [n - i * k for i in range(n // k)]
    assert greedy_run("shuffle", n, top_k(k))[0] == pytest.approx(math.prod(math.perm(r, k) / r**k for r in left))
    if k == 2:
        double_factorials = math.prod(range(n - 1, 0, -2)) / math.prod(range(n, 0, -2))
        assert greedy_run("shuffle", n, top_k(2))[0] == pytest.approx(double_factorials)


def test_replace_random_by_tokens_a_pass():
    assert [greedy_run("replace_random", 8, top_k(k))[0] for k in (1, 2, 4, 8)] == [1, 0.5, 0, 0]


def test_cliffs_of_the_threshold():
    for n in (3, 6, 8):
        edge = (n - 1) / n
        assert [greedy_run("replace_random", n, threshold(g))[0] for g in (edge - 1e-3, edge, edge + 1e-3)] == [0, 1, 1]
        assert [greedy_run("replace_random", n, threshold(g, strict=False))[0] for g in (edge - 1e-3, edge, edge + 1e-3)] == [0, 0, 1]
        assert [greedy_run("shuffle", n, threshold(g, strict=False))[0] for g in (0.49, 0.5, 0.51)] == [0.5, 0.5, 1]
        assert greedy_run("shuffle", n, threshold(0.51)) == (1, n)


def test_factor_rule_by_hand():
    assert [greedy_run("replace_random", 8, factor(f)) for f in (1.0, 0.7, 0.5, 1.3)] == [(1, 3), (1, 5), (1, 7), (0, 1)]
    assert [greedy_run("shuffle", 6, factor(f))[0] for f in (0.5, 1.0, 1.5, 1.9)] == [1, 1, 1, 0.5]
    assert greedy_run("replace_random", 8, factor(1.0, compat=True)) == (0, 1)
    assert greedy_run("shuffle", 6, factor(1.0, compat=True)) == (0.5, 5)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(0, 30))
def test_rules_are_their_definitions(numbers, tenths):
    c, f = sorted((x / 100 for x in numbers), reverse=True), tenths / 10 + 0.05
    fits = [m for m in range(1, len(c) + 1) if (m + 1) * (1 - c[m - 1]) < f]
    assert factor(f)(c) == max(fits, default=1)
    assert threshold(f / 4)(c) == max(1, len([x for x in c if x > f / 4 + 1e-9]))
    assert top_k(3)(c) == min(3, len(c))


def test_sampled_accuracy_is_that_of_the_schedule():
    dist = list_distribution("replace_random", 6)
    for k in (1, 2, 3, 4, 6):
        schedule = [list(range(i, min(i + k, 6))) for i in range(0, 6, k)]
        assert sampled_accuracy(6, k) == pytest.approx(float(schedule_distribution(dist, schedule).sum()), abs=1e-12)
    assert sampled_accuracy(8, 8) == pytest.approx((7 / 8) ** 7)


# the decoders of the family on the ideal denoiser

SAMPLES = 2000


@pytest.mark.parametrize(
    ("operation", "n", "k", "drawn", "theory"),
    [
        ("shuffle", 6, 1, False, 1.0),
        ("shuffle", 6, 2, False, 5 * 3 / (6 * 4 * 2)),
        ("shuffle", 6, 3, True, 6 * 5 * 4 / 6**3 * 6 / 27),
        ("shuffle", 6, 6, False, 720 / 6**6),
        ("replace_random", 8, 1, True, 1.0),
        ("replace_random", 8, 2, False, 0.5),
        ("replace_random", 8, 4, False, 0.0),
        ("replace_random", 8, 8, True, (7 / 8) ** 7),
        ("remove_random", 5, 4, False, 1.0),
        ("insert_random", 5, 2, False, 0.5),
    ],
)
def test_harness_agrees_with_the_formulas(operation, n, k, drawn, theory):
    dist = list_distribution(operation, n)
    decoder = LLaDA(steps=dist.length // k, remasking="random" if drawn else "low_confidence")
    run = harness(decoder, dist, SAMPLES, drawn)
    assert abs(run.deviations(theory)) < 3
    assert run.steps.eq(dist.length // k).all()


def test_deviations_reject_a_wrong_theory():
    run = harness(LLaDA(steps=3), list_distribution("shuffle", 6), SAMPLES)
    assert abs(run.deviations(0.3125)) < 3 < abs(run.deviations(0.36))
    assert math.isinf(run.deviations(1.0))
    unfair = IdealDenoiser(list_distribution("shuffle", 6), ties="first")
    out = LLaDA(steps=3).generate(unfair, unfair.start.expand(50, -1), max_new_tokens=6, do_sample=False)
    assert not unfair.possible(out.sequences).any()


def test_the_harness_leaves_the_generator_alone():
    before = torch.get_rng_state()
    a = harness(LLaDA(steps=2), list_distribution("shuffle", 4), 50, seed=3)
    assert torch.get_rng_state().equal(before)
    assert a.right.equal(harness(LLaDA(steps=2), list_distribution("shuffle", 4), 50, seed=3).right)


@pytest.mark.parametrize("gamma", [0.3, 0.49, 0.51, 0.82, 0.84, 1.0])
@pytest.mark.parametrize("operation", ["shuffle", "replace_random"])
def test_threshold_decoder_follows_the_theory(operation, gamma):
    run = harness(FastDLLM(threshold=gamma), list_distribution(operation, 6), 600)
    accuracy, passes = greedy_run(operation, 6, threshold(gamma))
    assert abs(run.deviations(accuracy)) < 3.5
    assert run.steps[run.right].eq(passes).all()


@pytest.mark.parametrize("f", [0.5, 0.7, 1.0, 1.3, 1.9])
@pytest.mark.parametrize(("operation", "n"), [("shuffle", 6), ("replace_random", 8)])
def test_factor_decoder_follows_the_theory(operation, n, f):
    run = harness(FastDLLM(factor=f), list_distribution(operation, n), 600)
    accuracy, passes = greedy_run(operation, n, factor(f))
    assert abs(run.deviations(accuracy)) < 3.5
    assert run.steps[run.right].eq(passes).all()


@pytest.mark.parametrize("f", [0.7, 1.01, 1.3, 1.9])
@pytest.mark.parametrize(("operation", "n"), [("shuffle", 6), ("replace_random", 8)])
def test_released_factor_decoder_follows_its_own_theory(operation, n, f):
    run = harness(ReleasedFactor(factor=f), list_distribution(operation, n), 600)
    accuracy, passes = greedy_run(operation, n, factor(f, compat=True))
    assert abs(run.deviations(accuracy)) < 3.5
    assert run.steps[run.right].eq(passes).all()


def test_the_released_loop_fails_where_the_formula_does_not():
    for operation, n in (("shuffle", 6), ("replace_random", 8)):
        dist = list_distribution(operation, n)
        assert harness(FastDLLM(factor=1.01), dist, 400).accuracy == 1
        assert harness(ReleasedFactor(factor=1.01), dist, 400).accuracy < 0.6


def outcomes(dist, decoder, samples=2400):
    "Counts of the support's strings, drawn at temperature 1."
    model = IdealDenoiser(dist)
    torch.manual_seed(0)
    out = decoder.generate(model, model.start.expand(samples, -1), max_new_tokens=dist.length, do_sample=True, top_k=0)
    return (out.sequences[:, None, 1:] == dist.strings).all(-1).sum(0)


@pytest.mark.parametrize("order", ["random", "left_to_right", "low_confidence"])
def test_one_token_a_pass_reproduces_a_shuffle_of_four(order):
    counts = outcomes(list_distribution("shuffle", 4), LLaDA(remasking=order))
    assert counts.sum() == 2400
    assert chisquare(counts).pvalue > 0.01


def test_two_tokens_a_pass_do_not_and_confidence_bends_coins():
    assert outcomes(list_distribution("shuffle", 4), LLaDA(steps=2, remasking="random")).sum() < 1200
    pair = coins([0.8, 0.6])
    counts = outcomes(pair, LLaDA())
    assert chisquare(counts, 2400 * pair.p).pvalue < 1e-6
    assert chisquare(counts, 2400 * one_by_one_distribution(pair, "low_confidence")).pvalue > 0.01


def test_without_dependence_every_rule_is_right():
    for operation in set(LIST_OPERATIONS) - set(RANDOM_TASKS):
        run = harness(LLaDA(steps=1), list_distribution(operation, 5), 20)
        assert run.accuracy == 1
        assert run.steps.eq(1).all()
