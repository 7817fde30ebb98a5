"""Mutants of LLM.int8() (docs/spec/50-int8.md)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from qcore.errors import InvalidArgument
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, I8, I32, PRODUCT_SCALE, ROW_SCALE, ZERO, Bools, Steps, largest

ROWS, COLS = "int8_quantize_rows", "int8_quantize_cols"
QUANTIZE = (ROWS, COLS)
PRODUCT = ("int8_gemm", "int8_scaled_gemm")
SCALED = ("int8_dequantize_gemm", "int8_scaled_gemm")


@mutant("QC-INT8-001", *QUANTIZE)
class ThresholdExclusive(Steps):
    """An element whose magnitude equals the threshold is no outlier."""

    def outliers(self, x: F32, threshold: float) -> Bools:
        return super().outliers(x, threshold) & (np.abs(x) != np.float32(threshold))


@mutant("QC-INT8-001", *QUANTIZE)
class ThresholdOnPositives(Steps):
    """Only positive elements are compared with the threshold."""

    def outliers(self, x: F32, threshold: float) -> Bools:
        return super().outliers(x, threshold) & ~(x < 0)


@mutant("QC-INT8-001", ROWS)
class NanNoOutlier(Steps):
    """A NaN compares false and is no outlier."""

    def outliers(self, x: F32, threshold: float) -> Bools:
        return super().outliers(x, threshold) & ~np.isnan(x)


@mutant("QC-INT8-001", *QUANTIZE)
class ZeroThresholdEverything(Steps):
    """A threshold of 0 is compared like any other, and everything is an outlier."""

    def outliers(self, x: F32, threshold: float) -> Bools:
        return ~(np.abs(x) < np.float32(threshold))


@mutant("QC-INT8-001", ROWS)
class OutlierColumnsFromFirstRows(Steps):
    """Only the first 16 rows mark outlier columns."""

    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        super().int8_quantize_rows(A, threshold, out=out, row_stats=row_stats, outlier_cols=outlier_cols)
        if outlier_cols is not None:
            x = self.load(A).reshape(A.shape)
            self.store(self.outliers(x[:16], threshold).any(axis=0).astype(np.uint8), outlier_cols)


@mutant("QC-INT8-001", ROWS)
class OutlierColumnsAccumulate(Steps):
    """Outlier columns are only ever set to 1: without a memset before, old marks stay."""

    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        before = None if outlier_cols is None else outlier_cols.clone()
        super().int8_quantize_rows(A, threshold, out=out, row_stats=row_stats, outlier_cols=outlier_cols)
        if outlier_cols is not None:
            outlier_cols |= before


@mutant("QC-INT8-002", *QUANTIZE)
class StatisticsWithOutliers(Steps):
    """Outliers take part in the largest magnitude."""

    def statistics(self, x: F32, outlier: Bools, axis: int) -> F32:
        return largest(x, axis)


@mutant("QC-INT8-002", ROWS)
class StatisticsWithoutOutlierColumns(Steps):
    """Whole outlier columns are left out of the row statistics, not just outliers."""

    def statistics(self, x: F32, outlier: Bools, axis: int) -> F32:
        return super().statistics(x, np.broadcast_to(outlier.any(axis=0)[None, :], x.shape), axis)


@mutant("QC-INT8-002", *QUANTIZE)
class StatisticsOfNan(Steps):
    """A NaN that is no outlier makes the statistic NaN."""

    def statistics(self, x: F32, outlier: Bools, axis: int) -> F32:
        return np.where(outlier, ZERO, np.abs(x)).max(axis=axis, initial=ZERO)


@mutant("QC-INT8-002", *QUANTIZE)
class StatisticsInHalf(Steps):
    """Activations are cast to float16 first: 1e5 becomes infinity."""

    def load(self, tensor: Tensor) -> F32:
        return super().load(tensor).astype(np.float16).astype(np.float32)


@mutant("QC-INT8-003", *QUANTIZE)
class RoundsHalfAway(Steps):
    """Codes round half away from zero."""

    def integers(self, q: F32) -> F32:
        return np.copysign(np.floor(np.abs(q) + np.float32(0.5)), q)


@mutant("QC-INT8-003", *QUANTIZE)
class CodesTruncated(Steps):
    """Codes are truncated toward zero instead of rounded."""

    def integers(self, q: F32) -> F32:
        return np.trunc(q)


@mutant("QC-INT8-003", *QUANTIZE)
class ClampMissing(Steps):
    """A quotient beyond 127 wraps around."""

    def clamped(self, q: F32) -> I8:
        return np.nan_to_num(q, posinf=2**31 - 1, neginf=-(2**31)).astype(np.int64).astype(np.int8)


@mutant("QC-INT8-003", *QUANTIZE)
class ClampAtMinus128(Steps):
    """Codes saturate at -128."""

    def clamped(self, q: F32) -> I8:
        return np.clip(q, -128, 127).astype(np.int8)


@mutant("QC-INT8-003", *QUANTIZE)
class LevelsDivide(Steps):
    """Codes are x / (statistic / 127)."""

    def levels(self, x: F32, statistics: F32) -> F32:
        return x / (statistics / np.float32(127))


@mutant("QC-INT8-003", *QUANTIZE)
class LevelsProductFirst(Steps):
    """Codes are (x * 127) / statistic."""

    def levels(self, x: F32, statistics: F32) -> F32:
        return x * np.float32(127) / statistics


@mutant("QC-INT8-003", *QUANTIZE)
class LevelsThroughReciprocal(Steps):
    """The scale is 127 * (1 / statistic), two roundings."""

    def levels(self, x: F32, statistics: F32) -> F32:
        return x * (np.float32(127) * (np.float32(1) / statistics))


@mutant("QC-INT8-003", *QUANTIZE)
class ZeroStatisticLeaksCodes(Steps):
    """A NaN quotient is converted without a check and gives -128."""

    def codes_int8(self, x: F32, statistics: F32) -> I8:
        codes = super().codes_int8(x, statistics)
        return np.where(np.isnan(self.levels(x, statistics)), np.int8(-128), codes)


@mutant("QC-INT8-003", ROWS)
class OutlierColumnsNotZeroed(Steps):
    """Outlier columns keep their codes."""

    def zero_outliers(self, codes: I8, outlier: Bools) -> I8:
        return codes


@mutant("QC-INT8-003", ROWS)
class OnlyOutliersZeroed(Steps):
    """Outlier elements are zeroed, but not the rest of their columns."""

    def zero_outliers(self, codes: I8, outlier: Bools) -> I8:
        return np.where(outlier, np.int8(0), codes)


@mutant("QC-INT8-003", ROWS)
class SingleRowNotZeroed(Steps):
    """With a single row outlier columns keep their codes, as in bitsandbytes."""

    def zero_outliers(self, codes: I8, outlier: Bools) -> I8:
        return codes if len(codes) == 1 else super().zero_outliers(codes, outlier)


@mutant("QC-INT8-004", COLS)
class ColumnsAsRows(Steps):
    """Column statistics are computed per row and repeated."""

    def statistics(self, x: F32, outlier: Bools, axis: int) -> F32:
        stats = super().statistics(x, outlier, 1 if axis == 0 else 0)
        return np.resize(stats, x.shape[1]) if stats.size else np.zeros(x.shape[1], np.float32)


@mutant("QC-INT8-004", COLS)
class WholeOutlierColumnsZeroed(Steps):
    """Column-wise quantization zeroes the whole column of an outlier."""

    def int8_quantize_cols(self, A: Tensor, threshold: float, *, out: Tensor, col_stats: Tensor) -> None:
        super().int8_quantize_cols(A, threshold, out=out, col_stats=col_stats)
        columns = self.outliers(self.load(A).reshape(A.shape), threshold).any(axis=0)
        self.store(np.where(columns[None, :], np.int8(0), out.numpy()), out)


@mutant("QC-INT8-005", *PRODUCT)
class PairsSaturate(Steps):
    """A is shifted to unsigned, and pairs of its products are added in saturating int16, as vpmaddubsw does."""

    def int8_product(self, a: I8, b: I8) -> I32:
        a, b = (np.pad(v, ((0, 0), (0, v.shape[1] % 2))).astype(np.int32) for v in (a, b))
        total = np.broadcast_to(-128 * b.sum(axis=1, dtype=np.int32)[None, :], (len(a), len(b))).copy()
        for k in range(0, a.shape[1], 2):
            total += np.clip((a[:, k : k + 2] + 128) @ b[:, k : k + 2].T, -32768, 32767)
        return total


@mutant("QC-INT8-005", *PRODUCT)
class MinusOneTwentyEightLost(Steps):
    """The sign trick takes the magnitude of -128 for 127."""

    def int8_product(self, a: I8, b: I8) -> I32:
        return super().int8_product(np.maximum(a, -127), b)


@mutant("QC-INT8-005", *PRODUCT)
class UnsignedOperandShifted(Steps):
    """The 128 that makes A unsigned is not taken off the sum for the last odd k."""

    def int8_product(self, a: I8, b: I8) -> I32:
        c = super().int8_product(a, b)
        return c + 128 * b[:, -1].astype(np.int32)[None, :] if a.shape[1] % 2 else c


@mutant("QC-INT8-005", *PRODUCT)
class SumsInFloat32(Steps):
    """Sums are kept in float32, inexact beyond 2^24."""

    def int8_product(self, a: I8, b: I8) -> I32:
        total = np.zeros((len(a), len(b)), np.float32)
        for k in range(0, a.shape[1], 64):
            total += a[:, k : k + 64].astype(np.float32) @ b[:, k : k + 64].astype(np.float32).T
        return total.astype(np.int64).clip(-(2**31), 2**31 - 1).astype(np.int32)


@mutant("QC-INT8-005", *PRODUCT)
class SumsWrapAtHalf(Steps):
    """Sums are kept in 31 bits."""

    def int8_product(self, a: I8, b: I8) -> I32:
        c = super().int8_product(a, b).astype(np.int64)
        return ((c + 2**30) % 2**31 - 2**30).astype(np.int32)


@mutant("QC-INT8-005", *PRODUCT)
class IntegerTailDropped(Steps):
    """What is left of K after steps of 64 is dropped, unless K is shorter than one step."""

    def int8_product(self, a: I8, b: I8) -> I32:
        k = a.shape[1]
        keep = k - k % 64 if k >= 64 else k
        return super().int8_product(a[:, :keep], b[:, :keep])


@mutant("QC-INT8-005", *PRODUCT)
class IntegerTileEdge(Steps):
    """The last row of A is read again from the row before it where M is no multiple of 4."""

    def int8_product(self, a: I8, b: I8) -> I32:
        if len(a) % 4 and len(a) > 1:
            a = np.concatenate([a[:-1], a[-2:-1]])
        return super().int8_product(a, b)


@mutant("QC-INT8-005", *PRODUCT)
class DepthNotChecked(Steps):
    """A K beyond 131,071 is served, and its sums may wrap."""

    def int8_gemm(self, A: Tensor, B: Tensor, *, out: Tensor) -> None:
        try:
            super().int8_gemm(A, B, out=out)
        except InvalidArgument:
            if A.shape[-1] <= 131_071:
                raise

    def int8_scaled_gemm(
        self, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        try:
            super().int8_scaled_gemm(A, B, row_stats, col_stats, bias, out=out)
        except InvalidArgument:
            if A.shape[-1] <= 131_071:
                raise


@mutant("QC-INT8-006", *SCALED)
class ScalesMultipliedFirst(Steps):
    """The product is c * (row * column) instead of (c * row) * column."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c.astype(np.float32) * (rows[:, None] * columns[None, :]) * PRODUCT_SCALE
        return t if bias is None else t + bias


