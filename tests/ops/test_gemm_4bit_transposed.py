"""``gemm_4bit_transposed``: values and gradients against float64, what it refuses, what it is composed of."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from expected import assert_close, decoded, random, weight_of
from qcore.backend import Backend, Description
from qcore.backend.registry import get_backend, use_backend
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops.fourbit import gemm_4bit, gemm_4bit_transposed

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("backend")
class TestTransposed:
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(
        ("shape", "k"), [((1, 96), 128), ((96,), 64), ((2, 3, 97), 65), ((33, 1030), 192), ((0, 4), 8), ((3, 4), 0)]
    )
    def test_values(self, shape: tuple[int, ...], k: int, dtype: torch.dtype, quant_type: str) -> None:
        weight, y = weight_of(shape[-1], k, quant_type, nested=k == 64), random(*shape, dtype=dtype)
        x = gemm_4bit_transposed(y, weight)
        assert x.dtype == dtype
        assert x.shape == (*shape[:-1], k)
        assert_close(x, y, weight, None, transposed=True)

    def test_an_empty_sum_is_zero(self) -> None:
        assert torch.equal(gemm_4bit_transposed(torch.empty(2, 0), weight_of(0, 64)), torch.zeros(2, 64))

    def test_strided_expanded_and_negated_inputs(self) -> None:
        weight = weight_of(40, 96)
        for y in (random(40, 5).t(), random(1, 40).expand(5, 40), torch._neg_view(random(5, 40))):
            assert torch.equal(gemm_4bit_transposed(y, weight), gemm_4bit_transposed(y.clone(), weight))

    def test_its_gradient_is_the_product(self) -> None:
        weight, y = weight_of(40, 96), random(3, 40).requires_grad_()
        upstream = random(3, 96, seed=2)
        gemm_4bit_transposed(y, weight).backward(upstream)
        assert torch.equal(y.grad, gemm_4bit(upstream, weight))

    def test_gradients_of_gradients_through_the_registered_op(self) -> None:
        weight, x = weight_of(6, 8), random(3, 8).requires_grad_()

        def loss(x: torch.Tensor) -> torch.Tensor:
            return (gemm_4bit(x, weight) ** 2).sum()

        hessian = torch.func.jacrev(torch.func.grad(loss))(x.detach()[0])
        w = torch.from_numpy(decoded(weight)).float()
        torch.testing.assert_close(hessian, 2 * w.t() @ w)
        compiled = torch.compile(lambda x: torch.autograd.grad(loss(x), x)[0], backend="aot_eager")
        torch.testing.assert_close(compiled(x), torch.autograd.grad(loss(x), x)[0])

    def test_refusals(self) -> None:
        weight = weight_of(8, 64)
        wrong = (random(2, 64), InvalidArgument), (random(2, 8).double(), InvalidDtype), ([1.0], InvalidArgument)
        for A, error in wrong:
            with pytest.raises(error, match="gemm_4bit_transposed: A"):
                gemm_4bit_transposed(A, weight)
        with pytest.raises(InvalidArgument, match="gemm_4bit_transposed: absmax"):
            gemm_4bit_transposed(random(2, 8), replace(weight, absmax=weight.absmax[:-1]))
        with pytest.raises(InvalidArgument, match=r"gemm_4bit_transposed: weight has shape \(2, 4, 64\)"):
            gemm_4bit_transposed(random(2, 8), replace(weight, shape=(2, 4, 64)))


class Decodes(Backend):
    """Serves what a product is composed of."""

    name = "decodes"

    def describe(self, device: torch.device) -> Description:
        raise NotImplementedError

    def dequantize_4bit(self, weight: Any, *, out: torch.Tensor) -> None:
        get_backend("cpu_reference").dequantize_4bit(weight, out=out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_composed_within_its_bound_and_logged_once(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with use_backend("cpu_reference"):
        weight = weight_of(16, 96, nested=True)
    y = random(2, 3, 16, dtype=dtype)
    with use_backend(Decodes()), caplog.at_level(logging.WARNING, "qcore"):
        for _ in range(2):
            assert_close(gemm_4bit_transposed(y, weight), y, weight, None, transposed=True)
    (record,) = caplog.records
    assert record.message == (
        "backend decodes does not serve gemm_4bit_transposed; it is composed of dequantize_4bit to the dtype of A, "
        "then torch.matmul, whose settings decide how it sums (QC-GEMM4-008)"
    )
