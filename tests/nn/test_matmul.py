"""``qcore.matmul`` and ``qcore.matmul_4bit`` against float64, forward and backward."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

from qcore import functional as F
from qcore.autograd import MatmulLtState, matmul, matmul_4bit
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops.int8 import int8_quantize_rows
from truth import UNIT, assert_close, f64, linear_int8, rows_int8, weight_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("backend")


def activations(*shape, dtype=torch.float32, outliers=()):
    x = torch.randn(*shape)
    for column in outliers:
        x[..., column] *= 20.0
    return x.to(dtype)


def frozen(n, k):
    codes, scales, _ = int8_quantize_rows(torch.randn(n, k))
    return MatmulLtState(CB=codes, SCB=scales, has_fp16_weights=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [1, 17])
def test_int8_product_is_the_papers(dtype, threshold, has_bias, rows):
    state = frozen(33, 70)
    x = activations(rows, 70, dtype=dtype, outliers=(3, 41))
    bias = torch.randn(33) if has_bias else None
    y = matmul(x, state.CB, state=state, threshold=threshold, bias=None if bias is None else bias.to(dtype))
    bias = None if bias is None else bias.to(dtype)
    want, total = linear_int8(x, state.CB, state.SCB, bias, threshold)
    assert y.dtype == dtype
    assert_close(y, want, total, roundings=12)


def test_outlier_columns_are_reported_and_kept_exact():
    state = frozen(8, 64)
    x = activations(5, 64, outliers=(7, 50))
    x[:, [7, 50]] = 100.0
    matmul(x, state.CB, state=state, threshold=6.0)
    assert state.idx.tolist() == np.flatnonzero(rows_int8(x, 6.0)[2]).tolist()
    assert {7, 50} <= set(state.idx.tolist())
    matmul(x, state.CB, state=frozen(8, 64))
    alone = torch.zeros(2, 64)
    alone[:, 7] = torch.tensor([1000.0, -8.0])
    exact = f64(state.CB)[:, 7] * f64(state.SCB) / 127.0
    assert_close(
        matmul(alone, state.CB, state=state), f64(alone)[:, [7]] * exact, np.abs(f64(alone)[:, [7]] * exact), 3
    )


def test_every_column_may_be_an_outlier():
    state = frozen(9, 40)
    x = torch.full((3, 40), 7.0) + torch.rand(3, 40)
    want, total = linear_int8(x, state.CB, state.SCB, None, 6.0)
    assert_close(matmul(x, state.CB, state=state, threshold=6.0), want, total, roundings=48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_beyond_float16_stay_finite_and_right(dtype):
    state = frozen(16, 32)
    x = (torch.randn(4, 32) * 1e5).to(dtype)
    want, total = linear_int8(x, state.CB, state.SCB, None, 0.0)
    y = matmul(x, state.CB, state=state)
    assert torch.isfinite(y).all()
    assert_close(y, want, total, roundings=12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_warned_about(dtype, caplog):
    state = frozen(16, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matmul(activations(4, 32, dtype=dtype, outliers=(1,)), state.CB, state=state, threshold=6.0)
    assert not caplog.records


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (2, 1, 3, 70)], ids=str)
def test_leading_dimensions_are_kept(shape):
    state = frozen(12, 70)
    x = activations(*shape)
    y = matmul(x, state.CB, state=state)
    flat = matmul(x.reshape(-1, 70), state.CB, state=state)
    assert y.shape == (*shape[:-1], 12)
    assert torch.equal(y.reshape(-1, 12), flat)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(0, 70), (3, 0, 70)], ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(shape, threshold):
    state = frozen(12, 70)
    x = torch.empty(shape, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    y = matmul(x, state.CB, state=state, threshold=threshold, bias=bias)
    assert y.shape == (*shape[:-1], 12)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros(12))


def test_no_columns_give_the_bias():
    bias = torch.randn(5)
    assert torch.equal(matmul(torch.empty(3, 0), torch.empty(5, 0), bias=bias), bias.expand(3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradients_of_a_frozen_weight(dtype, threshold):
    state = frozen(24, 40)
    x = activations(2, 7, 40, dtype=dtype, outliers=(5,)).requires_grad_()
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 7, 24).to(dtype)
    matmul(x, state.CB, state=state, threshold=threshold, bias=bias).backward(dy)
    weight = (f64(state.CB) * f64(state.SCB)[:, None]) / 127.0
    flat = f64(dy).reshape(-1, 24)
    total = np.abs(flat) @ np.abs(weight)
    weight_unit = UNIT[dtype] if dtype != torch.float32 else 3 * 2.0**-24
    assert_close(x.grad.reshape(-1, 40), flat @ weight, total, roundings=32, weight_unit=weight_unit)
    assert_close(bias.grad, flat.sum(0), np.abs(flat).sum(0), roundings=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradients_of_a_trained_weight(dtype, threshold):
    x = activations(6, 40, dtype=dtype, outliers=(5,)).requires_grad_()
    weight = torch.randn(24, 40).to(dtype).requires_grad_()
    dy = torch.randn(6, 24).to(dtype)
    matmul(x, weight, threshold=threshold).backward(dy)
    want = f64(dy).T @ f64(x)
    assert weight.grad.dtype == dtype
    assert_close(weight.grad, want, np.abs(f64(dy)).T @ np.abs(f64(x)), roundings=10)
    codes, stats, _ = rows_int8(weight)
    quantized = codes * stats.astype(np.float64)[:, None] / 127.0
    weight_unit = UNIT[dtype] if dtype != torch.float32 else 3 * 2.0**-24
    assert_close(x.grad, f64(dy) @ quantized, np.abs(f64(dy)) @ np.abs(quantized), 32, weight_unit=weight_unit)


def test_the_weight_may_have_another_float_dtype():
    x, weight = activations(5, 40, dtype=torch.bfloat16), torch.randn(24, 40, requires_grad=True)
    y = matmul(x, weight)
    y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    codes, stats, _ = rows_int8(weight)
    want, total = linear_int8(x, torch.from_numpy(codes), torch.from_numpy(stats), None, 0.0)
    assert_close(y, want, total, roundings=12)


def test_a_changed_weight_is_quantized_again():
    weight = torch.nn.Parameter(torch.randn(8, 32))
    state = MatmulLtState(is_training=False)
    x = activations(3, 32)
    with torch.no_grad():
        first = matmul(x, weight, state=state)
        codes = state.CB
        assert torch.equal(matmul(x, weight, state=state), first)
        assert state.CB is codes, "an unchanged weight is not quantized again"
        weight.mul_(2.0)
        assert torch.equal(matmul(x, weight, state=state), 2 * first)
        assert torch.equal(matmul(x, weight.clone(), state=state), 2 * first)
        other = torch.randn(8, 32)
        assert torch.equal(matmul(x, other, state=state), matmul(x, other))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["copy", "pickle"]
)
def test_a_state_can_be_copied(copier):
    state = MatmulLtState(is_training=False, threshold=3.0)
    weight, x = torch.randn(8, 32), activations(3, 32)
    want = matmul(x, weight, state=state)
    again = copier(state)
    assert again.threshold == 3.0
    assert torch.equal(matmul(x, weight, state=again), want)


def test_out_takes_the_result():
    state = frozen(12, 70)
    x, out = activations(5, 70), torch.full((5, 12), float("nan"))
    assert matmul(x, state.CB, out=out, state=state) is out
    assert torch.equal(out, matmul(x, state.CB, state=state))
    with pytest.raises(InvalidArgument, match=r"matmul: out has shape \(5, 11\)"):
        matmul(x, state.CB, out=torch.empty(5, 11), state=state)
    with pytest.raises(InvalidArgument, match="out is given"):
        matmul(x.requires_grad_(), state.CB, out=out, state=state)


def test_bad_arguments_are_named():
    state = frozen(12, 70)
    with pytest.raises(InvalidArgument, match=r"A has shape \(3, 69\), weight of shape \(12, 70\)"):
        matmul(torch.randn(3, 69), state.CB, state=state)
    with pytest.raises(InvalidArgument, match="int8 codes without scales"):
        matmul(torch.randn(3, 70), state.CB)
    with pytest.raises(InvalidDtype, match="float64"):
        matmul(torch.randn(3, 70, dtype=torch.float64), state.CB, state=state)
    with pytest.raises(InvalidArgument, match="threshold"):
        matmul(torch.randn(3, 70), state.CB, state=state, threshold=float("inf"))


def packed_weight(n, k, quant_type="nf4", nested=True, dtype=torch.float32, **options):
    return F.quantize_4bit(torch.randn(n, k).to(dtype), quant_type=quant_type, compress_statistics=nested, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_4bit_product_and_its_gradients(dtype, quant_type, nested):
    packed, state = packed_weight(24, 72, quant_type, nested)
    x = activations(2, 5, 72, dtype=dtype).requires_grad_()
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, 24).to(dtype)
    y = matmul_4bit(x, packed, state, bias=bias)
    y.backward(dy)
    weight, unit = weight_4bit(packed, state), UNIT[dtype]
    flat, gradient = f64(x).reshape(-1, 72), f64(dy).reshape(-1, 24)
    want, total = flat @ weight.T + f64(bias), np.abs(flat) @ np.abs(weight).T + np.abs(f64(bias))
    assert_close(y, want.reshape(2, 5, 24), total.reshape(2, 5, 24), roundings=80, weight_unit=unit)
    total = np.abs(gradient) @ np.abs(weight)
    assert_close(x.grad.reshape(-1, 72), gradient @ weight, total, roundings=32, weight_unit=unit)
    assert_close(bias.grad, gradient.sum(0), np.abs(gradient).sum(0), roundings=16)
    with torch.no_grad():
        assert torch.equal(matmul_4bit(x, packed, state, bias=bias), y)
    with torch.inference_mode():
        assert torch.equal(matmul_4bit(x.detach(), packed.t(), state, bias=bias.detach()), y)


def test_4bit_bad_arguments_are_named():
    packed, state = packed_weight(24, 72)
    with pytest.raises(InvalidArgument, match="quant_state is None"):
        matmul_4bit(torch.randn(3, 72), packed, None)
    with pytest.raises(InvalidArgument, match=r"weight of shape \(24, 72\)"):
        matmul_4bit(torch.randn(3, 25), packed, state)
    with pytest.raises(InvalidArgument, match="out"):
        matmul_4bit(torch.randn(3, 72), packed, state, out=torch.empty(3, 72))
    out = torch.empty(3, 24)
    assert matmul_4bit(torch.ones(3, 72), packed, state, out=out) is out


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(cast):
    packed, qstate = packed_weight(24, 72)
    state = frozen(24, 72)
    x, bias = activations(3, 72), torch.randn(24)
    linear = torch.nn.Linear(72, 24)
    with torch.autocast("cpu", dtype=cast):
        y4, y8 = matmul_4bit(x, packed, qstate, bias=bias), matmul(x, state.CB, state=state, bias=bias)
        assert y4.dtype == y8.dtype == linear(x).dtype == cast
    assert torch.equal(y4, matmul_4bit(x.to(cast), packed, qstate, bias=bias))
    assert torch.equal(y8, matmul(x.to(cast), state.CB, state=state, bias=bias))
