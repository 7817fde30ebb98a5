"""The memory_ functions of the HIP library: which calls reach the runtime, in which order, and what errors become.

The runtime is the one made for tests (fake_runtime.cpp); it notes its calls on standard output.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_hip_library import LIBRARY, compile_runtime, pytestmark  # noqa: F401 - skips these tests, too

# Runs lines such as "allocate 0 1000" (kind, bytes) through the C ABI on device 0 and prints each status and text. The
# entries come last in the table.
PROGRAM = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.qcore_backend_open.restype = ctypes.POINTER(ctypes.c_void_p)
table = library.qcore_backend_open(1)
words = ctypes.cast(table, ctypes.POINTER(ctypes.c_uint32))[0] // 8
i32, i64, size = ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t
first = int(sys.argv[3])
pointer = ctypes.c_void_p
kinds = {"kind": (i32, pointer), "allocate": (i32, i32, i64, pointer), "free": (i32, i32, size),
         "prefetch": (i32, size, i32, size, i64, i32)}
entries = {n: ctypes.CFUNCTYPE(i32, *k)(table[first + i]) for i, (n, k) in enumerate(kinds.items())}
last_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(table[2])
runtime = ctypes.CDLL("libamdhip64.so.6")
count = i32()
ctypes.CFUNCTYPE(i32, pointer)(table[3])(ctypes.byref(count))
made = size(0)
for line in sys.argv[2].split(","):
    name, *values = line.split()
    numbers = [int(value) for value in values]
    device = numbers.pop(0) if name.endswith("@") else 0
    name = name.rstrip("@")
    if name == "kind":
        kind = i32(-1)
        status = entries[name](device, ctypes.byref(kind))
        numbers = [kind.value]
    elif name == "allocate":
        made.value = 0
        status = entries[name](device, *numbers, ctypes.byref(made))
        numbers.append("made" if made.value else "nothing")
    elif name == "current":
        status = runtime.hipSetDevice(*numbers)
    elif name == "free":
        status = entries[name](device, numbers[0], made.value)
    else:
        status = entries[name](device, 64, numbers[0], made.value, numbers[1], numbers[2])
    print(name, *numbers, "->", status, last_error().decode() if status else "", flush=True)
    print("left", runtime.hipGetLastError(), flush=True)
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_runtime(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def memory(runtime: Path):  # type: ignore[no-untyped-def]
    """Runs lines of PROGRAM; gives the lines that it and the runtime said, and sees that no error was left behind."""
    from qcore.backend.abi import ffi

    first = ffi.offsetof("qc_api", "memory_kind") // 8

    def run(lines: str, **settings: str) -> list[str]:
        fake = {"FAKE_HIP": "gfx1100:32,gfx1100:32", "LD_LIBRARY_PATH": str(runtime)}
        env = {**os.environ, **fake, **{f"FAKE_HIP_{key.upper()}": value for key, value in settings.items()}}
        command = [sys.executable, "-c", PROGRAM, str(LIBRARY), lines, str(first)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        said = [line.strip() for line in done.stdout.splitlines()]
        assert {line for line in said if line.startswith("left")} == {"left 0"}
        return [line for line in said if not line.startswith("left")]

    return run


# The runtime's lines come in one piece when the process ends (its own buffer), so calls and answers are compared apart.
def answers(said: list[str]) -> list[str]:
    return [line for line in said if "->" in line]


def calls(said: list[str]) -> list[str]:
    return [line for line in said if "->" not in line]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"managed": "1", "pageable": "1"}, 0),
        ({"managed": "1"}, 1),  # XNACK off: pages cannot leave the device while a kernel runs
        ({}, 1),  # Windows
    ],
)
def test_a_device_says_which_kind_suits_it(memory, settings: dict[str, str], kind: int) -> None:  # type: ignore[no-untyped-def]
    assert memory("kind", **settings) == [f"kind {kind} -> 0"]


def test_managed_memory_is_made_moved_and_given_back(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("allocate 0 1000,prefetch 0 1000 0,prefetch 0 500 1,free 0", managed="1", pageable="1")
    assert [line.rpartition("->")[2].strip() for line in answers(said)] == ["0"] * 4
    assert calls(said) == [
        "managed 1000 flags 1",  # hipMemAttachGlobal
        "prefetch 1000 to 0 stream 0x40",
        "prefetch 500 to -1 stream 0x40",
        "free managed",
    ]


def test_pinned_memory_is_mapped_for_every_device_and_never_moved(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("allocate 1 1000,prefetch 1 1000 0,free 1")
    assert [line.rpartition("->")[2].strip() for line in answers(said)] == ["0"] * 3
    assert calls(said) == ["pinned 1000 flags 3", "free pinned"]  # portable, mapped


def test_managed_memory_is_refused_where_its_pages_do_not_move(memory) -> None:  # type: ignore[no-untyped-def]
    (said,) = memory("allocate 0 1000", managed="1")
    assert said.startswith("allocate 0 1000 nothing -> 2 memory_allocate: kind: pages of managed memory do not move")
    assert "take QC_MEMORY_PINNED (1)" in said


@pytest.mark.parametrize(("kind", "name"), [(0, "managed"), (1, "pinned")])
def test_memory_that_is_out_is_an_error_with_its_size(memory, kind: int, name: str) -> None:  # type: ignore[no-untyped-def]
    (said,) = memory(f"allocate {kind} 4096", managed="1", pageable="1", allocate="2")
    assert said == (
        f"allocate {kind} 4096 nothing -> 4 memory_allocate: allocating 4096 bytes of {name} memory: "
        "hipErrorOutOfMemory: a fake error"
    )


def test_other_errors_of_the_runtime_come_back_as_text(memory) -> None:  # type: ignore[no-untyped-def]
    xnack = {"managed": "1", "pageable": "1"}
    assert "-> 5 memory_allocate: allocating 10 bytes" in memory("allocate 1 10", allocate="1")[0]
    said = memory("allocate 0 10,prefetch 0 10 0", prefetch="1", **xnack)
    assert "-> 5 memory_prefetch: moving to the device 10 bytes of managed memory: hipErrorOther" in said[-2] + said[-1]
    said = memory("allocate 0 10,free 0", free="1", **xnack)
    assert any("-> 5 memory_free: managed memory at 0x" in line for line in said)


def test_pinned_memory_at_two_addresses_is_given_back_and_refused(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("allocate 1 1000", mapped="64")
    assert "nothing -> 2 memory_allocate: the device sees pinned memory at another address" in answers(said)[0]
    assert calls(said) == ["pinned 1000 flags 3", "free pinned"]


def test_memory_comes_and_goes_while_a_graph_is_captured(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("allocate 1 1000,free 1,allocate 1 1000,free 1", capturing="1")
    assert all(line.endswith("-> 0") for line in answers(said))
    assert calls(said) == ["pinned 1000 flags 3", "free pinned"] * 2


def test_memory_is_given_back_whichever_device_is_current(memory) -> None:  # type: ignore[no-untyped-def]
    assert answers(memory("free@ 0 1,free@ 1 1", current="1")) == ["free 1 -> 0", "free 1 -> 0"]
    (said,) = memory("allocate@ 0 1 1000", current="1")
    assert "-> 1 memory_allocate: device: expected the calling thread's current device, 1, got 0" in said


@pytest.mark.parametrize(("kind", "made"), [(0, "managed 1000 flags 1"), (1, "pinned 1000 flags 3")])
def test_memory_of_a_second_device_is_given_back_there(memory, kind: int, made: str) -> None:  # type: ignore[no-untyped-def]
    lines = f"current 1,allocate@ 1 {kind} 1000,current 0,free@ 1 {kind}"
    said = memory(lines, managed="1", pageable="1")
    assert all(line.split("->")[1].strip() == "0" for line in answers(said))
    freed = f"free {made.split()[0]}"
    assert calls(said) == ["current 1", made, "current 0", "current 1", freed, "current 0"]


def test_a_device_is_made_current_only_where_another_one_is(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("allocate@ 1 1 1000,free@ 1 1", current="1")
    assert calls(said) == ["pinned 1000 flags 3", "free pinned"]


def test_a_failed_free_leaves_the_device_current_that_was(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("current 1,allocate@ 1 1 1000,current 0,free@ 1 1,allocate@ 0 1 8", free="1")
    assert "-> 5 memory_free: pinned memory at 0x" in answers(said)[3]
    assert calls(said)[2:] == ["current 0", "current 1", "current 0", "pinned 8 flags 3"]


def test_memory_stays_where_its_device_cannot_be_made_current(memory) -> None:  # type: ignore[no-untyped-def]
    said = memory("allocate 1 1000,free@ 1 1", set="101")
    assert "-> 5 memory_free: pinned memory at 0x" in answers(said)[1]
    assert calls(said) == ["pinned 1000 flags 3"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("allocate 2 10", "1 memory_allocate: kind: expected QC_MEMORY_MANAGED (0) or QC_MEMORY_PINNED (1), got 2"),
        ("allocate 1 0", "1 memory_allocate: bytes: expected at least 1, got 0"),
        ("allocate 1 -1", "1 memory_allocate: bytes: expected a count"),
        ("allocate@ 7 1 10", "3 memory_allocate: device: expected 0 to 1, got 7"),
        ("kind@ 7", "3 memory_kind: device: expected 0 to 1, got 7"),
        ("free 9", "1 memory_free: kind: expected"),
        ("prefetch 0 10 0", "1 memory_prefetch: address: expected that of 10 bytes, got 0"),
        ("prefetch 0 10 2", "1 memory_prefetch: to_host: expected 0 or 1, got 2"),
    ],
)
def test_wrong_arguments_reach_no_runtime(memory, line: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    (said,) = memory(line, managed="1", pageable="1")
    assert f"-> {expected}" in said
