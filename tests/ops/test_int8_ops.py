"""The int8 ops of ``qcore.ops``: values, outliers, shapes, layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from expected import random
from qcore.errors import InvalidArgument
from qcore.ops.int8 import (
    int8_dequantize_gemm,
    int8_dequantize_rows,
    int8_gemm,
    int8_quantize_cols,
    int8_quantize_rows,
    int8_scaled_gemm,
)

pytestmark = pytest.mark.usefixtures("backend")


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def expected_rows(A: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """QC-INT8-001 to -003 in NumPy float32."""
    x = A.float().numpy().reshape(-1, A.shape[-1])
    outlier = ~(np.abs(x) < np.float32(threshold)) if threshold > 0 else np.zeros_like(x, bool)
    kept = np.where(outlier | np.isnan(x), np.float32(0), np.abs(x))
    stats = kept.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = x * (np.float32(127) / stats)[:, None]
    q = np.clip(np.rint(np.where(np.isnan(q), 0, q)), -127, 127)
    q[stats == 0] = 0
    q[:, outlier.any(axis=0)] = 0
    return q.astype(np.int8), stats, outlier.any(axis=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 64), (5,)])
def test_rows_are_those_of_the_spec(shape: tuple[int, ...], threshold: float, dtype: torch.dtype) -> None:
    A = random(*shape, dtype=dtype)
    got, stats, mask = int8_quantize_rows(A, threshold)
    expected, expected_stats, outliers = expected_rows(A, threshold)
    assert got.shape == A.shape
    np.testing.assert_array_equal(got.numpy().reshape(expected.shape), expected)
    np.testing.assert_array_equal(stats.numpy(), expected_stats)
    if threshold == 0.0:
        assert mask is None
    else:
        assert mask is not None
        np.testing.assert_array_equal(mask.numpy(), outliers.astype(np.uint8))


def test_columns_keep_the_other_elements_of_an_outlier_column() -> None:
    A = random(9, 5)
    A[4, 2] = 50.0
    got, stats = int8_quantize_cols(A, 6.0)
    rows, row_stats, _ = int8_quantize_rows(A.masked_fill(A.abs() >= 6.0, 0.0).t().contiguous(), 0.0)
    assert torch.equal(got, rows.t())
    assert torch.equal(stats, row_stats)
    assert got[4, 2] == 0
    assert got[:, 2].count_nonzero() > 0


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (40,)])
def test_product_is_exact(shape: tuple[int, ...]) -> None:
    A, B = codes(*shape), codes(11, 40, seed=1)
    result = int8_gemm(A, B)
    assert result.dtype == torch.int32
    np.testing.assert_array_equal(result.numpy(), A.numpy().astype(np.int64) @ B.numpy().astype(np.int64).T)
    out = torch.empty_like(result)
    assert int8_gemm(A, B, out) is out
    assert torch.equal(out, result)


def test_product_is_exact_at_the_largest_k_and_refused_beyond() -> None:
    A = torch.full((1, 131_071), -128, dtype=torch.int8)
    assert int8_gemm(A, A).item() == 131_071 * 128 * 128
    longer = torch.full((1, 131_072), -128, dtype=torch.int8)
    with pytest.raises(InvalidArgument, match=r"int8_gemm: K is 131072, .*131071"):
        int8_gemm(longer, longer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "out"])
def test_dequantized_product_takes_each_rounding_in_order(dtype: torch.dtype, bias_dtype: object) -> None:
    A, B = codes(2, 3, 40), codes(11, 40, seed=1)
    rows, cols = random(6).abs(), random(11, seed=1).abs()
    bias = None if bias_dtype is None else random(11, seed=2).to(dtype if bias_dtype == "out" else torch.float32)
    product = int8_gemm(A, B)
    t = product.numpy().reshape(6, 11).astype(np.float32) * rows.numpy()[:, None] * cols.numpy()
    t = t * np.float32(float.fromhex("0x1.040c2p-14"))
    t = t if bias is None else t + bias.float().numpy()
    expected = torch.from_numpy(t).to(dtype).reshape(2, 3, 11)
    assert torch.equal(int8_dequantize_gemm(product, rows, cols, bias, dtype), expected)
    assert torch.equal(int8_scaled_gemm(A, B, rows, cols, bias, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantized_rows(dtype: torch.dtype) -> None:
    A, stats = codes(2, 3, 40), random(6).abs()
    t = (
        A.numpy().reshape(6, 40).astype(np.float32)
        * stats.numpy()[:, None]
        * np.float32(float.fromhex("0x1.020408p-7"))
    )
    assert torch.equal(int8_dequantize_rows(A, stats, dtype), torch.from_numpy(t).to(dtype).reshape(2, 3, 40))


def test_layouts_do_not_matter() -> None:
    A, B = codes(40, 6).t(), codes(40, 11, seed=1).t()
    assert torch.equal(int8_gemm(A, B), int8_gemm(A.contiguous(), B.contiguous()))
    X = random(40, 6).t()
    assert torch.equal(int8_quantize_rows(X)[0], int8_quantize_rows(X.contiguous())[0])
    strided = torch.zeros(6, 22, dtype=torch.int32)[:, ::2]
    assert int8_gemm(A, B, strided) is strided
    assert torch.equal(strided, int8_gemm(A, B))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_sizes(m: int, n: int, k: int) -> None:
    A, B = codes(m, k), codes(n, k)
    assert torch.equal(int8_gemm(A, B), torch.zeros(m, n, dtype=torch.int32))
    scales = (torch.ones(m), torch.ones(n))
    assert torch.equal(int8_scaled_gemm(A, B, *scales, None, torch.float32), torch.zeros(m, n))
    got, stats, mask = int8_quantize_rows(torch.zeros(m, k), 1.0)
    assert got.shape == (m, k)
    assert torch.equal(stats, torch.zeros(m))
    assert mask is not None
    assert torch.equal(mask, torch.zeros(k, dtype=torch.uint8))
