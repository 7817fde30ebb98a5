"""Programs written for bitsandbytes, unchanged, in a process where qcore answers to its name."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FOLDER = Path(__file__).parent / "aliased"


def test_programs_for_bitsandbytes_run_on_qcore(tmp_path: Path) -> None:
    report = tmp_path / "aliased.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(FOLDER)]
    environment = {**os.environ, "QCORE_ALIASED": "1", "HF_HUB_OFFLINE": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # a parallel run above this one must not configure it
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    ran = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    assert ran >= 25, f"only {ran} programs ran:\n{run.stdout}"
