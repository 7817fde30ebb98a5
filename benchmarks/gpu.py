"""The ops on a GPU beside bitsandbytes, torch and the floor, measured in the same rounds.

Each call is timed in two ways: eager, host cost included, and replayed from a CUDA graph, which leaves the device's own
time. Every round walks over as many copies of the weight as do not fit the second-level cache, so that a product reads
its weight from memory, as it does in a model. The floor is a copy on this device of the op's own bytes, and for a
product also its multiplications at the rate of torch's bfloat16 product. A peer that is missing or fails is reported
with its error; the figures are written after every op, so that a run that is cut short leaves what it has.

    python benchmarks/gpu.py --library LIBRARY --json FILE [--size N] [--rounds N] [--seconds S] [--device cpu]

``--device cpu`` times the same program on a host: a rehearsal, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import qcore
from qcore import functional as F
from qcore.backend.registry import backend_for
from qcore.backend.weights import WeightInt4
from qcore.ops import int8
from qcore.ops.fourbit import prepare_gemm_4bit
from qcore.ops.prepared_int4 import prepare_int4

BF16 = torch.bfloat16
ROWS = (1, 4, 8, 16, 32, 64, 512, 2048)
SHAPES = ((2, 2), (7, 2), (2, 7))  # N and K in halves of --size: attention, up and down projections
Call = Callable[[], object]
Product = Callable[[Tensor], object]  # of activations with one weight


@dataclass(frozen=True)
class Benchmark:
    """One op: its calls by name ("qcore" first), each over the same inputs; the bytes that it has to move."""

    name: str
    calls: Mapping[str, Sequence[Call]]
    bytes: int
    products: int = 0
    errors: Mapping[str, str] = field(default_factory=dict)


class Timer:
    """Seconds a call on one device."""

    def __init__(self, device: torch.device, rounds: int, seconds: float) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds

    def _run(self, work: Call, repeats: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            return time.perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def eager(self, calls: Sequence[Call]) -> Call:
        def work() -> None:
            for call in calls:
                call()

        work()
        return work

    def graph(self, calls: Sequence[Call]) -> Call:
        """The same calls, captured; raises where a call cannot be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def compare(self, works: Mapping[str, tuple[Call, int]]) -> dict[str, dict[str, float]]:
        """Median seconds a call of each, with the quartiles; all of them in every round."""
        repeats = {}
        for name, (work, _) in works.items():
            once = max(self._run(work, 1), self._run(work, 1), 1e-7)
            repeats[name] = max(1, int(self.seconds / once))
        samples: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.rounds):
            for name, (work, count) in works.items():
                samples[name].append(self._run(work, repeats[name]) / repeats[name] / count)
        return {name: _spread(values) for name, values in samples.items()}


def _spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "lower": quarters[0], "upper": quarters[2]}


Made = TypeVar("Made")


def attempt(make: Callable[[], Sequence[Made]], errors: dict[str, str], name: str, *x: Tensor) -> Sequence[Made]:
    """A peer's calls, the first tried with ``x``; nothing and a note if it cannot be had."""
    try:
        calls = make()
        for call in calls[:1]:
            call(*x)
    except Exception as error:  # a peer may fail in any way
        errors[name] = f"{type(error).__name__}: {error}"
        return ()
    return calls


