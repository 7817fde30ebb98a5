"""What the processor's ports do in the loops that bound the CPU kernels, by llvm-mca.

    python benchmarks/port_counts.py [--mca llvm-mca-19] [--json FILE]

Compiles the kernel files as the build does, to assembly, takes the loops that docs/optimizers.md speaks of, and has
llvm-mca count the operations on ports 0 and 5 (where those of 512 bits run), and simulate what an iteration takes if
everything is in the first cache. Nothing is run: needs cmake, ninja and llvm-mca, no particular
processor.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CPU = "sapphirerapids"
SOURCE = Path(__file__).resolve().parent.parent / "backends" / "cpu"
_LABEL = re.compile(r"^(\.L\d+):")
_JUMP = re.compile(r"^\t(j\w+)\t(\.L\d+)")


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel file: in functions of this name, the longest way round with ``has`` and without ``lacks``.

    ``has`` says how often an instruction is in it, the rarest first, ``most`` how many there are at most; ``function``
    is a pattern of the mangled name.
    """

    title: str
    file: str
    function: str
    has: Mapping[str, int]
    lacks: str
    most: int
    isa: str = "avx512_vnni"


_STEP = r"stepINS1_4AdamELb1E"
LOOPS = (
    Loop(
        "AdamW8bit: decode, new states, square root",
        "optimizer_kernels.cpp",
        _STEP,
        {"vsqrtps": 4, "vpermb": 26, "vmulps": 28, "prefetcht0": 10},
        "vdivps",
        200,
    ),
    Loop(
        "AdamW8bit: encode, quotient, new parameter",
        "optimizer_kernels.cpp",
        _STEP,
        {"vdivps": 4, "vpermi2d": 8, "vpermb": 8, "vmulps": 16},
        "vsqrtps",
        260,
    ),
    Loop(
        "quantize_blockwise: codes of the dynamic map",
        "quantize_kernels.cpp",
        r"8quantizeIf",
        {"vpermi2d": 4, "vpermb": 4, "vmulps": 4},
        "vdivps",
        110,
    ),
    Loop(
        "int8_quantize_rows, bfloat16: largest magnitude, outliers",
        "int8_kernels.cpp",
        r"8row_statE",
        {"vpmaxuw": 2, "vpcmpuw": 2, "vpandd": 2},
        "vpbroadcastb",
        40,
        "avx512",
    ),
    Loop(
        "int8_quantize_rows, bfloat16: codes",
        "int8_kernels.cpp",
        r"9row_codesE",
        {"vpmovzxwd": 4, "vcvtps2dq": 4, "vmulps": 4},
        "vcvtph2ps",
        40,
        "avx512",
    ),
)


def commands(folder: Path) -> dict[tuple[str, str], list[str]]:
    """The build's compiler command for each kernel file and instruction set."""
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*configure, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"], check=True, capture_output=True)
    found = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        isa = re.search(r"-DQC_ISA=(\w+)", entry["command"])
        if isa is not None:
            found[Path(entry["file"]).name, isa[1]] = shlex.split(entry["command"])
    return found


def assembly(command: list[str], folder: Path) -> list[str]:
    """The lines of the file that ``command`` compiles."""
    out = folder / "kernels.s"
    arguments = [word for word in command if word != "-c"]
    arguments[arguments.index("-o") + 1] = str(out)
    subprocess.run([*arguments, "-S"], check=True, cwd=folder, capture_output=True)
    return out.read_text().splitlines()


