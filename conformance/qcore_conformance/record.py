"""The suite's calls as a file: inputs and what has to come out, for a device that has no Python.

The cases run on ``cpu_reference``, and every call that they make of the backend is written down once. What a replay
compares with is decided here: bits where the spec is exact, for the products of floats an interval an element, from the
oracle and from what the tested library declares (QC-GEMM4-004, QC-INT4-005, QC-INT8-012).
``backends/cpu/tests/replay.cpp`` reads it.

File, little-endian: ``QCCALLS2``, a count (u32) of products and of each its op, declared lanes, extra (i64) and weight
rounding, then calls up to the end. A string is its length (u32) and its bytes. A call is its case, its op, and four
groups, each with a count (u32): integers (name, i64), reals (name, f64), inputs and outputs (name, then an array). An
array is dtype (u8: 0 f32, 1 f16, 2 bf16, 3 u8, 4 i8, 5 i32), number of dimensions (u8), dimensions (i64) and elements;
of an output, after that a byte that says whether it is an interval: then low and high (f64 an element) take the place
of the elements. A tensor of ``optimizer_step`` is both: an input as it was, an output as it has to be.
"""

from __future__ import annotations

import inspect
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from qcore.backend import (
    ALGORITHMS,
    OPS,
    Backend,
    Description,
    OptimizerRule,
    OptimizerTensors,
    Weight4bit,
    Weight8bit,
    WeightInt4,
    get_backend,
)
from qcore.errors import BackendError
from qcore_conformance import oracle
from qcore_conformance.bounds import INT8_ROUNDINGS, GemmDeclaration, gemm_bound
from qcore_conformance.floats import Floats
from qcore_conformance.guards import GUARDS
from qcore_conformance.model import Case, Outcome
from qcore_conformance.session import Session, default_device, from_torch
from qcore_conformance.weights import Int4Weight, Weight

MAGIC = b"QCCALLS2"
LEVELS = ("L1", "L2")
PRODUCTS = ("gemm_4bit", "gemm_4bit_transposed", "gemm_int4", "int8_linear_transposed")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32)
_FORMATS = {"nf4": 0, "fp4": 1}
_FLAGS = ("nesterov", "skip_zeros", "stochastic", "bnb_codes", "signed_state")  # by bit, as in qcore_backend.h
Interval = tuple[NDArray[np.float64], NDArray[np.float64]]  # lowest and highest, an element
# Larger calls are left out: an emulated device takes minutes over each.
MOST_BYTES = 4 << 20


