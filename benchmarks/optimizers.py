"""An optimizer step beside torch, bitsandbytes and the floor, all measured in the same rounds.

Two shapes of work: one parameter of 4096 x 4096 in float32 (memory-bound), and 1000 parameters of 1000 elements
(overhead-bound), every one with its own gradient. The floor of an optimizer is its traffic and nothing else, on buffers
of its own sizes: the gradient is read, parameter and states are read and written, 8-bit states with a scale for 256.

    python benchmarks/optimizers.py [--size N] [--threads N] [--rounds N] [--peer-rounds N] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.optim as B
import torch
from measure import Call, Timing, machine, require_native, side_by_side, write_json
from rich.console import Console
from rich.table import Table
from torch import nn

from qcore import optim

# Family -> (arguments, bytes a parameter read and written at 32 bits, at 8 bits), scales left out.
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "AdamW": ({}, 28, 16),
    "LAMB": ({}, 28, 16),
    "Lion": ({}, 20, 14),
    "SGD": ({"lr": 1e-3, "momentum": 0.9}, 20, 14),
    "LARS": ({"lr": 1e-3, "momentum": 0.9}, 20, 14),
    "RMSprop": ({}, 20, 14),
    "Adagrad": ({}, 20, 14),
    "AdEMAMix": ({}, 36, 18),
}
STATES = {"AdamW": 2, "LAMB": 2, "AdEMAMix": 3}


def with_gradients(shape: tuple[int, ...], count: int) -> list[nn.Parameter]:
    """Parameters with a gradient each, of real data: untouched pages are all one page of zeros."""
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape) * 1e-2
    return params


def step_of(kind: Callable[..., Any], params: list[nn.Parameter], **arguments: Any) -> Call:
    """A step of a new optimizer; a rate so small that the parameters stay what they are."""
    return kind(params, **{**arguments, "lr": 1e-8}).step  # type: ignore[no-any-return]


def traffic(n: int, family: str, bits: int) -> Call:
    """Reads and writes what a step does, as fast as torch can: ``a += b`` on bytes, one read of the gradient."""
    _, wide, narrow = FAMILIES[family]
    total = (wide if bits == 32 else narrow) * n
    scales = STATES.get(family, 1) * 8 * (n // 256) if bits == 8 else 0
    both = torch.randn((total - 4 * n + scales) // 8)  # read and written
    gradient = torch.randn(n)

    def run() -> None:
        both.neg_()
        gradient.sum()

    return run


def large(size: int, family: str, peers: bool) -> dict[str, Call]:
    """qcore at 8 bits first; every optimizer on the same parameter and gradient."""
    arguments = FAMILIES[family][0]
    params = with_gradients((size, size), 1)
    calls = {
        "qcore 8-bit": step_of(getattr(optim, f"{family}8bit"), params, **arguments),
        "qcore 32-bit": step_of(getattr(optim, f"{family}32bit"), params, **arguments),
        "traffic 8-bit": traffic(size * size, family, 8),
        "traffic 32-bit": traffic(size * size, family, 32),
    }
    if family == "AdamW":
        calls["torch fused"] = step_of(torch.optim.AdamW, params, fused=True)
        calls["torch foreach"] = step_of(torch.optim.AdamW, params, foreach=True)
    if peers:
        calls["bitsandbytes 8-bit"] = step_of(getattr(B, f"{family}8bit"), params, **arguments)
        if family != "AdEMAMix":  # its 32-bit class fails
            calls["bitsandbytes 32-bit"] = step_of(getattr(B, f"{family}32bit"), params, **arguments)
    return calls


def many(count: int, elements: int) -> dict[str, Call]:
    """AdamW on many small parameters."""
    params = with_gradients((elements,), count)
    return {
        "qcore 8-bit": step_of(optim.AdamW8bit, params, min_8bit_size=0),
        "qcore 32-bit": step_of(optim.AdamW32bit, params),
        "torch foreach": step_of(torch.optim.AdamW, params, foreach=True),
        "torch fused": step_of(torch.optim.AdamW, params, fused=True),
    }


def bitsandbytes_serves(family: str) -> bool:
    """LAMB8bit and LARS8bit of bitsandbytes fail above 4096 elements."""
    param = nn.Parameter(torch.zeros(8192))
    param.grad = torch.ones(8192)
    try:
        step_of(getattr(B, f"{family}8bit"), [param], **FAMILIES[family][0])()
    except (RuntimeError, KeyError, ValueError, NotImplementedError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (default: 4096)")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--threads", type=int, help="threads of every library (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer-rounds", type=int, default=3, help="rounds that include bitsandbytes; 0 for none")
    parser.add_argument("--quick", action="store_true", help="1024 x 1024, 5 rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--allow-reference", action="store_true", help="measure the NumPy reference")
    options = parser.parse_args()
    require_native(options.allow_reference)
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    size, rounds = (min(options.size, 1024), 5) if options.quick else (options.size, options.rounds)
    results: dict[str, Any] = {}
    table = Table(title=f"{size} x {size} float32, {torch.get_num_threads()} threads, {rounds} rounds, ms a step")
    columns = (
        "qcore 8-bit",
        "of floor",
        "qcore 32-bit",
        "of floor",
        "torch fused",
        "torch foreach",
        "bitsandbytes 8-bit",
    )
    for heading in ("optimizer", *columns):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    console = Console(width=130)
    for family in options.families:
        timings = side_by_side(large(size, family, peers=False), rounds, 0.0)
        if options.peer_rounds and bitsandbytes_serves(family):
            slow = side_by_side(large(size, family, peers=True), options.peer_rounds, 0.0)
            timings |= {name: timing for name, timing in slow.items() if name.startswith("bitsandbytes")}
        results[family] = timings
        table.add_row(family, *row(timings))
        console.print(f"measured {family}", style="dim")
    results["1000 x 1000"] = small = side_by_side(many(1000, 1000), max(rounds, 5), 0.0)
    console.print(table)
    console.print("1000 parameters of 1000 elements, ms a step, and times torch foreach:")
    for name, timing in small.items():
        of_foreach = timing.median / small["torch foreach"].median
        console.print(f"  {name:14} {timing.median * 1e3:8.2f}  {of_foreach:.2f}x")
    if options.json:
        write_json(options.json, results)
    console.print(f"on {machine()['processor']}")


def row(timings: dict[str, Timing]) -> list[str]:
    def milliseconds(name: str) -> str:
        return f"{timings[name].median * 1e3:.1f}" if name in timings else "-"

    def of_floor(bits: int) -> str:
        return f"{timings[f'qcore {bits}-bit'].median / timings[f'traffic {bits}-bit'].median:.2f}x"

    ours = [milliseconds("qcore 8-bit"), of_floor(8), milliseconds("qcore 32-bit"), of_floor(32)]
    return [*ours, *map(milliseconds, ("torch fused", "torch foreach", "bitsandbytes 8-bit"))]


if __name__ == "__main__":
    main()
