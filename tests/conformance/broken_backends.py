"""Backends that misbehave in one way each, for the tests of the suite's own machinery."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

from torch import Tensor

from qcore.backend import get_backend
from qcore.errors import BackendUnavailable

Reference: Any = type(get_backend("cpu_reference"))


class Right(Reference):
    """The reference under another name."""

    name = "right"


class WritesPastTheEnd(Reference):
    name = "writes_past_the_end"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        super().dequantize_absmax(*arguments, out=out)
        if out.numel():
            beyond = out.as_strided((1,), (1,), out.storage_offset() + out.numel())
            beyond.fill_(1.0)


class WritesBeforeTheStart(Reference):
    name = "writes_before_the_start"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        super().dequantize_absmax(*arguments, out=out)
        if out.numel():
            out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1.0)


class WritesIntoItsInput(Reference):
    name = "writes_into_its_input"

    def dequantize_absmax(self, A: Tensor, *arguments: Any, out: Tensor) -> None:
        super().dequantize_absmax(A, *arguments, out=out)
        A.add_(1)


class LeavesTheTail(Reference):
    name = "leaves_the_tail"

    def dequantize_absmax(self, A: Tensor, *arguments: Any, out: Tensor) -> None:
        super().dequantize_absmax(A[:-1], *arguments, out=out[:-1])


class UsesWhatLiesBeyond(Reference):
    """Takes one element past the end of its input into the largest value."""

    name = "uses_what_lies_beyond"

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        super().quantize_4bit(A, quant_type, blocksize, absmax=absmax, out=out)
        if A.numel():
            beyond = A.as_strided((1,), (1,), A.storage_offset() + A.numel()).float().abs()
            last = absmax[-1:]
            last.copy_(last if bool(beyond.isnan()) else last.maximum(beyond))


class PeeksBeyond(Reference):
    """Reads past the end of its input and drops what it read: only a protected page notices."""

    name = "peeks_beyond"

    def dequantize_absmax(self, A: Tensor, *arguments: Any, out: Tensor) -> None:
        if A.numel():
            ctypes.string_at(A.data_ptr() + A.numel(), 1)
        super().dequantize_absmax(A, *arguments, out=out)


class Crashes(Reference):
    name = "crashes"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        sys.stderr.write("about to go\n")
        sys.stderr.flush()
        os.abort()


class Exits(Reference):
    name = "exits"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        os._exit(7)


class Hangs(Reference):
    name = "hangs"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        time.sleep(3600)


class Chatters(Reference):
    """Prints to standard output, where the worker's replies go."""

    name = "chatters"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        print("hello", flush=True)
        os.write(1, b'{"result": "hello"}\n')
        super().dequantize_absmax(*arguments, out=out)


class Raises(Reference):
    name = "raises"

    def dequantize_absmax(self, *arguments: Any, out: Tensor) -> None:
        raise ZeroDivisionError("by my own mistake")


class Unavailable(Reference):
    name = "unavailable"

    def describe(self, device: Any) -> Any:
        raise BackendUnavailable("no device of this kind")


class CrashesWhenLoaded(Reference):
    name = "crashes_when_loaded"

    def __init__(self) -> None:
        os.abort()
