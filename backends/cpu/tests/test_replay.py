"""The replay of recorded calls passes a right library, and fails where one expected byte is another."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import qcore_cpu
from qcore.backend import abi
from qcore.backend.cffi_backend import CffiBackend
from qcore_conformance.cases import OPS, select
from qcore_conformance.cli import main
from qcore_conformance.record import LEVELS, PRODUCTS, record_cases

HERE = Path(__file__).parent
# A call with bits, three with intervals, one that changes its tensors.
KINDS = ("quantize_absmax", "gemm_4bit", "gemm_int4", "int8_linear_transposed", "optimizer_step")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("replay") / "replay"
    flags = ["-std=c++17", "-O1", f"-I{abi.HEADER.parent}", str(HERE / "replay.cpp"), "-o", str(program), "-ldl"]
    subprocess.run(["g++", *flags], check=True)
    return program


def record(path: Path, *ops: str, every: int) -> Path:
    """The last of each so many cases of these ops: all of them run on this library in the suite itself."""
    cases = []
    for op in ops:
        # Not those beside protected pages, which are not recorded, nor over threads: the replay has its own.
        whole = [c for c in select([op], LEVELS) if "isolated" not in c.params and not c.id.endswith("/threads")]
        cases += whole[::-every][::-1]
    recorder = record_cases(path, qcore_cpu.load(), cases)
    assert recorder.counts.keys() == set(ops)
    return path


def run(program: Path, calls: Path) -> subprocess.CompletedProcess[str]:
    backend = qcore_cpu.load()
    assert isinstance(backend, CffiBackend)
    return subprocess.run([program, backend.path, calls], capture_output=True, text=True, check=False)


def test_a_right_library_passes(replay: Path, tmp_path: Path) -> None:
    calls = record(tmp_path / "calls.bin", *(set(OPS) - {"contract"}), every=16)
    done = run(replay, calls)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


def test_the_command_records(replay: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls.bin"
    done = CliRunner().invoke(main, ["record", str(calls), "--declared-by", "cpu", "--op", "int8_gemm"])
    assert done.exit_code == 0, done.output
    assert run(replay, calls).returncode == 0


@pytest.mark.parametrize("op", KINDS)
def test_one_other_expectation_fails(replay: Path, op: str, tmp_path: Path) -> None:
    """The file ends with what the last call has to give."""
    calls = record(tmp_path / f"{op}.bin", op, every=100)
    data = bytearray(calls.read_bytes())
    if op in PRODUCTS:
        data[-8:] = struct.pack("<d", -math.inf)  # the largest that the last element may be
    else:
        data[-1] ^= 1
    changed = tmp_path / "changed.bin"
    changed.write_bytes(data)
    done = run(replay, changed)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " 2 failed" in done.stdout  # on one thread and on three


@pytest.mark.parametrize(("content", "message"), [(b"QCCALLS1" + bytes(64), "no recorded calls"), (b"QC", "ends in")])
def test_another_file_is_refused(replay: Path, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "calls.bin"
    path.write_bytes(content)
    done = run(replay, path)
    assert done.returncode == 2
    assert message in done.stderr
