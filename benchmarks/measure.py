"""How the benchmarks measure: side by side, in rounds, medians; and on what."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from qcore.backend.registry import backend_for

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over rounds, and the median of each round's ratio to the first call."""

    median: float
    ratio: float
    rounds: int


def side_by_side(
    calls: Mapping[str, Call], rounds: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time every call once a round, so that all of them see the same state of the machine.

    Parameters
    ----------
    calls : mapping of str to callable
        The first one is what the others are compared with.
    rounds : int
    seconds : float
        What one call is repeated for in one round, at least once.
    clock : callable
        ``time.thread_time`` for work on one thread that other processes should not disturb.
    """
    counts = {}
    for name, call in calls.items():
        call()  # first calls allocate, prepare and compile
        counts[name] = max(1, int(seconds / max(_time(call, 1, clock), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_time(call, counts[name], clock))
    first = next(iter(samples.values()))
    return {
        name: Timing(
            statistics.median(times),
            statistics.median(mine / reference for mine, reference in zip(times, first, strict=True)),
            rounds,
        )
        for name, times in samples.items()
    }


def _time(call: Call, count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    description = backend_for("cpu").describe(torch.device("cpu"))
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": _version("bitsandbytes"),
        "qcore": _version("qcore-quant"),
        "backend": description.name,
        "backend_arch": description.arch,
        "backend_sha256": description.library_sha256,
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def require_native(allowed: bool) -> None:
    """Stop if CPU tensors are served by the NumPy reference: its times say nothing."""
    name = backend_for("cpu").name
    if name == "cpu_reference" and not allowed:
        raise SystemExit(
            "CPU tensors are served by the NumPy reference, whose times say nothing about qcore; install the native "
            "backend (pip install ./backends/cpu), or pass --allow-reference to measure the reference itself"
        )


def write_json(path: Path, results: object) -> None:
    """The figures and the machine, as JSON."""
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2, default=asdict) + "\n")
