"""Outputs that are written past the caches hold what others hold: with pages or new, aligned or not."""

from __future__ import annotations

import pytest
import torch

import qcore_cpu
from qcore.backend import Weight4bit

COLUMNS, ROWS = 4096, 2051  # 16.8 MB in bfloat16, beyond the 16 MiB from which pages.h decides; rows for a tail
BLOCKSIZE = 64


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_4bit_gives_the_same_past_the_caches(dtype: torch.dtype, quant_type: str) -> None:
    backend = qcore_cpu.load()
    n = ROWS * COLUMNS - 29  # the last block is short
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n // BLOCKSIZE), generator=generator)

    def decoded(first: int, last: int, out: torch.Tensor) -> torch.Tensor:
        blocks = slice(first // BLOCKSIZE, -(-last // BLOCKSIZE))
        part = Weight4bit(packed[first // 2 : (last + 1) // 2], absmax[blocks], quant_type, BLOCKSIZE, (last - first,))
        backend.dequantize_4bit(part, out=out)
        return out

    expected = torch.empty(n, dtype=dtype)
    piece = 1 << 20  # less than is ever written past the caches
    for first in range(0, n, piece):
        decoded(first, min(first + piece, n), expected[first : first + piece])
    space = torch.full((n + 64,), float("nan"), dtype=dtype)  # with pages
    for offset in (0, 1, 32):
        out = space[offset : offset + n].fill_(float("nan"))
        assert torch.equal(decoded(0, n, out), expected)
        assert space[offset + n :].isnan().all()
    assert torch.equal(decoded(0, n, torch.empty(n, dtype=dtype)), expected)
