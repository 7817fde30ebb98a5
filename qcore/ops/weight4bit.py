"""A 4-bit weight as an argument: its checks, its form for registered ops, and the check of a product with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from qcore.backend.interface import Weight4bit
from qcore.errors import InvalidArgument
from qcore.ops import validate

# The arguments of a registered op that stand for a weight.
SCHEMA = (
    "Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape, Tensor? nested_absmax, "
    "Tensor? nested_code, Tensor? nested_offset, int nested_blocksize"
)


def checked_weight(op: str, weight: Weight4bit) -> Weight4bit:
    """``weight``, every part of the right dtype, device and length, and readable; raises ``InvalidArgument``."""
    validate.quant_type(op, weight.quant_type)
    validate.blocksize(op, weight.blocksize)
    validate.dtype(op, "packed", weight.packed, torch.uint8)
    n, what = prod(weight.shape), f"weight of shape {tuple(weight.shape)}"
    blocks = -(-n // weight.blocksize)
    validate.length(op, "packed", weight.packed, (n + 1) // 2, what)
    nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset)
    named = list(zip(("nested_absmax", "nested_code", "nested_offset"), nested, strict=True))
    validate.dtype(op, "absmax", weight.absmax, torch.float32 if weight.nested_absmax is None else torch.uint8)
    validate.length(op, "absmax", weight.absmax, blocks, f"{what} at blocksize {weight.blocksize}")
    if weight.nested_absmax is not None:
        for name, part in named:
            if part is None:
                raise InvalidArgument(f"{op}: {name} is missing, a nested absmax needs it")
            validate.dtype(op, name, part, torch.float32)
        validate.blocksize(op, weight.nested_blocksize, "nested_blocksize")
        needed = {
            "nested_absmax": -(-blocks // weight.nested_blocksize),
            "nested_code": 256,
            "nested_offset": 1,
        }
        for name, part in named:
            why = f"{blocks} nested absmax values at nested_blocksize {weight.nested_blocksize}"
            validate.length(op, name, part, needed[name], why)  # type: ignore[arg-type]
    validate.device(op, "packed", weight.packed.device, [("absmax", weight.absmax), *named])
    parts = (weight.packed, weight.absmax, *nested)
    if all(part is None or (part.is_contiguous() and not part.is_neg()) for part in parts):
        return weight
    readable: dict[str, Any] = {name: None if part is None else validate.readable(part) for name, part in named}
    packed, absmax = validate.readable(weight.packed), validate.readable(weight.absmax)
    return replace(weight, packed=packed, absmax=absmax, **readable)


def weight_arguments(weight: Weight4bit) -> tuple[Any, ...]:
    """``weight`` as the arguments of a registered op."""
    return (
        weight.packed,
        weight.absmax,
        weight.quant_type,
        weight.blocksize,
        weight.shape,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
        weight.nested_blocksize,
    )


def require_matrix(weight: Weight4bit, op: str = "gemm_4bit") -> None:
    """The products take weights of two dimensions."""
    if len(weight.shape) != 2:
        raise InvalidArgument(f"{op}: weight has shape {tuple(weight.shape)}, needs (out_features, in_features)")


def planned_product(A: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    """The output of ``gemm_4bit`` on checked weights, allocated; raises where ``A`` or ``bias`` does not fit."""
    op = "gemm_4bit"
    validate.floats(op, "A", A)
    require_matrix(weight)
    n, k = weight.shape
    if A.dim() == 0 or A.shape[-1] != k:
        raise InvalidArgument(f"{op}: A has shape {tuple(A.shape)}, weight of shape {(n, k)} needs (..., {k})")
    validate.bias(op, bias, n, A.dtype)
    validate.device(op, "A", A.device, [("weight", weight.packed), ("bias", bias)])
    return torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)


def planned_transposed(A: Tensor, weight: Weight4bit) -> Tensor:
    """The output of ``gemm_4bit_transposed`` on checked weights, allocated; raises where ``A`` does not fit."""
    op = "gemm_4bit_transposed"
    validate.floats(op, "A", A)
    require_matrix(weight, op)
    n, k = weight.shape
    if A.dim() == 0 or A.shape[-1] != n:
        raise InvalidArgument(f"{op}: A has shape {tuple(A.shape)}, weight of shape {(n, k)} needs (..., {n})")
    validate.device(op, "A", A.device, [("weight", weight.packed)])
    return torch.empty((*A.shape[:-1], k), dtype=A.dtype, device=A.device)


def weight_from_arguments(
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> Weight4bit:
    """The inverse of :func:`weight_arguments`."""
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    return Weight4bit(packed, absmax, quant_type, blocksize, tuple(shape), *nested)


def checked_weight_values(op: str, weight: Weight4bit) -> Weight4bit:
    """:func:`checked_weight`, and the values of its nested codebook are finite."""
    weight = checked_weight(op, weight)
    if weight.nested_code is not None:
        validate.codebook_values(op, weight.nested_code, "nested_code", ascending=False)
        weight = replace(weight, nested_code=validate.readable(weight.nested_code))
    return weight
