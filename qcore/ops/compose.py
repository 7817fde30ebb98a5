"""Ops that a backend leaves out, made of others that it serves: only where the result is the one the spec asks for.

Each composition is logged once a backend, at WARNING, and ``composed_ops`` names them for ``qcore info``. The
conformance suite calls backends directly and never sees one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qcore.backend.interface import Backend, PreparedGemm, PreparedInt8, Weight4bit, Weight8bit, WeightInt4
from qcore.errors import Unsupported

log = logging.getLogger("qcore")
_logged: set[tuple[Backend, str]] = set()

# op -> (what it is made of, the text for people)
_RECIPES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "int8_scaled_gemm": (
        ("int8_gemm", "int8_dequantize_gemm"),
        "int8_gemm, then int8_dequantize_gemm (QC-INT8-007)",
    ),
    "int8_linear": (
        ("int8_quantize_rows", "int8_gemm", "int8_dequantize_gemm", "int8_dequantize_rows"),
        "int8_quantize_rows, int8_gemm, int8_dequantize_gemm, and each outlier column on its own: slow (QC-INT8-010)",
    ),
    "dequantize_absmax": (
        ("dequantize_blockwise",),
        "dequantize_blockwise to float32, then the offset added in float32 (QC-NEST-003)",
    ),
    "gemm_4bit": (
        ("dequantize_4bit",),
        "dequantize_4bit to float32, then torch.matmul in float32: slow (QC-GEMM4-001 to -003)",
    ),
    "gemm_int4": ((), "torch's own operations, which decode to float32, then torch.matmul: slow (QC-INT4-002 to -004)"),
    "gemm_4bit_transposed": (
        ("dequantize_4bit",),
        "dequantize_4bit to the dtype of A, then torch.matmul, whose settings decide how it sums (QC-GEMM4-008)",
    ),
    "int8_linear_transposed": (
        ("int8_dequantize_rows",),
        "int8_dequantize_rows to the dtype of A, then torch.matmul, whose settings decide how it sums (QC-INT8-011)",
    ),
}


def composed_ops(backend: Backend) -> dict[str, str]:
    """The ops that ``backend`` leaves out and qcore makes of others: op name to how."""
    return {
        op: how
        for op, (parts, how) in _RECIPES.items()
        if not backend.supports(op) and all(backend.supports(part) for part in parts)
    }


def _announce(backend: Backend, op: str) -> None:
    how = composed_ops(backend).get(op)
    if how is None:
        raise backend._unsupported(op)
    if (backend, op) not in _logged:
        _logged.add((backend, op))
        log.warning("backend %s does not serve %s; it is composed of %s", backend.name, op, how)


def int8_scaled_gemm(
    backend: Backend, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
) -> None:
    """QC-INT8-007: the fused product is bit for bit these two."""
    _announce(backend, "int8_scaled_gemm")
    product = torch.empty(out.shape, dtype=torch.int32, device=out.device)
    backend.int8_gemm(A, B, out=product)
    backend.int8_dequantize_gemm(product, row_stats, col_stats, bias, out=out)


def int8_linear(
    backend: Backend,
    A: Tensor,
    W: Weight8bit,
    threshold: float,
    bias: Tensor | None,
    *,
    out: Tensor,
    outliers: Tensor | None,
) -> None:
    """QC-INT8-010, step by step."""
    _announce(backend, "int8_linear")
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    row_stats = torch.empty(len(A), dtype=torch.float32, device=A.device)
    backend.int8_quantize_rows(A, threshold, out=codes, row_stats=row_stats, outlier_cols=outliers)
    product = torch.empty(out.shape, dtype=torch.int32, device=out.device)
    backend.int8_gemm(codes, W.codes, out=product)
    t = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    backend.int8_dequantize_gemm(product, row_stats, W.scales, None if bias is None else bias.float(), out=t)
    if outliers is not None and outliers.any():
        weights = torch.empty(W.codes.shape, dtype=torch.float32, device=out.device)
        backend.int8_dequantize_rows(W.codes, W.scales, out=weights)
        for k in outliers.nonzero().view(-1).tolist():
            t += A[:, k, None].float() * weights[None, :, k]
    out.copy_(t)


def prepare_int8_linear(backend: Backend, W: Weight8bit) -> PreparedInt8:
    """The backend's call; where it has none, :func:`int8_linear`."""
    if backend.supports("int8_linear"):
        return backend.prepare_int8_linear(W)
    n, k = W.codes.shape

    def linear(A: Tensor, threshold: float, bias: Tensor | None, out: Tensor, outliers: Tensor | None) -> None:
        rows = math.prod(A.shape[:-1])
        int8_linear(backend, A.view(rows, k), W, threshold, bias, out=out.view(rows, n), outliers=outliers)

    return linear


