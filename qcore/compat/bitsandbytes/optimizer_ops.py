"""``torch.ops.bitsandbytes.optimizer_update_*``: one step on one parameter, by ``optimizer_step``.

The schemas are bitsandbytes' (0.50.2). qcore works out both norms itself (QC-OPT-008):
``param_norm`` is not needed, and ``unorm_vec``, bitsandbytes' scratch for the other, stays as it is.
"""

from __future__ import annotations

from torch import Tensor

from qcore.compat.bitsandbytes.ops import define
from qcore.errors import InvalidArgument
from qcore.ops.optimizer import OptimizerTensors, optimizer_rule, optimizer_step, state_codebook

# bitsandbytes' name -> the algorithm (QC-OPT-010 to -015); LAMB and LARS are Adam and momentum with max_unorm.
_ALGORITHMS = {
    "adam": "adam",
    "lamb": "adam",
    "ademamix": "ademamix",
    "lion": "lion",
    "momentum": "momentum",
    "lars": "momentum",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
}
_NUMBER_OF_BETAS = {"adam": 2, "ademamix": 3, "lion": 2, "momentum": 1, "rmsprop": 1, "adagrad": 0}

_UPDATE_32BIT = (
    "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()"
)
_UPDATE_8BIT = (
    "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, "
    "float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, "
    "Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()"
)


def _algorithm(name: str) -> str:
    if name not in _ALGORITHMS:
        raise InvalidArgument(f"optimizer_update: optimizer_name is {name!r}, needs one of {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[name]


def _present(value: Tensor | None) -> tuple[Tensor, ...]:
    return () if value is None else (value,)


def _update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    algorithm = _algorithm(optimizer_name)
    rule = optimizer_rule(
        algorithm,
        lr=lr,
        step=step,
        betas=(beta1, beta2, beta3)[: _NUMBER_OF_BETAS[algorithm]],
        eps=eps,
        weight_decay=weight_decay,
        alpha=alpha,
        max_unorm=max_unorm,
        skip_zeros=skip_zeros,
    )
    optimizer_step(rule, OptimizerTensors([p], [g], [state1], _present(state2), grad_scales=[gnorm_scale]))


def _update_8bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    algorithm = _algorithm(optimizer_name)
    # RMSprop and Adagrad keep their second moment in the signed codebook there; its first value says which it is.
    signed = algorithm in ("rmsprop", "adagrad") and not _is_meta(qmap1) and float(qmap1[0]) < 0.0
    rule = optimizer_rule(
        algorithm,
        lr=lr,
        step=step,
        betas=(beta1, beta2, beta3)[: _NUMBER_OF_BETAS[algorithm]],
        eps=eps,
        weight_decay=weight_decay,
        alpha=alpha,
        state_bits=8,
        skip_zeros=skip_zeros,
        signed_state=signed,
    )
    for number, given in ((1, qmap1), (2, qmap2)):
        if given is not None and not _is_meta(given):
            _check_codebook(number, given, state_codebook(algorithm, number, signed_state=signed))
    tensors = OptimizerTensors(
        [p], [g], [state1], _present(state2), [absmax1], _present(absmax2), grad_scales=[gnorm_scale]
    )
    optimizer_step(rule, tensors)


def _is_meta(value: Tensor) -> bool:
    return value.is_meta or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _check_codebook(number: int, given: Tensor, table: tuple[float, ...]) -> None:
    expected = given.new_tensor(table)
    if given.shape != expected.shape or not bool(((given - expected).abs() <= 1e-6).all()):
        raise InvalidArgument(
            f"optimizer_update_8bit_blockwise: qmap{number} is not the dynamic codebook of this state; "
            "states are stored in no other one"
        )


define("optimizer_update_32bit", _UPDATE_32BIT, _update_32bit, lambda *arguments, **named: None)
define("optimizer_update_8bit_blockwise", _UPDATE_8BIT, _update_8bit, lambda *arguments, **named: None)
