"""float16 and bfloat16 as NumPy sees them (QC-NUM-002, QC-NUM-003)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def to_float32(tensor: torch.Tensor) -> F32:
    """The values of a float tensor on any device, exactly, as float32."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)
    return tensor.numpy().astype(np.float32)


def from_float32(values: F32, dtype: torch.dtype) -> torch.Tensor:
    """``values`` rounded once to ``dtype``, to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == torch.bfloat16:
        bits = values.view(np.uint32)
        # Adding 0x7fff plus the lowest kept bit carries into the kept half exactly when nearest-even rounds up.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        half = np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
        return torch.from_numpy(half.view(np.int16)).view(torch.bfloat16)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.astype(np.float16))
    return torch.from_numpy(values.copy())
