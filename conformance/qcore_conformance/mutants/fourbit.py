"""Mutants of NF4 and FP4: codes, packing, tables (docs/spec/20-4bit.md)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcore.backend import Weight4bit
from qcore_conformance.mutants.mutant import mutant
from qcore_conformance.mutants.steps import F32, FP4, FP4_ORDER, FP4_THRESHOLDS, NF4, U8, Bools, Steps

QUANTIZE = ("quantize_4bit",)
DECODE = ("dequantize_4bit", "gemm_4bit")


@mutant("QC-NF4-002", *QUANTIZE)
class NfTieUp(Steps):
    """An NF4 tie goes to the higher code."""

    def nf4_codes(self, y: F32) -> U8:
        return np.searchsorted(self.midpoints(NF4), y, "right").astype(np.uint8)


@mutant("QC-NF4-002", *QUANTIZE)
class NfMidpointsUnrounded(Steps):
    """NF4 thresholds are the float64 midpoints."""

    def nf4_codes(self, y: F32) -> U8:
        wide = NF4.astype(np.float64)
        return np.searchsorted((wide[:-1] + wide[1:]) / 2, y.astype(np.float64), "left").astype(np.uint8)


@mutant("QC-NF4-002", *QUANTIZE)
class NfThresholdOneUlpUp(Steps):
    """One NF4 threshold is one ulp too high."""

    def nf4_codes(self, y: F32) -> U8:
        middle = self.midpoints(NF4)
        middle[11] = np.nextafter(middle[11], np.float32(1))
        return np.searchsorted(middle, y, "left").astype(np.uint8)


@mutant("QC-NF4-002", *QUANTIZE)
class NfNearestInBfloat(Steps):
    """NF4 codes are chosen from quotients rounded to bfloat16."""

    def nf4_codes(self, y: F32) -> U8:
        return super().nf4_codes(torch.from_numpy(y).to(torch.bfloat16).to(torch.float32).numpy())


@mutant("QC-NF4-003", *QUANTIZE)
class NfZeroBelow(Steps):
    """An NF4 quotient of -0 takes code 6, the one below that of 0."""

    def nf4_codes(self, y: F32) -> U8:
        return np.where((y == 0) & np.signbit(y), np.uint8(6), super().nf4_codes(y))


@mutant("QC-FP4-002", *QUANTIZE)
class FpTieAway(Steps):
    """An FP4 tie goes away from zero."""

    def fp4_codes(self, y: F32) -> U8:
        codes = FP4_ORDER[np.searchsorted(FP4_THRESHOLDS, np.abs(y), "right")]
        return codes + np.where(y < 0, 8, 0).astype(np.uint8)


@mutant("QC-FP4-002", *QUANTIZE)
class FpTieToMinusInfinity(Steps):
    """An FP4 tie goes to the lower value, as with torch.bucketize on signed values."""

    def fp4_codes(self, y: F32) -> U8:
        ties_away = FP4_ORDER[np.searchsorted(FP4_THRESHOLDS, np.abs(y), "right")] + np.uint8(8)
        return np.where(y < 0, ties_away, super().fp4_codes(y)).astype(np.uint8)


@mutant("QC-FP4-002", *QUANTIZE)
class FpThresholdOneUlpOff(Steps):
    """One FP4 threshold is one ulp too low: the exact midpoint instead of the constant."""

    def fp4_codes(self, y: F32) -> U8:
        thresholds = FP4_THRESHOLDS.copy()
        thresholds[4] = np.nextafter(thresholds[4], np.float32(0))
        return FP4_ORDER[np.searchsorted(thresholds, np.abs(y), "left")] + np.where(y < 0, 8, 0).astype(np.uint8)


@mutant("QC-FP4-002", *QUANTIZE)
class FpMidpoints(Steps):
    """FP4 thresholds are the midpoints of the table instead of the stated constants."""

    def fp4_codes(self, y: F32) -> U8:
        values = np.sort(FP4[:8])
        thresholds = (values[:-1] + values[1:]) * np.float32(0.5)
        return FP4_ORDER[np.searchsorted(thresholds, np.abs(y), "left")] + np.where(y < 0, 8, 0).astype(np.uint8)


@mutant("QC-FP4-003", *QUANTIZE)
class FpSignOfZero(Steps):
    """A quotient of -0 takes code 8 instead of code 0."""

    def negative(self, y: F32) -> Bools:
        return np.signbit(y)


@mutant("QC-FP4-001", *QUANTIZE)
class FpOrderAscending(Steps):
    """FP4 codes count up with the magnitude instead of following the table's order."""

    def fp4_codes(self, y: F32) -> U8:
        codes = np.searchsorted(FP4_THRESHOLDS, np.abs(y), "left")
        return (codes + np.where(y < 0, 8, 0)).astype(np.uint8)


@mutant("QC-4BIT-002", *QUANTIZE)
class NibblesSwappedOnPacking(Steps):
    """Even elements go to the low nibble."""

    def pack(self, codes: U8, quant_type: str) -> U8:
        packed = super().pack(codes, quant_type)
        return (packed << 4) | (packed >> 4)


