"""Do something once another library is imported, without importing it: neither waits for the other.

Transformers and PEFT have no entry points that a plug-in could announce itself under. ``import qcore`` therefore leaves
a finder on ``sys.meta_path`` that knows two module names, and finds their loaders where everyone else does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from qcore.errors import IncompatibleVersion

# Module that has arrived -> module of ours that makes qcore known to it as it is imported.
_WATCHED = {
    "transformers.quantizers.auto": "qcore.integrations.transformers",
    "peft.tuners.lora.model": "qcore.integrations.peft",
}


class _Following(Loader):
    """A module's own loader, followed by an import of ours."""

    def __init__(self, loader: Loader, follower: str) -> None:
        self._loader, self._follower = loader, follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _follow(module.__name__, self._follower)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        follower = _WATCHED.get(fullname)
        if follower is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Following(spec.loader, follower)
                return spec
        return None


def watch() -> None:
    """Watch for the libraries; for one that is there already, act at once."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, follower in _WATCHED.items():
        if sys.modules.get(name) is not None:
            _follow(name, follower)


def _follow(arrived: str, follower: str) -> None:
    """Import ours. Where it does not know the library's version, the library itself must go on working."""
    library = arrived.partition(".")[0]
    try:
        import_module(follower)
    except IncompatibleVersion as error:
        if library == "peft":  # whose layers can be kept from quantized ones when that is tried
            import_module("qcore.integrations.peft_refusal").install(error)
        else:
            warnings.warn(f"qcore cannot be used from {library}: {error}", stacklevel=2)
    except (ImportError, AttributeError) as error:
        warnings.warn(f"qcore cannot be used from this {library}: {error}; upgrade one of them", stacklevel=2)


def stands_in_for_bitsandbytes() -> bool:
    """Whether ``import bitsandbytes`` means qcore in this process: a finder of :mod:`qcore.compat.alias` says so."""
    return any(getattr(finder, "stands_in_for", None) == "bitsandbytes" for finder in sys.meta_path)
