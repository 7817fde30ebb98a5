"""Uniform 4-bit grids, one a group, and round to nearest on them.

The scale is rounded to float16, as checkpoints store it, before codes are chosen with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qcore.backend.weights import WeightInt4
from qcore.functional.gptq_layers import pack_rows

_LEVELS = 15
_MIDDLE = 8
_SMALLEST = 2.0**-24  # of float16


class Grid(NamedTuple):
    """Scales and zero points of groups, float32 both; the zero points are whole numbers from 0 to 15."""

    scale: Tensor
    zero: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """The nearest code of each value of ``w``, as float32."""
        return (torch.round(w / self.scale) + self.zero).clamp_(0, _LEVELS)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for (QC-INT4-002)."""
        return (codes - self.zero) * self.scale


def choose_grid(w: Tensor, *, symmetric: bool, shrink: float | Tensor = 1.0) -> Grid:
    """The grid that spans the values of each group.

    Parameters
    ----------
    w : Tensor
        float32 ``(..., g)``; a group is the last dimension.
    symmetric : bool
        Zero point 8 for all; else the zero point is chosen so that the range from the smallest to the largest value,
        0 included, is spanned.
    shrink : float or Tensor
        Factor on the range, broadcast against ``(..., 1)``: outer values are clipped where it is below 1.

    Returns
    -------
    Grid
        Of shape ``(..., 1)``.
    """
    low = w.amin(-1, keepdim=True).clamp_(max=0) * shrink
    high = w.amax(-1, keepdim=True).clamp_(min=0) * shrink
    if symmetric:
        reach = torch.maximum(-low, high)
        low, high = -reach, reach
    scale = ((high - low) / _LEVELS).half().float()
    scale = torch.where(scale > 0, scale, torch.full_like(scale, _SMALLEST))
    zero = torch.full_like(scale, _MIDDLE) if symmetric else torch.round(-low / scale).clamp_(0, _LEVELS)
    return Grid(scale, zero)


def search_grid(
    w: Tensor, *, symmetric: bool, steps: int = 20, least: float = 0.6, weights: Tensor | None = None
) -> Grid:
    """Of the grids with a range from ``least`` to 1 of the full one, that with the smallest squared error.

    ``weights`` ``(g,)`` or ``(..., g)`` says how much the error of a column counts; None counts all alike.
    """
    best = choose_grid(w, symmetric=symmetric)
    best_error = torch.full_like(best.scale, torch.inf)
    for step in range(steps + 1):
        grid = choose_grid(w, symmetric=symmetric, shrink=1 - (1 - least) * step / steps)
        squares = (grid.values(grid.codes(w)) - w).square_()
        error = (squares if weights is None else squares * weights).sum(-1, keepdim=True)
        better = error < best_error
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        best_error = torch.minimum(error, best_error)
    return best


def grouped(w: Tensor, group_size: int) -> Tensor:
    """``(N, K)`` as ``(N, G, g)``; a short last group is filled up with zeros, which lie on every grid."""
    k = w.shape[1]
    padded = torch.nn.functional.pad(w, (0, -k % group_size))
    return padded.view(len(w), -1, group_size)


def weight_of(codes: Tensor, grid: Grid, group_size: int, perm: Tensor | None = None, *, symmetric: bool) -> WeightInt4:
    """Codes ``(N, K)`` and a grid of ``(N, G)`` or ``(N, G, 1)`` as a weight."""
    n, k = codes.shape
    zeros = None if symmetric else grid.zero.reshape(n, -1).to(torch.uint8)
    packed = pack_rows(codes.to(torch.uint8))
    return WeightInt4(packed, grid.scale.reshape(n, -1).half(), zeros, group_size, (n, k), perm)


def round_to_nearest(w: Tensor, group_size: int, *, symmetric: bool) -> WeightInt4:
    """Quantize ``w`` ``(N, K)`` without looking at any activations."""
    w = w.float()
    groups = grouped(w, group_size)
    grid = choose_grid(groups, symmetric=symmetric)
    codes = grid.codes(groups).view(len(w), -1)[:, : w.shape[1]]
    return weight_of(codes, grid, group_size, symmetric=symmetric)