@mutant("QC-4BIT-002", *QUANTIZE)
class LastNibbleGarbage(Steps):
    """The low nibble of the last byte is whatever was in the register when the number of elements is odd."""

    def zero_code(self, quant_type: str) -> int:
        return 13


@mutant("QC-4BIT-002", *QUANTIZE)
class LastNibbleZero(Steps):
    """The low nibble of the last byte is 0 for NF4 too, which reads as -absmax."""

    def zero_code(self, quant_type: str) -> int:
        return 0


@mutant("QC-4BIT-002", *QUANTIZE)
class LastByteSkipped(Steps):
    """With an odd number of elements the last byte is not written."""

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        before = out.clone()
        super().quantize_4bit(A, quant_type, blocksize, absmax=absmax, out=out)
        if A.numel() % 2:
            out.view(-1)[-1] = before.view(-1)[-1]


@mutant("QC-4BIT-001", *QUANTIZE)
class BlocksizeInBytes(Steps):
    """A block is counted in packed bytes, so that it spans twice as many elements."""

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        y, absmax = super().quotients(x, 2 * blocksize)
        return y, np.repeat(absmax, 2)[: -(-x.size // blocksize)]


@mutant("QC-4BIT-002", *DECODE)
class NibblesSwappedOnUnpacking(Steps):
    """Even elements are read from the low nibble."""

    def unpack(self, packed: U8) -> U8:
        return super().unpack((packed << 4) | (packed >> 4))


@mutant("QC-NF4-001", *DECODE)
class NfEntryOff(Steps):
    """One NF4 table entry is off by 2e-4."""

    def table(self, quant_type: str) -> F32:
        table = super().table(quant_type).copy()
        if quant_type == "nf4":
            table[11] += np.float32(2e-4)
        return table


@mutant("QC-NF4-001", *DECODE)
class NfEntryOneUlpOff(Steps):
    """One NF4 table entry is one ulp off, as when it is printed with seven digits."""

    def table(self, quant_type: str) -> F32:
        table = super().table(quant_type).copy()
        if quant_type == "nf4":
            table[3] = np.nextafter(table[3], np.float32(0))
        return table


@mutant("QC-FP4-001", *DECODE)
class FpEntryTruncated(Steps):
    """The smallest FP4 value is 0.00520833, six digits of 1/192."""

    def table(self, quant_type: str) -> F32:
        table = super().table(quant_type).copy()
        if quant_type == "fp4":
            table[[1, 9]] = np.float32(0.00520833), np.float32(-0.00520833)
        return table


@mutant("QC-FP4-001", "dequantize_4bit")
class FpCodeEightNegative(Steps):
    """FP4 code 8 reads back as -0."""

    def table(self, quant_type: str) -> F32:
        table = super().table(quant_type).copy()
        if quant_type == "fp4":
            table[8] = np.float32(-0.0)
        return table


@mutant("QC-4BIT-003", *DECODE)
class TableInBfloat(Steps):
    """The table is kept in bfloat16 in shared memory."""

    def table(self, quant_type: str) -> F32:
        return torch.from_numpy(super().table(quant_type)).to(torch.bfloat16).to(torch.float32).numpy()


@mutant("QC-4BIT-003", *DECODE)
class AbsmaxInHalf(Steps):
    """The absmax is rounded to float16 before it is used."""

    def weight_absmax(self, weight: Weight4bit) -> F32:
        return super().weight_absmax(weight).astype(np.float16).astype(np.float32)


@mutant("QC-4BIT-003", "dequantize_4bit")
class ProductInOutputDtype(Steps):
    """Table value and absmax are rounded to the output's dtype and multiplied there."""

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        super().dequantize_4bit(weight, out=out)
        values = torch.from_numpy(self.table(weight.quant_type)[self.unpack(weight.packed.numpy())[: out.numel()]])
        absmax = torch.from_numpy(self.spread(self.weight_absmax(weight), weight.blocksize, out.numel()))
        out.copy_((values.to(out.dtype) * absmax.to(out.dtype)).reshape(out.shape))


@mutant("QC-4BIT-003", "dequantize_4bit")
class LastElementOfOddCountWrong(Steps):
    """With an odd number of elements the last one is read from the low nibble of its byte."""

    def unpack(self, packed: U8) -> U8:
        codes = super().unpack(packed)
        if self.odd:
            codes[-2] = codes[-1]
        return codes

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        self.odd = out.numel() % 2 == 1
        super().dequantize_4bit(weight, out=out)


@mutant("QC-NUM-004", *DECODE)
class WeightBlocksPerRow(Steps):
    """Blocks of a weight restart in every row: wrong when the last dimension is no multiple of the blocksize."""

    def decode_4bit(self, weight: Weight4bit) -> F32:
        values = super().decode_4bit(weight)
        if len(weight.shape) != 2 or not values.size:
            return values
        rows, columns = weight.shape
        absmax = self.weight_absmax(weight)
        index = (
            np.arange(rows)[:, None] * (columns // weight.blocksize) + np.arange(columns)[None, :] // weight.blocksize
        )
        codes = self.unpack(weight.packed.numpy().reshape(-1))[: values.size]
        return self.table(weight.quant_type)[codes] * absmax[np.minimum(index, absmax.size - 1)].reshape(-1)
