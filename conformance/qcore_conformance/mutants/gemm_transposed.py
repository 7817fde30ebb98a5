"""Mutants of the transposed W4A16 product (QC-GEMM4-008 to QC-GEMM4-012)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qcore.backend import Weight4bit
from qcore.backend.interface import PreparedTransposed
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, ZERO, Steps

OP = "gemm_4bit_transposed"


@mutant("QC-GEMM4-008", OP)
class WeightNotTransposed(Steps):
    """A square weight is multiplied as ``gemm_4bit`` does."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        return super().sum_rows(y, w.T if w.shape[0] == w.shape[1] else w)


@mutant("QC-GEMM4-008", OP)
class TransposedWeightsInBfloat(Steps):
    """Weights are rounded to bfloat16 in every dtype, and declared as float32."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        return super().sum_rows(y, torch.from_numpy(w).to(torch.bfloat16).to(torch.float32).numpy())


@mutant("QC-GEMM4-008", OP)
class RowsShareAnAbsmax(Steps):
    """The second row of a pair is decoded with the absmax of the first."""

    def transposed_weights(self, weight: Weight4bit) -> F32:
        w = super().transposed_weights(weight).copy()
        n, k = weight.shape
        if k % weight.blocksize == 0:
            absmax = self.weight_absmax(weight).reshape(n, -1)
            ratio = np.repeat(absmax[0 : n - 1 : 2] / absmax[1:n:2], weight.blocksize, axis=1)
            w[1::2] *= ratio
        return w


@mutant("QC-GEMM4-008", OP)
class AnotherRoundingThanTheProduct(Steps):
    """``gemm_4bit`` declares float32 weights, this op rounds them to the dtype of Y and says so."""

    declarations: ClassVar[Mapping[str, Any]] = Steps.declarations | {
        OP: {"depth": {"lanes": 1, "extra": 8}, "weight_rounding": "compute"}
    }


@mutant("QC-GEMM4-009", OP)
class OddRowDropped(Steps):
    """The last row of W is left out when their number is odd: rows are taken in pairs."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        keep = len(w) - len(w) % 2 if len(w) > 1 else len(w)
        return super().sum_rows(y[:, :keep], w[:keep])


@mutant("QC-GEMM4-009", OP)
class SpanCountedTwice(Steps):
    """Where the rows of W are taken in spans of 512, the row at the seam is counted in both."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        x = super().sum_rows(y, w)
        return x + np.outer(y[:, 512], w[512]) if len(w) > 512 else x


@mutant("QC-GEMM4-009", OP)
class SpansMeetInBfloat(Steps):
    """The sums of spans of 128 rows are exchanged in bfloat16."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        total = np.zeros((len(y), w.shape[1]), np.float32)
        for start in range(0, len(w), 128):
            part = torch.from_numpy(super().sum_rows(y[:, start : start + 128], w[start : start + 128]))
            total += part.to(torch.bfloat16).to(torch.float32).numpy()
        return total


@mutant("QC-GEMM4-009", OP)
class ColumnsOutOfOrder(Steps):
    """Columns stay in the order in which nibbles are decoded where K is a multiple of 64."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        x = super().sum_rows(y, w)
        m, k = x.shape
        return x.reshape(m, k // 64, 16, 4).swapaxes(2, 3).reshape(m, k) if k % 64 == 0 else x


@mutant("QC-GEMM4-009", OP)
class TransposedTailUnwritten(Steps):
    """Columns beyond the last whole 64 are left as they were."""

    def gemm_4bit_transposed(self, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
        before = out.clone()
        super().gemm_4bit_transposed(A, weight, out=out)
        k = weight.shape[1]
        if k > 64 and k % 64:
            out.view(-1, k)[:, k // 64 * 64 :] = before.view(-1, k)[:, k // 64 * 64 :]


@mutant("QC-GEMM4-009", OP)
class SmallGradientsFlushed(Steps):
    """Gradients below 2^-76 count as 0, as on a unit that flushes the products."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        return super().sum_rows(np.where(np.abs(y) < 2.0**-76, ZERO, y), w)


@mutant("QC-GEMM4-009", OP)
class TransposedDepthNotDeclared(Steps):
    """The backend declares ``gemm_4bit`` only."""

    declarations: ClassVar[Mapping[str, Any]] = {"gemm_4bit": Steps.declarations["gemm_4bit"]}


@mutant("QC-GEMM4-010", OP)
class TransposedOneUlpOff(Steps):
    """Every float32 sum is one ulp too large before it is rounded: inside any bound, but not exact."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        x = super().sum_rows(y, w)
        return np.where(np.isfinite(x) & (x != 0), np.nextafter(x, np.float32(np.inf)), x)


@mutant("QC-GEMM4-011", OP)
class GradientNanLeaks(Steps):
    """A NaN in one row makes the others NaN: rows of a tile are mixed with zero weights."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        return super().sum_rows(y, w) + ZERO * y.sum(dtype=np.float32)


@mutant("QC-GEMM4-011", OP)
class GradientNanCleaned(Steps):
    """A NaN counts as 0."""

    def sum_rows(self, y: F32, w: F32) -> F32:
        return super().sum_rows(np.where(np.isnan(y), ZERO, y), w)


@mutant("QC-GEMM4-012", OP)
class EmptyTransposedUnwritten(Steps):
    """With N = 0 the output is left as it was."""

    def gemm_4bit_transposed(self, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
        before = out.clone()
        super().gemm_4bit_transposed(A, weight, out=out)
        if weight.shape[0] == 0:
            out.copy_(before)


@mutant("QC-GEMM4-008", OP)
class PreparedTransposedForgetsNesting(Steps):
    """The prepared handle decodes a nested absmax without its offset; the plain op is right."""

    def prepare_gemm_4bit_transposed(self, weight: Weight4bit) -> PreparedTransposed:
        if weight.nested_offset is None:
            return super().prepare_gemm_4bit_transposed(weight)
        without = Weight4bit(**{**vars(weight), "nested_offset": torch.zeros_like(weight.nested_offset)})
        return lambda A, out: self.gemm_4bit_transposed(A, without, out=out)
