"""What the compilers made of the GPU kernels: registers, shared memory, occupancy, loads, matrix units; checked.

    python tools/gpu_isa.py build/hip/libqcore_hip.so build/cuda/libqcore_cuda.so --out docs/results
    python tools/gpu_isa.py build/hip/libqcore_hip.so --target gfx1100

Reads the machine code in a library, of each kernel for each target: AMD's with llvm-readelf and llvm-objdump, NVIDIA's
with cuobjdump and nvdisasm. No GPU is needed. ``--out`` writes gpu-isa.json and gpu-isa.md there. Exit status 1 if a
kernel breaks a rule of ``gpu_isa_rules``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gpu_isa_rules import TARGETS, breaches, summary

LLVM = 19
_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target.

    Attributes
    ----------
    threads : int
        Of a block; 0 where the machine code does not say.
    registers : int
        Vector registers of a thread, accumulation registers included.
    scalars, scalar_spills : int
        Scalar registers of a wave; those that were parked in lanes of vector registers. AMD only.
    spills, scratch : int
        Vector registers that went to memory; bytes of it a thread.
    shared : int
        Bytes of a block.
    waves : int
        That one SIMD (AMD) or multiprocessor (NVIDIA) can hold at once, by registers and shared memory.
    instructions, loads16, stores16, loads, copies, matrix, dots : int
        In the code: all; loads and stores of global memory of 16 bytes; all loads of it, and those among them that go
        to shared memory past the registers; matrix units; dot products.
    """

    name: str
    target: str
    threads: int
    registers: int
    scalars: int
    scalar_spills: int
    spills: int
    scratch: int
    shared: int
    waves: int
    instructions: int
    loads16: int
    stores16: int
    loads: int
    copies: int
    matrix: int
    dots: int


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


def code_objects(library: Path) -> Iterator[tuple[str, bytes]]:
    """(target, ELF) of every code object in the library's bundles."""
    with tempfile.TemporaryDirectory() as folder:
        section = Path(folder) / "fatbin"
        run("objcopy", "-O", "binary", "--only-section=.hip_fatbin", str(library), str(section))
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


def amd_kernels(library: Path, only: str | None) -> Iterator[Kernel]:
    for target, elf in code_objects(library):
        if only in (None, target):
            with tempfile.NamedTemporaryFile(suffix=".co") as file:
                file.write(elf)
                file.flush()
                yield from _kernels_of_object(target, file.name)


def _kernels_of_object(target: str, path: str) -> Iterator[Kernel]:
    notes = run(f"llvm-readelf-{LLVM}", "--notes", path).partition("amdhsa.kernels:")[2].partition("amdhsa.target")[0]
    blocks = [
        dict(re.findall(r"^    \.(\w+): +(\S+)$", f"    {block}", re.M)) for block in re.split(r"(?m)^  - ", notes)[1:]
    ]
    names = demangle([block["name"] for block in blocks])
    code = _disassembly(run(f"llvm-objdump-{LLVM}", "--disassemble", "--no-show-raw-insn", "--no-leading-addr", path))
    for block in blocks:
        lines = code[block["name"]]
        said = {key: int(value) for key, value in block.items() if value.isdigit()}
        registers, threads = said["vgpr_count"], said["max_flat_workgroup_size"]
        if target == "gfx90a" or target.startswith("gfx94"):  # one file: accumulation registers are part of it
            registers = max(registers, said.get("agpr_count", 0))
        shared = said["group_segment_fixed_size"]
        loads = [line for line in lines if re.match(r"(global|flat|buffer)_load", line)]
        yield Kernel(
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


def _disassembly(text: str) -> dict[str, list[str]]:
    """Instructions of each symbol."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(?:[0-9a-f]+ )?<(.+)>:$", line)
        if head:
            lines = found.setdefault(head[1], [])
        elif line.startswith(("\t", " ")) and line.strip() and not line.strip().startswith("s_code_end"):
            lines.append(line.strip())
    return found


# NVIDIA


def nvidia_kernels(library: Path, only: str | None) -> Iterator[Kernel]:
    chosen = ("--gpu-architecture", only) if only else ()
    usage = run("cuobjdump", "--dump-resource-usage", *chosen, str(library))
    code = _sass(run("cuobjdump", "--dump-sass", *chosen, str(library)))
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


def kernels(library: Path, only: str | None) -> list[Kernel]:
    """All kernels of a library, by target and name."""
    sections = run("objdump", "--section-headers", str(library))
    if ".hip_fatbin" in sections:
        found = amd_kernels(library, only)
    elif ".nv_fatbin" in sections:
        found = nvidia_kernels(library, only)
    else:
        raise SystemExit(f"{library}: holds no GPU code")
    return sorted(found, key=lambda kernel: (kernel.target, kernel.name))


def write(found: list[Kernel], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = [field.name for field in fields(Kernel)]
    rows = [[asdict(kernel)[column] for column in columns] for kernel in found]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    source = run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty").strip()
    compilers = [run(name, "--version").splitlines() for name in ("clang++-19", "nvcc") if shutil.which(name)]
    machine = {
        "compilers": [next(line for line in said if "version" in line or "release" in line) for said in compilers]
    }
    about = {"schema": 1, "kind": "machine code", "machine": machine, "source": source, "columns": columns}
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    text = f'{{\n{head} "kernels": [\n{lines}\n ]\n}}\n'
    (folder / "gpu-isa.json").write_text(text, encoding="utf-8")
    (folder / "gpu-isa.md").write_text(summary(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", type=Path)
    parser.add_argument("--target", help="only this one, such as gfx1100 or sm_90a")
    parser.add_argument("--expect", default="", help="targets that have to be there, with commas between")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if shutil.which("c++filt") is None:
        raise SystemExit("c++filt was not found; it comes with binutils")
    found = [kernel for library in options.libraries for kernel in kernels(library, options.target)]
    targets = {kernel.target for kernel in found}
    wrong = [f"no code for {target}" for target in filter(None, options.expect.split(",")) if target not in targets]
    wrong += breaches(found)
    if options.out is not None:
        write(found, options.out)
    print(f"{len(found)} kernels for {', '.join(sorted(targets)) or 'nothing'}: {len(wrong)} break a rule")
    if wrong or not found:
        sys.exit("\n".join(wrong) or "no kernel was found")


if __name__ == "__main__":
    main()
