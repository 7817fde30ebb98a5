"""The ops: through the functions that a program calls, outputs fresh unless the variant says otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qcore.optim
from qcore import functional as F
from qcore.backend.registry import backend_for
from qcore.backend.weights import WeightInt4
from qcore.bench import peers
from qcore.bench.measure import Call
from qcore.bench.workload import BLOCKSIZE, BLOCKSIZE_8BIT, DTYPES, Build, Shared, Spec, Workload, nbytes
from qcore.functional.codemaps import dynamic_code
from qcore.ops import int8
from qcore.ops.fourbit import dequantize_absmax, prepare_gemm_4bit, quantize_absmax
from qcore.ops.int8_linear import int8_linear
from qcore.ops.prepared_int4 import prepare_int4
from qcore.ops.prepared_int8 import int8_back

QUANT_TYPES = ("nf4", "fp4")
GROUP_SIZE = 64  # of gemm_int4


def specs(shape: tuple[int, int], dtypes: Sequence[str], rows: Sequence[int]) -> Iterator[Spec]:
    """Every op at one shape of the weight; products with each number of rows."""
    for dtype in dtypes:
        yield Spec("quantize_blockwise", "", dtype, shape, None, _quantize_blockwise(dtype))
        for out in (False, True):
            variant = "out=" if out else ""
            yield Spec("dequantize_blockwise", variant, dtype, shape, None, _dequantize_blockwise(dtype, out))
        for kind in QUANT_TYPES:
            yield Spec("quantize_4bit", kind, dtype, shape, None, _quantize_4bit(kind, dtype))
            for out in (False, True):
                variant = f"{kind} out=" if out else kind
                yield Spec("dequantize_4bit", variant, dtype, shape, None, _dequantize_4bit(kind, dtype, out))
        yield Spec("int8_quantize_cols", "", dtype, shape, None, _quantize_cols(dtype))
        yield Spec("int8_dequantize_rows", "", dtype, shape, None, _dequantize_rows(dtype))
    for bits in (8, 32):
        yield Spec("optimizer_step", f"AdamW, {bits} bits", "f32", shape, None, _adamw(bits))
    yield Spec("quantize_absmax", "", "f32", shape, None, _quantize_absmax)
    yield Spec("dequantize_absmax", "", "f32", shape, None, _dequantize_absmax)
    for m in rows:
        for index, dtype in enumerate(dtypes):
            for kind in QUANT_TYPES[: 1 if index else 2]:
                yield Spec("gemm_4bit", kind, dtype, shape, m, _gemm_4bit(kind, dtype, m))
            yield Spec("gemm_4bit_transposed", "nf4", dtype, shape, m, _gemm_4bit_transposed(dtype, m))
            yield Spec("gemm_int4", f"groups of {GROUP_SIZE}", dtype, shape, m, _gemm_int4(dtype, m))
            for out in (False, True):
                variant = "threshold 6 out=" if out else "threshold 6"
                yield Spec("int8_quantize_rows", variant, dtype, shape, m, _quantize_rows(dtype, m, out))
        yield Spec("int8_gemm", "", "int8", shape, m, _int8_gemm(m))
        yield Spec("int8_linear", "", dtypes[0], shape, m, _int8_linear(dtypes[0], m))
        for dtype in dtypes:
            yield Spec("int8_linear_transposed", "", dtype, shape, m, _int8_linear_transposed(dtype, m))
        yield Spec("int8_scaled_gemm", "", dtypes[0], shape, m, _int8_scaled_gemm(dtypes[0], m))
        yield Spec("int8_dequantize_gemm", "", dtypes[0], shape, m, _dequantize_gemm(dtypes[0], m))


def _quantize_blockwise(dtype: str) -> Build:
    def build(s: Shared) -> Workload:
        a = s.weight(dtype)
        calls: dict[str, Call] = {"qcore": lambda: F.quantize_blockwise(a, blocksize=BLOCKSIZE_8BIT)}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            calls["bitsandbytes"] = lambda: B.quantize_blockwise(a, blocksize=BLOCKSIZE_8BIT)
        return Workload(calls, nbytes(a), a.numel() + a.numel() // BLOCKSIZE_8BIT * 4)

    return build


def _dequantize_blockwise(dtype: str, with_out: bool) -> Build:
    def build(s: Shared) -> Workload:
        a = s.weight(dtype)
        codes, state = F.quantize_blockwise(a, blocksize=BLOCKSIZE_8BIT)
        out = torch.zeros_like(a) if with_out else None
        calls: dict[str, Call] = {"qcore": lambda: F.dequantize_blockwise(codes, state, out=out)}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            theirs, their_state = B.quantize_blockwise(a, blocksize=BLOCKSIZE_8BIT)
            calls["bitsandbytes"] = lambda: B.dequantize_blockwise(theirs, their_state)  # no out= on a CPU
        return Workload(calls, nbytes(codes, state.absmax), nbytes(a))

    return build


def _quantize_4bit(kind: str, dtype: str) -> Build:
    def build(s: Shared) -> Workload:
        a = s.weight(dtype)
        calls: dict[str, Call] = {"qcore": lambda: F.quantize_4bit(a, quant_type=kind, blocksize=BLOCKSIZE)}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            calls["bitsandbytes"] = lambda: B.quantize_4bit(a, quant_type=kind, blocksize=BLOCKSIZE)
        return Workload(calls, nbytes(a), a.numel() // 2 + a.numel() // BLOCKSIZE * 4)

    return build


def _dequantize_4bit(kind: str, dtype: str, with_out: bool) -> Build:
    def build(s: Shared) -> Workload:
        a = s.weight(dtype)
        packed, state = F.quantize_4bit(a, quant_type=kind, blocksize=BLOCKSIZE)
        out = torch.zeros_like(a) if with_out else None
        calls: dict[str, Call] = {"qcore": lambda: F.dequantize_4bit(packed, state, out=out)}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            theirs, their_state = s.once(
                "bitsandbytes 4-bit", kind, dtype, make=lambda: B.quantize_4bit(a, quant_type=kind, blocksize=BLOCKSIZE)
            )
            calls["bitsandbytes"] = lambda: B.dequantize_4bit(theirs, their_state)  # no out= on a CPU
        return Workload(calls, nbytes(packed, state.absmax), nbytes(a))

    return build


def _quantize_absmax(s: Shared) -> Workload:
    absmax = s.weight("f32").view(-1)[:: s.shape[0] * s.shape[1] // _blocks(s)].abs().contiguous()
    code = dynamic_code(absmax.device)
    calls: dict[str, Call] = {"qcore": lambda: quantize_absmax(absmax, code, 256)}
    if s.bitsandbytes:
        B = peers.bitsandbytes().functional
        calls["bitsandbytes"] = lambda: B.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    return Workload(calls, nbytes(absmax), absmax.numel())


def _dequantize_absmax(s: Shared) -> Workload:
    absmax = s.weight("f32").view(-1)[: _blocks(s)].abs()
    code, offset = dynamic_code(absmax.device), absmax.mean()
    codes, nested, mean = quantize_absmax(absmax, code, 256)
    calls: dict[str, Call] = {"qcore": lambda: dequantize_absmax(codes, nested, code, mean, 256)}
    if s.bitsandbytes:
        B = peers.bitsandbytes().functional
        theirs, state = B.quantize_blockwise(absmax - offset, blocksize=256)
        calls["bitsandbytes"] = lambda: B.dequantize_blockwise(theirs, state) + offset
    return Workload(calls, nbytes(codes, nested), nbytes(absmax))


def _blocks(s: Shared) -> int:
    return max(1, s.shape[0] * s.shape[1] // BLOCKSIZE)


def _gemm_4bit(kind: str, dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), x = s.shape, s.normal(m, s.shape[1], dtype)
        packed, state = s.once(
            "plain 4-bit", kind, make=lambda: F.quantize_4bit(s.weight("f32"), quant_type=kind, blocksize=BLOCKSIZE)
        )
        handle = s.once("handle", kind, make=lambda: prepare_gemm_4bit(state.weight(packed)))
        calls: dict[str, Call] = {"qcore": lambda: handle(x)}
        if s.bitsandbytes:
            layer = s.their_linear4bit(kind, dtype)
            calls["bitsandbytes"] = lambda: layer(x)
        s.with_torch(calls, x, "f32", "bf16")
        written = m * n * x.element_size()
        return Workload(calls, nbytes(packed, state.absmax, x), written, 2 * m * n * k, dtype)

    return build


def _gemm_4bit_transposed(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), y = s.shape, s.normal(m, s.shape[0], dtype)
        packed, state = s.once(
            "plain 4-bit", "nf4", make=lambda: F.quantize_4bit(s.weight("f32"), quant_type="nf4", blocksize=BLOCKSIZE)
        )
        handle = s.once("handle", "nf4", make=lambda: prepare_gemm_4bit(state.weight(packed)))
        calls: dict[str, Call] = {"qcore": lambda: handle.transposed(y)}
        _with_plain_product(s, calls, y)
        return Workload(calls, nbytes(packed, state.absmax, y), m * k * y.element_size(), 2 * m * n * k, dtype)

    return build


def _gemm_int4(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), x = s.shape, s.normal(m, s.shape[1], dtype)
        weight = s.once("integers", make=lambda: _integers(n, k))
        handle = s.once("integers' handle", make=lambda: prepare_int4(weight))
        calls: dict[str, Call] = {"qcore": lambda: handle.eager(x, None)}
        if s.torch and n % 16 == 0 and k % GROUP_SIZE == 0:
            packed = s.once("torch's integers", make=lambda: peers.torch_int4(weight))
            grid = torch.stack([weight.scales.t(), torch.zeros(k // GROUP_SIZE, n)], 2).to(x.dtype).contiguous()
            calls["torch int4"] = lambda: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, grid)
        s.with_torch(calls, x, "f32", "bf16")
        read = nbytes(weight.packed, weight.scales, x)
        return Workload(calls, read, m * n * x.element_size(), 2 * m * n * k, dtype)

    return build


def _integers(n: int, k: int) -> WeightInt4:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8, generator=generator)
    scales = 0.01 + torch.rand((n, -(-k // GROUP_SIZE)), generator=generator) / 100
    return WeightInt4(packed, scales, None, GROUP_SIZE, (n, k))


def _with_outliers(s: Shared, m: int, dtype: str) -> Tensor:
    x = s.normal(m, s.shape[1], dtype)
    x[:, :: max(1, s.shape[1] // 8)] *= 8  # some outlier columns, as activations have
    return x


def _quantize_rows(dtype: str, m: int, with_out: bool) -> Build:
    """``with_out``: the backend's op, for which Python has no ``out=``."""

    def build(s: Shared) -> Workload:
        x = _with_outliers(s, m, dtype)
        calls: dict[str, Call] = {"qcore": lambda: F.int8_vectorwise_quant(x, 6.0)}
        if with_out:
            names = ("out", "row_stats", "outlier_cols")
            held = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(m), torch.zeros(s.shape[1], dtype=torch.uint8)
            calls["qcore"] = partial(backend_for("cpu").int8_quantize_rows, x, 6.0, **dict(zip(names, held)))
        if s.bitsandbytes:
            B, theirs = peers.bitsandbytes().functional, x.half()  # its layers cast to float16 first
            calls["bitsandbytes"] = lambda: B.int8_vectorwise_quant(theirs, 6.0)
        return Workload(calls, nbytes(x), x.numel() + 4 * m)

    return build


