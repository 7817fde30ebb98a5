"""``qcore bench``: speed beside torch, bitsandbytes and what the machine can do at most."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qcore.bench import peers as known_peers
from qcore.bench import plot as roofline
from qcore.bench.floors import UNITS, Machine
from qcore.bench.measure import Effort
from qcore.bench.report import KIND, SCHEMA, Load, Report, Result, machine, now, write_json
from qcore.bench.run import ROWS, SHAPES, Selection, known_ops, parse_shape, plan, require_native, run
from qcore.bench.workload import DTYPES
from qcore.cli.bench_gpu import gpu_command
from qcore.cli.bench_tables import print_report
from qcore.cli.console import console

_QUICK_SHAPES, _QUICK_ROWS, _QUICK_DTYPES = ("4096x4096",), (1, 16, 512), ("bf16",)
_QUICK, _FULL = Effort(rounds=7, seconds=0.3, slice_seconds=0.002), Effort(rounds=21, seconds=1.0)
# Of the loops that say what memory gives: beyond every cache, or in short.
_LOOP_BYTES, _QUICK_LOOP_BYTES = 256 << 20, 32 << 20


@click.group("bench")
def command() -> None:
    """Measure how fast qcore is on this machine."""


command.add_command(gpu_command)


@command.command("cpu")
@click.option("--op", "ops", multiple=True, help="Only this op or layer (repeatable); an unknown one lists all.")
@click.option(
    "--shape", "shapes", multiple=True, metavar="OUTxIN", help=f"Of the weight. [default: {' '.join(SHAPES)}]"
)
@click.option("--m", "rows", multiple=True, type=click.IntRange(1, 65536), help=f"Rows. [default: {ROWS}]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="[default: bf16 f32]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of every library. [default: torch's own choice]")
@click.option("--rounds", type=click.IntRange(3), help="Most rounds of a workload. [default: 21, quick: 7]")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="A workload. [default: 1, quick: 0.3]")
@click.option("--quick", is_flag=True, help="4096x4096 in bf16 with 1, 16 and 512 rows, fewer rounds: about a minute.")
@click.option("--peers", default=",".join(known_peers.NAMES), show_default=True, help="Some of these, or none.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw a roofline here (.png or .svg).")
@click.option("--allow-reference", is_flag=True, help="Time the NumPy reference if it is what serves CPU tensors.")
def cpu(
    ops: tuple[str, ...],
    shapes: tuple[str, ...],
    rows: tuple[int, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    rounds: int | None,
    seconds: float | None,
    quick: bool,
    peers: str,
    json_path: Path | None,
    plot_path: Path | None,
    allow_reference: bool,
) -> int:
    """Time every op and layer beside torch, bitsandbytes and the floor that this machine sets.

    All that is compared is timed in the same rounds; figures are medians. The floor is the least time in which this
    machine can read and write the op's bytes and do its multiplications, from loops that do nothing else. Ctrl-C and
    SIGTERM print and write what there is.
    """
    began, started = time.monotonic(), now()
    default = _QUICK if quick else _FULL
    seconds = seconds or default.seconds
    effort = Effort(rounds or default.rounds, seconds, min(default.slice_seconds, seconds / 10))
    selection = Selection(
        known_ops(ops),
        tuple(parse_shape(text) for text in shapes or (_QUICK_SHAPES if quick else SHAPES)),
        rows or (_QUICK_ROWS if quick else ROWS),
        dtypes or (_QUICK_DTYPES if quick else ("bf16", "f32")),
    )
    statuses = known_peers.status(known_peers.parse(peers))
    available = frozenset(name for name, status in statuses.items() if status.available)
    if plot_path is not None:
        roofline.check_path(plot_path)
    if not allow_reference:
        require_native()
    specs = plan(selection)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    results: list[Result] = []
    complete, load = False, Load()
    try:
        largest = max(4 * n * k for n, k in selection.shapes)
        loops = Machine(torch.get_num_threads(), max(largest, _QUICK_LOOP_BYTES if quick else _LOOP_BYTES))
        rates = loops.rates(effort)
        with _bar() as progress:
            task = progress.add_task("", total=len(specs))
            for result in run(
                specs, loops, available, effort, lambda spec: progress.update(task, description=spec.label)
            ):
                results.append(result)
                progress.advance(task)
        complete = True
    except KeyboardInterrupt:
        if not results:
            raise
        click.echo(f"interrupted after {len(results)} of {len(specs)} workloads", err=True)
    finally:
        torch.set_num_threads(before)
    report = Report(
        SCHEMA,
        KIND,
        shlex.join(["qcore", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else KIND,
        started,
        time.monotonic() - began,
        complete,
        machine(loops.threads) | {"others_cpu_share": load.of_others()},
        {"rounds": effort.rounds, "seconds": effort.seconds, "slice_seconds": effort.slice_seconds, "quick": quick},
        statuses,
        Path(loops.source).name,
        {unit: loops.unit(unit) for unit in UNITS},
        rates,
        results,
    )
    print_report(report)
    if json_path is not None:
        write_json(report, json_path)
    if plot_path is not None:
        roofline.roofline(report, plot_path)
    return 0 if complete else 130


def _bar() -> Progress:
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    return Progress(*columns, console=console(stderr=True), transient=True)
