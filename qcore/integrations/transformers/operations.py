"""What happens to one tensor on its way from a checkpoint into the model: Transformers' conversion operations."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from qcore.errors import FormatError, QcoreError
from qcore.formats import architecture
from qcore.formats.quantization_config import GROUPED
from qcore.functional import awq_layers, gptq_layers
from qcore.integrations import experts
from qcore.nn import Linear4bit, Linear8bitLt, LinearInt4, Params4bit
from qcore.nn.coded import CodedParameter

if TYPE_CHECKING:
    from qcore.integrations.transformers.quantizer import QcoreQuantizer

# Beside each weight; Transformers collects what is named here and hands it over together.
PARTS = {
    "nf4": ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"),
    "fp4": ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__fp4"),
}


def part_names(format: str) -> list[str]:
    """Names, below a layer, of the tensors that make up its quantized weight.

    The weight is last: some versions of Transformers give a tensor to the first of the names that occurs in its own.
    """
    if format == "int8":
        return ["SCB", "weight_format", "weight"]
    if format in GROUPED:
        return list(awq_layers.NAMES if format == "awq" else gptq_layers.NAMES)
    return [*(f"weight.{part}" for part in PARTS[format]), "weight"]


def _only(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _stand_in(weight: CodedParameter) -> CodedParameter:
    """The weight without its codes, for a layer whose codes stay on the disk: its meaning is kept in memory."""
    stand_in: Any = type(weight)
    attributes = {key: value for key, value in weight.__dict__.items() if not key.startswith("_")}
    # Transformers gives random values to what does not carry this mark.
    attributes["_is_hf_initialized"] = True
    placeholder: CodedParameter = stand_in(weight.data.to("meta"), requires_grad=False, **attributes)
    return placeholder


def _install(module: Any, weight: CodedParameter) -> CodedParameter:
    """Leave in ``module`` what the weight means; Transformers puts the codes there itself, or on the disk."""
    module._parameters["weight"] = _stand_in(weight)
    if isinstance(weight, Params4bit):
        module.quant_state = weight.quant_state
    module._changed()
    return weight


class _Reporting(ConversionOps):  # type: ignore[misc]
    """An operation whose errors reach the caller: Transformers would log their text and raise one without it."""

    quantizer: QcoreQuantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reporting:
        # Transformers copies an operation for each tensor; what is wrong belongs to the one quantizer it knows.
        return copy.copy(self)

    def convert(
        self,
        input_dict: dict[str, Any],
        *patterns: Any,
        model: Any,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        try:
            return self._convert(input_dict, model, full_layer_name, missing_keys)
        except (QcoreError, RuntimeError) as error:
            self.quantizer.broken.append(str(error))
            return {}

    def _convert(
        self, input_dict: dict[str, Any], model: Any, layer_name: str, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        raise NotImplementedError


class Quantize(_Reporting):
    """A float tensor becomes a quantized weight, or one weight an expert."""

    def __init__(self, quantizer: QcoreQuantizer) -> None:
        self.quantizer = quantizer

    def _convert(
        self, input_dict: dict[str, Any], model: Any, layer_name: str, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            fused = self.quantizer.experts.get(name)
            if fused is None:
                module, _leaf = get_module_from_name(model, name)
                transposed = name.removesuffix(".weight") in self.quantizer.transposed
                expected = tuple(module.weight.shape)
                _check_shape(name, _only(value), expected[::-1] if transposed else expected)
                result[name] = self._quantized(module, _only(value), transposed)
                continue
            _check_shape(name, _only(value), fused.shape)
            layers = experts.install(model, fused, self.quantizer.quantization_config.settings)
            for index, matrix in enumerate(_only(value)):
                result[f"{name}.{index}.weight"] = self._quantized(layers[index], matrix, fused.transposed)
            if missing_keys is not None:
                missing_keys.discard(name)
        return result

    @staticmethod
    def _quantized(module: Any, value: Tensor, transposed: bool) -> CodedParameter:
        empty = module._parameters["weight"]
        attributes = {key: each for key, each in empty.__dict__.items() if not key.startswith("_")}
        value = value.t().contiguous() if transposed else value
        weight: Any = type(empty)(value, requires_grad=False, **attributes)
        return _install(module, weight.quantize())


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise FormatError(
            f"{name} has shape {tuple(value.shape)}, the model {shape}; is config.json that of the weights?"
        )


class Load(_Reporting):
    """The parts of a quantized weight become one parameter; a weight that is not quantized goes through."""

    def __init__(self, quantizer: QcoreQuantizer) -> None:
        # Transformers looks for this name: the parts are not to be cast on the way.
        self.hf_quantizer = self.quantizer = quantizer

    def _convert(
        self, input_dict: dict[str, Any], model: Any, layer_name: str, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        module, _leaf = get_module_from_name(model, layer_name)
        entries = {key: _only(value) for key, value in input_dict.items()}
        if not isinstance(module, (Linear4bit, Linear8bitLt, LinearInt4)):
            return {key: self._cast(model, layer_name, value) for key, value in entries.items()}
        if not isinstance(module, LinearInt4) and "weight" not in entries:
            raise FormatError(f"{layer_name} is missing, but {', '.join(entries)} beside it are there")
        try:
            module.load_state_dict(entries, strict=False, assign=True)
        except (RuntimeError, QcoreError) as error:
            raise FormatError(f"{layer_name}: {error}") from error
        return {"weight": _install(module, module.weight)}

    def _cast(self, model: Any, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            if model.get_parameter_or_buffer(name).is_floating_point():
                raise FormatError(f"{name} is {value.dtype} where the model has a float weight; is skip_modules right?")
            return value
        dtype = self.hf_quantizer.dtype
        return value.to(torch.float32 if architecture.stays_float32(model, name, dtype) else dtype)


class Keep(ConversionOps):  # type: ignore[misc]
    """Nothing happens; but Transformers writes what went through an operation to the offload folder.

    Without one it would leave the module with the float tensor of the checkpoint, to be read in each forward pass.
    """

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return input_dict
