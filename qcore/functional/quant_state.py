"""What is needed to read a quantized tensor back, in bitsandbytes' form: as an object and as a state dict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from qcore import codebooks
from qcore.backend.interface import Weight4bit
from qcore.errors import FormatError, InvalidArgument
from qcore.ops import validate
from qcore.ops.validate import BLOCKSIZES, FLOATS, QUANT_TYPES

_TABLES = {"nf4": codebooks.NF4, "fp4": codebooks.FP4}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> Tensor:
    """``source_dict`` as the bytes of its JSON text, byte for byte what bitsandbytes writes.

    Parameters
    ----------
    source_dict : mapping
        What JSON can hold.

    Returns
    -------
    Tensor
        uint8 ``(bytes,)`` on the CPU.

    Raises
    ------
    InvalidArgument
        It holds something that JSON cannot.
    """
    try:
        text = json.dumps(source_dict)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"pack_dict_to_tensor: source_dict is not what JSON can hold: {error}") from error
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The inverse of :func:`pack_dict_to_tensor`.

    Parameters
    ----------
    tensor_data : Tensor
        uint8, any shape and device.

    Raises
    ------
    FormatError
        Its bytes are no JSON object.
    """
    try:
        if tensor_data.dtype != torch.uint8:
            raise ValueError(f"it is {tensor_data.dtype}, not uint8")
        unpacked = json.loads(bytes(tensor_data.detach().cpu().flatten().tolist()).decode("utf-8"))
        if not isinstance(unpacked, dict):
            raise ValueError(f"it holds a {type(unpacked).__name__}")
    except ValueError as error:
        raise FormatError(f"quant_state: not the JSON object that it should be: {error}") from error
    return unpacked


