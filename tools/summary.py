"""What a run of the tests left in a folder of reports: counts, and the name of everything that failed.

``python tools/summary.py build/reports`` exits with 1 if something failed, or if nothing ran.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path


def failed_cases(suites: list[ElementTree.Element], where: str) -> Iterator[str]:
    """The names of the test cases that failed or broke."""
    for suite in suites:
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                yield f"{where}: {case.get('classname')}::{case.get('name')}"


def failed_mutants(path: Path) -> Iterator[str]:
    """The mutants that survived and the right backends that did not pass; none where they were not run."""
    if not path.is_file():
        return
    matrix = json.loads(path.read_text(encoding="utf-8"))
    for row in matrix["rows"]:
        if not row["case_id"]:
            yield f"mutants: {row['mutant']} survived in {row['op']}"
    for control in matrix["controls"]:
        for alarm in control["alarms"]:
            yield f"mutants: {control['backend']} is right, but {alarm}"


def main(reports: Path) -> int:
    """Print the summary; the exit code."""
    passed = failed = skipped = 0
    names: list[str] = []
    for path in sorted(reports.rglob("*.xml")):
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
        ran, bad, broken, left = (
            sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
        )
        bad += broken
        good = ran - bad - left
        where = str(path.relative_to(reports))
        print(f"{where}: {good} passed, {bad} failed, {left} skipped")
        passed, failed, skipped = passed + good, failed + bad, skipped + left
        names += failed_cases(suites, where)
    names += failed_mutants(reports / "mutants" / "mutants.json")
    for name in names:
        print(f"failed: {name}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(bool(names) or failed > 0 or passed == 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, help="folder with JUnit reports, and mutants/mutants.json")
    sys.exit(main(parser.parse_args().reports))
