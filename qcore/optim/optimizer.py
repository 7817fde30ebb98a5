"""What every optimizer shares: groups and settings, making state, the step, state dicts."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from qcore.backend.interface import Backend
from qcore.backend.registry import backend_for, selection
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.functional.paged import DeviceMemory, MemoryTier, paged_memory
from qcore.ops.optimizer import OptimizerRule, optimizer_rule
from qcore.ops.validate import FLOATS
from qcore.optim import checkpoint
from qcore.optim.batch import Batch, Member, check_gradient
from qcore.optim.overrides import GlobalOptimManager
from qcore.optim.settings import ARGS, STRUCTURE, check_group, gather
from qcore.optim.sharded import is_split, local, local_gradient, rank_of
from qcore.optim.sharded_norms import limit_sharded
from qcore.optim.state import Moment, State, bits_of, converted, fresh, is_signed

_IN_MEMORY = DeviceMemory()
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Optimizer8bit(torch.optim.Optimizer):
    """Base of the optimizers whose state may be in 8 bits; use one of its subclasses.

    A step is one call of the backend for each list of parameters that share a group, a dtype and a number of steps. It
    either steps every parameter or raises before it changed one.
    """

    algorithm: ClassVar[str]  # of QC-OPT-010 to QC-OPT-015
    moments: ClassVar[tuple[Moment, ...]]
    bits: ClassVar[int | None] = None  # fixed by the class
    paged: ClassVar[bool] = False  # always paged

    def __init__(
        self,
        params: ParamsT,
        hyperparameters: Mapping[str, Any],
        optim_bits: int,
        args: object,
        min_8bit_size: int,
        options: Mapping[str, Any],
    ) -> None:
        name = type(self).__name__
        # bitsandbytes writes optim_bits=32 in the signatures of its 8-bit classes too: there it means nothing.
        wanted = self.bits if self.bits is not None and optim_bits == 32 else optim_bits
        settings = gather(name, args, wanted, min_8bit_size, options)
        settings["is_paged"] = settings["is_paged"] or self.paged
        self._begin()
        super().__init__(params, {**hyperparameters, **settings})

    @property
    def args(self) -> SimpleNamespace:
        """The constructor's settings by bitsandbytes' names; a copy: parameter groups have those that count."""
        return SimpleNamespace(**{name: self.defaults[name] for name in ARGS})

    def _begin(self) -> None:
        """What is not saved, copied or pickled: it is made again when it is needed."""
        self._batches: list[Batch] | None = None
        self._made_for: tuple[Any, ...] = ()
        self._idle: list[Tensor] = []  # parameters that have had no gradient yet
        self._tiers: dict[tuple[torch.device, str | None, Backend], MemoryTier] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; settings that it does not have are those of the constructor.

        Raises
        ------
        InvalidArgument, InvalidDtype
            A setting or a parameter that no step could honour; the group is not added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group, self.bits)
            for index, param in enumerate(group["params"]):
                if param.requires_grad and param.dtype not in FLOATS:
                    raise InvalidDtype(
                        f"{type(self).__name__}: {_name(group, index)} is {param.dtype}, needs float32, float16 or "
                        "bfloat16"
                    )
        except Exception:
            self.param_groups.pop()
            raise
        self._batches = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss again, with gradients, and returns it.

        Returns
        -------
        What ``closure`` returned, or None.

        Raises
        ------
        InvalidArgument, InvalidDtype, Unsupported, OutOfMemory
            No parameter was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def _step(self) -> None:
        if not self._is_current():
            self._batches = self._make_batches()
        assert self._batches is not None
        # Everything is checked before anything runs.
        calls = [call for batch in self._batches for call in batch.calls(self._rule)]
        limit_sharded(calls)
        for call, following in zip(calls, [*calls[1:], None]):
            batch = call.batch
            if batch.memory.window:
                batch.memory.ready(batch.state_tensors())
            if following is not None and following.batch is not batch and following.batch.memory.window:
                following.batch.memory.prefetch(following.batch.state_tensors())
            call.run()

    def _is_current(self) -> bool:
        """Whether the batches of the last step still fit."""
        if self._batches is None or self._made_for != self._conditions():
            return False
        if not all(batch.holds(self.state) for batch in self._batches):
            return False
        return all(param.grad is None for param in self._idle)

    def _conditions(self) -> tuple[Any, ...]:
        """What batches depend on, besides tensors."""
        groups = ((len(group["params"]), *(group[key] for key in _STRUCTURE_KEYS)) for group in self.param_groups)
        return (selection(), GlobalOptimManager.get_instance().version, *groups)

    def _make_batches(self) -> list[Batch]:
        self._idle = []
        drafts: dict[tuple[Any, ...], list[_Draft]] = {}
        number = 0
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                name = _name(group, index, number)
                number += 1
                if param.grad is None and not self.state.get(param):
                    self._idle.append(param)
                    continue
                settings = self._settings(group_index, index)
                own = local(param, name)
                self._check(param, own, name, settings)
                memory = self._memory(settings, own.device)
                state = self._settled(param, own, name, settings, memory)
                member = Member(param, name, state, (rank_of(param) << 32) + number - 1)
                # A parameter with settings, or with a limit (qcore.optim.sharded_norms), of its own is its own batch.
                alone = settings is not group or (settings["max_unorm"] > 0 and is_split(param))
                key = (group_index, number if alone else 0, *self._kind(own, settings, state))
                alike = drafts.setdefault(key, [])
                if not alike or (memory.window and alike[-1].size > memory.window):
                    alike.append(_Draft([], settings, memory))
                alike[-1].members.append(member)
                alike[-1].size += sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        self._made_for = self._conditions()
        return [
            Batch(draft.members, draft.settings, bits, signed, compensated, draft.memory)
            for (_, _, bits, signed, compensated, *_), alike in drafts.items()
            for draft in alike
        ]

    def _settings(self, group_index: int, index: int) -> Mapping[str, Any]:
        """What holds for a parameter: its group's settings, or its own over them."""
        group = self.param_groups[group_index]
        override = GlobalOptimManager.get_instance().config_of(group["params"][index], group_index, index)
        if not override:
            return group
        settings = ChainMap(override, group)
        self._check_group(settings)
        return settings

    def _check_group(self, settings: Mapping[str, Any], fixed_bits: int | None = None) -> None:
        check_group(type(self).__name__, settings, 3 if self.algorithm == "ademamix" else 2, fixed_bits)

    def _kind(self, own: Tensor, settings: Mapping[str, Any], state: State) -> tuple[Any, ...]:
        """What the parameters of a batch share: bits, codebook, Kahan buffer, dtype, device."""
        bits = bits_of(state)
        signed = bits == 8 and self.moments[0].either and is_signed(self.moments[0], state)
        return bits, signed, bool(settings["kahan"]) and own.dtype in _SIXTEEN_BITS, own.dtype, own.device

    def _settled(self, param: Tensor, own: Tensor, name: str, settings: Mapping[str, Any], memory: MemoryTier) -> State:
        """The parameter's state as its settings want it, made or converted if need be."""
        memory.check_open()
        known: State = self.state[param]
        bits = self._bits(param, settings)
        if known:
            lost = [key for key, value in known.items() if isinstance(value, Tensor) and value.device.type == "meta"]
            if lost:
                raise InvalidArgument(
                    f"{lost[0]} of {name} is on the meta device, where it has no values; load the state"
                )
            shape, expected = tuple(known["state1"].shape), self.moments[0].shape(tuple(own.shape))
            if shape != expected:
                raise InvalidArgument(
                    f"{name} has shape {tuple(own.shape)} and state1 of shape {shape}, needs {expected}; make a new "
                    "optimizer, or give the parameter its shape back"
                )
            state = converted(self.moments, known, own, bits, memory)
        else:
            state = fresh(self.moments, own, bits, memory, settings.get("initial_accumulator_value", 0.0))
        if settings["kahan"] and own.dtype in _SIXTEEN_BITS and "kahan" not in state:
            state["kahan"] = memory.zeros(tuple(own.shape), own.dtype, own.device)
        # In place: whoever holds the state sees the one that steps use.
        known.clear()
        known.update(state)
        return known

    def _bits(self, param: Tensor, settings: Mapping[str, Any]) -> int:
        return 8 if settings["optim_bits"] == 8 and param.numel() >= settings["min_8bit_size"] else 32

    def _check(self, param: Tensor, own: Tensor, name: str, settings: Mapping[str, Any]) -> None:
        """Raise unless the parameter can be stepped under these settings; before any state is made."""
        if own.dtype not in FLOATS:
            raise InvalidDtype(f"{name} is {own.dtype}, needs float32, float16 or bfloat16")
        if own.device.type == "meta":
            raise InvalidArgument(f"{name} is on the meta device, where it has no memory; materialize it first")
        if settings["stochastic_rounding"] and own.dtype == torch.float16:
            raise InvalidDtype(f"stochastic_rounding: {name} is float16, needs bfloat16 (or float32, not rounded)")
        if param.grad is not None:
            check_gradient(name, local_gradient(param, param.grad, f"gradient of {name}"), finite=False)

    def _memory(self, settings: Mapping[str, Any], device: torch.device) -> MemoryTier:
        if not settings["is_paged"]:
            return _IN_MEMORY
        key = (device, settings["paged_dir"], backend_for(device))
        if key not in self._tiers:
            self._tiers[key] = paged_memory(device, settings["paged_dir"])
        return self._tiers[key]

    def close(self) -> None:
        """Give the memory or the files of paged state back now, and the whole state with them; a later step raises.

        Does nothing if no state is paged.
        """
        if not self._tiers:
            return
        for tier in self._tiers.values():
            tier.close()
        self._batches = None
        self.state = defaultdict(dict)

    def _rule(self, batch: Batch, step: int) -> OptimizerRule:
        settings = batch.settings
        stochastic = settings["stochastic_rounding"] and batch.members[0].param.dtype == torch.bfloat16
        return optimizer_rule(
            self.algorithm,
            step=step,
            state_bits=batch.bits,
            max_unorm=settings["max_unorm"],
            skip_zeros=settings["skip_zeros"],
            stochastic=stochastic,
            seed=settings["seed"] if stochastic else 0,
            bnb_codes=settings["exact_bitsandbytes"],
            signed_state=batch.signed_state,
            **self._scalars(settings, step),
        )

    def _scalars(self, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The hyperparameters of a step, as :func:`~qcore.ops.optimizer.optimizer_rule` takes them."""
        return {
            "lr": float(settings["lr"]),
            "betas": tuple(float(beta) for beta in settings["betas"]),
            "eps": float(settings["eps"]),
            "weight_decay": float(settings["weight_decay"]),
        }

    def state_dict(self) -> dict[str, Any]:
        """The state in bitsandbytes' layout: its 8-bit optimizers load it, and this one loads theirs.

        Tensors are the optimizer's own, not copies, except for DTensor parameters: theirs are float32 DTensors.
        """
        return checkpoint.exported(super().state_dict(), self.param_groups, self.moments)

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Take over state from this optimizer, bitsandbytes' or, for Adam, SGD, RMSprop and Adagrad, torch's.

        State is converted to the number of bits that this optimizer keeps.

        Parameters
        ----------
        state_dict : mapping
        move_to_device : bool
            False leaves tensors on their device until the next step.

        Raises
        ------
        FormatError
            The state does not fit; this optimizer is unchanged.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        loaded, groups = checkpoint.imported(state_dict, self.param_groups, self.moments, self.algorithm)
        for group, saved in zip(self.param_groups, groups, strict=True):
            self._check_group({**group, **saved})
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param in loaded:
                    loaded[param] = self._loaded(
                        loaded[param], param, self._settings(group_index, index), move_to_device
                    )
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
        self.state = defaultdict(dict, loaded)
        self._batches = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _loaded(self, saved: State, param: Tensor, settings: Mapping[str, Any], move_to_device: bool) -> State:
        """Saved state as this optimizer keeps it; shares nothing with what was saved."""
        if not move_to_device:
            return {key: value.clone() if isinstance(value, Tensor) else value for key, value in saved.items()}
        own = local(param, "parameter")
        memory = self._memory(settings, own.device)
        memory.check_open()
        return converted(self.moments, saved, own, self._bits(param, settings), memory, copy=True)


_STRUCTURE_KEYS = sorted(STRUCTURE)


@dataclass
class _Draft:
    """A batch while parameters are still added to it."""

    members: list[Member]
    settings: Mapping[str, Any]
    memory: MemoryTier
    size: int = 0  # bytes of state


def _name(group: Mapping[str, Any], index: int, number: int | None = None) -> str:
    """What messages call a parameter."""
    names = group.get("param_names")
    label = f"parameter {index if number is None else number}"
    return f"{label} ({names[index]})" if names else label
