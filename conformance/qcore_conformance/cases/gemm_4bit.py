"""The W4A16 product: QC-GEMM4-001 to QC-GEMM4-007, exact probes and the declared-depth bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qcore_conformance import bounds, calls, generators, golden, oracle
from qcore_conformance.checks import expect_floats
from qcore_conformance.floats import DTYPES, Floats, is_nan, rounded
from qcore_conformance.model import Case
from qcore_conformance.session import Session
from qcore_conformance.weights import Weight, integer_weight, random_weight

QUANT_TYPES = ("nf4", "fp4")
_OP = "gemm_4bit"
_EXACT = ("QC-GEMM4-001", "QC-GEMM4-005")
_BOUNDED = ("QC-GEMM4-001", "QC-GEMM4-002", "QC-GEMM4-003", "QC-GEMM4-004")


def _one_hot(quant_type: str, dtype: str, m: int, k: int, blocksize: int, nested: int) -> Callable[[Session], None]:
    """Every column of K alone, ``m`` rows a call: the output is the decoded weight, rounded once."""

    def run(s: Session) -> None:
        n = 37
        weight = random_weight(s.rng, quant_type, blocksize, (n, k), nested)
        decoded = weight.decoded(dtype)
        eye = rounded(np.eye(k), dtype)
        # The last call holds the last m columns, so that each call has m rows.
        starts = [*range(0, k - m, m), k - m]
        for i, start in enumerate(starts):
            x = Floats(eye.bits[start : start + m], dtype)
            y = calls.gemm_4bit(s, x, weight, prepared=i % 2 == 1)
            want = Floats(decoded.bits[:, start : start + m].T.copy(), dtype)
            expect_floats(f"one-hot rows {start} to {start + m - 1}", y, want, zero_sign=False)

    return run


def _integers(quant_type: str, dtype: str, bias: str | None) -> Callable[[Session], None]:
    """Sums of small multiples of 1/4: exact in any order, so the result is exact, rounded once."""

    def run(s: Session) -> None:
        for m, n, k in (
            (1, 33, 67),
            (2, 64, 128),
            (5, 31, 200),
            (16, 48, 96),
            (33, 17, 257),
            (129, 9, 64),
            (1, 130, 1024),
        ):
            weight = integer_weight(s.rng, quant_type, 64, (n, k))
            x = rounded(s.rng.integers(-8, 9, (m, k)), dtype)
            b = None if bias is None else rounded(s.rng.integers(-64, 65, n), bias)
            truth = oracle.gemm_4bit(x, weight.decoded(), b)
            y = calls.gemm_4bit(s, x, weight, b)
            expect_floats(f"Y (M={m}, N={n}, K={k})", y, rounded(truth.exact, dtype), zero_sign=False)

    return run


def _overflow(dtype: str) -> Callable[[Session], None]:
    """A sum beyond the output's range is infinite, one at the edge rounds to the largest value (QC-NUM-003)."""

    def run(s: Session) -> None:
        k = 64
        weight = Weight(np.full(k * 3 // 2, 0xFF, dtype=np.uint8), rounded([1.0] * 3, "f32"), "nf4", 64, (3, k))
        x = np.zeros((4, k))
        x[0, :2] = 32768.0  # 65536: infinite in float16
        x[1, :3] = (32768.0, 32752.0, -1.0)  # 65519: below the rounding edge of 65520
        x[2, :2] = (32768.0, 32752.0)  # 65520: the tie goes to infinity
        x[3, :2] = -32768.0
        activations = rounded(x, dtype)
        y = calls.gemm_4bit(s, activations, weight)
        truth = oracle.gemm_4bit(activations, weight.decoded(), None)
        expect_floats("Y", y, rounded(truth.exact, dtype))

    return run


def _bounded(
    quant_type: str, dtype: str, sizes: tuple[tuple[int, int, int], ...], blocksize: int, nested: int, bias: str | None
) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for i, (m, n, k) in enumerate(sizes):
            weight = random_weight(s.rng, quant_type, blocksize, (n, k), nested)
            x = generators.values("normal", s.rng, m * k, dtype).reshape(m, k)
            b = None if bias is None else generators.values("normal", s.rng, n, bias)
            y = calls.gemm_4bit(s, x, weight, b, prepared=i % 2 == 1)
            s.record(bounds.check_gemm(y, oracle.gemm_4bit(x, weight.decoded(), b), s.gemm, k))

    return run


def _cancelling(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """Sums that nearly cancel, and activations over many binades: where relative rules would be blind."""

    def run(s: Session) -> None:
        for m, n, k in ((1, 64, 512), (7, 33, 300), (64, 24, 256)):
            weight = random_weight(s.rng, quant_type, 64, (n, k))
            x = generators.values("normal", s.rng, m * k, dtype).f64().reshape(m, k)
            x *= 2.0 ** s.rng.integers(-6, 7, (m, k))
            w = weight.decoded().f64()
            x[:, -1] = np.where(w[0, -1] != 0, -(x[:, :-1] @ w[0, :-1]) / (w[0, -1] or 1.0), x[:, -1])
            x = np.clip(x, -1e4, 1e4)
            activations = rounded(x, dtype)
            y = calls.gemm_4bit(s, activations, weight)
            s.record(bounds.check_gemm(y, oracle.gemm_4bit(activations, weight.decoded(), None), s.gemm, k))

    return run


def _small_activations(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """Denormal float16 inputs and outputs are kept; in the other dtypes, values near 2^-100."""

    def run(s: Session) -> None:
        for m in (1, 5, 40):
            weight = random_weight(s.rng, quant_type, 64, (19, 192))
            scale = 2.0**-20 if dtype == "f16" else 2.0**-100
            x = rounded(s.rng.standard_normal((m, 192)) * scale, dtype)
            y = calls.gemm_4bit(s, x, weight)
            s.record(bounds.check_gemm(y, oracle.gemm_4bit(x, weight.decoded(), None), s.gemm, 192))

    return run


def _independent_rows(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """QC-GEMM4-006: NaN and infinities stay in their row, and a NaN fills it."""

    def run(s: Session) -> None:
        n, k = 29, 160
        for m in (2, 3, 9, 17, 65):
            weight = random_weight(s.rng, quant_type, 64, (n, k))
            x = generators.values("normal", s.rng, m * k, dtype).reshape(m, k)
            clean = calls.gemm_4bit(s, x, weight)
            for value in (np.nan, np.inf, -np.inf):
                row, column = int(s.rng.integers(m)), int(s.rng.choice([0, k - 1, int(s.rng.integers(k))]))
                dirty = x.bits.copy()
                dirty[row, column] = rounded([value], dtype).bits[0]
                y = calls.gemm_4bit(s, Floats(dirty, dtype), weight)
                others = np.arange(m) != row
                expect_floats(
                    f"rows beside row {row} with a {value}",
                    Floats(y.bits[others], dtype),
                    Floats(clean.bits[others], dtype),
                )
                if np.isnan(value):
                    assert is_nan(y).reshape(m, n)[row].all(), (
                        f"X[{row}, {column}] is NaN, but row {row} of Y is not all NaN"
                    )

    return run


def _nan_meets_zero(dtype: str) -> Callable[[Session], None]:
    """A NaN against a weight of 0 is still NaN: no term may be skipped."""

    def run(s: Session) -> None:
        k = 96
        for quant_type, byte in (("nf4", 0x77), ("fp4", 0x00), ("fp4", 0x88)):
            blocks = rounded(np.ones(6 * k // 32), "f32")
            weight = Weight(np.full(6 * k // 2, byte, dtype=np.uint8), blocks, quant_type, 32, (6, k))
            for m in (1, 4, 33):
                x = rounded(np.ones((m, k)), dtype)
                x.bits[m - 1, k - 1] = rounded([np.nan], dtype).bits[0]
                y = calls.gemm_4bit(s, x, weight)
                assert is_nan(y)[m - 1].all(), f"NaN * 0 gave {y.f64()[m - 1].tolist()} ({quant_type}, M={m})"

    return run


def _empty(s: Session) -> None:
    """QC-GEMM4-007."""
    for dtype in DTYPES:
        bias = generators.values("normal", s.rng, 5, dtype)
        for m, n, k in ((0, 5, 64), (3, 0, 64), (0, 0, 0), (0, 5, 0)):
            weight = random_weight(s.rng, "nf4", 64, (n, k))
            x = generators.values("normal", s.rng, m * k, dtype).reshape(m, k)
            y = calls.gemm_4bit(s, x, weight, bias if n == 5 else None)
            assert y.shape == (m, n)
        weight = random_weight(s.rng, "nf4", 64, (5, 0))
        for m in generators.ROW_COUNTS:
            x = rounded(np.zeros((m, 0)), dtype)
            expect_floats(f"Y (M={m}, K=0)", calls.gemm_4bit(s, x, weight), rounded(np.zeros((m, 5)), dtype))
            want = Floats(np.tile(bias.bits, (m, 1)), dtype)
            expect_floats(f"Y (M={m}, K=0, bias)", calls.gemm_4bit(s, x, weight, bias), want)


def _ceiling(s: Session) -> None:
    """QC-GEMM4-002: a declared depth above K + 8 is refused for every K that the suite uses."""
    declaration = s.gemm
    for k in range(4097):
        declaration.depth(k)


def _same_weights(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """QC-GEMM4-001: the weights have one value whatever M is: a one-hot row gives the same bits beside any others."""

    def run(s: Session) -> None:
        n, k = 21, 130
        weight = random_weight(s.rng, quant_type, 64, (n, k))
        decoded = weight.decoded(dtype)
        for m in generators.ROW_COUNTS:
            x = rounded(s.rng.standard_normal((m, k)), dtype)
            row, column = int(s.rng.integers(m)), int(s.rng.integers(k))
            x.bits[row] = rounded(np.eye(k)[column], dtype).bits
            y = calls.gemm_4bit(s, x, weight)
            expect_floats(
                f"one-hot row {row} of M={m}",
                Floats(y.bits[row], dtype),
                Floats(decoded.bits[:, column].copy(), dtype),
                zero_sign=False,
            )

    return run


def _rows(n: int, k: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((m, n, k) for m in generators.ROW_COUNTS)


def cases() -> Iterator[Case]:
    def case(level: str, name: str, run: Callable[[Session], None], clauses: tuple[str, ...], **params: Any) -> Case:
        return Case(f"{_OP}/{level}/{name}", _OP, level, clauses, run, params)

    yield case("L0", "declared-depth-ceiling", _ceiling, ("QC-GEMM4-002",))
    yield case("L1", "empty", _empty, ("QC-GEMM4-007", "QC-NUM-005"))
    for qt in QUANT_TYPES:
        for dtype in DTYPES:
            name = f"{qt}-{dtype}"
            for m, k, blocksize, nested in (
                (1, 131, 64, 0), (2, 96, 32, 0), (4, 130, 64, 256), (8, 129, 128, 0), (16, 200, 64, 0),
                (33, 131, 32, 64), (65, 257, 64, 0), (128, 128, 64, 0), (320, 320, 4096, 0),
            ):  # fmt: skip
                run = _one_hot(qt, dtype, m, k, blocksize, nested)
                label = f"{name}-one-hot-m{m}-k{k}-bs{blocksize}" + (f"-nested{nested}" if nested else "")
                yield case("L1", label, run, (*_EXACT, "QC-4BIT-003", *(("QC-NEST-003",) if nested else ())))
            for bias in (None, dtype) if dtype == "f32" else (None, dtype, "f32"):
                run = _integers(qt, dtype, bias)
                yield case("L1", f"{name}-integers-bias-{bias or 'none'}", run, (*_EXACT, "QC-GEMM4-003"))
            yield case("L1", f"{name}-same-weights", _same_weights(qt, dtype), ("QC-GEMM4-001", "QC-GEMM4-005"))
            yield case("L1", f"{name}-independent-rows", _independent_rows(qt, dtype), ("QC-GEMM4-006",))

            yield case("L2", f"{name}-rows", _bounded(qt, dtype, _rows(45, 192), 64, 0, None), _BOUNDED)
            sizes = (
                (1, 33, 1),
                (1, 1, 2),
                (3, 17, 31),
                (1, 40, 65),
                (5, 40, 63),
                (1, 64, 1024),
                (6, 24, 577),
                (70, 20, 129),
            )
            for bias in (None, dtype) if dtype == "f32" else (dtype, "f32"):
                run = _bounded(qt, dtype, sizes, 64, 0, bias)
                yield case("L2", f"{name}-odd-sizes-bias-{bias or 'none'}", run, _BOUNDED)
            for blocksize in generators.BLOCKSIZES:
                few = ((1, 35, 320), (12, 35, 161), (40, 19, 96))
                run = _bounded(qt, dtype, few, blocksize, 0, dtype)
                yield case("L2", f"{name}-bs{blocksize}", run, _BOUNDED, blocksize=blocksize)
            for nested in (32, 256):
                few = ((1, 130, 256), (9, 40, 129), (34, 33, 64))
                run = _bounded(qt, dtype, few, 32, nested, None)
                yield case("L2", f"{name}-bs32-nested{nested}", run, (*_BOUNDED, "QC-NEST-003"), nested=nested)
            yield case("L2", f"{name}-cancelling", _cancelling(qt, dtype), _BOUNDED)
            yield case("L2", f"{name}-small", _small_activations(qt, dtype), (*_BOUNDED, "QC-NUM-003"))
    for dtype in DTYPES:
        yield case("L1", f"{dtype}-overflow", _overflow(dtype), ("QC-GEMM4-005", "QC-NUM-003"))
        yield case("L1", f"{dtype}-nan-meets-zero", _nan_meets_zero(dtype), ("QC-GEMM4-006",))
    yield case(
        "L2",
        "nf4-bf16-deep",
        _bounded("nf4", "bf16", ((1, 9, 8192), (4, 5, 4099), (4, 5, 8256)), 64, 0, None),
        _BOUNDED,
    )
    # Many rows, with a K of more than a few spans of any panel; and more than 512 rows.
    many = ((20, 70, 1600), (70, 40, 1090), (520, 16, 320))
    yield case("L2", "nf4-bf16-deep-panels", _bounded("nf4", "bf16", many, 64, 0, None), _BOUNDED)
    yield from golden.cases(_OP, _BOUNDED)
