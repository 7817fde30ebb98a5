"""The C ABI of a native library, called without the Python adapter: what a careless caller could pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qcore.backend import OptimizerRule
from qcore_conformance import generators
from qcore_conformance.floats import Floats, f32, rounded
from qcore_conformance.model import NotRun
from qcore_conformance.optimizer_call import random_tensor
from qcore_conformance.weights import random_int4

if TYPE_CHECKING:
    from qcore_conformance.session import Session

Array = Floats | NDArray[Any]
DTYPE_CODES = {"f32": 0, "f16": 1, "bf16": 2}


@dataclass(frozen=True)
class Argument:
    """One argument of a C function, after device and stream.

    ``kind``: ``dtype``, ``format``, ``count``, ``blocksize``, ``threshold``, ``bias_dtype``, ``workspace``,
    ``workspace_bytes``; ``in``, ``out`` or ``optional`` for the address of the tensor ``name``; ``weight`` for a
    pointer to the struct ``type`` whose fields are ``fields``; ``optimizer`` and ``tensors`` for a pointer to
    ``qc_optimizer`` and ``qc_optimizer_tensors``, whose lists of addresses are lists of names there.
    """

    name: str
    kind: str
    value: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    type: str = "qc_weight_4bit"


@dataclass(frozen=True)
class CCall:
    """A valid call of one function: its arrays, its outputs (shape, dtype) and its arguments in order."""

    op: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]
    arguments: Sequence[Argument]
    sizes: tuple[int, int, int] = (0, 0, 0)  # of workspace()
    initial: Mapping[str, Array] = field(default_factory=dict)  # what outputs hold before, where that matters
    more_workspace: int = 0  # bytes beyond what workspace() says (QC-INT4-003)


class Library:
    """The function table of the library under test."""

    def __init__(self, session: Session) -> None:
        if not session.description.abi:
            raise NotRun("a Python backend: it has no C ABI")
        from qcore.backend.abi import constants, ffi

        self.ffi: Any = ffi
        self.qc: Any = constants
        self.handle: Any = ffi.dlopen(session.description.library, os.RTLD_NOW | os.RTLD_LOCAL)
        self.api: Any = self.handle.qcore_backend_open(constants.QC_ABI_MAJOR)
        assert self.api != ffi.NULL, "qcore_backend_open(1) gave NULL, although the library was loaded before"
        self._session = session

    def where(self) -> tuple[int, int]:
        """(device, stream): the default stream, or the library's own choice of threads."""
        return (0 if self._session.on_host else self._session.device.index or 0), 0

    def current(self) -> AbstractContextManager[Any]:
        """Makes the session's device current, as an op's caller has to."""
        import torch

        return nullcontext() if self._session.device.type != "cuda" else torch.cuda.device(self._session.device)

    def last_error(self) -> str:
        text: bytes = self.ffi.string(self.api.last_error())
        return text.decode()

    def function(self, op: str) -> Any:
        offset = self.ffi.offsetof("qc_api", op)
        function = getattr(self.api, op) if offset < self.api.size else self.ffi.NULL
        if function == self.ffi.NULL:
            raise NotRun(f"the library does not serve {op}")
        return function

    def workspace_bytes(self, call: CCall, dtype: int) -> int:
        count = self.ffi.new("int64_t *", -1)
        status = self.api.workspace(
            getattr(self.qc, f"QC_OP_{call.op.upper()}"), *self.where(), dtype, *call.sizes, count
        )
        assert status == 0, f"workspace({call.op}) answered {status}: {self.last_error()}"
        assert count[0] >= 0, f"workspace({call.op}) says {count[0]} bytes"
        return int(count[0]) + call.more_workspace


