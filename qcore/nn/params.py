"""A weight in four bits, or one that will be: ``Params4bit``. Codes are no numbers: no change of dtype touches them."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import Tensor

from qcore import functional as F
from qcore.errors import FormatError, InvalidArgument, InvalidDtype
from qcore.functional import QuantState
from qcore.nn.coded import CodedParameter
from qcore.ops import validate

_SPLITS = frozenset({torch.chunk, torch.split, Tensor.chunk, Tensor.split})


class Params4bit(CodedParameter):
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
    InvalidArgument, InvalidDtype
        Unknown ``quant_type`` or ``blocksize``, or a ``quant_storage`` that no bytes can be kept under.
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
        validate.storage_dtype("Params4bit", quant_storage)
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
            quant_type=state.quant_type or "",
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

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """As :meth:`torch.Tensor.to`, but the first move to a device quantizes, in place.

        The meta device and a change of dtype alone do not quantize. Of a quantized weight, ``dtype`` is the one that
        dequantizing gives: the codes stay as they are.
        """
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, non_blocking = parsed[:3]
        if self.bnb_quantized:
            return self._moved(device, dtype, non_blocking)
        if device is not None and device.type != "meta":
            self.quantize(device)
            return self if dtype is None else self._moved(None, dtype, False)
        return self._with_data(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))

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
        moved = self._with_data(data)
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
        if isinstance(other, Params4bit):
            moved = other
        else:  # torch.empty_like and the like give plain tensors
            moved = self._with_data(other)
            if moved.quant_state is not None:
                moved.quant_state = copied_state(moved.quant_state, other.device, empty=self.is_meta)
        if torch._has_compatible_shallow_copy_type(self, moved):
            module = self.module
            self.requires_grad = moved.requires_grad
            self.data = moved.data
            self.__dict__.update(moved.__dict__)
            self.module = module
            moved = self
        moved._tell_module()
        return moved

    def _tell_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
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
    """Check that ``state`` describes a 4-bit tensor, and that ``packed`` has its bytes.

    Raises
    ------
    FormatError
        It does not, or has not.
    """
    if state.quant_type is None or state.shape is None:
        raise FormatError(f"{where}: its quant_state describes no 4-bit tensor: it has no quant_type or no shape")
    have, need = packed.numel() * packed.element_size(), (prod(state.shape) + 1) // 2
    if have != need:
        raise FormatError(f"{where}: weight has {have} bytes, shape {tuple(state.shape)} in 4 bits needs {need}")
