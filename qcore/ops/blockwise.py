"""Blockwise 8-bit quantization with a 256-entry codebook (``docs/spec/10-blockwise-8bit.md``)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.backend.registry import backend_for
from qcore.ops import validate
from qcore.ops.library import register, traced


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize to one byte an element (QC-Q8-001 to QC-Q8-004).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, any shape. Not differentiated through.
    code : Tensor
        float32 ``(256,)``, finite and in ascending order.
    blocksize : int
        Power of two from 32 to 4096.

    Returns
    -------
    codes : Tensor
        uint8, the shape of ``A``.
    absmax : Tensor
        float32 ``(ceil(A.numel() / blocksize),)``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Before anything is computed.
    """
    if traced(A, code):
        codes, absmax = torch.ops.qcore.quantize_blockwise(A.detach(), code, blocksize)
        return codes, absmax
    return _quantize(A, code, blocksize)


def _plan_quantize(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    op = "quantize_blockwise"
    validate.floats(op, "A", A)
    validate.codebook(op, code)
    validate.blocksize(op, blocksize)
    validate.device(op, "A", A.device, [("code", code)])
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(-(-A.numel() // blocksize), dtype=torch.float32, device=A.device)
    return codes, absmax


def _quantize(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, absmax = _plan_quantize(A, code, blocksize)
    validate.codebook_values("quantize_blockwise", code, ascending=True)
    code = validate.readable(code)
    backend_for(A.device).quantize_blockwise(validate.readable(A), code, blocksize, absmax=absmax, out=codes)
    return codes, absmax


def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Read codes back: ``code[A] * absmax`` (QC-Q8-005).

    Parameters
    ----------
    A : Tensor
        uint8, any shape.
    absmax : Tensor
        float32, one value a block of the flattened ``A``.
    code : Tensor
        float32 ``(256,)``, finite.
    blocksize : int
        Power of two from 32 to 4096.
    dtype : torch.dtype
        float32, float16 or bfloat16.
    out : Tensor, optional
        Takes the result; the shape of ``A`` in ``dtype``.

    Returns
    -------
    Tensor
        The shape of ``A`` in ``dtype``; ``out`` if it was given.
    """
    if traced(A, absmax, code, out):
        result: Tensor = torch.ops.qcore.dequantize_blockwise(A, absmax, code, blocksize, dtype)
        return result if out is None else out.copy_(result)
    if out is None:
        return _dequantize(A, absmax, code, blocksize, dtype)
    validate.out("dequantize_blockwise", out, A.shape, dtype, A.device)
    if not out.is_contiguous() or any(validate.overlaps(out, part) for part in (A, absmax, code)):
        return out.copy_(_dequantize(A, absmax, code, blocksize, dtype))
    return _dequantize(A, absmax, code, blocksize, dtype, out)


def _check_dequantize(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> None:
    op = "dequantize_blockwise"
    validate.dtype(op, "A", A, torch.uint8)
    validate.dtype(op, "absmax", absmax, torch.float32)
    validate.codebook(op, code)
    validate.blocksize(op, blocksize)
    validate.float_dtype(op, dtype)
    validate.device(op, "A", A.device, [("absmax", absmax), ("code", code)])
    n = A.numel()
    validate.length(op, "absmax", absmax, -(-n // blocksize), f"a tensor of {n} elements at blocksize {blocksize}")


def _plan_dequantize(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(A, absmax, code, blocksize, dtype)
    return torch.empty(A.shape, dtype=dtype, device=A.device)


def _dequantize(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    _check_dequantize(A, absmax, code, blocksize, dtype)
    validate.codebook_values("dequantize_blockwise", code, ascending=False)
    out = torch.empty(A.shape, dtype=dtype, device=A.device) if out is None else out
    parts = (validate.readable(A), validate.readable(absmax), validate.readable(code))
    backend_for(A.device).dequantize_blockwise(*parts, blocksize, out=out)
    return out


register("quantize_blockwise", "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)", _quantize, _plan_quantize)
register(
    "dequantize_blockwise",
    "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    _dequantize,
    _plan_dequantize,
)
