"""Quantization of activations, simulated: calibrate on one tensor, round another, train through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcore.errors import InvalidArgument
from qcore.ops import int8, validate

_READ_BACK = float.fromhex("0x1.020408p-7")  # the float32 nearest to 1/127 (QC-INT8-008)


def quantize_activation(t: Tensor, quant_type: str = "int8") -> tuple[Tensor, Tensor]:
    """What LLM.int8() quantizes each row of ``t`` with (QC-INT8-002, QC-INT8-003).

    Parameters
    ----------
    t : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    quant_type : {"int8"}

    Returns
    -------
    absmax : Tensor
        float32 ``(rows,)``: largest magnitude of each row.
    scale : Tensor
        float32 ``(rows,)``: ``127 / absmax``, by which numbers are multiplied before they are rounded; 0 where absmax
        is 0.

    Raises
    ------
    InvalidArgument, InvalidDtype
        An unknown ``quant_type``, or ``t`` is not a float tensor.

    Notes
    -----
    For one scale a tensor, as static calibration wants it, take ``absmax.amax()`` and ``scale.amin()``.
    """
    _check_type("quantize_activation", quant_type)
    _, absmax, _ = int8.int8_quantize_rows(t.detach(), 0.0)
    # One division: torch turns `127.0 / absmax` into a reciprocal and a product.
    scale = torch.div(torch.full_like(absmax, 127.0), absmax)
    return absmax, torch.where(absmax > 0.0, scale, 0.0)


def fake_quantize_tensor(t: Tensor, absmax: Tensor, scale: Tensor, quant_type: str = "int8") -> Tensor:
    """Round ``t`` to what its int8 codes read back as (QC-INT8-003, QC-INT8-008); differentiable.

    With the result of :func:`quantize_activation` of the same tensor, bit for bit what quantizing and dequantizing
    gives.

    Parameters
    ----------
    t : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    absmax, scale : Tensor
        float32 ``(rows,)``, or one value for all rows.
    quant_type : {"int8"}

    Returns
    -------
    Tensor
        The shape and dtype of ``t``. The gradient passes straight through rounding, and is 0 where ``t`` is beyond
        the last code (Bengio et al., arXiv 1308.3432).

    Raises
    ------
    InvalidArgument, InvalidDtype
        An unknown ``quant_type``, or lengths, dtypes or devices do not fit.
    """
    op = "fake_quantize_tensor"
    _check_type(op, quant_type)
    validate.floats(op, "t", t)
    if t.dim() == 0:
        raise InvalidArgument(f"{op}: t has no dimension, needs (..., K)")
    rows = t.numel() // t.shape[-1] if t.shape[-1] else 0
    for name, value in (("absmax", absmax), ("scale", scale)):
        validate.dtype(op, name, value, torch.float32)
        if value.numel() != 1:
            validate.length(op, name, value, rows, f"t of shape {tuple(t.shape)} (or one value for all rows)")
    validate.device(op, "t", t.device, [("absmax", absmax), ("scale", scale)])
    result: Tensor = _FakeQuantize.apply(t, absmax.detach().reshape(-1, 1), scale.detach().reshape(-1, 1))  # type: ignore[no-untyped-call]
    return result


def _check_type(op: str, quant_type: str) -> None:
    if quant_type != "int8":
        raise InvalidArgument(
            f"{op}: quant_type is {quant_type!r}, activations take 'int8' only; quantize_4bit is for weights"
        )


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, absmax: Tensor, scale: Tensor) -> Tensor:
        rounded = torch.round((t.reshape(-1, t.shape[-1]).float() * scale).nan_to_num_(0.0, 128.0, -128.0))
        codes = rounded.clamp(-127.0, 127.0)
        ctx.save_for_backward((codes == rounded).view(t.shape))
        return (codes * absmax * _READ_BACK).to(t.dtype).view(t.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None
