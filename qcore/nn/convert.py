"""Replace the linear layers of a model by quantized ones."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from qcore.errors import InvalidArgument, InvalidDtype
from qcore.nn.linear4bit import Linear4bit
from qcore.nn.linear8bit import Linear8bitLt
from qcore.ops import validate

Model = TypeVar("Model", bound=nn.Module)
Quantized = Linear4bit | Linear8bitLt
Progress = Callable[[str, int, int], None]

log = logging.getLogger("qcore")

DEFAULT_SKIPS = ("lm_head",)

# Hooks are kept by handing over the very dictionaries: the handles that remove them point at these.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def convert_module_to_linear4bit(
    model: Model,
    skip_modules: Iterable[str] = DEFAULT_SKIPS,
    *,
    quant_type: str = "nf4",
    compute_dtype: torch.dtype | None = None,
    compress_statistics: bool = True,
    quant_storage: torch.dtype = torch.uint8,
    blocksize: int = 64,
    progress: Progress | None = None,
) -> Model:
    """Replace every ``nn.Linear`` in ``model`` by a quantized :class:`~qcore.nn.Linear4bit`, one at a time, in place.

    Parameters
    ----------
    model : nn.Module
        A model whose linear layers have float32, float16 or bfloat16 weights. On the meta device the layers are
        replaced and stay unquantized.
    skip_modules : iterable of str
        Names of layers to leave: a layer is skipped if one of these is its dotted name, or a part of it.
    quant_type, compute_dtype, compress_statistics, quant_storage, blocksize
        As for :class:`~qcore.nn.Linear4bit`.
    progress : callable, optional
        Called after each layer with its name, the number of layers done and their total.

    Returns
    -------
    nn.Module
        ``model``; a new layer if ``model`` itself is an ``nn.Linear``.

    Raises
    ------
    InvalidArgument
        ``model`` is no module, or ``skip_modules`` is one string or holds something else than names.
    InvalidDtype
        A weight is not float32, float16 or bfloat16; no layer has been replaced then.

    Warns
    -----
    UserWarning
        A name in ``skip_modules`` is nowhere in the model.

    Notes
    -----
    Biases, devices, training flags and hooks stay. Linear layers that share a weight share the quantized one; a layer
    whose weight belongs to another kind of module as well (a tied embedding) is left as it is, as are subclasses of
    ``nn.Linear`` and parametrized layers, whose owners rely on their weight.
    """

    def make(old: nn.Linear) -> Linear4bit:
        options = (old.bias is not None, compute_dtype, compress_statistics, quant_type, quant_storage, "meta")
        return Linear4bit(old.in_features, old.out_features, *options, blocksize=blocksize, dtype=old.weight.dtype)

    return _convert(model, skip_modules, make, progress, "convert_module_to_linear4bit")


def convert_module_to_linear8bit(
    model: Model,
    skip_modules: Iterable[str] = DEFAULT_SKIPS,
    *,
    threshold: float = 6.0,
    has_fp16_weights: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Replace every ``nn.Linear`` in ``model`` by a :class:`~qcore.nn.Linear8bitLt`, one at a time, in place.

    Parameters
    ----------
    model, skip_modules, progress
        As for :func:`convert_module_to_linear4bit`.
    threshold : float
        Magnitude from which on activations are outliers; 0 for none.
    has_fp16_weights : bool
        Keep the weights in floating point, quantize them in each forward pass, and train them.

    Returns
    -------
    nn.Module
        ``model``; a new layer if ``model`` itself is an ``nn.Linear``.

    Raises
    ------
    InvalidArgument
        ``model`` is no module, ``skip_modules`` is one string or holds something else than names, or ``threshold`` is
        negative or not finite.
    InvalidDtype
        A weight is not float32, float16 or bfloat16; no layer has been replaced then.

    Warns
    -----
    UserWarning
        A name in ``skip_modules`` is nowhere in the model.
    """
    validate.threshold("convert_module_to_linear8bit", threshold)

    def make(old: nn.Linear) -> Linear8bitLt:
        options = (old.bias is not None, has_fp16_weights, threshold, None, "meta")
        return Linear8bitLt(old.in_features, old.out_features, *options, dtype=old.weight.dtype)

    return _convert(model, skip_modules, make, progress, "convert_module_to_linear8bit")


