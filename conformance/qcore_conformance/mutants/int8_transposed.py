"""Mutants of the gradient of the LLM.int8() product (QC-INT8-011 to QC-INT8-015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qcore.backend import Weight8bit
from qcore.backend.interface import PreparedTransposed
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, ZERO, Steps

OP = "int8_linear_transposed"


def _bfloat(x: F32) -> F32:
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).to(torch.float32).numpy()


@mutant("QC-INT8-011", OP)
class Int8NotTransposed(Steps):
    """A square weight is multiplied as ``int8_linear`` does."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        return super().sum_int8_rows(y, w.T if w.shape[0] == w.shape[1] else w)


@mutant("QC-INT8-011", OP)
class GradientInBfloat(Steps):
    """The gradient is rounded to bfloat16 in every dtype, and nothing of it declared."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        return super().sum_int8_rows(_bfloat(y), w)


@mutant("QC-INT8-011", OP)
class ScaleOfTheRowBefore(Steps):
    """The second row of a pair is scaled as the first."""

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        scales = W.scales.clone()
        scales[1::2] = scales[: len(scales) // 2 * 2 : 2]
        super().int8_linear_transposed(A, Weight8bit(W.codes, scales), out=out)


@mutant("QC-INT8-011", OP)
class ScaledBy128(Steps):
    """Rows are scaled by 1 / 128."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        return super().sum_int8_rows(y, w) * np.float32(127 / 128)


@mutant("QC-INT8-011", OP)
class LowestCodeClamped(Steps):
    """A code of -128 counts as -127."""

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        super().int8_linear_transposed(A, Weight8bit(W.codes.clamp(min=-127), W.scales), out=out)


@mutant("QC-INT8-011", OP)
class SmallScaledGradientLost(Steps):
    """The gradient times the scale of its row is kept in float16, where small ones vanish."""

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        if A.dtype != torch.float16:
            super().int8_linear_transposed(A, W, out=out)
            return
        p = (A.float() * (W.scales / 127)).half().float()
        out.copy_(p @ W.codes.float())


@mutant("QC-INT8-012", OP)
class OddInt8RowDropped(Steps):
    """The last row of W is left out when their number is odd: rows are taken in pairs."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        keep = len(w) - len(w) % 2 if len(w) > 1 else len(w)
        return super().sum_int8_rows(y[:, :keep], w[:keep])


@mutant("QC-INT8-012", OP)
class Int8SpanCountedTwice(Steps):
    """Where the rows of W are taken in spans of 512, the row at the seam is counted in both."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        x = super().sum_int8_rows(y, w)
        return x + np.outer(y[:, 512], w[512]) if len(w) > 512 else x


@mutant("QC-INT8-012", OP)
class Int8TailUnwritten(Steps):
    """Columns beyond the last whole 64 are left as they were."""

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        before = out.clone()
        super().int8_linear_transposed(A, W, out=out)
        k = W.codes.shape[1]
        if k > 64 and k % 64:
            out.view(-1, k)[:, k // 64 * 64 :] = before.view(-1, k)[:, k // 64 * 64 :]


@mutant("QC-INT8-012", OP)
class SmallInt8GradientsFlushed(Steps):
    """Gradients below 2^-100 count as 0, as on a unit that flushes the products."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        return super().sum_int8_rows(np.where(np.abs(y) < 2.0**-100, ZERO, y), w)


@mutant("QC-INT8-012", OP)
class Int8DepthNotDeclared(Steps):
    """The backend declares nothing about this op."""

    declarations: ClassVar[Mapping[str, Any]] = {op: said for op, said in Steps.declarations.items() if op != OP}


@mutant("QC-INT8-013", OP)
class Int8OneUlpOff(Steps):
    """Every float32 sum is one ulp too large before it is rounded: inside any bound, but not exact."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        x = super().sum_int8_rows(y, w)
        return np.where(np.isfinite(x) & (x != 0), np.nextafter(x, np.float32(np.inf)), x)


@mutant("QC-INT8-014", OP)
class Int8NanLeaks(Steps):
    """A NaN in one row makes the others NaN: rows of a tile are mixed with zero weights."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        return super().sum_int8_rows(y, w) + ZERO * y.sum(dtype=np.float32)


@mutant("QC-INT8-014", OP)
class Int8NanCleaned(Steps):
    """A NaN counts as 0."""

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        return super().sum_int8_rows(np.where(np.isnan(y), ZERO, y), w)


@mutant("QC-INT8-015", OP)
class EmptyInt8Unwritten(Steps):
    """With N = 0 the output is left as it was."""

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        before = out.clone()
        super().int8_linear_transposed(A, W, out=out)
        if not len(W.codes):
            out.copy_(before)


@mutant("QC-INT8-011", OP)
class PreparedInt8TransposedForgetsScales(Steps):
    """The prepared handle takes the scale of the first row for all; the plain op is right."""

    def prepare_int8_linear_transposed(self, W: Weight8bit) -> PreparedTransposed:
        same = Weight8bit(W.codes, W.scales[:1].expand(len(W.scales)).contiguous())
        return lambda A, out: self.int8_linear_transposed(A, same, out=out)
