"""Comparisons that say where two arrays differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcore_conformance.floats import Floats, differs


def expect_floats(what: str, actual: Floats, expected: Floats, *, zero_sign: bool = True) -> None:
    """Bit for bit, any NaN for any NaN; without ``zero_sign`` -0 passes for +0."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    unequal = differs(actual, expected, zero_sign=zero_sign)
    if unequal.any():
        index = tuple(int(i) for i in np.argwhere(unequal)[0])
        width = actual.bits.dtype.itemsize * 2
        raise AssertionError(
            f"{what}: {int(unequal.sum())} of {unequal.size} values differ; first at {list(index)}: got "
            f"{actual.f64()[index]!r} (0x{int(actual.bits[index]):0{width}x}), expected "
            f"{expected.f64()[index]!r} (0x{int(expected.bits[index]):0{width}x})"
        )


def expect_integers(what: str, actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    unequal = actual != expected
    if unequal.any():
        index = tuple(int(i) for i in np.argwhere(unequal)[0])
        raise AssertionError(
            f"{what}: {int(unequal.sum())} of {unequal.size} values differ; first at {list(index)}: got "
            f"{int(actual[index])}, expected {int(expected[index])}"
        )
