"""Imports point one way: nn, formats, cli -> functional -> ops -> backend, and nothing reaches into a backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A part of qcore may import parts of the ranks below its own. Parts of one rank do not know each other.
RANKS = [
    {"errors", "codebooks"},
    {"backend"},
    {"ops"},
    {"functional", "autotune"},
    {"autograd"},
    {"kernel_choice"},
    {"nn", "optim"},
    {"algorithms", "formats"},
    {"integrations", "bench"},
    {"compat"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
# What a backend and the conformance suite may know of qcore: the interface.
INTERFACE = {"backend", "errors", "codebooks"}
# The cases that check what the ops refuse before any backend is asked.
FRONTEND_CASES = "conformance/qcore_conformance/cases/frontend.py"


def imported(source: str) -> Iterator[str]:
    """Dotted names of every module that ``source`` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from qcore import nn` imports the part nn.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "build" not in path.relative_to(ROOT).parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def qcore_parts(path: Path) -> set[str]:
    """The parts of qcore that the file imports: {"backend", "errors"}."""
    names = (name.split(".") for name in imported(path.read_text(encoding="utf-8")))
    return {name[1] for name in names if name[0] == "qcore" and len(name) > 1}


def backend_packages() -> set[str]:
    """Import names of everything under backends/."""
    packages = {path.parent.name for path in (ROOT / "backends").glob("*/*/__init__.py")}
    assert packages >= {"qcore_cpu", "qcore_cpu_reference"}
    return packages


@pytest.mark.parametrize("path", files("qcore"), ids=relative)
def test_qcore_imports_downwards(path: Path) -> None:
    own = path.relative_to(ROOT / "qcore").parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return  # the public names come from every part
    assert own in RANK, f"{own}: give it a place in RANKS"
    upward = {part for part in qcore_parts(path) if part != own and RANK.get(part, len(RANKS)) >= RANK[own]}
    assert not upward


@pytest.mark.parametrize("path", files("qcore"), ids=relative)
def test_qcore_imports_no_backend_and_no_suite(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert not packages & {*backend_packages(), "qcore_conformance"}


@pytest.mark.parametrize("path", files("backends"), ids=relative)
def test_a_backend_knows_the_interface_only(path: Path) -> None:
    assert qcore_parts(path) <= INTERFACE
    others = backend_packages() - {path.relative_to(ROOT).parts[2]}
    packages = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert "tests" in path.parts or not packages & {*others, "qcore_conformance"}


@pytest.mark.parametrize("path", files("conformance"), ids=relative)
def test_conformance_knows_the_interface_only(path: Path) -> None:
    assert qcore_parts(path) <= (INTERFACE | {"ops"} if relative(path) == FRONTEND_CASES else INTERFACE)
    packages = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert not packages & backend_packages()
