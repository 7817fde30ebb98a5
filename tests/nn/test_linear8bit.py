"""``Linear8bitLt``: what it computes and trains, and what its state says."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcore
from qcore.errors import InvalidArgument
from qcore.nn import Int8Params, Linear8bitLt
from truth import UNIT, assert_close, f64, linear_int8, rows_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("backend")


def quantized(n=48, k=64, *, threshold=0.0, dtype=torch.float32, bias=True):
    return Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=threshold, dtype=dtype).to("cpu")


def activations(*shape, dtype=torch.float32):
    x = torch.randn(*shape)
    x[..., 11] *= 20.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_is_the_papers_product(dtype, threshold, training, caplog):
    layer = quantized(threshold=threshold).train(training)
    x = activations(2, 5, 64, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
    assert not caplog.records
    bias = layer.bias.detach()
    want, total = linear_int8(x.reshape(-1, 64), layer.weight.data, layer.weight.SCB, bias, threshold)
    assert y.dtype == dtype
    assert_close(y.reshape(-1, 48), want, total, roundings=12)
    assert layer.bias.dtype == torch.float32


def test_the_state_names_codes_scales_and_outliers():
    layer = quantized(threshold=6.0)
    layer(activations(9, 64))
    assert torch.equal(layer.state.CB, layer.weight.data)
    assert torch.equal(layer.state.SCB, layer.weight.SCB)
    assert 11 in layer.state.idx.tolist()
    assert layer.state.threshold == 6.0
    assert not layer.state.has_fp16_weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradients_flow_to_input_and_bias(dtype, threshold):
    layer = quantized(threshold=threshold, dtype=dtype)
    weight = f64(layer.weight.data) * f64(layer.weight.SCB)[:, None] / 127.0
    unit = UNIT[dtype] if dtype != torch.float32 else 3 * 2.0**-24
    for _ in range(3):  # the first call, one that prepares, and a prepared one
        layer.bias.grad = None
        x, dy = activations(2, 5, 64, dtype=dtype).requires_grad_(), torch.randn(2, 5, 48).to(dtype)
        layer(x).backward(dy)
        gradient = f64(dy).reshape(-1, 48)
        total = np.abs(gradient) @ np.abs(weight)
        assert_close(x.grad.reshape(-1, 64), gradient @ weight, total, 56, weight_unit=unit)
        assert_close(layer.bias.grad, gradient.sum(0), np.abs(gradient).sum(0), 16)


def test_a_gradient_of_a_prepared_call_has_a_gradient():
    layer, x = quantized(bias=False), activations(3, 64).requires_grad_()
    for _ in range(3):
        dy = torch.randn(3, 48, requires_grad=True)
        (d_x,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        upstream = torch.randn(3, 64)
        (d_dy,) = torch.autograd.grad(d_x, dy, upstream)
        weight = f64(layer.weight.data) * f64(layer.weight.SCB)[:, None] / 127.0
        assert_close(d_dy, f64(upstream) @ weight.T, np.abs(f64(upstream)) @ np.abs(weight.T), 72)


def test_training_goes_on_after_an_evaluation():
    layer, x = quantized(threshold=6.0), activations(3, 64)

    def gradient():
        leaf = x.clone().requires_grad_()
        layer.train()(leaf).sum().backward()
        return leaf.grad

    before, saved = gradient(), copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.eval()(x)
    with torch.inference_mode():
        layer(x)
    assert torch.equal(gradient(), before)
    assert before.abs().sum() > 0
    assert all(torch.equal(saved[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float_weight_is_trained(dtype):
    layer = Linear8bitLt(64, 48, has_fp16_weights=True, threshold=6.0, dtype=dtype).to("cpu")
    assert layer.weight.dtype == dtype
    assert layer.weight.requires_grad
    x, dy = activations(5, 64, dtype=dtype), torch.randn(5, 48).to(dtype)
    layer(x).backward(dy)
    total = np.abs(f64(dy)).T @ np.abs(f64(x))
    assert_close(layer.weight.grad, f64(dy).T @ f64(x), total, roundings=8)
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        layer.weight -= 0.5 * layer.weight.grad
        after = layer(x)
        codes, stats, _ = rows_int8(layer.weight)
        want, total = linear_int8(x, torch.from_numpy(codes), torch.from_numpy(stats), layer.bias, 6.0)
    assert not torch.equal(before, after), "an evaluation after a step sees the new weight"
    assert_close(after, want, total, roundings=12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = nn.Sequential(quantized(64, 64, threshold=6.0), nn.GELU(), quantized(64, 64))
    x = activations(3, 64).requires_grad_()
    model(x).sum().backward()
    want, x.grad = x.grad, None
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, want)


def test_a_weight_of_numbers_is_quantized_on_the_fly():
    layer = Linear8bitLt(64, 48, has_fp16_weights=False)
    x = activations(4, 64)
    y = layer(x)
    assert layer.weight.dtype == torch.float32, "a forward pass does not change the weight"
    assert "SCB" not in layer.state_dict()
    assert torch.equal(layer.to("cpu")(x), y)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_what_a_linear_layer_gives(cast):
    layer, x = quantized(threshold=6.0), activations(3, 64)
    with torch.autocast("cpu", dtype=cast):
        y = layer(x)
    assert y.dtype == cast
    assert torch.equal(y, layer(x.to(cast)))


def test_a_changed_weight_is_noticed():
    layer, x = quantized(), activations(3, 64)
    first = layer(x)
    weight = layer.weight
    layer.weight = Int8Params(torch.zeros(48, 64), requires_grad=False).to("cpu")
    assert torch.equal(layer(x), layer.bias.expand(3, 48))
    layer.weight = weight
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("part", ["weight", "scales"])
def test_a_weight_that_changes_before_its_gradient_is_refused(calls, part):
    layer, x = quantized(), activations(3, 64).requires_grad_()
    for _ in range(calls):
        y = layer(x)
    with torch.no_grad():
        (layer.weight if part == "weight" else layer.weight.SCB).zero_()
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        y.sum().backward()


def fresh(layer, x):
    """What a new layer with the same weight says: nothing was prepared in it."""
    other = Linear8bitLt(64, 48, has_fp16_weights=False, threshold=layer.state.threshold)
    other.weight = Int8Params(layer.weight.data.clone(), SCB=layer.weight.SCB.clone())
    other.bias = layer.bias
    return other(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: (layer, x),
        lambda layer, x: (layer, x.bfloat16()),
        lambda layer, x: (layer, x[:2]),
        lambda layer, x: (layer, x[None, None]),
        lambda layer, x: (layer, torch.stack([x, x], -1)[..., 0]),
        lambda layer, x: (setattr(layer.weight, "data", layer.weight.data.flip(0).clone()), x),
        lambda layer, x: (setattr(layer.weight, "SCB", layer.weight.SCB * 2), x),
        lambda layer, x: (setattr(layer.state, "threshold", 2.5), x),
        lambda layer, x: (setattr(layer.state, "threshold", 0.0), x),
        lambda layer, x: (layer.state.reset_grads(), x),
        lambda layer, x: (setattr(layer, "bias", nn.Parameter(torch.randn(48))), x),
        lambda layer, x: (layer.bias.data.mul_(2), x),
        lambda layer, x: (layer.half().float(), x.half()),
    ],
)
def test_what_was_prepared_for_other_arguments_is_not_used(change):
    layer, x = quantized(threshold=6.0), activations(4, 64)
    with torch.no_grad():
        for _ in range(3):
            before = layer(x)
        assert torch.equal(before, fresh(layer, x))
        _, x = change(layer, x)
        for _ in range(3):
            assert torch.equal(layer(x), fresh(layer, x))
        outliers = x.reshape(-1, 64).abs().float().amax(0) >= layer.state.threshold
        want = outliers.nonzero().view(-1).tolist() if layer.state.threshold else None
        assert (None if layer.state.idx is None else layer.state.idx.tolist()) == want


def test_another_backend_is_noticed_and_bad_input_is_still_refused():
    layer, x = quantized(threshold=6.0), activations(4, 64)
    with torch.no_grad():
        want = layer(x)
        layer(x)
        with qcore.use_backend("cpu_reference"):
            assert torch.equal(layer(x), want)
        with pytest.raises(InvalidArgument, match=r"\(4, 63\)"):
            layer(x[:, :63])
        layer.state.threshold = float("nan")
        with pytest.raises(InvalidArgument, match="threshold"):
            layer(x)


def test_copies_compute_the_same():
    layer, x = quantized(threshold=6.0), activations(3, 64)
    want = layer(x)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), want)
    again.weight.data.zero_()
    assert torch.equal(layer(x), want)


def test_arguments():
    with pytest.raises(InvalidArgument, match="index"):
        Linear8bitLt(4, 4, index=torch.arange(4))
    with pytest.raises(InvalidArgument, match=r"\(2, 63\)"):
        quantized()(torch.randn(2, 63))
    assert Linear8bitLt(8, 4, device="meta").weight.is_meta
    assert quantized(dtype=torch.float16).half().weight.dtype == torch.int8
