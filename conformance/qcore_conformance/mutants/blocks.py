"""Mutants of absmax and scaling, in every op that quantizes blocks (QC-NUM-004, QC-Q8-002, QC-Q8-003, QC-4BIT-001)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, ONE, ZERO, Steps

BLOCKWISE = ("quantize_blockwise", "quantize_4bit", "quantize_absmax")
ON_FLOATS = ("quantize_blockwise", "quantize_4bit")


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxOfNan(Steps):
    """A NaN element makes its block's absmax NaN."""

    def block_absmax(self, blocks: F32) -> F32:
        return np.abs(blocks).max(axis=1, initial=ZERO)


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxOfPositives(Steps):
    """The absmax is the largest value, not the largest magnitude."""

    def block_absmax(self, blocks: F32) -> F32:
        return np.where(np.isnan(blocks), ZERO, blocks).max(axis=1, initial=ZERO)


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxSkipsLast(Steps):
    """The last element of a block is left out of its absmax."""

    def block_absmax(self, blocks: F32) -> F32:
        return super().block_absmax(blocks[:, :-1])


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxFiniteOnly(Steps):
    """Infinite elements are left out of the absmax, so the damage no longer shows."""

    def block_absmax(self, blocks: F32) -> F32:
        return super().block_absmax(np.where(np.isinf(blocks), ZERO, blocks))


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxStartsTiny(Steps):
    """The maximum starts from 1e-38 instead of 0, which is what an all-zero block then stores."""

    def block_absmax(self, blocks: F32) -> F32:
        return np.fmax(super().block_absmax(blocks), np.float32(1e-38))


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxThroughHalf(Steps):
    """The absmax is rounded to float16 on the way."""

    def block_absmax(self, blocks: F32) -> F32:
        return super().block_absmax(blocks).astype(np.float16).astype(np.float32)


@mutant("QC-Q8-002", *BLOCKWISE)
class AbsmaxLanesLost(Steps):
    """A warp reduction stops one step early: only even elements reach the absmax."""

    def block_absmax(self, blocks: F32) -> F32:
        return super().block_absmax(blocks[:, ::2])


@mutant("QC-Q8-003", *BLOCKWISE)
class ScaleDivides(Steps):
    """Elements are divided by absmax instead of multiplied by its reciprocal."""

    def scale(self, blocks: F32, absmax: F32) -> F32:
        return blocks / absmax[:, None]


@mutant("QC-Q8-003", *BLOCKWISE)
class ReciprocalOneUlpOff(Steps):
    """The reciprocal is one ulp too large."""

    def reciprocal(self, absmax: F32) -> F32:
        return np.nextafter(ONE / absmax, np.float32(np.inf))


@mutant("QC-Q8-003", *BLOCKWISE)
class ReciprocalApproximate(Steps):
    """The reciprocal is a 12-bit estimate with one Newton step, as fast-math makes it."""

    def reciprocal(self, absmax: F32) -> F32:
        bits = (ONE / absmax).view(np.uint32) & np.uint32(0xFFFFF000)
        estimate = bits.view(np.float32)
        return estimate * (np.float32(2) - absmax * estimate)


@mutant("QC-Q8-003", *BLOCKWISE)
class ReciprocalOfDenormalClamped(Steps):
    """A reciprocal that overflows is clamped to the largest float instead of staying infinite."""

    def reciprocal(self, absmax: F32) -> F32:
        return np.minimum(ONE / absmax, np.finfo(np.float32).max)


@mutant("QC-Q8-003", *BLOCKWISE)
class NanToLowestCode(Steps):
    """A quotient that is NaN falls through every comparison and takes the lowest code, not that of 0."""

    def clean(self, y: F32, absmax: F32) -> F32:
        return np.where((absmax == 0)[:, None], ZERO, np.where(np.isnan(y), np.float32(-1), y))


@mutant("QC-Q8-003", *BLOCKWISE)
class ZeroBlockToLowestCode(Steps):
    """An all-zero block is scaled by -1 and takes the lowest code."""

    def clean(self, y: F32, absmax: F32) -> F32:
        return np.where((absmax == 0)[:, None], np.float32(-1), super().clean(y, absmax))


@mutant("QC-NUM-004", *BLOCKWISE)
class TailDivides(Steps):
    """A tail block is divided by its absmax while full blocks are multiplied by the reciprocal."""

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        y, absmax = super().quotients(x, blocksize)
        tail = x.size - x.size % blocksize
        if tail < x.size:
            y[tail:] = self.clean(x[None, tail:] / absmax[-1], absmax[-1:])[0]
        return y, absmax


@mutant("QC-NUM-004", *BLOCKWISE)
class TailTakesLastBlock(Steps):
    """A short tail is scaled with the absmax of the block before it."""

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        y, absmax = super().quotients(x, blocksize)
        tail = x.size - x.size % blocksize
        if tail < x.size and tail:
            y[tail:] = self.clean(self.scale(x[None, tail:], absmax[-2:-1]), absmax[-2:-1])[0]
        return y, absmax


@mutant("QC-NUM-004", *ON_FLOATS)
class BlocksRestartPerRow(Steps):
    """Blocks restart in every row of a matrix instead of running across rows."""

    def load(self, tensor: Tensor) -> F32:
        self.row = tensor.shape[-1] if tensor.dim() >= 2 and tensor.numel() else 0
        return super().load(tensor)

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        y, absmax = super().quotients(x, blocksize)
        if self.row % blocksize:
            rows = [super(BlocksRestartPerRow, self).quotients(row, blocksize) for row in x.reshape(-1, self.row)]
            y = np.concatenate([row[0] for row in rows])
            absmax = np.concatenate([row[1] for row in rows])[: absmax.size]
        return y, absmax


@mutant("QC-NUM-005", *BLOCKWISE)
class CountInSixteenBits(Steps):
    """The element count is held in 16 bits, as 2^31 elements are in an int: what lies beyond is not scaled."""

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        y, absmax = super().quotients(x, blocksize)
        if x.size > 0xFFFF:
            y[x.size & 0xFFFF :] = 0
        return y, absmax


@mutant("QC-NUM-005", *ON_FLOATS)
class LargestBlocksizeHalved(Steps):
    """Blocksize 4096 has no kernel of its own and is launched as 2048."""

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        y, absmax = super().quotients(x, blocksize)
        if blocksize == 4096:
            half, maxima = super().quotients(x, 2048)
            return half, maxima[: absmax.size]
        return y, absmax


@mutant("QC-NUM-002", *ON_FLOATS)
class ScaledInInputDtype(Steps):
    """Elements are scaled in the dtype of the input instead of float32."""

    def load(self, tensor: Tensor) -> F32:
        self.dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
        return super().load(tensor)

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        dtype = self.dtype
        y, absmax = super().quotients(x, blocksize)
        return torch.from_numpy(y).to(dtype).to(torch.float32).numpy(), absmax
