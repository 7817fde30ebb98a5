"""The truth, in float64 NumPy: each operation is done exactly or in float64 and then rounded once to float32.

A float32 product or sum is correctly rounded after one float64 operation and one rounding (53 >= 2 * 24 + 2), so
no float32 arithmetic of the machine is trusted here. Nothing is shared with a backend or with the reference; the second
oracle, :mod:`~qcore_conformance.scalar_oracle`, shares nothing with this one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcore import codebooks
from qcore_conformance.floats import Floats, f32, rounded

F64 = NDArray[np.float64]
TABLES = {"nf4": np.array(codebooks.NF4), "fp4": np.array(codebooks.FP4)}
ZERO_CODE = {"nf4": 7, "fp4": 0}
_FP4_THRESHOLDS = np.array(codebooks.FP4_THRESHOLDS)
_FP4_ORDER = np.array(codebooks.FP4_ORDER, dtype=np.uint8)
INV_127 = float.fromhex("0x1.020408p-7")  # QC-INT8-008
INV_127_SQUARED = float.fromhex("0x1.040c2p-14")  # QC-INT8-006


def r32(values: ArrayLike) -> F64:
    """Round float64 to float32; the result stays in float64."""
    with np.errstate(all="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32).astype(np.float64)


def midpoints(code: ArrayLike) -> F64:
    """QC-Q8-004, QC-NF4-002: ``m[j] = (c[j] + c[j+1]) * 0.5``."""
    c = np.asarray(code, dtype=np.float64)
    return r32(r32(c[:-1] + c[1:]) * 0.5)


def _blocks(x: F64, blocksize: int) -> F64:
    """Rows of one block each; the tail is filled with NaN, which every clause leaves out."""
    count = -(-x.size // blocksize)
    padded = np.full(count * blocksize, np.nan)
    padded[: x.size] = x
    return padded.reshape(count, blocksize)


def _absmax(x: F64, axis: int) -> F64:
    """QC-Q8-002: the largest magnitude, NaN left out, 0 if nothing is left."""
    magnitude = np.abs(x)
    return np.where(np.isnan(magnitude), 0.0, magnitude).max(axis=axis, initial=0.0)


def _scaled(x: F64, absmax: F64) -> F64:
    """QC-Q8-003 on blocks: reciprocal, product, 0 for NaN and for empty blocks."""
    with np.errstate(all="ignore"):
        y = r32(x * r32(1.0 / absmax)[:, None])
    return np.where(np.isnan(y) | (absmax == 0)[:, None], 0.0, y)


class Quantized(NamedTuple):
    absmax: Floats
    codes: NDArray[np.uint8]


def _quantize_8bit(x: F64, code: NDArray[np.float32], blocksize: int) -> Quantized:
    blocks = _blocks(x, blocksize)
    absmax = _absmax(blocks, axis=1)
    y = _scaled(blocks, absmax).reshape(-1)[: x.size]
    m = midpoints(code)
    # QC-Q8-004, counted twice: thresholds below y, and odd ones of a strict step that equal y.
    below = np.searchsorted(m, y, side="left")
    strict = code[:-1] < code[1:]
    odd = m[(np.arange(255) % 2 == 1) & strict]
    equal = np.searchsorted(odd, y, side="right") - np.searchsorted(odd, y, side="left")
    return Quantized(f32(absmax), (below + equal).astype(np.uint8))


def quantize_blockwise(a: Floats, code: NDArray[np.float32], blocksize: int) -> Quantized:
    """QC-Q8-001 to QC-Q8-004."""
    return _quantize_8bit(a.f64().reshape(-1), code, blocksize)


def _per_element(values: F64, n: int, blocksize: int) -> F64:
    return np.repeat(values, blocksize)[:n]


def dequantize_blockwise(
    codes: NDArray[np.uint8], absmax: Floats, code: NDArray[np.float32], blocksize: int, dtype: str
) -> Floats:
    """QC-Q8-005."""
    with np.errstate(all="ignore"):
        product = code.astype(np.float64)[codes] * _per_element(absmax.f64(), codes.size, blocksize)
    return rounded(r32(product), dtype)


def codes_4bit(y: F64, quant_type: str) -> NDArray[np.uint8]:
    """QC-NF4-002 or QC-FP4-002."""
    if quant_type == "nf4":
        return (y[..., None] > midpoints(TABLES["nf4"])).sum(axis=-1).astype(np.uint8)
    position = (np.abs(y)[..., None] > _FP4_THRESHOLDS).sum(axis=-1)
    return _FP4_ORDER[position] + np.where(y < 0, 8, 0).astype(np.uint8)


def pack(codes: NDArray[np.uint8], quant_type: str) -> NDArray[np.uint8]:
    """QC-4BIT-002."""
    padded = np.concatenate([codes, np.full(codes.size % 2, ZERO_CODE[quant_type], dtype=np.uint8)])
    return (padded[0::2] * 16 + padded[1::2]).astype(np.uint8)


def unpack(packed: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    return np.stack([packed // 16, packed % 16], axis=1).reshape(-1)[:n]


def quantize_4bit(a: Floats, quant_type: str, blocksize: int) -> Quantized:
    """QC-4BIT-001, QC-4BIT-002; ``codes`` are packed."""
    x = a.f64().reshape(-1)
    blocks = _blocks(x, blocksize)
    absmax = _absmax(blocks, axis=1)
    y = _scaled(blocks, absmax).reshape(-1)[: x.size]
    return Quantized(f32(absmax), pack(codes_4bit(y, quant_type), quant_type))


def dequantize_4bit(
    packed: NDArray[np.uint8], absmax: Floats, quant_type: str, n: int, blocksize: int, dtype: str
) -> Floats:
    """QC-4BIT-003, with a decoded absmax."""
    with np.errstate(all="ignore"):
        product = TABLES[quant_type][unpack(packed, n)] * _per_element(absmax.f64(), n, blocksize)
    return rounded(r32(product), dtype)


class Nested(NamedTuple):
    codes: NDArray[np.uint8]
    nested_absmax: Floats
    offset: Floats


def offset(absmax: Floats) -> float:
    """QC-NEST-001."""
    x = absmax.f64()
    if x.size == 0:
        return 0.0
    with np.errstate(all="ignore"):
        total = 0.0
        for lane in range(min(256, x.size)):
            # cumsum adds strictly in index order, unlike sum.
            total += np.cumsum(x[lane::256])[-1]
        return float(r32(total / x.size))


def quantize_absmax(absmax: Floats, code: NDArray[np.float32], blocksize: int) -> Nested:
    """QC-NEST-001, QC-NEST-002."""
    mean = offset(absmax)
    with np.errstate(all="ignore"):
        difference = r32(absmax.f64() - mean)
    quantized = _quantize_8bit(difference, code, blocksize)
    return Nested(quantized.codes, quantized.absmax, f32([mean]))


def dequantize_absmax(
    codes: NDArray[np.uint8], nested_absmax: Floats, code: NDArray[np.float32], mean: Floats, blocksize: int
) -> Floats:
    """QC-NEST-003."""
    with np.errstate(all="ignore"):
        product = r32(code.astype(np.float64)[codes] * _per_element(nested_absmax.f64(), codes.size, blocksize))
        return f32(r32(product + mean.f64()[0]))


class Rows(NamedTuple):
    codes: NDArray[np.int8]
    stats: Floats
    outlier_cols: NDArray[np.uint8]


def _int8_codes(x: F64, stats: F64) -> F64:
    """QC-INT8-003 along the last axis's statistics, already broadcastable."""
    with np.errstate(all="ignore"):
        q = r32(x * r32(127.0 / stats))
    q = np.where(np.isnan(q), 0.0, np.clip(np.rint(q), -127, 127))
    return np.where(stats == 0, 0.0, q)


