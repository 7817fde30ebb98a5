"""Linear layers with a weight in NF4 or FP4: Dettmers et al., *QLoRA*, 2023 (arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from qcore.autograd import bias_for, compute_dtype_of, matmul_4bit
from qcore.functional import QuantState
from qcore.nn.params import Params4bit
from qcore.nn.quantized import Quantized4bit
from qcore.ops import validate
from qcore.ops.fourbit import PreparedGemm4bit, prepare_gemm_4bit


class Linear4bit(Quantized4bit, nn.Linear):
    """``nn.Linear`` with its weight in four bits.

    The weight is quantized when the layer first moves to a device (``.to("cpu")`` included) or by :meth:`quantize`;
    until then it is an ordinary float weight that a state dict can be loaded into. It is frozen: gradients flow to the
    input and the bias.

    Parameters
    ----------
    input_features, output_features : int
    bias : bool
    compute_dtype : torch.dtype, optional
        dtype to compute in; the result comes back in the dtype of the input. None computes in the dtype of each input.
        Under ``torch.autocast`` the autocast dtype takes the place of the input's.
    compress_statistics : bool
        Quantize the scales too (nested quantization).
    quant_type : str
        ``"fp4"`` or ``"nf4"``.
    quant_storage : torch.dtype
        dtype under which the packed bytes are stored.
    device : torch.device, optional
    blocksize : int
        Elements a scale, a power of two from 32 to 4096.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Unknown ``quant_type``, ``blocksize``, ``quant_storage`` or ``compute_dtype``; in ``forward``, a weight that is
        not quantized yet.
    """

    # The handle, with the weight and the state that it was made for.
    _prepared: tuple[PreparedGemm4bit | None, Tensor | None, QuantState | None] = (None, None, None)

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:
        if compute_dtype is not None:
            validate.float_dtype("Linear4bit", compute_dtype, "compute_dtype")
        super().__init__(input_features, output_features, bias, device, dtype)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _changed(self) -> None:
        self._prepared = (None, None, None)

    def __getstate__(self) -> dict[str, Any]:
        # What was prepared holds addresses: a copy or a pickle prepares its own.
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``: ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x`` or autocast."""
        if is_compiling():  # first: code that has read what eager calls prepare is compiled again when they do
            return self._forward_any(x)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        gemm, known, state = self._prepared
        dtype, compute_dtype = x.dtype, self.compute_dtype
        if (
            gemm is not None
            and weight is known
            and weight.quant_state is state  # type: ignore[union-attr]
            and (compute_dtype is None or compute_dtype is dtype)
            and (bias is None or bias.dtype is dtype)
            and not _is_any_autocast_enabled()
        ):
            return gemm.eager(x, bias)  # the handle looks at everything else that may have changed
        return self._forward_any(x)

    def _forward_any(self, x: Tensor) -> Tensor:
        out_dtype = compute_dtype_of(x)
        dtype = self.compute_dtype or out_dtype
        x, bias = x.to(dtype), bias_for(self.bias, dtype)
        y = matmul_4bit(x, self.weight, self._state(), bias=bias) if is_compiling() else self._prepare()(x, bias)
        return y.to(out_dtype)

    def _prepare(self) -> PreparedGemm4bit:
        weight, state = self.weight, self._state()
        gemm, known, known_state = self._prepared
        if gemm is not None and weight is known and state is known_state:
            return gemm
        if not isinstance(weight, Params4bit):  # a wrapper's plain tensor, perhaps another in each call
            return prepare_gemm_4bit(state.weight(weight))
        weight.quant_state = state
        gemm = prepare_gemm_4bit(lambda: state.weight(weight), packed=weight, state=state)
        self._prepared = (gemm, weight, state)
        return gemm

    def extra_repr(self) -> str:
        options = {"quant_type": getattr(self.weight, "quant_type", None), "compute_dtype": self.compute_dtype}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in options.items() if value)])


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` in NF4, whose values have equal probability under a normal distribution."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        **options: Any,
    ) -> None:
        arguments = (bias, compute_dtype, compress_statistics, "nf4", quant_storage, device)
        super().__init__(input_features, output_features, *arguments, **options)


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` in FP4, a 4-bit floating-point format."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        **options: Any,
    ) -> None:
        arguments = (bias, compute_dtype, compress_statistics, "fp4", quant_storage, device)
        super().__init__(input_features, output_features, *arguments, **options)
