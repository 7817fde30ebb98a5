"""The calls that ``qcore-conformance perf`` times, one or two of each op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcore import codebooks
from qcore.backend import (
    OPTIMIZER_BLOCK,
    Backend,
    OptimizerRule,
    OptimizerTensors,
    Weight4bit,
    Weight8bit,
    WeightInt4,
)

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
