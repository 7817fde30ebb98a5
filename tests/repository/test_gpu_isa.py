"""The record of the GPU kernels' machine code is whole, of the sources that stand here, and within the rules."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "backends" / "kernels"


@pytest.fixture(scope="module")
def records() -> Any:
    return _tool("gpu_isa_record")


@pytest.fixture(scope="module")
def rules() -> Any:
    return _tool("gpu_isa_rules")


@pytest.fixture(scope="module")
def sources() -> Any:
    return _tool("gpu_isa_sources")


def _tool(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_no_recorded_kernel_breaks_a_rule(records: Any, rules: Any) -> None:
    assert rules.breaches(records.load().kernels) == []


def test_a_spilled_register_would_be_found(records: Any, rules: Any) -> None:
    spilled = replace(records.load().kernels[0], spills=1)
    assert len(rules.breaches([spilled])) == 1


def test_every_kernel_of_the_source_is_recorded_for_every_target(records: Any, rules: Any) -> None:
    files = [path for kind in ("*.cu", "*.cuh") for path in KERNELS.glob(kind)]
    written = {name for path in files for name in re.findall(r"\b(\w+_kernel)\s*\(", path.read_text("utf-8"))}
    recorded = {(kernel.target, kernel.name.partition("<")[0]) for kernel in records.load().kernels}
    assert recorded == {(target, name) for target in rules.TARGETS for name in written}, "run nox -s isa"


def test_the_record_is_of_the_sources_that_stand_here(records: Any) -> None:
    """A kernel that was changed may spill: nobody knows before it is compiled for every target."""
    stale = sorted({file for file, _ in records.load().stale()})
    names = ", ".join(f"backends/kernels/{file}.cu" for file in stale)
    assert not stale, (
        f"{names}, or what they include, changed after their machine code went into docs/results/gpu-isa.json. "
        f"Compile and record them again: nox -s isa -- --only {','.join(stale)}"
    )


EDITS = {
    "comment": ("backends/kernels/reduce.cuh", "\n#include", "\n// Why.\n\n#include", ""),
    "line-break": ("backends/kernels/reduce.cuh", " = 0.0f;", "\n            = 0.0f;", ""),
    "header": (
        "backends/kernels/reduce.cuh",
        "block_barrier();",
        "",
        "absmax,blockwise,fourbit,int8_quantize,optimizer",
    ),
    "kernel": ("backends/kernels/fourbit.cu", "namespace qcore", "static int added;\nnamespace qcore", "fourbit"),
    "abi": ("qcore/include/qcore_backend.h", "QC_F16 1", "QC_F16 9", "all"),
    "flag": ("backends/cuda/CMakeLists.txt", "-fmad=false", "-fmad=true", "all"),
    "targets": ("backends/cuda/CMakeLists.txt", "75-real 80-real", "75-real", ""),
    "one-target": (
        "backends/kernels/matrix_hip.cuh",
        "namespace qcore",
        "static int added;\nnamespace qcore",
        "matrix",
    ),
    "emulation": ("backends/kernels/simt/device.h", "namespace qcore", "static int added;\nnamespace qcore", ""),
    "host": ("backends/kernels/host/arguments.h", "namespace qcore", "int added();\nnamespace qcore", ""),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_a_change_makes_stale(edit: str, records: Any, sources: Any, tmp_path: Path) -> None:
    """In a copy of the tree with one edit, the record is stale for the kernel files that see it, and no other."""
    unwanted = shutil.ignore_patterns("build", "__pycache__", "tests", "*.so")
    for folder in ("tools", "backends/kernels", "backends/common", "backends/cuda", "backends/hip", "qcore/include"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
    record = records.load()
    parts = [(file, target) for file in sources.kernel_files() for target in _tool("gpu_isa_rules").TARGETS]
    record.fingerprints = {part: sources.fingerprint(*part) for part in parts}
    records.write(record, tmp_path / "docs" / "results")
    path, old, new, expected = EDITS[edit]
    text = (tmp_path / path).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / path).write_text(text.replace(old, new, 1), encoding="utf-8")
    command = (sys.executable, str(tmp_path / "tools" / "gpu_isa_record.py"), "--stale")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    matrix = [file for file in sources.kernel_files() if "gemm" in file or file == "int8_transposed"]
    named = {"all": ",".join(sources.kernel_files()), "matrix": ",".join(matrix)}
    assert said == named.get(expected, expected)


@pytest.mark.parametrize("file", [path.stem for path in sorted(KERNELS.glob("*.cu"))])
def test_a_fingerprint_is_of_all_that_the_compiler_reads(file: str, sources: Any) -> None:
    """The compiler's own list of what it reads for the emulation, but for the few files where targets part."""
    compiler = shutil.which("g++")
    if compiler is None:
        assert os.environ.get("QCORE_REQUIRE_NATIVE") != "1", "no g++, which builds the native backend too"
        pytest.skip("no g++, whose list of included files this compares with")
    folders = [f"-I{folder}" for folder in (KERNELS, ROOT / "backends" / "common", ROOT / "qcore" / "include")]
    command = (
        compiler,
        "-MM",
        "-std=c++17",
        "-DQC_TARGET_SIMT",
        "-DQC_WAVE_SIZE=32",
        "-x",
        "c++",
        *folders,
        str(KERNELS / f"{file}.cu"),
    )
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = {Path(word).resolve() for word in said.partition(":")[2].replace("\\\n", " ").split()}
    emulation = {path for path in read if "simt" in path.parent.name}
    assert len(emulation) >= 2
    for backend in ("cuda", "hip"):
        own = {path for path in sources.included(file, backend) if path.stem.endswith(f"_{backend}")}
        shared = sources.included(file, backend) - own - {KERNELS / "host" / "runtime.h"}
        assert {path.stem for path in own} >= {f"device_{backend}"}
        assert shared == {path for path in read - emulation if path.name not in sources.HOST_ONLY}


