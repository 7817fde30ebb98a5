"""One optimizer step on many tensors at once, in place (``docs/spec/60-optimizers.md``).

How an optimizer calls it::

    rule = optimizer_rule("adam", lr=1e-3, step=t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, state_bits=8)
    optimizer_step(rule, OptimizerTensors(params, grads, state1, state2, absmax1, absmax2))  # checks everything

    handle = prepare_optimizer_step(rule, OptimizerTensors(params, (), state1, state2, absmax1, absmax2))
    handle(rule, grads)  # every step: checks what can have changed, then one short call
    handle(rule, grads, grad_scales)  # a factor a tensor, as percentile clipping wants it (QC-OPT-003)

A *rule* holds the hyperparameters of one parameter group at one step, finished: bias corrections, schedules and powers
are computed in float64 by :func:`optimizer_rule`, whose ``step`` counts from 1. So tensors that share a group, a step
count, dtypes and a number of state bits go into one call, the others into a call each. A handle keeps working while
``lr``, ``step`` and the like change; prepare a new one when a state tensor has been replaced or the list changes.

============ ================================= ========================================== =================
algorithm    optimizers                        states (8-bit: codebook)                   ``weight_decay``
============ ================================= ========================================== =================
``adam``     Adam, AdamW, LAMB (``max_unorm``) state1 m (signed), state2 v (unsigned)     decoupled
``ademamix`` AdEMAMix                          state1 ``(2, *shape)`` m fast, slow        decoupled
                                               (signed), state2 v (unsigned)
``lion``     Lion                              state1 m (signed)                          decoupled
``momentum`` SGD, LARS (``max_unorm``)         state1 m (signed)                          into the gradient
``rmsprop``  RMSprop                           state1 v (unsigned, or ``signed_state``)   into the gradient
``adagrad``  Adagrad                           state1 v (unsigned, or ``signed_state``)   into the gradient
============ ================================= ========================================== =================

Fresh states are zeros: float32 ``zeros`` of the parameter's shape at 32 bits; at 8 bits uint8 filled with
:func:`zero_code` and float32 absmax zeros, one for 256 elements of the flattened tensor (AdEMAMix: absmax1 is
``(2, blocks)``). :func:`state_codebook` is the table of a state, ``qmap1`` and ``qmap2`` of bitsandbytes' state dicts.
bitsandbytes' RMSprop8bit and Adagrad8bit use the signed table: step on their states with ``signed_state=True``.

Parameters and gradients are float32, float16 or bfloat16, independently. ``compensation`` (16-bit parameters; zeros at
first, in their dtype) is the Kahan buffer. ``stochastic=True`` with a ``seed`` below 2**32 rounds bfloat16 parameters
stochastically and needs ``streams``: a number for each parameter, which never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qcore import codebooks
from qcore.backend.optimizer import ALGORITHMS, OPTIMIZER_BLOCK, OptimizerRule, OptimizerTensors, PreparedStep
from qcore.backend.registry import backend_for, selection
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops import validate
from qcore.ops.library import register, traced
from qcore.ops.optimizer_rule import optimizer_rule

__all__ = [
    "ALGORITHMS",
    "OPTIMIZER_BLOCK",
    "OptimizerRule",
    "OptimizerTensors",
    "PreparedOptimizerStep",
    "optimizer_rule",
    "optimizer_step",
    "prepare_optimizer_step",
    "state_codebook",
    "zero_code",
]

_OP = "optimizer_step"
_CHANGED = ("params", "state1", "state2", "absmax1", "absmax2", "compensation")


def is_unsigned(algorithm: str, state: int, signed_state: bool = False) -> bool:
    """Whether 8-bit state 1 or 2 of an algorithm is in the unsigned codebook (QC-OPT-020)."""
    return state == 2 or (algorithm in ("rmsprop", "adagrad") and not signed_state)


def state_codebook(algorithm: str, state: int, *, signed_state: bool = False) -> tuple[float, ...]:
    """The 256 values of 8-bit state 1 or 2 of an algorithm (QC-OPT-020)."""
    unsigned = is_unsigned(algorithm, state, signed_state)
    return codebooks.DYNAMIC_UNSIGNED if unsigned else codebooks.DYNAMIC


def zero_code(algorithm: str, state: int, *, signed_state: bool = False) -> int:
    """The code of the value 0 in that codebook: what a fresh state is filled with."""
    return 0 if is_unsigned(algorithm, state, signed_state) else 127


def optimizer_step(rule: OptimizerRule, tensors: OptimizerTensors) -> None:
    """One step on every parameter, in place (QC-OPT-001 to QC-OPT-023).

    Parameters
    ----------
    rule : OptimizerRule
        Made by :func:`optimizer_rule`.
    tensors : OptimizerTensors
        All on one device. ``params`` and ``grads`` may have any strides; what else changes is contiguous. Nothing that
        changes shares memory with another tensor of the call.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Before anything is written.
    """
    if traced(*tensors.params, *tensors.grads):
        _call_registered(rule, tensors)
        return
    handle = PreparedOptimizerStep(rule, tensors)
    _check_grads(tensors.params, tensors.grads)
    _require_apart((("grads", tensors.grads),), tensors)
    handle(rule, tensors.grads, tensors.grad_scales)


def prepare_optimizer_step(rule: OptimizerRule, tensors: OptimizerTensors) -> PreparedOptimizerStep:
    """Check and pack what stays the same from step to step: everything but the rule's numbers and the gradients.

    Parameters
    ----------
    rule : OptimizerRule
        The rule of any step: its algorithm, state bits and rounding are the handle's.
    tensors : OptimizerTensors
        As for :func:`optimizer_step`; ``grads`` and ``grad_scales`` are not looked at and may be empty.

    Returns
    -------
    PreparedOptimizerStep
        ``handle(rule, grads, grad_scales=())``.
    """
    return PreparedOptimizerStep(rule, tensors)


class PreparedOptimizerStep:
    """A step on tensors that were checked and packed once; made by :func:`prepare_optimizer_step`.

    Each call checks the gradients, and packs again when a parameter has moved or another backend was chosen. It holds
    the states, so that they live as long as it does, but does not notice when the caller replaces one of them.
    """

    def __init__(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        self._kind = _kind(rule)
        self._tensors = tensors
        self._shapes = [param.shape for param in tensors.params]
        _check_rule(rule, tensors)
        _check_states(rule, tensors)
        _require_apart((), tensors)
        self._device = tensors.params[0].device if tensors.params else None
        self._counted = [param for param in tensors.params if not param.is_inference()]
        self._pack()

    def _pack(self) -> None:
        params = self._tensors.params
        # A parameter of other strides takes its step in a contiguous copy, since blocks run in row-major order.
        self._strided = [i for i, param in enumerate(params) if not param.is_contiguous()]
        work = [param if param.is_contiguous() else torch.empty(param.shape, dtype=param.dtype, device=param.device)
                for param in params]  # fmt: skip
        self._work = work
        self._addresses = [param.data_ptr() for param in params]
        self._selection = selection()
        self._run: PreparedStep | None = None
        if self._device is not None:
            tensors = replace(self._tensors, params=work, grads=(), grad_scales=())
            self._run = backend_for(self._device).prepare_optimizer_step(tensors)

    def __call__(self, rule: OptimizerRule, grads: Sequence[Tensor], grad_scales: Sequence[float] = ()) -> None:
        """One step. ``grads`` has the shapes of the parameters and one dtype; ``grad_scales`` a factor for each."""
        params = self._tensors.params
        if torch.compiler.is_compiling():
            _call_registered(rule, replace(self._tensors, grads=grads, grad_scales=grad_scales))
            return
        if _kind(rule) != self._kind:
            raise InvalidArgument(
                f"{_OP}: the rule is for {_kind(rule)}, the tensors were prepared for {self._kind} (algorithm, "
                "state bits, signed state, stochastic rounding); prepare them again"
            )
        if len(grads) != len(params) or len(grad_scales) not in (0, len(params)):
            raise InvalidArgument(
                f"{_OP}: {len(grads)} grads and {len(grad_scales)} grad_scales came, {len(params)} params need as many"
            )
        if not grads:
            return
        grads = self._readable(grads)
        if selection() is not self._selection or self._addresses != [param.data_ptr() for param in params]:
            self._pack()
        assert self._run is not None
        for i in self._strided:
            self._work[i].copy_(params[i].detach())
        self._run(rule, grads, grad_scales)
        with torch.no_grad():
            for i in self._strided:
                params[i].copy_(self._work[i])
        increment_version(self._counted)

    def _readable(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients as contiguous memory; raises for one that does not fit its parameter."""
        dtype, device = grads[0].dtype, self._device
        fit = dtype in validate.FLOATS
        for grad, shape in zip(grads, self._shapes, strict=True):
            if (
                grad.dtype is not dtype
                or grad.shape != shape
                or grad.layout is not torch.strided
                or grad.device != device
                or not grad.is_contiguous()
                or grad.is_neg()
            ):
                fit = False
                break
        if fit:
            return grads
        _check_grads(self._tensors.params, grads)
        return [validate.readable(grad) for grad in grads]


