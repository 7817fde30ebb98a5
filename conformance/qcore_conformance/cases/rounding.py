"""The last rounding of every op with floating-point outputs: QC-NUM-003, and QC-NUM-001's denormals, at their edges.

Each op is given inputs whose float32 result is any value that is asked for: ties of the output's dtype and their
neighbours, the edges of overflow and of the denormals, infinities, and NaN whose payload carries when it is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qcore_conformance import calls, generators, oracle
from qcore_conformance.checks import expect_floats
from qcore_conformance.floats import DTYPES, FORMATS, Floats, concatenate, f32, neighbours, rounded
from qcore_conformance.generators import Rng
from qcore_conformance.model import Case
from qcore_conformance.session import Session
from qcore_conformance.weights import Weight

_NAN_BITS = np.array([0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0xFFC00001, 0x7FFF8000, 0x7FC08000], dtype=np.uint32)


def results(rng: Rng, dtype: str) -> Floats:
    """float32 values at and around every edge of rounding to ``dtype``; for float32 itself its denormals and ends."""
    form = FORMATS[dtype]
    bits = rng.integers(0, form.infinity_bits, 400, dtype=np.int64)
    below = Floats(bits.astype(form.bits), dtype).f64()
    above = Floats((bits + 1).astype(form.bits), dtype).f64()
    ties = ((below + above) / 2)[np.isfinite(above)]
    largest, smallest = form.largest, form.smallest_denormal
    step = largest - Floats(np.array([form.infinity_bits - 2], form.bits), dtype).f64()[0]
    edges = [largest, largest + step / 2, largest + step, smallest / 2, smallest, 1.5 * smallest, form.smallest_normal]
    points = np.concatenate([ties, edges, rng.integers(1, 9, 40) * form.smallest_normal / 8, [0.0, np.inf]])
    with np.errstate(over="ignore"):
        positive = neighbours(points.astype(np.float32).astype(np.float64), "f32")
    negative = Floats(positive.bits ^ np.uint32(0x80000000), "f32")
    return concatenate([positive, negative, Floats(_NAN_BITS, "f32")])


def _blockwise(s: Session, wanted: Floats, dtype: str) -> None:
    """Code 255 stands for 1, so absmax comes back."""
    codes = np.full(wanted.size * 32, 255, dtype=np.uint8)
    code = generators.CODEBOOKS["dynamic"]
    got = calls.dequantize_blockwise(s, codes, wanted, code, 32, dtype)
    expect_floats("out", got, oracle.dequantize_blockwise(codes, wanted, code, 32, dtype))


def _ones(wanted: Floats, quant_type: str, shape: tuple[int, ...]) -> Weight:
    """A weight whose codes all stand for 1."""
    byte = {"nf4": 0xFF, "fp4": 0x33}[quant_type]
    return Weight(np.full(wanted.size * 16, byte, dtype=np.uint8), wanted, quant_type, 32, shape)


def _fourbit(s: Session, wanted: Floats, dtype: str) -> None:
    for quant_type in ("nf4", "fp4"):
        weight = _ones(wanted, quant_type, (wanted.size * 32,))
        expect_floats(quant_type, calls.dequantize_4bit(s, weight, dtype), weight.decoded(dtype))


def _gemm(s: Session, wanted: Floats, dtype: str) -> None:
    """K = 1 and X = 1, so that Y is the weight, rounded once (QC-GEMM4-005)."""
    weight = _ones(wanted, "nf4", (wanted.size * 32, 1))
    y = calls.gemm_4bit(s, rounded([[1.0]], dtype), weight)
    expect_floats("Y", y, weight.decoded(dtype).reshape(1, -1), zero_sign=False)


def _gemm_transposed(s: Session, wanted: Floats, dtype: str) -> None:
    """N = 1 and Y = 1, so that X is the weight, rounded once (QC-GEMM4-010)."""
    weight = _ones(wanted, "nf4", (1, wanted.size * 32))
    x = calls.gemm_4bit_transposed(s, rounded([[1.0]], dtype), weight)
    expect_floats("X", x, weight.decoded(dtype).reshape(1, -1), zero_sign=False)


def _dequantize_gemm(s: Session, wanted: Floats, dtype: str) -> None:
    """A sum of 0 leaves the bias."""
    c, one = np.zeros((2, wanted.size), np.int32), f32(np.ones(wanted.size))
    got = calls.int8_dequantize_gemm(s, c, f32([1.0, 3.0]), one, wanted, dtype)
    expect_floats("out", got, oracle.int8_dequantize_gemm(c, f32([1.0, 3.0]), one, wanted, dtype))


def _scaled_gemm(s: Session, wanted: Floats, dtype: str) -> None:
    a, b = np.zeros((2, 33), np.int8), s.rng.integers(-128, 128, (wanted.size, 33), dtype=np.int8)
    rows, columns = f32([1.0, 3.0]), f32(np.ones(wanted.size))
    got = calls.int8_scaled_gemm(s, a, b, rows, columns, wanted, dtype)
    expect_floats("out", got, oracle.int8_dequantize_gemm(oracle.int8_gemm(a, b), rows, columns, wanted, dtype))


def _dequantize_rows(s: Session, wanted: Floats, dtype: str) -> None:
    """Two products cannot give every value: rows that are searched for, beside those whose statistic is an edge."""
    codes = np.tile(np.arange(1, 128, 2).astype(np.int8), (20000, 1))
    stats = rounded(np.exp2(s.rng.uniform(-3, 3, len(codes))), "f32")
    exact = oracle.int8_dequantize_rows(codes, stats, "f32").bits
    kept = {"f32": 24, "f16": 11, "bf16": 8}[dtype]
    half = np.uint32(1 << (23 - kept)) if kept < 24 else np.uint32(0)
    tied = (exact & (2 * half - 1 if half else 0)) == half
    rows = tied.any(axis=1)
    assert rows.sum() >= 4, "the probe has lost its bite"
    stats = concatenate([Floats(stats.bits[rows][:200], "f32"), wanted])
    codes = np.tile(np.arange(-128, 128).astype(np.int8), (stats.size, 1))
    got = calls.int8_dequantize_rows(s, codes, stats, dtype)
    expect_floats("out", got, oracle.int8_dequantize_rows(codes, stats, dtype))


_CHECKS = {
    "dequantize_blockwise": (_blockwise, "QC-Q8-005"),
    "dequantize_4bit": (_fourbit, "QC-4BIT-003"),
    "gemm_4bit": (_gemm, "QC-GEMM4-005"),
    "gemm_4bit_transposed": (_gemm_transposed, "QC-GEMM4-010"),
    "int8_dequantize_gemm": (_dequantize_gemm, "QC-INT8-006"),
    "int8_scaled_gemm": (_scaled_gemm, "QC-INT8-007"),
    "int8_dequantize_rows": (_dequantize_rows, "QC-INT8-008"),
}


def _edges(op: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        _CHECKS[op][0](s, results(s.rng, dtype), dtype)

    return run


def cases() -> Iterator[Case]:
    for op, (_, clause) in _CHECKS.items():
        for dtype in DTYPES:
            clauses = ("QC-NUM-001", "QC-NUM-003", clause)
            yield Case(f"{op}/L1/{dtype}-rounding-edges", op, "L1", clauses, _edges(op, dtype), {"dtype": dtype})
