"""Guarded buffers: every tensor that a backend sees lies inside a larger one, between canaries.

A call runs twice, with different poison around and inside the buffers and with a different alignment. What a backend
writes outside an output, or into an input, shows in the canaries; what it reads outside an input, or leaves unwritten
in an output, shows as a difference between the two runs (QC-NUM-006). A guarded tensor is a view: any torch device will
do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

MARGIN = 16384  # bytes on either side: more than one block of the largest blocksize in float32
_ALIGN = 64


@dataclass(frozen=True)
class Poison:
    """Bytes that fill canaries and fresh outputs, and whether a tensor is aligned to its element type only."""

    inputs: int
    outputs: int
    misaligned: bool


# 0xFF.. is NaN in every float dtype and -1 as int8; 0x7B.. is finite and huge, so it shows where NaN is left out.
POISONS = (Poison(0xFF, 0xA5, misaligned=False), Poison(0x7B, 0x5A, misaligned=True))


class GuardError(AssertionError):
    """A backend wrote where it may not, or its result depends on what lies outside its inputs."""


class Placed(Protocol):
    """A tensor that was put somewhere for one call, and the check of its surroundings after it."""

    tensor: torch.Tensor

    def check(self) -> None: ...


class Placement(Protocol):
    """A way to put a tensor somewhere: (name, CPU tensor with shape, dtype and, for an input, values)."""

    def __call__(self, name: str, content: torch.Tensor, device: torch.device, *, is_input: bool) -> Placed: ...


class GuardedTensor:
    """A contiguous tensor with canaries on both sides.

    Parameters
    ----------
    name : str
        The argument's name, for messages.
    content : Tensor
        A CPU tensor with the shape, dtype and, for an input, the values.
    device : torch.device
    is_input : bool
        An input holds ``content`` and must not change at all; an output starts as poison.
    poison : Poison
    """

    def __init__(
        self, name: str, content: torch.Tensor, device: torch.device, *, is_input: bool, poison: Poison = POISONS[0]
    ) -> None:
        self.name = name
        self.is_input = is_input
        size = content.element_size()
        self._nbytes = content.numel() * size
        total = MARGIN + 2 * _ALIGN + self._nbytes + MARGIN
        self._raw = torch.empty(total, dtype=torch.uint8, device=device)
        self._start = MARGIN + (-(self._raw.data_ptr() + MARGIN)) % _ALIGN + (size if poison.misaligned else 0)
        # Filled and compared by NumPy: on a host, torch would start its threads for each of these small arrays.
        self._before = np.full(total, poison.inputs if is_input else poison.outputs, dtype=np.uint8)
        if is_input and self._nbytes:
            values = content.contiguous().view(-1).view(torch.uint8).numpy()
            self._before[self._start : self._start + self._nbytes] = values
        if device.type == "cpu":
            self._raw.numpy()[:] = self._before
        else:
            self._raw.copy_(torch.from_numpy(self._before))
        body = self._raw[self._start : self._start + self._nbytes]
        self.tensor = body.view(content.dtype).view(content.shape)

    def check(self) -> None:
        """Raise ``GuardError`` if anything changed that may not."""
        changed = self._raw.cpu().numpy() != self._before
        start, end = self._start, self._start + self._nbytes
        if not self.is_input:
            changed[start:end] = False
        if not changed.any():
            return
        where = np.flatnonzero(changed)
        early, late = where[where < start], where[where >= end]
        inside = where.size - early.size - late.size
        kind = "input" if self.is_input else "output"
        parts = []
        if early.size:
            parts.append(f"{early.size} bytes before its start, the last at offset {int(early[-1]) - start}")
        if late.size:
            parts.append(f"{late.size} bytes past its end, the first at end + {int(late[0]) - end}")
        if inside:
            parts.append(f"{inside} bytes inside it, although it is an input")
        raise GuardError(f"{kind} {self.name!r} ({self._nbytes} bytes): written: {'; '.join(parts)} (QC-NUM-006)")

    def untouched(self) -> None:
        """Raise ``GuardError`` if anything changed at all: after a call that was refused."""
        self.check()
        if not np.array_equal(self._raw.cpu().numpy(), self._before):
            raise GuardError(f"output {self.name!r}: written by a call that was refused (QC-NUM-006)")


# Both poisons: the way in which every call is made unless a case says otherwise.
GUARDS: tuple[Placement, ...] = tuple(partial(GuardedTensor, poison=poison) for poison in POISONS)