def test_headers_without_a_fingerprint_have_nothing_for_a_kernel(sources: Any) -> None:
    for name in sources.HOST_ONLY:
        text = (KERNELS / "host" / name).read_text(encoding="utf-8")
        found = re.findall(
            r"#define (?!QCORE_GPU_\w+_H\b)\w+|\bconstexpr\b|\bQC_(?:DEVICE|KERNEL|CONSTANT)\b|__device__", text
        )
        assert not found, f"host/{name}: {found}"
        assert set(re.findall(r"#include \"([^\"]+)\"", text)) <= {"qcore_backend.h"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a + +b", "a ++b"),
        ("#define A\nint b;", "#define A int b;"),
        ('"a  b"', '"a b"'),
        ("1'000 / 2", "1'000"),
        ("f('\"'); // g", "f('\"'); g"),
        ("a /* b */ c", "a b c"),
    ],
)
def test_what_means_something_else_has_other_tokens(one: str, other: str, sources: Any) -> None:
    assert list(sources.tokens(one)) != list(sources.tokens(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("int a; // b\n", "int a;"),
        ("f(a,\n  b)", "f(a, /* c */ b)"),
        ("#define A \\\n  1\n", "#define A 1\n"),
        ("x = '\"'; // \"", "x  =  '\"';"),
    ],
)
def test_what_means_the_same_has_the_same_tokens(one: str, other: str, sources: Any) -> None:
    assert list(sources.tokens(one)) == list(sources.tokens(other))


def test_a_part_is_recorded_again_without_the_rest(records: Any) -> None:
    record = records.load()
    before, count = list(record.kernels), len(record.kernels)
    part = ("fourbit", "sm_80")
    record.fingerprints[part] = "old"
    assert record.stale() == [part]
    again = [replace(one, registers=one.registers + 1) for one in before if (one.file, one.target) == part]
    assert len(record.differences(again, record.compilers)) == 1
    record.put(again, {"cuda": record.compilers["cuda"]})
    assert record.stale() == []
    assert record.differences(again, record.compilers) == []
    assert len(record.kernels) == count
    assert set(before) - set(record.kernels) == {one for one in before if (one.file, one.target) == part}


def test_a_record_has_one_compiler_for_a_backend(records: Any) -> None:
    record = records.load()
    part = [one for one in record.kernels if (one.file, one.target) == ("fourbit", "sm_80")]
    with pytest.raises(SystemExit, match=r"compiled by .*V13.*, these by nvcc 99: they do not mix"):
        record.put(part, {"cuda": "nvcc 99"})
    (wrong,) = record.differences(part, {"cuda": "nvcc 99"})
    assert wrong.startswith("compiled by nvcc 99, the record by Cuda")


