"""``qcore eval``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qcore.backend.registry import use_backend
from qcore.cli.console import console, quiet_transformers
from qcore.cli.text import read_text
from qcore.cli.tokenizer import load_tokenizer
from qcore.errors import FormatError
from qcore.formats.plan import FLOATS
from qcore.integrations.checkpoint import load_model
from qcore.integrations.perplexity import perplexity, pydoc_topics, tokens_of


@click.command("eval")
@click.argument("models", metavar="MODEL...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--against", type=click.Path(path_type=Path), help="The float checkpoint; every loss is shown beside it.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text; Python's own reference manual if left out.")
@click.option("--tokens", type=click.IntRange(2), default=16384, show_default=True, help="Tokens of the text to use.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens a window.")
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", *FLOATS]),
    default="auto",
    show_default=True,
    help="To compute in; auto: the checkpoint's own.",
)
@click.option("--backend", metavar="SPEC", help="Backend to compute with, as QCORE_BACKEND.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    models: tuple[Path, ...],
    against: Path | None,
    text: Path | None,
    tokens: int,
    window: int,
    compute_dtype: str,
    backend: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of each MODEL folder on a text, in windows without context."""
    quiet_transformers()
    content = pydoc_topics() if text is None else read_text("--text", text)
    dtype = None if compute_dtype == "auto" else FLOATS[compute_dtype]
    rows: list[tuple[Path, float, float]] = []
    with nullcontext() if backend is None else use_backend(backend):
        for path in ([against] if against else []) + list(models):
            windows = tokens_of(load_tokenizer(path), content, tokens, window)
            model = load_model(path, dtype=dtype, device=device)
            began = time.monotonic()
            value = _measure(model, windows, path.name)
            rows.append((path, value, windows.numel() / (time.monotonic() - began)))
    if as_json:
        result = {str(path): {"perplexity": value, "tokens_per_second": rate} for path, value, rate in rows}
        console().print_json(data={"tokens": windows.numel(), "window": window, "models": result})
    else:
        _print_table(rows, against is not None)


def _measure(model: torch.nn.Module, windows: torch.Tensor, name: str) -> float:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{name}: tokens", total=windows.numel())
        value = perplexity(model, windows, lambda count: progress.advance(task, count))
    if value != value:
        raise FormatError(f"{name}: its loss is NaN; the checkpoint is damaged, or its dtype overflows")
    return value


def _print_table(rows: list[tuple[Path, float, float]], relative: bool) -> None:
    table = Table(header_style="bold")
    table.add_column("model")
    for name in ("perplexity", "tokens/s"):
        table.add_column(name, justify="right")
    if relative:
        table.add_column("against the first", justify="right")
    for path, value, rate in rows:
        cells = [path.name, f"{value:.3f}", f"{rate:.0f}"]
        table.add_row(*cells, *([f"{value / rows[0][1] - 1:+.2%}"] if relative else []))
    console().print(table)
