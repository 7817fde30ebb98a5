"""Matrix products with quantized weights, differentiable: ``qcore.matmul`` and ``qcore.matmul_4bit``.

Activations may be float32, bfloat16 or float16; nothing is cast on the way. Under ``torch.autocast`` both compute in
the autocast dtype, as ``torch.nn.functional.linear`` does.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops import validate
from qcore.ops.fourbit import dequantize_4bit, gemm_4bit
from qcore.ops.int8 import int8_quantize_rows
from qcore.ops.int8_linear import int8_linear

if TYPE_CHECKING:
    from qcore.functional import QuantState


@dataclass
class MatmulLtState:
    """What :func:`matmul` knows of a weight between calls.

    Attributes
    ----------
    CB, SCB : Tensor, optional
        int8 codes ``(N, K)`` of the weight and float32 ``(N,)`` largest magnitudes of its rows.
    threshold : float
        Magnitude from which on an activation is an outlier; 0 for no outliers.
    has_fp16_weights : bool
        The weight stays in floating point (any float dtype) and is quantized when it is used; it may be trained.
    is_training : bool
        Quantize a floating-point weight anew in each call. Otherwise codes are kept as long as the weight is the same.
    """

    CB: Tensor | None = None
    SCB: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    _outlier_cols: Tensor | None = field(default=None, repr=False)
    _source: weakref.ref[Tensor] | None = field(default=None, repr=False)
    _version: tuple[int, int] = field(default=(0, 0), repr=False)

    @property
    def idx(self) -> Tensor | None:
        """int64 indices of the outlier columns of the last eager call; None if there was none with a threshold."""
        return None if self._outlier_cols is None else self._outlier_cols.nonzero().view(-1)

    def reset_grads(self) -> None:
        """Forget the weight: the next call quantizes it again."""
        self.CB = self.SCB = self._source = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weight is another tensor: it has to be recognized anew.
        return {**self.__dict__, "_source": None}


def compute_dtype_of(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes ``x``: its own, or that of an active ``torch.autocast``."""
    validate.tensor("matmul", "A", x)
    kind = x.device.type
    if kind == "meta":  # torch has no autocast there
        return x.dtype
    if torch.is_autocast_enabled(kind) and x.dtype in validate.FLOATS:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def bias_for(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``bias`` in a dtype that a product in ``dtype`` takes (QC-GEMM4-003): float32 is added unrounded."""
    if bias is None or bias.dtype in (dtype, torch.float32):
        return bias
    if not bias.is_floating_point():
        raise InvalidDtype(f"matmul: bias is {bias.dtype}, needs a floating-point dtype")
    return bias.to(dtype)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``A @ W.T + bias`` with a weight in NF4 or FP4; gradients flow to ``A`` and ``bias``.

    Parameters
    ----------
    A : Tensor
        float32, bfloat16 or float16, ``(..., K)``.
    B : Tensor
        Packed codes of the weight ``(N, K)``, in any shape.
    quant_state : QuantState
        What the codes mean.
    out : Tensor, optional
        Takes the result; then nothing may need a gradient.
    bias : Tensor, optional
        ``(N,)``.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``A``, or of ``torch.autocast``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``quant_state`` is missing, or shapes, dtypes or devices do not fit.

    Warns
    -----
    DeprecationWarning
        The weight was quantized as ``(K, N)``: it is dequantized in each call. A square one is taken for ``(N, K)``.
    """
    if quant_state is None:
        raise InvalidArgument("matmul_4bit: quant_state is None; pass the state that quantize_4bit returned with B")
    if not hasattr(quant_state, "weight"):  # its class is above this module
        raise InvalidArgument(f"matmul_4bit: quant_state is a {type(quant_state).__name__}, needs a qcore QuantState")
    dtype = compute_dtype_of(A)
    weight = quant_state.weight(B)
    if len(weight.shape) == 2 and A.dim() > 0 and weight.shape[0] == A.shape[-1] != weight.shape[1]:
        warnings.warn(
            f"matmul_4bit: B was quantized from a tensor of shape {tuple(weight.shape)}, (in_features, out_features), "
            "and is dequantized in each call. Re-quantize from the weight as (out_features, in_features)",
            DeprecationWarning,
            stacklevel=2,
        )
        bias = bias_for(bias, dtype)
        bias = None if bias is None else bias.to(dtype)
        result = torch.nn.functional.linear(A.to(dtype), dequantize_4bit(weight, dtype).t(), bias)
    else:
        result = gemm_4bit(A.to(dtype), weight, bias_for(bias, dtype))
    return _into(out, result, "matmul_4bit")


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B.T + bias`` by LLM.int8(): int8 products, outlier columns in floating point.

    Parameters
    ----------
    A : Tensor
        float32, bfloat16 or float16, ``(..., K)``.
    B : Tensor
        The weight ``(N, K)``: numbers, or int8 codes whose scales are in ``state.SCB`` or ``B.SCB``.
    out : Tensor, optional
        Takes the result; then nothing may need a gradient.
    state : MatmulLtState, optional
        Keeps the quantized weight between calls. Codes in ``state.CB`` go before ``B``
        unless ``state.has_fp16_weights``.
    threshold : float
        Unless 0, becomes ``state.threshold``.
    bias : Tensor, optional
        ``(N,)``.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``A``, or of ``torch.autocast``. Gradients: ``dA = dY W`` with the quantized
        weight, ``dB = dY^T A`` in the dtype of ``A`` for a weight of numbers.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Shapes, dtypes or devices do not fit, int8 codes come without their scales, or ``threshold`` is negative or not
        finite.
    """
    state = MatmulLtState() if state is None else state
    if not isinstance(state, MatmulLtState):
        raise InvalidArgument(f"matmul: state is a {type(state).__name__}, needs a MatmulLtState")
    if threshold != 0.0:
        validate.threshold("matmul", threshold)
        state.threshold = threshold
    return _into(out, multiply_int8(A, *int8_weight(B, state), bias, state), "matmul")


def multiply_int8(
    A: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, state: MatmulLtState
) -> Tensor:
    """``A @ W.T + bias`` of a weight as :func:`int8_weight` gives it; outlier columns are left in ``state``."""
    dtype = compute_dtype_of(A)
    result, outlier_cols = int8_linear(A.to(dtype), weight, scales, bias_for(bias, dtype), state.threshold)
    if not is_compiling():
        state._outlier_cols = outlier_cols if state.threshold > 0.0 else None
    return result


def int8_weight(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor | None]:
    """The weight as codes and scales, or as numbers and None, which the op quantizes itself."""
    if not state.has_fp16_weights and state.CB is not None and state.SCB is not None:
        return state.CB, state.SCB
    validate.tensor("matmul", "B", B)
    if not B.is_floating_point():
        scales = state.SCB if state.SCB is not None else getattr(B, "SCB", None)
        if scales is None:
            raise InvalidArgument("matmul: B holds int8 codes without scales; pass a state whose SCB has them")
        return B, scales
    trained = B.requires_grad and torch.is_grad_enabled()
    if trained or is_compiling() or B.is_inference() or (state.has_fp16_weights and state.is_training):
        return B, None
    version = (B.data_ptr(), B._version)
    known = state._source is not None and state._source() is B and state._version == version
    if state.CB is None or state.SCB is None or not known:
        state.CB, state.SCB, _ = int8_quantize_rows(B.detach(), 0.0)
        state._source, state._version = weakref.ref(B), version
    return state.CB, state.SCB


def _into(out: Tensor | None, result: Tensor, op: str) -> Tensor:
    if out is None:
        return result
    if result.requires_grad:
        raise InvalidArgument(f"{op}: out is given, but an argument needs a gradient; use torch.no_grad() or drop out")
    validate.out(op, out, result.shape, result.dtype, result.device)
    return out.copy_(result)
