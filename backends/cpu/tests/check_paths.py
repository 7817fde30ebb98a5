"""Compares the library's quantization ops with the reference, bit for bit, on whatever path QCORE_CPU_ISA names.

Run by test_paths.py once per instruction set; the library decides its path once per process. Prints the number of
comparisons, or the first difference and how to get it again. The reference takes most of the time, so --digest prints
a hash of all the outputs of one side alone, which is enough to see that they are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import sys

import numpy as np
import torch
from hard_inputs import BLOCKSIZES, DTYPES, code_tables, vectors

import qcore_cpu
import qcore_cpu_reference
from qcore import codebooks
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.interface import Backend, Weight4bit

POISON = 0xA5
GUARD = 64  # elements before and after each output


class Guarded:
    """An output between two guard regions."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        self.whole = torch.full(((n + 2 * GUARD) * size,), POISON, dtype=torch.uint8).view(dtype)
        self.tensor = self.whole[GUARD : GUARD + n]

    def intact(self) -> bool:
        edges = torch.cat([self.whole[:GUARD], self.whole[self.whole.numel() - GUARD :]])
        return bool((edges.view(torch.uint8) == POISON).all())


def native(library: str | None) -> Backend:
    return CffiBackend("cpu", library) if library else qcore_cpu.load()


class Comparison:
    """Runs one op on both backends into guarded outputs and compares bits, any NaN with any NaN."""

    def __init__(self, library: str | None) -> None:
        self.backends: tuple[Backend, Backend] = (qcore_cpu_reference.load(), native(library))
        self.count = 0

    def run(self, what: str, op: str, arguments: tuple, outputs: dict[str, tuple[int, torch.dtype]]) -> list:
        results = []
        for backend in self.backends:
            out = {name: Guarded(n, dtype) for name, (n, dtype) in outputs.items()}
            getattr(backend, op)(*arguments, **{name: guarded.tensor for name, guarded in out.items()})
            results.append(out)
        for name in outputs:
            want, got = (result[name].tensor for result in results)
            if not results[1][name].intact():
                sys.exit(f"{op}: {what}: {name}: wrote outside")
            same = want == got if not want.is_floating_point() else same_bits(want, got)
            if not bool(same.all()):
                at = int((~same).nonzero()[0])
                sys.exit(f"{op}: {what}: {name}[{at}] of {want.numel()}: expected {want[at]}, got {got[at]}")
            self.count += 1
        return [results[1][name].tensor for name in outputs]


