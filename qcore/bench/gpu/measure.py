"""The workloads of ``model`` on the GPU that is here, replayed from a graph: what is timed is the device's own time.

Each call has inputs of its own among as many copies as the last cache cannot hold, so that a weight comes from memory,
as it does in a model. Where a call cannot be captured (an optimizer step that reads its arguments from the host), it is
timed as it stands, and the result says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import qcore.optim
from qcore import functional as F
from qcore.backend.weights import WeightInt4
from qcore.bench.gpu.model import BLOCK_8BIT, GROUP_INT4, Work
from qcore.bench.measure import Call
from qcore.ops import int8
from qcore.ops.fourbit import gemm_4bit_transposed, prepare_gemm_4bit
from qcore.ops.int8_linear import int8_linear_transposed
from qcore.ops.prepared_int4 import prepare_int4

BF16 = torch.bfloat16
_BEYOND_CACHES = 600_000_000  # bytes: more than twice the largest last cache
_MOST_COPIES = 64
_SLICE = 0.005  # seconds of one sample


@dataclass(frozen=True)
class Measured:
    """Median seconds of a call and half the distance of the quartiles; ``captured``: from a graph."""

    seconds: float
    spread: float
    captured: bool


def measure(work: Work, device: torch.device, rounds: int = 9) -> Measured:
    """Time one workload on ``device``, a CUDA or HIP device of torch."""
    touched = max(1, work.read + work.written)
    count = max(2, min(_MOST_COPIES, -(-_BEYOND_CACHES // touched)))
    with torch.cuda.device(device), torch.no_grad():
        calls = [build(work, device) for _ in range(count)]
        replay, captured = _replay(calls)
        once = max(_seconds(replay, 1), _seconds(replay, 1), 1e-7)
        repeats = max(1, int(_SLICE / once))
        samples = sorted(_seconds(replay, repeats) / repeats / count for _ in range(max(3, rounds)))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Measured(statistics.median(samples), (high - low) / 2, captured)


def _replay(calls: list[Call]) -> tuple[Call, bool]:
    def work() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work, False
    return graph.replay, True


def _seconds(work: Call, repeats: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def build(work: Work, device: torch.device) -> Call:
    """The call of one workload with inputs of its own."""
    return _BUILDERS[work.op](work, device)


def _matrix(work: Work, device: torch.device) -> torch.Tensor:
    return torch.randn(work.n, work.k, device=device, dtype=BF16)


def _quantize_blockwise(work: Work, device: torch.device) -> Call:
    a = _matrix(work, device)
    return lambda: F.quantize_blockwise(a, blocksize=BLOCK_8BIT)


def _dequantize_blockwise(work: Work, device: torch.device) -> Call:
    codes, state = F.quantize_blockwise(_matrix(work, device), blocksize=BLOCK_8BIT)
    return lambda: F.dequantize_blockwise(codes, state)


def _quantize_4bit(work: Work, device: torch.device) -> Call:
    a = _matrix(work, device)
    return lambda: F.quantize_4bit(a, quant_type="nf4")


def _dequantize_4bit(work: Work, device: torch.device) -> Call:
    packed, state = F.quantize_4bit(_matrix(work, device), quant_type="nf4")
    return lambda: F.dequantize_4bit(packed, state)


def _gemm_4bit(work: Work, device: torch.device) -> Call:
    packed, state = F.quantize_4bit(_matrix(work, device), quant_type="nf4")
    handle = prepare_gemm_4bit(state.weight(packed))
    x = torch.randn(work.m or 1, work.k, device=device, dtype=BF16)
    return lambda: handle(x)


def _gemm_int4(work: Work, device: torch.device) -> Call:
    groups = -(-work.k // GROUP_INT4)
    packed = torch.randint(0, 256, (work.n, -(-work.k // 2)), dtype=torch.uint8, device=device)
    scales = torch.rand(work.n, groups, device=device).to(BF16)
    zeros = torch.randint(0, 16, (work.n, groups), dtype=torch.uint8, device=device)
    weight = WeightInt4(packed, scales, zeros, GROUP_INT4, (work.n, work.k))
    handle = prepare_int4(weight)
    x = torch.randn(work.m or 1, work.k, device=device, dtype=BF16)
    return lambda: handle.eager(x, None)


def _gemm_4bit_transposed(work: Work, device: torch.device) -> Call:
    packed, state = F.quantize_4bit(_matrix(work, device), quant_type="nf4")
    weight = state.weight(packed)
    y = torch.randn(work.m or 1, work.n, device=device, dtype=BF16)
    return lambda: gemm_4bit_transposed(y, weight)


def _int8_scaled_gemm(work: Work, device: torch.device) -> Call:
    codes, columns, _ = F.int8_vectorwise_quant(_matrix(work, device))
    x, rows, _ = F.int8_vectorwise_quant(torch.randn(work.m or 1, work.k, device=device, dtype=BF16))
    return lambda: F.int8_scaled_mm(x, codes, rows, columns, dtype=BF16)


def _int8_linear_transposed(work: Work, device: torch.device) -> Call:
    codes, scales, _ = F.int8_vectorwise_quant(_matrix(work, device))
    y = torch.randn(work.m or 1, work.n, device=device, dtype=BF16)
    return lambda: int8_linear_transposed(y, codes, scales)


def _int8_quantize_rows(work: Work, device: torch.device) -> Call:
    a = _matrix(work, device)
    return lambda: F.int8_vectorwise_quant(a)


def _int8_quantize_cols(work: Work, device: torch.device) -> Call:
    a = _matrix(work, device)
    return lambda: int8.int8_quantize_cols(a)


def _int8_dequantize_rows(work: Work, device: torch.device) -> Call:
    codes, rows, _ = F.int8_vectorwise_quant(_matrix(work, device))
    return lambda: int8.int8_dequantize_rows(codes, rows, BF16)


def _optimizer_step(work: Work, device: torch.device) -> Call:
    parameter = torch.nn.Parameter(torch.randn(work.n, work.k, device=device))
    parameter.grad = torch.randn_like(parameter)
    made = qcore.optim.AdamW8bit if "8 bits" in work.variant else qcore.optim.AdamW32bit
    optimizer = made([parameter], lr=1e-4)
    return lambda: optimizer.step()


_BUILDERS: dict[str, Callable[[Work, torch.device], Call]] = {
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "gemm_4bit": _gemm_4bit,
    "gemm_int4": _gemm_int4,
    "gemm_4bit_transposed": _gemm_4bit_transposed,
    "int8_scaled_gemm": _int8_scaled_gemm,
    "int8_linear_transposed": _int8_linear_transposed,
    "int8_quantize_rows": _int8_quantize_rows,
    "int8_quantize_cols": _int8_quantize_cols,
    "int8_dequantize_rows": _int8_dequantize_rows,
    "optimizer_step": _optimizer_step,
}


def measure_all(works: Sequence[Work], device: torch.device) -> Iterator[tuple[Work, Measured | str]]:
    """Each workload with its time, or with why it could not be timed."""
    for work in works:
        try:
            yield work, measure(work, device)
        except Exception as error:  # one op that fails leaves the others to be measured
            yield work, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
