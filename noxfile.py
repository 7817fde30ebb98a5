"""Developer commands. `make` prepares the environment and calls these; `nox -l` lists them.

Every session runs in the environment that holds nox (one install of torch, not one per session). Results that CI keeps
land in build/reports.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

# Hundreds of processes start in these sessions; where nothing compiled is kept, each compiles all of qcore again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).parent
BIN = Path(sys.executable).parent
REPORTS = ROOT / "build" / "reports"
# The paths through the native CPU backend that CI walks: what this processor has, AVX2 alone, plain C++.
CPU_PATHS = {"cpu": {}, "cpu-avx2": {"QCORE_CPU_ISA": "avx2"}, "cpu-portable": {"QCORE_CPU_ISA": "portable"}}
# As many processes as cores, each with a team of threads: one that waits has to leave its core to the others.
CROWDED = {"OMP_WAIT_POLICY": "passive"}


# The ops whose kernels have a path for a tile unit.
PRODUCTS = (
    "gemm_4bit",
    "gemm_int4",
    "gemm_4bit_transposed",
    "int8_gemm",
    "int8_scaled_gemm",
    "int8_linear",
    "int8_linear_transposed",
)


def _processor_flags() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _python(session: nox.Session, *args: str, **env: str) -> None:
    session.run(sys.executable, *args, env=env, external=True)


def _tool(session: nox.Session, name: str, *args: str, **env: str) -> None:
    session.run(str(BIN / name), *args, env=env, external=True)


def _pytest(session: nox.Session, report: str, *args: str, **env: str) -> None:
    REPORTS.mkdir(parents=True, exist_ok=True)
    junit = REPORTS / f"{report}.xml"
    _python(session, "-m", "pytest", f"--junitxml={junit}", "--durations=15", *args, **(CROWDED | env))


def _conformance(session: nox.Session, backend: str, report: str, *args: str, **env: str) -> None:
    target = str(REPORTS / f"conformance-{report}")
    command = ("run", "--jobs", "2", "--backend", backend, "--report", target)
    _tool(session, "qcore-conformance", *command, *args, **(CROWDED | env))


def _c_sources() -> list[str]:
    """C and C++ files that are written by hand."""
    made = {"qcore_codebooks.h"}
    folders = ("backends", "qcore/include", "tests")
    files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*")))
    suffixes = {".c", ".cpp", ".h", ".hpp", ".cu", ".cuh"}
    wanted = (path for path in files if path.suffix in suffixes and path.name not in made)
    return [str(path.relative_to(ROOT)) for path in wanted if "build" not in path.relative_to(ROOT).parts]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style: ruff on Python, clang-format on C and C++."""
    _tool(session, "ruff", "check", ".")
    _tool(session, "ruff", "format", "--check", ".")
    _tool(session, "clang-format", "--dry-run", "--Werror", *_c_sources())


@nox.session
def format(session: nox.Session) -> None:  # noqa: A001, RUF100
    """Mend what ruff and clang-format can mend."""
    _tool(session, "ruff", "check", "--fix", ".")
    _tool(session, "ruff", "format", ".")
    _tool(session, "clang-format", "-i", *_c_sources())


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy --strict on qcore/."""
    _tool(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the frontend's tests on cpu_reference and cpu, and cpu's own; arguments go to pytest."""
    args = session.posargs or ["-n", "2", "--dist", "worksteal"]
    _pytest(session, "tests", *args, QCORE_REQUIRE_NATIVE="1")


@nox.session
def conformance(session: nox.Session) -> None:
    """Run the conformance suite on cpu_reference and on each path through cpu."""
    _conformance(session, "cpu_reference", "cpu_reference")
    for report, env in CPU_PATHS.items():
        _conformance(session, "cpu", report, **env)
    if "amx_bf16" in _processor_flags():  # `cpu` is that path: the products of the one below are its own
        chosen = [word for op in PRODUCTS for word in ("--op", op)]
        _conformance(session, "cpu", "cpu-avx512-bf16", *chosen, QCORE_CPU_ISA="avx512_bf16")


@nox.session
def mutants(session: nox.Session) -> None:
    """Run the suite on backends that are wrong on purpose: every one has to be found out."""
    report = str(REPORTS / "mutants")
    _tool(session, "qcore-conformance", "mutants", "--jobs", "2", "--report", report, **CROWDED)


@nox.session
def templates(session: nox.Session) -> None:
    """Build the backends to copy and run the conformance suite on them."""
    folder = ROOT / "backends" / "template"
    session.run("make", "-s", "-C", str(folder / "c_backend"), external=True)
    library = folder / "c_backend" / "build" / "libqcore_template.so"
    _conformance(session, str(library), "template-c")
    _conformance(session, "python_backend:TemplateBackend", "template-python", PYTHONPATH=str(folder))


