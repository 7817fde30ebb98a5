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

from qcore import codebooks
from qcore.backend import (
    OPS,
    OPTIMIZER_BLOCK,
    Backend,
    OptimizerRule,
    OptimizerTensors,
    Weight4bit,
    Weight8bit,
    WeightInt4,
    get_backend,
)
from qcore.errors import QcoreError, Unsupported
from qcore_conformance.report.json_file import write_text

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKSIZE = 64


@dataclass(frozen=True)
class Workload:
    """One call: what it is, what it has to move and to compute."""

    op: str
    label: str
    call: Callable[[], object]
    bytes_read: int
    bytes_written: int
    operations: int = 0  # floating-point or integer operations of a product; 0 for the rest


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


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def workloads(backend: Backend, device: torch.device, dtype: torch.dtype, size: int, rows: int) -> list[Workload]:
    """The calls that are timed: ``size`` x ``size`` tensors, products with 1 and with ``rows`` rows.

    Inputs come from a fixed seed; packed codes and statistics are made with torch, not by the backend.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    def integers(low: int, high: int, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(kind).to(device)

    def uniform(count: int) -> torch.Tensor:
        return (torch.rand(count, generator=generator) + 0.5).to(device)

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        # Touched once here, so that no repeat pays for fresh pages.
        return torch.zeros(shape, dtype=kind, device=device)

    n, blocks = size * size, -(-size * size // BLOCKSIZE)
    u8, i8, i32, f32 = torch.uint8, torch.int8, torch.int32, torch.float32
    a, code = normal(size, size), torch.tensor(codebooks.DYNAMIC, dtype=f32, device=device)
    codes, absmax, out = empty(n, kind=u8), empty(blocks, kind=f32), empty(size, size)
    bytes_, scales = integers(0, 256, (n,), u8), uniform(blocks)
    packed, half = integers(0, 256, (n // 2,), u8), empty(n // 2, kind=u8)
    found: list[Workload] = []

    def add(
        op: str,
        label: str,
        call: Callable[[], object],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        operations: int = 0,
    ) -> None:
        found.append(Workload(op, label, call, _nbytes(*reads), _nbytes(*writes), operations))

    b = backend
    add(
        "quantize_blockwise",
        "dynamic",
        lambda: b.quantize_blockwise(a, code, BLOCKSIZE, absmax=absmax, out=codes),
        [a],
        [codes, absmax],
    )
    add(
        "dequantize_blockwise",
        "dynamic",
        lambda: b.dequantize_blockwise(bytes_, scales, code, BLOCKSIZE, out=out.view(-1)),
        [bytes_, scales],
        [out],
    )
    for quant_type in ("nf4", "fp4"):
        weight = Weight4bit(packed, scales, quant_type, BLOCKSIZE, (size, size))
        add(
            "quantize_4bit",
            quant_type,
            lambda kind=quant_type: b.quantize_4bit(a, kind, BLOCKSIZE, absmax=absmax, out=half),
            [a],
            [half, absmax],
        )
        add(
            "dequantize_4bit",
            quant_type,
            lambda w=weight: b.dequantize_4bit(w, out=out),
            [packed, scales],
            [out],
        )
    nested_codes, nested, offset = empty(blocks, kind=u8), empty(-(-blocks // 256), kind=f32), empty(1, kind=f32)
    add(
        "quantize_absmax",
        "256",
        lambda: b.quantize_absmax(scales, code, 256, out=nested_codes, nested_absmax=nested, offset=offset),
        [scales],
        [nested_codes, nested],
    )
    add(
        "dequantize_absmax",
        "256",
        lambda: b.dequantize_absmax(bytes_[:blocks], nested, code, offset, 256, out=absmax),
        [bytes_[:blocks], nested],
        [absmax],
    )
    weight = Weight4bit(packed, scales, "nf4", BLOCKSIZE, (size, size))
    for m in dict.fromkeys((1, rows)):
        x, y = normal(m, size), empty(m, size)
        add(
            "gemm_4bit",
            f"nf4 M={m}",
            # Prepared in the first, untimed call: what a layer does once, at load.
            _prepared(b.prepare_gemm_4bit, weight, x, y),
            [packed, scales, x],
            [y],
            2 * m * n,
        )
        groups = WeightInt4(packed.view(size, -1), scales.view(size, -1).half(), None, BLOCKSIZE, (size, size))
        add(
            "gemm_int4",
            f"M={m}",
            _prepared(b.prepare_gemm_int4, groups, x, y),
            [packed, groups.scales, x],
            [y],
            2 * m * n,
        )
    y, x = normal(rows, size), empty(rows, size)
    add(
        "gemm_4bit_transposed",
        f"nf4 M={rows}",
        lambda y=y, x=x: b.gemm_4bit_transposed(y, weight, out=x),
        [packed, scales, y],
        [x],
        2 * rows * n,
    )
    q, stats, columns = empty(size, size, kind=i8), empty(size, kind=f32), empty(size, kind=u8)
    add(
        "int8_quantize_rows",
        "threshold 6",
        lambda: b.int8_quantize_rows(a, 6.0, out=q, row_stats=stats, outlier_cols=columns),
        [a],
        [q, stats, columns],
    )
    add(
        "int8_quantize_cols",
        "threshold 0",
        lambda: b.int8_quantize_cols(a, 0.0, out=q, col_stats=stats),
        [a],
        [q, stats],
    )
    w8, ones = integers(-127, 128, (size, size), i8), uniform(size)
    for m in dict.fromkeys((1, rows)):
        x8, c, y, row_stats = integers(-127, 128, (m, size), i8), empty(m, size, kind=i32), empty(m, size), uniform(m)
        add("int8_gemm", f"M={m}", lambda x=x8, c=c: b.int8_gemm(x, w8, out=c), [x8, w8], [c], 2 * m * n)
        add(
            "int8_scaled_gemm",
            f"M={m}",
            lambda x=x8, r=row_stats, y=y: b.int8_scaled_gemm(x, w8, r, ones, None, out=y),
            [x8, w8],
            [y],
            2 * m * n,
        )
        x = a[:m]
        add(
            "int8_linear",
            f"M={m}, threshold 6",
            lambda x=x, y=y: b.int8_linear(x, Weight8bit(w8, ones), 6.0, None, out=y, outliers=columns),
            [x, w8],
            [y],
            2 * m * n,
        )
    y, x = normal(rows, size), empty(rows, size)
    add(
        "int8_linear_transposed",
        f"M={rows}",
        lambda y=y, x=x: b.int8_linear_transposed(y, Weight8bit(w8, ones), out=x),
        [y, w8],
        [x],
        2 * rows * n,
    )
    c = integers(-(2**20), 2**20, (size, size), i32)
    add(
        "int8_dequantize_gemm",
        "",
        lambda: b.int8_dequantize_gemm(c, ones, ones, None, out=out),
        [c, ones, ones],
        [out],
    )
    add("int8_dequantize_rows", "", lambda: b.int8_dequantize_rows(w8, ones, out=out), [w8, ones], [out])
    rule = OptimizerRule("adam", 8, -1e-3, eps=1e-8, beta1=0.9, gain1=0.1, beta2=0.999, gain2=0.001)
    param, grad, m, v = normal(n), normal(n), integers(0, 256, (n,), u8), integers(0, 256, (n,), u8)
    maxima = [uniform(-(-n // OPTIMIZER_BLOCK)) for _ in range(2)]
    tensors = OptimizerTensors([param], [grad], [m], [v], maxima[:1], maxima[1:])
    changed = [param, m, v, *maxima]
    add("optimizer_step", "adam, 8 bits", lambda: b.optimizer_step(rule, tensors), [grad, *changed], changed)
    return found


def _prepared(prepare: Callable[[Any], Any], weight: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    handles: list[Any] = []

    def call() -> None:
        if not handles:
            handles.append(prepare(weight))
        handles[0](x, None, y)

    return call


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
    return Floor(read=_nbytes(source) / read, copy=2 * _nbytes(source) / copy, bytes=_nbytes(source))


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
