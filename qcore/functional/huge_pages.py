"""Pages of 2 MiB for memory that every step goes through from end to end.

With pages of 4 KiB a step over large tensors looks up a new page for every few hundred elements of each of them. Linux
gives larger pages to whoever asks, before the memory is first written ("madvise" in
``/sys/kernel/mm/transparent_hugepage/enabled``, which is usual).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from torch import Tensor

_PAGE = 2 << 20
_LEAST = 2 * _PAGE  # bytes of a tensor: a smaller one may hold no whole page


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages for a contiguous CPU tensor that nothing was written to yet.

    Only what lies in the tensor as a whole page is asked for, so it takes no more memory. A hint: where the system has
    no such pages, or where torch has written to new memory (deterministic mode does), nothing happens. The native
    backend does the same for its large outputs (``pages.h``).
    """
    size = tensor.numel() * tensor.element_size()
    madvise = _madvise()
    if size < _LEAST or madvise is None or type(tensor) is not Tensor:
        return
    address = tensor.data_ptr()
    first, end = -(-address // _PAGE) * _PAGE, (address + size) // _PAGE * _PAGE
    madvise(first, end - first, mmap.MADV_HUGEPAGE)
