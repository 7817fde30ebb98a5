"""A torch tensor over memory that somebody else allocated, on any device, without a copy.

By DLPack, made by hand: it names the device itself, where ``__cuda_array_interface__`` leaves torch to ask the runtime
whose the address is; it has every dtype; and it is the same code for a CPU tensor as for one of CUDA or ROCm. Whoever
lent the memory is told when torch's storage, and so the last tensor over it, is gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qcore.errors import InvalidDtype

_CPU, _CUDA, _ROCM = 1, 2, 10  # DLDeviceType
_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4  # DLDataTypeCode
# Of tensors over lent memory.
DTYPES = {
    torch.uint8: _UINT,
    **dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64), _INT),
    **dict.fromkeys((torch.float16, torch.float32, torch.float64), _FLOAT),
    torch.bfloat16: _BFLOAT,
}
_NAME = b"dltensor"


class _DLTensor(ctypes.Structure):
    """``DLDevice`` and ``DLDataType`` stand in it field by field."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: row-major
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))


# Address of a struct that torch has -> the struct, its shape, and what to call at the end.
_lent: dict[int, tuple[_DLManagedTensor, Any, Callable[[], None]]] = {}


def _make_deleter(lent: dict[int, tuple[_DLManagedTensor, Any, Callable[[], None]]]) -> Any:
    def delete(address: int) -> None:
        _, _, release = lent.pop(address)
        release()

    deleter = _Deleter(delete)
    # Tensors may outlive this module when the interpreter ends; the code that torch calls then has to be there.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(deleter))
    return deleter


_deleter = _make_deleter(_lent)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_at(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, release: Callable[[], None]
) -> Tensor:
    """A contiguous tensor over memory at ``address``.

    Parameters
    ----------
    address : int
        Of the first element, on ``device``.
    shape : tuple of int
    dtype : torch.dtype
        uint8, a signed integer, float16, float32, float64 or bfloat16.
    device : torch.device
        Of type cpu or cuda (ROCm builds' too), with an index.
    release : callable
        Gives the memory back. Called once, when torch drops the storage, in whatever thread does; also if no tensor
        could be made. What it raises is printed as an unraisable exception.

    Returns
    -------
    Tensor

    Raises
    ------
    InvalidDtype
        Another dtype.
    """
    place = None
    try:
        managed, sizes = _describe(address, shape, dtype, device)
        _lent[ctypes.addressof(managed)] = (managed, sizes, release)
        place = ctypes.addressof(managed)
        tensor: Tensor = from_dlpack(_new_capsule(place, _NAME, None))
    except BaseException:
        if place is None or _lent.pop(place, None) is not None:  # torch has not called the deleter
            release()
        raise
    return tensor


def _describe(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[_DLManagedTensor, Any]:
    """The struct and the sizes that it points to."""
    if dtype not in DTYPES:
        raise InvalidDtype(f"paged memory: dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    kind = _CPU if device.type == "cpu" else _ROCM if torch.version.hip else _CUDA
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    managed = _DLManagedTensor(
        _DLTensor(
            address, kind, device.index or 0, len(shape), DTYPES[dtype], 8 * dtype.itemsize, 1,
            ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)), None, 0,
        ),
        None,
        _deleter,
    )  # fmt: skip
    return managed, sizes
