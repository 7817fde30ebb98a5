"""Blockwise 8-bit quantization and nested absmax: docs/spec/10-blockwise-8bit.md and 30-nested.md."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcore_cpu_reference.floats import F32

U8 = NDArray[np.uint8]

_ONE = np.float32(1)
_HALF = np.float32(0.5)


def block_absmax(x: F32, blocksize: int) -> F32:
    """QC-Q8-002: the largest magnitude of each block, NaN left out."""
    blocks = -(-x.size // blocksize)
    absmax = np.zeros(blocks, np.float32)
    magnitude = np.abs(x)
    for b in range(blocks):
        block = magnitude[b * blocksize : (b + 1) * blocksize]
        absmax[b] = np.max(block, initial=np.float32(0), where=~np.isnan(block))
    return absmax


def scale(x: F32, absmax: F32, blocksize: int) -> F32:
    """QC-Q8-003: each element times the reciprocal of its block's absmax; NaN and all-zero blocks become 0."""
    with np.errstate(all="ignore"):
        reciprocal = _ONE / absmax
        y = x * np.repeat(reciprocal, blocksize)[: x.size]
    zero = np.isnan(y) | np.repeat(absmax == 0, blocksize)[: x.size]
    return np.where(zero, np.float32(0), y)


def midpoints(code: F32) -> F32:
    """QC-Q8-004: the fp32 midpoints of neighbouring codes."""
    with np.errstate(over="ignore"):
        return (code[:-1] + code[1:]) * _HALF


def quantize_blockwise(x: F32, code: F32, blocksize: int) -> tuple[U8, F32]:
    """QC-Q8-001 to QC-Q8-004: codes and absmax."""
    absmax = block_absmax(x, blocksize)
    return nearest_codes(scale(x, absmax, blocksize), code), absmax


def nearest_codes(y: F32, code: F32) -> U8:
    """QC-Q8-004: count the midpoints below each value; a tie counts at odd j between unequal codes."""
    result = np.zeros(y.size, np.uint8)
    for j, midpoint in enumerate(midpoints(code)):
        tie_goes_up = j % 2 == 1 and code[j] < code[j + 1]
        result += (y >= midpoint) if tie_goes_up else (y > midpoint)
    return result


def dequantize_blockwise(codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
    """QC-Q8-005."""
    with np.errstate(all="ignore"):
        return code[codes] * np.repeat(absmax, blocksize)[: codes.size]


def mean_offset(absmax: F32) -> np.float32:
    """QC-NEST-001: the mean, summed in float64 over 256 lanes in a fixed order."""
    if absmax.size == 0:
        return np.float32(0)
    lanes = np.zeros(256, np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, absmax.size, 256):
            row = absmax[start : start + 256].astype(np.float64)
            lanes[: row.size] += row
        total = lanes[0]
        for lane in lanes[1:]:
            total = total + lane
        return np.float32(total / np.float64(absmax.size))


def quantize_absmax(absmax: F32, code: F32, blocksize: int) -> tuple[U8, F32, np.float32]:
    """QC-NEST-001 and QC-NEST-002: codes, nested absmax and offset."""
    offset = mean_offset(absmax)
    with np.errstate(all="ignore"):
        difference = absmax - offset
    codes, nested_absmax = quantize_blockwise(difference, code, blocksize)
    return codes, nested_absmax, offset


def dequantize_absmax(codes: U8, nested_absmax: F32, code: F32, offset: np.float32, blocksize: int) -> F32:
    """QC-NEST-003: two roundings."""
    product = dequantize_blockwise(codes, nested_absmax, code, blocksize)
    with np.errstate(all="ignore"):
        return product + offset
