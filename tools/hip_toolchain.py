"""Gathers what clang needs to compile HIP where no ROCm is installed: headers, device libraries, and a check of clang.

    python tools/hip_toolchain.py build/hip-toolchain
    python tools/hip_toolchain.py build/hip-packages --packaged

Headers and the bitcode of ocml and ockl are HIP 6.2's, out of the ``triton`` wheel on the package index, the last that
carries all of them. The bitcode of the constants (``oclc_*``), which ROCm also ships one file each, is one constant a
file and is generated. The folder is laid out so that ``--rocm-path`` and ``--rocm-device-lib-path`` take it. The
compiler is Debian's: clang-19, lld-19 and llvm-19, and clang-tools-19, whose bundler it calls.

``--packaged`` takes the compiler out of the package index too, as bin/clang++: the clang of the ``ziglang`` wheel, of
the same release, with the headers for HIP that it leaves out, from ``clang-tidy`` (as they are in that release). It
compiles to assembly; what links and reads code objects is in no package. Linux on x86-64 alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LLVM = 19
PACKAGES = tuple(f"{name}-{LLVM}" for name in ("clang", "lld", "llvm", "clang-tools"))
TOOLS = tuple(
    f"{name}-{LLVM}" for name in ("clang++", "ld.lld", "llvm-readelf", "llvm-objdump", "clang-offload-bundler")
)
# Any of a project's wheels for this platform will do: what is taken is the same in each. The hash makes it the file
# that was read.
PLATFORMS = ("manylinux_2_12_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
WHEEL_TAGS = ("--python-version", "3.11", *(word for name in PLATFORMS for word in ("--platform", name)))
HEADERS = ("triton==3.5.1", "61413522a48add32302353fdbaaf92daaaab06f6b5e3229940d21b5207f47579")
COMPILER = ("ziglang==0.14.1", "6eb9d4d759b292c83810dbee2e9e8e3fbfbf01d864e6e9811bae711fd74e1c2f")
COMPILER_HEADERS = ("clang-tidy==19.1.0.1", "511fb73f2c8d86a3b34eee7c4a91306bdb17fc6f9565a662dd5ffa7b4836891d")
INSIDE = "triton/backends/amd"
# The target is the one of Debian's clang, so that it finds the C++ headers of the machine's g++.
CLANG = """#!/bin/sh
here=$(dirname "$0")
exec "$here/zig" clang --driver-mode=g++ --target=x86_64-linux-gnu -resource-dir "$here/../clang" "$@"
"""

_LAYOUT = (
    "e-p:64:64-p1:64:64-p2:32:32-p3:32:32-p4:64:64-p5:32:32-p6:32:32-p7:160:256:256:32-p8:128:128-p9:192:256:256:32"
    "-i64:64-v16:16-v24:32-v32:32-v48:64-v96:128-v192:256-v256:256-v512:512-v1024:1024-v2048:2048-n32:64-S32-A5-G1"
    "-ni:7:8:9"
)
_SWITCHES = ("correctly_rounded_sqrt", "daz_opt", "finite_only", "unsafe_math", "wavefrontsize64")
_ABI_VERSIONS = (400, 500, 600)
# Targets by the number that ocml asks for: 90a is 9010, 1201 is 12001.
_TARGETS = (
    "906 908 90a 942 950 1010 1030 1031 1032 1034 1035 1036 1100 1101 1102 1103 1150 1151 1200 1201"
)  # fmt: skip


def target_number(target: str) -> int:
    """``"90a"`` as ocml counts: major * 1000 + minor * 100 + stepping, the stepping in hexadecimal."""
    return 1000 * int(target[:-2]) + 100 * int(target[-2]) + int(target[-1], 16)


def constants() -> dict[str, tuple[str, str, int]]:
    """File name -> (symbol, LLVM type, value) of each module that holds one constant."""
    found: dict[str, tuple[str, str, int]] = {}
    for switch in _SWITCHES:
        symbol = f"__oclc_{switch}32" if switch == "correctly_rounded_sqrt" else f"__oclc_{switch}"
        symbol = f"{symbol}_opt" if switch in ("finite_only", "unsafe_math") else symbol
        for state, value in (("on", 1), ("off", 0)):
            found[f"oclc_{switch}_{state}"] = (symbol, "i8", value)
    for version in _ABI_VERSIONS:
        found[f"oclc_abi_version_{version}"] = ("__oclc_ABI_version", "i32", version)
    for target in _TARGETS.split():
        found[f"oclc_isa_version_{target}"] = ("__oclc_ISA_version", "i32", target_number(target))
    return found


def require_tools() -> None:
    """Install the compiler where that is possible; otherwise say how."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not missing:
        return
    install = ("apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES)
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("installing", *PACKAGES, flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
        if subprocess.run(("apt-get", "update"), check=False, **quiet).returncode == 0:  # type: ignore[call-overload]
            subprocess.run(install, check=False, **quiet)  # type: ignore[call-overload]
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not found; on Debian 12 or Ubuntu 24.04: {' '.join(install)}")


@contextmanager
def wheel(requirement: str, sha256: str) -> Iterator[zipfile.ZipFile]:
    """A wheel, downloaded and checked."""
    download = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    with tempfile.TemporaryDirectory() as folder:
        choice = ("--only-binary=:all:", *WHEEL_TAGS, "--dest", folder, requirement)
        done = subprocess.run((*download, *choice), check=False)
        found = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not found:
            sys.exit(f"{requirement} could not be downloaded from the package index; HIP is compiled with what it has")
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != sha256:
            sys.exit(f"{found[0].name} has SHA-256 {digest}, expected {sha256}")
        with zipfile.ZipFile(found[0]) as archive:
            yield archive


def extract(archive: zipfile.ZipFile, inside: str, target: Path) -> None:
    """Every header and library below ``inside`` of a wheel."""
    for name in archive.namelist():
        if name.startswith(inside) and not name.endswith(("/", ".py", ".so")):
            path = target / name.removeprefix(inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def write_compiler(root: Path) -> None:
    """``bin/clang++`` and its own headers, out of the package index."""
    binary, script = root / "bin/zig", root / "bin/clang++"
    binary.parent.mkdir(parents=True)
    with wheel(*COMPILER) as archive:
        binary.write_bytes(archive.read("ziglang/zig"))
    script.write_text(CLANG, encoding="utf-8")
    for program in (binary, script):
        program.chmod(0o755)
    with wheel(*COMPILER_HEADERS) as archive:
        extract(archive, f"clang_tidy/data/lib/clang/{LLVM}/include/", root / "clang/include")


def write_headers(root: Path) -> None:
    """``include/`` and ``amdgcn/bitcode/`` out of the package index, and the version file that clang looks for."""
    with wheel(*HEADERS) as archive:
        extract(archive, f"{INSIDE}/include/", root / "include")
        extract(archive, f"{INSIDE}/lib/", root / "amdgcn/bitcode")
    version = dict(
        line.split()[1:3]
        for line in (root / "include/hip/hip_version.h").read_text(encoding="utf-8").splitlines()
        if line.startswith("#define HIP_VERSION_") and len(line.split()) == 3
    )
    text = "".join(f"HIP_VERSION_{part}={version[f'HIP_VERSION_{part}']}\n" for part in ("MAJOR", "MINOR", "PATCH"))
    (root / "share/hip").mkdir(parents=True, exist_ok=True)
    (root / "share/hip/version").write_text(text, encoding="utf-8")


def write_bitcode(root: Path, clang: str) -> None:
    """The modules of one constant, and empty ones for two names that clang asks for."""
    folder = root / "amdgcn/bitcode"
    modules = {"opencl": "", "hip": ""}
    for name, (symbol, kind, value) in constants().items():
        linkage = "linkonce_odr protected local_unnamed_addr addrspace(4) constant"
        modules[name] = f"@{symbol} = {linkage} {kind} {value}\n"
    for name, body in modules.items():
        source = f'target datalayout = "{_LAYOUT}"\ntarget triple = "amdgcn-amd-amdhsa"\n{body}'
        plain = ("--target=amdgcn-amd-amdhsa", "-nogpulib", "-x", "ir", "-c", "-emit-llvm")
        subprocess.run((clang, *plain, "-o", str(folder / f"{name}.bc"), "-"), input=source, text=True, check=True)


def make(root: Path, packaged: bool) -> None:
    """Fill ``root``, unless it was filled by this very file."""
    stamp, mine = root / "stamp", f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()} {packaged}"
    if packaged and (sys.platform != "linux" or platform.machine() != "x86_64"):
        sys.exit("--packaged: the packages are taken for Linux on x86-64 alone")
    if not packaged:
        require_tools()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == mine:
        return
    shutil.rmtree(root, ignore_errors=True)
    if packaged:
        write_compiler(root)
    write_headers(root)
    write_bitcode(root, str(root / "bin/clang++") if packaged else f"clang++-{LLVM}")
    stamp.write_text(mine, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packaged", action="store_true", help="the compiler too from the package index, not Debian's")
    options = parser.parse_args()
    make(options.folder.resolve(), options.packaged)
