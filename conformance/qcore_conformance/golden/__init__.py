"""Golden vectors: inputs and outputs as bytes, made by the scalar oracle (``python -m qcore_conformance.golden.make``).

One JSON file an op. ``SHA256SUMS`` has the hash of each file and of each codebook; a file that does not match is an
error, not a reason to make new ones: a golden vector changes only when a clause does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qcore_conformance import bounds, calls
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import FORMATS, Floats
from qcore_conformance.model import Case
from qcore_conformance.oracle import Product
from qcore_conformance.weights import Weight

if TYPE_CHECKING:
    from qcore_conformance.session import Session

DIRECTORY = Path(__file__).parent
_INTEGERS = {"u8": np.uint8, "i8": np.int8, "i32": np.int32}


def encode(array: Floats | NDArray[Any]) -> dict[str, Any]:
    """An array as JSON: dtype, shape and little-endian bytes in hexadecimal."""
    if isinstance(array, Floats):
        return {"dtype": array.dtype, "shape": list(array.shape), "hex": array.bits.tobytes().hex()}
    if array.dtype == np.float64:
        return {"dtype": "f64", "shape": list(array.shape), "hex": array.tobytes().hex()}
    name = next(name for name, dtype in _INTEGERS.items() if dtype == array.dtype)
    return {"dtype": name, "shape": list(array.shape), "hex": array.tobytes().hex()}


def decode(entry: Mapping[str, Any]) -> Any:
    """The inverse of :func:`encode`."""
    data, name = bytes.fromhex(entry["hex"]), entry["dtype"]
    if name in FORMATS:
        return Floats(np.frombuffer(data, dtype=FORMATS[name].bits).reshape(entry["shape"]).copy(), name)
    dtype = np.float64 if name == "f64" else _INTEGERS[name]
    return np.frombuffer(data, dtype=dtype).reshape(entry["shape"]).copy()


@cache
def sums() -> dict[str, str]:
    """``SHA256SUMS`` as a mapping of name to digest."""
    lines = (DIRECTORY / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def check_codebook(name: str, table: NDArray[np.float32]) -> None:
    """Compare a codebook with the digest of its float32 bytes (QC-Q8-006, QC-NF4-001, QC-FP4-001)."""
    digest = hashlib.sha256(np.ascontiguousarray(table, dtype="<f4").tobytes()).hexdigest()
    assert digest == sums()[f"codebook:{name}"], f"codebook {name!r} is not the one that the spec names"


@cache
def vectors(op: str) -> list[dict[str, Any]]:
    """The vectors of one op; ``ValueError`` if the file is not the one of ``SHA256SUMS``."""
    path = DIRECTORY / f"{op}.json"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sums()[path.name]:
        raise ValueError(f"{path}: its SHA-256 is not the one in SHA256SUMS; restore the file")
    return list(json.loads(data))


def cases(op: str, clauses: tuple[str, ...]) -> Iterator[Case]:
    level = "L2" if op == "gemm_4bit" else "L1"
    for vector in vectors(op):
        yield Case(f"{op}/{level}/golden-{vector['name']}", op, level, clauses, _runner(op, vector))


def _runner(op: str, vector: dict[str, Any]) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        inputs = {name: decode(entry) for name, entry in vector["inputs"].items()}
        wanted = {name: decode(entry) for name, entry in vector["outputs"].items()}
        got = _CALLS[op](s, inputs, vector["arguments"])
        if op == "gemm_4bit":
            truth = Product(wanted["exact"], wanted["magnitude"])
            s.record(bounds.check_gemm(got["out"], truth, s.gemm, inputs["X"].shape[1]))
            return
        for name, want in wanted.items():
            check = expect_floats if isinstance(want, Floats) else expect_integers
            check(name, got[name], want)

    return run


def _table(code: Floats) -> NDArray[np.float32]:
    return code.bits.view(np.float32)


def _weight(i: Mapping[str, Any], a: Mapping[str, Any]) -> Weight:
    return Weight(i["packed"], i["absmax"], a["quant_type"], a["blocksize"], tuple(a["shape"]))


_Call = Callable[["Session", Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
_CALLS: dict[str, _Call] = {
    "quantize_blockwise": lambda s, i, a: calls.quantize_blockwise(
        s, i["A"], _table(i["code"]), a["blocksize"]
    )._asdict(),
    "dequantize_blockwise": lambda s, i, a: {
        "out": calls.dequantize_blockwise(s, i["A"], i["absmax"], _table(i["code"]), a["blocksize"], a["dtype"])
    },
    "quantize_4bit": lambda s, i, a: calls.quantize_4bit(s, i["A"], a["quant_type"], a["blocksize"])._asdict(),
    "dequantize_4bit": lambda s, i, a: {"out": calls.dequantize_4bit(s, _weight(i, a), a["dtype"])},
    "quantize_absmax": lambda s, i, a: calls.quantize_absmax(
        s, i["absmax"], _table(i["code"]), a["blocksize"]
    )._asdict(),
    "dequantize_absmax": lambda s, i, a: {
        "out": calls.dequantize_absmax(s, i["A"], i["nested_absmax"], _table(i["code"]), i["offset"], a["blocksize"])
    },
    "gemm_4bit": lambda s, i, a: {"out": calls.gemm_4bit(s, i["X"], _weight(i, a), i.get("bias"))},
    "int8_quantize_rows": lambda s, i, a: calls.int8_quantize_rows(s, i["A"], a["threshold"])._asdict(),
    "int8_quantize_cols": lambda s, i, a: calls.int8_quantize_cols(s, i["A"], a["threshold"])._asdict(),
    "int8_gemm": lambda s, i, a: {"out": calls.int8_gemm(s, i["A"], i["B"])},
    "int8_dequantize_gemm": lambda s, i, a: {
        "out": calls.int8_dequantize_gemm(s, i["C"], i["row_stats"], i["col_stats"], i.get("bias"), a["dtype"])
    },
    "int8_scaled_gemm": lambda s, i, a: {
        "out": calls.int8_scaled_gemm(s, i["A"], i["B"], i["row_stats"], i["col_stats"], i.get("bias"), a["dtype"])
    },
    "int8_dequantize_rows": lambda s, i, a: {"out": calls.int8_dequantize_rows(s, i["A"], i["row_stats"], a["dtype"])},
}
