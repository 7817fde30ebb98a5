"""Adam and AdamW (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101); QC-OPT-010."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim.optimizer import ParamsT

from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.settings import UnormOptions, parsed_betas, refuse
from qcore.optim.state import SIGNED, UNSIGNED, Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adam(Optimizer8bit):
    """Adam with state in 32 or 8 bits; the decay is AdamW's, taken from the parameter, as in bitsandbytes.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of parameter groups
        float32, float16 or bfloat16.
    lr : float or Tensor
    betas : pair of float
        Decay of the first and of the second moment.
    eps : float
    weight_decay : float
        The parameter is multiplied by ``1 - lr * weight_decay`` first (QC-OPT-010).
    amsgrad : bool
        Refused if set: the running maximum would need a third state.
    optim_bits : {32, 8}
        The classes that end in ``8bit`` and ``32bit`` fix it.
    args : object, optional
        Its attributes ``optim_bits``, ``min_8bit_size``, ``max_unorm``, ``skip_zeros`` take precedence.
    min_8bit_size : int
        Parameters with fewer elements keep 32-bit state.
    is_paged : bool
        Keep the state in memory that may be larger than the device's; the classes ``Paged...`` always do.
    **options
        :class:`~qcore.optim.settings.Options`, and ``max_unorm``.

    Raises
    ------
    InvalidArgument, Unsupported
        An argument that cannot be honoured.
    """

    algorithm = "adam"
    moments: ClassVar[tuple[Moment, ...]] = (SIGNED, UNSIGNED)

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        refuse(type(self).__name__, "amsgrad", amsgrad, "it needs a third state; torch.optim.AdamW has it")
        hyperparameters = {
            "lr": lr,
            "betas": parsed_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": 0.0,
            "t_alpha": None,
            "t_beta3": None,
        }
        super().__init__(params, hyperparameters, optim_bits, args, min_8bit_size, {"is_paged": is_paged, **options})


class Adam8bit(Adam):
    """:class:`Adam` with 8-bit state."""

    bits = 8


class Adam32bit(Adam):
    """:class:`Adam` with 32-bit state."""

    bits = 32


class PagedAdam(Adam):
    """:class:`Adam` with paged state."""

    paged = True


class PagedAdam8bit(Adam8bit):
    """:class:`Adam` with paged 8-bit state."""

    paged = True


class PagedAdam32bit(Adam32bit):
    """:class:`Adam` with paged 32-bit state."""

    paged = True


class AdamW(Adam):
    """:class:`Adam` with a decay of 0.01 unless told otherwise."""

    def __init__(
        self,
        params: ParamsT,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[UnormOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdamW8bit(AdamW):
    """:class:`AdamW` with 8-bit state."""

    bits = 8


class AdamW32bit(AdamW):
    """:class:`AdamW` with 32-bit state."""

    bits = 32


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged state."""

    paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW` with paged 8-bit state."""

    paged = True


class PagedAdamW32bit(AdamW32bit):
    """:class:`AdamW` with paged 32-bit state."""

    paged = True
