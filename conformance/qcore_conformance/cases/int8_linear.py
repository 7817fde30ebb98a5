"""LLM.int8() with outlier columns in one call: QC-INT8-010, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from qcore_conformance import calls, generators, oracle
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import DTYPES, Floats, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session

_OP = "int8_linear"
_CLAUSES = ("QC-NUM-001", "QC-NUM-003", "QC-INT8-001", "QC-INT8-010")
# One row, few rows and many: where the weights of outlier columns come from differs.
_SIZES = ((1, 1, 1), (1, 65, 129), (2, 33, 64), (4, 17, 131), (5, 66, 257), (17, 64, 96), (33, 130, 300), (65, 31, 640))
_EMPTY = ((0, 3, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0))


def _check(
    s: Session,
    a: Floats,
    b: NDArray[np.int8],
    scales: Floats,
    threshold: float,
    bias: Floats | None,
    what: str,
    *,
    prepared: bool = False,
) -> None:
    want, columns = oracle.int8_linear(a, b, scales, threshold, bias)
    got = calls.int8_linear(s, a, b, scales, threshold, bias, prepared=prepared)
    expect_integers(f"outliers ({what})", got.outliers, columns)
    expect_floats(f"out ({what})", got.out, want)


def _weight(s: Session, n: int, k: int) -> tuple[NDArray[np.int8], Floats]:
    return s.rng.integers(-128, 128, (n, k), dtype=np.int8), rounded(s.rng.uniform(0.01, 0.5, n), "f32")


def _activations(s: Session, m: int, k: int, columns: int, dtype: str) -> Floats:
    """Small values, and ``columns`` columns that hold one beyond 6."""
    x = generators.values("normal", s.rng, m * k, dtype).f64().reshape(m, k) * 0.5
    if m:
        chosen = s.rng.permutation(k)[:columns]
        x[s.rng.integers(0, m, len(chosen)), chosen] = s.rng.choice([-40.0, 7.5, 6.0, 19.25], len(chosen))
    return rounded(x, dtype)


def _sizes(dtype: str, bias: str | None) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for i, (m, n, k) in enumerate((*_SIZES, *_EMPTY)):
            b, scales = _weight(s, n, k)
            addend = None if bias is None else generators.values("normal", s.rng, n, bias)
            for j, (threshold, columns) in enumerate(((0.0, 3), (6.0, 0), (6.0, 1), (6.0, 7))):
                a = _activations(s, m, k, columns, dtype)
                what = f"M={m}, N={n}, K={k}, {columns} columns at {threshold}"
                _check(s, a, b, scales, threshold, addend, what, prepared=(i + j) % 2 == 1)

    return run


def _many_outliers(m: int, dtype: str) -> Callable[[Session], None]:
    """More outlier columns than any implementation sets room aside for, and all of them."""

    def run(s: Session) -> None:
        n, k = 70, 530
        b, scales = _weight(s, n, k)
        for columns in (256, 257, k):
            _check(s, _activations(s, m, k, columns, dtype), b, scales, 6.0, None, f"{columns} of {k} columns")

    return run


def _specials(dtype: str) -> Callable[[Session], None]:
    """NaN and infinities are outliers: they reach the output of their row, and of no other."""

    def run(s: Session) -> None:
        for m in (1, 9):
            b, scales = _weight(s, 40, 96)
            b[:, 5] = 0
            for value in (np.nan, np.inf, -np.inf):
                x = _activations(s, m, 96, 2, dtype).f64()
                x[m // 2, 5], x[0, 6] = value, value
                _check(s, rounded(x, dtype), b, scales, 6.0, None, f"M={m}, {value}")
            for kind in ("bits", "denormal", "largest", "zeros", "nan-inf"):
                a = generators.values(kind, s.rng, m * 96, dtype).reshape(m, 96)
                stats = generators.values("bits", s.rng, 40, "f32")
                _check(s, a, b, stats, 1.0, None, f"M={m}, {kind}")

    return run


def _order(s: Session) -> None:
    """Outlier products of changing sign and size: the order of the sum, and a fused multiply-add, both show."""
    m, n, k = 24, 60, 200
    b, scales = _weight(s, n, k)
    a = rounded(s.rng.standard_normal((m, k)) * np.exp2(s.rng.uniform(-3, 9, k))[None, :], "f32")
    want, _ = oracle.int8_linear(a, b, scales, 2.0, None)
    rows = oracle.int8_quantize_rows(a, 2.0)
    t = oracle.int8_dequantize_gemm(oracle.int8_gemm(rows.codes, b), rows.stats, scales, None, "f32").f64()
    w = oracle.int8_dequantize_rows(b, scales, "f32").f64()
    backwards = t.copy()
    fused = t.copy()
    for column in np.flatnonzero(rows.outlier_cols):
        product = a.f64()[:, column, None] * w[None, :, column]
        fused = oracle.r32(fused + product)
    for column in np.flatnonzero(rows.outlier_cols)[::-1]:
        backwards = oracle.r32(backwards + oracle.r32(a.f64()[:, column, None] * w[None, :, column]))
    for other in (backwards, fused):
        assert (rounded(other, "f32").bits != want.bits).mean() > 0.05, "the probe has lost its bite"
    _check(s, a, b, scales, 2.0, None, "order")


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for bias in (None, "f32") if dtype == "f32" else (None, "f32", dtype):
            clauses = (*_CLAUSES, "QC-INT8-009", "QC-NUM-005")
            yield Case(f"{_OP}/L1/{dtype}-bias-{bias or 'none'}", _OP, "L1", clauses, _sizes(dtype, bias))
        yield Case(f"{_OP}/L1/{dtype}-specials", _OP, "L1", _CLAUSES, _specials(dtype))
        for m in (1, 7):
            yield Case(f"{_OP}/L1/{dtype}-many-outliers-m{m}", _OP, "L1", _CLAUSES, _many_outliers(m, dtype))
    yield Case(f"{_OP}/L1/f32-order", _OP, "L1", _CLAUSES, _order)
