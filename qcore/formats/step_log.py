"""What is written of an unfinished shard: ``SHARD.steps`` beside it, one line of JSON for each tensor's step.

A line is appended after the bytes that it vouches for. Nothing is flushed to the disk for it: whoever goes on reads the
bytes back and compares their SHA-256, so a line that outlived its bytes costs that step, no more.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepRecord:
    """One finished step: SHA-256 of the tensors it wrote, its late texts, squares of error and signal."""

    sha256: dict[str, str]
    late: dict[str, str]
    error: float
    signal: float


class StepLog:
    """The log of the shard at ``shard``."""

    def __init__(self, shard: Path) -> None:
        self.path = log_path(shard)

    def load(self) -> list[StepRecord]:
        """The steps in order, up to the first line that is not whole."""
        records: list[StepRecord] = []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except (FileNotFoundError, UnicodeDecodeError):
            return records
        for line in lines:
            try:
                records.append(StepRecord(**json.loads(line)))
            except (ValueError, TypeError):
                break
        return records

    def append(self, record: StepRecord) -> None:
        """Note one more step."""
        self._write(os.O_APPEND, [record])

    def rewrite(self, records: list[StepRecord]) -> None:
        """Hold these, and no others."""
        self._write(os.O_TRUNC, records)

    def remove(self) -> None:
        """The shard is finished, or given up."""
        self.path.unlink(missing_ok=True)

    def _write(self, flag: int, records: list[StepRecord]) -> None:
        text = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)


def log_path(shard: Path) -> Path:
    """Where the log of the shard at ``shard`` lies."""
    return shard.with_name(shard.name + ".steps")
