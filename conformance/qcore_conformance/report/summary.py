"""What every rendering says of a report: the verdict, the counts, the support matrix, the worst ratios."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcore_conformance.model import LEVELS, Outcome, Report, Result

DTYPES = ("f32", "f16", "bf16")
BAD = frozenset({Outcome.FAILED, Outcome.CRASHED, Outcome.HUNG, Outcome.UNEXPECTED_PASS})
DID_RUN = BAD | {Outcome.PASSED, Outcome.WAIVED}


@dataclass(frozen=True)
class Verdict:
    """One word, one sentence, and the exit code of the run: 0, 1 for failures, 2 where nothing ran."""

    word: str
    sentence: str
    exit_code: int
    conformant: bool


@dataclass(frozen=True)
class Cell:
    """One cell of the support matrix: cases by outcome."""

    counts: Counter[Outcome]

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def state(self) -> str:
        """``empty``, ``bad``, ``waived``, ``unsupported``, ``not_run``, ``partial`` or ``good``, the worst first."""
        if not self.total:
            return "empty"
        if any(self.counts[outcome] for outcome in BAD):
            return "bad"
        if self.counts[Outcome.WAIVED]:
            return "waived"
        if self.counts[Outcome.UNSUPPORTED] == self.total:
            return "unsupported"
        if self.counts[Outcome.PASSED] == self.total:
            return "good"
        return "partial" if self.counts[Outcome.PASSED] else "not_run"

    @property
    def text(self) -> str:
        if self.state == "empty":
            return ""
        if self.state == "unsupported":
            return "unsupported"
        return f"{self.counts[Outcome.PASSED]}/{self.total}"


@dataclass(frozen=True)
class MatrixRow:
    """An op's row: its cells by level, then by dtype, then all of its cases."""

    op: str
    levels: tuple[Cell, ...]
    dtypes: tuple[Cell, ...]
    all: Cell


@dataclass(frozen=True)
class Worst:
    """The largest error over bound of an op, and the case that showed it."""

    op: str
    ratio: float
    case_id: str


def counts(results: Iterable[Result]) -> Counter[Outcome]:
    """Number of cases by outcome."""
    return Counter(result.outcome for result in results)


def verdict(report: Report) -> Verdict:
    """Judge a run. Waived cases do not fail it, but it is not conformant; a run of nothing is an error.

    Only a run of every required case can say that a backend conforms. One that fails says that it does not, whatever
    was selected.
    """
    count = counts(report.results)
    ran = sum(count[outcome] for outcome in DID_RUN)
    bad = sum(count[outcome] for outcome in BAD)
    unsupported = sorted({r.op for r in report.results if r.outcome is Outcome.UNSUPPORTED})
    if not ran:
        return Verdict("NOTHING RAN", f"none of {len(report.results)} selected cases ran", 2, False)
    if bad:
        parts = ", ".join(f"{count[o]} {o.value.replace('_', ' ')}" for o in Outcome if o in BAD and count[o])
        return Verdict("NOT CONFORMANT", f"{parts} of {ran} cases run", 1, False)
    if count[Outcome.WAIVED]:
        return Verdict("NOT CONFORMANT", f"{count[Outcome.WAIVED]} of {ran} cases run fail and are waived", 0, False)
    limits = []
    if unsupported:
        limits.append(f"does not serve {', '.join(unsupported)}")
    if count[Outcome.NOT_RUN]:
        limits.append(f"{count[Outcome.NOT_RUN]} cases were not run")
    sentence = "; ".join([f"{ran} cases passed", *limits])
    if not report.complete:
        return Verdict("PASSED (partial selection)", f"{sentence}; the suite has more cases", 0, False)
    return Verdict("CONFORMANT", sentence, 0, True)


def dtype_of(case_id: str) -> str | None:
    """The activation dtype that a case id names (``f32``, ``f16``, ``bf16``), the first if there are several."""
    for word in re.split(r"[^A-Za-z0-9]+", case_id.rpartition("/")[2]):
        if word in DTYPES:
            return word
    return None


def matrix(results: Sequence[Result]) -> list[MatrixRow]:
    """The support matrix, one row an op, in the order of appearance."""
    rows = []
    for op in dict.fromkeys(result.op for result in results):
        own = [result for result in results if result.op == op]
        rows.append(
            MatrixRow(
                op,
                tuple(Cell(counts(r for r in own if r.level == level)) for level in LEVELS),
                tuple(Cell(counts(r for r in own if dtype_of(r.case_id) == dtype)) for dtype in DTYPES),
                Cell(counts(own)),
            )
        )
    return rows


def clause_rows(results: Sequence[Result]) -> list[tuple[str, Cell]]:
    """Each cited clause with the outcomes of its cases, sorted by id."""
    clauses = sorted({clause for result in results for clause in result.clauses})
    return [(clause, Cell(counts(r for r in results if clause in r.clauses))) for clause in clauses]


def worst_ratios(results: Sequence[Result]) -> list[Worst]:
    """The worst error over bound per op, NaN counted as infinite; ops without a bounded case are left out."""
    found: dict[str, Worst] = {}
    for result in results:
        if result.worst is None:
            continue
        ratio = math.inf if math.isnan(result.worst) else result.worst
        if result.op not in found or ratio > found[result.op].ratio:
            found[result.op] = Worst(result.op, ratio, result.case_id)
    return list(found.values())


def with_outcome(results: Sequence[Result], *outcomes: Outcome) -> list[Result]:
    """The results that have one of ``outcomes``."""
    return [result for result in results if result.outcome in outcomes]
