"""What a backend has to refuse, with a message and before any output is written (QC-NUM-006)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore_conformance.floats import Floats
from qcore_conformance.generators import rng_for
from qcore_conformance.model import Case, NotRun
from qcore_conformance.samples import OPS
from qcore_conformance.session import Session, empty, to_torch

if TYPE_CHECKING:
    from qcore_conformance.capi import Argument, CCall

_INVALID, _UNSUPPORTED, _NO_DEVICE = 1, 2, 3
_ALSO = {"device": (_NO_DEVICE,), "layout": (_UNSUPPORTED,)}
_BAD = {
    "dtype": (-1, 3, 99),
    "format": (-1, 2, 99),
    "count": (-1, -(2**62)),
    "blocksize": (0, 16, 48, 96, 8192, -64, 2**40),
    "threshold": (float("nan"), float("inf"), -1.0),
    "bias_dtype": (-1, 3),
}
_ADDRESSES = ("in", "out", "optional")


def _item_size(call: CCall, name: str) -> int:
    if name in call.outputs:
        return {"u8": 1, "i8": 1, "i32": 4, "f32": 4}.get(call.outputs[name][1], 2)
    array = call.inputs[name]
    return int((array.bits if isinstance(array, Floats) else array).dtype.itemsize)


def _refuse(
    op: str,
    says: str,
    *,
    value: Any = None,
    shift: int = 0,
    fields: Mapping[str, Any] | None = None,
    device: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Session], None]:
    """A valid call succeeds; the same call with one bad argument (named ``says``) is refused and writes nothing."""

    def run(s: Session) -> None:
        from qcore_conformance import capi

        library = capi.Library(s)
        call = capi.valid_call(op, s.rng, **(options or {}))
        if says.startswith("workspace"):
            call = _call_with_workspace(library, op, s)
        outputs = {name: empty(*form) for name, form in call.outputs.items()}

        def valid(tensors: Mapping[str, Any]) -> None:
            for name, content in call.initial.items():
                tensors[name].copy_(to_torch(content))
            status = capi.invoke(library, call, tensors)
            assert status == 0, f"a valid call was refused with status {status}: {library.last_error()}"

        def change(values: list[Any], names: list[str]) -> None:
            if fields is None and device is None:
                index = names.index(says)
                values[index] = values[index] + shift if shift else value
                if values[index] is None:
                    values[index] = library.ffi.NULL

        def invalid(tensors: Mapping[str, Any]) -> None:
            status = capi.invoke(library, call, tensors, change, fields, device)
            # A layout of the future is no mistake of the caller's: a library may not serve it.
            allowed = (_INVALID, *(_ALSO.get(says, ())))
            text = library.last_error()
            assert status in allowed, f"{op}: bad {says}: status {status}, expected {allowed[0]} ({text!r})"
            assert op in text, f"the message names no op: {text!r}"
            names = says.removesuffix("_bytes") if says != "w" else "w|weight"
            assert re.search(rf"(?<!\w)({names})(_bytes)?(?!\w)", text), f"the message does not name {says!r}: {text!r}"

        contents: dict[str, Any] = dict(call.inputs)
        _expect_allowed(s, contents, outputs, valid)
        s.call_refused(contents, outputs, invalid)

    return run


def _call_with_workspace(library: Any, op: str, s: Session) -> CCall:
    """The first of several sizes for which the library asks for scratch."""
    from qcore_conformance import capi

    for product in (
        (3, 5, 96),
        (1, 1024, 1024),
        (70, 130, 1000),
        (5, 2048, 2048),
        (1, 4096, 4096),
        (512, 5, 96),
    ):
        call = capi.valid_call(op, s.rng, product=product)
        if library.workspace_bytes(call, capi.DTYPE_CODES["f16"]):
            return call
    raise NotRun("the library needs no workspace for this op")


def _expect_allowed(s: Session, inputs: Any, outputs: Any, valid: Callable[[Mapping[str, Any]], None]) -> None:
    s.call("", inputs, outputs, lambda _, tensors: valid(tensors))


def _argument_cases(op: str, argument: Argument, call: CCall) -> Iterator[tuple[str, Callable[[Session], None]]]:
    name = argument.name
    for bad in _BAD.get(argument.kind, ()):
        yield f"{name}={bad}", _refuse(op, name, value=bad)
    if argument.kind in ("in", "out"):
        # With a threshold the outlier columns are needed (qcore_backend.h).
        yield f"{name}-null", _refuse(op, name, value=0)
    if argument.kind in _ADDRESSES and _item_size(call, name) > 1:
        yield f"{name}-misaligned", _refuse(op, name, shift=1)
    if argument.kind == "weight":
        yield "w-null", _refuse(op, name)
        yield from _int4_cases(op) if op == "gemm_int4" else _weight_cases(op, call)
    if argument.kind in ("optimizer", "tensors"):
        yield f"{name}-null", _refuse(op, name)
        yield from _optimizer_cases(op) if argument.kind == "optimizer" else _tensor_list_cases(op)
    if argument.kind == "workspace":
        yield "workspace-null", _refuse(op, name, value=0)
    if argument.kind == "workspace_bytes":
        yield "workspace-short", _refuse(op, name, shift=-1)


def _weight_cases(op: str, call: CCall) -> Iterator[tuple[str, Callable[[Session], None]]]:
    for field, bad in (
        ("packed", 0), ("absmax", 0), ("blocksize", 0), ("blocksize", 48), ("blocksize", 8192), ("format", 2),
        ("format", -1), ("layout", 7), ("numel", -1),
    ):  # fmt: skip
        yield f"w.{field}={bad}", _refuse(op, field, fields={field: bad})
    yield "w.absmax-misaligned", _refuse(op, "absmax", fields={"absmax": ("shift", 2)})
    if op in ("gemm_4bit", "gemm_4bit_transposed"):
        yield "w.numel-too-large", _refuse(op, "numel", fields={"numel": 5 * 96 + 1})
    nested = {"nested": True}
    for field, bad in (("nested_code", 0), ("nested_offset", 0), ("nested_blocksize", 0), ("nested_blocksize", 100)):
        yield f"w.{field}={bad}", _refuse(op, field, fields={field: bad}, options=nested)
    for field in ("nested_absmax", "nested_code", "nested_offset"):
        yield f"w.{field}-misaligned", _refuse(op, field, fields={field: ("shift", 2)}, options=nested)


def _int4_cases(op: str) -> Iterator[tuple[str, Callable[[Session], None]]]:
    for field, bad in (
        ("packed", 0), ("scales", 0), ("group_size", 0), ("group_size", -64), ("group_size", 12), ("scale_dtype", -1),
        ("scale_dtype", 3), ("layout", 7), ("n", 4), ("k", 95), ("n", -1),
    ):  # fmt: skip
        yield f"w.{field}={bad}", _refuse(op, field, fields={field: bad})
    yield "w.scales-misaligned", _refuse(op, "scales", fields={"scales": ("shift", 1)})
    ordered = {"nested": True}
    yield "w.perm-misaligned", _refuse(op, "perm", fields={"perm": ("shift", 2)}, options=ordered)
    yield "w.perm-without-workspace", _refuse(op, "workspace", value=0, options=ordered)


def _optimizer_cases(op: str) -> Iterator[tuple[str, Callable[[Session], None]]]:
    for field, bad in (
        ("algorithm", -1), ("algorithm", 6), ("state_bits", 16), ("state_bits", 0), ("param_dtype", 3),
        ("grad_dtype", -1), ("flags", 32), ("flags", -(2**31)), ("max_unorm", float("nan")),
        ("max_unorm", float("inf")), ("max_unorm", -1.0),
    ):  # fmt: skip
        yield f"optimizer.{field}={bad}", _refuse(op, field, fields={field: bad})
    yield "optimizer.nesterov-of-adam", _refuse(op, "algorithm", fields={"flags": 1})
    yield "optimizer.signed-state-of-adam", _refuse(op, "algorithm", fields={"flags": 16})
    yield "optimizer.stochastic-float16", _refuse(op, "param_dtype", fields={"flags": 4})
    yield "tensors.compensation-of-float32", _refuse(op, "compensation", fields={"param_dtype": 0})
    bfloat16 = {"param_dtype": 2, "flags": 4}
    yield "tensors.streams=0", _refuse(op, "streams", fields=bfloat16 | {"compensation": 0})


def _tensor_list_cases(op: str) -> Iterator[tuple[str, Callable[[Session], None]]]:
    yield "tensors.count=-1", _refuse(op, "count", fields={"count": -1})
    yield "tensors.numel=-1", _refuse(op, "numel", fields={"numel": ("entry", -1)})
    lists = ("params", "grads", "state1", "state2", "absmax1", "absmax2", "compensation")
    for name in ("numel", *lists[:-1]):
        yield f"tensors.{name}=0", _refuse(op, name, fields={name: 0})
    for name in lists:
        yield f"tensors.{name}[0]=0", _refuse(op, name, fields={name: ("entry", 0)})
        if not name.startswith("state"):
            yield f"tensors.{name}[0]-misaligned", _refuse(op, name, fields={name: ("shift", 1)})


def _too_many_columns(op: str) -> Callable[[Session], None]:
    """K of 131,072 could leave the range of int32 (QC-INT8-005)."""

    def run(s: Session) -> None:
        from qcore.errors import InvalidArgument

        k = 131_072
        ones = np.ones((1, k), dtype=np.int8)
        scale = Floats(np.ones(1, dtype=np.uint32) * 0x3F800000, "f32")
        scaled = op == "int8_scaled_gemm"
        inputs: dict[str, Any] = {"A": ones, "B": ones} | ({"row_stats": scale, "col_stats": scale} if scaled else {})

        def invoke(t: Mapping[str, Any]) -> None:
            try:
                if scaled:
                    s.backend.int8_scaled_gemm(t["A"], t["B"], t["row_stats"], t["col_stats"], None, out=t["out"])
                else:
                    s.backend.int8_gemm(t["A"], t["B"], out=t["out"])
            except InvalidArgument:
                return
            raise AssertionError(f"{op}: K = {k} was not refused; 131,071 is the largest (QC-INT8-005)")

        s.call_refused(inputs, {"out": empty((1, 1), "f32" if scaled else "i32")}, invoke)

    return run


def _bad_codebook(op: str, kind: str) -> Callable[[Session], None]:
    """Quantization refuses a codebook that is not finite and ascending (QC-Q8-001), where the host can read it."""

    def run(s: Session) -> None:
        from qcore.errors import InvalidArgument

        if not s.on_host:
            raise NotRun("a backend of a device cannot read a codebook without synchronising; the frontend checks it")
        code = np.linspace(-1, 1, 256).astype(np.float32)
        if kind == "descending":
            code[200] = code[199] - np.float32(0.25)
        else:
            code[255] = {"nan": np.nan, "inf": np.inf}[kind]
        a = Floats(rng_for(op, 0).integers(0, 0x3F800000, 100, dtype=np.uint32), "f32")

        def invoke(t: Mapping[str, Any]) -> None:
            try:
                if op == "quantize_blockwise":
                    s.backend.quantize_blockwise(t["A"], t["code"], 64, absmax=t["absmax"], out=t["out"])
                else:
                    s.backend.quantize_absmax(
                        t["A"], t["code"], 64, out=t["out"], nested_absmax=t["absmax"], offset=t["offset"]
                    )
            except InvalidArgument:
                return
            raise AssertionError(f"{op}: a codebook with a {kind} entry was not refused (QC-Q8-001)")

        outputs = {"absmax": empty((2,), "f32"), "out": empty((100,), "u8"), "offset": empty((1,), "f32")}
        s.call_refused({"A": a, "code": Floats(code.view(np.uint32), "f32")}, outputs, invoke)

    return run


def _optional_bias(op: str) -> Callable[[Session], None]:
    """Bias of a third dtype is refused: it has the output's dtype or float32."""
    return _refuse(op, "bias_dtype", value=2)  # the call's own dtype is float16


