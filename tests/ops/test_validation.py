"""Every argument that a clause does not allow is refused before a backend is called, with a message that helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from expected import random
from qcore import codebooks
from qcore.backend import OPS, Backend
from qcore.backend.interface import Weight4bit
from qcore.backend.registry import use_backend
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops import blockwise, fourbit, int8

CODE = torch.tensor(codebooks.DYNAMIC)
X = random(4, 64)
I8 = torch.zeros(4, 64, dtype=torch.int8)
WEIGHT = Weight4bit(torch.zeros(128, dtype=torch.uint8), torch.ones(4), "nf4", 64, (4, 64))
NESTED = replace(
    WEIGHT,
    absmax=torch.zeros(4, dtype=torch.uint8),
    nested_absmax=torch.ones(1),
    nested_code=CODE,
    nested_offset=torch.zeros(1),
    nested_blocksize=256,
)


class Untouchable(Backend):
    """Fails the test if any op reaches it."""

    name = "untouchable"

    def describe(self, device: torch.device) -> Any:
        raise AssertionError("described")


def _reached(op: str) -> Callable[..., None]:
    def method(self: Backend, *arguments: Any, **outputs: Any) -> None:
        raise AssertionError(f"{op} reached the backend")

    return method


for _op in OPS:
    setattr(Untouchable, _op, _reached(_op))


def unsorted_code() -> torch.Tensor:
    code = CODE.clone()
    code[[3, 4]] = code[[4, 3]]
    return code


def infinite_code() -> torch.Tensor:
    code = CODE.clone()
    code[255] = torch.inf
    return code


Q8, D8 = blockwise.quantize_blockwise, blockwise.dequantize_blockwise
Q4, D4, GEMM = fourbit.quantize_4bit, fourbit.dequantize_4bit, fourbit.gemm_4bit
F32, F64 = torch.float32, torch.float64
U8 = torch.zeros(4, 64, dtype=torch.uint8)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dtype": (lambda: Q8(X.double(), CODE, 64), InvalidDtype, r"quantize_blockwise: A is torch.float64, needs float32"),
    "no tensor": (lambda: Q8([1.0], CODE, 64), InvalidArgument, r"quantize_blockwise: A is a list"),
    "sparse": (lambda: Q4(X.to_sparse(), "nf4", 64), InvalidArgument, r"A has layout torch.sparse_coo"),
    "blocksize 48": (
        lambda: Q8(X, CODE, 48),
        InvalidArgument,
        r"blocksize is 48, needs a power of two from 32 to 4096",
    ),
    "blocksize 16": (lambda: Q4(X, "nf4", 16), InvalidArgument, r"blocksize is 16"),
    "blocksize 8192": (lambda: Q4(X, "nf4", 8192), InvalidArgument, r"blocksize is 8192"),
    "blocksize 64.0": (lambda: Q4(X, "nf4", 64.0), InvalidArgument, r"blocksize is 64.0"),
    "code length": (lambda: Q8(X, CODE[:255], 64), InvalidArgument, r"code has 255 values, .* needs 256"),
    "code dtype": (lambda: Q8(X, CODE.double(), 64), InvalidDtype, r"code is torch.float64, needs torch.float32"),
    "code order": (lambda: Q8(X, unsorted_code(), 64), InvalidArgument, r"code is not in ascending order"),
    "code infinite": (lambda: Q8(X, infinite_code(), 64), InvalidArgument, r"code holds a NaN or an infinity"),
    "decode infinite": (lambda: D8(U8, torch.ones(4), infinite_code(), 64, F32), InvalidArgument, r"code holds a NaN"),
    "device": (lambda: Q8(X, CODE.to("meta"), 64), InvalidArgument, r"code is on meta, A on cpu"),
    "codes dtype": (
        lambda: D8(X, torch.ones(4), CODE, 64, F32),
        InvalidDtype,
        r"A is torch.float32, needs torch.uint8",
    ),
    "absmax length": (
        lambda: D8(U8, torch.ones(3), CODE, 64, F32),
        InvalidArgument,
        r"absmax has 3 values, .* needs 4",
    ),
    "result dtype": (lambda: D8(U8, torch.ones(4), CODE, 64, F64), InvalidDtype, r"dtype is torch.float64"),
    "out shape": (lambda: D4(WEIGHT, F32, torch.empty(64, 4)), InvalidArgument, r"out has shape \(64, 4\)"),
    "out dtype": (lambda: D4(WEIGHT, F32, torch.empty(4, 64).half()), InvalidDtype, r"out is torch.float16"),
    "quant_type": (lambda: Q4(X, "int4", 64), InvalidArgument, r"quant_type is 'int4', needs 'nf4' or 'fp4'"),
    "packed length": (
        lambda: D4(replace(WEIGHT, packed=WEIGHT.packed[:-1]), F32),
        InvalidArgument,
        r"dequantize_4bit: packed has 127 values, weight of shape \(4, 64\) needs 128",
    ),
    "packed dtype": (
        lambda: D4(replace(WEIGHT, packed=torch.zeros(128)), F32),
        InvalidDtype,
        r"packed is torch.float32",
    ),
    "weight absmax": (
        lambda: GEMM(X, replace(WEIGHT, absmax=torch.ones(5))),
        InvalidArgument,
        r"gemm_4bit: absmax has 5 values, weight of shape \(4, 64\) at blocksize 64 needs 4",
    ),
    "weight absmax dtype": (lambda: D4(replace(NESTED, absmax=torch.ones(4)), F32), InvalidDtype, r"needs torch.uint8"),
    "nested absmax": (
        lambda: D4(replace(NESTED, nested_absmax=torch.ones(2)), F32),
        InvalidArgument,
        r"nested_absmax has 2 values, 4 nested absmax values at nested_blocksize 256 needs 1",
    ),
    "nested code missing": (
        lambda: D4(replace(NESTED, nested_code=None), F32),
        InvalidArgument,
        r"nested_code is missing",
    ),
    "nested code": (
        lambda: D4(replace(NESTED, nested_code=infinite_code()), F32),
        InvalidArgument,
        r"nested_code holds",
    ),
    "nested blocksize": (
        lambda: D4(replace(NESTED, nested_blocksize=0), F32),
        InvalidArgument,
        r"nested_blocksize is 0",
    ),
    "inner size": (lambda: GEMM(X[:, :63], WEIGHT), InvalidArgument, r"A has shape \(4, 63\), .* needs \(\.\.\., 64\)"),
    "no dimensions": (lambda: GEMM(torch.tensor(1.0), WEIGHT), InvalidArgument, r"A has shape \(\)"),
    "weight dimensions": (
        lambda: GEMM(X, replace(WEIGHT, shape=(2, 2, 64))),
        InvalidArgument,
        r"weight has shape \(2, 2, 64\), needs \(out_features, in_features\)",
    ),
    "bias length": (lambda: GEMM(X, WEIGHT, torch.ones(5)), InvalidArgument, r"bias has shape \(5,\), .* need \(4,\)"),
    "bias dtype": (lambda: GEMM(X, WEIGHT, torch.ones(4).half()), InvalidDtype, r"bias is torch.float16"),
    "bias device": (lambda: GEMM(X, WEIGHT, torch.ones(4, device="meta")), InvalidArgument, r"bias is on meta"),
    "offset": (
        lambda: fourbit.dequantize_absmax(U8.view(-1), torch.ones(1), CODE, torch.zeros(2), 256),
        InvalidArgument,
        r"offset has 2 values",
    ),
    "absmax to nest": (lambda: fourbit.quantize_absmax(X.half(), CODE, 256), InvalidDtype, r"absmax is torch.float16"),
    "threshold": (lambda: int8.int8_quantize_rows(X, -1.0), InvalidArgument, r"threshold is -1.0"),
    "threshold NaN": (lambda: int8.int8_quantize_cols(X, float("nan")), InvalidArgument, r"threshold is nan"),
    "threshold beyond float32": (lambda: int8.int8_quantize_rows(X, 1e39), InvalidArgument, r"threshold is 1e\+39"),
    "rows of a scalar": (lambda: int8.int8_quantize_rows(torch.tensor(1.0)), InvalidArgument, r"no dimensions"),
    "int8 dtype": (lambda: int8.int8_gemm(X, I8), InvalidDtype, r"int8_gemm: A is torch.float32, needs torch.int8"),
    "int8 sizes": (lambda: int8.int8_gemm(I8, I8[:, :63]), InvalidArgument, r"A has shape \(4, 64\), B \(4, 63\)"),
    "row stats": (
        lambda: int8.int8_scaled_gemm(I8, I8, torch.ones(3), torch.ones(4)),
        InvalidArgument,
        r"row_stats has 3 values, a product of shape \(4, 4\) needs 4",
    ),
    "product dtype": (lambda: int8.int8_dequantize_gemm(I8, X, X), InvalidDtype, r"C is torch.int8, needs torch.int32"),
    "stats of rows": (lambda: int8.int8_dequantize_rows(I8, torch.ones(5)), InvalidArgument, r"row_stats has 5 values"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_a_backend_is_called(case: str) -> None:
    call, error, message = CASES[case]
    with use_backend(Untouchable()), pytest.raises(error, match=message):
        call()


def test_the_untouchable_backend_notices_a_call() -> None:
    with use_backend(Untouchable()), pytest.raises(AssertionError, match="quantize_blockwise reached"):
        Q8(X, CODE, 64)


def test_a_codebook_is_read_once_and_again_after_a_change(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    code, reads = CODE.clone(), []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda values: reads.append(1) or isfinite(values))
    Q8(X, code, 64)
    Q8(X, code, 64)
    assert len(reads) == 1
    code[0] = torch.nan
    with pytest.raises(InvalidArgument, match="NaN"):
        Q8(X, code, 64)
    code.data = CODE.clone()
    Q8(X, code, 64)


def test_a_codebook_changed_in_inference_mode_is_noticed(backend: Backend) -> None:
    with torch.inference_mode():
        code = CODE.clone()
        Q8(X, code, 64)
        code[0] = torch.nan
        with pytest.raises(InvalidArgument, match="NaN"):
            Q8(X, code, 64)