class Digest:
    """Runs one op on one backend into guarded outputs and hashes their bits, every NaN as the same one."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.count = 0
        self._hash = hashlib.sha256()

    def run(self, what: str, op: str, arguments: tuple, outputs: dict[str, tuple[int, torch.dtype]]) -> list:
        out = {name: Guarded(n, dtype) for name, (n, dtype) in outputs.items()}
        getattr(self.backend, op)(*arguments, **{name: guarded.tensor for name, guarded in out.items()})
        for name, guarded in out.items():
            if not guarded.intact():
                sys.exit(f"{op}: {what}: {name}: wrote outside")
            value = guarded.tensor
            if value.is_floating_point():
                value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
            self._hash.update(f"{op} {what} {name}".encode())
            self._hash.update(value.contiguous().view(torch.uint8).numpy().tobytes())
            self.count += 1
        return [guarded.tensor for guarded in out.values()]

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())


def midpoints(code: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (code[:-1] + code[1:]) * np.float32(0.5)


def check_blockwise(comparison: Comparison | Digest, blocksize: int, seed: int) -> None:
    for table, values in code_tables(seed).items():
        code = torch.from_numpy(values)
        for name, x in vectors(midpoints(values), blocksize, seed):
            # The look-up table serves large calls, the search small ones (kMinIndexedValues).
            for repeat in sorted({1, -(-4096 // max(x.numel(), 1))}):
                a = x.repeat(repeat)
                n, blocks = a.numel(), -(-a.numel() // blocksize)
                what = f"{table}, {name} x{repeat}, blocksize {blocksize}, seed {seed}"
                outputs = {"absmax": (blocks, torch.float32), "out": (n, torch.uint8)}
                absmax, codes = comparison.run(what, "quantize_blockwise", (a, code, blocksize), outputs)
                for dtype in DTYPES:
                    comparison.run(
                        f"{what}, {dtype}",
                        "dequantize_blockwise",
                        (codes, absmax, code, blocksize),
                        {"out": (n, dtype)},
                    )


def check_4bit(comparison: Comparison | Digest, blocksize: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dynamic = torch.from_numpy(np.array(codebooks.DYNAMIC, np.float32))
    thresholds = {
        "nf4": midpoints(np.array(codebooks.NF4, np.float32)),
        "fp4": np.array(codebooks.FP4_THRESHOLDS, np.float32),
    }
    for quant_type in ("nf4", "fp4"):
        for name, a in vectors(thresholds[quant_type], blocksize, seed):
            n, blocks = a.numel(), -(-a.numel() // blocksize)
            what = f"{quant_type}, {name}, blocksize {blocksize}, seed {seed}"
            outputs = {"absmax": (blocks, torch.float32), "out": ((n + 1) // 2, torch.uint8)}
            absmax, packed = comparison.run(what, "quantize_4bit", (a, quant_type, blocksize), outputs)
            # Any byte may come in a file, not only those that quantization makes.
            other = torch.from_numpy(rng.integers(0, 256, packed.numel(), dtype=np.uint8))
            nested = {}
            for nested_blocksize in (256, 32):
                outputs = {
                    "out": (blocks, torch.uint8),
                    "nested_absmax": (-(-blocks // nested_blocksize), torch.float32),
                    "offset": (1, torch.float32),
                }
                nested[nested_blocksize] = comparison.run(
                    f"{what}, nested {nested_blocksize}",
                    "quantize_absmax",
                    (absmax, dynamic, nested_blocksize),
                    outputs,
                )
                codes, nested_absmax, offset = nested[nested_blocksize]
                arguments = (codes, nested_absmax, dynamic, offset, nested_blocksize)
                comparison.run(
                    f"{what}, nested {nested_blocksize}",
                    "dequantize_absmax",
                    arguments,
                    {"out": (blocks, torch.float32)},
                )
            for dtype in DTYPES:
                for source in (packed, other):
                    weight = Weight4bit(source, absmax, quant_type, blocksize, (n,))
                    comparison.run(f"{what}, {dtype}", "dequantize_4bit", (weight,), {"out": (n, dtype)})
                for nested_blocksize, (codes, nested_absmax, offset) in nested.items():
                    weight = Weight4bit(
                        other, codes, quant_type, blocksize, (n,), nested_absmax, dynamic, offset, nested_blocksize
                    )
                    comparison.run(f"{what}, nested, {dtype}", "dequantize_4bit", (weight,), {"out": (n, dtype)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", choices=("blockwise", "4bit"), required=True)
    parser.add_argument("--blocksize", type=int, choices=BLOCKSIZES, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", help="another build of the library, such as one with sanitizers")
    parser.add_argument("--digest", choices=("library", "reference"), help="hash the outputs of this side alone")
    arguments = parser.parse_args()
    check = {"blockwise": check_blockwise, "4bit": check_4bit}[arguments.op]
    for blocksize in arguments.blocksize:
        if arguments.digest:
            one = qcore_cpu_reference.load() if arguments.digest == "reference" else native(arguments.library)
            digest = Digest(one)
            check(digest, blocksize, arguments.seed)
            print(f"blocksize {blocksize}: {digest.count} outputs, {digest.hexdigest()}")
            continue
        comparison = Comparison(arguments.library)
        check(comparison, blocksize, arguments.seed)
        arch = comparison.backends[1].describe(torch.device("cpu")).arch
        print(f"{arch}, blocksize {blocksize}: {comparison.count} outputs equal")


if __name__ == "__main__":
    main()
