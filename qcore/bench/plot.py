"""The roofline: products against memory and multipliers, and how far each op is from its floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcore.bench.report import Report, Result
from qcore.errors import InvalidArgument

SUFFIXES = (".png", ".svg")
_MARKERS = "osD^vP"


def check_path(path: Path) -> None:
    """Refuse a file name that is neither PNG nor SVG, and a missing matplotlib, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidArgument(f"bench: --plot {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InvalidArgument("bench: --plot needs matplotlib: pip install 'qcore-quant[conformance]'") from error


def roofline(report: Report, path: Path) -> None:
    """Draw ``report`` into ``path`` (PNG or SVG by its suffix).

    Left, products: operations a second over operations a byte, under the rate of memory and of each multiplier. Right,
    everything that has a floor: its time over the floor, worst first, at one shape.
    """
    check_path(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    products = [result for result in report.results if result.operations and result.floor is not None]
    _draw_roof(left, report, products)
    _draw_points(left, products)
    _draw_bars(right, [result for result in report.results if result.floor is not None])
    said = report.machine
    figure.suptitle(
        f"{said['processor']}, {said['isa']}, {said['threads']} threads, {report.started[:10]}"
        f"{'' if report.complete else ' (interrupted)'}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_roof(axes: Any, report: Report, products: Sequence[Result]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations / byte")
    axes.set_ylabel("TFLOP/s (int8: Top/s)")
    axes.set_title("products")
    if not products:
        axes.text(0.5, 0.5, "no product was measured", transform=axes.transAxes, ha="center")
        return
    intensities = [_intensity(result) for result in products]
    low, high = min(intensities) / 2, max(intensities) * 4
    points = [low * (high / low) ** (step / 200) for step in range(201)]
    units = sorted({result.unit for result in products if result.unit is not None})
    for index, unit in enumerate(units):
        peak = report.rates[unit]
        for name, style in (("read", "-"), ("read_8MB", ":")):
            memory = report.rates[name]
            label = f"{report.units[unit]}: {peak / 1e12:.2f} T/s" if style == "-" else None
            heights = [min(memory * x, peak) / 1e12 for x in points]
            axes.plot(points, heights, style, color=f"C{index}", linewidth=1, label=label)
    memory, cache = report.rates["read"] / 1e9, report.rates["read_8MB"] / 1e9
    axes.plot([], [], "k-", linewidth=1, label=f"memory: {memory:.0f} GB/s read")
    axes.plot([], [], "k:", linewidth=1, label=f"8 MB again and again: {cache:.0f} GB/s read")


def _draw_points(axes: Any, products: Sequence[Result]) -> None:
    names = list(dict.fromkeys((result.op, result.variant, result.dtype) for result in products))
    shapes = list(dict.fromkeys(result.shape for result in products))
    for index, (op, variant, dtype) in enumerate(names):
        for marker, shape in zip(_MARKERS * len(shapes), shapes):
            chosen = [r for r in products if (r.op, r.variant, r.dtype, r.shape) == (op, variant, dtype, shape)]
            label = " ".join(filter(None, (op, variant, dtype))) if shape == shapes[0] else None
            axes.plot(
                [_intensity(result) for result in chosen],
                [result.tflop_per_s for result in chosen],
                marker,
                color=f"C{index % 10}",
                alpha=0.8,
                markersize=5,
                label=label,
            )
    axes.grid(alpha=0.3)
    if names:
        marks = ", ".join(f"{marker} {n}x{k}" for marker, (n, k) in zip(_MARKERS, shapes))
        axes.legend(fontsize=7, title=marks, title_fontsize=7)


def _draw_bars(axes: Any, results: Sequence[Result]) -> None:
    axes.set_title("time / floor")
    if not results:
        axes.text(0.5, 0.5, "nothing with a floor was measured", transform=axes.transAxes, ha="center")
        return
    shape = results[0].shape
    rows = [(r.floor.over, _name(r)) for r in results if r.floor is not None and r.shape == shape]
    rows.sort()
    rows = rows[-60:]
    axes.barh(range(len(rows)), [over for over, _ in rows], color="C0")
    axes.axvline(1.0, color="k", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for _, name in rows], fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel(f"times the floor, {shape[0]}x{shape[1]}")


def _name(result: Result) -> str:
    rows = "" if result.m is None else f"M={result.m}"
    return " ".join(filter(None, (result.op, result.variant, result.dtype, rows)))


def _intensity(result: Result) -> float:
    return result.operations / (result.bytes_read + result.bytes_written)
