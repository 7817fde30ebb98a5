"""Hyperparameters to the scalars of a step, in float64 (QC-OPT-002)."""

from __future__ import annotations

import math

from qcore.backend.optimizer import ALGORITHMS, OptimizerRule
from qcore.errors import InvalidArgument

_DECOUPLED = {"adam", "ademamix", "lion"}
_BETAS = {"adam": 2, "ademamix": 3, "lion": 2, "momentum": 1, "rmsprop": 1, "adagrad": 0}


def optimizer_rule(
    algorithm: str,
    *,
    lr: float,
    step: int,
    betas: tuple[float, ...] = (),
    eps: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool | None = None,
    state_bits: int = 32,
    alpha: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    bias_correction: bool = True,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    bnb_codes: bool = False,
    signed_state: bool = False,
) -> OptimizerRule:
    """The scalars of one step (QC-OPT-002).

    Parameters
    ----------
    algorithm : str
        ``"adam"``, ``"ademamix"``, ``"lion"``, ``"momentum"``, ``"rmsprop"`` or ``"adagrad"``.
    lr : float
        Learning rate of this step, schedules included. Not negative.
    step : int
        1 in the first step.
    betas : tuple of float
        Each in [0, 1): Adam and Lion (beta1, beta2), AdEMAMix (beta1, beta2, beta3 of this step), momentum (momentum,),
        RMSprop (alpha,), Adagrad none.
    eps : float
        Not negative. Not used by Lion and momentum.
    weight_decay : float
        Not negative.
    decoupled : bool, optional
        ``True``: the parameter shrinks by ``1 - lr * weight_decay`` before the update (QC-OPT-004). ``False``:
        ``weight_decay * parameter`` is added to the gradient (QC-OPT-003). By default what bitsandbytes' optimizer
        does: decoupled for Adam, AdEMAMix and Lion.
    state_bits : int
        8 or 32.
    alpha : float
        AdEMAMix: weight of the slow average in this step.
    dampening, nesterov
        Momentum: as in ``torch.optim.SGD``.
    bias_correction : bool
        Adam and AdEMAMix: ``False`` leaves it out.
    max_unorm : float
        Largest norm of the update in units of the parameter's norm; 0 for no limit (QC-OPT-008).
    skip_zeros : bool
        Elements whose gradient is 0 stay as they are (QC-OPT-005).
    stochastic : bool
        bfloat16 parameters are rounded stochastically (QC-OPT-007).
    seed : int
        Of the stochastic rounding, from 0 to 2**32 - 1; the same in every step.
    bnb_codes : bool
        Requantize states as bitsandbytes does (QC-OPT-023).
    signed_state : bool
        RMSprop, Adagrad: the 8-bit state is in the signed codebook (QC-OPT-020).

    Returns
    -------
    OptimizerRule

    Raises
    ------
    InvalidArgument
        A value out of range, or an argument that the algorithm has no use for.
    """
    values = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "alpha": alpha, "max_unorm": max_unorm}
    _check(algorithm, betas, values)
    _require(isinstance(step, int) and step >= 1, f"step is {step!r}, needs an integer from 1")
    _require(state_bits in (8, 32), f"state_bits is {state_bits!r}, needs 8 or 32")
    _require(isinstance(seed, int) and 0 <= seed < 2**32, f"seed is {seed!r}, needs an integer from 0 to 2**32 - 1")
    _require(
        algorithm == "momentum" or not (nesterov or dampening), f"nesterov and dampening mean nothing to {algorithm}"
    )
    _require(math.isfinite(dampening), f"dampening is {dampening}, needs a finite value")
    _require(not nesterov or dampening == 0, "nesterov needs a dampening of 0")
    _require(algorithm == "ademamix" or not alpha, f"alpha means nothing to {algorithm}")
    _require(
        not signed_state or (algorithm in ("rmsprop", "adagrad") and state_bits == 8),
        f"signed_state is for 8-bit states of rmsprop and adagrad, not for {algorithm} at {state_bits} bits",
    )
    decoupled = algorithm in _DECOUPLED if decoupled is None else decoupled
    scalars: dict[str, float] = {"step_size": -lr, "eps": eps, "alpha": alpha, "unorm_factor": 1.0}
    for index, beta in enumerate(betas, 1):
        scalars |= {f"beta{index}": beta, f"gain{index}": 1.0 - beta}
    if algorithm == "momentum":
        scalars["gain1"] = 1.0 if step == 1 else 1.0 - dampening
    if algorithm in ("adam", "ademamix") and bias_correction:
        first, second = 1.0 - betas[0] ** step, math.sqrt(1.0 - betas[1] ** step)
        if algorithm == "adam":
            scalars |= {"step_size": -lr * (second / first), "eps": eps * second, "unorm_factor": second / first}
        else:
            scalars |= {"correction1": 1.0 / first, "correction2": 1.0 / second}
    return OptimizerRule(
        algorithm,
        state_bits,
        decay=1.0 - lr * weight_decay if decoupled else 1.0,
        l2=0.0 if decoupled else weight_decay,
        max_unorm=max_unorm,
        seed=(step % 2**32) << 32 | seed if stochastic else 0,
        nesterov=nesterov,
        skip_zeros=skip_zeros,
        stochastic=stochastic,
        bnb_codes=bnb_codes,
        signed_state=signed_state,
        **scalars,
    )


def _check(algorithm: str, betas: tuple[float, ...], values: dict[str, float]) -> None:
    known = ", ".join(ALGORITHMS)
    _require(algorithm in ALGORITHMS, f"algorithm is {algorithm!r}, needs one of {known}")
    count = _BETAS[algorithm]
    _require(len(betas) == count, f"betas is {betas}, {algorithm} needs {count} values")
    for beta in betas:
        _require(0.0 <= beta < 1.0, f"betas is {betas}, needs values from 0 to below 1")
    for name, value in values.items():
        _require(0.0 <= value < math.inf, f"{name} is {value}, needs a finite value that is not negative")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise InvalidArgument(f"optimizer_step: {text}")
