"""The CUDA backend: kernels for NVIDIA GPUs of compute capability 7.5 and newer behind the C ABI."""

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
        The library is missing, was built for another ABI, or finds no device that it was built for.
    """
    from qcore.backend.cffi_backend import CffiBackend

    # An editable install keeps the library and this file in two directories, both of them in __path__.
    places = [Path(directory) / "libqcore_cuda.so" for directory in __path__]
    return CffiBackend("cuda", next((place for place in places if place.is_file()), places[0]))
