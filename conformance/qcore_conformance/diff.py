"""What changed between two runs: outcomes, cases, worst ratios; and whether anything got worse."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from qcore.errors import FormatError
from qcore_conformance.model import Outcome, Report, Result

# A worst ratio depends on the seed and on the order of a sum; below this factor it is the same.
MOVED = 1.25
# Ratios this far below the bound are noise of the last bits.
SMALL = 1e-3


@dataclass(frozen=True)
class Change:
    """A case whose outcome differs; ``None`` where a run lacks the case."""

    case_id: str
    before: Outcome | None
    after: Outcome | None
    regression: bool
    message: str = ""
    repro: str = ""


@dataclass(frozen=True)
class Move:
    """A case whose worst error over bound moved by more than ``MOVED``."""

    case_id: str
    before: float
    after: float


@dataclass(frozen=True)
class Difference:
    """Everything that differs from run A to run B."""

    context: list[tuple[str, str, str]]  # what was run, where, with which seed: name, in A, in B
    changes: list[Change]
    moves: list[Move]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]


def compare(before: Report, after: Report) -> Difference:
    """Compare two reports.

    A regression is a case that passed and does not pass any more (failed, crashed, hung, waived, unsupported, not run,
    or gone although the run selected it), and a case that neither passed nor stood in the first run and fails in the
    second with a new outcome.
    """
    old = {result.case_id: result for result in before.results}
    new = {result.case_id: result for result in after.results}
    changes, moves = [], []
    for case_id in dict.fromkeys([*old, *new]):
        a, b = old.get(case_id), new.get(case_id)
        if b is None and a is not None and not _selected(a, after):
            continue
        if a is None and b is not None and not _selected(b, before) and b.outcome not in _BAD:
            continue
        if a is None or b is None or a.outcome is not b.outcome:
            outcome_a, outcome_b = (None if x is None else x.outcome for x in (a, b))
            changes.append(
                Change(
                    case_id,
                    outcome_a,
                    outcome_b,
                    _is_regression(outcome_a, outcome_b),
                    b.message if b else "",
                    b.repro if b else "",
                )
            )
        if a is not None and b is not None and a.worst is not None and b.worst is not None and _moved(a.worst, b.worst):
            moves.append(Move(case_id, a.worst, b.worst))
    return Difference(_context(before, after), changes, moves)


def to_text(difference: Difference) -> str:
    """Render a difference for a terminal: regressions first, each with the line that reproduces it."""
    lines = [f"{name}: {a} -> {b}" for name, a, b in difference.context]
    groups = (
        ("Regressions", difference.regressions),
        ("Other changes", [change for change in difference.changes if not change.regression]),
    )
    for title, changes in groups:
        if not changes:
            continue
        lines += ["", f"{title} ({len(changes)})"]
        for change in changes:
            lines.append(f"  {change.case_id}: {_word(change.before)} -> {_word(change.after)}")
            if change.regression and change.message:
                lines.append(f"    {change.message.partition(chr(10))[0]}")
            if change.regression and change.repro:
                lines.append(f"    {change.repro}")
    if difference.moves:
        lines += ["", f"Worst error over bound moved ({len(difference.moves)})"]
        ordered = sorted(difference.moves, key=lambda move: -_size(move.after))
        lines += [f"  {move.case_id}: {move.before:.4g} -> {move.after:.4g}" for move in ordered]
    if not difference.changes and not difference.moves:
        lines.append("no differences")
    return "\n".join(lines) + "\n"


_BAD = frozenset({Outcome.FAILED, Outcome.CRASHED, Outcome.HUNG, Outcome.UNEXPECTED_PASS})
_RANK = {Outcome.PASSED: 0, Outcome.UNEXPECTED_PASS: 1, Outcome.WAIVED: 1, Outcome.FAILED: 2, Outcome.CRASHED: 3}


def _is_regression(before: Outcome | None, after: Outcome | None) -> bool:
    if before is Outcome.PASSED:
        return after is not Outcome.PASSED
    if after not in _BAD:
        return False
    # Not a regression: a failure that became a milder one (a crash that is now a failed check).
    return before is None or before not in _BAD or _rank(after) > _rank(before)


def _rank(outcome: Outcome | None) -> int:
    return _RANK.get(outcome, 3) if outcome is not None else 0


def _selected(result: Result, report: Report) -> bool:
    """Whether ``report``'s run would have held ``result``; a selection that is missing or empty means all."""
    ops = report.selection.get("ops") or [result.op]
    levels = report.selection.get("levels") or [result.level]
    return result.op in ops and result.level in levels


def _size(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio


def _moved(before: float, after: float) -> bool:
    a, b = _size(before), _size(after)
    if a == b:
        return False
    low, high = min(a, b), max(a, b)
    return high > SMALL and high > low * MOVED


def _context(before: Report, after: Report) -> list[tuple[str, str, str]]:
    def facts(report: Report) -> Iterable[tuple[str, str]]:
        for name in ("name", "device", "arch", "driver", "runtime", "library_sha256"):
            yield name, str(report.backend.get(name, ""))
        yield "declarations", str(report.backend.get("declarations", ""))
        yield "spec", report.spec_version
        yield "seed", str(report.seed)
        for name in sorted(set(before.environment) | set(after.environment)):
            yield name, report.environment.get(name, "")

    return [(name, a, b) for (name, a), (_, b) in zip(facts(before), facts(after), strict=True) if a != b]


def _word(outcome: Outcome | None) -> str:
    return "absent" if outcome is None else outcome.value


@click.command("diff")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def diff_command(before: Path, after: Path) -> None:
    """What changed from one JSON report to another: exits with 1 if anything got worse, with 2 if one is unreadable."""
    from qcore_conformance.report.json_file import read_json

    try:
        difference = compare(read_json(before), read_json(after))
    except FormatError as error:
        click.echo(f"qcore-conformance: {error}", err=True)
        sys.exit(2)
    click.echo(to_text(difference), nl=False)
    sys.exit(1 if difference.regressions else 0)
