"""The checkpoint layout of bitsandbytes: names, shapes and the text of a quantization state.

A 4-bit weight ``W.weight`` of n elements is uint8 ``(ceil(n / 2), 1)`` with, beside it, ``.absmax`` (float32, or uint8
when nested), ``.quant_map`` (float32, 16), nested also ``.nested_absmax`` (float32) and ``.nested_quant_map`` (float32,
256), and ``.quant_state.bitsandbytes__nf4`` or ``__fp4``: the UTF-8 text of a JSON object with the rest. An int8 weight
is ``W.weight`` int8, ``W.SCB`` float32 per row (the row's largest absolute value), ``W.weight_format`` uint8 0.

Read and checked against bitsandbytes 0.50.2 and Transformers 5.23.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from qcore import codebooks
from qcore.errors import FormatError
from qcore.formats.shard_writer import Spec

FORMATS = ("nf4", "fp4", "int8")
CODES = {"nf4": codebooks.NF4, "fp4": codebooks.FP4}
NESTED_BLOCKSIZE = 256
# The longest text that json.dumps makes of a finite double.
_LONGEST_FLOAT = "-2.2250738585072014e-308"

_ABSMAX, _QUANT_MAP = "absmax", "quant_map"
_NESTED_ABSMAX, _NESTED_QUANT_MAP = "nested_absmax", "nested_quant_map"


def state_key(weight: str, quant_type: str) -> str:
    """Name of the tensor with the JSON text of the quantization state of ``weight``."""
    return f"{weight}.quant_state.bitsandbytes__{quant_type}"


@dataclass(frozen=True)
class FourBitLayout:
    """Where the parts of one 4-bit weight go.

    Parameters
    ----------
    weight
        Name of the weight, as in ``model.layers.0.mlp.up_proj.weight``.
    shape, dtype
        Of the weight that it stands for; ``dtype`` is what dequantizing gives by default.
    """

    weight: str
    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested: bool

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    def part(self, suffix: str) -> str:
        return f"{self.weight}.{suffix}"

    @property
    def absmax(self) -> str:
        return self.part(_ABSMAX)

    @property
    def quant_map(self) -> str:
        return self.part(_QUANT_MAP)

    @property
    def nested_absmax(self) -> str:
        return self.part(_NESTED_ABSMAX)

    @property
    def nested_quant_map(self) -> str:
        return self.part(_NESTED_QUANT_MAP)

    @property
    def state(self) -> str:
        return state_key(self.weight, self.quant_type)

    def state_text(self, nested_offset: float | None) -> bytes:
        """The quantization state as bitsandbytes spells it: key order and separators are part of the format."""
        value: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested:
            value |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": nested_offset}
        return json.dumps(value).encode()

    def specs(self) -> list[Spec]:
        """Every tensor of this weight, with dtype and shape; the state's length is its longest."""
        specs = [
            Spec(self.weight, torch.uint8, (-(-self.numel // 2), 1)),
            Spec(self.absmax, torch.uint8 if self.nested else torch.float32, (self.blocks,)),
            Spec(self.quant_map, torch.float32, (16,)),
        ]
        longest = len(self.state_text(None if not self.nested else 0.0)) + len(_LONGEST_FLOAT)
        if self.nested:
            specs += [
                Spec(self.nested_absmax, torch.float32, (-(-self.blocks // NESTED_BLOCKSIZE),)),
                Spec(self.nested_quant_map, torch.float32, (256,)),
            ]
        return [*specs, Spec(self.state, torch.uint8, (longest,), late=True)]


def int8_specs(weight: str, shape: tuple[int, int]) -> list[Spec]:
    """The tensors of one int8 weight of ``shape``: codes, row statistics, format tag."""
    module = weight.removesuffix(".weight")
    return [
        Spec(weight, torch.int8, shape),
        Spec(f"{module}.SCB", torch.float32, (shape[0],)),
        Spec(f"{module}.weight_format", torch.uint8, ()),
    ]


def quantization_config(
    format: str, *, nested: bool, compute_dtype: torch.dtype, skip_modules: list[str], threshold: float = 6.0
) -> dict[str, Any]:
    """``config.json``'s ``quantization_config``, with the keys that Transformers writes."""
    four_bit = format != "int8"
    return {
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": format if four_bit else "fp4",
        "bnb_4bit_use_double_quant": nested if four_bit else False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_threshold": threshold,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": "bitsandbytes",
    }


@dataclass(frozen=True)
class CheckpointQuantization:
    """What a checkpoint's ``quantization_config`` says: how its linear layers are to be built."""

    format: str
    nested: bool
    compute_dtype: torch.dtype
    quant_storage: torch.dtype
    skip_modules: list[str] | None
    threshold: float


def _dtype(value: Any, what: str) -> torch.dtype:
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"quantization_config: {what} is {value!r}, which is no dtype")
    return dtype


def read_quantization(config: dict[str, Any]) -> CheckpointQuantization | None:
    """Read ``config["quantization_config"]``; ``None`` for a float checkpoint.

    Raises
    ------
    FormatError
        Another quantization method, or a 4-bit type that is neither nf4 nor fp4.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method")
    if method != "bitsandbytes":
        raise FormatError(f"quantization_config: quant_method is {method!r}; this reader knows 'bitsandbytes'")
    four_bit = bool(section.get("load_in_4bit", section.get("_load_in_4bit", False)))
    eight_bit = bool(section.get("load_in_8bit", section.get("_load_in_8bit", False)))
    if four_bit == eight_bit:
        raise FormatError("quantization_config: exactly one of load_in_4bit and load_in_8bit must be true")
    format = section.get("bnb_4bit_quant_type", "fp4") if four_bit else "int8"
    if format not in FORMATS:
        raise FormatError(f"quantization_config: bnb_4bit_quant_type is {format!r}, expected nf4 or fp4")
    return CheckpointQuantization(
        format,
        bool(section.get("bnb_4bit_use_double_quant", False)),
        _dtype(section.get("bnb_4bit_compute_dtype", "float32"), "bnb_4bit_compute_dtype"),
        _dtype(section.get("bnb_4bit_quant_storage", "uint8"), "bnb_4bit_quant_storage"),
        section.get("llm_int8_skip_modules"),
        float(section.get("llm_int8_threshold", 6.0)),
    )
