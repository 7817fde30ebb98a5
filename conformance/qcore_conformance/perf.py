"""How fast the ops are, beside what the machine's memory allows in the same run. No pass, no fail.

Each op is called on a square problem, directly on the backend and with outputs already allocated. Bytes are what the op
has to read and write once; the floor is the time that a copy and a read of as many bytes take here and now.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from qcore.backend import (
    OPS,
    Backend,
    get_backend,
)
from qcore.errors import QcoreError, Unsupported
from qcore_conformance.perf_workloads import workloads
from qcore_conformance.report.json_file import write_text

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """Median and spread of the repeats of one workload, and the floor of its bytes."""

    op: str
    label: str
    seconds: float
    fastest: float
    slowest: float
    repeats: int
    bytes_moved: int
    gb_per_s: float
    gop_per_s: float | None
    floor_seconds: float
    over_floor: float


@dataclass(frozen=True)
class Floor:
    """What the device's memory gives: bytes per second read, and read plus written by a copy."""

    read: float
    copy: float
    bytes: int

    def seconds(self, read: int, written: int) -> float:
        """Least time to move that many bytes: as much as is written is copied, the rest is read."""
        copied = min(read, written)
        return 2 * copied / self.copy + (max(read, written) - copied) / self.read


@dataclass(frozen=True)
class Perf:
    """A run of :func:`measure`."""

    backend: dict[str, Any]
    dtype: str
    size: int
    rows: int
    threads: int
    floor: Floor
    timings: list[Timing]
    unsupported: list[str]


class _Clock:
    """Times a call: until the device is done, median of as many repeats as fit."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.budget = seconds

    def __call__(self, call: Callable[[], object]) -> list[float]:
        call()  # first-call costs: pages, caches, lazy set-up
        times: list[float] = []
        end = time.perf_counter() + self.budget
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "xpu":
            torch.xpu.synchronize(self.device)


def measure_floor(device: torch.device, nbytes: int, seconds: float = 0.5) -> Floor:
    """Bytes per second of a read and of a copy of ``nbytes``, with torch's threads, on real data."""
    clock = _Clock(device, seconds)
    # Ones, not empty: pages that were never written are all the same zero page.
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    read = statistics.median(clock(source.sum))
    copy = statistics.median(clock(lambda: target.copy_(source)))
    return Floor(read=source.nbytes / read, copy=2 * source.nbytes / copy, bytes=source.nbytes)


def measure(
    backend: Backend, device: torch.device, dtype: str, size: int, rows: int, ops: Sequence[str], seconds: float
) -> Perf:
    """Time the ops of a backend; those that it leaves out are listed.

    Parameters
    ----------
    backend, device
        What is measured, and where its tensors live.
    dtype
        "f32", "f16" or "bf16".
    size, rows
        Tensors are ``size`` x ``size``; products have 1 and ``rows`` rows.
    ops
        Names of ops; all if empty.
    seconds
        Time for the repeats of one workload.
    """
    timings, unsupported = [], []
    floor = measure_floor(device, max(4 * size * size, 1 << 26), seconds)
    clock = _Clock(device, seconds)
    for work in workloads(backend, device, DTYPES[dtype], size, rows):
        if ops and work.op not in ops:
            continue
        try:
            times = clock(work.call)
        except Unsupported:
            unsupported.append(f"{work.op} {work.label}".strip())
            continue
        median, moved = statistics.median(times), work.bytes_read + work.bytes_written
        least = floor.seconds(work.bytes_read, work.bytes_written)
        timings.append(
            Timing(
                work.op,
                work.label,
                median,
                min(times),
                max(times),
                len(times),
                moved,
                moved / median / 1e9,
                work.operations / median / 1e9 if work.operations else None,
                least,
                median / least,
            )
        )
    described = asdict(backend.describe(device))
    return Perf(described, dtype, size, rows, torch.get_num_threads(), floor, timings, unsupported)


def to_table(perf: Perf) -> str:
    """Render for a terminal."""
    said, floor = perf.backend, perf.floor
    lines = [
        f"backend {said['name']}: {said['device']} ({said['arch']})",
        f"{perf.dtype}, {perf.size} x {perf.size}, {perf.threads} threads",
        f"floor on {floor.bytes / 1e6:.0f} MB: read {floor.read / 1e9:.1f} GB/s, copy {floor.copy / 1e9:.1f} GB/s",
        f"{'op':22}{'':14}{'median ms':>11}{'min':>10}{'max':>10}{'MB':>9}{'GB/s':>9}{'Gop/s':>9}{'x floor':>9}",
    ]
    for t in perf.timings:
        gops = "" if t.gop_per_s is None else f"{t.gop_per_s:.1f}"
        lines.append(
            f"{t.op:22}{t.label:14}{t.seconds * 1e3:11.3f}{t.fastest * 1e3:10.3f}{t.slowest * 1e3:10.3f}"
            f"{t.bytes_moved / 1e6:9.1f}{t.gb_per_s:9.2f}{gops:>9}{t.over_floor:9.1f}"
        )
    lines += [f"unsupported: {what}" for what in perf.unsupported]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--backend", required=True, help="Name, path or module:Class of the backend.")
@click.option("--device", help="torch device, such as cuda:1 (default: the backend's own).")
@click.option("--op", "ops", multiple=True, type=click.Choice(tuple(OPS)), help="Only this op (repeatable).")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="bf16", show_default=True)
@click.option("--size", type=click.IntRange(64, 65536), default=2048, show_default=True, help="Rows and columns.")
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Rows of the larger products.")
@click.option("--seconds", type=click.FloatRange(0.0), default=0.5, show_default=True, help="Repeats, per workload.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
def perf(
    backend: str,
    device: str | None,
    ops: tuple[str, ...],
    dtype: str,
    size: int,
    rows: int,
    seconds: float,
    path: Path | None,
) -> None:
    """Time a backend's ops beside the memory floor of the same run. No pass, no fail."""
    from qcore_conformance.session import default_device

    try:
        loaded = get_backend(backend)
        place = torch.device(device) if device is not None else default_device(loaded)
        result = measure(loaded, place, dtype, size, rows, ops, seconds)
        if path is not None:
            write_text(path, json.dumps({"schema": 1, **asdict(result)}, indent=1, default=str) + "\n")
    except QcoreError as error:
        click.echo(f"qcore-conformance: {error}", err=True)
        sys.exit(2)
    click.echo(to_table(result), nl=False)
    if not result.timings:
        sys.exit(2)
