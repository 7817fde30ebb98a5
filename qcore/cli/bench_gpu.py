"""``qcore bench gpu``: measured, predicted and least time of every kernel."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from qcore.bench.gpu.devices import GPUS, Gpu, gpu, gpu_named
from qcore.bench.gpu.measure import Measured, measure_all
from qcore.bench.gpu.model import COPY_SHARE, LAUNCH, PRODUCT_SHARE, ROWS, SHAPES, Work, predict, workloads
from qcore.bench.run import parse_shape
from qcore.cli.console import console
from qcore.errors import InvalidArgument

KIND, SCHEMA = "qcore bench gpu", 1
NOT_YET = "not yet measured"
_WIDTH = 140


@click.command("gpu")
@click.option(
    "--device-model",
    help=f"Predict for this GPU and measure nothing: {', '.join(known.key for known in GPUS)}. "
    f"[default: the GPU that is here, measured; {GPUS[0].key} where there is none]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="OUTxIN",
    help=f"Of the weight. [default: {' '.join(f'{n}x{k}' for n, k in SHAPES)}]",
)
@click.option("--m", "rows", multiple=True, type=click.IntRange(1, 65536), help=f"Rows. [default: {ROWS}]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
def gpu_command(
    device_model: str | None, shapes: tuple[str, ...], rows: tuple[int, ...], json_path: Path | None
) -> None:
    """Judge the kernels of a GPU: what they take, what they should take, what no kernel can beat.

    Predictions follow from each kernel's bytes and operations and from the vendor's public figures. Without a GPU, or
    with --device-model, they stand alone.
    """
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    chosen = gpu_named(here) if here and not device_model else gpu(device_model or GPUS[0].key)
    if chosen is None:
        keys = ", ".join(known.key for known in GPUS)
        raise InvalidArgument(
            f"bench gpu: no public figures of {here} are in qcore/bench/gpu/devices.py; add them there, or predict for "
            f"another GPU with --device-model: {keys}"
        )
    works = list(workloads(tuple(parse_shape(text) for text in shapes) or SHAPES, rows or ROWS))
    measured: dict[Work, Measured | str] = {}
    if here and not device_model:
        measured = dict(measure_all(works, torch.device("cuda", torch.cuda.current_device())))
    _print(chosen, works, measured, here)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(_report(chosen, works, measured, here), indent=1) + "\n", encoding="utf-8")


def _print(chosen: Gpu, works: list[Work], measured: dict[Work, Measured | str], here: str | None) -> None:
    out = console(log_width=_WIDTH)
    if here is None:
        out.print(
            f"This PyTorch ({torch.__version__}) sees no GPU: what follows is predicted, for another.",
            soft_wrap=True,
        )
    out.print(
        f"{chosen.name} ({chosen.arch}): {chosen.bandwidth / 1e12:.2f} TB/s, {chosen.f16 / 1e12:.0f} TFLOP/s in 16 "
        f"bits, {chosen.int8 / 1e12:.0f} TOP/s in int8; {' '.join(chosen.sources)}",
        soft_wrap=True,
    )
    state = f"measured on {here}" if measured else NOT_YET
    out.print(
        f"Predictions: copies at {COPY_SHARE:.0%} of the bandwidth, products at {PRODUCT_SHARE:.0%} of the rate, "
        f"{LAUNCH * 1e6:.0f} us a kernel. {state[0].upper()}{state[1:]}.",
        soft_wrap=True,
    )
    table = Table(title="microseconds")
    table.add_column("workload", overflow="fold")
    for name in ("measured", "predicted", "floor", "measured/predicted", "floor/measured"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for work in works:
        expected, found = predict(work, chosen), measured.get(work)
        took, against, share = NOT_YET, "", ""
        if isinstance(found, Measured):
            took = f"{found.seconds * 1e6:.1f}{'' if found.captured else ' (host included)'}"
            against, share = f"{found.seconds / expected.predicted:.2f}", f"{expected.floor / found.seconds:.0%}"
        elif found is not None:
            took = found
        times = (f"{expected.predicted * 1e6:.1f}", f"{expected.floor * 1e6:.1f}")
        table.add_row(work.label, took, *times, against, share, expected.bound)
    out.print(table)


def _report(chosen: Gpu, works: list[Work], measured: dict[Work, Measured | str], here: str | None) -> dict[str, Any]:
    results = []
    for work in works:
        found = measured.get(work, NOT_YET)
        said = asdict(found) if isinstance(found, Measured) else found
        results.append({"workload": work.label, **asdict(work), **asdict(predict(work, chosen)), "measured": said})
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "command": shlex.join(["qcore", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else KIND,
        "model": asdict(chosen),
        "here": here,
        "assumed": {"copy_share": COPY_SHARE, "product_share": PRODUCT_SHARE, "launch_seconds": LAUNCH},
        "results": results,
    }
