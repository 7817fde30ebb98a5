"""Fixtures that every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from qcore.backend import Backend
from qcore.backend.registry import get_backend, use_backend
from qcore.errors import BackendUnavailable


@pytest.fixture(params=["cpu_reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend that every machine can run, selected for the test.

    Without the native library the test is skipped, unless ``QCORE_REQUIRE_NATIVE=1`` says that it has to be there.
    """
    try:
        backend = get_backend(request.param)
    except BackendUnavailable as error:
        if os.environ.get("QCORE_REQUIRE_NATIVE") == "1":
            raise
        pytest.skip(str(error))
    with use_backend(request.param):
        yield backend
