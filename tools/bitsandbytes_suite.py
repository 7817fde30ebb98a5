"""Run bitsandbytes' own test suite on bitsandbytes and on qcore, and count per file.

    python tools/bitsandbytes_suite.py CHECKOUT -o counts.json [--file test_ops.py ...] [--only qcore]

CHECKOUT is a clone of the bitsandbytes repository; its ``tests`` run on the CPU, once as they are and once in a process
where qcore answers to the name bitsandbytes. ``lion-pytorch``, ``scipy`` and bitsandbytes have to be installed.
test_cuda_setup_evaluator.py tests bitsandbytes' choice of a library file and is left out, as are tests marked slow,
benchmark or deprecated, which its own configuration leaves out. Every failure on qcore is expected to be in
docs/compat.md, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

LEFT_OUT = {"test_cuda_setup_evaluator.py", "test_generation.py"}
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "log_cli=false", "-o", "log_file="]
MARKS = "not slow and not benchmark and not deprecated"
PROGRAM = "import sys, pytest; sys.path.insert(0, '.'); {prelude} sys.exit(pytest.main(sys.argv[1:]))"
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


def run(checkout: Path, file: str, subject: str, timeout: float) -> dict[str, Any]:
    """Counts of one test file on ``bitsandbytes`` or ``qcore``, and what failed."""
    alias = ALIAS.format(reference=str(checkout.absolute() / "bitsandbytes" / "optim" / "ademamix.py"))
    prelude = f"exec({alias!r});" if subject == "qcore" else ""
    with tempfile.TemporaryDirectory() as folder:
        # The tests alone: beside them, the checkout's package would be imported instead of the installed one.
        shutil.copytree(checkout / "tests", Path(folder) / "tests")
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-c", PROGRAM.format(prelude=prelude), *OPTIONS, "-m", MARKS]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", f"tests/{file}"],
                cwd=folder,
                env={**os.environ, "BNB_TEST_DEVICE": "cpu"},
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout:.0f} s"}
        if not report.is_file():
            return {"error": (done.stdout + done.stderr)[-2000:]}
        return counts(ElementTree.parse(report).getroot())


def counts(root: ElementTree.Element) -> dict[str, Any]:
    """passed, failed, skipped (expected failures too), and the names of what failed."""
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in root.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            result["failed"] += 1
            result["failures"].append(case.get("name"))
        elif case.find("skipped") is not None:
            result["skipped"] += 1
        else:
            result["passed"] += 1
    return result


def table(results: dict[str, Any]) -> str:
    """The counts of both, file by file, in Markdown."""
    lines = [
        "| file | bitsandbytes: passed, failed, skipped | qcore: passed, failed, skipped |",
        "|---|---|---|",
    ]
    for file, subjects in sorted(results.items()):
        cells = []
        for subject in ("bitsandbytes", "qcore"):
            found = subjects.get(subject, {"error": "not run"})
            numbers = ", ".join(str(found.get(key)) for key in ("passed", "failed", "skipped"))
            cells.append(found["error"].splitlines()[-1] if "error" in found else numbers)
        lines.append(f"| `{file}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="JSON file, brought up to date after each test file")
    parser.add_argument("--file", action="append", help="only this test file; may be repeated")
    parser.add_argument("--only", choices=["bitsandbytes", "qcore"])
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one test file")
    options = parser.parse_args()
    files = options.file or sorted(
        path.name for path in (options.checkout / "tests").glob("test_*.py") if path.name not in LEFT_OUT
    )
    if not files:
        parser.error(f"{options.checkout} has no tests/test_*.py")
    known = options.output is not None and options.output.is_file()
    results: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8")) if known else {}
    for file in files:
        for subject in [options.only] if options.only else ["bitsandbytes", "qcore"]:
            found = run(options.checkout, file, subject, options.timeout)
            results.setdefault(file, {})[subject] = found
            shown = {key: value for key, value in found.items() if key != "failures"}
            print(f"{file:28} {subject:13} {shown}", flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
