"""JUnit XML: one suite an op and level, one test case a case; what every CI server reads."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from qcore_conformance.model import LEVELS, Outcome, Report, Result
from qcore_conformance.report.summary import BAD, counts

# XML 1.0 has no way to write these, not even escaped; a message may quote raw bytes.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report) -> str:
    """Render ``report`` as JUnit XML.

    A crash or a hang is an ``error``, a failure or an unexpected pass a ``failure``; unsupported, not run and waived
    cases are ``skipped`` with the reason.
    """
    root = ET.Element("testsuites", name="qcore-conformance", time=f"{report.seconds:.3f}")
    properties = {"seed": report.seed, "spec_version": report.spec_version, **report.backend, **report.environment}
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for op in dict.fromkeys(result.op for result in report.results):
        for level in LEVELS:
            results = [r for r in report.results if (r.op, r.level) == (op, level)]
            if not results:
                continue
            suite = ET.SubElement(root, "testsuite", name=f"{op}.{level}", timestamp=report.started)
            holder = ET.SubElement(suite, "properties")
            for name, value in properties.items():
                ET.SubElement(holder, "property", name=_clean(str(name)), value=_clean(str(value)))
            for result in results:
                _add_case(suite, result)
            count = counts(results)
            numbers = {
                "tests": len(results),
                "failures": count[Outcome.FAILED] + count[Outcome.UNEXPECTED_PASS],
                "errors": count[Outcome.CRASHED] + count[Outcome.HUNG],
                "skipped": count[Outcome.UNSUPPORTED] + count[Outcome.NOT_RUN] + count[Outcome.WAIVED],
            }
            for name, number in numbers.items():
                suite.set(name, str(number))
                totals[name] += number
            suite.set("time", f"{sum(r.seconds for r in results):.3f}")
    for name, number in totals.items():
        root.set(name, str(number))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ET.Element, result: Result) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        name=_clean(result.case_id),
        classname=f"{result.op}.{result.level}",
        time=f"{result.seconds:.3f}",
    )
    text = _clean(result.message)
    if result.outcome in BAD:
        tag = "error" if result.outcome in (Outcome.CRASHED, Outcome.HUNG) else "failure"
        body = ET.SubElement(case, tag, type=result.outcome.value, message=text.partition("\n")[0])
        clauses = ", ".join(result.clauses)
        body.text = _clean(f"{result.message}\nclauses: {clauses}\nreproduce: {result.repro}")
    elif result.outcome is not Outcome.PASSED:
        reason = text
        if result.waiver:
            reason = f"waived: {result.waiver.get('reason', '')} ({result.waiver.get('link', '')}); {text}"
        ET.SubElement(case, "skipped", type=result.outcome.value, message=_clean(reason.partition("\n")[0]))


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
