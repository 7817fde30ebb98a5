"""What the GPU libraries' workspace() refuses, it refuses in its own name, whichever op it was asked about.

Needs the libraries of ``nox -s simt`` (build/simt).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qcore.backend import OPS
from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi

LIBRARY = Path(__file__).parents[3] / "build" / "simt" / "libqcore_simt32.so"
# With scratch that depends on the dtype, or on sizes.
OF_DTYPE = ("gemm_4bit", "gemm_4bit_transposed", "gemm_int4", "int8_linear", "int8_linear_transposed")
OF_SIZES = (*OF_DTYPE, "int8_gemm", "int8_scaled_gemm")


@pytest.fixture(scope="module")
def library():  # type: ignore[no-untyped-def]
    if not LIBRARY.exists():
        if os.environ.get("QCORE_REQUIRE_SIMT") == "1":
            pytest.fail(f"{LIBRARY} is missing; nox -s simt builds it")
        pytest.skip(f"{LIBRARY} is missing; nox -s simt builds it")
    return ffi.dlopen(str(LIBRARY))


def refused(library, op: str, dtype: int, *sizes: int) -> str:  # type: ignore[no-untyped-def]
    api, place = library.qcore_backend_open(QC.QC_ABI_MAJOR), ffi.new("int64_t *", -1)
    assert api.workspace(list(OPS).index(op), 0, 0, dtype, *sizes, place) == QC.QC_INVALID_ARGUMENT
    assert place[0] == -1
    return ffi.string(api.last_error()).decode()


@pytest.mark.parametrize("op", OF_DTYPE)
def test_an_unknown_dtype(library, op: str) -> None:  # type: ignore[no-untyped-def]
    assert refused(library, op, 9, 4, 64, 64).startswith("workspace: dtype: expected")


@pytest.mark.parametrize("op", OF_SIZES)
def test_sizes_that_no_memory_holds(library, op: str) -> None:  # type: ignore[no-untyped-def]
    said = refused(library, op, QC.QC_F16, 1 << 45, 1 << 45, 1 << 45)
    assert re.match("workspace: (., .|k): expected", said)
