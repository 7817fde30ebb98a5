"""LAMB (You et al., arXiv 1904.00962, algorithm 2) as bitsandbytes steps it: Adam with a limited update; QC-OPT-010."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import PagedOptions, parsed_betas, refuse
from qcore.optim.state import SIGNED, UNSIGNED, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LAMB(Optimizer8bit):
    """LAMB with state in 32 or 8 bits.

    The update of a parameter is Adam's, scaled down where its norm exceeds ``max_unorm`` times the parameter's
    (QC-OPT-008). That is bitsandbytes' rule; the paper also scales smaller updates up.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    bias_correction : bool
        Correct the moments for their start at 0.
    betas : pair of float
    eps : float
    weight_decay : float
    amsgrad : bool
        Refused if set.
    adam_w_mode : bool
        True: the parameter is multiplied by ``1 - lr * weight_decay`` first. False: ``weight_decay`` times the
        parameter is added to the gradient.
    optim_bits, args, min_8bit_size, **options
        As :class:`~qcore.optim.adam.Adam`, and ``is_paged``.
    max_unorm : float
        Largest norm of the update in units of the parameter's norm; 0 for no limit.
    """

    algorithm = "adam"
    moments: ClassVar[tuple[Moment, ...]] = (SIGNED, UNSIGNED)

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[PagedOptions],
    ) -> None:
        refuse(type(self).__name__, "amsgrad", amsgrad, "it needs a third state")
        hyperparameters = {
            "lr": lr,
            "betas": parsed_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": 0.0,
            "t_alpha": None,
            "t_beta3": None,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, {"max_unorm": max_unorm, **options})

    def _scalars(self, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
        return {
            **super()._scalars(settings, step),
            "bias_correction": settings["bias_correction"],
            "decoupled": settings["adam_w_mode"],
        }


class LAMB8bit(LAMB):
    """:class:`LAMB` with 8-bit state."""

    bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: object = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[PagedOptions],
    ) -> None:
        given = (params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode)
        super().__init__(*given, 8, args, min_8bit_size, max_unorm, **options)


class LAMB32bit(LAMB):
    """:class:`LAMB` with 32-bit state."""

    bits = 32

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: object = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[PagedOptions],
    ) -> None:
        given = (params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode)
        super().__init__(*given, 32, args, min_8bit_size, max_unorm, **options)