def invoke(
    library: Library,
    call: CCall,
    tensors: Mapping[str, Any],
    change: Callable[[list[Any], list[str]], None] = lambda values, names: None,
    weight_change: Mapping[str, Any] | None = None,
    device: int | None = None,
) -> int:
    """Call the function with the addresses of ``tensors``; ``change`` edits the argument values first.

    Returns the status. ``weight_change`` overrides fields of the structs; a value of the form ``("shift", 1)`` moves an
    address, and ``("entry", 0)`` replaces the first entry of a list.
    """
    dtype = next((a.value for a in call.arguments if a.kind == "dtype"), 0)
    size = library.workspace_bytes(call, dtype) if any(a.kind == "workspace" for a in call.arguments) else 0
    scratch = _Scratch(size, tensors)
    keep: list[Any] = [scratch]
    values = []
    for argument in call.arguments:
        if argument.kind in ("in", "out", "optional"):
            values.append(tensors[argument.name].data_ptr() if argument.name in tensors else 0)
        elif argument.kind == "weight":
            fields = {k: tensors[v].data_ptr() if isinstance(v, str) else v for k, v in argument.fields.items()}
            for key, value in (weight_change or {}).items():
                fields[key] = fields[key] + value[1] if isinstance(value, tuple) else value
            struct = library.ffi.new(f"{argument.type} *", fields)
            keep.append(struct)
            values.append(struct)
        elif argument.kind == "optimizer":
            known = {k: v for k, v in (weight_change or {}).items() if k in argument.fields}
            values.append(library.ffi.new("qc_optimizer *", {**argument.fields, **known}))
            keep.append(values[-1])
        elif argument.kind == "tensors":
            values.append(_tensor_lists(library.ffi, argument.fields, tensors, weight_change or {}, keep))
        elif argument.kind == "workspace":
            values.append(scratch.address)
        elif argument.kind == "workspace_bytes":
            values.append(size)
        else:
            values.append(argument.value)
    change(values, [argument.name for argument in call.arguments])
    index, stream = library.where()
    with library.current():
        status = int(library.function(call.op)(index if device is None else device, stream, *values))
    scratch.check(call.op)
    return status


def _tensor_lists(
    ffi: Any, fields: Mapping[str, Any], tensors: Mapping[str, Any], change: Mapping[str, Any], keep: list[Any]
) -> Any:
    """A ``qc_optimizer_tensors``; what it points to goes into ``keep``."""
    types = {"numel": "int64_t[]", "grad_scales": "float[]", "streams": "uint64_t[]"}
    found: dict[str, Any] = {}
    for name, value in fields.items():
        changed = change.get(name)
        if name == "count":
            found[name] = value if changed is None else changed
            continue
        entries = [tensors[entry].data_ptr() if isinstance(entry, str) else entry for entry in value]
        if isinstance(changed, tuple):
            entries[0] = entries[0] + changed[1] if changed[0] == "shift" else changed[1]
        found[name] = ffi.NULL if changed == 0 or not entries else ffi.new(types.get(name, "uintptr_t[]"), entries)
    struct = ffi.new("qc_optimizer_tensors *", found)
    keep += [found, struct]
    return struct


class _Scratch:
    """A workspace of exactly ``size`` bytes, aligned to 64 and no more, between canaries."""

    _MARGIN = 4096

    def __init__(self, size: int, tensors: Mapping[str, Any]) -> None:
        import torch

        device = next(iter(tensors.values())).device if tensors else "cpu"
        self._raw = torch.full((size + 256 + 2 * self._MARGIN,), 0xC3, dtype=torch.uint8, device=device)
        # A multiple of 64, as the header promises, and of nothing larger.
        self._start = self._MARGIN + (64 - (self._raw.data_ptr() + self._MARGIN)) % 128
        self._size = size
        self.address = self._raw.data_ptr() + self._start if size else 0

    def check(self, op: str) -> None:
        raw = self._raw.cpu().numpy()
        inside = slice(self._start, self._start + self._size)
        outside = np.concatenate([raw[: inside.start], raw[inside.stop :]])
        assert (outside == 0xC3).all(), f"{op}: written outside the workspace of {self._size} bytes that it asked for"


def _weight(numel: int, nested: bool, format_code: int) -> Argument:
    fields = {
        "packed": "packed",
        "absmax": "absmax",
        "nested_absmax": "nested_absmax" if nested else 0,
        "nested_code": "nested_code" if nested else 0,
        "nested_offset": "nested_offset" if nested else 0,
        "numel": numel,
        "blocksize": 64,
        "nested_blocksize": 256 if nested else 0,
        "format": format_code,
        "layout": 0,
    }
    return Argument("w", "weight", fields=fields)


