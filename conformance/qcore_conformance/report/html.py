"""A self-contained HTML page: no script, font or image from anywhere else, so that it can be published as it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qcore_conformance.model import LEVELS, Outcome, Report
from qcore_conformance.report.summary import (
    BAD,
    DTYPES,
    Worst,
    clause_rows,
    counts,
    matrix,
    verdict,
    with_outcome,
    worst_ratios,
)

LABELS = {
    Outcome.PASSED: "passed",
    Outcome.FAILED: "failed",
    Outcome.CRASHED: "crashed",
    Outcome.HUNG: "hung",
    Outcome.UNEXPECTED_PASS: "passed although waived",
    Outcome.WAIVED: "failed, waived",
    Outcome.NOT_RUN: "not run",
    Outcome.UNSUPPORTED: "unsupported",
}


def to_html(report: Report) -> str:
    """Render ``report`` as one HTML page (every value from the report is escaped)."""
    environment = Environment(
        loader=PackageLoader("qcore_conformance.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = counts(report.results)
    slowest = sorted(report.results, key=lambda result: -result.seconds)[:5]
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report),
        outcomes=[(outcome, label, count[outcome]) for outcome, label in LABELS.items() if count[outcome]],
        levels=LEVELS,
        dtypes=DTYPES,
        matrix=matrix(report.results),
        plot=_plot(worst_ratios(report.results)),
        clauses=clause_rows(report.results),
        failures=[result for result in report.results if result.outcome in BAD],
        not_run=with_outcome(report.results, Outcome.NOT_RUN),
        unsupported=sorted({r.op for r in with_outcome(report.results, Outcome.UNSUPPORTED)}),
        waived=with_outcome(report.results, Outcome.WAIVED, Outcome.UNEXPECTED_PASS),
        declarations=_declarations(report),
        slowest=slowest,
        labels=LABELS,
    )


def _declarations(report: Report) -> list[tuple[str, str, str]]:
    rows = []
    for op, declared in (report.backend.get("declarations") or {}).items():
        items = declared.items() if isinstance(declared, dict) else [("", declared)]
        rows += [(op, name, value if isinstance(value, str) else json.dumps(value)) for name, value in items]
    return rows


@dataclass(frozen=True)
class _Bar:
    op: str
    case_id: str
    label: str
    y: int
    width: float
    over: bool


_ROW, _LEFT, _WIDTH, _RIGHT = 30, 190, 560, 90


def _plot(ratios: list[Worst]) -> Markup | None:
    """Horizontal bars of the worst error over bound per op on a logarithmic axis, as inline SVG."""
    if not ratios:
        return None
    finite = [w.ratio for w in ratios if math.isfinite(w.ratio) and w.ratio > 0]
    low = min(-3, math.floor(math.log10(min(finite))) if finite else -3)
    low = max(low, -8)
    high = max(1, math.ceil(math.log10(max(finite))) if finite else 1)
    high = min(high, 12)

    def x(ratio: float) -> float:
        if ratio <= 0:
            return 0.0
        place = high if math.isinf(ratio) else min(max(math.log10(ratio), low), high)
        return round((place - low) / (high - low) * _WIDTH, 1)

    bars = [
        _Bar(
            w.op,
            w.case_id,
            "not finite" if math.isinf(w.ratio) else f"{w.ratio:.3g}",
            index * _ROW + 8,
            max(x(w.ratio), 2.0),
            not w.ratio <= 1,
        )
        for index, w in enumerate(sorted(ratios, key=lambda w: -w.ratio))
    ]
    step = max(1, (high - low) // 8)
    ticks = [(x(10.0**power), "1" if power == 0 else f"1e{power}") for power in range(low, high + 1, step)]
    height = len(bars) * _ROW + 44
    template = Environment(
        loader=PackageLoader("qcore_conformance.report", "templates"), autoescape=True, undefined=StrictUndefined
    ).get_template("worst.svg.j2")
    # Safe: made by an autoescaping template.
    return Markup(
        template.render(
            bars=bars,
            ticks=ticks,
            bound=x(1.0),
            height=height,
            width=_LEFT + _WIDTH + _RIGHT,
            left=_LEFT,
            right=_LEFT + _WIDTH,
            bottom=height - 36,
        )
    )
