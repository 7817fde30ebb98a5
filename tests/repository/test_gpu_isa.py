"""The committed record of the GPU kernels' machine code is whole, and within the rules of now."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs" / "results" / "gpu-isa.json").read_text(encoding="utf-8"))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("gpu_isa", ROOT / "tools" / "gpu_isa.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_isa", module)
    spec.loader.exec_module(module)
    return module


def kernels(tool: Any) -> list[Any]:
    return [tool.Kernel(**dict(zip(RECORD["columns"], row, strict=True))) for row in RECORD["kernels"]]


def test_no_recorded_kernel_breaks_a_rule(tool: Any) -> None:
    assert tool.breaches(kernels(tool)) == []


def test_a_spilled_register_would_be_found(tool: Any) -> None:
    one = kernels(tool)[0]
    spilled = type(one)(**{**vars(one), "spills": 1})
    assert len(tool.breaches([spilled])) == 1


def test_every_kernel_of_the_source_is_recorded_for_every_target(tool: Any) -> None:
    sources = [path for kind in ("*.cu", "*.cuh") for path in (ROOT / "backends" / "kernels").glob(kind)]
    written = {name for path in sources for name in re.findall(r"\b(\w+_kernel)\s*\(", path.read_text("utf-8"))}
    recorded = {(kernel.target, kernel.name.partition("<")[0]) for kernel in kernels(tool)}
    assert recorded == {(target, name) for target in tool.TARGETS for name in written}, "run nox -s isa"
