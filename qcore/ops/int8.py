"""LLM.int8(): row and column quantization, the int8 product and its dequantization (``docs/spec/50-int8.md``)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.backend.registry import backend_for
from qcore.errors import InvalidArgument
from qcore.ops import compose, validate
from qcore.ops.library import register, traced


def int8_quantize_rows(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row by its largest magnitude, outlier columns left out (QC-INT8-001 to -003).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``. Not differentiated through.
    threshold : float
        Magnitude from which an element is an outlier; 0 for none.

    Returns
    -------
    codes : Tensor
        int8, the shape of ``A``.
    row_stats : Tensor
        float32 ``(rows,)``, rows being the product of the leading dimensions.
    outlier_cols : Tensor or None
        uint8 ``(K,)``, 1 where the column holds an outlier; None when ``threshold`` is 0.
    """
    if traced(A):
        codes, row_stats, outlier_cols = torch.ops.qcore.int8_quantize_rows(A.detach(), threshold)
        return codes, row_stats, outlier_cols
    return _quantize_rows(A, threshold)


def _check_quantize(op: str, A: Tensor, threshold: float) -> tuple[int, int]:
    validate.floats(op, "A", A)
    validate.threshold(op, threshold)
    if A.dim() == 0:
        raise InvalidArgument(f"{op}: A has no dimensions, needs (..., K)")
    return _rows(A), A.shape[-1]


def _rows(A: Tensor) -> int:
    rows = 1
    for size in A.shape[:-1]:
        rows *= size
    return rows


