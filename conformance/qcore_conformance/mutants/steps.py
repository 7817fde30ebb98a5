"""The ops in small steps, so that a mutant replaces one step and nothing else.

Every op first calls the reference, which checks the arguments and writes its own result, and then writes the result of
the steps over it. Unmutated, the steps give the reference's bits: they are the second control of the kill matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcore import codebooks
from qcore.backend import (
    Backend,
    Description,
    OptimizerRule,
    OptimizerTensors,
    Weight4bit,
    Weight8bit,
    WeightInt4,
    get_backend,
)

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]

ONE = np.float32(1)
ZERO = np.float32(0)
NF4 = np.array(codebooks.NF4, np.float32)
FP4 = np.array(codebooks.FP4, np.float32)
FP4_THRESHOLDS = np.array(codebooks.FP4_THRESHOLDS, np.float32)
FP4_ORDER = np.array(codebooks.FP4_ORDER, np.uint8)
PRODUCT_SCALE = np.float32(float.fromhex("0x1.040c2p-14"))
ROW_SCALE = np.float32(float.fromhex("0x1.020408p-7"))


def largest(x: F32, axis: int) -> F32:
    """The largest magnitude along an axis, NaN left out (np.fmax would keep a signalling one)."""
    return np.where(np.isnan(x), ZERO, np.abs(x)).max(axis=axis, initial=ZERO)


class Steps(Backend):
    """The unmutated backend. A method without a docstring is an op of the interface."""

    name = "steps"
    device_types = frozenset({"cpu"})
    declarations: ClassVar[Mapping[str, Any]] = {
        op: {"depth": {"lanes": 1, "extra": 8}, "weight_rounding": "float32"}
        for op in ("gemm_4bit", "gemm_4bit_transposed", "gemm_int4", "int8_linear_transposed")
    }

    def __init__(self) -> None:
        self.reference = get_backend("cpu_reference")

    def describe(self, device: torch.device) -> Description:
        own = self.reference.describe(device)
        return Description(
            name=self.name, device=own.device, arch=own.arch, ops=own.ops, declarations=self.declarations
        )

    # Conversions (QC-NUM-002, QC-NUM-003)

    def load(self, tensor: Tensor) -> F32:
        return tensor.detach().to(torch.float32).numpy().reshape(-1)

    def store(self, values: NDArray[Any], out: Tensor) -> None:
        out.copy_(self.rounded(torch.from_numpy(np.ascontiguousarray(values)), out.dtype).reshape(out.shape))

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype)

    # Blocks (QC-NUM-004, QC-Q8-002, QC-Q8-003)

    def blocks(self, x: F32, blocksize: int) -> F32:
        return np.pad(x, (0, -x.size % blocksize)).reshape(-1, blocksize)

    def block_absmax(self, blocks: F32) -> F32:
        return largest(blocks, axis=1)

    def scale(self, blocks: F32, absmax: F32) -> F32:
        """The quotients, before what is not a number becomes 0."""
        return blocks * self.reciprocal(absmax)[:, None]

    def reciprocal(self, absmax: F32) -> F32:
        return ONE / absmax

    def clean(self, y: F32, absmax: F32) -> F32:
        return np.where(np.isnan(y) | (absmax == 0)[:, None], ZERO, y)

    def quotients(self, x: F32, blocksize: int) -> tuple[F32, F32]:
        """Scaled elements, flat, and the absmax of every block."""
        blocks = self.blocks(x, blocksize)
        absmax = self.block_absmax(blocks)
        return self.clean(self.scale(blocks, absmax), absmax).reshape(-1)[: x.size], absmax

    def spread(self, absmax: F32, blocksize: int, n: int) -> F32:
        """The absmax of every element."""
        return np.repeat(absmax, blocksize)[:n]

    # 8-bit codes (QC-Q8-004, QC-Q8-005)

    def midpoints(self, code: F32) -> F32:
        return (code[:-1] + code[1:]) * np.float32(0.5)

    def tie_counts(self, code: F32) -> Bools:
        """For which j a value on the midpoint j counts as above it."""
        return (np.arange(255) % 2 == 1) & (code[:-1] < code[1:])

    def codes_8bit(self, y: F32, code: F32) -> U8:
        middle = self.midpoints(code)
        below, upto = np.searchsorted(middle, y, "left"), np.searchsorted(middle, y, "right")
        ties = np.concatenate([[0], np.cumsum(self.tie_counts(code))])
        return (below + ties[upto] - ties[below]).astype(np.uint8)

    def decode_8bit(self, codes: U8, absmax: F32, code: F32, blocksize: int) -> F32:
        return code[codes] * self.spread(absmax, blocksize, codes.size)

    # 4-bit codes (QC-4BIT-002, QC-4BIT-003, QC-NF4-002, QC-FP4-002)

    def nf4_codes(self, y: F32) -> U8:
        return np.searchsorted(self.midpoints(NF4), y, "left").astype(np.uint8)

    def fp4_codes(self, y: F32) -> U8:
        return FP4_ORDER[np.searchsorted(FP4_THRESHOLDS, np.abs(y), "left")] + np.where(self.negative(y), 8, 0).astype(
            "u1"
        )

    def negative(self, y: F32) -> Bools:
        return y < 0

    def codes_4bit(self, y: F32, quant_type: str) -> U8:
        return self.nf4_codes(y) if quant_type == "nf4" else self.fp4_codes(y)

    def zero_code(self, quant_type: str) -> int:
        """The code in the last low nibble when the number of elements is odd."""
        return 7 if quant_type == "nf4" else 0

    def pack(self, codes: U8, quant_type: str) -> U8:
        if codes.size % 2:
            codes = np.append(codes, np.uint8(self.zero_code(quant_type)))
        return (codes[0::2] << 4) | codes[1::2]

    def unpack(self, packed: U8) -> U8:
        return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)

    def table(self, quant_type: str) -> F32:
        return NF4 if quant_type == "nf4" else FP4

    def weight_absmax(self, weight: Weight4bit) -> F32:
        if weight.nested_absmax is None:
            return self.load(weight.absmax)
        assert weight.nested_code is not None
        assert weight.nested_offset is not None
        return self.decode_absmax(
            weight.absmax.numpy().reshape(-1),
            self.load(weight.nested_absmax),
            self.load(weight.nested_code),
            self.load(weight.nested_offset)[0],
            weight.nested_blocksize,
        )

    def decode_4bit(self, weight: Weight4bit) -> F32:
        """The values in float32, flat."""
        n = int(np.prod(weight.shape, dtype=np.int64))
        codes = self.unpack(weight.packed.numpy().reshape(-1))[:n]
        return self.table(weight.quant_type)[codes] * self.spread(self.weight_absmax(weight), weight.blocksize, n)

    # Nested absmax (QC-NEST-001 to QC-NEST-003)

    def offset(self, absmax: F32) -> np.float32:
        if not absmax.size:
            return ZERO
        lanes = np.add.reduce(np.pad(absmax.astype(np.float64), (0, -absmax.size % 256)).reshape(-1, 256), axis=0)
        return np.float32(np.cumsum(lanes)[-1] / absmax.size)

    def differences(self, absmax: F32, offset: np.float32) -> F32:
        return absmax - offset

    def decode_absmax(self, codes: U8, nested: F32, code: F32, offset: np.float32, blocksize: int) -> F32:
        return self.decode_8bit(codes, nested, code, blocksize) + offset

    # W4A16 product (QC-GEMM4-001 to QC-GEMM4-003)

    def gemm_weights(self, weight: Weight4bit, dtype: torch.dtype, rows: int) -> F32:
        return self.decode_4bit(weight).reshape(weight.shape)

    def sum_products(self, x: F32, w: F32) -> F32:
        return (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.float32)

    def transposed_weights(self, weight: Weight4bit) -> F32:
        return self.decode_4bit(weight).reshape(weight.shape)

    def sum_rows(self, y: F32, w: F32) -> F32:
        """The transposed product (QC-GEMM4-009)."""
        return (y.astype(np.float64) @ w.astype(np.float64)).astype(np.float32)

    def sum_int8_rows(self, y: F32, w: F32) -> F32:
        """The transposed product with an int8 weight (QC-INT8-012)."""
        return (y.astype(np.float64) @ w.astype(np.float64)).astype(np.float32)

    def add_bias(self, y: F32, bias: F32, dtype: torch.dtype) -> F32:
        return y + bias

    def store_product(self, x: F32, w: F32, bias: Tensor | None, out: Tensor) -> None:
        y = self.sum_products(x, w)
        self.store(y if bias is None else self.add_bias(y, self.load(bias), out.dtype), out)

    # Integers in groups (QC-INT4-001 to QC-INT4-004)

    def int4_codes(self, weight: WeightInt4) -> NDArray[np.int16]:
        codes = self.unpack(weight.packed.numpy().reshape(-1)).reshape(weight.shape[0], -1)
        return codes[:, : weight.shape[1]].astype(np.int16)

    def int4_groups(self, weight: WeightInt4) -> NDArray[np.intp]:
        return np.arange(weight.shape[1]) // weight.group_size

    def int4_zeros(self, weight: WeightInt4) -> NDArray[np.int16]:
        if weight.zeros is None:
            return np.full(weight.scales.shape, 8, np.int16)
        return weight.zeros.numpy().astype(np.int16)

    def int4_scales(self, weight: WeightInt4) -> F32:
        return self.load(weight.scales).reshape(weight.scales.shape)

    def int4_order(self, values: F32, perm: NDArray[np.int32]) -> F32:
        ordered = np.empty_like(values)
        ordered[:, perm] = values
        return ordered

    def int4_weights(self, weight: WeightInt4, dtype: torch.dtype, rows: int) -> F32:
        group = self.int4_groups(weight)
        difference = self.int4_codes(weight) - self.int4_zeros(weight)[:, group]
        values = difference.astype(np.float32) * self.int4_scales(weight)[:, group]
        return values if weight.perm is None else self.int4_order(values, weight.perm.numpy())

    # LLM.int8() (QC-INT8-001 to QC-INT8-008)

    def outliers(self, x: F32, threshold: float) -> Bools:
        return ~(np.abs(x) < np.float32(threshold)) if threshold > 0 else np.zeros(x.shape, np.bool_)

    def statistics(self, x: F32, outlier: Bools, axis: int) -> F32:
        return largest(np.where(outlier, ZERO, x), axis)

    def levels(self, x: F32, statistics: F32) -> F32:
        return x * (np.float32(127) / statistics)

    def integers(self, q: F32) -> F32:
        return np.rint(q)

    def clamped(self, q: F32) -> I8:
        return np.clip(q, -127, 127).astype(np.int8)

    def codes_int8(self, x: F32, statistics: F32) -> I8:
        q = self.levels(x, statistics)
        return self.clamped(self.integers(np.where(np.isnan(q) | (statistics == 0), ZERO, q)))

    def zero_outliers(self, codes: I8, outlier: Bools) -> I8:
        """Row-wise codes with outlier columns set to 0."""
        return np.where(outlier.any(axis=0)[None, :], np.int8(0), codes)

    def int8_product(self, a: I8, b: I8) -> I32:
        return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int32)

    def decode_product(self, c: I32, rows: F32, columns: F32, bias: F32 | None) -> F32:
        t = c.astype(np.float32) * rows[:, None] * columns[None, :] * PRODUCT_SCALE
        return t if bias is None else t + bias

    def decode_rows(self, codes: I8, rows: F32) -> F32:
        return codes.astype(np.float32) * rows[:, None] * ROW_SCALE

    def outlier_columns(self, outlier: Bools) -> NDArray[np.intp]:
        """In the order in which their products are added (QC-INT8-010)."""
        return np.flatnonzero(outlier.any(axis=0))

    def add_column(self, t: F32, x: F32, w: F32) -> F32:
        return t + x[:, None] * w[None, :]

    def add_outliers(self, t: F32, x: F32, w: F32, columns: NDArray[np.intp]) -> F32:
        for k in columns:
            t = self.add_column(t, x[:, k], w[:, k])
        return t

    # The ops

    @np.errstate(all="ignore")
    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        self.reference.quantize_blockwise(A, code, blocksize, absmax=absmax, out=out)
        y, maxima = self.quotients(self.load(A), blocksize)
        self.store(maxima, absmax)
        self.store(self.codes_8bit(y, self.load(code)), out)

    @np.errstate(all="ignore")
    def dequantize_blockwise(self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor) -> None:
        self.reference.dequantize_blockwise(A, absmax, code, blocksize, out=out)
        codes = A.numpy().reshape(-1)
        self.store(self.decode_8bit(codes, self.load(absmax), self.load(code), blocksize), out)

    @np.errstate(all="ignore")
    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        self.reference.quantize_4bit(A, quant_type, blocksize, absmax=absmax, out=out)
        y, maxima = self.quotients(self.load(A), blocksize)
        self.store(maxima, absmax)
        self.store(self.pack(self.codes_4bit(y, quant_type), quant_type), out)

    @np.errstate(all="ignore")
    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        self.reference.dequantize_4bit(weight, out=out)
        self.store(self.decode_4bit(weight), out)

    @np.errstate(all="ignore")
    def quantize_absmax(
        self, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor, nested_absmax: Tensor, offset: Tensor
    ) -> None:
        self.reference.quantize_absmax(absmax, code, blocksize, out=out, nested_absmax=nested_absmax, offset=offset)
        x = self.load(absmax)
        mean = self.offset(x)
        y, maxima = self.quotients(self.differences(x, mean), blocksize)
        self.store(maxima, nested_absmax)
        self.store(self.codes_8bit(y, self.load(code)), out)
        offset.fill_(float(mean))

    @np.errstate(all="ignore")
    def dequantize_absmax(
        self, A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int, *, out: Tensor
    ) -> None:
        self.reference.dequantize_absmax(A, nested_absmax, code, offset, blocksize, out=out)
        nested, mean = self.load(nested_absmax), self.load(offset)[0]
        self.store(self.decode_absmax(A.numpy().reshape(-1), nested, self.load(code), mean, blocksize), out)

    @np.errstate(all="ignore")
    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        self.reference.gemm_4bit(A, weight, bias, out=out)
        if out.numel():
            x = self.load(A).reshape(out.numel() // weight.shape[0], weight.shape[1])
            self.store_product(x, self.gemm_weights(weight, A.dtype, len(x)), bias, out)

    @np.errstate(all="ignore")
    def gemm_4bit_transposed(self, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
        self.reference.gemm_4bit_transposed(A, weight, out=out)
        n, k = weight.shape
        if not out.numel():
            return
        y = self.load(A).reshape(-1, n) if n else np.zeros((out.numel() // k, 0), np.float32)
        self.store(self.sum_rows(y, self.transposed_weights(weight)), out)

    @np.errstate(all="ignore")
    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        self.reference.int8_quantize_rows(A, threshold, out=out, row_stats=row_stats, outlier_cols=outlier_cols)
        x = self.load(A).reshape(A.shape)
        outlier = self.outliers(x, threshold)
        stats = self.statistics(x, outlier, axis=1)
        self.store(self.zero_outliers(self.codes_int8(x, stats[:, None]), outlier), out)
        self.store(stats, row_stats)
        if outlier_cols is not None:
            self.store(outlier.any(axis=0).astype(np.uint8), outlier_cols)

    @np.errstate(all="ignore")
    def int8_quantize_cols(self, A: Tensor, threshold: float, *, out: Tensor, col_stats: Tensor) -> None:
        self.reference.int8_quantize_cols(A, threshold, out=out, col_stats=col_stats)
        x = self.load(A).reshape(A.shape)
        outlier = self.outliers(x, threshold)
        stats = self.statistics(x, outlier, axis=0)
        self.store(np.where(outlier, np.int8(0), self.codes_int8(x, stats[None, :])), out)
        self.store(stats, col_stats)

    @np.errstate(all="ignore")
    def int8_gemm(self, A: Tensor, B: Tensor, *, out: Tensor) -> None:
        self.reference.int8_gemm(A, B, out=out)
        self.store(self.int8_product(A.numpy(), B.numpy()), out)

    @np.errstate(all="ignore")
    def int8_dequantize_gemm(
        self, C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        self.reference.int8_dequantize_gemm(C, row_stats, col_stats, bias, out=out)
        b = None if bias is None else self.load(bias)
        self.store(self.decode_product(C.numpy(), self.load(row_stats), self.load(col_stats), b), out)

    @np.errstate(all="ignore")
    def int8_scaled_gemm(
        self, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        self.reference.int8_scaled_gemm(A, B, row_stats, col_stats, bias, out=out)
        b = None if bias is None else self.load(bias)
        product = self.int8_product(A.numpy(), B.numpy())
        self.store(self.decode_product(product, self.load(row_stats), self.load(col_stats), b), out)

    @np.errstate(all="ignore")
    def int8_dequantize_rows(self, A: Tensor, row_stats: Tensor, *, out: Tensor) -> None:
        self.reference.int8_dequantize_rows(A, row_stats, out=out)
        self.store(self.decode_rows(A.numpy(), self.load(row_stats)), out)

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        self.reference.optimizer_step(rule, tensors)

    @np.errstate(all="ignore")
    def int8_linear(
        self, A: Tensor, W: Weight8bit, threshold: float, bias: Tensor | None, *, out: Tensor, outliers: Tensor | None
    ) -> None:
        self.reference.int8_linear(A, W, threshold, bias, out=out, outliers=outliers)
        x, scales = self.load(A).reshape(A.shape), self.load(W.scales)
        outlier = self.outliers(x, threshold)
        stats = self.statistics(x, outlier, axis=1)
        codes = self.zero_outliers(self.codes_int8(x, stats[:, None]), outlier)
        b = None if bias is None else self.load(bias)
        t = self.decode_product(self.int8_product(codes, W.codes.numpy()), stats, scales, b)
        w = self.decode_rows(W.codes.numpy(), scales)
        self.store(self.add_outliers(t, x, w, self.outlier_columns(outlier)), out)
        if outliers is not None and threshold > 0:
            self.store(outlier.any(axis=0).astype(np.uint8), outliers)

    @np.errstate(all="ignore")
    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        self.reference.int8_linear_transposed(A, W, out=out)
        w = self.decode_rows(W.codes.numpy(), self.load(W.scales))
        if out.numel():
            self.store(self.sum_int8_rows(self.load(A).reshape(A.shape), w), out)

    @np.errstate(all="ignore")
    def gemm_int4(self, A: Tensor, weight: WeightInt4, bias: Tensor | None, *, out: Tensor) -> None:
        self.reference.gemm_int4(A, weight, bias, out=out)
        if out.numel():
            x = self.load(A).reshape(out.numel() // weight.shape[0], weight.shape[1])
            self.store_product(x, self.int4_weights(weight, A.dtype, len(x)), bias, out)
