"""Parameters that one call of the backend steps together, and what such a call needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from qcore.errors import InvalidArgument, InvalidDtype
from qcore.functional.paged import MemoryTier
from qcore.ops.optimizer import OptimizerRule, OptimizerTensors, PreparedOptimizerStep, prepare_optimizer_step
from qcore.ops.validate import FLOATS
from qcore.optim.clipping import grad_scale, history_of, recorded, squared_norms
from qcore.optim.sharded import as_dtensor, local, local_gradient
from qcore.optim.state import State

_step_of = itemgetter("step")
_CHANGED = ("state1", "state2", "absmax1", "absmax2", "kahan")  # tensors of a state that a prepared call writes to
_grad_of = attrgetter("grad")
_shape_of = attrgetter("shape")
_kind_of = attrgetter("dtype", "layout", "device")
Kind = tuple[torch.dtype, torch.layout, torch.device]
_PREPARED_AT_ONCE = 8  # subsets of a batch that have their own prepared call: experts take turns


@dataclass(eq=False)
class Member:
    """A parameter in a batch."""

    param: Tensor
    name: str  # in messages
    state: State
    stream: int  # of stochastic rounding (QC-OPT-007)


@dataclass(eq=False)
class Call:
    """One call of the backend, checked and ready."""

    batch: Batch
    handle: PreparedOptimizerStep
    rule: OptimizerRule
    grads: Sequence[Tensor]
    scales: Sequence[float]
    states: Sequence[State]
    histories: list[Tensor]  # of percentile clipping

    def run(self) -> None:
        """Step, then count it."""
        self.handle(self.rule, self.grads, self.scales)
        for state in self.states:
            state["step"] += 1
        for state, history in zip(self.states, self.histories):
            state["gnorm_vec"] = history


@dataclass(eq=False)
class Batch:
    """Parameters of one group with the same dtype, device, kind of state and settings."""

    members: list[Member]
    settings: Mapping[str, Any]  # the group's, or a parameter's own over them
    bits: int
    signed_state: bool
    compensated: bool  # by Kahan buffers
    memory: MemoryTier
    _params: list[Tensor] = field(init=False)
    _states: list[State] = field(init=False)
    _held: dict[str, list[Tensor]] = field(init=False)  # the states' tensors by key
    _sharded: bool = field(init=False)
    _prepared: dict[tuple[int, ...] | None, PreparedOptimizerStep] = field(init=False, default_factory=dict)
    _locals: list[Tensor] = field(init=False)
    _addresses: list[int] = field(init=False)
    _shapes: list[torch.Size] = field(init=False)
    _kinds: list[Kind] = field(init=False)
    _fitting: set[Kind] = field(init=False)  # kinds of gradients

    def __post_init__(self) -> None:
        self._params = [member.param for member in self.members]
        self._states = [member.state for member in self.members]
        self._held = {key: [state[key] for state in self._states] for key in _CHANGED if key in self._states[0]}
        self._sharded = any(as_dtensor(param) is not None for param in self._params)
        self._locate()

    def _locate(self) -> None:
        self._locals = [local(member.param, member.name) for member in self.members]
        self._addresses = [tensor.data_ptr() for tensor in self._locals]
        self._shapes = [tensor.shape for tensor in self._locals]
        self._kinds = list(map(_kind_of, self._locals))
        self._fitting = {(dtype, torch.strided, self._locals[0].device) for dtype in FLOATS}
        self._prepared.clear()

    def holds(self, state: Mapping[Tensor, State]) -> bool:
        """Whether the parameters and an optimizer's state are still what the batch was made from."""
        return (
            all(map(is_, map(state.get, self._params), self._states))
            and all(self._holds(key, tensors) for key, tensors in self._held.items())
            and list(map(_kind_of, self._locals)) == self._kinds
            and list(map(_shape_of, self._locals)) == self._shapes
        )

    def _holds(self, key: str, tensors: Sequence[Tensor]) -> bool:
        try:
            return all(map(is_, map(itemgetter(key), self._states), tensors))
        except KeyError:
            return False

    def local_of(self, index: int) -> Tensor:
        """The memory of a parameter on this rank."""
        return self._locals[index]

    def state_tensors(self) -> list[Tensor]:
        """Every state tensor, to be read ahead."""
        return [value for state in self._states for value in state.values() if isinstance(value, Tensor)]

    def calls(self, make_rule: MakeRule) -> list[Call]:
        """The calls of this step: one, unless parameters differ in how many steps they had.

        Parameters
        ----------
        make_rule : callable
            The rule of a batch at a step.

        Raises
        ------
        InvalidArgument, InvalidDtype
            A gradient that does not fit; nothing has changed.
        """
        grads: list[Tensor | None] = list(map(_grad_of, self._params))
        which: Sequence[int] | None = None
        if not all(map(is_not, grads, repeat(None))):
            which = [index for index, grad in enumerate(grads) if grad is not None]
            if not which:
                return []
        steps = [*map(_step_of, self._states)] if which is None else [self._states[index]["step"] for index in which]
        if steps.count(steps[0]) == len(steps):
            return [self._call(which, grads, make_rule)]
        everyone = range(len(grads)) if which is None else which
        by_step: dict[int, list[int]] = {}
        for index, step in zip(everyone, steps):
            by_step.setdefault(step, []).append(index)
        return [self._call(chosen, grads, make_rule) for chosen in by_step.values()]

    def _call(self, which: Sequence[int] | None, grads: Sequence[Tensor | None], make_rule: MakeRule) -> Call:
        chosen: list[Any] = list(grads) if which is None else [grads[index] for index in which]
        states = self._states if which is None else [self._states[index] for index in which]
        step = states[0]["step"] + 1
        percentile, scales, histories = self.settings["percentile_clipping"], [], []
        if percentile < 100:
            norms = squared_norms(chosen)
            past = [history_of(state) for state in states]
            scales = [grad_scale(history, step, norm, percentile) for history, norm in zip(past, norms)]
            histories = [recorded(history, step, norm) for history, norm in zip(past, norms)]
        readable = self._checked(which, chosen)
        if self.settings["maximize"]:
            scales = [-scale for scale in scales] if scales else [-1.0] * len(readable)
        rule = make_rule(self, step)
        return Call(self, self._handle(which, rule), rule, readable, scales, states, histories)

    def _checked(self, which: Sequence[int] | None, grads: list[Tensor]) -> list[Tensor]:
        """Local gradients that fit their parameters."""
        indices = range(len(grads)) if which is None else which
        if self._sharded or set(map(type, grads)) != {Tensor}:
            grads = [
                local_gradient(self._params[index], grad, f"gradient of {self.members[index].name}")
                for index, grad in zip(indices, grads)
            ]
        shapes = self._shapes if which is None else [self._shapes[index] for index in which]
        kinds = set(map(_kind_of, grads))
        fits = len(kinds) == 1 and kinds <= self._fitting and list(map(_shape_of, grads)) == shapes
        if not fits or self.settings["check_finite"]:
            self._complain(indices, grads)
        return grads

    def _complain(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Raise for the first gradient that does not fit its parameter, if one does not."""
        for index, grad in zip(indices, grads):
            name, own = self.members[index].name, self._locals[index]
            check_gradient(name, grad, self.settings["check_finite"])
            if grad.shape != own.shape or grad.device != own.device:
                raise InvalidArgument(
                    f"gradient of {name} has shape {tuple(grad.shape)} on {grad.device}, the parameter "
                    f"{tuple(own.shape)} on {own.device}"
                )
            if grad.dtype != grads[0].dtype:
                first = self.members[indices[0]].name
                raise InvalidDtype(
                    f"gradient of {name} is {grad.dtype}, that of {first} in the same group {grads[0].dtype}; needs one"
                )

    def _handle(self, which: Sequence[int] | None, rule: OptimizerRule) -> PreparedOptimizerStep:
        if self._sharded and self._addresses != [local(param, "").data_ptr() for param in self._params]:
            self._locate()
        key = None if which is None else tuple(which)
        handle = self._prepared.get(key)
        if handle is None:
            while len(self._prepared) >= _PREPARED_AT_ONCE:
                self._prepared.pop(next(iter(self._prepared)))
            handle = self._prepared[key] = self._prepare(range(len(self.members)) if which is None else which, rule)
        return handle

    def _prepare(self, which: Sequence[int], rule: OptimizerRule) -> PreparedOptimizerStep:
        states = [self._states[index] for index in which]

        def every(key: str) -> list[Tensor]:
            return [state[key] for state in states if key in state]

        tensors = OptimizerTensors(
            params=[self._locals[index] for index in which],
            grads=(),
            state1=every("state1"),
            state2=every("state2"),
            absmax1=every("absmax1") if self.bits == 8 else (),
            absmax2=every("absmax2") if self.bits == 8 else (),
            compensation=every("kahan") if self.compensated else (),
            streams=[self.members[index].stream for index in which] if rule.stochastic else (),
        )
        return prepare_optimizer_step(rule, tensors)


MakeRule = Callable[[Batch, int], OptimizerRule]


def check_gradient(name: str, grad: Tensor, finite: bool) -> None:
    """Raise unless a gradient is one that a step takes.

    Parameters
    ----------
    name : str
        Of the parameter.
    grad : Tensor
        The local part.
    finite : bool
        Also refuse NaN and infinity.
    """
    if grad.layout is not torch.strided:
        raise InvalidArgument(
            f"gradient of {name} is sparse ({grad.layout}), needs a dense one; make the layer with sparse=False, or "
            "use torch.optim.SparseAdam"
        )
    if grad.dtype not in FLOATS:
        raise InvalidDtype(f"gradient of {name} is {grad.dtype}, needs float32, float16 or bfloat16")
    if finite and not bool(torch.isfinite(grad).all()):
        raise InvalidArgument(
            f"gradient of {name} holds a NaN or an infinity (check_finite=True); no parameter was changed"
        )
