"""Two builds of a native backend beside each other, call by call in the same rounds: what a change to a kernel gains.

    python benchmarks/two_builds.py before.so after.so --op gemm_4bit --shape 4096x4096 --m 1 4 16
    python benchmarks/two_builds.py before.so after.so --op int8_linear --threads 1

A build is a ``libqcore_cpu.so`` (``cmake -S backends/cpu -B build/before && cmake --build build/before``), or whatever
else ``QCORE_BACKEND`` takes. Each gets tensors of its own. A ratio is the median of the ratios within rounds: above 1
the second is faster.
"""

from __future__ import annotations

import argparse
from contextvars import copy_context
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

import qcore
from qcore.backend.interface import OPS, Backend
from qcore.backend.registry import get_backend
from qcore.bench.measure import Call, Effort, Samples, ratio, side_by_side
from qcore.bench.run import Selection, known_ops, parse_shape, plan
from qcore.bench.workload import DTYPES, Shared, Spec


def calls_of(spec: Spec, builds: list[Backend]) -> dict[str, Call]:
    """The workload of each build, in a context in which that build is selected for good."""
    calls: dict[str, Call] = {}
    for name, build in zip(("first", "second"), builds, strict=True):
        context = copy_context()
        context.run(qcore.use_backend(build).__enter__)
        with torch.no_grad():
            work = context.run(spec.build, Shared(spec.shape, frozenset()))
        calls[name] = partial(context.run, work.calls["qcore"])
    return calls


def microseconds(samples: Samples) -> str:
    return f"{1e6 * samples.median:.1f} ({1e6 * min(samples.by_round.values()):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", help="a shared library, or the name of a backend")
    parser.add_argument("second")
    parser.add_argument("--op", nargs="+", default=["gemm_4bit"], metavar="OP", help=", ".join(OPS))
    parser.add_argument("--shape", nargs="+", type=parse_shape, default=[(4096, 4096)], metavar="OUTxIN")
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64], help="rows of activations")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=[*DTYPES])
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each workload, about (default: 2)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    builds = [get_backend(name) for name in (options.first, options.second)]
    table = Table("workload", "first, us (least)", "second, us (least)", "first / second")
    table.title = f"{torch.get_num_threads()} threads"
    chosen = Selection(known_ops(options.op), tuple(options.shape), tuple(options.m), tuple(options.dtype))
    for spec in plan(chosen):
        samples, errors = side_by_side(calls_of(spec, builds), Effort(101, options.seconds))
        if errors:
            table.add_row(spec.label, microseconds(samples["first"]), errors["second"], "")
            continue
        first, second = samples["first"], samples["second"]
        table.add_row(spec.label, microseconds(first), microseconds(second), f"{ratio(first, second):.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
