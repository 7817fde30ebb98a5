"""What the registered products keep of the weights that compiled code brings.

Compiled code has no handle of a prepared weight (``prepared.py``): it brings the weight's tensors to every call of
``torch.ops.qcore.gemm_4bit``, ``gemm_int4`` or ``int8_linear``. The same ones come again with every token, so what was
checked and packed for them is kept as long as the scales live. An op gets no tensor with a pending negation: torch
resolves it on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qcore.backend.interface import Backend, PreparedGemm
from qcore.backend.registry import backend_for, selection
from qcore.ops import validate

Weight = TypeVar("Weight")
Call = TypeVar("Call")


@dataclass(slots=True)
class Known(Generic[Weight, Call]):
    """A weight that has been seen, and the last activations that were found to fit."""

    scales: weakref.ref[Tensor]
    selection: object
    places: tuple[Any, ...]  # of all its tensors
    format: tuple[Any, ...]  # all that is no tensor
    weight: Weight  # of aliases: no other tensor can come to lie in their places
    call: Call
    # dtype, shape and device of the activations, shape of the result: one tuple, which another thread may replace.
    fit: tuple[torch.dtype | None, torch.Size | None, torch.device | None, tuple[int, ...]] = (None, None, None, ())

    def shape_of_result(self, A: Tensor, bias: Tensor | None) -> tuple[int, ...] | None:
        """None where the activations or the bias have to be looked at more closely."""
        dtype, shape, device, out_shape = self.fit
        if A.shape != shape or A.dtype is not dtype or A.device != device or not A.is_contiguous():
            return None
        if bias is not None and not (
            bias.dtype in (dtype, torch.float32)
            and bias.shape == out_shape[-1:]
            and bias.device == device
            and bias.is_contiguous()
        ):
            return None
        return out_shape

    def keep_fit(self, A: Tensor, out: Tensor) -> None:
        """Activations like ``A``, which were checked, need not be looked at again."""
        self.fit = (A.dtype, A.shape, A.device, tuple(out.shape))


class KnownWeights(Generic[Weight, Call]):
    """The weights that one op has been called with, each as long as its scales live.

    Parameters
    ----------
    check : callable
        ``check(scales, *others, *format)`` gives the weight, with all of its parts checked and readable.
    prepare : callable
        ``prepare(backend, weight)`` packs it.
    """

    def __init__(self, check: Callable[..., Weight], prepare: Callable[[Backend, Weight], Call]) -> None:
        self._check, self._prepare = check, prepare
        self._known: dict[int, Known[Weight, Call]] = {}  # by id(scales)

    def find(self, scales: Tensor, others: tuple[Tensor | None, ...], format_: tuple[Any, ...]) -> Known[Weight, Call]:
        """The weight with these parts, checked and packed in this call if it is another one than before."""
        known = self._known.get(id(scales))
        if (
            known is None
            or known.scales() is not scales
            or known.selection is not selection()
            or known.places != _places(scales, *others)
            or known.format != format_
        ):
            return self._learn((scales, *others), format_)
        return known

    def _learn(self, parts: tuple[Any, ...], format_: tuple[Any, ...]) -> Known[Weight, Call]:
        """Checks a weight and packs it; keeps it unless what was packed is a copy."""
        scales = parts[0]
        # Aliases: what is kept must not keep the scales alive, with which it is forgotten.
        weight = self._check(*(part.detach() if isinstance(part, Tensor) else part for part in parts), *format_)
        call = self._prepare(backend_for(scales.device), weight)
        key = id(scales)
        reference = weakref.ref(scales, lambda _: self._known.pop(key, None))
        known = Known(reference, selection(), _places(*parts), format_, weight, call)
        if all(part is None or part.is_contiguous() for part in parts):
            self._known[key] = known
        return known


def product(
    known: Known[Weight, PreparedGemm],
    A: Tensor,
    bias: Tensor | None,
    plan: Callable[[Tensor, Weight, Tensor | None], Tensor],
) -> Tensor:
    """``A @ W.T + bias``; ``plan`` checks the activations and allocates the result."""
    shape = known.shape_of_result(A, bias)
    if shape is not None:
        out = A.new_empty(shape)
    else:
        out = plan(A, known.weight, bias)
        known.keep_fit(A, out)
        A, bias = validate.readable(A), None if bias is None else validate.readable(bias)
    known.call(A, bias, out)
    return out


def _places(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Where tensors lie, and how: a view that is made anew for each call lies where the last one did."""
    return tuple(None if of is None else (of.data_ptr(), of.shape, of.stride(), of.dtype) for of in tensors)
