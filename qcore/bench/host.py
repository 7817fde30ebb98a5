"""What a call costs on the host: ``Linear4bit`` 64x64 with one row.

The work itself is small enough not to count (8,192 operations on 2 kB), so what remains is Python, checks, allocation
and the call into the library. Every layer of a forward pass is timed, on one thread, in that thread's CPU time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import qcore.nn
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.registry import backend_for
from qcore.bench import peers
from qcore.bench.measure import Call
from qcore.bench.workload import DTYPES, Build, Shared, Spec, Workload
from qcore.ops.fourbit import gemm_4bit, prepare_gemm_4bit
from qcore.ops.weight4bit import weight_arguments

SIZE = 64


def specs(dtypes: Sequence[str]) -> Iterator[Spec]:
    """Each dtype with and without bias, and with gradients recorded."""
    for dtype in dtypes:
        for bias, grad in ((True, False), (False, False), (True, True)):
            variant = f"{'bias' if bias else 'no bias'}{', gradients recorded' if grad else ''}"
            yield Spec("host_cost", variant, dtype, (SIZE, SIZE), 1, _build(dtype, bias, grad))


def _build(dtype: str, bias: bool, grad: bool) -> Build:
    def build(s: Shared) -> Workload:
        kind = DTYPES[dtype]
        x, plain = torch.randn(1, SIZE, dtype=kind), torch.nn.Linear(SIZE, SIZE, bias=bias).to(kind)
        plain.weight.requires_grad_(False)
        ours = qcore.nn.Linear4bit(SIZE, SIZE, bias=bias, compute_dtype=kind, quant_type="nf4").to(kind)
        ours.load_state_dict(plain.state_dict())
        ours.to("cpu").eval()
        assert ours.weight.quant_state is not None
        weight, b = ours.weight.quant_state.weight(ours.weight), ours.bias
        handle, out, parts = prepare_gemm_4bit(weight), torch.empty(1, SIZE, dtype=kind), weight_arguments(weight)
        backend = backend_for("cpu")
        prepared = backend.prepare_gemm_4bit(weight)
        calls: dict[str, Call] = {"qcore": lambda: ours(x)}
        if s.bitsandbytes:
            theirs = peers.linear4bit(plain, "nf4", kind)
            calls["bitsandbytes"] = lambda: theirs(x)
        if s.torch:
            calls[f"torch {dtype}"] = lambda: plain(x)
        calls |= {
            "part: prepare_gemm_4bit handle": lambda: handle(x, b),
            "part: backend's prepared call": lambda: prepared(x, b, out),
            "part: result allocated": lambda: x.new_empty((1, SIZE)),
            "without handle: gemm_4bit": lambda: gemm_4bit(x, weight, b),
            "without handle: torch.ops.qcore": lambda: torch.ops.qcore.gemm_4bit(x, b, *parts),
        }
        if isinstance(backend, CffiBackend):
            calls["part: cffi call"] = _bare_call(backend, weight, x, b, out)
        return Workload(calls, grad=grad, one_thread=True)

    return build


def _bare_call(backend: CffiBackend, weight: Any, x: Tensor, b: Tensor | None, out: Tensor) -> Call:
    """The C function with arguments that were converted once."""
    function = backend._functions["gemm_4bit"]
    recorded: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> int:
        recorded.append(arguments)
        return 0

    backend._functions["gemm_4bit"] = record
    try:
        call = backend.prepare_gemm_4bit(weight)
        call(x, b, out)
    finally:
        backend._functions["gemm_4bit"] = function
    (arguments,) = recorded

    def run() -> None:
        function(*arguments)

    run.keep = call  # type: ignore[attr-defined]  # the weight's struct
    return run
