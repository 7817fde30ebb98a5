"""The quantization ops give the reference's bits on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512")
MISSING = "this machine does not have it"


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, QCORE_CPU_ISA=isa)
    return subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


# 32 is the one block size that AVX-512 packs in another way; the others differ in loop counts only, and each of them is
# in the conformance suite.
@pytest.mark.parametrize(("op", "blocksizes"), [("blockwise", ("32", "256")), ("4bit", ("32", "64"))])
def test_every_path_gives_the_bits_of_the_reference(op: str, blocksizes: tuple[str, ...]) -> None:
    command = ("check_paths.py", "--op", op, "--blocksize", *blocksizes)
    want = run("portable", *command, "--digest", "reference")
    assert want.returncode == 0, want.stderr
    counts = [int(line.split()[2]) for line in want.stdout.splitlines()]
    assert len(counts) == len(blocksizes)
    assert min(counts) > 500
    for isa in ISAS:
        got = run(isa, *command, "--digest", "library")
        if isa != "portable" and MISSING in got.stderr:
            continue
        assert got.returncode == 0, f"QCORE_CPU_ISA={isa}: {got.stderr}"
        if got.stdout != want.stdout:
            difference = run(isa, *command)
            pytest.fail(f"QCORE_CPU_ISA={isa} python {' '.join(command)}: {difference.stderr or difference.stdout}")


# The AVX-512 ways to encode by arithmetic; the other paths take the codebook's index, which the test above reaches.
@pytest.mark.parametrize("name", ["avx512", "avx512_vnni"])
def test_dynamic_codes_are_those_of_a_search(name: str) -> None:
    result = run(name, "check_state_codes.py", "--count", str(1 << 18))
    if MISSING in result.stderr:
        pytest.skip(f"this machine has no {name}")
    assert result.returncode == 0, f"QCORE_CPU_ISA={name}: {result.stderr}"
    assert "codes equal" in result.stdout


@pytest.mark.parametrize("isa", ["mmx", "AVX2"])
def test_unknown_instruction_set_is_an_error_that_names_the_known(isa: str) -> None:
    result = run(isa, "-c", "import qcore_cpu; qcore_cpu.load()")
    assert result.returncode != 0
    assert f"QCORE_CPU_ISA={isa}: no such instruction set; this machine has portable" in result.stderr
