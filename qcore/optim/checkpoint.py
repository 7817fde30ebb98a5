"""State dicts: out in bitsandbytes' layout, in from bitsandbytes, torch.optim and ``torch.distributed.checkpoint``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcore.errors import FormatError
from qcore.optim.settings import STRUCTURE
from qcore.optim.sharded import as_dtensor, unwrap, wrap
from qcore.optim.state import TENSORS, Moment, State, bits_of, check, decode

# bitsandbytes puts the tensors one level down, where FSDP's gathering does not look for them.
WRAPPER = "__bnb_optimizer_quant_state__"
# Algorithm -> torch.optim's names of its moments.
_TORCH_MOMENTS: Mapping[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "momentum": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}
# What torch.optim keeps in groups for itself, and what it must be for the steps to go on as they were.
_TORCH_ONLY = frozenset({"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"})
_TORCH_MUST_BE_OFF = ("amsgrad", "centered")
_TORCH_MOMENTUM = frozenset({"momentum", "dampening"})

Groups = Sequence[Mapping[str, Any]]


def exported(state_dict: Mapping[str, Any], groups: Groups, moments: tuple[Moment, ...]) -> dict[str, Any]:
    """torch's state dict of an optimizer, in bitsandbytes' layout.

    Parameters
    ----------
    state_dict : mapping
        ``state`` by number of the parameter, ``param_groups``.
    groups : sequence of mapping
        The optimizer's own, with the parameters.
    moments : tuple of Moment
    """
    numbers = {
        number: (param, group["max_unorm"] > 0)
        for packed, group in zip(state_dict["param_groups"], groups, strict=True)
        for number, param in zip(packed["params"], group["params"], strict=True)
    }
    states = {
        key: _exported_state(state, *numbers[key], moments) if key in numbers else state
        for key, state in state_dict["state"].items()
    }
    packed = [
        {key: value for key, value in group.items() if key not in STRUCTURE} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": states, "param_groups": packed}


def _exported_state(state: Mapping[str, Any], param: Tensor, limited: bool, moments: tuple[Moment, ...]) -> State:
    if not state:
        return {}
    if as_dtensor(param) is not None:
        return _exported_shard(state, param, moments)
    outside: State = {key: value for key, value in state.items() if key not in TENSORS}
    wrapped: State = {key: value for key, value in state.items() if key in TENSORS}
    if limited:  # bitsandbytes' scratch for the norm, without which its LAMB and LARS do not step
        wrapped["unorm_vec"] = torch.zeros(1, device=param.device)
    return {**outside, WRAPPER: wrapped}


def _exported_shard(state: Mapping[str, Any], param: Tensor, moments: tuple[Moment, ...]) -> State:
    """Float32 DTensors: codes and scales of one sharding mean nothing in another."""
    result: State = {"step": state["step"]}
    for moment in moments:
        key = moment.key("state")
        result[key] = wrap(param, decode(moment, state) if bits_of(state) == 8 else state[key])
    if "kahan" in state:
        result["kahan"] = wrap(param, state["kahan"])
    if "gnorm_vec" in state:
        result["gnorm_vec"] = state["gnorm_vec"]
    return result


def imported(
    state_dict: Mapping[str, Any], groups: Groups, moments: tuple[Moment, ...], algorithm: str
) -> tuple[dict[Any, State], list[dict[str, Any]]]:
    """A state dict as state of parameters and changes of groups; nothing is copied or changed.

    Parameters
    ----------
    state_dict : mapping
    groups : sequence of mapping
        The optimizer's own.
    moments : tuple of Moment
    algorithm : str

    Returns
    -------
    states : dict
        By parameter, its tensors local and in the file's precision; what belongs to no parameter by its key.
    groups : list of dict
        What to change in each group.

    Raises
    ------
    FormatError
        It does not fit the parameters.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise FormatError(
            f"load_state_dict: there is no {' and no '.join(missing)}; is this an optimizer's state dict?"
        )
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise FormatError(
            f"load_state_dict: the state dict has {len(saved_groups)} parameter groups, this optimizer {len(groups)}"
        )
    params: dict[Any, Tensor] = {}
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise FormatError(
                f"load_state_dict: group {index} of the state dict has {len(saved['params'])} parameters, this "
                f"optimizer's {len(group['params'])}"
            )
        params.update(zip(saved["params"], group["params"], strict=True))
    loaded: dict[Any, State] = {}
    for key, state in state_dict["state"].items():
        if key not in params:
            loaded[key] = state
        elif state:
            loaded[params[key]] = _imported_state(state, params[key], f"parameter {key}", moments, algorithm)
    return loaded, [dict(_imported_group(saved, algorithm)) for saved in saved_groups]


