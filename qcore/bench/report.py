"""What a run found, and its JSON: schema versioned, the machine named."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qcore.backend.registry import backend_for
from qcore.bench.measure import Samples
from qcore.bench.peers import PeerStatus
from qcore.errors import FormatError, OutputError

SCHEMA = 1
KIND = "qcore bench cpu"

# Whose versions decide what is measured; the benchmarks of models write this too.
_DISTRIBUTIONS = (
    "qcore-quant", "qcore-cpu", "torch", "bitsandbytes", "numpy", "transformers", "accelerate", "peft",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over ``rounds`` rounds of ``repeats`` calls each."""

    median: float
    low: float
    high: float
    rounds: int
    repeats: int

    @classmethod
    def of(cls, samples: Samples) -> Timing:
        low, high = samples.quartiles
        return cls(samples.median, low, high, len(samples.by_round), samples.repeats)


@dataclass(frozen=True)
class Floor:
    """The least time that the machine needs for the bytes and the operations of a workload, in the same rounds.

    Attributes
    ----------
    seconds : float
        Median over rounds.
    parts : mapping of str to float
        Median seconds of each loop, for the workload's own sizes: ``read``, ``write``, ``copy``, ``multiply``.
    bound : str
        ``"memory"`` or ``"multiply"``: which of them decides.
    over : float
        qcore's time over it, median of the ratios within rounds.
    """

    seconds: float
    parts: Mapping[str, float]
    bound: str
    over: float


@dataclass(frozen=True)
class Result:
    """One workload.

    Attributes
    ----------
    ratios : mapping of str to float
        Time of a call over that of qcore, median within rounds: above 1, qcore is faster.
    over_sum : mapping of str to float
        Time of a call over the sum of its parts (op ``alternate``).
    errors : mapping of str to str
        Peers that raised, and what.
    """

    op: str
    variant: str
    dtype: str
    shape: tuple[int, int]
    m: int | None
    threads: int
    timings: Mapping[str, Timing]
    ratios: Mapping[str, float]
    bytes_read: int = 0
    bytes_written: int = 0
    operations: int = 0
    unit: str | None = None
    floor: Floor | None = None
    over_sum: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.timings["qcore"].median

    @property
    def gb_per_s(self) -> float:
        return (self.bytes_read + self.bytes_written) / self.seconds / 1e9

    @property
    def tflop_per_s(self) -> float:
        return self.operations / self.seconds / 1e12


@dataclass
class Report:
    """A run, complete or interrupted."""

    schema: int
    kind: str
    command: str
    started: str  # ISO 8601, UTC
    seconds: float
    complete: bool
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    peers: Mapping[str, PeerStatus]
    loops: str  # the probe library that the floors were measured with, or "torch"
    units: Mapping[str, str]  # dtype of the factors -> unit that multiplies them
    rates: Mapping[str, float]  # of large loops: bytes a second, operations a second
    results: list[Result]


def machine(threads: int) -> dict[str, Any]:
    """What the figures are taken on."""
    said = backend_for("cpu").describe(torch.device("cpu"))
    return {
        "processor": said.device or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": said.arch,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "backend": said.name,
        "backend_sha256": said.library_sha256,
        "openmp": said.runtime.partition(" (")[0],
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _DISTRIBUTIONS},
        },
    }


class Load:
    """Who uses the processor, from when the object is made."""

    def __init__(self) -> None:
        self._began = self._busy(), time.process_time(), time.monotonic()

    def of_others(self) -> float | None:
        """The share of all cores that other processes have used since; None where the system does not say."""
        busy, own, wall = self._began
        now_busy, cores = self._busy(), os.cpu_count() or 1
        seconds = time.monotonic() - wall
        if now_busy is None or busy is None or seconds <= 0:
            return None
        return max(0.0, min(1.0, (now_busy - busy - (time.process_time() - own)) / (seconds * cores)))

    @staticmethod
    def _busy() -> float | None:
        """Seconds of CPU time that all processes have had, all cores together."""
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
            user, nice, system, _idle, _wait, irq, soft, steal = (int(field) for field in fields[:8])
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_json(report: Report, path: Path) -> None:
    """Write ``report``; rates that follow from other fields (GB/s, TFLOP/s) are written out for readers.

    Raises
    ------
    OutputError
        The file cannot be written; an older one still stands.
    """
    tree = asdict(report)
    for entry, result in zip(tree["results"], report.results, strict=True):
        entry["gb_per_s"], entry["tflop_per_s"] = result.gb_per_s, result.tflop_per_s
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"bench: {path}: cannot be written: {error}") from error


def read_json(path: Path) -> Report:
    """Read what :func:`write_json` wrote.

    Raises
    ------
    FormatError
        It cannot be read, is of another kind or schema, or lacks a field.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise FormatError(f"{path}: no JSON of `{KIND} --json`")
    if tree.get("schema") != SCHEMA:
        raise FormatError(f"{path}: schema {tree.get('schema')!r}, this version reads {SCHEMA}; run the bench again")
    try:
        results = [_result(entry) for entry in tree["results"]]
        peers = {name: PeerStatus(**entry) for name, entry in tree["peers"].items()}
        return Report(**{**tree, "results": results, "peers": peers})
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: not the fields of schema {SCHEMA}: {error}") from error


def _result(entry: Mapping[str, Any]) -> Result:
    known = {part.name for part in fields_of(Result)}
    values = {name: value for name, value in entry.items() if name in known}
    values["shape"] = tuple(entry["shape"])
    values["timings"] = {name: Timing(**timing) for name, timing in entry["timings"].items()}
    values["floor"] = None if entry["floor"] is None else Floor(**entry["floor"])
    return Result(**values)
