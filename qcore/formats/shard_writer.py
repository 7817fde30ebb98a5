"""Writing one safetensors file tensor by tensor, or a tensor chunk by chunk.

The library's ``save_file`` wants every tensor in memory. Here the place of each tensor is computed from the shapes
before the first byte is written, so a chunk goes straight to its place with ``pwrite``. The order inside a file is by
descending element size, so that every tensor is aligned for readers that map it; tensors whose length is known only at
the end (the JSON text of a quantization state) come last and are held in memory, and the header, which states their
lengths, is written into room reserved for its longest form and padded with spaces, which the format allows.

Nothing that varies between runs enters the file: the same tensors give the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcore.errors import FormatError, OutputError
from qcore.formats.output import writing_failed
from qcore.formats.safetensors import NAMES, SafetensorsFile, byte_view

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

_METADATA = {"format": "pt"}

# Bytes that are hashed at a time when they are read back.
_VERIFY_BYTES = 32 << 20


@dataclass(frozen=True)
class Spec:
    """A tensor to be written. ``late`` marks one-dimensional uint8 text of at most ``shape[0]`` bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    late: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk; for a late tensor the most that they can be."""
        return math.prod(self.shape) * self.dtype.itemsize


def _order(spec: Spec) -> tuple[bool, int]:
    return spec.late, -spec.dtype.itemsize


def _header(specs: Sequence[Spec], lengths: dict[str, int]) -> bytes:
    entries: dict[str, object] = {"__metadata__": _METADATA}
    begin = 0
    for spec in specs:
        nbytes = lengths.get(spec.name, spec.nbytes)
        shape = [nbytes] if spec.late else list(spec.shape)
        entries[spec.name] = {"dtype": NAMES[spec.dtype], "shape": shape, "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    return json.dumps(entries, separators=(",", ":")).encode()


class ShardWriter:
    """Write the tensors of ``specs`` into ``path``; every one must be written in full before :meth:`finish`.

    With ``resume``, what an unfinished file of the same specs holds stays, for :meth:`restore` to take over.

    Raises
    ------
    OutputError
        The file cannot be created, or the disk is full: room for all of it is claimed at once.
    """

    def __init__(self, path: Path, specs: Sequence[Spec], *, resume: bool = False) -> None:
        self.path = path
        self._specs = sorted(specs, key=_order)
        reserved = len(_header(self._specs, {}))
        self._header_room = (reserved + 7) // 8 * 8
        self._places: dict[str, int] = {}
        offset = 8 + self._header_room
        for spec in self._specs:
            if not spec.late:
                self._places[spec.name] = offset
                offset += spec.nbytes
        self._late_start = offset
        self._late: dict[str, bytes] = {}
        self._written = dict.fromkeys(self._places, 0)
        self._sizes = {spec.name: spec.nbytes for spec in self._specs}
        self._hashes = {spec.name: hashlib.sha256() for spec in self._specs}
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_TRUNC), 0o644)
            _claim(self._fd, offset + sum(spec.nbytes for spec in self._specs if spec.late))
        except OSError as error:
            if resume:
                self.close()
            else:
                self.abort()
            raise writing_failed(path, error) from error

    def write(self, name: str, chunk: Tensor) -> None:
        """Append ``chunk`` (any shape, contiguous, of the declared dtype) to tensor ``name``."""
        view, place = byte_view(chunk), self._places[name] + self._written[name]
        self._hashes[name].update(view)
        self._write_at(view, place)
        self._written[name] += len(view)

    def write_late(self, name: str, text: bytes) -> None:
        """Give a late tensor its bytes."""
        self._hashes[name].update(text)
        self._late[name] = text

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the bytes of these tensors as written so far."""
        return {name: self._hashes[name].hexdigest() for name in names}

    def late_text(self, name: str) -> bytes | None:
        """What :meth:`write_late` was given for ``name``, if it was."""
        return self._late.get(name)

    def restore(self, sha256: Mapping[str, str], late: Mapping[str, bytes]) -> bool:
        """Take over tensors that an earlier writer wrote in full, if their bytes in the file have these SHA-256.

        False, and nothing taken over, if one differs.
        """
        digests = {name: hashlib.sha256(text) for name, text in late.items()}
        digests |= {name: self._read_digest(name) for name in sha256 if name in self._places}
        if any(name not in digests or digests[name].hexdigest() != sha256[name] for name in sha256):
            return False
        self._hashes |= digests
        self._late |= late
        self._written |= {name: self._sizes[name] for name in sha256 if name in self._places}
        return True

    def _read_digest(self, name: str) -> Hash:
        digest, place, left = hashlib.sha256(), self._places[name], self._sizes[name]
        try:
            while left > 0 and (piece := os.pread(self._open_fd(), min(left, _VERIFY_BYTES), place)):
                digest.update(piece)
                place, left = place + len(piece), left - len(piece)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read back: {error.strerror or error}") from error
        return digest

    def _write_at(self, view: memoryview | bytes, offset: int) -> None:
        view, done = memoryview(view), 0
        try:
            while done < len(view):
                done += os.pwrite(self._open_fd(), view[done:], offset + done)
        except OSError as error:
            raise writing_failed(self.path, error) from error

    def _open_fd(self) -> int:
        if self._fd is None:
            raise OutputError(f"{self.path}: is closed already")
        return self._fd

    def close(self) -> None:
        """Let go of the file as it is; harmless after :meth:`finish`."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def finish(self) -> dict[str, str]:
        """Write the header, flush to the disk and close; returns the SHA-256 of every tensor's bytes as written."""
        for spec in self._specs:
            written = len(self._late.get(spec.name, b"")) if spec.late else self._written[spec.name]
            if written > spec.nbytes or (not spec.late and written < spec.nbytes):
                raise FormatError(
                    f"{self.path}: {written} bytes written of tensor {spec.name!r}, {spec.nbytes} expected"
                )
        lengths = {name: len(text) for name, text in self._late.items()}
        header = _header(self._specs, lengths).ljust(self._header_room)
        tail = b"".join(self._late[spec.name] for spec in self._specs if spec.late)
        self._write_at(self._header_room.to_bytes(8, "little") + header, 0)
        self._write_at(tail, self._late_start)
        try:
            os.ftruncate(self._open_fd(), self._late_start + len(tail))
            os.fsync(self._open_fd())
            if hasattr(os, "posix_fadvise"):  # what verification reads back should come from the disk
                os.posix_fadvise(self._open_fd(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.close()
        except OSError as error:
            raise writing_failed(self.path, error) from error
        return self.digests(list(self._hashes))

    def abort(self) -> None:
        """Close and remove the unfinished file; harmless after that."""
        self.close()
        self.path.unlink(missing_ok=True)


def _claim(fd: int, nbytes: int) -> None:
    """Reserve disk blocks, so that a full disk is known before hours of work; not every system and file system can."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def verify_shard(path: Path, specs: Sequence[Spec], digests: dict[str, str]) -> None:
    """Read a finished shard back and compare it with what was written.

    Parameters
    ----------
    specs
        The tensors that must be there, with dtype and shape.
    digests
        SHA-256 of every tensor's bytes, from :meth:`ShardWriter.finish`.

    Raises
    ------
    FormatError
        A tensor is missing, of another dtype, shape or length, or its bytes differ.
    """
    file = SafetensorsFile(path)
    try:
        if set(file.entries) != {spec.name for spec in specs}:
            raise FormatError(f"{path}: holds other tensors than were written")
        for spec in specs:
            entry = file.entries[spec.name]
            if entry.dtype != spec.dtype or (entry.shape != spec.shape and not spec.late):
                raise FormatError(f"{path}: tensor {spec.name!r} reads back as {entry.dtype} {entry.shape}")
            if _digest(file, spec.name) != digests.get(spec.name):
                raise FormatError(f"{path}: tensor {spec.name!r} reads back with other bytes than were written")
    finally:
        file.close()


def _digest(file: SafetensorsFile, name: str) -> str:
    entry, digest = file.entries[name], hashlib.sha256()
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, _VERIFY_BYTES * rows // max(1, entry.nbytes))
    for start in range(0, rows, step):
        digest.update(byte_view(file.read_rows(name, start, min(rows, start + step))))
    return digest.hexdigest()
