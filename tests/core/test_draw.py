"""Drawing on a CPU: one uniform number a row, looked up in running sums, against the definition and against counts."""

import numpy as np
import pytest
import torch

from decodelab.core import warp
from decodelab.core.warp import draw


def by_definition(p, uniform):
    "The first token whose running sum exceeds `uniform` of the whole, in float64."
    sums = np.cumsum(p.double().numpy(), -1)
    return [int(np.argmax(row > u * row[-1])) for row, u in zip(sums, uniform)]


@pytest.mark.parametrize("size", [3, 512, 4096, 20_000])
def test_the_first_token_whose_running_sum_exceeds_a_uniform_number(size):
    generator = torch.Generator().manual_seed(1)
    p = torch.softmax(3 * torch.randn(60, size, generator=generator), -1)
    uniform = torch.rand(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = draw(p, torch.Generator().manual_seed(2)).tolist()
    assert tokens == by_definition(p, uniform.tolist())


@pytest.mark.parametrize("size", [7, 4096, 20_000])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(size, uniform, monkeypatch):
    monkeypatch.setattr(warp.torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    p = torch.zeros(3, size)
    p[0, 2], p[1, [1, 3]], p[2, [1, size - 3]] = 1.0, 0.5, torch.tensor([1e-30, 1.0])
    for row, token in zip(p, draw(p).tolist()):
        assert row[token] > 0
    assert draw(p)[0] == 2


def test_counts():
    p = torch.zeros(1, 2000)
    p[0, [0, 127, 128, 1280, 1999]] = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    counts = torch.bincount(draw(p.expand(20_000, -1), torch.Generator().manual_seed(0)), minlength=2000)
    expected = 20_000 * p[0, p[0] > 0]
    assert counts.sum() == counts[p[0] > 0].sum()
    assert float(((counts[p[0] > 0] - expected) ** 2 / expected).sum()) < 18.5  # four free cells: once in a thousand runs


def test_rows_draw_from_their_own_sources():
    p = torch.softmax(torch.randn(3, 900, generator=torch.Generator().manual_seed(5)), -1)
    both = draw(p, [torch.Generator().manual_seed(s) for s in (7, 8, 9)]).tolist()
    assert both == [int(draw(row, torch.Generator().manual_seed(s))) for row, s in zip(p, (7, 8, 9))]


def test_one_row_and_many_dimensions():
    p = torch.softmax(torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(5)), -1)
    assert draw(p).shape == (2, 3)
    assert draw(p[0, 0]).shape == ()


def test_nan_is_left_to_the_check():
    assert draw(torch.full((2, 900), float("nan"))).max() < 900
