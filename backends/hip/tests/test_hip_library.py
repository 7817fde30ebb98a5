"""The built HIP library without a GPU: what it says where something is missing, and where its calls go.

A runtime made for the test answers for the driver: it counts the devices that it is told to, and notes launches instead
of starting kernels. Needs the library (``QCORE_HIP_LIBRARY``) and HIP's headers (``QCORE_HIP_ROOT``): `nox -s isa`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY, ROOT = os.environ.get("QCORE_HIP_LIBRARY"), os.environ.get("QCORE_HIP_ROOT")
pytestmark = pytest.mark.skipif(not (LIBRARY and ROOT), reason="needs a built libqcore_hip.so; nox -s isa -- hip")
HERE = Path(__file__).parent

# The C ABI by hand, for a process that starts at once: the entry's table has a name and then functions. With an
# argument it calls an op on that device, at addresses that nothing reads.
PROGRAM = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1])
library.qcore_backend_open.restype = ctypes.POINTER(ctypes.c_void_p)
table = library.qcore_backend_open(1)
last_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(table[2])
count, text, int64 = ctypes.c_int32(-1), ctypes.c_char_p(), ctypes.c_int64
status = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(table[3])(ctypes.byref(count))
print("device_count", status, count.value, last_error().decode() if status else "")
if status == 0 and len(sys.argv) > 2:
    device, size = int(sys.argv[2]), ctypes.c_size_t
    kinds = (ctypes.c_int32, size, size, size, size, size, int64, int64, size)
    op = ctypes.CFUNCTYPE(ctypes.c_int32, *kinds)(table[11])  # dequantize_absmax
    status = op(device, 64, 4096, 4096, 4096, 4096, 1000, 256, 4096)
    print("status", status, last_error().decode() if status else "")
    if os.environ.pop("FAKE_HIP_LAUNCH", None) and status:
        print("left", ctypes.CDLL("libamdhip64.so.6").hipGetLastError())
        print("again", op(device, 64, 4096, 4096, 4096, 4096, 1000, 256, 4096))
"""


