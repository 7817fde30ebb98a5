"""``matmul.execute`` and ``matmul.mat_mul_fused`` against float64; the choice is made once and kept."""

from __future__ import annotations

import pytest
import torch

import qcore
from qcore import autotune
from qcore import functional as F
from qcore.errors import InvalidArgument

K, N = 128, 48


def problem(form: str):
    torch.manual_seed(3)
    x, w, bias = torch.randn(5, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    if form == "int8":
        codes, scales, _ = F.int8_vectorwise_quant(w)
        state = qcore.MatmulLtState(CB=codes, SCB=scales, has_fp16_weights=False)
        return x, codes, state, bias, F.int8_vectorwise_dequant(codes, scales)
    packed, state = F.quantize_4bit(w, quant_type=form)
    return x, packed, state, bias, F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("kernel", ["auto", "fused", "dequantize"])
@pytest.mark.parametrize("form", ["int8", "nf4", "fp4"])
def test_every_kernel_multiplies_by_the_same_weights(form, kernel):
    x, weight, state, bias, numbers = problem(form)
    x.requires_grad_()
    y = qcore.matmul.execute(x, weight, state=state, bias=bias, kernel=kernel)
    want = x.double() @ numbers.double().T + bias.double()
    # int8 activations are off by at most half a step of their row.
    step = x.detach().abs().amax() / 254 * numbers.abs().sum(1).max() if form == "int8" else 0.0
    assert (y - want).abs().max() <= step + 1e-4
    y.sum().backward()
    assert (x.grad - numbers.sum(0)).abs().max() < 1e-3


def test_the_choice_is_timed_once_for_a_kind_of_problem(monkeypatch):
    autotune.forget()
    timed = []
    seconds = {"slow": 3.0, "fast": 1.0}
    monkeypatch.setattr(autotune, "_seconds", lambda call, device: timed.append(call()) or seconds[timed[-1]])
    calls = {name: lambda name=name: name for name in seconds}
    cpu = torch.device("cpu")
    assert autotune.fastest(("kind", 1), calls, cpu) == "fast"
    assert len(timed) == 2 * autotune.ROUNDS
    assert autotune.fastest(("kind", 1), calls, cpu) == "fast"
    assert len(timed) == 2 * autotune.ROUNDS
    autotune.forget()


def test_the_fused_product_takes_weights_as_they_come():
    x, weight, state, bias, numbers = problem("nf4")
    parameter = qcore.nn.Params4bit(weight, quant_state=state, bnb_quantized=True)
    want = x @ numbers.T + bias
    assert (qcore.matmul.mat_mul_fused(x, parameter, bias=bias) - want).abs().max() < 1e-4
    assert (qcore.matmul.mat_mul_fused(x, numbers, bias=bias) - want).abs().max() < 0.1


def test_an_unknown_kernel_and_a_lost_gradient_are_refused():
    x, weight, state, _, numbers = problem("int8")
    with pytest.raises(InvalidArgument, match="kernel is 'best'"):
        qcore.matmul.execute(x, weight, state=state, kernel="best")
    with pytest.raises(InvalidArgument, match="B needs a gradient"):
        qcore.matmul.execute(x, numbers.requires_grad_(), kernel="dequantize")
