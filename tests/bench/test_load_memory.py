"""`benchmarks/load_memory.py`: every figure comes from a process of its own under the same settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def load_memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import load_memory

    return load_memory


@pytest.mark.parametrize("formats", [["nf4"], ["nf4", "awq"]])
def test_one_format_is_measured_as_two_are(
    load_memory: ModuleType, monkeypatch: pytest.MonkeyPatch, formats: list[str]
) -> None:
    ran: list[tuple[list[str], str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append((command[2:], env["MALLOC_MMAP_THRESHOLD_"], env["MALLOC_TRIM_THRESHOLD_"]))
        return subprocess.CompletedProcess(command, 0, stdout='a warning\n{"model": 168000000, "peak": 176000000}\n')

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(load_memory, "measure", lambda *_: pytest.fail("measured in the process that asks"))
    monkeypatch.setattr(sys, "argv", ["load_memory.py", "--model", "folder", "--formats", *formats])
    load_memory.main()
    arguments = [["--model", "folder", "--measure", format_, "--dtype", "float32"] for format_ in formats]
    assert ran == [(each, "65536", "65536") for each in arguments]


def test_a_record_keeps_the_runs_with_other_arguments(
    load_memory: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "runs.json"
    for arguments, peak in (["--model", "a"], 1), (["--model", "b"], 2), (["--model", "a"], 3):
        done = subprocess.CompletedProcess([], 0, stdout=json.dumps({"model": 1, "peak": peak}))
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        monkeypatch.setattr(sys, "argv", ["load_memory.py", *arguments, "--formats", "nf4", "--json", str(path)])
        load_memory.main()
    tree = json.loads(path.read_text())
    peaks = {run["arguments"]: run["rows"][0]["peak"] for run in tree["runs"]}
    assert peaks == {"--model a --formats nf4": 3, "--model b --formats nf4": 2}
    path.write_text(json.dumps({**tree, "machine": {"processor": "another"}}))
    with pytest.raises(SystemExit, match="of another machine"):
        load_memory.main()


@pytest.mark.parametrize("width", ["256", "640", "0", "-512"])
def test_a_width_without_whole_heads_is_refused(
    load_memory: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, width: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["load_memory.py", "--gigabytes", "0.1", f"--width={width}"])
    monkeypatch.setattr(load_memory, "write_checkpoint", lambda *_, **__: pytest.fail("a checkpoint is written"))
    with pytest.raises(SystemExit):
        load_memory.main()
    assert f"--width is {width}, expected a multiple of 512" in capsys.readouterr().err
