"""``bitsandbytes.utils``: packing of quantization states, and waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.functional import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = ["pack_dict_to_tensor", "sync_gpu", "unpack_tensor_to_dict"]


def sync_gpu(t: Tensor) -> None:
    """Wait until all work on the device of ``t`` is done; returns at once for the CPU."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
