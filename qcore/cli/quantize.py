"""``qcore quantize``."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource
from rich.progress import Progress, TaskID
from rich.table import Table

from qcore.backend.registry import use_backend
from qcore.cli.console import byte_progress, console, quiet_transformers, size
from qcore.cli.text import read_text
from qcore.cli.tokenizer import source_tokenizer
from qcore.errors import InvalidArgument
from qcore.formats.output import check_target
from qcore.formats.plan import Options, Plan, make_plan
from qcore.formats.quantization_config import GROUPED
from qcore.formats.quantize import KindRow, Listener, planned_rows, quantize_checkpoint
from qcore.formats.source import open_source
from qcore.integrations.calibrated import calibration_windows, make_blocks

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class _Size(click.ParamType[int]):
    """A number of bytes: 500MB, 2GB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip(), re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            self.fail(f"{value!r} is not a size like 500MB or 2GB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder that is made.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["nf4", "fp4", "int8", "gptq", "awq", "float"]),
    default="nf4",
    show_default=True,
    help="Format of the linear layers; float only converts (a GGUF file to safetensors).",
)
@click.option("--blocksize", type=int, default=64, show_default=True, help="Elements a scale: 32 to 4096 (nf4, fp4).")
@click.option(
    "--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the scales too (nf4, fp4)."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="UTF-8 text to calibrate with (gptq, awq). Without it, pass --round-to-nearest.",
)
@click.option("--round-to-nearest", is_flag=True, help="Quantize without calibration (gptq, awq): much less accurate.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs a scale; -1: one (gptq, awq).")
@click.option("--sym/--asym", default=True, show_default=True, help="Without or with zero points (gptq, awq).")
@click.option("--act-order", is_flag=True, help="Quantize columns by falling importance (gptq).")
@click.option("--damping", type=float, default=0.05, show_default=True, help="Of the Hessian's diagonal (gptq).")
@click.option("--windows", type=int, default=128, show_default=True, help="Pieces of the text (gptq, awq).")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens a piece (gptq, awq).")
@click.option(
    "--skip",
    multiple=True,
    metavar="GLOB",
    help="Leave these layers in floating point: a full name, its last part, or an enclosing module. May be repeated.",
)
@click.option("--quantize-head", is_flag=True, help="Quantize the output head too; it must not share its weight.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of what is not quantized; auto: the checkpoint's, bfloat16 if it states none.",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="That 4-bit layers compute in; auto: as --dtype.",
)
@click.option("--shard-size", type=_Size(), default="2GB", show_default=True, help="Largest weight file.")
@click.option("--keep-unknown", is_flag=True, help="Copy tensors that the model class does not have.")
@click.option("--force", is_flag=True, help="Replace OUT; it is kept until the new one is complete.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@click.option("--backend", metavar="SPEC", help="Backend to quantize with, as QCORE_BACKEND.")
def command(
    model: Path,
    out: Path,
    format_: str,
    blocksize: int,
    double_quant: bool,
    calibration: Path | None,
    round_to_nearest: bool,
    group_size: int,
    sym: bool,
    act_order: bool,
    damping: float,
    windows: int,
    window: int,
    skip: tuple[str, ...],
    quantize_head: bool,
    dtype: str,
    compute_dtype: str,
    shard_size: int,
    keep_unknown: bool,
    force: bool,
    restart: bool,
    dry_run: bool,
    backend: str | None,
) -> None:
    """Quantize MODEL, a folder with safetensors files or a GGUF file, into the folder OUT.

    OUT loads in Transformers with bitsandbytes (nf4, fp4, int8) or GPTQModel (gptq, awq), and with `qcore generate`.
    Weights stream tensor by tensor, or for gptq and awq block by block, so memory does not grow with the model. OUT
    appears when it is complete and has been read back; until then the work is in OUT.partial, and after an interruption
    the same command goes on there.
    """
    if format_ not in ("nf4", "fp4"):
        _refuse_4bit_options(format_)
    text = _calibration(format_, calibration, round_to_nearest)
    options = Options(
        format=format_,
        blocksize=blocksize,
        double_quant=double_quant,
        dtype=None if dtype == "auto" else dtype,
        compute_dtype=None if compute_dtype == "auto" else compute_dtype,
        skip=skip,
        quantize_head=quantize_head,
        keep_unknown=keep_unknown,
        shard_bytes=shard_size,
        group_size=group_size,
        symmetric=sym,
        act_order=act_order,
        damping=damping,
        calibration=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        windows=windows,
        window=window,
    )
    quiet_transformers()
    with nullcontext() if backend is None else use_backend(backend):
        if dry_run:
            _dry_run(model, out, options, force)
        else:
            _run(model, out, options, force, restart, text)


def _refuse_4bit_options(format_: str) -> None:
    """An option that the format has no use for would be ignored."""
    context = click.get_current_context()
    for name, option in (("blocksize", "--blocksize"), ("double_quant", "--double-quant/--no-double-quant")):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option} is for nf4 and fp4; --format {format_} has no blocks", context)


