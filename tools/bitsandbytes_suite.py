"""Run bitsandbytes' own test suite on bitsandbytes and on qcore, and count per file.

    python tools/bitsandbytes_suite.py CHECKOUT -o counts.json [--file test_ops.py ...] [--only qcore] [-k EXPRESSION]

CHECKOUT is a clone of the bitsandbytes repository; its ``tests`` run on the CPU, once as they are and once in a process
where qcore answers to the name bitsandbytes. ``lion-pytorch``, ``scipy`` and bitsandbytes have to be installed.
test_cuda_setup_evaluator.py tests bitsandbytes' choice of a library file and is left out, as are tests marked slow,
benchmark or deprecated, which its own configuration leaves out. Every failure on qcore is expected to be in
docs/compat.md, with the reason.

Each case is written to ``counts.cases.jsonl`` as it ends, so that a run that was cut off, by ``--timeout`` or
otherwise, goes on where it stopped when it is started again; delete that file to begin anew. A case that was under
way both times it was cut off, or that ends the process, counts as failed from the second time on. The exit status is 1
while any of the counts is incomplete.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

SUBJECTS = ("bitsandbytes", "qcore")
LEFT_OUT = {"test_cuda_setup_evaluator.py", "test_generation.py"}
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "log_cli=false", "-o", "log_file="]
MARKS = "not slow and not benchmark and not deprecated"
# Writes a line when a case begins, one with its outcome when it ends, and one when the last has ended.
PROGRAM = """
import json, sys, pytest
sys.path.insert(0, ".")
{prelude}

class Journal:
    def __init__(self, path, done, about):
        self.stream, self.done, self.about = open(path, "a", encoding="utf-8"), done, about

    def write(self, nodeid, outcome):
        line = dict(self.about, case=nodeid and nodeid.split("::", 1)[1], outcome=outcome)
        print(json.dumps(line), file=self.stream, flush=True)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid.split("::", 1)[1] not in self.done]

    def pytest_runtest_logstart(self, nodeid):
        self.outcome = "passed"
        self.write(nodeid, "began")

    def pytest_runtest_logreport(self, report):
        if report.failed or (report.skipped and self.outcome == "passed"):
            self.outcome = "failed" if report.failed else "skipped"

    def pytest_runtest_logfinish(self, nodeid):
        self.write(nodeid, self.outcome)

    def pytest_sessionfinish(self):
        self.write(None, "finished")