def compile_runtime(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.fail("no C++ compiler (g++, c++) was found")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-D__HIP_PLATFORM_AMD__", *flags]
    command += ["-isystem", f"{ROOT}/include", "-o", str(folder / "libamdhip64.so.6"), str(HERE / "fake_runtime.cpp")]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_runtime(tmp_path_factory.mktemp("runtime"))


def said(runtime: Path | None, fake: str = "", *arguments: str, **env: str) -> str:
    path = {"LD_LIBRARY_PATH": str(runtime)} if runtime else {}
    environment = {**os.environ, **path, "FAKE_HIP": fake, **env}
    command = [sys.executable, "-c", PROGRAM, str(LIBRARY), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_without_a_runtime_it_loads_and_says_so() -> None:
    text = said(None)
    assert text.startswith("device_count 3 0 ")
    assert "no device: no HIP runtime (libamdhip64) was found; install a ROCm build of PyTorch" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [("100", "the HIP runtime sees no GPU; check rocminfo"), ("35", "driver is too old"), ("46", "answers")],
)
def test_without_a_device_it_says_so(runtime: Path, error: str, expected: str) -> None:
    text = said(runtime, error)
    assert text.startswith("device_count 3 0 no device: ")
    assert expected in text


def test_a_runtime_of_rocm_5_is_too_old(tmp_path: Path) -> None:
    text = said(compile_runtime(tmp_path, "-DFAKE_HIP_OLD"), "gfx942:64")
    assert "no device: the HIP runtime is too old (it has no hipGetDevicePropertiesR0600)" in text
    assert "ROCm 6 or newer" in text


def test_a_device_that_it_was_not_built_for_is_named(runtime: Path) -> None:
    text = said(runtime, "gfx906:64")
    assert "built for gfx90a gfx942" in text
    assert "this Fake gfx906 is gfx906; build qcore-hip with -DQCORE_HIP_ARCHITECTURES=gfx906" in text


def test_one_device_of_two_can_be_served(runtime: Path) -> None:
    assert said(runtime, "gfx1036:32,gfx1100:32", "1", FAKE_HIP_CURRENT="1").endswith("status 0")
    refused = said(runtime, "gfx1036:32,gfx1100:32", "0")
    assert "dequantize_absmax: device: built for" in refused
    assert "launch" not in refused


@pytest.mark.parametrize(("arch", "wave"), [("gfx90a", 64), ("gfx942", 64), ("gfx1030", 32), ("gfx1100", 32)])
def test_a_call_goes_to_the_kernels_of_the_devices_wave_size(runtime: Path, arch: str, wave: int) -> None:
    text = said(runtime, f"{arch}:{wave}", "0")
    assert f"qcore_wave{wave}" in text
    assert "dequantize_absmax_kernel" in text
    # 1000 elements, 512 threads a block, on the stream that was named.
    assert "2 512 stream 0x40" in text


def test_an_error_of_a_launch_comes_back_as_text_and_stays_with_no_one(runtime: Path) -> None:
    text = said(runtime, "gfx1100:32", "0", FAKE_HIP_LAUNCH="9")
    assert "status 5 dequantize_absmax: hipErrorInvalidConfiguration: a fake error" in text
    assert "left 0" in text
    assert text.endswith("again 0")


def test_another_current_device_is_refused(runtime: Path) -> None:
    text = said(runtime, "gfx1100:32,gfx1100:32", "0", FAKE_HIP_CURRENT="1")
    assert "expected the calling thread's current device, 1, got 0" in text
    assert "launch" not in text


def test_memory_of_the_device_is_asked_about_once(runtime: Path) -> None:
    text = said(runtime, "gfx1100:32", "0", FAKE_HIP_MEMORY="2:0")
    assert "status 0" in text
    assert text.count("asked 0x1000") == 1


@pytest.mark.parametrize("memory", ["1:0", "3:1", "11:0"], ids=["pinned", "managed", "unified"])
def test_memory_that_every_device_may_use_is_taken(runtime: Path, memory: str) -> None:
    assert "status 0" in said(runtime, "gfx942:64", "0", FAKE_HIP_MEMORY=memory)


@pytest.mark.parametrize(
    ("memory", "whose"),
    [
        ("0:0", "memory of the host that is not pinned, or no memory"),
        ("1", "memory of the host that is not pinned, or no memory"),
        ("2:1", "memory of device 1"),
    ],
    ids=["unregistered", "unknown to the runtime", "of another device"],
)
def test_other_memory_is_refused_before_a_kernel_starts(runtime: Path, memory: str, whose: str) -> None:
    text = said(runtime, "gfx1100:32,gfx1100:32", "0", FAKE_HIP_MEMORY=memory)
    assert f"status 1 dequantize_absmax: a: expected memory of device 0, got 0x1000, {whose}" in text
    assert "launch" not in text


def test_a_device_that_reads_the_hosts_memory_takes_it(runtime: Path) -> None:
    assert "status 0" in said(runtime, "gfx942:64", "0", FAKE_HIP_MEMORY="0:0", FAKE_HIP_PAGEABLE="1")


def test_every_entry_of_the_table_leads_somewhere() -> None:
    program = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1])
library.qcore_backend_open.restype = ctypes.POINTER(ctypes.c_void_p)
table = library.qcore_backend_open(1)
words = ctypes.cast(table, ctypes.POINTER(ctypes.c_uint32))[0] // ctypes.sizeof(ctypes.c_void_p)
print(words, [i for i in range(1, words) if not table[i]])
"""
    command = [sys.executable, "-c", program, str(LIBRARY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words, empty = said.split(maxsplit=1)
    assert int(words) > 20
    assert empty.strip() == "[]"


def test_nothing_but_the_entry_point_leaves_the_library() -> None:
    names = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in names.stdout.splitlines()] == ["qcore_backend_open"]
