"""Make the golden vectors with the scalar oracle: ``python -m qcore_conformance.golden.make``.

Run it only when a clause changes; the difference of the files is then part of that change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcore import codebooks
from qcore_conformance import generators, scalar_oracle
from qcore_conformance.floats import DTYPES, Floats, f32, rounded
from qcore_conformance.generators import CODEBOOKS, Rng
from qcore_conformance.golden import DIRECTORY, encode

Arrays = dict[str, Floats | NDArray[Any]]
Vector = tuple[str, dict[str, Any], Arrays, Arrays]  # name, arguments, inputs, outputs


def _floats(values: list[float], dtype: str = "f32") -> Floats:
    return rounded(np.array(values, dtype=np.float64), dtype)  # exact: the oracle has rounded already


def _bytes(values: Any, dtype: type[Any] = np.uint8) -> NDArray[Any]:
    return np.array(values, dtype=dtype)


def _inputs(rng: Rng, dtype: str, blocksize: int) -> Iterator[tuple[str, Floats]]:
    yield "normal", generators.values("normal", rng, 2 * blocksize + 9, dtype)
    yield "specials", generators.values("nan-inf", rng, blocksize + 5, dtype)
    yield "denormal", generators.values("smallest", rng, blocksize + 1, dtype)


def quantize_blockwise(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        for book in ("dynamic", "fp8"):
            for kind, a in _inputs(rng, dtype, 32):
                absmax, codes = scalar_oracle.quantize_blockwise(a.f64().tolist(), CODEBOOKS[book].tolist(), 32)
                outputs: Arrays = {"absmax": _floats(absmax), "codes": _bytes(codes)}
                yield f"{dtype}-{book}-{kind}", {"blocksize": 32}, {"A": a, "code": f32(CODEBOOKS[book])}, outputs


def dequantize_blockwise(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        codes = rng.integers(0, 256, 101, dtype=np.uint8)
        absmax = generators.values("lognormal", rng, 4, "f32")
        code = CODEBOOKS["dynamic"]
        out = scalar_oracle.dequantize_blockwise(codes.tolist(), absmax.f64().tolist(), code.tolist(), 32, dtype)
        inputs: Arrays = {"A": codes, "absmax": absmax, "code": f32(code)}
        yield dtype, {"blocksize": 32, "dtype": dtype}, inputs, {"out": _floats(out, dtype)}


def quantize_4bit(rng: Rng) -> Iterator[Vector]:
    for quant_type in ("nf4", "fp4"):
        for dtype in DTYPES:
            for kind, a in _inputs(rng, dtype, 64):
                absmax, packed = scalar_oracle.quantize_4bit(a.f64().tolist(), quant_type, 64)
                arguments = {"quant_type": quant_type, "blocksize": 64}
                outputs: Arrays = {"absmax": _floats(absmax), "codes": _bytes(packed)}
                yield f"{quant_type}-{dtype}-{kind}", arguments, {"A": a}, outputs


def dequantize_4bit(rng: Rng) -> Iterator[Vector]:
    for quant_type in ("nf4", "fp4"):
        for dtype in DTYPES:
            packed = rng.integers(0, 256, 79, dtype=np.uint8)
            absmax = generators.values("lognormal", rng, 5, "f32")
            out = scalar_oracle.dequantize_4bit(packed.tolist(), absmax.f64().tolist(), quant_type, 157, 32, dtype)
            arguments = {"quant_type": quant_type, "blocksize": 32, "shape": [157], "dtype": dtype}
            yield f"{quant_type}-{dtype}", arguments, {"packed": packed, "absmax": absmax}, {"out": _floats(out, dtype)}


def quantize_absmax(rng: Rng) -> Iterator[Vector]:
    for n in (5, 300, 601):
        absmax = generators.values("lognormal", rng, n, "f32")
        code = CODEBOOKS["dynamic"]
        codes, nested, offset = scalar_oracle.quantize_absmax(absmax.f64().tolist(), code.tolist(), 256)
        outputs: Arrays = {"codes": _bytes(codes), "nested_absmax": _floats(nested), "offset": _floats([offset])}
        yield f"n{n}", {"blocksize": 256}, {"absmax": absmax, "code": f32(code)}, outputs


def dequantize_absmax(rng: Rng) -> Iterator[Vector]:
    codes = rng.integers(0, 256, 150, dtype=np.uint8)
    nested, offset = generators.values("lognormal", rng, 3, "f32"), generators.values("normal", rng, 1, "f32")
    code = CODEBOOKS["dynamic"]
    out = scalar_oracle.dequantize_absmax(
        codes.tolist(), nested.f64().tolist(), code.tolist(), float(offset.f64()[0]), 64
    )
    inputs: Arrays = {"A": codes, "nested_absmax": nested, "code": f32(code), "offset": offset}
    yield "n150", {"blocksize": 64}, inputs, {"out": _floats(out)}


def gemm_4bit(rng: Rng) -> Iterator[Vector]:
    m, n, k = 3, 7, 77
    for quant_type in ("nf4", "fp4"):
        for dtype in DTYPES:
            packed = rng.integers(0, 256, (n * k + 1) // 2, dtype=np.uint8)
            absmax = rounded(rng.uniform(0.2, 2, -(-n * k // 64)), "f32")
            x = generators.values("normal", rng, m * k, dtype).reshape(m, k)
            bias = generators.values("normal", rng, n, dtype)
            flat = scalar_oracle.dequantize_4bit(packed.tolist(), absmax.f64().tolist(), quant_type, n * k, 64, "f32")
            weights = [flat[i * k : (i + 1) * k] for i in range(n)]
            exact = scalar_oracle.gemm_4bit(x.f64().tolist(), weights, bias.f64().tolist())
            positive = [[abs(w) for w in row] for row in weights]
            size = scalar_oracle.gemm_4bit(np.abs(x.f64()).tolist(), positive, np.abs(bias.f64()).tolist())
            outputs: Arrays = {
                "exact": np.array([[float(v) for v in row] for row in exact]),
                "magnitude": np.array([[float(v) for v in row] for row in size]),
            }
            arguments = {"quant_type": quant_type, "blocksize": 64, "shape": [n, k]}
            inputs: Arrays = {"X": x, "packed": packed, "absmax": absmax, "bias": bias}
            yield f"{quant_type}-{dtype}", arguments, inputs, outputs


def _matrix(rng: Rng, dtype: str, kind: str) -> Floats:
    return generators.values(kind, rng, 6 * 29, dtype).reshape(6, 29)


def int8_quantize_rows(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        for kind in ("normal", "nan-inf"):
            for threshold in (0.0, 2.0):
                a = _matrix(rng, dtype, kind)
                codes, stats, columns = scalar_oracle.int8_quantize_rows(a.f64().tolist(), threshold)
                outputs: Arrays = {
                    "codes": _bytes(codes, np.int8),
                    "stats": _floats(stats),
                    "outlier_cols": _bytes(columns),
                }
                yield f"{dtype}-{kind}-threshold{threshold:g}", {"threshold": threshold}, {"A": a}, outputs


def int8_quantize_cols(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        for kind in ("normal", "nan-inf"):
            for threshold in (0.0, 2.0):
                a = _matrix(rng, dtype, kind)
                codes, stats = scalar_oracle.int8_quantize_cols(a.f64().tolist(), threshold)
                outputs: Arrays = {"codes": _bytes(codes, np.int8), "stats": _floats(stats)}
                yield f"{dtype}-{kind}-threshold{threshold:g}", {"threshold": threshold}, {"A": a}, outputs


def _int8_factors(rng: Rng, m: int, n: int, k: int) -> tuple[Arrays, list[list[int]]]:
    a, b = rng.integers(-128, 128, (m, k), dtype=np.int8), rng.integers(-128, 128, (n, k), dtype=np.int8)
    return {"A": a, "B": b}, scalar_oracle.int8_gemm(a.tolist(), b.tolist())


def int8_gemm(rng: Rng) -> Iterator[Vector]:
    for m, n, k in ((3, 5, 67), (1, 9, 200)):
        inputs, product = _int8_factors(rng, m, n, k)
        yield f"m{m}-n{n}-k{k}", {}, inputs, {"out": _bytes(product, np.int32)}


def int8_dequantize_gemm(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        c = rng.integers(-(2**31), 2**31, (4, 9), dtype=np.int32)
        rows, cols = rounded(rng.uniform(0.01, 5, 4), "f32"), rounded(rng.uniform(0.001, 0.1, 9), "f32")
        bias = generators.values("normal", rng, 9, dtype)
        out = _scaled(c.tolist(), rows, cols, bias, dtype)
        yield dtype, {"dtype": dtype}, {"C": c, "row_stats": rows, "col_stats": cols, "bias": bias}, {"out": out}


def int8_scaled_gemm(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        inputs, product = _int8_factors(rng, 4, 9, 131)
        rows, cols = rounded(rng.uniform(0.01, 5, 4), "f32"), rounded(rng.uniform(0.001, 0.1, 9), "f32")
        bias = generators.values("normal", rng, 9, dtype)
        out = _scaled(product, rows, cols, bias, dtype)
        yield dtype, {"dtype": dtype}, inputs | {"row_stats": rows, "col_stats": cols, "bias": bias}, {"out": out}


def _scaled(product: list[list[int]], rows: Floats, cols: Floats, bias: Floats, dtype: str) -> Floats:
    factors = (rows.f64().tolist(), cols.f64().tolist(), bias.f64().tolist())
    return rounded(np.array(scalar_oracle.int8_dequantize_gemm(product, *factors, dtype)), dtype)


def int8_dequantize_rows(rng: Rng) -> Iterator[Vector]:
    for dtype in DTYPES:
        codes, stats = rng.integers(-128, 128, (5, 33), dtype=np.int8), generators.values("lognormal", rng, 5, "f32")
        out = scalar_oracle.int8_dequantize_rows(codes.tolist(), stats.f64().tolist(), dtype)
        yield dtype, {"dtype": dtype}, {"A": codes, "row_stats": stats}, {"out": rounded(np.array(out), dtype)}


MAKERS = (
    quantize_blockwise,
    dequantize_blockwise,
    quantize_4bit,
    dequantize_4bit,
    quantize_absmax,
    dequantize_absmax,
    gemm_4bit,
    int8_quantize_rows,
    int8_quantize_cols,
    int8_gemm,
    int8_dequantize_gemm,
    int8_scaled_gemm,
    int8_dequantize_rows,
)


def make(directory: Path) -> None:
    """Write every file and ``SHA256SUMS`` into ``directory``."""
    lines = []
    for maker in MAKERS:
        entries = [
            {
                "name": name,
                "arguments": arguments,
                "inputs": {key: encode(array) for key, array in inputs.items()},
                "outputs": {key: encode(array) for key, array in outputs.items()},
            }
            for name, arguments, inputs, outputs in maker(generators.rng_for(f"golden/{maker.__name__}", 1))
        ]
        data = (json.dumps(entries, indent=1) + "\n").encode()
        (directory / f"{maker.__name__}.json").write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {maker.__name__}.json")
    tables = CODEBOOKS | {"nf4": np.array(codebooks.NF4), "fp4": np.array(codebooks.FP4)}
    for name, table in tables.items():
        digest = hashlib.sha256(np.asarray(table, dtype="<f4").tobytes()).hexdigest()
        lines.append(f"{digest}  codebook:{name}")
    (directory / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    make(DIRECTORY)