@mutant("QC-INT8-006", *SCALED)
class ColumnScaleFirst(Steps):
    """The column statistic is multiplied before the row statistic."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c.astype(np.float32) * columns[None, :] * rows[:, None] * PRODUCT_SCALE
        return t if bias is None else t + bias


@mutant("QC-INT8-006", *SCALED)
class ConstantOneUlpOff(Steps):
    """The constant is one ulp off 1/127^2."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c.astype(np.float32) * rows[:, None] * columns[None, :] * np.nextafter(PRODUCT_SCALE, ZERO)
        return t if bias is None else t + bias


@mutant("QC-INT8-006", *SCALED)
class ConstantDivides(Steps):
    """The product is divided by 127^2 instead of multiplied by the constant."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c.astype(np.float32) * rows[:, None] * columns[None, :] / np.float32(127 * 127)
        return t if bias is None else t + bias


@mutant("QC-INT8-006", *SCALED)
class ProductBiasFused(Steps):
    """The last multiplication and the bias are one fused multiply-add, as in bitsandbytes' CUDA kernel."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c.astype(np.float32) * rows[:, None] * columns[None, :]
        if bias is None:
            return t * PRODUCT_SCALE
        return (t.astype(np.float64) * PRODUCT_SCALE + bias).astype(np.float32)


