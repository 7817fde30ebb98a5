"""Products with more rows than are taken at a time: those that are left may be multiplied in another way."""

from __future__ import annotations

import pytest
import torch

import qcore_cpu
from qcore.backend.weights import Weight4bit

ROWS_AT_A_TIME = 512


@pytest.mark.parametrize("left", [8, 11, 20])
def test_rows_that_are_left_find_room_for_long_rows(left: int) -> None:
    n, k = 70, 32768  # a row of X is larger than what the products of many rows keep of one
    rng = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (n * k // 2,), generator=rng, dtype=torch.uint8)
    weight = Weight4bit(packed, torch.rand(n * k // 64, generator=rng) + 0.5, "nf4", 64, (n, k))
    x = torch.randn((left, k), generator=rng).bfloat16()
    many = x.repeat(ROWS_AT_A_TIME // left + 2, 1)[: ROWS_AT_A_TIME + left]
    backend = qcore_cpu.load()
    want, got = (torch.full((len(rows), n), torch.nan, dtype=torch.bfloat16) for rows in (x, many))
    backend.gemm_4bit(x, weight, None, out=want)
    backend.gemm_4bit(many, weight, None, out=got)
    expected = want.repeat(ROWS_AT_A_TIME // left + 2, 1)[: ROWS_AT_A_TIME + left].double()
    # Two orders of the same sum, each rounded to bfloat16.
    bound = 2.0**-7 * expected.abs() + 2.0**-7 * expected.abs().mean()
    assert bool(((got.double() - expected).abs() <= bound).all())
