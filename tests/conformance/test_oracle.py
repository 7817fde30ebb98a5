"""The two oracles against each other, against plain float32 arithmetic, and the golden vectors against their maker."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from qcore_conformance import generators, golden, oracle, scalar_oracle
from qcore_conformance.floats import DTYPES, Floats, differs, f32, rounded
from qcore_conformance.golden import make
from qcore_conformance.weights import random_weight

KINDS = tuple(generators.VALUES)


def _rng(*words: object) -> np.random.Generator:
    return generators.rng_for("/".join(map(str, words)), 0)


def _same(got: Floats, want: list[Any]) -> bool:
    return not differs(got.reshape(-1), rounded(np.array(want, dtype=np.float64).reshape(-1), got.dtype)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_quantization_agrees(dtype: str, kind: str) -> None:
    a = generators.values(kind, _rng(dtype, kind), 75, dtype)
    for quant_type in ("nf4", "fp4"):
        absmax, packed = scalar_oracle.quantize_4bit(a.f64().tolist(), quant_type, 32)
        got = oracle.quantize_4bit(a, quant_type, 32)
        assert _same(got.absmax, absmax)
        assert got.codes.tolist() == packed


@pytest.mark.parametrize("kind", ["normal", "nan-inf", "smallest", "largest", "zeros-mixed"])
@pytest.mark.parametrize("book", [*generators.CODEBOOKS, *generators.CUSTOM_CODEBOOKS])
def test_8bit_quantization_agrees(book: str, kind: str) -> None:
    rng = _rng(book, kind)
    code = generators.CODEBOOKS[book] if book in generators.CODEBOOKS else generators.custom_codebook(rng, book)
    points = np.concatenate([oracle.midpoints(code)[::9], code.astype(np.float64)[::11]])
    points = points[np.abs(points) <= 1]
    for a in (
        generators.values(kind, rng, 7, "f32"),
        Floats(generators.decision_points(points, 256, 1.0, "f32").bits[:24], "f32"),
    ):
        absmax, codes = scalar_oracle.quantize_blockwise(a.f64().tolist(), code.tolist(), 32)
        got = oracle.quantize_blockwise(a, code, 32)
        assert _same(got.absmax, absmax)
        assert got.codes.tolist() == codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lognormal", "bits", "denormal", "largest", "nan-inf"])
def test_dequantization_agrees(dtype: str, kind: str) -> None:
    rng = _rng(dtype, kind)
    absmax = generators.values(kind, rng, 3, "f32")
    packed = rng.integers(0, 256, 45, dtype=np.uint8)
    for quant_type in ("nf4", "fp4"):
        want = scalar_oracle.dequantize_4bit(packed.tolist(), absmax.f64().tolist(), quant_type, 89, 32, dtype)
        assert _same(oracle.dequantize_4bit(packed, absmax, quant_type, 89, 32, dtype), want)
    code = generators.CODEBOOKS["dynamic"]
    codes = rng.integers(0, 256, 89, dtype=np.uint8)
    want = scalar_oracle.dequantize_blockwise(codes.tolist(), absmax.f64().tolist(), code.tolist(), 32, dtype)
    assert _same(oracle.dequantize_blockwise(codes, absmax, code, 32, dtype), want)


@pytest.mark.parametrize("kind", ["lognormal", "bits", "equal", "nan-inf"])
@pytest.mark.parametrize("n", [0, 1, 255, 257, 700])
def test_the_offset_agrees(n: int, kind: str) -> None:
    absmax = generators.values(kind, _rng(n, kind), n, "f32")
    assert _same(f32([oracle.offset(absmax)]), [scalar_oracle.offset(absmax.f64().tolist())])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_quantization_agrees(kind: str, dtype: str) -> None:
    a = generators.values(kind, _rng(kind, dtype), 5 * 13, dtype).reshape(5, 13)
    for threshold in (0.0, 1.5, 6.0):
        codes, stats, columns = scalar_oracle.int8_quantize_rows(a.f64().tolist(), threshold)
        rows = oracle.int8_quantize_rows(a, threshold)
        assert (rows.codes.tolist(), rows.outlier_cols.tolist()) == (codes, columns)
        assert _same(rows.stats, stats)
        codes, stats = scalar_oracle.int8_quantize_cols(a.f64().tolist(), threshold)
        got_codes, got_stats = oracle.int8_quantize_cols(a, threshold)
        assert got_codes.tolist() == codes
        assert _same(got_stats, stats)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lognormal", "bits", "nan-inf"])
def test_int8_scaling_agrees(dtype: str, kind: str) -> None:
    rng = _rng(dtype, kind)
    c = rng.integers(-(2**31), 2**31, (3, 4), dtype=np.int32)
    rows, cols, bias = (generators.values(kind, rng, n, "f32") for n in (3, 4, 4))
    want = scalar_oracle.int8_dequantize_gemm(
        c.tolist(), rows.f64().tolist(), cols.f64().tolist(), bias.f64().tolist(), dtype
    )
    assert _same(oracle.int8_dequantize_gemm(c, rows, cols, bias, dtype), want)


def test_the_exact_product_is_the_rational_one() -> None:
    rng = _rng("product")
    weight = random_weight(rng, "nf4", 32, (4, 37), 32)
    x, bias = (
        generators.values("normal", rng, 3 * 37, "bf16").reshape(3, 37),
        generators.values("normal", rng, 4, "f32"),
    )
    got = oracle.gemm_4bit(x, weight.decoded(), bias)
    want = scalar_oracle.gemm_4bit(x.f64().tolist(), weight.decoded().f64().tolist(), bias.f64().tolist())
    for m in range(3):
        for n in range(4):
            assert abs(Fraction(got.exact[m, n]) - want[m][n]) <= Fraction(got.magnitude[m, n]) * Fraction(2) ** -46


@pytest.mark.parametrize(
    ("scalar", "numpy"),
    [(scalar_oracle.mul, np.multiply), (scalar_oracle.add, np.add), (scalar_oracle.div, np.divide)],
)
def test_scalar_arithmetic_is_ieee(scalar: Callable[[float, float], float], numpy: np.ufunc) -> None:
    rng = _rng(numpy.__name__)
    for kind in ("bits", "denormal", "largest", "lognormal", "nan-inf"):
        a, b = (generators.values(kind, rng, 300, "f32") for _ in range(2))
        with np.errstate(all="ignore"):
            want = f32(numpy(a.bits.view(np.float32), b.bits.view(np.float32)))
        if numpy is np.divide:  # used with a non-zero dividend only
            keep = a.f64() != 0
            a, b, want = (Floats(part.bits[keep], "f32") for part in (a, b, want))
        got = [scalar(p, q) for p, q in zip(a.f64().tolist(), b.f64().tolist())]
        assert _same(want, got)


def test_golden_vectors_are_what_the_maker_makes() -> None:
    for maker in make.MAKERS:
        made = list(maker(generators.rng_for(f"golden/{maker.__name__}", 1)))
        kept = golden.vectors(maker.__name__)
        assert [entry["name"] for entry in kept] == [name for name, *_ in made]
        for entry, (_, arguments, inputs, outputs) in zip(kept, made):
            assert entry["arguments"] == arguments
            assert entry["inputs"] == {key: golden.encode(value) for key, value in inputs.items()}
            assert entry["outputs"] == {key: golden.encode(value) for key, value in outputs.items()}


def test_a_changed_golden_file_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in golden.DIRECTORY.glob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    entries = json.loads((tmp_path / "int8_gemm.json").read_text())
    entries[0]["outputs"]["out"]["hex"] = entries[0]["outputs"]["out"]["hex"][::-1]
    (tmp_path / "int8_gemm.json").write_text(json.dumps(entries))
    monkeypatch.setattr(golden, "DIRECTORY", tmp_path)
    golden.vectors.cache_clear()
    with pytest.raises(ValueError, match="SHA-256"):
        golden.vectors("int8_gemm")
    golden.vectors.cache_clear()


def test_a_changed_codebook_is_noticed() -> None:
    table = generators.CODEBOOKS["dynamic"].copy()
    golden.check_codebook("dynamic", table)
    table[3] = np.nextafter(table[3], np.float32(0))
    with pytest.raises(AssertionError, match="not the one that the spec names"):
        golden.check_codebook("dynamic", table)


def test_the_seed_depends_on_case_and_run() -> None:
    first, again = generators.rng_for("a/L1/b", 5).random(4), generators.rng_for("a/L1/b", 5).random(4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, generators.rng_for("a/L1/b", 6).random(4))
    assert not np.array_equal(first, generators.rng_for("a/L1/c", 5).random(4))
