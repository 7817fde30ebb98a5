"""Load a checkpoint, quantized or not, into a Transformers model with qcore's layers; bitsandbytes is not needed.

The model is built with its parameters on the meta device, its linear layers are exchanged for quantized ones, and every
tensor is read from the safetensors files into memory of its own, so the peak is the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import FormatError
from qcore.formats import architecture, grouped
from qcore.formats.plan import FLOATS
from qcore.formats.quantization_config import GROUPED, read_section
from qcore.formats.source import SafetensorsSource
from qcore.integrations import experts, layers
from qcore.integrations.experts import ExpertList
from qcore.nn import Linear4bit, Linear8bitLt, LinearInt4


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Load the checkpoint in folder ``path``.

    Parameters
    ----------
    path : str or Path
        A folder with ``config.json`` and safetensors files: float, or in bitsandbytes' layout (nf4, fp4, int8),
        or that of GPTQ or AWQ.
    dtype : torch.dtype, optional
        Of everything that is not quantized, and of the computation; the checkpoint's own if None.
    device : torch.device or str

    Returns
    -------
    nn.Module
        The Transformers model in eval mode, with :class:`qcore.nn.Linear4bit`, ``Linear8bitLt`` or ``LinearInt4`` where
        the checkpoint is quantized, and ``generation_config`` from the folder if it has one.

    Raises
    ------
    FormatError
        The folder is incomplete, truncated or inconsistent.
    Unsupported
        Float weights of experts that Transformers fuses to one parameter while it loads.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder")
    source = SafetensorsSource(path)
    try:
        config = source.config()
        section = grouped.section_of(path, config)
        quantization = None if section is None else read_section(section)
        own = FLOATS.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), torch.float32)
        model: nn.Module = architecture.empty_model(config, dtype or own)
        if quantization is not None:
            settings = replace(quantization, compute_dtype=dtype or quantization.compute_dtype)
            skips = architecture.default_skips(model) if settings.skip_modules is None else settings.skip_modules
            linear = architecture.linear_layers(model, skips)
            if settings.format in GROUPED:  # the tensors say which layers they quantized
                linear = {name: layer for name, layer in linear.items() if f"{name}.qweight" in source.tensors}
            layers.exchange(model, linear, settings)
            if settings.experts:
                experts.exchange(model, experts.find(model, skips), settings)
        _fill(model, source, dtype or own, torch.device(device))
    finally:
        source.close()
    _generation_config(model, path)
    return model


def _fill(model: Any, source: SafetensorsSource, dtype: torch.dtype, device: torch.device) -> None:
    """Read every tensor of the source into its place; whatever the model lacks or the source lacks is an error."""
    spelled = architecture.checkpoint_names(model, source.tensors, str(source.path))
    names_of = {new: name for name, new in spelled.items()}
    left = set(names_of)

    def read(name: str) -> Tensor:
        return source.read(names_of[name])

    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (Linear4bit, Linear8bitLt, LinearInt4)):
            names = _names_below(left, prefix)
            entries = {key[len(prefix) :]: _placed(read(key), None, device) for key in names}
            if "bias" in entries:
                entries["bias"] = entries["bias"].to(dtype)
            if not entries:
                raise FormatError(f"{source.path}: the weights of {name} are missing")
            try:
                module.load_state_dict(entries, strict=True, assign=True)
            except (RuntimeError, FormatError) as error:
                raise FormatError(f"{source.path}: {name}: {error}") from error
            left.difference_update(names)
        elif isinstance(module, ExpertList):
            if name in left:
                left.remove(name)
                experts.check_shape(f"{source.path}: {name}", read(name), module)
        else:
            left.difference_update(_fill_plain(model, module, prefix, left, read, dtype, device))
    model.tie_weights(missing_keys=_meta_parameters(model), recompute_mapping=False)
    missing = _meta_parameters(model)
    unknown = [key for key in left if not architecture.matches_any(key, model._keys_to_ignore_on_load_unexpected)]
    for what, names in (("missing", sorted(missing)), ("not in the model", sorted(unknown))):
        if names:
            raise FormatError(f"{source.path}: {len(names)} tensors are {what}: {', '.join(names[:4])}")


def _fill_plain(
    model: Any,
    module: nn.Module,
    prefix: str,
    left: Iterable[str],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    done = []
    for key, old in [*module._parameters.items(), *module._buffers.items()]:
        full = prefix + key
        if old is None:
            continue
        if full not in left:
            if key in module._buffers:
                module._buffers[key] = old.to(device)
            continue
        target = torch.float32 if architecture.stays_float32(model, full, dtype) else dtype
        value = _placed(read(full), target, device)
        if value.shape != old.shape:
            raise FormatError(f"{full} has shape {tuple(value.shape)}, the model {tuple(old.shape)}")
        if key in module._buffers:
            module._buffers[key] = value
        elif not value.is_floating_point():
            raise FormatError(f"{full} is {value.dtype} where the model has a float weight")
        else:
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        done.append(full)
    return done


def _names_below(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _placed(value: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() else None)


def _meta_parameters(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_meta}


def _generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise FormatError(f"{path / 'generation_config.json'}: {error}") from error
