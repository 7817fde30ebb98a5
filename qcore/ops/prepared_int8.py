"""An int8 weight made ready for many products: one short call a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _disabled_torch_function_impl, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

from qcore.backend.interface import PreparedInt8, Weight8bit
from qcore.backend.registry import backend_for, selection
from qcore.ops.back import Back
from qcore.ops.int8_linear import int8_linear, int8_linear_transposed, record
from qcore.ops.library import is_batched, traced

_DATA_PTR = (Tensor.data_ptr, ())  # the function, and the types that would override it


class _Ready(NamedTuple):
    """The last arguments that were found to fit, and the call that serves them."""

    selection: object  # while this is selected, the backend that made `call` serves `device`
    call: PreparedInt8
    codes_address: int
    scales_address: int
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    out_shape: tuple[int, ...]
    columns: int
    bias: Tensor | None
    bias_address: int
    back: Back


def _multiply(ready: _Ready, x: Tensor, bias: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """The product of arguments that were found to fit."""
    out = x.new_empty(ready.out_shape)
    outliers = x.new_empty(ready.columns if threshold > 0.0 else 0, dtype=torch.uint8)
    ready.call(x, threshold, bias, out, outliers if threshold > 0.0 else None)
    return out, outliers


class PreparedInt8Linear:
    """``handle.eager(x, bias, threshold) -> (x @ W.T + bias, outlier columns)`` for one weight.

    Arguments and results are those of :func:`~qcore.ops.int8_linear.int8_linear`, which also takes what the short path
    leaves out: modes, transforms, other layouts. Each call compares the chosen backend, the weight's two
    addresses and the device with those of the last one. It holds addresses, so a copy or a pickle of a handle is
    ``None``.
    """

    __slots__ = ("_codes", "_codes_address", "_ready", "_scales")

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._codes, self._scales = codes, scales
        # Asked for in every call: a parameter's own data_ptr goes through __torch_function__, three times as long.
        self._codes_address: Callable[[], int] = partial(_disabled_torch_function_impl, *_DATA_PTR, (codes,), {})
        self._ready: _Ready | None = None

    def eager(self, x: Tensor, bias: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """The call, for a layer that has asked ``is_compiling()`` itself."""
        ready = self._ready  # one read: another thread may replace it meanwhile
        if ready is None:
            return self._slow(x, bias, threshold)
        selected, _, codes, scales, device, dtype, shape, _, _, known_bias, bias_address, _ = ready
        if (
            type(x) is not Tensor
            or x.dtype is not dtype
            or x.shape != shape
            or x.device != device
            or not x.is_contiguous()
            or x.is_neg()
            or selection() is not selected
            or self._codes_address() != codes
            or self._scales.data_ptr() != scales
            or (bias is not None and (bias is not known_bias or bias.data_ptr() != bias_address))
            or not 0.0 <= threshold < 1e38
            or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None
            or is_batched(x)
        ):
            return self._slow(x, bias, threshold)
        if is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return record(x, bias, partial(_multiply, ready, threshold=threshold), ready.back, ready.back.parts)
        return _multiply(ready, x, bias, threshold)

    def _slow(self, x: Tensor, bias: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        out, outliers = int8_linear(x, self._codes, self._scales, bias, threshold)
        if not traced(x, self._codes, self._scales, bias):
            self._ready = self._prepared(x, bias, out)
        return out, outliers

    def _prepared(self, x: Tensor, bias: Tensor | None, out: Tensor) -> _Ready | None:
        """What to compare the next call with; ``x`` and ``bias`` were found to fit."""
        codes, scales, backend = self._codes.detach(), self._scales, backend_for(x.device)
        plain = all(part.is_contiguous() and not part.is_neg() for part in (codes, scales))
        if not (plain and backend.supports("int8_linear")):
            return None
        call = backend.prepare_int8_linear(Weight8bit(codes, scales))
        addresses = (self._codes_address(), scales.data_ptr())
        fits = bias is not None and bias.is_contiguous() and not bias.is_neg()
        known = (bias, bias.data_ptr()) if bias is not None and fits else (None, 0)
        known_bias, bias_address = known
        return _Ready(
            selection(),
            call,
            *addresses,
            x.device,
            x.dtype,
            x.shape,
            tuple(out.shape),
            x.shape[-1],
            known_bias,
            bias_address,
            int8_back(codes, scales),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def int8_back(codes: Tensor, scales: Tensor) -> Back:
    """``dY W`` for one weight on the backend that serves it now; the arguments were checked."""
    backend = backend_for(codes.device)
    served = backend.supports("int8_linear_transposed")
    call = backend.prepare_int8_linear_transposed(Weight8bit(codes, scales)) if served else None

    def general(gradient: Tensor) -> Tensor:
        return int8_linear_transposed(gradient, codes, scales)

    return Back(call, general, (codes, scales), tuple(codes.shape))
