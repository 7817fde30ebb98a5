"""`benchmarks/load_memory.py`: every figure comes from a process of its own under the same settings."""

from __future__ import annotations

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

    def run(command: list[str], *, check: bool, env: dict[str, str]) -> None:
        ran.append((command[2:], env["MALLOC_MMAP_THRESHOLD_"], env["MALLOC_TRIM_THRESHOLD_"]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(load_memory, "measure", lambda *_: pytest.fail("measured in the process that asks"))
    monkeypatch.setattr(sys, "argv", ["load_memory.py", "--model", "folder", "--formats", *formats])
    load_memory.main()
    arguments = [["--model", "folder", "--measure", format_, "--dtype", "float32"] for format_ in formats]
    assert ran == [(each, "65536", "65536") for each in arguments]


@pytest.mark.parametrize("width", ["256", "640", "0", "-512"])
def test_a_width_without_whole_heads_is_refused(
    load_memory: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, width: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["load_memory.py", "--gigabytes", "0.1", f"--width={width}"])
    monkeypatch.setattr(load_memory, "write_checkpoint", lambda *_, **__: pytest.fail("a checkpoint is written"))
    with pytest.raises(SystemExit):
        load_memory.main()
    assert f"--width is {width}, expected a multiple of 512" in capsys.readouterr().err
