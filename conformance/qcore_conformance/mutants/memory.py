"""Mutants that handle memory, errors, threads or the process wrongly, in every op (QC-NUM-005 to QC-NUM-007)."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore.backend import OPS, Backend, Description, OptimizerTensors, Weight4bit, WeightInt4, get_backend
from qcore.errors import InvalidArgument
from qcore_conformance.model import Outcome
from qcore_conformance.mutants.mutant import mutant

ANY = tuple(OPS)
TWO = ("quantize_4bit", "gemm_4bit")
# What these ops have to refuse is not known to the frontend alone: a codebook's values, a K whose sums may overflow.
REFUSING = ("quantize_blockwise", "quantize_absmax", "int8_gemm", "int8_scaled_gemm")
# What optimizer_step changes.
_IN_PLACE = ("params", "state1", "state2", "absmax1", "absmax2", "compensation")


class AnyOp(Backend):
    """The reference with every op going through :meth:`around`."""

    name = "any-op"

    def __init__(self) -> None:
        self.reference = get_backend("cpu_reference")
        self.calls = 0

    def describe(self, device: torch.device) -> Description:
        own = self.reference.describe(device)
        return Description(self.name, own.device, own.arch, ops=own.ops, declarations=own.declarations)

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()


def _through(name: str) -> Callable[..., None]:
    def method(self: AnyOp, *args: Any, **kwargs: Any) -> None:
        weights = (Weight4bit, WeightInt4)
        parts = [part for arg in args for part in (vars(arg).values() if isinstance(arg, weights) else [arg])]
        inputs = [part for part in parts if isinstance(part, Tensor)]
        outputs = [value for value in kwargs.values() if isinstance(value, Tensor)]
        for lists in (vars(arg) for arg in args if isinstance(arg, OptimizerTensors)):
            inputs += lists["grads"]
            outputs += [part for name in _IN_PLACE for part in lists[name]]
        if not outputs:  # a list without tensors
            getattr(self.reference, name)(*args, **kwargs)
            return
        self.around(lambda: getattr(self.reference, name)(*args, **kwargs), inputs, outputs)

    return method


for _op in OPS:
    setattr(AnyOp, _op, _through(_op))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _flip(outputs: list[Tensor]) -> None:
    """Change the lowest bit of the first output that holds anything."""
    for output in outputs:
        if output.numel():
            _bytes(output)[0] ^= 1
            return


def _end(tensor: Tensor) -> int:
    return tensor.data_ptr() + tensor.numel() * tensor.element_size()


@mutant("QC-NUM-006", *ANY)
class WritesPastEnd(AnyOp):
    """One byte past the end of every output is written."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        for output in filter(Tensor.numel, outputs):
            ctypes.memset(_end(output), 0x11, 1)


@mutant("QC-NUM-006", *ANY)
class WritesBeforeStart(AnyOp):
    """One byte before the start of every output is written."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        for output in filter(Tensor.numel, outputs):
            ctypes.memset(output.data_ptr() - 1, 0x11, 1)


@mutant("QC-NUM-006", *ANY)
class WritesFarPastEnd(AnyOp):
    """A whole vector of 64 bytes is written a kilobyte past the end of the last output."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        if outputs[-1].numel():
            ctypes.memset(_end(outputs[-1]) + 1024, 0x11, 64)


@mutant("QC-NUM-006", *ANY)
class WritesInput(AnyOp):
    """The last input is used as scratch and comes back with one bit changed."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        _flip(inputs[::-1])


@mutant("QC-NUM-006", *ANY)
class ReadsPastEnd(AnyOp):
    """What lies behind the first input reaches the result."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        if inputs[0].numel() and ctypes.string_at(_end(inputs[0]), 1)[0] & 4:
            _flip(outputs)


@mutant("QC-NUM-006", *ANY, expects=Outcome.CRASHED)
class LoadsPastEnd(AnyOp):
    """A vector load runs past the end of the first input; what it finds there is not used."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        if inputs[0].numel():
            ctypes.string_at(_end(inputs[0]), 32)


@mutant("QC-NUM-006", *ANY)
class LastElementUnwritten(AnyOp):
    """The last element of the last output is left as it was."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        last = outputs[-1].view(-1)[-1:]
        before = last.clone()
        op()
        last.copy_(before)


@mutant("QC-NUM-006", *ANY)
class AccumulatesIntoOutput(AnyOp):
    """The result is added to what the output held before."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        before = [output.clone() for output in outputs]
        op()
        for output, old in zip(outputs, before):
            output += old


@mutant("QC-NUM-006", *ANY)
class AlignmentAssumed(AnyOp):
    """An input that is not aligned to 16 bytes is read from the aligned address below it."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        if any(tensor.data_ptr() % 16 for tensor in inputs):
            _flip(outputs)


@mutant("QC-NUM-006", *REFUSING)
class WritesBeforeChecking(AnyOp):
    """An output is written before the arguments are checked."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        try:
            op()
        except InvalidArgument:
            _flip(outputs)
            raise


@mutant("QC-NUM-006", *REFUSING)
class RefusalSwallowed(AnyOp):
    """A call with arguments that are not allowed returns as if nothing were wrong."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        try:
            op()
        except InvalidArgument:
            return


@mutant("QC-NUM-006", *REFUSING)
class RefusalUntyped(AnyOp):
    """Arguments that are not allowed raise a bare RuntimeError."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        try:
            op()
        except InvalidArgument as error:
            raise RuntimeError(str(error)) from error


@mutant("QC-NUM-005", *ANY)
class EmptyRefused(AnyOp):
    """A call without elements is refused."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if not outputs[0].numel():
            raise InvalidArgument("nothing to do")
        op()


@mutant("QC-NUM-007", *ANY)
class OneCallInSevenDiffers(AnyOp):
    """One call in seven gives another last bit."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        self.calls += 1
        if self.calls % 7 == 0:
            _flip(outputs)


@mutant("QC-NUM-007", *ANY)
class ThreadCountShows(AnyOp):
    """The last bit depends on the number of threads."""

    threads = torch.get_num_threads()

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        if torch.get_num_threads() != self.threads:
            _flip(outputs)


@mutant("QC-NUM-007", *TWO)
class ScratchShared(AnyOp):
    """Results pass through one scratch buffer that all threads share."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        op()
        self.scratch = [output.clone() for output in outputs]
        time.sleep(0.0005)
        for output, mine in zip(outputs, self.scratch):
            if mine.shape == output.shape:
                output.copy_(mine)


@mutant("QC-NUM-006", *TWO, expects=Outcome.CRASHED)
class Segfaults(AnyOp):
    """It dereferences a null pointer."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        ctypes.string_at(0)


@mutant("QC-NUM-006", "int8_gemm", expects=Outcome.CRASHED)
class Aborts(AnyOp):
    """It aborts the process on bad input instead of returning an error."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        try:
            op()
        except InvalidArgument:
            os.abort()


@mutant("QC-NUM-006", *TWO, expects=Outcome.CRASHED)
class ExitsQuietly(AnyOp):
    """It ends the process with status 0, which is no success."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        os._exit(0)


@mutant("QC-NUM-006", "gemm_4bit", expects=Outcome.HUNG)
class Hangs(AnyOp):
    """It never returns."""

    def around(self, op: Callable[[], None], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        while True:
            time.sleep(1)
