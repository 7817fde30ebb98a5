"""Markdown: the report for a pull request or a release page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from qcore_conformance.model import LEVELS, Outcome, Report, Result
from qcore_conformance.report.summary import (
    BAD,
    DTYPES,
    Cell,
    clause_rows,
    counts,
    matrix,
    verdict,
    with_outcome,
    worst_ratios,
)

# A pull request comment holds 65 kB; a backend that fails everywhere is read in the JSON.
LISTED = 100

_MARK = {"good": "✅", "bad": "❌", "waived": "⚠️", "unsupported": "➖", "not_run": "⏸", "partial": "🟡", "empty": ""}


def to_markdown(report: Report) -> str:
    """Render ``report`` as GitHub-flavoured Markdown."""
    judged = verdict(report)
    backend = report.backend
    lines = [
        f"# Conformance of `{backend.get('name', '?')}` on {_text(backend.get('device', '?'))}",
        "",
        f"**{judged.word}**: {_text(judged.sentence)}.",
        "",
        *_table(("fact", "value"), _facts(report)),
        "",
        "## Outcomes",
        "",
        *_table(
            ("outcome", "cases"), [(o.value.replace("_", " "), n) for o, n in counts(report.results).most_common()]
        ),
        "",
        "## Support matrix",
        "",
        "Cases passed of cases selected.",
        "",
        *_table(
            ("op", *LEVELS, *DTYPES),
            [(f"`{row.op}`", *map(_cell, row.levels), *map(_cell, row.dtypes)) for row in matrix(report.results)],
        ),
    ]
    ratios = worst_ratios(report.results)
    if ratios:
        lines += ["", "## Worst error over bound", "", "1 is the bound of the clause.", ""]
        lines += _table(
            ("op", "error / bound", "case"),
            [
                (f"`{w.op}`", "not finite" if math.isinf(w.ratio) else f"{w.ratio:.4f}", f"`{w.case_id}`")
                for w in ratios
            ],
        )
    lines += _failures(report.results)
    waived = with_outcome(report.results, Outcome.WAIVED, Outcome.UNEXPECTED_PASS)
    if waived:
        lines += ["", "## Waivers", ""]
        lines += _table(
            ("case", "outcome", "reason", "link", "expires"),
            [
                (
                    f"`{r.case_id}`",
                    r.outcome.value,
                    *((r.waiver or {}).get(k, "") for k in ("reason", "link", "expires")),
                )
                for r in waived
            ],
        )
    for title, outcome in (("Not run", Outcome.NOT_RUN), ("Unsupported", Outcome.UNSUPPORTED)):
        chosen = with_outcome(report.results, outcome)
        if chosen:
            lines += ["", f"## {title}", ""]
            lines += [f"- `{r.case_id}`: {_text(r.message.partition(chr(10))[0])}" for r in chosen[:LISTED]]
            lines += _rest(len(chosen))
    lines += ["", "## Clauses", ""]
    lines += _table(("clause", "passed"), [(clause, _cell(cell)) for clause, cell in clause_rows(report.results)])
    return "\n".join(lines) + "\n"


def _facts(report: Report) -> list[tuple[str, object]]:
    backend = {k: v for k, v in report.backend.items() if k not in ("ops", "declarations") and v}
    declared = report.backend.get("declarations") or {}
    return [
        *backend.items(),
        *((f"declares for {op}", f"`{json.dumps(value, sort_keys=True)}`") for op, value in declared.items()),
        ("spec", report.spec_version),
        ("seed", report.seed),
        ("started", report.started),
        ("seconds", f"{report.seconds:.1f}"),
        ("selection", f"`{json.dumps(report.selection, sort_keys=True, default=str)}`"),
        *report.environment.items(),
    ]


def _failures(results: Sequence[Result]) -> list[str]:
    bad = [result for result in results if result.outcome in BAD]
    if not bad:
        return []
    lines = ["", "## Failures", ""]
    for result in bad[:LISTED]:
        lines += [f"### {result.outcome.value}: `{result.case_id}`", "", f"Clauses: {', '.join(result.clauses)}", ""]
        # A fence longer than any in the message, so that the message cannot close it.
        fence = "```"
        while fence in result.message:
            fence += "`"
        lines += [fence, result.message, fence, "", f"Reproduce: `{result.repro}`", ""]
    return lines[:-1] + _rest(len(bad))


def _rest(number: int) -> list[str]:
    return [f"- and {number - LISTED} more, in `report.json`"] if number > LISTED else []


def _cell(cell: Cell) -> str:
    return f"{_MARK[cell.state]} {cell.text}".strip()


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(_text(str(value)) for value in row) + " |" for row in rows]


def _text(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
