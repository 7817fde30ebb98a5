"""Waivers: known failures that do not fail a run, each with its reason, its link and its last day.

A TOML file::

    [[waiver]]
    case = "gemm_4bit/L2/*-bf16-*"      # a glob over case ids; or clause = "QC-GEMM4-004"; or both, to narrow
    backend = "hip"                     # globs over the backend's name, and over its device or architecture
    device = "gfx1030"
    reason = "the driver's v_dot2 flushes denormals"
    link = "https://example.org/issues/17"
    expires = 2027-06-30                # the last day on which it holds

A waived failure is reported as WAIVED, and the backend is not conformant. A case that passes although it is waived
fails the run: the waiver has to go.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qcore.errors import FormatError
from qcore_conformance.model import Outcome, Report, Result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = ("clause", "case", "backend", "device", "reason", "link", "expires")
_WAIVABLE = frozenset({Outcome.FAILED, Outcome.CRASHED, Outcome.HUNG})


@dataclass(frozen=True)
class Waiver:
    """One entry. ``clause``, ``case``, ``backend`` and ``device`` are globs; all that are given have to match."""

    reason: str
    link: str
    expires: date
    clause: str = "*"
    case: str = "*"
    backend: str = "*"
    device: str = "*"

    def covers(self, result: Result, backend: dict[str, Any]) -> bool:
        """Whether this waiver speaks of ``result`` on the backend and device of the run."""
        places = (str(backend.get("device", "")), str(backend.get("arch", "")))
        return (
            fnmatchcase(result.case_id, self.case)
            and (self.clause == "*" or any(fnmatchcase(clause, self.clause) for clause in result.clauses))
            and fnmatchcase(str(backend.get("name", "")), self.backend)
            and any(fnmatchcase(place, self.device) for place in places)
        )


def read_waivers(path: Path, today: date | None = None) -> list[Waiver]:
    """Read a waiver file.

    Parameters
    ----------
    path
        The TOML file.
    today
        The day on which waivers are judged; today in UTC if left out.

    Raises
    ------
    FormatError
        The file cannot be read or is not TOML, has an unknown key, lacks one, or holds a waiver that has expired.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{path}: not TOML: {error}") from error
    unknown = sorted(set(tree) - {"waiver"})
    entries = tree.get("waiver", [])
    if unknown or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(f"{path}: expected [[waiver]] entries only, got keys {unknown or ['waiver']}")
    today = today or datetime.now(timezone.utc).date()
    return [_waiver(entry, f"{path}: waiver {index}", today) for index, entry in enumerate(entries, start=1)]


def apply_waivers(report: Report, waivers: Sequence[Waiver]) -> tuple[Report, list[Waiver]]:
    """Apply ``waivers`` to the results of ``report``.

    Returns
    -------
    The report with waived failures as WAIVED and waived passes as UNEXPECTED_PASS, and the waivers that no result of
    this run matched (of another device, or of cases that were not selected).
    """
    used: set[int] = set()
    results = []
    for result in report.results:
        covering = [i for i, waiver in enumerate(waivers) if waiver.covers(result, report.backend)]
        used.update(covering)
        results.append(_waived(result, waivers[covering[0]]) if covering else result)
    return replace(report, results=results), [w for i, w in enumerate(waivers) if i not in used]


def _waiver(entry: dict[str, Any], where: str, today: date) -> Waiver:
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise FormatError(f"{where}: unknown keys {unknown}; known are {list(_KEYS)}")
    for key in _KEYS[:-1]:
        if key in entry and not (isinstance(entry[key], str) and entry[key].strip()):
            raise FormatError(f"{where}: {key} must be a string that is not empty, got {entry[key]!r}")
    for key in ("reason", "link", "expires"):
        if key not in entry:
            raise FormatError(f"{where}: {key} is missing; every waiver says why, points to an issue and ends")
    if "clause" not in entry and "case" not in entry:
        raise FormatError(f"{where}: says neither which clause nor which case")
    if "backend" not in entry and "device" not in entry:
        raise FormatError(f"{where}: says neither which backend nor which device")
    expires = entry["expires"]
    # A TOML date-time is a datetime, which is a date too: only a plain date is meant.
    if not isinstance(expires, date) or isinstance(expires, datetime):
        raise FormatError(f"{where}: expires must be a date as 2027-06-30, got {expires!r}")
    if expires < today:
        raise FormatError(f"{where}: expired on {expires}; mend the backend, or renew it with a new reason")
    return Waiver(**entry)


def _waived(result: Result, waiver: Waiver) -> Result:
    note = {"reason": waiver.reason, "link": waiver.link, "expires": waiver.expires.isoformat()}
    if result.outcome in _WAIVABLE:
        message = f"{result.outcome.value}: {result.message}"
        return replace(result, outcome=Outcome.WAIVED, message=message, waiver=note)
    if result.outcome is Outcome.PASSED:
        message = f"passed, but a waiver that expires on {waiver.expires} expects it to fail: remove the waiver"
        return replace(result, outcome=Outcome.UNEXPECTED_PASS, message=message, waiver=note)
    return result
