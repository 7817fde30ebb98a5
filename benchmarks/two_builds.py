"""Two builds of a native backend beside each other, call by call in the same rounds: what a change to a kernel gains.

    python benchmarks/two_builds.py before.so after.so --op gemm_4bit --shape 4096x4096 --m 1 4 16
    python benchmarks/two_builds.py before.so after.so --op int8_linear --shape 576x1536 --m 1 --copies 140

A build is a ``libqcore_cpu.so`` (``cmake -S backends/cpu -B build/before && cmake --build build/before``), or whatever
else ``QCORE_BACKEND`` takes. Each gets tensors of its own. A ratio is the median of the ratios within rounds: above 1
the second is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from functools import partial
from itertools import cycle

import torch
from rich.console import Console
from rich.table import Table

import qcore
from qcore.backend.interface import OPS, Backend
from qcore.backend.registry import get_backend
from qcore.bench.measure import Call, Effort, Samples, ratio, side_by_side
from qcore.bench.run import Selection, known_ops, parse_shape, plan
from qcore.bench.workload import DTYPES, Shared, Spec


@contextmanager
def selected(build: Backend) -> Iterator[Context]:
    """A context in which a build is selected: to enter it costs a call less than to select the build anew."""
    context, stack = copy_context(), ExitStack()
    context.run(stack.enter_context, qcore.use_backend(build))
    yield context
    context.run(stack.close)


def calls_of(spec: Spec, contexts: Mapping[str, Context], copies: int) -> dict[str, Call]:
    """The workload of each build, its copies in turn."""
    calls: dict[str, Call] = {}
    for name, context in contexts.items():
        with torch.no_grad():
            works = [context.run(spec.build, Shared(spec.shape, frozenset())) for _ in range(copies)]
        turn = cycle([work.calls["qcore"] for work in works])
        calls[name] = partial(context.run, lambda turn=turn: next(turn)())
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
    parser.add_argument("--copies", type=int, default=1, help="weights in turn, as in a model")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each workload, about (default: 2)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    table = Table("workload", "first, us (least)", "second, us (least)", "first / second")
    table.title = f"{torch.get_num_threads()} threads"
    chosen = Selection(known_ops(options.op), tuple(options.shape), tuple(options.m), tuple(options.dtype))
    with ExitStack() as stack:
        names = {"first": options.first, "second": options.second}
        contexts = {key: stack.enter_context(selected(get_backend(name))) for key, name in names.items()}
        for spec in plan(chosen):
            samples, errors = side_by_side(calls_of(spec, contexts, options.copies), Effort(101, options.seconds))
            first, second = samples["first"], samples.get("second")
            if second is None:
                table.add_row(spec.label, microseconds(first), errors["second"], "")
            else:
                table.add_row(spec.label, microseconds(first), microseconds(second), f"{ratio(first, second):.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
