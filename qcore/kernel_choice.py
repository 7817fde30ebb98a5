"""``matmul.execute`` and ``matmul.mat_mul_fused``: the product with a quantized weight, by a kernel that one chooses.

``fused``
    The backend's product with the codes as they lie: NF4 and FP4 weights are decoded inside it; int8 weights meet
    activations that are quantized by rows (LLM.int8()), and scales and bias are applied in the same kernel.
``dequantize``
    The weight is decoded into the compute dtype and multiplied by torch. The weights are the same numbers, but int8
    activations stay unquantized. A matrix of its size is allocated in each call, and a weight in training has no
    gradient.

Which is faster depends on the number of rows, the processor and torch's build: ``auto`` times both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from qcore import autotune
from qcore.autograd import MatmulLtState, compute_dtype_of, int8_weight, matmul, matmul_4bit
from qcore.backend.registry import backend_for
from qcore.errors import InvalidArgument
from qcore.functional import QuantState
from qcore.ops import validate
from qcore.ops.fourbit import dequantize_4bit
from qcore.ops.int8 import int8_dequantize_rows, int8_quantize_rows
from qcore.ops.library import traced

__all__ = ["KERNELS", "execute", "mat_mul_fused", "matmul"]

KERNELS = ("fused", "dequantize")


def execute(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | QuantState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> Tensor:
    """``A @ W.T + bias`` with an int8, NF4 or FP4 weight by the kernel asked for; differentiable.

    Parameters
    ----------
    A : Tensor
        float32, bfloat16 or float16, ``(..., K)``.
    B : Tensor
        The weight: packed 4-bit codes, int8 codes, or numbers, which are quantized to int8.
    out : Tensor, optional
        Takes the result; then nothing may need a gradient.
    state : QuantState or MatmulLtState, optional
        What the codes mean, if ``B`` does not carry it (``B.quant_state``, ``B.SCB``).
    threshold : float
        As in :func:`qcore.matmul`, for the fused int8 product.
    bias : Tensor, optional
        ``(N,)``.
    kernel : {"auto", "fused", "dequantize"}
        ``"auto"`` times both once for each power of two of rows, weight shape, format, dtype and backend, and then
        takes the faster. Under a tracer, where nothing can be timed, it is ``"fused"``.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``A``, or of ``torch.autocast``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        An unknown ``kernel``, or shapes, dtypes or devices do not fit.
    """
    if kernel not in ("auto", *KERNELS):
        raise InvalidArgument(f"matmul.execute: kernel is {kernel!r}, needs 'auto', 'fused' or 'dequantize'")
    if state is None:
        state = getattr(B, "quant_state", None)
    if B.requires_grad and not isinstance(state, QuantState):
        if kernel == "dequantize":
            raise InvalidArgument(
                "matmul.execute: B needs a gradient, which kernel='dequantize' does not give; use 'fused'"
            )
        kernel = "fused"
    if kernel == "auto":
        kernel = _tuned(A, B, state, threshold, bias)
    if kernel == "dequantize":
        result = _dequantized(A, B, state, bias)
        if out is None:
            return result
        if result.requires_grad:
            raise InvalidArgument("matmul.execute: out is given, but an argument needs a gradient; drop out")
        validate.out("matmul.execute", out, result.shape, result.dtype, result.device)
        return out.copy_(result)
    if isinstance(state, QuantState):
        return matmul_4bit(A, B, state, out, bias)
    return matmul(A, B, out, state, threshold, bias)


def mat_mul_fused(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, state: MatmulLtState | QuantState | None = None
) -> Tensor:
    """:func:`execute` with the fused kernel: scales and bias are applied where the product is summed.

    Parameters
    ----------
    input : Tensor
        float32, bfloat16 or float16, ``(..., K)``.
    weight : Tensor
        As ``B`` of :func:`execute`.
    bias : Tensor, optional
        ``(N,)``.
    state : QuantState or MatmulLtState, optional
        What the codes mean, if ``weight`` does not carry it.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``input``, or of ``torch.autocast``.
    """
    return execute(input, weight, state=state, bias=bias, kernel="fused")


def _dequantized(A: Tensor, B: Tensor, state: MatmulLtState | QuantState | None, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype_of(A)
    if isinstance(state, QuantState):
        weight = dequantize_4bit(state.weight(B), dtype)
    else:
        codes, scales = int8_weight(B, MatmulLtState() if state is None else state)
        if scales is None:
            codes, scales, _ = int8_quantize_rows(codes.detach(), 0.0)
        weight = int8_dequantize_rows(codes, scales, dtype)
    return torch.nn.functional.linear(A.to(dtype), weight, None if bias is None else bias.to(dtype))


def _tuned(
    A: Tensor, B: Tensor, state: MatmulLtState | QuantState | None, threshold: float, bias: Tensor | None
) -> str:
    if is_compiling() or traced(A, B, bias) or A.numel() == 0:
        return "fused"
    form = state.quant_type if isinstance(state, QuantState) else "int8"
    shape = tuple(state.shape or ()) if isinstance(state, QuantState) else tuple(B.shape)
    rows = 1 << (A.numel() // A.shape[-1] - 1).bit_length()
    key = (form, shape, rows, compute_dtype_of(A), backend_for(A.device).name, torch.get_num_threads())
    x, b = A.detach(), None if bias is None else bias.detach()
    candidates = {name: lambda name=name: execute(x, B, None, state, threshold, b, kernel=name) for name in KERNELS}
    with torch.no_grad():
        return autotune.fastest(key, candidates, A.device)


matmul.execute = execute  # type: ignore[attr-defined]
matmul.mat_mul_fused = mat_mul_fused  # type: ignore[attr-defined]
