"""LLM.int8() under bitsandbytes' names and signatures (0.50.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.errors import InvalidArgument
from qcore.functional.outputs import into
from qcore.ops import int8, validate


def _columns(mask: Tensor | None) -> Tensor | None:
    """Indices of the outlier columns, int64; None where none were looked for."""
    return None if mask is None else mask.nonzero().view(-1)


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row to int8 (QC-INT8-001 to -003).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    threshold : float
        Magnitude from which an element is an outlier; 0 for none.

    Returns
    -------
    codes : Tensor
        int8, the shape of ``A``, 0 in outlier columns.
    row_stats : Tensor
        float32 ``(rows,)``.
    outlier_cols : Tensor or None
        int64 indices of the outlier columns; None when ``threshold`` is 0.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``A`` is no float matrix, or ``threshold`` is negative or not finite.
    """
    codes, row_stats, mask = int8.int8_quantize_rows(A, threshold)
    return codes, row_stats, _columns(mask)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize by rows and by columns (QC-INT8-001 to -004).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    col_stats, row_stats, out_col, out_row : Tensor, optional
        Take the results.
    threshold : float
        Magnitude from which an element is an outlier; 0 for none.

    Returns
    -------
    out_row, out_col, row_stats, col_stats, outlier_cols
        int8, int8 of the shape of ``A``; float32 ``(rows,)`` and ``(K,)``; int64 indices, or None when ``threshold``
        is 0.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``A``, ``threshold`` or a tensor that takes a result does not fit; nothing is written then.
    """
    rows, by_row, mask = int8.int8_quantize_rows(A, threshold)
    cols, by_col = int8.int8_quantize_cols(A, threshold)
    op = "int8_double_quant"
    out_row, out_col, row_stats, col_stats = into(
        op,
        ("out_row", out_row, rows),
        ("out_col", out_col, cols),
        ("row_stats", row_stats, by_row),
        ("col_stats", col_stats, by_col),
    )
    return out_row, out_col, row_stats, col_stats, _columns(mask)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """``A @ B.T`` in exact int32 (QC-INT8-005).

    Parameters
    ----------
    A, B : Tensor
        int8, ``(..., K)`` and ``(N, K)``.
    out : Tensor, optional
        Takes the result.
    dtype : torch.dtype
        Only int32.

    Returns
    -------
    Tensor
        int32 ``(..., N)``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Dtypes or shapes do not fit, or ``K`` is so large that int32 could overflow.
    """
    if dtype != torch.int32:
        raise InvalidArgument(f"int8_linear_matmul: dtype is {dtype}, the product is exact in torch.int32 only")
    return int8.int8_gemm(A, B, out)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Scale an int8 product back (QC-INT8-006).

    Parameters
    ----------
    A : Tensor
        int32 ``(..., N)``.
    row_stats, col_stats : Tensor
        float32, one value a row and ``(N,)``.
    out : Tensor, optional
        Takes the result, in its dtype.
    bias : Tensor, optional
        ``(N,)``.

    Returns
    -------
    Tensor
        The shape of ``A``; float16 unless ``out`` says otherwise.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Dtypes, shapes or devices of the parts do not fit each other or ``out``.
    """
    op = "int8_mm_dequant"
    if out is not None:
        validate.tensor(op, "out", out)
    dtype = torch.float16 if out is None else out.dtype
    result = int8.int8_dequantize_gemm(A, row_stats, col_stats, _bias(bias, dtype), dtype)
    return into(op, ("out", out, result))[0]


def _bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The ops take a bias in the output's dtype or float32; a 16-bit one of another dtype is exact in float32."""
    if bias is not None:
        validate.floats("int8", "bias", bias)
    return bias if bias is None or bias.dtype in (dtype, torch.float32) else bias.float()


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`int8_linear_matmul` and :func:`int8_mm_dequant` in one (QC-INT8-007).

    Parameters
    ----------
    A, B : Tensor
        int8, ``(..., K)`` and ``(N, K)``.
    row_stats, col_stats : Tensor
        float32, one value a row of ``A`` and ``(N,)``.
    bias : Tensor, optional
        ``(N,)``, float32, float16 or bfloat16.
    dtype : torch.dtype, optional
        Of the result; float16 by default.

    Returns
    -------
    Tensor
        ``(..., N)`` in ``dtype``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Dtypes, shapes or devices do not fit, or ``K`` is so large that int32 could overflow.
    """
    dtype = torch.float16 if dtype is None else dtype
    return int8.int8_scaled_gemm(A, B, row_stats, col_stats, _bias(bias, dtype), dtype)


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The int8 product, and the outlier columns of ``A`` times the dequantized ones of ``CB`` added to it.

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(rows, K)``: the activations.
    CA, SCA : Tensor
        Their codes and row statistics.
    CB, SCB : Tensor
        The weight's codes ``(N, K)`` and row statistics.
    outlier_cols : Tensor, optional
        int64 indices.
    bias : Tensor, optional
        ``(N,)``.

    Returns
    -------
    out, outliers : Tensor
        ``(rows, N)`` in the dtype of ``A``; the outlier columns of ``A``, empty if there are none.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Dtypes, shapes or devices do not fit, or ``K`` is so large that int32 could overflow.
    """
    if outlier_cols is None or outlier_cols.numel() == 0:
        return int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), A.new_empty(0)
    # The parts are added in float32 and rounded once.
    product = int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.float32)
    outliers = A[..., outlier_cols].contiguous()
    columns = int8.int8_dequantize_rows(CB[:, outlier_cols].contiguous(), SCB, torch.float32)
    return (product + outliers.float() @ columns.t()).to(A.dtype), outliers


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Read row codes back as float32 (QC-INT8-008).

    Parameters
    ----------
    A : Tensor
        int8 ``(..., K)``.
    stats : Tensor
        float32, one value a row.

    Returns
    -------
    Tensor
        float32, the shape of ``A``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``A`` is not int8, or ``stats`` has not one float32 value a row.
    """
    return int8.int8_dequantize_rows(A, stats, torch.float32)
