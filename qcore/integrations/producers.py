"""What stands in front of the linear layers of a block, and takes back the scale that AWQ gives to their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcore.algorithms.calibration import Statistics

# Whose rows make the input channels of whom, where no norm stands between.
_FRONTS = {"down_proj": "up_proj", "o_proj": "v_proj"}


def find_producer(block: nn.Module, each: Statistics, weights: dict[str, Tensor], config: Any) -> Producer | None:
    """The producer of the input of ``each.layers``; None where nothing known stands in front of them.

    ``weights`` are the block's quantized layers by name, ``config`` is the model's (size of an attention head).
    """
    if each.producer is not None:
        return Producer(block, each, None, None)
    path, _, leaf = each.layers[0].rpartition(".")
    front = f"{path}.{_FRONTS[leaf]}" if leaf in _FRONTS else ""
    if len(each.layers) != 1 or front not in weights:
        return None
    rows, columns = len(weights[front]), len(each.hessian)
    if columns % rows:
        return None
    owner = torch.arange(rows, device=each.hessian.device)
    if columns != rows:  # grouped-query attention: several query heads read one value head
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        owner = owner.view(-1, 1, head).expand(-1, columns // rows, -1).reshape(-1)
    return Producer(block, each, front, owner)


@dataclass
class Producer:
    """What stands in front of layers with one input, and can take a scale back.

    ``front`` is a linear layer, None for the norm that the statistics name; ``owner`` int64 ``(K,)`` says which row of
    ``front`` makes each channel.
    """

    block: nn.Module
    statistics: Statistics
    front: str | None
    owner: Tensor | None

    def divide(self, factors: Tensor, weights: dict[str, Tensor], changed: dict[str, Tensor]) -> bool:
        """Divide the outputs by ``factors``; False, and nothing changed, where that does not come out."""
        if self.front is not None and self.owner is not None:
            by_row = factors.new_ones(len(weights[self.front])).index_copy_(0, self.owner, factors)
            weights[self.front] = weights[self.front] / by_row[:, None]
            layer: Any = self.block.get_submodule(self.front)
            if layer.bias is not None:
                changed[f"{self.front}.bias"] = (layer.bias.float() / by_row).to(layer.bias.dtype)
            return True
        assert self.statistics.producer is not None
        assert self.statistics.sample is not None
        norm = self.block.get_submodule(self.statistics.producer)
        given, gave = self.statistics.sample
        kept = {name: value.detach().clone() for name, value in norm.named_parameters()}
        divided = {name: (value.float() / factors).to(value.dtype) for name, value in kept.items()}
        _load(norm, divided)
        with torch.inference_mode():
            now = norm(given)
        _load(norm, kept)
        # Some norms multiply by 1 + weight: dividing that is not dividing the output.
        if not torch.allclose(
            now.float() * factors, gave.float(), rtol=0.05, atol=0.02 * float(gave.float().abs().max())
        ):
            return False
        changed |= {f"{self.statistics.producer}.{name}": value for name, value in divided.items()}
        return True


def _load(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)
