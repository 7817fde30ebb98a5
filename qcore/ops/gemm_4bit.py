"""The product with a 4-bit weight, and its gradient: ``docs/spec/40-gemm-4bit.md``.

The prepared weight of a layer is in ``prepared.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore.backend.interface import PreparedGemm, Weight4bit
from qcore.backend.registry import backend_for
from qcore.ops import compose, registered, validate
from qcore.ops.gradient import Factor, bias_gradient, product
from qcore.ops.library import register, register_autograd
from qcore.ops.prepared import HasAbsmax, PreparedGemm4bit
from qcore.ops.weight4bit import (
    SCHEMA,
    checked_weight,
    checked_weight_values,
    planned_product,
    planned_transposed,
    weight_from_arguments,
)


def gemm_4bit(A: Tensor, weight: Weight4bit, bias: Tensor | None = None) -> Tensor:
    """``A @ W.T + bias`` with a 4-bit weight (QC-GEMM4-001 to -007); differentiable in ``A`` and ``bias``.

    A layer that runs the same weight again and again prepares it once: :func:`prepare_gemm_4bit`.

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    weight : Weight4bit
        Of shape ``(N, K)``; frozen, it gets no gradient.
    bias : Tensor, optional
        ``(N,)`` in the dtype of ``A`` or float32.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``A``.
    """

    validate.tensor("gemm_4bit", "A", A)

    def run(A: Tensor, bias: Tensor | None) -> Tensor:
        return _gemm(A, weight, bias)

    return product(A, bias, Factor(weight, run, lambda gradient: gemm_4bit_transposed(gradient, weight)))


def gemm_4bit_transposed(A: Tensor, weight: Weight4bit) -> Tensor:
    """``A @ W`` with a 4-bit weight (QC-GEMM4-008 to -012), the gradient of :func:`gemm_4bit`; differentiable in ``A``.

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., N)``.
    weight : Weight4bit
        Of shape ``(N, K)``.

    Returns
    -------
    Tensor
        ``(..., K)`` in the dtype of ``A``.
    """
    validate.tensor("gemm_4bit_transposed", "A", A)

    def run(A: Tensor, _: Tensor | None) -> Tensor:
        return _gemm_transposed(A, weight)

    return product(A, None, Factor(weight, run, lambda gradient: gemm_4bit(gradient, weight), transposed=True))


def prepare_gemm_4bit(
    weight: Weight4bit | Callable[[], Weight4bit], *, packed: Tensor | None = None, state: HasAbsmax | None = None
) -> PreparedGemm4bit:
    """Make a 4-bit weight ready for many products.

    Parameters
    ----------
    weight : Weight4bit, or a function that gives one
        The weight, of shape ``(N, K)``. A function is called now, and again whenever the weight was found to have
        moved: a layer passes one that reads its parameter, e.g. ``lambda: state.weight(param)``.
    packed : Tensor, optional
        The live tensor whose storage is watched, e.g. the layer's ``Params4bit`` (any quant_storage); by default the
        weight's own ``packed``.
    state : object with an ``absmax`` tensor, optional
        The live object whose ``absmax`` is watched, e.g. the layer's ``QuantState``; by default the weight itself.

    Returns
    -------
    PreparedGemm4bit
        ``handle(x, bias) -> y``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        The weight's parts do not fit each other.
    BackendNotFound, BackendUnavailable, Unsupported
        No backend serves it.

    Examples
    --------
    In a layer, which drops the handle (``self._gemm = None``) when its parameter or its ``QuantState`` object is
    replaced; everything else (``.to``, ``param.data = ...``, ``use_backend``) the handle notices::

        if self._gemm is None:
            param, state = self.weight, self.weight.quant_state
            self._gemm = prepare_gemm_4bit(lambda: state.weight(param), packed=param, state=state)
        return self._gemm(x, bias)
    """
    return PreparedGemm4bit(weight, packed, state, gemm_4bit_transposed)


def _gemm(A: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    weight = checked_weight_values("gemm_4bit", weight)
    out = planned_product(A, weight, bias)
    bias = None if bias is None else validate.readable(bias)
    compose.prepare_gemm_4bit(backend_for(A.device), weight)(validate.readable(A), bias, out)
    return out


def _weight_of_parts(absmax: Tensor, packed: Tensor, *parts: Any) -> Weight4bit:
    *nested, quant_type, blocksize, shape, nested_blocksize = parts
    arguments = (packed, absmax, quant_type, blocksize, shape, *nested, nested_blocksize)
    return checked_weight_values("gemm_4bit", weight_from_arguments(*arguments))


_weights: registered.KnownWeights[Weight4bit, PreparedGemm] = registered.KnownWeights(
    _weight_of_parts, compose.prepare_gemm_4bit
)


def _gemm_kernel(
    A: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, ...],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    others = (packed, nested_absmax, nested_code, nested_offset)
    known = _weights.find(absmax, others, (quant_type, blocksize, tuple(shape), nested_blocksize))
    return registered.product(known, A, bias, planned_product)


def _gemm_fake(A: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return planned_product(A, checked_weight("gemm_4bit", weight_from_arguments(*parts)), bias)


def _gemm_transposed(A: Tensor, weight: Weight4bit) -> Tensor:
    weight = checked_weight_values("gemm_4bit_transposed", weight)
    out = planned_transposed(A, weight)
    backend, A = backend_for(A.device), validate.readable(A)
    if backend.supports("gemm_4bit_transposed"):
        backend.prepare_gemm_4bit_transposed(weight)(A, out)
    else:
        compose.gemm_4bit_transposed(backend, A, weight, out=out)
    return out


def _gemm_transposed_kernel(A: Tensor, *parts: Any) -> Tensor:
    return _gemm_transposed(A, weight_from_arguments(*parts))


def _gemm_transposed_fake(A: Tensor, *parts: Any) -> Tensor:
    return planned_transposed(A, checked_weight("gemm_4bit_transposed", weight_from_arguments(*parts)))


def _keep_weight(ctx: Any, parts: tuple[Any, ...]) -> None:
    packed, absmax, quant_type, blocksize, shape, nested_absmax, nested_code, nested_offset, nested = parts
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_code, nested_offset)
    ctx.meta = (quant_type, blocksize, tuple(shape), nested)


def _kept_weight(ctx: Any) -> tuple[Any, ...]:
    packed, absmax, *nested_parts = ctx.saved_tensors
    quant_type, blocksize, shape, nested = ctx.meta
    return (packed, absmax, quant_type, blocksize, shape, *nested_parts, nested)


def _gemm_transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_weight(ctx, inputs[1:])


def _gemm_transposed_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.qcore.gemm_4bit(gradient, None, *_kept_weight(ctx)), *([None] * 9)


def _gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *parts = inputs
    _keep_weight(ctx, tuple(parts))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gemm_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    d_A = d_bias = None
    if ctx.needs_input_grad[0]:
        d_A = torch.ops.qcore.gemm_4bit_transposed(gradient, *_kept_weight(ctx))
    if ctx.needs_input_grad[1]:
        d_bias = bias_gradient(gradient, ctx.bias_dtype)
    return d_A, d_bias, *([None] * 9)


register("gemm_4bit", f"(Tensor A, Tensor? bias, {SCHEMA}) -> Tensor", _gemm_kernel, _gemm_fake)
register_autograd("gemm_4bit", _gemm_setup, _gemm_backward)
register("gemm_4bit_transposed", f"(Tensor A, {SCHEMA}) -> Tensor", _gemm_transposed_kernel, _gemm_transposed_fake)
register_autograd("gemm_4bit_transposed", _gemm_transposed_setup, _gemm_transposed_backward)
