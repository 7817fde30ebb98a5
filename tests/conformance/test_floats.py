"""The suite's own arithmetic against torch's and NumPy's conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcore_conformance.floats import DTYPES, FORMATS, Floats, differs, f32, is_nan, neighbours, rounded
from qcore_conformance.session import to_torch


def _edges(dtype: str) -> np.ndarray:
    """Every value of a 16-bit format (or a sample of float32), the midpoints between them, and a bit either side."""
    form = FORMATS[dtype]
    step = 1 if dtype != "f32" else 65_521
    bits = np.arange(0, form.infinity_bits, step, dtype=np.int64).astype(form.bits)
    values = Floats(bits, dtype).f64()
    above = Floats(bits + form.bits(1), dtype).f64()
    middle = (values + np.where(np.isinf(above), 2 * form.largest - values, above)) / 2
    points = np.concatenate([values, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)])
    return np.concatenate([points, -points, [0.0, -0.0, np.inf, -np.inf, np.nan]])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rounding_to_16_bits_is_torchs_on_every_float32_edge(dtype: str) -> None:
    points = _edges(dtype).astype(np.float32)
    want = torch.from_numpy(points).to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    got = rounded(points.astype(np.float64), dtype)
    want_bits = Floats(want.view(torch.int16).numpy().view(np.uint16), dtype)
    assert not differs(got, want_bits).any()


def test_rounding_to_float32_is_numpys() -> None:
    points = _edges("f32")
    with np.errstate(over="ignore"):
        want = f32(points.astype(np.float32))
    assert not differs(rounded(points, "f32"), want).any()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_16_bit_pattern_is_read_as_torch_reads_it(dtype: str) -> None:
    every = Floats(np.arange(1 << 16, dtype=np.uint16), dtype)
    assert np.array_equal(every.f64(), to_torch(every).double().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_are_adjacent_and_cross_zero(dtype: str) -> None:
    below, middle, above = neighbours([1.0, -1.0, 0.0], dtype).f64().reshape(3, 3)
    assert (below < middle).all()
    assert (middle < above).all()
    assert above[2] == FORMATS[dtype].smallest_denormal
    assert below[2] == -FORMATS[dtype].smallest_denormal
    ulp = 2.0 ** (1 - FORMATS[dtype].precision)
    assert (above[0], below[0]) == (1 + ulp, 1 - ulp / 2)


def test_any_nan_equals_any_nan_but_no_number() -> None:
    nans = Floats(np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF], dtype=np.uint32), "f32")
    assert is_nan(nans).all()
    assert not differs(nans, Floats(nans.bits[::-1].copy(), "f32")).any()
    assert differs(nans, f32([np.inf, 0.0, 1.0])).all()


def test_the_sign_of_zero_counts_unless_said_otherwise() -> None:
    assert differs(f32([0.0]), f32([-0.0])).all()
    assert not differs(f32([0.0]), f32([-0.0]), zero_sign=False).any()
    assert differs(f32([0.0]), f32([1e-45]), zero_sign=False).all()
