"""``torch.ops.bitsandbytes``: kernel, fake and schema of each op agree; the numbers are those of qcore's functions."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

F = bnb.functional
ops = torch.ops.bitsandbytes
CHECKS = ("test_schema", "test_faketensor")


def check(op, *arguments):
    torch.library.opcheck(op, arguments, test_utils=CHECKS)


def test_int8_ops():
    A, B = torch.randn(6, 32), torch.randn(5, 32)
    A[0, 3] = 20.0
    CA, SCA, columns = ops.int8_vectorwise_quant(A, 6.0)
    CB, SCB, none = ops.int8_vectorwise_quant(B)
    assert columns.tolist() == [3]
    assert none is None
    assert torch.equal(ops.int8_linear_matmul(CA, CB), (CA.int() @ CB.int().T))
    mixed, outliers = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns)
    assert (mixed - A @ B.T).abs().max() < 0.2
    assert torch.equal(outliers, A[:, [3]])
    product = ops.int8_scaled_mm(CA, CB, SCA, SCB, None, torch.float32)
    assert torch.equal(product, ops.int8_mm_dequant(CA.int() @ CB.int().T, SCA, SCB, torch.float32))
    check(ops.int8_linear_matmul.default, CA, CB)
    check(ops.int8_linear_matmul.out, CA, CB, torch.empty(6, 5, dtype=torch.int32))
    check(ops.int8_scaled_mm.default, CA, CB, SCA, SCB, None, torch.float32)
    check(ops.int8_vectorwise_quant.default, A, 6.0)
    check(ops.int8_double_quant.default, A, 6.0)
    check(ops.int8_vectorwise_dequant.default, CA, SCA)
    check(ops.int8_mixed_scaled_mm.default, A, CA, CB, SCA, SCB, columns)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_ops(quant_type, nested):
    A, W, bias = torch.randn(3, 64), torch.randn(20, 64), torch.randn(20)
    packed, state = F.quantize_4bit(W, quant_type=quant_type, compress_statistics=nested)
    numbers = F.dequantize_4bit(packed, state)
    arguments = (A, packed, [20, 64], state.absmax, 64, quant_type, bias)
    if nested:
        arguments = (*arguments[:3], state.state2.absmax, 64, quant_type, bias)
        arguments += (state.absmax, state.state2.code, state.offset)
    assert (ops.gemm_4bit(*arguments) - (A @ numbers.T + bias)).abs().max() < 1e-4
    check(ops.gemm_4bit.default, *arguments)
    if not nested:
        again, absmax = ops.quantize_4bit(W, 64, quant_type, torch.uint8)
        assert torch.equal(again, packed)
        assert torch.equal(ops.dequantize_4bit(again, absmax, 64, quant_type, W.shape, W.dtype), numbers)
        gemv = (A[:1], packed, [20, 64], absmax, state.code, 64)
        assert (ops.gemv_4bit(*gemv) - A[:1] @ numbers.T).abs().max() < 1e-4
        check(ops.gemv_4bit.default, *gemv)
        check(ops.quantize_4bit.default, W, 64, quant_type, torch.uint8)
        out = torch.empty_like(W)
        check(ops.dequantize_4bit.out, packed, absmax, 64, quant_type, list(W.shape), W.dtype, out)


def test_blockwise_ops():
    A, code = torch.randn(5, 100), F.create_dynamic_map()
    codes, absmax = ops.quantize_blockwise(A, code, 256)
    back = ops.dequantize_blockwise(codes, absmax, code, 256, torch.float32)
    assert torch.equal(back, F.dequantize_blockwise(*F.quantize_blockwise(A, blocksize=256)))
    check(ops.quantize_blockwise.default, A, code, 256)
    check(ops.dequantize_blockwise.out, codes, absmax, code, 256, torch.float32, torch.empty_like(A))


def test_optimizer_ops():
    parameter, gradient = torch.randn(512), torch.randn(512)
    expected = torch.nn.Parameter(parameter.clone())
    expected.grad = gradient.clone()
    torch.optim.AdamW([expected], lr=0.01, weight_decay=0.1).step()
    state1, state2 = torch.zeros(512), torch.zeros(512)
    common = (0.9, 0.999, 0.0, 0.0, 1e-8)
    ops.optimizer_update_32bit("adam", gradient, parameter, state1, state2, None, 0.0, 0.0, *common, 0.1, 1, 0.01, 1.0)
    assert (parameter - expected).abs().max() < 1e-6
    assert (state1 - 0.1 * gradient).abs().max() < 1e-6
    signed, unsigned = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
    codes1, codes2 = torch.full((512,), 127, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    absmax1, absmax2 = torch.zeros(2), torch.zeros(2)
    eight = parameter.clone()
    maps = (signed, unsigned, absmax1, absmax2)
    ops.optimizer_update_8bit_blockwise("adam", gradient, eight, codes1, codes2, *common, 1, 0.01, *maps, 0.0, 1.0)
    # The first step of Adam has size lr in every element, whatever its state is rounded to afterwards.
    assert ((eight - parameter).abs() - 0.01).abs().max() < 1e-5
    torch.testing.assert_close(absmax1, (0.1 * gradient).view(2, 256).abs().amax(1))
