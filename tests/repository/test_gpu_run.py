"""`tools/gpu_run.sh` where there is no GPU: it says so, leaves a summary, and starts nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_run.sh"


def gpu_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script, with an nvidia-smi that lists no GPU."""
    folder.mkdir()
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 6\n", encoding="utf-8")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    run = gpu_run(tmp_path / "bin", str(tmp_path / "out"))
    assert run.returncode == 3, run.stderr
    assert "no GPU" in run.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == 3
    assert summary["reason"].startswith("no GPU: nvidia-smi")
    assert summary["parts"] == []


@pytest.mark.parametrize("arguments", [(), ("one", "two"), ("--rehearse", "no-such-library.so", "out"), ("--help",)])
def test_wrong_use_prints_the_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = gpu_run(tmp_path / "bin", *arguments)
    assert run.returncode == 2
    assert "tools/gpu_run.sh OUT_DIR" in run.stderr