NOTES = """
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .offset:         0
        .size:           8
    .group_segment_fixed_size: 64
    .max_flat_workgroup_size: 256
    .name:           gather_kernel
    .private_segment_fixed_size: 0
    .sgpr_count:     12
    .sgpr_spill_count: 0
    .vgpr_count:     8
    .vgpr_spill_count: 3
amdhsa.target:   amdgcn-amd-amdhsa--gfx1100
"""
ASSEMBLY = (
    """
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx1100"
\t.p2align\t8
gather_kernel:                          ; @gather_kernel
; %bb.0:
\ts_load_b128 s[0:3], s[0:1], 0x0       ; a load of scalars
\tglobal_load_b128 v[0:3], v0, s[0:1]
\ts_nop 0
\t.p2align\t6
.LBB0_1:                                ; %loop
\t;;#ASMSTART
\tv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
\t;;#ASMEND
\tv_dual_mov_b32 v1, 0 :: v_dual_mov_b32 v2, 0
\ts_cbranch_scc0 .LBB0_1
\tglobal_store_b128 v0, v[0:3], s[2:3]
\ts_endpgm
.Lfunc_end0:
\t.section\t.rodata
\t.amdhsa_kernel gather_kernel
\t\t.amdhsa_next_free_vgpr 8
\t.end_amdhsa_kernel
other:
\ts_endpgm
\t.amdgpu_metadata
"""
    + NOTES
)
DISASSEMBLY = """
Disassembly of section .text:

<gather_kernel>:
\ts_load_b128 s[0:3], s[0:1], null
\tglobal_load_b128 v[0:3], v0, s[0:1]
\ts_nop 0
\ts_nop 0
\ts_nop 0
\tv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
\tv_dual_mov_b32 v1, 0 :: v_dual_mov_b32 v2, 0
\ts_cbranch_scc0 65534
\tglobal_store_b128 v0, v[0:3], s[2:3]
\ts_endpgm
\ts_code_end
\tv_cndmask_b32_e32 v0, s0, v0, vcc_lo
\t\t...

<other>:
\ts_endpgm
"""


def test_assembly_says_what_the_code_object_says(rules: Any, tmp_path: Path) -> None:
    isa, compiled = _tool("gpu_isa"), tmp_path / "gather.cu.o"
    compiled.write_text(ASSEMBLY, encoding="utf-8")
    (kernel,) = isa.assembly_kernels(compiled, None)
    assert list(isa._amd_kernels_of(compiled, "gfx1100", NOTES, DISASSEMBLY)) == [kernel]
    assert (kernel.file, kernel.name, kernel.target) == ("gather", "gather_kernel", "gfx1100")
    assert (kernel.threads, kernel.registers, kernel.scalars, kernel.shared) == (256, 8, 12, 64)
    assert (kernel.instructions, kernel.loads, kernel.loads16, kernel.stores16, kernel.matrix) == (7, 1, 1, 1, 1)
    assert rules.breaches([kernel]) == ["gfx1100 gather_kernel: 3 spilled registers, 0 bytes of scratch; expected none"]


@pytest.mark.parametrize("text", ["", "\t.text\nf:\n\tret\n", ASSEMBLY.replace("  - .agpr_count", "    .agpr_count")])
def test_a_file_without_kernels_is_not_passed_over(text: str, tmp_path: Path) -> None:
    compiled = tmp_path / "gather.cu.o"
    compiled.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"gather\.cu\.o: (neither|holds no kernel)"):
        _tool("gpu_isa").kernels(compiled, None)


def test_a_release_of_clang_is_one_compiler_whoever_built_it() -> None:
    line = _tool("gpu_isa").version_line
    assert line("Debian clang version 19.1.7 (3~deb12u1)\nTarget: x") == "clang version 19.1.7"
    assert line("clang version 19.1.7 (https://example.org/llvm 00ff)\n") == "clang version 19.1.7"
    for other in ("AMD clang version 19.0.0git (roc-6.4.0)", "clang version 20.0.0git (main)"):
        assert line(other) == other


def test_ci_compiles_for_each_wave_size_and_kind_of_matrix_unit(rules: Any) -> None:
    builds = _tool("gpu_builds")
    assert {*builds.HIP_TARGETS, *builds.CUDA_TARGETS} == set(rules.TARGETS)
    assert f"sm_{builds.LEAN_CUDA}" in builds.CUDA_TARGETS
    assert sorted(rules.TARGETS[target].wave for target in builds.LEAN_HIP) == [32, 64]
    assert all(rules.TARGETS[target].matrix for target in builds.LEAN_HIP)


def test_ci_compiles_with_the_compiler_of_the_record(records: Any) -> None:
    pinned = re.search(r"^nvidia-cuda-nvcc==(\S+)$", (ROOT / "requirements/nvcc.txt").read_text("utf-8"), re.M)
    assert pinned is not None
    assert records.load().compilers["cuda"].endswith(f"V{pinned[1]}")
    assert "isa_lean" in (ROOT / "Makefile").read_text(encoding="utf-8")
