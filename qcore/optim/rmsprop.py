"""RMSprop (Tieleman and Hinton, *Neural Networks for Machine Learning*, lecture 6.5, 2012); QC-OPT-014."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.errors import InvalidArgument
from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import AllOptions, refuse
from qcore.optim.state import UNSIGNED_FIRST, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RMSprop(Optimizer8bit):
    """RMSprop with its one moment in 32 or 8 bits.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    alpha : float
        Decay of the second moment, between 0 and 1.
    eps : float
    weight_decay : float
        Added to the gradient, times the parameter.
    momentum : float
        Refused if not 0: it would need a second state.
    centered : bool
        Refused if set: it would need a second state.
    optim_bits, args, min_8bit_size, **options
        As :class:`~qcore.optim.adam.Adam`, and ``is_paged``.
    """

    algorithm = "rmsprop"
    moments: ClassVar[tuple[Moment, ...]] = (UNSIGNED_FIRST,)

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        **options: Unpack[AllOptions],
    ) -> None:
        name = type(self).__name__
        if alpha == 0:
            raise InvalidArgument(f"{name}: alpha is 0, which keeps no average; needs 0 < alpha < 1")
        refuse(name, "momentum", momentum, "it needs a second state; torch.optim.RMSprop has it")
        refuse(name, "centered", centered, "it needs a second state; torch.optim.RMSprop has it")
        hyperparameters = {"lr": lr, "betas": (alpha, momentum), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, options)

    def _scalars(self, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
        return {**super()._scalars(settings, step), "betas": settings["betas"][:1]}


class RMSprop8bit(RMSprop):
    """:class:`RMSprop` with 8-bit state."""

    bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: object = None,
        min_8bit_size: int = 4096,
        **options: Unpack[AllOptions],
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, 8, args, min_8bit_size, **options)


class RMSprop32bit(RMSprop):
    """:class:`RMSprop` with 32-bit state."""

    bits = 32

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: object = None,
        min_8bit_size: int = 4096,
        **options: Unpack[AllOptions],
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, 32, args, min_8bit_size, **options)
