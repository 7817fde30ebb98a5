"""QC-GEMM4-004: what the bound lets pass and what it does not."""

from __future__ import annotations

import numpy as np
import pytest

from qcore_conformance import generators, oracle
from qcore_conformance.bounds import GemmDeclaration, check_gemm, gemm_bound
from qcore_conformance.floats import DTYPES, Floats, f32, rounded
from qcore_conformance.oracle import Product
from qcore_conformance.weights import random_weight

EXACT = GemmDeclaration(lanes=1, extra=0, weight_rounding="float32")


def _truth(value: float, magnitude: float) -> Product:
    return Product(np.array([[value]]), np.array([[magnitude]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_fail(dtype: str, bad: float) -> None:
    with pytest.raises(AssertionError, match="beyond the bound"):
        check_gemm(rounded([[bad]], dtype), _truth(1.0, 1.0), EXACT, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correctly_rounded_tie_passes_and_the_next_value_fails(dtype: str) -> None:
    """Half a unit in the last place is the largest error of a right result; one and a half is wrong."""
    ulp = 2.0 ** (1 - {"f32": 24, "f16": 11, "bf16": 8}[dtype])
    truth = _truth(1 + ulp / 2, 0.0)
    assert check_gemm(rounded([[1.0]], dtype), truth, EXACT, 0) <= 1.0
    with pytest.raises(AssertionError, match="beyond the bound"):
        check_gemm(rounded([[1 - ulp]], dtype), truth, EXACT, 0)


def test_the_bound_is_the_clauses() -> None:
    d, u = 10, 2.0**-24
    declaration = GemmDeclaration(lanes=2, extra=2, weight_rounding="compute")
    g = d * u / (1 - d * u)
    a = ((1 + g) * (1 + u) * (1 + 2.0**-8) - 1) * 7.0
    want = a + 2.0**-8 * (3.0 + a)
    assert gemm_bound(_truth(-3.0, 7.0), declaration, 16, "bf16")[0, 0] == pytest.approx(want, rel=1e-12)
    a = ((1 + g) * (1 + u) - 1) * 7.0
    assert gemm_bound(_truth(-3.0, 7.0), declaration, 16, "f32")[0, 0] == pytest.approx(a + u * (3 + a), rel=1e-12)


def test_denormal_outputs_get_half_a_denormal() -> None:
    tiny = 2.0**-24 / 2
    assert check_gemm(rounded([[0.0]], "f16"), _truth(tiny, tiny), EXACT, 1) <= 1.0


@pytest.mark.parametrize(
    ("declarations", "text"),
    [
        ({}, "declares nothing"),
        ({"gemm_4bit": {"weight_rounding": "float32"}}, "declared depth"),
        ({"gemm_4bit": {"depth": {"lanes": 0, "extra": 1}, "weight_rounding": "float32"}}, "lanes 0"),
        ({"gemm_4bit": {"depth": {"lanes": 1.5, "extra": 1}, "weight_rounding": "float32"}}, "lanes 1.5"),
        ({"gemm_4bit": {"depth": {"lanes": 1, "extra": -1}, "weight_rounding": "float32"}}, "extra -1"),
        ({"gemm_4bit": {"depth": {"lanes": 1, "extra": 1}, "weight_rounding": "bf16"}}, "weight_rounding 'bf16'"),
    ],
)
def test_an_incomplete_declaration_is_refused(declarations: dict[str, object], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        GemmDeclaration.parse(declarations)


def test_a_declared_depth_above_the_ceiling_fails() -> None:
    at = GemmDeclaration(lanes=1, extra=8, weight_rounding="float32")
    assert at.depth(100) == 108
    above = GemmDeclaration(lanes=1, extra=9, weight_rounding="float32")
    with pytest.raises(AssertionError, match="the ceiling is K"):
        above.depth(100)
    wide = GemmDeclaration(lanes=64, extra=12, weight_rounding="float32")
    assert wide.depth(1024) == 28
    with pytest.raises(AssertionError, match="the ceiling is K"):
        wide.depth(1)


def test_float32_sums_pass_and_half_precision_sums_fail() -> None:
    rng = generators.rng_for("accumulators", 0)
    m, n, k = 4, 16, 512
    weight = random_weight(rng, "nf4", 64, (n, k))
    x = generators.values("normal", rng, m * k, "f32").reshape(m, k)
    truth = oracle.gemm_4bit(x, weight.decoded(), None)
    xs, ws = x.f64().astype(np.float32), weight.decoded().f64().astype(np.float32)
    declaration = GemmDeclaration(lanes=1, extra=8, weight_rounding="float32")

    def chained(dtype: type[np.floating]) -> Floats:
        total = np.zeros((m, n), dtype=dtype)
        for i in range(k):
            total = (total + (xs[:, i : i + 1] * ws[:, i]).astype(dtype)).astype(dtype)
        return f32(total.astype(np.float32))

    assert 0 < check_gemm(chained(np.float32), truth, declaration, k) < 1
    with pytest.raises(AssertionError, match="beyond the bound"):
        check_gemm(chained(np.float16), truth, declaration, k)
