"""The wheel holds what it needs, and works with nothing but its three dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Everything that is an extra: importing one of them in the core is an error.
EXTRAS = ["accelerate", "bitsandbytes", "click", "gguf", "jinja2", "matplotlib", "peft", "rich", "safetensors"]
EXTRAS += ["transformers"]

PROGRAM = """
import sys
sys.modules.update(dict.fromkeys({extras}))
import torch, qcore
from qcore.backend import abi
assert qcore.__file__.startswith({folder!r}), qcore.__file__
assert sys.modules["qcore.backend._abi"].ffi is abi.ffi, "the header was parsed at import"
with qcore.use_backend("cpu_reference"):
    packed, state = qcore.functional.quantize_4bit(torch.tensor([[1.0, -1.0, 0.0, 0.5]]), quant_type="nf4")
    print(qcore.functional.dequantize_4bit(packed, state).tolist())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so", "_abi.py", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=skip)
    shutil.copy(ROOT / ".gitignore", source)
    command = ["pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_pure_python_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    needed = {
        "qcore/py.typed",
        "qcore/backend/_abi.py",
        "qcore/include/qcore_backend.h",
        "qcore/include/qcore_codebooks.h",
        "qcore_cpu_reference/__init__.py",
        "qcore_conformance/cli.py",
    }
    assert needed <= names
    # Templates of reports and whatever else is read at run time.
    data = {path for path in (ROOT / "conformance").rglob("*") if path.suffix in {".j2", ".toml", ".json", ".css"}}
    assert {str(path.relative_to(ROOT / "conformance")) for path in data} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "qcore",
        "qcore_conformance",
        "qcore_cpu_reference",
        "qcore_quant",
    }
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert "License-Expression: MIT" in metadata
    assert "cpu_reference = qcore_cpu_reference:load" in entry_points


def test_the_wheel_runs_without_any_extra(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    program = PROGRAM.format(extras=EXTRAS, folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[[1.0, -1.0, 0.0, 0.44070982933044434]]"
