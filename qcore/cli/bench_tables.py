"""What ``qcore bench`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from qcore.bench.report import Report, Result
from qcore.cli.console import console

_WIDTH = 140
# Above this share of the processor in other hands, figures are not to be relied upon.
_DISTURBED = 0.05


def print_report(report: Report) -> None:
    """The machine, the peers, the floors, a table for each shape, then turns and host costs."""
    out, said = console(log_width=_WIDTH), report.machine
    out.print(
        f"{said['processor']}, {said['cores']} cores, {said['threads']} threads, {said['isa']}, "
        f"backend {said['backend']}, {report.started}",
        soft_wrap=True,
    )
    for name, status in report.peers.items():
        words = f"{name} {status.version or ''}".strip()
        state = "takes part" if status.available else "left out"
        out.print(f"{words}: {state}{f' ({status.note})' if status.note else ''}", soft_wrap=True)
    rates = report.rates
    out.print(
        f"floors by {report.loops}: read {rates['read'] / 1e9:.1f}, write {rates['write'] / 1e9:.1f}, "
        f"copy {rates['copy'] / 1e9:.1f} GB/s (8 MB again and again: read {rates['read_8MB'] / 1e9:.1f}); "
        + ", ".join(f"{unit} {rates[unit] / 1e12:.2f} T/s ({name})" for unit, name in report.units.items()),
        soft_wrap=True,
    )
    share = said["others_cpu_share"]
    if share is not None and share > _DISTURBED:
        out.print(
            f"Disturbed: other programs used {share:.0%} of the processor meanwhile. Threads that wait for each other "
            "then take ten times as long; measure again on a machine at rest.",
            style="bold",
            soft_wrap=True,
        )
    with_floor = [result for result in report.results if result.floor is not None]
    for shape in dict.fromkeys(result.shape for result in with_floor):
        out.print(_table([result for result in with_floor if result.shape == shape], shape))
    for op, table in (("alternate", _turns_table), ("host_cost", _host_table)):
        chosen = [result for result in report.results if result.op == op]
        if chosen:
            out.print(table(chosen))
    for result in report.results:
        for name, error in result.errors.items():
            rows = "" if result.m is None else f" M={result.m}"
            out.print(f"{result.op} {result.variant} {result.dtype}{rows}: {name}: {error}", soft_wrap=True)


def _table(results: Sequence[Result], shape: tuple[int, int]) -> Table:
    table = Table(title=f"weight {shape[0]}x{shape[1]}; under a peer's name: how many times faster qcore is")
    table.add_column("op", overflow="fold")
    for name in ("M", "ms", "±%", "GB/s", "TF/s", "floor ms", "x floor", "torch f32", "torch bf16", "bitsandbytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        timing, floor = r.timings["qcore"], r.floor
        assert floor is not None
        table.add_row(
            " ".join(filter(None, (r.op, r.variant, r.dtype))),
            "" if r.m is None else str(r.m),
            f"{timing.median * 1e3:.3f}",
            f"{(timing.high - timing.low) / timing.median * 50:.0f}",
            f"{r.gb_per_s:.1f}",
            f"{r.tflop_per_s:.2f}" if r.operations else "",
            f"{floor.seconds * 1e3:.3f}{'*' if floor.bound == 'multiply' else ' '}",
            f"{floor.over:.2f}",
            *(_ratio(r, name) for name in ("torch f32", "torch bf16", "bitsandbytes")),
        )
    table.caption = "±: half the distance of the quartiles. * the multiplications set the floor, not the bytes."
    return table


def _ratio(result: Result, name: str) -> str:
    if name in result.errors:
        return "error"
    return f"{result.ratios[name]:.2f}x" if name in result.ratios else "-"


def _turns_table(results: Sequence[Result]) -> Table:
    n, k = results[0].shape
    table = Table(title=f"turns of torch (linear, gelu) and Linear4bit, {n}x{k}, {results[0].dtype}")
    for name in ("M", "turns ms", "torch alone ms", "Linear4bit alone ms", "turns / sum", "bitsandbytes: turns / sum"):
        table.add_column(name, justify="right")
    for r in results:
        parts = (f"{r.timings[name].median * 1e3:.3f}" for name in ("qcore", "torch alone", "qcore alone"))
        theirs = f"{r.over_sum['bitsandbytes']:.3f}" if "bitsandbytes" in r.over_sum else "-"
        table.add_row(str(r.m), *parts, f"{r.over_sum['qcore']:.3f}", theirs)
    return table


def _host_table(results: Sequence[Result]) -> Table:
    table = Table(title="host cost of Linear4bit 64x64, 1 row, 1 thread: us of CPU time")
    table.add_column("call", overflow="fold")
    for r in results:
        table.add_column(f"{r.dtype}, {r.variant}", justify="right")
    columns = [{_plain(name): timing.median for name, timing in r.timings.items()} for r in results]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(f"{column[name] * 1e6:.2f}" if name in column else "-" for column in columns))
    table.add_row("qcore / torch", *(f"{_over_torch(r):.2f}" if _over_torch(r) else "-" for r in results))
    return table


def _plain(name: str) -> str:
    return {"qcore": "qcore Linear4bit", "bitsandbytes": "bitsandbytes Linear4bit"}.get(
        name, "torch Linear" if name.startswith("torch ") else name
    )


def _over_torch(result: Result) -> float:
    return next((1 / ratio for name, ratio in result.ratios.items() if name == f"torch {result.dtype}"), 0.0)
