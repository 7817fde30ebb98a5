"""What quantized layers shall compute, in NumPy and float64, from the stored bytes alone."""

from __future__ import annotations

import numpy as np
import torch

from qcore.codebooks import FP4, NF4

TABLES = {"nf4": NF4, "fp4": FP4}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # one rounding to the dtype
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def weight_4bit(packed: torch.Tensor, state) -> np.ndarray:
    """QC-4BIT-002, QC-4BIT-003 and QC-NEST-003: the decoded float32 weights, as float64."""
    data = packed.detach().contiguous().view(torch.uint8).reshape(-1).numpy()
    codes = np.stack([data >> 4, data & 15], axis=1).reshape(-1)
    numel = int(np.prod(state.shape))
    absmax = state.absmax.numpy().reshape(-1)
    if state.nested:
        inner = state.state2
        scale = np.repeat(inner.absmax.numpy(), inner.blocksize)[: absmax.size]
        absmax = inner.code.numpy()[absmax] * scale + np.float32(state.offset.item())
    table = np.asarray(TABLES[state.quant_type], dtype=np.float32)
    values = table[codes[:numel]] * np.repeat(absmax, state.blocksize)[:numel]
    return values.reshape(tuple(state.shape)).astype(np.float64)


def rows_int8(x: torch.Tensor, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """QC-INT8-001 to -003 of a finite matrix: codes, row statistics, outlier columns."""
    values = x.detach().float().numpy()
    magnitude = np.abs(values)
    outlier = magnitude >= np.float32(threshold) if threshold else np.zeros(values.shape, bool)
    stats = np.where(outlier, np.float32(0), magnitude).max(axis=1, initial=np.float32(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(values * (np.float32(127) / stats)[:, None])
    codes = np.where((stats > 0)[:, None], np.clip(codes, -127, 127), 0)
    columns = outlier.any(axis=0)
    codes[:, columns] = 0
    return codes.astype(np.int64), stats.astype(np.float32), columns


def linear_int8(x, codes, scales, bias, threshold) -> tuple[np.ndarray, np.ndarray]:
    """LLM.int8() in float64 from int8 codes of the weight: the result, and the sum of all magnitudes that went in."""
    x_codes, x_stats, columns = rows_int8(x, threshold)
    w_codes, w_stats = codes.detach().numpy().astype(np.int64), f64(scales)
    factors = x_stats.astype(np.float64)[:, None] * w_stats[None] / 127.0**2
    y = (x_codes @ w_codes.T) * factors
    total = np.abs(y)
    x_outlier, w_outlier = f64(x)[:, columns], (w_codes * w_stats[:, None] / 127.0)[:, columns]
    y = y + x_outlier @ w_outlier.T
    total = total + np.abs(x_outlier) @ np.abs(w_outlier).T
    if bias is not None:
        y, total = y + f64(bias), total + np.abs(f64(bias))
    return y, total


def assert_close(got: torch.Tensor, want: np.ndarray, total: np.ndarray, roundings: int, *, weight_unit: float = 0.0):
    """QC-GEMM4-004: ``roundings`` float32 roundings of terms that sum to ``total``, then one to ``got.dtype``."""
    bound = (roundings * 2.0**-24 + weight_unit) * total
    bound = bound + UNIT[got.dtype] * (np.abs(want) + bound) + TINY[got.dtype]
    error = np.abs(f64(got).reshape(want.shape) - want)
    worst = (
        np.unravel_index(np.argmax(np.nan_to_num(error / np.maximum(bound, 1e-300), nan=np.inf)), error.shape)
        if error.size
        else ()
    )
    assert not error.size or not (~(error <= bound)).any(), (
        f"at {worst}: {f64(got).reshape(want.shape)[worst]} instead of {want[worst]}, bound {bound[worst]}"
    )
