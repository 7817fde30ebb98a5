"""The truth about ``optimizer_step``, in float64: each operation in float64, then rounded once (see :mod:`oracle`).

A square root, a quotient, a sum or a product of two float32 values is correctly rounded after one float64 operation
and one rounding. The random numbers are computed in Python's integers, the sums of squares by a loop over lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qcore.backend import OPTIMIZER_BLOCK, OptimizerRule
from qcore_conformance.floats import Floats, f32, rounded
from qcore_conformance.generators import CODEBOOKS
from qcore_conformance.optimizer_call import Array, Tensor
from qcore_conformance.oracle import F64, dequantize_blockwise, quantize_blockwise, r32

Bools = NDArray[np.bool_]
_SQUARES = {
    "adam": (False, True),
    "ademamix": (False, False, True),
    "lion": (False,),
    "momentum": (False,),
    "rmsprop": (True,),
    "adagrad": (True,),
}


def _root(x: F64) -> F64:
    return r32(np.sqrt(x))


def _average(s: F64, beta: float, x: F64, gain: float) -> F64:
    return r32(r32(s * r32(beta)) + r32(x * r32(gain)))


def _adam(rule: OptimizerRule, x: F64, s: Sequence[F64]) -> tuple[list[F64], F64]:
    m = _average(s[0], rule.beta1, x, rule.gain1)
    v = _average(s[1], rule.beta2, r32(x * x), rule.gain2)
    return [m, v], r32(m / r32(_root(v) + r32(rule.eps)))


def _ademamix(rule: OptimizerRule, x: F64, s: Sequence[F64]) -> tuple[list[F64], F64]:
    m = _average(s[0], rule.beta1, x, rule.gain1)
    n = _average(s[1], rule.beta3, x, rule.gain3)
    v = _average(s[2], rule.beta2, r32(x * x), rule.gain2)
    above = r32(r32(m * r32(rule.correction1)) + r32(n * r32(rule.alpha)))
    return [m, n, v], r32(above / r32(r32(_root(v) * r32(rule.correction2)) + r32(rule.eps)))


def _lion(rule: OptimizerRule, x: F64, s: Sequence[F64]) -> tuple[list[F64], F64]:
    direction = _average(s[0], rule.beta1, x, rule.gain1)
    sign = np.where(np.isnan(direction), 0.0, np.sign(direction))
    return [_average(s[0], rule.beta2, x, rule.gain2)], sign


def _momentum(rule: OptimizerRule, x: F64, s: Sequence[F64]) -> tuple[list[F64], F64]:
    m = _average(s[0], rule.beta1, x, rule.gain1)
    return [m], r32(x + r32(m * r32(rule.beta1))) if rule.nesterov else m


def _rmsprop(rule: OptimizerRule, x: F64, s: Sequence[F64]) -> tuple[list[F64], F64]:
    v = _average(s[0], rule.beta1, r32(x * x), rule.gain1)
    return [v], r32(x / r32(_root(v) + r32(rule.eps)))


def _adagrad(rule: OptimizerRule, x: F64, s: Sequence[F64]) -> tuple[list[F64], F64]:
    v = r32(s[0] + r32(x * x))
    return [v], r32(x / r32(_root(v) + r32(rule.eps)))


_RULES: dict[str, Callable[[OptimizerRule, F64, Sequence[F64]], tuple[list[F64], F64]]] = {
    "adam": _adam,
    "ademamix": _ademamix,
    "lion": _lion,
    "momentum": _momentum,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def optimizer_step(rule: OptimizerRule, tensor: Tensor) -> Tensor:
    """QC-OPT-001 to QC-OPT-023 on one tensor."""
    with np.errstate(all="ignore"):
        return _step(rule, tensor)


def _step(rule: OptimizerRule, tensor: Tensor) -> Tensor:
    grad, param = tensor.grad.f64(), tensor.param.f64()
    w = param if tensor.compensation is None else r32(param + tensor.compensation.f64())
    x = r32(grad * r32(tensor.grad_scale))
    if r32(rule.l2) != 0:
        x = r32(x + r32(w * r32(rule.l2)))
    old = _values(rule, tensor)
    new, update = _RULES[rule.algorithm](rule, x, old)
    skipped = (grad == 0) & rule.skip_zeros
    new = [np.where(skipped, before, after) for before, after in zip(old, new, strict=True)]
    lost = np.zeros(w.size, np.bool_)
    if rule.state_bits == 8:
        lost = ~np.all([np.isfinite(values) for values in new], axis=0)
        new = [np.where(lost, 0.0, values) for values in new]
    kept = skipped | lost
    size = r32(rule.step_size)
    if rule.max_unorm > 0:
        size = r32(size * update_scale(rule, np.where(kept, 0.0, update), w))
    moved = r32(r32(w * r32(rule.decay)) + r32(update * size))
    changed = _stored(rule, tensor, moved, kept)
    return replace(changed, **_coded(rule, new))


def _values(rule: OptimizerRule, tensor: Tensor) -> list[F64]:
    """The states as values, AdEMAMix's two rows of state1 apart."""
    n = tensor.param.size
    rows = 2 if rule.algorithm == "ademamix" else 1
    found: list[F64] = []
    for stored, absmax, count in ((tensor.state1, tensor.absmax1, rows), (tensor.state2, tensor.absmax2, 1)):
        for row in range(count if stored is not None else 0):
            if isinstance(stored, Floats):
                found.append(stored.f64().reshape(count, n)[row])
                continue
            assert stored is not None
            assert absmax is not None
            of_row = absmax.reshape(count, -1 if n else 0)
            scale = Floats(of_row.bits[row], "f32")
            book = _book(rule, _SQUARES[rule.algorithm][len(found)])
            found.append(dequantize_blockwise(stored.reshape(count, n)[row], scale, book, OPTIMIZER_BLOCK, "f32").f64())
    return found


