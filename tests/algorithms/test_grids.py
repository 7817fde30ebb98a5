"""GPTQ and AWQ against what their papers promise: identities where there are some, else a smaller output error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcore.algorithms import awq, gptq
from qcore.algorithms.grid import choose_grid, round_to_nearest
from qcore.backend.weights import WeightInt4
from qcore.errors import InvalidArgument
from qcore.ops.int4 import dequantize_int4

N, K, TOKENS = 48, 96, 2048


def layer() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs with a few large channels, and inputs of the same kind that were not seen."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    size = torch.ones(K)
    size[:4] = 12.0
    seen, unseen = (torch.randn(TOKENS, K, generator=generator) @ mix * size for _ in range(2))
    return torch.randn(N, K, generator=generator), seen, unseen


def output_error(weight: WeightInt4, w: Tensor, x: Tensor) -> float:
    return float((x @ (dequantize_int4(weight, torch.float32) - w).t()).square().mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 40, -1])
def test_without_correlation_gptq_is_round_to_nearest(group: int, symmetric: bool) -> None:
    w, _, _ = layer()
    options = gptq.GptqOptions(group, symmetric, search=False)
    found = gptq.quantize(w, torch.eye(K), options)
    nearest = round_to_nearest(w, K if group == -1 else group, symmetric=symmetric)
    assert torch.equal(dequantize_int4(found, torch.float32), dequantize_int4(nearest, torch.float32))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_halves_the_error_of_inputs_that_it_did_not_see(symmetric: bool, act_order: bool) -> None:
    w, seen, unseen = layer()
    found = gptq.quantize(w, seen.t() @ seen, gptq.GptqOptions(32, symmetric, act_order))
    assert (found.perm is not None) == act_order
    nearest = round_to_nearest(w, 32, symmetric=symmetric)
    assert output_error(found, w, unseen) < 0.5 * output_error(nearest, w, unseen)


@pytest.mark.parametrize("group", [32, 40, -1])
def test_an_order_of_groups_lowers_the_error_and_leaves_no_trace(group: int) -> None:
    w, seen, unseen = layer()
    h = (seen.t() @ seen).flip(0, 1)  # the large channels come last
    plain, ordered = (gptq.quantize(w, h, gptq.GptqOptions(group, group_order=order)) for order in (False, True))
    assert ordered.perm is None
    assert output_error(ordered, w, unseen.flip(1)) < 0.9 * output_error(plain, w, unseen.flip(1))


def test_gptq_solves_two_columns_as_a_search_does() -> None:
    """For the last column, given the others, the best code is the nearest to the compensated weight."""
    generator = torch.Generator().manual_seed(4)
    w, x = torch.randn(6, 2, generator=generator), torch.randn(500, 2, generator=generator)
    x[:, 1] += 0.9 * x[:, 0]
    h = x.t() @ x
    found = gptq.quantize(w, h, gptq.GptqOptions(-1, True, group_order=False, damping=1e-6, search=False))
    values = dequantize_int4(found, torch.float32)
    scale = found.scales.float()
    for row in range(6):
        levels = (torch.arange(16) - 8) * scale[row, 0]
        change = torch.stack((values[row, 0].expand(16), levels), 1) - w[row]
        errors = ((change @ h) * change).sum(1)
        assert torch.isclose(values[row, 1], levels[errors.argmin()])


def test_awq_beats_round_to_nearest_where_a_few_channels_are_large() -> None:
    w, seen, unseen = layer()
    h, magnitude = seen.t() @ seen, seen.abs().mean(0)
    factors = awq.search_scales([w], h, magnitude, 32, symmetric=False)
    assert float(factors[:4].min()) > float(factors[4:].median())
    scaled = awq.quantize(w * factors, h / (factors[:, None] * factors), 32, symmetric=False)
    found = dequantize_int4(scaled, torch.float32) / factors
    error = float((unseen @ (found - w).t()).square().mean())
    assert error < 0.6 * output_error(round_to_nearest(w, 32, symmetric=False), w, unseen)


def test_tied_channels_get_one_factor() -> None:
    w, seen, _ = layer()
    owner = torch.arange(K // 2).repeat(2)
    factors = awq.search_scales([w], seen.t() @ seen, seen.abs().mean(0), 32, symmetric=False, owner=owner)
    assert torch.equal(factors[: K // 2], factors[K // 2 :])


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_reaches_both_ends_and_zero(symmetric: bool) -> None:
    w = torch.tensor([[-0.3, 0.0, 1.2], [0.5, 0.7, 0.9], [0.0, 0.0, 0.0]])
    grid = choose_grid(w, symmetric=symmetric)
    error = (grid.values(grid.codes(w)) - w).abs()
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert bool((error <= grid.scale * (1.0 if symmetric else 0.51)).all())
    assert bool((grid.values(grid.codes(torch.zeros_like(w))) == 0).all())


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    w, _, _ = layer()
    with pytest.raises(InvalidArgument, match="not finite"):
        gptq.quantize(w, torch.full((K, K), torch.nan), gptq.GptqOptions(32))
