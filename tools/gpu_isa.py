"""What the compilers made of the GPU kernels: registers, shared memory, occupancy, loads, matrix units; checked.

    python tools/gpu_isa.py build/hip build/cuda --out docs/results
    python tools/gpu_isa.py build/cuda --only absmax,int8_gemm --out docs/results
    python tools/gpu_isa.py build/hip --only blockwise --target gfx1100

Reads the machine code in the object files of a build, of each kernel for each target: AMD's with llvm-readelf and
llvm-objdump, NVIDIA's with cuobjdump and nvdisasm. Where a build of AMD's kernels stopped at assembly (``-S``) it reads
that, which says the same and needs no tool. No GPU is needed. ``--out`` writes gpu-isa.json and gpu-isa.md there, or
puts what was read into those that are there; ``--compare`` asks that it is what a record says. Exit status 1 if a
kernel breaks a rule of ``gpu_isa_rules`` or is not as that record says.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu_isa_record import Record, load, write
from gpu_isa_rules import TARGETS, Kernel, breaches
from gpu_isa_sources import ROOT, backend_of, included, kernel_files

LLVM = 19
_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"


def run(*command: str, **more: object) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, **more).stdout  # type: ignore[call-overload, no-any-return]


def plain_name(symbol: str) -> str:
    """``matrix_kernel<Half, 32, 1, 8, true>`` of the demangled name: no namespaces, no parameters."""
    name = re.sub(r"\bqcore\w*::gpu::|\(anonymous namespace\)::|^void |\(bool\)|\(int\)", "", symbol)
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:index]
            break
    return name.replace("> >", ">>")


def demangle(symbols: list[str]) -> dict[str, str]:
    said = run("c++filt", input="\n".join(symbols)).splitlines()
    return {symbol: plain_name(text) for symbol, text in zip(symbols, said, strict=True)}


# AMD


def code_objects(compiled: Path) -> Iterator[tuple[str, bytes]]:
    """(target, ELF) of every code object in the bundles of an object file."""
    with tempfile.TemporaryDirectory() as folder:
        section = Path(folder) / "fatbin"
        run("objcopy", "-O", "binary", "--only-section=.hip_fatbin", str(compiled), str(section))
        data = section.read_bytes()
    start = data.find(_MAGIC)
    while start >= 0:
        (count,), at = struct.unpack_from("<Q", data, start + 24), start + 32
        for _ in range(count):
            offset, size, length = struct.unpack_from("<QQQ", data, at)
            triple = data[at + 24 : at + 24 + length].decode()
            at += 24 + length
            if size and "amdgcn" in triple:
                yield triple.rsplit("-", 1)[-1].partition(":")[0], data[start + offset : start + offset + size]
        start = data.find(_MAGIC, start + 1)


def amd_kernels(compiled: Path, only: str | None) -> Iterator[Kernel]:
    for target, elf in code_objects(compiled):
        if only in (None, target):
            with tempfile.NamedTemporaryFile(suffix=".co") as file:
                file.write(elf)
                file.flush()
                notes = run(f"llvm-readelf-{LLVM}", "--notes", file.name)
                plain = ("--disassemble", "--no-show-raw-insn", "--no-leading-addr")
                yield from _amd_kernels_of(compiled, target, notes, run(f"llvm-objdump-{LLVM}", *plain, file.name))


def assembly_kernels(compiled: Path, only: str | None) -> Iterator[Kernel]:
    """Of what the compiler wrote for one target, as assembly: the notes of a code object are at its end."""
    text = compiled.read_text(encoding="utf-8")
    target = re.search(r'^\t\.amdgcn_target "amdgcn-amd-amdhsa--(\w+)', text, re.M)
    if target is None:
        raise SystemExit(f"{compiled}: neither an object file nor assembly for one AMD target")
    if only in (None, target[1]):
        code, _, notes = text.rpartition("\t.amdgpu_metadata\n")
        yield from _amd_kernels_of(compiled, target[1], notes, code)


def _amd_kernels_of(compiled: Path, target: str, notes: str, text: str) -> Iterator[Kernel]:
    """The kernels of one target: their notes, which are YAML, and their assembly."""
    said_of = notes.partition("amdhsa.kernels:")[2].partition("amdhsa.target")[0]
    blocks = [
        dict(re.findall(r"^    \.(\w+): +(\S+)$", f"    {block}", re.M))
        for block in re.split(r"(?m)^  - ", said_of)[1:]
    ]
    if not blocks:
        raise SystemExit(f"{compiled}: holds no kernel for {target}")
    names = demangle([block["name"] for block in blocks])
    code = _amd_instructions(text)
    for block in blocks:
        lines = code[block["name"]]
        said = {key: int(value) for key, value in block.items() if value.isdigit()}
        registers, threads = said["vgpr_count"], said["max_flat_workgroup_size"]
        if target == "gfx90a" or target.startswith("gfx94"):  # one file: accumulation registers are part of it
            registers = max(registers, said.get("agpr_count", 0))
        shared = said["group_segment_fixed_size"]
        loads = [line for line in lines if re.match(r"(global|flat|buffer)_load", line)]
        yield Kernel(
            _file_of(compiled),
            names[block["name"]],
            target,
            threads,
            registers,
            said["sgpr_count"],
            said["sgpr_spill_count"],
            said["vgpr_spill_count"],
            said["private_segment_fixed_size"],
            shared,
            TARGETS[target].waves(registers, shared, threads),
            len(lines),
            sum(re.match(r"\w+_load_(dwordx4|b128)\b", line) is not None for line in loads),
            sum(re.match(r"(global|flat|buffer)_store_(dwordx4|b128)\b", line) is not None for line in lines),
            len(loads),
            0,
            sum(re.match(r"v_(mfma|wmma)_", line) is not None for line in lines),
            sum(re.match(r"v_dot4", line) is not None for line in lines),
        )


def _amd_instructions(text: str) -> dict[str, list[str]]:
    """Instructions of each symbol, in what the compiler writes and in what llvm-objdump does.

    Without what an alignment puts there, which only the second has: s_nop, and all behind the last jump or end.
    """
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"(?:[0-9a-f]+ )?<(.+)>:$", line) or re.match(r"(?!\.L)([\w.$]+):", line):
            lines = found.setdefault(head[1], [])
        elif re.match(r"[\t ]+(?!s_nop\b)[a-z]", line):
            lines.append(line.strip())
    for lines in found.values():
        while lines and not re.match(r"s_(endpgm|branch|setpc)", lines[-1]):
            lines.pop()
    return found


# NVIDIA


def nvidia_kernels(compiled: Path, only: str | None) -> Iterator[Kernel]:
    chosen = ("--gpu-architecture", only) if only else ()
    usage = run("cuobjdump", "--dump-resource-usage", *chosen, str(compiled))
    code = _sass(run("cuobjdump", "--dump-sass", *chosen, str(compiled)))
    target, symbol = "", ""
    found: list[tuple[str, str, dict[str, int]]] = []
    for line in usage.splitlines():
        if line.startswith("arch = "):
            target = line.removeprefix("arch = ").strip()
        elif line.strip().startswith("Function "):
            symbol = line.strip().removeprefix("Function ").rstrip(":")
        elif "REG:" in line:
            found.append((target, symbol, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}))
    names = demangle([symbol for _, symbol, _ in found])
    for target, symbol, said in found:
        lines, plain = code[target, symbol], target.rstrip("af")
        loads = [line for line in lines if re.match(r"LDG(STS)?\b", line)]
        reserved = TARGETS[plain].reserved_shared if TARGETS[plain].reports_reserved else 0
        shared = max(0, said["SHARED"] - reserved)
        threads = _threads_of(names[symbol])
        yield Kernel(
            _file_of(compiled),
            names[symbol],
            plain,
            threads,
            said["REG"],
            0,
            0,
            sum(re.match(r"(LDL|STL)\b", line) is not None for line in lines),
            said["STACK"] + said["LOCAL"],
            shared,
            TARGETS[plain].waves(said["REG"], shared, threads),
            len(lines),
            sum("128" in line.split()[0].split(".") for line in loads),
            sum(re.match(r"STG\S*\.128", line) is not None for line in lines),
            len(loads),
            sum(line.startswith("LDGSTS") for line in loads),
            sum(re.match(r"(HMMA|IMMA)\b", line) is not None for line in lines),
            sum(re.match(r"(IDP|IDP4A)\b", line) is not None for line in lines),
        )


def _threads_of(name: str) -> int:
    """Of a block, which SASS does not say: the kernels of tiles have 512, all others 256."""
    return 512 if re.match(r"(de)?quantize_(blockwise|4bit|absmax)_kernel", name) else 256


def _sass(text: str) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    target, lines = "", []
    for line in text.splitlines():
        if line.startswith("arch = "):
            target = line.removeprefix("arch = ").strip()
        elif line.strip().startswith("Function : "):
            lines = found.setdefault((target, line.strip().removeprefix("Function : ")), [])
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?(.+?) *;", line):
            lines.append(code[1])
    return found


# Both


def _file_of(compiled: Path) -> str:
    return compiled.name.partition(".")[0]


def objects(build: Path, only: list[str]) -> list[Path]:
    """The object files of a build's kernel files."""
    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    wanted = [entry for entry in commands if Path(entry["file"]).suffix == ".cu" and Path(entry["file"]).stem in only]
    found = [build / entry["output"] for entry in wanted]
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise SystemExit(f"{build}: {', '.join(missing) or 'no kernel file'} is not compiled")
    return found


