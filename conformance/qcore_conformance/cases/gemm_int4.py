"""The product with integers in groups: QC-INT4-001 to QC-INT4-008, exact probes and the declared-depth bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qcore_conformance import bounds, calls, generators, oracle
from qcore_conformance.checks import expect_floats
from qcore_conformance.floats import DTYPES, Floats, is_nan, rounded
from qcore_conformance.model import Case, NotRun
from qcore_conformance.session import Session, empty
from qcore_conformance.weights import Int4Weight, integer_int4, random_int4

_OP = "gemm_int4"
_EXACT = ("QC-INT4-001", "QC-INT4-002", "QC-INT4-006")
_BOUNDED = ("QC-INT4-002", "QC-INT4-004", "QC-INT4-005")
_SCALES = ("f32", "f16", "bf16")


def _one_hot(
    dtype: str, m: int, k: int, group: int, kind: str, zeros: bool, ordered: bool
) -> Callable[[Session], None]:
    """Every column of K alone, ``m`` rows a call: the output is the decoded weight, rounded once."""

    def run(s: Session) -> None:
        weight = random_int4(s.rng, group, (37, k), kind, zeros=zeros, ordered=ordered)
        decoded, eye = weight.decoded(dtype), rounded(np.eye(k), dtype)
        # The last call holds the last m columns, so that each call has m rows.
        for i, start in enumerate([*range(0, k - m, m), k - m]):
            x = Floats(eye.bits[start : start + m], dtype)
            y = calls.gemm_int4(s, x, weight, prepared=i % 2 == 1)
            want = Floats(decoded.bits[:, start : start + m].T.copy(), dtype)
            expect_floats(f"one-hot rows {start} to {start + m - 1}", y, want, zero_sign=False)

    return run


def _any_zero_point(dtype: str) -> Callable[[Session], None]:
    """Zero points of every byte, those beyond the codes included."""

    def run(s: Session) -> None:
        n, k = 64, 128
        weight = random_int4(s.rng, 32, (n, k), "f16")
        zeros = np.arange(256, dtype=np.uint8).reshape(n, 4)
        weight = Int4Weight(weight.packed, weight.scales, zeros, 32, (n, k))
        decoded = weight.decoded(dtype)
        for m in (1, 16, 40):
            columns = s.rng.choice(k, m, replace=False)
            y = calls.gemm_int4(s, Floats(rounded(np.eye(k), dtype).bits[columns], dtype), weight)
            want = Floats(decoded.bits[:, columns].T.copy(), dtype)
            expect_floats(f"zero points 0 to 255 (M={m})", y, want, zero_sign=False)

    return run


def _integers(dtype: str, bias: str | None) -> Callable[[Session], None]:
    """Sums of small integers: exact in any order, so the result is exact, rounded once."""

    def run(s: Session) -> None:
        for i, (m, n, k, group) in enumerate(
            ((1, 33, 67, 32), (2, 64, 128, 64), (5, 31, 200, 40), (16, 48, 96, 16), (33, 17, 257, 128),
             (129, 9, 64, 64), (1, 130, 1024, 128), (1, 65, 576, 576)),
        ):  # fmt: skip
            weight = integer_int4(s.rng, group, (n, k), zeros=i % 3 != 2, ordered=i % 2 == 1)
            x = rounded(s.rng.integers(-8, 9, (m, k)), dtype)
            b = None if bias is None else rounded(s.rng.integers(-64, 65, n), bias)
            truth = oracle.gemm_4bit(x, weight.decoded(), b)
            y = calls.gemm_int4(s, x, weight, b)
            expect_floats(f"Y (M={m}, N={n}, K={k})", y, rounded(truth.exact, dtype), zero_sign=False)

    return run


def _bounded(
    dtype: str, sizes: tuple[tuple[int, int, int], ...], group: int, kind: str, bias: str | None, ordered: bool
) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for i, (m, n, k) in enumerate(sizes):
            g = group or k
            weight = random_int4(s.rng, g, (n, k), kind, zeros=i % 2 == 0, ordered=ordered)
            x = generators.values("normal", s.rng, m * k, dtype).reshape(m, k)
            b = None if bias is None else generators.values("normal", s.rng, n, bias)
            y = calls.gemm_int4(s, x, weight, b, prepared=i % 2 == 1)
            s.record(bounds.check_gemm(y, oracle.gemm_4bit(x, weight.decoded(), b), s.gemm_int4, k))

    return run


def _small(dtype: str) -> Callable[[Session], None]:
    """Denormal float16 inputs and outputs are kept, and so are small scales: nothing on the way flushes."""

    def run(s: Session) -> None:
        for m in (1, 5, 40):
            weight = random_int4(s.rng, 64, (19, 192), "f32")
            scale = 2.0**-20 if dtype == "f16" else 2.0**-100
            x = rounded(s.rng.standard_normal((m, 192)) * scale, dtype)
            y = calls.gemm_int4(s, x, weight)
            s.record(bounds.check_gemm(y, oracle.gemm_4bit(x, weight.decoded(), None), s.gemm_int4, 192))
        if dtype == "f16":
            return
        tiny = rounded(weight.scales.f64() * 2.0**-110, "f32")  # 16 times as much meets x of 2^100
        weight = Int4Weight(weight.packed, tiny, weight.zeros, 64, (19, 192))
        for m in (1, 5, 40):
            x = rounded(s.rng.standard_normal((m, 192)) * 2.0**100, dtype)
            y = calls.gemm_int4(s, x, weight)
            s.record(bounds.check_gemm(y, oracle.gemm_4bit(x, weight.decoded(), None), s.gemm_int4, 192))

    return run


def _independent_rows(dtype: str) -> Callable[[Session], None]:
    """QC-INT4-007: NaN and infinities stay in their row, and a NaN fills it, where its weights are 0 too."""

    def run(s: Session) -> None:
        n, k = 29, 160
        for m in (2, 9, 17, 65):
            weight = random_int4(s.rng, 32, (n, k), ordered=m == 9)
            packed, zeros = weight.packed.copy(), np.full_like(weight.zeros, 8)
            packed[3] = 0x88  # a row of zeros
            weight = Int4Weight(packed, weight.scales, zeros, 32, (n, k), weight.perm)
            x = generators.values("normal", s.rng, m * k, dtype).reshape(m, k)
            clean = calls.gemm_int4(s, x, weight)
            for value in (np.nan, np.inf):
                row, column = int(s.rng.integers(m)), int(s.rng.choice([0, k - 1, int(s.rng.integers(k))]))
                dirty = x.bits.copy()
                dirty[row, column] = rounded([value], dtype).bits[0]
                y = calls.gemm_int4(s, Floats(dirty, dtype), weight)
                others = np.arange(m) != row
                got, want = Floats(y.bits[others], dtype), Floats(clean.bits[others], dtype)
                expect_floats(f"rows beside row {row} with a {value}", got, want)
                if np.isnan(value):
                    assert is_nan(y).reshape(m, n)[row].all(), f"X[{row}, {column}] is NaN, row {row} of Y not all NaN"

    return run


def _same_weights(dtype: str) -> Callable[[Session], None]:
    """QC-INT4-002: the weights have one value whatever M is: a one-hot row gives the same bits beside any others."""

    def run(s: Session) -> None:
        n, k = 21, 192
        weight = random_int4(s.rng, 64, (n, k), "f32")
        decoded = weight.decoded(dtype)
        for m in generators.ROW_COUNTS:
            x = rounded(s.rng.standard_normal((m, k)), dtype)
            row, column = int(s.rng.integers(m)), int(s.rng.integers(k))
            x.bits[row] = rounded(np.eye(k)[column], dtype).bits
            got = Floats(calls.gemm_int4(s, x, weight).bits[row], dtype)
            want = Floats(decoded.bits[:, column].copy(), dtype)
            expect_floats(f"one-hot row {row} of M={m}", got, want, zero_sign=False)

    return run


def _padding(s: Session) -> None:
    """QC-INT4-001: the last nibble of a row with an odd K means nothing."""
    for m in (1, 7, 33):
        weight = random_int4(s.rng, 32, (11, 67))
        x = rounded(s.rng.standard_normal((m, 67)), "bf16")
        packed = weight.packed.copy()
        packed[:, -1] ^= 0x0F
        other = Int4Weight(packed, weight.scales, weight.zeros, 32, weight.shape)
        expect_floats(f"Y (M={m})", calls.gemm_int4(s, x, other), calls.gemm_int4(s, x, weight))


def _empty(s: Session) -> None:
    """QC-INT4-008."""
    for dtype in DTYPES:
        bias = generators.values("normal", s.rng, 5, dtype)
        for m, n, k in ((0, 5, 64), (3, 0, 64), (0, 0, 0), (0, 5, 0)):
            weight = random_int4(s.rng, 64, (n, k), ordered=m == 3)
            x = generators.values("normal", s.rng, m * k, dtype).reshape(m, k)
            assert calls.gemm_int4(s, x, weight, bias if n == 5 else None).shape == (m, n)
        for ordered in (False, True):
            weight = random_int4(s.rng, 64, (5, 0), ordered=ordered)
            for m in generators.ROW_COUNTS:
                x = rounded(np.zeros((m, 0)), dtype)
                expect_floats(f"Y (M={m}, K=0)", calls.gemm_int4(s, x, weight), rounded(np.zeros((m, 5)), dtype))
                want = Floats(np.tile(bias.bits, (m, 1)), dtype)
                expect_floats(f"Y (M={m}, K=0, bias)", calls.gemm_int4(s, x, weight, bias), want)


def _ceiling(s: Session) -> None:
    """QC-GEMM4-002: a declared depth above K + 8 is refused for every K that the suite uses."""
    for k in range(4097):
        s.gemm_int4.depth(k)


def _bad_order(bad: int) -> Callable[[Session], None]:
    """A column that is not there is refused where the host can read the permutation."""

    def run(s: Session) -> None:
        from qcore.errors import InvalidArgument

        if not s.on_host:
            raise NotRun("a backend of a device cannot read perm without synchronising; the frontend checks it")
        weight = random_int4(s.rng, 32, (5, 96), ordered=True)
        inputs: dict[str, Any] = {"X": rounded(np.ones((2, 96)), "f32")} | weight.inputs()
        inputs["perm"] = np.where(weight.perm == 17, bad, weight.perm).astype(np.int32)

        def invoke(t: Mapping[str, Any]) -> None:
            try:
                s.backend.gemm_int4(t["X"], weight.bind(dict(t)), None, out=t["out"])
            except InvalidArgument:
                return
            raise AssertionError(f"{_OP}: perm with the entry {bad} was not refused for K = 96 (QC-INT4-003)")

        s.call_refused(inputs, {"out": empty((2, 5), "f32")}, invoke)

    return run


def cases() -> Iterator[Case]:
    def case(level: str, name: str, run: Callable[[Session], None], clauses: tuple[str, ...], **params: Any) -> Case:
        return Case(f"{_OP}/{level}/{name}", _OP, level, clauses, run, params)

    yield case("L0", "declared-depth-ceiling", _ceiling, ("QC-INT4-004",))
    for bad in (-1, 96, 2**31 - 1):
        yield case("L0", f"perm-entry-{bad}", _bad_order(bad), ("QC-INT4-003", "QC-NUM-006"))
    yield case("L1", "empty", _empty, ("QC-INT4-008", "QC-NUM-005"))
    yield case("L1", "padding-nibble", _padding, ("QC-INT4-001",))
    rows = tuple((m, 45, 192) for m in generators.ROW_COUNTS)
    for dtype in DTYPES:
        for i, (m, k, group) in enumerate(
            ((1, 131, 64), (1, 256, 32), (2, 96, 32), (4, 130, 16), (8, 129, 128), (16, 200, 40), (33, 131, 131),
             (65, 264, 64), (128, 128, 64), (192, 192, 192), (40, 256, 64), (128, 128, 8)),
        ):  # fmt: skip
            kind, zeros, ordered = _SCALES[i % 3], i % 4 != 1, i % 3 == 2
            label = f"{dtype}-one-hot-m{m}-k{k}-g{group}-{kind}" + "-perm" * ordered + "-symmetric" * (not zeros)
            clauses = (*_EXACT, *(("QC-INT4-003",) if ordered else ()))
            yield case("L1", label, _one_hot(dtype, m, k, group, kind, zeros, ordered), clauses)
        yield case("L1", f"{dtype}-any-zero-point", _any_zero_point(dtype), ("QC-INT4-001", "QC-INT4-002"))
        for bias in (None, dtype) if dtype == "f32" else (None, dtype, "f32"):
            yield case(
                "L1", f"{dtype}-integers-bias-{bias or 'none'}", _integers(dtype, bias), (*_EXACT, "QC-INT4-004")
            )
        yield case("L1", f"{dtype}-same-weights", _same_weights(dtype), ("QC-INT4-002", "QC-INT4-006"))
        yield case("L1", f"{dtype}-independent-rows", _independent_rows(dtype), ("QC-INT4-007",))
        yield case("L2", f"{dtype}-rows", _bounded(dtype, rows, 64, "f16", None, False), _BOUNDED)
        sizes = (
            (1, 33, 1),
            (1, 1, 2),
            (3, 17, 31),
            (1, 40, 65),
            (5, 40, 63),
            (1, 64, 1024),
            (6, 24, 577),
            (70, 20, 129),
            (40, 33, 1100),
        )
        for bias in (None, dtype) if dtype == "f32" else (dtype, "f32"):
            run = _bounded(dtype, sizes, 32, "bf16", bias, False)
            yield case("L2", f"{dtype}-odd-sizes-bias-{bias or 'none'}", run, _BOUNDED)
        for group in (16, 24, 32, 64, 128, 0):
            few = ((1, 35, 320), (12, 35, 160), (40, 19, 448), (1, 20, 576))
            run = _bounded(dtype, few, group, _SCALES[group % 3], dtype, group % 32 == 0)
            yield case("L2", f"{dtype}-g{group or 'k'}", run, (*_BOUNDED, "QC-INT4-003"), group=group)
        yield case("L2", f"{dtype}-small", _small(dtype), (*_BOUNDED, "QC-NUM-003"))
    deep = ((1, 9, 8192), (4, 5, 4099), (4, 5, 8256), (20, 5, 8200))
    yield case("L2", "bf16-deep", _bounded("bf16", deep, 64, "f16", None, False), _BOUNDED)
