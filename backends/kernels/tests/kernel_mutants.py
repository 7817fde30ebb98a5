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
_STEPS = ("optimizer_step/L1/adam-8-lengths", "optimizer_step/L1/momentum-8-lengths")
_NORMS = ("optimizer_step/L1/adam-max-unorm", "optimizer_step/L1/momentum-max-unorm")
_THRESHOLDS = ("optimizer_step/L1/momentum-8-thresholds", "optimizer_step/L1/adagrad-8-thresholds")
_TILES = ("gemm_4bit/L2/nf4-f16-rows", "gemm_4bit/L1/nf4-f16-one-hot-m320-k320-bs4096")
_INT8_TILES = ("int8_gemm/L1/sizes",)
_INT8_COLUMNS = ("int8_linear_transposed/L2/f16-rows-n192-k64",)
_INT8_FEW = ("int8_linear_transposed/L1/f16-one-hot-m2-n96-k64",)
_INT8_DEEP_TILES = ("int8_linear_transposed/L2/f16-tiles",)
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
        "fourbit_product.cuh",
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
        "    block_barrier();\n    for (int i = thread_index(); i < kRowsOfTile",
        "    for (int i = thread_index(); i < kRowsOfTile",
        "gemm_4bit.cu",
        _PRODUCTS,
    ),
    KernelMutant(
        "int8-tile-read-before-it-is-there-for-all",
        "int8_tiles.cuh",
        "        block_barrier();  // this int8 tile",
        "        // this int8 tile",
        "int8_gemm.cu",
        _INT8_TILES,
    ),
    KernelMutant(
        "int8-tile-read-before-it-has-landed",
        "int8_tiles.cuh",
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
        "int8_gemm.cu",
        _INT8_TILES,
    ),
    KernelMutant(
        "int8-depth-past-a-part-counts-twice",
        "int8_tiles.cuh",
        "last < a.k ? last : a.k",
        "a.k",
        "int8_gemm.cu",
        _INT8_TILES,
    ),
    KernelMutant(
        "one-wave-left-out-of-the-sum",
        "product.cuh",
        "for (int other = 1; other < kProductWaves; ++other) {",
        "for (int other = 1; other + 1 < kProductWaves; ++other) {",
        "gemm_4bit.cu",
        ("gemm_4bit/L1/nf4-f16-integers-bias-none",),
    ),
    KernelMutant(
        "depth-cut-to-whole-steps",
        "product.cuh",
        "base < x.k; base += kProductWaves * kStep",
        "base + kStep <= x.k; base += kProductWaves * kStep",
        "gemm_4bit.cu",
        _PRODUCTS,
    ),
    KernelMutant(
        "absmax-of-every-second-lane",
        "optimizer_step.cuh",
        "for (int mask = 1; mask < kLanesOfBlock; mask *= 2) {",
        "for (int mask = 2; mask < kLanesOfBlock; mask *= 2) {",
        "optimizer.cu",
        _STEPS,
    ),
    KernelMutant(
        "elements-past-the-end-count",
        "optimizer_step.cuh",
        "        if (count < 8) {\n            clear_from(count);",
        "        if (count < 0) {\n            clear_from(count);",
        "optimizer.cu",
        _STEPS,
    ),
    KernelMutant(
        "runs-cut-to-whole-teams",
        "optimizer_step.cuh",
        "for (int64_t base = run; base < end; base += kBlocksAtOnce) {",
        "for (int64_t base = run; base + kBlocksAtOnce <= end; base += kBlocksAtOnce) {",
        "optimizer.cu",
        _STEPS,
    ),
    KernelMutant(
        "first-tensor-of-a-run-missed",
        "optimizer_step.cuh",
        "if (middle.first_block() <= run) {",
        "if (middle.first_block() <= run + 1) {",
        "optimizer.cu",
        (*_STEPS, "optimizer_step/L1/adam-8-many-tensors"),
    ),
    KernelMutant(
        "thresholds-read-before-they-are-written",
        "optimizer_codes.cuh",
        "        block_barrier();\n        const int entries",
        "        const int entries",
        "optimizer.cu",
        _THRESHOLDS,
    ),
    KernelMutant(
        "ties-go-down",
        "optimizer_codes.cuh",
        "(j % 2 == 1 && c < next ? 1 : 0)",
        "0",
        "optimizer.cu",
        _THRESHOLDS,
    ),
    KernelMutant(
        "squares-read-before-they-are-written",
        "optimizer.cu",
        "        block_barrier();\n        const int which",
        "        const int which",
        "optimizer.cu",
        _NORMS,
    ),
    KernelMutant(
        "lanes-folded-before-they-are-written",
        "optimizer.cu",
        "        block_barrier();\n        if (l == 0 && block >= 0) {",
        "        if (l == 0 && block >= 0) {",
        "optimizer.cu",
        _NORMS,
    ),
    KernelMutant(
        "totals-folded-without-a-barrier",
        "optimizer.cu",
        "half];\n        }\n        block_barrier();",
        "half];\n        }",
        "optimizer.cu",
        ("optimizer_step/L1/adam-8-max-unorm-many-blocks",),
    ),
    KernelMutant(
        "kept-compensation-overwritten",
        "optimizer_block.cuh",
        "store_moved<T>(compensation, rest, count, kept);",
        "store_moved<T>(compensation, rest, count, 0);",
        "optimizer.cu",
        ("optimizer_step/L1/f16-compensation",),
    ),
    KernelMutant(
        "outlier-columns-listed-one-too-far",
        "int8_quantize.cu",
        "(i < thread_index() ? shared.flag[i] : 0)",
        "(i <= thread_index() ? shared.flag[i] : 0)",
        "int8_quantize.cu",
        ("int8_linear/L1/f32-many-outliers-m1",),
    ),
    KernelMutant(
        "one-weight-too-many-taken-as-written",
        "int8_gemm.cu",
        "j < terms.expanded",
        "j <= terms.expanded",
        "int8_gemm.cu",
        ("int8_linear/L1/f32-many-outliers-m7",),
    ),
    KernelMutant(
        "tile-taken-before-it-has-landed",
        "tiled.cuh",
        "wait_for_copies<kStages - 3>();",
        "wait_for_copies<kStages - 2>();",
        "gemm_4bit.cu",
        _TILES,
    ),
    KernelMutant(
        "tile-read-before-it-is-decoded",
        "tiled.cuh",
        "        block_barrier();  // this tile",
        "        // this tile",
        "gemm_4bit.cu",
        _TILES,
    ),
    KernelMutant(
        "last-part-of-the-depth-not-added",
        "tiled.cuh",
        "for (int part = 1; part < splits; ++part) {",
        "for (int part = 1; part + 1 < splits; ++part) {",
        "gemm_4bit.cu",
        _TILES,
    ),
    KernelMutant(
        "scale-of-the-tile-before",
        "fourbit_product.cuh",
        "carry = begin<Threads>(thread, first_row, at + kTileDepth, end);",
        "carry = begin<Threads>(thread, first_row, at, end);",
        "gemm_int4.cu",
        ("gemm_int4/L1/f16-any-zero-point",),
    ),
    KernelMutant(
        "columns-not-gathered",
        "gemm_int4.cu",
        "x[row * k + from]",
        "x[row * k + column]",
        "gemm_int4.cu",
        ("gemm_int4/L1/f32-one-hot-m2-k96-g32-bf16-perm",),
    ),
    KernelMutant(
        "last-code-of-an-odd-row-dropped",
        "weight_int4.cuh",
        "2 * i < count ?",
        "2 * i + 1 < count ?",
        "gemm_int4.cu",
        ("gemm_int4/L1/padding-nibble", "gemm_int4/L1/f32-one-hot-m1-k131-g64-f32"),
    ),
    KernelMutant(
        "scales-put-where-they-are-read",
        "gemm_4bit_transposed.cu",
        "put(thread, at + kTileDepth, carry);",
        "put(thread, at, carry);",
        "gemm_4bit_transposed.cu",
        ("gemm_4bit_transposed/L1/nf4-f16-one-hot-m2-n96-k64-bs32",),
    ),
    KernelMutant(
        "sums-of-rows-read-before-they-are-written",
        "transposed.cuh",
        "            block_barrier();\n            for (int c = thread_index()",
        "            for (int c = thread_index()",
        "gemm_4bit_transposed.cu",
        ("gemm_4bit_transposed/L1/nf4-f32-one-hot-m4-n130-k128-bs64-nested256",),
    ),
    KernelMutant(
        "sums-of-a-tile-read-before-they-are-there",
        "tile.cuh",
        "            block_barrier();\n#pragma unroll 4",
        "#pragma unroll 4",
        "int8_gemm.cu",
        _INT8_TILES,
    ),
    KernelMutant(
        "scales-of-the-tile-before",
        "int8_transposed.cu",
        "carry = begin<Threads>(thread, first_column, at + kTileDepth, end);",
        "carry = begin<Threads>(thread, first_column, at, end);",
        "int8_transposed.cu",
        _INT8_COLUMNS,
    ),
    KernelMutant(
        "sums-of-few-rows-read-before-they-are-written",
        "int8_transposed.cu",
        "        block_barrier();\n        for (int i = thread_index()",
        "        for (int i = thread_index()",
        "int8_transposed.cu",
        _INT8_FEW,
    ),
    KernelMutant(
        "first-column-of-a-block-ignored",
        "int8_transposed.cu",
        "column = first_column + slot % kPiecesAcross * 16;",
        "column = slot % kPiecesAcross * 16;",
        "int8_transposed.cu",
        _INT8_DEEP_TILES,
    ),
    KernelMutant(
        "a-stage-of-codes-less",
        "tiled.cuh",
        "kCodeStages = kStages - 1;",
        "kCodeStages = kStages > 3 ? kStages - 2 : kStages - 1;",
        "int8_transposed.cu",
        _INT8_DEEP_TILES,
    ),
)
