"""Simulated int8 activations: the ops' own bits, torch's clipping, a gradient that passes straight through."""

from __future__ import annotations

import pytest
import torch

from qcore import functional as F
from qcore.errors import InvalidArgument


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_what_quantizing_and_reading_back_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    t = (torch.randn(3, 5, 40) * torch.logspace(-2, 2, 15).view(3, 5, 1)).to(dtype)
    t[1, 2] = 0.0
    absmax, scale = F.quantize_activation(t)
    assert absmax.shape == scale.shape == (15,)
    assert torch.equal(absmax, t.float().abs().amax(-1).view(-1))
    codes, stats, _ = F.int8_vectorwise_quant(t)
    back = F.int8_vectorwise_dequant(codes, stats).to(dtype)
    assert torch.equal(F.fake_quantize_tensor(t, absmax, scale), back)


def test_one_scale_for_a_tensor_clips_as_torch_does() -> None:
    torch.manual_seed(1)
    calibration, t = torch.randn(8, 64), torch.randn(4, 64) * 2.0
    absmax, scale = F.quantize_activation(calibration)
    x = t.clone().requires_grad_()
    y = F.fake_quantize_tensor(x, absmax.amax(), scale.amin())
    other = t.clone().requires_grad_()
    want = torch.fake_quantize_per_tensor_affine(other, float(absmax.amax() / 127.0), 0, -127, 127)
    assert (y - want).abs().max() < 1e-5
    gradient = torch.randn_like(t)
    y.backward(gradient)
    want.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, other.grad)
    assert 0 < int((x.grad == 0.0).sum()) < x.numel()


def test_what_does_not_fit_is_refused() -> None:
    t = torch.randn(4, 8)
    absmax, scale = F.quantize_activation(t)
    with pytest.raises(InvalidArgument, match="quant_type is 'nf4', activations take 'int8' only"):
        F.quantize_activation(t, quant_type="nf4")
    with pytest.raises(InvalidArgument, match="absmax has 3 values"):
        F.fake_quantize_tensor(t, absmax[:3], scale)
