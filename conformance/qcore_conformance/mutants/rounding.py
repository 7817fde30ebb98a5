"""Mutants of what all ops share: reading inputs, rounding outputs (QC-NUM-001 to QC-NUM-003)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, Steps

WITH_FLOAT_OUTPUT = (
    "dequantize_blockwise",
    "dequantize_4bit",
    "gemm_4bit",
    "int8_dequantize_gemm",
    "int8_scaled_gemm",
    "int8_dequantize_rows",
)
QUANTIZERS = ("quantize_blockwise", "quantize_4bit", "int8_quantize_rows", "int8_quantize_cols")


def _bf16(bits: Tensor) -> Tensor:
    """The upper halves of int64 float32 patterns as bfloat16."""
    half = (bits >> 16) & 0xFFFF
    return torch.where(half >= 0x8000, half - 0x10000, half).to(torch.int16).view(torch.bfloat16)


def _pattern(values: Tensor) -> Tensor:
    return values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


@mutant("QC-NUM-003", *WITH_FLOAT_OUTPUT)
class BfloatTruncated(Steps):
    """A bfloat16 output drops the low half of the float32 instead of rounding to nearest even."""

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return _bf16(_pattern(values)) if dtype is torch.bfloat16 else values.to(dtype)


@mutant("QC-NUM-003", *WITH_FLOAT_OUTPUT)
class BfloatTiesAway(Steps):
    """A bfloat16 output rounds ties away from zero."""

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype is not torch.bfloat16:
            return values.to(dtype)
        return torch.where(values.isnan(), torch.nan, _bf16(_pattern(values) + 0x8000))


@mutant("QC-NUM-003", *WITH_FLOAT_OUTPUT)
class BfloatNanCarries(Steps):
    """Rounding to bfloat16 adds to the pattern of a NaN too, and one with a full payload turns into -0."""

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype is not torch.bfloat16:
            return values.to(dtype)
        bits = _pattern(values)
        return _bf16(bits + 0x7FFF + ((bits >> 16) & 1))


@mutant("QC-NUM-003", *WITH_FLOAT_OUTPUT)
class BfloatThroughHalf(Steps):
    """A bfloat16 output goes through float16 first: two roundings, and overflow at 65520."""

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(torch.float16).to(dtype) if dtype is torch.bfloat16 else values.to(dtype)


@mutant("QC-NUM-003", *WITH_FLOAT_OUTPUT)
class HalfSaturates(Steps):
    """A float16 output that overflows becomes 65504 instead of infinity."""

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        finite = values.isfinite()
        return (
            torch.where(finite, values.clamp(-65504, 65504), values).to(dtype)
            if dtype is torch.float16
            else values.to(dtype)
        )


@mutant("QC-NUM-003", *WITH_FLOAT_OUTPUT)
class HalfDenormalsFlushed(Steps):
    """A float16 output that is denormal becomes zero."""

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        result = values.to(dtype)
        return torch.where(result.abs() < 2.0**-14, result * 0, result) if dtype is torch.float16 else result


@mutant("QC-NUM-001", *WITH_FLOAT_OUTPUT)
class DenormalResultsFlushed(Steps):
    """A float32 result that is denormal becomes zero, as with flush-to-zero set."""

    def store(self, values: NDArray[Any], out: Tensor) -> None:
        if values.dtype == np.float32:
            values = np.where(np.abs(values) < 2.0**-126, np.copysign(np.float32(0), values), values)
        super().store(values, out)


@mutant("QC-NUM-001", *QUANTIZERS)
class DenormalInputsFlushed(Steps):
    """An input that is denormal in float32 counts as zero, as with denormals-are-zero set."""

    def load(self, tensor: Tensor) -> F32:
        x = super().load(tensor)
        return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


@mutant("QC-NUM-002", *QUANTIZERS, "gemm_4bit")
class HalfDenormalInputsFlushed(Steps):
    """A float16 input that is denormal counts as zero."""

    def load(self, tensor: Tensor) -> F32:
        x = super().load(tensor)
        return np.where(np.abs(x) < 2.0**-14, np.float32(0), x) if tensor.dtype is torch.float16 else x


@mutant("QC-NUM-002", *QUANTIZERS, "gemm_4bit")
class InputsThroughHalf(Steps):
    """Inputs are cast to float16 on the way in: 1e5 becomes infinity, and bfloat16 loses its range."""

    def load(self, tensor: Tensor) -> F32:
        return super().load(tensor.to(torch.float16) if tensor.dtype is torch.bfloat16 else tensor)
