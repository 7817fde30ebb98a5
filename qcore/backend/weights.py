"""What a quantized weight is to a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weight4bit:
    """A 4-bit tensor as its parts (QC-4BIT-002, QC-NEST-003); validated by the frontend.

    ``packed`` uint8 ``(ceil(numel/2),)``; ``absmax`` float32 ``(blocks,)``, or uint8 when nested; ``nested_absmax``
    float32 ``(ceil(blocks/nested_blocksize),)``; ``nested_code`` float32 ``(256,)``; ``nested_offset`` float32, one
    value.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str  # "nf4" | "fp4"
    blocksize: int
    shape: tuple[int, ...]
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 0


@dataclass(frozen=True, eq=False)
class WeightInt4:
    """4-bit integers in groups along K (QC-INT4-001); validated by the frontend.

    ``packed`` uint8 ``(N, ceil(K/2))``; ``scales`` float32, float16 or bfloat16 ``(N, G)``, G = ceil(K / group_size);
    ``zeros`` uint8 ``(N, G)``, or None where every zero point is 8; ``perm`` int32 ``(K,)``: column j of ``packed`` is
    column ``perm[j]`` of the weight.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    shape: tuple[int, int]  # (N, K)
    perm: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Weight8bit:
    """An int8 weight: ``codes`` int8 ``(N, K)``, ``scales`` float32 ``(N,)``, the largest magnitudes of its rows."""

    codes: Tensor
    scales: Tensor
