"""Kernels that are wrong in one place, and the conformance cases of which one at least has to fail on each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelMutant:
    """``file`` with ``right`` (found exactly once) replaced by ``wrong``, built into the library through ``unit``."""

    name: str
    file: str
    right: str
    wrong: str
    unit: str  # the one source file that is compiled again
    cases: tuple[str, ...]


_QUANTIZED = ("quantize_4bit/L1/nf4-f32-bs1024-lengths", "quantize_4bit/L1/nf4-f32-bs64-lengths")
_PRODUCTS = ("gemm_4bit/L2/nf4-f16-rows", "gemm_4bit/L1/nf4-f16-one-hot-m1-k131-bs64")

MUTANTS = (
    KernelMutant(
        "barrier-before-reading-removed",
        "reduce.cuh",
        "        block_barrier();\n        value = 0.0f;",
        "        value = 0.0f;",
        "fourbit.cu",
        _QUANTIZED,
    ),
    KernelMutant(
        "barrier-before-writing-again-removed",
        "reduce.cuh",
        "        block_barrier();\n    }\n    return value;",
        "    }\n    return value;",
        "fourbit.cu",
        ("quantize_4bit/L1/nf4-f32-bs4096-lengths", "quantize_4bit/L1/fp4-f32-bs4096-lengths"),
    ),
    KernelMutant(
        "wrong-first-lane-mask",
        "reduce.cuh",
        "for (int mask = 1; mask < inside; mask *= 2) {",
        "for (int mask = 2; mask < inside; mask *= 2) {",
        "fourbit.cu",
        _QUANTIZED,
    ),
    KernelMutant(
        "wrong-last-lane-mask",
        "gemm_4bit.cu",
        "for (int mask = M; mask < W; mask *= 2) {",
        "for (int mask = M; mask < W / 2; mask *= 2) {",
        "gemm_4bit.cu",
        ("gemm_4bit/L1/nf4-f32-integers-bias-none",),
    ),
    KernelMutant(
        "threads-past-the-end-leave-early",
        "fourbit.cu",
        "const Eight x = source.eight(first, count);",
        "if (count <= 0) {\n            return;\n        }\n        const Eight x = source.eight(first, count);",
        "fourbit.cu",
        _QUANTIZED,
    ),
    KernelMutant(
        "tail-of-one-dropped",
        "fourbit.cu",
        "if (2 * i < count) {",
        "if (2 * i + 1 < count) {",
        "fourbit.cu",
        _QUANTIZED,
    ),
    KernelMutant(
        "reads-one-past-the-end",
        "numbers.cuh",
        "out.value[i] = i < count ? to_float(x[i]) : 0.0f;",
        "out.value[i] = i <= count ? to_float(x[i]) : 0.0f;",
        "fourbit.cu",
        _QUANTIZED,
    ),
    KernelMutant(
        "stores-one-past-the-end",
        "numbers.cuh",
        "if (aligned && count >= 8) {\n        store_aligned<T>(out, x);",
        "if (aligned && count >= 7) {\n        store_aligned<T>(out, x);",
        "fourbit.cu",
        ("dequantize_4bit/L1/nf4-f32-bs64-lengths",),
    ),
    KernelMutant(
        "sums-read-before-they-are-written",
        "product.cuh",
        "        block_barrier();\n        constexpr int kRows",
        "        constexpr int kRows",
        "gemm_4bit.cu",
        _PRODUCTS,
    ),
    KernelMutant(
        "sums-overwritten-before-they-are-read",
        "product.cuh",
        "            }\n        }\n        block_barrier();\n    }\n}",
        "            }\n        }\n    }\n}",
        "gemm_4bit.cu",
        ("gemm_4bit/L1/nf4-f16-one-hot-m320-k320-bs4096", "gemm_4bit/L2/nf4-f16-rows"),
    ),
    KernelMutant(
        "one-wave-left-out-of-the-sum",
        "product.cuh",
        "for (int other = 1; other < KW; ++other) {",
        "for (int other = 1; other + 1 < KW; ++other) {",
        "gemm_4bit.cu",
        ("gemm_4bit/L1/nf4-f16-integers-bias-none",),
    ),
    KernelMutant(
        "depth-cut-to-whole-steps",
        "product.cuh",
        "base < x.k; base += KW * step",
        "base + step <= x.k; base += KW * step",
        "gemm_4bit.cu",
        _PRODUCTS,
    ),
)
