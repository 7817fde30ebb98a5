"""What the optimizer tests share: seeds, and settings of the process undone after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qcore.optim import GlobalOptimManager


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(20261122)
    yield
    GlobalOptimManager.get_instance().initialize()
