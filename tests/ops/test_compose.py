"""An op that a backend leaves out is made of others only where the spec gives the same result, and never silently."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from expected import assert_close, random, weight_of
from qcore.backend import OPS, Backend
from qcore.backend.interface import WeightInt4
from qcore.backend.registry import get_backend, use_backend
from qcore.errors import Unsupported
from qcore.ops import fourbit, int8
from qcore.ops.compose import composed_ops
from qcore.ops.int4 import gemm_int4, weight_arguments
from qcore.ops.int8_linear import int8_linear, int8_linear_transposed
from qcore.ops.prepared_int8 import PreparedInt8Linear

REFERENCE = get_backend("cpu_reference")


class Partial(Backend):
    """The reference without some ops, and without nested weights if ``flat``."""

    def __init__(self, *missing: str, flat: bool = False) -> None:
        self.name, self.missing, self.flat = "partial", missing, flat

    def describe(self, device: torch.device) -> Any:
        return REFERENCE.describe(device)

    def supports(self, op: str) -> bool:
        return op not in self.missing


def _forward(op: str) -> Any:
    def method(self: Partial, *arguments: Any, **outputs: Any) -> None:
        nested = op == "dequantize_4bit" and arguments[0].nested_absmax is not None
        if op in self.missing or (self.flat and nested):
            raise self._unsupported(op)
        getattr(REFERENCE, op)(*arguments, **outputs)

    return method


for _op in OPS:
    setattr(Partial, _op, _forward(_op))


def test_scaled_gemm_is_bit_for_bit_the_two_ops(caplog: pytest.LogCaptureFixture) -> None:
    A = torch.randint(-127, 128, (5, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    arguments = (A, A, torch.ones(5) * 0.3, torch.ones(5) * 0.7, random(5), torch.bfloat16)
    with use_backend("cpu_reference"):
        expected = int8.int8_scaled_gemm(*arguments)
    partial = Partial("int8_scaled_gemm")
    with use_backend(partial), caplog.at_level(logging.WARNING, "qcore"):
        for _ in range(2):
            assert torch.equal(int8.int8_scaled_gemm(*arguments), expected)
    (record,) = caplog.records
    assert record.message == (
        "backend partial does not serve int8_scaled_gemm; it is composed of int8_gemm, then int8_dequantize_gemm "
        "(QC-INT8-007)"
    )


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_int8_linear_is_bit_for_bit_its_steps(threshold: float) -> None:
    A, bias = random(7, 64), random(12).bfloat16()
    B = torch.randint(-127, 128, (12, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    arguments = (A.bfloat16(), B, torch.linspace(0.1, 3, 12), bias, threshold)
    with use_backend("cpu_reference"):
        expected, columns = int8_linear(*arguments)
    assert bool(columns.any()) == (threshold > 0)
    with use_backend(Partial("int8_linear")):
        out, found = int8_linear(*arguments)
        again = [torch.ops.qcore.int8_linear(A.bfloat16().view(7, 1, 64), *arguments[1:]) for _ in range(2)]
    assert torch.equal(out, expected)
    assert torch.equal(found, columns)
    for out, found in again:
        assert torch.equal(out, expected.view(7, 1, 12))
        assert torch.equal(found, columns)


@pytest.mark.parametrize("missing", [(), ("dequantize_absmax",)])
def test_nested_weights_are_decoded_first_where_a_backend_takes_only_flat_ones(missing: tuple[str, ...]) -> None:
    with use_backend("cpu_reference"):
        weight = weight_of(16, 64, nested=True)
        expected = fourbit.dequantize_4bit(weight, torch.float16)
    with use_backend(Partial(*missing, flat=True)):
        assert torch.equal(fourbit.dequantize_4bit(weight, torch.float16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gemm_4bit_is_composed_within_its_bound_and_logged_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with use_backend("cpu_reference"):
        weight = weight_of(16, 96)
    x, bias = random(3, 96, dtype=dtype), random(16)
    with use_backend(Partial("gemm_4bit")), caplog.at_level(logging.WARNING, "qcore"):
        handle = fourbit.prepare_gemm_4bit(weight)
        y = fourbit.gemm_4bit(x, weight, bias)
        assert torch.equal(handle(x, bias), y)
    assert_close(y, x, weight, bias)
    assert len([record for record in caplog.records if "gemm_4bit" in record.message]) == 1


def test_gemm_4bit_is_not_composed_of_products_that_are_not_exact() -> None:
    with use_backend("cpu_reference"):
        weight = weight_of(16, 96)
    torch.set_float32_matmul_precision("medium")
    try:
        with use_backend(Partial("gemm_4bit")), pytest.raises(Unsupported, match="set_float32_matmul_precision"):
            fourbit.gemm_4bit(random(3, 96), weight)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_op_without_a_recipe_stays_unsupported() -> None:
    with use_backend(Partial("quantize_4bit")), pytest.raises(Unsupported, match="quantize_4bit: backend 'partial'"):
        fourbit.quantize_4bit(random(64), "nf4", 64)
    A = torch.zeros(2, 64, dtype=torch.int8)
    with use_backend(Partial("int8_scaled_gemm", "int8_gemm")), pytest.raises(Unsupported, match="int8_scaled_gemm"):
        int8.int8_scaled_gemm(A, A, torch.ones(2), torch.ones(2))


def test_composed_ops_are_listed() -> None:
    assert composed_ops(REFERENCE) == {}
    assert set(composed_ops(Partial("gemm_4bit", "int8_scaled_gemm", "quantize_4bit"))) == {
        "gemm_4bit",
        "int8_scaled_gemm",
    }
    assert composed_ops(Partial("gemm_4bit", "dequantize_4bit")) == {}


class Matrices(Partial):
    """Its products take what the interface says, and nothing else."""


def _checked(op: str) -> Any:
    def method(self: Matrices, A: torch.Tensor, *arguments: Any, out: torch.Tensor, **outputs: Any) -> None:
        assert (A.dim(), out.dim()) == (2, 2)
        getattr(REFERENCE, op)(A, *arguments, out=out, **outputs)

    return method


for _op in ("gemm_4bit", "gemm_4bit_transposed", "gemm_int4", "int8_linear", "int8_linear_transposed"):
    setattr(Matrices, _op, _checked(_op))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 2, 64)])
def test_a_backend_sees_matrices_whatever_the_activations_are(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-127, 128, (64, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    packed, scales = codes[:, :32].contiguous().view(torch.uint8), torch.ones(64)
    with use_backend("cpu_reference"):
        four, ints = weight_of(64, 64), WeightInt4(packed, scales.view(64, 1), None, 64, (64, 64))
    A = random(*shape)

    def results() -> list[torch.Tensor]:
        handle, prepared = fourbit.prepare_gemm_4bit(four), PreparedInt8Linear(codes, scales)
        ways = (
            lambda: fourbit.gemm_4bit(A, four),
            lambda: handle(A),
            lambda: handle.transposed(A),
            lambda: fourbit.gemm_4bit_transposed(A, four),
            lambda: gemm_int4(A, ints),
            lambda: torch.ops.qcore.gemm_int4(A, None, *weight_arguments(ints)),
            lambda: int8_linear(A, codes, scales, None, 2.0)[0],
            lambda: prepared.eager(A, None, 2.0)[0],
            lambda: torch.ops.qcore.int8_linear(A, codes, scales, None, 2.0)[0],
            lambda: int8_linear_transposed(A, codes, scales),
        )
        return [way() for way in ways for _ in range(2)]

    with use_backend("cpu_reference"):
        expected = results()
    with use_backend(Matrices()):
        for got, want in zip(results(), expected, strict=True):
            assert torch.equal(got, want)
            assert got.shape == shape
