"""Where optimizer state lives: in the device's own memory, or in a tier that may be larger than it.

A tier makes zeroed tensors and reads them ahead. On the CPU the paged tier is a map of files that have no name any
more: the kernel writes pages out when memory is short, nothing is left on disk whatever ends the process, and the space
is reserved when a tensor is made, so that a full disk is an error then and not a crash in the middle of a step.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from qcore.errors import InvalidArgument, OutOfMemory, OutputError, Unsupported

DIRECTORY = "QCORE_PAGED_DIR"
# Smaller tensors stay where they are: a page table entry each costs more than they take (bitsandbytes' threshold).
SMALLEST = 100_000


class MemoryTier(ABC):
    """Makes tensors for optimizer state, and brings them near before a step.

    Attributes
    ----------
    window : int
        Bytes of state that one call of the backend should touch, so that the next call's can be read meanwhile; 0 for
        any number.
    """

    window: int = 0

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zeroed tensor; raises ``OutOfMemory`` if there is no room."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is this tier's."""
        return True

    def prefetch(self, tensors: Iterable[Tensor]) -> None:  # noqa: B027 - a tier may have nothing to do
        """Start to bring the tensors' pages in; a hint."""

    def check_open(self) -> None:  # noqa: B027
        """Raise if the tier was closed."""


class DeviceMemory(MemoryTier):
    """The device's own memory."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        try:
            return torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch's allocator: DefaultCPUAllocator, torch.OutOfMemoryError
            if "alloc" not in str(error).lower() and "memory" not in str(error).lower():
                raise
            raise OutOfMemory(
                f"optimizer state: {_size(shape, dtype)} bytes for a {dtype} tensor of shape {shape} do not fit on "
                f"{device}; keep the state in 8 bits, or page it (is_paged=True)"
            ) from error


class FileMemory(MemoryTier):
    """Files mapped into memory, for CPU tensors.

    Parameters
    ----------
    directory : path, optional
        Where the files are; by default ``QCORE_PAGED_DIR``, else the system's directory for temporary files. A
        directory in memory (tmpfs) saves none.

    Raises
    ------
    InvalidArgument
        The directory does not exist.
    """

    window = 64 << 20

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(directory or os.environ.get(DIRECTORY) or tempfile.gettempdir())
        if not self.directory.is_dir():
            raise InvalidArgument(
                f"paged state: {self.directory} is not a directory; make it, or choose another with paged_dir or "
                f"{DIRECTORY}"
            )
        # Address -> map; a tensor keeps its map alive, and the space is given back with the last tensor.
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
        self._closed = False

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.check_open()
        if device.type != "cpu":
            raise InvalidArgument(f"paged state: a map of files serves cpu tensors, not {device}")
        size = _size(shape, dtype)
        if size < SMALLEST:
            return DeviceMemory().zeros(shape, dtype, device)
        pages = self._map(size)
        tensor = torch.frombuffer(pages, dtype=dtype)
        self._maps[tensor.data_ptr()] = pages
        return tensor.view(shape)

    def _map(self, size: int) -> mmap.mmap:
        try:
            file, name = tempfile.mkstemp(prefix="qcore-paged-", dir=self.directory)
        except OSError as error:
            raise OutputError(f"paged state: no file can be made in {self.directory}: {error.strerror}") from error
        try:
            os.unlink(name)
            if hasattr(os, "posix_fallocate"):  # elsewhere a full disk is known when a page is first written
                os.posix_fallocate(file, 0, size)
            else:
                os.truncate(file, size)
            return mmap.mmap(file, size)
        except OSError as error:
            raise OutOfMemory(
                f"paged state: {size} bytes cannot be had in {self.directory}: {error.strerror}; free some space, or "
                f"choose another directory with paged_dir or {DIRECTORY}"
            ) from error
        finally:
            os.close(file)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.nbytes < SMALLEST or tensor.data_ptr() in self._maps

    def prefetch(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            pages = self._maps.get(tensor.data_ptr())
            if pages is not None:
                pages.madvise(mmap.MADV_WILLNEED)

    def check_open(self) -> None:
        if self._closed:
            raise InvalidArgument(
                "paged state: its map was closed by close(), and the state went with it; load a state dict into a new "
                "optimizer"
            )

    def close(self) -> None:
        """Make no more tensors; those that exist go when nobody refers to them any more."""
        self._closed = True


def paged_memory(device: torch.device, directory: str | os.PathLike[str] | None) -> MemoryTier:
    """The tier for paged state of tensors on ``device``.

    Raises
    ------
    Unsupported
        No backend has one for this kind of device.
    """
    if device.type == "cpu":
        return FileMemory(directory)
    raise Unsupported(
        f"paged state on {device}: needs managed or pinned memory from the backend of {device.type} tensors, and none "
        "has it; use the optimizer that is not paged"
    )


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size
