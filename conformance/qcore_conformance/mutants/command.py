"""``qcore-conformance mutants``: the kill matrix as a table, JSON and Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click

from qcore.errors import QcoreError
from qcore_conformance.mutants.runner import Control, Matrix, Row, run
from qcore_conformance.report.json_file import write_text


@click.command()
@click.option("--mutant", "names", multiple=True, help="Only this mutant (repeatable).")
@click.option("--op", "ops", multiple=True, help="Only this op (repeatable).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random input.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
@click.option("--report", type=click.Path(path_type=Path), help="Write mutants.json and mutants.md here.")
@click.option("--list", "listing", is_flag=True, help="List the mutants and run nothing.")
def mutants(
    names: tuple[str, ...], ops: tuple[str, ...], seed: int, jobs: int, report: Path | None, listing: bool
) -> None:
    """Run the suite on wrong backends: every one has to be noticed, and no right one.

    Exits with 1 if a mutant survives or a right backend fails a case, with 2 if nothing was run.
    """
    if listing:
        from qcore_conformance.mutants import all_mutants
        from qcore_conformance.mutants.native import TABLE

        for mutant in all_mutants():
            click.echo(f"{mutant.name} [{mutant.clause}] {mutant.says} ({', '.join(mutant.ops)})")
        for row in TABLE:
            click.echo(f"{row.name} [{row.clause}] {row.says} ({row.op}, behind the C ABI)")
        return
    try:
        matrix = _run_with_progress(names, ops, seed, jobs)
        if report is not None:
            write_text(report / "mutants.json", to_json(matrix))
            write_text(report / "mutants.md", to_markdown(matrix))
    except QcoreError as error:
        click.echo(f"qcore-conformance: {error}", err=True)
        sys.exit(2)
    _print(matrix)
    sys.exit(matrix.exit_code)


def _run_with_progress(names: tuple[str, ...], ops: tuple[str, ...], seed: int, jobs: int) -> Matrix:
    if not sys.stderr.isatty():

        def tell(done: int, total: int, last: Row | Control) -> None:
            if isinstance(last, Row) and not last.killed:
                click.echo(f"SURVIVED {last.mutant} in {last.op}", err=True)
            if done % 100 == 0 or done == total:
                click.echo(f"{done} of {total}", err=True)

        return run(names, ops, seed, jobs, tell)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return run(names, ops, seed, jobs, lambda done, total, last: bar.update(task, completed=done, total=total))


def _by_mutant(matrix: Matrix) -> Iterator[tuple[str, list[Row]]]:
    for name, rows in groupby(matrix.rows, key=lambda row: row.mutant):
        yield name, list(rows)


def _summary(matrix: Matrix) -> str:
    mutants_alive = {row.mutant for row in matrix.survivors}
    total = len({row.mutant for row in matrix.rows})
    passed = sum(control.passed for control in matrix.controls)
    alarms = sum(len(control.alarms) for control in matrix.controls)
    return (
        f"{total - len(mutants_alive)} of {total} mutants killed, in {len(matrix.rows) - len(matrix.survivors)} of "
        f"{len(matrix.rows)} op slots; {len({c.backend for c in matrix.controls})} right backends passed {passed} "
        f"cases with {alarms} false alarms; {matrix.seconds:.0f} s, seed {matrix.seed}"
    )


def _print(matrix: Matrix) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("mutant", "clause", "op", "level", "noticed by", "outcome", box=None, pad_edge=False)
    for name, rows in _by_mutant(matrix):
        for index, row in enumerate(rows):
            verdict = Text(row.outcome, "green") if row.killed else Text("SURVIVED", "bold red")
            # A case of another clause noticed it: fine, but the clause itself could be checked more directly.
            by = row.case_id.partition("/")[2].partition("/")[2] + ("" if row.cites or not row.killed else " *")
            first = (name, row.clause) if index == 0 else ("", "")
            table.add_row(*first, row.op, row.level, by, verdict)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if any(row.killed and not row.cites for row in matrix.rows):
        console.print("* noticed by a case that does not list the clause", highlight=False)
    for row in matrix.survivors:
        console.print(
            f"SURVIVED {row.mutant} in {row.op}: {row.says} [{row.clause}], {row.cases_run} cases", markup=False
        )
    for control in matrix.alarms:
        console.print(f"FALSE ALARM on {control.backend} in {control.op}: {control.passed} passed", markup=False)
        for alarm in control.alarms:
            console.print(f"  {alarm}", markup=False)
    console.print(_summary(matrix), highlight=False)


def to_json(matrix: Matrix) -> str:
    """The kill matrix as JSON: ``{"schema": 1, "seed", "seconds", "rows": [...], "controls": [...]}``."""
    return json.dumps({"schema": 1, **asdict(matrix)}, indent=1) + "\n"


def to_markdown(matrix: Matrix) -> str:
    """The kill matrix as Markdown, one line a mutant."""
    lines = ["# Kill matrix", "", _summary(matrix) + ".", ""]
    lines += ["| mutant | what is wrong | clause | killed in | by, at level |", "| --- | --- | --- | --- | --- |"]
    for name, rows in _by_mutant(matrix):
        killed = [row for row in rows if row.killed]
        by = "; ".join(f"`{row.case_id}`" for row in killed[:2]) + ("; ..." if len(killed) > 2 else "")
        levels = ", ".join(sorted({row.level for row in killed}))
        alive = "".join(f" **SURVIVED in {row.op}**" for row in rows if not row.killed)
        lines.append(
            f"| {name} | {rows[0].says} | {rows[0].clause} | {len(killed)}/{len(rows)} ops{alive} | {levels}: {by} |"
        )
    lines += ["", "| right backend | cases passed | false alarms |", "| --- | --- | --- |"]
    for backend, controls in groupby(matrix.controls, key=lambda control: control.backend):
        own = list(controls)
        lines.append(f"| `{backend}` | {sum(c.passed for c in own)} | {sum(len(c.alarms) for c in own)} |")
    return "\n".join(lines) + "\n"
