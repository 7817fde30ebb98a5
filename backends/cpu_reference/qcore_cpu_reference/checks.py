"""What the reference checks of every argument: dtype, alignment, extent, values; reading and writing are here too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcore.errors import InvalidArgument
from qcore_cpu_reference import fourbit
from qcore_cpu_reference.floats import F32, to_float32

MAX_INT8_K = 131_071  # QC-INT8-005
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def block_count(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def check_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise InvalidArgument(f"{op}: blocksize is {blocksize}, expected a power of two from 32 to 4096")


def check_quant_type(op: str, quant_type: str) -> None:
    if quant_type not in fourbit.TABLES:
        raise InvalidArgument(f"{op}: quant_type is {quant_type!r}, expected 'nf4' or 'fp4'")


def check_int8_depth(op: str, k: int) -> None:
    if k > MAX_INT8_K:
        raise InvalidArgument(f"{op}: K is {k}, int32 sums are exact up to {MAX_INT8_K}")


def check_threshold(op: str, threshold: float) -> None:
    if not 0 <= threshold < float("inf"):
        raise InvalidArgument(f"{op}: threshold is {threshold}, expected a finite value of at least 0")


def check_count(op: str, name: str, count: int, expected: int) -> None:
    if count != expected:
        raise InvalidArgument(f"{op}: {name} has {count} values, expected {expected}")


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise InvalidArgument(f"{op}: {name} is {tensor.dtype}, expected {expected}")


def check_layout(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{op}: {name} is not contiguous")
    if tensor.data_ptr() % tensor.element_size():
        raise InvalidArgument(f"{op}: {name} at {tensor.data_ptr():#x} is not aligned to {tensor.element_size()} bytes")


def matrix(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise InvalidArgument(f"{op}: {name} has {tensor.dim()} dimensions, expected 2")
    return tensor.shape[0], tensor.shape[1]


def float_values(op: str, name: str, tensor: Tensor, count: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> F32:
    check_dtype(op, name, tensor, dtypes)
    check_layout(op, name, tensor)
    check_count(op, name, tensor.numel(), count)
    return to_float32(tensor).reshape(-1)


def integer_values(op: str, name: str, tensor: Tensor, count: int, dtype: torch.dtype) -> np.ndarray:
    check_dtype(op, name, tensor, (dtype,))
    check_layout(op, name, tensor)
    check_count(op, name, tensor.numel(), count)
    return tensor.detach().cpu().numpy().reshape(-1)


def codebook(op: str, code: Tensor, *, ascending: bool) -> F32:
    table = float_values(op, "code", code, 256, (torch.float32,))
    if not np.isfinite(table).all():
        raise InvalidArgument(f"{op}: code holds values that are not finite")
    if ascending and (table[1:] < table[:-1]).any():
        raise InvalidArgument(f"{op}: code is not in ascending order")
    return table


def check_output(op: str, name: str, tensor: Tensor, count: int, *dtypes: torch.dtype) -> None:
    check_dtype(op, name, tensor, dtypes)
    check_layout(op, name, tensor)
    check_count(op, name, tensor.numel(), count)


def write(destination: Tensor, values: Tensor) -> None:
    destination.copy_(values.reshape(destination.shape))
