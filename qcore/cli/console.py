"""How the commands speak: sizes, tables, and a progress bar in bytes. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qcore.integrations.versions import check

# A pipe has no width; tables are made for a reader of the log.
_WIDTH_OF_A_LOG = 110


def console(*, stderr: bool = False, log_width: int = _WIDTH_OF_A_LOG) -> Console:
    """A console on stdout or stderr, wide enough for the tables where there is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else log_width
    return Console(file=stream, width=width, highlight=False)


def size(nbytes: float) -> str:
    """Bytes for a reader: 111.9 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def byte_progress() -> Progress:
    """A progress bar with bytes done, rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console(stderr=True),
    )


def quiet_transformers() -> None:
    """Keep Transformers' bars and advice out of the commands' output; its errors still show.

    Raises
    ------
    IncompatibleVersion
        Transformers or Accelerate is too old or not installed.
    """
    for library in ("transformers", "accelerate"):
        check(library, "this command")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
