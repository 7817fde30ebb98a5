"""Optimizers and arguments that the tests go through, and short runs of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import papers
from qcore import optim


@dataclass(frozen=True)
class Case:
    """A family with arguments."""

    family: str
    paper: Callable[..., papers.Rule]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.family, *(f"{key}={value}" for key, value in self.arguments.items())])

    def make(self, params: Any, bits: int, **more: Any) -> optim.Optimizer8bit:
        """The optimizer at ``bits``, every parameter's state in that many."""
        kind = getattr(optim, f"{self.family}{bits}bit")
        optimizer: optim.Optimizer8bit = kind(params, **self.arguments, min_8bit_size=0, **more)
        return optimizer


CASES = [
    Case("Adam", papers.adam, {"lr": 1e-2, "weight_decay": 0.1}),
    Case("AdamW", papers.adam, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
    Case("LAMB", papers.lamb, {"lr": 1e-2, "weight_decay": 0.1, "max_unorm": 0.5}),
    Case("LAMB", papers.lamb, {"lr": 1e-2, "weight_decay": 0.1, "adam_w_mode": False, "bias_correction": False}),
    Case("Lion", papers.lion, {"lr": 1e-3, "weight_decay": 0.1}),
    Case("SGD", papers.sgd, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    Case("SGD", papers.sgd, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
    Case("SGD", papers.sgd, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    Case("LARS", papers.lars, {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.1}),
    Case("RMSprop", papers.rmsprop, {"lr": 1e-3, "weight_decay": 0.1}),
    Case("Adagrad", papers.adagrad, {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    Case("Adagrad", papers.adagrad, {"lr": 1e-2, "weight_decay": 0.1}),
    Case("AdEMAMix", papers.ademamix, {"lr": 1e-2, "betas": (0.9, 0.99, 0.999)}),
    Case("AdEMAMix", papers.ademamix, {"lr": 1e-2, "t_alpha": 8, "t_beta3": 12}),
]


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Gradients of like magnitude that point mostly one way, as in training."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator)
    return [mean + 0.5 * torch.randn(shape, generator=generator) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> np.ndarray:
    """The first parameter after a step on each gradient, as float64."""
    param = optimizer.param_groups[0]["params"][0]
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    result: np.ndarray = param.detach().double().numpy()
    return result


def true(case: Case, start: Tensor, grads: list[Tensor]) -> np.ndarray:
    """The same by the paper."""
    return case.paper(**case.arguments)(start.double().numpy(), [grad.double().numpy() for grad in grads])