def _quantize_cols(dtype: str) -> Build:
    def build(s: Shared) -> Workload:
        a = s.weight(dtype)
        return Workload({"qcore": lambda: int8.int8_quantize_cols(a)}, nbytes(a), a.numel() + 4 * s.shape[1])

    return build


def _dequantize_rows(dtype: str) -> Build:
    def build(s: Shared) -> Workload:
        codes, stats = s.codes()
        calls: dict[str, Call] = {"qcore": lambda: int8.int8_dequantize_rows(codes, stats, DTYPES[dtype])}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            calls["bitsandbytes"] = lambda: B.int8_vectorwise_dequant(codes, stats)
        return Workload(calls, nbytes(codes, stats), codes.numel() * DTYPES[dtype].itemsize)

    return build


def _activations(s: Shared, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = s.normal(m, s.shape[1], "f32")
    codes, stats, _ = F.int8_vectorwise_quant(x)
    return x, codes, stats


def _int8_gemm(m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), (weight, _), (x, codes, _) = s.shape, s.codes(), _activations(s, m)
        calls: dict[str, Call] = {"qcore": lambda: int8.int8_gemm(codes, weight)}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            calls["bitsandbytes"] = lambda: B.int8_linear_matmul(codes, weight)
        s.with_torch(calls, x, "f32", "bf16")
        if s.torch:
            calls["torch int8"] = lambda: torch._int_mm(codes, weight.t())
        return Workload(calls, nbytes(codes, weight), 4 * m * n, 2 * m * n * k, "int8")

    return build


def _int8_scaled_gemm(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), (weight, cols), (x, codes, rows) = s.shape, s.codes(), _activations(s, m)
        target = DTYPES[dtype]
        calls: dict[str, Call] = {"qcore": lambda: int8.int8_scaled_gemm(codes, weight, rows, cols, dtype=target)}
        if s.bitsandbytes:
            peers.bitsandbytes()
            scaled = torch.ops.bitsandbytes.int8_scaled_mm.default
            calls["bitsandbytes"] = lambda: scaled(codes, weight, rows, cols, dtype=target)
        s.with_torch(calls, x, "f32", "bf16")
        written = m * n * target.itemsize
        return Workload(calls, nbytes(codes, weight, rows, cols), written, 2 * m * n * k, "int8")

    return build


def _int8_linear(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), (weight, cols), x = s.shape, s.codes(), s.normal(m, s.shape[1], dtype)
        calls: dict[str, Call] = {"qcore": lambda: int8_linear(x, weight, cols)}
        if s.bitsandbytes:
            layer = s.their_linear8bit(0.0)
            calls["bitsandbytes"] = lambda: layer(x)
        s.with_torch(calls, x, "f32", "bf16")
        return Workload(calls, nbytes(x, weight, cols), m * n * x.element_size(), 2 * m * n * k, "int8")

    return build


def _int8_linear_transposed(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        (n, k), (weight, rows), y = s.shape, s.codes(), s.normal(m, s.shape[0], dtype)
        back = s.once("back", make=lambda: int8_back(weight, rows))
        calls: dict[str, Call] = {"qcore": lambda: back(y)}
        _with_plain_product(s, calls, y)
        return Workload(calls, nbytes(weight, rows, y), m * k * y.element_size(), 2 * m * n * k, dtype)

    return build


def _with_plain_product(s: Shared, calls: dict[str, Call], y: torch.Tensor) -> None:
    """torch's product with the plain weight as it lies, the gradient of ``nn.Linear``."""
    for peer in ("f32", "bf16") if s.torch else ():
        dense, a = s.weight(peer), y.to(DTYPES[peer])
        calls[f"torch {peer}"] = lambda dense=dense, a=a: a @ dense  # type: ignore[misc]


def _adamw(bits: int) -> Build:
    """A step of one float32 parameter; torch keeps its state in 32 bits in any case, and fuses the step."""

    def build(s: Shared) -> Workload:
        gradient = s.normal(*s.shape, "f32")
        name = "AdamW8bit" if bits == 8 else "AdamW32bit"

        def step(kind: Any, **options: Any) -> Call:
            parameter = torch.nn.Parameter(s.weight("f32").clone())
            parameter.grad = gradient
            optimizer = kind([parameter], lr=1e-4, **options)
            return lambda: optimizer.step()

        calls: dict[str, Call] = {"qcore": step(getattr(qcore.optim, name))}
        if s.torch:
            calls["torch f32"] = step(torch.optim.AdamW, fused=True)
        if s.bitsandbytes:
            calls["bitsandbytes"] = step(getattr(peers.bitsandbytes().optim, name))
        state = 2 * (1 + 4 / 256) if bits == 8 else 8.0  # bytes an element
        read, changed = int(gradient.numel() * (8 + state)), int(gradient.numel() * (4 + state))
        return Workload(calls, read, changed, in_place=True)

    return build


def _dequantize_gemm(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        n = s.shape[0]
        product = torch.randint(-(2**20), 2**20, (m, n), dtype=torch.int32)
        rows, cols = torch.rand(m), torch.rand(n)
        calls: dict[str, Call] = {"qcore": lambda: int8.int8_dequantize_gemm(product, rows, cols, None, DTYPES[dtype])}
        if s.bitsandbytes:
            B = peers.bitsandbytes().functional
            calls["bitsandbytes"] = lambda: B.int8_mm_dequant(product, rows, cols)
        return Workload(calls, nbytes(product, rows, cols), m * n * DTYPES[dtype].itemsize)

    return build
