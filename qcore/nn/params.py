"""Parameters that hold codes: what a weight is before, while and after it is quantized.

Both classes carry everything that the codes mean with them, so that a move, a copy or a pickle is never half a weight.
Codes are not numbers: a conversion to another dtype leaves them as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from qcore import functional as F
from qcore.errors import FormatError, InvalidArgument, InvalidDtype
from qcore.functional import QuantState
from qcore.ops import validate

_SPLITS = frozenset({torch.chunk, torch.split, Tensor.chunk, Tensor.split})


def _rebuild(cls: type[torch.nn.Parameter], data: Tensor, requires_grad: bool) -> torch.nn.Parameter:
    return cls(data, requires_grad=requires_grad)


class _CodedParameter(torch.nn.Parameter):
    """A parameter with attributes of its own, which copies and pickles keep."""

    # Attributes that point back at an owner: a deep copy follows them only to an owner that is copied as well.
    _owners: tuple[str, ...] = ()

    def _with_data(self, data: Tensor) -> _CodedParameter:
        return type(self)(data, requires_grad=self.requires_grad, **self.__dict__)

    def __copy__(self) -> _CodedParameter:
        return self._with_data(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CodedParameter:
        if id(self) in memo:
            known: _CodedParameter = memo[id(self)]
            return known
        attributes = {
            name: memo.get(id(value), value) if name in self._owners else copy.deepcopy(value, memo)
            for name, value in self.__dict__.items()
        }
        result = type(self)(self.data.clone(), requires_grad=self.requires_grad, **attributes)
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The attributes go in as state, not as arguments: the owner holds this parameter, and state may be cyclic.
        return _rebuild, (type(self), self.data, self.requires_grad), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def is_coded(self) -> bool:
        """Whether the data are codes, not numbers."""
        raise NotImplementedError

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None, non_blocking: bool = False, **_: Any) -> Tensor:
        return self.to(_indexed("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: int | str | torch.device | None = None, non_blocking: bool = False, **_: Any) -> Tensor:
        return self.to(_indexed("xpu", device), non_blocking=non_blocking)

    def half(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.float64)


def _indexed(kind: str, device: int | str | torch.device | None) -> str | torch.device:
    if device is None:
        return kind
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device)


class Params4bit(_CodedParameter):
    """A weight in NF4 or FP4, or one that will be on its first move to a device.

    Parameters
    ----------
    data : Tensor, optional
        float32, float16 or bfloat16 of any shape; or packed codes, with ``quant_state`` and ``bnb_quantized=True``.
    requires_grad : bool
        Codes have no gradient; only a weight that is not quantized yet may ask for one.
    quant_state : QuantState, optional
        What the codes mean.
    blocksize : int, optional
        Elements a scale, a power of two from 32 to 4096; 64 if None.
    compress_statistics : bool
        Quantize the scales too (nested quantization).
    quant_type : str
        ``"fp4"`` or ``"nf4"``.
    quant_storage : torch.dtype
        dtype under which the packed bytes are stored; FSDP wants that of the other parameters.
    module : nn.Module, optional
        The layer that owns the weight; its ``quant_state`` is kept equal to the weight's.
    bnb_quantized : bool
        Whether ``data`` are packed codes.
    **attributes
        Kept as attributes, so that ``Params4bit(data, **old.__dict__)`` carries over what others have attached.

    Raises
    ------
    InvalidArgument
        Unknown ``quant_type`` or ``blocksize``.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: torch.nn.Module | None

    _owners = ("module",)

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **attributes: Any,
    ) -> Params4bit:
        validate.quant_type("Params4bit", quant_type)
        blocksize = 64 if blocksize is None else blocksize
        validate.blocksize("Params4bit", blocksize)
        self: Params4bit = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.__dict__.update(attributes)
        self.blocksize = blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: str | torch.device = "cuda",
        module: torch.nn.Module | None = None,
        **attributes: Any,
    ) -> Params4bit:
        """A weight from packed codes and the entries of a state dict that belong to it.

        Parameters
        ----------
        data : Tensor
            Packed codes, ``(ceil(n / 2), 1)`` uint8 or the same bytes under another dtype.
        quantized_stats : dict
            ``absmax``, ``quant_map``, ``quant_state.bitsandbytes__nf4`` ..., with or without a prefix. Not changed.
        device : str or torch.device
            Where the weight shall live.

        Raises
        ------
        FormatError
            The entries are incomplete, or do not fit each other or ``data``.
        """
        state = QuantState.from_dict(dict(quantized_stats), device=torch.device(device))
        check_packed("from_prequantized", data, state)
        self = cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
            **attributes,
        )
        self._tell_module()
        return self

    @property
    def is_coded(self) -> bool:
        return self.bnb_quantized

    def quantize(self, device: str | torch.device | None = None) -> Params4bit:
        """Quantize in place, on ``device`` if one is given; does nothing to a quantized weight but move it.

        Raises
        ------
        InvalidDtype
            The data are not float32, float16 or bfloat16.
        """
        if self.bnb_quantized:
            return self if device is None else self.to(device)
        source = self.data if device is None else self.data.to(device)
        if source.is_meta:
            raise InvalidArgument("Params4bit.quantize: the weight is on the meta device, there is nothing to quantize")
        self.requires_grad = False
        self.data, self.quant_state = F.quantize_4bit(
            source,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.bnb_quantized = True
        self._tell_module()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        """As :meth:`torch.Tensor.to`, but the first move to a device quantizes, in place.

        The meta device and a change of dtype alone do not quantize. Of a quantized weight, ``dtype`` is the one that
        dequantizing gives: the codes stay as they are.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            return self._moved(device, dtype, non_blocking)
        if device is not None and device.type != "meta":
            self.quantize(device)
            return self if dtype is None else self._moved(None, dtype, False)
        return self._with_data(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))  # type: ignore[return-value]

    def _moved(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> Params4bit:
        state = self.quant_state
        if dtype is not None and dtype not in validate.FLOATS:
            raise InvalidDtype(f"Params4bit.to: {dtype} cannot be dequantized to, needs float32, float16 or bfloat16")
        stays = device is None or (
            self.data.device == device if device.index is not None else self.data.device.type == device.type
        )
        if stays and (dtype is None or state is None or state.dtype == dtype):
            return self
        data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
        moved: Params4bit = self._with_data(data)  # type: ignore[assignment]
        if state is not None:
            moved.quant_state = copied_state(state, device)
            moved.quant_state.dtype = dtype or state.dtype
        moved._tell_module()
        return moved

    def adopt(self, other: Tensor) -> Params4bit:
        """Take over the data and meaning of ``other``, the result of a module-wide move; returns what to keep.

        The object stays the same where torch allows it, so that tied weights stay tied and optimizers keep their
        reference.
        """
        if other is self:
            return self
        if not isinstance(other, Params4bit):  # torch.empty_like and the like give plain tensors
            other = self._with_data(other)  # type: ignore[assignment]
            if other.quant_state is not None:
                other.quant_state = copied_state(other.quant_state, other.device, empty=self.is_meta)
        if not torch._has_compatible_shallow_copy_type(self, other):
            kept = other
        else:
            kept, module = self, self.module
            kept.data = other.data
            kept.__dict__.update(other.__dict__)
            kept.module = module
        kept._tell_module()
        return kept  # type: ignore[return-value]

    def _tell_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in _SPLITS and isinstance(args[0], Params4bit):
            # FSDP and tensor parallelism cut parameters up and expect parameters of the same class.
            return tuple(args[0]._with_data(part) for part in result)
        return result

    # FSDP resolves "weight.absmax" and the other names of a state dict by getattr. Properties, not __getattr__:
    # torch.compile traces them.

    def _part(self, name: str, *, nested: bool = False) -> Any:
        state = self.quant_state
        if state is None or (nested and state.state2 is None):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return state.state2 if nested else state

    @property
    def absmax(self) -> Tensor:
        """Scales: float32, or uint8 when nested."""
        result: Tensor = self._part("absmax").absmax
        return result

    @property
    def code(self) -> Tensor:
        """The sixteen values of the format."""
        result: Tensor = self._part("code").code
        return result

    @property
    def quant_map(self) -> Tensor:
        """The sixteen values of the format, under their name in a state dict."""
        result: Tensor = self._part("quant_map").code
        return result

    @property
    def offset(self) -> Tensor | None:
        """Offset of nested scales."""
        result: Tensor | None = self._part("offset").offset
        return result

    @property
    def state2(self) -> QuantState | None:
        """What the codes of nested scales mean."""
        result: QuantState | None = self._part("state2").state2
        return result

    @property
    def nested_absmax(self) -> Tensor:
        """Scales of the scales."""
        result: Tensor = self._part("nested_absmax", nested=True).absmax
        return result

    @property
    def nested_blocksize(self) -> int:
        """Scales a scale."""
        result: int = self._part("nested_blocksize", nested=True).blocksize
        return result

    @property
    def nested_quant_map(self) -> Tensor:
        """The 256 values of a nested scale."""
        result: Tensor = self._part("nested_quant_map", nested=True).code
        return result

    @property
    def nested_dtype(self) -> torch.dtype:
        """dtype of the scales before they were quantized."""
        result: torch.dtype = self._part("nested_dtype", nested=True).dtype
        return result

    @property
    def nested_offset(self) -> Tensor:
        """Offset of nested scales, under its name in a state dict."""
        result: Tensor = self._part("nested_offset", nested=True) and self._part("nested_offset").offset
        return result


class Int8Params(_CodedParameter):
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
        Kept as attributes, as in :class:`Params4bit`.
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
        return self.dtype == torch.int8

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

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:  # type: ignore[override]
        """As :meth:`torch.Tensor.to`, but the first move to a device quantizes, unless ``has_fp16_weights``."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.is_coded:
            if device is not None and device.type != "meta" and not self.has_fp16_weights:
                return self.quantize(device)
            data = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self if data is self.data else self._with_data(data)  # type: ignore[return-value]
        if device is None:
            return self
        moved: Int8Params = self._with_data(self.data.to(device, non_blocking=non_blocking))  # type: ignore[assignment]
        if self.SCB is not None:
            moved.SCB = self.SCB.to(device, non_blocking=non_blocking)
        return moved

    def adopt(self, other: Tensor) -> Int8Params:
        """As :meth:`Params4bit.adopt`."""
        if other is self:
            return self
        if not isinstance(other, Int8Params):
            other = self._with_data(other)  # type: ignore[assignment]
            if other.SCB is not None and other.SCB.device != other.device:
                other.SCB = torch.empty_like(other.SCB, device=other.device)
        if not torch._has_compatible_shallow_copy_type(self, other):
            return other  # type: ignore[return-value]
        self.data = other.data
        self.__dict__.update(other.__dict__)
        return self


def copied_state(
    state: QuantState, device: torch.device | None, *, clone: bool = False, empty: bool = False
) -> QuantState:
    """A quantization state on ``device``, so that a later change of it leaves ``state`` alone.

    ``clone`` copies tensors that are there already; ``empty`` leaves the values undefined, for a state that comes from
    the meta device.
    """
    result = copy.copy(state)
    if state.state2 is not None:
        result.state2 = copy.copy(state.state2)
    for part in (result, result.state2):
        for name in ("absmax", "code", "offset"):
            value = getattr(part, name, None)
            if isinstance(value, Tensor):
                target = value.device if device is None else device
                moved = torch.empty_like(value, device=target) if empty else value.to(target, copy=clone)
                setattr(part, name, moved)
    return result


def check_packed(where: str, packed: Tensor, state: QuantState) -> None:
    """Check that codes and state belong together, as far as their sizes can say.

    Raises
    ------
    FormatError
        They do not.
    """
    numel = 1
    for size in state.shape or ():
        numel *= size
    have, need = packed.numel() * packed.element_size(), (numel + 1) // 2
    if have != need and not need <= have < need + packed.element_size():
        raise FormatError(f"{where}: weight has {have} bytes, shape {tuple(state.shape)} in 4 bits needs {need}")
