"""``Linear4bit``: what it computes, when it is quantized, and that a forward pass changes nothing."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qcore.backend.registry import use_backend
from qcore.errors import InvalidArgument
from qcore.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from truth import UNIT, assert_close, f64, weight_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("backend")


def quantized(n=96, k=64, *, dtype=torch.float32, **options):
    return Linear4bit(k, n, dtype=dtype, **{"quant_type": "nf4", **options}).to("cpu")


def check(layer, x, y, dtype=None):
    """``y`` is the layer's result for ``x``, computed in ``dtype``."""
    dtype = dtype or x.dtype
    weight = weight_4bit(layer.weight.data, layer.weight.quant_state)
    flat = f64(x.to(dtype)).reshape(-1, weight.shape[1])
    bias = 0.0 if layer.bias is None else f64(layer.bias if layer.bias.dtype == torch.float32 else layer.bias.to(dtype))
    total = np.abs(flat) @ np.abs(weight).T + np.abs(bias)
    unit = UNIT[dtype] + (0.0 if y.dtype == dtype else UNIT[dtype] + UNIT[y.dtype])
    assert_close(
        y.reshape(flat.shape[0], layer.out_features),
        flat @ weight.T + bias,
        total,
        weight.shape[1] + 10,
        weight_unit=unit,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_forward_is_the_decoded_product(dtype, quant_type, nested, storage, rows):
    layer = quantized(quant_type=quant_type, compress_statistics=nested, quant_storage=storage)
    x = torch.randn(rows, 64).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    check(layer, x, y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (7, 63), (33, 65), (64, 128)])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_any_shape(n, k, has_bias):
    layer = quantized(n, k, bias=has_bias)
    for shape in [(k,), (1, k), (2, 3, k), (0, k), (2, 0, k)]:
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], n)
        check(layer, x, y)
    strided = torch.randn(k, 6).t()
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_each_input_is_computed_in_its_own_dtype():
    layer = quantized()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float32):
            x = torch.randn(3, 64).to(dtype)
            y = layer(x)
            assert y.dtype == dtype
            check(layer, x, y)
    assert layer.bias.dtype == torch.float32
    assert layer.compute_dtype is None


@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_dtype_is_used_and_the_inputs_returned(compute, dtype):
    layer = quantized()
    x = torch.randn(3, 64).to(dtype)
    layer(x)  # whatever was prepared for another dtype must not be used
    layer.compute_dtype = compute
    y = layer(x)
    assert y.dtype == dtype
    check(layer, x, y, compute)
    layer.compute_dtype = None
    assert torch.equal(y, layer(x.to(compute)).to(dtype))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
