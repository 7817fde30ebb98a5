"""The suite's cases of paged memory, on functions that are wrong where a host's library cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qcore_conformance import streams
from qcore_conformance.cases.paged_memory import Memory

CUDA = torch.device("cuda", 1)


class Devices:
    """Two devices, of which memory_free makes one current: the one before it again (``right``), or not."""

    def __init__(self, right: bool) -> None:
        self.current, self.right = 1, right

    def memory_free(self, device: int, kind: int, address: int) -> int:
        before, self.current = self.current, device
        if self.right:
            self.current = before
        return 0


@pytest.mark.parametrize("right", [True, False])
def test_giving_back_leaves_the_current_device(monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    devices = Devices(right)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices.current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(devices, "current", index))
    memory = Memory.__new__(Memory)
    memory.session, memory.index = SimpleNamespace(device=CUDA), CUDA.index
    memory.library = SimpleNamespace(api=devices, last_error=lambda: "")
    if right:
        memory.free_elsewhere(0, 64)
        assert devices.current == 0, "the case gave back with the memory's own device current"
        return
    with pytest.raises(AssertionError, match="memory_free left device 1 current, not 0 as it was"):
        memory.free_elsewhere(0, 64)


def test_a_host_has_no_current_device() -> None:
    streams.leave_device(torch.device("cpu"))
    assert streams.current_device(torch.device("cpu")) is None
