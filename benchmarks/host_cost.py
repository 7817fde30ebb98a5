"""What a call costs on the host: ``Linear4bit`` 64x64 with one row, beside ``nn.Linear`` and bitsandbytes.

The work itself is small enough not to count (8,192 operations on 2 kB), so what remains is Python, checks, allocation
and the call into the library. Every layer is timed: the bare cffi call, the backend's prepared call, the handle of
``prepare_gemm_4bit``, the op as a function and as ``torch.ops.qcore.gemm_4bit``, the module. It runs on one thread and
counts that thread's CPU time: waking a team of threads, or another process's turn, would be measured otherwise.

    python benchmarks/host_cost.py [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import bitsandbytes
import torch
from measure import Call, require_native, side_by_side, write_json
from rich.console import Console
from rich.table import Table

import qcore
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.registry import backend_for
from qcore.ops.fourbit import gemm_4bit, prepare_gemm_4bit
from qcore.ops.weight4bit import weight_arguments

SIZE = 64


def calls(dtype: torch.dtype, bias: bool) -> dict[str, Call]:
    """Every layer of a forward pass, ``nn.Linear`` first."""
    x = torch.randn(1, SIZE, dtype=dtype)
    plain = torch.nn.Linear(SIZE, SIZE, bias=bias).to(dtype)
    ours = qcore.nn.Linear4bit(SIZE, SIZE, bias=bias, compute_dtype=dtype, quant_type="nf4").to(dtype)
    theirs = bitsandbytes.nn.Linear4bit(SIZE, SIZE, bias=bias, compute_dtype=dtype, quant_type="nf4").to(dtype)
    for layer in (ours, theirs):
        layer.load_state_dict(plain.state_dict())
        layer.to("cpu").eval()
    assert ours.weight.quant_state is not None
    weight = ours.weight.quant_state.weight(ours.weight)
    handle, out = prepare_gemm_4bit(weight), torch.empty(1, SIZE, dtype=dtype)
    backend = backend_for("cpu")
    prepared, parts, b = backend.prepare_gemm_4bit(weight), weight_arguments(weight), ours.bias
    found: dict[str, Call] = {
        "nn.Linear": lambda: plain(x),
        "qcore Linear4bit": lambda: ours(x),
        "bitsandbytes Linear4bit": lambda: theirs(x),
        "prepare_gemm_4bit handle": lambda: handle(x, b),
        "backend prepared call": lambda: prepared(x, b, out),
        "qcore.ops.fourbit.gemm_4bit": lambda: gemm_4bit(x, weight, b),
        "torch.ops.qcore.gemm_4bit": lambda: torch.ops.qcore.gemm_4bit(x, b, *parts),
        "torch.empty of the result": lambda: x.new_empty((1, SIZE)),
    }
    if isinstance(backend, CffiBackend):
        found["cffi call"] = _bare_call(backend, prepared, x, b, out)
    return found


def _bare_call(
    backend: CffiBackend, prepared: object, x: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor
) -> Call:
    """The C function with arguments that were converted once."""
    function = backend._functions["gemm_4bit"]
    recorded: list[tuple[object, ...]] = []

    def record(*arguments: object) -> int:
        recorded.append(arguments)
        return 0

    backend._functions["gemm_4bit"] = record
    try:
        backend.prepare_gemm_4bit(prepared.weight)(x, b, out)  # type: ignore[attr-defined]
    finally:
        backend._functions["gemm_4bit"] = function
    (arguments,) = recorded
    return lambda: function(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--allow-reference", action="store_true", help="measure the NumPy reference")
    options = parser.parse_args()
    require_native(options.allow_reference)
    torch.set_num_threads(1)
    rounds, seconds = (15, 0.005) if options.quick else (61, 0.01)
    console, results = Console(), {}
    for dtype in (torch.float32, torch.bfloat16):
        for bias, grad in ((True, False), (False, False), (True, True)):
            title = f"{str(dtype).removeprefix('torch.')}, {'bias' if bias else 'no bias'}, "
            title += "gradients recorded" if grad else "no_grad"
            with torch.set_grad_enabled(grad):
                timings = side_by_side(calls(dtype, bias), rounds, seconds, time.thread_time)
            results[title] = timings
            table = Table("layer", "us a call", "of nn.Linear", title=f"{SIZE}x{SIZE}, 1 row, {title}")
            for name, timing in timings.items():
                table.add_row(name, f"{timing.median * 1e6:.2f}", f"{timing.ratio:.2f}x")
            console.print(table)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
