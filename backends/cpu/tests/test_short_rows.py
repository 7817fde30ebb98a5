"""Products of short rows of W, or with few rows of X: what no other way through gemm_4bit and gemm_int4 shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import qcore_cpu
from qcore import codebooks
from qcore.backend.weights import Weight4bit, WeightInt4

N = 37  # two groups of sixteen rows and a strip that is not full
# Rows of X and K, with whole and half steps: what short_row() in gemm_4bit_short.h gives to this way where there is a
# tile unit, and one more; then what it gives to it elsewhere, in two parts of X and of K.
SIZES = [(1, 192), (2, 128), (3, 64), (4, 64), (7, 320), (8, 4160)]
# What gemm_4bit_lanes.h serves: lanes of 512 bits, and with some of 256, one group of rows of X and two.
SIZES += [(13, 192), (20, 320), (32, 64), (40, 4160), (64, 128)]


Make = Callable[[torch.Tensor, int], tuple[Weight4bit | WeightInt4, torch.Tensor]]


def nf4(scale: torch.Tensor, k: int, blocksize: int = 64) -> tuple[Weight4bit, torch.Tensor]:
    """A weight whose blocks have the scale of the row that they begin in, and its values in float64."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N * k,), generator=rng, dtype=torch.uint8)
    first = torch.arange(0, N * k, blocksize)
    absmax = (0.5 + torch.rand(len(first), generator=rng)) * scale[first // k]
    values = torch.tensor(codebooks.NF4)[codes.long()] * absmax.repeat_interleave(blocksize)[: N * k]
    weight = Weight4bit(codes[::2] << 4 | codes[1::2], absmax, "nf4", blocksize, (N, k))
    return weight, values.bfloat16().double().view(N, k)


def nf4_in_longer_blocks(scale: torch.Tensor, k: int) -> tuple[Weight4bit, torch.Tensor]:
    return nf4(scale, k, 128)


def int4(scale: torch.Tensor, k: int, group: int = 64) -> tuple[WeightInt4, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (N, k), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (N, k // group), generator=rng, dtype=torch.uint8)
    scales = (0.5 + torch.rand((N, k // group), generator=rng)) * scale[:, None]
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    wide = (codes.float() - zeros.repeat_interleave(group, 1).float()) * scales.repeat_interleave(group, 1)
    return WeightInt4(packed, scales, zeros, group, (N, k)), wide.bfloat16().double()


def product(weight: Weight4bit | WeightInt4, x: torch.Tensor) -> torch.Tensor:
    backend = qcore_cpu.load()
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype)
    call = backend.gemm_4bit if isinstance(weight, Weight4bit) else backend.gemm_int4
    call(x, weight, None, out=out)
    return out


def assert_close(got: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> None:
    """Within bfloat16's last bit and float32's sums, with nothing absolute to hide a flushed denormal but its ulp."""
    want = x.double() @ values.T
    bound = 2.0**-8 * want.abs() + 2.0**-16 * (x.double().abs() @ values.abs().T) + 2.0**-133
    assert bool(((got.double() - want).abs() <= bound).all()), (got.double() - want).abs().max()


def inputs(rows: int, k: int) -> torch.Tensor:
    return torch.randn((rows, k), generator=torch.Generator().manual_seed(rows)).bfloat16()


@pytest.mark.parametrize("make", [nf4, nf4_in_longer_blocks, int4])
@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_products_that_are_denormal_are_kept(make: Make, rows: int, k: int) -> None:
    """Rows 5 to 9 of W meet X below 2^-70 in products below 2^-126; the rows after them are regular again."""
    scale = torch.ones(N)
    scale[5:10] = 2.0**-60
    weight, values = make(scale, k)
    x = (inputs(rows, k) * 2.0**-70).abs().clamp_min(2.0**-74).bfloat16()
    assert_close(product(weight, x), x, values)


@pytest.mark.parametrize("make", [nf4, int4])
@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_rows_after_the_first_part_of_x_have_their_place(make: Make, rows: int, k: int) -> None:
    """X is taken 512 rows at a time: so many are left."""
    weight, values = make(torch.ones(N), k)
    x = inputs(512 + rows, k)
    assert_close(product(weight, x), x, values)


@pytest.mark.parametrize("rows", [1, 2, 3, 13, 40])
@pytest.mark.parametrize("group", [32, 64, 192, 384])
def test_groups_of_any_number_of_units(group: int, rows: int) -> None:
    """Groups of 192 are three units of 64: no shift finds the group of a unit. Those of 32 are half a unit."""
    weight, values = int4(torch.ones(N), 384, group)
    x = inputs(rows, 384)
    assert_close(product(weight, x), x, values)


@pytest.mark.parametrize("rows", [1, 3, 13, 40])
def test_groups_without_zero_points(rows: int) -> None:
    with_zeros, _ = int4(torch.ones(N), 192)
    assert with_zeros.zeros is not None
    weight = replace(with_zeros, zeros=None)
    eights = replace(with_zeros, zeros=torch.full_like(with_zeros.zeros, 8))
    x = inputs(rows, 192)
    assert torch.equal(product(weight, x), product(eights, x))
