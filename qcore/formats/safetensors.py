"""Reading safetensors files by ranges, with nothing mapped and nothing trusted.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes without holes. The library's own reader maps
the file, so every page that was read counts as resident memory; here a tensor's rows are read into a buffer of their
own with ``preadv``, so that what a caller holds is what it asked for. The header is checked in full before any tensor
is read: lengths, dtypes, shapes, overlaps and holes.

Source: https://huggingface.co/docs/safetensors (format section).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore.errors import FormatError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# The library refuses longer headers; a longer one is a damaged length field.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``start`` is its first byte counted from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError(f"{path}: the header names a tensor twice")
    return result


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        dtype_name, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets in the header") from None
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        known = ", ".join(DTYPES)
        raise FormatError(f"{path}: tensor {name!r} has dtype {dtype_name!r}; known are {known}")
    ints = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not ints or type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise FormatError(f"{path}: tensor {name!r} has shape {shape} and data_offsets [{begin}, {end}]")
    dtype = DTYPES[dtype_name]
    need = math.prod(shape) * dtype.itemsize
    if end - begin != need:
        raise FormatError(
            f"{path}: tensor {name!r} of shape {tuple(shape)} and dtype {dtype_name} needs {need} bytes, "
            f"its data_offsets span {end - begin}"
        )
    return Entry(name, dtype, tuple(shape), base + begin, need)


class SafetensorsFile:
    """One open safetensors file.

    Parameters
    ----------
    path
        The file. It stays open until :meth:`close`.

    Raises
    ------
    FormatError
        The file is truncated, longer than its header says, or its header is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self.metadata, self.entries = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        path, status = self.path, os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path}: is not a file")
        size = status.st_size
        if size < 8:
            raise FormatError(f"{path}: {size} bytes is too short for a safetensors file; it is truncated")
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if length > MAX_HEADER or 8 + length > size:
            raise FormatError(
                f"{path}: the header says it is {length} bytes long, the file has {size}; "
                "it is truncated or not a safetensors file"
            )
        try:
            header = json.loads(os.pread(self._fd, length, 8), object_pairs_hook=lambda pairs: _unique(path, pairs))
        except FormatError:
            raise
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: the header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise FormatError(f"{path}: the header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        base = 8 + length
        entries = {name: _entry(path, name, value, base) for name, value in header.items()}
        end = base
        for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
            if entry.start != end:
                raise FormatError(f"{path}: tensor {entry.name!r} begins at byte {entry.start}, expected {end}")
            end = entry.start + entry.nbytes
        if end != size:
            what = "truncated" if end > size else "longer than its header says"
            raise FormatError(f"{path}: the tensors end at byte {end}, the file at {size}; it is {what}")
        return metadata, entries

    def read(self, name: str) -> Tensor:
        """Read a whole tensor into memory of its own."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        return self.read_rows(name, 0, rows).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read ``tensor[start:stop]`` (for a scalar, rows 0 to 1), shape ``(stop - start, *shape[1:])``."""
        entry = self.entries[name]
        row_shape = entry.shape[1:]
        out = torch.empty((stop - start, *row_shape), dtype=entry.dtype)
        row_bytes = math.prod(row_shape) * entry.dtype.itemsize
        read_exactly(self._fd, out, entry.start + start * row_bytes, f"{self.path}: tensor {name!r}")
        return out

    def close(self) -> None:
        """Close the file; reading from it afterwards is an error."""
        os.close(self._fd)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_exactly(fd: int, out: Tensor, offset: int, what: str) -> None:
    """Fill ``out`` from ``offset`` of the file; ``FormatError`` if it ends before, or cannot be read."""
    view, done = byte_view(out), 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise FormatError(f"{what}: reading failed: {error.strerror}") from error
        if count == 0:
            raise FormatError(f"{what}: the file ends {len(view) - done} bytes early; it changed while it was read")
        done += count
