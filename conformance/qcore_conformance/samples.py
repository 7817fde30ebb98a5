"""One call of any op, for cases that are not about values: threads, pages, streams, repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore.backend import OptimizerRule
from qcore_conformance import calls, generators
from qcore_conformance.floats import rounded
from qcore_conformance.optimizer_call import optimizer_step, random_tensor
from qcore_conformance.weights import random_int4, random_weight

if TYPE_CHECKING:
    from qcore_conformance.session import Session

# A call with inputs that are already made; returns its outputs in a fixed order.
Sample = Callable[["Session"], tuple[Any, ...]]


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]
    products: tuple[tuple[int, int, int], ...]


# Every kind of tail; and large enough that an op is split over threads or thread blocks.
TAILS = Sizes(
    (1, 2, 31, 33, 65, 95, 127, 1009),
    ((1, 1), (3, 33), (2, 64), (5, 127), (17, 31)),
    ((1, 3, 65), (1, 33, 96), (2, 17, 32), (5, 33, 63), (17, 19, 130), (40, 33, 64), (66, 65, 127)),
)
LARGE = Sizes((300_007,), ((257, 1031),), ((1, 1030, 1024), (5, 515, 520), (70, 300, 520)))


def samples(op: str, rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    """Calls of ``op`` with random inputs of each size."""
    return _MAKERS[op](rng, dtype, sizes)


def _quantize_blockwise(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for n in sizes.lengths:
        a = generators.values("normal", rng, n, dtype)
        yield lambda s, a=a: calls.quantize_blockwise(s, a, generators.CODEBOOKS["dynamic"], 64)


def _dequantize_blockwise(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for n in sizes.lengths:
        a, absmax = rng.integers(0, 256, n, dtype=np.uint8), generators.values("normal", rng, -(-n // 64), "f32")
        yield lambda s, a=a, absmax=absmax: (
            calls.dequantize_blockwise(s, a, absmax, generators.CODEBOOKS["dynamic"], 64, dtype),
        )


def _quantize_4bit(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for n in sizes.lengths:
        a = generators.values("normal", rng, n, dtype)
        for quant_type in ("nf4", "fp4"):
            yield lambda s, a=a, quant_type=quant_type: calls.quantize_4bit(s, a, quant_type, 64)


def _dequantize_4bit(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for n in sizes.lengths:
        for quant_type, nested in (("nf4", 0), ("fp4", 0), ("nf4", 256)):
            w = random_weight(rng, quant_type, 64, (n,), nested)
            yield lambda s, w=w: (calls.dequantize_4bit(s, w, dtype),)


def _quantize_absmax(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for n in sizes.lengths:
        absmax = rounded(np.abs(rng.standard_normal(n)), "f32")
        yield lambda s, absmax=absmax: calls.quantize_absmax(s, absmax, generators.CODEBOOKS["dynamic"], 256)


def _dequantize_absmax(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for n in sizes.lengths:
        a, nested = rng.integers(0, 256, n, dtype=np.uint8), generators.values("normal", rng, -(-n // 256), "f32")
        offset = generators.values("normal", rng, 1, "f32")
        yield lambda s, a=a, nested=nested, offset=offset: (
            calls.dequantize_absmax(s, a, nested, generators.CODEBOOKS["dynamic"], offset, 256),
        )


def _gemm_4bit(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for i, (m, n, k) in enumerate(sizes.products):
        w = random_weight(rng, ("nf4", "fp4")[i % 2], 64, (n, k), 256 if i % 3 == 2 else 0)
        x = generators.values("normal", rng, m * k, dtype).reshape(m, k)
        bias = generators.values("normal", rng, n, dtype) if i % 2 else None
        yield lambda s, x=x, w=w, bias=bias: (calls.gemm_4bit(s, x, w, bias),)


def _gemm_4bit_transposed(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for i, (m, n, k) in enumerate(sizes.products):
        w = random_weight(rng, ("nf4", "fp4")[i % 2], 64, (n, k), 256 if i % 3 == 2 else 0)
        y = generators.values("normal", rng, m * n, dtype).reshape(m, n)
        yield lambda s, y=y, w=w: (calls.gemm_4bit_transposed(s, y, w),)


def _int8_quantize_rows(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, k in sizes.matrices:
        a = generators.values("normal", rng, m * k, dtype).reshape(m, k)
        for threshold in (0.0, 3.0):
            yield lambda s, a=a, threshold=threshold: calls.int8_quantize_rows(s, a, threshold)


def _int8_quantize_cols(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, k in sizes.matrices:
        a = generators.values("normal", rng, m * k, dtype).reshape(m, k)
        yield lambda s, a=a: calls.int8_quantize_cols(s, a, 3.0)


def _factors(rng: generators.Rng, m: int, n: int, k: int) -> tuple[Any, Any]:
    return rng.integers(-128, 128, (m, k), dtype=np.int8), rng.integers(-128, 128, (n, k), dtype=np.int8)


def _int8_gemm(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for size in sizes.products:
        a, b = _factors(rng, *size)
        yield lambda s, a=a, b=b: (calls.int8_gemm(s, a, b),)


def _scales(rng: generators.Rng, m: int, n: int, dtype: str) -> tuple[Any, Any, Any]:
    rows, cols = (rounded(rng.uniform(0.1, 2, size), "f32") for size in (m, n))
    return rows, cols, generators.values("normal", rng, n, dtype)


def _int8_dequantize_gemm(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, n in sizes.matrices:
        c = rng.integers(-(2**20), 2**20, (m, n), dtype=np.int32)
        scales = _scales(rng, m, n, dtype)
        yield lambda s, c=c, scales=scales: (calls.int8_dequantize_gemm(s, c, *scales, dtype),)


def _int8_scaled_gemm(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, n, k in sizes.products:
        factors, scales = _factors(rng, m, n, k), _scales(rng, m, n, dtype)
        yield lambda s, factors=factors, scales=scales: (calls.int8_scaled_gemm(s, *factors, *scales, dtype),)


def _int8_dequantize_rows(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, k in sizes.matrices:
        codes, stats = rng.integers(-128, 128, (m, k), dtype=np.int8), rounded(rng.uniform(0.1, 2, m), "f32")
        yield lambda s, codes=codes, stats=stats: (calls.int8_dequantize_rows(s, codes, stats, dtype),)


def _optimizer_step(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    stochastic = dtype == "bf16"
    for rule in (
        OptimizerRule("adam", 8, -0.01, 0.99, eps=1e-6, beta1=0.9, gain1=0.1, beta2=0.99, gain2=0.01, max_unorm=0.1),
        OptimizerRule("ademamix", 8, -0.01, eps=1e-6, beta1=0.9, gain1=0.1, beta3=0.99, gain3=0.01, alpha=5.0),
        OptimizerRule("momentum", 32, -0.01, beta1=0.9, stochastic=stochastic, seed=7),
    ):
        tensors = [random_tensor(rng, rule, n, dtype) for n in sizes.lengths]
        yield lambda s, rule=rule, tensors=tensors: tuple(
            part for tensor in optimizer_step(s, rule, tensors) for _, part in tensor.parts()
        )


def _int8_linear(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, n, k in sizes.products:
        a, b = generators.values("normal", rng, m * k, dtype).reshape(m, k), _factors(rng, 0, n, k)[1]
        _, cols, bias = _scales(rng, m, n, dtype)
        for threshold in (0.0, 3.0):
            yield lambda s, a=a, b=b, cols=cols, bias=bias, t=threshold: calls.int8_linear(s, a, b, cols, t, bias)


def _int8_linear_transposed(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for m, n, k in sizes.products:
        y, b = generators.values("normal", rng, m * n, dtype).reshape(m, n), _factors(rng, 0, n, k)[1]
        _, cols, _ = _scales(rng, m, n, dtype)
        yield lambda s, y=y, b=b, cols=cols: (calls.int8_linear_transposed(s, y, b, cols),)


def _gemm_int4(rng: generators.Rng, dtype: str, sizes: Sizes) -> Iterator[Sample]:
    for i, (m, n, k) in enumerate(sizes.products):
        g = (64, 32, 16, max(k, 1))[i % 4]
        w = random_int4(rng, g, (n, k), ("f16", "f32", "bf16")[i % 3], zeros=i % 2 == 0, ordered=i % 3 == 1)
        x = generators.values("normal", rng, m * k, dtype).reshape(m, k)
        bias = generators.values("normal", rng, n, dtype) if i % 2 else None
        yield lambda s, x=x, w=w, bias=bias: (calls.gemm_int4(s, x, w, bias),)


_MAKERS: Mapping[str, Callable[[generators.Rng, str, Sizes], Iterator[Sample]]] = {
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "quantize_absmax": _quantize_absmax,
    "dequantize_absmax": _dequantize_absmax,
    "gemm_4bit": _gemm_4bit,
    "int8_quantize_rows": _int8_quantize_rows,
    "int8_quantize_cols": _int8_quantize_cols,
    "int8_gemm": _int8_gemm,
    "int8_dequantize_gemm": _int8_dequantize_gemm,
    "int8_scaled_gemm": _int8_scaled_gemm,
    "int8_dequantize_rows": _int8_dequantize_rows,
    "optimizer_step": _optimizer_step,
    "int8_linear": _int8_linear,
    "gemm_int4": _gemm_int4,
    "gemm_4bit_transposed": _gemm_4bit_transposed,
    "int8_linear_transposed": _int8_linear_transposed,
}
OPS = tuple(_MAKERS)
