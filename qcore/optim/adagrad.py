"""Adagrad (Duchi, Hazan and Singer, *Adaptive Subgradient Methods*, JMLR 12, 2011, figure 1); QC-OPT-015."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.errors import InvalidArgument
from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import AllOptions
from qcore.optim.state import UNSIGNED_FIRST, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adagrad(Optimizer8bit):
    """Adagrad with its sum of squares in 32 or 8 bits.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    lr_decay : float
        Step ``t`` takes ``lr / (1 + (t - 1) * lr_decay)``.
    weight_decay : float
        Added to the gradient, times the parameter.
    initial_accumulator_value : float
        What the sum of squares starts with.
    eps : float
    optim_bits, args, min_8bit_size, **options
        As :class:`~qcore.optim.adam.Adam`, and ``is_paged``.
    """

    algorithm = "adagrad"
    moments: ClassVar[tuple[Moment, ...]] = (UNSIGNED_FIRST,)

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        **options: Unpack[AllOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": (0.0, 0.0),
            "eps": eps,
            "weight_decay": weight_decay,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, options)

    def _scalars(self, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
        shared = super()._scalars(settings, step)
        return {**shared, "lr": shared["lr"] / (1.0 + (step - 1) * settings["lr_decay"]), "betas": ()}


class Adagrad8bit(Adagrad):
    """:class:`Adagrad` with 8-bit state; ``optim_bits`` has to be 8, as in bitsandbytes."""

    bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: object = None,
        min_8bit_size: int = 4096,
        **options: Unpack[AllOptions],
    ) -> None:
        if optim_bits != 8:  # elsewhere 32 is the default of 8-bit classes too, and means nothing
            raise InvalidArgument(f"{type(self).__name__}: optim_bits is {optim_bits}, this class keeps 8-bit state")
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


class Adagrad32bit(Adagrad):
    """:class:`Adagrad` with 32-bit state."""

    bits = 32
