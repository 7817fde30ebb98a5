"""LLM.int8(): docs/spec/50-int8.md."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcore_cpu_reference.blockwise import U8
from qcore_cpu_reference.floats import F32

I8 = NDArray[np.int8]
I32 = NDArray[np.int32]

_LEVELS = np.float32(127)
_PRODUCT_SCALE = np.float32(float.fromhex("0x1.040c2p-14"))  # 1 / 127^2
_ROW_SCALE = np.float32(float.fromhex("0x1.020408p-7"))  # 1 / 127


def outliers(x: F32, threshold: float) -> NDArray[np.bool_]:
    """QC-INT8-001: which elements are outliers."""
    if threshold == 0:
        return np.zeros(x.shape, np.bool_)
    with np.errstate(all="ignore"):
        return ~(np.abs(x) < np.float32(threshold))


def _statistics(x: F32, outlier: NDArray[np.bool_], axis: int) -> F32:
    """QC-INT8-002: the largest magnitude along ``axis`` of what is neither outlier nor NaN."""
    return np.max(np.abs(x), axis=axis, initial=np.float32(0), where=~(outlier | np.isnan(x)))


def _codes(x: F32, statistics: F32) -> I8:
    """QC-INT8-003, outliers apart; ``statistics`` broadcasts against ``x``."""
    with np.errstate(all="ignore"):
        q = x * (_LEVELS / statistics)
    q = np.where(np.isnan(q) | (statistics == 0), np.float32(0), q)
    return np.clip(np.rint(q), -127, 127).astype(np.int8)


def quantize_rows(x: F32, threshold: float) -> tuple[I8, F32, U8]:
    """QC-INT8-001 to QC-INT8-003: codes, row statistics, outlier columns."""
    outlier = outliers(x, threshold)
    row_stats = _statistics(x, outlier, axis=1)
    columns = outlier.any(axis=0)
    codes = _codes(x, row_stats[:, None])
    codes[:, columns] = 0
    return codes, row_stats, columns.astype(np.uint8)


def quantize_cols(x: F32, threshold: float) -> tuple[I8, F32]:
    """QC-INT8-004: codes and column statistics."""
    outlier = outliers(x, threshold)
    col_stats = _statistics(x, outlier, axis=0)
    codes = _codes(x, col_stats[None, :])
    codes[outlier] = 0
    return codes, col_stats


def gemm(a: I8, b: I8) -> I32:
    """QC-INT8-005. Exact: every partial sum is an integer below 2^31, far inside float64's 2^53."""
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int32)


def dequantize_gemm(c: I32, row_stats: F32, col_stats: F32, bias: F32 | None) -> F32:
    """QC-INT8-006, before the last rounding."""
    with np.errstate(all="ignore"):
        t = c.astype(np.float32) * row_stats[:, None]
        t = t * col_stats[None, :]
        t = t * _PRODUCT_SCALE
        return t if bias is None else t + bias


def linear(x: F32, b: I8, col_stats: F32, threshold: float, bias: F32 | None) -> tuple[F32, U8]:
    """QC-INT8-010, before the last rounding, and the outlier columns."""
    codes, row_stats, columns = quantize_rows(x, threshold)
    t = dequantize_gemm(gemm(codes, b), row_stats, col_stats, bias)
    weights = dequantize_rows(b, col_stats)
    with np.errstate(all="ignore"):
        for k in np.flatnonzero(columns):
            t = t + x[:, k, None] * weights[None, :, k]
    return t, columns


def dequantize_rows(codes: I8, row_stats: F32) -> F32:
    """QC-INT8-008, before the last rounding."""
    with np.errstate(all="ignore"):
        return (codes.astype(np.float32) * row_stats[:, None]) * _ROW_SCALE


def linear_transposed(y: F32, b: I8, col_stats: F32) -> F32:
    """QC-INT8-011 and -012 before the last rounding: the sum in float64, rounded once to float32."""
    with np.errstate(all="ignore"):
        return (y.astype(np.float64) @ dequantize_rows(b, col_stats).astype(np.float64)).astype(np.float32)
