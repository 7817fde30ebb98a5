"""NF4 and FP4: QC-4BIT, QC-NF4 and QC-FP4, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qcore_conformance import calls, generators, golden, oracle
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import DTYPES, FORMATS, Floats, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session
from qcore_conformance.weights import Weight, random_packed, random_weight

QUANT_TYPES = ("nf4", "fp4")
_COMMON = ("QC-NUM-001", "QC-NUM-002", "QC-NUM-004", "QC-4BIT-001", "QC-4BIT-002")
_QUANTIZE = {qt: (*_COMMON, f"QC-{qt.upper()}-002", f"QC-{qt.upper()}-003") for qt in QUANT_TYPES}
_DEQUANTIZE = {
    qt: ("QC-NUM-001", "QC-NUM-003", "QC-NUM-004", "QC-4BIT-002", "QC-4BIT-003", f"QC-{qt.upper()}-001")
    for qt in QUANT_TYPES
}


def _check_quantize(s: Session, a: Floats, quant_type: str, blocksize: int) -> None:
    got = calls.quantize_4bit(s, a, quant_type, blocksize)
    want = oracle.quantize_4bit(a, quant_type, blocksize)
    expect_floats("absmax", got.absmax, want.absmax)
    expect_integers("out", got.codes, want.codes)


def _check_dequantize(s: Session, weight: Weight, dtype: str) -> None:
    expect_floats("out", calls.dequantize_4bit(s, weight, dtype), weight.decoded(dtype))


def _quantize_values(kind: str, quant_type: str, dtype: str, blocksize: int, n: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        _check_quantize(s, generators.values(kind, s.rng, n, dtype), quant_type, blocksize)

    return run


def _quantize_lengths(quant_type: str, dtype: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for n in generators.lengths(blocksize):
            _check_quantize(s, generators.values("normal", s.rng, n, dtype), quant_type, blocksize)

    return run


def _quantize_blocks(quant_type: str, dtype: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        _check_quantize(s, generators.special_blocks(s.rng, blocksize, dtype), quant_type, blocksize)

    return run


def _quantize_thresholds(quant_type: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        thresholds = generators.thresholds_4bit(quant_type)
        for scale in (1.0, 0.125, 3.0, 0.7, 2.0**-120, 2.0**100):
            if not FORMATS[dtype].smallest_normal <= scale <= FORMATS[dtype].largest:
                continue
            points = np.concatenate([thresholds, oracle.TABLES[quant_type]])
            _check_quantize(s, generators.decision_points(points, 64, scale, dtype), quant_type, 64)

    return run


def _quantize_all_patterns(quant_type: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        every = generators.every_16_bit_pattern(dtype)
        _check_quantize(s, every, quant_type, 64)
        # The same values under one absmax of 1: every pattern inside [-1, 1] meets the thresholds.
        inside = every.bits[np.abs(every.f64()) <= 1]
        inside = inside[: inside.size // 31 * 31].reshape(-1, 31)
        top = np.full((len(inside), 1), rounded([1.0], dtype).bits[0])
        _check_quantize(s, Floats(np.concatenate([top, inside], axis=1).reshape(-1), dtype), quant_type, 32)

    return run


def _quantize_shape(quant_type: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        a = generators.values("normal", s.rng, 7 * 5 * 13, dtype).reshape(7, 5, 13)
        _check_quantize(s, a, quant_type, 64)

    return run


def _dequantize_lengths(quant_type: str, dtype: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for n in generators.lengths(blocksize):
            _check_dequantize(s, random_weight(s.rng, quant_type, blocksize, (n,)), dtype)

    return run


def _dequantize_all_bytes(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """All 256 bytes; at absmax 1 in float32 the table itself comes back."""

    def run(s: Session) -> None:
        golden.check_codebook(quant_type, oracle.TABLES[quant_type].astype(np.float32))
        packed = np.arange(256, dtype=np.uint8)
        for scale in (1.0, -1.0, 3.0, 1e-3, 2.0**-130, 2.0**-148):
            absmax = rounded(np.full(8, scale), "f32")
            _check_dequantize(s, Weight(packed, absmax, quant_type, 64, (512,)), dtype)

    return run


def _dequantize_absmax_bits(quant_type: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for kind in ("bits", "denormal", "largest", "nan-inf", "zeros"):
            absmax = generators.values(kind, s.rng, 67, "f32")
            n = 66 * 32 + 5
            _check_dequantize(s, Weight(random_packed(s.rng, n), absmax, quant_type, 32, (n,)), dtype)

    return run


def _dequantize_rows(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """Two dimensions whose last one is no multiple of the blocksize: flat indexing all the same (QC-NUM-004)."""

    def run(s: Session) -> None:
        for shape in ((5, 48), (3, 80), (9, 33), (17, 1), (1, 65)):
            _check_dequantize(s, random_weight(s.rng, quant_type, 64, shape), dtype)

    return run


def _dequantize_nested(quant_type: str, dtype: str, blocksize: int, nested_blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for n in (1, blocksize + 1, nested_blocksize * blocksize + 3 * blocksize + 1):
            _check_dequantize(s, random_weight(s.rng, quant_type, blocksize, (n,), nested_blocksize), dtype)

    return run


def _round_trip(quant_type: str) -> Callable[[Session], None]:
    """Every code survives dequantize then quantize, where the block's largest code is present."""

    def run(s: Session) -> None:
        top = {"nf4": 15, "fp4": 3}[quant_type]
        codes = s.rng.integers(0, 16, 64 * 20, dtype=np.uint8)
        codes[codes == (0 if quant_type == "nf4" else 8)] = top  # NF4's -1 is as large as 1; FP4's 8 is a second zero
        codes[::64] = top
        packed = oracle.pack(codes, quant_type)
        absmax = rounded(2.0 ** s.rng.integers(-8, 8, 20), "f32")
        decoded = calls.dequantize_4bit(s, Weight(packed, absmax, quant_type, 64, (codes.size,)), "f32")
        again = calls.quantize_4bit(s, decoded, quant_type, 64)
        expect_floats("absmax", again.absmax, absmax)
        expect_integers("out", again.codes, packed)

    return run


