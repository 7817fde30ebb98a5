"""A run: which workloads, and each of them measured beside its peers and its floor."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qcore.backend.interface import OPS
from qcore.backend.registry import backend_for
from qcore.bench import host, layers, ops
from qcore.bench.floors import Machine, floor
from qcore.bench.measure import Call, Effort, Samples, ratio, side_by_side, total
from qcore.bench.report import Floor, Result, Timing
from qcore.bench.workload import Shared, Spec, Workload
from qcore.errors import BackendUnavailable, InvalidArgument

# What can be asked for: the ops, the layers, and two questions about the whole.
NAMES = (*OPS, "linear4bit", "linear8bitlt", "alternate", "host_cost")
SHAPES = ("4096x4096", "4096x14336", "576x1536")
ROWS = (1, 4, 16, 64, 128, 512)
_LARGEST_SIDE = 1 << 17


@dataclass(frozen=True)
class Selection:
    """What is measured. Shapes are those of weights, ``(N, K)`` = (out_features, in_features)."""

    ops: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    dtypes: tuple[str, ...]


def known_ops(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, or all of them if there are none; ``InvalidArgument`` for one that is unknown."""
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InvalidArgument(f"bench: --op {name!r} is unknown; {hint}There are: {', '.join(NAMES)}")
    return tuple(names) or NAMES


def parse_shape(text: str) -> tuple[int, int]:
    """``"4096x14336"`` as (out_features, in_features)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    n, k = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (0 < n <= _LARGEST_SIDE and 0 < k <= _LARGEST_SIDE):
        raise InvalidArgument(
            f"bench: --shape {text!r}: expected OUTxIN, such as 4096x14336, each from 1 to {_LARGEST_SIDE}"
        )
    return n, k


def require_native() -> None:
    """Refuse to time the NumPy reference, whose times say nothing."""
    if backend_for("cpu").name == "cpu_reference":
        raise BackendUnavailable(
            "bench: CPU tensors are served by the NumPy reference, whose times say nothing about qcore; install the "
            "native backend (pip install qcore-cpu), or pass --allow-reference to time the reference itself"
        )


def plan(chosen: Selection) -> list[Spec]:
    """The workloads, those of one shape together."""
    first = chosen.dtypes[0]
    found: list[Spec] = []
    for shape in chosen.shapes:
        found += ops.specs(shape, chosen.dtypes, chosen.rows)
        found += layers.specs(shape, first, chosen.rows)
    found += layers.alternating(chosen.shapes[0], first, chosen.rows)
    found += host.specs(chosen.dtypes)
    return [spec for spec in found if spec.op in chosen.ops]


def run(
    specs: Sequence[Spec],
    machine: Machine,
    peer_names: frozenset[str],
    effort: Effort,
    starting: Callable[[Spec], None],
) -> Iterator[Result]:
    """Measure each workload; ``starting`` is told before each."""
    shared: Shared | None = None
    for spec in specs:
        starting(spec)
        if shared is None or shared.shape != spec.shape:
            shared = None  # the memory of one shape goes before that of the next comes
            shared = Shared(spec.shape, peer_names)
        with torch.no_grad():
            work = spec.build(shared)
        yield measure(spec, work, machine, effort)


def measure(spec: Spec, work: Workload, machine: Machine, effort: Effort) -> Result:
    """Time a workload, its peers and the loops of its floor in the same rounds."""
    loops = {} if work.one_thread else machine.loops(work.read, work.written, work.unit, work.in_place)
    calls: dict[str, Call] = {**work.calls, **{f"loop {name}": call for name, (call, _) in loops.items()}}
    clock = time.thread_time if work.one_thread else time.perf_counter
    with torch.set_grad_enabled(work.grad), _threads(1 if work.one_thread else machine.threads):
        samples, errors = side_by_side(calls, effort, clock)
    own = samples["qcore"]
    timings = {name: samples[name] for name in work.calls if name in samples}
    sums = {name: parts for name, parts in work.sums.items() if {name, *parts} <= samples.keys()}
    return Result(
        spec.op,
        spec.variant,
        spec.dtype,
        spec.shape,
        spec.m,
        1 if work.one_thread else machine.threads,
        {name: Timing.of(taken) for name, taken in timings.items()},
        {name: ratio(taken, own) for name, taken in timings.items() if name != "qcore"},
        work.read,
        work.written,
        work.operations,
        work.unit,
        _floor(work, machine, samples, loops),
        {name: ratio(samples[name], total([samples[part] for part in parts])) for name, parts in sums.items()},
        errors,
    )


def _floor(
    work: Workload, machine: Machine, samples: dict[str, Samples], loops: dict[str, tuple[Call, float]]
) -> Floor | None:
    scales = {name: scale for name, (_, scale) in loops.items()}
    if work.unit is not None and work.operations:
        scales["multiply"] = work.operations / machine.operations(work.unit)
    taken = {name: samples[f"loop {name}"] for name in loops}
    least = floor(taken, scales, work.read, work.written)
    if least is None:
        return None
    parts = {name: taken[name].median * scale for name, scale in scales.items()}
    multiply = parts.get("multiply", 0.0)
    bound = "multiply" if multiply >= least.median * (1 - 1e-9) and multiply > 0 else "memory"
    return Floor(least.median, parts, bound, ratio(samples["qcore"], least))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
