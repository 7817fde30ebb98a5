"""``qcore.functional`` beside bitsandbytes 0.50.2 on the CPU.

Equal where the spec says equal. bitsandbytes' CPU path differs from its CUDA path in 8-bit codes (a table lookup), so
its torch implementation is the peer there; FP4 codes are compared away from the thresholds, which its torch path takes
from other constants; blocks of zeros, NaN and tails have tests of their own.
"""

from __future__ import annotations

import bitsandbytes.functional as B
import numpy as np
import pytest
import torch
from torch import Tensor

from qcore import codebooks
from qcore import functional as F
from qcore.errors import InvalidArgument, InvalidDtype

pytestmark = pytest.mark.usefixtures("backend")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_of(packed: Tensor) -> np.ndarray:
    data = packed.reshape(-1).view(torch.uint8).numpy()
    return np.stack([data >> 4, data & 15], 1).reshape(-1)


class TestFourBit:
    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize("blocksize", [None, 32, 4096])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_nf4_is_bitsandbytes_bit_for_bit(self, dtype: torch.dtype, blocksize: int | None, compress: bool) -> None:
        A = random(64, 192, dtype=dtype)
        packed, state = F.quantize_nf4(A, blocksize=blocksize, compress_statistics=compress)
        their_packed, their_state = B.quantize_nf4(A, blocksize=blocksize, compress_statistics=compress)
        assert torch.equal(packed, their_packed)
        assert packed.shape == their_packed.shape
        assert torch.equal(state.code, their_state.code)
        assert (state.dtype, state.shape, state.blocksize, state.quant_type) == (dtype, A.shape, blocksize or 64, "nf4")
        if not compress:
            assert torch.equal(state.absmax, their_state.absmax)
            return
        assert state.offset.shape == their_state.offset.shape == ()
        torch.testing.assert_close(state.offset, their_state.offset, rtol=1e-6, atol=0)
        assert torch.equal(state.state2.code, their_state.state2.code)
        assert state.state2.blocksize == their_state.state2.blocksize == 256
        assert state.state2.dtype == their_state.state2.dtype == torch.float32

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_fp4_is_bitsandbytes_away_from_the_thresholds(self, dtype: torch.dtype) -> None:
        A = random(64, 192, dtype=dtype)
        packed, state = F.quantize_fp4(A)
        theirs, their_state = B.quantize_fp4(A)
        assert torch.equal(state.absmax, their_state.absmax)
        scaled = (A.float().view(-1, 64) / state.absmax[:, None]).abs().view(-1)
        distance = (scaled[:, None] - torch.tensor(codebooks.FP4_THRESHOLDS)).abs().min(1).values
        far = (distance > 1e-3).numpy()
        assert far.mean() > 0.9
        # Values, not codes: 0 has two codes, and bitsandbytes takes either.
        table = np.array(codebooks.FP4, np.float32)
        np.testing.assert_array_equal(table[codes_of(packed)][far], table[codes_of(theirs)][far])

    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dequantize_is_bitsandbytes_bit_for_bit(self, dtype: torch.dtype, quant_type: str, compress: bool) -> None:
        packed, state = B.quantize_4bit(
            random(64, 192, dtype=dtype), quant_type=quant_type, compress_statistics=compress
        )
        ours = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
        expected = B.dequantize_4bit(packed, state)
        assert torch.equal(F.dequantize_4bit(packed, ours), expected)
        by_name = F.dequantize_nf4 if quant_type == "nf4" else F.dequantize_fp4
        out = torch.empty_like(expected)
        assert by_name(packed, ours, out=out) is out
        assert torch.equal(out, expected)

    @pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int8])
    def test_quant_storage_is_the_same_bytes(self, storage: torch.dtype) -> None:
        A = random(64, 64)
        plain, _ = F.quantize_4bit(A)
        packed, state = F.quantize_4bit(A, quant_storage=storage)
        theirs, _ = B.quantize_4bit(A, quant_storage=storage)
        assert packed.dtype == theirs.dtype == storage
        assert packed.shape == theirs.shape
        assert torch.equal(packed.view(torch.uint8).view(-1), plain.view(-1))
        assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, state))
        x = random(3, 64)
        assert torch.equal(F.gemv_4bit(x, packed, state=state), F.gemv_4bit(x, plain, state=state))

    def test_quant_storage_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="33 packed bytes do not divide"):
            F.quantize_4bit(random(66), quant_storage=torch.float32)

    @pytest.mark.parametrize("compress", [False, True])
    def test_preallocated_results_are_used(self, compress: bool) -> None:
        A = random(64, 64)
        packed, state = F.quantize_4bit(A, compress_statistics=compress)
        absmax, out = torch.empty_like(state.absmax), torch.empty_like(packed)
        got, got_state = F.quantize_4bit(A, absmax, out, compress_statistics=compress)
        assert got is out
        assert got_state.absmax is absmax
        assert torch.equal(out, packed)
        assert torch.equal(absmax, state.absmax)
        with pytest.raises(InvalidArgument, match=r"quantize_4bit: out is torch.uint8 of shape \(1,\)"):
            F.quantize_4bit(A, out=torch.empty(1, dtype=torch.uint8))

    def test_without_a_state_absmax_and_out_say_everything(self) -> None:
        A = random(64, 64, dtype=torch.bfloat16)
        packed, state = F.quantize_nf4(A)
        out = torch.empty_like(A)
        assert F.dequantize_nf4(packed, absmax=state.absmax, out=out) is out
        assert torch.equal(out, F.dequantize_4bit(packed, state))
        with pytest.raises(InvalidArgument, match="both absmax and out"):
            F.dequantize_nf4(packed, absmax=state.absmax)

    def test_a_packed_row_stands_for_the_transposed_tensor(self) -> None:
        packed, state = F.quantize_nf4(random(6, 64))
        assert torch.equal(F.dequantize_nf4(packed.t(), state), F.dequantize_nf4(packed, state).t())
        packed, state = F.quantize_nf4(torch.tensor([[0.5, -1.0]]))
        assert F.dequantize_nf4(packed, state).shape == (1, 2), "one byte is no row"

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_zeros_stay_zero_and_a_nan_reads_back_as_zero(self, quant_type: str) -> None:
        A = torch.zeros(3, 64)
        A[1, 5], A[1, 6] = torch.nan, 2.0
        back = F.dequantize_4bit(*F.quantize_4bit(A, quant_type=quant_type))
        expected = torch.zeros(3, 64)
        expected[1, 6] = 2.0
        assert torch.equal(back, expected)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_check_finite_names_the_first_bad_element(self, bad: float) -> None:
        A = random(4, 64)
        A[2, 7] = bad
        for function in (F.quantize_4bit, F.quantize_nf4, F.quantize_fp4, F.quantize_blockwise):
            with pytest.raises(InvalidArgument, match=r"A has 1 NaN or infinite elements, the first at \(2, 7\)"):
                function(A, check_finite=True)
        F.quantize_4bit(random(4, 64), check_finite=True)

    def test_gemv_is_the_product_with_the_decoded_weight(self) -> None:
        packed, state = F.quantize_4bit(random(24, 64), quant_type="nf4", compress_statistics=True)
        x, out = random(2, 64), torch.empty(2, 24)
        expected = x.double() @ F.dequantize_4bit(packed, state).double().t()
        assert F.gemv_4bit(x, packed, out, state=state) is out
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        for options in ({"transposed_A": True}, {"transposed_B": True}):
            with pytest.raises(InvalidArgument, match="transposed"):
                F.gemv_4bit(x, packed, state=state, **options)
        with pytest.raises(InvalidArgument, match="state is None"):
            F.gemv_4bit(x, packed)

    def test_wrong_arguments(self) -> None:
        A = random(64)
        with pytest.raises(InvalidArgument, match="blocksize is 16"):
            F.quantize_4bit(A, blocksize=16)
        with pytest.raises(ValueError, match="quant_type is 'af4'"):
            F.quantize_4bit(A, quant_type="af4")
        with pytest.raises(InvalidDtype, match=r"A is torch\.int32"):
            F.quantize_4bit(A.int())
        codes, state = F.quantize_blockwise(A)
        with pytest.raises(InvalidArgument, match="only a state of quantize_4bit"):
            F.dequantize_4bit(codes, state)


