"""The HIP backend: kernels for AMD GPUs (CDNA2, CDNA3, RDNA2 to RDNA4) behind the C ABI."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcore.backend.interface import Backend

_RUNTIME = "amdhip64*.dll" if os.name == "nt" else "libamdhip64.so*"
_LIBRARY = "qcore_hip.dll" if os.name == "nt" else "libqcore_hip.so"
# Packages that carry a HIP runtime, and where in them: PyTorch's ROCm builds, and ROCm's own wheels.
_CARRIERS = (("torch", "lib"), ("_rocm_sdk_core", "bin" if os.name == "nt" else "lib"))


def runtimes() -> list[Path]:
    """HIP runtimes that belong to PyTorch, the one that its tensors live in first; then the one of ``ROCM_PATH``.

    Without any of these the library looks for itself: by name, and where ROCm installs it.
    """
    folders = [
        Path(spec.submodule_search_locations[0]) / folder
        for package, folder in _CARRIERS
        if (spec := find_spec(package)) is not None and spec.submodule_search_locations
    ]
    root = os.environ.get("ROCM_PATH")
    folders += [Path(root) / "lib"] if root else []
    return [path for folder in folders for path in sorted(folder.glob(_RUNTIME))]


def open_runtime() -> Path | None:
    """Open the first runtime that loads, for every library of the process to see; the path, or None.

    PyTorch loads its own privately: without this the backend might bring a second runtime into the process, which
    knows nothing of the first one's memory and streams.
    """
    for path in runtimes():
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:  # of another machine, or without its own dependencies: the next, or the library's own search
            continue
        return path
    return None


def load() -> Backend:
    """Load the library that was built beside this module (entry point of the group ``qcore.backends``).

    Raises
    ------
    qcore.errors.BackendUnavailable
        The library is missing, was built for another ABI, finds no HIP runtime, or no device that it was built for.
    """
    from qcore.backend.cffi_backend import CffiBackend

    open_runtime()
    # An editable install keeps the library and this file in two directories, both of them in __path__.
    places = [Path(directory) / _LIBRARY for directory in __path__]
    return CffiBackend("hip", next((place for place in places if place.is_file()), places[0]))
