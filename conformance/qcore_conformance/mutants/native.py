"""Mutants behind the C ABI: libraries that hand out a right library's table with one careless function.

They are compiled from ``abi_mutants.c`` when they are run, so they need a C compiler and a native backend to spoil.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

import qcore
from qcore.backend import get_backend
from qcore.errors import BackendError, BackendUnavailable
from qcore_conformance.model import Outcome
from qcore_conformance.mutants.mutant import Mutant

_SOURCE = Path(__file__).with_name("abi_mutants.c")
_Q, _D = "quantize_4bit", "dequantize_4bit"
TABLE: tuple[tuple[str, str, str, str, Outcome], ...] = (
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
    mutants = []
    for name, op, clause, says, expects in TABLE:
        if names and name not in names:
            continue
        library = directory / f"{name}.so"
        define = "MUTANT_" + name.removeprefix("abi-").upper().replace("-", "_")
        command = [compiler, "-shared", "-fPIC", "-O1", f"-D{define}", f'-DREAL="{real}"', f"-I{include}"]
        done = subprocess.run(
            [*command, "-o", str(library), str(_SOURCE), "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BackendUnavailable(f"mutants of the C ABI: {compiler} failed on {_SOURCE.name}: {done.stderr}")
        mutants.append(Mutant(name, says, clause, (op,), str(library), expects, native=True))
    return mutants


def names() -> list[str]:
    """The names of the native mutants."""
    return [name for name, *_ in TABLE]
