"""Opening a shared library with the C ABI of ``qcore_backend.h``, and what is wrong with one that cannot be opened."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.errors import BackendUnavailable


def open_library(name: str, path: Path) -> tuple[Any, Any]:
    """Load the library at ``path`` for the backend ``name``.

    Returns
    -------
    (library, qc_api *)
        The library, to keep it loaded, and its table, checked as far as a table can be.

    Raises
    ------
    BackendUnavailable
        The file is missing, truncated, cannot be loaded, is no qcore backend, or was built for another ABI.
    """
    where = f"backend {name!r}: {path}"
    if not path.is_file():
        raise BackendUnavailable(f"{where}: no such file")
    if _is_truncated(path):
        raise BackendUnavailable(f"{where}: cannot be loaded: the file is truncated; install it again")
    try:
        library = ffi.dlopen(str(path), os.RTLD_NOW | os.RTLD_LOCAL)
        api = library.qcore_backend_open(QC.QC_ABI_MAJOR)
    except OSError as error:
        raise BackendUnavailable(f"{where}: cannot be loaded: {error}") from error
    except (AttributeError, getattr(ffi, "error", AttributeError)) as error:  # the latter under a pre-parsed header
        raise BackendUnavailable(f"{where}: exports no qcore_backend_open; it is not a qcore backend") from error
    if api == ffi.NULL:
        raise BackendUnavailable(f"{where}: does not serve ABI {QC.QC_ABI_MAJOR}; install a matching version")
    version = f"ABI {api.abi_major}.{api.abi_minor}"
    if api.abi_major != QC.QC_ABI_MAJOR:
        raise BackendUnavailable(f"{where}: built for {version}, this qcore needs {QC.QC_ABI_MAJOR}.x")
    ours = ffi.sizeof("qc_api")
    if api.size < ffi.offsetof("qc_api", "quantize_blockwise"):
        raise BackendUnavailable(f"{where}: its table has {api.size} bytes, too few for its own header")
    if api.abi_minor == QC.QC_ABI_MINOR and api.size != ours:
        raise BackendUnavailable(f"{where}: {version} has a table of {ours} bytes, this one says {api.size}")
    return library, api


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its segments do: the dynamic loader would crash the process."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
            return False  # no 64-bit little-endian ELF file: the loader's own message says what is wrong
        (table,), (size, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
        if table + size * count > length:
            return True
        file.seek(table)
        entries = file.read(size * count)
    segments = (struct.unpack_from("<QQQQ", entries, size * i + 8) for i in range(count))
    return any(offset + in_file > length for offset, _, _, in_file in segments)
