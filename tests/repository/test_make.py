"""`make` says what is missing, before it does anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A make above this test must not hand its own options down.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_test_without_a_compiler_says_what_to_install() -> None:
    run = make("compiler", "CXX=no-such-compiler")
    assert run.returncode == 2
    assert "no C++ compiler (no-such-compiler) was found" in run.stderr
    assert "install g++" in run.stderr


def test_test_asks_for_the_compiler_first() -> None:
    run = make("--dry-run", "test", "CXX=no-such-compiler")
    assert "no C++ compiler" in run.stdout.splitlines()[0]


def test_demo_without_a_compiler_runs_on_the_reference_and_says_so() -> None:
    run = make("no-compiler", "CXX=no-such-compiler")
    assert run.returncode == 0
    assert "runs on cpu_reference" in run.stderr
    plan = make("--dry-run", "demo", "CXX=no-such-compiler").stdout
    assert "nox -s demo" in plan
    assert "backends/cpu" not in plan


def test_an_unsuitable_python_is_refused(tmp_path: Path) -> None:
    run = make(f"VENV={tmp_path}/venv", "PYTHON=false", "env")
    assert run.returncode == 2
    assert "qcore needs Python 3.10 or newer" in run.stderr
    assert not (tmp_path / "venv").exists()
