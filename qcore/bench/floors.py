"""What this machine can do at most: read, write, copy and multiply, on the threads that the ops use.

The loops are those of ``libqcore_cpu_probe.so``, which is built beside the native backend: they read and write with the
widest loads and stores, and multiply in the best matrix unit out of registers. Without it torch's own kernels stand in
(``sum``, ``fill_``, ``copy_``, ``mm``), and every report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from cffi import FFI
from torch import Tensor

from qcore.backend.registry import backend_for
from qcore.bench.measure import Call, Effort, Samples, side_by_side

UNITS: Mapping[str, int] = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3}
# Less than this is measured on this much and scaled: the call itself would count otherwise.
_LEAST_BYTES = 1 << 20
_LINE = 64
_LARGE_BYTES = 256 << 20
_DECLARATIONS = """
uint64_t qcp_read(int64_t threads, const void *data, int64_t bytes);
void qcp_write(int64_t threads, void *to, int64_t bytes, int32_t past_caches);
void qcp_copy(int64_t threads, void *to, const void *from, int64_t bytes, int32_t past_caches);
uint64_t qcp_update(int64_t threads, const void *data, int64_t bytes, void *updated, int64_t updated_bytes);
int64_t qcp_multiply(int64_t threads, int32_t dtype, int64_t steps);
const char *qcp_unit(int32_t dtype);
"""


class Machine:
    """The loops on ``threads`` threads.

    Attributes
    ----------
    source : str
        Path of the probe library, or ``"torch"``.
    threads : int
    """

    def __init__(self, threads: int, largest: int) -> None:
        self.threads = threads
        self._ffi = FFI()
        self._ffi.cdef(_DECLARATIONS)
        path = Path(backend_for("cpu").describe(torch.device("cpu")).library).parent / "libqcore_cpu_probe.so"
        self._probe: Any = self._ffi.dlopen(str(path)) if path.is_file() else None
        self.source = str(path) if self._probe is not None else "torch"
        self._source, self._target = _memory(largest), _memory(largest)
        self._steps: dict[str, int] = {}
        self._past_caches: dict[tuple[str, int], int] = {}

    def unit(self, dtype: str) -> str:
        """Name of the unit that multiplies factors of ``dtype``."""
        if self._probe is None:
            return "torch matrix product"
        return str(self._ffi.string(self._probe.qcp_unit(UNITS[dtype])).decode())

    def loops(self, read: int, written: int, unit: str | None, in_place: bool = False) -> dict[str, tuple[Call, float]]:
        """The loops that make up a workload's floor: (call, what its time has to be multiplied with).

        ``in_place``: what is written has been read from the same place.
        """
        if in_place:
            return {"update": self.update(read - written, written)}
        found: dict[str, tuple[Call, float]] = {}
        for name, size in (("read", read), ("write", written), ("copy", min(read, written))):
            if size > 0:
                # More than the buffers hold takes as many times longer.
                held = min(self._source.numel(), self._target.numel())
                measured = min(max(size, _LEAST_BYTES), held) // _LINE * _LINE
                found[name] = self._traffic(name, measured), size / measured
        if unit is not None:
            found["multiply"] = self._multiply(unit), 1.0
        return found

    def update(self, read: int, changed: int) -> tuple[Call, float]:
        """One pass over ``changed`` bytes, each changed in place, and over ``read`` more that are only read."""
        held = min(self._source.numel(), self._target.numel())
        part = min(1.0, held / max(read, changed))
        sizes = [int(size * part) // _LINE * _LINE for size in (read, changed)]
        source, target, probe, threads = self._source[: sizes[0]], self._target[: sizes[1]], self._probe, self.threads
        if probe is None:
            words, into = source.view(torch.float32), target.view(torch.float32)
            return lambda: (into.neg_(), words.sum()), 1 / part
        a, b = (self._ffi.cast("void *", tensor.data_ptr()) for tensor in (source, target))
        return lambda: probe.qcp_update(threads, a, sizes[0], b, sizes[1]), 1 / part

    def operations(self, unit: str) -> int:
        """Multiplications and additions of one call of the ``multiply`` loop."""
        if self._probe is None:
            return 2 * 1024**3
        return 2 * int(self._probe.qcp_multiply(self.threads, UNITS[unit], self._steps[unit]))

    def rates(self, effort: Effort) -> dict[str, float]:
        """Bytes a second of large reads, writes and copies, and operations a second in each unit."""
        size = min(_LARGE_BYTES, self._source.numel())
        loops = {name: call for name, (call, _) in self.loops(size, size, None).items()}
        small = min(8 << 20, size)
        loops["read_8MB"] = self._traffic("read", small)
        loops |= {unit: self._multiply(unit) for unit in UNITS}
        samples, _ = side_by_side(loops, effort)
        work = {name: 2 * size if name == "copy" else size for name in ("read", "write", "copy")}
        work |= {"read_8MB": small} | {unit: self.operations(unit) for unit in UNITS}
        return {name: work[name] / sample.median for name, sample in samples.items()}

    def _traffic(self, name: str, size: int) -> Call:
        source, target, probe, threads = self._source[:size], self._target[:size], self._probe, self.threads
        if probe is None:
            words, into = source.view(torch.float32), target.view(torch.float32)
            torch_loops: dict[str, Call] = {
                "read": words.sum,
                "write": lambda: into.fill_(1.0),
                "copy": lambda: into.copy_(words),
            }
            return torch_loops[name]
        a, b = (self._ffi.cast("void *", tensor.data_ptr()) for tensor in (source, target))
        if name == "read":
            return lambda: probe.qcp_read(threads, a, size)
        store = partial(probe.qcp_write, threads, b, size)
        if name == "copy":
            store = partial(probe.qcp_copy, threads, b, a, size)
        loops: tuple[Call, Call] = (partial(store, 0), partial(store, 1))
        key = name, size
        if key not in self._past_caches:  # whether stores past the caches are faster is a matter of size
            trial, _ = side_by_side({"in": loops[0], "past": loops[1]}, Effort(5, 0.02, 0.001))
            self._past_caches[key] = int(trial["past"].median < trial["in"].median)
        return loops[self._past_caches[key]]

    def _multiply(self, unit: str) -> Call:
        if self._probe is None:
            return _product(unit)
        probe, threads, code = self._probe, self.threads, UNITS[unit]
        if unit not in self._steps:  # about a millisecond
            trial, _ = side_by_side({"": lambda: probe.qcp_multiply(threads, code, 1000)}, Effort(5, 0.02, 0.002))
            self._steps[unit] = max(1000, int(1000 * 0.001 / trial[""].median))
        steps = self._steps[unit]
        return lambda: probe.qcp_multiply(threads, code, steps)


def _memory(size: int) -> Tensor:
    # Written once: untouched pages of torch.empty are all one page of zeros.
    return torch.ones(max(size, _LEAST_BYTES) // _LINE * _LINE + _LINE, dtype=torch.uint8)


@cache
def _product(unit: str) -> Call:
    n = 1024
    if unit == "int8":
        codes = torch.randint(-127, 128, (n, n), dtype=torch.int8)
        return lambda: torch._int_mm(codes, codes)
    x = torch.randn(n, n).to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[unit])
    return lambda: x @ x


def floor(parts: Mapping[str, Samples], scales: Mapping[str, float], read: int, written: int) -> Samples | None:
    """Least time for the traffic and the multiplications of a workload, round by round.

    Reading all and then writing all, or copying as much as goes both ways and moving the rest, whichever is less; the
    multiplications take place meanwhile. What is changed in place has one loop of its own, "update".
    """
    rounds = set.intersection(*(set(part.by_round) for part in parts.values())) if parts else set()
    least = {}
    for index in sorted(rounds):
        seconds = {name: part.by_round[index] * scales[name] for name, part in parts.items()}
        if "update" in seconds:
            least[index] = seconds["update"]
            continue
        into, out = seconds.get("read", 0.0), seconds.get("write", 0.0)
        both = min(read, written)
        traffic = into + out
        if both > 0:
            rest = into * (read - both) / read + out * (written - both) / written
            traffic = min(traffic, seconds["copy"] + rest)
        least[index] = max(traffic, seconds.get("multiply", 0.0))
    return Samples(least, 1) if least else None
