"""The kernel behind ``torch.ops.qcore.gemm_4bit``.

Compiled code has no handle of a prepared weight (``prepared.py``): it brings the weight's tensors to every call. The
same ones come again with every token, so what was checked and packed for them is kept as long as ``absmax`` lives.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcore.backend.interface import PreparedGemm, Weight4bit
from qcore.backend.registry import backend_for, selection
from qcore.ops import compose, validate
from qcore.ops.weight4bit import checked_weight_values, planned_product, weight_from_arguments


@dataclass(slots=True)
class _Known:
    """A weight that has been seen, and the last activations that were found to fit."""

    absmax: weakref.ref[Tensor]
    selection: object
    places: tuple[Any, ...]  # of the packed codes, of absmax and of what it is nested in
    format: tuple[Any, ...]  # all that is no tensor
    weight: Weight4bit  # of aliases: no other tensor can come to lie in their places
    call: PreparedGemm
    dtype: torch.dtype | None = None
    shape: torch.Size | None = None
    device: torch.device | None = None
    out_shape: tuple[int, ...] = ()


_known: dict[int, _Known] = {}  # by id(absmax)


def gemm_4bit(
    A: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, ...],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    known = _known.get(id(absmax))
    nested = (nested_absmax, nested_code, nested_offset)
    format_ = (quant_type, blocksize, tuple(shape), nested_blocksize)
    if (
        known is None
        or known.absmax() is not absmax
        or known.selection is not selection()
        or known.places != _places(packed, absmax, *nested)
        or known.format != format_
    ):
        known = _learn(packed, absmax, nested, format_)
    if (
        A.shape != known.shape
        or A.dtype is not known.dtype
        or A.device != known.device
        or not _plain(A)
        or (bias is not None and not _fits(bias, known))
    ):
        return _checked(A, bias, known)
    out = A.new_empty(known.out_shape)
    known.call(A, bias, out)
    return out


def _places(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Where tensors lie, and how: a view that is made anew for each call lies where the last one did."""
    return tuple(
        None if of is None else (of.data_ptr(), of.shape, of.stride(), of.dtype, of.is_neg()) for of in tensors
    )


def _fits(bias: Tensor, known: _Known) -> bool:
    fits = bias.dtype in (known.dtype, torch.float32) and bias.shape == known.out_shape[-1:]
    return fits and bias.device == known.device and _plain(bias)


def _plain(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is its values in order."""
    return tensor.is_contiguous() and not tensor.is_neg()


def _learn(packed: Tensor, absmax: Tensor, nested: tuple[Tensor | None, ...], format_: tuple[Any, ...]) -> _Known:
    """Checks a weight and packs its arguments; keeps both unless it is a copy that was packed."""
    *meta, nested_blocksize = format_
    parts = (packed, absmax, *meta, *nested, nested_blocksize)
    # Aliases: what is kept must not keep `absmax` alive, with which it is forgotten.
    aliases: list[Any] = [part.detach() if isinstance(part, Tensor) else part for part in parts]
    weight = checked_weight_values("gemm_4bit", weight_from_arguments(*aliases))
    selected, backend = selection(), backend_for(packed.device)
    prepare = (
        backend.prepare_gemm_4bit if backend.supports("gemm_4bit") else partial(compose.prepare_gemm_4bit, backend)
    )
    key = id(absmax)
    reference = weakref.ref(absmax, lambda _: _known.pop(key, None))
    known = _Known(reference, selected, _places(packed, absmax, *nested), format_, weight, prepare(weight))
    if all(_plain(part) for part in parts if isinstance(part, Tensor)):
        _known[key] = known
    return known


def _checked(A: Tensor, bias: Tensor | None, known: _Known) -> Tensor:
    out = planned_product(A, known.weight, bias)
    known.call(validate.readable(A), None if bias is None else validate.readable(bias), out)
    known.dtype, known.shape, known.device, known.out_shape = A.dtype, A.shape, A.device, tuple(out.shape)
    return out
