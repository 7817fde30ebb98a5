"""Fixtures of the layer tests: each runs on the NumPy reference and on the native CPU backend."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def backend(backend):
    """The name of a backend that serves CPU tensors, selected for the test."""
    return backend.name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260727)
