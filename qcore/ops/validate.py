"""Checks of arguments, made before anything is allocated or written (QC-NUM-006).

Every message names the op, the argument, what was expected, what came and what to do. Checks of metadata (dtype, shape,
device) also run on fake tensors; checks of values run once a tensor and are remembered.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from qcore.errors import InvalidArgument, InvalidDtype

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})  # QC-NUM-002, QC-NUM-003
BLOCKSIZES = frozenset(2**power for power in range(5, 13))  # QC-NUM-005
QUANT_TYPES = ("nf4", "fp4")
MAX_INT8_K = 131_071  # QC-INT8-005

# A bool that is neither 0 nor 1 is undefined, and quantized tensors need scales to be viewed as bytes.
_NO_STORAGE = frozenset({torch.bool, torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})

# id(codebook) -> (the codebook, version and address at the time of the check, finite, sorted)
_codebooks: dict[int, tuple[weakref.ref[Tensor], int, int, bool, bool]] = {}


def tensor(op: str, name: str, value: Tensor) -> None:
    """``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise InvalidArgument(f"{op}: {name} is a {type(value).__name__}, needs a torch.Tensor")
    if value.layout is not torch.strided:
        raise InvalidArgument(f"{op}: {name} has layout {value.layout}, needs a dense tensor; call .to_dense()")


def floats(op: str, name: str, value: Tensor) -> None:
    """``value`` is a dense float32, float16 or bfloat16 tensor."""
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise InvalidDtype(f"{op}: {name} is {value.dtype}, needs float32, float16 or bfloat16; convert it with .to()")


def dtype(op: str, name: str, value: Tensor, needed: torch.dtype) -> None:
    """``value`` is a dense tensor of dtype ``needed``."""
    tensor(op, name, value)
    if value.dtype != needed:
        raise InvalidDtype(f"{op}: {name} is {value.dtype}, needs {needed}")


def float_dtype(op: str, value: torch.dtype, name: str = "dtype") -> None:
    """``value`` is a dtype that an op can write."""
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise InvalidDtype(f"{op}: {name} is {value!r}, needs torch.float32, float16 or bfloat16")


def storage_dtype(op: str, value: torch.dtype) -> None:
    """``value`` is a dtype of plain numbers, under which packed bytes can be kept."""
    if not isinstance(value, torch.dtype) or value in _NO_STORAGE or value.is_complex:
        raise InvalidDtype(f"{op}: quant_storage is {value!r}, needs a real dtype of torch such as torch.uint8")


def blocksize(op: str, value: int, name: str = "blocksize") -> None:
    """``value`` is a power of two from 32 to 4096."""
    if not isinstance(value, int) or value not in BLOCKSIZES:
        raise InvalidArgument(f"{op}: {name} is {value!r}, needs a power of two from 32 to 4096")


def quant_type(op: str, value: str) -> None:
    """``value`` names a 4-bit format."""
    if value not in QUANT_TYPES:
        raise InvalidArgument(f"{op}: quant_type is {value!r}, needs 'nf4' or 'fp4'")


def device(op: str, first: str, expected: torch.device, others: Iterable[tuple[str, Tensor | None]]) -> None:
    """Every tensor in ``others`` lives where ``first`` does."""
    for name, value in others:
        if value is not None and value.device != expected:
            raise InvalidArgument(
                f"{op}: {name} is on {value.device}, {first} on {expected}; move it with .to({str(expected)!r})"
            )


def length(op: str, name: str, value: Tensor, needed: int, why: str) -> None:
    """``value`` has ``needed`` elements, because of ``why``."""
    if value.numel() != needed:
        raise InvalidArgument(f"{op}: {name} has {value.numel()} values, {why} needs {needed}")


def bias(op: str, value: Tensor | None, n: int, out_dtype: torch.dtype) -> None:
    """``value`` is absent, or ``(n,)`` in the dtype of the output or float32 (QC-GEMM4-003, QC-INT8-006)."""
    if value is None:
        return
    tensor(op, "bias", value)
    if value.dtype not in (out_dtype, torch.float32):
        raise InvalidDtype(f"{op}: bias is {value.dtype}, needs {out_dtype} (the output's dtype) or torch.float32")
    if value.shape != (n,):
        raise InvalidArgument(f"{op}: bias has shape {tuple(value.shape)}, {n} output features need ({n},)")


def out(
    op: str, value: Tensor, shape: Iterable[int], needed: torch.dtype, where: torch.device, name: str = "out"
) -> None:
    """``value`` can take a result of this shape, dtype and device."""
    dtype(op, name, value, needed)
    if tuple(value.shape) != tuple(shape):
        raise InvalidArgument(f"{op}: {name} has shape {tuple(value.shape)}, the result has {tuple(shape)}")
    if value.device != where:
        raise InvalidArgument(f"{op}: {name} is on {value.device}, the inputs on {where}")
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        raise InvalidArgument(f"{op}: {name} is expanded, several elements share one address; pass a tensor of its own")


def threshold(op: str, value: float) -> None:
    """``value`` is a finite, non-negative float32 (QC-INT8-001)."""
    try:
        valid = math.isfinite(value) and 0.0 <= value <= torch.finfo(torch.float32).max
    except TypeError:
        valid = False
    if not valid:
        raise InvalidArgument(f"{op}: threshold is {value!r}, needs a finite float32 that is not negative; 0 for none")


def codebook(op: str, value: Tensor, name: str = "code") -> None:
    """``value`` is a float32 tensor of 256 values; what they are is for :func:`codebook_values`."""
    dtype(op, name, value, torch.float32)
    length(op, name, value, 256, "an 8-bit code")


def codebook_values(op: str, value: Tensor, name: str = "code", *, ascending: bool) -> None:
    """The values are finite and, if ``ascending``, sorted (QC-Q8-001). Read once a tensor, then remembered."""
    finite, ordered = _read_codebook(value)
    if not finite:
        raise InvalidArgument(f"{op}: {name} holds a NaN or an infinity, needs 256 finite values")
    if ascending and not ordered:
        raise InvalidArgument(f"{op}: {name} is not in ascending order; sort it, e.g. with code.sort().values")


def _read_codebook(code: Tensor) -> tuple[bool, bool]:
    key = id(code)
    known = _codebooks.get(key)
    # Inference tensors count no versions, so a change in place would go unseen: they are read every time.
    version = -1 if code.is_inference() else code._version
    if known and known[0]() is code and version >= 0 and known[1:3] == (version, code.data_ptr()):
        return known[3], known[4]
    flat = code.detach().reshape(-1)
    finite, ordered = bool(torch.isfinite(flat).all()), bool((flat[1:] >= flat[:-1]).all())
    forget = weakref.ref(code, lambda _: _codebooks.pop(key, None))
    _codebooks[key] = (forget, version, code.data_ptr(), finite, ordered)
    return finite, ordered


def overlaps(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors may share memory: outputs never overlap inputs (``qcore_backend.h``)."""
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def readable(value: Tensor) -> Tensor:
    """``value`` as contiguous memory that means what it says (no pending negation)."""
    return value.resolve_neg().contiguous()