def _dry_run(model: Path, out: Path, options: Options, force: bool) -> None:
    check_target(out, model, force)
    source = open_source(model)
    try:
        plan = make_plan(source, options)
    finally:
        source.close()
    _print_table(planned_rows(plan), errors=False)
    _tell_of_experts(plan.experts, options.format)
    console().print(f"{len(plan.shards)} weight file(s), at most {size(plan.nbytes)}; nothing was written.")


def _tell_of_experts(names: Sequence[str], format_: str) -> None:
    """Say that fused experts were left out, which often are most of a model, and what takes them."""
    if names:
        why = f"{format_} has no place for them" if format_ in GROUPED else "they are quantized in Python alone"
        click.echo(
            f"warning: {len(names)} fused expert weights stay in floating point, such as {names[0]}: {why}. "
            'AutoModelForCausalLM.from_pretrained(..., quantization_config=qcore.QcoreConfig("nf4")) takes them too',
            err=True,
        )


def _calibration(format_: str, path: Path | None, nearest: bool) -> str | None:
    """The text to calibrate with; None for formats that need none, or to round to nearest."""
    if format_ not in GROUPED:
        if path is not None or nearest:
            raise InvalidArgument(f"--calibration, --round-to-nearest: {format_} needs no calibration; leave them out")
        return None
    if nearest != (path is None):
        raise InvalidArgument(f"--format {format_}: pass a text with --calibration, or --round-to-nearest")
    return None if path is None else read_text("--calibration", path)


def _run(model: Path, out: Path, options: Options, force: bool, restart: bool, text: str | None) -> None:
    began = time.monotonic()
    bar = _Bar(options.format)
    make = None
    if options.format in GROUPED:
        tokens = None
        if text is not None:
            tokens = calibration_windows(source_tokenizer(model), text, options.windows, options.window)
        make = partial(make_blocks, tokens, options)
    try:
        report = quantize_checkpoint(model, out, options, force=force, restart=restart, listener=bar, make=make)
    except KeyboardInterrupt:
        bar.close()
        click.echo("qcore: the same command goes on where this one stopped", err=True)
        raise
    finally:
        bar.close()
    seconds = time.monotonic() - began
    _print_table(report.rows, errors=True)
    _tell_of_experts(report.experts, options.format)
    for name in report.dropped:
        click.echo(f"not written, because it equals another tensor or the model does not use it: {name}", err=True)
    rate = size(report.before / seconds)
    console().print(
        f"{out}: {size(report.before)} -> {size(report.after)} ({report.before / report.after:.2f}x) "
        f"in {seconds:.1f} s ({rate}/s), verified."
    )


def _print_table(rows: list[KindRow], *, errors: bool) -> None:
    table = Table(title=None, header_style="bold")
    for name in ("layers", "to", "tensors", "parameters", "before", "after", "bits"):
        table.add_column(name, justify="left" if name in ("layers", "to") else "right")
    if errors:
        table.add_column("error, rms", justify="right")
        table.add_column("worst", justify="right")
    for row in rows:
        bits = f"{8 * row.after / row.numel:.2f}" if row.numel else "-"
        cells = [row.kind, row.action, str(row.tensors), f"{row.numel:,}", size(row.before), size(row.after), bits]
        if errors:
            cells += [f"{row.relative:.2%}", f"{row.worst:.2%}"] if row.error else ["0", "0"]
        table.add_row(*cells)
    console().print(table)


class _Bar(Listener):
    """Shows a run on a progress bar of source bytes, from the moment when it is planned."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown: tuple[Progress, TaskID] | None = None

    def planned(self, plan: Plan) -> None:
        progress = byte_progress()
        progress.start()
        self._shown = progress, progress.add_task(self._title, total=sum(step.info.nbytes for step in plan.steps))

    def kept(self, shard: str, nbytes: int) -> None:
        if self._shown is not None:
            self._shown[0].console.print(f"{shard}: kept from the interrupted run, verified")
        self.read(nbytes)

    def resumed(self, shard: str, tensors: int, of: int, nbytes: int) -> None:
        if self._shown is not None:
            self._shown[0].console.print(f"{shard}: {tensors} of {of} tensors kept from the interrupted run, verified")
        self.read(nbytes)

    def read(self, nbytes: int) -> None:
        if self._shown is not None:
            progress, task = self._shown
            progress.update(task, advance=nbytes, description=self._title)

    def calibrated(self, block: int, count: int) -> None:
        if self._shown is not None:
            progress, task = self._shown
            progress.update(task, description=f"{self._title}: block {block} of {count}")

    def verifying(self, shard: str) -> None:
        if self._shown is not None:
            progress, task = self._shown
            progress.update(task, description=f"verifying {shard}")

    def close(self) -> None:
        """Take the bar off the screen; more than once does no harm."""
        if self._shown is not None:
            self._shown[0].stop()
            self._shown = None
