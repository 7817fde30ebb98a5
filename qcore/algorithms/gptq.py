"""GPTQ: column after column is rounded, and what is left makes up for it.

Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers*, 2022 (arXiv 2210.17323), algorithm 1. With X the inputs of a layer and H = X X^T, the error of column i,
divided by the i-th diagonal element of the upper Cholesky factor of the inverse of H, is taken off the columns behind
it along that factor's row; sections 3.3 (act-order: columns by falling diagonal of H) and 4 (groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcore.algorithms.grid import Grid, choose_grid, search_grid, weight_of
from qcore.backend.weights import WeightInt4
from qcore.errors import InvalidArgument


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ runs.

    Parameters
    ----------
    group_size
        Inputs a group; -1 for one group.
    symmetric
        Zero point 8 for all groups.
    act_order
        Quantize the columns in the order of falling importance; groups are then runs of that order.
    group_order
        Without ``act_order``: quantize the groups, and the columns inside each, in the order of falling importance
        (arXiv 2505.14638). Groups stay runs of neighbours, so the checkpoint needs no order of columns.
    damping
        Share of the mean diagonal of H that is added to all of it.
    search
        Choose each group's range by squared error, not by its largest values.
    """

    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    group_order: bool = True
    damping: float = 0.05
    search: bool = True


def quantize(weight: Tensor, hessian: Tensor, options: GptqOptions) -> WeightInt4:
    """Quantize a linear layer's weight.

    Parameters
    ----------
    weight : Tensor
        ``(N, K)``, any float dtype.
    hessian : Tensor
        float32 ``(K, K)``: the sum of ``x x^T`` over the layer's inputs, up to a factor.
    options : GptqOptions

    Raises
    ------
    InvalidArgument
        The Hessian is not finite, or no damping makes it positive definite.
    """
    w = weight.detach().float().clone()
    k = w.shape[1]
    size = k if options.group_size == -1 else min(options.group_size, k)
    diagonal = hessian.diagonal()
    w[:, diagonal == 0] = 0  # inputs that were never seen
    order, groups = _column_order(diagonal, size, options)
    w, hessian = w[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, options.damping)
    importance = 1 / factor.diagonal().square()
    codes = torch.empty_like(w)
    grids: list[Grid] = []
    start = 0
    # A block is a group, so that a group's grid sees every error that was pushed into it.
    for group in groups:
        stop = start + min(size, k - group * size)
        columns = w[:, start:stop]
        if options.search:
            grid = search_grid(columns, symmetric=options.symmetric, weights=importance[start:stop])
        else:
            grid = choose_grid(columns, symmetric=options.symmetric)
        grids.append(grid)
        errors = _quantize_block(columns, factor[start:stop, start:stop], grid, codes[:, start:stop])
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        start = stop
    if not options.act_order:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
        grids = [grids[groups.index(group)] for group in range(len(groups))]
    whole = Grid(*(torch.cat(parts, 1) for parts in zip(*grids, strict=True)))
    perm = order.int() if options.act_order else None
    return weight_of(codes, whole, size, perm, symmetric=options.symmetric)


def _column_order(diagonal: Tensor, size: int, options: GptqOptions) -> tuple[Tensor, list[int]]:
    """The order in which columns are rounded, and the groups in the order in which they come."""
    count = -(-len(diagonal) // size)
    if options.act_order:
        return diagonal.argsort(descending=True, stable=True), list(range(count))
    if not options.group_order:
        return torch.arange(len(diagonal), device=diagonal.device), list(range(count))
    members = diagonal.split(size)
    groups = sorted(range(count), key=lambda group: -float(members[group].mean()))
    inside = [group * size + members[group].argsort(descending=True, stable=True) for group in groups]
    return torch.cat(inside), groups


def _quantize_block(w: Tensor, factor: Tensor, grid: Grid, codes: Tensor, block: int = 64) -> Tensor:
    """Round the columns of one group into ``codes``; returns the scaled errors ``(N, g)``; ``w`` is used up."""
    errors = torch.empty_like(w)
    scale, zero = grid.scale[:, 0], grid.zero[:, 0]
    width = w.shape[1]
    for start in range(0, width, block):
        stop = min(width, start + block)
        columns, rows = w[:, start:stop].t().contiguous(), factor[start:stop]
        wrong = torch.empty_like(columns)
        for i in range(stop - start):
            column = columns[i]
            q = torch.round(column / scale).add_(zero).clamp_(0, 15)
            codes[:, start + i] = q
            error = (column - (q - zero) * scale).div_(rows[i, start + i])
            columns[i + 1 :].addr_(rows[i, start + i + 1 : stop], error, alpha=-1)
            wrong[i] = error
        errors[:, start:stop] = wrong.t()
        w[:, stop:] -= errors[:, start:stop] @ rows[:, stop:]
    return errors


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, float32; computed in float64.

    Raises
    ------
    InvalidArgument
        As in :func:`quantize`.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    if not bool(torch.isfinite(h).all()):
        raise InvalidArgument("gptq: the Hessian is not finite; the activations overflow, use another dtype")
    mean = float(diagonal.mean())
    for attempt in range(4):
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                found: Tensor = upper.float()
                return found
    raise InvalidArgument(f"gptq: the Hessian is not positive definite with damping {damping}; use more data")
