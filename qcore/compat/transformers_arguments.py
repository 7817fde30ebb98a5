"""``from_pretrained(..., load_in_8bit=True)``, which transformers 5 no longer takes, put back while the shim is active.

The two arguments become a ``BitsAndBytesConfig``, with a warning that gives the new spelling.
"""

from __future__ import annotations

import functools
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import TYPE_CHECKING, Any

from qcore.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_MODULE = "transformers.modeling_utils"
_ARGUMENTS = ("load_in_8bit", "load_in_4bit")
_MARK = "_takes_load_in_arguments"


def patch_if_loaded() -> None:
    """Patch transformers where it has been imported already."""
    if _MODULE in sys.modules:
        _patch(sys.modules[_MODULE])


def patched_spec(fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """The spec of transformers' module, which is patched once it has run; None leaves it to the other finders."""
    spec = PathFinder.find_spec(fullname, path)
    if spec is None or type(spec.loader) is not SourceFileLoader:
        return None
    spec.loader = _PatchingLoader(spec.loader.name, spec.loader.path)
    return spec


class _PatchingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _patch(module)


def _patch(module: ModuleType) -> None:
    model_class = module.PreTrainedModel
    original = model_class.from_pretrained.__func__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(name in kwargs for name in _ARGUMENTS):
            kwargs = _with_config(kwargs)
        return original(cls, *args, **kwargs)

    setattr(from_pretrained, _MARK, True)
    model_class.from_pretrained = classmethod(from_pretrained)


def _with_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with the two arguments turned into a quantization_config, if they ask for one."""
    from transformers import BitsAndBytesConfig

    asked = {name: bool(kwargs[name]) for name in _ARGUMENTS if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in _ARGUMENTS}
    config = rest.get("quantization_config")
    if config is not None:
        differ = [name for name, value in asked.items() if value and not getattr(config, name, False)]
        if differ:
            raise InvalidArgument(
                f"from_pretrained: {differ[0]}=True contradicts the quantization_config given with it; drop one"
            )
        return rest
    if any(asked.values()):
        spelling = ", ".join(f"{name}=True" for name, value in asked.items() if value)
        warnings.warn(
            f"from_pretrained({spelling}) is gone from transformers 5; write quantization_config="
            f"BitsAndBytesConfig({spelling}), which it is taken for here",
            FutureWarning,
            stacklevel=3,
        )
        rest["quantization_config"] = BitsAndBytesConfig(**asked)
    return rest
