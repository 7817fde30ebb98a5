"""The gradient of the LLM.int8() product: QC-INT8-011 to QC-INT8-015, exact probes and the declared-depth bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from qcore_conformance import bounds, calls, generators, oracle
from qcore_conformance.checks import expect_floats
from qcore_conformance.floats import DTYPES, Floats, is_nan, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session

_OP = "int8_linear_transposed"
_BOUNDED = ("QC-INT8-011", "QC-INT8-012")
# N and K multiples of 32, more than 128 columns, and a depth that goes round any ring of tiles of 32 rows of W, or
# takes several steps of 256, in one part and in two.
_TILED = ((20, 640, 320), (40, 640, 320), (70, 416, 192))
_FEW = ((5, 1056, 192), (12, 1056, 160), (3, 4096, 288))
_RECIPROCAL = float.fromhex("0x1.020408p-7")
I8 = NDArray[np.int8]


def _weight(s: Session, n: int, k: int) -> tuple[I8, Floats]:
    """Codes of the whole range, and rows of different sizes."""
    return s.rng.integers(-128, 128, (n, k), dtype=np.int8), rounded(np.exp2(s.rng.uniform(-6, 3, n)), "f32")


def _check(s: Session, y: Floats, b: I8, stats: Floats, *, prepared: bool = False) -> None:
    x = calls.int8_linear_transposed(s, y, b, stats, prepared=prepared)
    s.record(
        bounds.check_gemm(
            x, oracle.int8_linear_transposed(y, b, stats), s.int8_transposed, len(b), bounds.INT8_ROUNDINGS
        )
    )


def _row(b: I8, stats: Floats, dtype: str, declared: str) -> Floats:
    """What Y = 1 makes of each row of the weight (QC-INT8-013)."""
    if declared != "scaled":
        return oracle.int8_dequantize_rows(b, stats, dtype)
    p = rounded(stats.f64() * _RECIPROCAL, "f32")
    p = rounded(p.f64(), "bf16") if dtype == "bf16" else p
    return rounded(rounded(b.astype(np.float64) * p.f64()[:, None], "f32").f64(), dtype)


def _one_hot(dtype: str, m: int, n: int, k: int) -> Callable[[Session], None]:
    """Every row of W alone, ``m`` a call."""

    def run(s: Session) -> None:
        b, stats = _weight(s, n, k)
        want, eye = _row(b, stats, dtype, s.int8_transposed.weight_rounding), rounded(np.eye(n), dtype)
        for i, start in enumerate([*range(0, n - m, m), n - m]):
            rows = slice(start, start + m)
            x = calls.int8_linear_transposed(s, Floats(eye.bits[rows], dtype), b, stats, prepared=i % 2 == 1)
            expect_floats(f"rows {start} to {start + m - 1}", x, Floats(want.bits[rows].copy(), dtype), zero_sign=False)

    return run


def _integers(dtype: str) -> Callable[[Session], None]:
    """Scales that are powers of two and small integers: exact in any order, so the result is, rounded once."""

    def run(s: Session) -> None:
        for m, n, k in (
            (1, 67, 33), (1, 1030, 1100), (2, 128, 64), (5, 200, 31), (16, 192, 192), (33, 257, 17), (129, 64, 65),
            (40, 600, 320),
        ):  # fmt: skip
            b = s.rng.integers(-128, 128, (n, k), dtype=np.int8)
            stats = rounded(127 * np.exp2(s.rng.integers(-2, 3, n)), "f32")
            y = rounded(s.rng.integers(-4, 5, (m, n)), dtype)
            x = calls.int8_linear_transposed(s, y, b, stats)
            want = rounded(oracle.int8_linear_transposed(y, b, stats).exact, dtype)
            expect_floats(f"X (M={m}, N={n}, K={k})", x, want, zero_sign=False)

    return run


def _bounded(dtype: str, sizes: tuple[tuple[int, int, int], ...]) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for i, (m, n, k) in enumerate(sizes):
            y = generators.values("normal", s.rng, m * n, dtype).reshape(m, n)
            _check(s, y, *_weight(s, n, k), prepared=i % 2 == 1)

    return run


def _small(dtype: str) -> Callable[[Session], None]:
    """Small gradients, in some rows only, that neither the row scale nor a unit that flushes may lose."""

    def run(s: Session) -> None:
        for m, n, k in ((1, 192, 64), (5, 100, 19), (40, 192, 128)):
            b, stats = _weight(s, n, k)
            scale = 2.0**-13 if dtype == "f16" else 2.0**-112
            scales = np.where(np.arange(m) % 3 == 0, scale, 1.0)
            y = s.rng.choice([-1.5, -1.0, 1.0, 1.25], (m, n)) * scales[:, None]
            _check(s, rounded(y, dtype), b, stats)

    return run


def _independent_rows(dtype: str) -> Callable[[Session], None]:
    """QC-INT8-014: NaN and infinities stay in their row, and a NaN fills it, also against a weight of 0."""

    def run(s: Session) -> None:
        n, k = 160, 93
        b, stats = _weight(s, n, k)
        for m in (2, 3, 17, 65):
            y = generators.values("normal", s.rng, m * n, dtype).reshape(m, n)
            clean = calls.int8_linear_transposed(s, y, b, stats)
            for value in (np.nan, np.inf, -np.inf):
                row, column = int(s.rng.integers(m)), int(s.rng.choice([0, n - 1, int(s.rng.integers(n))]))
                dirty = y.bits.copy()
                dirty[row, column] = rounded([value], dtype).bits[0]
                x = calls.int8_linear_transposed(s, Floats(dirty, dtype), b, stats)
                others = np.arange(m) != row
                what = f"rows beside row {row} with a {value}"
                expect_floats(what, Floats(x.bits[others], dtype), Floats(clean.bits[others], dtype))
                if np.isnan(value):
                    full = is_nan(x).reshape(m, k)[row].all()
                    assert full, f"Y[{row}, {column}] is NaN, but row {row} of X is not all NaN"
        for m in (1, 2):
            y = rounded(np.where(np.arange(6) == 1, np.nan, np.ones((m, 6))), dtype)
            x = calls.int8_linear_transposed(s, y, np.zeros((6, 96), np.int8), rounded(np.ones(6), "f32"))
            assert is_nan(x).all(), f"M={m}: a NaN against weights of 0 vanished"

    return run


def _empty(s: Session) -> None:
    """QC-INT8-015."""
    for dtype in DTYPES:
        for m, n, k in ((0, 64, 5), (3, 64, 0), (0, 0, 0), (0, 0, 5)):
            y = generators.values("normal", s.rng, m * n, dtype).reshape(m, n)
            assert calls.int8_linear_transposed(s, y, *_weight(s, n, k)).shape == (m, k)
        for m in generators.ROW_COUNTS:
            x = calls.int8_linear_transposed(s, rounded(np.zeros((m, 0)), dtype), *_weight(s, 0, 5))
            expect_floats(f"X (M={m}, N=0)", x, rounded(np.zeros((m, 5)), dtype))


def _declared(s: Session) -> None:
    for n in range(4097):
        s.int8_transposed.depth(n)


def cases() -> Iterator[Case]:
    def case(level: str, name: str, run: Callable[[Session], None], *clauses: str) -> Case:
        return Case(f"{_OP}/{level}/{name}", _OP, level, clauses, run)

    yield case("L0", "declaration", _declared, *_BOUNDED)
    yield case("L1", "empty", _empty, "QC-INT8-015", "QC-NUM-005")
    for dtype in DTYPES:
        for m, n, k in ((1, 67, 37), (1, 19, 1100), (2, 96, 64), (16, 200, 192), (33, 131, 70), (65, 257, 64)):
            name = f"{dtype}-one-hot-m{m}-n{n}-k{k}"
            yield case("L1", name, _one_hot(dtype, m, n, k), "QC-INT8-011", "QC-INT8-013", "QC-INT8-008")
        yield case("L1", f"{dtype}-integers", _integers(dtype), "QC-INT8-011", "QC-INT8-013", "QC-NUM-003")
        yield case("L1", f"{dtype}-independent-rows", _independent_rows(dtype), "QC-INT8-014")
        for n, k in ((192, 64), (45, 130)):
            sizes = tuple((m, n, k) for m in generators.ROW_COUNTS)
            yield case("L2", f"{dtype}-rows-n{n}-k{k}", _bounded(dtype, sizes), *_BOUNDED)
        odd = (
            (1, 1, 33),
            (1, 2, 1),
            (3, 31, 17),
            (1, 65, 40),
            (5, 577, 63),
            (70, 129, 20),
            (6, 1030, 64),
            (1, 9, 2050),
        )
        yield case("L2", f"{dtype}-odd-sizes", _bounded(dtype, odd), *_BOUNDED)
        yield case("L2", f"{dtype}-small", _small(dtype), *_BOUNDED, "QC-NUM-003")
    for dtype in ("f16", "bf16"):
        yield case("L2", f"{dtype}-tiles", _bounded(dtype, _TILED), *_BOUNDED)
        yield case("L2", f"{dtype}-few-rows", _bounded(dtype, _FEW), *_BOUNDED)
    deep = ((1, 8192, 64), (4, 4099, 9), (17, 2050, 1088))
    yield case("L2", "bf16-deep", _bounded("bf16", deep), *_BOUNDED)