def _check_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if len(grads) != len(params):
        raise InvalidArgument(f"{_OP}: {len(grads)} grads came, {len(params)} params need as many")
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        name = f"grads[{i}]"
        validate.floats(_OP, name, grad)
        if grad.shape != param.shape:
            came, needed = tuple(grad.shape), tuple(param.shape)
            raise InvalidArgument(f"{_OP}: {name} has shape {came}, params[{i}] has {needed}")
        if grad.dtype != grads[0].dtype:
            raise InvalidDtype(f"{_OP}: {name} is {grad.dtype}, grads[0] is {grads[0].dtype}; a call takes one dtype")
        validate.device(_OP, f"params[{i}]", param.device, [(name, grad)])


def _kind(rule: OptimizerRule) -> tuple[str, int, bool, bool]:
    return rule.algorithm, rule.state_bits, rule.signed_state, rule.stochastic


def _check_rule(rule: OptimizerRule, tensors: OptimizerTensors) -> None:
    """Which lists the rule needs, and how they fit together."""
    if rule.algorithm not in ALGORITHMS or rule.state_bits not in (8, 32):
        raise InvalidArgument(f"{_OP}: {rule.algorithm!r} at {rule.state_bits} bits; make rules with optimizer_rule()")
    two, coded = ALGORITHMS[rule.algorithm] == 2, rule.state_bits == 8
    needed = {"state1": True, "state2": two, "absmax1": coded, "absmax2": coded and two, "streams": rule.stochastic}
    count = len(tensors.params)
    for name, need in needed.items():
        came = len(getattr(tensors, name))
        if came != (count if need else 0) and not (name == "streams" and not need):
            raise InvalidArgument(
                f"{_OP}: {name} has {came} entries, {count} params under {rule.algorithm} at {rule.state_bits} bits "
                f"need {count if need else 0}"
            )
    if len(tensors.compensation) not in (0, count):
        raise InvalidArgument(f"{_OP}: compensation has {len(tensors.compensation)} entries, needs none or {count}")
    if not count:
        return
    dtype = tensors.params[0].dtype
    if tensors.compensation and dtype not in (torch.float16, torch.bfloat16):
        raise InvalidDtype(f"{_OP}: compensation is for float16 and bfloat16 parameters, params are {dtype}")
    if rule.stochastic and (dtype != torch.bfloat16 or tensors.compensation):
        raise InvalidArgument(
            f"{_OP}: stochastic rounding is for bfloat16 parameters without compensation, params are {dtype}"
        )


