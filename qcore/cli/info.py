"""``qcore info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from qcore.backend.interface import OPS
from qcore.backend.registry import VARIABLE, backend_for, backend_report
from qcore.cli.console import console
from qcore.errors import QcoreError

_DISTRIBUTIONS = (
    "qcore-quant", "qcore-cpu", "torch", "numpy", "transformers", "accelerate", "peft", "safetensors", "gguf",
    "bitsandbytes",
)  # fmt: skip

_EXACT = 1 << 62


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show which backends there are, which can run here, why the rest cannot, and what to do about it."""
    report = collect()
    if as_json:
        console().print_json(data=report)
    else:
        _print(report)


def collect() -> dict[str, Any]:
    """Everything that ``qcore info --json`` prints."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpu_threads": torch.get_num_threads(),
        },
        "devices": _devices(),
        "selection": {"variable": VARIABLE, "value": os.environ.get(VARIABLE, ""), "serves": _serving()},
        "backends": {name: _plain(status) for name, status in backend_report().items()},
    }


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: a third party's description may hold anything."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": _processor()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append({"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory})
    return devices


def _processor() -> str:
    """The processor's name; ``platform`` knows the instruction set only, on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _serving() -> dict[str, dict[str, str]]:
    """Which backend each kind of tensor gets under the present selection, or why none."""
    serving = {}
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            serving[kind] = {"backend": backend_for(kind).name}
        except QcoreError as error:
            serving[kind] = {"error": str(error)}
    return serving


def _print(report: dict[str, Any]) -> None:
    out = console()
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in report["versions"].items())
    out.print(versions, soft_wrap=True)
    out.print(f"{report['platform']['system']}, {report['platform']['cpu_threads']} threads", soft_wrap=True)
    for device in report["devices"]:
        out.print(f"device {device['device']}: {device['name']}", soft_wrap=True)
    selected = report["selection"]
    setting = (
        f"{selected['variable']}={selected['value']}" if selected["value"] else f"{selected['variable']} is not set"
    )
    for kind, served in selected["serves"].items():
        by = f"served by {served['backend']}" if "backend" in served else f"not served: {served['error']}"
        out.print(f"{kind} tensors: {by} ({setting})", soft_wrap=True)
    table = Table(header_style="bold")
    for name in ("backend", "state", "device and library, or why not", "ops"):
        table.add_column(name, overflow="fold")
    for name, status in report["backends"].items():
        table.add_row(name, *_cells(status))
    out.print(table)


def _declared(value: Any) -> Any:
    """A declaration as it is read: more lanes than any sum has terms stand for an exact sum (QC-GEMM4-004)."""
    if isinstance(value, Mapping):
        return {key: _declared(item) for key, item in value.items()}
    return "exact" if isinstance(value, int) and value >= _EXACT else value


def _cells(status: dict[str, Any]) -> list[str]:
    if not status["available"]:
        fix = f"\nfix: {status['fix']}" if status["fix"] and status["fix"] not in status["reason"] else ""
        return ["not available", f"{status['reason']}{fix}", "-"]
    description = status["description"] or {}
    lines = [
        f"{description.get('device', '')} ({description.get('arch', '')})",
        status["origin"],
        description.get("library", ""),
    ]
    for name, value in (description.get("declarations") or {}).items():
        lines.append(f"{name}: {_declared(value)}")
    return [
        "available",
        "\n".join(line for line in lines if line),
        f"{len(description.get('ops') or {})} of {len(OPS)}",
    ]
