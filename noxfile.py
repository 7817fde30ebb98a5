"""Developer commands. `make` prepares the environment and calls these; `nox -l` lists them.

Every session runs in the environment that holds nox (one install of torch, not one per session). Results that CI keeps
land in build/reports.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import gpu_builds
from gpu_builds import ROOT, run_python, run_tool

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

# Hundreds of processes start in these sessions; where nothing compiled is kept, each compiles all of qcore again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

REPORTS = ROOT / "build" / "reports"
# The paths through the native CPU backend that CI walks: what this processor has, AVX2 alone, plain C++.
CPU_PATHS = {"cpu": {}, "cpu-avx2": {"QCORE_CPU_ISA": "avx2"}, "cpu-portable": {"QCORE_CPU_ISA": "portable"}}
# As many processes as cores, each with a team of threads: one that waits has to leave its core to the others.
CROWDED = {"OMP_WAIT_POLICY": "passive"}


# The ops whose kernels on the path `amx` are others than on `avx512_bf16`: products have a tile unit there, and
# permutes and roots have other costs, as the processor is Intel's.
OWN_ON_AMX = (
    "gemm_4bit",
    "gemm_int4",
    "gemm_4bit_transposed",
    "int8_gemm",
    "int8_scaled_gemm",
    "int8_linear",
    "int8_linear_transposed",
    "optimizer_step",
    "quantize_blockwise",
    "dequantize_blockwise",
)


def _processor_flags() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _pytest(session: nox.Session, report: str, *args: str, **env: str) -> None:
    REPORTS.mkdir(parents=True, exist_ok=True)
    junit = REPORTS / f"{report}.xml"
    run_python(session, "-m", "pytest", f"--junitxml={junit}", "--durations=15", *args, **(CROWDED | env))


def _conformance(session: nox.Session, backend: str, report: str, *args: str, **env: str) -> None:
    target = str(REPORTS / f"conformance-{report}")
    command = ("run", "--jobs", "2", "--backend", backend, "--report", target)
    run_tool(session, "qcore-conformance", *command, *args, **(CROWDED | env))


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
    run_tool(session, "ruff", "check", ".")
    run_tool(session, "ruff", "format", "--check", ".")
    run_tool(session, "clang-format", "--dry-run", "--Werror", *_c_sources())


@nox.session
def format(session: nox.Session) -> None:  # noqa: A001, RUF100
    """Mend what ruff and clang-format can mend."""
    run_tool(session, "ruff", "check", "--fix", ".")
    run_tool(session, "ruff", "format", ".")
    run_tool(session, "clang-format", "-i", *_c_sources())


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy --strict on qcore/."""
    run_tool(session, "mypy")


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
    if "amx_bf16" in _processor_flags():  # `cpu` is that path: these kernels of the one below are its own
        chosen = [word for op in OWN_ON_AMX for word in ("--op", op)]
        _conformance(session, "cpu", "cpu-avx512-bf16", *chosen, QCORE_CPU_ISA="avx512_bf16")


