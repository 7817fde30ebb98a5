"""A linear layer with an int8 weight: Dettmers et al., *LLM.int8()*, 2022 (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from qcore.autograd import MatmulLtState, matmul, multiply_int8
from qcore.errors import InvalidArgument
from qcore.nn.int8_params import Int8Params
from qcore.nn.quantized import Quantized8bit
from qcore.ops import validate
from qcore.ops.prepared_int8 import PreparedInt8Linear


class Linear8bitLt(Quantized8bit, nn.Linear):
    """``nn.Linear`` by LLM.int8(): int8 products, outlier columns of the input in floating point.

    Parameters
    ----------
    input_features, output_features : int
    bias : bool
    has_fp16_weights : bool
        Keep the weight in floating point, quantize it in each forward pass, and train it. Otherwise the weight is
        quantized when the layer first moves to a device (``.to("cpu")`` included) or by :meth:`quantize`, and frozen.
    threshold : float
        Magnitude from which on an input element makes its column an outlier; 0 for no outliers, 6.0 in the paper.
    index : None
        Accepted as None alone: reordered weights have not been in use since 2023.
    device : torch.device, optional

    Raises
    ------
    InvalidArgument
        ``index`` is given, or ``threshold`` is negative or not finite.

    Attributes
    ----------
    state : MatmulLtState
        ``CB`` and ``SCB`` are the weight's codes and scales, ``idx`` the outlier columns of the last eager call.
    """

    # The handle, with the weight and the scales that it was made for.
    _prepared: tuple[PreparedInt8Linear | None, Tensor | None, Tensor | None] = (None, None, None)

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: None = None,
        device: torch.device | str | int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if index is not None:
            raise InvalidArgument("Linear8bitLt: index is given, needs None; weights are stored by rows, in order")
        validate.threshold("Linear8bitLt", threshold)
        super().__init__(input_features, output_features, bias, device, dtype)
        self.state = MatmulLtState(threshold=threshold, has_fp16_weights=has_fp16_weights)
        self.index = index
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _changed(self) -> None:
        self._prepared = (None, None, None)
        if isinstance(self.weight, Int8Params):
            self.state.reset_grads()

    def _scales(self) -> Tensor | None:
        scales = super()._scales()
        # A wrapper's plain int8 parameter has no scales of its own.
        return self.state.SCB if scales is None and self.weight.dtype == torch.int8 else scales

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``: ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x`` or autocast."""
        if is_compiling():  # first: code that has read what eager calls prepare is compiled again when they do
            return self._forward_any(x)
        weight, bias, state = self._parameters["weight"], self._parameters["bias"], self.state
        gemm, known, scales = self._prepared
        if (
            gemm is not None
            and weight is known
            and weight.SCB is scales  # type: ignore[union-attr]
            and state.CB is weight
            and (bias is None or bias.dtype is x.dtype)
            and not _is_any_autocast_enabled()
        ):
            out, outlier_cols = gemm.eager(x, bias, state.threshold)  # the handle looks at everything else
            state._outlier_cols = outlier_cols if state.threshold > 0.0 else None
            return out
        return self._forward_any(x)

    def _forward_any(self, x: Tensor) -> Tensor:
        state, weight = self.state, self.weight
        if is_compiling():
            scales = self._scales()
            if scales is not None:  # what eager calls leave in `state` is the same, but to read it is to depend on it
                return multiply_int8(x, weight, scales, self.bias, state)
        else:
            state.is_training = self.training
            if weight.dtype == torch.int8:
                state.CB, state.SCB = weight, self._scales()
                if isinstance(weight, Int8Params) and weight.SCB is not None:
                    self._prepared = (PreparedInt8Linear(weight, weight.SCB), weight, weight.SCB)
        return matmul(x, weight, bias=self.bias, state=state)

    def __getstate__(self) -> dict[str, Any]:
        # What was prepared holds addresses: a copy or a pickle prepares its own.
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.state.threshold}"
