"""The name bitsandbytes: who has it, how it is taken, and what refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch

import qcore
from qcore.compat.metadata import shim_status
from qcore.errors import NameTaken

SHIM = Path(__file__).parents[2] / "integrations" / "bitsandbytes_shim"
SCHEMAS = """
import {prelude}
import bitsandbytes, torch
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("bitsandbytes::"):
        print(schema)
"""


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_name_is_refused_once_bitsandbytes_is_imported() -> None:
    assert bitsandbytes.__version__
    with pytest.raises(NameTaken, match="has been imported already"):
        qcore.install_as_bitsandbytes()
    status = shim_status()
    assert not status.active
    assert status.resolves_to.startswith("bitsandbytes itself, in ")


def test_op_schemas_are_bitsandbytes() -> None:
    real = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("bitsandbytes::"))
    ours = python(SCHEMAS.format(prelude="qcore; qcore.install_as_bitsandbytes()")).splitlines()
    assert len(real) >= 16
    assert sorted(ours) == real


def test_loading_the_shim_at_start_imports_no_torch() -> None:
    program = f"import sys; sys.path.insert(0, {str(SHIM)!r}); import qcore_bitsandbytes; print('torch' in sys.modules)"
    assert python(program).strip() == "False"


def test_two_packages_of_one_name_are_an_error_that_says_what_to_remove() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SHIM)!r}); import qcore_bitsandbytes\n"
        "from qcore.compat.metadata import shim_status\n"
        "print(shim_status().resolves_to)\n"
        "try:\n    import bitsandbytes\nexcept ImportError as error:\n    print(error)"
    )
    first, second = python(program).splitlines()
    assert first == "an error: bitsandbytes and its stand-in are both installed"
    assert "keep one: pip uninstall qcore-bitsandbytes, or pip uninstall bitsandbytes" in second


def test_the_distribution_is_not_built_beside_bitsandbytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(SHIM)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip uninstall bitsandbytes first" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