def functions(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every function, with what the compiler moved out of its way as unlikely."""
    name, start = "", 0
    for i, line in enumerate(lines):
        label = re.match(r"^(_Z[\w.]*):", line)
        if label is not None and ".cold" not in label[1]:
            name, start = label[1], i
        elif name and line.startswith(f"\t.size\t{name},"):
            yield name, lines[start:i]
            name = ""


class Blocks:
    """A function as basic blocks: instructions, and where each block may go on."""

    def __init__(self, lines: list[str]) -> None:
        self.code: dict[str, list[str]] = {"": []}
        self.next: dict[str, list[str]] = {"": []}
        name = ""
        for number, line in enumerate(lines):
            if (label := _LABEL.match(line)) is not None:
                self._begin(label[1], name)
                name = label[1]
            elif line.startswith("\t") and not line.startswith("\t."):
                self.code[name].append(line)
                if (jump := _JUMP.match(line)) is not None:
                    self.next[name].append(jump[2])
                    after = f"after {number}"
                    self._begin(after, "" if jump[1] == "jmp" else name)
                    name = after
        self.next = {of: [to for to in targets if to in self.code] for of, targets in self.next.items()}

    def _begin(self, name: str, before: str) -> None:
        self.code[name], self.next[name] = [], []
        if before:
            self.next[before].append(name)

    def ways_round(self, head: str, most: int) -> Iterator[list[str]]:
        """The instructions, at most ``most``, of every way from ``head`` back to it that meets no block twice."""
        stack = [(head, [head], len(self.code[head]))]
        while stack:
            at, way, length = stack.pop()
            for to in self.next[at]:
                if to == head:
                    yield [line for name in way for line in self.code[name]]
                elif to not in way and length + len(self.code[to]) <= most:
                    stack.append((to, [*way, to], length + len(self.code[to])))


def count(opcode: str, body: list[str]) -> int:
    return sum(line.split()[0] == opcode for line in body)


def find(loop: Loop, lines: list[str]) -> list[str]:
    found: list[str] = []
    for name, function in functions(lines):
        if re.search(loop.function, name) is None:
            continue
        blocks = Blocks(function)
        rarest = next(iter(loop.has))
        heads = [head for head, code in blocks.code.items() if count(rarest, code)]
        for head in heads:
            for body in blocks.ways_round(head, loop.most):
                fits = all(count(opcode, body) == times for opcode, times in loop.has.items())
                if fits and not count(loop.lacks, body) and len(body) > len(found):
                    found = body
    if not found:
        wanted = ", ".join(f"{times} {opcode}" for opcode, times in loop.has.items())
        raise SystemExit(f"{loop.file}: no loop with {wanted} in {loop.function}")
    return found


def simulate(mca: str, body: list[str]) -> dict[str, float]:
    """Cycles of an iteration: of ports 0 and 5, and in all."""
    iterations = 200
    command = [mca, f"-mcpu={CPU}", f"-iterations={iterations}", "--json"]
    try:
        done = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SystemExit(f"{mca} is not installed (Debian: llvm-19); --mca names another") from error
    if done.returncode != 0:
        raise SystemExit(f"{mca}: {done.stderr.strip()[:300]}")
    report = json.loads(done.stdout)
    resources = report["TargetInfo"]["Resources"]
    region = report["CodeRegions"][0]
    pressure: dict[str, float] = dict.fromkeys(resources, 0.0)
    count = len(region["Instructions"])
    for entry in region["ResourcePressureView"]["ResourcePressureInfo"]:
        if entry["InstructionIndex"] < count:
            pressure[resources[entry["ResourceIndex"]]] += entry["ResourceUsage"]

    def of(suffix: str) -> float:
        return sum(value for name, value in pressure.items() if name.endswith(suffix))

    return {
        "instructions": count,
        "port_0": of("Port00"),
        "port_5": of("Port05"),
        "simulated": region["SummaryView"]["TotalCycles"] / iterations,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mca", default="llvm-mca-19", help="the llvm-mca to use (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = commands(folder)
        compiled: dict[tuple[str, str], list[str]] = {}
        for loop in LOOPS:
            source = loop.file, loop.isa
            if source not in compiled:
                compiled[source] = assembly(build[source], folder)
            counts = simulate(arguments.mca, find(loop, compiled[source]))
            rows.append({"loop": loop.title, **counts})
    table = Table("loop", title=f"Cycles for 64 elements, {CPU}")
    for heading in ("port 0", "port 5", "at least", "simulated"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = (row["port_0"], row["port_5"], max(row["port_0"], row["port_5"]), row["simulated"])
        table.add_row(row["loop"], *(f"{value:.0f}" for value in values))
    Console().print(table)
    if arguments.json is not None:
        compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[
            0
        ]
        arguments.json.write_text(
            json.dumps({"cpu": CPU, "compiler": compiler, "elements": 64, "loops": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
