"""Writes the summary of tools/gpu_run.sh: its parts, and the machine that they ran on."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from pathlib import Path

_QUERY = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def said(*command: str) -> str:
    """The output of a command, or why there is none."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} was not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer"
    return (done.stdout or done.stderr).strip()


def torch_version() -> str:
    try:
        import torch
    except ImportError as error:
        return str(error)
    return torch.__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", type=Path)
    parser.add_argument("summary", type=Path)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--reason", required=True)
    parser.add_argument("--seconds", type=int, required=True)
    options = parser.parse_args()
    lines = [line.split("\t") for line in options.parts.read_text(encoding="utf-8").splitlines()]
    summary = {
        "status": options.status,
        "reason": options.reason,
        "seconds": options.seconds,
        "parts": [
            {"name": name, "state": state, "exit": int(status), "seconds": int(seconds)}
            for name, state, status, seconds in lines
        ],
        "commit": said("git", "rev-parse", "HEAD"),
        "gpu": said("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version").splitlines()[-1:],
        "python": platform.python_version(),
        "torch": torch_version(),
        "system": platform.platform(),
    }
    options.summary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
