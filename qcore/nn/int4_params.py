"""A weight of 4-bit integers in groups: ``Int4Params``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcore.backend.weights import WeightInt4
from qcore.nn.coded import CodedParameter

_PARTS = ("scales", "zeros", "perm")


class Int4Params(CodedParameter):
    """The weight of a ``LinearInt4``: codes, two a byte, with the scales, zero points and order that they have.

    Parameters
    ----------
    data : Tensor
        uint8 ``(N, ceil(K/2))`` (QC-INT4-001).
    requires_grad : bool
        Codes have no gradient: ignored.
    scales, zeros, perm : Tensor, optional
        As in :class:`~qcore.backend.weights.WeightInt4`.
    group_size : int
    shape_of_weight : tuple of int
        ``(N, K)``.
    **attributes
        Kept as attributes, as in :class:`~qcore.nn.Params4bit`.
    """

    scales: Tensor | None
    zeros: Tensor | None
    perm: Tensor | None
    group_size: int
    shape_of_weight: tuple[int, int]

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        *,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        group_size: int = 0,
        shape_of_weight: tuple[int, int] = (0, 0),
        **attributes: Any,
    ) -> Int4Params:
        data = torch.empty(0, dtype=torch.uint8) if data is None else data
        self: Int4Params = torch.Tensor._make_subclass(cls, data, False)
        self.__dict__.update(attributes)
        self.scales, self.zeros, self.perm = scales, zeros, perm
        self.group_size, self.shape_of_weight = group_size, shape_of_weight
        return self

    @classmethod
    def of(cls, weight: WeightInt4) -> Int4Params:
        """The parameter that holds ``weight``, without a copy."""
        return cls(
            weight.packed,
            scales=weight.scales,
            zeros=weight.zeros,
            perm=weight.perm,
            group_size=weight.group_size,
            shape_of_weight=weight.shape,
        )

    @property
    def is_coded(self) -> bool:
        return self.scales is not None

    def value(self) -> WeightInt4:
        """The weight as ops take it."""
        assert self.scales is not None
        return WeightInt4(self.data, self.scales, self.zeros, self.group_size, self.shape_of_weight, self.perm)

    def to(self, *args: Any, **kwargs: Any) -> Int4Params:
        """As :meth:`torch.Tensor.to`; a dtype is ignored, since codes and scales keep theirs."""
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, non_blocking = parsed[0], parsed[2]
        if device is None:
            return self
        moved = self._with_data(self.data.to(device, non_blocking=non_blocking))
        moved._move_parts(lambda part: part.to(device, non_blocking=non_blocking))
        return moved

    def _move_parts(self, move: Any) -> None:
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, move(part))

    def adopt(self, other: Tensor) -> Int4Params:
        """As :meth:`~qcore.nn.Params4bit.adopt`."""
        if other is self:
            return self
        if isinstance(other, Int4Params):
            moved = other
        else:
            moved = self._with_data(other)
            moved._move_parts(lambda part: part if part.device == other.device else part.to(other.device))
        if not torch._has_compatible_shallow_copy_type(self, moved):
            return moved
        self.data = moved.data
        self.__dict__.update(moved.__dict__)
        return self
