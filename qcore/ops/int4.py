"""The product with a weight of 4-bit integers in groups (GPTQ, AWQ): ``docs/spec/70-int4.md``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcore.backend.interface import Backend, PreparedGemm
from qcore.backend.registry import backend_for
from qcore.backend.weights import WeightInt4
from qcore.errors import InvalidArgument
from qcore.ops import compose, registered, validate
from qcore.ops.gradient import bias_gradient
from qcore.ops.library import register, register_autograd, traced

_OP = "gemm_int4"


def checked_weight(weight: WeightInt4, op: str = _OP) -> WeightInt4:
    """``weight``, every part of the right dtype, device and extent, and contiguous (QC-INT4-001).

    Raises
    ------
    InvalidArgument, InvalidDtype
    """
    if len(weight.shape) != 2:
        raise InvalidArgument(f"{op}: weight has shape {tuple(weight.shape)}, needs (out_features, in_features)")
    (n, k), g = weight.shape, weight.group_size
    if not isinstance(g, int) or g < 1 or (g % 8 and g < k):
        raise InvalidArgument(f"{op}: group_size is {g!r}, needs a multiple of 8, or K = {k} for one group a row")
    groups = -(-k // g)
    validate.dtype(op, "packed", weight.packed, torch.uint8)
    validate.floats(op, "scales", weight.scales)
    parts: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("packed", weight.packed, (n, (k + 1) // 2)),
        ("scales", weight.scales, (n, groups)),
    ]
    if weight.zeros is not None:
        validate.dtype(op, "zeros", weight.zeros, torch.uint8)
        parts.append(("zeros", weight.zeros, (n, groups)))
    if weight.perm is not None:
        validate.dtype(op, "perm", weight.perm, torch.int32)
        parts.append(("perm", weight.perm, (k,)))
    for name, part, shape in parts:
        if tuple(part.shape) != shape:
            raise InvalidArgument(
                f"{op}: {name} has shape {tuple(part.shape)}, weight of shape {(n, k)} with groups of {g} needs {shape}"
            )
    validate.device(op, "packed", weight.packed.device, [(name, part) for name, part, _ in parts[1:]])
    readable: dict[str, Any] = {name: validate.readable(part) for name, part, _ in parts}
    return replace(weight, **readable)


def checked_order(weight: WeightInt4, op: str = _OP) -> WeightInt4:
    """``weight``, whose ``perm`` is a permutation (QC-INT4-003): read once, when a weight is made or prepared."""
    perm = weight.perm
    if perm is not None and not perm.is_meta:
        count = torch.bincount(perm.clamp(min=-1) + 1, minlength=perm.numel() + 1)
        if count.numel() != perm.numel() + 1 or not bool((count[1:] == 1).all()):
            raise InvalidArgument(f"{op}: perm is no permutation of 0 to {perm.numel() - 1}; each column comes once")
    return weight


def gemm_int4(A: Tensor, weight: WeightInt4, bias: Tensor | None = None) -> Tensor:
    """``A @ W.T + bias``; differentiable in ``A`` and ``bias`` (QC-INT4-001 to -008).

    A layer that runs the same weight again and again prepares it once: :func:`~qcore.ops.prepared_int4.prepare_int4`.

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    weight : WeightInt4
        Of shape ``(N, K)``; frozen, it gets no gradient.
    bias : Tensor, optional
        ``(N,)`` in the dtype of ``A`` or float32.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``A``.
    """
    wanted = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if wanted or traced(A, weight.packed, weight.scales, bias):
        result: Tensor = torch.ops.qcore.gemm_int4(A, bias, *weight_arguments(weight))
        return result
    return _gemm(A, weight, bias)


def dequantize_int4(weight: WeightInt4, dtype: torch.dtype) -> Tensor:
    """The weight ``(N, K)`` in the order of the activations (QC-INT4-002), rounded once to ``dtype``.

    Made of torch's own operations, each of which is exact but the product with the scale.
    """
    n, k = weight.shape
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).view(n, -1)[:, :k]
    g = min(weight.group_size, max(k, 1))
    zeros = 8.0 if weight.zeros is None else _spread(weight.zeros, g, k).float()
    values = ((codes.float() - zeros) * _spread(weight.scales, g, k).float()).to(dtype)
    if weight.perm is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.perm.long(), values)


def _spread(groups: Tensor, g: int, k: int) -> Tensor:
    """A value of each group, once a column."""
    return groups.unsqueeze(-1).expand(-1, -1, g).reshape(groups.shape[0], -1)[:, :k]


def weight_arguments(weight: WeightInt4) -> tuple[Any, ...]:
    """``weight`` as the arguments of the registered op."""
    return weight.packed, weight.scales, weight.zeros, weight.group_size, weight.shape, weight.perm


def planned_product(A: Tensor, weight: WeightInt4, bias: Tensor | None) -> Tensor:
    """The output on a checked weight, allocated; raises where ``A`` or ``bias`` does not fit."""
    validate.floats(_OP, "A", A)
    n, k = weight.shape
    if A.dim() == 0 or A.shape[-1] != k:
        raise InvalidArgument(f"{_OP}: A has shape {tuple(A.shape)}, weight of shape {(n, k)} needs (..., {k})")
    validate.bias(_OP, bias, n, A.dtype)
    validate.device(_OP, "A", A.device, [("weight", weight.packed), ("bias", bias)])
    return torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)


def prepare(backend: Backend, weight: WeightInt4) -> PreparedGemm:
    """The backend's call for a checked weight, or its composition."""
    if backend.supports(_OP):
        return backend.prepare_gemm_int4(weight)
    return partial(compose.gemm_int4, backend, weight, dequantize_int4)


