"""LLM.int8(): QC-INT8-001 to QC-INT8-009, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcore_conformance import calls, generators, golden, oracle
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import DTYPES, Floats, concatenate, f32, neighbours, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session

_FLOAT = ("QC-NUM-001", "QC-NUM-002")
_ROWS = (*_FLOAT, "QC-INT8-001", "QC-INT8-002", "QC-INT8-003")
_COLS = (*_FLOAT, "QC-INT8-004")
_SHAPES = ((1, 1), (1, 65), (2, 64), (3, 127), (5, 129), (17, 33), (64, 1), (33, 256), (7, 1009))
_EMPTY = ((0, 8), (8, 0), (0, 0))
_VALUES = (
    "normal",
    "lognormal",
    "bits",
    "denormal",
    "smallest",
    "largest",
    "zeros",
    "equal",
    "outlier",
    "nan",
    "nan-inf",
)
_GEMM_SIZES = (
    *((m, 33, 129) for m in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)),
    (1, 1, 1),
    (3, 5, 7),
    (17, 1, 63),
    (4, 64, 1024),
    (129, 17, 31),
    (2, 130, 257),
    (17, 33, 336),
    (65, 130, 720),
    # Several spans of a thousand bytes, and more groups of sixteen rows than three.
    (20, 70, 2100),
    (70, 40, 1100),
    (517, 20, 70),
)


def _check_rows(s: Session, a: Floats, threshold: float) -> None:
    want = oracle.int8_quantize_rows(a, threshold)
    for want_columns in (True, False) if threshold == 0 else (True,):
        got = calls.int8_quantize_rows(s, a, threshold, want_columns=want_columns)
        expect_floats("row_stats", got.stats, want.stats)
        expect_integers("outlier_cols", got.outlier_cols, want.outlier_cols)
        expect_integers("out", got.codes, want.codes)


def _check_cols(s: Session, a: Floats, threshold: float) -> None:
    got = calls.int8_quantize_cols(s, a, threshold)
    codes, stats = oracle.int8_quantize_cols(a, threshold)
    expect_floats("col_stats", got.stats, stats)
    expect_integers("out", got.codes, codes)


_CHECKS = {"int8_quantize_rows": _check_rows, "int8_quantize_cols": _check_cols}


def _quantize_shapes(op: str, dtype: str, threshold: float) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for m, k in (*_SHAPES, *_EMPTY):
            _CHECKS[op](s, generators.values("normal", s.rng, m * k, dtype).reshape(m, k), threshold)

    return run


def _quantize_values(op: str, dtype: str, kind: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for threshold in (0.0, 1.0, 6.0):
            _CHECKS[op](s, generators.values(kind, s.rng, 19 * 131, dtype).reshape(19, 131), threshold)

    return run


def _quantize_ties(op: str, dtype: str) -> Callable[[Session], None]:
    """Halves between integers at statistics of 127 and 127/2, with their neighbours: ties go to even, ends clamp."""

    def run(s: Session) -> None:
        halves = neighbours(np.arange(-127, 128) * 0.5, dtype)
        for scale in (1.0, 0.5, 2.0**-10, 3.0):
            x = rounded(halves.f64() * scale, dtype)
            row = concatenate([rounded([127.0 * scale], dtype), x])
            wide = Floats(np.stack([row.bits, row.bits[::-1]]), dtype)
            _CHECKS[op](s, wide if op == "int8_quantize_rows" else Floats(wide.bits.T.copy(), dtype), 0.0)

    return run


def _quantize_threshold_edge(op: str, dtype: str) -> Callable[[Session], None]:
    """An element equal to the threshold is an outlier, its lower neighbour is not (QC-INT8-001)."""

    def run(s: Session) -> None:
        for threshold in (6.0, 0.5, 2.0**-14, 6.100000381469727, 1000.0):
            a = generators.values("normal", s.rng, 23 * 47, dtype).f64().reshape(23, 47) * threshold / 8
            edge = neighbours([threshold, -threshold], dtype).f64()
            a[s.rng.integers(0, 23, edge.size), s.rng.permutation(47)[: edge.size]] = edge
            _CHECKS[op](s, rounded(a, dtype), threshold)

    return run


def _quantize_outlier_columns(op: str, dtype: str) -> Callable[[Session], None]:
    """Rows, columns and everything an outlier; a NaN or infinity in one column."""

    def run(s: Session) -> None:
        base = generators.values("normal", s.rng, 12 * 40, dtype).f64().reshape(12, 40) * 0.3
        for place in ((3, 7), (slice(None), 5), (4, slice(None)), (slice(None), slice(None)), (0, 0), (11, 39)):
            for value in (-9.0, np.nan, np.inf, -np.inf):
                a = base.copy()
                a[place] = value
                for threshold in (6.0, 0.0):
                    _CHECKS[op](s, rounded(a, dtype), threshold)

    return run


def _quantize_patterns(op: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        every = generators.every_16_bit_pattern(dtype).reshape(256, 256)
        for threshold in (0.0, 6.0):
            _CHECKS[op](s, every, threshold)

    return run


def _int8(s: Session, m: int, k: int) -> NDArray[np.int8]:
    """All of -128 ... 127."""
    return s.rng.integers(-128, 128, (m, k), dtype=np.int8)


def _gemm(sizes: tuple[tuple[int, int, int], ...]) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for m, n, k in sizes:
            a, b = _int8(s, m, k), _int8(s, n, k)
            expect_integers(f"out (M={m}, N={n}, K={k})", calls.int8_gemm(s, a, b), oracle.int8_gemm(a, b))

    return run


def _gemm_extremes(k: int) -> Callable[[Session], None]:
    """Every product at the end of its range: a 16-bit, saturating or float32 accumulator shows."""

    def run(s: Session) -> None:
        for m in (3, 20):  # a few rows and many may be multiplied in different ways
            for p, q in ((-128, -128), (127, 127), (-128, 127), (127, -127)):
                a, b = np.full((m, k), p, dtype=np.int8), np.full((5, k), q, dtype=np.int8)
                a[1, ::2] = 1  # an odd sum, beyond 2^24 not a float32
                expect_integers(f"out ({p} * {q}, M={m}, K={k})", calls.int8_gemm(s, a, b), oracle.int8_gemm(a, b))

    return run


def _gemm_one_hot(s: Session) -> None:
    """Each column of K alone."""
    k = 131
    b = _int8(s, 37, k)
    for value in (1, -128):
        a = (np.eye(k) * value).astype(np.int8)
        expect_integers("out", calls.int8_gemm(s, a, b), oracle.int8_gemm(a, b))


def _random_scaled(s: Session, m: int, n: int, dtype: str, bias: str | None) -> tuple[Floats, Floats, Floats | None]:
    rows, cols = rounded(s.rng.uniform(0.1, 9, m), "f32"), rounded(s.rng.uniform(0.01, 0.5, n), "f32")
    return rows, cols, None if bias is None else generators.values("normal", s.rng, n, bias)


def _dequantize_gemm(dtype: str, bias: str | None) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for m, n in ((1, 1), (1, 67), (3, 33), (17, 64), (65, 129), (0, 4), (4, 0)):
            c = s.rng.integers(-(2**31), 2**31, (m, n), dtype=np.int32) >> s.rng.integers(0, 30, (m, n), dtype=np.int32)
            rows, cols, b = _random_scaled(s, m, n, dtype, bias)
            got = calls.int8_dequantize_gemm(s, c, rows, cols, b, dtype)
            expect_floats(f"out (M={m}, N={n})", got, oracle.int8_dequantize_gemm(c, rows, cols, b, dtype))

    return run


def _dequantize_gemm_specials(dtype: str) -> Callable[[Session], None]:
    """Sums beyond 2^24, statistics of any bits, results that overflow or are denormal in the output."""

    def run(s: Session) -> None:
        edges = np.array(
            [0, 1, -1, 2**24 + 1, -(2**24) - 1, 2**24 + 3, 2**31 - 1, -(2**31), 2**30 + 65], dtype=np.int32
        )
        for kind in ("bits", "largest", "denormal", "nan-inf", "lognormal", "zeros"):
            c = np.tile(edges, (13, 3))
            rows, cols = generators.values(kind, s.rng, 13, "f32"), generators.values(kind, s.rng, 27, "f32")
            bias = generators.values("nan-inf", s.rng, 27, "f32")
            for b in (None, bias):
                got = calls.int8_dequantize_gemm(s, c, rows, cols, b, dtype)
                expect_floats(f"out ({kind})", got, oracle.int8_dequantize_gemm(c, rows, cols, b, dtype))

    return run


def _dequantize_gemm_order(s: Session) -> None:
    """Many random factors: the order of the products and the separate bias rounding both show."""
    m, n = 40, 200
    c = s.rng.integers(-(2**20), 2**20, (m, n), dtype=np.int32)
    rows, cols = rounded(s.rng.uniform(0.1, 9, m), "f32"), rounded(s.rng.uniform(0.1, 9, n), "f32")
    bias = rounded(s.rng.uniform(-500, 500, n), "f32")
    want = oracle.int8_dequantize_gemm(c, rows, cols, bias, "f32")
    scale = oracle.r32(rows.f64()[:, None] * cols.f64()[None, :])
    other = f32(oracle.r32(oracle.r32(oracle.r32(c * scale) * oracle.INV_127_SQUARED) + bias.f64()))
    assert (other.bits != want.bits).mean() > 0.05, "the probe has lost its bite"
    expect_floats("out", calls.int8_dequantize_gemm(s, c, rows, cols, bias, "f32"), want)


def _scaled_gemm(dtype: str, bias: str | None) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for m, n, k in (*_GEMM_SIZES, (0, 3, 5), (3, 0, 5), (3, 4, 0)):
            a, b = _int8(s, m, k), _int8(s, n, k)
            rows, cols, vector = _random_scaled(s, m, n, dtype, bias)
            want = oracle.int8_dequantize_gemm(oracle.int8_gemm(a, b), rows, cols, vector, dtype)
            got = calls.int8_scaled_gemm(s, a, b, rows, cols, vector, dtype)
            expect_floats(f"out (M={m}, N={n}, K={k})", got, want)

    return run


def _scaled_gemm_large_sums(dtype: str) -> Callable[[Session], None]:
    """Sums beyond 2^24: the conversion to float32 rounds once, at the end of the exact sum."""

    def run(s: Session) -> None:
        for k in (2049, 8191, 131_071):
            a, b = np.full((5, k), 127, dtype=np.int8), np.full((7, k), 127, dtype=np.int8)
            a[:, :9] = _int8(s, 5, 9)
            rows, cols, bias = _random_scaled(s, 5, 7, dtype, dtype)
            want = oracle.int8_dequantize_gemm(oracle.int8_gemm(a, b), rows, cols, bias, dtype)
            expect_floats(f"out (K={k})", calls.int8_scaled_gemm(s, a, b, rows, cols, bias, dtype), want)

    return run


def _dequantize_rows(dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for m, k in (*_SHAPES, *_EMPTY):
            for kind in ("lognormal", "bits"):
                codes, stats = _int8(s, m, k), generators.values(kind, s.rng, m, "f32")
                got = calls.int8_dequantize_rows(s, codes, stats, dtype)
                expect_floats(f"out ({m}x{k})", got, oracle.int8_dequantize_rows(codes, stats, dtype))
        every = np.tile(np.arange(-128, 128).astype(np.int8), (64, 1))
        stats = generators.values("lognormal", s.rng, 64, "f32")
        got = calls.int8_dequantize_rows(s, every, stats, dtype)
        expect_floats("out (all bytes)", got, oracle.int8_dequantize_rows(every, stats, dtype))

    return run


def _quantize_cases() -> Iterator[Case]:
    for op, clauses in (("int8_quantize_rows", _ROWS), ("int8_quantize_cols", _COLS)):

        def case(name: str, run: Callable[[Session], None], *more: str, op: str = op, base: Any = clauses) -> Case:
            return Case(f"{op}/L1/{name}", op, "L1", (*base, *more), run)

        for dtype in DTYPES:
            for threshold in (0.0, 2.0):
                run = _quantize_shapes(op, dtype, threshold)
                yield case(f"{dtype}-shapes-threshold{threshold:g}", run, "QC-INT8-009", "QC-NUM-005")
            for kind in _VALUES:
                yield case(f"{dtype}-{kind}", _quantize_values(op, dtype, kind))
            yield case(f"{dtype}-ties", _quantize_ties(op, dtype))
            yield case(f"{dtype}-threshold-edge", _quantize_threshold_edge(op, dtype))
            yield case(f"{dtype}-outlier-places", _quantize_outlier_columns(op, dtype), "QC-INT8-001")
            if dtype != "f32":
                yield case(f"{dtype}-every-pattern", _quantize_patterns(op, dtype))
        yield from golden.cases(op, clauses)


def cases() -> Iterator[Case]:
    yield from _quantize_cases()
    op, exact = "int8_gemm", ("QC-INT8-005",)
    yield Case(f"{op}/L1/sizes", op, "L1", exact, _gemm(_GEMM_SIZES))
    yield Case(f"{op}/L1/empty", op, "L1", (*exact, "QC-INT8-009"), _gemm(((0, 4, 8), (4, 0, 8), (3, 5, 0))))
    yield Case(f"{op}/L1/one-hot", op, "L1", exact, _gemm_one_hot)
    for k in (64, 1041, 4097, 131_071):
        yield Case(f"{op}/L1/extremes-k{k}", op, "L1", exact, _gemm_extremes(k))
    yield from golden.cases(op, exact)

    for dtype in DTYPES:
        biases = (None, "f32") if dtype == "f32" else (None, "f32", dtype)
        for bias in biases:
            name = f"{dtype}-bias-{bias or 'none'}"
            op, clauses = "int8_dequantize_gemm", ("QC-NUM-001", "QC-NUM-003", "QC-INT8-006")
            yield Case(f"{op}/L1/{name}", op, "L1", (*clauses, "QC-INT8-009"), _dequantize_gemm(dtype, bias))
            op = "int8_scaled_gemm"
            yield Case(f"{op}/L1/{name}", op, "L1", (*clauses, "QC-INT8-007", "QC-INT8-009"), _scaled_gemm(dtype, bias))
        op = "int8_dequantize_gemm"
        yield Case(f"{op}/L1/{dtype}-specials", op, "L1", clauses, _dequantize_gemm_specials(dtype))
        op = "int8_scaled_gemm"
        yield Case(f"{op}/L1/{dtype}-large-sums", op, "L1", ("QC-INT8-007",), _scaled_gemm_large_sums(dtype))
        op, clauses = "int8_dequantize_rows", ("QC-NUM-001", "QC-NUM-003", "QC-INT8-008", "QC-INT8-009")
        yield Case(f"{op}/L1/{dtype}-shapes", op, "L1", clauses, _dequantize_rows(dtype))
    op = "int8_dequantize_gemm"
    yield Case(f"{op}/L1/f32-order", op, "L1", ("QC-NUM-001", "QC-INT8-006"), _dequantize_gemm_order)
    for op, clause in (
        ("int8_dequantize_gemm", "QC-INT8-006"),
        ("int8_scaled_gemm", "QC-INT8-007"),
        ("int8_dequantize_rows", "QC-INT8-008"),
    ):
        yield from golden.cases(op, (clause,))
