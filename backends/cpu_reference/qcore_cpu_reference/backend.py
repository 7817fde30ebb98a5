"""The reference as a backend: copies to NumPy, computes, checks every extent, writes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcore.backend import OPS, Backend, Description, Weight4bit
from qcore.errors import InvalidArgument
from qcore_cpu_reference import blockwise, fourbit, int8
from qcore_cpu_reference.floats import F32, from_float32, to_float32

_MAX_INT8_K = 131_071  # QC-INT8-005
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ReferenceBackend(Backend):
    """Every op in plain NumPy, on tensors of any device, by copying.

    It is as strict as an emulator: a buffer that is too short or too long, of the wrong dtype or not contiguous is
    refused before anything is written, although the frontend has checked it already.
    """

    name = "cpu_reference"
    device_types = frozenset({"*"})

    def describe(self, device: torch.device) -> Description:
        return Description(
            name=self.name,
            device=f"NumPy {np.__version__}",
            arch="numpy",
            library=__file__,
            ops=dict(OPS),
            # The sum is formed in float64, so only the rounding to float32 and that of the bias remain.
            declarations={"gemm_4bit": {"depth": {"lanes": 2**62, "extra": 2}, "weight_rounding": "float32"}},
        )

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        op, n = "quantize_blockwise", A.numel()
        _check_blocksize(op, blocksize)
        x = _float(op, "A", A, n)
        table = _codebook(op, code, ascending=True)
        _output(op, "absmax", absmax, _blocks(n, blocksize), torch.float32)
        _output(op, "out", out, n, torch.uint8)
        codes, maxima = blockwise.quantize_blockwise(x, table, blocksize)
        _write(absmax, torch.from_numpy(maxima))
        _write(out, torch.from_numpy(codes))

    def dequantize_blockwise(self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor) -> None:
        op, n = "dequantize_blockwise", A.numel()
        _check_blocksize(op, blocksize)
        codes = _integers(op, "A", A, n, torch.uint8)
        maxima = _float(op, "absmax", absmax, _blocks(n, blocksize), (torch.float32,))
        table = _codebook(op, code, ascending=False)
        _output(op, "out", out, n, *_FLOATS)
        _write(out, from_float32(blockwise.dequantize_blockwise(codes, maxima, table, blocksize), out.dtype))

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        op, n = "quantize_4bit", A.numel()
        _check_blocksize(op, blocksize)
        _check_quant_type(op, quant_type)
        x = _float(op, "A", A, n)
        _output(op, "absmax", absmax, _blocks(n, blocksize), torch.float32)
        _output(op, "out", out, (n + 1) // 2, torch.uint8)
        packed, maxima = fourbit.quantize_4bit(x, quant_type, blocksize)
        _write(absmax, torch.from_numpy(maxima))
        _write(out, torch.from_numpy(packed))

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        values = _decode("dequantize_4bit", weight)
        _output("dequantize_4bit", "out", out, values.size, *_FLOATS)
        _write(out, from_float32(values, out.dtype))

    def quantize_absmax(
        self, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor, nested_absmax: Tensor, offset: Tensor
    ) -> None:
        op, n = "quantize_absmax", absmax.numel()
        _check_blocksize(op, blocksize)
        maxima = _float(op, "absmax", absmax, n, (torch.float32,))
        table = _codebook(op, code, ascending=True)
        _output(op, "out", out, n, torch.uint8)
        _output(op, "nested_absmax", nested_absmax, _blocks(n, blocksize), torch.float32)
        _output(op, "offset", offset, 1, torch.float32)
        codes, nested, mean = blockwise.quantize_absmax(maxima, table, blocksize)
        _write(out, torch.from_numpy(codes))
        _write(nested_absmax, torch.from_numpy(nested))
        offset.fill_(float(mean))

    def dequantize_absmax(
        self, A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int, *, out: Tensor
    ) -> None:
        values = _decode_absmax("dequantize_absmax", A, nested_absmax, code, offset, blocksize)
        _output("dequantize_absmax", "out", out, values.size, torch.float32)
        _write(out, torch.from_numpy(values))

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        op = "gemm_4bit"
        if len(weight.shape) != 2:
            raise InvalidArgument(f"{op}: weight has shape {weight.shape}, expected (N, K)")
        n, k = weight.shape
        m = out.numel() // n if n else 0
        x = _float(op, "A", A, m * k if n else A.numel())
        w = _decode(op, weight).reshape(n, k)
        b = None if bias is None else _float(op, "bias", bias, n, (A.dtype, torch.float32))
        _output(op, "out", out, m * n, A.dtype)
        if m and n:
            _write(out, from_float32(fourbit.gemm_4bit(x.reshape(m, k), w, b), out.dtype))

    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        op = "int8_quantize_rows"
        m, k = _matrix(op, "A", A)
        x = _float(op, "A", A, m * k).reshape(m, k)
        _check_threshold(op, threshold)
        _output(op, "out", out, m * k, torch.int8)
        _output(op, "row_stats", row_stats, m, torch.float32)
        if outlier_cols is None and threshold > 0:
            raise InvalidArgument(f"{op}: outlier_cols is missing, threshold {threshold} needs {k} values")
        if outlier_cols is not None:
            _output(op, "outlier_cols", outlier_cols, k, torch.uint8)
        codes, stats, columns = int8.quantize_rows(x, threshold)
        _write(out, torch.from_numpy(codes))
        _write(row_stats, torch.from_numpy(stats))
        if outlier_cols is not None:
            _write(outlier_cols, torch.from_numpy(columns))

    def int8_quantize_cols(self, A: Tensor, threshold: float, *, out: Tensor, col_stats: Tensor) -> None:
        op = "int8_quantize_cols"
        m, k = _matrix(op, "A", A)
        x = _float(op, "A", A, m * k).reshape(m, k)
        _check_threshold(op, threshold)
        _output(op, "out", out, m * k, torch.int8)
        _output(op, "col_stats", col_stats, k, torch.float32)
        codes, stats = int8.quantize_cols(x, threshold)
        _write(out, torch.from_numpy(codes))
        _write(col_stats, torch.from_numpy(stats))

    def int8_gemm(self, A: Tensor, B: Tensor, *, out: Tensor) -> None:
        product = _int8_product("int8_gemm", A, B)
        _output("int8_gemm", "out", out, product.size, torch.int32)
        _write(out, torch.from_numpy(product))

    def int8_dequantize_gemm(
        self, C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        m, n = _matrix("int8_dequantize_gemm", "C", C)
        c = _integers("int8_dequantize_gemm", "C", C, m * n, torch.int32).reshape(m, n)
        _write_product("int8_dequantize_gemm", c, row_stats, col_stats, bias, out)

    def int8_scaled_gemm(
        self, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        product = _int8_product("int8_scaled_gemm", A, B)
        _write_product("int8_scaled_gemm", product, row_stats, col_stats, bias, out)

    def int8_dequantize_rows(self, A: Tensor, row_stats: Tensor, *, out: Tensor) -> None:
        op = "int8_dequantize_rows"
        m, k = _matrix(op, "A", A)
        codes = _integers(op, "A", A, m * k, torch.int8).reshape(m, k)
        stats = _float(op, "row_stats", row_stats, m, (torch.float32,))
        _output(op, "out", out, m * k, *_FLOATS)
        _write(out, from_float32(int8.dequantize_rows(codes, stats), out.dtype))


def _int8_product(op: str, A: Tensor, B: Tensor) -> int8.I32:
    m, k = _matrix(op, "A", A)
    n, k_b = _matrix(op, "B", B)
    if k != k_b:
        raise InvalidArgument(f"{op}: A has {k} columns, B has {k_b}; both are (rows, K)")
    if k > _MAX_INT8_K:
        raise InvalidArgument(f"{op}: K is {k}, int32 sums are exact up to {_MAX_INT8_K}")
    a = _integers(op, "A", A, m * k, torch.int8).reshape(m, k)
    b = _integers(op, "B", B, n * k, torch.int8).reshape(n, k)
    return int8.gemm(a, b)


def _write_product(
    op: str, product: int8.I32, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    m, n = product.shape
    rows = _float(op, "row_stats", row_stats, m, (torch.float32,))
    columns = _float(op, "col_stats", col_stats, n, (torch.float32,))
    b = None if bias is None else _float(op, "bias", bias, n, (out.dtype, torch.float32))
    _output(op, "out", out, m * n, *_FLOATS)
    _write(out, from_float32(int8.dequantize_gemm(product, rows, columns, b), out.dtype))


def _decode_absmax(op: str, codes: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int) -> F32:
    _check_blocksize(op, blocksize)
    n = codes.numel()
    values = _integers(op, "absmax", codes, n, torch.uint8)
    nested = _float(op, "nested_absmax", nested_absmax, _blocks(n, blocksize), (torch.float32,))
    table = _codebook(op, code, ascending=False)
    mean = _float(op, "offset", offset, 1, (torch.float32,))[0]
    return blockwise.dequantize_absmax(values, nested, table, mean, blocksize)


def _decode(op: str, weight: Weight4bit) -> F32:
    _check_blocksize(op, weight.blocksize)
    _check_quant_type(op, weight.quant_type)
    numel = int(np.prod(weight.shape, dtype=np.int64))
    packed = _integers(op, "packed", weight.packed, (numel + 1) // 2, torch.uint8)
    blocks = _blocks(numel, weight.blocksize)
    if weight.nested_absmax is None:
        absmax = _float(op, "absmax", weight.absmax, blocks, (torch.float32,))
    else:
        if weight.nested_code is None or weight.nested_offset is None:
            raise InvalidArgument(f"{op}: a nested weight needs nested_code and nested_offset")
        nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset, weight.nested_blocksize)
        absmax = _decode_absmax(op, weight.absmax, *nested)
        _check_count(op, "absmax", absmax.size, blocks)
    return fourbit.dequantize_4bit(packed, absmax, weight.quant_type, weight.blocksize, numel)


def _blocks(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def _check_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise InvalidArgument(f"{op}: blocksize is {blocksize}, expected a power of two from 32 to 4096")


def _check_quant_type(op: str, quant_type: str) -> None:
    if quant_type not in fourbit.TABLES:
        raise InvalidArgument(f"{op}: quant_type is {quant_type!r}, expected 'nf4' or 'fp4'")


def _check_threshold(op: str, threshold: float) -> None:
    if not 0 <= threshold < float("inf"):
        raise InvalidArgument(f"{op}: threshold is {threshold}, expected a finite value of at least 0")


def _check_count(op: str, name: str, count: int, expected: int) -> None:
    if count != expected:
        raise InvalidArgument(f"{op}: {name} has {count} values, expected {expected}")


def _check_dtype(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise InvalidArgument(f"{op}: {name} is {tensor.dtype}, expected {expected}")


def _check_layout(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{op}: {name} is not contiguous")
    if tensor.data_ptr() % tensor.element_size():
        raise InvalidArgument(f"{op}: {name} at {tensor.data_ptr():#x} is not aligned to {tensor.element_size()} bytes")


def _matrix(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise InvalidArgument(f"{op}: {name} has {tensor.dim()} dimensions, expected 2")
    return tensor.shape[0], tensor.shape[1]


def _float(op: str, name: str, tensor: Tensor, count: int, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> F32:
    _check_dtype(op, name, tensor, dtypes)
    _check_layout(op, name, tensor)
    _check_count(op, name, tensor.numel(), count)
    return to_float32(tensor).reshape(-1)


def _integers(op: str, name: str, tensor: Tensor, count: int, dtype: torch.dtype) -> np.ndarray:
    _check_dtype(op, name, tensor, (dtype,))
    _check_layout(op, name, tensor)
    _check_count(op, name, tensor.numel(), count)
    return tensor.detach().cpu().numpy().reshape(-1)


def _codebook(op: str, code: Tensor, *, ascending: bool) -> F32:
    table = _float(op, "code", code, 256, (torch.float32,))
    if not np.isfinite(table).all():
        raise InvalidArgument(f"{op}: code holds values that are not finite")
    if ascending and (table[1:] < table[:-1]).any():
        raise InvalidArgument(f"{op}: code is not in ascending order")
    return table


def _output(op: str, name: str, tensor: Tensor, count: int, *dtypes: torch.dtype) -> None:
    _check_dtype(op, name, tensor, dtypes)
    _check_layout(op, name, tensor)
    _check_count(op, name, tensor.numel(), count)


def _write(destination: Tensor, values: Tensor) -> None:
    destination.copy_(values.reshape(destination.shape))
