"""The built CUDA library without a GPU: what it says where a driver or a device is missing.

NVIDIA's runtime is linked into the library and asks the driver, which is made up here. Needs the library
(``QCORE_CUDA_LIBRARY``): `nox -s isa`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = os.environ.get("QCORE_CUDA_LIBRARY")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="needs a built libqcore_cuda.so; nox -s isa -- cuda")

# The C ABI by hand: the entry's table has a name and then functions. The second call is an op's, at addresses that
# nothing reads.
PROGRAM = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.qcore_backend_open.restype = ctypes.POINTER(ctypes.c_void_p)
table = library.qcore_backend_open(1)
last_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(table[2])
count, int64, size = ctypes.c_int32(-1), ctypes.c_int64, ctypes.c_size_t
status = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(table[3])(ctypes.byref(count))
print(status, count.value, last_error().decode())
kinds = (ctypes.c_int32, size, size, size, size, size, int64, int64, size)
op = ctypes.CFUNCTYPE(ctypes.c_int32, *kinds)(table[11])  # dequantize_absmax
print(op(0, 64, 4096, 4096, 4096, 4096, 1000, 256, 4096), last_error().decode())
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("no C compiler (gcc, cc) was found")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parent / "fake_driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


def said(driver: Path | None = None, version: int = 0) -> list[str]:
    path = {"LD_LIBRARY_PATH": str(driver), "FAKE_CUDA": str(version)} if driver else {}
    command = [sys.executable, "-c", PROGRAM, str(LIBRARY)]
    run = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has NVIDIA's driver")
def test_without_a_driver_it_loads_and_says_so() -> None:
    count, op = said()
    assert count.startswith("3 0 no device: this machine has no NVIDIA driver; install one for CUDA 1")
    assert count.endswith("or use the cpu backend")
    assert op.startswith("3 dequantize_absmax: no device: this machine has no NVIDIA driver; ")


@pytest.mark.parametrize(("version", "text"), [(11040, "11.4"), (12000, "12.0")])
def test_a_driver_older_than_the_library_is_named(driver: Path, version: int, text: str) -> None:
    count, op = said(driver, version)
    refusal = f"no device: the NVIDIA driver is too old: it serves CUDA {text}, and this library needs 1"
    assert count.startswith(f"3 0 {refusal}")
    assert "; update the driver (5" in count
    assert op.startswith(f"3 dequantize_absmax: {refusal}")


def test_a_driver_without_a_gpu_is_told_apart(driver: Path) -> None:
    count, _ = said(driver, 13000)
    assert count == "3 0 no device: the NVIDIA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def test_nothing_but_the_entry_point_leaves_the_library() -> None:
    names = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in names.stdout.splitlines()] == ["qcore_backend_open"]
