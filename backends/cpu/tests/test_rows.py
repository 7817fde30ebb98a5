"""int8_quantize_rows gives the bits of the reference at every threshold, on rows with whole vectors and a tail."""

from __future__ import annotations

import math

import pytest
import torch

import qcore_cpu
import qcore_cpu_reference

THRESHOLDS = [0.0, 1e-40, 2.0**-24, 1.0 + 2.0**-12, 6.0, 65504.0, 65519.0, 65520.0, 70000.0, 3.3e38, 3.4e38]
SPECIAL = [0.0, -0.0, 1e-40, 2.0**-24, -1.0, 1.0, 5.99, 6.0, -6.0, 65504.0, 3.3e38, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_outliers_are_those_of_the_reference(dtype: torch.dtype, threshold: float) -> None:
    m, k = len(SPECIAL) + 1, 150
    a = torch.randn((m, k), generator=torch.Generator().manual_seed(0)) * 3
    for row, value in enumerate(SPECIAL):  # one in a vector, one in the tail
        a[row, 7 * row] = a[row, 149 - row] = value
    results = []
    for backend in (qcore_cpu_reference.load(), qcore_cpu.load()):
        out, stats = torch.empty((m, k), dtype=torch.int8), torch.empty(m)
        columns = torch.empty(k, dtype=torch.uint8)
        backend.int8_quantize_rows(a.to(dtype), threshold, out=out, row_stats=stats, outlier_cols=columns)
        results.append((out, stats.view(torch.int32), columns))
    for want, got in zip(*results):
        assert torch.equal(got, want)
