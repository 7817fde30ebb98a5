"""The quantization ops give the reference's bits on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512")


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, QCORE_CPU_ISA=isa)
    return subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    probe = run(request.param, "-c", "import qcore_cpu; qcore_cpu.load()")
    if "this machine does not have it" in probe.stderr:
        pytest.skip(f"this machine has no {request.param}")
    assert probe.returncode == 0, probe.stderr
    return request.param


# 32 is the one block size that AVX-512 packs in another way; the large ones differ from 256 in loop counts only.
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("op", ["blockwise", "4bit"])
def test_path_gives_the_bits_of_the_reference(isa: str, op: str, blocksize: int) -> None:
    result = run(isa, "check_paths.py", "--op", op, "--blocksize", str(blocksize))
    assert result.returncode == 0, f"QCORE_CPU_ISA={isa}: {result.stderr}"
    assert "outputs equal" in result.stdout


@pytest.mark.parametrize("isa", ["mmx", "AVX2"])
def test_unknown_instruction_set_is_an_error_that_names_the_known(isa: str) -> None:
    result = run(isa, "-c", "import qcore_cpu; qcore_cpu.load()")
    assert result.returncode != 0
    assert f"QCORE_CPU_ISA={isa}: no such instruction set; this machine has portable" in result.stderr
