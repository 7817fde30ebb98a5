"""The SIMT emulation: what it computes, what it finds, and that a schedule is what it is called."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
SIMT = HERE.parent / "simt"
WAVES = (32, 64)
POISON = -67372037  # 0xFBFBFBFB


@pytest.fixture(scope="module", params=WAVES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        if os.environ.get("QCORE_REQUIRE_NATIVE") == "1":
            pytest.fail("no C++ compiler (c++, g++) was found")
        pytest.skip("no C++ compiler (c++, g++) was found")
    library = tmp_path_factory.mktemp("machine") / f"machine{request.param}.so"
    sources = [HERE / "machine_kernels.cpp", *(SIMT / name for name in ("machine.cpp", "fiber.cpp", "half.cpp"))]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", f"-DQC_WAVE_SIZE={request.param}"]
    subprocess.run([compiler, *flags, "-o", library, *sources], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.launch.restype = ctypes.c_char_p
    loaded.launch.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)
    loaded.to_half.argtypes, loaded.from_half.restype = (ctypes.c_float,), ctypes.c_float
    loaded.wave = request.param
    return loaded


def launch(machine: ctypes.CDLL, kernel: str, threads: int = 256, blocks: int = 1) -> tuple[str, np.ndarray]:
    out = np.full(max(threads, 1), -1, dtype=np.int32)
    return machine.launch(kernel.encode(), threads, blocks, out.ctypes.data).decode(), out


SCHEDULES = ("forward", "reversed", "random:1", "random:2")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_makes_shared_memory_safe(
    machine: ctypes.CDLL, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCORE_SIMT_SCHEDULE", schedule)
    error, out = launch(machine, "mirror", blocks=3)
    assert error == ""
    assert np.array_equal(out, np.arange(256)[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_barrier_shows_as_poison(
    machine: ctypes.CDLL, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCORE_SIMT_SCHEDULE", schedule)
    error, out = launch(machine, "mirror without a barrier")
    assert error == ""
    assert (out == POISON).any()


def test_shuffles_reach_the_whole_wave(machine: ctypes.CDLL) -> None:
    error, out = launch(machine, "wave neighbour")
    assert error == ""
    assert np.array_equal(out, np.arange(256) ^ (machine.wave // 2))


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("one lane stays away", "thread 37: waits at a barrier while other lanes of wave"),
        ("one lane leaves", "thread 37: has left the kernel while other lanes of wave"),
        ("lanes part", "thread 1: exchanges values at line"),
        ("one thread misses the barrier", "thread 200: has left the kernel while others of its block"),
        ("waves wait at two barriers", "thread 128: waits at the barrier of line"),
        ("runs out of stack", "ran out of its stack"),
        ("stores across a boundary", "thread 1: an access of 16 bytes at an address that is no multiple of 16"),
    ],
)
def test_what_a_gpu_would_hide_is_an_error(machine: ctypes.CDLL, kernel: str, says: str) -> None:
    error, _ = launch(machine, kernel)
    assert says in error
    assert launch(machine, "mirror")[0] == "", "an error leaves the machine usable"


@pytest.mark.parametrize(("threads", "blocks"), [(0, 1), (48, 1), (2048, 1), (256, 0), (256, 2**31)])
def test_a_launch_that_no_gpu_takes_is_refused(machine: ctypes.CDLL, threads: int, blocks: int) -> None:
    error, _ = launch(machine, "mirror", threads, blocks)
    assert error.startswith("simt: a block of" if blocks == 1 else "simt: a grid of")


def test_schedules_differ(machine: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = {}
    for schedule in SCHEDULES:
        monkeypatch.setenv("QCORE_SIMT_SCHEDULE", schedule)
        error, out = launch(machine, "order of threads")
        assert error == ""
        orders[schedule] = tuple(out - out.min())
    assert orders["forward"] == tuple(range(256))
    assert orders["reversed"] == tuple(range(256))[::-1]
    assert len(set(orders.values())) == len(SCHEDULES)


def test_an_unknown_schedule_is_an_error(machine: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_SIMT_SCHEDULE", "backwards")
    assert "expected forward, reversed or random:SEED, got backwards" in launch(machine, "mirror")[0]


def test_float16_is_numpys(machine: ctypes.CDLL) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = np.array([machine.from_half(int(bits)) for bits in every[::7]], dtype=np.float32)
    expected = every[::7].view(np.float16).astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)
    near = (every[::5].view(np.float16).astype(np.float32).view(np.uint32) + rng.integers(-3, 4)).astype(np.uint32)
    halves = np.nextafter(np.float32(65520), np.float32([0, 1e9])).astype(np.float32)
    for x in (bits.view(np.float32), near.view(np.float32), halves, np.float32([65520, -65520, 2**-25, 3 * 2**-25])):
        with np.errstate(over="ignore"):
            want = x.astype(np.float16)
        got = np.array([machine.to_half(float(value)) for value in x], dtype=np.uint16).view(np.float16)
        assert np.array_equal(got.view(np.uint16)[~np.isnan(want)], want.view(np.uint16)[~np.isnan(want)])
        assert np.isnan(got[np.isnan(want)]).all()
