"""The frontend in front of a backend: what it refuses never reaches the backend (QC-NUM-006)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qcore_conformance.model import Case, NotRun
from qcore_conformance.session import Session

_FrontendCall = Callable[[Any, Any], Any]


def _frontend(call: _FrontendCall, dtype_error: bool) -> Callable[[Session], None]:
    """The frontend refuses the call before the backend sees it, and leaves ``out`` alone."""

    def run(s: Session) -> None:
        import torch

        from qcore.backend import use_backend
        from qcore.errors import InvalidArgument, InvalidDtype

        out = torch.full((4, 6), 7.0, device=s.device)
        refusal: InvalidArgument | None = None
        with use_backend(s.backend):
            try:
                call(s.device, out)
            except InvalidArgument as error:
                refusal = error
        assert refusal is not None, "the frontend accepted what no clause allows"
        assert isinstance(refusal, InvalidDtype) or not dtype_error, f"expected InvalidDtype, got {refusal!r}"
        assert ":" in str(refusal), f"the message does not begin with the op: {refusal}"
        assert bool((out == 7.0).all()), "the output was written by a call that was refused (QC-NUM-006)"

    return run


def _strided(s: Session) -> None:
    """Through the frontend a transposed or offset view gives what its contiguous copy gives."""
    import torch

    from qcore.backend import use_backend
    from qcore.ops.fourbit import quantize_4bit

    if not s.backend.supports("quantize_4bit"):
        raise NotRun("the backend does not serve quantize_4bit")
    base = torch.from_numpy(s.rng.standard_normal((37, 70)).astype("float32")).to(s.device)
    with use_backend(s.backend):
        for view in (base.t(), base[1:, 3:], base[::2, ::3]):
            got, want = quantize_4bit(view, "nf4", 64), quantize_4bit(view.contiguous(), "nf4", 64)
            assert all(torch.equal(a, b) for a, b in zip(got, want)), "a strided input is not read in its own order"


def _frontend_calls() -> Mapping[str, tuple[str, _FrontendCall, bool]]:
    """Name -> (op, call, whether ``InvalidDtype`` is due). ``d`` is the device, ``out`` a float32 (4, 6) tensor."""
    import torch

    from qcore.backend import Weight4bit, WeightInt4
    from qcore.ops import blockwise, fourbit, int4, int8
    from qcore.ops.int8_linear import int8_linear, int8_linear_transposed

    def zeros(d: Any, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=d)

    def code(d: Any) -> torch.Tensor:
        return torch.linspace(-1, 1, 256, device=d)

    u8, i8, f64 = torch.uint8, torch.int8, torch.float64

    def weight(d: Any, **changes: Any) -> Weight4bit:
        parts: dict[str, Any] = {"packed": zeros(d, 12, dtype=u8), "absmax": zeros(d, 1), "quant_type": "nf4"}
        return Weight4bit(**(parts | {"blocksize": 64, "shape": (4, 6)} | changes))

    def dequantized(**changes: Any) -> _FrontendCall:
        return lambda d, out: fourbit.dequantize_4bit(
            weight(d, **{k: v(d) if callable(v) else v for k, v in changes.items()}), torch.float32, out=out
        )

    def int4_product(width: int = 16, **changes: Any) -> _FrontendCall:
        def call(d: Any, out: Any) -> Any:
            parts: dict[str, Any] = {"packed": zeros(d, 3, 8, dtype=u8), "scales": zeros(d, 3, 2), "zeros": None}
            made = {k: v(d) if callable(v) else v for k, v in changes.items()}
            weight = WeightInt4(**(parts | {"group_size": 8, "shape": (3, 16)} | made))
            return int4.gemm_int4(zeros(d, 2, width), weight)

        return call

    def unsorted(d: Any) -> torch.Tensor:
        return code(d).flip(0)

    return {
        "quantize_blockwise-float64": (
            "quantize_blockwise",
            lambda d, out: blockwise.quantize_blockwise(zeros(d, 8, dtype=f64), code(d), 64),
            True,
        ),
        "quantize_blockwise-blocksize-48": (
            "quantize_blockwise",
            lambda d, out: blockwise.quantize_blockwise(zeros(d, 8), code(d), 48),
            False,
        ),
        "quantize_blockwise-short-code": (
            "quantize_blockwise",
            lambda d, out: blockwise.quantize_blockwise(zeros(d, 8), code(d)[:255], 64),
            False,
        ),
        "quantize_blockwise-unsorted-code": (
            "quantize_blockwise",
            lambda d, out: blockwise.quantize_blockwise(zeros(d, 8), unsorted(d), 64),
            False,
        ),
        "quantize_blockwise-other-device": (
            "quantize_blockwise",
            lambda d, out: blockwise.quantize_blockwise(zeros(d, 8), code("meta"), 64),
            False,
        ),
        "dequantize_blockwise-short-absmax": (
            "dequantize_blockwise",
            lambda d, out: blockwise.dequantize_blockwise(
                zeros(d, 4, 6, dtype=u8), zeros(d, 0), code(d), 64, torch.float32, out=out
            ),
            False,
        ),
        "dequantize_blockwise-float-codes": (
            "dequantize_blockwise",
            lambda d, out: blockwise.dequantize_blockwise(
                zeros(d, 4, 6), zeros(d, 1), code(d), 64, torch.float32, out=out
            ),
            True,
        ),
        "dequantize_blockwise-out-dtype": (
            "dequantize_blockwise",
            lambda d, out: blockwise.dequantize_blockwise(
                zeros(d, 4, 6, dtype=u8), zeros(d, 1), code(d), 64, torch.float16, out=out
            ),
            True,
        ),
        "quantize_4bit-integers": (
            "quantize_4bit",
            lambda d, out: fourbit.quantize_4bit(zeros(d, 8, dtype=u8), "nf4", 64),
            True,
        ),
        "quantize_4bit-nf5": ("quantize_4bit", lambda d, out: fourbit.quantize_4bit(zeros(d, 8), "nf5", 64), False),
        "quantize_4bit-blocksize-16": (
            "quantize_4bit",
            lambda d, out: fourbit.quantize_4bit(zeros(d, 8), "nf4", 16),
            False,
        ),
        "dequantize_4bit-short-packed": (
            "dequantize_4bit",
            dequantized(packed=lambda d: zeros(d, 11, dtype=u8)),
            False,
        ),
        "dequantize_4bit-long-absmax": ("dequantize_4bit", dequantized(absmax=lambda d: zeros(d, 2)), False),
        "dequantize_4bit-half-absmax": (
            "dequantize_4bit",
            dequantized(absmax=lambda d: zeros(d, 1, dtype=torch.float16)),
            True,
        ),
        "dequantize_4bit-nested-without-offset": (
            "dequantize_4bit",
            dequantized(
                absmax=lambda d: zeros(d, 1, dtype=u8),
                nested_absmax=lambda d: zeros(d, 1),
                nested_code=code,
                nested_blocksize=256,
            ),
            False,
        ),
        "dequantize_4bit-blocksize-100": ("dequantize_4bit", dequantized(blocksize=100), False),
        "dequantize_4bit-shape": ("dequantize_4bit", dequantized(shape=(4, 7)), False),
        "gemm_4bit-inner-size": ("gemm_4bit", lambda d, out: fourbit.gemm_4bit(zeros(d, 2, 5), weight(d), None), False),
        "gemm_4bit_transposed-outer-size": (
            "gemm_4bit_transposed",
            lambda d, out: fourbit.gemm_4bit_transposed(zeros(d, 2, 5), weight(d)),
            False,
        ),
        "gemm_4bit-bias-length": (
            "gemm_4bit",
            lambda d, out: fourbit.gemm_4bit(zeros(d, 2, 6), weight(d), zeros(d, 5)),
            False,
        ),
        "gemm_4bit-bias-dtype": (
            "gemm_4bit",
            lambda d, out: fourbit.gemm_4bit(zeros(d, 2, 6), weight(d), zeros(d, 4, dtype=torch.float16)),
            True,
        ),
        "quantize_absmax-short-code": (
            "quantize_absmax",
            lambda d, out: fourbit.quantize_absmax(zeros(d, 8), code(d)[:9], 256),
            False,
        ),
        "dequantize_absmax-offset": (
            "dequantize_absmax",
            lambda d, out: fourbit.dequantize_absmax(zeros(d, 8, dtype=u8), zeros(d, 1), code(d), zeros(d, 2), 256),
            False,
        ),
        "int8_quantize_rows-threshold": (
            "int8_quantize_rows",
            lambda d, out: int8.int8_quantize_rows(zeros(d, 2, 3), -1.0),
            False,
        ),
        "int8_quantize_cols-threshold": (
            "int8_quantize_cols",
            lambda d, out: int8.int8_quantize_cols(zeros(d, 2, 3), float("nan")),
            False,
        ),
        "int8_gemm-inner-size": (
            "int8_gemm",
            lambda d, out: int8.int8_gemm(zeros(d, 2, 3, dtype=i8), zeros(d, 2, 4, dtype=i8)),
            False,
        ),
        "int8_gemm-dtype": ("int8_gemm", lambda d, out: int8.int8_gemm(zeros(d, 2, 3), zeros(d, 2, 3, dtype=i8)), True),
        "int8_gemm-k-131072": (
            "int8_gemm",
            lambda d, out: int8.int8_gemm(zeros(d, 1, 131_072, dtype=i8), zeros(d, 1, 131_072, dtype=i8)),
            False,
        ),
        "int8_dequantize_gemm-row-stats": (
            "int8_dequantize_gemm",
            lambda d, out: int8.int8_dequantize_gemm(
                zeros(d, 2, 3, dtype=torch.int32), zeros(d, 3), zeros(d, 3), None, torch.float32
            ),
            False,
        ),
        "int8_scaled_gemm-col-stats": (
            "int8_scaled_gemm",
            lambda d, out: int8.int8_scaled_gemm(
                zeros(d, 2, 8, dtype=i8), zeros(d, 3, 8, dtype=i8), zeros(d, 2), zeros(d, 2), None, torch.float32
            ),
            False,
        ),
        "int8_linear-scales": (
            "int8_linear",
            lambda d, out: int8_linear(zeros(d, 2, 8), zeros(d, 3, 8, dtype=i8), zeros(d, 2)),
            False,
        ),
        "int8_linear-k-131072": (
            "int8_linear",
            lambda d, out: int8_linear(zeros(d, 1, 131_072), zeros(d, 1, 131_072, dtype=i8), zeros(d, 1)),
            False,
        ),
        "int8_linear_transposed-outer-size": (
            "int8_linear_transposed",
            lambda d, out: int8_linear_transposed(zeros(d, 2, 8), zeros(d, 3, 8, dtype=i8), zeros(d, 3)),
            False,
        ),
        "gemm_int4-inner-size": ("gemm_int4", int4_product(15), False),
        "gemm_int4-group-size-12": ("gemm_int4", int4_product(group_size=12), False),
        "gemm_int4-group-size-minus-1": ("gemm_int4", int4_product(group_size=-1), False),
        "gemm_int4-scales-shape": ("gemm_int4", int4_product(scales=lambda d: zeros(d, 2, 3)), False),
        "gemm_int4-scales-dtype": ("gemm_int4", int4_product(scales=lambda d: zeros(d, 3, 2, dtype=f64)), True),
        "gemm_int4-zeros-dtype": ("gemm_int4", int4_product(zeros=lambda d: zeros(d, 3, 2)), True),
        "gemm_int4-packed-shape": ("gemm_int4", int4_product(packed=lambda d: zeros(d, 24, dtype=u8)), False),
        "gemm_int4-perm-twice": ("gemm_int4", int4_product(perm=lambda d: zeros(d, 16, dtype=torch.int32)), False),
        "int8_dequantize_rows-stats": (
            "int8_dequantize_rows",
            lambda d, out: int8.int8_dequantize_rows(zeros(d, 2, 8, dtype=i8), zeros(d, 3)),
            False,
        ),
    }


def cases() -> Iterator[Case]:
    yield Case("contract/L0/frontend-strided-input", "contract", "L0", ("QC-NUM-004",), _strided)
    for name, (op, call, dtype_error) in _frontend_calls().items():
        run = _frontend(call, dtype_error)
        yield Case(f"{op}/L0/frontend-{name.removeprefix(op + '-')}", op, "L0", ("QC-NUM-006",), run)
