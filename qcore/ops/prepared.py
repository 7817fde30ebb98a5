"""A 4-bit weight made ready for many products: validated and packed once, one short call a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from qcore.backend.interface import Backend, PreparedGemm, Weight4bit
from qcore.backend.registry import backend_for
from qcore.errors import InvalidArgument
from qcore.ops import compose, validate
from qcore.ops.library import traced


class HasAbsmax(Protocol):
    """What holds the absmax tensor of a weight: a ``QuantState`` or a ``Weight4bit``."""

    @property
    def absmax(self) -> Tensor: ...


def checked_weight(op: str, weight: Weight4bit) -> Weight4bit:
    """``weight``, every part of the right dtype, device and length, and contiguous; raises ``InvalidArgument``."""
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
    if all(part is None or part.is_contiguous() for part in parts):
        return weight
    packed, absmax, *nested_parts = (None if part is None else part.contiguous() for part in parts)
    meta = (weight.quant_type, weight.blocksize, weight.shape)
    return Weight4bit(packed, absmax, *meta, *nested_parts, weight.nested_blocksize)  # type: ignore[arg-type]


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


def _require_matrix(weight: Weight4bit) -> None:
    if len(weight.shape) != 2:
        raise InvalidArgument(f"gemm_4bit: weight has shape {tuple(weight.shape)}, needs (out_features, in_features)")


def planned_product(A: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    """The output of ``gemm_4bit`` on checked weights, allocated; raises where ``A`` or ``bias`` does not fit."""
    op = "gemm_4bit"
    validate.floats(op, "A", A)
    _require_matrix(weight)
    n, k = weight.shape
    if A.dim() == 0 or A.shape[-1] != k:
        raise InvalidArgument(f"{op}: A has shape {tuple(A.shape)}, weight of shape {(n, k)} needs (..., {k})")
    validate.bias(op, bias, n, A.dtype)
    validate.device(op, "A", A.device, [("weight", weight.packed), ("bias", bias)])
    return torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)


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
    return PreparedGemm4bit(weight, packed, state)


class PreparedGemm4bit:
    """``handle(x, bias=None) -> x @ W.T + bias`` for one weight; made by :func:`prepare_gemm_4bit`.

    ``x`` is float32, float16 or bfloat16 of shape ``(..., K)`` on the weight's device, ``bias`` ``(N,)`` in the dtype
    of ``x`` or float32, the result ``(..., N)`` in the dtype of ``x``. Gradients flow to ``x`` and ``bias``; under
    ``torch.compile``, dispatch modes and functorch transforms it becomes ``torch.ops.qcore.gemm_4bit``.

    Each call compares the chosen backend, the weight's two addresses and the device with those it was prepared for, and
    prepares itself again when one has changed. It holds addresses, so a copy or a pickle of a handle is ``None``:
    whoever holds it prepares it again.
    """

    __slots__ = (
        "_absmax_address",
        "_backend",
        "_bias",
        "_bias_address",
        "_call",
        "_device",
        "_dtype",
        "_features",
        "_load",
        "_n",
        "_packed",
        "_packed_address",
        "_state",
        "weight",
    )

    def __init__(
        self, weight: Weight4bit | Callable[[], Weight4bit], packed: Tensor | None, state: HasAbsmax | None
    ) -> None:
        self._load: Callable[[], Weight4bit] = weight if callable(weight) else lambda: weight
        first = self._load()
        self._packed = first.packed if packed is None else packed
        self._state: HasAbsmax = first if state is None else state
        self._prepare(first)

    def _prepare(self, weight: Weight4bit) -> None:
        weight = checked_weight("gemm_4bit", weight)
        if len(weight.shape) != 2:
            raise InvalidArgument(
                f"gemm_4bit: weight has shape {tuple(weight.shape)}, needs (out_features, in_features)"
            )
        if weight.nested_code is not None:
            validate.codebook_values("gemm_4bit", weight.nested_code, "nested_code", ascending=False)
        self.weight = weight
        self._device = weight.packed.device
        self._n, k = weight.shape
        self._features = (k,)
        self._packed_address = self._packed.data_ptr()
        self._absmax_address = self._state.absmax.data_ptr()
        self._dtype: torch.dtype | None = None  # of the last x that was checked, and the bias that came with it
        self._bias: Tensor | None = None
        self._bias_address = 0
        self._backend: Backend = backend_for(self._device)
        self._call: PreparedGemm = (
            self._backend.prepare_gemm_4bit(weight)
            if self._backend.supports("gemm_4bit")
            else compose.prepare_gemm_4bit(self._backend, weight)
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape
        if (
            is_compiling()
            or type(x) is not Tensor
            or x.dtype is not self._dtype
            or shape[-1:] != self._features
            or x.device != self._device
            or not x.is_contiguous()
            or x.is_neg()
            or backend_for(self._device) is not self._backend
            or self._packed.data_ptr() != self._packed_address
            or self._state.absmax.data_ptr() != self._absmax_address
            or (bias is not None and (bias is not self._bias or bias.data_ptr() != self._bias_address))
            or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None
        ):
            return self._slow(x, bias)
        out = x.new_empty((*shape[:-1], self._n))
        self._call(x, bias, out)
        return out

    def _slow(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Everything that the short path leaves out: tracing, gradients, other layouts, a changed weight or backend."""
        if is_compiling():
            traced_result: Tensor = torch.ops.qcore.gemm_4bit(x, bias, *weight_arguments(self._load()))
            return traced_result
        if self._is_stale():
            self._prepare(self._load())
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if wants_gradient or traced(x, bias, self.weight.packed):
            result: Tensor = torch.ops.qcore.gemm_4bit(x, bias, *weight_arguments(self.weight))
            return result
        out = planned_product(x, self.weight, bias)
        self._dtype = x.dtype
        if bias is not None and bias.is_contiguous() and not bias.is_neg():
            self._bias, self._bias_address = bias, bias.data_ptr()
        self._call(validate.readable(x), None if bias is None else validate.readable(bias), out)
        return out

    def _is_stale(self) -> bool:
        return (
            backend_for(self._packed.device) is not self._backend
            or self._packed.data_ptr() != self._packed_address
            or self._state.absmax.data_ptr() != self._absmax_address
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
