"""``dY W`` for a weight that was packed once: the gradient of a prepared product, one short call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from qcore.backend.interface import PreparedTransposed
from qcore.backend.registry import selection
from qcore.ops.library import is_batched


class _Served(NamedTuple):
    """What a call was prepared for."""

    selection: object  # while this is selected, the backend that made `call` serves `device`
    call: PreparedTransposed
    addresses: tuple[int, int]
    device: torch.device


class Back:
    """``back(gradient) -> gradient @ W``, of shape ``(..., K)``; what is not plain goes the general way.

    Parameters
    ----------
    call : callable, optional
        The backend's, packed for the weight; None where it has none.
    general : callable
        The op on any tensor, checked and differentiable.
    parts : (Tensor, Tensor)
        Codes and scales of the weight, whose addresses ``call`` holds.
    shape : (int, int)
        Of the weight, ``(N, K)``.
    """

    __slots__ = ("_columns", "_general", "_rows", "_served", "parts")

    def __init__(
        self,
        call: PreparedTransposed | None,
        general: Callable[[Tensor], Tensor],
        parts: tuple[Tensor, Tensor],
        shape: tuple[int, ...],
    ) -> None:
        self._general, self.parts = general, parts
        self._rows, self._columns = shape
        codes, scales = parts
        addresses = (codes.data_ptr(), scales.data_ptr())
        self._served = None if call is None else _Served(selection(), call, addresses, codes.device)

    def __call__(self, gradient: Tensor) -> Tensor:
        served = self._served
        codes, scales = self.parts
        if (
            served is None
            or type(gradient) is not Tensor
            or not gradient.is_contiguous()
            or gradient.is_neg()
            or (gradient.requires_grad and is_grad_enabled())
            or selection() is not served.selection
            or (codes.data_ptr(), scales.data_ptr()) != served.addresses
            or gradient.device != served.device
            or gradient.shape[-1:] != (self._rows,)
            or not gradient.is_floating_point()
            or gradient.dtype == torch.float64
            or is_compiling()
            or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None
            or is_batched(gradient)
        ):
            return self._general(gradient)
        out = gradient.new_empty((*gradient.shape[:-1], self._columns))
        served.call(gradient, out)
        return out
