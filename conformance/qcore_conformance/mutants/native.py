"""Mutants behind the C ABI: libraries that hand out a right library's table with one careless function.

They are compiled from ``abi_mutants.c`` when they are run, so they need a C compiler and a native backend to spoil.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

import qcore
from qcore.backend import get_backend
from qcore.errors import BackendError, BackendUnavailable
from qcore_conformance.model import Outcome
from qcore_conformance.mutants.mutant import Mutant

_SOURCE = Path(__file__).with_name("abi_mutants.c")
_Q, _D = "quantize_4bit", "dequantize_4bit"
MEMORY_CONTROL = "memory-right"


class Careless(NamedTuple):
    """A library with one careless function; ``control``: the right one that it spoils, where that is not cpu's own."""

    name: str
    op: str
    clause: str
    says: str
    expects: Outcome
    control: str = ""


_OPS: tuple[tuple[str, str, str, str, Outcome], ...] = (
    ("abi-blocksize-unchecked", _Q, "QC-NUM-005", "A blocksize that is not allowed is taken for 4096.", Outcome.FAILED),
    ("abi-count-unsigned", _Q, "QC-NUM-006", "A negative count is taken for no elements.", Outcome.FAILED),
    ("abi-null-accepted", _Q, "QC-NUM-006", "A null address returns success.", Outcome.FAILED),
    ("abi-dtype-defaulted", _Q, "QC-NUM-006", "An unknown dtype is taken for float32.", Outcome.FAILED),
    ("abi-format-defaulted", _Q, "QC-NUM-006", "An unknown format is taken for NF4.", Outcome.FAILED),
    ("abi-alignment-rounded", _Q, "QC-NUM-006", "A misaligned address is rounded down.", Outcome.FAILED),
    ("abi-writes-first", _Q, "QC-NUM-006", "The output is touched before the arguments are checked.", Outcome.FAILED),
    ("abi-status-internal", _Q, "QC-NUM-006", "Bad arguments are reported as a defect of the library.", Outcome.FAILED),
    ("abi-aborts", _Q, "QC-NUM-006", "Bad arguments abort the process.", Outcome.CRASHED),
    ("abi-message-missing", _Q, "QC-NUM-006", "A refusal leaves no message.", Outcome.FAILED),
    (
        "abi-device-ignored",
        "dequantize_absmax",
        "QC-NUM-006",
        "Any device number is taken for device 0.",
        Outcome.FAILED,
    ),
    ("abi-layout-ignored", _D, "QC-NUM-006", "A weight of an unknown layout is read as stored.", Outcome.FAILED),
    ("abi-nesting-unchecked", _D, "QC-NUM-006", "A missing nested codebook is read.", Outcome.CRASHED),
    ("abi-threshold-unchecked", "int8_quantize_rows", "QC-INT8-001", "A bad threshold is taken for 0.", Outcome.FAILED),
    (
        "abi-bias-dtype-unchecked",
        "int8_dequantize_gemm",
        "QC-NUM-006",
        "A bias of an unknown dtype is taken for float32.",
        Outcome.FAILED,
    ),
)
_M1, _M2, _M3, _M4, _M5 = (f"QC-MEM-00{i}" for i in range(1, 6))
# The same of the memory functions. They spoil right ones over the host's memory, which the cpu backend has no use for.
MEMORY: tuple[tuple[str, str, str, Outcome], ...] = (
    ("memory-half-there", _M1, "One of the four functions is missing.", Outcome.FAILED),
    ("memory-kind-unknown", _M1, "The device's kind of memory is none that there is.", Outcome.FAILED),
    ("memory-kind-not-served", _M1, "The kind that suits the device is refused.", Outcome.FAILED),
    ("memory-misaligned", _M2, "Pieces begin at multiples of 16.", Outcome.FAILED),
    ("memory-handed-out-twice", _M2, "A piece lies in one that was not given back.", Outcome.FAILED),
    ("memory-op-differs", _M2, "An op rounds otherwise where its output is such memory.", Outcome.FAILED),
    ("memory-full-untyped", _M2, "No room is a defect of the library.", Outcome.FAILED),
    ("memory-full-writes", _M2, "No room writes address 0.", Outcome.FAILED),
    ("memory-prefetch-drops", _M3, "The last byte of what goes to the device is lost.", Outcome.FAILED),
    ("memory-nothing-refused", _M3, "A prefetch of no bytes is refused.", Outcome.FAILED),
    ("memory-free-reads-zero", _M4, "Giving back address 0 reads there.", Outcome.CRASHED),
    ("memory-free-by-owner", _M4, "Another thread may not give back.", Outcome.FAILED),
    ("memory-kind-unchecked", _M5, "An unknown kind is taken for one that there is.", Outcome.FAILED),
    ("memory-device-ignored", _M5, "Any device number is taken for device 0.", Outcome.FAILED),
    ("memory-bytes-unsigned", _M5, "A negative number of bytes is taken for a large one.", Outcome.FAILED),
    ("memory-to-host-unchecked", _M5, "Any to_host is taken for a place.", Outcome.FAILED),
    ("memory-address-unchecked", _M5, "A prefetch of bytes at address 0 returns success.", Outcome.FAILED),
    ("memory-message-missing", _M5, "A refusal leaves no message.", Outcome.FAILED),
)
TABLE: tuple[Careless, ...] = (
    *(Careless(*row) for row in _OPS),
    *(Careless(name, "contract", clause, says, expects, MEMORY_CONTROL) for name, clause, says, expects in MEMORY),
)


def native_mutants(directory: Path, names: tuple[str, ...] = ()) -> list[Mutant]:
    """Compile the mutants of the C ABI into ``directory``, those in ``names`` or all.

    Raises
    ------
    BackendUnavailable
        There is no C compiler, or no native backend on this machine to spoil.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BackendUnavailable("mutants of the C ABI: no C compiler found; set CC")
    try:
        real = get_backend("cpu").describe(torch.device("cpu")).library
    except BackendError as error:
        raise BackendUnavailable(f"mutants of the C ABI spoil the cpu backend, which cannot be had: {error}") from error
    include = Path(qcore.__file__).parent / "include"

    def compiled(name: str, control: str) -> str:
        library = directory / f"{name}.so"
        defines = ["-DMUTANT_" + name.removeprefix("abi-").upper().replace("-", "_"), f'-DREAL="{real}"']
        defines += ["-DMEMORY"] if control == MEMORY_CONTROL else []
        command = [compiler, "-shared", "-fPIC", "-O1", *defines, f"-I{include}", "-o", str(library), str(_SOURCE)]
        done = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendUnavailable(f"mutants of the C ABI: {compiler} failed on {_SOURCE.name}: {done.stderr}")
        return str(library)

    chosen = [row for row in TABLE if not names or row.name in names]
    controls = {row.control for row in chosen if row.control}
    right = {"": "", **{name: compiled(name, name) for name in sorted(controls)}}
    return [
        Mutant(
            row.name,
            row.says,
            row.clause,
            (row.op,),
            compiled(row.name, row.control),
            row.expects,
            native=True,
            control=right[row.control],
        )
        for row in chosen
    ]


def names() -> list[str]:
    """The names of the native mutants."""
    return [row.name for row in TABLE]