def _gemm(A: Tensor, weight: WeightInt4, bias: Tensor | None) -> Tensor:
    weight = checked_order(checked_weight(weight))
    out = planned_product(A, weight, bias)
    bias = None if bias is None else validate.readable(bias)
    prepare(backend_for(A.device), weight)(validate.readable(A), bias, out)
    return out


def _weight_of_parts(
    scales: Tensor,
    packed: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    group_size: int,
    shape: tuple[int, int],
    _version: int,
) -> WeightInt4:
    return checked_order(checked_weight(WeightInt4(packed, scales, zeros, group_size, shape, perm)))


_weights: registered.KnownWeights[WeightInt4, PreparedGemm] = registered.KnownWeights(_weight_of_parts, prepare)


def _kernel(
    A: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    shape: tuple[int, int],
    perm: Tensor | None,
) -> Tensor:
    # An order that was changed in place may be none any more. Tensors of inference mode do not count changes.
    version = 0 if perm is None or perm.is_inference() else perm._version
    known = _weights.find(scales, (packed, zeros, perm), (group_size, tuple(shape), version))
    return registered.product(known, A, bias, planned_product)


def _fake(A: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return planned_product(A, checked_weight(_from_arguments(*parts)), bias)


def _from_arguments(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, shape: Sequence[int], perm: Tensor | None
) -> WeightInt4:
    return WeightInt4(packed, scales, zeros, group_size, (shape[0], shape[1]), perm)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, packed, scales, zeros, group_size, shape, perm = inputs
    ctx.save_for_backward(packed, scales, zeros, perm)
    ctx.meta = (group_size, tuple(shape))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    packed, scales, zeros, perm = ctx.saved_tensors
    d_A = d_bias = None
    if ctx.needs_input_grad[0]:
        group_size, shape = ctx.meta
        weight = WeightInt4(packed, scales, zeros, group_size, shape, perm)
        d_A = gradient @ dequantize_int4(weight, gradient.dtype)
    if ctx.needs_input_grad[1]:
        d_bias = bias_gradient(gradient, ctx.bias_dtype)
    return d_A, d_bias, *([None] * 6)


register(
    _OP,
    "(Tensor A, Tensor? bias, Tensor packed, Tensor scales, Tensor? zeros, int group_size, SymInt[] shape, "
    "Tensor? perm) -> Tensor",
    _kernel,
    _fake,
)
register_autograd(_OP, _setup, _backward)
