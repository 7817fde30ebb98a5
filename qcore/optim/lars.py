"""LARS (You, Gitman and Ginsburg, arXiv 1708.03888) as bitsandbytes steps it: SGD with a limited update; QC-OPT-013."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import ParamsT

from qcore.errors import InvalidArgument
from qcore.optim.settings import PagedOptions
from qcore.optim.sgd import MomentumOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LARS(MomentumOptimizer):
    """LARS with its momentum buffer in 32 or 8 bits.

    The update of a parameter is that of :class:`~qcore.optim.sgd.SGD`, scaled down where its norm exceeds ``max_unorm``
    times the parameter's (QC-OPT-008).

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    momentum, dampening, weight_decay, nesterov
        As :class:`~qcore.optim.sgd.SGD`.
    optim_bits, args, min_8bit_size, **options
        As :class:`~qcore.optim.adam.Adam`, and ``is_paged``.
    max_unorm : float
        Largest norm of the update in units of the parameter's norm; 0 for no limit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Unpack[PagedOptions],
    ) -> None:
        hyperparameters = self._hyperparameters(lr, momentum, dampening, weight_decay, nesterov)
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, {"max_unorm": max_unorm, **options})


class LARS8bit(LARS):
    """:class:`LARS` with an 8-bit buffer."""

    bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: object = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Unpack[PagedOptions],
    ) -> None:
        given = (params, lr, momentum, dampening, weight_decay, nesterov)
        super().__init__(*given, 8, args, min_8bit_size, max_unorm, **options)


class LARS32bit(LARS):
    """:class:`LARS` with a 32-bit buffer."""

    bits = 32

    def __init__(
        self,
        params: ParamsT,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: object = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Unpack[PagedOptions],
    ) -> None:
        given = (params, lr, momentum, dampening, weight_decay, nesterov)
        super().__init__(*given, 32, args, min_8bit_size, max_unorm, **options)


class PytorchLARS(torch.optim.Optimizer):
    """LARS in torch operations alone: any device, any number of dimensions, float state in the parameter's dtype.

    Parameters
    ----------
    params : iterable of Tensor or of parameter groups
    lr, momentum, dampening, weight_decay, nesterov
        As ``torch.optim.SGD``; without momentum the update is the gradient.
    max_unorm : float
        Largest norm of the update in units of the parameter's norm; 0 for no limit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if not value >= 0.0:
                raise InvalidArgument(f"PytorchLARS: {name} is {value}, needs a number that is not negative")
        if nesterov and (momentum == 0 or dampening != 0):
            raise InvalidArgument("PytorchLARS: nesterov=True needs a momentum and dampening=0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_unorm": max_unorm,
        }
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss again and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self._step(group, param)
        return loss

    def _step(self, group: dict[str, Any], param: torch.Tensor) -> None:
        gradient = param.grad
        assert gradient is not None
        if group["weight_decay"]:
            gradient = gradient.add(param, alpha=group["weight_decay"])
        update = gradient
        if group["momentum"]:
            state = self.state[param]
            if "momentum_buffer" in state:
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
            else:
                state["momentum_buffer"] = gradient.clone()
            update = state["momentum_buffer"]
            if group["nesterov"]:
                update = gradient.add(update, alpha=group["momentum"])
        scale = 1.0
        if group["max_unorm"] > 0.0:
            limit, norm = group["max_unorm"] * param.norm().item(), update.norm().item()
            scale = limit / norm if norm > limit else 1.0
        param.add_(update, alpha=-group["lr"] * scale)
