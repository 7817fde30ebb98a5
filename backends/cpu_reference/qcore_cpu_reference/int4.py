"""4-bit integers in groups: docs/spec/70-int4.md."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcore_cpu_reference.blockwise import U8
from qcore_cpu_reference.floats import F32


def dequantize(
    packed: U8, scales: F32, zeros: U8 | None, perm: NDArray[np.int32] | None, group_size: int, k: int
) -> F32:
    """QC-INT4-001 to QC-INT4-003: the weight ``(N, K)`` in the order of X, before a last rounding."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int16)
    codes[:, 0::2] = packed >> 4
    codes[:, 1::2] = packed & 15
    group = np.arange(k) // group_size
    zero = np.int16(8) if zeros is None else zeros.astype(np.int16)[:, group]
    with np.errstate(all="ignore"):
        values = (codes[:, :k] - zero).astype(np.float32) * scales[:, group]
    if perm is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, perm] = values
    return ordered
