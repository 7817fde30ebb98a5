"""The reference as a backend: copies to NumPy, computes, checks every extent, writes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcore.backend import (
    ALGORITHMS,
    OPS,
    Backend,
    Description,
    OptimizerRule,
    OptimizerTensors,
    Weight4bit,
    Weight8bit,
    WeightInt4,
)
from qcore.errors import InvalidArgument
from qcore_cpu_reference import blockwise, fourbit, int4, int8, optimizer
from qcore_cpu_reference.checks import (
    FLOATS,
    block_count,
    check_blocksize,
    check_count,
    check_int8_depth,
    check_output,
    check_quant_type,
    check_threshold,
    codebook,
    float_values,
    integer_values,
    matrix,
    write,
)
from qcore_cpu_reference.floats import F32, from_float32, to_float32


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
            declarations={
                op: {"depth": {"lanes": 2**62, "extra": 2}, "weight_rounding": "float32"}
                for op in ("gemm_4bit", "gemm_4bit_transposed", "gemm_int4", "int8_linear_transposed")
            },
        )

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        op, n = "quantize_blockwise", A.numel()
        check_blocksize(op, blocksize)
        x = float_values(op, "A", A, n)
        table = codebook(op, code, ascending=True)
        check_output(op, "absmax", absmax, block_count(n, blocksize), torch.float32)
        check_output(op, "out", out, n, torch.uint8)
        codes, maxima = blockwise.quantize_blockwise(x, table, blocksize)
        write(absmax, torch.from_numpy(maxima))
        write(out, torch.from_numpy(codes))

    def dequantize_blockwise(self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor) -> None:
        op, n = "dequantize_blockwise", A.numel()
        check_blocksize(op, blocksize)
        codes = integer_values(op, "A", A, n, torch.uint8)
        maxima = float_values(op, "absmax", absmax, block_count(n, blocksize), (torch.float32,))
        table = codebook(op, code, ascending=False)
        check_output(op, "out", out, n, *FLOATS)
        write(out, from_float32(blockwise.dequantize_blockwise(codes, maxima, table, blocksize), out.dtype))

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        op, n = "quantize_4bit", A.numel()
        check_blocksize(op, blocksize)
        check_quant_type(op, quant_type)
        x = float_values(op, "A", A, n)
        check_output(op, "absmax", absmax, block_count(n, blocksize), torch.float32)
        check_output(op, "out", out, (n + 1) // 2, torch.uint8)
        packed, maxima = fourbit.quantize_4bit(x, quant_type, blocksize)
        write(absmax, torch.from_numpy(maxima))
        write(out, torch.from_numpy(packed))

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        values = _decode("dequantize_4bit", weight)
        check_output("dequantize_4bit", "out", out, values.size, *FLOATS)
        write(out, from_float32(values, out.dtype))

    def quantize_absmax(
        self, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor, nested_absmax: Tensor, offset: Tensor
    ) -> None:
        op, n = "quantize_absmax", absmax.numel()
        check_blocksize(op, blocksize)
        maxima = float_values(op, "absmax", absmax, n, (torch.float32,))
        table = codebook(op, code, ascending=True)
        check_output(op, "out", out, n, torch.uint8)
        check_output(op, "nested_absmax", nested_absmax, block_count(n, blocksize), torch.float32)
        check_output(op, "offset", offset, 1, torch.float32)
        codes, nested, mean = blockwise.quantize_absmax(maxima, table, blocksize)
        write(out, torch.from_numpy(codes))
        write(nested_absmax, torch.from_numpy(nested))
        offset.fill_(float(mean))

    def dequantize_absmax(
        self, A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int, *, out: Tensor
    ) -> None:
        values = _decode_absmax("dequantize_absmax", A, nested_absmax, code, offset, blocksize)
        check_output("dequantize_absmax", "out", out, values.size, torch.float32)
        write(out, torch.from_numpy(values))

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        op = "gemm_4bit"
        if len(weight.shape) != 2:
            raise InvalidArgument(f"{op}: weight has shape {weight.shape}, expected (N, K)")
        n, k = weight.shape
        m = out.numel() // n if n else 0
        x = float_values(op, "A", A, m * k if n else A.numel())
        w = _decode(op, weight).reshape(n, k)
        b = None if bias is None else float_values(op, "bias", bias, n, (A.dtype, torch.float32))
        check_output(op, "out", out, m * n, A.dtype)
        if m and n:
            write(out, from_float32(fourbit.gemm_4bit(x.reshape(m, k), w, b), out.dtype))

    def gemm_4bit_transposed(self, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
        op = "gemm_4bit_transposed"
        if len(weight.shape) != 2:
            raise InvalidArgument(f"{op}: weight has shape {weight.shape}, expected (N, K)")
        n, k = weight.shape
        m = out.numel() // k if k else 0
        x = float_values(op, "A", A, m * n if k else A.numel())
        w = _decode(op, weight).reshape(n, k)
        check_output(op, "out", out, m * k, A.dtype)
        if m and k:
            write(out, from_float32(fourbit.gemm_4bit_transposed(x.reshape(m, n), w), out.dtype))

    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        op = "int8_quantize_rows"
        m, k = matrix(op, "A", A)
        x = float_values(op, "A", A, m * k).reshape(m, k)
        check_threshold(op, threshold)
        check_output(op, "out", out, m * k, torch.int8)
        check_output(op, "row_stats", row_stats, m, torch.float32)
        if outlier_cols is None and threshold > 0:
            raise InvalidArgument(f"{op}: outlier_cols is missing, threshold {threshold} needs {k} values")
        if outlier_cols is not None:
            check_output(op, "outlier_cols", outlier_cols, k, torch.uint8)
        codes, stats, columns = int8.quantize_rows(x, threshold)
        write(out, torch.from_numpy(codes))
        write(row_stats, torch.from_numpy(stats))
        if outlier_cols is not None:
            write(outlier_cols, torch.from_numpy(columns))

    def int8_quantize_cols(self, A: Tensor, threshold: float, *, out: Tensor, col_stats: Tensor) -> None:
        op = "int8_quantize_cols"
        m, k = matrix(op, "A", A)
        x = float_values(op, "A", A, m * k).reshape(m, k)
        check_threshold(op, threshold)
        check_output(op, "out", out, m * k, torch.int8)
        check_output(op, "col_stats", col_stats, k, torch.float32)
        codes, stats = int8.quantize_cols(x, threshold)
        write(out, torch.from_numpy(codes))
        write(col_stats, torch.from_numpy(stats))

    def int8_gemm(self, A: Tensor, B: Tensor, *, out: Tensor) -> None:
        product = _int8_product("int8_gemm", A, B)
        check_output("int8_gemm", "out", out, product.size, torch.int32)
        write(out, torch.from_numpy(product))

    def int8_dequantize_gemm(
        self, C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        m, n = matrix("int8_dequantize_gemm", "C", C)
        c = integer_values("int8_dequantize_gemm", "C", C, m * n, torch.int32).reshape(m, n)
        _write_product("int8_dequantize_gemm", c, row_stats, col_stats, bias, out)

    def int8_scaled_gemm(
        self, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        product = _int8_product("int8_scaled_gemm", A, B)
        _write_product("int8_scaled_gemm", product, row_stats, col_stats, bias, out)

    def int8_dequantize_rows(self, A: Tensor, row_stats: Tensor, *, out: Tensor) -> None:
        op = "int8_dequantize_rows"
        m, k = matrix(op, "A", A)
        codes = integer_values(op, "A", A, m * k, torch.int8).reshape(m, k)
        stats = float_values(op, "row_stats", row_stats, m, (torch.float32,))
        check_output(op, "out", out, m * k, *FLOATS)
        write(out, from_float32(int8.dequantize_rows(codes, stats), out.dtype))

    def int8_linear(
        self, A: Tensor, W: Weight8bit, threshold: float, bias: Tensor | None, *, out: Tensor, outliers: Tensor | None
    ) -> None:
        op = "int8_linear"
        n, k = matrix(op, "codes", W.codes)
        m = out.numel() // n if n else A.numel() // max(k, 1)
        x = float_values(op, "A", A, m * k).reshape(m, k)
        codes = integer_values(op, "codes", W.codes, n * k, torch.int8).reshape(n, k)
        check_int8_depth(op, k)
        scales = float_values(op, "scales", W.scales, n, (torch.float32,))
        check_threshold(op, threshold)
        addend = None if bias is None else float_values(op, "bias", bias, n, (A.dtype, torch.float32))
        check_output(op, "out", out, m * n, A.dtype)
        if outliers is None and threshold > 0:
            raise InvalidArgument(f"{op}: outliers is missing, threshold {threshold} needs {k} values")
        if outliers is not None:
            check_output(op, "outliers", outliers, k, torch.uint8)
        t, columns = int8.linear(x, codes, scales, threshold, addend)
        write(out, from_float32(t, out.dtype))
        if outliers is not None and threshold > 0:
            write(outliers, torch.from_numpy(columns))

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        op = "int8_linear_transposed"
        n, k = matrix(op, "codes", W.codes)
        m = out.numel() // k if k else A.numel() // max(n, 1)
        y = float_values(op, "A", A, m * n).reshape(m, n)
        codes = integer_values(op, "codes", W.codes, n * k, torch.int8).reshape(n, k)
        scales = float_values(op, "scales", W.scales, n, (torch.float32,))
        check_output(op, "out", out, m * k, A.dtype)
        write(out, from_float32(int8.linear_transposed(y, codes, scales), out.dtype))

    def gemm_int4(self, A: Tensor, weight: WeightInt4, bias: Tensor | None, *, out: Tensor) -> None:
        op, (n, k) = "gemm_int4", weight.shape
        m = out.numel() // n if n else A.numel() // max(k, 1)
        x = float_values(op, "A", A, m * k)
        w = _decode_int4(op, weight)
        b = None if bias is None else float_values(op, "bias", bias, n, (A.dtype, torch.float32))
        check_output(op, "out", out, m * n, A.dtype)
        if m and n:
            write(out, from_float32(fourbit.gemm_4bit(x.reshape(m, k), w, b), out.dtype))

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        stepped = [_step(rule, tensors, i) for i in range(len(tensors.params))]
        for i, step in enumerate(stepped):  # nothing is written before every tensor was checked
            _write_step(rule, tensors, i, step)


def _step(rule: OptimizerRule, t: OptimizerTensors, i: int) -> optimizer.Stepped:
    op, n = "optimizer_step", t.params[i].numel()
    _check_lists(op, rule, t)
    param = float_values(op, "params", t.params[i], n, (t.params[0].dtype,))
    grad = float_values(op, "grads", t.grads[i], n, (t.grads[0].dtype,))
    if t.compensation:
        with np.errstate(all="ignore"):
            param = param + float_values(op, "compensation", t.compensation[i], n, (param_dtype := t.params[i].dtype,))
        if param_dtype == torch.float32:
            raise InvalidArgument(f"{op}: compensation is for 16-bit parameters")
    if rule.stochastic and (t.params[i].dtype != torch.bfloat16 or t.compensation):
        raise InvalidArgument(f"{op}: stochastic rounding is for bfloat16 parameters without compensation")
    scale = t.grad_scales[i] if t.grad_scales else 1.0
    return optimizer.step(rule, grad, scale, param, _read_states(op, rule, t, i))


def _check_lists(op: str, rule: OptimizerRule, t: OptimizerTensors) -> None:
    if rule.algorithm not in ALGORITHMS or rule.state_bits not in (8, 32):
        raise InvalidArgument(f"{op}: no algorithm {rule.algorithm!r} at {rule.state_bits} bits")
    count, two, coded = len(t.params), ALGORITHMS[rule.algorithm] == 2, rule.state_bits == 8
    lengths = {"grads": count, "state1": count, "state2": count * two, "absmax1": count * coded}
    lengths |= {"absmax2": count * (two and coded)}
    for name, expected in lengths.items():
        check_count(op, name, len(getattr(t, name)), expected)
    for name in ("compensation", "grad_scales"):
        check_count(op, name, len(getattr(t, name)) or count, count)
    if rule.stochastic:
        check_count(op, "streams", len(t.streams), count)


def _read_states(op: str, rule: OptimizerRule, t: OptimizerTensors, i: int) -> list[optimizer.State]:
    """The states of tensor i, decoded (QC-OPT-020), in the order of optimizer.second_moments."""
    n = t.params[i].numel()
    rows = 2 if rule.algorithm == "ademamix" else 1
    states = []
    for s, second_moment in enumerate(optimizer.second_moments(rule.algorithm)):
        row, of_two = (s, rows) if s < rows else (0, 1)
        codes, absmaxes = (t.state1, t.absmax1) if s < rows else (t.state2, t.absmax2)
        if rule.state_bits == 32:
            values = float_values(op, "state", codes[i], of_two * n, (torch.float32,))
            states.append(optimizer.State(values.reshape(of_two, n)[row].copy(), None, second_moment))
            continue
        table = optimizer.table(rule, second_moment)
        blocks = block_count(n, optimizer.BLOCK)
        code = integer_values(op, "state", codes[i], of_two * n, torch.uint8).reshape(of_two, n)[row]
        absmax = float_values(op, "absmax", absmaxes[i], of_two * blocks, (torch.float32,)).reshape(of_two, blocks)[row]
        values = blockwise.dequantize_blockwise(code, absmax, table, optimizer.BLOCK)
        states.append(optimizer.State(values, table, second_moment))
    return states


def _write_step(rule: OptimizerRule, t: OptimizerTensors, i: int, step: optimizer.Stepped) -> None:
    param = t.params[i]
    changed = torch.from_numpy(~step.kept).to(param.device).reshape(param.shape)
    if rule.stochastic:
        bits = optimizer.stochastic_bits(step.param, rule.seed, t.streams[i])
        rounded = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    else:
        rounded = from_float32(step.param, param.dtype)
    if t.compensation:
        high = to_float32(rounded)
        with np.errstate(all="ignore"):
            rest = np.where(np.isfinite(high), step.param - high, np.float32(0))
        _write_where(t.compensation[i], changed, from_float32(rest, param.dtype))
    _write_where(param, changed, rounded)
    groups: list[tuple[Tensor, Tensor | None, list[optimizer.State]]]
    first = 2 if rule.algorithm == "ademamix" else 1
    groups = [(t.state1[i], t.absmax1[i] if t.absmax1 else None, step.states[:first])]
    if t.state2:
        groups.append((t.state2[i], t.absmax2[i] if t.absmax2 else None, step.states[first:]))
    for state, absmax, parts in groups:
        if absmax is None:
            write(state, torch.from_numpy(np.concatenate([part.values for part in parts])))
        else:
            write(state, torch.from_numpy(np.concatenate([part.codes for part in parts])))
            write(absmax, torch.from_numpy(np.concatenate([part.absmax for part in parts])))


def _write_where(destination: Tensor, changed: Tensor, values: Tensor) -> None:
    """Elements that a step passes over keep their bits, those of a NaN included (QC-OPT-005)."""
    new = values.to(destination.device).reshape(destination.shape)
    destination.copy_(torch.where(changed.reshape(destination.shape), new, destination))


def _int8_product(op: str, A: Tensor, B: Tensor) -> int8.I32:
    m, k = matrix(op, "A", A)
    n, k_b = matrix(op, "B", B)
    if k != k_b:
        raise InvalidArgument(f"{op}: A has {k} columns, B has {k_b}; both are (rows, K)")
    check_int8_depth(op, k)
    a = integer_values(op, "A", A, m * k, torch.int8).reshape(m, k)
    b = integer_values(op, "B", B, n * k, torch.int8).reshape(n, k)
    return int8.gemm(a, b)


def _write_product(
    op: str, product: int8.I32, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    m, n = product.shape
    rows = float_values(op, "row_stats", row_stats, m, (torch.float32,))
    columns = float_values(op, "col_stats", col_stats, n, (torch.float32,))
    b = None if bias is None else float_values(op, "bias", bias, n, (out.dtype, torch.float32))
    check_output(op, "out", out, m * n, *FLOATS)
    write(out, from_float32(int8.dequantize_gemm(product, rows, columns, b), out.dtype))


def _decode_absmax(op: str, codes: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int) -> F32:
    check_blocksize(op, blocksize)
    n = codes.numel()
    values = integer_values(op, "absmax", codes, n, torch.uint8)
    nested = float_values(op, "nested_absmax", nested_absmax, block_count(n, blocksize), (torch.float32,))
    table = codebook(op, code, ascending=False)
    mean = float_values(op, "offset", offset, 1, (torch.float32,))[0]
    return blockwise.dequantize_absmax(values, nested, table, mean, blocksize)


def _decode(op: str, weight: Weight4bit) -> F32:
    check_blocksize(op, weight.blocksize)
    check_quant_type(op, weight.quant_type)
    numel = int(np.prod(weight.shape, dtype=np.int64))
    packed = integer_values(op, "packed", weight.packed, (numel + 1) // 2, torch.uint8)
    blocks = block_count(numel, weight.blocksize)
    if weight.nested_absmax is None:
        absmax = float_values(op, "absmax", weight.absmax, blocks, (torch.float32,))
    else:
        if weight.nested_code is None or weight.nested_offset is None:
            raise InvalidArgument(f"{op}: a nested weight needs nested_code and nested_offset")
        nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset, weight.nested_blocksize)
        absmax = _decode_absmax(op, weight.absmax, *nested)
        check_count(op, "absmax", absmax.size, blocks)
    return fourbit.dequantize_4bit(packed, absmax, weight.quant_type, weight.blocksize, numel)


def _decode_int4(op: str, weight: WeightInt4) -> F32:
    n, k = weight.shape
    g = weight.group_size
    if g < 1 or (g % 8 and g < k):
        raise InvalidArgument(f"{op}: group_size is {g}, expected a multiple of 8, or K = {k} or more")
    groups = block_count(k, g)
    stride = block_count(k, 2)
    packed = integer_values(op, "packed", weight.packed, n * stride, torch.uint8).reshape(n, stride)
    scales = float_values(op, "scales", weight.scales, n * groups).reshape(n, groups)
    zeros = None
    if weight.zeros is not None:
        zeros = integer_values(op, "zeros", weight.zeros, n * groups, torch.uint8).reshape(n, groups)
    perm = None
    if weight.perm is not None:
        perm = integer_values(op, "perm", weight.perm, k, torch.int32)
        if not np.array_equal(np.sort(perm), np.arange(k)):
            raise InvalidArgument(f"{op}: perm is no permutation of 0 to {k - 1}")
    return int4.dequantize(packed, scales, zeros, perm, g, k)
