"""A 4-bit weight made ready for many products: validated and packed once, one short call a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from qcore.backend.interface import Backend, PreparedGemm, Weight4bit
from qcore.backend.registry import backend_for
from qcore.ops import compose, validate
from qcore.ops.gradient import Product, product
from qcore.ops.weight4bit import checked_weight_values, planned_product, require_matrix


class HasAbsmax(Protocol):
    """What holds the absmax tensor of a weight: a ``QuantState`` or a ``Weight4bit``."""

    @property
    def absmax(self) -> Tensor: ...


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
        "_decode",
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
        self,
        weight: Weight4bit | Callable[[], Weight4bit],
        packed: Tensor | None,
        state: HasAbsmax | None,
        decode: Callable[[Weight4bit, torch.dtype], Tensor],
    ) -> None:
        self._decode = decode
        self._load: Callable[[], Weight4bit] = weight if callable(weight) else lambda: weight
        first = self._load()
        self._packed = first.packed if packed is None else packed
        self._state: HasAbsmax = first if state is None else state
        self._prepare(first)

    def _prepare(self, weight: Weight4bit) -> None:
        weight = checked_weight_values("gemm_4bit", weight)
        require_matrix(weight)
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
            or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None
        ):
            return self._slow(x, bias)
        if is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            recorded = Product.apply(x, bias, self.weight, self._run, self._decode)  # type: ignore[no-untyped-call]
            return cast(Tensor, recorded)
        out = x.new_empty((*shape[:-1], self._n))
        self._call(x, bias, out)
        return out

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of arguments that were found to fit."""
        out = x.new_empty((*x.shape[:-1], self._n))
        self._call(x, bias, out)
        return out

    def _slow(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the short path leaves out: tracing, transforms, other layouts, a changed weight or backend."""
        if not is_compiling() and self._is_stale():
            self._prepare(self._load())
        # A tracer has to see where the weight comes from, not the copy of its address that was prepared.
        return product(x, self._load() if is_compiling() else self.weight, bias, self._run_any, self._decode)

    def _run_any(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of plain tensors, checked; what was found to fit is remembered for the short path."""
        out = planned_product(x, self.weight, bias)
        if x.dtype is not self._dtype:
            self._dtype, self._bias = x.dtype, None
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
