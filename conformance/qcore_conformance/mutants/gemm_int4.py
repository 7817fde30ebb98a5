"""Mutants of the product with integers in groups (docs/spec/70-int4.md)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcore.backend import PreparedGemm, WeightInt4
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, Steps

OP = "gemm_int4"


@mutant("QC-INT4-001", OP)
class LowNibbleFirst(Steps):
    """The low nibble of a byte comes first."""

    def int4_codes(self, weight: WeightInt4) -> NDArray[np.int16]:
        swapped = (weight.packed << 4) | (weight.packed >> 4)
        return super().int4_codes(replace(weight, packed=swapped))


@mutant("QC-INT4-001", OP)
class GroupsRunAcrossRows(Steps):
    """Groups are blocks of the flat tensor, so that a short last group shifts those of the rows below."""

    def int4_weights(self, weight: WeightInt4, dtype: torch.dtype, rows: int) -> F32:
        n, k = weight.shape
        flat = (np.arange(n)[:, None] * k + np.arange(k)[None, :]) // weight.group_size
        difference = self.int4_codes(weight) - self.int4_zeros(weight).reshape(-1)[flat]
        values = difference.astype(np.float32) * self.int4_scales(weight).reshape(-1)[flat]
        return values if weight.perm is None else self.int4_order(values, weight.perm.numpy())


@mutant("QC-INT4-001", OP)
class GroupOfThirtyTwo(Steps):
    """A step of 32 columns takes the scale of its first, wrong for groups of 16."""

    def int4_groups(self, weight: WeightInt4) -> NDArray[np.intp]:
        return super().int4_groups(weight)[np.arange(weight.shape[1]) // 32 * 32]


@mutant("QC-INT4-002", OP)
class ZeroPointAddsOne(Steps):
    """Zero points are taken for those of GPTQ's first format, which stores one less."""

    def int4_zeros(self, weight: WeightInt4) -> NDArray[np.int16]:
        return super().int4_zeros(weight) + np.int16(weight.zeros is not None)


@mutant("QC-INT4-002", OP)
class ZeroPointOfFourBits(Steps):
    """Zero points lose their upper nibble."""

    def int4_zeros(self, weight: WeightInt4) -> NDArray[np.int16]:
        return super().int4_zeros(weight) & np.int16(15)


@mutant("QC-INT4-002", OP)
class SymmetricAtSeven(Steps):
    """Without zero points the codes are centred at 7.5, as absmax / 7.5 would ask for."""

    def int4_weights(self, weight: WeightInt4, dtype: torch.dtype, rows: int) -> F32:
        w = super().int4_weights(weight, dtype, rows)
        if weight.zeros is not None:
            return w
        half = np.float32(0.5) * self.int4_scales(weight)[:, self.int4_groups(weight)]
        return w + (half if weight.perm is None else self.int4_order(half, weight.perm.numpy()))


@mutant("QC-INT4-002", OP)
class ScaledBeforeSubtracting(Steps):
    """``q * s - z * s``: two products, each rounded, then the difference."""

    def int4_weights(self, weight: WeightInt4, dtype: torch.dtype, rows: int) -> F32:
        group = self.int4_groups(weight)
        scale = self.int4_scales(weight)[:, group]
        values = self.int4_codes(weight).astype(np.float32) * scale
        values = values - self.int4_zeros(weight)[:, group].astype(np.float32) * scale
        return values if weight.perm is None else self.int4_order(values, weight.perm.numpy())


@mutant("QC-INT4-002", OP)
class ScalesInHalf(Steps):
    """Scales are rounded to float16."""

    def int4_scales(self, weight: WeightInt4) -> F32:
        return super().int4_scales(weight).astype(np.float16).astype(np.float32)


@mutant("QC-INT4-002", OP)
class Int4WeightsDependOnBatch(Steps):
    """From 9 rows on, another kernel rounds the weights to the dtype of X; float32 is declared."""

    def int4_weights(self, weight: WeightInt4, dtype: torch.dtype, rows: int) -> F32:
        w = super().int4_weights(weight, dtype, rows)
        return torch.from_numpy(w).to(dtype).float().numpy() if rows > 8 else w


@mutant("QC-INT4-003", OP)
class OrderIgnored(Steps):
    """The permutation is not read."""

    def int4_order(self, values: F32, perm: NDArray[np.int32]) -> F32:
        return values


@mutant("QC-INT4-003", OP)
class OrderInverted(Steps):
    """The permutation is taken the other way round: scattered where it should gather."""

    def int4_order(self, values: F32, perm: NDArray[np.int32]) -> F32:
        return values[:, perm]


@mutant("QC-INT4-003", OP)
class PreparedHandleForgetsOrder(Steps):
    """The prepared handle drops the permutation; the plain op is right."""

    def prepare_gemm_int4(self, weight: WeightInt4) -> PreparedGemm:
        plain = replace(weight, perm=None)
        return lambda A, bias, out: self.gemm_int4(A, plain, bias, out=out)


@mutant("QC-INT4-004", OP)
class GroupSumsInHalf(Steps):
    """The sums of two halves of K are exchanged in float16."""

    def sum_products(self, x: F32, w: F32) -> F32:
        middle = x.shape[1] // 2
        halves = (super().sum_products(x[:, part], w[:, part]) for part in (slice(middle), slice(middle, None)))
        first, second = (half.astype(np.float16).astype(np.float32) for half in halves)
        return first + second


@mutant("QC-INT4-004", OP)
class LastShortGroupDropped(Steps):
    """What is left of K after whole groups is dropped."""

    def int4_weights(self, weight: WeightInt4, dtype: torch.dtype, rows: int) -> F32:
        k, g = weight.shape[1], min(weight.group_size, max(weight.shape[1], 1))
        w = super().int4_weights(weight, dtype, rows).copy()
        left = np.arange(k) >= k - k % g
        w[:, left if weight.perm is None else np.isin(np.arange(k), weight.perm.numpy()[left])] = 0
        return w


@mutant("QC-INT4-004", OP)
class BiasOfSixteenBits(Steps):
    """A float32 bias is rounded to the dtype of Y before it is added."""

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return y + torch.from_numpy(bias).to(dtype).float().numpy()


@mutant("QC-INT4-007", OP)
class ZeroCodesSkipped(Steps):
    """Products with a weight of 0 are skipped, so that NaN times 0 vanishes."""

    def sum_products(self, x: F32, w: F32) -> F32:
        clean = np.where(np.isnan(x), np.float32(0), x)
        hit = (np.isnan(x).astype(np.float32) @ (w != 0).astype(np.float32).T) > 0
        return np.where(hit, np.float32(np.nan), super().sum_products(clean, w))


@mutant("QC-INT4-008", OP)
class NoGroupsNoBias(Steps):
    """With K = 0 the output is zero even where there is a bias."""

    def gemm_int4(self, A: Tensor, weight: WeightInt4, bias: Tensor | None, *, out: Tensor) -> None:
        super().gemm_int4(A, weight, bias, out=out)
        if weight.shape[1] == 0:
            out.zero_()