def _convert(
    model: Model, skip: Iterable[str], make: Callable[[nn.Linear], Quantized], progress: Progress | None, op: str
) -> Model:
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"{op}: model is a {type(model).__name__}, needs a torch.nn.Module")
    skip = _skip_names(model, skip, op)
    if _is_plain(model):
        _check_dtype(op, "model", model)
        return _quantized(model, make, {})  # type: ignore[return-value,arg-type]
    layers = _candidates(model, skip)
    for path, parent, name in layers:
        _check_dtype(op, path, getattr(parent, name))
    # Layers that appear twice, or share a weight, are converted once. Their ids hold while `shared` keeps them alive.
    uses = Counter(key for _, parent, name in layers for key in _identities(getattr(parent, name)))
    shared: dict[int, tuple[nn.Linear, Quantized]] = {}
    for done, (path, parent, name) in enumerate(layers, 1):
        old = getattr(parent, name)
        new = _quantized(old, make, shared)
        shared.update({key: (old, new) for key in _identities(old) if uses[key] > 1 and key not in shared})
        setattr(parent, name, new)
        if progress is not None:
            progress(path, done, len(layers))
    return model


def _skip_names(model: nn.Module, skip: Iterable[str], op: str) -> tuple[str, ...]:
    """The names to skip; one that is nowhere in the model is probably misspelt, and warned of."""
    if isinstance(skip, str):
        raise InvalidArgument(f"{op}: skip_modules is the string {skip!r}, needs names such as [{skip!r}]")
    names = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InvalidArgument(f"{op}: skip_modules holds {wrong[0]!r}, needs names of modules; () for none")
    known = [f".{path}." for path, _ in model.named_modules()]
    absent = [name for name in names if not any(f".{name}." in path for path in known)]
    if absent and names != DEFAULT_SKIPS:
        warnings.warn(f"{op}: skip_modules names {', '.join(absent)}, which the model does not have", stacklevel=4)
    return names


def _is_plain(module: nn.Module | None) -> bool:
    """Whether ``module`` is an ``nn.Linear`` and nothing more, with a weight of its own."""
    return type(module) is nn.Linear and isinstance(module._parameters.get("weight"), nn.Parameter)


def _identities(layer: nn.Linear) -> tuple[int, int]:
    return id(layer), id(layer.weight)


def _check_dtype(op: str, path: str, layer: nn.Module) -> None:
    dtype = layer.weight.dtype
    if dtype not in validate.FLOATS:
        raise InvalidDtype(f"{op}: {path}.weight is {dtype}, needs float32, float16 or bfloat16; convert it with .to()")


def _candidates(model: nn.Module, skip: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    """Layers to convert as (dotted name, parent, name): none that is skipped or tied to a module that stays."""
    found = [
        (f"{prefix}.{name}".lstrip("."), parent, name)
        for prefix, parent in model.named_modules()
        for name, child in parent._modules.items()
        if _is_plain(child)
    ]
    found = [each for each in found if not any(f".{part}." in f".{each[0]}." for part in skip)]
    layers = {id(layer): layer for layer in (getattr(parent, name) for _, parent, name in found)}
    converted = Counter(id(layer.weight) for layer in layers.values())
    holders = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    kept = []
    for path, parent, name in found:
        key = id(getattr(parent, name).weight)
        if holders[key] > converted[key]:
            log.info("%s is not converted: its weight is tied to a module that stays", path)
        else:
            kept.append((path, parent, name))
    return kept


def _quantized(
    old: nn.Linear, make: Callable[[nn.Linear], Quantized], shared: Mapping[int, tuple[nn.Linear, Quantized]]
) -> Quantized:
    if id(old) in shared:
        return shared[id(old)][1]
    new = make(old)
    if id(old.weight) in shared:
        new.weight = shared[id(old.weight)][1].weight
    else:
        trains = bool(getattr(new.weight, "has_fp16_weights", False)) and old.weight.requires_grad
        new.weight = type(new.weight)(old.weight.detach(), requires_grad=trains, **new.weight.__dict__)
        if not (new.weight.is_meta or getattr(new.weight, "has_fp16_weights", False)):
            new.weight.quantize()
    if isinstance(new, Linear4bit):
        new.quant_state = new.weight.quant_state
    new.bias = old.bias
    new.train(old.training)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new
