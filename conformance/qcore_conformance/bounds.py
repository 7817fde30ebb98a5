"""QC-GEMM4-004 and QC-INT8-012: how far a sum may be from the truth, from what the backend declares about its sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcore_conformance.floats import FORMATS, Floats
from qcore_conformance.oracle import Product

WEIGHT_ROUNDINGS = ("float32", "compute")
SCALED = "scaled"  # QC-INT8-011 allows it too
INT8_ROUNDINGS = 3  # of QC-INT8-012, besides those of the sum


@dataclass(frozen=True)
class GemmDeclaration:
    """What a backend declares of a product (QC-GEMM4-002, -009, QC-INT4-004, QC-INT8-012).

    ``d(K) = ceil(K / lanes) + extra``.
    """

    lanes: int
    extra: int
    weight_rounding: str
    op: str = "gemm_4bit"

    @classmethod
    def parse(cls, declarations: Mapping[str, Any], op: str = "gemm_4bit") -> GemmDeclaration:
        """Read ``declarations[op]``; ``AssertionError`` says what is missing or wrong."""
        said = declarations.get(op)
        assert isinstance(said, Mapping), (
            f"{op}: the backend declares nothing about it; describe() needs declarations "
            f'{{"{op}": {{"depth": {{"lanes": ..., "extra": ...}}, "weight_rounding": "float32" or "compute"}}}}'
        )
        depth = said.get("depth")
        assert isinstance(depth, Mapping), f"{op}: declared depth is {depth!r}, expected lanes and extra"
        lanes, extra = depth.get("lanes"), depth.get("extra")
        assert type(lanes) is int and lanes >= 1, f"{op}: declared lanes {lanes!r}, expected an integer >= 1"
        assert type(extra) is int and extra >= 0, f"{op}: declared extra {extra!r}, expected an integer >= 0"
        rounding = said.get("weight_rounding")
        allowed = (*WEIGHT_ROUNDINGS, SCALED) if op == "int8_linear_transposed" else WEIGHT_ROUNDINGS
        assert rounding in allowed, f"{op}: weight_rounding {rounding!r}, expected one of {allowed}"
        return cls(lanes, extra, rounding, op)

    def depth(self, k: int) -> int:
        """``d(K)``, refused above the spec's ceiling."""
        depth = -(-k // self.lanes) + self.extra
        assert depth <= k + 8, (
            f"{self.op}: declared depth d({k}) = ceil({k}/{self.lanes}) + {self.extra} = {depth}, "
            f"the ceiling is K + 8 = {k + 8} (QC-GEMM4-002)"
        )
        return depth


def gemm_bound(
    truth: Product, declaration: GemmDeclaration, k: int, dtype: str, roundings: int = 1
) -> NDArray[np.float64]:
    """The largest allowed ``|y - y*|``, elementwise; ``roundings`` to float32 besides those of the sum."""
    u = FORMATS["f32"].unit_roundoff
    out = FORMATS[dtype]
    du = declaration.depth(k) * u
    rounded = {"float32": (), "compute": ("f16", "bf16"), SCALED: ("bf16",)}[declaration.weight_rounding]
    u_w = out.unit_roundoff if dtype in rounded else 0.0
    g = du / (1 - du)
    a = ((1 + g) * (1 + u) ** roundings * (1 + u_w) - 1) * truth.magnitude
    bound = a + out.unit_roundoff * (np.abs(truth.exact) + a)
    denormal = np.abs(truth.exact) - bound < out.smallest_normal
    return np.asarray(bound + np.where(denormal, out.smallest_denormal / 2, 0.0))


def check_gemm(y: Floats, truth: Product, declaration: GemmDeclaration, k: int, roundings: int = 1) -> float:
    """Largest error over bound; ``AssertionError`` where ``not (error <= bound)``, so that NaN fails."""
    bound = gemm_bound(truth, declaration, k, y.dtype, roundings)
    with np.errstate(invalid="ignore"):
        error = np.abs(y.f64() - truth.exact)
        bad = ~(error <= bound)
    if bad.any():
        m, n = (int(i) for i in np.argwhere(bad)[0])
        clause = "QC-GEMM4-004" if roundings == 1 else "QC-INT8-012"
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} outputs beyond the bound ({clause}); first at [{m}, {n}]: got "
            f"{y.f64()[m, n]!r}, exact {truth.exact[m, n]!r}, error {error[m, n]:.3g}, bound {bound[m, n]:.3g}"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(bound > 0, error / bound, 0.0)
    return float(ratio.max(initial=0.0))
