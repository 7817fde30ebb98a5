"""Floating-point arrays as bit patterns, so that NumPy's lack of bfloat16 and NaN payloads cannot blur a comparison.

Rounding is done on integers and exact powers of two (QC-NUM-003), not by the conversions of torch or of a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DTYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Format:
    """An IEEE-like binary format: ``precision`` counts the hidden bit."""

    precision: int
    emin: int
    emax: int
    bits: type[np.unsignedinteger[Any]]

    @property
    def unit_roundoff(self) -> float:
        return 2.0**-self.precision

    @property
    def smallest_denormal(self) -> float:
        return 2.0 ** (self.emin - self.precision + 1)

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.emin

    @property
    def largest(self) -> float:
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.emax

    @property
    def infinity_bits(self) -> int:
        return (self.emax - self.emin + 2) << (self.precision - 1)


FORMATS = {
    "f32": Format(24, -126, 127, np.uint32),
    "f16": Format(11, -14, 15, np.uint16),
    "bf16": Format(8, -126, 127, np.uint16),
}


@dataclass(frozen=True, eq=False)
class Floats:
    """An array of ``dtype`` ("f32", "f16", "bf16") as its bit patterns (uint32 or uint16)."""

    bits: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def size(self) -> int:
        return self.bits.size

    def reshape(self, *shape: int) -> Floats:
        return Floats(self.bits.reshape(*shape), self.dtype)

    def f64(self) -> NDArray[np.float64]:
        """The values, exactly."""
        if self.dtype == "f32":
            values = np.ascontiguousarray(self.bits).view(np.float32)
        elif self.dtype == "f16":
            values = np.ascontiguousarray(self.bits).view(np.float16)
        else:
            values = (self.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(invalid="ignore"):  # a signalling NaN is quieted, which raises a flag
            return values.astype(np.float64)


def rounded(values: ArrayLike, dtype: str) -> Floats:
    """``values`` (float64) rounded once to ``dtype``, to nearest even; overflow gives infinity (QC-NUM-003)."""
    x = np.asarray(values, dtype=np.float64)
    form = FORMATS[dtype]
    finite = np.isfinite(x)
    # 2^(emax + 1) stands for everything beyond it: it encodes as infinity.
    magnitude = np.minimum(np.where(finite, np.abs(x), 0.0), 2.0 ** (form.emax + 1))
    exponent = np.clip(np.frexp(magnitude)[1] - 1, form.emin, form.emax + 1)
    exponent = np.where(magnitude == 0, form.emin, exponent)
    # Scaling by a power of two is exact, rint rounds ties to even: a significand with `precision` bits, or a denormal.
    significand = np.rint(np.ldexp(magnitude, form.precision - 1 - exponent))
    # A carry out of the significand runs into the exponent field, up to infinity, as it should.
    bits = ((exponent - form.emin).astype(np.int64) << (form.precision - 1)) + significand.astype(np.int64)
    bits = np.where(finite, np.minimum(bits, form.infinity_bits), form.infinity_bits)
    bits = np.where(np.isnan(x), form.infinity_bits | (1 << (form.precision - 2)), bits)
    sign = np.signbit(x).astype(np.int64) << (np.dtype(form.bits).itemsize * 8 - 1)
    return Floats((bits | sign).astype(form.bits), dtype)


def f32(values: ArrayLike) -> Floats:
    """float32 ``values`` as :class:`Floats`, NaN payloads and all."""
    return Floats(np.ascontiguousarray(values, dtype=np.float32).view(np.uint32), "f32")


def concatenate(parts: Sequence[Floats]) -> Floats:
    return Floats(np.concatenate([part.bits.reshape(-1) for part in parts]), parts[0].dtype)


def neighbours(values: ArrayLike, dtype: str) -> Floats:
    """Each value rounded to ``dtype``, with the representable values just below and just above it."""
    middle = rounded(np.asarray(values, dtype=np.float64).reshape(-1), dtype)
    return concatenate([_step(middle, -1), middle, _step(middle, +1)])


def _step(x: Floats, direction: int) -> Floats:
    """The next representable value up or down; the order of floats is that of sign-magnitude integers."""
    form = FORMATS[x.dtype]
    top = 1 << (np.dtype(form.bits).itemsize * 8 - 1)
    wide = x.bits.astype(np.int64)
    ordered = np.where(wide >= top, top - wide, wide) + direction
    return Floats(np.where(ordered < 0, top - ordered, ordered).astype(form.bits), x.dtype)


def is_nan(x: Floats) -> NDArray[np.bool_]:
    form = FORMATS[x.dtype]
    top = 1 << (np.dtype(form.bits).itemsize * 8 - 1)
    return np.asarray((x.bits.astype(np.int64) & (top - 1)) > form.infinity_bits)


def differs(actual: Floats, expected: Floats, *, zero_sign: bool = True) -> NDArray[np.bool_]:
    """Where two arrays differ in their bits; any NaN equals any NaN (QC-NUM-002)."""
    unequal = actual.bits != expected.bits
    if unequal.any():
        unequal &= ~(is_nan(actual) & is_nan(expected))
        if not zero_sign:
            unequal &= ~((actual.f64() == 0) & (expected.f64() == 0))
    return np.asarray(unequal)
