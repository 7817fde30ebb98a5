"""Where optimizer state lives: in the device's own memory, or in a tier that may be larger than it.

A tier makes zeroed tensors and brings them near ahead of their use. A GPU's tier is its backend's: managed memory, or
pinned memory of the host. On the CPU it is a map of files that have no name any more: the kernel writes pages out when
memory is short, nothing is left on disk whatever ends the process, and the space is reserved when a tensor is made, so
that a full disk is an error then and not a crash in the middle of a step.
"""

from __future__ import annotations

import mmap
import operator
import os
import tempfile
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qcore.backend.dlpack import DTYPES
from qcore.backend.interface import Backend
from qcore.backend.paged import PagedMemory
from qcore.backend.registry import backend_for
from qcore.errors import DeviceError, InvalidArgument, InvalidDtype, OutOfMemory, OutputError, Unsupported
from qcore.functional.huge_pages import prefer_huge_pages

DIRECTORY = "QCORE_PAGED_DIR"
# Smaller tensors stay where they are: a page table entry each costs more than they take (bitsandbytes' threshold).
SMALLEST = 100_000
_MOST_BYTES = 2**63 - 1


class MemoryTier(ABC):
    """Makes tensors for optimizer state, and brings them near before a step.

    A step that goes through several windows calls ``ready`` for one, ``prefetch`` for the next, and then the backend.

    Attributes
    ----------
    window : int
        Bytes of state that one call of the backend should touch, so that the next call's can be brought meanwhile; 0
        for any number, and then nothing is brought.
    what : str
        What messages say was closed.
    """

    window: int = 0
    what = "memory"
    _closed = False

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zeroed tensor; raises ``OutOfMemory`` if there is no room."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is this tier's."""
        return True

    def prefetch(self, tensors: Iterable[Tensor], to_host: bool = False) -> None:  # noqa: B027 - may have nothing to do
        """Start to bring the tensors near, or back to the host; a hint."""

    def ready(self, tensors: Iterable[Tensor]) -> None:  # noqa: B027
        """Have the next call find the tensors near: those of the last ``prefetch``, or, without one, any others."""

    def check_open(self) -> None:
        """Raise if the tier was closed."""
        if self._closed:
            raise InvalidArgument(
                f"paged state: its {self.what} was closed by close(), and the state went with it; load a state dict "
                "into a new optimizer"
            )

    def close(self) -> None:
        """Make no more tensors; those that exist go when nobody refers to them any more."""
        self._closed = True