def _sanitized(session: nox.Session) -> tuple[str, dict[str, str]]:
    """A build of cpu with AddressSanitizer and UndefinedBehaviorSanitizer, and what its process needs around it."""
    folder = ROOT / "build" / "sanitizers"
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    configure = ["-S", "backends/cpu", "-B", str(folder), "-G", "Ninja", f"-DCMAKE_CXX_FLAGS={flags}"]
    _tool(session, "cmake", *configure, "-DCMAKE_BUILD_TYPE=None", "-DQCORE_CPU_PROBE=OFF")
    _tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    return str(folder / "libqcore_cpu.so"), _asan(session)


def _asan(session: nox.Session) -> dict[str, str]:
    """The environment of a process that loads a library with AddressSanitizer."""
    # Both have to be there before torch: ASan allocates for everybody, and it looks for C++'s throw when it starts. The
    # interpreter's own leaks are none of our business.
    runtimes = [
        session.run("g++", f"-print-file-name={name}", external=True, silent=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # A case asks for more memory than there is: that is to be refused, not to end the process.
    return {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}


@nox.session
def simt(session: nox.Session) -> None:
    """Run the conformance suite and the kernels' own tests on the GPU kernels, emulated with waves of 32 and of 64."""
    folder = ROOT / "build" / "simt"
    _tool(session, "cmake", "-S", "backends/kernels/simt", "-B", str(folder), "-G", "Ninja")
    _tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    # Each wave size under another schedule; the kernels' own tests run the third.
    for wave, schedule in ((32, "random:1"), (64, "reversed")):
        _conformance(session, str(folder / f"libqcore_simt{wave}.so"), f"simt{wave}", QCORE_SIMT_SCHEDULE=schedule)
    required = {"QCORE_REQUIRE_NATIVE": "1", "QCORE_REQUIRE_SIMT": "1"}
    tests = ("backends/kernels/tests", "tests/backend/test_simt_memory.py")
    _pytest(session, "simt", "-n", "2", "--dist", "worksteal", *tests, **required)


@nox.session
def sanitizers(session: nox.Session) -> None:
    """Run the suite, all ops and levels L0 to L2, on a build of cpu with ASan and UBSan, on each path."""
    library, env = _sanitized(session)
    for report, path in CPU_PATHS.items():
        _conformance(session, library, f"sanitizers-{report}", **env, **path)


@nox.session
def sanitizers_lean(session: nox.Session) -> None:
    """Run the suite on a build of cpu with ASan and UBSan, on its best path alone: what CI has time for."""
    library, env = _sanitized(session)
    _conformance(session, library, "sanitizers-lean", **env)


@nox.session
def amx(session: nox.Session) -> None:
    """Run the products on the path for AMX, with its tile instructions emulated, on a processor without them."""
    flags = _processor_flags()
    if "amx_bf16" in flags:
        session.skip("this processor has AMX: the session `conformance` runs that path")
    if "avx512_bf16" not in flags:
        session.skip("this processor has no AVX512-BF16, which the emulation is made of")
    folder = ROOT / "build" / "amx"
    _tool(
        session, "cmake", "-S", "backends/cpu", "-B", str(folder), "-G", "Ninja",
        "-DQCORE_CPU_EMULATE_AMX=ON", "-DQCORE_CPU_PROBE=OFF",
    )  # fmt: skip
    _tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    chosen = [word for op in PRODUCTS for word in ("--op", op)]
    _conformance(session, str(folder / "libqcore_cpu.so"), "amx", *chosen, QCORE_CPU_ISA="amx")


@nox.session
def aarch64(session: nox.Session) -> None:
    """Cross-compile cpu for aarch64 and replay the suite's calls of all ops under emulation."""
    for tool, package in (("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if shutil.which(tool) is None:
            session.error(f"{tool} was not found; Debian has it in the package {package} (apt-get install {package})")
    folder = ROOT / "build" / "aarch64"
    configure = ["-S", "backends/cpu", "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    target += ["-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DQCORE_CPU_REPLAY=ON"]
    _tool(session, "cmake", *configure, *target)
    _tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    recorded = str(folder / "calls.bin")
    _tool(session, "qcore-conformance", "record", recorded, "--declared-by", "cpu", QCORE_CPU_ISA="portable")
    libraries = ["-L", "/usr/aarch64-linux-gnu"]
    replay = [str(folder / "qcore_cpu_replay"), str(folder / "libqcore_cpu.so"), recorded]
    session.run("qemu-aarch64", *libraries, *replay, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Quantize a real language model to each format and let it write."""
    _python(session, "-m", "qcore.cli.demo", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """Run the demo in its short form."""
    _python(session, "-m", "qcore.cli.demo", "--smoke")


@nox.session
def bench(session: nox.Session) -> None:
    """Time ops, layers and optimizers beside their peers and the machine's limits; arguments go to qcore bench cpu."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    outputs = ("--json", str(REPORTS / "bench-cpu.json"), "--plot", str(REPORTS / "bench-cpu.png"))
    _tool(session, "qcore", "bench", "cpu", *outputs, *session.posargs)
    _python(session, "benchmarks/optimizers.py", "--json", str(REPORTS / "optimizers.json"))


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels and the source distribution into dist/; `-- cuda` and `-- hip` add those backends' wheels."""
    unknown = set(session.posargs) - {"cuda", "hip"}
    if unknown:
        session.error(f"build: {', '.join(sorted(unknown))}: expected cuda, hip, or both")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    _python(session, *wheel, ".")
    _python(session, *wheel, "./backends/cpu")
    if "cuda" in session.posargs:
        _require_nvcc(session)
        _python(session, *wheel, "./backends/cuda")
    if "hip" in session.posargs:
        _python(session, *wheel, "./backends/hip", CMAKE_ARGS=" ".join(_hip_options(session)))
    _tool(session, "hatchling", "build", "-t", "sdist")


def _require_nvcc(session: nox.Session) -> None:
    if shutil.which("nvcc") is None:
        session.error("nvcc was not found: install the CUDA toolkit, 12.8 or newer, and put its bin/ on the PATH")


def _hip_options(session: nox.Session) -> list[str]:
    """What CMake needs for HIP: ROCm where ROCM_PATH says so, else Debian's clang and the gathered headers."""
    rocm = os.environ.get("ROCM_PATH")
    if rocm:
        return [f"-DQCORE_HIP_ROOT={rocm}", f"-DCMAKE_CXX_COMPILER={rocm}/llvm/bin/clang++"]
    folder = ROOT / "build" / "hip-toolchain"
    _python(session, "tools/hip_toolchain.py", str(folder))
    return [f"-DQCORE_HIP_ROOT={folder}", "-DCMAKE_CXX_COMPILER=clang++-19"]


def _gpu_build(session: nox.Session, backend: str, *options: str, only: Iterable[str] = ()) -> Path:
    """Compile backends/cuda or backends/hip in build/, or of it these kernel files; again only what has changed."""
    folder = ROOT / "build" / backend
    _tool(session, "cmake", "-S", f"backends/{backend}", "-B", str(folder), "-G", "Ninja", *options)
    _compile(session, folder, only)
    return folder


def _compile(session: nox.Session, folder: Path, only: Iterable[str]) -> None:
    """Build all of a configured folder, or the object files of these kernel files."""
    commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    wanted = [entry["output"] for entry in commands if Path(entry["file"]).name in {f"{name}.cu" for name in only}]
    targets = [os.path.relpath(folder / output, folder) for output in wanted]
    _tool(session, "cmake", "--build", str(folder), "--parallel", "2", *(("--target", *targets) if targets else ()))


def _nvidia_tools(session: nox.Session) -> Path:
    """A CUDA toolkit, as far as these sessions need one, out of the package index: the folder with its bin/."""
    folder, wanted = ROOT / "build" / "nvidia-tools", ROOT / "requirements" / "nvcc.txt"
    stamp = folder / "stamp"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        shutil.rmtree(folder, ignore_errors=True)
        _python(session, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "-r", str(wanted))
        root = next(folder.glob("nvidia/cu*"))
        # nvcc and CMake look for these two, which the packages do not have.
        (root / "lib64").symlink_to("lib")
        runtime = next((root / "lib").glob("libcudart.so.*"))
        (root / "lib" / "libcudart.so").symlink_to(runtime.name)
        stamp.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return next(folder.glob("nvidia/cu*"))


def _nvcc(toolkit: Path) -> str:
    """What CMake needs for that compiler."""
    return f"-DCMAKE_CUDA_COMPILER={toolkit / 'bin' / 'nvcc'}"


def _with_tools(toolkit: Path) -> str:
    """The PATH with the toolkit's programs first."""
    return f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}"


def _hip_on_cuda(session: nox.Session, toolkit: Path) -> None:
    """Build the HIP backend by nvcc through its shim, for one target: tools/gpu_run.sh has no minutes to lose on it."""
    folder = str(ROOT / "build" / "hip-on-cuda")
    target = ("-DCMAKE_CUDA_ARCHITECTURES=90a-real", "-DQCORE_HIP_ARCH=sm_90")
    _tool(session, "cmake", "-S", "backends/hip/shim", "-B", folder, "-G", "Ninja", *target, _nvcc(toolkit))
    _tool(session, "cmake", "--build", folder, "--parallel", "2")


HIP_TARGETS = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201")
# The one that CI compiles for: about a minute of two cores.
LEAN_TARGET = "90"
CUDA_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def _isa_request(session: nox.Session) -> tuple[list[str], list[str]]:
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
        known = {path.stem for path in (ROOT / "backends" / "kernels").glob("*.cu")}
        if not only or set(only) - known:
            session.error(f"isa: --only {','.join(only)}: expected names out of {', '.join(sorted(known))}")
    unknown = set(words) - {"cuda", "hip"}
    if unknown:
        session.error(f"isa: {', '.join(sorted(unknown))}: expected cuda, hip, --only NAME,... or --changed")
    return words or ["hip", "cuda"], only


@nox.session
def isa(session: nox.Session) -> None:
    """Compile the GPU kernels for every target, check their machine code and record it in docs/results.

    `-- cuda` or `-- hip`: for that backend's targets alone. `-- --only absmax,fourbit`: these kernel files alone;
    `-- --changed`: those that are no longer as recorded. Without either, that the libraries load where there is no GPU.
    """
    backends, only = _isa_request(session)
    builds: dict[str, Path] = {}
    environment: dict[str, str] = {}
    if "hip" in backends:
        options = _hip_options(session)
        builds["hip"] = _gpu_build(session, "hip", *options, only=only)
        environment["QCORE_HIP_ROOT"] = options[0].partition("=")[2]
    path = os.environ["PATH"]
    if "cuda" in backends:
        toolkit = _nvidia_tools(session)
        path = _with_tools(toolkit)
        builds["cuda"] = _gpu_build(session, "cuda", _nvcc(toolkit), only=only)
        if not only:
            _hip_on_cuda(session, toolkit)
    expected = (*(HIP_TARGETS if "hip" in backends else ()), *(CUDA_TARGETS if "cuda" in backends else ()))
    read = [str(folder) for folder in builds.values()] + (["--only", ",".join(only)] if only else [])
    _python(session, "tools/gpu_isa.py", *read, "--expect", ",".join(expected), "--out", "docs/results", PATH=path)
    if not only:
        for backend, folder in builds.items():
            environment[f"QCORE_{backend.upper()}_LIBRARY"] = str(folder / f"libqcore_{backend}.so")
        _pytest(session, "gpu-builds", *(f"backends/{backend}/tests" for backend in builds), **environment)


@nox.session
def isa_lean(session: nox.Session) -> None:
    """Compile every kernel for one target: its machine code has to keep the rules, and be as recorded. CI's share."""
    if not sys.platform.startswith("linux"):
        session.skip("NVIDIA's packages of its compiler are taken for Linux alone: NO MACHINE CODE IS CHECKED HERE")
    toolkit = _nvidia_tools(session)
    folder = ROOT / "build" / "isa-lean"
    target = f"-DCMAKE_CUDA_ARCHITECTURES={LEAN_TARGET}a-real"
    _tool(session, "cmake", "-S", "backends/cuda", "-B", str(folder), "-G", "Ninja", target, _nvcc(toolkit))
    _compile(session, folder, [path.stem for path in sorted((ROOT / "backends" / "kernels").glob("*.cu"))])
    expected = ("--expect", f"sm_{LEAN_TARGET}", "--compare", "docs/results/gpu-isa.json")
    _python(session, "tools/gpu_isa.py", str(folder), *expected, PATH=_with_tools(toolkit))


@nox.session
def simt_asan(session: nox.Session) -> None:
    """Run the conformance suite on the GPU kernels, emulated under ASan and UBSan with waves of 32 and of 64."""
    folder = ROOT / "build" / "simt-asan"
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    configure = ["-S", "backends/kernels/simt", "-B", str(folder), "-G", "Ninja", f"-DCMAKE_CXX_FLAGS={flags}"]
    _tool(session, "cmake", *configure, "-DCMAKE_BUILD_TYPE=None")
    _tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    for wave, schedule in ((32, "random:2"), (64, "reversed")):
        library = str(folder / f"libqcore_simt{wave}.so")
        _conformance(
            session, library, f"simt{wave}-asan", *session.posargs, QCORE_SIMT_SCHEDULE=schedule, **_asan(session)
        )


@nox.session
def summary(session: nox.Session) -> None:
    """Add up the reports of build/reports and name what failed; fails if nothing ran."""
    _python(session, "tools/summary.py", str(REPORTS))