class QuantState:
    """The scales, codebook, shape and dtype of a quantized tensor.

    Parameters
    ----------
    absmax : Tensor
        float32 ``(blocks,)``; with ``state2`` the uint8 codes that decode to it.
    shape : torch.Size, optional
        Of the tensor before quantization; None for blockwise 8-bit.
    code : Tensor, optional
        float32 ``(16,)`` or ``(256,)``.
    blocksize : int, optional
    quant_type : {"nf4", "fp4"}, optional
        None for blockwise 8-bit.
    dtype : torch.dtype, optional
        Of the tensor before quantization, and of what dequantization gives.
    offset : Tensor, optional
        0-dim float32: the mean that nested quantization took off ``absmax`` (QC-NEST-001).
    state2 : QuantState, optional
        How ``absmax`` itself was quantized.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = ("bitsandbytes__fp4", "bitsandbytes__nf4")
    valid_qs_keys = (
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    )

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        # torch's FSDP looks a state dict's dotted names up as attributes, "quant_state.bitsandbytes__nf4" among them.
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if "quant_state." + name in packed:
                return packed["quant_state." + name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: int | slice) -> Any:
        """The old list form: absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        mine = (self.shape, self.dtype, self.blocksize, self.quant_type, self.state2)
        theirs = (other.shape, other.dtype, other.blocksize, other.quant_type, other.state2)
        tensors = ((self.absmax, other.absmax), (self.code, other.code), (self.offset, other.offset))
        return mine == theirs and all(_close(a, b) for a, b in tensors)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = self.quant_type or "8-bit"
        shape = None if self.shape is None else tuple(self.shape)
        nested = ", nested" if self.nested else ""
        return f"QuantState({kind}, shape={shape}, dtype={self.dtype}, blocksize={self.blocksize}{nested})"

    def to(self, device: torch.device | str | int) -> None:
        """Move every tensor to ``device``, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        if self.state2 is not None:
            self.offset = None if self.offset is None else self.offset.to(device)
            self.state2.to(device)

    def weight(self, packed: Tensor) -> Weight4bit:
        """The 4-bit tensor whose bytes are ``packed``, for ``qcore.ops``.

        Parameters
        ----------
        packed : Tensor
            The packed codes: any shape, any dtype (``quant_storage``), the same bytes.

        Raises
        ------
        InvalidArgument
            This state does not describe a 4-bit tensor. Lengths are checked by the op that takes the weight.
        """
        if self.quant_type not in QUANT_TYPES or self.blocksize is None or self.shape is None:
            raise InvalidArgument(
                f"QuantState.weight: quant_type is {self.quant_type!r}, blocksize {self.blocksize}, shape "
                f"{self.shape}; only a state of quantize_4bit describes a 4-bit weight"
            )
        validate.tensor("QuantState.weight", "packed", packed)
        data = packed.detach().reshape(-1)
        data = data if data.dtype == torch.uint8 else data.view(torch.uint8)
        meta = (self.quant_type, self.blocksize, tuple(self.shape))
        if self.state2 is None:
            return Weight4bit(data, widened("absmax", self.absmax), *meta)
        state2 = self.state2
        if state2.code is None or state2.blocksize is None or self.offset is None:
            raise InvalidArgument("QuantState.weight: nested, but state2.code, state2.blocksize or offset is missing")
        return Weight4bit(
            data,
            self.absmax,
            *meta,
            nested_absmax=widened("state2.absmax", state2.absmax),
            nested_code=widened("state2.code", state2.code),
            nested_offset=widened("offset", self.offset).reshape(1),
            nested_blocksize=state2.blocksize,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a flat dictionary.

        Parameters
        ----------
        packed : bool
            Everything that is no tensor goes into one uint8 tensor, ``quant_state.bitsandbytes__<quant_type>``: the
            form of a state dict, byte for byte bitsandbytes'.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            state["nested_absmax"] = self.state2.absmax
            state["nested_blocksize"] = self.state2.blocksize
            # A clone: safetensors refuses tensors that share memory, and every layer has the same codebook.
            state["nested_quant_map"] = None if self.state2.code is None else self.state2.code.clone()
            state["nested_dtype"] = str(self.state2.dtype).removeprefix("torch.")
            state["nested_offset"] = None if self.offset is None else self.offset.item()
        if not packed or self.quant_type is None:
            return state
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        return {**tensors, f"quant_state.bitsandbytes__{self.quant_type}": pack_dict_to_tensor(rest)}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """The state that :meth:`as_dict` wrote, here or in bitsandbytes.

        Parameters
        ----------
        qs_dict : mapping
            Packed or not; keys may carry a prefix that ends in a dot. It is not changed.
        device : torch.device
            Where the tensors go.

        Raises
        ------
        FormatError
            A key is missing, unknown or doubled; the codebook is none that qcore can decode; lengths do not fit the
            shape and block sizes.
        """
        items = _unpacked(qs_dict)
        quant_type, blocksize = items["quant_type"], items["blocksize"]
        if quant_type not in (*QUANT_TYPES, None):
            raise FormatError(f"quant_state: quant_type is {quant_type!r}, needs 'nf4' or 'fp4'")
        if type(blocksize) is not int or blocksize not in BLOCKSIZES:
            raise FormatError(f"quant_state: blocksize is {blocksize!r}, needs a power of two from 32 to 4096")
        absmax = _tensor(items, "absmax")
        shape = items["shape"]
        if shape is not None:
            shape = _shape(shape)
            blocks = -(-prod(shape) // blocksize)
            if absmax.shape != (blocks,):
                raise FormatError(
                    f"quant_state: absmax has shape {tuple(absmax.shape)}, a tensor of shape {tuple(shape)} at "
                    f"blocksize {blocksize} needs ({blocks},); the file is truncated or was written after bitsandbytes "
                    "repacked the layer for its CPU kernel"
                )
        offset = state2 = None
        if "nested_absmax" in items:
            offset, state2 = cls._nested(items, absmax, device)
        elif absmax.dtype not in FLOATS:
            raise FormatError(f"quant_state: absmax is {absmax.dtype}, needs float32 unless it is nested")
        return cls(
            absmax=(absmax if state2 else absmax.float()).to(device),
            shape=shape,
            code=_codebook(items, "quant_map", quant_type).to(device),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=_dtype(items, "dtype"),
            offset=offset,
            state2=state2,
        )

    @classmethod
    def _nested(cls, items: Mapping[str, Any], absmax: Tensor, device: torch.device | str) -> tuple[Tensor, QuantState]:
        missing = [key for key in ("blocksize", "dtype", "offset", "quant_map") if f"nested_{key}" not in items]
        if missing:
            raise FormatError(f"quant_state: nested_absmax without {', '.join(f'nested_{key}' for key in missing)}")
        nested_absmax, blocksize = _tensor(items, "nested_absmax"), items["nested_blocksize"]
        if type(blocksize) is not int or blocksize not in BLOCKSIZES:
            raise FormatError(f"quant_state: nested_blocksize is {blocksize!r}, needs a power of two from 32 to 4096")
        if absmax.dtype != torch.uint8:
            raise FormatError(f"quant_state: absmax is {absmax.dtype}, nested absmax needs uint8 codes")
        if nested_absmax.shape != (-(-absmax.numel() // blocksize),):
            raise FormatError(
                f"quant_state: nested_absmax has shape {tuple(nested_absmax.shape)}, {absmax.numel()} values at "
                f"nested_blocksize {blocksize} need ({-(-absmax.numel() // blocksize)},)"
            )
        try:
            offset = torch.tensor(float(items["nested_offset"]), dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FormatError(f"quant_state: nested_offset is {items['nested_offset']!r}, needs a number") from error
        if not math.isfinite(float(offset)):
            raise FormatError(f"quant_state: nested_offset is {items['nested_offset']!r}, needs a finite float32")
        state2 = cls(
            absmax=nested_absmax.float().to(device),
            code=_codebook(items, "nested_quant_map", None).to(device),
            blocksize=blocksize,
            dtype=_dtype(items, "nested_dtype"),
        )
        return offset.to(device), state2


def widened(name: str, value: Tensor) -> Tensor:
    """``value`` in float32, which holds every 16-bit float; a dtype that would be rounded or reinterpreted is refused.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``value`` is no tensor of float32, float16 or bfloat16.
    """
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value
    validate.floats("quant_state", name, value)
    return value.float()


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.allclose(a, b, atol=1e-6) if a.is_floating_point() else torch.equal(a, b)


def _unpacked(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    """All items, the packed ones included, under their last name; only known ones, each once, none missing."""
    packed = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, Tensor)]
    if len(packed) > 1 or (packed and packed[0].split(".")[-1] not in QuantState.valid_qs_type_keys):
        expected = " or ".join(f"quant_state.{key}" for key in QuantState.valid_qs_type_keys)
        raise FormatError(f"quant_state: found {packed}, needs one item, {expected}")
    items: dict[str, Any] = {}
    pairs = [(key.split(".")[-1], value) for key, value in qs_dict.items() if key not in packed]
    pairs += list(unpack_tensor_to_dict(qs_dict[packed[0]]).items()) if packed else []
    for key, value in pairs:
        if key not in QuantState.valid_qs_keys:
            raise FormatError(f"quant_state: unknown item {key!r}")
        if key in items:
            raise FormatError(f"quant_state: item {key!r} appears twice")
        items[key] = value
    missing = [key for key in ("quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape") if key not in items]
    if missing:
        raise FormatError(f"quant_state: {', '.join(missing)} missing; the checkpoint is incomplete")
    return items


def _tensor(items: Mapping[str, Any], key: str) -> Tensor:
    value = items[key]
    if not isinstance(value, Tensor):
        raise FormatError(f"quant_state: {key} is a {type(value).__name__}, needs a tensor")
    return value


def _shape(value: Any) -> torch.Size:
    if not isinstance(value, list | tuple) or not all(isinstance(size, int) and size >= 0 for size in value):
        raise FormatError(f"quant_state: shape is {value!r}, needs a list of sizes")
    return torch.Size(value)


def _dtype(items: Mapping[str, Any], key: str) -> torch.dtype:
    try:
        return _DTYPES[items[key]]
    except (KeyError, TypeError):
        raise FormatError(f"quant_state: {key} is {items[key]!r}, needs one of {', '.join(sorted(_DTYPES))}") from None


def _codebook(items: Mapping[str, Any], key: str, quant_type: str | None) -> Tensor:
    """The codebook as stored, so that saving gives the same bytes; one that qcore would decode otherwise is refused."""
    code = _tensor(items, key)
    if code.dtype not in FLOATS:
        raise FormatError(f"quant_state: {key} is {code.dtype}, needs float32")
    code = widened(key, code)
    if code.is_meta:
        return code
    if quant_type is None:
        if code.shape != (256,) or not bool(torch.isfinite(code).all()):
            raise FormatError(f"quant_state: {key} has shape {tuple(code.shape)}, needs 256 finite values")
        return code
    table = torch.tensor(_TABLES[quant_type], dtype=torch.float32, device=code.device)
    if code.shape != table.shape or not torch.allclose(code, table, rtol=0.0, atol=1e-6):
        raise FormatError(f"quant_state: {key} is not the {quant_type} codebook; qcore decodes no other one")
    return code