def test_autocast_gives_what_a_linear_layer_gives(cast, compute):
    layer = quantized(compute_dtype=compute)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x)
    with torch.autocast("cpu", dtype=cast):
        y = layer(x)
        assert y.dtype == nn.Linear(64, 96)(x).dtype == cast
    check(layer, x, y, compute or cast)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_flow_to_input_and_bias(dtype):
    layer = quantized(dtype=dtype)
    x, dy = torch.randn(2, 5, 64).to(dtype).requires_grad_(), torch.randn(2, 5, 96).to(dtype)
    layer(x).backward(dy)
    weight, gradient = weight_4bit(layer.weight.data, layer.weight.quant_state), f64(dy).reshape(-1, 96)
    total = np.abs(gradient) @ np.abs(weight)
    assert_close(x.grad.reshape(-1, 64), gradient @ weight, total, 100, weight_unit=UNIT[dtype])
    assert_close(layer.bias.grad, gradient.sum(0), np.abs(gradient).sum(0), 16)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_of_gradients_is_that_of_each(dtype):
    layer = quantized(dtype=dtype)
    x, upstream = torch.randn(5, 64).to(dtype).requires_grad_(), torch.randn(3, 5, 96).to(dtype)
    y = layer(x)
    for _ in range(2):  # the second finds a prepared weight
        (batch,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
        for got, dy in zip(batch, upstream, strict=True):
            assert torch.equal(got, torch.autograd.grad(y, x, dy, retain_graph=True)[0])


def test_a_forward_pass_over_a_batch_of_gradients():
    layer = quantized(dtype=torch.float32, bias=False)

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x[:, :64].clone()

        @staticmethod
        def backward(ctx, gradient):
            return layer(gradient)

    x, upstream = torch.randn(5, 96, requires_grad=True), torch.randn(3, 5, 64)
    layer(upstream[0])  # prepared for this shape
    y = Through.apply(x)
    (batch,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    assert torch.equal(batch, torch.stack([layer(one) for one in upstream]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_after_an_evaluation(dtype):
    layer = quantized(dtype=dtype, bias=False)
    x = torch.randn(3, 64).to(dtype)

    def gradient():
        layer.train()
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        return leaf.grad

    before = gradient()
    saved = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            layer(x)
    after = gradient()
    assert before is not None
    assert before.abs().sum() > 0
    assert torch.equal(before, after)
    assert all(torch.equal(saved[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = nn.Sequential(quantized(64, 64), nn.GELU(), quantized(64, 64))
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    want, x.grad = x.grad, None
    bias = model[0].bias.grad.clone()
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, want)
    assert torch.equal(model[0].bias.grad, bias)


def test_a_weight_that_is_not_quantized_is_refused():
    layer = Linear4bit(64, 32)
    with pytest.raises(InvalidArgument, match=r"not quantized yet; .*\.quantize\(\)"):
        layer(torch.randn(1, 64))
    assert layer.quantize() is layer
    assert layer(torch.randn(1, 64)).shape == (1, 32)


def test_kinds_and_arguments():
    assert LinearNF4(64, 32).weight.quant_type == "nf4"
    assert LinearFP4(64, 32).weight.quant_type == "fp4"
    assert Linear4bit(64, 32).weight.quant_type == "fp4"
    assert LinearNF4(64, 32, blocksize=128).to("cpu").weight.quant_state.blocksize == 128
    assert Linear4bit(64, 32, device="meta").weight.is_meta
    with pytest.raises(InvalidArgument, match=r"\(2, 63\)"):
        quantized()(torch.randn(2, 63))


def test_a_changed_weight_is_noticed():
    layer, other, x = quantized(), quantized(), torch.randn(2, 64)
    first, second = layer(x), other(x)
    weight = layer.weight
    layer.weight = other.weight
    assert torch.equal(layer(x) - layer.bias, second - other.bias) or torch.allclose(
        layer(x) - layer.bias, second - other.bias
    )
    layer.weight = weight
    assert torch.equal(layer(x), first)
    zero = copy.deepcopy(weight)
    zero.quant_state.absmax = torch.zeros_like(weight.quant_state.absmax)
    layer.weight = Params4bit(torch.zeros(96, 64), quant_type="nf4").quantize()
    assert torch.equal(layer(x), layer.bias.expand(2, 96))
    layer.weight.data, layer.weight.quant_state = weight.data, weight.quant_state
    assert torch.equal(layer(x), first)


def test_the_backend_in_force_is_used(monkeypatch):
    layer, x = quantized(), torch.randn(2, 64)
    layer(x)
    from qcore.backend.registry import get_backend

    reference = get_backend("cpu_reference")
    calls = []
    original = type(reference).gemm_4bit
    monkeypatch.setattr(
        type(reference),
        "gemm_4bit",
        lambda self, *args, **kwargs: (calls.append(1), original(self, *args, **kwargs))[1],
    )
    with use_backend("cpu_reference"):
        layer(x)
    assert calls


def test_a_wrapper_that_loses_the_class_of_the_weight_is_survived():
    layer, x = quantized(), torch.randn(2, 64)
    want = layer(x)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), want)
    assert "weight.absmax" in layer.state_dict()
