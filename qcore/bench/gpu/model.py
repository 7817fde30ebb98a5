"""Bytes, operations and time of every GPU kernel, from its memory picture (the head of each file of backends/kernels).

Three times of one workload stand beside each other:

floor
    The least that the public figures allow: each byte moved once at full bandwidth, or all operations of the product at
    full rate, whichever takes longer. No kernel reaches it.
predicted
    What the kernel as it is written should take: what it moves, reads that come again included, at the share of the
    bandwidth that a copy reaches; its instructions on the vector units, decoding above all; its products; the largest
    of the three, for they overlap; and its launches.
measured
    ``measure``, where there is a GPU.

A measured time far above the prediction means that the kernel does not do what its file says, and the part of the
prediction that is largest says where to look. Far below it, the model is wrong: mend it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qcore.bench.gpu.devices import Gpu

# What the prediction assumes; each is a figure of common experience, none is a vendor's.
COPY_SHARE = 0.90  # of the public bandwidth, for a kernel that only copies
PRODUCT_SHARE = 0.70  # of the matrix units' rate, for mma.sync, MFMA or WMMA out of registers
LAUNCH = 2e-6  # seconds a kernel in a graph, start and end

# Instructions of a lane for one element, counted in the source: shifts, masks, lookups, products, conversions.
_SEARCH_8BIT = 32  # eight steps of a search in 256 keys
_SEARCH_4BIT = 20  # four steps of a search in 16 thresholds
_DECODE_8BIT = 5
_DECODE_4BIT = 6
_DECODE_INT4 = 5  # no lookup: a mask, a subtraction
_DECODE_ACROSS = 8  # of columns: a code comes alone, and so does its scale
_DECODE_INT8 = 5  # a conversion, two products, half of one that packs two, a share of reads and writes
_ROUND_INT8 = 14  # statistic, then product, rounding and limits
_FROM_INT32 = 8

BLOCK_4BIT, BLOCK_8BIT, GROUP_INT4 = 64, 256, 128
ROWS_OF_TILE = 128  # of X for one reading of W: tiled.cuh and int8_tiles.cuh, for more than 16 rows
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
ROWS = (1, 8, 16, 64, 512, 2048)


@dataclass(frozen=True)
class Work:
    """One workload.

    Attributes
    ----------
    op, variant : str
        ``measure`` makes the calls of these.
    m : int, optional
        Rows of activations; None for an op that has no product.
    n, k : int
        The weight, or the whole matrix.
    read, written : int
        Bytes that have to be moved.
    operations : int
        Multiplications and additions of the product.
    unit : str
        ``"f16"`` or ``"int8"``, whose rate counts for them; ``""`` without a product.
    instructions : int
        Of lanes of the vector units.
    again : int
        Bytes read once more in each further pass over the weight.
    passes : int
        Times that the weight is read and decoded.
    launches : int
        Kernels.
    """

    op: str
    variant: str
    m: int | None
    n: int
    k: int
    read: int
    written: int
    operations: int = 0
    unit: str = ""
    instructions: int = 0
    again: int = 0
    passes: int = 1
    launches: int = 1

    @property
    def label(self) -> str:
        rows = "" if self.m is None else f"M={self.m} "
        return f"{self.op} {self.variant} {rows}N={self.n} K={self.k}"


@dataclass(frozen=True)
class Prediction:
    """Seconds; ``bound`` names the largest part of ``predicted``: memory, product, decoding or launch."""

    floor: float
    predicted: float
    bound: str


def predict(work: Work, gpu: Gpu) -> Prediction:
    """Floor and prediction of one workload on one GPU."""
    rate = {"f16": gpu.f16, "int8": gpu.int8, "": math.inf}[work.unit]
    moved = work.read + work.written
    # A weight that the last cache holds is read from there in the passes after the first.
    again = work.again * (work.passes - 1) if work.again > gpu.cache else 0
    parts = {
        "memory": (moved + again) / (gpu.bandwidth * COPY_SHARE),
        "product": work.operations / (rate * PRODUCT_SHARE),
        "decoding": work.instructions / gpu.lanes,
        "launch": work.launches * LAUNCH,
    }
    busy = max(parts["memory"], parts["product"], parts["decoding"])
    floor = max(moved / gpu.bandwidth, work.operations / rate)
    return Prediction(floor, busy + parts["launch"], max(parts, key=lambda part: parts[part]))


def elementwise(n: int, k: int) -> Iterator[Work]:
    """The ops that have no product, on a bfloat16 matrix of ``n`` by ``k``."""
    size = n * k
    scales8, scales4 = 4 * math.ceil(size / BLOCK_8BIT), 4 * math.ceil(size / BLOCK_4BIT)
    half = math.ceil(size / 2)
    yield Work("quantize_blockwise", "bf16", None, n, k, 2 * size, size + scales8, instructions=_SEARCH_8BIT * size)
    yield Work("dequantize_blockwise", "bf16", None, n, k, size + scales8, 2 * size, instructions=_DECODE_8BIT * size)
    yield Work("quantize_4bit", "nf4 bf16", None, n, k, 2 * size, half + scales4, instructions=_SEARCH_4BIT * size)
    yield Work("dequantize_4bit", "nf4 bf16", None, n, k, half + scales4, 2 * size, instructions=_DECODE_4BIT * size)
    yield Work("int8_quantize_rows", "bf16", None, n, k, 2 * size, size + 4 * n, instructions=_ROUND_INT8 * size)
    # Statistics of columns need all rows before the first code: two kernels after one that clears, two readings.
    yield Work(
        "int8_quantize_cols", "bf16", None, n, k, 4 * size, size + 4 * k, instructions=_ROUND_INT8 * size, launches=3
    )
    yield Work("int8_dequantize_rows", "bf16", None, n, k, size + 4 * n, 2 * size, instructions=_FROM_INT32 * size)


def _fourbit_product(op: str, variant: str, m: int, n: int, k: int, weight: int, decode: int) -> Work:
    """``weight`` bytes that take ``decode`` operations an element, times ``m`` rows of bfloat16."""
    passes = math.ceil(m / ROWS_OF_TILE)
    read, written, operations = weight + 2 * m * k, 2 * m * n, 2 * m * n * k
    return Work(op, variant, m, n, k, read, written, operations, "f16", decode * n * k * passes, weight, passes)


def gemm_4bit(m: int, n: int, k: int) -> Work:
    """NF4 weight ``(n, k)``, blocks of 64, times ``m`` rows of bfloat16."""
    weight = n * k // 2 + 4 * math.ceil(n * k / BLOCK_4BIT)
    return _fourbit_product("gemm_4bit", "nf4 bf16", m, n, k, weight, _DECODE_4BIT)


def gemm_int4(m: int, n: int, k: int) -> Work:
    """Integers ``(n, k)`` in groups of 128 with bfloat16 scales and zero points, times ``m`` rows of bfloat16."""
    weight = n * k // 2 + 3 * n * math.ceil(k / GROUP_INT4)
    return _fourbit_product("gemm_int4", "bf16", m, n, k, weight, _DECODE_INT4)


def gemm_4bit_transposed(m: int, n: int, k: int) -> Work:
    """``m`` rows of ``n`` bfloat16 times the NF4 weight ``(n, k)``: the gradient of ``gemm_4bit``."""
    product = gemm_4bit(m, n, k)
    return replace(
        product,
        op="gemm_4bit_transposed",
        read=product.again + 2 * m * n,
        written=2 * m * k,
        instructions=_DECODE_ACROSS * n * k * product.passes,
    )


def int8_linear_transposed(m: int, n: int, k: int) -> Work:
    """``m`` rows of ``n`` bfloat16 times the int8 weight ``(n, k)``: the gradient of ``int8_linear``."""
    passes = math.ceil(m / ROWS_OF_TILE)
    weight, decode = n * k + 4 * n, _DECODE_INT8 * n * k * passes
    read, written, operations = weight + 2 * m * n, 2 * m * k, 2 * m * n * k
    return Work("int8_linear_transposed", "bf16", m, n, k, read, written, operations, "f16", decode, weight, passes)


def int8_scaled_gemm(m: int, n: int, k: int) -> Work:
    """int8 codes ``(m, k)`` times ``(n, k)``, scaled to bfloat16."""
    return Work(
        "int8_scaled_gemm",
        "bf16",
        m,
        n,
        k,
        n * k + m * k + 4 * (m + n),
        2 * m * n,
        2 * m * n * k,
        "int8",
        _FROM_INT32 * m * n,
        n * k,
        math.ceil(m / ROWS_OF_TILE),
    )


def adamw(bits: int, n: int, k: int) -> Work:
    """A step of AdamW on float32 parameters: read and write parameter and two states, read the gradient."""
    size = n * k
    state = 4 * size if bits == 32 else size + 4 * math.ceil(size / BLOCK_8BIT)
    instructions = 20 * size if bits == 32 else (20 + 2 * (_DECODE_8BIT + _SEARCH_8BIT)) * size
    return Work(
        "optimizer_step",
        f"AdamW {bits} bits f32",
        None,
        n,
        k,
        8 * size + 2 * state,
        4 * size + 2 * state,
        0,
        "",
        instructions,
    )


def workloads(shapes: Sequence[tuple[int, int]] = SHAPES, rows: Sequence[int] = ROWS) -> Iterator[Work]:
    """Every kernel; elementwise ops and optimizers at the first shape."""
    first = shapes[0]
    for n, k in shapes:
        yield from (gemm_4bit(m, n, k) for m in rows)
    for n, k in shapes[:1]:
        yield from (gemm_int4(m, n, k) for m in rows)
        yield from (gemm_4bit_transposed(m, n, k) for m in rows)
        yield from (int8_scaled_gemm(m, n, k) for m in rows)
        yield from (int8_linear_transposed(m, n, k) for m in rows)
    yield from elementwise(*first)
    yield from (adamw(bits, *first) for bits in (8, 32))
