"""Tensors over lent memory: whose they look like, when the memory goes back, and how prefetches are ordered."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcore.backend import cffi_memory, dlpack
from qcore.backend.abi import constants as QC
from qcore.backend.cffi_memory import CffiMemory
from qcore.backend.dlpack import tensor_at
from qcore.errors import InvalidDtype

CPU = torch.device("cpu")


class Lender:
    """Memory that notes when it was given back."""

    def __init__(self, size: int = 256) -> None:
        self.memory = ctypes.create_string_buffer(size)
        self.returned: list[int] = []  # the threads that did

    @property
    def address(self) -> int:
        return ctypes.addressof(self.memory)

    def release(self) -> None:
        self.returned.append(threading.get_ident())

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        return tensor_at(self.address, shape, dtype, CPU, self.release)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), ()])
def test_a_tensor_is_the_lent_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lender = Lender()
    tensor = lender.tensor(shape, dtype)
    assert (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) == (lender.address, shape, dtype)
    assert tensor.is_contiguous()
    values = torch.arange(tensor.numel(), dtype=dtype).view(shape)
    tensor.copy_(values)
    assert bytes(lender.memory)[: tensor.nbytes] == values.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_memory_goes_back_once_with_the_last_view() -> None:
    lender = Lender()
    tensor = lender.tensor((4, 8))
    view, alias = tensor[1:].view(-1), tensor.detach()
    del tensor, alias
    assert lender.returned == []
    del view
    assert lender.returned == [threading.get_ident()]


def test_memory_goes_back_in_the_thread_that_drops_it() -> None:
    lender = Lender()
    holder = [lender.tensor((8,))]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert lender.returned == [thread.ident]


def test_nothing_is_kept_for_tensors_that_are_gone() -> None:
    before = len(dlpack._lent)
    lenders = [Lender() for _ in range(100)]
    tensors = [lender.tensor((8,)) for lender in lenders]
    assert len(dlpack._lent) == before + 100
    tensors.clear()
    assert len(dlpack._lent) == before
    assert all(len(lender.returned) == 1 for lender in lenders)


def test_memory_that_becomes_no_tensor_goes_back() -> None:
    lender = Lender()
    before = len(dlpack._lent)
    with pytest.raises(RuntimeError):
        tensor_at(lender.address, (-1,), torch.uint8, CPU, lender.release)
    with pytest.raises(InvalidDtype, match=r"paged memory: dtype: expected .*uint8, .* got torch\.complex64"):
        tensor_at(lender.address, (1,), torch.complex64, CPU, lender.release)
    assert len(lender.returned) == 2
    assert len(dlpack._lent) == before


def test_a_tensor_may_be_there_when_the_interpreter_ends() -> None:
    program = """
import ctypes, torch
from qcore.backend.dlpack import tensor_at
memory = ctypes.create_string_buffer(64)
kept = tensor_at(ctypes.addressof(memory), (8,), torch.uint8, torch.device("cpu"), lambda: print("returned"))
torch.kept = kept  # goes when torch's own modules do, and not before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


class Runtime:
    """A pretended library and torch.cuda: everything that they are asked to do, in order."""

    def __init__(self, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.capturing = False
        self.status = 0
        self.memory: dict[int, Tensor] = {}
        main = self.stream("main")
        cuda = {
            "current_stream": lambda device: main,
            "Stream": lambda device: self.stream("side"),
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)

        def wrap(address: int, shape: Any, dtype: Any, device: Any, release: Callable[[], None]) -> Tensor:
            return self.memory[address].view(shape)

        monkeypatch.setattr(cffi_memory, "tensor_at", wrap)
        functions = {
            "memory_kind": lambda device, place: self._set(place, kind),
            "memory_allocate": self._allocate,
            "memory_free": lambda device, kind, address: self.status,
            "memory_prefetch": self._prefetch,
        }
        self.paged = CffiMemory(None, functions, self._check, torch.device("cuda", 0))

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            cuda_stream=64,
            wait_stream=lambda other: self.said.append(f"{name} waits for a stream"),
            record_event=lambda: self.said.append(f"event on {name}") or "event",
            wait_event=lambda event: self.said.append(f"{name} waits for the {event}"),
        )

    def _set(self, place: Any, value: int) -> int:
        place[0] = value
        return 0

    def _allocate(self, device: int, kind: int, size: int, place: Any) -> int:
        tensor = torch.zeros(size, dtype=torch.uint8)
        self.memory[tensor.data_ptr()] = tensor
        return self._set(place, tensor.data_ptr())

    def _prefetch(self, device: int, stream: int, kind: int, address: int, size: int, to_host: int) -> int:
        self.said.append(f"{size} bytes to {'the host' if to_host else device} on {stream}")
        return self.status

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}")


def test_a_prefetch_begins_after_the_work_before_it_and_ends_before_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(QC.QC_MEMORY_MANAGED, monkeypatch)
    tensors = [runtime.paged.empty((10,), torch.uint8), runtime.paged.empty((20,), torch.uint8)]
    runtime.paged.prefetch([*tensors, torch.zeros(3)])  # the last is no memory of it
    runtime.paged.wait()
    runtime.paged.wait()  # nothing new to wait for
    assert runtime.said == [
        "side waits for a stream",
        "10 bytes to 0 on 64",
        "20 bytes to 0 on 64",
        "event on side",
        "main waits for the event",
    ]
    runtime.said.clear()
    runtime.paged.prefetch(tensors[:1], to_host=True)
    assert runtime.said[1] == "10 bytes to the host on 64"


def test_nothing_is_moved_into_a_graph_and_pinned_memory_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(QC.QC_MEMORY_MANAGED, monkeypatch)
    tensor = runtime.paged.empty((10,), torch.uint8)
    runtime.capturing = True
    runtime.paged.prefetch([tensor])
    runtime.paged.wait()
    pinned = Runtime(QC.QC_MEMORY_PINNED, monkeypatch)
    pinned.paged.prefetch([pinned.paged.empty((10,), torch.uint8)])
    pinned.paged.wait()
    assert runtime.said == pinned.said == []
    assert (runtime.paged.kind, pinned.paged.kind) == ("managed", "pinned")


def test_a_prefetch_that_fails_raises_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(QC.QC_MEMORY_MANAGED, monkeypatch)
    tensor = runtime.paged.empty((10,), torch.uint8)
    runtime.status = 5
    with pytest.raises(RuntimeError, match="status 5"):
        runtime.paged.prefetch([tensor])
