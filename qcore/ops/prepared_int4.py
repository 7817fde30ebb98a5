"""A weight of 4-bit integers made ready for many products: validated and packed once, one short call a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _disabled_torch_function_impl, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

from qcore.backend.interface import PreparedGemm
from qcore.backend.registry import backend_for, selection
from qcore.backend.weights import WeightInt4
from qcore.ops.int4 import checked_order, checked_weight, gemm_int4, prepare
from qcore.ops.library import is_batched, traced

_DATA_PTR = (Tensor.data_ptr, ())  # the function, and the types that would override it


class HasParts(Protocol):
    """What holds the parts of a weight beside its codes: an ``Int4Params`` or a ``WeightInt4``."""

    @property
    def scales(self) -> Tensor | None: ...
    @property
    def zeros(self) -> Tensor | None: ...
    @property
    def perm(self) -> Tensor | None: ...


class _Ready(NamedTuple):
    """The last arguments that were found to fit, and the call that serves them."""

    selection: object  # while this is selected, the backend that made `call` serves `device`
    call: PreparedGemm
    addresses: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    out_shape: tuple[int, ...]
    bias: Tensor | None
    bias_address: int


class PreparedInt4:
    """``handle.eager(x, bias) -> x @ W.T + bias`` for one weight.

    Arguments and results are those of :func:`~qcore.ops.int4.gemm_int4`, which also takes what the short path leaves
    out: gradients, modes, transforms, other layouts. ``load`` gives the weight; it is asked again when the chosen
    backend, the device or the address of one of the weight's parts has changed. The handle holds addresses, so a copy
    or a pickle of it is ``None``.
    """

    __slots__ = ("_load", "_packed_address", "_parts", "_ready")

    def __init__(self, load: Callable[[], WeightInt4], packed: Tensor | None, parts: HasParts | None) -> None:
        self._load = load
        first = checked_order(checked_weight(load()))
        # Asked for in every call: a parameter's own data_ptr goes through __torch_function__, three times as long.
        self._packed_address: Callable[[], int] = partial(
            _disabled_torch_function_impl, *_DATA_PTR, (first.packed if packed is None else packed,), {}
        )
        self._parts: HasParts = first if parts is None else parts
        self._ready: _Ready | None = None

    def _addresses(self) -> tuple[int, ...]:
        parts = self._parts
        scales, zeros, perm = parts.scales, parts.zeros, parts.perm
        return (
            self._packed_address(),
            0 if scales is None else scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            0 if perm is None else perm.data_ptr(),
        )

    def eager(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The call, for a layer that has asked ``is_compiling()`` itself."""
        ready = self._ready  # one read: another thread may replace it meanwhile
        if ready is None:
            return self._slow(x, bias)
        selected, call, addresses, device, dtype, shape, out_shape, known_bias, bias_address = ready
        if (
            type(x) is not Tensor
            or x.dtype is not dtype
            or x.shape != shape
            or x.device != device
            or not x.is_contiguous()
            or x.is_neg()
            or selection() is not selected
            or self._addresses() != addresses
            or (bias is not None and (bias is not known_bias or bias.data_ptr() != bias_address))
            or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None
            or is_batched(x)
            or (is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        ):
            return self._slow(x, bias)
        out = x.new_empty(out_shape)
        call(x, bias, out)
        return out

    def _slow(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._load()
        out = gemm_int4(x, weight, bias)
        if not out.requires_grad and not traced(x, weight.packed, bias):
            fits = bias is not None and bias.is_contiguous() and not bias.is_neg()
            known = (bias, bias.data_ptr()) if bias is not None and fits else (None, 0)
            call = prepare(backend_for(x.device), checked_weight(weight))
            found = (selection(), call, self._addresses(), x.device, x.dtype, x.shape, tuple(out.shape))
            self._ready = _Ready(*found, *known)
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def prepare_int4(
    weight: WeightInt4 | Callable[[], WeightInt4], packed: Tensor | None = None, parts: HasParts | None = None
) -> PreparedInt4:
    """Make a weight ready for many products.

    Parameters
    ----------
    weight : WeightInt4, or a function that gives one
        A layer passes a function that reads its parameter.
    packed : Tensor, optional
        The parameter, whose address shows in each call whether its codes have moved.
    parts : object, optional
        What holds ``scales``, ``zeros`` and ``perm``; their addresses are looked at as well.

    Raises
    ------
    InvalidArgument, InvalidDtype
        The weight's parts do not fit each other.
    """
    return PreparedInt4(weight if callable(weight) else lambda: weight, packed, parts)
