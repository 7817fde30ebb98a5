"""The demo: a real language model, quantized to int8, NF4 and FP4, writing text and being measured.

``make demo``, or ``python -m qcore.cli.demo``. The model and a text come out of two packages (see ``demo_inputs.py``).
How much text is measured follows from how fast the machine is, and is said in the table's title.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from qcore.backend.registry import backend_for, backend_report
from qcore.bench.report import Load, machine, now
from qcore.cli.console import console, quiet_transformers, size
from qcore.cli.demo_inputs import default_cache, fetch_articles, fetch_model
from qcore.cli.generate import chat_inputs, stream
from qcore.cli.main import report_errors
from qcore.cli.main import run as run_qcore
from qcore.cli.tokenizer import load_tokenizer
from qcore.errors import FormatError
from qcore.integrations.checkpoint import load_model
from qcore.integrations.perplexity import perplexity, pydoc_topics, tokens_of

SCHEMA = 1  # of the JSON
FORMATS = ("int8", "nf4", "fp4")
WINDOW = 512
# Tokens of the probe that says how fast this machine is, and the fewest that are measured on a slow one.
_PROBE, _FEWEST = 48, 64
# Above this, perplexity against that of the float model says that something is broken. On many tokens the ratios are
# 1.004, 1.3 and 1.5; on the few of a slow machine they vary.
_BROKEN = {"int8": 1.08, "nf4": 1.6, "fp4": 2.0}


@dataclass
class Row:
    """One line of the table."""

    name: str
    folder: Path
    dtype: torch.dtype
    nbytes: int = 0
    prompt_rate: float = 0.0
    decode_rate: float = 0.0
    perplexities: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """What the JSON holds of it."""
        return {
            "weights": self.name,
            "bytes": self.nbytes,
            "prompt_tokens_per_s": self.prompt_rate,
            "decode_tokens_per_s": self.decode_rate,
            "perplexities": self.perplexities,
        }


@click.command()
@click.option("--prompt", default="Why is the sky blue?", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(2), default=48, show_default=True)
@click.option(
    "--tokens", type=click.IntRange(_FEWEST), default=8192, show_default=True, help="Most to measure, a text."
)
@click.option("--budget", type=float, default=120, show_default=True, help="Seconds for the measurements, about.")
@click.option("--cache", type=click.Path(path_type=Path), default=default_cache, help="Folder for model and results.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--smoke", is_flag=True, help="NF4 and Python's own text alone, as short as possible.")
def demo(
    prompt: str, max_new_tokens: int, tokens: int, budget: float, cache: Path, json_path: Path | None, smoke: bool
) -> None:
    """Quantize SmolLM2-135M-Instruct to each format, let it write, and measure what it lost."""
    began, started, load = time.monotonic(), now(), Load()
    quiet_transformers()
    cache.mkdir(parents=True, exist_ok=True)
    slow = _announce_backend()
    if smoke:
        max_new_tokens, tokens, budget = 8, 256, min(budget, 20)
    elif slow:
        max_new_tokens = 12
    rows = _quantize(cache, ("nf4",) if smoke else FORMATS)
    for row in rows:
        _generate(row, prompt, max_new_tokens)
    texts = _texts(cache, smoke)
    count, window = _measure(rows, texts, tokens, budget)
    if json_path is not None:
        facts = machine(torch.get_num_threads()) | {"others_cpu_share": load.of_others()}
        settings = {"texts": list(texts), "tokens": count, "window": window}
        tree = {"schema": SCHEMA, "kind": "qcore demo", "started": started, "machine": facts, **settings}
        tree["rows"] = [row.figures() for row in rows]
        json_path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    console().print(f"Done in {time.monotonic() - began:.0f} s; everything is in {cache}.")
    _check(rows)


def _announce_backend() -> bool:
    """Say which backend computes; returns whether it is the slow reference."""
    name = backend_for("cpu").name
    if name != "cpu_reference":
        console().print(f"Backend: {name}, {torch.get_num_threads()} threads.")
        return False
    reason = backend_report()["cpu"].reason or "QCORE_BACKEND asks for it"
    console().print(
        f"Backend: cpu_reference, because: {reason}\n"
        "It is the NumPy meaning of each op: right, but far slower than the native backend, so this demo "
        "writes and measures less. For the native one install g++ and run `make demo` again."
    )
    return True


def _qcore(*args: object) -> None:
    words = [str(arg) for arg in args]
    console().print(f"\n$ qcore {shlex.join(words)}", style="bold", soft_wrap=True)
    code = run_qcore(words)
    if code:
        sys.exit(code)


def _quantize(cache: Path, formats: tuple[str, ...]) -> list[Row]:
    gguf = fetch_model(cache)
    source = cache / "SmolLM2-135M"
    if not (source / "config.json").is_file():
        _qcore("quantize", gguf, "-o", source, "--format", "float")
    dtype = _fast_dtype()
    rows = [Row("float32", source, torch.float32)]
    if dtype != torch.float32:
        rows.append(Row(str(dtype).removeprefix("torch."), source, dtype))
    for name in formats:
        _qcore("quantize", source, "-o", cache / f"SmolLM2-135M-{name}", "--format", name, "--force")
        rows.append(Row(name, cache / f"SmolLM2-135M-{name}", dtype))
    for row in rows:
        stored = sum(file.stat().st_size for file in row.folder.glob("*.safetensors"))
        row.nbytes = 2 * stored if row.name == "float32" else stored
    return rows


def _fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        return min(times)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def _generate(row: Row, prompt: str, max_new_tokens: int) -> None:
    console().print(f"\n{row.name} writes:", style="bold")
    tokenizer = load_tokenizer(row.folder)
    inputs = chat_inputs(tokenizer, prompt)
    model = load_model(row.folder, dtype=row.dtype)
    streamer = stream(model, tokenizer, inputs, max_new_tokens, {})
    row.prompt_rate = inputs.numel() / streamer.prompt_seconds
    row.decode_rate = streamer.decode_rate


def _texts(cache: Path, smoke: bool) -> dict[str, str]:
    texts = {"Python's manual": pydoc_topics()}
    if not smoke:
        try:
            texts["Wikipedia"] = fetch_articles(cache).read_text(encoding="utf-8")
        except FormatError as error:
            console().print(f"No Wikipedia text: {error}", soft_wrap=True)
    return texts


def _measure(rows: list[Row], texts: dict[str, str], tokens: int, budget: float) -> tuple[int, int]:
    """Fill in the perplexities; returns the tokens of each text and of a window."""
    tokenizer = load_tokenizer(rows[0].folder)
    probe = tokens_of(tokenizer, next(iter(texts.values())), _PROBE, _PROBE)
    model = load_model(rows[-1].folder, dtype=rows[-1].dtype)
    perplexity(model, probe[:, :2])
    began = time.monotonic()
    perplexity(model, probe)
    rate = _PROBE / (time.monotonic() - began)
    affordable = int(budget * rate / (len(texts) * len(rows)))
    count = max(_FEWEST, min(tokens, affordable))
    window = min(WINDOW, count)
    windows = [tokens_of(tokenizer, text, count, window) for text in texts.values()]
    for row in rows:
        model = load_model(row.folder, dtype=row.dtype)
        row.perplexities = [perplexity(model, ids) for ids in windows]
    _print_table(rows, list(texts), windows[0].numel(), window)
    return windows[0].numel(), window


def _print_table(rows: list[Row], texts: list[str], tokens: int, window: int) -> None:
    table = Table(title=f"SmolLM2-135M-Instruct; perplexity on {tokens} tokens in windows of {window}")
    table.add_column("weights")
    for name in ("bytes", "smaller", "prompt tok/s", "decode tok/s", *texts):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [size(row.nbytes), f"{rows[0].nbytes / row.nbytes:.2f}x", f"{row.prompt_rate:.0f}"]
        cells += [f"{row.decode_rate:.1f}", *(f"{value:.2f}" for value in row.perplexities)]
        table.add_row(row.name, *cells)
    console().print()
    console().print(table)


def _check(rows: list[Row]) -> None:
    """Fail where a format has lost more than it can have."""
    for row in rows:
        for value, base in zip(row.perplexities, rows[0].perplexities, strict=True):
            if not value < base * _BROKEN.get(row.name, 1.02):
                raise FormatError(
                    f"demo: {row.name} has perplexity {value:.2f} where float32 has {base:.2f}; it is broken"
                )


if __name__ == "__main__":
    sys.exit(report_errors(lambda: demo.main(prog_name="demo", standalone_mode=False)))
