"""Put quantized layers where a Transformers model has linear ones, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qcore.errors import InvalidArgument
from qcore.formats.architecture import Linear
from qcore.formats.quantization_config import GROUPED, QuantizationSettings
from qcore.functional import int8_vectorwise_dequant
from qcore.nn import Int4Params, Linear4bit, Linear8bitLt, LinearInt4, Params4bit
from qcore.ops.fourbit import dequantize_4bit
from qcore.ops.int4 import dequantize_int4

Quantized = Linear4bit | Linear8bitLt | LinearInt4


def make_layer(settings: QuantizationSettings, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> Quantized:
    """A frozen layer ``shape`` = (out, in) on the meta device; ``dtype`` is that of its bias."""
    rows, columns = shape
    layer: Quantized
    if settings.format == "int8":
        layer = Linear8bitLt(columns, rows, bias, False, settings.threshold, device="meta", dtype=dtype)
    elif settings.format in GROUPED:
        layer = LinearInt4(
            columns,
            rows,
            bias,
            group_size=settings.group_size,
            checkpoint_format=settings.checkpoint_format,
            compute_dtype=settings.compute_dtype,
            device="meta",
            dtype=dtype,
        )
    else:
        layer = Linear4bit(
            columns,
            rows,
            bias,
            compute_dtype=settings.compute_dtype,
            compress_statistics=settings.nested,
            quant_type=settings.format,
            quant_storage=settings.quant_storage,
            device="meta",
            blocksize=settings.blocksize,
            dtype=dtype,
        )
    layer.requires_grad_(False)
    return layer.eval()


def exchange(model: Any, layers: Mapping[str, Linear], settings: QuantizationSettings) -> None:
    """Put an unquantized layer on the meta device in the place of each of ``layers``."""
    for layer in layers.values():
        dtype = model.get_submodule(layer.name).weight.dtype
        model.set_submodule(layer.name, make_layer(settings, layer.shape, layer.bias, dtype))


def dequantized(weight: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers (out, in) that a ``Params4bit``, ``Int8Params`` or ``Int4Params`` with codes stands for.

    They come in ``dtype``; without it in the dtype of a 4-bit weight before it was quantized, float32 of an int8 one.
    """
    if isinstance(weight, Int4Params):
        return dequantize_int4(weight.value(), dtype or torch.float32)
    if not isinstance(weight, Params4bit):
        numbers = int8_vectorwise_dequant(weight.data, weight.SCB)
        return numbers if dtype is None else numbers.to(dtype)
    state = weight.quant_state
    if state is None:
        raise InvalidArgument("dequantized: the weight is not quantized")
    return dequantize_4bit(state.weight(weight.data), dtype or state.dtype or torch.float32)


def float_layer(layer: Quantized, dtype: torch.dtype, *, transposed: bool) -> nn.Module:
    """The ``nn.Linear``, or Transformers' ``Conv1D`` if ``transposed``, that computes what the dequantized layer does.

    A weight that is not quantized is taken as it is. Parameters require gradients, as those of a model that was loaded
    in floating point do.
    """
    coded = getattr(layer.weight, "is_coded", False)
    weight = dequantized(layer.weight, dtype) if coded else layer.weight.data.to(dtype)
    new: Any
    if transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            new = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight = nn.Parameter(weight)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().to(dtype))
    module: nn.Module = new
    return module.train(layer.training)


def keep_hook(old: Any, new: nn.Module) -> None:
    """Let ``new`` have what Accelerate has hooked to ``old``, in whose place it is put."""
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