def _quantize_cases(qt: str, dtype: str) -> Iterator[Case]:
    op, base = "quantize_4bit", _QUANTIZE[qt]

    def case(name: str, run: Callable[[Session], None], clauses: tuple[str, ...] = base, **params: Any) -> Case:
        return Case(
            f"{op}/L1/{qt}-{dtype}-{name}", op, "L1", clauses, run, {"quant_type": qt, "dtype": dtype, **params}
        )

    for kind in generators.VALUES:
        yield case(f"bs64-n1009-{kind}", _quantize_values(kind, qt, dtype, 64, 1009), kind=kind, blocksize=64)
    for blocksize in generators.BLOCKSIZES:
        run = _quantize_lengths(qt, dtype, blocksize)
        yield case(f"bs{blocksize}-lengths", run, (*base, "QC-NUM-005"), blocksize=blocksize)
        run = _quantize_blocks(qt, dtype, blocksize)
        yield case(f"bs{blocksize}-blocks", run, (*base, "QC-NUM-005"), blocksize=blocksize)
    yield case("thresholds", _quantize_thresholds(qt, dtype))
    yield case("shape-7x5x13", _quantize_shape(qt, dtype))
    if dtype != "f32":
        yield case("every-pattern", _quantize_all_patterns(qt, dtype))


def _dequantize_cases(qt: str, dtype: str) -> Iterator[Case]:
    op, base = "dequantize_4bit", _DEQUANTIZE[qt]
    nested = (*base, "QC-NEST-003")

    def case(name: str, run: Callable[[Session], None], clauses: tuple[str, ...] = base, **params: Any) -> Case:
        return Case(
            f"{op}/L1/{qt}-{dtype}-{name}", op, "L1", clauses, run, {"quant_type": qt, "dtype": dtype, **params}
        )

    for blocksize in generators.BLOCKSIZES:
        run = _dequantize_lengths(qt, dtype, blocksize)
        yield case(f"bs{blocksize}-lengths", run, (*base, "QC-NUM-005"), blocksize=blocksize)
    yield case("all-bytes", _dequantize_all_bytes(qt, dtype))
    yield case("absmax-bits", _dequantize_absmax_bits(qt, dtype))
    yield case("rows", _dequantize_rows(qt, dtype))
    for blocksize, nested_blocksize in ((64, 256), (32, 32), (128, 64), (4096, 256)):
        if nested_blocksize * blocksize <= 64 * 256 or dtype == "bf16":
            run = _dequantize_nested(qt, dtype, blocksize, nested_blocksize)
            yield case(f"bs{blocksize}-nested{nested_blocksize}", run, nested, blocksize=blocksize)
    if dtype == "f32":
        yield case("round-trip", _round_trip(qt), (*base, *_QUANTIZE[qt]))


def cases() -> Iterator[Case]:
    for quant_type in QUANT_TYPES:
        for dtype in DTYPES:
            yield from _quantize_cases(quant_type, dtype)
            yield from _dequantize_cases(quant_type, dtype)
    yield from golden.cases("quantize_4bit", _COMMON)
    yield from golden.cases("dequantize_4bit", ("QC-4BIT-003",))