class DeviceMemory(MemoryTier):
    """The device's own memory."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        try:
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            values = torch.empty(shape, dtype=dtype, device=device)
            prefer_huge_pages(values)
            return values.zero_()
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
    what = "map"

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(directory or os.environ.get(DIRECTORY) or tempfile.gettempdir())
        if not self.directory.is_dir():
            raise InvalidArgument(
                f"paged state: {self.directory} is not a directory; make it, or choose another with paged_dir or "
                f"{DIRECTORY}"
            )
        # Address -> map; a tensor keeps its map alive, and the space is given back with the last tensor.
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

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

    def prefetch(self, tensors: Iterable[Tensor], to_host: bool = False) -> None:
        for tensor in () if to_host else tensors:  # pages that nobody uses go back by themselves
            pages = self._maps.get(tensor.data_ptr())
            if pages is not None:
                pages.madvise(mmap.MADV_WILLNEED)


class BackendMemory(MemoryTier):
    """Memory that the backend of a device offers (``Backend.paged_memory``), for tensors of that device."""

    window = 64 << 20

    def __init__(self, memory: PagedMemory) -> None:
        self.memory = memory
        self._ahead = False  # a window was asked for that nobody was ready for yet
        self._warned = False

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.check_open()
        size = _size(shape, dtype)
        if size < SMALLEST:
            return DeviceMemory().zeros(shape, dtype, device)
        try:
            return self.memory.empty(shape, dtype).zero_()
        except OutOfMemory as error:
            raise OutOfMemory(
                f"paged state: {size} bytes of {self.memory.kind} memory for a {dtype} tensor of shape {shape} cannot "
                f"be had for {device}: {error}; keep the state in 8 bits, or free some of the host's memory"
            ) from error

    def holds(self, tensor: Tensor) -> bool:
        return tensor.nbytes < SMALLEST or self.memory.holds(tensor)

    def prefetch(self, tensors: Iterable[Tensor], to_host: bool = False) -> None:
        self._ahead = not to_host
        try:
            self.memory.prefetch([tensor for tensor in tensors if self.memory.holds(tensor)], to_host)
        except DeviceError as error:  # in the middle of a step, which is right without it
            if not self._warned:
                self._warned = True
                message = f"paged state: it could not be brought near, and steps may be slow: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def ready(self, tensors: Iterable[Tensor]) -> None:
        if not self._ahead:
            self.prefetch(tensors)
        self._ahead = False
        self.memory.wait()


def paged_memory(device: torch.device, directory: str | os.PathLike[str] | None = None) -> MemoryTier:
    """The tier for paged state of tensors on ``device``.

    Parameters
    ----------
    device : torch.device
    directory : path, optional
        CPU tensors: where the files are, and that there are files even if the backend has memory of its own.

    Raises
    ------
    Unsupported
        The device's backend has none.
    """
    if device.type == "cpu" and directory is not None:
        return FileMemory(directory)
    backend = backend_for(device)
    try:
        return BackendMemory(backend.paged_memory(device))
    except Unsupported as error:
        if device.type == "cpu":
            return FileMemory()
        raise Unsupported(
            f"paged state on {device}: needs managed or pinned memory from its backend, and {backend.name!r} has none; "
            "use the optimizer that is not paged"
        ) from error


# Of get_paged. A tensor's tier brings it near whichever backend is selected later; it is no attribute of the tensor,
# which would be saved with it.
_shared: dict[tuple[torch.device, Backend], MemoryTier] = {}
_tier_of: MutableMapping[Tensor, MemoryTier] = WeakTensorKeyDictionary()


def get_paged(
    *shape: SupportsIndex, dtype: torch.dtype = torch.float32, device: torch.device | str = "cuda:0"
) -> Tensor:
    """A tensor in memory that may be larger than its device's own: bitsandbytes' function, for every device.

    Parameters
    ----------
    *shape : int
    dtype : torch.dtype
        uint8, a signed integer, float16, float32, float64 or bfloat16.
    device : torch.device or str

    Returns
    -------
    Tensor
        On ``device`` (bitsandbytes' is a CPU tensor over the same memory), zeroed; below 100,000 bytes in the device's
        own memory. Its attribute ``is_paged`` is True.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Sizes that are no counts, no device, or another dtype.
    BackendUnavailable
        No backend serves the device.
    OutOfMemory, Unsupported
        There is no room, or the device's backend has no such memory.
    """
    lengths = _counts(shape)
    if dtype not in DTYPES:
        raise InvalidDtype(f"get_paged: dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if max(_size(lengths, dtype), *lengths, 0) > _MOST_BYTES:
        raise OutOfMemory(f"get_paged: shape: {lengths} in {dtype} takes {_size(lengths, dtype)} bytes")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"get_paged: device: {error}") from error
    backend_for(device)  # says what is missing, before torch does
    if device.type != "cpu":  # with an index
        device = torch.empty(0, device=device).device
    tier = _shared_tier(device)
    tensor = tier.zeros(lengths, dtype, device)
    tensor.is_paged = True  # type: ignore[attr-defined]
    tensor.page_deviceid = device.index  # type: ignore[attr-defined]
    _tier_of[tensor] = tier
    return tensor


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Begin to bring a tensor of :func:`get_paged` to its device, or back to the host; bitsandbytes' function.

    Parameters
    ----------
    A : Tensor
        Any shape and dtype.
    to_cpu : bool
        To the host.

    Raises
    ------
    InvalidArgument
        Another tensor.
    """
    tier = _tier_of.get(A) if isinstance(A, Tensor) else None
    if tier is None:
        raise InvalidArgument("prefetch_tensor: A is not paged; make it with get_paged")
    tier.prefetch([A], to_cpu)


def _shared_tier(device: torch.device) -> MemoryTier:
    key = (device, backend_for(device))
    if key not in _shared:
        _shared[key] = paged_memory(device)
    return _shared[key]


def _counts(shape: tuple[SupportsIndex, ...]) -> tuple[int, ...]:
    try:
        counts = tuple(operator.index(length) for length in shape)
    except TypeError:
        counts = (-1,)
    if min(counts, default=0) < 0 or any(isinstance(length, bool) for length in shape):
        raise InvalidArgument(f"get_paged: shape: expected counts, one argument each, got {shape}")
    return counts


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size
