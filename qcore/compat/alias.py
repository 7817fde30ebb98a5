"""``import bitsandbytes`` answered by qcore: in this process, or in every one of an environment.

A finder at the head of ``sys.meta_path`` serves the modules of ``_SERVED`` and the metadata of a distribution called
bitsandbytes: transformers asks for a spec and a version, accelerate for the metadata, PEFT for a spec. Each module is
the one of qcore itself under a second name, so no class exists twice. Nothing is written to disk.

This module imports neither torch nor the rest of qcore: a distribution that installs the shim loads it in every
interpreter of its environment.
"""

from __future__ import annotations

import sys
from importlib import import_module, invalidate_caches
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

from qcore.errors import NameTaken

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType

NAME = "bitsandbytes"
API_VERSION = "0.50.2"  # of the bitsandbytes whose names, signatures and formats these are
DISTRIBUTION = "qcore-bitsandbytes"

_SERVED = {
    "bitsandbytes": "qcore.compat.bitsandbytes",
    "bitsandbytes._ops": "qcore.compat.bitsandbytes.ops",
    "bitsandbytes.autograd": "qcore.compat.bitsandbytes.autograd",
    "bitsandbytes.autograd._functions": "qcore.autograd",
    "bitsandbytes.cextension": "qcore.compat.bitsandbytes.cextension",
    "bitsandbytes.functional": "qcore.compat.bitsandbytes.functional",
    "bitsandbytes.nn": "qcore.nn",
    "bitsandbytes.nn.modules": "qcore.nn",
    "bitsandbytes.nn.parametrize": "qcore.nn.parametrize",
    "bitsandbytes.optim": "qcore.compat.bitsandbytes.optim",
    "bitsandbytes.utils": "qcore.compat.bitsandbytes.state_packing",
}
# All of bitsandbytes.optim is one module here.
_SERVED |= {
    f"bitsandbytes.optim.{name}": "qcore.compat.bitsandbytes.optim"
    for name in ("adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd")
}
# Questions whose answers other libraries cache: "is bitsandbytes there?"
_CACHED = {
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
}


def install_as_bitsandbytes() -> None:
    """Make ``import bitsandbytes`` mean qcore, in this process and until it ends.

    Works whether or not bitsandbytes is installed, as long as it has not been imported. Calling it again does nothing.

    Raises
    ------
    NameTaken
        bitsandbytes itself has been imported already: its classes and ``torch.ops.bitsandbytes`` are in use.
    """
    if any(isinstance(finder, StandIn) and not finder.yields for finder in sys.meta_path):
        return
    loaded = sys.modules.get(NAME)
    if loaded is not None and loaded.__name__ != _SERVED[NAME]:
        raise NameTaken(
            f"install_as_bitsandbytes: bitsandbytes {getattr(loaded, '__version__', '')} from {_place(loaded)} has "
            "been imported already; call this before anything imports it (transformers, peft and accelerate do when a "
            "quantized model is loaded)"
        )
    _take_name(yields=False)


def install_for_environment() -> None:
    """Make ``import bitsandbytes`` mean qcore as the distribution ``qcore-bitsandbytes`` does at interpreter start.

    Where bitsandbytes itself is installed as well, importing either fails with a text that says which to remove.
    """
    if not any(isinstance(finder, StandIn) for finder in sys.meta_path):
        _take_name(yields=True)


def _take_name(*, yields: bool) -> None:
    sys.meta_path.insert(0, StandIn(yields=yields))
    invalidate_caches()
    for name, questions in _CACHED.items():
        for question in questions:
            forget = getattr(getattr(sys.modules.get(name), question, None), "cache_clear", None)
            if forget is not None:
                forget()
    from qcore.compat import transformers_arguments

    transformers_arguments.patch_if_loaded()


class StandIn:
    """Finder of ``bitsandbytes`` and its metadata (:pep:`302`, :mod:`importlib.metadata`).

    Parameters
    ----------
    yields : bool
        Refuse where bitsandbytes itself is installed too, instead of taking its place.
    """

    stands_in_for = NAME  # how others tell that the name is qcore's, without this module

    def __init__(self, *, yields: bool) -> None:
        self.yields = yields

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "transformers.modeling_utils":
            from qcore.compat import transformers_arguments

            return transformers_arguments.patched_spec(fullname, path)
        if fullname.partition(".")[0] != NAME:
            return None
        if fullname not in _SERVED:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: qcore stands in for bitsandbytes and has {', '.join(sorted(_SERVED))}",
                name=fullname,
            )
        package = any(name.startswith(f"{fullname}.") for name in _SERVED)
        loader = _Refusal() if self.yields and real_package() is not None else _Second(_SERVED[fullname])
        return ModuleSpec(fullname, loader, origin=_SERVED[fullname], is_package=package)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        wanted = getattr(context, "name", None)
        if wanted in (None, NAME) and not (self.yields and real_package() is not None):
            from qcore.compat.metadata import StandInDistribution

            yield StandInDistribution()


class _Second(Loader):
    """Loads a module of qcore under a second name: one module, so that no class exists twice."""

    def __init__(self, source: str) -> None:
        self._source = source

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == NAME:
            import_module("qcore.compat.bitsandbytes.optimizer_ops")  # and all other ops with it
        # The import system takes what it finds here afterwards.
        sys.modules[name] = import_module(self._source)


class _Refusal(Loader):
    """Fails to load: two packages want the name."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise NameTaken(
            f"import bitsandbytes: both bitsandbytes ({real_package()}) and {DISTRIBUTION}, which makes qcore answer "
            f"to that name, are installed; keep one: pip uninstall {DISTRIBUTION}, or pip uninstall {NAME}"
        )


def real_package() -> str | None:
    """Where bitsandbytes itself is installed; None if it is not."""
    spec = PathFinder.find_spec(NAME)
    return None if spec is None else _place(spec)


def _place(found: Any) -> str:
    """The folder or file of a module or spec, in words."""
    places = getattr(found, "submodule_search_locations", None) or getattr(found, "__path__", None)
    return next(iter(places), "an unknown place") if places else str(getattr(found, "origin", "an unknown place"))
