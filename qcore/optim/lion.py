"""Lion (Chen et al., *Symbolic Discovery of Optimization Algorithms*, arXiv 2302.06675, program 1); QC-OPT-012."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import UnormOptions, parsed_betas
from qcore.optim.state import SIGNED, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(Optimizer8bit):
    """Lion with its one moment in 32 or 8 bits.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    betas : pair of float
        Weight of the moment in the update, and its decay.
    weight_decay : float
        The parameter is multiplied by ``1 - lr * weight_decay`` first.
    optim_bits, args, min_8bit_size, is_paged, **options
        As :class:`~qcore.optim.adam.Adam`.
    """

    algorithm = "lion"
    moments: ClassVar[tuple[Moment, ...]] = (SIGNED,)

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        hyperparameters = {"lr": lr, "betas": parsed_betas(betas), "eps": 0.0, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, {"is_paged": is_paged, **options})


class Lion8bit(Lion):
    """:class:`Lion` with 8-bit state."""

    bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: object = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 8, args, min_8bit_size, is_paged, **options)


class Lion32bit(Lion):
    """:class:`Lion` with 32-bit state."""

    bits = 32

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: object = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, is_paged, **options)


class PagedLion(Lion):
    """:class:`Lion` with paged state."""

    paged = True


class PagedLion8bit(Lion8bit):
    """:class:`Lion` with paged 8-bit state."""

    paged = True


class PagedLion32bit(Lion32bit):
    """:class:`Lion` with paged 32-bit state."""

    paged = True