class Recorder(Backend):
    """Another backend, whose calls are written to a file."""

    def __init__(self, inner: Backend, file: IO[bytes], declared: Mapping[str, GemmDeclaration]) -> None:
        self.name, self.device_types = inner.name, inner.device_types
        self.case: Case | None = None
        self.counts: Counter[str] = Counter()
        self.too_large = 0
        self._inner, self._file, self._declared = inner, file, declared
        file.write(MAGIC + struct.pack("<I", len(declared)))
        for op, said in declared.items():
            file.write(_text(op) + struct.pack("<qq", said.lanes, said.extra) + _text(said.weight_rounding))
        for op in OPS.keys() - {"optimizer_step"}:
            setattr(self, op, self._recording(op))

    def describe(self, device: torch.device) -> Description:
        return self._inner.describe(device)

    def supports(self, op: str) -> bool:
        return self._inner.supports(op)

    def _recording(self, op: str) -> Callable[..., None]:
        function = getattr(self._inner, op)
        parameters = inspect.signature(getattr(Backend, op)).parameters
        written = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}

        def call(*arguments: Any, **keywords: Any) -> None:
            function(*arguments, **keywords)
            named = dict(zip((name for name in parameters if name != "self"), arguments)) | keywords
            self._write(op, named, written)

        return call

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        lists = {name: list(value) for name, value in vars(tensors).items()}
        every = {f"{name}[{i}]": value for name, values in lists.items() for i, value in enumerate(values)}
        before = {name: value.clone() for name, value in every.items() if isinstance(value, torch.Tensor)}
        self._inner.optimizer_step(rule, tensors)
        if not tensors.params:
            return
        integers = {
            "count": len(tensors.params),
            "algorithm": list(ALGORITHMS).index(rule.algorithm),
            "state_bits": rule.state_bits,
            "param_dtype": _DTYPES.index(tensors.params[0].dtype),
            "grad_dtype": _DTYPES.index(tensors.grads[0].dtype),
            "flags": sum(getattr(rule, flag) << bit for bit, flag in enumerate(_FLAGS)),
            "seed": _signed(rule.seed),
        } | {name: _signed(value) for name, value in every.items() if name.startswith("streams")}
        reals = {name: value for name, value in vars(rule).items() if isinstance(value, float)}
        reals |= {name: value for name, value in every.items() if name.startswith("grad_scales")}
        changed = {name: every[name] for name in before if not name.startswith("grads")}
        self._write_call("optimizer_step", integers, reals, before, {n: (t, None) for n, t in changed.items()})

    def _write(self, op: str, named: Mapping[str, Any], written: set[str]) -> None:
        integers: dict[str, int] = {}
        reals: dict[str, float] = {}
        inputs: dict[str, torch.Tensor] = {}
        for name, value in named.items():
            if isinstance(value, Weight4bit | Weight8bit | WeightInt4):
                for part in fields(value):
                    _sort(part.name, getattr(value, part.name), integers, reals, inputs)
            elif name not in written:
                _sort(name, value, integers, reals, inputs)
        outputs = {
            name: (named[name], self._interval(op, named, named[name]) if op in PRODUCTS else None)
            for name in sorted(written)
            if named.get(name) is not None
        }
        self._write_call(op, integers, reals, inputs, outputs)

    def _write_call(
        self,
        op: str,
        integers: Mapping[str, int],
        reals: Mapping[str, float],
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, tuple[torch.Tensor, Interval | None]],
    ) -> None:
        assert self.case is not None
        tensors = (*inputs.values(), *(tensor for tensor, _ in outputs.values()))
        if sum(t.numel() * t.element_size() for t in tensors) > MOST_BYTES:
            self.too_large += 1
            return
        parts = [_text(self.case.id), _text(op)]
        parts += [_group(integers, "<q"), _group(reals, "<d")]
        parts.append(struct.pack("<I", len(inputs)))
        parts += [_text(name) + _shape(tensor) + _bytes(tensor) for name, tensor in inputs.items()]
        parts.append(struct.pack("<I", len(outputs)))
        for name, (tensor, interval) in outputs.items():
            exact = b"\x00" + _bytes(tensor) if interval is None else b""
            parts.append(_text(name) + _shape(tensor) + exact)
            if interval is not None:
                parts.append(b"\x01" + interval[0].tobytes() + interval[1].tobytes())
        self._file.write(b"".join(parts))
        self.counts[op] += 1

    def _interval(self, op: str, named: Mapping[str, Any], out: torch.Tensor) -> Interval:
        """What an output of a product may be; a single value where a sum is exact or not finite."""
        given, x = out.double().numpy(), _floats(named["A"])
        with np.errstate(invalid="ignore", over="ignore"):
            if op == "int8_linear_transposed":
                codes, scales = named["W"].codes.numpy(), _floats(named["W"].scales)
                truth, roundings = oracle.int8_linear_transposed(x, codes, scales), INT8_ROUNDINGS
                exact = _exact_sums(truth, x.f64(), codes * scales.f64()[:, None] / 127)
            else:
                bias = None if named.get("bias") is None else _floats(named["bias"])
                decoded = _weight(named["weight"]).decoded()
                if op == "gemm_4bit_transposed":
                    decoded = Floats(decoded.bits.reshape(named["weight"].shape).T.copy(), decoded.dtype)
                truth, roundings = oracle.gemm_4bit(x, decoded, bias), 1
                exact = _exact_sums(truth, x.f64(), decoded.f64(), *(() if bias is None else (bias.f64(),)))
            bound = gemm_bound(truth, self._declared[op], x.shape[1], x.dtype, roundings)
            free = np.isfinite(truth.exact) & np.isfinite(given) & ~exact
            return np.where(free, truth.exact - bound, given), np.where(free, truth.exact + bound, given)


