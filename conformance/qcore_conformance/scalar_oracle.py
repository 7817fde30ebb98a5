"""The second oracle: exact rationals, one element at a time, in plain Python. Slow, and hard to get wrong.

Values are Python floats that hold float32 values. An operation on finite values is carried out on fractions and rounded
once; one on NaN, an infinity or a zero is Python's own, which is exact. Golden vectors are made with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

from qcore import codebooks

Numbers = Sequence[float]
_PRECISIONS = {"f64": (53, -1022, 1023), "f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}


def round_to(value: Fraction, dtype: str) -> float:
    """The nearest value of ``dtype``, ties to even; beyond the range infinity."""
    if value == 0:
        return 0.0
    precision, emin, emax = _PRECISIONS[dtype]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, emin) - precision + 1)
    count = round(magnitude / unit)  # Python rounds a fraction's ties to even
    result = math.inf if count * unit >= Fraction(2) ** (emax + 1) else float(count * unit)
    return math.copysign(result, value)


def convert(value: float, dtype: str) -> float:
    """QC-NUM-003."""
    if value == 0 or not math.isfinite(value):
        return value
    result = round_to(Fraction(value), dtype)
    return math.copysign(result, value)


def _operate(a: float, b: float, exact: Callable[[Fraction, Fraction], Fraction], dtype: str) -> float:
    result = exact(Fraction(a), Fraction(b))
    return math.copysign(round_to(result, dtype), result) if result else 0.0


def mul(a: float, b: float) -> float:
    if a == 0 or b == 0 or not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    magnitude = _operate(abs(a), abs(b), lambda p, q: p * q, "f32")
    return -magnitude if (a < 0) != (b < 0) else magnitude


def add(a: float, b: float, dtype: str = "f32") -> float:
    if a == 0 or b == 0 or not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    return _operate(a, b, lambda p, q: p + q, dtype)


def div(a: float, b: float, dtype: str = "f32") -> float:
    """``a / b`` for finite, non-zero ``a``."""
    if math.isnan(a) or math.isnan(b):
        return math.nan
    if b == 0:
        return math.copysign(math.inf, a) * math.copysign(1.0, b)
    if math.isinf(a):
        return math.nan if math.isinf(b) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    if math.isinf(b):
        return math.copysign(0.0, a) * math.copysign(1.0, b)
    return _operate(a, b, lambda p, q: p / q, dtype) if a else 0.0


def _absmax(values: Numbers) -> float:
    return max((abs(v) for v in values if not math.isnan(v)), default=0.0)


def _scaled(values: Numbers, absmax: float) -> list[float]:
    if absmax == 0:
        return [0.0] * len(values)
    reciprocal = div(1.0, absmax)
    scaled = [mul(v, reciprocal) for v in values]
    return [0.0 if math.isnan(y) else y for y in scaled]


@cache
def _midpoint(low: float, high: float) -> float:
    return mul(add(low, high), 0.5)


def code_8bit(y: float, c: Numbers) -> int:
    """QC-Q8-004, as it is written."""
    count = 0
    for j in range(255):
        m = _midpoint(c[j], c[j + 1])
        if y > m or (y == m and j % 2 == 1 and c[j] < c[j + 1]):
            count += 1
    return count


def code_4bit(y: float, quant_type: str) -> int:
    """QC-NF4-002, QC-FP4-002, as they are written."""
    if quant_type == "nf4":
        return sum(y > _midpoint(low, high) for low, high in zip(codebooks.NF4, codebooks.NF4[1:]))
    position = sum(abs(y) > t for t in codebooks.FP4_THRESHOLDS)
    return (0, 1, 6, 7, 4, 5, 2, 3)[position] + (8 if y < 0 else 0)


def quantize_blockwise(x: Numbers, c: Numbers, blocksize: int) -> tuple[list[float], list[int]]:
    absmax, codes = [], []
    for start in range(0, len(x), blocksize):
        block = x[start : start + blocksize]
        absmax.append(_absmax(block))
        codes += [code_8bit(y, c) for y in _scaled(block, absmax[-1])]
    return absmax, codes


def quantize_4bit(x: Numbers, quant_type: str, blocksize: int) -> tuple[list[float], list[int]]:
    absmax, codes = [], []
    for start in range(0, len(x), blocksize):
        block = x[start : start + blocksize]
        absmax.append(_absmax(block))
        codes += [code_4bit(y, quant_type) for y in _scaled(block, absmax[-1])]
    if len(codes) % 2:
        codes.append(7 if quant_type == "nf4" else 0)
    return absmax, [16 * high + low for high, low in zip(codes[0::2], codes[1::2])]


def dequantize_blockwise(codes: Sequence[int], absmax: Numbers, c: Numbers, blocksize: int, dtype: str) -> list[float]:
    return [convert(mul(c[code], absmax[i // blocksize]), dtype) for i, code in enumerate(codes)]


def dequantize_4bit(
    packed: Sequence[int], absmax: Numbers, quant_type: str, n: int, blocksize: int, dtype: str
) -> list[float]:
    table = codebooks.NF4 if quant_type == "nf4" else codebooks.FP4
    nibbles = [byte >> 4 if i % 2 == 0 else byte & 15 for byte in packed for i in (0, 1)]
    return [convert(mul(table[nibbles[i]], absmax[i // blocksize]), dtype) for i in range(n)]


def offset(absmax: Numbers) -> float:
    """QC-NEST-001; the additions are float64's."""
    if not absmax:
        return 0.0
    lanes = []
    for lane in range(min(256, len(absmax))):
        total = absmax[lane]
        for value in absmax[lane + 256 :: 256]:
            total = add(total, value, "f64")
        lanes.append(total)
    total = lanes[0]
    for value in lanes[1:]:
        total = add(total, value, "f64")
    return convert(div(total, float(len(absmax)), "f64"), "f32")


