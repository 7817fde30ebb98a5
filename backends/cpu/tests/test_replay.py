"""The replay of recorded calls passes a right library, and fails where one expected byte is another."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import qcore_cpu
from qcore.backend import abi
from qcore.backend.cffi_backend import CffiBackend

HERE = Path(__file__).parent
OPS = ("quantize_absmax", "gemm_4bit", "optimizer_step")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("replay") / "replay"
    flags = ["-std=c++17", "-O1", f"-I{abi.HEADER.parent}", str(HERE / "replay.cpp"), "-o", str(program), "-ldl"]
    subprocess.run(["g++", *flags], check=True)
    return program


@pytest.fixture(scope="module", params=OPS)
def calls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calls") / f"{request.param}.bin"
    program = Path(sys.executable).parent / "qcore-conformance"
    command = [str(program), "record", str(path), "--declared-by", "cpu", "--op", request.param]
    subprocess.run(command, check=True)
    return path


def run(program: Path, calls: Path) -> subprocess.CompletedProcess[str]:
    backend = qcore_cpu.load()
    assert isinstance(backend, CffiBackend)
    return subprocess.run([program, backend.path, calls], capture_output=True, text=True, check=False)


def test_a_right_library_passes(replay: Path, calls: Path) -> None:
    done = run(replay, calls)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


def test_one_other_expectation_fails(replay: Path, calls: Path, tmp_path: Path) -> None:
    """The file ends with what the last call has to give."""
    data = bytearray(calls.read_bytes())
    if calls.stem == "gemm_4bit":
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
