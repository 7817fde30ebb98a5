"""Mutants of the product with outlier columns (QC-INT8-010)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qcore.backend import PreparedInt8, Weight8bit
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, I8, Bools, Steps

LINEAR = "int8_linear"


@mutant("QC-INT8-010", LINEAR)
class OutliersBackwards(Steps):
    """Outlier columns are added from the last to the first."""

    def outlier_columns(self, outlier: Bools) -> NDArray[np.intp]:
        return super().outlier_columns(outlier)[::-1]


@mutant("QC-INT8-010", LINEAR)
class OutliersCutOff(Steps):
    """There is room for 256 outlier columns, and the rest is dropped."""

    def outlier_columns(self, outlier: Bools) -> NDArray[np.intp]:
        return super().outlier_columns(outlier)[:256]


@mutant("QC-INT8-010", LINEAR)
class FirstOutlierDropped(Steps):
    """The list of outlier columns begins with the second."""

    def outlier_columns(self, outlier: Bools) -> NDArray[np.intp]:
        return super().outlier_columns(outlier)[1:]


@mutant("QC-INT8-010", LINEAR)
class OutlierProductFused(Steps):
    """Product and sum of an outlier column are one fused multiply-add."""

    def add_column(self, t: F32, x: F32, w: F32) -> F32:
        return (t + x[:, None].astype(np.float64) * w[None, :]).astype(np.float32)


@mutant("QC-INT8-010", LINEAR)
class OutliersApart(Steps):
    """The outlier products are summed on their own and added at the end, as two matrix products would."""

    def add_outliers(self, t: F32, x: F32, w: F32, columns: NDArray[np.intp]) -> F32:
        return t + super().add_outliers(np.zeros_like(t), x, w, columns)


@mutant("QC-INT8-010", LINEAR)
class OutliersRounded(Steps):
    """Weights of outlier columns are rounded to float16, as in bitsandbytes."""

    def add_column(self, t: F32, x: F32, w: F32) -> F32:
        return super().add_column(t, x, w.astype(np.float16).astype(np.float32))


@mutant("QC-INT8-010", LINEAR)
class OutliersCountedTwice(Steps):
    """Codes of outlier columns are not cleared, so that their columns are multiplied twice."""

    def zero_outliers(self, codes: I8, outlier: Bools) -> I8:
        return codes


@mutant("QC-INT8-010", LINEAR)
class BiasLostBesideOutliers(Steps):
    """Where there are outlier columns, the bias is dropped."""

    def int8_linear(
        self, A: Tensor, W: Weight8bit, threshold: float, bias: Tensor | None, *, out: Tensor, outliers: Tensor | None
    ) -> None:
        found = self.outliers(self.load(A).reshape(A.shape), threshold)
        super().int8_linear(A, W, threshold, None if found.any() else bias, out=out, outliers=outliers)


@mutant("QC-INT8-010", LINEAR)
class PreparedInt8ForgetsBias(Steps):
    """The prepared handle drops the bias; the plain op is right."""

    def prepare_int8_linear(self, W: Weight8bit) -> PreparedInt8:
        return lambda A, t, bias, out, found: self.int8_linear(A, W, t, None, out=out, outliers=found)


@mutant("QC-INT8-010", LINEAR)
class PreparedInt8ForgetsThreshold(Steps):
    """The prepared handle leaves no column out of the integer product; the plain op is right."""

    def prepare_int8_linear(self, W: Weight8bit) -> PreparedInt8:
        def linear(A: Tensor, threshold: float, bias: Tensor | None, out: Tensor, found: Tensor | None) -> None:
            self.int8_linear(A, W, threshold, bias, out=out, outliers=found)
            self.int8_linear(A, W, 0.0, bias, out=out, outliers=None)

        return linear
