"""Nested quantization of absmax: QC-NEST, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qcore_conformance import calls, generators, golden, oracle
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import Floats, f32, neighbours, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session

_QUANTIZE = ("QC-NUM-001", "QC-NUM-004", "QC-NEST-001", "QC-NEST-002")
_DEQUANTIZE = ("QC-NUM-001", "QC-NUM-004", "QC-NEST-003")
# Around the 256 lanes of QC-NEST-001 and several rounds of them.
_LENGTHS = (0, 1, 2, 3, 31, 255, 256, 257, 511, 512, 513, 1009, 4096, 4099)


def _absmax(s: Session, kind: str, n: int) -> Floats:
    """Values as blocks of weights have them, or any values: the clause does not ask."""
    if kind == "weights":
        return rounded(np.abs(s.rng.standard_normal((n, 64))).max(axis=1) * 0.02, "f32")
    if kind == "wide":
        # The lanes' sums round: another order of summation gives another offset.
        return rounded(np.exp(8 * s.rng.standard_normal(n)), "f32")
    return generators.values(kind, s.rng, n, "f32")


def _check_quantize(s: Session, absmax: Floats, code: np.ndarray, blocksize: int) -> None:
    got = calls.quantize_absmax(s, absmax, code, blocksize)
    want = oracle.quantize_absmax(absmax, code, blocksize)
    expect_floats("offset", got.offset, want.offset)
    expect_floats("nested_absmax", got.nested_absmax, want.nested_absmax)
    expect_integers("out", got.codes, want.codes)


def _quantize(kind: str, book: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for n in _LENGTHS:
            _check_quantize(s, _absmax(s, kind, n), generators.CODEBOOKS[book], blocksize)

    return run


def _lane_order(s: Session) -> None:
    """Sums that only the clause's order gives: what a lane loses beside a large value does not come back."""
    for rounds in (3, 6, 9):
        parts = []
        for _ in range(rounds // 3):
            large, small = s.rng.standard_normal(256) * 2.0**60, s.rng.standard_normal(256) * 2.0**9
            parts += [large, small, -large]
        absmax = rounded(np.concatenate([*parts, [1.0]]), "f32")
        mean = oracle.offset(absmax)
        for other in (np.cumsum(absmax.f64())[-1], absmax.f64().sum()):
            assert float(oracle.r32(other / absmax.size)) != mean, "the probe has lost its bite"
        _check_quantize(s, absmax, generators.CODEBOOKS["dynamic"], 256)


def _ties(s: Session) -> None:
    """Every midpoint and code with its neighbours, in pairs of both signs: the offset is 0, d the value itself."""
    books = {kind: generators.custom_codebook(s.rng, kind) for kind in ("repeated", "denormal", "wide")}
    for name, code in {**generators.CODEBOOKS, **books}.items():
        points = np.concatenate([oracle.midpoints(code), code.astype(np.float64)])
        points = neighbours(points[np.abs(points) <= 1], "f32").f64()
        points = points[np.abs(points) <= 1]
        pairs = np.concatenate([points, -points])
        # 1 and -1 share a lane and are gone before anything small is added.
        absmax = f32(np.concatenate([[1.0], pairs[:255], [-1.0], pairs[255:]]))
        assert oracle.offset(absmax) == 0, f"{name}: the probe has lost its bite"
        _check_quantize(s, absmax, code, 4096)


def _differences(s: Session) -> None:
    """A codebook with a tie at every quotient of a rounded difference: an unrounded one falls beside it."""
    absmax = rounded(np.exp(s.rng.standard_normal(1024)), "f32")
    mean = oracle.offset(absmax)
    exact = (absmax.f64() - mean).reshape(-1, 256)
    scale = oracle.r32(1 / np.abs(oracle.r32(exact)).max(axis=1))[:, None]
    y, unrounded = oracle.r32(oracle.r32(exact) * scale).reshape(-1), oracle.r32(exact * scale).reshape(-1)
    # Quotients with room for a pair of codes 8 ulp around each; the midpoint of an even j sends its tie down.
    pairs, bite = [-1.0], 0
    for i in np.argsort(y):
        step = 8 * float(np.spacing(np.float32(abs(y[i]))))
        if unrounded[i] > y[i] and pairs[-1] < y[i] - step and 2.0**-6 < abs(y[i]) < 0.99 and len(pairs) < 253:
            pairs += [y[i] - step, y[i] + step]
            bite += 1
    assert bite > 20, "the probe has lost its bite"
    code = np.array([-1.0, *pairs, *[1.0] * (255 - len(pairs))]).astype(np.float32)
    _check_quantize(s, absmax, code, 256)


def _dequantize(book: str, blocksize: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        code = generators.CODEBOOKS[book]
        for n in _LENGTHS:
            for kind in ("normal", "bits"):
                codes = s.rng.integers(0, 256, n, dtype=np.uint8)
                nested = generators.values(kind, s.rng, -(-n // blocksize), "f32")
                offset = generators.values("normal", s.rng, 1, "f32")
                got = calls.dequantize_absmax(s, codes, nested, code, offset, blocksize)
                expect_floats("out", got, oracle.dequantize_absmax(codes, nested, code, offset, blocksize))

    return run


def _dequantize_rounds_twice(s: Session) -> None:
    """Products and offsets whose fused sum rounds otherwise (QC-NUM-001: no contraction)."""
    code = generators.CODEBOOKS["dynamic"]
    codes = np.arange(256, dtype=np.uint8)
    fused_differs = 0
    for _ in range(40):
        nested, offset = f32(s.rng.uniform(0.5, 2, 1)), f32(s.rng.uniform(-1, 1, 1))
        want = oracle.dequantize_absmax(codes, nested, code, offset, 256)
        fused = f32(oracle.r32(code.astype(np.float64) * nested.f64() + offset.f64()))
        fused_differs += int((fused.bits != want.bits).sum())
        expect_floats("out", calls.dequantize_absmax(s, codes, nested, code, offset, 256), want)
    assert fused_differs > 100, "the probe has lost its bite"


def cases() -> Iterator[Case]:
    op = "quantize_absmax"
    for kind in ("weights", "wide", "normal", "equal", "zeros", "denormal", "largest", "nan-inf", "bits"):
        run = _quantize(kind, "dynamic", 256)
        yield Case(f"{op}/L1/dynamic-bs256-{kind}", op, "L1", (*_QUANTIZE, "QC-Q8-002", "QC-Q8-003"), run)
    for book in ("linear", "fp8", "dynamic-unsigned"):
        yield Case(f"{op}/L1/{book}-bs256-weights", op, "L1", _QUANTIZE, _quantize("weights", book, 256))
    for blocksize in generators.BLOCKSIZES:
        run = _quantize("weights", "dynamic", blocksize)
        yield Case(f"{op}/L1/dynamic-bs{blocksize}-lengths", op, "L1", (*_QUANTIZE, "QC-NUM-005"), run)
    yield Case(f"{op}/L1/lane-order", op, "L1", _QUANTIZE, _lane_order)
    yield Case(f"{op}/L1/rounded-differences", op, "L1", ("QC-NUM-001", "QC-NEST-002"), _differences)
    yield Case(f"{op}/L1/ties", op, "L1", ("QC-NEST-002", "QC-Q8-001", "QC-Q8-004"), _ties)
    yield from golden.cases(op, _QUANTIZE)

    op = "dequantize_absmax"
    for blocksize in generators.BLOCKSIZES:
        run = _dequantize("dynamic", blocksize)
        yield Case(f"{op}/L1/dynamic-bs{blocksize}-lengths", op, "L1", (*_DEQUANTIZE, "QC-NUM-005"), run)
    for book in ("linear", "fp8"):
        yield Case(f"{op}/L1/{book}-bs256-lengths", op, "L1", _DEQUANTIZE, _dequantize(book, 256))
    yield Case(f"{op}/L1/two-roundings", op, "L1", _DEQUANTIZE, _dequantize_rounds_twice)
    yield from golden.cases(op, _DEQUANTIZE)
