"""`tools/bitsandbytes_suite.py`: a run that never began is no run without failures, and a killed one goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bitsandbytes_suite.py"
CASES = """
def test_good(): pass
def test_bad(): assert False
"""


@pytest.fixture
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bitsandbytes_suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Installing qcore under the other name takes seconds; the checkout is read as the real one does.
    module.ALIAS = "import pathlib; pathlib.Path({reference!r}).read_text()"
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout/tests").mkdir(parents=True)
    (tmp_path / "checkout/tests/test_a.py").write_text(CASES, encoding="utf-8")
    return tmp_path / "checkout"


def run(suite: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, object]]:
    out = checkout.parent / "counts.json"
    monkeypatch.setattr(sys, "argv", ["suite", str(checkout), "-o", str(out), "--only", "qcore"])
    code = suite.main()
    return code, json.loads(out.read_text(encoding="utf-8"))["test_a.py"]["qcore"]


def test_an_exception_in_front_of_pytest_is_no_run(
    suite: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = run(suite, checkout, monkeypatch)
    assert code == 1
    assert "ended with 1: " in str(found["stopped"])
    assert "FileNotFoundError" in str(found["stopped"])
    (checkout / "bitsandbytes/optim").mkdir(parents=True)
    (checkout / "bitsandbytes/optim/ademamix.py").touch()
    code, found = run(suite, checkout, monkeypatch)
    assert (code, found) == (0, {"passed": 1, "failed": 1, "skipped": 0, "failures": ["test_bad"]})
    (checkout / "bitsandbytes/optim/ademamix.py").unlink()
    assert run(suite, checkout, monkeypatch)[0] == 1, "an earlier run came to its end, this one did not"


def test_a_line_that_was_cut_off_is_written_anew(
    suite: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "bitsandbytes/optim").mkdir(parents=True)
    (checkout / "bitsandbytes/optim/ademamix.py").touch()
    journal = checkout.parent / "counts.cases.jsonl"
    whole = json.dumps({"file": "test_a.py", "subject": "qcore", "case": "test_good", "outcome": "skipped"})
    journal.write_text(f"{whole}\n{whole[:40]}", encoding="utf-8")
    code, found = run(suite, checkout, monkeypatch)
    assert (code, found) == (0, {"passed": 0, "failed": 1, "skipped": 1, "failures": ["test_bad"]})
    assert all(json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())
