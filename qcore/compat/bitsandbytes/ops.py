"""``torch.ops.bitsandbytes``: bitsandbytes' op schemas (0.50.2) over qcore's ops.

Importing this module defines the library, so it is imported only where qcore answers to the name bitsandbytes: a
process that imports bitsandbytes itself has the library from there. As there, none of these ops has a gradient;
``matmul`` and the layers do not go through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcore import codebooks
from qcore import functional as F
from qcore.backend.interface import Weight4bit
from qcore.errors import InvalidArgument
from qcore.functional import QuantState
from qcore.functional.quantization import NESTED_BLOCKSIZE
from qcore.ops import blockwise, fourbit, validate

_LIBRARY = torch.library.Library("bitsandbytes", "DEF")
_TABLES = {"nf4": codebooks.NF4, "fp4": codebooks.FP4}

Kernel = Callable[..., Any]


def define(name: str, schema: str, kernel: Kernel, fake: Kernel | None = None) -> None:
    """``torch.ops.bitsandbytes.<name>`` on every device; shapes come from ``fake``, or from ``kernel`` on fakes."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitsandbytes::{name}", kernel if fake is None else fake, lib=_LIBRARY)


def _define_out(name: str, schema: str, kernel: Kernel, fake: Kernel | None = None) -> None:
    """The overload whose last argument takes the result."""

    def writes(function: Kernel) -> Kernel:
        def into(*arguments: Any, out: Tensor | None = None) -> None:
            if out is None:
                *arguments, out = arguments  # type: ignore[assignment]
            result = function(*arguments)
            validate.out(name, out, result.shape, result.dtype, result.device)
            out.copy_(result)

        return into

    define(f"{name}.out", schema, writes(kernel), writes(fake or kernel))


# LLM.int8()


def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return F.int8_linear_matmul(A, B)


def _int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    out = torch.empty(A.shape, dtype=dtype or torch.float16, device=A.device)
    return F.int8_mm_dequant(A, row_stats, col_stats, out=out, bias=bias)


def _number_of_outliers(A: Tensor) -> Tensor:
    """Indices of as many columns as the data will say: an unbacked size."""
    return A.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _vectorwise_quant_fake(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, stats, _ = F.int8_vectorwise_quant(A, 0.0)
    return codes, stats, _number_of_outliers(A) if threshold > 0.0 else None


def _double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return F.int8_double_quant(A, threshold=threshold)


def _double_quant_fake(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    parts = F.int8_double_quant(A, threshold=0.0)[:4]
    return *parts, _number_of_outliers(A) if threshold > 0.0 else None


def _mixed_scaled_mm_fake(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    out = F.int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    return out, A.new_empty(0) if outlier_cols is None else A[..., outlier_cols]


# 8 bits in blocks


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return blockwise.dequantize_blockwise(A, absmax, code.float(), blocksize, dtype)


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return blockwise.quantize_blockwise(A, code.float(), blocksize)


# 4 bits


def _bytes_of(packed: Tensor) -> Tensor:
    data = packed.reshape(-1)
    return data if data.dtype == torch.uint8 else data.view(torch.uint8)


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, absmax = fourbit.quantize_4bit(A, quant_type, blocksize)
    if quant_storage != torch.uint8:
        packed = packed.view(-1).view(quant_storage).unsqueeze(1)
    return packed, absmax


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return fourbit.dequantize_4bit(Weight4bit(_bytes_of(A), absmax, quant_type, blocksize, tuple(shape)), dtype)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    state = QuantState(absmax, torch.Size(shapeB), blocksize=blocksize, quant_type=quant_type, dtype=A.dtype)
    if absmax_8bit is not None:
        if absmax_code is None or absmax_offset is None:
            raise InvalidArgument("gemm_4bit: absmax_8bit needs absmax_code and absmax_offset, which decode it")
        nested = QuantState(absmax, code=absmax_code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
        state.absmax, state.offset, state.state2, state.nested = absmax_8bit, absmax_offset, nested, True
    return fourbit.gemm_4bit(A.detach(), state.weight(B), bias)


def _format_of(code: Tensor) -> str:
    """The 4-bit format whose sixteen values ``code`` holds."""
    values = tuple(code.detach().float().cpu().tolist())
    for name, table in _TABLES.items():
        if len(values) == len(table) and all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(values, table)):
            return name
    raise InvalidArgument("gemv_4bit: code is neither the NF4 nor the FP4 codebook; qcore decodes no other one")


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return _gemm_4bit(A, B, shapeB, absmax, blocksize, _format_of(code))


def _gemv_4bit_fake(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    return _gemm_4bit(A, B, shapeB, absmax, blocksize, "nf4")


_GEMM_4BIT = (
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
_MIXED = (
    "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None)"
    " -> (Tensor, Tensor?)"
)
_SCALED = "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None)"
_DEQUANT = "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor"
_BLOCKWISE = "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_FOURBIT = "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_GEMV = "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"

define("int8_linear_matmul", "(Tensor A, Tensor B) -> Tensor", _int8_linear_matmul)
_define_out("int8_linear_matmul", "(Tensor A, Tensor B, Tensor! out) -> ()", _int8_linear_matmul)
define("int8_mixed_scaled_mm", _MIXED, F.int8_mixed_scaled_mm, _mixed_scaled_mm_fake)
define("int8_scaled_mm", f"{_SCALED} -> Tensor", F.int8_scaled_mm)
define("int8_mm_dequant", _DEQUANT, _int8_mm_dequant)
define("int8_vectorwise_dequant", "(Tensor A, Tensor stats) -> Tensor", F.int8_vectorwise_dequant)
define(
    "int8_vectorwise_quant",
    "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    F.int8_vectorwise_quant,
    _vectorwise_quant_fake,
)
define(
    "int8_double_quant",
    "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    _double_quant,
    _double_quant_fake,
)
define("quantize_blockwise", "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)", _quantize_blockwise)
define("dequantize_blockwise", f"{_BLOCKWISE}) -> Tensor", _dequantize_blockwise)
_define_out("dequantize_blockwise", f"{_BLOCKWISE}, Tensor! out) -> ()", _dequantize_blockwise)
define(
    "quantize_4bit",
    "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _quantize_4bit,
)
define("dequantize_4bit", f"{_FOURBIT}) -> Tensor", _dequantize_4bit)
_define_out("dequantize_4bit", f"{_FOURBIT}, Tensor! out) -> ()", _dequantize_4bit)
define("gemm_4bit", _GEMM_4BIT, _gemm_4bit)
define("gemv_4bit", f"{_GEMV}) -> Tensor", _gemv_4bit, _gemv_4bit_fake)
_define_out("gemv_4bit", f"{_GEMV}, Tensor! out) -> ()", _gemv_4bit, _gemv_4bit_fake)
