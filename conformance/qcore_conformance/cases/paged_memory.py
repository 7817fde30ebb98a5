"""The memory_ functions of the C ABI, called without the Python adapter (QC-MEM-001 to QC-MEM-005)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qcore_conformance import generators, streams
from qcore_conformance.model import Case, NotRun
from qcore_conformance.session import Session

NAMES = ("memory_kind", "memory_allocate", "memory_free", "memory_prefetch")
KINDS = (0, 1)  # QC_MEMORY_MANAGED, QC_MEMORY_PINNED
_SIZES = (4097, 1, 1 << 20, 64, 1000)  # not in order: a small piece may be cut from the rest of a large one
_UNTOUCHED = 0xC3


class Memory:
    """The four functions on the session's device."""

    def __init__(self, s: Session) -> None:
        from qcore_conformance import capi

        self.session, self.library = s, capi.Library(s)
        api, ffi = self.library.api, self.library.ffi
        held = {name: ffi.offsetof("qc_api", name) < api.size and getattr(api, name) for name in NAMES}
        there = [name for name, function in held.items() if function]
        if not there:
            raise NotRun("the library has no memory for paged state")
        assert len(there) == len(NAMES), f"of the memory functions there are only {', '.join(there)}"
        self.index, self.stream = self.library.where()

    def call(self, name: str, *arguments: Any, device: int | None = None) -> int:
        with self.library.current():
            return int(getattr(self.library.api, name)(self.index if device is None else device, *arguments))

    def good(self, name: str, *arguments: Any) -> None:
        status = self.call(name, *arguments)
        assert status == 0, f"{name}{arguments}: status {status}: {self.library.last_error()}"

    def kind(self) -> int:
        place = self.library.ffi.new("int32_t *", -1)
        self.good("memory_kind", place)
        return int(place[0])

    def allocate(self, kind: int, size: int) -> tuple[int, int]:
        """(status, address)."""
        place = self.library.ffi.new("uintptr_t *", _UNTOUCHED)
        status = self.call("memory_allocate", kind, size, place)
        assert status == 0 or place[0] == _UNTOUCHED, f"memory_allocate: status {status}, yet an address was written"
        return status, int(place[0])

    def prefetch(self, kind: int, address: int, size: int, to_host: int) -> None:
        self.good("memory_prefetch", self.stream, kind, address, size, to_host)

    def free_elsewhere(self, kind: int, address: int) -> None:
        """On a thread that has not called anything yet, while another device is current there."""
        said: list[tuple[int, str]] = []
        current: list[int | None] = []

        def free() -> None:
            streams.leave_device(self.session.device)
            current.append(streams.current_device(self.session.device))
            said.append((int(self.library.api.memory_free(self.index, kind, address)), self.library.last_error()))
            current.append(streams.current_device(self.session.device))

        thread = threading.Thread(target=free)
        thread.start()
        thread.join()
        assert said[0][0] == 0, f"memory_free on another thread: status {said[0][0]}: {said[0][1]}"
        before, after = current
        assert after == before, f"memory_free left device {after} current, not {before} as it was"

    def tensor(self, address: int, size: int) -> torch.Tensor:
        """The device's view."""
        from qcore.backend.dlpack import tensor_at

        device = torch.empty(0, device=self.session.device).device  # with an index
        return tensor_at(address, (size,), torch.uint8, device, lambda: None)

    def finish(self) -> None:
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)

    def write(self, address: int, values: NDArray[np.uint8]) -> None:
        """By the host."""
        self.finish()
        self.library.ffi.memmove(self.library.ffi.cast("void *", address), values.tobytes(), values.size)

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        """By the host."""
        self.finish()
        raw = self.library.ffi.buffer(self.library.ffi.cast("char *", address), size)
        return np.frombuffer(bytes(raw), np.uint8)


def _same(found: NDArray[np.uint8], expected: NDArray[np.uint8], what: str) -> None:
    wrong = np.flatnonzero(found != expected)
    assert not wrong.size, f"{what}: byte {wrong[0]} of {expected.size} is {found[wrong[0]]}, not {expected[wrong[0]]}"


def _kinds(s: Session) -> None:
    memory = Memory(s)
    kind = memory.kind()
    assert kind in KINDS, f"memory_kind says {kind}"
    assert memory.kind() == kind, "memory_kind gives another answer the second time"
    status, address = memory.allocate(kind, 64)
    assert status == 0, f"the kind that memory_kind gives is refused: status {status}: {memory.library.last_error()}"
    memory.good("memory_free", kind, address)


