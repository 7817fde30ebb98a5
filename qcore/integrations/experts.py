"""Fused experts: the three-dimensional weights of a mixture of experts, quantized matrix by matrix.

Transformers keeps the experts of a layer in two parameters, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, which
an exchange of linear layers does not see. Each becomes a list of quantized layers, one an expert, so that no block and
no nested statistic reaches from one expert into the next, and everything that a layer can do holds for an expert. What
surrounds the products, gate and routing, stays the model's own: the lists are computed by a function in Transformers'
``ExpertsInterface``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import FormatError, InvalidArgument
from qcore.formats import architecture
from qcore.formats.quantization_config import QuantizationSettings
from qcore.integrations.layers import dequantized, make_layer

IMPLEMENTATION = "qcore"


@dataclass(frozen=True)
class FusedExperts:
    """One fused parameter: ``shape`` as the model has it, ``transposed`` if its matrices are (in, out)."""

    name: str
    shape: tuple[int, int, int]
    transposed: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of each expert."""
        _, first, second = self.shape
        return (second, first) if self.transposed else (first, second)


class ExpertList(nn.ModuleList):
    """The quantized layers of one projection, by expert; ``fused_shape`` is that of the parameter they replace."""

    def __init__(self, layers: Sequence[nn.Module], fused_shape: tuple[int, ...], transposed: bool) -> None:
        super().__init__(layers)
        self.fused_shape = tuple(fused_shape)
        self.transposed = transposed


def find(model: nn.Module, skip_modules: Sequence[str]) -> dict[str, FusedExperts]:
    """The fused parameters, by name, of modules that compute through Transformers' ``ExpertsInterface``."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = {}
    for prefix, module in model.named_modules():
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
            continue
        for key in architecture.FUSED_PROJECTIONS:
            weight, name = module._parameters.get(key), f"{prefix}.{key}"
            if weight is not None and weight.dim() == 3 and should_convert_module(name, list(skip_modules)):
                first, second, third = weight.shape
                found[name] = FusedExperts(name, (first, second, third), bool(module.is_transposed))
    return found


def unreachable(model: nn.Module, skip_modules: Sequence[str]) -> list[str]:
    """Names of fused weights that :func:`find` cannot serve: their modules do not ask the interface."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    known = find(model, skip_modules)
    return [
        name
        for name in architecture.fused_weights(model)
        if name not in known and should_convert_module(name, list(skip_modules))
    ]


def exchange(model: nn.Module, fused: Mapping[str, FusedExperts], settings: QuantizationSettings) -> None:
    """Put unquantized lists of layers on the meta device in the place of the fused parameters."""
    for each in fused.values():
        install(model, each, settings)


def install(model: nn.Module, fused: FusedExperts, settings: QuantizationSettings) -> ExpertList:
    """Replace one fused parameter by a list of layers on the meta device; returns the list."""
    path, _, key = fused.name.rpartition(".")
    module: Any = model.get_submodule(path)
    dtype = module._parameters.pop(key).dtype
    layers = ExpertList(
        [make_layer(settings, fused.matrix, False, dtype) for _ in range(fused.shape[0])], fused.shape, fused.transposed
    )
    setattr(module, key, layers)
    _register()
    # Past the setter, which would hand the choice down to configurations of other parts of the model.
    module.config._experts_implementation_internal = IMPLEMENTATION
    return layers


def restore(module: Any, key: str, dtype: torch.dtype) -> None:
    """Put the fused, dequantized parameter back; the module's ``config`` is left to the caller."""
    layers = getattr(module, key)
    matrices = [dequantized(layer.weight, dtype) for layer in layers]
    stacked = torch.stack([each.t() for each in matrices] if layers.transposed else matrices)
    delattr(module, key)
    setattr(module, key, nn.Parameter(stacked.contiguous()))


def check_shape(name: str, stored: Tensor, layers: ExpertList) -> None:
    """Compare the shape that a checkpoint holds under a fused name with the model's.

    Raises
    ------
    FormatError
        It is another one.
    """
    if tuple(stored.tolist()) != layers.fused_shape:
        raise FormatError(f"{name} stands for shape {tuple(stored.tolist())}, the model has {layers.fused_shape}")


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' part of a layer, expert by expert.

    Parameters
    ----------
    hidden_states : Tensor
        ``(tokens, hidden)``.
    top_k_index : Tensor
        int64 ``(tokens, k)``: experts of each token; a number beyond the last expert means none.
    top_k_weights : Tensor
        ``(tokens, k)``.

    Returns
    -------
    Tensor
        ``(tokens, hidden)`` in the dtype of ``hidden_states``; summed in float32.
    """
    total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:
            continue
        token, position = torch.where(top_k_index == expert)
        inner = _project(self, first, expert, hidden_states[token])
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _project(self, "down_proj", expert, inner)
        if getattr(self, "has_post_expert_norm", False):  # absent in older versions of Transformers
            outer = self.post_expert_norm(outer)
        total.index_add_(0, token, (outer * top_k_weights[token, position, None]).float())
    return total.to(hidden_states.dtype)


def _project(module: Any, key: str, expert: int, x: Tensor) -> Tensor:
    projection = getattr(module, key)
    result: Tensor
    if isinstance(projection, ExpertList):
        result = projection[expert](x)
    elif isinstance(projection, Tensor):  # left in floating point
        weight = projection[expert]
        result = x @ weight if module.is_transposed else x @ weight.t()
    else:
        raise InvalidArgument(f"{type(module).__name__}.{key} is a {type(projection).__name__}, not a list of experts")
    return result + getattr(module, f"{key}_bias")[expert] if module.has_bias else result
