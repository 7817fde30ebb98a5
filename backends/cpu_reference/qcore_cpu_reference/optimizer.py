"""One optimizer step on one tensor: docs/spec/60-optimizers.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcore import codebooks
from qcore.backend import OptimizerRule
from qcore_cpu_reference import blockwise, philox
from qcore_cpu_reference.blockwise import U8
from qcore_cpu_reference.floats import F32

BLOCK = 256  # QC-OPT-020
Bool = NDArray[np.bool_]
Bits = NDArray[np.uint16]

_SIGNED = np.array(codebooks.DYNAMIC, np.float32)
_UNSIGNED = np.array(codebooks.DYNAMIC_UNSIGNED, np.float32)


@dataclass
class State:
    """One state of one tensor: its values, and at 8 bits its codes and absmax."""

    values: F32
    table: F32 | None = None  # the codebook at 8 bits
    second_moment: bool = False
    codes: U8 | None = None
    absmax: F32 | None = None


@dataclass
class Stepped:
    """What a step leaves of a tensor: the parameter as float32, elements that keep their bits, the states."""

    param: F32
    kept: Bool
    states: list[State]


def table(rule: OptimizerRule, second_moment: bool) -> F32:
    """QC-OPT-020: the codebook of a state."""
    return _UNSIGNED if second_moment and not rule.signed_state else _SIGNED


def second_moments(algorithm: str) -> tuple[bool, ...]:
    """Which of an algorithm's states hold squares, in the order of :func:`step`."""
    return {
        "adam": (False, True),
        "ademamix": (False, False, True),
        "lion": (False,),
        "momentum": (False,),
        "rmsprop": (True,),
        "adagrad": (True,),
    }[algorithm]


def step(rule: OptimizerRule, grad: F32, scale: float, param: F32, states: list[State]) -> Stepped:
    """QC-OPT-003 to QC-OPT-023 on flat float32 values; ``states`` as :func:`second_moments` lists them."""
    with np.errstate(all="ignore"):
        x = grad * np.float32(scale)
        if rule.l2 != 0:
            x = x + param * np.float32(rule.l2)
        old = [state.values for state in states]
        new, update = _UPDATES[rule.algorithm](rule, x, old)
        skipped = (grad == 0) if rule.skip_zeros else np.zeros(grad.size, np.bool_)
        new = [np.where(skipped, before, after) for before, after in zip(old, new, strict=True)]
        lost = np.zeros(grad.size, np.bool_)
        if rule.state_bits == 8:  # QC-OPT-022
            for values in new:
                lost |= ~np.isfinite(values)
            new = [np.where(lost, np.float32(0), values) for values in new]
        kept = skipped | lost
        update = np.where(kept, np.float32(0), update)
        size = np.float32(rule.step_size)
        if rule.max_unorm > 0:
            size = size * update_scale(rule, update, param)
        moved = param * np.float32(rule.decay) + update * size
    for state, values in zip(states, new, strict=True):
        state.values = values
        if state.table is not None:
            requantize(state, state.table, rule.bnb_codes)
    return Stepped(np.where(kept, param, moved), kept, states)


def _adam(rule: OptimizerRule, x: F32, old: list[F32]) -> tuple[list[F32], F32]:
    """QC-OPT-010."""
    m = old[0] * np.float32(rule.beta1) + x * np.float32(rule.gain1)
    v = old[1] * np.float32(rule.beta2) + (x * x) * np.float32(rule.gain2)
    return [m, v], m / (np.sqrt(v) + np.float32(rule.eps))


def _ademamix(rule: OptimizerRule, x: F32, old: list[F32]) -> tuple[list[F32], F32]:
    """QC-OPT-011."""
    fast = old[0] * np.float32(rule.beta1) + x * np.float32(rule.gain1)
    slow = old[1] * np.float32(rule.beta3) + x * np.float32(rule.gain3)
    v = old[2] * np.float32(rule.beta2) + (x * x) * np.float32(rule.gain2)
    numerator = fast * np.float32(rule.correction1) + slow * np.float32(rule.alpha)
    return [fast, slow, v], numerator / (np.sqrt(v) * np.float32(rule.correction2) + np.float32(rule.eps))


