"""int8_quantize_cols gives the bits of the reference on matrices as wide as its vectors, finite or not."""

from __future__ import annotations

import math

import pytest
import torch

import qcore_cpu
import qcore_cpu_reference

ODD = {"finite": [], "infinite": [math.inf, -math.inf], "NaN": [math.nan], "outliers": [7.0, -6.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("odd", ODD)
def test_codes_are_those_of_the_reference(odd: str, threshold: float, dtype: torch.dtype) -> None:
    m, k = 7, 200
    a = torch.randn((m, k), generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    for i, value in enumerate(ODD[odd]):
        a[i + 2, i::41] = value
    results = []
    for backend in (qcore_cpu_reference.load(), qcore_cpu.load()):
        out, stats = torch.empty((m, k), dtype=torch.int8), torch.empty(k)
        backend.int8_quantize_cols(a.to(dtype), threshold, out=out, col_stats=stats)
        results.append((out, stats))
    (want, want_stats), (got, got_stats) = results
    assert torch.equal(got_stats, want_stats)
    assert torch.equal(got, want)
