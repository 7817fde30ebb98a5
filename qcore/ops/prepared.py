"""A 4-bit weight made ready for many products: validated and packed once, one short call a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _disabled_torch_function_impl, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from qcore.backend.interface import Backend, PreparedGemm, Weight4bit
from qcore.backend.registry import backend_for, selection
from qcore.ops import compose, validate
from qcore.ops.back import Back
from qcore.ops.gradient import Factor, product, record
from qcore.ops.library import is_batched
from qcore.ops.weight4bit import checked_weight_values, planned_product, require_matrix

_DATA_PTR = (Tensor.data_ptr, ())  # the function, and the types that would override it


class HasAbsmax(Protocol):
    """What holds the absmax tensor of a weight: a ``QuantState`` or a ``Weight4bit``."""

    @property
    def absmax(self) -> Tensor: ...


class _Ready(NamedTuple):
    """What a handle was prepared for, and the last arguments that were found to fit."""

    selection: object  # while this is selected, `backend` serves `device`
    backend: Backend
    call: PreparedGemm
    packed_address: int
    absmax_address: int
    device: torch.device
    factor: Factor  # for products of `shape`, once there is one
    dtype: torch.dtype | None
    shape: torch.Size | None
    out_shape: tuple[int, ...]
    bias: Tensor | None
    bias_address: int


def _back(backend: Backend, weight: Weight4bit, general: Callable[[Tensor, Weight4bit], Tensor]) -> Back:
    served = backend.supports("gemm_4bit_transposed")
    call = backend.prepare_gemm_4bit_transposed(weight) if served else None
    return Back(call, lambda gradient: general(gradient, weight), (weight.packed, weight.absmax), weight.shape)


class PreparedGemm4bit:
    """``handle(x, bias=None) -> x @ W.T + bias`` for one weight; made by :func:`prepare_gemm_4bit`.

    ``x`` is float32, float16 or bfloat16 of shape ``(..., K)`` on the weight's device, ``bias`` ``(N,)`` in the dtype
    of ``x`` or float32, the result ``(..., N)`` in the dtype of ``x``. Gradients flow to ``x`` and ``bias``; under
    ``torch.compile``, dispatch modes and functorch transforms it becomes ``torch.ops.qcore.gemm_4bit``.

    Each call compares the chosen backend, the weight's two addresses and the device with those it was prepared for, and
    prepares itself again when one has changed. It holds addresses, so a copy or a pickle of a handle is ``None``:
    whoever holds it prepares it again.
    """

    __slots__ = ("_back", "_load", "_packed", "_packed_address", "_ready", "_state")

    def __init__(
        self,
        weight: Weight4bit | Callable[[], Weight4bit],
        packed: Tensor | None,
        state: HasAbsmax | None,
        back: Callable[[Tensor, Weight4bit], Tensor],
    ) -> None:
        self._load: Callable[[], Weight4bit] = weight if callable(weight) else lambda: weight
        self._back = back
        first = self._load()
        self._packed = first.packed if packed is None else packed
        # Asked for in every call: a parameter's own data_ptr goes through __torch_function__, three times as long.
        self._packed_address: Callable[[], int] = partial(
            _disabled_torch_function_impl, *_DATA_PTR, (self._packed,), {}
        )
        self._state: HasAbsmax = first if state is None else state
        self._ready = self._prepared(first)

    @property
    def weight(self) -> Weight4bit:
        """The weight as it was last prepared."""
        return self._ready.factor.weight

    def _prepared(self, weight: Weight4bit) -> _Ready:
        weight = checked_weight_values("gemm_4bit", weight)
        require_matrix(weight)
        device = weight.packed.device
        selected, backend = selection(), backend_for(device)
        addresses = (self._packed_address(), self._state.absmax.data_ptr())
        factor = Factor(weight, self._run_any, _back(backend, weight, self._back))
        call = compose.prepare_gemm_4bit(backend, weight)
        return _Ready(selected, backend, call, *addresses, device, factor, None, None, (), None, 0)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._traced(x, bias) if is_compiling() else self.eager(x, bias)

    def eager(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The call, for a layer that has asked ``is_compiling()`` itself."""
        # One read of one attribute: another thread may prepare the handle again meanwhile.
        selected, _, call, packed, absmax, device, factor, dtype, shape, out_shape, known_bias, bias_address = (
            self._ready
        )
        if (
            type(x) is not Tensor
            or x.dtype is not dtype
            or x.shape != shape
            or x.device != device
            or not x.is_contiguous()
            or x.is_neg()
            or selection() is not selected
            or self._packed_address() != packed
            or self._state.absmax.data_ptr() != absmax
            or (bias is not None and (bias is not known_bias or bias.data_ptr() != bias_address))
            or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None
            or is_batched(x)
        ):
            return self._slow(x, bias)
        if is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return record(x, bias, factor)
        out = x.new_empty(out_shape)
        call(x, bias, out)
        return out

    def _traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """A tracer has to see where the weight comes from, not the copy of its address that was prepared."""
        weight = self._load()
        return product(x, bias, Factor(weight, self._run_any, lambda gradient: self._back(gradient, weight)))

    def transposed(self, y: Tensor) -> Tensor:
        """``y @ W``, ``(..., N)`` to ``(..., K)``: what the backward pass of a product with this handle calls."""
        return self._current().factor.back(y)

    def _slow(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the short path leaves out: modes, transforms, other layouts, a changed weight or backend."""
        return product(x, bias, self._current().factor._replace(multiply=self._run_any))

    def _current(self) -> _Ready:
        """What is ready, prepared again if weight or backend have changed."""
        ready, selected = self._ready, selection()
        if (
            backend_for(self._packed.device) is not ready.backend
            or self._packed_address() != ready.packed_address
            or self._state.absmax.data_ptr() != ready.absmax_address
        ):
            self._ready = self._prepared(self._load())
        elif selected is not ready.selection:
            self._ready = ready._replace(selection=selected)
        return self._ready

    def _run_any(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of plain tensors, checked; what was found to fit is remembered for the short path."""
        ready = self._ready
        out = planned_product(x, ready.factor.weight, bias)
        plain = bias is None or (bias.is_contiguous() and not bias.is_neg())
        known = (bias, 0 if bias is None else bias.data_ptr()) if plain else (None, 0)
        out_shape = tuple(out.shape)
        factor = ready.factor._replace(multiply=partial(_multiply, ready.call, out_shape))
        self._ready = _Ready(*ready[:6], factor, x.dtype, x.shape, out_shape, *known)
        ready.call(validate.readable(x), None if bias is None else validate.readable(bias), out)
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _multiply(call: PreparedGemm, out_shape: tuple[int, ...], x: Tensor, bias: Tensor | None) -> Tensor:
    """The product of arguments that were found to fit."""
    out = x.new_empty(out_shape)
    call(x, bias, out)
    return out
