"""The gradient of ``gemm_4bit``: ``dX = dY W`` and ``dbias = sum dY``; the weight is frozen.

Eager calls use :class:`Product`, a short call; functorch transforms use :class:`FunctorchProduct`; tracers see
``torch.ops.qcore.gemm_4bit``, registered with the same formula in ``fourbit.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from qcore.backend.interface import Weight4bit
from qcore.errors import Unsupported
from qcore.ops.library import traced
from qcore.ops.weight4bit import weight_arguments


def wanted(A: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has to record this product."""
    return torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """``dY @ W``, ``weight`` decoded in the dtype of ``gradient``."""
    return gradient @ weight


def bias_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over rows in float32, rounded once to the dtype of the bias."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


class Product(torch.autograd.Function):
    """``apply(A, bias, weight, run, decode)``: ``run(A, bias)`` forward, ``decode(weight, dtype)`` for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        bias: Tensor | None,
        weight: Weight4bit,
        run: Callable[[Tensor, Tensor | None], Tensor],
        decode: Callable[[Weight4bit, torch.dtype], Tensor],
    ) -> Tensor:
        ctx.weight, ctx.decode = weight, decode
        ctx.bias_dtype = None if bias is None else bias.dtype
        return run(A, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        wants_A, wants_bias, *_ = ctx.needs_input_grad
        d_A = input_gradient(gradient, ctx.decode(ctx.weight, gradient.dtype)) if wants_A else None
        d_bias = bias_gradient(gradient, ctx.bias_dtype) if wants_bias else None
        return d_A, d_bias, None, None, None


# Function.apply without its search for functorch's wrappers, a third of its cost: for plain tensors outside transforms.
record: Callable[..., Tensor] = super(torch.autograd.Function, Product).apply


class FunctorchProduct(Product):
    """:class:`Product` for functorch transforms, which need a separate ``setup_context``: 30 us more a call."""

    @staticmethod
    def forward(  # type: ignore[override]
        A: Tensor,
        bias: Tensor | None,
        weight: Weight4bit,
        run: Callable[[Tensor, Tensor | None], Tensor],
        decode: Callable[[Weight4bit, torch.dtype], Tensor],
    ) -> Tensor:
        return run(A, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, ctx.weight, _, ctx.decode = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        A: Tensor,
        bias: Tensor | None,
        weight: Weight4bit,
        run: Callable[[Tensor, Tensor | None], Tensor],
        decode: Callable[[Weight4bit, torch.dtype], Tensor],
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None:
            raise Unsupported("gemm_4bit: vmap over bias is not supported, only over A; add a mapped bias afterwards")
        return run(A.movedim(in_dims[0], 0), bias), 0


def product(
    A: Tensor,
    weight: Weight4bit,
    bias: Tensor | None,
    run: Callable[[Tensor, Tensor | None], Tensor],
    decode: Callable[[Weight4bit, torch.dtype], Tensor],
) -> Tensor:
    """``run(A, bias)`` with its gradient, or the registered op, as whoever watches this call needs it."""
    if not is_compiling() and peek_interpreter_stack() is not None:
        # Inside a transform the tensors are wrapped; `run` may meet the next transform's wrappers.
        def unwrapped(A: Tensor, bias: Tensor | None) -> Tensor:
            return product(A, weight, bias, run, decode)

        transformed = FunctorchProduct.apply(A, bias, weight, unwrapped, decode)  # type: ignore[no-untyped-call]
        return cast(Tensor, transformed)
    if traced(A, weight.packed, weight.absmax, bias):
        return cast(Tensor, torch.ops.qcore.gemm_4bit(A, bias, *weight_arguments(weight)))
    if wanted(A, bias):
        return record(A, bias, weight, run, decode)
    return run(A, bias)