def _each_kind(run: Callable[[Memory, int, Mapping[int, int]], None]) -> Callable[[Session], None]:
    """Runs on pieces of ``_SIZES`` ({address: bytes}) of each kind that the device has; gives them back afterwards."""

    def with_pieces(s: Session) -> None:
        memory = Memory(s)
        for kind in sorted(KINDS, key=lambda kind: kind != memory.kind()):
            pieces: dict[int, int] = {}
            for size in _SIZES:
                status, address = memory.allocate(kind, size)
                if status == memory.library.qc.QC_UNSUPPORTED and kind != memory.kind() and not pieces:
                    assert memory.library.last_error(), "a kind is refused without a message"
                    break
                assert status == 0, f"memory_allocate({kind}, {size}): status {status}: {memory.library.last_error()}"
                assert address, f"memory_allocate({kind}, {size}) gave address 0"
                assert address not in pieces, f"two pieces of kind {kind} at 0x{address:x}"
                pieces[address] = size
            if pieces:
                run(memory, kind, pieces)
            for address in pieces:
                memory.good("memory_free", kind, address)

    return with_pieces


def _filled(memory: Memory, pieces: Mapping[int, int]) -> dict[int, NDArray[np.uint8]]:
    """Every piece written by the host."""
    values = {at: memory.session.rng.integers(0, 256, size, dtype=np.uint8) for at, size in pieces.items()}
    for address, content in values.items():
        memory.write(address, content)
    return values


def _both_sides(memory: Memory, kind: int, pieces: Mapping[int, int]) -> None:
    end = 0
    for address, size in sorted(pieces.items()):
        assert address % 64 == 0, f"kind {kind}: 0x{address:x} is no multiple of 64"
        assert address >= end, f"kind {kind}: two pieces share bytes"
        end = address + size
    for address, content in _filled(memory, pieces).items():
        view = memory.tensor(address, content.size)
        _same(view.cpu().numpy(), content, f"kind {kind}: written by the host, read by the device")
        view.bitwise_xor_(0x5A)
        _same(memory.read(address, content.size), content ^ 0x5A, f"kind {kind}: written by the device")