def _weight_inputs(rng: generators.Rng, numel: int, nested: bool) -> dict[str, Array]:
    blocks = -(-numel // 64)
    inputs: dict[str, Array] = {"packed": rng.integers(0, 256, (numel + 1) // 2, dtype=np.uint8)}
    if not nested:
        return inputs | {"absmax": rounded(rng.uniform(0.5, 2, blocks), "f32")}
    return inputs | {
        "absmax": rng.integers(0, 256, blocks, dtype=np.uint8),
        "nested_absmax": rounded(rng.uniform(0.5, 2, -(-blocks // 256)), "f32"),
        "nested_code": f32(generators.CODEBOOKS["dynamic"]),
        "nested_offset": rounded([0.5], "f32"),
    }


def valid_call(
    op: str,
    rng: generators.Rng,
    *,
    dtype: str = "f16",
    nested: bool = False,
    product: tuple[int, int, int] = (3, 5, 96),
) -> CCall:
    """A valid call of ``op``; ``product`` is M, N and K of a GEMM."""
    code = f32(generators.CODEBOOKS["dynamic"])
    n = 130
    m, cols, k = product
    kind = Argument("dtype", "dtype", DTYPE_CODES[dtype])

    def ptr(name: str, role: str = "in") -> Argument:
        return Argument(name, role)

    def count(name: str, value: int) -> Argument:
        return Argument(name, "count", value)

    size = Argument("blocksize", "blocksize", 64)
    blocks = -(-n // 64)
    a = generators.values("normal", rng, n, dtype)
    bytes_ = rng.integers(0, 256, n, dtype=np.uint8)
    absmax = rounded(rng.uniform(0.5, 2, blocks), "f32")
    arguments: tuple[Argument, ...]
    if op == "quantize_blockwise":
        arguments = (kind, ptr("a"), ptr("code"), count("n", n), size, ptr("absmax", "out"), ptr("out", "out"))
        return CCall(op, {"a": a, "code": code}, {"absmax": ((blocks,), "f32"), "out": ((n,), "u8")}, arguments)
    if op == "dequantize_blockwise":
        arguments = (kind, ptr("a"), ptr("absmax"), ptr("code"), count("n", n), size, ptr("out", "out"))
        return CCall(op, {"a": bytes_, "absmax": absmax, "code": code}, {"out": ((n,), dtype)}, arguments)
    if op == "quantize_4bit":
        arguments = (
            kind, Argument("format", "format", 0), ptr("a"), count("n", n), size, ptr("absmax", "out"),
            ptr("out", "out"),
        )  # fmt: skip
        return CCall(op, {"a": a}, {"absmax": ((blocks,), "f32"), "out": (((n + 1) // 2,), "u8")}, arguments)
    if op == "dequantize_4bit":
        arguments = (kind, _weight(n, nested, 1), ptr("out", "out"))
        return CCall(op, _weight_inputs(rng, n, nested), {"out": ((n,), dtype)}, arguments)
    if op == "quantize_absmax":
        outputs = {"out": ((n,), "u8"), "nested_absmax": ((blocks,), "f32"), "offset": ((1,), "f32")}
        arguments = (
            ptr("absmax"), ptr("code"), count("n", n), size, ptr("out", "out"), ptr("nested_absmax", "out"),
            ptr("offset", "out"),
        )  # fmt: skip
        return CCall(op, {"absmax": generators.values("normal", rng, n, "f32"), "code": code}, outputs, arguments)
    if op == "dequantize_absmax":
        inputs = {"a": bytes_, "nested_absmax": absmax, "code": code, "offset": rounded([0.5], "f32")}
        arguments = (
            ptr("a"), ptr("nested_absmax"), ptr("code"), ptr("offset"), count("n", n), size, ptr("out", "out"),
        )  # fmt: skip
        return CCall(op, inputs, {"out": ((n,), "f32")}, arguments)
    if op == "gemm_4bit":
        x = generators.values("normal", rng, m * k, dtype).reshape(m, k)
        inputs = {"a": x, "bias": generators.values("normal", rng, cols, dtype)} | _weight_inputs(rng, cols * k, nested)
        arguments = (
            kind, count("m", m), count("n", cols), count("k", k), ptr("a"), _weight(cols * k, nested, 0),
            Argument("bias_dtype", "bias_dtype", kind.value), ptr("bias", "optional"), ptr("out", "out"),
            Argument("workspace", "workspace"), Argument("workspace_bytes", "workspace_bytes"),
        )  # fmt: skip
        return CCall(op, inputs, {"out": ((m, cols), dtype)}, arguments, (m, cols, k))
    if op == "gemm_int4":
        return _int4_call(rng, dtype, product, ordered=nested)
    if op == "gemm_4bit_transposed":
        y = generators.values("normal", rng, m * cols, dtype).reshape(m, cols)
        arguments = (
            kind, count("m", m), count("n", cols), count("k", k), ptr("a"), _weight(cols * k, nested, 0),
            ptr("out", "out"), Argument("workspace", "workspace"), Argument("workspace_bytes", "workspace_bytes"),
        )  # fmt: skip
        inputs = {"a": y} | _weight_inputs(rng, cols * k, nested)
        return CCall(op, inputs, {"out": ((m, k), dtype)}, arguments, (m, cols, k))
    if op == "optimizer_step":
        return _optimizer_call(rng)
    return _int8_call(op, rng, dtype, m, cols, k)


def _int4_call(rng: generators.Rng, dtype: str, product: tuple[int, int, int], *, ordered: bool) -> CCall:
    """Groups of 32 with zero points; ``ordered`` with a permutation, which needs scratch."""
    m, n, k = product
    kind = Argument("dtype", "dtype", DTYPE_CODES[dtype])
    weight = random_int4(rng, 32, (n, k), "f16", ordered=ordered)
    parts = {name: part for name, part in weight.inputs().items() if part is not None}
    fields = {"packed": "packed", "scales": "scales", "zeros": "zeros", "perm": "perm" if ordered else 0}
    fields |= {"n": n, "k": k, "group_size": 32, "scale_dtype": 1, "layout": 0}
    inputs: dict[str, Array] = {"a": generators.values("normal", rng, m * k, dtype).reshape(m, k)} | parts
    inputs["bias"] = generators.values("normal", rng, n, dtype)
    arguments = (
        kind, Argument("m", "count", m), Argument("n", "count", n), Argument("k", "count", k), Argument("a", "in"),
        Argument("w", "weight", fields=fields, type="qc_weight_int4"),
        Argument("bias_dtype", "bias_dtype", kind.value), Argument("bias", "optional"), Argument("out", "out"),
        Argument("workspace", "workspace"), Argument("workspace_bytes", "workspace_bytes"),
    )  # fmt: skip
    more = -(-m * k * (4 if dtype == "f32" else 2) // 64) * 64 if ordered else 0
    return CCall("gemm_int4", inputs, {"out": ((m, n), dtype)}, arguments, (m, n, k), more_workspace=more)


def _optimizer_call(rng: generators.Rng) -> CCall:
    """8-bit Adam on two float16 parameters with compensation and a limit on the norm, which needs scratch."""
    rule = OptimizerRule("adam", 8, -0.01, beta1=0.9, gain1=0.1, beta2=0.99, gain2=0.01, eps=1e-6, max_unorm=0.1)
    tensors = [random_tensor(rng, rule, n, "f16", "f32", compensated=True) for n in (300, 31)]
    initial = {f"{name}{i}": part for i, tensor in enumerate(tensors) for name, part in tensor.parts()}
    outputs = {name: ((part.size,), part.dtype if isinstance(part, Floats) else "u8") for name, part in initial.items()}
    scalars = {
        name: getattr(rule, name)
        for name in ("step_size", "decay", "eps", "beta1", "gain1", "beta2", "gain2", "max_unorm", "unorm_factor")
    }
    optimizer = scalars | {"algorithm": 0, "state_bits": 8, "param_dtype": 1, "grad_dtype": 0, "flags": 0}
    names = {"params": "param", "grads": "grad"}
    lists = {
        name: [f"{names.get(name, name)}{i}" for i in range(2)]
        for name in ("params", "grads", "state1", "state2", "absmax1", "absmax2", "compensation")
    }
    every = {"count": 2, "numel": [300, 31], **lists, "grad_scales": [1.5, 0.5], "streams": []}
    arguments = (
        Argument("optimizer", "optimizer", fields=optimizer),
        Argument("tensors", "tensors", fields=every),
        Argument("workspace", "workspace"),
        Argument("workspace_bytes", "workspace_bytes"),
    )
    grads = {f"grad{i}": tensor.grad for i, tensor in enumerate(tensors)}
    return CCall("optimizer_step", grads, outputs, arguments, (3, 2, 0), initial)


def _int8_call(op: str, rng: generators.Rng, dtype: str, m: int, n: int, k: int) -> CCall:
    kind = Argument("dtype", "dtype", DTYPE_CODES[dtype])
    bias_kind = Argument("bias_dtype", "bias_dtype", kind.value)
    work = (Argument("workspace", "workspace"), Argument("workspace_bytes", "workspace_bytes"))
    sizes = tuple(Argument(name, "count", value) for name, value in (("m", m), ("n", n), ("k", k)))
    rows, cols = rounded(rng.uniform(0.5, 2, m), "f32"), rounded(rng.uniform(0.5, 2, n), "f32")
    bias = generators.values("normal", rng, n, dtype)
    x = generators.values("normal", rng, m * k, dtype).reshape(m, k)
    a, b = (rng.integers(-128, 128, (size, k), dtype=np.int8) for size in (m, n))
    out = Argument("out", "out")

    def ptr(name: str, role: str = "in") -> Argument:
        return Argument(name, role)

    if op in ("int8_quantize_rows", "int8_quantize_cols"):
        by_row = op == "int8_quantize_rows"
        outputs: dict[str, tuple[tuple[int, ...], str]] = {"out": ((m, k), "i8")}
        outputs |= (
            {"row_stats": ((m,), "f32"), "outlier_cols": ((k,), "u8")} if by_row else {"col_stats": ((k,), "f32")}
        )
        arguments = (kind, ptr("a"), sizes[0], sizes[2], Argument("threshold", "threshold", 2.0))
        return CCall(op, {"a": x}, outputs, (*arguments, *(Argument(name, "out") for name in outputs)))
    if op == "int8_gemm":
        return CCall(
            op, {"a": a, "b": b}, {"out": ((m, n), "i32")}, (*sizes, ptr("a"), ptr("b"), out, *work), (m, n, k)
        )
    scales: dict[str, Array] = {"row_stats": rows, "col_stats": cols, "bias": bias}
    scaling = (ptr("row_stats"), ptr("col_stats"), bias_kind, ptr("bias", "optional"), out)
    if op == "int8_dequantize_gemm":
        c = rng.integers(-1000, 1000, (m, n), dtype=np.int32)
        return CCall(op, {"c": c} | scales, {"out": ((m, n), dtype)}, (kind, *sizes[:2], ptr("c"), *scaling))
    if op == "int8_scaled_gemm":
        arguments = (kind, *sizes, ptr("a"), ptr("b"), *scaling, *work)
        return CCall(op, {"a": a, "b": b} | scales, {"out": ((m, n), dtype)}, arguments, (m, n, k))
    if op == "int8_linear":
        inputs: dict[str, Array] = {"a": x, "b": b, "col_stats": cols, "bias": bias}
        arguments = (
            kind, *sizes, ptr("a"), ptr("b"), ptr("col_stats"), Argument("threshold", "threshold", 2.0), bias_kind,
            ptr("bias", "optional"), out, ptr("outliers", "out"), *work,
        )  # fmt: skip
        return CCall(op, inputs, {"out": ((m, n), dtype), "outliers": ((k,), "u8")}, arguments, (m, n, k))
    if op == "int8_linear_transposed":
        inputs = {"a": generators.values("normal", rng, m * n, dtype).reshape(m, n), "b": b, "col_stats": cols}
        arguments = (kind, *sizes, ptr("a"), ptr("b"), ptr("col_stats"), out, *work)
        return CCall(op, inputs, {"out": ((m, k), dtype)}, arguments, (m, n, k))
    assert op == "int8_dequantize_rows"
    arguments = (kind, sizes[0], sizes[2], ptr("a"), ptr("row_stats"), out)
    return CCall(op, {"a": a, "row_stats": rows}, {"out": ((m, k), dtype)}, arguments)
