"""The CUDA backend's host side, as far as it goes without the CUDA toolkit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "architectures.h"
int main(int, char **argv) { std::puts(qcore::gpu::runs_on(argv[1], std::atoi(argv[2])) ? "yes" : "no"); }
"""
RELEASE = "75-real 80-real 86-real 89-real 90a-real 100-real 120"


@pytest.fixture(scope="module")
def runs_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        if os.environ.get("QCORE_REQUIRE_NATIVE") == "1":
            pytest.fail("no C++ compiler (c++, g++) was found")
        pytest.skip("no C++ compiler (c++, g++) was found")
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "main.cpp").write_text(PROGRAM, encoding="utf-8")
    command = [compiler, "-std=c++17", f"-I{SOURCES}", "-o", folder / "runs_on", folder / "main.cpp"]
    subprocess.run(command, check=True)
    return folder / "runs_on"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (RELEASE, 70, False),  # V100: older than everything
        (RELEASE, 75, True),
        (RELEASE, 80, True),
        (RELEASE, 87, True),  # the code of 8.6
        (RELEASE, 89, True),
        (RELEASE, 90, True),
        (RELEASE, 100, True),
        (RELEASE, 103, True),  # the code of 10.0
        (RELEASE, 110, False),  # no code of that major, and the only PTX is of 12.0
        (RELEASE, 120, True),
        (RELEASE, 130, True),  # the PTX of 12.0
        ("90a-real", 90, True),
        ("90a-real", 100, False),
        ("90a", 103, False),  # the letter: not even its PTX goes on
        ("80-virtual", 75, False),
        ("80-virtual", 90, True),
        ("89-real", 86, False),
        ("", 90, False),
    ],
)
def test_a_build_knows_its_devices(runs_on: Path, built: str, capability: int, runs: bool) -> None:
    said = subprocess.run([runs_on, built, str(capability)], capture_output=True, text=True, check=True).stdout
    assert said == ("yes\n" if runs else "no\n")
