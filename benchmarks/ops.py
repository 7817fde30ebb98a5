"""Every op at 4096 x 4096 beside bitsandbytes, torch and the floor, all measured in the same rounds.

The floor is what the machine takes to do the op's traffic and nothing else, measured on buffers of the op's own sizes:
a sum over what is read, a fill of what is written; for a product also its multiplications at the rate of a large
matrix product of torch. Peers run at their best: bitsandbytes' 4-bit product through its module in evaluation mode,
which repacks the weight for its CPU kernel; torch with the weight in the activations' dtype.

    python benchmarks/ops.py [--quick] [--ops REGEX] [--size N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as B
import torch
from measure import Call, Timing, machine, require_native, side_by_side, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qcore import functional as F
from qcore.functional.codemaps import dynamic_code
from qcore.ops import int8
from qcore.ops.fourbit import dequantize_absmax, prepare_gemm_4bit, quantize_absmax

F32, BF16 = torch.float32, torch.bfloat16
ROWS = (1, 64, 512)


@dataclass(frozen=True)
class Benchmark:
    """One op: what to call, what it has to read and write, and how many multiplications it is."""

    name: str
    calls: dict[str, Call]  # "qcore" first
    read: int  # bytes
    written: int
    products: int = 0  # multiply-adds
    dtype: torch.dtype = F32  # of the multiplications


@cache
def _memory(size: int) -> Tensor:
    # Real data: untouched pages of torch.empty are all one page of zeros.
    return torch.randn(max(size // 4, 1))


def traffic(read: int, written: int) -> Call:
    """Reads and writes that many bytes, as fast as torch can."""
    source, target = _memory(read), _memory(written).clone()

    def run() -> None:
        source.sum()
        target.fill_(1.0)

    return run


def products_per_second(dtype: torch.dtype) -> float:
    """Multiply-adds of a large square product of torch, in int8 for integer ops."""
    n = 2048
    if dtype == torch.int8:
        a = torch.randint(-127, 128, (n, n), dtype=torch.int8)
        timing = side_by_side({"product": lambda: torch._int_mm(a, a)}, rounds=5, seconds=0.2)["product"]
    else:
        x = torch.randn(n, n).to(dtype)
        timing = side_by_side({"product": lambda: x @ x}, rounds=5, seconds=0.2)["product"]
    return n**3 / timing.median


def blockwise(n: int) -> Iterator[Benchmark]:
    for dtype in (F32, BF16):
        A, label, size = torch.randn(n, n).to(dtype), str(dtype).removeprefix("torch."), dtype.itemsize
        codes, state = F.quantize_blockwise(A, blocksize=256)
        their_codes, their_state = B.quantize_blockwise(A, blocksize=256)
        yield Benchmark(
            f"quantize_blockwise {label}",
            {
                "qcore": lambda A=A: F.quantize_blockwise(A, blocksize=256),
                "bitsandbytes": lambda A=A: B.quantize_blockwise(A, blocksize=256),
            },
            read=n * n * size,
            written=n * n,
        )
        yield Benchmark(
            f"dequantize_blockwise {label}",
            {
                "qcore": lambda c=codes, s=state: F.dequantize_blockwise(c, s),
                "bitsandbytes": lambda c=their_codes, s=their_state: B.dequantize_blockwise(c, s),
            },
            read=n * n,
            written=n * n * size,
        )


def fourbit(n: int) -> Iterator[Benchmark]:
    for quant_type in ("nf4", "fp4"):
        for dtype in (F32, BF16):
            A, label, size = torch.randn(n, n).to(dtype), str(dtype).removeprefix("torch."), dtype.itemsize
            packed, state = F.quantize_4bit(A, quant_type=quant_type)
            their_packed, their_state = B.quantize_4bit(A, quant_type=quant_type)
            yield Benchmark(
                f"quantize_4bit {quant_type} {label}",
                {
                    "qcore": lambda A=A, q=quant_type: F.quantize_4bit(A, quant_type=q),
                    "bitsandbytes": lambda A=A, q=quant_type: B.quantize_4bit(A, quant_type=q),
                },
                read=n * n * size,
                written=n * n // 2 + n * n // 16,
            )
            yield Benchmark(
                f"dequantize_4bit {quant_type} {label}",
                {
                    "qcore": lambda p=packed, s=state: F.dequantize_4bit(p, s),
                    "bitsandbytes": lambda p=their_packed, s=their_state: B.dequantize_4bit(p, s),
                },
                read=n * n // 2 + n * n // 16,
                written=n * n * size,
            )


def nested(n: int) -> Iterator[Benchmark]:
    absmax = torch.rand(n * n // 64) + 0.5
    offset = absmax.mean()
    code = dynamic_code(absmax.device)
    mine = quantize_absmax(absmax, code, 256)
    their_codes, their_state = B.quantize_blockwise(absmax - offset, blocksize=256)
    yield Benchmark(
        "quantize_absmax",
        {
            "qcore": lambda: quantize_absmax(absmax, code, 256),
            "bitsandbytes": lambda: B.quantize_blockwise(absmax - absmax.mean(), blocksize=256),
        },
        read=absmax.numel() * 4,
        written=absmax.numel(),
    )
    yield Benchmark(
        "dequantize_absmax",
        {
            "qcore": lambda: dequantize_absmax(mine[0], mine[1], code, mine[2], 256),
            "bitsandbytes": lambda: B.dequantize_blockwise(their_codes, their_state) + offset,
        },
        read=absmax.numel(),
        written=absmax.numel() * 4,
    )


def gemm_4bit(n: int) -> Iterator[Benchmark]:
    for dtype in (BF16, F32):
        label, size = str(dtype).removeprefix("torch."), dtype.itemsize
        plain = torch.nn.Linear(n, n, bias=False).to(dtype)
        theirs = bitsandbytes.nn.Linear4bit(n, n, bias=False, compute_dtype=dtype, quant_type="nf4")
        theirs.load_state_dict({"weight": plain.weight.data.float()})
        theirs = theirs.to("cpu").eval()
        packed, state = F.quantize_4bit(plain.weight.data, quant_type="nf4")
        handle = prepare_gemm_4bit(state.weight(packed))
        for m in ROWS:
            x = torch.randn(m, n).to(dtype)
            yield Benchmark(
                f"gemm_4bit nf4 {label} M={m}",
                {
                    "qcore": lambda x=x, h=handle: h(x),
                    "bitsandbytes": lambda x=x, t=theirs: t(x),
                    "torch": lambda x=x, p=plain: p(x),
                },
                read=n * n // 2 + n * n // 16 + m * n * size,
                written=m * n * size,
                products=m * n * n,
                dtype=dtype,
            )


def int8_ops(n: int) -> Iterator[Benchmark]:
    A = torch.randn(n, n)
    for threshold in (0.0, 6.0):
        yield Benchmark(
            f"int8_quantize_rows threshold={threshold}",
            {
                "qcore": lambda t=threshold: F.int8_vectorwise_quant(A, t),
                "bitsandbytes": lambda t=threshold: B.int8_vectorwise_quant(A, t),
            },
            read=n * n * 4,
            written=n * n,
        )
    yield Benchmark("int8_quantize_cols", {"qcore": lambda: int8.int8_quantize_cols(A)}, read=n * n * 4, written=n * n)
    W, cols, _ = F.int8_vectorwise_quant(torch.randn(n, n))
    scaled_mm = torch.ops.bitsandbytes.int8_scaled_mm.default
    rows_of = {m: F.int8_vectorwise_quant(torch.randn(m, n)) for m in ROWS}
    for m, (codes, rows, _) in rows_of.items():
        yield Benchmark(
            f"int8_gemm M={m}",
            {
                "qcore": lambda c=codes: F.int8_linear_matmul(c, W),
                "bitsandbytes": lambda c=codes: B.int8_linear_matmul(c, W),
                "torch": lambda c=codes: torch._int_mm(c, W.t()),
            },
            read=n * n + m * n,
            written=m * n * 4,
            products=m * n * n,
            dtype=torch.int8,
        )
        yield Benchmark(
            f"int8_scaled_gemm bfloat16 M={m}",
            {
                "qcore": lambda c=codes, r=rows: F.int8_scaled_mm(c, W, r, cols, dtype=BF16),
                "bitsandbytes": lambda c=codes, r=rows: scaled_mm(c, W, r, cols, dtype=BF16),
            },
            read=n * n + m * n,
            written=m * n * 2,
            products=m * n * n,
            dtype=torch.int8,
        )
    product = torch.randint(-(2**20), 2**20, (n, n), dtype=torch.int32)
    stats = torch.rand(n)
    yield Benchmark(
        "int8_dequantize_gemm float16",
        {
            "qcore": lambda: F.int8_mm_dequant(product, stats, stats),
            "bitsandbytes": lambda: B.int8_mm_dequant(product, stats, stats),
        },
        read=n * n * 4,
        written=n * n * 2,
    )
    yield Benchmark(
        "int8_dequantize_rows float32",
        {
            "qcore": lambda: F.int8_vectorwise_dequant(W, cols),
            "bitsandbytes": lambda: B.int8_vectorwise_dequant(W, cols),
        },
        read=n * n,
        written=n * n * 4,
    )


FAMILIES: tuple[Callable[[int], Iterator[Benchmark]], ...] = (blockwise, fourbit, nested, gemm_4bit, int8_ops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (default: 4096)")
    parser.add_argument("--ops", default="", help="only those whose name matches this regular expression")
    parser.add_argument("--threads", type=int, help="threads of every library (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--allow-reference", action="store_true", help="measure the NumPy reference")
    options = parser.parse_args()
    require_native(options.allow_reference)
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds, seconds = (5, 0.02) if options.quick else (21, 0.1)
    about, console, results = machine(), Console(width=130), {}
    title = f"{options.size} x {options.size}, {about['processor']}, {about['threads']} threads, {rounds} rounds"
    table = Table(title=title)
    for heading in ("op", "qcore ms", "floor ms", "of floor", "bitsandbytes ms", "faster by", "torch ms"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "op" else "right")
    rates: dict[torch.dtype, float] = {}
    with torch.no_grad():
        for family in FAMILIES:
            for benchmark in family(options.size):
                if not re.search(options.ops, benchmark.name):
                    continue
                calls = {**benchmark.calls, "traffic": traffic(benchmark.read, benchmark.written)}
                timings = side_by_side(calls, rounds, seconds)
                if benchmark.products and benchmark.dtype not in rates:
                    rates[benchmark.dtype] = products_per_second(benchmark.dtype)
                arithmetic = benchmark.products / rates[benchmark.dtype] if benchmark.products else 0.0
                floor = max(timings["traffic"].median, arithmetic)
                results[benchmark.name] = {"floor": floor, "arithmetic": arithmetic, "timings": timings}
                table.add_row(benchmark.name, *_cells(timings, floor))
                console.print(f"measured {benchmark.name}", style="dim")
    if not results:
        raise SystemExit(f"no op matches {options.ops!r}")
    console.print(table)
    if options.json:
        write_json(options.json, results)


def _cells(timings: dict[str, Timing], floor: float) -> list[str]:
    def milliseconds(name: str) -> str:
        return f"{timings[name].median * 1e3:.3f}" if name in timings else "-"

    ratio = f"{timings['bitsandbytes'].ratio:.1f}x" if "bitsandbytes" in timings else "-"
    of_floor = f"{timings['qcore'].median / floor:.1f}x"
    return [
        milliseconds("qcore"),
        f"{floor * 1e3:.3f}",
        of_floor,
        milliseconds("bitsandbytes"),
        ratio,
        milliseconds("torch"),
    ]


if __name__ == "__main__":
    main()
