"""The library as a guest in a process: its exports, its answers to bad arguments, and whom it must not disturb."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore_cpu
from qcore import codebooks
from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.backend.cffi_backend import CffiBackend

DYNAMIC = torch.tensor(codebooks.DYNAMIC)
N = 300_000  # several chunks, so that threads take part


@pytest.fixture(scope="module")
def backend() -> CffiBackend:
    loaded = qcore_cpu.load()
    assert isinstance(loaded, CffiBackend)
    return loaded


@pytest.fixture(scope="module")
def api(backend: CffiBackend) -> Any:
    return ffi.dlopen(str(backend.path)).qcore_backend_open(1)


def quantize(backend: CffiBackend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = torch.empty(-(-x.numel() // 64))
    packed = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8)
    backend.quantize_4bit(x, "nf4", 64, absmax=absmax, out=packed)
    return packed, absmax


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_it_exports_its_entry_point_and_nothing_else(backend: CffiBackend) -> None:
    lines = subprocess.run(["nm", "-D", "--defined-only", backend.path], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in lines.stdout.splitlines()] == ["qcore_backend_open"]


def test_another_major_version_is_refused(backend: CffiBackend) -> None:
    assert ffi.dlopen(str(backend.path)).qcore_backend_open(2) == ffi.NULL


def test_it_runs_on_the_threads_of_torch(backend: CffiBackend) -> None:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    openmp = [line.split()[-1] for line in maps.splitlines() if re.search(r"lib[gi]?omp", line)]
    assert any(path in backend.describe(torch.device("cpu")).runtime for path in openmp)


# Calls with valid arguments but for one, and what the message must say. `a` and `out` are real addresses.
BAD_QUANTIZE = {
    "device": ({"device": 1}, QC.QC_NO_DEVICE, "device: expected 0, the only one of a host, got 1"),
    "dtype": ({"dtype": 3}, QC.QC_INVALID_ARGUMENT, r"dtype: expected QC_F32 \(0\), .* got 3"),
    "format": ({"format": -1}, QC.QC_INVALID_ARGUMENT, r"format: expected QC_NF4 \(0\) or QC_FP4 \(1\), got -1"),
    "negative": ({"n": -1}, QC.QC_INVALID_ARGUMENT, "n: expected a count from 0 to [0-9]+, got -1"),
    "overflow": ({"n": 2**62}, QC.QC_INVALID_ARGUMENT, f"n: expected a count .*, got {2**62}"),
    "small block": (
        {"blocksize": 16},
        QC.QC_INVALID_ARGUMENT,
        "blocksize: expected a power of two from 32 to 4096, got 16",
    ),
    "odd block": ({"blocksize": 96}, QC.QC_INVALID_ARGUMENT, "blocksize: expected a power of two .*, got 96"),
    "large block": ({"blocksize": 8192}, QC.QC_INVALID_ARGUMENT, "blocksize: expected a power of two .*, got 8192"),
    "null": ({"a": 0}, QC.QC_INVALID_ARGUMENT, "a: expected the address of 64 elements, got 0"),
    "misaligned": ({"a": 2}, QC.QC_INVALID_ARGUMENT, "a: expected an address aligned to 4 bytes, got 0x"),
    "null absmax": ({"absmax": 0}, QC.QC_INVALID_ARGUMENT, "absmax: expected the address"),
    "null out": ({"out": 0}, QC.QC_INVALID_ARGUMENT, "out: expected the address"),
}


@pytest.mark.parametrize("case", BAD_QUANTIZE)
def test_a_bad_argument_is_named_and_nothing_is_written(api: Any, case: str) -> None:
    changes, status, message = BAD_QUANTIZE[case]
    a = torch.ones(65)
    absmax = torch.full((2,), 7.0)
    out = torch.full((33,), 7, dtype=torch.uint8)
    arguments = {
        "device": 0,
        "stream": 1,
        "dtype": QC.QC_F32,
        "format": QC.QC_NF4,
        "a": a.data_ptr(),
        "n": 64,
        "blocksize": 64,
        "absmax": absmax.data_ptr(),
        "out": out.data_ptr(),
    }
    assert api.quantize_4bit(*arguments.values()) == QC.QC_OK
    absmax.fill_(7.0)
    out.fill_(7)
    arguments.update(changes)
    if case == "misaligned":
        arguments["a"] = a.data_ptr() + 2
    assert api.quantize_4bit(*arguments.values()) == status
    assert re.fullmatch(f"quantize_4bit: {message}.*", ffi.string(api.last_error()).decode())
    assert bool((absmax == 7).all())
    assert bool((out == 7).all())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, float("nan"), "code: expected 256 finite values, got -?nan at 3"),
        (200, float("inf"), "code: expected 256 finite values, got inf at 200"),
        (100, -2.0, "code: expected ascending values, got -2 at 100 after"),
    ],
)
def test_a_codebook_that_is_none_is_refused(api: Any, index: int, value: float, message: str) -> None:
    code = DYNAMIC.clone()
    code[index] = value
    a, absmax, out = torch.ones(64), torch.full((1,), 7.0), torch.full((64,), 7, dtype=torch.uint8)
    pointers = a.data_ptr(), code.data_ptr(), 64, 64, absmax.data_ptr(), out.data_ptr()
    assert api.quantize_blockwise(0, 1, QC.QC_F32, *pointers) == QC.QC_INVALID_ARGUMENT
    assert re.match(f"quantize_blockwise: {message}", ffi.string(api.last_error()).decode())
    assert float(absmax) == 7
    assert bool((out == 7).all())


def test_errors_of_two_threads_do_not_mix(api: Any) -> None:
    seen: dict[int, str] = {}

    def fail(device: int) -> None:
        for _ in range(200):
            api.quantize_4bit(device, 1, 0, 0, 0, 0, 64, 0, 0)
            seen[device] = ffi.string(api.last_error()).decode()
            assert seen[device].endswith(f"got {device}")

    threads = [threading.Thread(target=fail, args=(device,)) for device in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2


def test_threads_do_not_change_the_bits(backend: CffiBackend, api: Any) -> None:
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    want, want_absmax = quantize(backend, x)
    for threads in (1, 2, 3, 7):
        out, absmax = torch.zeros_like(want), torch.zeros_like(want_absmax)
        status = api.quantize_4bit(
            0, threads, QC.QC_F32, QC.QC_NF4, x.data_ptr(), N, 64, absmax.data_ptr(), out.data_ptr()
        )
        assert status == QC.QC_OK
        assert torch.equal(out, want)
        assert torch.equal(absmax, want_absmax)


def test_calls_from_many_threads_at_once(backend: CffiBackend) -> None:
    x = torch.randn(N, generator=torch.Generator().manual_seed(1))
    want = quantize(backend, x)
    wrong = []

    def repeat() -> None:
        for _ in range(10):
            got = quantize(backend, x)
            if not all(torch.equal(a, b) for a, b in zip(want, got, strict=True)):
                wrong.append(got)

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_denormals_count_even_when_torch_flushes_them(backend: CffiBackend) -> None:
    """QC-NUM-001, and the caller's setting is his again afterwards."""
    x = torch.arange(-64, 64, dtype=torch.int32).view(torch.float32)  # the smallest denormals, and NaN
    x = torch.where(x.isnan(), torch.zeros_like(x), x)
    want = quantize(backend, x)
    assert float(want[1].view(torch.int32)[1]) == 63
    assert torch.set_flush_denormal(True)
    try:
        got = quantize(backend, x)
        still_flushing = float((torch.tensor([1e-40]) * 1.0).view(torch.int32)) == 0
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(want, got, strict=True))
    assert still_flushing