def compiler(build: Path) -> str:
    """Which compiler a build's kernel files go through, as ``version_line`` says it."""
    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    command = next(entry["command"] for entry in commands if Path(entry["file"]).suffix == ".cu")
    return version_line(run(shlex.split(command)[0], "--version"))


def version_line(said: str) -> str:
    """The line with the version out of what ``--version`` says.

    A release of LLVM makes the same code whoever built it, so that of clang it is the release alone. AMD's is another.
    """
    line = next(line for line in said.splitlines() if "version" in line or "release" in line).strip()
    return re.sub(r"^(?:Debian |Ubuntu )?(clang version \d+\.\d+\.\d+)\b(?!git).*", r"\1", line)


def kernels(compiled: Path, only: str | None) -> list[Kernel]:
    """All kernels of a compiled file, which is no older than what it was compiled from."""
    with compiled.open("rb") as file:
        is_object = file.read(4) == b"\x7fELF"
    sections = run("objdump", "--section-headers", str(compiled)) if is_object else ""
    if not is_object:
        found = list(assembly_kernels(compiled, only))
    elif ".hip_fatbin" in sections:
        found = list(amd_kernels(compiled, only))
    elif ".nv_fatbin" in sections:
        found = list(nvidia_kernels(compiled, only))
    else:
        raise SystemExit(f"{compiled}: holds no GPU code")
    for backend in {backend_of(kernel.target) for kernel in found}:
        made_from = {*included(_file_of(compiled), backend), ROOT / "backends" / backend / "CMakeLists.txt"}
        newest = max(made_from, key=lambda path: path.stat().st_mtime)
        if newest.stat().st_mtime > compiled.stat().st_mtime:
            raise SystemExit(f"{compiled}: is older than {newest.name}; compile it again")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", type=Path, help="folders with compile_commands.json")
    parser.add_argument("--only", help="these kernel files, without .cu, with commas between")
    parser.add_argument("--target", help="only this one, such as gfx1100 or sm_90")
    parser.add_argument("--expect", default="", help="targets that have to be there, with commas between")
    parser.add_argument("--compare", type=Path, metavar="RECORD", help="a gpu-isa.json")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if shutil.which("c++filt") is None:
        raise SystemExit("c++filt was not found; it comes with binutils")
    only = options.only.split(",") if options.only else kernel_files()
    unknown = sorted(set(only) - set(kernel_files()))
    if unknown:
        raise SystemExit(f"--only: {', '.join(unknown)}: expected some of {', '.join(kernel_files())}")
    found: list[Kernel] = []
    compilers: dict[str, str] = {}
    for build in options.builds:
        mine = [kernel for path in objects(build, only) for kernel in kernels(path, options.target)]
        compilers |= dict.fromkeys((backend_of(kernel.target) for kernel in mine), compiler(build))
        found += mine
    print(f"{len(found)} kernels for {', '.join(sorted({kernel.target for kernel in found})) or 'nothing'}")
    targets = {kernel.target for kernel in found}
    wrong = [f"no code for {target}" for target in filter(None, options.expect.split(",")) if target not in targets]
    wrong += breaches(found)
    if options.compare is not None:
        wrong += load(options.compare).differences(found, compilers)
    if options.out is not None:
        file = options.out / "gpu-isa.json"
        whole = options.target is None and options.only is None and targets == set(TARGETS)
        record = load(file) if file.is_file() and not whole else Record()
        record.put(found, compilers)
        write(record, options.out)
    if wrong or not found:
        sys.exit("\n".join(wrong) or "no kernel was found")


if __name__ == "__main__":
    main()
