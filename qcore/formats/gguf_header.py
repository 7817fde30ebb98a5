"""The header of a GGUF file: scalars and the table of tensors, read without mapping the file.

The ``gguf`` package builds an array object for every string of the vocabulary, seconds and hundreds of megabytes for a
large one; a quantizer needs the scalars and the tensors' places only, so arrays are stepped over.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qcore.errors import FormatError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` in row-major order, ``type_name`` as ggml calls it, ``start`` from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """``fields`` holds the scalars and strings; of an array it holds the length."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise self.damaged(f"a field of {count} bytes reaches past the end of the file; it is truncated")
        return self._file.read(count)

    def skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise self.damaged(f"a field of {count} bytes reaches past the end of the file; it is truncated")
        self._file.seek(count, 1)

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name is not UTF-8 ({error})") from error

    def value(self, kind: int) -> Any:
        """Read a value; of an array return the length."""
        if kind == _STRING:
            return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise self.damaged(f"value type {kind} is unknown")
            return self.scalar(_SCALARS[kind])
        inner, length = self.scalar("<I"), self.scalar("<Q")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(length):
                self.skip(self.scalar("<Q"))
        else:
            raise self.damaged(f"an array of value type {inner} is not supported")
        return length

    def damaged(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {what}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of ``path``.

    Raises
    ------
    FormatError
        Not a GGUF file of version 2 or 3 in little-endian order, truncated, or inconsistent.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: Path, file: BinaryIO, size: int) -> GgufHeader:
    reader = _Reader(path, file, size)
    if file.read(4) != _MAGIC:
        raise reader.damaged("is not a GGUF file")
    version = reader.scalar("<I")
    if version not in _VERSIONS:
        raise reader.damaged(f"GGUF version {version}, expected 2 or 3 (little-endian)")
    tensor_count, field_count = reader.scalar("<Q"), reader.scalar("<Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = reader.string()
        fields[key] = reader.value(reader.scalar("<I"))
    rows = []
    for _ in range(tensor_count):
        name = reader.string()
        dims = reader.scalar("<I")
        if dims > _MAX_DIMS:
            raise reader.damaged(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(reversed([reader.scalar("<Q") for _ in range(dims)]))
        rows.append((name, shape, reader.scalar("<I"), reader.scalar("<Q")))
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.damaged(f"general.alignment is {alignment}")
    data_start = -(-file.tell() // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise reader.damaged(f"tensor {name!r} is there twice")
        tensors[name] = _tensor(reader, name, shape, kind, data_start + offset)
        if tensors[name].start + tensors[name].nbytes > size:
            raise reader.damaged(f"tensor {name!r} reaches past the end of the file; it is truncated")
    return GgufHeader(fields, tensors)


def _tensor(reader: _Reader, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml_type = GGMLQuantizationType(kind)
    except ValueError:
        raise reader.damaged(f"tensor {name!r} has the unknown type {kind}; a newer gguf package may know it") from None
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    columns = shape[-1] if shape else 1
    if columns % block:
        raise reader.damaged(
            f"tensor {name!r} has rows of {columns}, which {ggml_type.name} blocks of {block} do not fill"
        )
    row_bytes = columns // block * block_bytes
    return GgufTensor(name, shape, ggml_type.name, start, math.prod(shape[:-1]) * row_bytes, row_bytes)