def quantize_absmax(absmax: Numbers, c: Numbers, blocksize: int) -> tuple[list[int], list[float], float]:
    mean = offset(absmax)
    nested_absmax, codes = quantize_blockwise([add(value, -mean) for value in absmax], c, blocksize)
    return codes, nested_absmax, mean


def dequantize_absmax(
    codes: Sequence[int], nested_absmax: Numbers, c: Numbers, mean: float, blocksize: int
) -> list[float]:
    return [add(mul(c[code], nested_absmax[i // blocksize]), mean) for i, code in enumerate(codes)]


def _int8_code(x: float, stat: float) -> int:
    if stat == 0:
        return 0
    q = mul(x, div(127.0, stat))
    if math.isnan(q):
        return 0
    return int(max(-127, min(127, q if math.isinf(q) else round(q))))


def _is_outlier(x: float, threshold: float) -> bool:
    return threshold > 0 and not abs(x) < threshold


def int8_quantize_rows(x: Sequence[Numbers], threshold: float) -> tuple[list[list[int]], list[float], list[int]]:
    columns = [int(any(_is_outlier(row[k], threshold) for row in x)) for k in range(len(x[0]))]
    stats = [_absmax([v for v in row if not _is_outlier(v, threshold)]) for row in x]
    codes = [[0 if columns[k] else _int8_code(v, stat) for k, v in enumerate(row)] for row, stat in zip(x, stats)]
    return codes, stats, columns


def int8_quantize_cols(x: Sequence[Numbers], threshold: float) -> tuple[list[list[int]], list[float]]:
    stats = [_absmax([row[k] for row in x if not _is_outlier(row[k], threshold)]) for k in range(len(x[0]))]
    codes = [[0 if _is_outlier(v, threshold) else _int8_code(v, stats[k]) for k, v in enumerate(row)] for row in x]
    return codes, stats


def int8_gemm(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[sum(p * q for p, q in zip(row, column)) for column in b] for row in a]


def int8_dequantize_gemm(
    c: Sequence[Sequence[int]], row_stats: Numbers, col_stats: Numbers, bias: Numbers | None, dtype: str
) -> list[list[float]]:
    def element(m: int, n: int) -> float:
        t = convert(float(c[m][n]), "f32")
        t = mul(mul(mul(t, row_stats[m]), col_stats[n]), float.fromhex("0x1.040c2p-14"))
        return convert(t if bias is None else add(t, bias[n]), dtype)

    return [[element(m, n) for n in range(len(col_stats))] for m in range(len(row_stats))]


def int8_dequantize_rows(codes: Sequence[Sequence[int]], row_stats: Numbers, dtype: str) -> list[list[float]]:
    inverse = float.fromhex("0x1.020408p-7")
    return [[convert(mul(mul(float(q), stat), inverse), dtype) for q in row] for row, stat in zip(codes, row_stats)]


def gemm_4bit(x: Sequence[Numbers], weights: Sequence[Numbers], bias: Numbers | None) -> list[list[Fraction]]:
    """The exact sums of QC-GEMM4-004, as fractions."""
    rows = [[Fraction(v) for v in row] for row in x]
    columns = [[Fraction(v) for v in row] for row in weights]
    start = [Fraction(v) for v in bias] if bias is not None else [Fraction(0)] * len(columns)
    return [[sum((p * q for p, q in zip(row, w)), start[n]) for n, w in enumerate(columns)] for row in rows]
