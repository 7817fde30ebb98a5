"""The C ABI as cffi reads it: ``qcore/include/qcore_backend.h``, pre-parsed when the package is built.

Parsing the header takes about 80 ms, so a build writes the parsed form to ``_abi.py`` beside this file. A checkout
that was never built, or whose header has changed since, parses the header at import.
"""

from __future__ import annotations

import hashlib
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import cffi

HEADER = Path(__file__).parent.parent / "include" / "qcore_backend.h"
_GENERATED = "qcore.backend._abi"


def declarations(header: str) -> str:
    """The part of the header that ``ffi.cdef`` can read: no includes, guards or C++ blocks."""
    header = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.DOTALL)
    return re.sub(r"^#(include|ifndef|endif|define QCORE_\w+_H).*$", "", header, flags=re.MULTILINE)


def _parse(header: str) -> cffi.FFI:
    ffi = cffi.FFI()
    ffi.cdef(declarations(header))
    return ffi


def generate(directory: Path) -> Path:
    """Write the pre-parsed header into the package tree under ``directory``; returns the file."""
    header = HEADER.read_text(encoding="utf-8")
    ffi = _parse(header)
    ffi.set_source(_GENERATED, None)
    path = Path(ffi.compile(tmpdir=str(directory)))
    with path.open("a", encoding="utf-8") as file:
        file.write(f'HEADER_SHA256 = "{_digest(header)}"\n')
    return path


def _digest(header: str) -> str:
    return hashlib.sha256(header.encode()).hexdigest()


def _load() -> Any:
    header = HEADER.read_text(encoding="utf-8")
    try:
        generated = import_module(_GENERATED)
    except ModuleNotFoundError:
        return _parse(header)
    return generated.ffi if _digest(header) == generated.HEADER_SHA256 else _parse(header)


ffi: Any = _load()
# The header's integer constants, as attributes.
constants: Any = ffi.dlopen(None)
