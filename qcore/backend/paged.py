"""Memory for optimizer state that may be larger than a device's own: what a backend offers of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor


class PagedMemory(ABC):
    """Makes tensors on one device whose memory is not, or not always, the device's own.

    Kernels of the backend and torch's own use them like any tensor of the device.

    Attributes
    ----------
    kind : str
        For people: "managed" (pages move to whoever touches them), "pinned" (the host's, read from there), ...
    """

    kind: str

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with any contents; its memory is given back with the last tensor that shares it.

        Raises
        ------
        OutOfMemory
            There is no room.
        """

    @abstractmethod
    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory begins where that of one made here does."""

    def prefetch(self, tensors: Iterable[Tensor], to_host: bool = False) -> None:  # noqa: B027 - may have nothing to do
        """Begin to bring tensors of this memory near, or back to the host; returns at once.

        Begins when the work that the current stream has by now is done, and runs beside what it is given next.
        """

    def wait(self) -> None:  # noqa: B027
        """Let the current stream go on when what :meth:`prefetch` began is done; returns at once."""
