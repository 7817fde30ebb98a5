"""A linear layer with a weight of 4-bit integers in groups: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from qcore.autograd import bias_for, compute_dtype_of
from qcore.backend.weights import WeightInt4
from qcore.errors import FormatError, InvalidArgument
from qcore.functional import awq_layers as awq
from qcore.functional import gptq_layers as gptq
from qcore.nn.int4_params import Int4Params
from qcore.nn.quantized import QuantizedModule
from qcore.ops.int4 import checked_order, checked_weight, gemm_int4
from qcore.ops.prepared_int4 import PreparedInt4, prepare_int4

CHECKPOINT_FORMATS = (*gptq.FORMATS, "awq")


class LinearInt4(QuantizedModule, nn.Linear):
    """``nn.Linear`` with its weight as integers in groups; frozen: gradients flow to the input and the bias.

    Its state dict is a layer of a GPTQ or an AWQ checkpoint (``qweight``, ``qzeros``, ``scales``, ``g_idx``), in memory
    codes lie in rows (QC-INT4-001), and one is turned into the other without a loss.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    group_size : int
        Inputs a group; -1 for one group. A checkpoint that is loaded has to have the same.
    checkpoint_format : {"gptq", "gptq_v2", "awq"}
        What the state dict looks like.
    compute_dtype : torch.dtype, optional
        dtype to compute in; None for that of each input, or of ``torch.autocast``.
    device : torch.device, optional
    dtype : torch.dtype, optional
        Of the bias.

    Raises
    ------
    InvalidArgument
        Unknown ``checkpoint_format``; in ``forward``, a layer without a weight.
    """

    # The handle, with the weight that it was made for.
    _prepared: tuple[PreparedInt4 | None, Tensor | None] = (None, None)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        checkpoint_format: str = "gptq",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise InvalidArgument(
                f"LinearInt4: checkpoint_format is {checkpoint_format!r}, expected one of {CHECKPOINT_FORMATS}"
            )
        super().__init__(in_features, out_features, bias, "meta", dtype)
        self.group_size, self.checkpoint_format, self.compute_dtype = group_size, checkpoint_format, compute_dtype
        shape = (out_features, in_features)
        packed = torch.empty(out_features, (in_features + 1) // 2, dtype=torch.uint8, device=device)
        self.weight = Int4Params(packed, shape_of_weight=shape)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def of(cls, weight: WeightInt4, bias: Tensor | None = None, *, checkpoint_format: str = "gptq") -> LinearInt4:
        """A layer with this weight.

        Raises
        ------
        InvalidArgument, InvalidDtype
            The parts of the weight do not fit each other.
        """
        weight = checked_order(checked_weight(weight, "LinearInt4"), "LinearInt4")
        rows, columns = weight.shape
        layer = cls(columns, rows, False, group_size=weight.group_size, checkpoint_format=checkpoint_format)
        layer.weight = Int4Params.of(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _changed(self) -> None:
        self._prepared = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        # What was prepared holds addresses: a copy or a pickle prepares its own.
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def quantize(self, device: str | torch.device | None = None) -> Any:
        """Refused: the codes come from a checkpoint or from an algorithm that has seen data."""
        raise InvalidArgument("LinearInt4.quantize: load a GPTQ or AWQ checkpoint, or use qcore.algorithms")

    def reset_parameters(self) -> None:
        """Nothing: a layer begins without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``: ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x`` or autocast."""
        if is_compiling():  # first: code that has read what eager calls prepare is compiled again when they do
            return self._forward_any(x)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        gemm, known = self._prepared
        dtype, compute_dtype = x.dtype, self.compute_dtype
        if (
            gemm is not None
            and weight is known
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
        y = gemm_int4(x, self._value(), bias) if is_compiling() else self._prepare().eager(x, bias)
        return y.to(out_dtype)

    def _value(self) -> WeightInt4:
        if not self.weight.is_coded:
            raise InvalidArgument("LinearInt4: there is no weight yet; load a checkpoint into the layer first")
        return self.weight.value()  # type: ignore[no-any-return]

    def _prepare(self) -> PreparedInt4:
        gemm, known = self._prepared
        if gemm is None or self.weight is not known:
            gemm = prepare_int4(self._value, self.weight, self.weight)
            self._prepared = (gemm, self.weight)
        return gemm

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_coded:  # a layer that waits for its weight says where that will be
            del destination[prefix + "weight"]

    def _entries(self) -> dict[str, Tensor]:
        if not self.weight.is_coded:
            return {}
        weight = self._value()
        if self.checkpoint_format == "awq":
            return awq.write_layer(weight)
        return gptq.write_layer(weight, self.checkpoint_format)

    def _read(self, entries: dict[str, Any], prefix: str) -> tuple[Tensor, Any] | None:
        names = awq.NAMES if self.checkpoint_format == "awq" else gptq.NAMES
        tensors = {name: entries.pop(name).detach() for name in names if name in entries}
        if not tensors:
            return None
        if self.checkpoint_format == "awq":
            weight = awq.read_layer(tensors, self.group_size, prefix.rstrip("."))
        else:
            weight = gptq.read_layer(tensors, self.group_size, self.checkpoint_format, prefix.rstrip("."))
        try:
            return weight.packed, checked_weight(weight, "LinearInt4")
        except InvalidArgument as error:
            raise FormatError(f"{prefix.rstrip('.')}: {error}") from error

    def _shape_of(self, data: Tensor, meaning: WeightInt4) -> tuple[int, ...]:
        return meaning.shape

    def _take(self, data: Tensor, meaning: WeightInt4, *, assign: bool) -> None:
        loaded = Int4Params.of(meaning)
        self.weight = loaded if assign else loaded.to(self.weight.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}, checkpoint_format={self.checkpoint_format}"