def _plan_quantize_rows(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, k = _check_quantize("int8_quantize_rows", A, threshold)
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    row_stats = torch.empty(rows, dtype=torch.float32, device=A.device)
    outlier_cols = torch.empty(k, dtype=torch.uint8, device=A.device) if threshold > 0.0 else None
    return codes, row_stats, outlier_cols


def _quantize_rows(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, row_stats, outlier_cols = _plan_quantize_rows(A, threshold)
    sizes = (row_stats.numel(), A.shape[-1])
    flat = validate.readable(A).view(sizes)
    out = codes.view(sizes)
    backend_for(A.device).int8_quantize_rows(flat, threshold, out=out, row_stats=row_stats, outlier_cols=outlier_cols)
    return codes, row_stats, outlier_cols


def int8_quantize_cols(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Quantize each column by its largest magnitude, outlier elements left out (QC-INT8-004).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``. Not differentiated through.
    threshold : float
        Magnitude from which an element is an outlier; 0 for none.

    Returns
    -------
    codes, col_stats : Tensor
        int8 of the shape of ``A``; float32 ``(K,)``.
    """
    if traced(A):
        codes, col_stats = torch.ops.qcore.int8_quantize_cols(A.detach(), threshold)
        return codes, col_stats
    return _quantize_cols(A, threshold)


def _plan_quantize_cols(A: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    _, k = _check_quantize("int8_quantize_cols", A, threshold)
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    return codes, torch.empty(k, dtype=torch.float32, device=A.device)


def _quantize_cols(A: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    codes, col_stats = _plan_quantize_cols(A, threshold)
    sizes = (_rows(A), A.shape[-1])
    flat = validate.readable(A).view(sizes)
    backend_for(A.device).int8_quantize_cols(flat, threshold, out=codes.view(sizes), col_stats=col_stats)
    return codes, col_stats


def int8_gemm(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """``A @ B.T`` in exact int32 (QC-INT8-005).

    Parameters
    ----------
    A, B : Tensor
        int8, ``(..., K)`` and ``(N, K)``; ``K`` at most 131,071, so that no sum can overflow.
    out : Tensor, optional
        Takes the result; int32 ``(..., N)``.

    Returns
    -------
    Tensor
        int32 ``(..., N)``; ``out`` if it was given.
    """
    if traced(A, B, out):
        result: Tensor = torch.ops.qcore.int8_gemm(A, B)
        return result if out is None else out.copy_(result)
    if out is None:
        return _gemm(A, B)
    shape = _check_product("int8_gemm", A, B)
    validate.out("int8_gemm", out, shape, torch.int32, A.device)
    if not out.is_contiguous() or validate.overlaps(out, A) or validate.overlaps(out, B):
        return out.copy_(_gemm(A, B))
    return _gemm(A, B, out)


def _check_product(op: str, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of the product."""
    validate.dtype(op, "A", A, torch.int8)
    validate.dtype(op, "B", B, torch.int8)
    if A.dim() == 0 or B.dim() != 2 or A.shape[-1] != B.shape[1]:
        raise InvalidArgument(f"{op}: A has shape {tuple(A.shape)}, B {tuple(B.shape)}, needs (..., K) and (N, K)")
    if B.shape[1] > validate.MAX_INT8_K:
        raise InvalidArgument(f"{op}: K is {B.shape[1]}, int32 sums are exact up to {validate.MAX_INT8_K}; split K")
    validate.device(op, "A", A.device, [("B", B)])
    return (*A.shape[:-1], B.shape[0])


def _plan_gemm(A: Tensor, B: Tensor) -> Tensor:
    return torch.empty(_check_product("int8_gemm", A, B), dtype=torch.int32, device=A.device)


def _gemm(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    out = _plan_gemm(A, B) if out is None else out
    m, (n, k) = _rows(A), B.shape
    flat = validate.readable(A).view(m, k)
    backend_for(A.device).int8_gemm(flat, validate.readable(B), out=out.view(m, n))
    return out


def int8_dequantize_gemm(
    C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Scale an int8 product back: ``C * row * col / 127^2 + bias`` (QC-INT8-006).

    Parameters
    ----------
    C : Tensor
        int32 ``(..., N)``.
    row_stats, col_stats : Tensor
        float32, one value a row of the flattened ``C``, and ``(N,)``.
    bias : Tensor, optional
        ``(N,)`` in ``dtype`` or float32.
    dtype : torch.dtype
        float32, float16 or bfloat16.

    Returns
    -------
    Tensor
        The shape of ``C`` in ``dtype``.
    """
    if traced(C, row_stats, col_stats, bias):
        result: Tensor = torch.ops.qcore.int8_dequantize_gemm(C, row_stats, col_stats, bias, dtype)
        return result
    return _dequantize_gemm(C, row_stats, col_stats, bias, dtype)


def _check_scales(
    op: str, shape: tuple[int, ...], row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    validate.dtype(op, "row_stats", row_stats, torch.float32)
    validate.dtype(op, "col_stats", col_stats, torch.float32)
    validate.float_dtype(op, dtype)
    rows = 1
    for size in shape[:-1]:
        rows *= size
    validate.length(op, "row_stats", row_stats, rows, f"a product of shape {shape}")
    validate.length(op, "col_stats", col_stats, shape[-1], f"a product of shape {shape}")
    validate.bias(op, bias, shape[-1], dtype)
    others = [("col_stats", col_stats), ("bias", bias)]
    validate.device(op, "row_stats", row_stats.device, others)


def _plan_dequantize_gemm(
    C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    op = "int8_dequantize_gemm"
    validate.dtype(op, "C", C, torch.int32)
    if C.dim() == 0:
        raise InvalidArgument(f"{op}: C has no dimensions, needs (..., N)")
    _check_scales(op, tuple(C.shape), row_stats, col_stats, bias, dtype)
    validate.device(op, "C", C.device, [("row_stats", row_stats)])
    return torch.empty(C.shape, dtype=dtype, device=C.device)


def _dequantize_gemm(
    C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = _plan_dequantize_gemm(C, row_stats, col_stats, bias, dtype)
    sizes = (row_stats.numel(), C.shape[-1])
    scales = (validate.readable(row_stats), validate.readable(col_stats))
    bias = None if bias is None else validate.readable(bias)
    flat = validate.readable(C).view(sizes)
    backend_for(C.device).int8_dequantize_gemm(flat, *scales, bias, out=out.view(sizes))
    return out


def int8_scaled_gemm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """:func:`int8_gemm` and :func:`int8_dequantize_gemm` in one, bit for bit (QC-INT8-007).

    Parameters
    ----------
    A, B : Tensor
        int8, ``(..., K)`` and ``(N, K)``; ``K`` at most 131,071.
    row_stats, col_stats : Tensor
        float32, one value a row of the flattened ``A``, and ``(N,)``.
    bias : Tensor, optional
        ``(N,)`` in ``dtype`` or float32.
    dtype : torch.dtype
        float32, float16 or bfloat16.

    Returns
    -------
    Tensor
        ``(..., N)`` in ``dtype``.
    """
    if traced(A, B, row_stats, col_stats, bias):
        result: Tensor = torch.ops.qcore.int8_scaled_gemm(A, B, row_stats, col_stats, bias, dtype)
        return result
    return _scaled_gemm(A, B, row_stats, col_stats, bias, dtype)


def _plan_scaled_gemm(
    A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    op = "int8_scaled_gemm"
    shape = _check_product(op, A, B)
    _check_scales(op, shape, row_stats, col_stats, bias, dtype)
    validate.device(op, "A", A.device, [("row_stats", row_stats)])
    return torch.empty(shape, dtype=dtype, device=A.device)


def _scaled_gemm(
    A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = _plan_scaled_gemm(A, B, row_stats, col_stats, bias, dtype)
    m, (n, k) = row_stats.numel(), B.shape
    backend = backend_for(A.device)
    matrices = (validate.readable(A).view(m, k), validate.readable(B))
    scales = (validate.readable(row_stats), validate.readable(col_stats))
    bias = None if bias is None else validate.readable(bias)
    if backend.supports("int8_scaled_gemm"):
        backend.int8_scaled_gemm(*matrices, *scales, bias, out=out.view(m, n))
    else:
        compose.int8_scaled_gemm(backend, *matrices, *scales, bias, out=out.view(m, n))
    return out


def int8_dequantize_rows(A: Tensor, row_stats: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read row codes back: ``A * row / 127`` (QC-INT8-008).

    Parameters
    ----------
    A : Tensor
        int8 ``(..., K)``.
    row_stats : Tensor
        float32, one value a row of the flattened ``A``.
    dtype : torch.dtype
        float32, float16 or bfloat16.

    Returns
    -------
    Tensor
        The shape of ``A`` in ``dtype``.
    """
    if traced(A, row_stats):
        result: Tensor = torch.ops.qcore.int8_dequantize_rows(A, row_stats, dtype)
        return result
    return _dequantize_rows(A, row_stats, dtype)


def _plan_dequantize_rows(A: Tensor, row_stats: Tensor, dtype: torch.dtype) -> Tensor:
    op = "int8_dequantize_rows"
    validate.dtype(op, "A", A, torch.int8)
    validate.dtype(op, "row_stats", row_stats, torch.float32)
    validate.float_dtype(op, dtype)
    if A.dim() == 0:
        raise InvalidArgument(f"{op}: A has no dimensions, needs (..., K)")
    validate.length(op, "row_stats", row_stats, _rows(A), f"A of shape {tuple(A.shape)}")
    validate.device(op, "A", A.device, [("row_stats", row_stats)])
    return torch.empty(A.shape, dtype=dtype, device=A.device)


def _dequantize_rows(A: Tensor, row_stats: Tensor, dtype: torch.dtype) -> Tensor:
    out = _plan_dequantize_rows(A, row_stats, dtype)
    sizes = (row_stats.numel(), A.shape[-1])
    flat = validate.readable(A).view(sizes)
    backend_for(A.device).int8_dequantize_rows(flat, validate.readable(row_stats), out=out.view(sizes))
    return out


register(
    "int8_quantize_rows",
    "(Tensor A, float threshold) -> (Tensor, Tensor, Tensor?)",
    _quantize_rows,
    _plan_quantize_rows,
)
register("int8_quantize_cols", "(Tensor A, float threshold) -> (Tensor, Tensor)", _quantize_cols, _plan_quantize_cols)
register("int8_gemm", "(Tensor A, Tensor B) -> Tensor", _gemm, _plan_gemm)
register(
    "int8_dequantize_gemm",
    "(Tensor C, Tensor row_stats, Tensor col_stats, Tensor? bias, ScalarType dtype) -> Tensor",
    _dequantize_gemm,
    _plan_dequantize_gemm,
)
register(
    "int8_scaled_gemm",
    "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias, ScalarType dtype) -> Tensor",
    _scaled_gemm,
    _plan_scaled_gemm,
)
register(
    "int8_dequantize_rows",
    "(Tensor A, Tensor row_stats, ScalarType dtype) -> Tensor",
    _dequantize_rows,
    _plan_dequantize_rows,
)
