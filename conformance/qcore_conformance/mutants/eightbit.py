"""Mutants of the 8-bit codes and of nested absmax (QC-Q8-001, -004, -005; QC-NEST-001 to -003)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcore import codebooks
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, U8, ZERO, Bools, Steps

CODES = ("quantize_blockwise", "quantize_absmax")
NESTED = ("dequantize_absmax", "dequantize_4bit", "gemm_4bit")


@mutant("QC-Q8-004", *CODES)
class TieToLower(Steps):
    """A tie goes to the lower index, not to the even one."""

    def tie_counts(self, code: F32) -> Bools:
        return np.zeros(255, np.bool_)


@mutant("QC-Q8-004", *CODES)
class TieToHigher(Steps):
    """A tie goes to the higher index."""

    def tie_counts(self, code: F32) -> Bools:
        return code[:-1] < code[1:]


@mutant("QC-Q8-004", *CODES)
class TieToOdd(Steps):
    """A tie goes to the odd index."""

    def tie_counts(self, code: F32) -> Bools:
        return (np.arange(255) % 2 == 0) & (code[:-1] < code[1:])


@mutant("QC-Q8-004", *CODES)
class EqualCodesNotFirst(Steps):
    """A value that equals two neighbouring codes takes the second where that one is even."""

    def tie_counts(self, code: F32) -> Bools:
        return np.arange(255) % 2 == 1


@mutant("QC-Q8-004", *CODES)
class MidpointsUnrounded(Steps):
    """Midpoints are kept in float64 instead of being rounded to float32."""

    def midpoints(self, code: F32) -> F32:
        wide = code.astype(np.float64)
        return (wide[:-1] + wide[1:]) * 0.5


@mutant("QC-Q8-004", *CODES)
class MidpointsHalvedFirst(Steps):
    """A midpoint is the sum of two halves, which differs where the sum overflows or the halves are denormal."""

    def midpoints(self, code: F32) -> F32:
        half = np.float32(0.5)
        return code[:-1] * half + code[1:] * half


@mutant("QC-Q8-004", *CODES)
class LastCodeUnreachable(Steps):
    """The binary search ends one too early: code 255 is never given."""

    def codes_8bit(self, y: F32, code: F32) -> U8:
        return np.minimum(super().codes_8bit(y, code), np.uint8(254))


@mutant("QC-Q8-004", *CODES)
class LookupTable(Steps):
    """Codes come from a table of 65,536 bins over [-1, 1]: an exact 0 reads back as 2e-5 of absmax."""

    def codes_8bit(self, y: F32, code: F32) -> U8:
        bins = np.clip((y + np.float32(1)) * np.float32(32768), 0, 65535).astype(np.int64)
        return super().codes_8bit(((bins + 0.5) / 32768 - 1).astype(np.float32), code)


@mutant("QC-Q8-004", *CODES)
class ZeroCodeShifted(Steps):
    """An exact zero takes the code above that of 0."""

    def codes_8bit(self, y: F32, code: F32) -> U8:
        codes = super().codes_8bit(y, code)
        return np.where((y == 0) & (codes < 255), codes + np.uint8(1), codes).astype(np.uint8)


@mutant("QC-Q8-001", *CODES)
class CodebookNotChecked(Steps):
    """A codebook that is not ascending is sorted instead of refused."""

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        super().quantize_blockwise(A, _ascending(code), blocksize, absmax=absmax, out=out)

    def quantize_absmax(
        self, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor, nested_absmax: Tensor, offset: Tensor
    ) -> None:
        super().quantize_absmax(
            absmax, _ascending(code), blocksize, out=out, nested_absmax=nested_absmax, offset=offset
        )


def _ascending(code: Tensor) -> Tensor:
    return code.sort().values if code.dtype is torch.float32 else code


@mutant("QC-Q8-001", *CODES, "dequantize_blockwise", "dequantize_absmax")
class CodebookBuiltIn(Steps):
    """The dynamic codebook is compiled in, and the one that is given is not looked at."""

    def codes_8bit(self, y: F32, code: F32) -> U8:
        return super().codes_8bit(y, np.array(codebooks.DYNAMIC, np.float32))

    def decode_8bit(self, codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
        return super().decode_8bit(codes, absmax, np.array(codebooks.DYNAMIC, np.float32), blocksize)


@mutant("QC-Q8-006", "dequantize_blockwise")
class CodebookEntryOff(Steps):
    """One entry of the codebook in constant memory is off by 2e-4."""

    def decode_8bit(self, codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
        code = code.copy()
        code[201] += np.float32(2e-4)
        return super().decode_8bit(codes, absmax, code, blocksize)


@mutant("QC-Q8-005", "dequantize_blockwise", *NESTED[:1])
class DecodeInHalf(Steps):
    """Code times absmax is formed in float16."""

    def decode_8bit(self, codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
        product = code[codes].astype(np.float16) * self.spread(absmax, blocksize, codes.size).astype(np.float16)
        return product.astype(np.float32)


@mutant("QC-Q8-005", "dequantize_blockwise")
class DecodeSkipsZero(Steps):
    """A code whose value is 0 reads back as 0 even where absmax is infinite or NaN."""

    def decode_8bit(self, codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
        return np.where(code[codes] == 0, ZERO, super().decode_8bit(codes, absmax, code, blocksize))


@mutant("QC-Q8-005", "dequantize_blockwise", "dequantize_absmax")
class SignedCodes(Steps):
    """Codes are read as signed bytes, and those above 127, now negative, are clamped to 0."""

    def decode_8bit(self, codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
        return code[np.maximum(codes.view(np.int8), 0)] * self.spread(absmax, blocksize, codes.size)


@mutant("QC-NUM-004", "dequantize_blockwise", "dequantize_absmax", "dequantize_4bit")
class AbsmaxOfNextBlock(Steps):
    """The last element of every block but the last reads the next block's absmax."""

    def spread(self, absmax: F32, blocksize: int, n: int) -> F32:
        index = np.minimum((np.arange(n) + 1) // blocksize, max(absmax.size - 1, 0))
        return absmax[index]


@mutant("QC-NUM-005", "dequantize_blockwise", "dequantize_absmax", "dequantize_4bit")
class IndexInSixteenBits(Steps):
    """The element index is held in 16 bits, as 2^31 elements are in an int, and wraps to the first blocks."""

    def spread(self, absmax: F32, blocksize: int, n: int) -> F32:
        return absmax[(np.arange(n) & 0xFFFF) // blocksize]


@mutant("QC-NEST-001", "quantize_absmax")
class OffsetInFloat32(Steps):
    """The mean is summed in float32, in the pairwise order of NumPy."""

    def offset(self, absmax: F32) -> np.float32:
        return absmax.mean(dtype=np.float32) if absmax.size else ZERO


@mutant("QC-NEST-001", "quantize_absmax")
class OffsetWithoutLanes(Steps):
    """The mean is summed in float64, but in plain index order instead of 256 lanes."""

    def offset(self, absmax: F32) -> np.float32:
        return np.float32(np.cumsum(absmax.astype(np.float64))[-1] / absmax.size) if absmax.size else ZERO


@mutant("QC-NEST-001", "quantize_absmax")
class OffsetLanesPairwise(Steps):
    """The 256 lanes are added as a tree instead of in index order."""

    def offset(self, absmax: F32) -> np.float32:
        if not absmax.size:
            return ZERO
        lanes = np.pad(absmax.astype(np.float64), (0, -absmax.size % 256)).reshape(-1, 256).sum(axis=0)
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        return np.float32(lanes[0] / absmax.size)


@mutant("QC-NEST-001", "quantize_absmax")
class OffsetRoundedTwice(Steps):
    """The sum is rounded to float32 before it is divided."""

    def offset(self, absmax: F32) -> np.float32:
        if not absmax.size:
            return ZERO
        lanes = np.pad(absmax.astype(np.float64), (0, -absmax.size % 256)).reshape(-1, 256).sum(axis=0)
        return np.float32(np.cumsum(lanes)[-1]) / np.float32(absmax.size)


@mutant("QC-NEST-002", "quantize_absmax")
class OffsetNotSubtracted(Steps):
    """The absmax values are quantized without the offset taken off."""

    def differences(self, absmax: F32, offset: np.float32) -> F32:
        return absmax


@mutant("QC-NEST-002", "quantize_absmax")
class DifferencesUnrounded(Steps):
    """The differences stay in float64 while they are scaled."""

    def differences(self, absmax: F32, offset: np.float32) -> F32:
        return absmax.astype(np.float64) - np.float64(offset)

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        absmax = self.block_absmax(self.blocks(x.astype(np.float32), blocksize))
        blocks = self.blocks(x, blocksize) * self.reciprocal(absmax).astype(np.float64)[:, None]
        return self.clean(blocks.astype(np.float32), absmax).reshape(-1)[: x.size], absmax


@mutant("QC-NEST-003", *NESTED)
class NestedFused(Steps):
    """Decoding contracts product and offset into one fused multiply-add."""

    def decode_absmax(self, codes: U8, nested: F32, code: F32, offset: np.float32, blocksize: int) -> F32:
        # The product of two float32 is exact in float64, so only the sum rounds, as in a fused multiply-add.
        product = code[codes].astype(np.float64) * self.spread(nested, blocksize, codes.size)
        return (product + np.float64(offset)).astype(np.float32)


@mutant("QC-NEST-003", *NESTED)
class NestedWithoutOffset(Steps):
    """Decoding forgets the offset."""

    def decode_absmax(self, codes: U8, nested: F32, code: F32, offset: np.float32, blocksize: int) -> F32:
        return self.decode_8bit(codes, nested, code, blocksize)


@mutant("QC-NEST-003", *NESTED)
class NestedBlocksizeFixed(Steps):
    """The nested blocksize is taken for 256 whatever is given."""

    def decode_absmax(self, codes: U8, nested: F32, code: F32, offset: np.float32, blocksize: int) -> F32:
        padded = np.resize(nested, -(-codes.size // 256)) if codes.size else nested
        return super().decode_absmax(codes, padded, code, offset, 256)


@mutant("QC-NEST-003", *NESTED)
class NestedInHalf(Steps):
    """The decoded absmax is rounded to bfloat16 before it is used."""

    def decode_absmax(self, codes: U8, nested: F32, code: F32, offset: np.float32, blocksize: int) -> F32:
        values = super().decode_absmax(codes, nested, code, offset, blocksize)
        return torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