def _outliers(x: F64, threshold: float) -> NDArray[np.bool_]:
    return ~(np.abs(x) < float(np.float32(threshold))) if threshold > 0 else np.zeros(x.shape, dtype=bool)


def int8_quantize_rows(a: Floats, threshold: float) -> Rows:
    """QC-INT8-001 to QC-INT8-003."""
    x = a.f64()
    outlier = _outliers(x, threshold)
    columns = outlier.any(axis=0)
    stats = _absmax(np.where(outlier, np.nan, x), axis=1)
    codes = np.where(columns[None, :], 0.0, _int8_codes(x, stats[:, None]))
    return Rows(codes.astype(np.int8), f32(stats), columns.astype(np.uint8))


def int8_quantize_cols(a: Floats, threshold: float) -> tuple[NDArray[np.int8], Floats]:
    """QC-INT8-004."""
    x = a.f64()
    outlier = _outliers(x, threshold)
    stats = _absmax(np.where(outlier, np.nan, x), axis=0)
    codes = np.where(outlier, 0.0, _int8_codes(x, stats[None, :]))
    return codes.astype(np.int8), f32(stats)


def int8_gemm(a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """QC-INT8-005; float64 holds every sum exactly (131,071 * 2^14 < 2^53)."""
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int64).astype(np.int32)


