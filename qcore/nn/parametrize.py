"""Parameters outside of linear layers in 4 bits: stored as codes, dequantized when they are read.

For weights that a model uses as plain tensors, such as the 3-D experts of a mixture: ``torch.nn.utils.parametrize``
puts the decoding between the stored codes and the attribute. While the module's own forward pass runs, each parameter
is decoded once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcore.functional import QuantState, dequantize_4bit, quantize_4bit

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Decodes a parameter; the result has no gradient.

    Parameters
    ----------
    quant_state : QuantState
        What the stored codes mean.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    def forward(self, quantized_param: Tensor) -> Tensor:
        """Packed codes to the tensor that was quantized, in its shape and dtype (QC-4BIT-003)."""
        with torch.no_grad():
            return dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter of any shape in place; reading the attribute decodes it.

    Parameters
    ----------
    module : nn.Module
    param_name : str
        A float32, float16 or bfloat16 parameter of ``module`` itself, not of a child.
    compress_statistics : bool
        Quantize the scales too.
    quant_type : {"nf4", "fp4"}
    blocksize : int, optional
        Power of two from 32 to 4096; 64 by default.

    Raises
    ------
    AttributeError, TypeError
        ``module`` has no such attribute, or it is no parameter.
    """
    parameter = _parameter(module, param_name)
    packed, state = quantize_4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device
) -> None:
    """Decode a parameter that holds packed codes already, when it is read.

    Parameters
    ----------
    module : nn.Module
    param_name : str
        A parameter that holds packed codes.
    qs_dict : mapping
        What :meth:`~qcore.functional.QuantState.as_dict` wrote for them.
    device : torch.device
        Where the scales go.

    Raises
    ------
    AttributeError, TypeError
        ``module`` has no such attribute, or it is no parameter.
    FormatError
        ``qs_dict`` is incomplete.
    """
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device=device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter {name!r}")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter {name!r} is not an instance of nn.Parameter but of {type(parameter).__name__}")
    return parameter


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    # unsafe: codes and decoded values differ in dtype and shape, which torch would otherwise refuse.
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Keep decoded values during the module's forward pass; save codes and their state under the parameter's name."""
    module.register_state_dict_post_hook(partial(_save_codes, param_name=param_name))
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # Always: checkpointing with use_reentrant=False leaves a recomputation by an exception, once it has what it needs.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    parametrize._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    # Not below 0: this also runs where an earlier hook failed before the cache was enabled.
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def _save_codes(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *, param_name: str
) -> None:
    stored = f"{prefix}parametrizations.{param_name}.original"
    if stored not in state_dict:
        return
    state_dict[prefix + param_name] = state_dict.pop(stored)
    for step in module.parametrizations[param_name]:  # type: ignore[index]
        if isinstance(step, Bnb4bitParametrization):
            for key, value in step.quant_state.as_dict(packed=True).items():
                state_dict[f"{prefix}{param_name}.{key}"] = value
