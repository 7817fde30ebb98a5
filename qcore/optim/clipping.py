"""Gradients scaled to a percentile of the norms that they had lately: ``percentile_clipping``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qcore.optim.sharded import as_dtensor
from qcore.optim.state import NORMS_KEPT, State


def squared_norms(grads: Sequence[Tensor]) -> list[float]:
    """The squared norm of each gradient, a DTensor's over all its shards."""
    norms = []
    for grad in grads:
        norm = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)
        whole = as_dtensor(norm)
        norms.append(norm if whole is None else whole.full_tensor())
    return torch.stack(norms).double().square().tolist() if norms else []


def grad_scale(history: Tensor, step: int, squared: float, percentile: int) -> float:
    """The factor that brings a gradient down to a percentile of its last 100 norms; 1 if it is below.

    Parameters
    ----------
    history : Tensor
        float32 ``(100,)`` on the CPU: squared norms. Not changed.
    step : int
        Number of this step, from 1. The first one's norm stands for all that there were none of.
    squared : float
    percentile : int
        1 to 99.
    """
    ranked = recorded(history, step, squared).sort().values
    limit = math.sqrt(ranked[percentile].item())
    norm = math.sqrt(squared)
    return limit / norm if norm > limit else 1.0


def recorded(history: Tensor, step: int, squared: float) -> Tensor:
    """The history with the squared norm of a step: in place ``step % 100``, of the first step in every place."""
    if step == 1:
        return torch.full_like(history, squared)
    changed = history.clone()
    changed[step % NORMS_KEPT] = squared
    return changed


def history_of(state: State) -> Tensor:
    """The parameter's squared norms, float32 ``(100,)``; zeros before the first step."""
    history: Tensor = state.setdefault("gnorm_vec", torch.zeros(NORMS_KEPT))
    return history
