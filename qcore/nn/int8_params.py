"""A weight of int8 codes with one scale a row, or one that will be: ``Int8Params``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcore import functional as F
from qcore.errors import InvalidArgument
from qcore.nn.coded import CodedParameter


class Int8Params(CodedParameter):
    """A weight of ``Linear8bitLt`` or ``Embedding8bit``: numbers, or int8 codes with one scale a row.

    Parameters
    ----------
    data : Tensor, optional
        float32, float16 or bfloat16 ``(rows, columns)``; or int8 codes.
    requires_grad : bool
        Codes have no gradient: ignored for int8 data.
    has_fp16_weights : bool
        Keep numbers, of any float dtype, and quantize them in each forward pass. Otherwise the first move to a device
        quantizes.
    CB : Tensor, optional
        The codes, if ``data`` are not they: bitsandbytes keeps them twice.
    SCB : Tensor, optional
        float32 ``(rows,)``: largest magnitude of each row.
    **attributes
        Kept as attributes, as in :class:`~qcore.nn.Params4bit`.
    """

    has_fp16_weights: bool
    SCB: Tensor | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **attributes: Any,
    ) -> Int8Params:
        data = (torch.empty(0) if CB is None else CB) if data is None else data
        self: Int8Params = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.__dict__.update(attributes)
        self.has_fp16_weights = has_fp16_weights
        self.SCB = SCB
        return self

    @property
    def is_coded(self) -> bool:
        return bool(self.dtype == torch.int8)

    @property
    def CB(self) -> Tensor | None:
        """The codes; None while the data are numbers."""
        return self.data if self.is_coded else None

    def quantize(self, device: str | torch.device | None = None) -> Int8Params:
        """Quantize the rows in place (QC-INT8-002, QC-INT8-003), on ``device`` if one is given.

        bitsandbytes rounds to float16 first; here float32 and bfloat16 weights are quantized as they are.
        """
        if self.is_coded:
            return self if device is None else self.to(device)
        source = self.data if device is None else self.data.to(device)
        if source.is_meta:
            raise InvalidArgument("Int8Params.quantize: the weight is on the meta device, there is nothing to quantize")
        codes, scales, _ = F.int8_vectorwise_quant(source)
        self.requires_grad = False
        self.data, self.SCB = codes, scales
        return self

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """As :meth:`torch.Tensor.to`, but the first move to a device quantizes, unless ``has_fp16_weights``."""
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, non_blocking = parsed[:3]
        if not self.is_coded:
            if device is not None and device.type != "meta" and not self.has_fp16_weights:
                return self.quantize(device)
            source = self.data
            data = source.to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self if data is source else self._with_data(data)
        if device is None:
            return self
        moved = self._with_data(self.data.to(device, non_blocking=non_blocking))
        if self.SCB is not None:
            moved.SCB = self.SCB.to(device, non_blocking=non_blocking)
        return moved

    def adopt(self, other: Tensor) -> Int8Params:
        """As :meth:`~qcore.nn.Params4bit.adopt`."""
        if other is self:
            return self
        if isinstance(other, Int8Params):
            moved = other
        else:
            moved = self._with_data(other)
            if moved.SCB is not None and moved.SCB.device != other.device:
                moved.SCB = torch.empty_like(moved.SCB, device=other.device)
        if not torch._has_compatible_shallow_copy_type(self, moved):
            return moved
        self.requires_grad = moved.requires_grad
        self.data = moved.data
        self.__dict__.update(moved.__dict__)
        return self


# A name that guides and old code use for the same thing.
Params8bit = Int8Params