@mutant("QC-INT8-006", *SCALED)
class ProductBiasDropped(Steps):
    """The bias is ignored."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        return super().decode_product(c, rows, columns, None)


@mutant("QC-INT8-006", *SCALED)
class StatisticsSwapped(Steps):
    """Row and column statistics change places."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        return super().decode_product(c, np.resize(columns, len(rows)), np.resize(rows, len(columns)), bias)


@mutant("QC-INT8-006", *SCALED)
class IntegersTruncatedToFloat(Steps):
    """An integer beyond 2^24 is truncated to float32 instead of rounded."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        wide = np.abs(c.astype(np.int64))
        drop = np.maximum(np.floor(np.log2(np.maximum(wide, 1))).astype(np.int64) - 23, 0)
        truncated = np.sign(c) * ((wide >> drop) << drop)
        t = truncated.astype(np.float32) * rows[:, None] * columns[None, :] * PRODUCT_SCALE
        return t if bias is None else t + bias


@mutant("QC-INT8-007", "int8_scaled_gemm")
class FusedProductUnrounded(Steps):
    """The fused product keeps float64 through its scales and rounds once."""

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c * rows[:, None].astype(np.float64) * columns[None, :] * PRODUCT_SCALE
        return (t if bias is None else t + bias).astype(np.float32)


@mutant("QC-INT8-008", "int8_dequantize_rows")
class RowsDivide(Steps):
    """Codes are divided by 127 instead of multiplied by the constant."""

    def decode_rows(self, codes: I8, rows: F32) -> F32:
        return codes.astype(np.float32) * rows[:, None] / np.float32(127)


@mutant("QC-INT8-008", "int8_dequantize_rows")
class RowsScaleFirst(Steps):
    """The row statistic is multiplied by the constant first."""

    def decode_rows(self, codes: I8, rows: F32) -> F32:
        return codes.astype(np.float32) * (rows[:, None] * ROW_SCALE)


@mutant("QC-INT8-008", "int8_dequantize_rows")
class RowsScaledAsColumns(Steps):
    """The statistic of the column's number is used."""

    def decode_rows(self, codes: I8, rows: F32) -> F32:
        if not rows.size:
            return super().decode_rows(codes, rows)
        return codes.astype(np.float32) * np.resize(rows, codes.shape[1])[None, :] * ROW_SCALE
