"""NF4, FP4 and the W4A16 product: docs/spec/20-4bit.md and 40-gemm-4bit.md."""

from __future__ import annotations

import numpy as np

from qcore.codebooks import FP4, FP4_ORDER, FP4_THRESHOLDS, NF4
from qcore_cpu_reference.blockwise import U8, block_absmax, midpoints, scale
from qcore_cpu_reference.floats import F32

TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}
_FP4_THRESHOLDS = np.array(FP4_THRESHOLDS, np.float32)
_FP4_ORDER = np.array(FP4_ORDER, np.uint8)


def _nf4_codes(y: F32) -> U8:
    """QC-NF4-002."""
    codes = np.zeros(y.size, np.uint8)
    for midpoint in midpoints(TABLES["nf4"]):
        codes += y > midpoint
    return codes


def _fp4_codes(y: F32) -> U8:
    """QC-FP4-002."""
    magnitude = np.abs(y)
    position = np.zeros(y.size, np.uint8)
    for threshold in _FP4_THRESHOLDS:
        position += magnitude > threshold
    return _FP4_ORDER[position] + np.where(y < 0, np.uint8(8), np.uint8(0))


_CODES = {"nf4": _nf4_codes, "fp4": _fp4_codes}


def quantize_4bit(x: F32, quant_type: str, blocksize: int) -> tuple[U8, F32]:
    """QC-4BIT-001 and QC-4BIT-002: packed codes and absmax."""
    absmax = block_absmax(x, blocksize)
    y = scale(x, absmax, blocksize)
    if y.size % 2:
        y = np.append(y, np.float32(0))  # the last low nibble holds the code of 0
    codes = _CODES[quant_type](y)
    return (codes[0::2] << 4) | codes[1::2], absmax


def unpack(packed: U8, numel: int) -> U8:
    """QC-4BIT-002: one code a byte, in order."""
    codes = np.empty(packed.size * 2, np.uint8)
    codes[0::2] = packed >> 4
    codes[1::2] = packed & 15
    return codes[:numel]


def dequantize_4bit(packed: U8, absmax: F32, quant_type: str, blocksize: int, numel: int) -> F32:
    """QC-4BIT-003, before the last rounding."""
    values = TABLES[quant_type][unpack(packed, numel)]
    with np.errstate(all="ignore"):
        return values * np.repeat(absmax, blocksize)[:numel]


def gemm_4bit(x: F32, weight: F32, bias: F32 | None) -> F32:
    """QC-GEMM4-002 and QC-GEMM4-003 before the last rounding: the sum in float64, rounded once to float32."""
    with np.errstate(all="ignore"):
        y = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)
        return y if bias is None else y + bias


def gemm_4bit_transposed(x: F32, weight: F32) -> F32:
    """QC-GEMM4-009 before the last rounding: the sum in float64, rounded once to float32."""
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