def _exact_sums(truth: oracle.Product, x: NDArray[np.float64], *rest: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where no order of summation rounds (QC-GEMM4-005): integers times small multiples of 1/64 all over."""
    integral = all(bool((part == np.round(part)).all()) for part in (x, *(64 * part for part in rest)))
    return np.asarray((64 * truth.magnitude < 2.0**24) & integral)


def _floats(tensor: torch.Tensor) -> Floats:
    values = from_torch(tensor)
    assert isinstance(values, Floats)
    return values


def _weight(w: Weight4bit | WeightInt4) -> Weight | Int4Weight:
    if isinstance(w, WeightInt4):
        codes, scales, zeros, perm = (
            None if part is None else from_torch(part) for part in (w.packed, w.scales, w.zeros, w.perm)
        )
        return Int4Weight(codes, scales, zeros, w.group_size, w.shape, perm)
    nested: dict[str, Any] = {}
    if w.nested_absmax is not None:
        assert w.nested_code is not None
        assert w.nested_offset is not None
        nested = {
            "nested_absmax": from_torch(w.nested_absmax),
            "nested_code": w.nested_code.numpy(),
            "nested_offset": from_torch(w.nested_offset),
            "nested_blocksize": w.nested_blocksize,
        }
    packed: Any = from_torch(w.packed)
    return Weight(packed, from_torch(w.absmax), w.quant_type, w.blocksize, w.shape, **nested)


def _sort(name: str, value: Any, integers: dict[str, int], reals: dict[str, float], inputs: dict[str, Any]) -> None:
    """Put an argument where its type belongs; an absent one nowhere."""
    if isinstance(value, torch.Tensor):
        inputs[name] = value
    elif name == "quant_type":
        integers["format"] = _FORMATS[value]
    elif name == "shape":
        integers |= {f"shape{index}": size for index, size in enumerate(value)}
        integers["numel"] = int(np.prod(value, dtype=np.int64))
    elif isinstance(value, int):
        integers[name] = value
    elif isinstance(value, float):
        reals[name] = value
    else:
        assert value is None, name


def _signed(value: int) -> int:
    """An unsigned 64-bit integer as the signed one of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _group(values: Mapping[str, float], form: str) -> bytes:
    return struct.pack("<I", len(values)) + b"".join(_text(k) + struct.pack(form, v) for k, v in values.items())


def _shape(tensor: torch.Tensor) -> bytes:
    sizes = tuple(tensor.shape)
    return struct.pack(f"<BB{len(sizes)}q", _DTYPES.index(tensor.dtype), len(sizes), *sizes)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def record_cases(path: Path, declared_by: Backend, cases: Iterable[Case], seed: int = 0) -> Recorder:
    """Run cases on ``cpu_reference`` and write their calls into a file; the recorder knows what it wrote.

    Parameters
    ----------
    path : Path
    declared_by : Backend
        Whose declarations of the products of floats a replay is held to.
    cases : iterable of Case
    seed : int

    Raises
    ------
    BackendError
        ``declared_by`` has no device here.
    OSError
        The file cannot be written.
    AssertionError
        A case fails on ``cpu_reference`` itself.
    """
    said = declared_by.describe(default_device(declared_by)).declarations
    declared = {op: GemmDeclaration.parse(said, op) for op in PRODUCTS}
    with path.open("wb") as file:
        recorder = Recorder(get_backend("cpu_reference"), file, declared)
        session = Session(recorder, "cpu", seed)
        session.placements = GUARDS[:1]  # where memory lies is the replay's concern
        for case in cases:
            recorder.case = case
            result = session.run_case(case)
            if result.outcome not in (Outcome.PASSED, Outcome.NOT_RUN):
                raise AssertionError(f"cpu_reference itself: {result.outcome.value} {case.id}: {result.message}")
    return recorder


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--declared-by", required=True, help="Backend whose declarations of the products of floats the replay is held to."
)
@click.option("--op", "ops", multiple=True, help="Only this op (repeatable).")
@click.option("--seed", type=int, default=0, show_default=True)
def record(path: Path, declared_by: str, ops: tuple[str, ...], seed: int) -> None:
    """Write the calls of the exact and the bounded cases, and what has to come out, into the file PATH."""
    from qcore_conformance.cli import chosen_cases, fail

    try:
        recorder = record_cases(path, get_backend(declared_by), chosen_cases(ops, LEVELS), seed)
    except (BackendError, AssertionError) as error:
        fail(str(error))
        return
    except OSError as error:
        fail(f"{path}: cannot be written: {error}")
        return
    if not recorder.counts:
        fail("no call was recorded")
    click.echo(
        f"{path}: {sum(recorder.counts.values())} calls of {len(recorder.counts)} ops, "
        f"{path.stat().st_size / 1e6:.1f} MB, {recorder.too_large} calls beyond {MOST_BYTES >> 20} MB left out"
    )
