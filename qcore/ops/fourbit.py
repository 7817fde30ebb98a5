"""NF4 and FP4: quantize, dequantize, nested absmax: ``docs/spec/20-4bit.md`` and ``30-nested.md``.

The products with a 4-bit weight are in ``gemm_4bit.py``; their names are here as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcore.backend.interface import Weight4bit
from qcore.backend.registry import backend_for
from qcore.ops import compose, validate
from qcore.ops.gemm_4bit import gemm_4bit, gemm_4bit_transposed, prepare_gemm_4bit
from qcore.ops.library import register, traced
from qcore.ops.prepared import PreparedGemm4bit
from qcore.ops.weight4bit import (
    SCHEMA,
    checked_weight,
    checked_weight_values,
    weight_arguments,
    weight_from_arguments,
)

__all__ = [
    "PreparedGemm4bit",
    "dequantize_4bit",
    "dequantize_absmax",
    "gemm_4bit",
    "gemm_4bit_transposed",
    "prepare_gemm_4bit",
    "quantize_4bit",
    "quantize_absmax",
]


def quantize_4bit(A: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize to NF4 or FP4, two codes a byte (QC-4BIT-001, QC-4BIT-002).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, any shape. Not differentiated through.
    quant_type : {"nf4", "fp4"}
    blocksize : int
        Power of two from 32 to 4096.

    Returns
    -------
    packed : Tensor
        uint8 ``(ceil(A.numel() / 2), 1)``, high nibble first.
    absmax : Tensor
        float32 ``(ceil(A.numel() / blocksize),)``.
    """
    if traced(A):
        packed, absmax = torch.ops.qcore.quantize_4bit(A.detach(), quant_type, blocksize)
        return packed, absmax
    return _quantize(A, quant_type, blocksize)


def _plan_quantize(A: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    op = "quantize_4bit"
    validate.floats(op, "A", A)
    validate.quant_type(op, quant_type)
    validate.blocksize(op, blocksize)
    n = A.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=A.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=A.device)
    return packed, absmax