def _lion(rule: OptimizerRule, x: F32, old: list[F32]) -> tuple[list[F32], F32]:
    """QC-OPT-012."""
    direction = old[0] * np.float32(rule.beta1) + x * np.float32(rule.gain1)
    m = old[0] * np.float32(rule.beta2) + x * np.float32(rule.gain2)
    return [m], (direction > 0).astype(np.float32) - (direction < 0).astype(np.float32)


def _momentum(rule: OptimizerRule, x: F32, old: list[F32]) -> tuple[list[F32], F32]:
    """QC-OPT-013."""
    m = old[0] * np.float32(rule.beta1) + x * np.float32(rule.gain1)
    return [m], x + m * np.float32(rule.beta1) if rule.nesterov else m


def _rmsprop(rule: OptimizerRule, x: F32, old: list[F32]) -> tuple[list[F32], F32]:
    """QC-OPT-014."""
    v = old[0] * np.float32(rule.beta1) + (x * x) * np.float32(rule.gain1)
    return [v], x / (np.sqrt(v) + np.float32(rule.eps))


def _adagrad(rule: OptimizerRule, x: F32, old: list[F32]) -> tuple[list[F32], F32]:
    """QC-OPT-015."""
    v = old[0] + x * x
    return [v], x / (np.sqrt(v) + np.float32(rule.eps))


_UPDATES = {
    "adam": _adam,
    "ademamix": _ademamix,
    "lion": _lion,
    "momentum": _momentum,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def requantize(state: State, codebook: F32, bnb_codes: bool) -> None:
    """QC-OPT-021 and QC-OPT-023: new codes and absmax for the values."""
    codes, absmax = blockwise.quantize_blockwise(state.values, codebook, BLOCK)
    zero = int(np.flatnonzero(codebook == 0)[0])
    if bnb_codes and not state.second_moment:
        codes[np.signbit(state.values) & (codes == zero)] = zero - 1
    if not bnb_codes and state.second_moment:
        codes[(state.values > 0) & (codes == zero)] = zero + 1
    state.codes, state.absmax = codes, absmax


def update_scale(rule: OptimizerRule, update: F32, param: F32) -> np.float32:
    """QC-OPT-008: the factor that holds the update to ``max_unorm`` times the parameter's norm."""
    squares = sum_of_squares(param)
    if squares == 0:
        return np.float32(1)
    limit = np.float64(rule.max_unorm) * np.sqrt(squares)
    norm = np.sqrt(sum_of_squares(update)) * np.float64(rule.unorm_factor)
    return np.float32(limit / norm) if norm > limit else np.float32(1)


def sum_of_squares(values: F32) -> np.float64:
    """QC-OPT-009: float64 over 16 lanes in each block, then 256 lanes over the blocks, both folded in halves."""
    blocks = -(-values.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, np.float64)
    padded[: values.size] = values.astype(np.float64) ** 2
    rows = padded.reshape(blocks, 16, 16)
    lanes = np.zeros((blocks, 16), np.float64)
    for i in range(16):
        lanes = lanes + rows[:, i]
    of_block = _fold(lanes)
    totals = np.zeros(256, np.float64)
    for start in range(0, blocks, 256):
        row = of_block[start : start + 256]
        totals[: row.size] += row
    return np.float64(_fold(totals[None])[0])


def _fold(lanes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adds the upper half of the lanes to the lower one until one is left."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def stochastic_bits(values: F32, seed: int, stream: int) -> Bits:
    """QC-OPT-007: bfloat16 bits of the values, rounded up with the probability of the part cut off."""
    random = philox.random_16_bits(values.size, seed, stream)
    bits = values.view(np.uint32)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    raised = (bits + random.astype(np.uint32)) >> np.uint32(16)
    return np.where(np.isnan(values), quiet_nan, raised).astype(np.uint16)
