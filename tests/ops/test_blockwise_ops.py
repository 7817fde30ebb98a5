"""The 8-bit ops of ``qcore.ops``: values, layouts, preallocated outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from expected import codes_8bit, random
from qcore import codebooks
from qcore.ops.blockwise import dequantize_blockwise, quantize_blockwise

pytestmark = pytest.mark.usefixtures("backend")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def code_of(name: str) -> Tensor:
    return torch.tensor(getattr(codebooks, name))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["DYNAMIC", "DYNAMIC_UNSIGNED", "LINEAR", "FP8"])
@pytest.mark.parametrize(("shape", "blocksize"), [((300,), 256), ((5, 77), 64), ((2, 3, 41), 32), ((), 64)])
def test_codes_and_scales_are_those_of_the_spec(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], blocksize: int
) -> None:
    A, code = random(*shape, dtype=dtype), code_of(name)
    codes, absmax = quantize_blockwise(A, code, blocksize)
    expected, scales = codes_8bit(A, code, blocksize)
    assert codes.shape == A.shape
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes.numpy().reshape(-1), expected)
    np.testing.assert_array_equal(absmax.numpy(), scales)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_one_product_and_one_rounding(dtype: torch.dtype) -> None:
    code, codes = code_of("DYNAMIC"), torch.arange(256, dtype=torch.uint8).repeat(2)[:500].reshape(20, 25)
    absmax = random(16).abs()
    result = dequantize_blockwise(codes, absmax, code, 32, dtype)
    scale = np.repeat(absmax.numpy(), 32)[:500]
    expected = torch.from_numpy(code.numpy()[codes.numpy().reshape(-1)] * scale).to(dtype)
    assert result.shape == codes.shape
    assert torch.equal(result.reshape(-1), expected)


def test_a_transposed_input_gives_what_its_contiguous_copy_gives() -> None:
    A, code = random(64, 48).t(), code_of("DYNAMIC")
    codes, absmax = quantize_blockwise(A, code, 64)
    same, same_absmax = quantize_blockwise(A.contiguous(), code, 64)
    assert torch.equal(codes, same)
    assert torch.equal(absmax, same_absmax)
    assert torch.equal(
        dequantize_blockwise(codes.t(), absmax, code, 64, torch.float32),
        dequantize_blockwise(codes.t().contiguous(), absmax, code, 64, torch.float32),
    )


def test_a_pending_negation_is_carried_out() -> None:
    negated = torch._neg_view(random(64))
    assert negated.is_neg()
    assert negated.is_contiguous()
    codes, _ = quantize_blockwise(negated, code_of("DYNAMIC"), 64)
    plain, _ = quantize_blockwise(-random(64), code_of("DYNAMIC"), 64)
    assert torch.equal(codes, plain)


def test_an_input_that_wants_a_gradient_is_detached() -> None:
    codes, absmax = quantize_blockwise(random(64).requires_grad_(), code_of("DYNAMIC"), 64)
    assert not codes.requires_grad
    assert not absmax.requires_grad


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 7)])
def test_an_empty_tensor_gives_empty_results(shape: tuple[int, ...]) -> None:
    codes, absmax = quantize_blockwise(torch.empty(shape), code_of("DYNAMIC"), 64)
    assert codes.shape == shape
    assert absmax.shape == (0,)
    assert dequantize_blockwise(codes, absmax, code_of("DYNAMIC"), 64, torch.float16).shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_out_takes_the_result(layout: str) -> None:
    code = code_of("DYNAMIC")
    codes, absmax = quantize_blockwise(random(32, 32), code, 64)
    out = torch.full((32, 32), torch.nan)
    out = out if layout == "contiguous" else out.t()
    result = dequantize_blockwise(codes, absmax, code, 64, torch.float32, out)
    assert result is out
    assert torch.equal(out, dequantize_blockwise(codes, absmax, code, 64, torch.float32))


def test_out_may_share_memory_with_an_input() -> None:
    code = code_of("DYNAMIC")
    codes, absmax = quantize_blockwise(random(64), code, 64)
    expected = dequantize_blockwise(codes, absmax, code, 64, torch.float32)
    memory = torch.zeros(64)
    memory.view(torch.uint8)[:64] = codes
    dequantize_blockwise(memory.view(torch.uint8)[:64], absmax, code, 64, torch.float32, memory)
    assert torch.equal(memory, expected)
