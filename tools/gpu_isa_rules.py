"""What is asked of the machine code of every GPU kernel, and what a target gives: registers, shared memory, waves.

Register files and limits: the vendors' ISA documents and programming guides (CDNA2, CDNA3, RDNA2, RDNA3, RDNA4; the
compute-capability tables of CUDA). A breach is a sentence; ``breaches`` finds all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target.

    Attributes
    ----------
    file : str
        The kernel file that it was compiled from, without .cu.
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
        In the code: all, on AMD but for s_nop; loads and stores of global memory of 16 bytes; all loads of it, and
        those among them that go to shared memory past the registers; matrix units; dot products.
    """

    file: str
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


@dataclass(frozen=True)
class Target:
    """One target; a group is what shares its registers among waves: a SIMD of AMD's, a multiprocessor of NVIDIA's.

    Attributes
    ----------
    registers : int
        Of a lane's width, in a group: what `registers of a thread * waves` may come to.
    granule : int
        Registers of a thread are given out in multiples of this.
    most : int
        Waves of a group.
    shared, sharing : int
        Bytes of shared memory, and the groups that share them.
    reserved_shared : int
        Bytes of a block that the driver keeps for itself.
    reports_reserved : bool
        Whether NVIDIA's tools count them with the kernel's own.
    without : str
        What the kernels use elsewhere and this target lacks, and what they do instead.
    """

    wave: int
    registers: int
    granule: int
    most: int
    shared: int
    sharing: int
    matrix: bool = True
    reserved_shared: int = 0
    reports_reserved: bool = False
    copies: bool = False  # from global to shared memory past the registers
    without: str = ""

    def waves(self, registers: int, shared: int, threads: int) -> int:
        """Waves of a group that fit at once, in whole blocks."""
        given = max(1, -(-registers // self.granule)) * self.granule
        waves_of_block = max(1, threads // self.wave)
        blocks = min(self.most, self.registers // given) * self.sharing // waves_of_block
        if shared:
            blocks = min(blocks, self.shared // (shared + self.reserved_shared))
        return blocks * waves_of_block // self.sharing


_NO_COPIES = "Tiles pass through registers on their way to shared memory."
_CDNA = Target(64, 512, 8, 8, 64 << 10, 4, without=_NO_COPIES)
_CDNA2 = replace(
    _CDNA,
    without=f"{_NO_COPIES} The 16-bit units take denormals for zeros: float16 products run on the float32 units.",
)
_RDNA2 = Target(
    *(32, 1024, 16, 16, 128 << 10, 4),
    matrix=False,
    without=f"{_NO_COPIES} No matrix units: int8 products are dot products of four, and products of 16 bits run on the "
    "plain kernels; their matrix kernels are compiled and never launched.",
)
_RDNA3 = Target(32, 1536, 24, 16, 128 << 10, 4, without=_NO_COPIES)


def _nvidia(threads: int, shared_kib: int, without: str = "") -> Target:
    file = (32, 65536 // 32, 8, threads // 32, shared_kib << 10, 1)
    return Target(*file, reserved_shared=1024, copies=True, without=without)


TARGETS = {
    "gfx90a": _CDNA2,
    "gfx942": _CDNA,
    "gfx1030": _RDNA2,
    "gfx1100": _RDNA3,
    "gfx1201": _RDNA3,
    "sm_75": replace(
        _nvidia(1024, 64),
        reserved_shared=0,
        copies=False,
        without=f"No cp.async. {_NO_COPIES} The matrix units take float16 (m16n8k8) and int8 (m8n8k16), not bfloat16: "
        "its products run on the plain kernels; their matrix kernels are compiled and never launched.",
    ),
    "sm_80": _nvidia(2048, 164),
    "sm_86": _nvidia(1536, 100),
    "sm_89": _nvidia(1536, 100),
    "sm_90": replace(
        _nvidia(2048, 228, "wgmma and TMA are left alone: mma.sync and cp.async serve."), reports_reserved=True
    ),
    "sm_100": replace(
        _nvidia(2048, 228, "tcgen05 and TMA are left alone: mma.sync and cp.async serve."), reports_reserved=True
    ),
    "sm_120": replace(_nvidia(1536, 100), reports_reserved=True),
}

_PRODUCT = re.compile(r"(matrix|int8|int8_tiled|tiled|tiled_transposed|tiled_columns|few_columns)_kernel<")
_TILED = re.compile(r"(int8_tiled|tiled|tiled_transposed|tiled_columns)_kernel<")
# What these read, or write, comes eight elements at a time, and those are 16 bytes and more.
_READS_WIDE = re.compile(r"(quantize|plain_kernel|rows|column_|dequantize_gemm|step|squares)")
_WRITES_WIDE = re.compile(r"(dequantize_(4bit|blockwise|rows|gemm)|step)_kernel")
# Of the waves that a group can hold. Products live on registers: one block of eight waves will do. Eight rows of X at
# once, without matrix units, are between the two.
_SHARES = (
    (_PRODUCT, 0.125),
    (re.compile(r"(plain|plain_transposed|step|squares)_kernel"), 0.25),
)
_SHARE = 0.5
# Scalars that were parked in lanes of vector registers: an instruction each way, no memory. What products park are
# addresses and sizes of their outer loops; beside the hundreds of products of an inner step that is nothing.
_MOST_SCALAR_SPILLS, _MOST_OF_PRODUCTS = 20, 40
# Without matrix units lanes pass each other what they multiply, and who takes part is a scalar for each sum that the
# compiler makes once, outside of the loops: 4 x 16 sums a lane, and up to 8 x 8 in tiles.
_PARKED = {("gfx1030", "int8_kernel"): 200, ("gfx1030", "int8_tiled_kernel"): 320}


def breaches(kernels: Iterable[Kernel]) -> list[str]:
    """Every rule that a kernel breaks."""
    return [f"{kernel.target} {kernel.name}: {text}" for kernel in kernels for text in _breaches_of(kernel)]


def _breaches_of(kernel: Kernel) -> Iterable[str]:
    target = TARGETS[kernel.target]
    product = _PRODUCT.match(kernel.name) is not None
    if kernel.spills or kernel.scratch:
        yield f"{kernel.spills} spilled registers, {kernel.scratch} bytes of scratch; expected none"
    usual = _MOST_OF_PRODUCTS if product or kernel.name.startswith("plain_transposed") else _MOST_SCALAR_SPILLS
    most_parked = _PARKED.get((kernel.target, kernel.name.partition("<")[0]), usual)
    if kernel.scalar_spills > most_parked:
        yield f"{kernel.scalar_spills} scalar registers parked, expected at most {most_parked}"
    share = next((share for kind, share in _SHARES if kind.match(kernel.name)), _SHARE)
    least = max(1, int(target.most * share))
    if kernel.waves < least:
        yield f"{kernel.waves} waves at once, expected {least} ({kernel.registers} registers, {kernel.shared} bytes)"
    if product:
        yield from _breaches_of_product(kernel, target)
    if _READS_WIDE.match(kernel.name) and kernel.loads16 == 0:
        yield f"no 16-byte load among {kernel.loads}"
    if _WRITES_WIDE.match(kernel.name) and kernel.stores16 == 0:
        yield "no 16-byte store"


def _breaches_of_product(kernel: Kernel, target: Target) -> Iterable[str]:
    aligned = kernel.name.endswith("true>")
    int8 = kernel.name.startswith("int8_")
    if aligned and kernel.loads16 == 0 and not _never_launched(kernel):
        yield f"no 16-byte load among {kernel.loads}"
    units = kernel.matrix if target.matrix else kernel.dots if int8 else 1
    if units == 0 and not _never_launched(kernel):
        yield "no instruction of the matrix units"
    if target.copies and aligned and kernel.copies == 0 and _TILED.match(kernel.name):
        yield "no copy to shared memory past the registers"


def _never_launched(kernel: Kernel) -> bool:
    """Compiled because every target compiles the same source, but no host launches it (capabilities.h)."""
    sixteen_bits = _PRODUCT.match(kernel.name) is not None and not kernel.name.startswith("int8_")
    return (kernel.target == "gfx1030" and sixteen_bits) or (
        kernel.target == "sm_75" and sixteen_bits and "BFloat16" in kernel.name
    )


_HEAD = (
    "Made by `tools/gpu_isa.py` from what `nox -s isa` compiles; [the figures of every instance]"
    "(gpu-isa.json). Compiled only: none of it is a measurement. Registers are of a thread; waves are how many a "
    "SIMD (AMD) or a multiprocessor (NVIDIA) can hold at once; loads and stores of 16 bytes, copies to shared memory "
    "past the registers (of 16 bytes too), and matrix instructions (dot products on gfx10) are counted in the code. "
    "A range is over the instances of a template."
)


_FIGURES = ("registers", "spilled", "scalars spilled", "shared", "waves", "loads", "copies", "stores", "matrix")
_COLUMNS = ("kernel", "instances", *_FIGURES)


def summary(kernels: Sequence[Kernel]) -> str:
    """The table as a page: for each family of kernels and each target, the ranges over its instances."""
    lines = [
        "# Machine code of the GPU kernels",
        "",
        _HEAD,
        "",
    ]
    for target in TARGETS:
        mine = [kernel for kernel in kernels if kernel.target == target]
        if not mine:
            continue
        wave, most = TARGETS[target].wave, TARGETS[target].most
        lines += [
            f"## {target}",
            "",
            f"Waves of {wave}, at most {most}. {TARGETS[target].without}".rstrip(),
            "",
            f"| {' | '.join(_COLUMNS)} |",
            f"|{'---|' * len(_COLUMNS)}",
        ]
        for family in sorted({kernel.name.partition("<")[0] for kernel in mine}):
            several = [kernel for kernel in mine if kernel.name.partition("<")[0] == family]
            cells = (
                _range(kernel.registers for kernel in several),
                _range(kernel.spills for kernel in several),
                _range(kernel.scalar_spills for kernel in several),
                _range(kernel.shared for kernel in several),
                _range(kernel.waves for kernel in several),
                _range(kernel.loads16 for kernel in several),
                _range(kernel.copies for kernel in several),
                _range(kernel.stores16 for kernel in several),
                _range(kernel.matrix + kernel.dots for kernel in several),
            )
            lines.append(f"| `{family}` | {len(several)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
