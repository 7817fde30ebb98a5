"""What one optimizer step is made of: the scalars, the tensors, and a step that was packed once (QC-OPT-002)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

OPTIMIZER_BLOCK = 256  # QC-OPT-020
# Algorithm -> number of states (QC-OPT-010 to QC-OPT-015).
ALGORITHMS: Mapping[str, int] = {"adam": 2, "ademamix": 2, "lion": 1, "momentum": 1, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class OptimizerRule:
    """What a step does to every element (QC-OPT-002): each float is rounded once to float32 where it is used.

    ``max_unorm`` and ``unorm_factor`` stay float64; ``seed`` is an unsigned 64-bit integer. Made by
    :func:`qcore.ops.optimizer.optimizer_rule`.
    """

    algorithm: str  # a key of ALGORITHMS
    state_bits: int  # 8 or 32
    step_size: float
    decay: float = 1.0
    l2: float = 0.0
    eps: float = 0.0
    beta1: float = 0.0
    gain1: float = 1.0
    beta2: float = 0.0
    gain2: float = 1.0
    beta3: float = 0.0
    gain3: float = 1.0
    correction1: float = 1.0
    correction2: float = 1.0
    alpha: float = 0.0
    max_unorm: float = 0.0
    unorm_factor: float = 1.0
    seed: int = 0
    nesterov: bool = False
    skip_zeros: bool = False
    stochastic: bool = False
    bnb_codes: bool = False
    signed_state: bool = False


@dataclass(frozen=True, eq=False)
class OptimizerTensors:
    """The tensors of a step, one entry a parameter; all but ``grads`` change. Validated by the frontend.

    ``params`` float32, float16 or bfloat16, all of one dtype, any shape, contiguous; ``grads`` the same number of
    elements each, all of one float dtype. ``state1``, ``state2`` float32 or uint8, as many elements as the parameter
    (AdEMAMix: ``state1`` is ``(2, *shape)``, fast and slow); ``absmax1``, ``absmax2`` float32 ``(blocks,)``, with 8-bit
    states only (AdEMAMix: ``absmax1`` is ``(2, blocks)``); ``compensation`` like ``params``. A list that the rule does
    not need is empty. ``streams`` are unsigned 64-bit integers (QC-OPT-007).
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    state1: Sequence[Tensor]
    state2: Sequence[Tensor] = ()
    absmax1: Sequence[Tensor] = ()
    absmax2: Sequence[Tensor] = ()
    compensation: Sequence[Tensor] = ()
    grad_scales: Sequence[float] = ()  # QC-OPT-003; 1 where empty
    streams: Sequence[int] = field(default=())


# (rule, grads, grad_scales) -> None: a step on tensors that were packed once; only the gradients may have moved.
PreparedStep = Callable[[OptimizerRule, Sequence[Tensor], Sequence[float]], None]
