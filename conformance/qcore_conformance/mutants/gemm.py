"""Mutants of the W4A16 product (docs/spec/40-gemm-4bit.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qcore.backend import PreparedGemm, Weight4bit
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, ZERO, Steps

OP = "gemm_4bit"


def _cast(values: F32, dtype: torch.dtype) -> F32:
    return torch.from_numpy(values).to(dtype).to(torch.float32).numpy()


def _chained(x: F32, w: F32, dtype: torch.dtype) -> F32:
    """The sum over k in order, every partial sum rounded to ``dtype``."""
    total = torch.zeros(len(x), len(w), dtype=dtype)
    for k in range(x.shape[1]):
        product = torch.from_numpy(np.outer(x[:, k], w[:, k]))
        total = (total.to(torch.float32) + product).to(dtype)
    return total.to(torch.float32).numpy()


@mutant("QC-GEMM4-002", OP)
class LastRowZeroed(Steps):
    """The last row is zero when there is more than one and their number is odd: half a tile was forgotten."""

    def sum_products(self, x: F32, w: F32) -> F32:
        y = super().sum_products(x, w)
        if len(y) > 1 and len(y) % 2:
            y[-1] = 0
        return y


@mutant("QC-GEMM4-002", OP)
class LastColumnZeroed(Steps):
    """The last output column is zero when N is no multiple of 4."""

    def sum_products(self, x: F32, w: F32) -> F32:
        y = super().sum_products(x, w)
        if y.shape[1] % 4:
            y[:, -1] = 0
        return y


@mutant("QC-GEMM4-002", OP)
class LastProductDropped(Steps):
    """The last product of an odd K is dropped."""

    def sum_products(self, x: F32, w: F32) -> F32:
        keep = x.shape[1] - x.shape[1] % 2
        return super().sum_products(x[:, :keep], w[:, :keep])


@mutant("QC-GEMM4-002", OP)
class TailOfSixteenDropped(Steps):
    """What is left of K after steps of 16 is dropped, unless K is shorter than one step."""

    def sum_products(self, x: F32, w: F32) -> F32:
        keep = x.shape[1] - x.shape[1] % 16 if x.shape[1] >= 16 else x.shape[1]
        return super().sum_products(x[:, :keep], w[:, :keep])


@mutant("QC-GEMM4-002", OP)
class ProductCountedTwice(Steps):
    """Two halves of K overlap by one product."""

    def sum_products(self, x: F32, w: F32) -> F32:
        y, middle = super().sum_products(x, w), x.shape[1] // 2
        return y + np.outer(x[:, middle], w[:, middle]) if x.shape[1] > 1 else y


@mutant("QC-GEMM4-002", OP)
class BfloatAccumulator(Steps):
    """Partial sums are kept in bfloat16."""

    def sum_products(self, x: F32, w: F32) -> F32:
        return _chained(x, w, torch.bfloat16)


@mutant("QC-GEMM4-002", OP)
class HalfAccumulator(Steps):
    """Partial sums are kept in float16."""

    def sum_products(self, x: F32, w: F32) -> F32:
        return _chained(x, w, torch.float16)


@mutant("QC-GEMM4-002", OP)
class SplitSumsInHalf(Steps):
    """The partial sums of two halves of K are exchanged in float16."""

    def sum_products(self, x: F32, w: F32) -> F32:
        middle = x.shape[1] // 2
        first, second = (
            super().sum_products(x[:, :middle], w[:, :middle]),
            super().sum_products(x[:, middle:], w[:, middle:]),
        )
        return _cast(first, torch.float16) + _cast(second, torch.float16)


@mutant("QC-GEMM4-002", OP)
class TensorFloatInputs(Steps):
    """Inputs of the matrix unit keep ten mantissa bits."""

    def sum_products(self, x: F32, w: F32) -> F32:
        def short(a: F32) -> F32:
            return (a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

        return super().sum_products(short(np.ascontiguousarray(x)), short(np.ascontiguousarray(w)))


@mutant("QC-GEMM4-002", OP)
class OffsetsCancel(Steps):
    """Every element gets a large constant that is taken off the sum again, which loses low bits."""

    def sum_products(self, x: F32, w: F32) -> F32:
        return (super().sum_products(x, w) + np.float32(64)) - np.float32(64)


@mutant("QC-GEMM4-002", OP)
class DepthAboveCeiling(Steps):
    """The backend declares a chain depth above K + 8, which would excuse anything."""

    declarations: ClassVar[Mapping[str, Any]] = {
        "gemm_4bit": {"depth": {"lanes": 1, "extra": 10_000}, "weight_rounding": "float32"}
    }


@mutant("QC-GEMM4-002", OP)
class DepthUnderstated(Steps):
    """The backend declares a tree and sums in one chain."""

    declarations: ClassVar[Mapping[str, Any]] = {
        "gemm_4bit": {"depth": {"lanes": 2**30, "extra": 1}, "weight_rounding": "float32"}
    }

    def sum_products(self, x: F32, w: F32) -> F32:
        return _chained(x, w, torch.float32)


@mutant("QC-GEMM4-002", OP)
class DepthNotDeclared(Steps):
    """The backend declares nothing about its sums."""

    declarations: ClassVar[Mapping[str, Any]] = {}


@mutant("QC-GEMM4-001", OP)
class WeightRoundingNotDeclared(Steps):
    """The declared weight rounding is none of the two that the spec knows."""

    declarations: ClassVar[Mapping[str, Any]] = {
        "gemm_4bit": {"depth": {"lanes": 1, "extra": 8}, "weight_rounding": "bfloat16"}
    }


@mutant("QC-GEMM4-001", OP)
class WeightsInBfloat(Steps):
    """Weights are rounded to bfloat16 whatever the dtype of X, and declared as float32."""

    def gemm_weights(self, weight: Weight4bit, dtype: torch.dtype, rows: int) -> F32:
        return _cast(super().gemm_weights(weight, dtype, rows), torch.bfloat16)


@mutant("QC-GEMM4-001", OP)
class WeightsDependOnBatch(Steps):
    """From 9 rows on, another kernel rounds the weights to the dtype of X; float32 is declared."""

    def gemm_weights(self, weight: Weight4bit, dtype: torch.dtype, rows: int) -> F32:
        w = super().gemm_weights(weight, dtype, rows)
        return _cast(w, dtype) if rows > 8 else w


@mutant("QC-GEMM4-001", OP)
class WeightsInBfloatForSmallBatch(Steps):
    """For a single row the weights are rounded to bfloat16 in every dtype."""

    def gemm_weights(self, weight: Weight4bit, dtype: torch.dtype, rows: int) -> F32:
        w = super().gemm_weights(weight, dtype, rows)
        return _cast(w, torch.bfloat16) if rows == 1 else w


@mutant("QC-GEMM4-001", OP)
class OneAbsmaxPerRowStart(Steps):
    """A step of 16 columns uses the absmax of its first element, wrong where a block ends inside it."""

    def gemm_weights(self, weight: Weight4bit, dtype: torch.dtype, rows: int) -> F32:
        w = super().gemm_weights(weight, dtype, rows)
        if not w.size:
            return w
        n, k = weight.shape
        first = np.arange(n)[:, None] * k + np.arange(k)[None, :] // 16 * 16
        absmax = self.weight_absmax(weight)[first // weight.blocksize]
        codes = self.unpack(weight.packed.numpy().reshape(-1))[: n * k].reshape(n, k)
        return self.table(weight.quant_type)[codes] * absmax


@mutant("QC-GEMM4-001", OP)
class OddRowsMisread(Steps):
    """With an odd K the rows that start inside a byte are read from its start."""

    def gemm_weights(self, weight: Weight4bit, dtype: torch.dtype, rows: int) -> F32:
        w = super().gemm_weights(weight, dtype, rows).copy()
        if w.shape[1] % 2:
            w[1::2, 1:] = w[1::2, :-1].copy()
        return w


@mutant("QC-GEMM4-003", OP)
class BiasDropped(Steps):
    """The bias is ignored."""

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return y


@mutant("QC-GEMM4-003", OP)
class BiasPerRow(Steps):
    """The bias is indexed by the row of Y instead of its column."""

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return y + bias[np.arange(len(y)) % len(bias)][:, None]


@mutant("QC-GEMM4-003", OP)
class BiasAfterRounding(Steps):
    """The sum is rounded to the dtype of Y before the bias is added: two roundings."""

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return _cast(y, dtype) + bias


@mutant("QC-GEMM4-003", OP)
class BiasInOutputDtype(Steps):
    """A float32 bias is rounded to the dtype of Y before it is added."""

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return y + _cast(bias, dtype)


@mutant("QC-GEMM4-003", OP)
class BiasTwice(Steps):
    """Both halves of a split sum add the bias."""

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return y + bias + bias


@mutant("QC-GEMM4-006", OP)
class NanLeaksAcrossRows(Steps):
    """A NaN in one row makes the others NaN: rows of a tile are mixed with zero weights."""

    def sum_products(self, x: F32, w: F32) -> F32:
        return super().sum_products(x, w) + ZERO * x.sum(dtype=np.float32)


@mutant("QC-GEMM4-006", OP)
class ZeroWeightsSkipped(Steps):
    """Products with a zero weight are skipped, so that NaN times 0 vanishes."""

    def sum_products(self, x: F32, w: F32) -> F32:
        with_nan = np.where(np.isnan(x), ZERO, x)
        hit = (np.isnan(x).astype(np.float32) @ (w != 0).astype(np.float32).T) > 0
        return np.where(hit, np.float32(np.nan), super().sum_products(with_nan, w))


@mutant("QC-GEMM4-006", OP)
class NanCleaned(Steps):
    """A NaN in X counts as 0."""

    def sum_products(self, x: F32, w: F32) -> F32:
        return super().sum_products(np.where(np.isnan(x), ZERO, x), w)


@mutant("QC-GEMM4-007", OP)
class EmptySumSkipsBias(Steps):
    """With K = 0 the output is zero even where there is a bias."""

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        super().gemm_4bit(A, weight, bias, out=out)
        if weight.shape[1] == 0:
            out.zero_()


@mutant("QC-GEMM4-007", OP)
class EmptySumUnwritten(Steps):
    """With K = 0 the output is left as it was."""

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        before = out.clone()
        super().gemm_4bit(A, weight, bias, out=out)
        if weight.shape[1] == 0:
            out.copy_(before)


@mutant("QC-GEMM4-003", OP)
class PreparedHandleForgetsBias(Steps):
    """The prepared handle drops the bias; the plain op is right."""

    def prepare_gemm_4bit(self, weight: Weight4bit) -> PreparedGemm:
        return lambda A, bias, out: self.gemm_4bit(A, weight, None, out=out)


@mutant("QC-GEMM4-001", OP)
class PreparedHandleForgetsNesting(Steps):
    """The prepared handle decodes a nested absmax without its offset; the plain op is right."""

    def prepare_gemm_4bit(self, weight: Weight4bit) -> PreparedGemm:
        if weight.nested_offset is None:
            return super().prepare_gemm_4bit(weight)
        zero = torch.zeros_like(weight.nested_offset)
        without = Weight4bit(**{**vars(weight), "nested_offset": zero})
        return lambda A, bias, out: self.gemm_4bit(A, without, bias, out=out)


@mutant("QC-GEMM4-005", OP)
class ResultOneUlpOff(Steps):
    """Every float32 sum is one ulp too large before it is rounded: inside any bound, but not exact."""

    def sum_products(self, x: F32, w: F32) -> F32:
        y = super().sum_products(x, w)
        return np.where(np.isfinite(y) & (y != 0), np.nextafter(y, np.float32(np.inf)), y)