def _check_states(rule: OptimizerRule, tensors: OptimizerTensors) -> None:
    """Every tensor against its parameter."""
    if not tensors.params:
        return
    first = tensors.params[0]
    state_dtype = torch.uint8 if rule.state_bits == 8 else torch.float32
    rows = 2 if rule.algorithm == "ademamix" else 1
    for i, param in enumerate(tensors.params):
        validate.floats(_OP, f"params[{i}]", param)
        if param.dtype != first.dtype:
            raise InvalidDtype(
                f"{_OP}: params[{i}] is {param.dtype}, params[0] is {first.dtype}; a call takes one dtype"
            )
        n = param.numel()
        blocks = -(-n // OPTIMIZER_BLOCK)
        sizes = {"state1": rows * n, "state2": n, "absmax1": rows * blocks, "absmax2": blocks, "compensation": n}
        dtypes = {"state1": state_dtype, "state2": state_dtype, "compensation": param.dtype}
        for name, size in sizes.items():
            of_all = getattr(tensors, name)
            if not of_all:
                continue
            value, label = of_all[i], f"{name}[{i}]"
            validate.dtype(_OP, label, value, dtypes.get(name, torch.float32))
            validate.length(
                _OP, label, value, size, f"params[{i}] of shape {tuple(param.shape)} under {rule.algorithm}"
            )
            if not value.is_contiguous():
                raise InvalidArgument(f"{_OP}: {label} has strides {value.stride()}, needs a contiguous tensor")
            validate.device(_OP, "params[0]", first.device, [(label, value)])
        validate.device(_OP, "params[0]", first.device, [(f"params[{i}]", param)])


def _require_apart(others: Iterable[tuple[str, Sequence[Tensor]]], tensors: OptimizerTensors) -> None:
    """Nothing that changes shares bytes with anything else."""
    changed = [(name, getattr(tensors, name), True) for name in _CHANGED]
    spans = sorted(
        (value.data_ptr(), value.data_ptr() + _extent(value), changes, f"{name}[{i}]")
        for name, values, changes in [*changed, *((name, values, False) for name, values in others)]
        for i, value in enumerate(values)
        if isinstance(value, Tensor) and value.layout is torch.strided and value.numel()
    )
    reach, writer = 0, ""  # how far what changes has come, and who
    held, reader = 0, ""  # the same of what is only read
    for start, end, changes, name in spans:
        other = writer if start < reach else reader if changes and start < held else ""
        if other:
            raise InvalidArgument(f"{_OP}: {name} and {other} share memory; each tensor needs its own")
        if changes:
            reach, writer = max(reach, end), name
        else:
            held, reader = max(held, end), name


def _extent(value: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = sum((size - 1) * abs(stride) for size, stride in zip(value.shape, value.stride(), strict=True))
    return (steps + 1) * value.element_size()


# The rule as the flat lists of a torch schema.
_INTEGERS = ("state_bits", "seed")
_BOOLEANS = ("nesterov", "skip_zeros", "stochastic", "bnb_codes", "signed_state")
_FLOATS = tuple(f.name for f in fields(OptimizerRule) if f.name not in (*_INTEGERS, *_BOOLEANS, "algorithm"))


def _signed64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def schema_arguments(rule: OptimizerRule, tensors: OptimizerTensors) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.qcore.optimizer_step``."""
    return (
        *(list(getattr(tensors, name)) for name in _CHANGED),
        list(tensors.grads),
        rule.algorithm,
        [_signed64(getattr(rule, name)) for name in _INTEGERS],
        [getattr(rule, name) for name in _BOOLEANS],
        [float(getattr(rule, name)) for name in _FLOATS],
        list(tensors.grad_scales),
        [_signed64(stream) for stream in tensors.streams],
    )


def _call_registered(rule: OptimizerRule, tensors: OptimizerTensors) -> None:
    torch.ops.qcore.optimizer_step(*schema_arguments(rule, tensors))


def _unpacked(
    params: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    compensation: list[Tensor],
    grads: list[Tensor],
    algorithm: str,
    integers: list[int],
    booleans: list[bool],
    floats: list[float],
    grad_scales: list[float],
    streams: list[int],
) -> tuple[OptimizerRule, OptimizerTensors]:
    """What :func:`schema_arguments` packed."""
    numbers: dict[str, Any] = dict(zip(_FLOATS + _BOOLEANS, (*floats, *booleans), strict=True))
    state_bits, seed = integers
    rule = OptimizerRule(algorithm, state_bits, seed=seed % 2**64, **numbers)
    return rule, OptimizerTensors(
        params, grads, state1, state2, absmax1, absmax2, compensation, grad_scales, [s % 2**64 for s in streams]
    )


def _registered(*arguments: Any) -> None:
    rule, tensors = _unpacked(*arguments)
    handle = PreparedOptimizerStep(rule, tensors)
    _check_grads(tensors.params, tensors.grads)
    _require_apart((("grads", tensors.grads),), tensors)
    handle(rule, tensors.grads, tensors.grad_scales)


def _registered_fake(*arguments: Any) -> None:
    """Nothing is returned, and what changes keeps its shape; but what does not fit is refused here too."""
    rule, tensors = _unpacked(*arguments)
    _check_rule(rule, tensors)
    _check_states(rule, tensors)
    _check_grads(tensors.params, tensors.grads)


register(
    _OP,
    "(Tensor(a!)[] params, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, "
    "Tensor(f!)[] compensation, Tensor[] grads, str algorithm, int[] integers, bool[] booleans, float[] floats, "
    "float[] grad_scales, int[] streams) -> ()",
    _registered,
    _registered_fake,
)
