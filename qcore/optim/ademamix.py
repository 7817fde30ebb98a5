"""AdEMAMix (Pagliardini et al., arXiv 2409.03137, algorithm 1); QC-OPT-011."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.errors import InvalidArgument
from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import UnormOptions, parsed_betas
from qcore.optim.state import FAST_AND_SLOW, UNSIGNED, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AdEMAMix(Optimizer8bit):
    """AdEMAMix with its three averages in 32 or 8 bits; ``state1`` holds the fast and the slow one, ``(2, *shape)``.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    betas : three floats
        Decay of the fast first moment, of the second moment, of the slow first moment.
    alpha : float
        Weight of the slow moment.
    t_alpha, t_beta3 : int, optional
        Number of steps in which ``alpha`` and ``betas[2]`` grow to their values (equations 3.2 and 3.3).
    eps : float
    weight_decay : float
        The parameter is multiplied by ``1 - lr * weight_decay`` first.
    optim_bits, min_8bit_size, is_paged, **options
        As :class:`~qcore.optim.adam.Adam`.
    """

    algorithm = "ademamix"
    moments: ClassVar[tuple[Moment, ...]] = (FAST_AND_SLOW, UNSIGNED)

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        betas = parsed_betas(betas)
        if t_beta3 and betas[0] == 0:
            raise InvalidArgument(f"{type(self).__name__}: t_beta3 needs betas[0] > 0, where the schedule starts")
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        super().__init__(params, hyperparameters, optim_bits, None, min_8bit_size, {"is_paged": is_paged, **options})

    def _scalars(self, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
        shared = super()._scalars(settings, step)
        beta1, beta2, beta3 = shared["betas"]
        alpha, t_alpha, t_beta3 = float(settings["alpha"]), settings["t_alpha"], settings["t_beta3"]
        if t_alpha:
            alpha = min(step * alpha / t_alpha, alpha)
        if t_beta3:
            # The half-life of the average grows linearly (equation 3.2).
            log1, log3, done = math.log(beta1), math.log(beta3), step / t_beta3
            beta3 = min(math.exp(log1 * log3 / ((1.0 - done) * log3 + done * log1)), beta3)
        return {**shared, "betas": (beta1, beta2, beta3), "alpha": alpha}


class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with 8-bit state."""

    bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, 8, min_8bit_size, is_paged, **options
        )


class AdEMAMix32bit(AdEMAMix):
    """:class:`AdEMAMix` with 32-bit state."""

    bits = 32

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, 32, min_8bit_size, is_paged, **options
        )


class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with paged state."""

    paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with paged 8-bit state."""

    paged = True


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with paged 32-bit state."""

    paged = True
