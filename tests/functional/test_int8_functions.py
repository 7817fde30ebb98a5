"""LLM.int8() under bitsandbytes' names, beside bitsandbytes 0.50.2 on the CPU and beside float64."""

from __future__ import annotations

import bitsandbytes.functional as B
import pytest
import torch
from torch import Tensor

from qcore import functional as F
from qcore.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("backend")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_rows_are_bitsandbytes(threshold: float) -> None:
    A = random(16, 64)
    mine, theirs = F.int8_vectorwise_quant(A, threshold), B.int8_vectorwise_quant(A.clone(), threshold)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    if threshold == 0.0:
        assert mine[2] is theirs[2] is None
    else:
        assert mine[2].dtype == torch.int64
        assert torch.equal(mine[2], theirs[2])


@pytest.mark.parametrize("value", [1e5, -7e4])
def test_large_activations_are_not_lost_in_float16(value: float) -> None:
    A = random(4, 64)
    A[1, 3] = value
    back = F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(A)[:2])
    torch.testing.assert_close(back[1, 3].item(), value, rtol=1e-6, atol=0)


def test_no_outliers_give_an_empty_list() -> None:
    columns = F.int8_vectorwise_quant(random(4, 64), 100.0)[2]
    assert columns.dtype == torch.int64
    assert columns.shape == (0,)


def test_dequantized_rows_are_bitsandbytes_within_a_rounding() -> None:
    A, stats = codes(16, 64), random(16).abs()
    torch.testing.assert_close(
        F.int8_vectorwise_dequant(A, stats), B.int8_vectorwise_dequant(A, stats), rtol=2.0**-23, atol=0
    )


def test_product_is_bitsandbytes() -> None:
    A, Bt = codes(2, 3, 64), codes(24, 64, seed=1)
    assert torch.equal(F.int8_linear_matmul(A, Bt), B.int8_linear_matmul(A, Bt))
    out = torch.empty(2, 3, 24, dtype=torch.int32)
    assert F.int8_linear_matmul(A, Bt, out) is out
    assert torch.equal(out, B.int8_linear_matmul(A, Bt))
    with pytest.raises(InvalidArgument, match=r"dtype is torch\.float32"):
        F.int8_linear_matmul(A, Bt, dtype=torch.float32)


@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.float32, torch.bfloat16])
def test_dequantized_product_is_exact_to_float16(bias_dtype: torch.dtype | None) -> None:
    product, rows, cols = codes(6, 24).int() * 1000, random(6).abs(), random(24, seed=1).abs()
    bias = None if bias_dtype is None else random(24, seed=2, dtype=bias_dtype)
    mine = F.int8_mm_dequant(product, rows, cols, bias=bias)
    exact = product.double() * rows.double()[:, None] * cols.double() / 127**2
    exact = exact if bias is None else exact + bias.double()
    assert mine.dtype == torch.float16
    torch.testing.assert_close(mine.double(), exact, rtol=2.0**-10, atol=1e-6)
    torch.testing.assert_close(mine, B.int8_mm_dequant(product, rows, cols, bias=bias), rtol=2.0**-9, atol=1e-3)


def test_dequantized_product_in_the_dtype_of_out() -> None:
    product, rows, cols = codes(6, 24).int(), random(6).abs(), random(24).abs()
    out = torch.empty(6, 24)
    assert F.int8_mm_dequant(product, rows, cols, out) is out
    assert torch.equal(out.half(), F.int8_mm_dequant(product, rows, cols))
    with pytest.raises(InvalidArgument, match=r"int8_mm_dequant: out is .* of shape \(24, 6\)"):
        F.int8_mm_dequant(product, rows, cols, out.t())


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_double_quant_is_by_rows_and_by_columns(threshold: float) -> None:
    A = random(16, 64)
    out_row, out_col, row_stats, col_stats, columns = F.int8_double_quant(A, threshold=threshold)
    rows = F.int8_vectorwise_quant(A, threshold)
    assert torch.equal(out_row, rows[0])
    assert torch.equal(row_stats, rows[1])
    assert (columns is None) if threshold == 0.0 else torch.equal(columns, rows[2])
    kept = A.masked_fill(A.abs() >= threshold, 0.0) if threshold else A
    by_column = F.int8_vectorwise_quant(kept.t().contiguous())
    assert torch.equal(out_col, by_column[0].t())
    assert torch.equal(col_stats, by_column[1])


def test_double_quant_uses_preallocated_results() -> None:
    A = random(16, 64)
    expected = F.int8_double_quant(A)
    given = [torch.empty_like(part) for part in expected[:4]]
    out_row, out_col, row_stats, col_stats = given
    results = F.int8_double_quant(A, col_stats=col_stats, row_stats=row_stats, out_col=out_col, out_row=out_row)
    for result, mine, wanted in zip(results[:4], given, expected[:4], strict=True):
        assert result is mine
        assert torch.equal(mine, wanted)
    with pytest.raises(InvalidArgument, match="int8_double_quant: col_stats"):
        F.int8_double_quant(A, col_stats=torch.empty(3))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_mixed_product_is_close_to_the_float_product(threshold: float) -> None:
    A, W, bias = random(16, 64), random(24, 64, seed=1), random(24, seed=2)
    A[:, 5] *= 20
    CA, SCA, columns = F.int8_vectorwise_quant(A, threshold)
    CB, SCB, _ = F.int8_vectorwise_quant(W)
    y, outliers = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
    exact = A.double() @ W.double().t() + bias.double()
    error = (y.double() - exact).abs().max()
    assert y.dtype == A.dtype
    if threshold:
        assert torch.equal(outliers, A[:, columns])
        assert error < 1.0
    else:
        assert outliers.numel() == 0
        assert error > 1.0, "the outlier column costs accuracy where it is not taken out"
    plain = F.int8_scaled_mm(CA, CB, SCA, SCB, bias)
    assert plain.dtype == torch.float16
    if not threshold:
        assert torch.equal(plain, y.half())
