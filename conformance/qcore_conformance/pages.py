"""Tensors that touch a page without access rights: an access out of bounds on that side is a segmentation fault.

Canaries show what was written and poison shows what was used; a read out of bounds whose value is dropped shows only
here. Host memory only.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import partial

import numpy as np
import torch

from qcore_conformance.guards import Placement
from qcore_conformance.model import NotRun

_NO_ACCESS = 0  # PROT_NONE, which the mmap module does not name


class PagedTensor:
    """A tensor that ends (or begins) exactly where a page without access rights begins (or ends).

    Raises
    ------
    NotRun
        The device is no host, or the system has no ``mprotect``.
    """

    def __init__(
        self, name: str, content: torch.Tensor, device: torch.device, *, is_input: bool, at_end: bool = True
    ) -> None:
        if device.type != "cpu":
            raise NotRun("page protection is for host memory")
        size = content.numel() * content.element_size()
        page = mmap.PAGESIZE
        body = max(page, -(-size // page) * page)
        memory = mmap.mmap(-1, body + 2 * page)
        whole = np.frombuffer(memory, dtype=np.uint8)
        address = whole.ctypes.data
        _protect(address, page, _NO_ACCESS)
        _protect(address + page + body, page, _NO_ACCESS)
        start = page + (body - size if at_end else 0)
        view = whole[start : start + size]
        view[:] = content.contiguous().view(-1).view(torch.uint8).numpy() if is_input else 0xA5
        self.tensor = torch.from_numpy(view).view(content.dtype).view(content.shape)

    def check(self) -> None:
        """Nothing to check: a violation has ended the process."""


def _protect(address: int, size: int, rights: int) -> None:
    try:
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    except (AttributeError, OSError) as error:
        raise NotRun(f"this system has no mprotect: {error}") from error
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if mprotect(address, size, rights):
        raise NotRun(f"mprotect failed with errno {ctypes.get_errno()}")


PAGES: tuple[Placement, ...] = (partial(PagedTensor, at_end=True), partial(PagedTensor, at_end=False))