def _quantize(A: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    packed, absmax = _plan_quantize(A, quant_type, blocksize)
    A = validate.readable(A)
    backend_for(A.device).quantize_4bit(A, quant_type, blocksize, absmax=absmax, out=packed.view(-1))
    return packed, absmax


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Read a 4-bit tensor back (QC-4BIT-003); nested absmax is decoded on the way (QC-NEST-003).

    Parameters
    ----------
    weight : Weight4bit
    dtype : torch.dtype
        float32, float16 or bfloat16.
    out : Tensor, optional
        Takes the result; ``weight.shape`` in ``dtype``.

    Returns
    -------
    Tensor
        ``weight.shape`` in ``dtype``; ``out`` if it was given.
    """
    if traced(weight.packed, weight.absmax, out):
        result: Tensor = torch.ops.qcore.dequantize_4bit(*weight_arguments(weight), dtype)
        return result if out is None else out.copy_(result)
    weight = checked_weight_values("dequantize_4bit", weight)
    validate.float_dtype("dequantize_4bit", dtype)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
        compose.dequantize_4bit(backend_for(out.device), weight, out=out)
        return out
    validate.out("dequantize_4bit", out, weight.shape, dtype, weight.packed.device)
    if not out.is_contiguous() or any(validate.overlaps(out, part) for part in (weight.packed, weight.absmax)):
        return out.copy_(dequantize_4bit(weight, dtype))
    compose.dequantize_4bit(backend_for(out.device), weight, out=out)
    return out


def _dequantize_kernel(*arguments: Any) -> Tensor:
    weight = checked_weight_values("dequantize_4bit", weight_from_arguments(*arguments[:-1]))
    validate.float_dtype("dequantize_4bit", arguments[-1])
    out = torch.empty(weight.shape, dtype=arguments[-1], device=weight.packed.device)
    compose.dequantize_4bit(backend_for(out.device), weight, out=out)
    return out


def _dequantize_fake(*arguments: Any) -> Tensor:
    weight = checked_weight("dequantize_4bit", weight_from_arguments(*arguments[:-1]))
    validate.float_dtype("dequantize_4bit", arguments[-1])
    return torch.empty(weight.shape, dtype=arguments[-1], device=weight.packed.device)


def quantize_absmax(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize absmax values about their mean (QC-NEST-001, QC-NEST-002).

    Parameters
    ----------
    absmax : Tensor
        float32 ``(n,)``.
    code : Tensor
        float32 ``(256,)``, finite and in ascending order; the signed dynamic codebook in every known file.
    blocksize : int
        Power of two from 32 to 4096; 256 in every file that bitsandbytes writes.

    Returns
    -------
    codes, nested_absmax, offset : Tensor
        uint8 ``(n,)``, float32 ``(ceil(n / blocksize),)``, float32 ``(1,)``.
    """
    if traced(absmax, code):
        codes, nested_absmax, offset = torch.ops.qcore.quantize_absmax(absmax.detach(), code, blocksize)
        return codes, nested_absmax, offset
    return _quantize_absmax(absmax, code, blocksize)


def _plan_quantize_absmax(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_absmax"
    validate.dtype(op, "absmax", absmax, torch.float32)
    validate.codebook(op, code)
    validate.blocksize(op, blocksize)
    validate.device(op, "absmax", absmax.device, [("code", code)])
    n, device = absmax.numel(), absmax.device
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=device)
    return codes, nested_absmax, torch.empty(1, dtype=torch.float32, device=device)


def _quantize_absmax(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_absmax, offset = _plan_quantize_absmax(absmax, code, blocksize)
    validate.codebook_values("quantize_absmax", code, ascending=True)
    absmax, code = validate.readable(absmax), validate.readable(code)
    backend = backend_for(absmax.device)
    backend.quantize_absmax(absmax, code, blocksize, out=codes, nested_absmax=nested_absmax, offset=offset)
    return codes, nested_absmax, offset


def dequantize_absmax(A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int) -> Tensor:
    """Decode nested absmax: ``code[A] * nested_absmax + offset`` (QC-NEST-003).

    Parameters
    ----------
    A : Tensor
        uint8 ``(n,)``.
    nested_absmax, code, offset : Tensor
        float32, ``(ceil(n / blocksize),)``, ``(256,)`` and one value.
    blocksize : int
        Power of two from 32 to 4096.

    Returns
    -------
    Tensor
        float32 ``(n,)``.
    """
    if traced(A, nested_absmax, code, offset):
        result: Tensor = torch.ops.qcore.dequantize_absmax(A, nested_absmax, code, offset, blocksize)
        return result
    return _dequantize_absmax(A, nested_absmax, code, offset, blocksize)


def _plan_dequantize_absmax(A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int) -> Tensor:
    op = "dequantize_absmax"
    validate.dtype(op, "A", A, torch.uint8)
    validate.dtype(op, "nested_absmax", nested_absmax, torch.float32)
    validate.codebook(op, code)
    validate.dtype(op, "offset", offset, torch.float32)
    validate.blocksize(op, blocksize)
    others = [("nested_absmax", nested_absmax), ("code", code), ("offset", offset)]
    validate.device(op, "A", A.device, others)
    n = A.numel()
    validate.length(op, "nested_absmax", nested_absmax, -(-n // blocksize), f"{n} values at blocksize {blocksize}")
    validate.length(op, "offset", offset, 1, "every call")
    return torch.empty(A.shape, dtype=torch.float32, device=A.device)


def _dequantize_absmax(A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int) -> Tensor:
    out = _plan_dequantize_absmax(A, nested_absmax, code, offset, blocksize)
    validate.codebook_values("dequantize_absmax", code, ascending=False)
    backend = backend_for(A.device)
    parts = (validate.readable(A), validate.readable(nested_absmax), validate.readable(code), validate.readable(offset))
    if backend.supports("dequantize_absmax"):
        backend.dequantize_absmax(*parts, blocksize, out=out)
    else:
        compose.dequantize_absmax(backend, *parts, blocksize, out=out)
    return out


register("quantize_4bit", "(Tensor A, str quant_type, int blocksize) -> (Tensor, Tensor)", _quantize, _plan_quantize)
register("dequantize_4bit", f"({SCHEMA}, ScalarType dtype) -> Tensor", _dequantize_kernel, _dequantize_fake)
register(
    "quantize_absmax",
    "(Tensor absmax, Tensor code, int blocksize) -> (Tensor, Tensor, Tensor)",
    _quantize_absmax,
    _plan_quantize_absmax,
)
register(
    "dequantize_absmax",
    "(Tensor A, Tensor nested_absmax, Tensor code, Tensor offset, int blocksize) -> Tensor",
    _dequantize_absmax,
    _plan_dequantize_absmax,
)
