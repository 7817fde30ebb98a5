"""The gradient of ``gemm_4bit``: ``dX = dY W``, which is ``gemm_4bit_transposed``, and ``dbias = sum dY``.

The weight is frozen. The gradient of ``gemm_4bit_transposed`` is ``gemm_4bit``.

Eager calls use :class:`Product`, a short call; functorch transforms use :class:`FunctorchProduct`; tracers see the
registered ops, which have the same formulas in ``gemm_4bit.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from qcore.backend.interface import Weight4bit
from qcore.errors import Unsupported
from qcore.ops.library import traced
from qcore.ops.weight4bit import weight_arguments


class Factor(NamedTuple):
    """What a recorded product is made of: the weight, how to multiply by it, how a gradient comes back through it."""

    weight: Weight4bit
    multiply: Callable[[Tensor, Tensor | None], Tensor]
    back: Callable[[Tensor], Tensor]
    transposed: bool = False  # A W, without a bias, in place of A W^T


def wanted(A: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has to record this product."""
    return torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))


def bias_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over rows in float32, rounded once to the dtype of the bias."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


class Product(torch.autograd.Function):
    """``apply(A, bias, factor)``: ``factor.multiply(A, bias)`` forward, ``factor.back`` back."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
        ctx.factor = factor
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        return factor.multiply(A, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wants_A, wants_bias, _ = ctx.needs_input_grad
        factor = ctx.factor
        d_A = factor.back(gradient) if wants_A else None
        d_bias = bias_gradient(gradient, ctx.bias_dtype) if wants_bias else None
        return d_A, d_bias, None


# Function.apply without its search for functorch's wrappers, a third of its cost: for plain tensors outside transforms.
record: Callable[..., Tensor] = super(torch.autograd.Function, Product).apply


class FunctorchProduct(Product):
    """:class:`Product` for functorch transforms, which need a separate ``setup_context``: 30 us more a call."""

    @staticmethod
    def forward(A: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:  # type: ignore[override]
        return factor.multiply(A, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, ctx.factor = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], A: Tensor, bias: Tensor | None, factor: Factor
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None:
            raise Unsupported("gemm_4bit: vmap over bias is not supported, only over A; add a mapped bias afterwards")
        return factor.multiply(A.movedim(in_dims[0], 0), bias), 0


def product(A: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
    """The product with its gradient, or the registered op, as whoever watches this call needs it."""
    weight = factor.weight
    if not is_compiling() and peek_interpreter_stack() is not None:
        # Inside a transform the tensors are wrapped; `multiply` may meet the next transform's wrappers.
        def unwrapped(A: Tensor, bias: Tensor | None) -> Tensor:
            return product(A, bias, factor)

        inner = factor._replace(multiply=unwrapped)
        transformed = FunctorchProduct.apply(A, bias, inner)  # type: ignore[no-untyped-call]
        return cast(Tensor, transformed)
    if traced(A, weight.packed, weight.absmax, bias):
        parts = weight_arguments(weight)
        ops = torch.ops.qcore
        return cast(
            Tensor, ops.gemm_4bit_transposed(A, *parts) if factor.transposed else ops.gemm_4bit(A, bias, *parts)
        )
    if wanted(A, bias):
        return record(A, bias, factor)
    return factor.multiply(A, bias)