def cases() -> Iterator[Case]:
    from qcore_conformance import capi

    for op in OPS:
        call = capi.valid_call(op, rng_for(op, 0))
        for argument in call.arguments:
            for label, run in _argument_cases(op, argument, call):
                yield Case(f"{op}/L0/abi-{label}", op, "L0", _clauses(op, argument), run, {"isolated": True})
            if argument.kind == "bias_dtype":
                yield Case(f"{op}/L0/abi-bias-of-third-dtype", op, "L0", ("QC-NUM-006",), _optional_bias(op))
        for index in (-1, 10_000):
            run = _refuse(op, "device", device=index)
            yield Case(f"{op}/L0/abi-device={index}", op, "L0", ("QC-NUM-006",), run, {"isolated": True})
    for op in ("int8_gemm", "int8_scaled_gemm"):
        yield Case(f"{op}/L0/k-131072", op, "L0", ("QC-INT8-005", "QC-NUM-006"), _too_many_columns(op))
    for op in ("quantize_blockwise", "quantize_absmax"):
        for kind in ("descending", "nan", "inf"):
            yield Case(f"{op}/L0/codebook-{kind}", op, "L0", ("QC-Q8-001", "QC-NUM-006"), _bad_codebook(op, kind))


def _clauses(op: str, argument: Argument) -> tuple[str, ...]:
    extra = {"blocksize": ("QC-NUM-005",), "threshold": ("QC-INT8-001",), "count": ("QC-NUM-005",)}
    return ("QC-NUM-006", *extra.get(argument.kind, ()))
