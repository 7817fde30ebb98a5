"""Arguments that mean nothing are refused by an error of the tree, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcore.functional as F
from qcore.autograd import MatmulLtState, matmul, matmul_4bit
from qcore.backend.registry import use_backend
from qcore.errors import FormatError, InvalidArgument, InvalidDtype, QcoreError
from qcore.nn import Linear4bit, Linear8bitLt
from qcore.nn.convert import convert_module_to_linear4bit, convert_module_to_linear8bit

A = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
LONG = A.repeat(16, 1)  # two blocks of 4096


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("cpu_reference"):
        yield


def expanded(like: Tensor) -> Tensor:
    return torch.empty(1, dtype=like.dtype).expand(like.shape)


def meta(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="meta")


def as_list(like: Tensor) -> Any:
    return [1]


QUANTIZERS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Tensor, ...]], tuple[str, ...]]] = {
    "quantize_4bit": (F.quantize_4bit, lambda r: (r[1].absmax, r[0]), ("absmax", "out")),
    "quantize_blockwise": (F.quantize_blockwise, lambda r: (r[1].absmax, r[0]), ("absmax", "out")),
    "int8_double_quant": (
        F.int8_double_quant,
        lambda r: (r[0], r[1], r[2], r[3]),
        ("out_row", "out_col", "row_stats", "col_stats"),
    ),
}


@pytest.mark.parametrize(
    "wrong", [meta, as_list, expanded, lambda like: like[:1]], ids=["meta", "list", "expanded", "short"]
)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_nothing_is_written_unless_every_target_fits(name: str, wrong: Callable[[Tensor], Any]) -> None:
    call, parts, names = QUANTIZERS[name]
    results = parts(call(LONG))
    for bad in range(len(names)):
        targets: dict[str, Any] = {n: torch.full_like(r, 77) for n, r in zip(names, results, strict=True)}
        targets[names[bad]] = wrong(results[bad])
        with pytest.raises(InvalidArgument, match=f"{name}: {names[bad]} "):
            call(LONG, **targets)
        assert all((targets[n] == 77).all() for n in names if n != names[bad])
    targets = {n: torch.empty_like(r) for n, r in zip(names, results, strict=True)}
    call(LONG, **targets)
    assert all(torch.equal(targets[n], r) for n, r in zip(names, results, strict=True))


Q4, S4 = F.quantize_4bit(A)
Q8, S8 = F.quantize_blockwise(A)
X = torch.randn(2, 64)
D4, DQ8, M4 = F.dequantize_4bit, F.dequantize_blockwise, matmul_4bit
CODES = torch.zeros(4, 64, dtype=torch.int8)
ROWS: Any = torch.ones(4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "threshold negative": (lambda: matmul(X, X, threshold=-1.0), InvalidArgument),
    "threshold nan": (lambda: matmul(X, X, threshold=math.nan), InvalidArgument),
    "threshold text": (lambda: matmul(X, X, threshold="6"), InvalidArgument),  # type: ignore[arg-type]
    "layer threshold": (lambda: Linear8bitLt(4, 4, threshold=-1), InvalidArgument),
    "model threshold": (lambda: convert_module_to_linear8bit(nn.ReLU(), (), threshold=-3), InvalidArgument),
    "absmax float64": (lambda: D4(Q4, absmax=S4.absmax.double(), out=torch.empty(8, 64)), InvalidDtype),
    "absmax int64": (lambda: D4(Q4, absmax=S4.absmax.long(), out=torch.empty(8, 64)), InvalidDtype),
    "absmax list": (lambda: D4(Q4, absmax=[1.0], out=torch.empty(8, 64)), InvalidArgument),  # type: ignore[arg-type]
    "absmax8 float64": (lambda: DQ8(Q8, absmax=S8.absmax.double()), InvalidDtype),
    "absmax8 list": (lambda: DQ8(Q8, absmax=[1.0]), InvalidArgument),  # type: ignore[arg-type]
    "code int64": (lambda: F.quantize_blockwise(A, code=torch.arange(256)), InvalidDtype),
    "code list": (lambda: F.quantize_blockwise(A, code=[1.0]), InvalidArgument),  # type: ignore[arg-type]
    "code8 float64": (lambda: DQ8(Q8, absmax=S8.absmax, code=S8.code.double()), InvalidDtype),  # type: ignore[union-attr]
    "bias int32": (lambda: M4(X, Q4, S4, bias=torch.ones(8, dtype=torch.int32)), InvalidDtype),
    "bias8 int32": (lambda: F.int8_scaled_mm(CODES, CODES, ROWS, ROWS, bias=ROWS.int()), InvalidDtype),
    "no packed": (lambda: D4(None, S4), InvalidArgument),  # type: ignore[arg-type]
    "no state": (lambda: D4(Q4, "x"), InvalidArgument),  # type: ignore[arg-type]
    "no codes": (lambda: DQ8(None, S8), InvalidArgument),  # type: ignore[arg-type]
    "no state8": (lambda: DQ8(Q8, "x"), InvalidArgument),  # type: ignore[arg-type]
    "out list": (lambda: D4(Q4, absmax=S4.absmax, out=[1]), InvalidArgument),  # type: ignore[arg-type]
    "out8 list": (lambda: DQ8(Q8, absmax=S8.absmax, out=[1]), InvalidArgument),  # type: ignore[arg-type]
    "out expanded": (lambda: D4(Q4, S4, out=torch.empty(1).expand(8, 64)), InvalidArgument),
    "no activations": (lambda: M4(None, Q4, S4), InvalidArgument),  # type: ignore[arg-type]
    "meta activations": (lambda: M4(X.to("meta"), Q4, S4), InvalidArgument),
    "state of another kind": (lambda: M4(X, Q4, "x"), InvalidArgument),  # type: ignore[arg-type]
    "no weight": (lambda: matmul(X, None), InvalidArgument),  # type: ignore[arg-type]
    "matmul state": (lambda: matmul(X, X, state="x"), InvalidArgument),  # type: ignore[arg-type]
    "storage bool": (lambda: F.quantize_4bit(A, quant_storage=torch.bool), InvalidDtype),
    "storage qint8": (lambda: F.quantize_4bit(A, quant_storage=torch.qint8), InvalidDtype),
    "storage complex": (lambda: F.quantize_4bit(A, quant_storage=torch.complex64), InvalidDtype),
    "storage text": (lambda: F.quantize_4bit(A, quant_storage="uint8"), InvalidDtype),  # type: ignore[arg-type]
    "layer storage": (lambda: Linear4bit(4, 4, quant_storage=None), InvalidDtype),  # type: ignore[arg-type]
    "layer compute": (lambda: Linear4bit(4, 4, compute_dtype="bf16"), InvalidDtype),  # type: ignore[arg-type]
    "type list": (lambda: F.get_4bit_type(["nf4"]), QcoreError),  # type: ignore[arg-type]
    "type device": (lambda: F.get_4bit_type("nf4", device="nope"), InvalidArgument),
    "map text": (lambda: F.create_dynamic_map(True, "7", 8), InvalidArgument),  # type: ignore[arg-type]
    "skip none": (lambda: convert_module_to_linear4bit(nn.ReLU(), None), InvalidArgument),  # type: ignore[arg-type]
    "skip number": (lambda: convert_module_to_linear4bit(nn.ReLU(), [0]), InvalidArgument),  # type: ignore[list-item]
}


@pytest.mark.parametrize(("call", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_argument_is_refused(call: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_scales_are_widened_exactly(dtype: torch.dtype) -> None:
    narrow, target = S4.absmax.to(dtype), torch.empty(8, 64)
    assert torch.equal(D4(Q4, absmax=narrow, out=target), D4(Q4, absmax=narrow.float(), out=torch.empty(8, 64)))


def test_codes_in_the_state_need_no_weight() -> None:
    state = MatmulLtState(CB=CODES, SCB=ROWS, has_fp16_weights=False)
    assert matmul(X, None, state=state).shape == (2, 4)  # type: ignore[arg-type]


def test_a_skip_that_is_nowhere_is_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    convert_module_to_linear4bit(model)
    convert_module_to_linear4bit(model, ["0"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="skip_modules names nope, which the model does not have"):
        convert_module_to_linear4bit(model, ["nope", "0"])


@pytest.mark.parametrize("change", [{"blocksize": 64.0}, {"nested_offset": math.nan}, {"nested_offset": 1e300}])
def test_a_state_dict_that_means_nothing_is_refused(change: dict[str, Any]) -> None:
    _, state = F.quantize_4bit(A, compress_statistics=True)
    with pytest.raises(FormatError, match=next(iter(change))):
        F.QuantState.from_dict(state.as_dict() | change, device="cpu")


def test_a_weight_format_of_several_numbers_is_refused() -> None:
    layer = Linear8bitLt(4, 4, has_fp16_weights=False).quantize()
    entries = layer.state_dict() | {"weight_format": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(FormatError, match="weight_format has 3 values"):
        layer.load_state_dict(entries)


PUBLIC = [name for name in F.__all__ if name != "QuantState"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_says_what_it_raises(name: str) -> None:
    text = getattr(F, name).__doc__
    assert "Raises\n" in text
    assert "Parameters\n" in text or "its arguments" in text


def test_what_json_cannot_hold_is_not_packed() -> None:
    with pytest.raises(InvalidArgument, match="JSON"):
        F.pack_dict_to_tensor({"dtype": torch.float32})