def dequantize_absmax(
    backend: Backend, A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int, *, out: Tensor
) -> None:
    """QC-NEST-003: ``(c[code] * nested_absmax) + offset``, each operation rounded once."""
    _announce(backend, "dequantize_absmax")
    backend.dequantize_blockwise(A, nested_absmax, code, blocksize, out=out)
    out.add_(offset)


def flat_weight(backend: Backend, weight: Weight4bit) -> Weight4bit:
    """``weight`` with its absmax decoded, for a backend whose op takes no nested one (QC-4BIT-003)."""
    if weight.nested_absmax is None or weight.nested_code is None or weight.nested_offset is None:
        raise ValueError("flat_weight: the weight is not nested")
    absmax = torch.empty(weight.absmax.numel(), dtype=torch.float32, device=weight.absmax.device)
    arguments = (weight.absmax, weight.nested_absmax, weight.nested_code, weight.nested_offset, weight.nested_blocksize)
    if backend.supports("dequantize_absmax"):
        backend.dequantize_absmax(*arguments, out=absmax)
    else:
        dequantize_absmax(backend, *arguments, out=absmax)
    if (backend, "nested") not in _logged:
        _logged.add((backend, "nested"))
        log.warning("backend %s takes no nested absmax; it is decoded first (QC-4BIT-003)", backend.name)
    return Weight4bit(weight.packed, absmax, weight.quant_type, weight.blocksize, weight.shape)


def dequantize_4bit(backend: Backend, weight: Weight4bit, *, out: Tensor) -> None:
    """``backend.dequantize_4bit``, with nested absmax decoded first where the backend refuses it."""
    try:
        backend.dequantize_4bit(weight, out=out)
    except Unsupported:
        if weight.nested_absmax is None or not backend.supports("dequantize_4bit"):
            raise
        backend.dequantize_4bit(flat_weight(backend, weight), out=out)


def prepare_gemm_4bit(backend: Backend, weight: Weight4bit) -> PreparedGemm:
    """The backend's call; where it has none, the product over weights decoded to float32 once a call.

    Exact in the sense of QC-GEMM4-001 to -006.
    """
    if backend.supports("gemm_4bit"):
        return backend.prepare_gemm_4bit(weight)
    _announce(backend, "gemm_4bit")

    def gemm(A: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _need_exact_products(backend, "gemm_4bit")
        decoded = torch.empty(weight.shape, dtype=torch.float32, device=A.device)
        dequantize_4bit(backend, weight, out=decoded)
        _multiply(A, decoded, bias, out)

    return gemm


def gemm_int4(
    backend: Backend,
    weight: WeightInt4,
    decode: Callable[[WeightInt4, torch.dtype], Tensor],
    A: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """The product over the weight decoded to float32 in this call (QC-INT4-002 to -007)."""
    _announce(backend, "gemm_int4")
    _need_exact_products(backend, "gemm_int4")
    _multiply(A, decode(weight, torch.float32), bias, out)


def _need_exact_products(backend: Backend, op: str) -> None:
    if torch.get_float32_matmul_precision() != "highest":
        raise Unsupported(
            f"{op}: backend {backend.name!r} does not serve this op, and composing it needs exact float32 "
            "products; call torch.set_float32_matmul_precision('highest')"
        )


def _multiply(A: Tensor, decoded: Tensor, bias: Tensor | None, out: Tensor) -> None:
    n, k = decoded.shape
    product = A.reshape(out.numel() // max(n, 1), k).float() @ decoded.t()
    if bias is not None:
        product += bias.float()
    out.copy_(product.view(out.shape))


def gemm_4bit_transposed(backend: Backend, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
    """The product over weights decoded to the dtype of ``A``, once a call."""
    _announce(backend, "gemm_4bit_transposed")
    decoded = torch.empty(weight.shape, dtype=A.dtype, device=A.device)
    dequantize_4bit(backend, weight, out=decoded)
    torch.matmul(A, decoded, out=out)


def int8_linear_transposed(backend: Backend, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
    """The product over weights decoded to the dtype of ``A``, once a call."""
    _announce(backend, "int8_linear_transposed")
    decoded = torch.empty(W.codes.shape, dtype=A.dtype, device=A.device)
    backend.int8_dequantize_rows(W.codes, W.scales, out=decoded)
    torch.matmul(A, decoded, out=out)
