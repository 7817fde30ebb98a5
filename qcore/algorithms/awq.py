"""AWQ: inputs that matter are scaled up before rounding to nearest, and the layer in front takes the scale back.

Lin et al., *AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration*, 2023 (arXiv 2306.00978),
sections 3.2 (scales from mean activations, by a search over one exponent) and appendix (clipping by output error). The
paper measures the error of outputs on samples; with H = X X^T the squared error of a layer's output, over every token
that was seen, is the trace of D H D^T for a change D of its weight, and that is what is searched with here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcore.algorithms.grid import Grid, choose_grid, grouped, weight_of
from qcore.backend.weights import WeightInt4

_EXPONENTS = 20
_CLIP_STEPS = 20
_LEAST_CLIP = 0.5
_ROWS = 256  # whose groups are clipped at a time


def search_scales(
    weights: Sequence[Tensor],
    hessian: Tensor,
    mean_input: Tensor,
    group_size: int,
    *,
    symmetric: bool,
    owner: Tensor | None = None,
) -> Tensor:
    """Factors for the input channels of layers that share their input.

    Parameters
    ----------
    weights : sequence of Tensor
        float32 ``(N_i, K)``.
    hessian : Tensor
        float32 ``(K, K)``, the sum of ``x x^T``.
    mean_input : Tensor
        float32 ``(K,)``, mean magnitude of each channel.
    group_size, symmetric
        Of the grid.
    owner : Tensor, optional
        int64 ``(K,)``: which row of the layer in front makes each channel, where one makes several (grouped-query
        attention); they get one factor.

    Returns
    -------
    Tensor
        float32 ``(K,)``, positive: columns of the weights are to be multiplied, the inputs divided by it.
    """
    w = torch.cat(list(weights))
    groups = grouped(w.abs(), group_size)
    relative = groups / groups.amax(-1, keepdim=True).clamp_(min=1e-8)
    mean_weight = relative.view(len(w), -1)[:, : w.shape[1]].mean(0)
    if owner is not None:
        mean_input, mean_weight = _shared(mean_input, owner), _shared(mean_weight, owner)
    best, best_loss = torch.ones_like(mean_input), torch.inf
    for step in range(_EXPONENTS):
        exponent = step / _EXPONENTS
        for divisor in (mean_weight.pow(1 - exponent) + 1e-4, torch.ones_like(mean_weight)):
            factors = (mean_input.pow(exponent) / divisor).clamp_(min=1e-4)
            factors = factors / (factors.max() * factors.min()).sqrt()
            change = _rounded(w * factors, group_size, symmetric) / factors - w
            loss = float(((change @ hessian) * change).sum())
            if loss < best_loss:
                best, best_loss = factors, loss
    return best


def _shared(values: Tensor, owner: Tensor) -> Tensor:
    """Each channel's value replaced by the mean over the channels of its owner."""
    count = int(owner.max()) + 1
    total = values.new_zeros(count).index_add_(0, owner, values)
    members = values.new_zeros(count).index_add_(0, owner, torch.ones_like(values))
    return (total / members.clamp_(min=1))[owner]


def _rounded(w: Tensor, group_size: int, symmetric: bool) -> Tensor:
    groups = grouped(w, group_size)
    grid = choose_grid(groups, symmetric=symmetric)
    return grid.values(grid.codes(groups)).view(len(w), -1)[:, : w.shape[1]]


def quantize(weight: Tensor, hessian: Tensor, group_size: int, *, symmetric: bool, clip: bool = True) -> WeightInt4:
    """Round to nearest, each group's range shrunk to where its share of the output error is smallest.

    Parameters
    ----------
    weight : Tensor
        ``(N, K)``, scaled already.
    hessian : Tensor
        float32 ``(K, K)`` of the scaled inputs; the blocks on its diagonal are used.
    group_size : int
        Divides K.
    symmetric, clip : bool
        Without ``clip`` the whole range is spanned.
    """
    w = weight.detach().float()
    n, k = w.shape
    groups = w.view(n, k // group_size, group_size)
    if not clip:
        grid = choose_grid(groups, symmetric=symmetric)
    else:
        blocks = torch.stack([hessian[i : i + group_size, i : i + group_size] for i in range(0, k, group_size)])
        parts = [_clipped(groups[row : row + _ROWS], blocks, symmetric) for row in range(0, n, _ROWS)]
        grid = Grid(*(torch.cat(each) for each in zip(*parts, strict=True)))
    return weight_of(grid.codes(groups).view(n, k), grid, group_size, symmetric=symmetric)


def _clipped(groups: Tensor, blocks: Tensor, symmetric: bool) -> Grid:
    """For groups ``(N, G, g)`` and blocks ``(G, g, g)``: the best grid of each group."""
    best = choose_grid(groups, symmetric=symmetric)
    best_error = torch.full_like(best.scale, torch.inf)
    for step in range(_CLIP_STEPS + 1):
        grid = choose_grid(groups, symmetric=symmetric, shrink=1 - (1 - _LEAST_CLIP) * step / _CLIP_STEPS)
        change = grid.values(grid.codes(groups)) - groups
        error = (torch.einsum("ngi,gij->ngj", change, blocks) * change).sum(-1, keepdim=True)
        better = error < best_error
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        best_error = torch.minimum(error, best_error)
    return best
