"""The state of one parameter: which tensors, how they are made, checked, and taken from 32 bits to 8 and back.

Names and layout are those of bitsandbytes 0.50.2: ``step``; ``state1`` and ``state2`` in the parameter's shape, float32
or uint8 codes; for codes also ``qmap1``, ``qmap2`` (the codebook) and ``absmax1``, ``absmax2`` (a scale for 256
elements). AdEMAMix keeps its two first moments in one ``state1`` of shape ``(2, *shape)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcore.backend.optimizer import OPTIMIZER_BLOCK
from qcore.errors import FormatError
from qcore.functional.paged import MemoryTier
from qcore.optim.codes import codebook, decode_rows, encode_rows, zero_code

State = dict[str, Any]
TENSORS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "kahan", "gnorm_vec", "unorm_vec")
NORMS_KEPT = 100  # of percentile clipping


@dataclass(frozen=True)
class Moment:
    """One state tensor of an algorithm."""

    number: int  # of state1, absmax1, qmap1
    signed: bool  # the codebook of a fresh 8-bit state
    rows: int = 1  # averages kept in one tensor
    either: bool = False  # bitsandbytes uses the signed codebook where the unsigned one is fresh state's

    def key(self, part: str) -> str:
        """``state1``, ``absmax1`` or ``qmap1``."""
        return f"{part}{self.number}"

    def shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the state of a parameter."""
        return (self.rows, *param_shape) if self.rows > 1 else param_shape

    def absmax_shape(self, numel: int) -> tuple[int, ...]:
        """The shape of the scales of a parameter's 8-bit state."""
        blocks = -(-numel // OPTIMIZER_BLOCK)
        return (self.rows, blocks) if self.rows > 1 else (blocks,)


SIGNED = Moment(1, True)
UNSIGNED = Moment(2, False)
UNSIGNED_FIRST = Moment(1, False, either=True)
FAST_AND_SLOW = Moment(1, True, rows=2)


def is_signed(moment: Moment, state: Mapping[str, Any]) -> bool:
    """Which codebook an 8-bit state of the moment is in."""
    qmap: Tensor = state[moment.key("qmap")]
    if not moment.either or qmap is codebook(moment.signed, qmap.device):
        return moment.signed
    return bool(qmap[0] < 0)


def bits_of(state: Mapping[str, Any]) -> int:
    """8 or 32."""
    return 8 if state["state1"].dtype == torch.uint8 else 32


def fresh(moments: tuple[Moment, ...], param: Tensor, bits: int, memory: MemoryTier, start: float = 0.0) -> State:
    """State before the first step: every moment is ``start``.

    Parameters
    ----------
    moments : tuple of Moment
    param : Tensor
        The local tensor.
    bits : {8, 32}
    memory : MemoryTier
        Where the large tensors go.
    start : float
        Not negative; Adagrad's initial sum of squares.
    """
    state: State = {"step": 0}
    shape, device = tuple(param.shape), param.device
    for moment in moments:
        values = memory.zeros(moment.shape(shape), torch.uint8 if bits == 8 else torch.float32, device)
        state[moment.key("state")] = values
        if bits == 32:
            if start:
                values.fill_(start)
            continue
        code = codebook(moment.signed, device)
        values.fill_(255 if start else zero_code(moment.signed))  # code 255 is 1.0
        state[moment.key("qmap")] = code
        state[moment.key("absmax")] = torch.full(moment.absmax_shape(param.numel()), float(start), device=device)
    return state


def check(moments: tuple[Moment, ...], state: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raise ``FormatError`` unless ``state`` is the state of ``param``.

    Parameters
    ----------
    moments : tuple of Moment
    state : mapping
        As a state dict holds it, unwrapped.
    param : Tensor
        The local tensor.
    name : str
        What messages call the parameter.
    """
    missing = [key for key in ("step", *(moment.key("state") for moment in moments)) if key not in state]
    if missing:
        raise FormatError(
            f"load_state_dict: {name} has no {' and no '.join(missing)}, but "
            f"{', '.join(map(str, state)) or 'nothing'}; it was written by another optimizer"
        )
    numel = param.numel()
    for moment in moments:
        key, values = moment.key("state"), state[moment.key("state")]
        expected = moment.shape(tuple(param.shape))
        if tuple(values.shape) != expected:
            raise FormatError(
                f"load_state_dict: {key} of {name} has shape {tuple(values.shape)}, a parameter of shape "
                f"{tuple(param.shape)} needs {expected}"
            )
        if values.dtype not in (torch.uint8, torch.float32):
            raise FormatError(f"load_state_dict: {key} of {name} is {values.dtype}, needs torch.uint8 or torch.float32")
        if values.dtype == torch.uint8:
            _check_codes(moment, state, numel, name)
    if len({state[moment.key("state")].dtype for moment in moments}) > 1:
        raise FormatError(f"load_state_dict: state1 and state2 of {name} differ in dtype")


def _check_codes(moment: Moment, state: Mapping[str, Any], numel: int, name: str) -> None:
    absmax, qmap = state.get(moment.key("absmax")), state.get(moment.key("qmap"))
    if absmax is None or qmap is None:
        raise FormatError(
            f"load_state_dict: {name} has 8-bit {moment.key('state')} without {moment.key('absmax')} and "
            f"{moment.key('qmap')}; state with one scale a tensor (block_wise=False) cannot be read"
        )
    expected = moment.absmax_shape(numel)
    if tuple(absmax.shape) != expected or absmax.dtype != torch.float32:
        raise FormatError(
            f"load_state_dict: {moment.key('absmax')} of {name} is {absmax.dtype} of shape {tuple(absmax.shape)}, "
            f"{numel} elements in blocks of {OPTIMIZER_BLOCK} need torch.float32 of shape {expected}"
        )
    allowed = (True, False) if moment.either else (moment.signed,)
    if not any(torch.equal(qmap.to("cpu", torch.float32), codebook(signed, torch.device("cpu"))) for signed in allowed):
        raise FormatError(
            f"load_state_dict: {moment.key('qmap')} of {name} is not the dynamic codebook; state in another one cannot "
            "be stepped"
        )


def converted(
    moments: tuple[Moment, ...], state: State, param: Tensor, bits: int, memory: MemoryTier, *, copy: bool = False
) -> State:
    """The same state at ``bits``, on the parameter's device and in ``memory``.

    Parameters
    ----------
    moments : tuple of Moment
    state : dict
        Checked.
    param : Tensor
        The local tensor.
    bits : {8, 32}
    memory : MemoryTier
    copy : bool
        Copy what fits already, too.
    """
    device = param.device
    result: State = {
        key: _moved(value, torch.device("cpu") if key == "gnorm_vec" else device, copy)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
        if key not in _coded_keys(moments)
    }
    for moment in moments:
        key = moment.key("state")
        values: Tensor = state[key]
        if bits_of(state) == bits:
            kept = values.device == device and values.is_contiguous() and memory.holds(values) and not copy
            result[key] = values if kept else memory.zeros(tuple(values.shape), values.dtype, device).copy_(values)
            if bits == 8:
                result[moment.key("qmap")] = codebook(is_signed(moment, state), device)
                result[moment.key("absmax")] = _moved(state[moment.key("absmax")], device, copy)
            continue
        target = memory.zeros(tuple(values.shape), torch.uint8 if bits == 8 else torch.float32, device)
        result[key] = target
        if bits == 8:
            result[moment.key("qmap")] = codebook(moment.signed, device)
            result[moment.key("absmax")] = encode(moment, values.to(device), target)
        else:
            target.copy_(decode(moment, state))
    return result


def _moved(value: Tensor, device: torch.device, copy: bool) -> Tensor:
    return value.to(device, copy=copy, memory_format=torch.contiguous_format)


def _coded_keys(moments: tuple[Moment, ...]) -> set[str]:
    return {moment.key(part) for moment in moments for part in ("state", "absmax", "qmap")}


def decode(moment: Moment, state: Mapping[str, Any]) -> Tensor:
    """8-bit state as float32 in the same shape."""
    codes, absmax = state[moment.key("state")], state[moment.key("absmax")]
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    decode_rows(_rows(moment, codes), _rows(moment, absmax), _rows(moment, out), is_signed(moment, state))
    return out


def encode(moment: Moment, values: Tensor, codes: Tensor) -> Tensor:
    """float32 state to 8 bits: writes ``codes``, returns the scales."""
    absmax = torch.empty(moment.absmax_shape(codes.numel() // moment.rows), device=values.device)
    encode_rows(_rows(moment, values), _rows(moment, codes), _rows(moment, absmax), moment.signed)
    return absmax


def _rows(moment: Moment, tensor: Tensor) -> Tensor:
    """A tensor as one row an average: blocks never run from one average into the next."""
    return tensor.contiguous().view(moment.rows, tensor.numel() // moment.rows)