def copies(nbytes: int, device: torch.device) -> int:
    """How many weights of this size a cache cannot hold; few on a host."""
    return 2 if device.type != "cuda" else max(2, min(32, -(-400_000_000 // nbytes)))


def quantizers(n: int, device: torch.device) -> Iterator[Benchmark]:
    A = torch.randn(n, n, device=device, dtype=BF16)
    size = n * n
    for name, ours, theirs, nbytes in (
        (
            "quantize_blockwise bf16 block 256",
            lambda: F.quantize_blockwise(A, blocksize=256),
            lambda B: B.quantize_blockwise(A, blocksize=256),
            3 * size,
        ),
        (
            "quantize_4bit nf4 bf16 block 64",
            lambda: F.quantize_4bit(A, quant_type="nf4"),
            lambda B: B.quantize_4bit(A, quant_type="nf4"),
            5 * size // 2,
        ),
        (
            "int8_quantize_rows bf16",
            lambda: F.int8_vectorwise_quant(A),
            lambda B: B.int8_vectorwise_quant(A.half()),
            3 * size,
        ),
        (
            "int8_quantize_rows bf16 threshold 6",
            lambda: F.int8_vectorwise_quant(A, 6.0),
            lambda B: B.int8_vectorwise_quant(A.half(), 6.0),
            3 * size,
        ),
        ("int8_quantize_cols bf16", lambda: int8.int8_quantize_cols(A), None, 5 * size),
    ):
        errors: dict[str, str] = {}
        calls: dict[str, Sequence[Call]] = {"qcore": [ours]}
        if theirs is not None:
            calls["bitsandbytes"] = attempt(lambda theirs=theirs: [_bound(theirs, _peer())], errors, "bitsandbytes")
        yield Benchmark(name, calls, nbytes, errors=errors)


def dequantizers(n: int, device: torch.device) -> Iterator[Benchmark]:
    A = torch.randn(n, n, device=device, dtype=BF16)
    size = n * n
    codes, state = F.quantize_blockwise(A, blocksize=256)
    packed, state4 = F.quantize_4bit(A, quant_type="nf4")
    errors: dict[str, str] = {}
    ours: Sequence[Call] = [lambda: F.dequantize_blockwise(codes, state)]
    theirs = attempt(lambda: _their_dequantize_8bit(A), errors, "bitsandbytes")
    yield Benchmark("dequantize_blockwise bf16", {"qcore": ours, "bitsandbytes": theirs}, 3 * size, errors=errors)
    errors = {}
    ours = [lambda: F.dequantize_4bit(packed, state4)]
    theirs = attempt(lambda: _their_dequantize_4bit(A), errors, "bitsandbytes")
    yield Benchmark("dequantize_4bit nf4 bf16", {"qcore": ours, "bitsandbytes": theirs}, 5 * size // 2, errors=errors)


def products_4bit(size: int, device: torch.device) -> Iterator[Benchmark]:
    for halves_n, halves_k in SHAPES:
        yield from _products_of_shape(halves_n * size // 2, halves_k * size // 2, device)


def _products_of_shape(n: int, k: int, device: torch.device) -> Iterator[Benchmark]:
    count = copies(n * k // 2, device)
    plain = [torch.randn(n, k, device=device, dtype=BF16) for _ in range(copies(2 * n * k, device))]
    one = torch.zeros(1, k, device=device, dtype=BF16)
    errors: dict[str, str] = {}
    products: dict[str, Sequence[Product]] = {
        "qcore": [_prepared(plain[i % len(plain)]) for i in range(count)],
        "torch bf16": [partial(_linear, w) for w in plain],
        "qcore int4 group 128": [_prepared_int4(n, k, device) for _ in range(count)],
        "bitsandbytes": attempt(lambda: _their_weights(plain, count), errors, "bitsandbytes", one),
        "torch int4 group 128": attempt(lambda: _int4_weights(n, k, count, device), errors, "torch int4", one),
    }
    for m in ROWS:
        x = torch.randn(m, k, device=device, dtype=BF16)
        calls = {name: [partial(product, x) for product in several] for name, several in products.items()}
        nbytes = n * k // 2 + n * k // 16 + 2 * m * (n + k)
        yield Benchmark(f"gemm_4bit nf4 bf16 M={m} N={n} K={k}", calls, nbytes, m * n * k, errors)


def products_int8(n: int, device: torch.device) -> Iterator[Benchmark]:
    count = copies(n * n, device)
    weights = [F.int8_vectorwise_quant(torch.randn(n, n, device=device, dtype=BF16))[:2] for _ in range(count)]
    plain = torch.randn(n, n, device=device, dtype=BF16)
    for m in (1, 16, 64, 512, 2048):
        yield _product_int8(torch.randn(m, n, device=device, dtype=BF16), weights, plain)


def _product_int8(x: Tensor, weights: Sequence[tuple[Tensor, ...]], plain: Tensor) -> Benchmark:
    (m, k), n = x.shape, plain.shape[0]
    codes, rows, _ = F.int8_vectorwise_quant(x)
    errors: dict[str, str] = {}

    def theirs(w: Tensor, c: Tensor) -> Tensor:
        peer = _peer()
        return peer.int8_mm_dequant(peer.int8_linear_matmul(codes, w), rows, c)

    calls: dict[str, Sequence[Call]] = {
        "qcore": [lambda w=w, c=c: F.int8_scaled_mm(codes, w, rows, c, dtype=BF16) for w, c in weights],
        "torch _int_mm": attempt(
            lambda: [lambda w=w: torch._int_mm(codes, w.t()) for w, _ in weights], errors, "torch"
        ),
        "torch bf16": [partial(_linear, plain, x)],
        "bitsandbytes": attempt(lambda: [partial(theirs, *weight) for weight in weights], errors, "bitsandbytes"),
    }
    return Benchmark(f"int8_scaled_gemm bf16 M={m} N={n} K={k}", calls, n * k + m * (k + 2 * n), m * n * k, errors)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _peer() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional


def _bound(call: Callable[[Any], object], peer: Any) -> Call:
    return lambda: call(peer)


def _prepared(weight: Tensor) -> Any:
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    return prepare_gemm_4bit(state.weight(packed))


def _prepared_int4(n: int, k: int, device: torch.device) -> Product:
    packed, zeros = (torch.randint(0, 256, (n, columns), dtype=torch.uint8, device=device) for columns in (k // 2, 1))
    scales = torch.rand(n, -(-k // 128), device=device).to(BF16)
    weight = WeightInt4(packed, scales, (zeros % 16).expand(scales.shape).contiguous(), 128, (n, k))
    handle = prepare_int4(weight)
    return lambda x: handle.eager(x, None)


def _their_dequantize_8bit(A: Tensor) -> Sequence[Call]:
    codes, state = _peer().quantize_blockwise(A, blocksize=256)
    return [lambda: _peer().dequantize_blockwise(codes, state)]


def _their_dequantize_4bit(A: Tensor) -> Sequence[Call]:
    packed, state = _peer().quantize_4bit(A, quant_type="nf4", blocksize=64)
    return [lambda: _peer().dequantize_4bit(packed, state)]


def _their_weights(plain: Sequence[Tensor], count: int) -> Sequence[Product]:
    import bitsandbytes

    made = [_peer().quantize_4bit(plain[i % len(plain)], quant_type="nf4", blocksize=64) for i in range(count)]
    return [lambda x, p=packed, s=state: bitsandbytes.matmul_4bit(x, p.t(), s) for packed, state in made]


def _int4_weights(n: int, k: int, count: int, device: torch.device) -> Sequence[Product]:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    if device.type != "cuda":
        raise RuntimeError("torch's int4 product takes another layout on a host")
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // 128, n, 2, dtype=BF16, device=device)
    weights = [packed.clone() for _ in range(count)]
    return [lambda x, w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in weights]


FAMILIES: tuple[Callable[[int, torch.device], Iterator[Benchmark]], ...] = (
    products_4bit,
    quantizers,
    dequantizers,
    products_int8,
)


def copy_rate(timer: Timer, nbytes: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.randn(nbytes // 8, device=timer.device)
    target = torch.empty_like(source)
    timing = timer.compare({"copy": (timer.eager([lambda: target.copy_(source)]), 1)})["copy"]
    return 8 * source.numel() / timing["median"]


def product_rate(timer: Timer, n: int) -> float:
    """Multiply-adds a second of torch's square bfloat16 product."""
    a = torch.randn(n, n, device=timer.device, dtype=BF16)
    return n**3 / timer.compare({"product": (timer.eager([lambda: a @ a]), 1)})["product"]["median"]


def measure(benchmark: Benchmark, timer: Timer, rates: tuple[float, float]) -> dict[str, Any]:
    """Both timings of every call, the floor, and the ratios to it."""
    errors = dict(benchmark.errors)
    calls = {name: list(several) for name, several in benchmark.calls.items() if several}
    floor = max(benchmark.bytes / rates[0], benchmark.products / rates[1])
    result: dict[str, Any] = {"floor": floor, "bytes": benchmark.bytes, "products": benchmark.products}
    ways = {"eager": timer.eager} | ({"graph": timer.graph} if timer.device.type == "cuda" else {})
    for way, make in ways.items():
        works = {}
        for name, several in calls.items():
            try:
                works[name] = (make(several), len(several))
            except Exception as error:  # an op of a peer may not be capturable
                errors[f"{name}, {way}"] = f"{type(error).__name__}: {error}"
                if timer.device.type == "cuda":
                    torch.cuda.synchronize()
        timings = timer.compare(works)
        result[way] = timings
        if "qcore" in timings:
            ours = timings["qcore"]["median"]
            result[f"{way} ratios"] = {name: timing["median"] / ours for name, timing in timings.items()}
            result[f"{way} of floor"] = floor / ours
    return result | ({"errors": errors} if errors else {})


def machine(device: torch.device) -> dict[str, Any]:
    described = backend_for(device).describe(device)
    about: dict[str, Any] = {
        "device": described.device,
        "arch": described.arch,
        "driver": described.driver,
        "runtime": described.runtime,
        "library_sha256": described.library_sha256,
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"processors": properties.multi_processor_count, "memory": properties.total_memory}
    try:
        import bitsandbytes

        about["bitsandbytes"] = bitsandbytes.__version__
    except Exception as error:  # its import looks for libraries of its own
        about["bitsandbytes"] = f"{type(error).__name__}: {error}"
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, help="backend to measure: a name or the path of a library")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one call in one round")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further op is begun")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    timer = Timer(device, options.rounds, options.seconds)
    with torch.no_grad(), qcore.use_backend(f"{device.type}={options.library}"):
        rates = copy_rate(timer, 64 * options.size**2), product_rate(timer, 2 * options.size)
        results: dict[str, Any] = {}
        report = {"machine": machine(device), "copy": rates[0], "products": rates[1], "results": results}
        for family in FAMILIES:
            try:
                for benchmark in family(options.size, device):
                    if time.monotonic() > end:
                        report["cut short"] = f"before {benchmark.name}"
                        break
                    results[benchmark.name] = measured = measure(benchmark, timer, rates)
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
                    way = "graph" if "graph of floor" in measured else "eager"
                    print(f"{benchmark.name}: {measured.get(f'{way} of floor', 0):.2f} of the floor", flush=True)
            except Exception as error:  # the next family can still be measured
                report.setdefault("failed", {})[family.__name__] = f"{type(error).__name__}: {error}"
                options.json.write_text(json.dumps(report, indent=1) + "\n")
                print(f"{family.__name__}: {type(error).__name__}: {error}", flush=True)
    if not results:
        raise SystemExit("nothing could be measured")


if __name__ == "__main__":
    main()
