"""``qcore-conformance``: run the suite, list its cases, reproduce one.

Exit codes: 0 if everything that ran passed, 1 for any failure, 2 if the question makes no sense (no such backend, op,
level or case) or nothing ran.
"""

from __future__ import annotations

import difflib
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from qcore.errors import BackendError, QcoreError
from qcore_conformance.model import LEVELS, REQUIRED_LEVELS, Case, Outcome, Report, Result

# Subcommands that live in modules of their own, imported when they are asked for.
COMMANDS: Mapping[str, str] = {
    "mutants": "qcore_conformance.mutants.command:mutants",
    "perf": "qcore_conformance.perf:perf",
    "diff": "qcore_conformance.diff:diff_command",
    "record": "qcore_conformance.record:record",
}
_FINE = (Outcome.PASSED, Outcome.UNSUPPORTED, Outcome.NOT_RUN, Outcome.WAIVED)


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name].partition(":")
            command: click.Command = getattr(import_module(module), attribute)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qcore-quant")
def main() -> None:
    """Is this backend right? Run the conformance suite of qcore on any backend."""


def fail(text: str) -> None:
    """Say what is wrong with the question and exit with 2."""
    click.echo(f"qcore-conformance: {text}", err=True)
    sys.exit(2)


def backend_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--backend`` and ``--device``, the same everywhere."""
    command = click.option("--device", help="torch device to test on, such as cuda:1 (default: the backend's own).")(
        command
    )
    return click.option(
        "--backend",
        required=True,
        help="Name of a backend, path of a shared library with the C ABI, or an importable module:Class.",
    )(command)


def chosen_cases(ops: Sequence[str], levels: Sequence[str]) -> tuple[Case, ...]:
    """The cases of these ops and levels; exits with 2 for an unknown op or an empty selection."""
    from qcore_conformance import cases

    for op in ops:
        if op not in cases.OPS:
            near = difflib.get_close_matches(op, cases.OPS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            fail(f"unknown op {op!r}.{hint} The ops are: {', '.join(cases.OPS)}")
    found = cases.select(ops, levels)
    if not found:
        fail(f"no case of {', '.join(ops) or 'any op'} has level {' or '.join(levels)}; nothing would be checked")
    return found


@main.command()
@backend_option
@click.option("--op", "ops", multiple=True, help="Only this op (repeatable); 'contract' is the backend as a whole.")
@click.option("--level", "levels", multiple=True, type=click.Choice(LEVELS), help="Default: L0 L1 L2.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random input.")
@click.option(
    "--report", "report_dir", type=click.Path(path_type=Path), help="Write JSON, JUnit, Markdown and HTML here."
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--waivers", type=click.Path(path_type=Path), help="TOML file of known failures.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds that a case may take.")
@click.option(
    "--budget",
    type=click.FloatRange(0),
    default=math.inf,
    help="Seconds after which no case is begun; the rest is not run.",
)
def run(
    backend: str,
    device: str | None,
    ops: tuple[str, ...],
    levels: tuple[str, ...],
    seed: int,
    report_dir: Path | None,
    jobs: int,
    waivers: Path | None,
    timeout: float | None,
    budget: float,
) -> None:
    """Run the suite on a backend."""
    from qcore_conformance.forkserver import SERVER

    SERVER.start()  # it imports torch while this process does
    from qcore_conformance.report import probe, verdict, write_all
    from qcore_conformance.runner import Target, run_cases
    from qcore_conformance.waivers import apply_waivers, read_waivers

    levels = levels or REQUIRED_LEVELS
    selected = chosen_cases(ops, levels)
    target = Target(backend, device, seed, timeout)
    selection = {"backend": backend, "device": device, "ops": list(ops), "levels": list(levels)}
    try:
        known = read_waivers(waivers) if waivers is not None else []
        if report_dir is not None:
            probe(report_dir)  # a suite takes minutes: better refused now than when there is something to lose
        with _progress(len(selected)) as on_result:
            report = run_cases(target, selected, jobs=jobs, on_result=on_result, selection=selection, budget=budget)
        report, unused = apply_waivers(report, known)
        paths = write_all(report, report_dir) if report_dir is not None else []
    except QcoreError as error:
        fail(str(error))
        return
    _print_report(report)
    for waiver in unused:
        click.echo(f"waiver matched nothing in this run: {waiver.clause} {waiver.case} ({waiver.link})")
    for path in paths:
        click.echo(f"wrote {path}")
    judged = verdict(report)
    click.echo(f"{judged.word}: {judged.sentence} ({report.seconds:.1f} s, seed {seed})")
    sys.exit(judged.exit_code)


@main.command("list")
@click.option("--op", "ops", multiple=True, help="Only this op (repeatable).")
@click.option("--level", "levels", multiple=True, type=click.Choice(LEVELS), help="Only this level (repeatable).")
@click.option("--clauses", is_flag=True, help="Also print the clauses that each case checks.")
def list_cases(ops: tuple[str, ...], levels: tuple[str, ...], clauses: bool) -> None:
    """List the cases, one id a line."""
    for case in chosen_cases(ops, levels or LEVELS):
        click.echo(f"{case.id}  {' '.join(case.clauses)}" if clauses else case.id)


@main.command()
@click.argument("case_id")
@backend_option
@click.option("--seed", type=int, default=0, show_default=True)
def repro(case_id: str, backend: str, device: str | None, seed: int) -> None:
    """Run one case in this very process, where a debugger or a sanitizer can see it."""
    from qcore.backend import get_backend
    from qcore_conformance import cases
    from qcore_conformance.session import Session

    try:
        case = cases.case_by_id(case_id)
    except KeyError:
        near = difflib.get_close_matches(case_id, [case.id for case in cases.all_cases()], n=3)
        hint = f"Did you mean one of: {', '.join(near)}? " if near else ""
        fail(f"no case {case_id!r}. {hint}`qcore-conformance list` names them all")
        return
    try:
        session = Session(get_backend(backend), device, seed, spec=backend)
    except BackendError as error:
        fail(str(error))
        return
    session.isolated = True  # a crash ends this process, which does nothing else
    result = session.run_case(case)
    worst = "" if result.worst is None else f", worst error / bound {result.worst:.3g}"
    click.echo(f"{result.outcome.value}: {case.id} [{' '.join(case.clauses)}] ({result.seconds:.3f} s{worst})")
    if result.message:
        click.echo(result.message)
    if result.outcome is Outcome.PASSED:
        return
    sys.exit(2 if result.outcome in _FINE else 1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Result], None]]:
    """A progress bar where someone is looking; failures are printed as they happen in any case."""

    def failure(result: Result) -> str:
        first = result.message.splitlines()[0] if result.message else ""
        return f"{result.outcome.value.upper()} {result.case_id}: {first}\n  {result.repro}"

    if not sys.stderr.isatty():

        def plain(result: Result) -> None:
            if result.outcome not in _FINE:
                click.echo(failure(result), err=True)

        yield plain
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)

        def show(result: Result) -> None:
            if result.outcome not in _FINE:
                progress.console.print(failure(result), markup=False, highlight=False, soft_wrap=True)
            progress.update(task, advance=1, description=f"{result.op} {result.level}")

        yield show


def _print_report(report: Report) -> None:
    """The table of ops, then what did not run and why, then every failure with its message."""
    from qcore_conformance.report.summary import counts, matrix, with_outcome, worst_ratios

    said = report.backend
    click.echo(f"backend {said['name']}: {said['device']} ({said['arch']}), spec {report.spec_version}")
    worst = {entry.op: entry.ratio for entry in worst_ratios(report.results)}
    rows = matrix(report.results)
    width = max(len(row.op) for row in rows)
    click.echo(f"{'op':{width}} {' '.join(f'{level:>9}' for level in LEVELS)}  worst error / bound")
    for row in rows:
        ratio = f"{worst[row.op]:.3f}" if row.op in worst else ""
        click.echo(f"{row.op:{width}} {' '.join(f'{cell.text:>9}' for cell in row.levels)}  {ratio}".rstrip())
    for outcome in (Outcome.NOT_RUN, Outcome.UNSUPPORTED):
        reasons: dict[str, list[str]] = {}
        for result in with_outcome(report.results, outcome):
            reasons.setdefault(result.message, []).append(result.case_id)
        for reason, ids in reasons.items():
            what = ids[0] if len(ids) == 1 else f"{len(ids)} cases"
            click.echo(f"{outcome.value.replace('_', ' ')}: {what}: {reason}")
    bad = [result for result in report.results if result.outcome not in _FINE]
    room = shutil.get_terminal_size((120, 24)).columns
    for result in bad:
        click.echo("-" * min(room, 120))
        click.echo(f"{result.outcome.value.upper()} {result.case_id} [{' '.join(result.clauses)}]")
        click.echo(result.message)
        click.echo(f"reproduce: {result.repro}")
    total = counts(report.results)
    click.echo(", ".join(f"{total[o]} {o.value.replace('_', ' ')}" for o in Outcome if total[o]))
