"""What the spec says, in NumPy float32 and float64: the truth that these tests compare with; and their inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcore import codebooks
from qcore.backend.interface import Weight4bit
from qcore.ops.fourbit import quantize_4bit, quantize_absmax

TABLES = {"nf4": codebooks.NF4, "fp4": codebooks.FP4}
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
Floats = NDArray[np.float32]


def flat(A: Tensor) -> Floats:
    """The values of ``A`` in row-major order."""
    return A.detach().float().numpy().reshape(-1)


def scaled(A: Tensor, blocksize: int) -> tuple[Floats, Floats]:
    """(values scaled to [-1, 1], absmax) by QC-Q8-002 and QC-Q8-003, for finite values."""
    values = flat(A)
    absmax = np.array([np.abs(values[i : i + blocksize]).max() for i in range(0, len(values), blocksize)], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        reciprocal = np.where(absmax > 0, np.float32(1) / absmax, np.float32(0)).astype(np.float32)
    return values * np.repeat(reciprocal, blocksize)[: len(values)], absmax


def codes_8bit(A: Tensor, code: Tensor, blocksize: int) -> tuple[NDArray[np.uint8], Floats]:
    """QC-Q8-004 on finite values."""
    y, absmax = scaled(A, blocksize)
    c = code.numpy()
    middle = (c[:-1] + c[1:]) * np.float32(0.5)
    tie_up = (np.arange(255) % 2 == 1) & (c[:-1] < c[1:])
    codes = [(value > middle).sum() + ((value == middle) & tie_up).sum() for value in y]
    return np.array(codes, np.uint8), absmax


def codes_4bit(A: Tensor, quant_type: str, blocksize: int) -> tuple[NDArray[np.uint8], Floats]:
    """One code an element, by QC-NF4-002 and QC-FP4-002 on finite values."""
    y, absmax = scaled(A, blocksize)
    if quant_type == "nf4":
        c = np.array(codebooks.NF4, np.float32)
        middle = (c[:-1] + c[1:]) * np.float32(0.5)
        return np.array([(value > middle).sum() for value in y], np.uint8), absmax
    thresholds = np.array(codebooks.FP4_THRESHOLDS, np.float32)
    codes = [codebooks.FP4_ORDER[(abs(value) > thresholds).sum()] + (8 if value < 0 else 0) for value in y]
    return np.array(codes, np.uint8), absmax


def unpacked(packed: Tensor, n: int) -> NDArray[np.uint8]:
    """QC-4BIT-002: high nibble first."""
    data = packed.reshape(-1).numpy()
    return np.stack([data >> 4, data & 15], axis=1).reshape(-1)[:n]


def decoded(weight: Weight4bit) -> NDArray[np.float64]:
    """The exact values behind QC-4BIT-003 and QC-NEST-003: float32 arithmetic, returned in float64."""
    n = int(np.prod(weight.shape))
    absmax = weight.absmax.numpy()
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None
        assert weight.nested_offset is not None
        scale = np.repeat(weight.nested_absmax.numpy(), weight.nested_blocksize)[: len(absmax)]
        absmax = weight.nested_code.numpy()[absmax] * scale + weight.nested_offset.numpy()
    table = np.array(TABLES[weight.quant_type], np.float32)
    values = table[unpacked(weight.packed, n)] * np.repeat(absmax, weight.blocksize)[:n]
    return values.astype(np.float64).reshape(weight.shape)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(n: int, k: int, quant_type: str = "nf4", nested: bool = False, seed: int = 0) -> Weight4bit:
    """Normal values, quantized by the backend that is selected."""
    packed, absmax = quantize_4bit(random(n, k, seed=seed), quant_type, 64)
    weight = Weight4bit(packed.view(-1), absmax, quant_type, 64, (n, k))
    if not nested:
        return weight
    code = torch.tensor(codebooks.DYNAMIC)
    codes, nested_absmax, offset = quantize_absmax(absmax, code, 256)
    parts = {"nested_absmax": nested_absmax, "nested_code": code, "nested_offset": offset, "nested_blocksize": 256}
    return replace(weight, absmax=codes, **parts)


def assert_close(y: Tensor, x: Tensor, weight: Weight4bit, bias: Tensor | None, transposed: bool = False) -> None:
    """QC-GEMM4-004 with the spec's ceiling of the chain depth and weights rounded to the dtype of x.

    ``transposed``: ``y`` is ``x @ w`` (QC-GEMM4-009).
    """
    w = torch.from_numpy(decoded(weight))
    w = w.t() if transposed else w
    exact, size = x.double() @ w.t(), x.double().abs() @ w.t().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    depth, u, u_out = w.shape[1] + 8, 2.0**-24, ROUNDING[y.dtype]
    a = (depth * u / (1 - depth * u) + u + (0 if y.dtype == torch.float32 else u_out)) * size
    assert y.shape == exact.shape
    assert not bool((~((y.double() - exact).abs() <= a + u_out * (exact.abs() + a))).any())
