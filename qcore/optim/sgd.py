"""SGD with momentum (Sutskever et al., *On the importance of initialization and momentum*, ICML 2013); QC-OPT-013."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.errors import InvalidArgument, Unsupported
from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import AllOptions
from qcore.optim.state import SIGNED, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MomentumOptimizer(Optimizer8bit):
    """What SGD and LARS share. ``betas`` of a group is ``(momentum, dampening)``, as in bitsandbytes' state dicts."""

    algorithm = "momentum"
    moments: ClassVar[tuple[Moment, ...]] = (SIGNED,)

    def _hyperparameters(
        self, lr: Any, momentum: float, dampening: float, weight_decay: float, nesterov: bool
    ) -> dict[str, Any]:
        name = type(self).__name__
        if momentum == 0:
            raise Unsupported(f"{name}: momentum is 0, so there is no state to keep small; use torch.optim.SGD")
        if nesterov and dampening != 0:
            raise InvalidArgument(f"{name}: nesterov=True needs dampening=0, came {dampening}")
        return {
            "lr": lr,
            "betas": (momentum, dampening),
            "eps": 0.0,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }

    def _scalars(self, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
        momentum, dampening = settings["betas"]
        shared = super()._scalars(settings, step)
        return {**shared, "betas": (momentum,), "dampening": dampening, "nesterov": settings["nesterov"]}


class SGD(MomentumOptimizer):
    """SGD with momentum, its buffer in 32 or 8 bits; the steps are those of ``torch.optim.SGD``.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    momentum : float
        Not 0: without momentum there is no state.
    dampening : float
        The gradient enters the buffer times ``1 - dampening``, from the second step on.
    weight_decay : float
        Added to the gradient, times the parameter.
    nesterov : bool
        Needs ``dampening=0``.
    optim_bits, args, min_8bit_size, **options
        As :class:`~qcore.optim.adam.Adam`, and ``is_paged``.
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
        **options: Unpack[AllOptions],
    ) -> None:
        hyperparameters = self._hyperparameters(lr, momentum, dampening, weight_decay, nesterov)
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, options)


class SGD8bit(SGD):
    """:class:`SGD` with 8-bit state."""

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
        **options: Unpack[AllOptions],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 8, args, min_8bit_size, **options)


class SGD32bit(SGD):
    """:class:`SGD` with 32-bit state."""

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
        **options: Unpack[AllOptions],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size, **options)
