"""``int8_linear_transposed``: values and gradients against float64, what it refuses, what it is composed of."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from expected import random
from qcore.backend import Backend, Description
from qcore.backend.registry import get_backend, use_backend
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops.int8_linear import int8_linear, int8_linear_transposed

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def weight_of(n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return codes, torch.rand(n, generator=generator) + 0.25


def decoded(codes: Tensor, scales: Tensor) -> np.ndarray:
    return codes.double().numpy() * scales.double().numpy()[:, None] / 127


def assert_near(x: Tensor, y: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The bound of QC-INT8-012 at its ceiling, for the largest ``u_w`` that it allows."""
    rows, w = y.detach().double().numpy().reshape(math.prod(y.shape[:-1]), len(codes)), decoded(codes, scales)
    exact, total = rows @ w, np.abs(rows) @ np.abs(w)
    unit = UNITS[x.dtype]
    summed = total * ((1 + (len(codes) + 12) * 2.0**-24) * (1 + (unit if unit > 2.0**-20 else 0)) - 1)
    error = np.abs(x.detach().double().numpy().reshape(exact.shape) - exact)
    assert (error <= summed + unit * (np.abs(exact) + summed) + (2.0**-25 if x.dtype == torch.float16 else 0)).all()


@pytest.mark.usefixtures("backend")
class TestTransposed:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(
        ("shape", "k"),
        [((1, 96), 128), ((96,), 1100), ((2, 3, 97), 65), ((33, 1030), 192), ((0, 4), 8), ((3, 4), 0), ((2, 0), 8)],
    )
    def test_values(self, shape: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
        weight, y = weight_of(shape[-1], k), random(*shape, dtype=dtype)
        x = int8_linear_transposed(y, *weight)
        assert (x.dtype, x.shape) == (dtype, (*shape[:-1], k))
        assert_near(x, y, *weight)

    def test_strided_expanded_and_negated_inputs(self) -> None:
        codes, scales = weight_of(40, 96)
        for y in (random(40, 5).t(), random(1, 40).expand(5, 40), torch._neg_view(random(5, 40))):
            assert torch.equal(
                int8_linear_transposed(y, codes, scales), int8_linear_transposed(y.clone(), codes, scales)
            )
        strided = torch.stack((codes, codes), 2)[:, :, 0]
        assert torch.equal(int8_linear_transposed(y, strided, scales), int8_linear_transposed(y, codes, scales))

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_it_is_the_gradient_of_the_layer(self, dtype: torch.dtype) -> None:
        codes, scales = weight_of(48, 64)
        x, upstream = random(5, 64, dtype=dtype).requires_grad_(), random(5, 48, seed=2, dtype=dtype)
        int8_linear(x, codes, scales)[0].backward(upstream)
        assert torch.equal(x.grad, int8_linear_transposed(upstream, codes, scales))
        assert_near(x.grad, upstream, codes, scales)

    def test_a_batch_of_gradients_is_that_of_each(self) -> None:
        codes, scales = weight_of(48, 64)
        x, upstream = random(5, 64).requires_grad_(), random(3, 5, 48, seed=2)
        y = int8_linear(x, codes, scales)[0]
        (batch,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
        for got, one in zip(batch, upstream, strict=True):
            assert torch.equal(got, torch.autograd.grad(y, x, one, retain_graph=True)[0])

    def test_its_own_gradient(self) -> None:
        codes, scales = weight_of(40, 96)
        y, upstream = random(3, 40).requires_grad_(), random(3, 96, seed=2)
        int8_linear_transposed(y, codes, scales).backward(upstream)
        exact = upstream.double().numpy() @ decoded(codes, scales).T
        np.testing.assert_allclose(y.grad.double().numpy(), exact, rtol=0, atol=1e-4)

    def test_refusals(self) -> None:
        codes, scales = weight_of(8, 64)
        for A, error in ((random(2, 64), InvalidArgument), (random(2, 8).double(), InvalidDtype)):
            with pytest.raises(error, match="int8_linear_transposed: A"):
                int8_linear_transposed(A, codes, scales)
        with pytest.raises(InvalidArgument, match="int8_linear_transposed: scales"):
            int8_linear_transposed(random(2, 8), codes, scales[:-1])
        with pytest.raises(InvalidDtype, match="int8_linear_transposed: B"):
            int8_linear_transposed(random(2, 8), codes.float(), scales)
        with pytest.raises(InvalidArgument, match=r"int8_linear_transposed: B has shape \(2, 4, 64\)"):
            int8_linear_transposed(random(2, 8), codes.view(2, 4, 64), scales)


class Decodes(Backend):
    """Serves what the product is composed of."""

    name = "decodes"

    def describe(self, device: torch.device) -> Description:
        raise NotImplementedError

    def int8_dequantize_rows(self, A: Tensor, row_stats: Tensor, *, out: Tensor) -> None:
        get_backend("cpu_reference").int8_dequantize_rows(A, row_stats, out=out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_composed_within_its_bound_and_logged_once(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    weight, y = weight_of(16, 96), random(2, 3, 16, dtype=dtype)
    with use_backend(Decodes()), caplog.at_level(logging.WARNING, "qcore"):
        for _ in range(2):
            assert_near(int8_linear_transposed(y, *weight), y, *weight)
    (record,) = caplog.records
    assert record.message == (
        "backend decodes does not serve int8_linear_transposed; it is composed of int8_dequantize_rows to the dtype of "
        "A, then torch.matmul, whose settings decide how it sums (QC-INT8-011)"
    )
