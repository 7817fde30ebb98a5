"""In this process ``import bitsandbytes`` is qcore, and a tiny model is at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import qcore

qcore.install_as_bitsandbytes()
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of a few words."""
    from tiny_models import save_model

    return save_model("llama", tmp_path_factory.mktemp("tiny") / "model", torch.float32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261122)
