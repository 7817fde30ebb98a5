"""The 4-bit ops of ``qcore.ops`` but the product: values, packing, nesting, layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from expected import codes_4bit, codes_8bit, decoded, random, unpacked
from qcore import codebooks
from qcore.backend.interface import Weight4bit
from qcore.ops.fourbit import dequantize_4bit, dequantize_absmax, quantize_4bit, quantize_absmax

pytestmark = pytest.mark.usefixtures("backend")
DYNAMIC = torch.tensor(codebooks.DYNAMIC)


def weight_of(A: torch.Tensor, quant_type: str, blocksize: int, nested: bool = False) -> Weight4bit:
    packed, absmax = quantize_4bit(A, quant_type, blocksize)
    weight = Weight4bit(packed.view(-1), absmax, quant_type, blocksize, tuple(A.shape))
    if not nested:
        return weight
    codes, nested_absmax, offset = quantize_absmax(absmax, DYNAMIC, 32)
    return replace(
        weight,
        absmax=codes,
        nested_absmax=nested_absmax,
        nested_code=DYNAMIC,
        nested_offset=offset,
        nested_blocksize=32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((300,), 128), ((5, 77), 64), ((2, 3, 41), 32), ((1,), 64)])
def test_packed_codes_and_scales_are_those_of_the_spec(
    quant_type: str, dtype: torch.dtype, shape: tuple[int, ...], blocksize: int
) -> None:
    A = random(*shape, dtype=dtype)
    packed, absmax = quantize_4bit(A, quant_type, blocksize)
    expected, scales = codes_4bit(A, quant_type, blocksize)
    n = A.numel()
    assert packed.shape == ((n + 1) // 2, 1)
    np.testing.assert_array_equal(unpacked(packed, n), expected)
    np.testing.assert_array_equal(absmax.numpy(), scales)
    if n % 2:
        assert packed[-1].item() & 15 == (7 if quant_type == "nf4" else 0), "the odd nibble holds the code of 0"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_gives_the_exact_value_rounded_once(quant_type: str, dtype: torch.dtype, nested: bool) -> None:
    weight = weight_of(random(37, 83), quant_type, 64, nested)
    result = dequantize_4bit(weight, dtype)
    expected = torch.from_numpy(decoded(weight).astype(np.float32)).to(dtype)
    assert torch.equal(result, expected)


def test_nested_scales_are_those_of_the_spec() -> None:
    absmax = random(1000).abs()
    codes, nested_absmax, offset = quantize_absmax(absmax, DYNAMIC, 256)
    values = absmax.double().numpy()
    lanes = [sum(values[lane::256].tolist()) for lane in range(256)]
    assert offset.shape == (1,)
    assert offset.item() == np.float32(sum(lanes) / 1000)
    expected, scales = codes_8bit(absmax - offset, DYNAMIC, 256)
    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_array_equal(nested_absmax.numpy(), scales)
    back = dequantize_absmax(codes, nested_absmax, DYNAMIC, offset, 256)
    scale = np.repeat(nested_absmax.numpy(), 256)[:1000]
    np.testing.assert_array_equal(back.numpy(), DYNAMIC.numpy()[codes.numpy()] * scale + offset.numpy())


def test_a_transposed_input_gives_what_its_contiguous_copy_gives() -> None:
    A = random(64, 48).t()
    for got, wanted in zip(quantize_4bit(A, "nf4", 64), quantize_4bit(A.contiguous(), "nf4", 64), strict=True):
        assert torch.equal(got, wanted)


def test_parts_of_a_weight_need_not_be_contiguous() -> None:
    weight = weight_of(random(64, 64), "nf4", 64)
    strided = replace(weight, absmax=torch.stack([weight.absmax, -weight.absmax], 1)[:, 0])
    assert not strided.absmax.is_contiguous()
    assert torch.equal(dequantize_4bit(strided, torch.float32), dequantize_4bit(weight, torch.float32))


def test_scales_may_wait_for_their_negation() -> None:
    weight = weight_of(random(16, 64), "nf4", 64)
    waiting, negated = (replace(weight, absmax=absmax) for absmax in (torch._neg_view(weight.absmax), -weight.absmax))
    assert torch.equal(dequantize_4bit(waiting, torch.float32), dequantize_4bit(negated, torch.float32))


def test_empty_tensors_give_empty_results_and_a_zero_offset() -> None:
    packed, absmax = quantize_4bit(torch.empty(0, 8), "fp4", 64)
    assert packed.shape == (0, 1)
    codes, nested_absmax, offset = quantize_absmax(absmax, DYNAMIC, 256)
    assert (codes.numel(), nested_absmax.numel(), offset.tolist()) == (0, 0, [0.0])
    weight = Weight4bit(packed.view(-1), absmax, "fp4", 64, (0, 8))
    assert dequantize_4bit(weight, torch.float32).shape == (0, 8)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_out_takes_the_result(layout: str) -> None:
    weight = weight_of(random(32, 32), "nf4", 64)
    out = torch.full((32, 32), torch.nan, dtype=torch.bfloat16)
    out = out if layout == "contiguous" else out.t()
    assert dequantize_4bit(weight, torch.bfloat16, out) is out
    assert torch.equal(out, dequantize_4bit(weight, torch.bfloat16))
