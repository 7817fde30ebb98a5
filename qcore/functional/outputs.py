"""Results in the caller's own tensors."""

from __future__ import annotations

from torch import Tensor

from qcore.errors import InvalidArgument
from qcore.ops import validate


def into(op: str, *targets: tuple[str, Tensor | None, Tensor]) -> list[Tensor]:
    """The result of each (name, caller's tensor, result), in the caller's tensor if there is one.

    All of them are checked before the first is written.

    Raises
    ------
    InvalidArgument, InvalidDtype
        One of them is no tensor of the result's dtype, shape and device with an address for each element.
    """
    for name, given, result in targets:
        if given is not None:
            validate.tensor(op, name, given)
            if given.dtype != result.dtype or given.shape != result.shape:
                raise InvalidArgument(
                    f"{op}: {name} is {given.dtype} of shape {tuple(given.shape)}, the result is {result.dtype} of "
                    f"shape {tuple(result.shape)}"
                )
            validate.out(op, given, result.shape, result.dtype, result.device, name)
    return [result if given is None else given.copy_(result) for _, given, result in targets]
