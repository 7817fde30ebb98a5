"""The nouns of the suite: a case, its outcome, and the report of a run.

The JSON report is ``asdict(Report)``; every other rendering is made from it. ``SCHEMA`` counts its revisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore_conformance.session import Session

SCHEMA = 2
LEVELS = ("L0", "L1", "L2", "L3")
# What a backend has to pass; L3 needs memory and devices that not every machine has.
REQUIRED_LEVELS = ("L0", "L1", "L2")


class Outcome(str, Enum):
    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"  # the worker process died
    HUNG = "hung"  # the worker process exceeded its time limit
    UNSUPPORTED = "unsupported"  # the backend leaves the op out
    NOT_RUN = "not_run"  # a precondition is missing (memory, second device); never counts as passed
    WAIVED = "waived"  # failed, and a waiver says why; not conformant
    UNEXPECTED_PASS = "unexpected_pass"  # passed although a waiver expects it to fail; fails the run


@dataclass(frozen=True)
class Case:
    """One check of one op. ``run`` raises ``AssertionError`` with a message on failure, ``NotRun`` if it cannot run."""

    id: str  # "quantize_4bit/L1/nf4-f32-bs64-n65-normal": unique, stable, no spaces
    op: str
    level: str
    clauses: tuple[str, ...]
    run: Callable[[Session], None] = field(compare=False, repr=False)
    params: Mapping[str, Any] = field(default_factory=dict, compare=False)


class NotRun(Exception):
    """A precondition of a case is missing; the message says which."""


@dataclass
class Result:
    case_id: str
    op: str
    level: str
    clauses: list[str]
    outcome: Outcome
    seconds: float = 0.0
    worst: float | None = None  # largest error / bound seen (L2), 1.0 is the bound
    message: str = ""
    repro: str = ""  # the command line that runs this case alone
    waiver: dict[str, str] | None = None


@dataclass
class Report:
    schema: int
    spec_version: str
    started: str  # ISO 8601, UTC
    seconds: float
    seed: int
    selection: dict[str, Any]  # backend, ops, levels as asked for
    complete: bool  # whether every case of REQUIRED_LEVELS was selected
    backend: dict[str, Any]  # asdict(Description)
    environment: dict[str, str]  # qcore, torch, python, platform
    results: list[Result]
