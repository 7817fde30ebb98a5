"""Fixtures of the layer tests: each runs on the NumPy reference and on the native CPU backend."""

from __future__ import annotations

import pytest
import torch

from qcore.backend.registry import get_backend, use_backend
from qcore.errors import BackendUnavailable


@pytest.fixture(params=["cpu_reference", "cpu"])
def backend(request):
    """The name of a backend that serves CPU tensors, selected for the test."""
    try:
        get_backend(request.param)
    except BackendUnavailable as error:
        pytest.skip(f"backend {request.param}: {error}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260727)
