"""The native CPU backend: C++17 kernels behind the C ABI, chosen at run time for the processor's instruction set.

``QCORE_CPU_ISA=portable|avx2|avx512|...`` forces a path; ``qcore info`` shows which one is in use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcore.backend.interface import Backend


def load() -> Backend:
    """Load the library that was built beside this module (entry point of the group ``qcore.backends``).

    Raises
    ------
    qcore.errors.BackendUnavailable
        The library is missing, was built for another ABI, or does not run on this processor.
    """
    from qcore.backend.cffi_backend import CffiBackend

    # An editable install keeps the library and this file in two directories, both of them in __path__.
    places = [Path(directory) / "libqcore_cpu.so" for directory in __path__]
    return CffiBackend("cpu", next((place for place in places if place.is_file()), places[0]))
