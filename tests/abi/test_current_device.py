"""A native library finds the tensor's device current, and the caller finds its own again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qcore.backend import cffi_backend
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.interface import Weight4bit


class Machine:
    """Two pretended CUDA devices, and every call of the library with the device that was current then."""

    def __init__(self) -> None:
        self.current = 0
        self.calls: list[tuple[int, int]] = []  # (device argument, current device)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def function(self, device: int, *_: Any) -> int:
        self.calls.append((device, self.current))
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: machine.current, raising=False)
    return machine


@pytest.fixture
def backend(machine: Machine) -> CffiBackend:
    """An adapter whose table is the pretended machine's, serving device 1."""
    backend = CffiBackend.__new__(CffiBackend)
    backend.name, backend.path, backend._host = "pretended", Path("pretended.so"), False
    backend._functions = dict.fromkeys(cffi_backend.OPS, machine.function)
    backend._where = lambda tensor: (1, 0)  # type: ignore[method-assign]
    backend._workspace = lambda *_: (None, 0, 0)  # type: ignore[method-assign]
    return backend


def decode(backend: CffiBackend) -> None:
    backend.int8_dequantize_rows(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), out=torch.empty(2, 3))


def multiply(backend: CffiBackend) -> None:
    packed, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    weight = Weight4bit(packed=packed, absmax=absmax, quant_type="nf4", blocksize=64, shape=(2, 64))
    backend.gemm_4bit(torch.ones(1, 64), weight, None, out=torch.empty(1, 2))


@pytest.mark.parametrize("call", [decode, multiply])
@pytest.mark.parametrize("current", [0, 1])
def test_the_tensors_device_is_current_during_a_call(
    machine: Machine, backend: CffiBackend, call: Any, current: int
) -> None:
    machine.current = current
    call(backend)
    assert machine.calls == [(1, 1)]
    assert machine.current == current
