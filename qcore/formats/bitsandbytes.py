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
from qcore.formats.shard_writer import Spec

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
