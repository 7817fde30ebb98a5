"""LLM.int8() as one op: quantize the activations, multiply in int8, outlier columns in floating point.

Dettmers et al., *LLM.int8()*, 2022 (arXiv 2208.07339), section 3. How many outlier columns there are depends on the
data; inside one op the shape of the result does not, so ``torch.compile`` sees no break.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcore.backend.interface import PreparedInt8, Weight8bit
from qcore.backend.registry import backend_for
from qcore.errors import InvalidArgument
from qcore.ops import compose, registered, validate
from qcore.ops.gradient import bias_gradient
from qcore.ops.int8 import int8_dequantize_rows, int8_quantize_rows
from qcore.ops.library import register, register_autograd, traced

Multiply = Callable[[Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
Gradient = Callable[[Tensor], Tensor]


def int8_linear(
    A: Tensor, B: Tensor, scales: Tensor | None, bias: Tensor | None = None, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``A @ W.T + bias`` by LLM.int8(); differentiable in ``A``, ``bias`` and a ``B`` that holds numbers.

    QC-INT8-010: the products of outlier columns with the dequantized weights are added in float32, and the sum is
    rounded once. Gradients take the quantized weight for the weight and activations for themselves: ``dA = dY W``,
    ``dB = dY^T A``.

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    B : Tensor
        int8 ``(N, K)`` with ``scales``; or float32, float16 or bfloat16 ``(N, K)``, which is quantized first.
    scales : Tensor, optional
        float32 ``(N,)``: row statistics of ``B``; None if ``B`` holds numbers.
    bias : Tensor, optional
        ``(N,)`` in the dtype of ``A`` or float32.
    threshold : float
        Columns of ``A`` with an element of this magnitude or more are left out of the int8 product; 0 for none.

    Returns
    -------
    out : Tensor
        ``(..., N)`` in the dtype of ``A``.
    outlier_cols : Tensor
        uint8 ``(K,)``, 1 for an outlier column; empty if ``threshold`` is 0.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Before anything is computed.
    """
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (A, B, bias)
    )
    if (wants_gradient and scales is None) or traced(A, B, scales, bias):
        out, outlier_cols = torch.ops.qcore.int8_linear(A, B, scales, bias, threshold)
        return out, outlier_cols
    if wants_gradient and scales is not None:
        codes, stats = B.detach(), scales

        def multiply(A: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return _forward(A, codes, stats, bias, threshold)

        return record(
            A, bias, multiply, lambda gradient: int8_linear_transposed(gradient, codes, stats), (codes, stats)
        )
    return _forward(A, B, scales, bias, threshold)


def _versions(parts: tuple[Tensor, Tensor]) -> list[int]:
    """How often each was changed in place; tensors of inference mode do not count that."""
    return [0 if part.is_inference() else part._version for part in parts]


class Int8Product(torch.autograd.Function):
    """``apply(A, bias, multiply, back, parts)``: ``multiply(A, bias)`` forward, ``back`` back.

    ``parts`` are codes and scales of the weight. Every eager call with such a weight, prepared or not, so that all of
    them save the same: nothing. Non-reentrant checkpoints count the saved tensors, and the second of two calls is a
    prepared one. That the weight has not changed meanwhile, which autograd checks of what is saved, is checked here.
    """

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, bias: Tensor | None, multiply: Multiply, back: Gradient, parts: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.back, ctx.parts, ctx.versions = back, parts, _versions(parts)
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        out, outlier_cols = multiply(A, bias)
        ctx.mark_non_differentiable(outlier_cols)
        ctx.set_materialize_grads(False)
        return out, outlier_cols

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        if _versions(ctx.parts) != ctx.versions:
            raise RuntimeError(
                "int8_linear: the int8 weight or its scales were changed in place after the forward pass, and the "
                "gradient needs them as they were; call backward() first"
            )
        wants_A, wants_bias, *_ = ctx.needs_input_grad
        d_A = ctx.back(gradient) if wants_A else None
        d_bias = bias_gradient(gradient, ctx.bias_dtype) if wants_bias else None
        return d_A, d_bias, None, None, None


# As in gradient.py: without the search for functorch's wrappers, for plain tensors outside transforms.
record: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, Int8Product).apply


def _plan(A: Tensor, B: Tensor, scales: Tensor | None, bias: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    op = "int8_linear"
    validate.floats(op, "A", A)
    n, k = _checked_shape(op, B, scales)
    if A.dim() == 0 or A.shape[-1] != k:
        raise InvalidArgument(f"{op}: A has shape {tuple(A.shape)}, weight of shape {(n, k)} needs (..., {k})")
    validate.bias(op, bias, n, A.dtype)
    validate.device(op, "A", A.device, [("B", B), ("scales", scales), ("bias", bias)])
    validate.threshold(op, threshold)
    if k > validate.MAX_INT8_K:
        raise InvalidArgument(f"{op}: K is {k}, int32 sums are exact up to {validate.MAX_INT8_K}; split K")
    out = torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)
    return out, torch.empty(k if threshold > 0.0 else 0, dtype=torch.uint8, device=A.device)