sys.exit(pytest.main(sys.argv[1:], plugins=[Journal({journal!r}, set(json.load(open({done!r}))), {about!r})]))
"""
# AdEMAMix's plain-torch reference is private to bitsandbytes' package: its tests take it from the checkout.
ALIAS = """
import ast, pathlib, qcore
qcore.install_as_bitsandbytes()
import bitsandbytes.optim.ademamix as ademamix
source = ast.parse(pathlib.Path({reference!r}).read_text())
imports = [node for node in source.body if isinstance(node, (ast.Import, ast.ImportFrom))]
wanted = [node for node in imports if not (getattr(node, "module", "") or "").startswith("bitsandbytes")]
wanted += [node for node in source.body if isinstance(node, ast.ClassDef) and node.name.startswith("_Reference")]
exec(compile(ast.Module(wanted, []), "ademamix.py", "exec"), vars(ademamix))
"""


def run(
    checkout: Path, file: str, subject: str, timeout: float, journal: Path, select: str | None
) -> tuple[dict[str, str], str | None]:
    """Run the cases of a test file whose outcome is not known; the outcome of each, and what cut the run off."""
    alias = ALIAS.format(reference=str(checkout.absolute() / "bitsandbytes" / "optim" / "ademamix.py"))
    stopped = None
    if journal.is_file():  # what the next line would be appended to
        os.truncate(journal, len(_whole_lines(journal)))
    finished = _sessions(journal, file, subject)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The tests alone: beside them, the checkout's package would be imported instead of the installed one.
        shutil.copytree(checkout / "tests", folder / "tests")
        (folder / "done.json").write_text(json.dumps(list(known(journal, file, subject))), encoding="utf-8")
        program = PROGRAM.format(
            prelude=alias if subject == "qcore" else "",
            journal=str(journal.absolute()),
            done=str(folder / "done.json"),
            about={"file": file, "subject": subject},
        )
        command = [sys.executable, "-c", program, *OPTIONS, "-m", MARKS, *(["-k", select] if select else [])]
        try:
            ended = subprocess.run(
                [*command, f"tests/{file}"],
                cwd=folder,
                env={**os.environ, "BNB_TEST_DEVICE": "cpu"},
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            stopped = f"not finished after {timeout:.0f} s"
        else:
            # 0: all passed, 1: some failed, 5: nothing was left to run. Else the run broke off, or never began; an
            # exception in front of pytest ends with 1 as well.
            if ended.returncode not in (0, 1, 5) or _sessions(journal, file, subject) == finished:
                stopped = f"ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-2000:]}"
    return known(journal, file, subject), stopped


def known(journal: Path, file: str, subject: str) -> dict[str, str]:
    """The outcomes that the journal has; a case that began twice and never ended has failed."""
    outcomes: dict[str, str] = {}
    begun: Counter[str] = Counter()
    for entry in _entries(journal, file, subject):
        if entry["outcome"] == "began":
            begun[entry["case"]] += 1
        elif entry["case"] is not None:
            outcomes[entry["case"]] = entry["outcome"]
    return {case: "failed" for case, times in begun.items() if times > 1} | outcomes


def _entries(journal: Path, file: str, subject: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in _whole_lines(journal).splitlines()] if journal.is_file() else []
    return [entry for entry in entries if (entry["file"], entry["subject"]) == (file, subject)]


def _sessions(journal: Path, file: str, subject: str) -> int:
    """How many runs of the file came to their end."""
    return sum(entry["case"] is None for entry in _entries(journal, file, subject))


def _whole_lines(journal: Path) -> bytes:
    """The journal without the line that a run was writing when it was killed."""
    written = journal.read_bytes()
    return written[: written.rfind(b"\n") + 1]


def counts(outcomes: dict[str, str]) -> dict[str, Any]:
    """passed, failed, skipped (expected failures too), and the names of what failed."""
    numbers = Counter(outcomes.values())
    failures = [case for case, outcome in outcomes.items() if outcome == "failed"]
    return {**{key: numbers[key] for key in ("passed", "failed", "skipped")}, "failures": failures}


def table(results: dict[str, Any]) -> str:
    """The counts of both, file by file, in Markdown."""
    lines = [
        "| file | bitsandbytes: passed, failed, skipped | qcore: passed, failed, skipped |",
        "|---|---|---|",
    ]
    for file, subjects in sorted(results.items()):
        cells = []
        for subject in SUBJECTS:
            found = subjects.get(subject, {"stopped": "not run"})
            numbers = ", ".join(str(found[key]) for key in ("passed", "failed", "skipped") if key in found)
            stopped = found["stopped"].splitlines()[-1] if "stopped" in found else ""
            cells.append("; ".join(part for part in (numbers, stopped) if part))
        lines.append(f"| `{file}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file, kept up to date")
    parser.add_argument("--file", action="append", help="only this test file; may be repeated")
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("-k", dest="select", help="only the cases that pytest's -k selects")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one test file; run again to go on")
    options = parser.parse_args()
    files = options.file or sorted(
        path.name for path in (options.checkout / "tests").glob("test_*.py") if path.name not in LEFT_OUT
    )
    if not files:
        parser.error(f"{options.checkout} has no tests/test_*.py")
    results: dict[str, Any] = json.loads(options.output.read_text("utf-8")) if options.output.is_file() else {}
    journal = options.output.with_suffix(".cases.jsonl")
    subjects = [options.only] if options.only else list(SUBJECTS)
    for file in files:
        for subject in subjects:
            outcomes, stopped = run(options.checkout, file, subject, options.timeout, journal, options.select)
            found = counts(outcomes) | ({"stopped": stopped} if stopped else {})
            results.setdefault(file, {})[subject] = found
            shown = {key: value for key, value in found.items() if key != "failures"}
            print(f"{file:28} {subject:13} {shown}", flush=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return int(any("stopped" in results[file][subject] for file in files for subject in subjects))


if __name__ == "__main__":
    sys.exit(main())
