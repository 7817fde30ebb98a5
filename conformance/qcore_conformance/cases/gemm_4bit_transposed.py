"""The transposed W4A16 product: QC-GEMM4-008 to QC-GEMM4-012, exact probes and the declared-depth bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qcore_conformance import bounds, calls, generators, oracle
from qcore_conformance.checks import expect_floats
from qcore_conformance.floats import DTYPES, Floats, is_nan, rounded
from qcore_conformance.model import Case, NotRun
from qcore_conformance.session import Session
from qcore_conformance.weights import Weight, integer_weight, random_weight

QUANT_TYPES = ("nf4", "fp4")
_OP = "gemm_4bit_transposed"
_EXACT = ("QC-GEMM4-008", "QC-GEMM4-010")
_BOUNDED = ("QC-GEMM4-008", "QC-GEMM4-009", "QC-GEMM4-004")


def _truth(y: Floats, weight: Weight) -> oracle.Product:
    """The exact result: the product with the decoded weight as it lies."""
    decoded = weight.decoded()
    return oracle.gemm_4bit(y, Floats(decoded.bits.reshape(weight.shape).T.copy(), "f32"), None)


def _one_hot(quant_type: str, dtype: str, m: int, n: int, k: int, blocksize: int, nested: int) -> Any:
    """Every row of W alone, ``m`` a call: the output is the decoded row, rounded once."""

    def run(s: Session) -> None:
        weight = random_weight(s.rng, quant_type, blocksize, (n, k), nested)
        decoded, eye = weight.decoded(dtype).bits.reshape(n, k), rounded(np.eye(n), dtype)
        # The last call holds the last m rows, so that each call has m.
        for i, start in enumerate([*range(0, n - m, m), n - m]):
            rows = slice(start, start + m)
            x = calls.gemm_4bit_transposed(s, Floats(eye.bits[rows], dtype), weight, prepared=i % 2 == 1)
            want = Floats(decoded[rows].copy(), dtype)
            expect_floats(f"one-hot rows {start} to {start + m - 1}", x, want, zero_sign=False)

    return run


def _integers(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """Sums of small multiples of 1/4: exact in any order, so the result is exact, rounded once."""

    def run(s: Session) -> None:
        for m, n, k in (
            (1, 67, 33), (2, 128, 64), (5, 200, 31), (16, 192, 192), (33, 257, 17), (129, 64, 65), (1, 1030, 192),
            (40, 600, 320),
        ):  # fmt: skip
            weight = integer_weight(s.rng, quant_type, 64, (n, k))
            y = rounded(s.rng.integers(-8, 9, (m, n)), dtype)
            x = calls.gemm_4bit_transposed(s, y, weight)
            want = rounded(_truth(y, weight).exact, dtype)
            expect_floats(f"X (M={m}, N={n}, K={k})", x, want, zero_sign=False)

    return run


def _bounded(
    quant_type: str, dtype: str, sizes: tuple[tuple[int, int, int], ...], blocksize: int, nested: int
) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for i, (m, n, k) in enumerate(sizes):
            weight = random_weight(s.rng, quant_type, blocksize, (n, k), nested)
            y = generators.values("normal", s.rng, m * n, dtype).reshape(m, n)
            x = calls.gemm_4bit_transposed(s, y, weight, prepared=i % 2 == 1)
            s.record(bounds.check_gemm(x, _truth(y, weight), s.gemm_transposed, n))

    return run


def _small(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """Denormal float16 inputs and outputs are kept; in the other dtypes, gradients near 2^-100, some rows only."""

    def run(s: Session) -> None:
        for m, n, k in ((1, 192, 64), (5, 100, 19), (40, 192, 128)):
            weight = random_weight(s.rng, quant_type, 64, (n, k))
            scale = 2.0**-20 if dtype == "f16" else 2.0**-100
            scales = np.where(np.arange(m) % 3 == 0, scale, 1.0)
            y = rounded(s.rng.standard_normal((m, n)) * scales[:, None], dtype)
            x = calls.gemm_4bit_transposed(s, y, weight)
            s.record(bounds.check_gemm(x, _truth(y, weight), s.gemm_transposed, n))

    return run


def _small_weights(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """Blocks near 2^-60 beside usual ones: weights that no bfloat16 unit may flush."""

    def run(s: Session) -> None:
        for m, n, k in ((2, 64, 192), (3, 64, 192), (20, 70, 128)):
            weight = random_weight(s.rng, quant_type, 64, (n, k))
            scales = np.where(s.rng.random(weight.absmax.size) < 0.2, 2.0**-60, 1.0)
            weight.absmax.bits[:] = rounded(weight.absmax.f64() * scales, "f32").bits
            y = rounded(s.rng.standard_normal((m, n)) * 2.0**-30, dtype)
            x = calls.gemm_4bit_transposed(s, y, weight)
            s.record(bounds.check_gemm(x, _truth(y, weight), s.gemm_transposed, n))

    return run


def _independent_rows(quant_type: str, dtype: str) -> Callable[[Session], None]:
    """QC-GEMM4-011: NaN and infinities stay in their row, and a NaN fills it, also against a weight of 0."""

    def run(s: Session) -> None:
        n, k = 160, 93
        for m in (2, 3, 9, 17, 65):
            weight = random_weight(s.rng, quant_type, 64, (n, k))
            y = generators.values("normal", s.rng, m * n, dtype).reshape(m, n)
            clean = calls.gemm_4bit_transposed(s, y, weight)
            for value in (np.nan, np.inf, -np.inf):
                row, column = int(s.rng.integers(m)), int(s.rng.choice([0, n - 1, int(s.rng.integers(n))]))
                dirty = y.bits.copy()
                dirty[row, column] = rounded([value], dtype).bits[0]
                x = calls.gemm_4bit_transposed(s, Floats(dirty, dtype), weight)
                others = np.arange(m) != row
                what = f"rows beside row {row} with a {value}"
                expect_floats(what, Floats(x.bits[others], dtype), Floats(clean.bits[others], dtype))
                if np.isnan(value):
                    full = is_nan(x).reshape(m, k)[row].all()
                    assert full, f"Y[{row}, {column}] is NaN, but row {row} of X is not all NaN"
        byte = 0x77 if quant_type == "nf4" else 0x08  # every weight is 0
        zeros = Weight(np.full(6 * 96 // 2, byte, dtype=np.uint8), rounded(np.ones(18), "f32"), quant_type, 32, (6, 96))
        y = rounded([[1.0, np.nan, 1.0, 1.0, 1.0, 1.0]], dtype)
        assert is_nan(calls.gemm_4bit_transposed(s, y, zeros)).all(), "a NaN against weights of 0 vanished"

    return run


def _empty(s: Session) -> None:
    """QC-GEMM4-012."""
    for dtype in DTYPES:
        for m, n, k in ((0, 64, 5), (3, 64, 0), (0, 0, 0), (0, 0, 5)):
            weight = random_weight(s.rng, "nf4", 64, (n, k))
            y = generators.values("normal", s.rng, m * n, dtype).reshape(m, n)
            assert calls.gemm_4bit_transposed(s, y, weight).shape == (m, k)
        weight = random_weight(s.rng, "nf4", 64, (0, 5))
        for m in generators.ROW_COUNTS:
            x = calls.gemm_4bit_transposed(s, rounded(np.zeros((m, 0)), dtype), weight)
            expect_floats(f"X (M={m}, N=0)", x, rounded(np.zeros((m, 5)), dtype))


def _declared(s: Session) -> None:
    """A declared depth above N + 8 is refused, and both products have one rounding of the weights (QC-GEMM4-008)."""
    for n in range(4097):
        s.gemm_transposed.depth(n)
    if not s.backend.supports("gemm_4bit"):
        raise NotRun("the backend does not serve gemm_4bit, whose weights these are")
    ours, theirs = s.gemm_transposed.weight_rounding, s.gemm.weight_rounding
    assert ours == theirs, f"weight_rounding {ours!r}, but {theirs!r} for gemm_4bit: not its gradient (QC-GEMM4-008)"


def cases() -> Iterator[Case]:
    def case(level: str, name: str, run: Callable[[Session], None], clauses: tuple[str, ...], **params: Any) -> Case:
        return Case(f"{_OP}/{level}/{name}", _OP, level, clauses, run, params)

    yield case("L0", "declaration", _declared, ("QC-GEMM4-008", "QC-GEMM4-009"))
    yield case("L1", "empty", _empty, ("QC-GEMM4-012", "QC-NUM-005"))
    for qt in QUANT_TYPES:
        for dtype in DTYPES:
            name = f"{qt}-{dtype}"
            for m, n, k, blocksize, nested in (
                (1, 131, 37, 64, 0), (2, 96, 64, 32, 0), (4, 130, 128, 64, 256), (16, 200, 192, 128, 0),
                (33, 131, 70, 32, 64), (65, 257, 64, 64, 0), (320, 320, 320, 4096, 0),
            ):  # fmt: skip
                run = _one_hot(qt, dtype, m, n, k, blocksize, nested)
                label = f"{name}-one-hot-m{m}-n{n}-k{k}-bs{blocksize}" + (f"-nested{nested}" if nested else "")
                yield case("L1", label, run, (*_EXACT, "QC-4BIT-003", *(("QC-NEST-003",) if nested else ())))
            yield case("L1", f"{name}-integers", _integers(qt, dtype), (*_EXACT, "QC-NUM-003"))
            yield case("L1", f"{name}-independent-rows", _independent_rows(qt, dtype), ("QC-GEMM4-011",))
            for n, k in ((192, 64), (45, 130)):
                sizes = tuple((m, n, k) for m in generators.ROW_COUNTS)
                yield case("L2", f"{name}-rows-n{n}-k{k}", _bounded(qt, dtype, sizes, 64, 0), _BOUNDED)
            odd = ((1, 1, 33), (1, 2, 1), (3, 31, 17), (1, 65, 40), (5, 577, 63), (70, 129, 20), (6, 1030, 64))
            yield case("L2", f"{name}-odd-sizes", _bounded(qt, dtype, odd, 64, 0), _BOUNDED)
            for blocksize in (32, 128, 4096):
                few = ((1, 320, 35), (12, 161, 128), (40, 96, 192))
                run = _bounded(qt, dtype, few, blocksize, 0)
                yield case("L2", f"{name}-bs{blocksize}", run, _BOUNDED, blocksize=blocksize)
            few = ((1, 256, 130), (9, 129, 64), (34, 33, 320))
            yield case("L2", f"{name}-bs64-nested256", _bounded(qt, dtype, few, 64, 256), (*_BOUNDED, "QC-NEST-003"))
            yield case("L2", f"{name}-small", _small(qt, dtype), (*_BOUNDED, "QC-NUM-003"))
            if dtype != "f16":
                yield case("L2", f"{name}-small-weights", _small_weights(qt, dtype), _BOUNDED)
    deep = ((1, 8192, 64), (4, 4099, 9), (17, 2050, 1088))
    yield case("L2", "nf4-bf16-deep", _bounded("nf4", "bf16", deep, 64, 0), _BOUNDED)