@nox.session
def mutants(session: nox.Session) -> None:
    """Run the suite on backends that are wrong on purpose: every one has to be found out."""
    report = str(REPORTS / "mutants")
    run_tool(session, "qcore-conformance", "mutants", "--jobs", "2", "--report", report, **CROWDED)


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
    # Nothing runs the programs that count cycles: to compile them is what keeps them in step with the kernels.
    options = ("-DCMAKE_BUILD_TYPE=None", "-DQCORE_CPU_PROBE=OFF", "-DQCORE_CPU_CYCLES=ON")
    run_tool(session, "cmake", *configure, *options)
    run_tool(session, "cmake", "--build", str(folder), "--parallel", "2")
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
    run_tool(session, "cmake", "-S", "backends/kernels/simt", "-B", str(folder), "-G", "Ninja")
    run_tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    # Each wave size under another schedule; `simt_asan_lean` runs the third.
    for wave, schedule in ((32, "forward"), (64, "reversed")):
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
    """Run what is the path for AMX's own, its tile instructions emulated, on a processor without them."""
    flags = _processor_flags()
    if "amx_bf16" in flags:
        session.skip("this processor has AMX: the session `conformance` runs that path")
    if "avx512_bf16" not in flags:
        session.skip("this processor has no AVX512-BF16, which the emulation is made of")
    folder = ROOT / "build" / "amx"
    run_tool(
        session, "cmake", "-S", "backends/cpu", "-B", str(folder), "-G", "Ninja",
        "-DQCORE_CPU_EMULATE_AMX=ON", "-DQCORE_CPU_PROBE=OFF",
    )  # fmt: skip
    run_tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    chosen = [word for op in OWN_ON_AMX for word in ("--op", op)]
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
    run_tool(session, "cmake", *configure, *target)
    run_tool(session, "cmake", "--build", str(folder), "--parallel", "2")
    recorded = str(folder / "calls.bin")
    run_tool(session, "qcore-conformance", "record", recorded, "--declared-by", "cpu", QCORE_CPU_ISA="portable")
    libraries = ["-L", "/usr/aarch64-linux-gnu"]
    replay = [str(folder / "qcore_cpu_replay"), str(folder / "libqcore_cpu.so"), recorded]
    session.run("qemu-aarch64", *libraries, *replay, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Quantize a real language model to each format and let it write."""
    run_python(session, "-m", "qcore.cli.demo", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """Run the demo in its short form."""
    run_python(session, "-m", "qcore.cli.demo", "--smoke")


@nox.session
def bench(session: nox.Session) -> None:
    """Time ops, layers and optimizers beside their peers and the machine's limits; arguments go to qcore bench cpu."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    outputs = ("--json", str(REPORTS / "bench-cpu.json"), "--plot", str(REPORTS / "bench-cpu.png"))
    run_tool(session, "qcore", "bench", "cpu", *outputs, *session.posargs)
    run_python(session, "benchmarks/optimizers.py", "--json", str(REPORTS / "optimizers.json"))


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels and the source distribution into dist/; `-- cuda` and `-- hip` add those backends' wheels."""
    unknown = set(session.posargs) - {"cuda", "hip"}
    if unknown:
        session.error(f"build: {', '.join(sorted(unknown))}: expected cuda, hip, or both")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    run_python(session, *wheel, ".")
    run_python(session, *wheel, "./backends/cpu")
    if "cuda" in session.posargs:
        gpu_builds.require_nvcc(session)
        run_python(session, *wheel, "./backends/cuda")
    if "hip" in session.posargs:
        run_python(session, *wheel, "./backends/hip", CMAKE_ARGS=" ".join(gpu_builds.hip_options(session)))
    run_tool(session, "hatchling", "build", "-t", "sdist")


@nox.session
def isa(session: nox.Session) -> None:
    """Compile the GPU kernels for every target, check their machine code and record it in docs/results.

    `-- cuda` or `-- hip`: for that backend's targets alone. `-- --only absmax,fourbit`: these kernel files alone;
    `-- --changed`: those that are no longer as recorded. Without either, that the libraries load where there is no GPU.
    """
    backends, only = gpu_builds.isa_request(session)
    builds: dict[str, Path] = {}
    environment: dict[str, str] = {}
    if "hip" in backends:
        options = gpu_builds.hip_options(session)
        builds["hip"] = gpu_builds.gpu_build(session, "hip", *options, only=only)
        environment["QCORE_HIP_ROOT"] = options[0].partition("=")[2]
    path = os.environ["PATH"]
    if "cuda" in backends:
        toolkit = gpu_builds.nvidia_tools(session)
        path = gpu_builds.with_tools(toolkit)
        builds["cuda"] = gpu_builds.gpu_build(session, "cuda", gpu_builds.nvcc_option(toolkit), only=only)
        if not only:
            gpu_builds.hip_on_cuda(session, toolkit)
    expected = (
        *(gpu_builds.HIP_TARGETS if "hip" in backends else ()),
        *(gpu_builds.CUDA_TARGETS if "cuda" in backends else ()),
    )
    read = [str(folder) for folder in builds.values()] + (["--only", ",".join(only)] if only else [])
    run_python(session, "tools/gpu_isa.py", *read, "--expect", ",".join(expected), "--out", "docs/results", PATH=path)
    if not only:
        for backend, folder in builds.items():
            environment[f"QCORE_{backend.upper()}_LIBRARY"] = str(folder / f"libqcore_{backend}.so")
        _pytest(session, "gpu-builds", *(f"backends/{backend}/tests" for backend in builds), **environment)


@nox.session
def isa_lean(session: nox.Session) -> None:
    """Compile every kernel for a target of each kind: its code has to keep the rules and be as recorded. CI's share."""
    if not sys.platform.startswith("linux"):
        session.skip("the compilers' packages are taken for Linux alone: NO MACHINE CODE IS CHECKED HERE")
    toolkit = gpu_builds.nvidia_tools(session)
    builds, expected = [gpu_builds.lean_cuda_build(session, toolkit)], [f"sm_{gpu_builds.LEAN_CUDA}"]
    if platform.machine() == "x86_64":
        builds.append(gpu_builds.lean_hip_build(session))
        expected += gpu_builds.LEAN_HIP
    else:
        session.warn("the packages with a compiler for AMD are for x86-64: NO AMD MACHINE CODE IS CHECKED HERE")
    checks = ("--expect", ",".join(expected), "--compare", "docs/results/gpu-isa.json")
    run_python(session, "tools/gpu_isa.py", *map(str, builds), *checks, PATH=gpu_builds.with_tools(toolkit))


def _simt_sanitized(session: nox.Session, schedules: Mapping[int, str]) -> None:
    """Build the emulated kernels under ASan and UBSan, and run the suite on each wave size with its schedule."""
    folder = ROOT / "build" / "simt-asan"
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    configure = ["-S", "backends/kernels/simt", "-B", str(folder), "-G", "Ninja", f"-DCMAKE_CXX_FLAGS={flags}"]
    run_tool(session, "cmake", *configure, "-DCMAKE_BUILD_TYPE=None")
    targets = [f"qcore_simt{wave}" for wave in schedules]
    run_tool(session, "cmake", "--build", str(folder), "--parallel", "2", "--target", *targets)
    for wave, schedule in schedules.items():
        library = str(folder / f"libqcore_simt{wave}.so")
        _conformance(
            session, library, f"simt{wave}-asan", *session.posargs, QCORE_SIMT_SCHEDULE=schedule, **_asan(session)
        )


@nox.session
def simt_asan(session: nox.Session) -> None:
    """Run the conformance suite on the GPU kernels, emulated under ASan and UBSan with waves of 32 and of 64."""
    _simt_sanitized(session, {32: "random:2", 64: "reversed"})


@nox.session
def simt_asan_lean(session: nox.Session) -> None:
    """Run the suite on the emulated GPU kernels under ASan and UBSan with waves of 32: what CI has time for."""
    _simt_sanitized(session, {32: "random:2"})


@nox.session
def summary(session: nox.Session) -> None:
    """Add up the reports of build/reports and name what failed; fails if nothing ran."""
    run_python(session, "tools/summary.py", str(REPORTS))