def int8_dequantize_gemm(
    c: NDArray[np.int32], row_stats: Floats, col_stats: Floats, bias: Floats | None, dtype: str
) -> Floats:
    """QC-INT8-006."""
    with np.errstate(all="ignore"):
        t = r32(c.astype(np.float64))
        t = r32(t * row_stats.f64()[:, None])
        t = r32(t * col_stats.f64()[None, :])
        t = r32(t * INV_127_SQUARED)
        if bias is not None:
            t = r32(t + bias.f64()[None, :])
    return rounded(t, dtype)


def int8_linear(
    a: Floats, b: NDArray[np.int8], col_stats: Floats, threshold: float, bias: Floats | None
) -> tuple[Floats, NDArray[np.uint8]]:
    """QC-INT8-010: the product in the dtype of ``a``, and the outlier columns."""
    rows = int8_quantize_rows(a, threshold)
    t = int8_dequantize_gemm(int8_gemm(rows.codes, b), rows.stats, col_stats, bias, "f32").f64()
    weights, x = int8_dequantize_rows(b, col_stats, "f32").f64(), a.f64()
    with np.errstate(all="ignore"):
        for k in np.flatnonzero(rows.outlier_cols):
            t = r32(t + r32(x[:, k, None] * weights[None, :, k]))
    return rounded(t, a.dtype), rows.outlier_cols


def int8_dequantize_rows(codes: NDArray[np.int8], row_stats: Floats, dtype: str) -> Floats:
    """QC-INT8-008."""
    with np.errstate(all="ignore"):
        t = r32(codes.astype(np.float64) * row_stats.f64()[:, None])
        return rounded(r32(t * INV_127), dtype)


def dequantize_int4(
    packed: NDArray[np.uint8],
    scales: Floats,
    zeros: NDArray[np.uint8] | None,
    perm: NDArray[np.int32] | None,
    group_size: int,
    k: int,
    dtype: str,
) -> Floats:
    """QC-INT4-001 to QC-INT4-003: ``(N, K)`` in the order of X."""
    n = len(packed)
    codes = unpack(packed.reshape(-1), packed.size * 2).reshape(n, packed.shape[1] * 2)[:, :k].astype(np.float64)
    zero = np.full(scales.shape, 8.0) if zeros is None else zeros.astype(np.float64)
    s = scales.f64()
    w = np.empty((n, k))
    with np.errstate(all="ignore"):
        for j in range(k):
            column = j if perm is None else int(perm[j])
            w[:, column] = r32((codes[:, j] - zero[:, j // group_size]) * s[:, j // group_size])
    return rounded(w, dtype)


class Product(NamedTuple):
    exact: F64
    magnitude: F64  # sum |x*w| + |bias|


def gemm_4bit(x: Floats, decoded: Floats, bias: Floats | None) -> Product:
    """QC-GEMM4-004's ``y*`` from the decoded float32 weights ``(N, K)``, in float64."""
    a, w = x.f64(), decoded.f64()
    exact, magnitude = a @ w.T, np.abs(a) @ np.abs(w).T
    if bias is not None:
        exact = exact + bias.f64()
        magnitude = magnitude + np.abs(bias.f64())
    return Product(exact, magnitude)


def int8_linear_transposed(y: Floats, b: NDArray[np.int8], row_stats: Floats) -> Product:
    """QC-INT8-012's ``x*``: the rows of ``y`` times codes that stand for multiples of their row's ``stat / 127``."""
    w = b.astype(np.float64) * row_stats.f64()[:, None] / 127
    return Product(y.f64() @ w, np.abs(y.f64()) @ np.abs(w))
