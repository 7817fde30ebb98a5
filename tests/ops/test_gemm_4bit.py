"""``gemm_4bit`` and its prepared form: values, gradients, what the handle notices."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expected import assert_close, decoded, random, weight_of
from qcore.backend import Backend
from qcore.backend.interface import Weight4bit
from qcore.backend.registry import get_backend, use_backend
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops.fourbit import PreparedGemm4bit, gemm_4bit, gemm_4bit_transposed, prepare_gemm_4bit

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("backend")
class TestProduct:
    @pytest.mark.parametrize("bias_dtype", [None, torch.float32, "same"])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(1, 96), (96,), (2, 3, 96), (33, 96)])
    def test_values(self, shape: tuple[int, ...], dtype: torch.dtype, bias_dtype: object) -> None:
        weight, x = weight_of(40, 96), random(*shape, dtype=dtype)
        bias = None if bias_dtype is None else random(40, dtype=dtype if bias_dtype == "same" else torch.float32)
        y = gemm_4bit(x, weight, bias)
        assert y.dtype == dtype
        assert_close(y, x, weight, bias)
        handle = prepare_gemm_4bit(weight)
        for _ in range(2):  # the first call checks, the second takes the short path
            assert torch.equal(handle(x, bias), y)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (24, 100)])
    def test_odd_sizes(self, n: int, k: int, nested: bool, quant_type: str) -> None:
        weight, x = weight_of(n, k, quant_type, nested), random(3, k)
        assert_close(gemm_4bit(x, weight), x, weight, None)
        assert torch.equal(prepare_gemm_4bit(weight)(x), gemm_4bit(x, weight))

    def test_strided_and_negated_inputs(self) -> None:
        weight, x, bias = weight_of(40, 96), random(96, 5).t(), random(80)[::2]
        handle = prepare_gemm_4bit(weight)
        expected = gemm_4bit(x.contiguous(), weight, bias.contiguous())
        assert torch.equal(gemm_4bit(x, weight, bias), expected)
        assert torch.equal(handle(x, bias), expected)
        negated = torch._neg_view(x.contiguous())
        assert negated.is_neg()
        assert negated.is_contiguous()
        plain = gemm_4bit(-x.contiguous(), weight)
        handle(x.contiguous())
        assert torch.equal(handle(negated), plain)
        assert torch.equal(gemm_4bit(negated, weight), plain)

    @pytest.mark.parametrize(("shape", "n", "k"), [((0, 8), 4, 8), ((2, 0, 8), 4, 8), ((3, 8), 0, 8)])
    def test_empty_results(self, shape: tuple[int, ...], n: int, k: int) -> None:
        weight = weight_of(n, k)
        assert gemm_4bit(torch.empty(shape), weight, torch.ones(n)).shape == (*shape[:-1], n)
        assert prepare_gemm_4bit(weight)(torch.empty(shape)).shape == (*shape[:-1], n)

    def test_an_empty_sum_is_the_bias(self) -> None:
        weight, bias = weight_of(4, 0), random(4)
        for product in (prepare_gemm_4bit(weight), lambda x, bias=None: gemm_4bit(x, weight, bias)):
            assert torch.equal(product(torch.empty(2, 0), bias), bias.expand(2, 4))
            assert torch.equal(product(torch.empty(2, 0)), torch.zeros(2, 4))


@pytest.mark.usefixtures("backend")
class TestGradient:
    @pytest.mark.parametrize("how", ["function", "handle", "op"])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_gradients_are_those_of_the_decoded_weight(self, dtype: torch.dtype, how: str) -> None:
        weight = weight_of(24, 64, nested=True)
        x, bias = random(2, 5, 64, dtype=dtype).requires_grad_(), random(24).requires_grad_()
        handle = prepare_gemm_4bit(weight)
        with torch.no_grad():
            handle(x, bias)  # so that the recorded call below takes the short path
        y = {
            "function": lambda: gemm_4bit(x, weight, bias),
            "handle": lambda: handle(x, bias),
            "op": lambda: call_op(x, weight, bias),
        }[how]()
        upstream = random(2, 5, 24, seed=3, dtype=dtype)
        y.backward(upstream)
        assert x.grad.dtype == dtype
        assert_close(x.grad, upstream, weight, None, transposed=True)
        torch.testing.assert_close(bias.grad, upstream.reshape(-1, 24).float().sum(0), rtol=1e-6, atol=1e-6)

    def test_gradient_of_the_gradient(self) -> None:
        weight, x = weight_of(6, 8), random(3, 8).requires_grad_()
        y = gemm_4bit(x, weight)
        upstream = torch.ones_like(y).requires_grad_()
        (d_x,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        (dd,) = torch.autograd.grad(d_x.sum(), upstream)
        w = torch.from_numpy(decoded(weight)).float()
        torch.testing.assert_close(dd, w.sum(1).expand(3, 6))

    def test_only_what_was_asked_for_is_computed(self) -> None:
        weight, bias = weight_of(6, 8), random(6).requires_grad_()
        y = prepare_gemm_4bit(weight)(random(3, 8), bias)
        y.sum().backward()
        assert torch.equal(bias.grad, torch.full((6,), 3.0))

    @pytest.mark.parametrize("how", ["function", "handle"])
    def test_functorch_transforms(self, how: str) -> None:
        weight, x, bias = weight_of(6, 8), random(4, 3, 8), random(6)
        w = torch.from_numpy(decoded(weight)).float()
        product = prepare_gemm_4bit(weight) if how == "handle" else lambda x, bias: gemm_4bit(x, weight, bias)
        gradient = torch.func.grad(lambda x: (product(x, bias) ** 2).sum())(x[0])
        torch.testing.assert_close(gradient, 2 * gemm_4bit(x[0], weight, bias) @ w)
        mapped = torch.func.vmap(lambda x: product(x, bias))(x)
        assert torch.equal(mapped, gemm_4bit(x, weight, bias))


def call_op(x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset, weight.nested_blocksize)
    parts = (weight.packed, weight.absmax, weight.quant_type, weight.blocksize, weight.shape, *nested)
    return torch.ops.qcore.gemm_4bit(x, bias, *parts)


class TestPreparedHandle:
    """What changes under a handle's feet is noticed."""

    def test_another_backend(self, backend: Backend) -> None:
        weight, x = weight_of(8, 64), random(2, 64)
        handle = prepare_gemm_4bit(weight)
        counted = Counting(backend)
        expected = handle(x)
        with use_backend(counted):
            assert torch.equal(handle(x), expected)
            assert torch.equal(handle(x), expected)
        assert counted.calls == 2
        handle(x)
        assert counted.calls == 2, "outside the block the first backend serves again"

    def test_moved_storage(self, backend: Backend) -> None:
        first, second = weight_of(8, 64), weight_of(8, 64, seed=1)
        handle, x = prepare_gemm_4bit(first), random(2, 64)
        handle(x)
        expected = gemm_4bit(x, second)
        first.packed.data, first.absmax.data = second.packed.clone(), second.absmax.clone()
        assert torch.equal(handle(x), expected)

    def test_moved_storage_of_the_gradients_weight(self, backend: Backend) -> None:
        first, second = weight_of(8, 64), weight_of(8, 64, seed=1)
        handle, y = prepare_gemm_4bit(first), random(2, 8)
        handle.transposed(y)
        first.packed.data, first.absmax.data = second.packed.clone(), second.absmax.clone()
        assert torch.equal(handle.transposed(y), gemm_4bit_transposed(y, second))

    @pytest.mark.parametrize("replaced", ["packed", "absmax"])
    def test_a_live_owner(self, backend: Backend, replaced: str) -> None:
        first, second = weight_of(8, 64), weight_of(8, 64, seed=1)
        param = torch.nn.Parameter(first.packed.view(torch.float32), requires_grad=False)
        state = Holder(first.absmax)
        handle = prepare_gemm_4bit(
            lambda: replace(first, packed=param.data.view(torch.uint8), absmax=state.absmax), packed=param, state=state
        )
        x = random(2, 64)
        assert torch.equal(handle(x), gemm_4bit(x, first))
        if replaced == "packed":
            param.data = second.packed.view(torch.float32).clone()
            assert torch.equal(handle(x), gemm_4bit(x, replace(first, packed=second.packed)))
        else:
            state.absmax = second.absmax
            assert torch.equal(handle(x), gemm_4bit(x, replace(first, absmax=second.absmax)))

    def test_a_remembered_bias_is_checked_again_for_another_dtype(self, backend: Backend) -> None:
        weight, bias = weight_of(8, 64), random(8, dtype=torch.bfloat16)
        handle = prepare_gemm_4bit(weight)
        handle(random(2, 64, dtype=torch.bfloat16), bias)
        handle(random(2, 64))
        with pytest.raises(InvalidDtype, match="bias"):
            handle(random(2, 64), bias)

    def test_a_bias_whose_data_were_replaced_is_checked_again(self, backend: Backend) -> None:
        weight, bias, x = weight_of(8, 64), random(8), random(2, 64)
        handle = prepare_gemm_4bit(weight)
        handle(x, bias)
        bias.data = random(7)
        with pytest.raises(InvalidArgument, match=r"bias has shape \(7,\)"):
            handle(x, bias)

    def test_wrong_inputs_are_refused_on_every_call(self, backend: Backend) -> None:
        handle = prepare_gemm_4bit(weight_of(8, 64))
        handle(random(2, 64))
        for wrong, error in ((random(2, 63), InvalidArgument), (random(2, 64).double(), InvalidDtype)):
            with pytest.raises(error, match="gemm_4bit: A"):
                handle(wrong)
        with pytest.raises(InvalidArgument, match="gemm_4bit: A"):
            handle(torch.tensor(1.0))

    def test_a_copy_or_pickle_is_none(self, backend: Backend) -> None:
        handle = prepare_gemm_4bit(weight_of(8, 64))
        assert isinstance(handle, PreparedGemm4bit)
        assert copy.deepcopy({"handle": handle}) == {"handle": None}
        assert pickle.loads(pickle.dumps(handle)) is None

    def test_a_weight_that_does_not_fit_is_refused_when_it_is_prepared(self, backend: Backend) -> None:
        weight = weight_of(64, 64)
        with pytest.raises(InvalidArgument, match=r"absmax has 63 values, weight of shape \(64, 64\) at blocksize 64"):
            prepare_gemm_4bit(replace(weight, absmax=weight.absmax[:-1]))


class Holder:
    def __init__(self, absmax: Tensor) -> None:
        self.absmax = absmax


class Counting(type(get_backend("cpu_reference"))):  # type: ignore[misc]
    """A backend that counts its products and computes them with another one."""

    def __init__(self, inner: Backend) -> None:
        self.name, self.inner, self.calls = "counting", inner, 0

    def prepare_gemm_4bit(self, weight):
        run = self.inner.prepare_gemm_4bit(weight)

        def counted(A, bias, out):
            self.calls += 1
            run(A, bias, out)

        return counted