def _op_there(memory: Memory, kind: int, pieces: Mapping[int, int]) -> None:
    """dequantize_blockwise from one piece to another gives the bits that it gives elsewhere."""
    s = memory.session
    if not s.backend.supports("dequantize_blockwise"):
        raise NotRun("the backend does not serve dequantize_blockwise")
    (codes_at, n), (out_at, _) = ((at, size) for at, size in pieces.items() if size > 1000)
    codes = _filled(memory, {codes_at: n})[codes_at]
    absmax = torch.from_numpy(s.rng.uniform(0.5, 2, -(-n // 64)).astype(np.float32)).to(s.device)
    book = torch.tensor(generators.CODEBOOKS["dynamic"], dtype=torch.float32, device=s.device)
    there = memory.tensor(out_at, 4 * n).view(torch.float32)
    elsewhere = torch.empty(n, device=s.device)
    memory.prefetch(kind, codes_at, n, 0)
    s.backend.dequantize_blockwise(memory.tensor(codes_at, n), absmax, book, 64, out=there)
    s.backend.dequantize_blockwise(torch.from_numpy(codes).to(s.device), absmax, book, 64, out=elsewhere)
    memory.finish()
    assert torch.equal(there.view(torch.int32), elsewhere.view(torch.int32)), f"kind {kind}: an op gives other bits"


def _no_room(s: Session) -> None:
    memory = Memory(s)
    status, _ = memory.allocate(memory.kind(), 1 << 50)
    assert status == memory.library.qc.QC_OUT_OF_MEMORY, f"2^50 bytes: status {status}, expected QC_OUT_OF_MEMORY"
    assert "memory_allocate" in memory.library.last_error(), f"the text is {memory.library.last_error()!r}"


def _moved(memory: Memory, kind: int, pieces: Mapping[int, int]) -> None:
    values = _filled(memory, pieces)
    views = {address: memory.tensor(address, size) for address, size in pieces.items()}
    for to_host in (0, 1, 0):
        for address, size in pieces.items():
            memory.prefetch(kind, address, size, to_host)
            views[address].add_(1)  # behind the prefetch, and before the next
            memory.prefetch(kind, address + size // 2, size - size // 2, 1 - to_host)
            memory.prefetch(kind, address, 0, to_host)
    for address, content in values.items():
        _same(memory.read(address, content.size), content + np.uint8(3), f"kind {kind}: after prefetches")


def _given_back(memory: Memory, kind: int, pieces: Mapping[int, int]) -> None:
    """What comes after a piece was given back is not the others'; any thread may do it; nothing happens to 0."""
    values = _filled(memory, pieces)
    memory.good("memory_free", kind, 0)
    memory.free_elsewhere(kind, 0)
    for size in _SIZES:
        status, address = memory.allocate(kind, size)
        assert status == 0, f"memory_allocate({kind}, {size}): status {status}: {memory.library.last_error()}"
        memory.tensor(address, size).fill_(0x77)
        memory.free_elsewhere(kind, address)
    for address, content in values.items():
        _same(memory.read(address, content.size), content, f"kind {kind}: after other pieces came and went")


def _refusals(memory: Memory) -> Iterable[tuple[str, str, tuple[Any, ...]]]:
    """(function, argument, arguments after the device)."""
    kind, null, stream = memory.kind(), memory.library.ffi.NULL, memory.stream
    place = memory.library.ffi.new("uintptr_t *", _UNTOUCHED)
    yield "memory_kind", "kind", (null,)
    for wrong in (2, -1):
        yield "memory_allocate", "kind", (wrong, 64, place)
        yield "memory_free", "kind", (wrong, 64)
        yield "memory_prefetch", "kind", (stream, wrong, 64, 64, 0)
        yield "memory_prefetch", "to_host", (stream, kind, 64, 64, wrong)
    for wrong in (0, -1, -(1 << 63)):
        yield "memory_allocate", "bytes", (kind, wrong, place)
    yield "memory_allocate", "address", (kind, 64, null)
    yield "memory_prefetch", "bytes", (stream, kind, 64, -1, 0)
    yield "memory_prefetch", "address", (stream, kind, 0, 64, 0)


def _refused(s: Session) -> None:
    memory = Memory(s)
    qc, said = memory.library.qc, memory.library.last_error
    for name, argument, arguments in _refusals(memory):
        status = memory.call(name, *arguments)
        assert status == qc.QC_INVALID_ARGUMENT, f"{name}{arguments}: status {status}, expected QC_INVALID_ARGUMENT"
        assert name in said() and argument in said(), f"{name}{arguments}: the text is {said()!r}"
        assert all(a[0] == _UNTOUCHED for a in arguments if not isinstance(a, int) and a), f"{name} wrote an address"


def _devices(s: Session) -> None:
    memory = Memory(s)
    ffi, qc, kind = memory.library.ffi, memory.library.qc, memory.kind()
    place, found = ffi.new("uintptr_t *", _UNTOUCHED), ffi.new("int32_t *", 9)
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("memory_kind", (found,)),
        ("memory_allocate", (kind, 64, place)),
        ("memory_free", (kind, 0)),
        ("memory_prefetch", (memory.stream, kind, 0, 0, 0)),
    )
    for device in (-1, 10_000):
        for name, arguments in calls:
            status = memory.call(name, *arguments, device=device)
            assert status in (qc.QC_INVALID_ARGUMENT, qc.QC_NO_DEVICE), f"{name} on device {device}: status {status}"
            assert "device" in memory.library.last_error(), f"the text is {memory.library.last_error()!r}"
    assert (place[0], found[0]) == (_UNTOUCHED, 9), "a refused call has written"


def cases() -> Iterator[Case]:
    for level, name, clause, run in (
        ("L0", "memory-kinds", "QC-MEM-001", _kinds),
        ("L0", "memory-refusals", "QC-MEM-005", _refused),
        ("L0", "memory-devices", "QC-MEM-005", _devices),
        ("L1", "memory-of-both-sides", "QC-MEM-002", _each_kind(_both_sides)),
        ("L1", "memory-of-ops", "QC-MEM-002", _each_kind(_op_there)),
        ("L1", "memory-without-room", "QC-MEM-002", _no_room),
        ("L1", "memory-prefetched", "QC-MEM-003", _each_kind(_moved)),
        ("L1", "memory-given-back", "QC-MEM-004", _each_kind(_given_back)),
    ):
        yield Case(f"contract/{level}/{name}", "contract", level, (clause,), run)
