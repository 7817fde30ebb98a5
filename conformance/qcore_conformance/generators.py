"""Inputs. Every random number comes from a generator seeded with hash(case id, run seed)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from qcore import codebooks
from qcore_conformance import oracle
from qcore_conformance.floats import FORMATS, Floats, concatenate, neighbours, rounded

Rng = np.random.Generator

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # QC-NUM-005
# Around every row count at which a kernel may switch its strategy: vectors, small tiles, powers of two.
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)

CODEBOOKS: Mapping[str, NDArray[np.float32]] = {
    "dynamic": np.array(codebooks.DYNAMIC, dtype=np.float32),
    "dynamic-unsigned": np.array(codebooks.DYNAMIC_UNSIGNED, dtype=np.float32),
    "linear": np.array(codebooks.LINEAR, dtype=np.float32),
    "linear-unsigned": np.array(codebooks.LINEAR_UNSIGNED, dtype=np.float32),
    "fp8": np.array(codebooks.FP8, dtype=np.float32),
}


def rng_for(case_id: str, seed: int) -> Rng:
    digest = hashlib.sha256(f"{seed}:{case_id}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def lengths(blocksize: int) -> tuple[int, ...]:
    """0, 1, around one and several blocks, odd, prime, tails of every kind of vector width."""
    b = blocksize
    return (0, 1, 2, 3, b // 2 + 1, b - 1, b, b + 1, 2 * b - 1, 2 * b, 3 * b + 17, 4 * b + b // 2, 1009, 4099)


def _normal(rng: Rng, n: int, dtype: str) -> Floats:
    return rounded(rng.standard_normal(n), dtype)


def _lognormal(rng: Rng, n: int, dtype: str) -> Floats:
    """Magnitudes over many binades, both signs."""
    return rounded(rng.choice([-1.0, 1.0], n) * np.exp(2.5 * rng.standard_normal(n)), dtype)


def _bits(rng: Rng, n: int, dtype: str) -> Floats:
    """Random bit patterns: every binade, denormals, NaN and infinities as they fall."""
    form = FORMATS[dtype]
    return Floats(rng.integers(0, np.iinfo(form.bits).max, n, dtype=form.bits, endpoint=True), dtype)


def _finite_bits(rng: Rng, n: int, dtype: str) -> Floats:
    x = _bits(rng, n, dtype)
    return Floats(np.where(np.isfinite(x.f64()), x.bits, FORMATS[dtype].bits(0)), dtype)


def _denormal(rng: Rng, n: int, dtype: str) -> Floats:
    """Denormals only: the reciprocal of the smallest overflows."""
    form = FORMATS[dtype]
    counts = rng.integers(0, 1 << (form.precision - 1), n) >> rng.integers(0, form.precision - 1, n)
    return rounded(rng.choice([-1.0, 1.0], n) * counts * form.smallest_denormal, dtype)


def _smallest(rng: Rng, n: int, dtype: str) -> Floats:
    """Zeros and the smallest denormals, whose reciprocal is infinite in float32: 0 * inf is NaN on the way."""
    return rounded(rng.integers(-2, 3, n) * FORMATS[dtype].smallest_denormal, dtype)


def _largest(rng: Rng, n: int, dtype: str) -> Floats:
    """Near the top of the range, where 1 / absmax is denormal for float32 and bfloat16."""
    return rounded(FORMATS[dtype].largest * rng.uniform(-1, 1, n).astype(np.float32).astype(np.float64), dtype)


def _zeros(rng: Rng, n: int, dtype: str) -> Floats:
    return rounded(rng.choice([0.0, -0.0], n), dtype)


def _equal(rng: Rng, n: int, dtype: str) -> Floats:
    return rounded(np.full(n, rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 9)), dtype)


def _outlier(rng: Rng, n: int, dtype: str) -> Floats:
    x = rng.standard_normal(n) * 0.01
    if n:
        x[rng.integers(n)] = -1000.0
    return rounded(x, dtype)


def _sprinkled(values: tuple[float, ...], share: float) -> Callable[[Rng, int, str], Floats]:
    def make(rng: Rng, n: int, dtype: str) -> Floats:
        x = rng.standard_normal(n)
        where = rng.random(n) < share
        x[where] = rng.choice(values, int(where.sum()))
        return rounded(x, dtype)

    return make


def _all_nan(rng: Rng, n: int, dtype: str) -> Floats:
    return rounded(np.full(n, np.nan), dtype)


VALUES: Mapping[str, Callable[[Rng, int, str], Floats]] = {
    "normal": _normal,
    "lognormal": _lognormal,
    "bits": _bits,
    "finite-bits": _finite_bits,
    "denormal": _denormal,
    "smallest": _smallest,
    "largest": _largest,
    "zeros": _zeros,
    "equal": _equal,
    "outlier": _outlier,
    "zeros-mixed": _sprinkled((0.0, -0.0), 0.4),
    "nan": _sprinkled((np.nan,), 0.02),
    "inf": _sprinkled((np.inf, -np.inf), 0.002),
    "nan-inf": _sprinkled((np.nan, np.inf, -np.inf, 0.0, -0.0), 0.05),
    "all-nan": _all_nan,
}


def values(kind: str, rng: Rng, n: int, dtype: str) -> Floats:
    return VALUES[kind](rng, n, dtype)


def special_blocks(rng: Rng, blocksize: int, dtype: str) -> Floats:
    """One block of each kind, side by side, and a tail: what happens in one must not leak into the next."""
    parts = [values(kind, rng, blocksize, dtype) for kind in VALUES]
    order = rng.permutation(len(parts))
    return concatenate([*(parts[i] for i in order), values("normal", rng, blocksize // 2 + 1, dtype)])


def every_16_bit_pattern(dtype: str) -> Floats:
    return Floats(np.arange(1 << 16, dtype=np.uint16), dtype)


def decision_points(thresholds: NDArray[np.float64], blocksize: int, scale: float, dtype: str) -> Floats:
    """Blocks whose absmax is ``scale``, filled with ``scale`` times each threshold and its neighbours, both signs.

    With a power of two as scale the quotients are the thresholds themselves; with another they fall around them.
    """
    exact = neighbours(np.concatenate([thresholds, -thresholds]) * scale, dtype)
    zeros = rounded(np.array([0.0, -0.0]), dtype)
    points = concatenate([exact, zeros])
    inside = np.abs(points.f64()) <= scale
    bits = points.bits[inside]
    per_block = blocksize - 1
    pad = -len(bits) % per_block
    rows = np.concatenate([bits, np.zeros(pad, bits.dtype)]).reshape(-1, per_block)
    top = np.full((len(rows), 1), rounded([scale], dtype).bits[0])
    blocks = np.concatenate([top, rows], axis=1).reshape(-1)
    return Floats(blocks[: blocks.size - pad], dtype)


def thresholds_4bit(quant_type: str) -> NDArray[np.float64]:
    if quant_type == "fp4":
        return np.array(codebooks.FP4_THRESHOLDS)
    return oracle.midpoints(oracle.TABLES["nf4"])


def custom_codebook(rng: Rng, kind: str) -> NDArray[np.float32]:
    """Any 256 finite ascending values: repeated neighbours, adjacent floats, denormals, no zero, a wide range."""
    if kind == "repeated":
        return np.sort(rng.choice(rng.uniform(-1, 1, 90), 256)).astype(np.float32)
    if kind == "adjacent":
        start = np.float32(0.5).view(np.uint32)
        return (start + np.arange(256, dtype=np.uint32) // 2).view(np.float32)
    if kind == "denormal":
        return (np.arange(-128, 128) * 2.0**-149).astype(np.float32)
    if kind == "no-zero":
        return np.sort(np.concatenate([-np.geomspace(0.01, 1, 128), np.geomspace(0.02, 1, 128)])).astype(np.float32)
    if kind == "constant":
        return np.full(256, 0.25, dtype=np.float32)
    if kind == "wide":
        return (np.linspace(-1, 1, 256) * 3.4e38).astype(np.float32)
    raise ValueError(f"unknown codebook kind {kind!r}")


CUSTOM_CODEBOOKS = ("repeated", "adjacent", "denormal", "no-zero", "constant", "wide")
