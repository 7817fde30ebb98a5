"""The conformance suite on the emulation finds every kernel that is wrong on purpose.

Needs the libraries of ``nox -s simt`` (build/simt): a mutant compiles one file again and links it with their objects.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from kernel_mutants import MUTANTS, KernelMutant

from qcore.backend.cffi_backend import CffiBackend
from qcore_conformance import cases
from qcore_conformance.model import Outcome
from qcore_conformance.session import Session

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "backends" / "kernels"
BUILD = ROOT / "build" / "simt"
LIBRARY = "qcore_simt32"


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    found = sorted((BUILD / "CMakeFiles" / f"{LIBRARY}.dir").rglob("*.o"))
    if not found or not (BUILD / f"lib{LIBRARY}.so").exists():
        if os.environ.get("QCORE_REQUIRE_SIMT") == "1":
            pytest.fail(f"{BUILD} holds no libraries; nox -s simt builds them")
        pytest.skip(f"{BUILD} holds no libraries; nox -s simt builds them")
    return found


def outcome(library: Path, case_id: str) -> tuple[Outcome, str]:
    """In a process of its own: a wrong kernel may write anywhere."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(library, case_id, sender))
    child.start()
    sender.close()
    try:
        said: tuple[Outcome, str] = receiver.recv()
    except EOFError:
        said = (Outcome.CRASHED, "the process died")
    child.join()
    return (Outcome.CRASHED, f"the process died with {child.exitcode}") if child.exitcode else said


def _run(library: Path, case_id: str, sender: Connection) -> None:
    faulthandler.disable()  # a crash is an outcome here: a fatal traceback in the log would look like a failure
    session = Session(CffiBackend("mutant", library), spec=str(library))
    session.isolated = True
    result = session.run_case(cases.case_by_id(case_id))
    sender.send((result.outcome, result.message))


def build(mutant: KernelMutant, objects: list[Path], folder: Path) -> Path:
    source = folder / "kernels"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("tests"))
    text = (source / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1, f"{mutant.file} holds {text.count(mutant.right)} times: {mutant.right}"
    (source / mutant.file).write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    library = folder / "mutant.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    folders = (ROOT / "qcore" / "include", ROOT / "backends" / "common", source)
    defines = ["-DQC_TARGET_SIMT", "-DQC_WAVE_SIZE=32", *(f"-I{folder}" for folder in folders)]
    changed = folder / "changed.o"
    subprocess.run([compiler, *flags, *defines, "-x", "c++", "-c", source / mutant.unit, "-o", changed], check=True)
    others = [path for path in objects if path.name != f"{mutant.unit}.o"]
    assert len(others) == len(objects) - 1
    subprocess.run([compiler, "-shared", "-pthread", "-o", library, changed, *others], check=True)
    return library


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_kernel_is_found(mutant: KernelMutant, objects: list[Path], tmp_path: Path) -> None:
    library = build(mutant, objects, tmp_path)
    outcomes = [outcome(library, case_id)[0] for case_id in mutant.cases]
    assert {Outcome.FAILED, Outcome.CRASHED} & set(outcomes), f"{mutant.name} passes {', '.join(mutant.cases)}"


def test_the_right_kernels_pass_the_same_cases(objects: list[Path]) -> None:
    for case_id in sorted({case_id for mutant in MUTANTS for case_id in mutant.cases}):
        found, message = outcome(BUILD / f"lib{LIBRARY}.so", case_id)
        assert found is Outcome.PASSED, f"{case_id}: {message}"
