"""Blockwise 8-bit: QC-Q8-001 to QC-Q8-006, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qcore_conformance import calls, generators, golden, oracle
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import DTYPES, Floats, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session

_QUANTIZE = ("QC-NUM-001", "QC-NUM-002", "QC-NUM-004", "QC-Q8-001", "QC-Q8-002", "QC-Q8-003", "QC-Q8-004")
_DEQUANTIZE = ("QC-NUM-001", "QC-NUM-003", "QC-NUM-004", "QC-Q8-005")


def _check_quantize(s: Session, a: Floats, code: Any, blocksize: int) -> None:
    got = calls.quantize_blockwise(s, a, code, blocksize)
    want = oracle.quantize_blockwise(a, code, blocksize)
    expect_floats("absmax", got.absmax, want.absmax)
    expect_integers("out", got.codes.reshape(-1), want.codes)


def _check_dequantize(s: Session, codes: Any, absmax: Floats, code: Any, blocksize: int, dtype: str) -> None:
    got = calls.dequantize_blockwise(s, codes, absmax, code, blocksize, dtype)
    expect_floats("out", got, oracle.dequantize_blockwise(codes, absmax, code, blocksize, dtype))


def _quantize_values(kind: str, dtype: str, book: str, blocksize: int, n: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        a = generators.values(kind, s.rng, n, dtype)
        _check_quantize(s, a, generators.CODEBOOKS[book], blocksize)

    return run


def _quantize_lengths(dtype: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for n in generators.lengths(blocksize):
            _check_quantize(s, generators.values("normal", s.rng, n, dtype), generators.CODEBOOKS["dynamic"], blocksize)

    return run


def _quantize_blocks(dtype: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        a = generators.special_blocks(s.rng, blocksize, dtype)
        _check_quantize(s, a, generators.CODEBOOKS["dynamic"], blocksize)

    return run


def _quantize_thresholds(dtype: str, book: str, scale: float) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        code = generators.CODEBOOKS[book]
        points = np.concatenate([oracle.midpoints(code), code.astype(np.float64)])
        _check_quantize(s, generators.decision_points(points, 256, scale, dtype), code, 256)

    return run


def _quantize_all_patterns(dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        every = generators.every_16_bit_pattern(dtype)
        _check_quantize(s, every, generators.CODEBOOKS["dynamic"], 64)
        # A finite absmax in every block, so that each finite value meets the codebook at one scale.
        finite = every.bits[np.abs(every.f64()) <= 2.0**14]
        finite = finite[: finite.size // 31 * 31].reshape(-1, 31)
        top = np.full((len(finite), 1), rounded([2.0**14], dtype).bits[0])
        blocks = Floats(np.concatenate([top, finite], axis=1).reshape(-1), dtype)
        _check_quantize(s, blocks, generators.CODEBOOKS["dynamic"], 32)

    return run


def _quantize_custom(kind: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        code = generators.custom_codebook(s.rng, kind)
        for values in ("normal", "nan-inf", "zeros-mixed"):
            _check_quantize(s, generators.values(values, s.rng, 1009, dtype), code, 128)
        points = np.concatenate([oracle.midpoints(code), code.astype(np.float64)])
        points = points[np.isfinite(points) & (np.abs(points) <= 1)]
        _check_quantize(s, generators.decision_points(points, 256, 1.0, dtype), code, 256)

    return run


def _dequantize_lengths(dtype: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for n in generators.lengths(blocksize):
            codes = s.rng.integers(0, 256, n, dtype=np.uint8)
            absmax = generators.values("lognormal", s.rng, -(-n // blocksize), "f32")
            _check_dequantize(s, codes, absmax, generators.CODEBOOKS["dynamic"], blocksize, dtype)

    return run


def _dequantize_all_bytes(book: str, dtype: str) -> Callable[[Session], None]:
    """All 256 bytes; at absmax 1 in float32 the codebook itself comes back (QC-Q8-006)."""

    def run(s: Session) -> None:
        golden.check_codebook(book, generators.CODEBOOKS[book])
        codes = np.arange(256, dtype=np.uint8)
        for scale in (1.0, 3.0, 1e-3, 2.0**-130):
            absmax = rounded(np.full(1, scale), "f32")
            _check_dequantize(s, codes, absmax, generators.CODEBOOKS[book], 256, dtype)

    return run


def _dequantize_absmax_bits(dtype: str) -> Callable[[Session], None]:
    """Any absmax: denormal, huge (the product overflows), negative, NaN, infinite."""

    def run(s: Session) -> None:
        for kind in ("bits", "denormal", "largest", "nan-inf", "zeros"):
            absmax = generators.values(kind, s.rng, 67, "f32")
            codes = s.rng.integers(0, 256, 66 * 32 + 5, dtype=np.uint8)
            _check_dequantize(s, codes, absmax, generators.CODEBOOKS["dynamic"], 32, dtype)

    return run


def _dequantize_any_codebook(dtype: str) -> Callable[[Session], None]:
    """Dequantization takes any 256 finite values, sorted or not (QC-Q8-001)."""

    def run(s: Session) -> None:
        codes = s.rng.permutation(np.repeat(np.arange(256, dtype=np.uint8), 3))
        for kind in generators.CUSTOM_CODEBOOKS:
            code = s.rng.permutation(generators.custom_codebook(s.rng, kind))
            absmax = generators.values("normal", s.rng, 12, "f32")
            _check_dequantize(s, codes, absmax, code, 64, dtype)

    return run


def _shape(op: str, dtype: str) -> Callable[[Session], None]:
    """Blocks run across rows (QC-NUM-004)."""

    def run(s: Session) -> None:
        code = generators.CODEBOOKS["linear"]
        a = generators.values("normal", s.rng, 7 * 5 * 13, dtype).reshape(7, 5, 13)
        if op == "quantize_blockwise":
            _check_quantize(s, a, code, 64)
        else:
            q = oracle.quantize_blockwise(a, code, 64)
            got = calls.dequantize_blockwise(s, q.codes.reshape(7, 5, 13), q.absmax, code, 64, dtype)
            want = oracle.dequantize_blockwise(q.codes, q.absmax, code, 64, dtype)
            expect_floats("out", got.reshape(-1), want)

    return run


def _quantize_cases() -> Iterator[Case]:
    op = "quantize_blockwise"

    def case(name: str, run: Callable[[Session], None], clauses: tuple[str, ...] = _QUANTIZE, **params: Any) -> Case:
        return Case(f"{op}/L1/{name}", op, "L1", clauses, run, params)

    for dtype in DTYPES:
        for kind in generators.VALUES:
            run = _quantize_values(kind, dtype, "dynamic", 256, 1009)
            yield case(f"{dtype}-dynamic-bs256-n1009-{kind}", run, dtype=dtype, kind=kind, blocksize=256)
        for blocksize in generators.BLOCKSIZES:
            run = _quantize_lengths(dtype, blocksize)
            yield case(f"{dtype}-dynamic-bs{blocksize}-lengths", run, (*_QUANTIZE, "QC-NUM-005"), blocksize=blocksize)
            run = _quantize_blocks(dtype, blocksize)
            yield case(f"{dtype}-dynamic-bs{blocksize}-blocks", run, (*_QUANTIZE, "QC-NUM-005"), blocksize=blocksize)
        for book in generators.CODEBOOKS:
            run = _quantize_values("normal", dtype, book, 64, 4099)
            yield case(f"{dtype}-{book}-bs64-n4099-normal", run, (*_QUANTIZE, "QC-Q8-006"), codebook=book)
            for label, scale in (("1", 1.0), ("2p-3", 0.125), ("3", 3.0), ("0.7", 0.7)):
                run = _quantize_thresholds(dtype, book, scale)
                yield case(f"{dtype}-{book}-thresholds-absmax{label}", run, (*_QUANTIZE, "QC-Q8-006"), codebook=book)
        for kind in generators.CUSTOM_CODEBOOKS:
            yield case(f"{dtype}-codebook-{kind}", _quantize_custom(kind, dtype), codebook=kind)
        yield case(f"{dtype}-shape-7x5x13", _shape(op, dtype))
    for dtype in ("f16", "bf16"):
        yield case(f"{dtype}-every-pattern", _quantize_all_patterns(dtype), dtype=dtype)


def _dequantize_cases() -> Iterator[Case]:
    op = "dequantize_blockwise"

    def case(name: str, run: Callable[[Session], None], clauses: tuple[str, ...] = _DEQUANTIZE, **params: Any) -> Case:
        return Case(f"{op}/L1/{name}", op, "L1", clauses, run, params)

    for dtype in DTYPES:
        for blocksize in generators.BLOCKSIZES:
            run = _dequantize_lengths(dtype, blocksize)
            yield case(f"{dtype}-bs{blocksize}-lengths", run, (*_DEQUANTIZE, "QC-NUM-005"), blocksize=blocksize)
        for book in generators.CODEBOOKS:
            run = _dequantize_all_bytes(book, dtype)
            yield case(f"{dtype}-{book}-all-bytes", run, (*_DEQUANTIZE, "QC-Q8-006"), codebook=book)
        yield case(f"{dtype}-absmax-bits", _dequantize_absmax_bits(dtype))
        yield case(f"{dtype}-any-codebook", _dequantize_any_codebook(dtype), (*_DEQUANTIZE, "QC-Q8-001"))
        yield case(f"{dtype}-shape-7x5x13", _shape(op, dtype))


def cases() -> Iterator[Case]:
    yield from _quantize_cases()
    yield from _dequantize_cases()
    yield from golden.cases("quantize_blockwise", _QUANTIZE)
    yield from golden.cases("dequantize_blockwise", _DEQUANTIZE)
