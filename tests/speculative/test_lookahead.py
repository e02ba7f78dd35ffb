"""Lookahead decoding: the rounds of a plain transcription, the pool's bound, small and large windows, and what it refuses."""

import pytest
import torch
from toys import plain, random_prompts, small_model

from decodelab.speculative.lookahead import Lookahead, window_paths


@pytest.mark.parametrize("fields", [{"W": 0}, {"N": 1}, {"G": 0}])
def test_bad_fields(fields):
    with pytest.raises(ValueError, match="W and G must be at least 1 and N at least 2"):
        Lookahead(**fields)


def rounds_by_definition(model, ids, new, W, N, G):
    "Tokens of every round, one forward for each path: the method word by word."

    def answer(path):
        return int(model(torch.tensor([text + list(path)])).logits[0, -1].argmax())

    start, text, pool, rounds = ids[0].tolist(), ids[0].tolist(), {}, []
    window = [[start[(k * W + j) % len(start)] for j in range(W)] for k in range(N - 1)]
    while len(text) < len(start) + new:
        left = len(start) + new - len(text) - 1
        columns = [[*window[0][: j + 1], *(level[j] for level in window[1:])] for j in range(W)]
        candidates = [path[:left] for path in [*reversed(pool.get(text[-1], [])), *columns]]
        best = []
        for path in candidates:
            n = 0
            while n < len(path) and answer(path[:n]) == path[n]:
                n += 1
            best = path[:n] if n > len(best) else best
        if left >= W + N - 2:
            answers = [answer(path) for path in columns]
            for j, e in enumerate(answers):
                gram = [*(level[j] for level in window[1:]), e]
                known = [g for g in pool.get(window[0][j], []) if g != gram]
                pool[window[0][j]] = [*known, gram][-G:]
            window = [*window[1:], answers]
        rounds.append(len(best) + 1)
        text = [*text, *best, answer(best)]
    return rounds, text[len(start) :]


@pytest.mark.parametrize(("W", "N", "G"), [(1, 2, 1), (4, 3, 2), (3, 5, 4), (6, 2, 1)])
def test_its_rounds_are_those_of_the_definition(W, N, G):
    model = small_model(vocab=12, hidden=16, spread=0.6)  # few tokens: n-grams come back
    saved = 0
    for ids in random_prompts(3, lengths=(4, 9), vocab=12, seed=W):
        out = Lookahead(W=W, N=N, G=G).generate(model, ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        rounds, text = rounds_by_definition(model, ids, 24, W, N, G)
        assert out.continuations[0].tolist() == text == plain(model, ids, 24, eos_token_id=None)
        assert out.stats.emitted[0] == rounds
        saved += 24 - len(rounds)
    assert saved > 0


def test_columns_hang_on_the_trunk():
    assert window_paths([[1, 2], [3, 4], [5, 6]]) == [[1, 3, 5], [1, 2, 4, 6]]


def test_a_short_budget_is_no_trouble():
    model, ids = small_model(), random_prompts(1)[0]
    for new in (1, 2, 3):
        assert Lookahead().generate(model, ids, max_new_tokens=new, do_sample=False).continuations[0].tolist() == plain(model, ids, new)
