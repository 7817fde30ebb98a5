"""An optimizer step beside torch, bitsandbytes, torchao and its traffic, all measured in the same rounds.

Two shapes of work: one parameter of 4096 x 4096 in float32 (memory-bound), and 1000 parameters of 1000 elements
(overhead-bound), every one with its own gradient. The floor is the loop of `qcore bench cpu` for work in place, on
buffers of the optimizer's sizes: in one pass the gradient is read, parameter and states are changed where they are,
8-bit states with a scale for 256. LAMB and LARS read parameter, gradient and states once more beforehand, because no
parameter can move before the norm of all is known.

    python benchmarks/optimizers.py [--families NAME ...] [--threads N] [--seconds S] [--no-peers] [--json FILE]

Calls that take longer than a fair share of the time are measured in fewer rounds, three at least. torchao, where it is
installed, compiles its step, so the first run of a machine takes a minute longer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qcore import optim
from qcore.bench.floors import Machine
from qcore.bench.measure import Call, Effort, Samples, ratio, side_by_side
from qcore.bench.report import Load, machine, now
from qcore.bench.run import require_native

# Family -> (arguments, states, whether a norm has to be known first).
FAMILIES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "AdamW": ({}, 2, False),
    "Lion": ({}, 1, False),
    "RMSprop": ({}, 1, False),
    "Adagrad": ({}, 1, False),
    "SGD": ({"momentum": 0.9}, 1, False),
    "LAMB": ({}, 2, True),
    "LARS": ({"momentum": 0.9}, 1, True),
    "AdEMAMix": ({}, 3, False),
}
SMALL = "1000 x 1000"
COLUMNS = ("qcore 8-bit", "of floor", "qcore 32-bit", "of floor", "torch fused", "bitsandbytes 8-bit")


def with_gradients(shape: tuple[int, ...], count: int) -> list[nn.Parameter]:
    """Parameters with a gradient each, of real data: untouched pages are all one page of zeros."""
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape) * 1e-2
    return params


def step_of(kind: Callable[..., Any], params: list[nn.Parameter], **arguments: Any) -> Call:
    """A step of a new optimizer; a rate so small that the parameters stay what they are."""
    return kind(params, lr=1e-8, **arguments).step  # type: ignore[no-any-return]


def late(make: Callable[[], Call]) -> Call:
    """A call that is made when it is first called: a peer that is missing, or fails, is then reported as such."""
    made: list[Call] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


def traffic(n: int, family: str, bits: int, loops: Machine) -> Call:
    """Reads and writes what a step does, and nothing else."""
    _, states, norm_first = FAMILIES[family]
    state_bytes = states * (4 * n if bits == 32 else n + n // 64)
    changed = 4 * n + state_bytes  # parameter and states
    update, _ = loops.update(4 * n, changed)
    if not norm_first:
        return update
    (read, _) = loops.loops(4 * n + changed, 0, None)["read"]

    def run() -> None:
        read()
        update()

    return run


def bitsandbytes(name: str, params: list[nn.Parameter], **arguments: Any) -> Call:
    import bitsandbytes.optim

    return step_of(getattr(bitsandbytes.optim, name), params, **arguments)


def torchao(params: list[nn.Parameter]) -> Call:
    from torchao.optim import AdamW8bit

    return step_of(AdamW8bit, params)


def torchs(params: list[nn.Parameter]) -> dict[str, Call]:
    return {
        "torch fused": step_of(torch.optim.AdamW, params, fused=True),
        "torch foreach": step_of(torch.optim.AdamW, params, foreach=True),
        "torch unfused": step_of(torch.optim.AdamW, params, foreach=False, fused=False),
    }


def large(size: int, family: str, peers: bool, loops: Machine) -> dict[str, Call]:
    """qcore at 8 bits first; every optimizer on the same parameter and gradient."""
    arguments = FAMILIES[family][0]
    params = with_gradients((size, size), 1)
    calls = {
        "qcore 8-bit": step_of(getattr(optim, f"{family}8bit"), params, **arguments),
        "floor 8-bit": traffic(size * size, family, 8, loops),
        "qcore 32-bit": step_of(getattr(optim, f"{family}32bit"), params, **arguments),
        "floor 32-bit": traffic(size * size, family, 32, loops),
    }
    if family == "AdamW":
        calls |= torchs(params)
    if peers:
        for bits in (8, 32):
            name = f"{family}{bits}bit"
            calls[f"bitsandbytes {bits}-bit"] = late(lambda name=name: bitsandbytes(name, params, **arguments))
        if family == "AdamW" and find_spec("torchao") is not None:
            calls["torchao 8-bit"] = late(lambda: torchao(params))
    return calls


def small(peers: bool) -> dict[str, Call]:
    """AdamW on 1000 parameters of 1000 elements."""
    params = with_gradients((1000,), 1000)
    calls = {
        "qcore 8-bit": step_of(optim.AdamW8bit, params, min_8bit_size=0),
        "qcore 32-bit": step_of(optim.AdamW32bit, params),
        **torchs(params),
    }
    if peers:
        calls["bitsandbytes 8-bit"] = late(lambda: bitsandbytes("AdamW8bit", params, min_8bit_size=0))
    return calls


def ratios(times: Mapping[str, Samples], family: str) -> Iterator[tuple[str, float]]:
    """What the figures are for, medians of ratios within rounds."""
    for bits in (8, 32):
        if f"floor {bits}-bit" in times:
            yield f"qcore {bits}-bit / floor", ratio(times[f"qcore {bits}-bit"], times[f"floor {bits}-bit"])
        if "torch fused" in times:
            yield f"qcore {bits}-bit / torch fused", ratio(times[f"qcore {bits}-bit"], times["torch fused"])
        if family == SMALL:
            yield f"qcore {bits}-bit / torch foreach", ratio(times[f"qcore {bits}-bit"], times["torch foreach"])
    for peer in ("bitsandbytes 8-bit", "torchao 8-bit"):
        if peer in times:
            yield f"{peer} / qcore 8-bit", ratio(times[peer], times["qcore 8-bit"])


def entry(family: str, times: Mapping[str, Samples], errors: Mapping[str, str]) -> dict[str, Any]:
    """What the JSON file holds of one family."""
    calls = {
        name: {
            "ms": round(taken.median * 1e3, 3),
            "quartiles_ms": [round(value * 1e3, 3) for value in taken.quartiles],
            "rounds": len(taken.by_round),
        }
        for name, taken in times.items()
    }
    return {
        "optimizer": family,
        "ms": calls,
        "ratios": {name: round(value, 3) for name, value in ratios(times, family)},
        "errors": dict(errors),
    }


def row(found: Mapping[str, Any]) -> list[str]:
    cells, before = [], ""
    for column in COLUMNS:
        if column == "of floor":
            value = found["ratios"].get(f"{before} / floor")
            cells.append("-" if value is None else f"{value:.2f}x")
        else:
            call = found["ms"].get(column)
            cells.append("-" if call is None else f"{call['ms']:.1f}")
        before = column
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (default: 4096)")
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, SMALL], choices=[*FAMILIES, SMALL])
    parser.add_argument("--threads", type=int, help="threads of every library (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each optimizer, about (default: 10)")
    parser.add_argument("--rounds", type=int, default=25, help="at most (default: 25)")
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes and torchao out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    require_native()
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    console, load, began = Console(width=130), Load(), now()
    # As many bytes as the largest step goes over: four float32 values an element, and the gradient.
    loops = Machine(torch.get_num_threads(), 20 * options.size**2)
    results = []
    for family in options.families:
        one = family == SMALL
        calls = small(not options.no_peers) if one else large(options.size, family, not options.no_peers, loops)
        effort = Effort(options.rounds, options.seconds, slice_seconds=0.004 if one else 0.0)
        results.append(entry(family, *side_by_side(calls, effort)))
        console.print(family, results[-1]["ratios"], results[-1]["errors"] or "", style="dim")
    table = Table("optimizer", *COLUMNS)
    table.title = f"{options.size} x {options.size} float32, {torch.get_num_threads()} threads, ms a step"
    for found in results:
        table.add_row(found["optimizer"], *row(found))
    console.print(table)
    others = load.of_others()
    console.print(f"others used {others:.0%} of the processor" if others is not None else "")
    if options.json:
        record = {
            "schema": 1,
            "kind": "optimizer steps",
            "command": " ".join(["python", *sys.argv]),
            "started": began,
            "machine": {**machine(torch.get_num_threads()), "others_cpu_share": others},
            "settings": {"size": options.size, "rounds": options.rounds, "seconds": options.seconds},
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TORCH_LOGS", "-inductor")
    main()