class TestBlockwise:
    @pytest.mark.parametrize("blocksize", [64, 256, 4096])
    @pytest.mark.parametrize("name", ["create_dynamic_map", "create_linear_map", "create_fp8_map"])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_codes_are_bitsandbytes_away_from_ties(self, dtype: torch.dtype, name: str, blocksize: int) -> None:
        A, code = random(64, 256, dtype=dtype), getattr(F, name)()
        codes, state = F.quantize_blockwise(A, code, blocksize=blocksize)
        theirs, absmax = torch_quantize_blockwise(A, code, blocksize)
        assert torch.equal(state.absmax, absmax)
        scaled = (A.double().view(-1, blocksize) / absmax.double()[:, None]).view(-1)
        middle = (code[:-1].double() + code[1:].double()) / 2
        tie = torch.isclose(scaled[:, None], middle, rtol=1e-6, atol=1e-9).any(1)
        assert tie.float().mean() < 0.05
        assert torch.equal(codes.view(-1)[~tie], theirs.view(-1)[~tie])

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dequantize_is_bitsandbytes_bit_for_bit(self, dtype: torch.dtype) -> None:
        codes, state = B.quantize_blockwise(random(33, 100, dtype=dtype), blocksize=256)
        ours = F.QuantState(state.absmax, code=state.code, blocksize=256, dtype=dtype)
        assert torch.equal(F.dequantize_blockwise(codes, ours), B.dequantize_blockwise(codes, state))

    def test_an_exact_zero_stays_zero(self) -> None:
        A = torch.zeros(256)
        A[3] = 5.0
        assert torch.equal(F.dequantize_blockwise(*F.quantize_blockwise(A, blocksize=256)), A)

    def test_nested_scales_come_back_within_one_code(self) -> None:
        A = random(64, 512)
        codes, state = F.quantize_blockwise(A, blocksize=64, nested=True)
        plain, plain_state = F.quantize_blockwise(A, blocksize=64)
        assert torch.equal(codes, plain)
        assert state.nested
        assert state.absmax.dtype == torch.uint8
        assert state.state2.blocksize == 64
        assert state.offset.shape == ()
        difference = (F.dequantize_blockwise(codes, state) - F.dequantize_blockwise(plain, plain_state)).abs().max()
        assert 0 < difference < 0.02

    def test_preallocated_results_are_used(self) -> None:
        A = random(64, 64)
        codes, state = F.quantize_blockwise(A)
        absmax, out = torch.empty_like(state.absmax), torch.empty_like(codes)
        got, got_state = F.quantize_blockwise(A, absmax=absmax, out=out)
        assert got is out
        assert got_state.absmax is absmax
        assert torch.equal(out, codes)
        back = torch.empty(64, 64, dtype=torch.float16)
        assert F.dequantize_blockwise(codes, absmax=absmax, out=back) is back
        assert torch.equal(back, F.dequantize_blockwise(codes, absmax=absmax).half())

    def test_the_state_keeps_its_codebook_when_the_callers_changes(self) -> None:
        code = F.create_linear_map()
        codes, state = F.quantize_blockwise(random(64), code)
        expected = F.dequantize_blockwise(codes, state)
        code.zero_()
        assert torch.equal(F.dequantize_blockwise(codes, state), expected)

    def test_wrong_arguments(self) -> None:
        with pytest.raises(InvalidArgument, match="neither quant_state nor absmax"):
            F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8))
        with pytest.raises(InvalidArgument, match="nested absmax needs quant_state"):
            F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8), absmax=torch.ones(1), nested=True)
        with pytest.raises(InvalidArgument, match="ascending"):
            F.quantize_blockwise(random(64), F.create_linear_map().flip(0))


def torch_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes' torch path: it serves every device type without a kernel of its own."""
    blocks = A.float().view(-1, blocksize)
    absmax = blocks.abs().max(1).values
    scaled = blocks * (1.0 / absmax)[:, None]
    return torch.bucketize(scaled.view(-1), (code[:-1] + code[1:]) / 2).to(torch.uint8), absmax