def _book(rule: OptimizerRule, squares: bool) -> NDArray[np.float32]:
    return CODEBOOKS["dynamic-unsigned" if squares and not rule.signed_state else "dynamic"]


def _coded(rule: OptimizerRule, values: Sequence[F64]) -> dict[str, Array | None]:
    """state1, state2, absmax1, absmax2 of new values."""
    split = len(values) - 1 if rule.algorithm in ("adam", "ademamix") else len(values)
    groups = {"1": range(split), "2": range(split, len(values))}
    result: dict[str, Array | None] = {}
    for label, members in groups.items():
        if not members:
            continue
        if rule.state_bits == 32:
            result[f"state{label}"] = rounded(np.concatenate([values[i] for i in members]), "f32")
            continue
        quantized = [_quantized(rule, values[i], _SQUARES[rule.algorithm][i]) for i in members]
        result[f"state{label}"] = np.concatenate([codes for codes, _ in quantized])
        result[f"absmax{label}"] = Floats(np.concatenate([absmax.bits for _, absmax in quantized]), "f32")
    return result


def _quantized(rule: OptimizerRule, values: F64, squares: bool) -> tuple[NDArray[np.uint8], Floats]:
    book = _book(rule, squares)
    codes, absmax = (q := quantize_blockwise(f32(values), book, OPTIMIZER_BLOCK)).codes, q.absmax
    zero = np.uint8(list(book).index(0.0))
    at_zero = codes == zero
    if rule.bnb_codes and not squares:
        codes = np.where(at_zero & np.signbit(values), zero - np.uint8(1), codes)
    if squares and not rule.bnb_codes:
        codes = np.where(at_zero & (values > 0), zero + np.uint8(1), codes)
    return codes.astype(np.uint8), absmax


def _stored(rule: OptimizerRule, tensor: Tensor, moved: F64, kept: Bools) -> Tensor:
    dtype = tensor.param.dtype
    new = _stochastic(moved, rule.seed, tensor.stream) if rule.stochastic else rounded(moved, dtype)
    param = Floats(np.where(kept, tensor.param.bits, new.bits), dtype)
    if tensor.compensation is None:
        return replace(tensor, param=param)
    high = new.f64()
    rest = rounded(r32(np.where(np.isfinite(high), moved - high, 0.0)), dtype)
    return replace(tensor, param=param, compensation=Floats(np.where(kept, tensor.compensation.bits, rest.bits), dtype))


def update_scale(rule: OptimizerRule, update: F64, w: F64) -> float:
    """QC-OPT-008."""
    squares = sum_of_squares(w)
    limit = rule.max_unorm * math.sqrt(squares) if squares >= 0 else math.nan
    total = sum_of_squares(update)
    norm = math.sqrt(total) * rule.unorm_factor if total >= 0 else math.nan
    return float(r32(limit / norm)) if squares != 0 and norm > limit else 1.0


def sum_of_squares(x: F64) -> float:
    """QC-OPT-009."""
    totals = [0.0] * 256
    for block, start in enumerate(range(0, x.size, OPTIMIZER_BLOCK)):
        part = x[start : start + OPTIMIZER_BLOCK]
        lanes = []
        for lane in range(16):
            total = 0.0
            for value in part[lane::16].tolist():
                total += value * value
            lanes.append(total)
        totals[block % 256] += _folded(lanes)
    return _folded(totals)


def _folded(values: list[float]) -> float:
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def _stochastic(values: F64, seed: int, stream: int) -> Floats:
    """QC-OPT-007."""
    bits = f32(values).bits.astype(np.int64)
    random = np.array(random_numbers(values.size, seed, stream), np.int64)
    raised = np.where(np.isnan(values), 0x7FC0, (bits + random) >> 16)
    return Floats(raised.astype(np.uint16), "bf16")


def random_numbers(n: int, seed: int, stream: int) -> list[int]:
    """The 16-bit numbers of elements 0 to n - 1."""
    numbers: list[int] = []
    for j in range(-(-n // 8)):
        for word in philox(j | stream << 64, seed):
            numbers += [word & 0xFFFF, word >> 16]
    return numbers[:n]


def philox(counter: int, key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of a 128-bit counter and a 64-bit key; the lowest word of each comes first."""
    a, b, c, d = (counter >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96))
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = second >> 32 ^ b ^ low, second & 0xFFFFFFFF, first >> 32 ^ d ^ high, first & 0xFFFFFFFF
        low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d
