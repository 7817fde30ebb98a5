"""Streams, graphs and memory of a device: what the stress cases need beyond a plain call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcore_conformance.guards import Placement
from qcore_conformance.model import NotRun

if TYPE_CHECKING:
    from qcore_conformance.session import Session

_DELAY_CYCLES = 100_000_000  # about 60 ms on a GPU of today


def needs_cuda(session: Session) -> None:
    """Raise ``NotRun`` on a device that torch does not drive as CUDA (or HIP)."""
    if session.device.type != "cuda":
        raise NotRun(f"a {session.device.type} device has no streams or graphs")


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


class DelayedTensor:
    """A tensor of zeros that a side stream fills only after a long wait; nothing synchronises after that."""

    def __init__(self, name: str, content: torch.Tensor, device: torch.device, *, is_input: bool) -> None:
        # A copy from pageable memory waits for its own stream only, so the side stream stays busy meanwhile.
        ready = content.to(device)
        with torch.cuda.stream(_side_stream()):
            self.tensor = torch.zeros_like(ready)
            if is_input:
                torch.cuda._sleep(_DELAY_CYCLES)
                self.tensor.copy_(ready, non_blocking=True)
        ready.record_stream(_side_stream())

    def check(self) -> None:
        """The caller compares the result; the surroundings were checked by the guarded call."""


DELAYED: tuple[Placement, ...] = (DelayedTensor,)


def on_side_stream(call: Callable[[], None]) -> None:
    """Make a call on the stream that :class:`DelayedTensor` uses."""
    with torch.cuda.stream(_side_stream()):
        call()


def captured(call: Callable[[], None]) -> None:
    """Capture a call in a graph and replay it; an op that synchronises or allocates makes the capture fail."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()


def current_device(device: torch.device) -> int | None:
    """The calling thread's current device, by index; None where torch drives ``device`` by no runtime that has one."""
    return torch.cuda.current_device() if device.type == "cuda" else None


def leave_device(device: torch.device) -> None:
    """Make a device other than ``device`` current in the calling thread, if there is one."""
    if device.type == "cuda":
        others = [index for index in range(torch.cuda.device_count()) if index != (device.index or 0)]
        torch.cuda.set_device(others[0] if others else device.index or 0)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device, or on this host within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = 0
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return available


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """Give a device's cached memory back before and after."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
