"""The metadata of the distribution that qcore stands in for, and what is installed under its name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path

from qcore.compat.alias import API_VERSION, DISTRIBUTION, NAME, StandIn, real_package


def stand_in_version() -> str:
    """bitsandbytes' version whose interface this is, and qcore's: ``0.50.2+qcore.0.1.0``."""
    # Whoever lists an environment's distributions comes by here: torch does, when it is imported.
    own = _installed("qcore-quant")
    return f"{API_VERSION}+qcore" if own is None else f"{API_VERSION}+qcore.{own}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class StandInDistribution(Distribution):
    """What :mod:`importlib.metadata` says of ``bitsandbytes`` while qcore stands in for it."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {stand_in_version()}\nSummary: served by qcore\n"
        return f"{NAME}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: object) -> Path:
        return Path(__file__).parents[2] / str(path)


@dataclass(frozen=True)
class ShimStatus:
    """What ``import bitsandbytes`` means in this environment.

    Attributes
    ----------
    distribution : str, optional
        Version of the installed ``qcore-bitsandbytes``; None if it is not installed.
    real : str, optional
        Where bitsandbytes itself is installed; None if it is not.
    active : bool
        qcore answers to the name in this process.
    resolves_to : str
        What ``import bitsandbytes`` does, in words.
    undo : str
        What to do to have it otherwise.
    """

    distribution: str | None
    real: str | None
    active: bool
    resolves_to: str
    undo: str


def shim_status() -> ShimStatus:
    """What ``import bitsandbytes`` means in this process, and how to change it."""
    distribution = _installed(DISTRIBUTION)
    real = real_package()
    finders = [finder for finder in sys.meta_path if isinstance(finder, StandIn)]
    refused = bool(finders) and all(finder.yields for finder in finders) and real is not None
    active = bool(finders) and not refused
    if refused:
        resolves_to = "an error: bitsandbytes and its stand-in are both installed"
        undo = f"keep one: pip uninstall {DISTRIBUTION}, or pip uninstall {NAME}"
    elif active:
        resolves_to = f"qcore, as bitsandbytes {stand_in_version()}"
        undo = (
            f"pip uninstall {DISTRIBUTION}"
            if distribution is not None
            else "a program called qcore.install_as_bitsandbytes(); it lasts until that process ends"
        )
    elif real is not None:
        resolves_to = f"bitsandbytes itself, in {real}"
        undo = f"pip uninstall {NAME}, then install integrations/bitsandbytes_shim; or qcore.install_as_bitsandbytes()"
    else:
        resolves_to = "nothing: ModuleNotFoundError"
        undo = "install integrations/bitsandbytes_shim, or call qcore.install_as_bitsandbytes() in the program"
    return ShimStatus(distribution, real, active, resolves_to, undo)
