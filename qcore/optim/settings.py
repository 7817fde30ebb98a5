"""What an optimizer can be told, how it is checked, and what is refused and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from qcore.errors import InvalidArgument


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, also per parameter group.

    Attributes
    ----------
    percentile_clipping : int
        Scale a gradient down to this percentile of its own last 100 norms; 100 (the default) for never.
    block_wise : bool
        True, the only way there is: 8-bit state has a scale a block of 256. Anything else is refused.
    skip_zeros : bool
        Leave parameter and state alone where the gradient is exactly 0 (QC-OPT-005).
    maximize : bool
        Climb instead of descend: the gradient is negated, which is exact.
    stochastic_rounding : bool
        Round bfloat16 parameters up or down with a probability that keeps the mean (QC-OPT-007).
    kahan : bool
        Keep what rounding a 16-bit parameter lost, and add it at the next step (QC-OPT-006).
    seed : int
        For stochastic rounding: the same seed gives the same run.
    paged_dir : str
        Where the files of paged state of CPU tensors are; by default ``QCORE_PAGED_DIR``, else the system's temporary
        directory. State of a GPU's tensors is in no files.
    exact_bitsandbytes : bool
        Write 8-bit states as bitsandbytes 0.50.2 does, small second moments rounded to 0 included (QC-OPT-023).
    check_finite : bool
        Raise if a gradient holds a NaN or an infinity, before anything changes; costs one more read of the gradients.
    """

    percentile_clipping: int
    block_wise: bool
    skip_zeros: bool
    maximize: bool
    stochastic_rounding: bool
    kahan: bool
    seed: int
    paged_dir: str | None
    exact_bitsandbytes: bool
    check_finite: bool


class UnormOptions(Options, total=False):
    """Those of optimizers that do not limit their update by themselves.

    Attributes
    ----------
    max_unorm : float
        Limit the norm of an update to this multiple of the parameter's norm (QC-OPT-008); 0 (the default) for none.
    """

    max_unorm: float


class PagedOptions(Options, total=False):
    """Those of optimizers that have no paged class of their own.

    Attributes
    ----------
    is_paged : bool
        Keep the state in memory that may be larger than the device's.
    """

    is_paged: bool


class AllOptions(UnormOptions, PagedOptions, total=False):
    """All of them."""


DEFAULTS: Mapping[str, Any] = {
    "percentile_clipping": 100,
    "skip_zeros": False,
    "max_unorm": 0.0,
    "is_paged": False,
    "maximize": False,
    "stochastic_rounding": False,
    "kahan": False,
    "seed": 0,
    "paged_dir": None,
    "exact_bitsandbytes": False,
    "check_finite": False,
}
# How an optimizer was built, as against what training changes: not in a state dict, which keeps bitsandbytes' keys.
STRUCTURE = frozenset(
    {
        *DEFAULTS,
        *("optim_bits", "min_8bit_size"),
    }
)
# What bitsandbytes' optimizers take, and show, as attributes of `args`.
ARGS = ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros", "percentile_clipping")


def gather(name: str, args: object, optim_bits: int, min_8bit_size: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer from its constructor's arguments.

    ``args`` may be any object with attributes of these names (bitsandbytes' way to pass a parsed command line); they
    take precedence.
    """
    given = {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size, **options}
    given.update({key: getattr(args, key) for key in (*ARGS, "block_wise") if hasattr(args, key)})
    unknown = sorted(set(given) - {*DEFAULTS, *ARGS, "block_wise"})
    if unknown:
        raise TypeError(f"{name}: unknown argument {', '.join(unknown)}; known options: {', '.join(sorted(DEFAULTS))}")
    if given.pop("block_wise", True) is not True:
        raise InvalidArgument(
            f"{name}: block_wise=False is not supported: 8-bit state always has a scale a block of 256"
        )
    return {**DEFAULTS, **given}


def check_group(name: str, group: Mapping[str, Any], betas: int, fixed_bits: int | None = None) -> None:
    """Every setting of a parameter group is one that a step can honour; ``betas`` says how many there are."""
    for key in ("lr", "eps", "weight_decay", "max_unorm"):
        value = float(group[key])
        if not (math.isfinite(value) and value >= 0.0):
            raise InvalidArgument(f"{name}: {key} is {value}, needs a finite number that is not negative")
    if len(group["betas"]) != betas:
        raise InvalidArgument(f"{name}: betas is {group['betas']}, needs {betas} numbers")
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise InvalidArgument(f"{name}: betas[{index}] is {beta}, needs 0 <= beta < 1")
    bits = group["optim_bits"]
    if bits not in (8, 32):
        raise InvalidArgument(f"{name}: optim_bits is {bits!r}, needs 8 or 32")
    if fixed_bits is not None and bits != fixed_bits:
        raise InvalidArgument(
            f"{name}: optim_bits is {bits}, this class keeps {fixed_bits}-bit state; use another class"
        )
    percentile = group["percentile_clipping"]
    if not (isinstance(percentile, int) and 1 <= percentile <= 100):
        raise InvalidArgument(f"{name}: percentile_clipping is {percentile!r}, needs a whole number from 1 to 100")
    if group["stochastic_rounding"] and group["kahan"]:
        raise InvalidArgument(f"{name}: stochastic_rounding and kahan both say how to round a parameter; choose one")
    if not (isinstance(group["seed"], int) and 0 <= group["seed"] < 2**32):
        raise InvalidArgument(f"{name}: seed is {group['seed']!r}, needs a whole number from 0 to 2**32 - 1")


def parsed_betas(betas: Any) -> tuple[float, ...]:
    """Betas as numbers; bitsandbytes also takes the text ``"(0.9, 0.999)"``."""
    if isinstance(betas, str):
        return tuple(float(beta) for beta in betas.strip("() ").split(","))
    return tuple(betas)


def refuse(name: str, argument: str, value: object, instead: str) -> None:
    """Raise if an argument that bitsandbytes takes and ignores was set."""
    if value:
        raise InvalidArgument(f"{name}: {argument}={value!r} is not supported: {instead}")
