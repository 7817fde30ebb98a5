"""The memory_ functions of ``qcore_backend.h`` as :class:`~qcore.backend.paged.PagedMemory`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.backend.dlpack import tensor_at
from qcore.backend.paged import PagedMemory
from qcore.errors import InvalidArgument

FUNCTIONS = ("memory_kind", "memory_allocate", "memory_free", "memory_prefetch")
VARIABLE = "QCORE_PAGED_MEMORY"  # the kind, if not what the library says
_KINDS = {"managed": QC.QC_MEMORY_MANAGED, "pinned": QC.QC_MEMORY_PINNED}


class CffiMemory(PagedMemory):
    """Paged memory of a native library on one device.

    Parameters
    ----------
    library : object
        Keeps the functions loaded for as long as a tensor's memory has to be given back.
    functions : mapping of str to function
        Those of ``FUNCTIONS``; they make the device current where they have to.
    check : callable
        Raises for a status.
    device : torch.device
        With an index, if it is no host.

    Raises
    ------
    InvalidArgument
        ``QCORE_PAGED_MEMORY`` names no kind.
    """

    def __init__(
        self,
        library: object,
        functions: Mapping[str, Callable[..., int]],
        check: Callable[[int], None],
        device: torch.device,
    ) -> None:
        self._library = library
        self._functions = functions
        self._check = check
        self._device = device
        self._index = device.index or 0
        place = ffi.new("int32_t *")
        check(functions["memory_kind"](self._index, place))
        self.kind = os.environ.get(VARIABLE) or next(name for name, kind in _KINDS.items() if kind == place[0])
        if self.kind not in _KINDS:
            raise InvalidArgument(f"{VARIABLE} is {self.kind!r}, needs {' or '.join(_KINDS)}")
        self._kind = _KINDS[self.kind]
        self._addresses: set[int] = set()
        self._side: Any = None  # the stream of prefetches
        self._arrived: Any = None  # the event behind the last of them

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize
        for length in shape:
            size *= length
        if size == 0:
            return torch.empty(shape, dtype=dtype, device=self._device)
        place = ffi.new("uintptr_t *")
        self._check(self._functions["memory_allocate"](self._index, self._kind, size, place))
        address = int(place[0])
        self._addresses.add(address)
        return tensor_at(address, shape, dtype, self._device, partial(self._release, address))

    def _release(self, address: int) -> None:
        self._addresses.discard(address)  # before it is free for somebody else
        status = self._functions["memory_free"](self._index, self._kind, address)
        if status:
            self._check(status)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self._addresses

    def prefetch(self, tensors: Iterable[Tensor], to_host: bool = False) -> None:
        if self._kind != QC.QC_MEMORY_MANAGED:
            return  # read and written where it is
        if self._device.type == "cpu":
            self._move(tensors, 0, to_host)
            return
        if torch.cuda.is_current_stream_capturing():
            return  # the graph would keep moving what it does not use
        current = torch.cuda.current_stream(self._device)
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        # Without this all windows of a step would move at once, and push each other out again.
        self._side.wait_stream(current)
        self._move(tensors, self._side.cuda_stream, to_host)
        self._arrived = self._side.record_event()

    def _move(self, tensors: Iterable[Tensor], stream: int, to_host: bool) -> None:
        prefetch = self._functions["memory_prefetch"]
        for tensor in tensors:
            if self.holds(tensor):
                address, size = tensor.data_ptr(), tensor.nbytes
                self._check(prefetch(self._index, stream, self._kind, address, size, int(to_host)))

    def wait(self) -> None:
        arrived, self._arrived = self._arrived, None
        if arrived is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._device).wait_event(arrived)
