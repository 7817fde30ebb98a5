"""The CUDA backend's host side, as far as it goes without the CUDA toolkit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
HOST = Path(__file__).parents[2] / "kernels" / "host"
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "architectures.h"
int main(int, char **argv) { std::puts(qcore::gpu::runs_on(argv[1], std::atoi(argv[2])) ? "yes" : "no"); }
"""
RELEASE = "75-real 80-real 86-real 89-real 90a-real 100-real 120"


MEMORY = """
#include <cassert>
#include <cstdio>
#include "memory.h"
using namespace qcore::gpu;
int main() {
    using Kind = Memory::Kind;
    assert(memory_refusal({Kind::device, 1}, 1, false).empty());
    assert(memory_refusal({Kind::device, 1}, 0, true) == "memory of device 1");
    assert(memory_refusal({Kind::unknown, -1}, 0, false) == "memory of the host that is not pinned, or no memory");
    assert(memory_refusal({Kind::unknown, -1}, 0, true).empty());
    assert(memory_refusal({Kind::pinned, -1}, 0, false).empty());
    assert(memory_refusal({Kind::managed, 1}, 0, false).empty());
    static KnownPages<21> pages;
    const uintptr_t page = uintptr_t{1} << 21, address = uintptr_t{0x7F32} << 32;
    assert(!pages.holds(0, 0) && !pages.holds(address, 0));
    pages.add(address, 0);
    assert(pages.holds(address, 0) && pages.holds(address + page - 1, 0));
    assert(!pages.holds(address, 1) && !pages.holds(address + page, 0) && !pages.holds(address - 1, 0));
    assert(!pages.holds(address + 2048 * page, 0));  // of the same slot
    pages.add(address + 2048 * page, 1);
    assert(pages.holds(address + 2048 * page, 1) && !pages.holds(address, 0));
    int asked = 0;
    const auto look = [&](uintptr_t) { ++asked; return Memory{Kind::device, 0}; };
    KnownPages<12> &small = *new KnownPages<12>;
    for (uintptr_t address : {4096, 8191, 8192}) {
        assert(address_refusal(small, address, 0, false, look).empty());
    }
    assert(asked == 2);
    assert(address_refusal(small, 4096, 1, false, look) == "memory of device 0" && !small.holds(4096, 1));
    std::puts("yes");
}
"""

DRIVER = """
#include <cstdio>
#include <cstdlib>
#include "driver.h"
int main(int, char **argv) {
    const int error = std::atoi(argv[1]), count = std::atoi(argv[2]);
    const int driver = std::atoi(argv[3]), runtime = std::atoi(argv[4]);
    std::puts(qcore::gpu::machine_refusal({error, count, driver, runtime, "cudaErrorName", "text"}).c_str());
}
"""


def _compiler() -> str:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        if os.environ.get("QCORE_REQUIRE_NATIVE") == "1":
            pytest.fail("no C++ compiler (c++, g++) was found")
        pytest.skip("no C++ compiler (c++, g++) was found")
    return compiler


def _compiled(folder: Path, name: str, program: str) -> Path:
    source = folder / f"{name}.cpp"
    source.write_text(program, encoding="utf-8")
    subprocess.run([_compiler(), "-std=c++17", f"-I{SOURCES}", f"-I{HOST}", "-o", folder / name, source], check=True)
    return folder / name


@pytest.fixture(scope="module")
def runs_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("architectures"), "runs_on", PROGRAM)


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


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("driver"), "refusal", DRIVER)


_MISSING = "this machine has no NVIDIA driver; install one for CUDA {} or newer ({} or newer), or use the cpu backend"
_OLD = "the NVIDIA driver is too old: it serves CUDA {}, and this library needs {}; update the driver ({} or newer), "
_OLD += "or use the cpu backend"
_HIDDEN = "the NVIDIA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("error", "count", "driver", "runtime", "expected"),
    [
        (0, 1, 13000, 13000, ""),
        (0, 2, 13000, 13010, ""),  # an older minor version serves
        (0, 1, 12010, 12080, ""),
        (0, 1, 13000, 12080, ""),
        (35, 0, 0, 13000, f"no device: {_MISSING.format('13.0', 580)}"),
        (35, 0, 12040, 13000, f"no device: {_OLD.format('12.4', '13.0', 580)}"),
        # The runtime is content, but kernels with more than 4 KB of parameters would not start.
        (0, 1, 12000, 12080, f"no device: {_OLD.format('12.0', '12.1', 530)}"),
        (100, 0, 13000, 13000, f"no device: {_HIDDEN}"),
        (0, 0, 13000, 13000, f"no device: {_HIDDEN}"),
        (803, 0, 13000, 13000, "no device: the CUDA runtime answers cudaErrorName: text; check that nvidia-smi works"),
    ],
)
def test_what_the_runtime_answers_becomes_one_sentence(
    refusal: Path, error: int, count: int, driver: int, runtime: int, expected: str
) -> None:
    command = [str(word) for word in (refusal, error, count, driver, runtime)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{expected}\n"


def test_memory_of_the_host_and_of_other_devices_is_refused(tmp_path: Path) -> None:
    said = subprocess.run([_compiled(tmp_path, "memory", MEMORY)], capture_output=True, text=True, check=True).stdout
    assert said == "yes\n"


@pytest.mark.parametrize("source", sorted(HOST.glob("*.cpp")), ids=lambda path: path.name)
def test_the_shared_host_side_needs_no_kernel_compiler(source: Path) -> None:
    """A CUDA build gives these files to the host's compiler; HIP and the emulation to another."""
    root = HOST.parents[2]
    folders = (root / "qcore" / "include", root / "backends" / "common", HOST.parent)
    command = [_compiler(), "-std=c++17", "-fsyntax-only", *(f"-I{folder}" for folder in folders), str(source)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