def _imported_state(
    saved: Mapping[str, Any], param: Tensor, name: str, moments: tuple[Moment, ...], algorithm: str
) -> State:
    state: State = {**{key: value for key, value in saved.items() if key != WRAPPER}, **saved.get(WRAPPER, {})}
    if "state1" not in state:
        state = _from_torch(state, name, moments, algorithm)
    dtensor = as_dtensor(param)
    if dtensor is not None:
        state = _imported_shard(state, param, name, moments)
        param = dtensor.to_local()
    check(moments, state, param, name)
    state["step"] = int(state["step"])
    state.pop("unorm_vec", None)  # scratch of bitsandbytes
    return state


def _from_torch(state: State, name: str, moments: tuple[Moment, ...], algorithm: str) -> State:
    names = _TORCH_MOMENTS.get(algorithm, ())
    if any(not isinstance(state.get(theirs), Tensor) for theirs in names) or not names:
        raise FormatError(
            f"load_state_dict: {name} has {', '.join(map(str, state)) or 'nothing'}; needs state1, or torch.optim's "
            f"{' and '.join(names) or 'equivalent, which this algorithm does not have'}"
        )
    others = [key for key in state if key not in (*names, "step") and state[key] is not None]
    if others:
        raise FormatError(f"load_state_dict: {name} also has {', '.join(others)}, which this optimizer does not keep")
    result: State = {"step": state.get("step", 1)}  # torch's SGD does not count; it has a buffer from step 1 on
    for moment, theirs in zip(moments, names, strict=True):
        result[moment.key("state")] = state[theirs].to(torch.float32)
    return result


def _imported_shard(state: State, param: Tensor, name: str, moments: tuple[Moment, ...]) -> State:
    """The local part of state of a DTensor parameter, as float32."""
    result: State = {"step": state["step"]} if "step" in state else {}
    for moment in moments:
        key = moment.key("state")
        if key not in state:
            continue
        values: Tensor = state[key]
        if values.dtype == torch.uint8:
            # A checkpoint of a model that was not sharded.
            check(moments, state, param, name)
            values = decode(moment, state)
        result[key] = unwrap(param, values, name)
    if "kahan" in state:
        result["kahan"] = unwrap(param, state["kahan"], name)
    if "gnorm_vec" in state:
        result["gnorm_vec"] = state["gnorm_vec"]
    return result


def _imported_group(saved: Mapping[str, Any], algorithm: str) -> Iterator[tuple[str, Any]]:
    """What a saved group says, in this optimizer's words."""
    for key in _TORCH_MUST_BE_OFF:
        if saved.get(key):
            raise FormatError(f"load_state_dict: the state dict is of an optimizer with {key}=True, this one has none")
    from_torch = "foreach" in saved
    if from_torch and algorithm == "momentum":
        yield "betas", (saved["momentum"], saved["dampening"])
    if from_torch and algorithm == "rmsprop":
        if saved["momentum"]:
            raise FormatError("load_state_dict: the state dict is of an RMSprop with momentum, this one has none")
        yield "betas", (saved["alpha"], saved["momentum"])
    dropped = {"params", *STRUCTURE, *_TORCH_ONLY, *_TORCH_MUST_BE_OFF}
    if from_torch:
        dropped |= {*_TORCH_MOMENTUM, "alpha"}
    for key, value in saved.items():
        if key not in dropped:
            yield key, value.clone() if isinstance(value, Tensor) else value
