"""Quantizing one tensor after the other, in chunks of rows.

What is held at a time is a chunk of a weight in floating point and, for a 4-bit weight, one float32 per block of the
whole of it: nested statistics need every absmax before the first can be quantized, so they take a second pass, over
absmax alone. A ``Conv1D`` weight is held whole, because its rows are columns of the file.

The error that is reported is against the tensor as it was read, ``sqrt(sum((w - w')^2) / sum(w^2))`` with w'
dequantized in float32. With nested absmax, w' is known only after the chunks have gone by; with code value c, first
absmax a, decoded absmax a' and ``e = w - c a``, each block adds
``sum(e^2) + 2 (a - a') sum(e c) + (a - a')^2 sum(c^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcore import codebooks
from qcore.backend.interface import Weight4bit
from qcore.errors import FormatError
from qcore.formats.bitsandbytes import CODES, NESTED_BLOCKSIZE, FourBitLayout
from qcore.formats.plan import Step
from qcore.formats.shard_writer import ShardWriter
from qcore.formats.source import Source

# Elements of a chunk: 4 MB in bfloat16, 8 MB in float32; half a dozen arrays of this size are alive at a time, and stay
# in the processor's caches.
CHUNK_NUMEL = 2 << 20
_DOT_NUMEL = 1 << 20

Progress = Callable[[int], None]


@dataclass
class ErrorSum:
    """Squares of a tensor and of its quantization error."""

    error: float = 0.0
    signal: float = 0.0

    @property
    def relative(self) -> float:
        """Relative error, root mean square; 0 for a tensor of zeros."""
        return math.sqrt(self.error / self.signal) if self.signal else 0.0


def run_step(step: Step, source: Source, writer: ShardWriter, progress: Progress) -> ErrorSum:
    """Read, convert and write one tensor; ``progress`` is called with source bytes done.

    Raises
    ------
    FormatError
        A value is not finite, or does not fit the output's dtype; or the source cannot be read.
    OutputError
        The output cannot be written.
    """
    if step.action == "cast":
        return _cast(step, source, writer, progress)
    if step.action == "int8":
        return _int8(step, source, writer, progress)
    return _four_bit(step, source, writer, progress)


def _chunks(step: Step, source: Source, progress: Progress, multiple: int = 1) -> Iterator[Tensor]:
    """Rows in floating point; every chunk but the last has a multiple of ``multiple`` elements."""
    info = step.info
    shape = (info.shape[1], info.shape[0]) if step.transposed else info.shape
    row_numel = math.prod(shape[1:])
    group = math.lcm(info.row_group, multiple // math.gcd(multiple, max(1, row_numel)))
    rows = max(1, CHUNK_NUMEL // max(1, row_numel) // group) * group
    count = shape[0] if shape else 1
    whole = source.read_rows(info.name, 0, info.rows).t().contiguous() if step.transposed else None
    for start in range(0, count, rows):
        stop = min(count, start + rows)
        yield source.read_rows(info.name, start, stop) if whole is None else whole[start:stop]
        progress(info.nbytes * stop // count - info.nbytes * start // count)


def _squares(values: Tensor) -> float:
    # Float32 dot products of short pieces, added in float64: within 1e-5, where torch's float32 norm is off by 6e-4.
    flat = values.float().reshape(-1)
    pieces = (flat[start : start + _DOT_NUMEL] for start in range(0, flat.numel(), _DOT_NUMEL))
    return sum((float(torch.dot(piece, piece)) for piece in pieces), 0.0)


def _finite(step: Step, chunk: Tensor, squares: float) -> None:
    """Refuse NaN and infinities, which the squares have found for free; a finite overflow of them is let pass."""
    if not math.isfinite(squares):
        bad = int((~torch.isfinite(chunk)).sum())
        if bad:
            raise FormatError(
                f"tensor {step.info.name!r} has {bad} values that are NaN or infinite; the file is damaged"
            )


def _cast(step: Step, source: Source, writer: ShardWriter, progress: Progress) -> ErrorSum:
    total = ErrorSum()
    for chunk in _chunks(step, source, progress):
        signal = _squares(chunk) if chunk.dtype.is_floating_point else 0.0
        if step.finite:
            _finite(step, chunk, signal)
        out = chunk.to(step.dtype)
        writer.write(step.specs[0].name, out)
        if step.dtype != chunk.dtype:
            wide = torch.float64 if chunk.dtype == torch.float64 else torch.float32
            squares = _squares(out.to(wide) - chunk.to(wide))
            if not math.isfinite(squares) and bool(torch.isfinite(chunk).all()):
                raise FormatError(
                    f"tensor {step.info.name!r} has values beyond the range of {step.dtype}; use bfloat16"
                )
            total.error += squares
        total.signal += signal
    return total


def _quantizable(chunk: Tensor) -> Tensor:
    """The ops take 16- and 32-bit floats; wider ones are rounded to float32 first."""
    return chunk.float() if chunk.dtype == torch.float64 else chunk


def _int8(step: Step, source: Source, writer: ShardWriter, progress: Progress) -> ErrorSum:
    from qcore.ops.int8 import int8_dequantize_rows, int8_quantize_rows

    weight, scales, tag = (spec.name for spec in step.specs)
    total = ErrorSum()
    for chunk in map(_quantizable, _chunks(step, source, progress)):
        squares = _squares(chunk)
        _finite(step, chunk, squares)
        codes, row_stats, _ = int8_quantize_rows(chunk, 0.0)
        writer.write(weight, codes)
        writer.write(scales, row_stats)
        total.error += _squares(chunk.float() - int8_dequantize_rows(codes, row_stats, torch.float32))
        total.signal += squares
    writer.write(tag, torch.zeros((), dtype=torch.uint8))
    return total


def _four_bit(step: Step, source: Source, writer: ShardWriter, progress: Progress) -> ErrorSum:
    from qcore.ops.fourbit import quantize_4bit

    assert step.layout is not None
    layout, total = step.layout, ErrorSum()
    statistics = _BlockStatistics(layout)
    for chunk in map(_quantizable, _chunks(step, source, progress, multiple=layout.blocksize)):
        squares = _squares(chunk)
        _finite(step, chunk, squares)
        packed, absmax = quantize_4bit(chunk, layout.quant_type, layout.blocksize)
        writer.write(layout.weight, packed)
        total.error += statistics.add(chunk, packed, absmax)
        total.signal += squares
    writer.write(layout.quant_map, torch.tensor(CODES[layout.quant_type]))
    if layout.nested:
        total.error += _write_nested(layout, statistics, writer)
    else:
        writer.write(layout.absmax, statistics.absmax)
        writer.write_late(layout.state, layout.state_text(None))
    return total


def _write_nested(layout: FourBitLayout, statistics: _BlockStatistics, writer: ShardWriter) -> float:
    from qcore.ops.fourbit import dequantize_absmax, quantize_absmax

    code = torch.tensor(codebooks.DYNAMIC)
    codes, nested_absmax, offset = quantize_absmax(statistics.absmax, code, NESTED_BLOCKSIZE)
    writer.write(layout.absmax, codes)
    writer.write(layout.nested_absmax, nested_absmax)
    writer.write(layout.nested_quant_map, code)
    writer.write_late(layout.state, layout.state_text(float(offset)))
    return statistics.correction(dequantize_absmax(codes, nested_absmax, code, offset, NESTED_BLOCKSIZE))


class _BlockStatistics:
    """Absmax of every block, and the sums that give the error for another absmax (see the module's text)."""

    def __init__(self, layout: FourBitLayout) -> None:
        self._layout = layout
        self.absmax = torch.empty(layout.blocks)
        self._cross = torch.empty(layout.blocks if layout.nested else 0)
        self._codes = torch.empty_like(self._cross)
        self._done = 0

    def add(self, chunk: Tensor, packed: Tensor, absmax: Tensor) -> float:
        """Take in one chunk; returns its squared error with the absmax given."""
        from qcore.ops.fourbit import dequantize_4bit

        layout, blocks = self._layout, slice(self._done, self._done + absmax.numel())
        self.absmax[blocks] = absmax
        self._done += absmax.numel()
        parts = (layout.quant_type, layout.blocksize, tuple(chunk.shape))
        error = chunk.float() - dequantize_4bit(Weight4bit(packed.view(-1), absmax, *parts), torch.float32)
        if layout.nested:
            values = dequantize_4bit(Weight4bit(packed.view(-1), torch.ones_like(absmax), *parts), torch.float32)
            self._cross[blocks] = self._block_sums(error * values)
            self._codes[blocks] = self._block_sums(values.square_())
        return _squares(error)

    def _block_sums(self, values: Tensor) -> Tensor:
        flat, size = values.view(-1), self._layout.blocksize
        missing = -flat.numel() % size
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        return flat.view(-1, size).sum(1)

    def correction(self, decoded: Tensor) -> float:
        """What the squared error grows by when ``decoded`` takes the place of absmax."""
        change = (self.absmax - decoded).double()
        return float((change * (2 * self._cross.double() + change * self._codes.double())).sum())
