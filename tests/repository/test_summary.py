"""tools/summary.py names what failed, whatever kind of report says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOOD = '<testcase classname="a" name="good"/>'
BAD = '<testcase classname="a" name="bad"><failure message="x"/></testcase>'


def summary(reports: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "summary.py"), str(reports)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write(reports: Path, cases: list[str], alive: bool = False, alarms: tuple[str, ...] = ()) -> None:
    (reports / "mutants").mkdir(parents=True)
    suite = f'<testsuite tests="{len(cases)}" failures="{cases.count(BAD)}" errors="0" skipped="0">'
    (reports / "tests.xml").write_text(f"<testsuites>{suite}{''.join(cases)}</testsuite></testsuites>")
    row = {"mutant": "off-by-one", "op": "gemm", "case_id": "" if alive else "gemm/L1/x"}
    matrix = {"rows": [row], "controls": [{"backend": "cpu", "alarms": list(alarms)}]}
    (reports / "mutants" / "mutants.json").write_text(json.dumps(matrix))


def test_a_whole_run_that_passed(tmp_path: Path) -> None:
    write(tmp_path, [GOOD, GOOD])
    run = summary(tmp_path)
    assert run.returncode == 0
    assert run.stdout.endswith("2 passed, 0 failed, 0 skipped\n")
    assert "failed:" not in run.stdout


def test_everything_that_failed_has_its_name(tmp_path: Path) -> None:
    write(tmp_path, [GOOD, BAD], alive=True, alarms=("gemm/L1/y: failed: 1 of 2",))
    run = summary(tmp_path)
    assert run.returncode == 1
    assert "failed: tests.xml: a::bad\n" in run.stdout
    assert "failed: mutants: off-by-one survived in gemm\n" in run.stdout
    assert "failed: mutants: cpu is right, but gemm/L1/y: failed: 1 of 2\n" in run.stdout


def test_a_survivor_alone_fails_the_run(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], alive=True)
    assert summary(tmp_path).returncode == 1


def test_no_report_is_no_success(tmp_path: Path) -> None:
    assert summary(tmp_path).returncode == 1
