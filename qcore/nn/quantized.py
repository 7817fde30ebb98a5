"""What layers with a quantized weight share: moving, saving and loading the weight together with what it means.

Saving writes what the weight is, never what a forward pass left behind. Loading reads and checks every entry before it
changes anything; a weight of numbers goes into a quantized layer quantized.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcore.errors import FormatError, InvalidArgument
from qcore.functional import QuantState
from qcore.nn.int4_params import Int4Params
from qcore.nn.int8_params import Int8Params
from qcore.nn.params import Params4bit, check_packed, copied_state

Self = TypeVar("Self", bound="QuantizedModule")

# The number that stands for each layout of int8 weights in a state dict; only rows have been written since 2023.
_INT8_LAYOUTS = {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}


class QuantizedModule(nn.Module):
    """A layer whose parameter ``weight`` is a :class:`Params4bit`, :class:`Int8Params` or :class:`Int4Params`."""

    weight: Any

    def quantize(self: Self, device: str | torch.device | None = None) -> Self:
        """Quantize the weight now, and move the whole layer to ``device`` if one is given; returns the layer."""
        if not isinstance(self.weight, (Params4bit, Int8Params)):
            raise InvalidArgument(f"{type(self).__name__}.quantize: weight is a {type(self.weight).__name__}")
        self.weight.quantize(device)
        return self if device is None else self.to(device)

    def _changed(self) -> None:
        """The weight is another one: forget what was prepared from it."""

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self._parameters["weight"]
        if not isinstance(weight, (Params4bit, Int8Params, Int4Params)):  # FSDP keeps views of its own here
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._changed()
            return self
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        with torch.no_grad():
            gradient = weight.grad
            self._parameters["weight"] = weight = weight.adopt(fn(weight))
            if gradient is not None and not weight.is_coded:
                weight.grad = fn(gradient)
        self._changed()
        return self

    def _entries(self) -> dict[str, Tensor]:
        """What is saved beside ``weight``, by name; empty while the weight is not quantized."""
        raise NotImplementedError

    def _read(self, entries: dict[str, Any], prefix: str) -> tuple[Tensor, Any] | None:
        """Take this weight's entries out of ``entries``; returns data and meaning, or None if there is no weight."""
        raise NotImplementedError

    def _shape_of(self, data: Tensor, meaning: Any) -> tuple[int, ...]:
        """Shape of the weight that ``data`` stands for."""
        raise NotImplementedError

    def _take(self, data: Tensor, meaning: Any, *, assign: bool) -> None:
        """Hold ``data``; everything has been checked."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self._entries().items():
            destination[prefix + key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        entries = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        rest = dict(entries)
        found = self._read(rest, prefix)
        known = {prefix + key for key in entries.keys() - rest.keys()}
        known_errors, extra = len(error_msgs), len(unexpected_keys)
        weight = self._parameters["weight"]
        self._parameters["weight"] = None
        try:
            arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            super()._load_from_state_dict(state_dict, prefix, *arguments)
        finally:
            self._parameters["weight"] = weight
        unexpected_keys[extra:] = [key for key in unexpected_keys[extra:] if key not in known]
        if found is None:
            if strict:
                missing_keys.append(prefix + "weight")
            return
        data, meaning = found
        saved, shape = self._shape_of(data, meaning), self._weight_shape()
        if saved != shape:
            error_msgs.append(
                f"size mismatch for {prefix}weight: the checkpoint has shape {saved}, this layer has {shape}."
            )
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if weight is not None and weight.is_meta and not assign and not data.is_meta:
            warnings.warn(
                f"for {prefix}weight: this layer is on the meta device, where nothing can be copied to; "
                "pass assign=True to load_state_dict, or call .to_empty(device=...) first",
                stacklevel=2,
            )
        elif len(error_msgs) == known_errors:
            with torch.no_grad():
                self._take(data, meaning, assign=assign)
            self._changed()


class Quantized4bit(QuantizedModule):
    """A layer whose weight is a :class:`Params4bit`; ``quant_state`` keeps its state for wrappers that lose it."""

    quant_state: QuantState | None

    def _find_state(self) -> QuantState | None:
        weight = self.weight
        if not isinstance(weight, Params4bit):
            return self.quant_state
        return (weight.quant_state or self.quant_state) if weight.bnb_quantized else None

    def _state(self) -> QuantState:
        state = self._find_state()
        if state is None:
            raise InvalidArgument(
                f"{type(self).__name__}: the weight is not quantized yet; move the layer to a device with "
                ".to(device), 'cpu' included, or call .quantize()"
            )
        return state

    def _entries(self) -> dict[str, Tensor]:
        state = self._find_state()
        if state is None:
            return {}
        if state.offset is not None and state.offset.is_meta:
            # A state dict holds the offset as a number; on the meta device it is as undefined as all the rest.
            state = copy.copy(state)
            state.offset = torch.zeros(())
        return {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}

    def _read(self, entries: dict[str, Any], prefix: str) -> tuple[Tensor, Any] | None:
        parts = {key: entries.pop(f"weight.{key}") for key in _parts_of(entries)}
        data = entries.pop("weight", None)
        if data is None:
            if parts:
                raise FormatError(f"{prefix}weight is missing, but {prefix}weight.{next(iter(parts))} is there")
            return None
        if not parts:
            if not data.is_floating_point():
                raise FormatError(
                    f"{prefix}weight is {data.dtype} without {prefix}weight.absmax, .quant_map and .quant_state: "
                    "the checkpoint is incomplete, or not in 4 bits"
                )
            return data.detach(), None
        try:
            state = QuantState.from_dict(parts, device=data.device)
        except FormatError as error:
            raise FormatError(f"{prefix}weight: {error}") from error
        check_packed(f"{prefix}weight", data, state)
        return data.detach(), state

    def _shape_of(self, data: Tensor, meaning: Any) -> tuple[int, ...]:
        return tuple(data.shape if meaning is None else meaning.shape)

    def _take(self, data: Tensor, meaning: QuantState | None, *, assign: bool) -> None:
        weight = self.weight
        known = weight.__dict__ if isinstance(weight, Params4bit) else {"module": self}
        quantized = self._find_state() is not None
        if meaning is None and not quantized and not assign:
            weight.copy_(data)
            return
        device = data.device if assign else weight.device
        if meaning is None:
            changed: dict[str, Any] = {"quant_state": None, "bnb_quantized": False}
            requires_grad = weight.requires_grad and not quantized
        else:
            changed = {
                "quant_state": copied_state(meaning, device, clone=not assign),
                "blocksize": meaning.blocksize,
                "compress_statistics": meaning.nested,
                "quant_type": meaning.quant_type,
                "quant_storage": data.dtype,
                "bnb_quantized": True,
            }
            requires_grad = False
        data = data if assign else data.to(device, copy=True)
        loaded = Params4bit(data, requires_grad=requires_grad, **{**known, **changed})
        if meaning is None and quantized and not data.is_meta:
            loaded.quantize()
        self.weight = loaded if assign or not isinstance(weight, Params4bit) else weight.adopt(loaded)
        self.quant_state = self.weight.quant_state


def _parts_of(entries: dict[str, Any]) -> list[str]:
    """Names below ``weight`` that say what 4-bit codes mean."""
    names = [key.removeprefix("weight.") for key in entries if key.startswith("weight.")]
    return [name for name in names if name.split(".")[0] == "quant_state" or name in QuantState.valid_qs_keys]


class Quantized8bit(QuantizedModule):
    """A layer whose weight is an :class:`Int8Params`."""

    def _scales(self) -> Tensor | None:
        """float32 row statistics of int8 codes; None while the weight holds numbers."""
        weight = self.weight
        return getattr(weight, "SCB", None) if weight.dtype == torch.int8 else None

    def _entries(self) -> dict[str, Tensor]:
        scales = self._scales()
        if scales is None:
            return {}
        return {"SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def _read(self, entries: dict[str, Any], prefix: str) -> tuple[Tensor, Any] | None:
        scales, layout = entries.pop("SCB", None), entries.pop("weight_format", None)
        data = entries.pop("weight", None)
        if data is None:
            if scales is not None:
                raise FormatError(f"{prefix}weight is missing, but {prefix}SCB is there")
            return None
        if isinstance(layout, Tensor) and layout.numel() != 1:
            raise FormatError(f"{prefix}weight_format has {layout.numel()} values, needs one number")
        layout = layout.item() if isinstance(layout, Tensor) else layout
        layout = _INT8_LAYOUTS.get(layout, layout) if isinstance(layout, int) else layout
        if layout not in (None, "row"):
            raise FormatError(
                f"{prefix}weight_format is {layout!r}, needs 'row' (0): load the file with the version that wrote it, "
                "and save it again from a version that writes rows"
            )
        if data.dtype == torch.int8 and data.shape == (prod(self._weight_shape()),):
            data = data.view(self._weight_shape())  # stored flat, so that no plain layer takes it
        if data.dtype != torch.int8:
            if scales is not None or not data.is_floating_point():
                raise FormatError(f"{prefix}weight is {data.dtype}, {prefix}SCB needs it to be int8 codes")
            return data.detach(), None
        if scales is None:
            raise FormatError(f"{prefix}weight holds int8 codes, but {prefix}SCB with their scales is missing")
        rows = data.shape[0] if data.dim() else 0
        if scales.dtype != torch.float32 or scales.numel() != rows:
            raise FormatError(
                f"{prefix}SCB has {scales.numel()} values of {scales.dtype}, "
                f"weight of shape {tuple(data.shape)} needs {rows} of torch.float32"
            )
        if isinstance(self.weight, Int8Params) and self.weight.has_fp16_weights:
            raise FormatError(
                f"{prefix}weight holds int8 codes, this layer keeps numbers; make it with has_fp16_weights=False"
            )
        return data.detach(), scales.detach().view(-1)

    def _shape_of(self, data: Tensor, meaning: Any) -> tuple[int, ...]:
        return tuple(data.shape)

    def _take(self, data: Tensor, meaning: Tensor | None, *, assign: bool) -> None:
        weight = self.weight
        quantized = weight.dtype == torch.int8
        if meaning is None and not quantized and not assign:
            weight.copy_(data)
            return
        known = weight.__dict__ if isinstance(weight, Int8Params) else {}
        device = data.device if assign else weight.device
        scales = meaning if assign or meaning is None else meaning.to(device, copy=True)
        data = data if assign else data.to(device, copy=True)
        loaded = Int8Params(data, requires_grad=weight.requires_grad, **{**known, "SCB": scales})
        if meaning is None and quantized and not data.is_meta:
            loaded.quantize()
        self.weight = loaded if assign or not isinstance(weight, Int8Params) else weight.adopt(loaded)
