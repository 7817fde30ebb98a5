"""How the sessions of noxfile.py compile the GPU backends: toolchains, builds in build/, what `isa` was asked for."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import nox
from gpu_isa_sources import kernel_files

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HIP_TARGETS = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201")
CUDA_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Those that CI compiles for, about a minute of two cores for each maker: AMD's have waves of 64 and of 32.
LEAN_CUDA = "90"
LEAN_HIP = ("gfx942", "gfx1100")


def run_python(session: nox.Session, *args: str, **env: str) -> None:
    """Run this Python."""
    session.run(sys.executable, *args, env=env, external=True)


def run_tool(session: nox.Session, name: str, *args: str, **env: str) -> None:
    """Run a program that was installed beside this Python."""
    session.run(str(BIN / name), *args, env=env, external=True)


def require_nvcc(session: nox.Session) -> None:
    if shutil.which("nvcc") is None:
        session.error("nvcc was not found: install the CUDA toolkit, 12.8 or newer, and put its bin/ on the PATH")


def hip_options(session: nox.Session) -> list[str]:
    """What CMake needs for HIP: ROCm where ROCM_PATH says so, else Debian's clang and the gathered headers."""
    rocm = os.environ.get("ROCM_PATH")
    if rocm:
        return [f"-DQCORE_HIP_ROOT={rocm}", f"-DCMAKE_CXX_COMPILER={rocm}/llvm/bin/clang++"]
    folder = ROOT / "build" / "hip-toolchain"
    run_python(session, "tools/hip_toolchain.py", str(folder))
    return [f"-DQCORE_HIP_ROOT={folder}", "-DCMAKE_CXX_COMPILER=clang++-19"]


def gpu_build(
    session: nox.Session, backend: str, *options: str, only: Iterable[str] = (), folder: str | None = None
) -> Path:
    """Compile backends/cuda or backends/hip in build/, or of it these kernel files; again only what has changed."""
    build = ROOT / "build" / (folder or backend)
    run_tool(session, "cmake", "-S", f"backends/{backend}", "-B", str(build), "-G", "Ninja", *options)
    compile_files(session, build, only)
    return build


def compile_files(session: nox.Session, folder: Path, only: Iterable[str]) -> None:
    """Build all of a configured folder, or the object files of these kernel files."""
    commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    wanted = [entry["output"] for entry in commands if Path(entry["file"]).name in {f"{name}.cu" for name in only}]
    targets = [os.path.relpath(folder / output, folder) for output in wanted]
    run_tool(session, "cmake", "--build", str(folder), "--parallel", "2", *(("--target", *targets) if targets else ()))


def nvidia_tools(session: nox.Session) -> Path:
    """A CUDA toolkit, as far as these sessions need one, out of the package index: the folder with its bin/."""
    folder, wanted = ROOT / "build" / "nvidia-tools", ROOT / "requirements" / "nvcc.txt"
    stamp = folder / "stamp"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        shutil.rmtree(folder, ignore_errors=True)
        run_python(session, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "-r", str(wanted))
        root = next(folder.glob("nvidia/cu*"))
        # nvcc and CMake look for these two, which the packages do not have.
        (root / "lib64").symlink_to("lib")
        runtime = next((root / "lib").glob("libcudart.so.*"))
        (root / "lib" / "libcudart.so").symlink_to(runtime.name)
        stamp.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return next(folder.glob("nvidia/cu*"))


def nvcc_option(toolkit: Path) -> str:
    """What CMake needs for that compiler."""
    return f"-DCMAKE_CUDA_COMPILER={toolkit / 'bin' / 'nvcc'}"


def with_tools(toolkit: Path) -> str:
    """The PATH with the toolkit's programs first."""
    return f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}"


def hip_on_cuda(session: nox.Session, toolkit: Path) -> None:
    """Build the HIP backend by nvcc through its shim, for one target: tools/gpu_run.sh has no minutes to lose on it."""
    folder = str(ROOT / "build" / "hip-on-cuda")
    target = ("-DCMAKE_CUDA_ARCHITECTURES=90a-real", "-DQCORE_HIP_ARCH=sm_90")
    run_tool(session, "cmake", "-S", "backends/hip/shim", "-B", folder, "-G", "Ninja", *target, nvcc_option(toolkit))
    run_tool(session, "cmake", "--build", folder, "--parallel", "2")


def lean_cuda_build(session: nox.Session, toolkit: Path) -> Path:
    """Compile every kernel file for CI's target of NVIDIA's."""
    target = f"-DCMAKE_CUDA_ARCHITECTURES={LEAN_CUDA}a-real"
    return gpu_build(session, "cuda", target, nvcc_option(toolkit), only=kernel_files(), folder="isa-lean/cuda")


def lean_hip_build(session: nox.Session) -> Path:
    """Compile every kernel file for CI's targets of AMD's, to assembly: that needs no linker."""
    root = ROOT / "build" / "hip-packages"
    run_python(session, "tools/hip_toolchain.py", str(root), "--packaged")
    options = (
        f"-DQCORE_HIP_ROOT={root}",
        f"-DCMAKE_CXX_COMPILER={root / 'bin' / 'clang++'}",
        f"-DQCORE_HIP_ARCHITECTURES={';'.join(LEAN_HIP)}",
        "-DQCORE_HIP_FLAGS=-S;--cuda-device-only;-Wno-unused-command-line-argument",
        "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
    )
    return gpu_build(session, "hip", *options, only=kernel_files(), folder="isa-lean/hip")


def isa_request(session: nox.Session) -> tuple[list[str], list[str]]:
    """(backends, kernel files) that the arguments of `isa` ask for; no kernel files: all, and the libraries."""
    words = list(session.posargs)
    only: list[str] = []
    if "--changed" in words:
        words.remove("--changed")
        stale = session.run(sys.executable, "tools/gpu_isa_record.py", "--stale", external=True, silent=True)
        only = str(stale).strip().split(",")
        if only == [""]:
            session.skip("every kernel file is as recorded")
    if "--only" in words:
        at = words.index("--only")
        only += [name for name in "".join(words[at + 1 : at + 2]).split(",") if name]
        del words[at : at + 2]
        known = set(kernel_files())
        if not only or set(only) - known:
            session.error(f"isa: --only {','.join(only)}: expected names out of {', '.join(sorted(known))}")
    unknown = set(words) - {"cuda", "hip"}
    if unknown:
        session.error(f"isa: {', '.join(sorted(unknown))}: expected cuda, hip, --only NAME,... or --changed")
    return words or ["hip", "cuda"], only
