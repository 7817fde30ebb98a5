"""One guarded call per op: arrays in, arrays out. The only place of the suite that knows the ops' signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcore_conformance.floats import Floats
from qcore_conformance.oracle import Nested, Quantized, Rows
from qcore_conformance.weights import Int4Weight, Weight

if TYPE_CHECKING:
    from qcore_conformance.session import Session


def _form(shape: tuple[int, ...], dtype: str) -> Any:
    from qcore_conformance.session import (
        empty,
    )  # torch is imported where a backend is called, not where cases are listed

    return empty(shape, dtype)


def quantize_blockwise(s: Session, a: Floats, code: NDArray[np.float32], blocksize: int) -> Quantized:
    r = s.call(
        "quantize_blockwise",
        {"A": a, "code": code},
        {"absmax": _form((-(-a.size // blocksize),), "f32"), "out": _form(a.shape, "u8")},
        lambda b, t: b.quantize_blockwise(t["A"], t["code"], blocksize, absmax=t["absmax"], out=t["out"]),
    )
    return Quantized(r["absmax"], r["out"])


def dequantize_blockwise(
    s: Session, codes: NDArray[np.uint8], absmax: Floats, code: NDArray[np.float32], blocksize: int, dtype: str
) -> Floats:
    r = s.call(
        "dequantize_blockwise",
        {"A": codes, "absmax": absmax, "code": code},
        {"out": _form(codes.shape, dtype)},
        lambda b, t: b.dequantize_blockwise(t["A"], t["absmax"], t["code"], blocksize, out=t["out"]),
    )
    return r["out"]


def quantize_4bit(s: Session, a: Floats, quant_type: str, blocksize: int) -> Quantized:
    r = s.call(
        "quantize_4bit",
        {"A": a},
        {"absmax": _form((-(-a.size // blocksize),), "f32"), "out": _form(((a.size + 1) // 2,), "u8")},
        lambda b, t: b.quantize_4bit(t["A"], quant_type, blocksize, absmax=t["absmax"], out=t["out"]),
    )
    return Quantized(r["absmax"], r["out"])


def dequantize_4bit(s: Session, weight: Weight, dtype: str) -> Floats:
    r = s.call(
        "dequantize_4bit",
        weight.inputs(),
        {"out": _form(weight.shape, dtype)},
        lambda b, t: b.dequantize_4bit(weight.bind(t), out=t["out"]),
    )
    return r["out"]


def quantize_absmax(s: Session, absmax: Floats, code: NDArray[np.float32], blocksize: int) -> Nested:
    r = s.call(
        "quantize_absmax",
        {"absmax": absmax, "code": code},
        {
            "out": _form(absmax.shape, "u8"),
            "nested_absmax": _form((-(-absmax.size // blocksize),), "f32"),
            "offset": _form((1,), "f32"),
        },
        lambda b, t: b.quantize_absmax(
            t["absmax"], t["code"], blocksize, out=t["out"], nested_absmax=t["nested_absmax"], offset=t["offset"]
        ),
    )
    return Nested(r["out"], r["nested_absmax"], r["offset"])


def dequantize_absmax(
    s: Session,
    codes: NDArray[np.uint8],
    nested_absmax: Floats,
    code: NDArray[np.float32],
    offset: Floats,
    blocksize: int,
) -> Floats:
    r = s.call(
        "dequantize_absmax",
        {"A": codes, "nested_absmax": nested_absmax, "code": code, "offset": offset},
        {"out": _form(codes.shape, "f32")},
        lambda b, t: b.dequantize_absmax(t["A"], t["nested_absmax"], t["code"], t["offset"], blocksize, out=t["out"]),
    )
    return r["out"]


def gemm_4bit(s: Session, x: Floats, weight: Weight, bias: Floats | None = None, *, prepared: bool = False) -> Floats:
    """``prepared`` goes through ``prepare_gemm_4bit``, as a layer does."""

    def invoke(b: Any, t: dict[str, Any]) -> None:
        if prepared:
            b.prepare_gemm_4bit(weight.bind(t))(t["X"], t["bias"], t["out"])
        else:
            b.gemm_4bit(t["X"], weight.bind(t), t["bias"], out=t["out"])

    r = s.call(
        "gemm_4bit",
        {"X": x, "bias": bias} | weight.inputs(),
        {"out": _form((x.shape[0], weight.shape[0]), x.dtype)},
        invoke,
    )
    return r["out"]


def gemm_4bit_transposed(s: Session, y: Floats, weight: Weight, *, prepared: bool = False) -> Floats:
    """``prepared`` goes through ``prepare_gemm_4bit_transposed``."""

    def invoke(b: Any, t: dict[str, Any]) -> None:
        if prepared:
            b.prepare_gemm_4bit_transposed(weight.bind(t))(t["Y"], t["out"])
        else:
            b.gemm_4bit_transposed(t["Y"], weight.bind(t), out=t["out"])

    outputs = {"out": _form((y.shape[0], weight.shape[1]), y.dtype)}
    return s.call("gemm_4bit_transposed", {"Y": y} | weight.inputs(), outputs, invoke)["out"]


def int8_quantize_rows(s: Session, a: Floats, threshold: float, *, want_columns: bool = True) -> Rows:
    """Without ``want_columns`` the optional output is absent; it comes back as zeros."""
    m, k = a.shape
    outputs = {"out": _form((m, k), "i8"), "row_stats": _form((m,), "f32")}
    if want_columns:
        outputs["outlier_cols"] = _form((k,), "u8")
    r = s.call(
        "int8_quantize_rows",
        {"A": a},
        outputs,
        lambda b, t: b.int8_quantize_rows(
            t["A"], threshold, out=t["out"], row_stats=t["row_stats"], outlier_cols=t.get("outlier_cols")
        ),
    )
    return Rows(r["out"], r["row_stats"], r.get("outlier_cols", np.zeros(k, dtype=np.uint8)))


class Columns(NamedTuple):
    codes: NDArray[np.int8]
    stats: Floats


def int8_quantize_cols(s: Session, a: Floats, threshold: float) -> Columns:
    m, k = a.shape
    r = s.call(
        "int8_quantize_cols",
        {"A": a},
        {"out": _form((m, k), "i8"), "col_stats": _form((k,), "f32")},
        lambda b, t: b.int8_quantize_cols(t["A"], threshold, out=t["out"], col_stats=t["col_stats"]),
    )
    return Columns(r["out"], r["col_stats"])


def int8_gemm(s: Session, a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    r = s.call(
        "int8_gemm",
        {"A": a, "B": b},
        {"out": _form((a.shape[0], b.shape[0]), "i32")},
        lambda backend, t: backend.int8_gemm(t["A"], t["B"], out=t["out"]),
    )
    return r["out"]


def int8_dequantize_gemm(
    s: Session, c: NDArray[np.int32], row_stats: Floats, col_stats: Floats, bias: Floats | None, dtype: str
) -> Floats:
    r = s.call(
        "int8_dequantize_gemm",
        {"C": c, "row_stats": row_stats, "col_stats": col_stats, "bias": bias},
        {"out": _form(c.shape, dtype)},
        lambda b, t: b.int8_dequantize_gemm(t["C"], t["row_stats"], t["col_stats"], t["bias"], out=t["out"]),
    )
    return r["out"]


def int8_scaled_gemm(
    s: Session,
    a: NDArray[np.int8],
    b: NDArray[np.int8],
    row_stats: Floats,
    col_stats: Floats,
    bias: Floats | None,
    dtype: str,
) -> Floats:
    r = s.call(
        "int8_scaled_gemm",
        {"A": a, "B": b, "row_stats": row_stats, "col_stats": col_stats, "bias": bias},
        {"out": _form((a.shape[0], b.shape[0]), dtype)},
        lambda backend, t: backend.int8_scaled_gemm(
            t["A"], t["B"], t["row_stats"], t["col_stats"], t["bias"], out=t["out"]
        ),
    )
    return r["out"]


class Linear(NamedTuple):
    out: Floats
    outliers: NDArray[np.uint8]


def int8_linear(
    s: Session,
    a: Floats,
    b: NDArray[np.int8],
    col_stats: Floats,
    threshold: float,
    bias: Floats | None,
    *,
    prepared: bool = False,
) -> Linear:
    """``prepared`` goes through ``prepare_int8_linear``, as a layer does."""
    (m, k), n = a.shape, len(b)
    outputs = {"out": _form((m, n), a.dtype)} | ({"outliers": _form((k,), "u8")} if threshold > 0 else {})

    def call(backend: Any, t: Any) -> None:
        from qcore.backend import Weight8bit

        w = Weight8bit(t["codes"], t["scales"])
        if prepared:
            backend.prepare_int8_linear(w)(t["A"], threshold, t["bias"], t["out"], t.get("outliers"))
        else:
            backend.int8_linear(t["A"], w, threshold, t["bias"], out=t["out"], outliers=t.get("outliers"))

    r = s.call("int8_linear", {"A": a, "codes": b, "scales": col_stats, "bias": bias}, outputs, call)
    return Linear(r["out"], r.get("outliers", np.zeros(k, dtype=np.uint8)))


def int8_linear_transposed(
    s: Session, y: Floats, b: NDArray[np.int8], col_stats: Floats, *, prepared: bool = False
) -> Floats:
    """``prepared`` goes through ``prepare_int8_linear_transposed``."""

    def invoke(backend: Any, t: dict[str, Any]) -> None:
        from qcore.backend import Weight8bit

        w = Weight8bit(t["codes"], t["scales"])
        if prepared:
            backend.prepare_int8_linear_transposed(w)(t["A"], t["out"])
        else:
            backend.int8_linear_transposed(t["A"], w, out=t["out"])

    outputs = {"out": _form((y.shape[0], b.shape[1]), y.dtype)}
    return s.call("int8_linear_transposed", {"A": y, "codes": b, "scales": col_stats}, outputs, invoke)["out"]


def gemm_int4(
    s: Session, x: Floats, weight: Int4Weight, bias: Floats | None = None, *, prepared: bool = False
) -> Floats:
    """``prepared`` goes through ``prepare_gemm_int4``, as a layer does."""

    def invoke(b: Any, t: dict[str, Any]) -> None:
        if prepared:
            b.prepare_gemm_int4(weight.bind(t))(t["X"], t["bias"], t["out"])
        else:
            b.gemm_int4(t["X"], weight.bind(t), t["bias"], out=t["out"])

    r = s.call(
        "gemm_int4",
        {"X": x, "bias": bias} | weight.inputs(),
        {"out": _form((x.shape[0], weight.shape[0]), x.dtype)},
        invoke,
    )
    return r["out"]


def int8_dequantize_rows(s: Session, codes: NDArray[np.int8], row_stats: Floats, dtype: str) -> Floats:
    r = s.call(
        "int8_dequantize_rows",
        {"A": codes, "row_stats": row_stats},
        {"out": _form(codes.shape, dtype)},
        lambda b, t: b.int8_dequantize_rows(t["A"], t["row_stats"], out=t["out"]),
    )
    return r["out"]