def _checked_shape(op: str, B: Tensor, scales: Tensor | None) -> tuple[int, int]:
    """``(N, K)`` of a weight whose parts have the right dtypes and lengths."""
    if scales is None:
        validate.floats(op, "B", B)
    else:
        validate.dtype(op, "B", B, torch.int8)
        validate.dtype(op, "scales", scales, torch.float32)
    if B.dim() != 2:
        raise InvalidArgument(f"{op}: B has shape {tuple(B.shape)}, needs (out_features, in_features)")
    n, k = B.shape
    if scales is not None:
        validate.length(op, "scales", scales, n, f"weight of shape {(n, k)}")
    return n, k


def _forward(
    A: Tensor, B: Tensor, scales: Tensor | None, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    out, outliers = _plan(A, B, scales, bias, threshold)
    weight, stats = _codes(B, scales)
    W = Weight8bit(validate.readable(weight), validate.readable(stats))
    call = compose.prepare_int8_linear(backend_for(A.device), W)
    addend = None if bias is None else validate.readable(bias)
    call(validate.readable(A), threshold, addend, out, outliers if threshold > 0.0 else None)
    return out, outliers


def _weight_of_parts(scales: Tensor, codes: Tensor) -> Weight8bit:
    _checked_shape("int8_linear", codes, scales)
    return Weight8bit(validate.readable(codes), validate.readable(scales))


_weights: registered.KnownWeights[Weight8bit, PreparedInt8] = registered.KnownWeights(
    _weight_of_parts, compose.prepare_int8_linear
)


def _kernel(
    A: Tensor, B: Tensor, scales: Tensor | None, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    if scales is None:  # numbers, which are quantized in each call
        return _forward(A, B, None, bias, threshold)
    known = _weights.find(scales, (B,), ())
    shape = known.shape_of_result(A, bias)
    if shape is not None and 0.0 <= threshold < 1e38:
        out = A.new_empty(shape)
        outliers = A.new_empty(A.shape[-1] if threshold > 0.0 else 0, dtype=torch.uint8)
    else:
        out, outliers = _plan(A, known.weight.codes, known.weight.scales, bias, threshold)
        known.keep_fit(A, out)
        A, bias = validate.readable(A), None if bias is None else validate.readable(bias)
    known.call(A, threshold, bias, out, outliers if threshold > 0.0 else None)
    return out, outliers


def _codes(B: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    if scales is not None:
        return B, scales
    codes, stats, _ = int8_quantize_rows(B, 0.0)
    return codes, stats


def int8_linear_transposed(A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """``A @ W`` with an int8 weight (QC-INT8-011 to -015), the gradient of :func:`int8_linear`.

    Differentiable in ``A``.

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., N)``.
    B : Tensor
        int8 ``(N, K)``.
    scales : Tensor
        float32 ``(N,)``: row statistics of ``B``.

    Returns
    -------
    Tensor
        ``(..., K)`` in the dtype of ``A``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Before anything is computed.
    """
    validate.tensor("int8_linear_transposed", "A", A)
    if (torch.is_grad_enabled() and A.requires_grad) or traced(A, B, scales):
        result: Tensor = torch.ops.qcore.int8_linear_transposed(A, B, scales)
        return result
    return _transposed(A, B, scales)


def _plan_transposed(A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    op = "int8_linear_transposed"
    validate.floats(op, "A", A)
    n, k = _checked_shape(op, B, scales)
    if A.dim() == 0 or A.shape[-1] != n:
        raise InvalidArgument(f"{op}: A has shape {tuple(A.shape)}, weight of shape {(n, k)} needs (..., {n})")
    validate.device(op, "A", A.device, [("B", B), ("scales", scales)])
    return torch.empty((*A.shape[:-1], k), dtype=A.dtype, device=A.device)


def _transposed(A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    out = _plan_transposed(A, B, scales)
    backend, (n, k) = backend_for(A.device), B.shape
    served = backend.supports("int8_linear_transposed")
    step = backend.int8_linear_transposed if served else partial(compose.int8_linear_transposed, backend)
    rows = math.prod(A.shape[:-1])
    W = Weight8bit(validate.readable(B), validate.readable(scales))
    step(validate.readable(A).reshape(rows, n), W, out=out.view(rows, k))
    return out


def _setup_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_transposed(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    B, scales = ctx.saved_tensors
    return gradient @ int8_dequantize_rows(B, scales, gradient.dtype).t(), None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    A, B, scales, bias, _ = inputs
    ctx.save_for_backward(A if ctx.needs_input_grad[1] else None, B, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    A, B, scales = ctx.saved_tensors
    d_A = d_B = d_bias = None
    if ctx.needs_input_grad[0]:
        codes, stats = _codes(B.detach(), scales)
        d_A = int8_linear_transposed(gradient, codes, stats)
    rows = gradient.reshape(-1, B.shape[0])
    if ctx.needs_input_grad[1]:
        d_B = (rows.t() @ A.reshape(-1, B.shape[1])).to(B.dtype)
    if ctx.needs_input_grad[3]:
        d_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return d_A, d_B, None, d_bias, None


register(
    "int8_linear",
    "(Tensor A, Tensor B, Tensor? scales, Tensor? bias, float threshold) -> (Tensor, Tensor)",
    _kernel,
    _plan,
)
register_autograd("int8_linear", _setup, _backward)
register("int8_linear_transposed", "(Tensor A, Tensor B, Tensor scales) -> Tensor", _transposed, _plan_transposed)
register_autograd("int8_linear_transposed", _setup_transposed, _backward_transposed)
