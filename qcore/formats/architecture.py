"""The model class behind a checkpoint, built without weights: which parameters it has and which are linear layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcore.errors import FormatError, InvalidArgument, Unsupported

_LIKE_LINEAR = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
FUSED_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def empty_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Build the Transformers model of ``config`` with parameters on the meta device and real buffers, in eval mode.

    The class is the first of ``config["architectures"]`` that there is; where the file names none, the causal language
    model of its ``model_type``.

    Raises
    ------
    FormatError
        The installed Transformers does not know the model, or the configuration is inconsistent.
    """
    import transformers
    from accelerate import init_empty_weights

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise FormatError(
            f"config.json: model_type {model_type!r} is unknown to Transformers {transformers.__version__}; "
            "upgrade it, or check the file (models with code of their own are not supported)"
        )
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    default = torch.get_default_dtype()
    try:
        parsed = transformers.CONFIG_MAPPING[model_type].from_dict(values)
        model_class = _model_class(transformers, parsed)
        torch.set_default_dtype(dtype)
        with init_empty_weights(include_buffers=False):
            model = model_class(parsed)
    except FormatError:
        raise
    except Exception as error:  # the file is data, and Transformers' own checks of it raise anything
        raise FormatError(f"config.json: makes no model of type {model_type!r}: {error}") from error
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def _model_class(transformers: Any, config: Any) -> Any:
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if config.architectures:
        raise FormatError(
            f"config.json: architectures is {config.architectures}, which Transformers {transformers.__version__} "
            "does not have; upgrade it, or correct the name"
        )
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FormatError(
            f"config.json: names no architectures, and {config.model_type!r} has no causal language model"
        )
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def checkpoint_names(model: Any, names: Iterable[str], where: str) -> dict[str, str]:
    """The model's name for each tensor of a checkpoint: classes were renamed inside, others wrote without a prefix.

    ``where`` is the checkpoint, for messages.

    Raises
    ------
    Unsupported
        Transformers makes one parameter of several of these tensors.
    FormatError
        Two of them are the same one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    known = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    pieces: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings count
        new, converter = name, None
        if name not in known:
            new, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converter is not None and new in known:
            pieces[name] = new
            continue
        if new in taken:
            raise FormatError(f"{where}: {taken[new]} and {name} are both {new} of {type(model).__name__}")
        found[name], taken[new] = new, name
    if pieces:
        name, new = next(iter(pieces.items()))
        raise Unsupported(
            f"{where}: {type(model).__name__} of this Transformers keeps {len(pieces)} of the tensors fused, such as "
            f"{name} in {new}, which is not done here; load the folder with AutoModelForCausalLM.from_pretrained(..., "
            'quantization_config=qcore.QcoreConfig("nf4")), which quantizes them too, and save_pretrained'
        )
    return found


def fused_weights(model: Any) -> list[str]:
    """Names of the parameters that hold a matrix for each expert; they are no linear layers."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rpartition(".")[2] in FUSED_PROJECTIONS
    ]


@dataclass(frozen=True)
class Linear:
    """A linear layer: ``shape`` is (out, in). A ``Conv1D`` layer keeps its weight transposed in float checkpoints."""

    name: str
    shape: tuple[int, int]
    bias: bool
    transposed: bool


def linear_layers(model: Any, skip_modules: Sequence[str]) -> dict[str, Linear]:
    """The layers that Transformers would replace when it loads a bitsandbytes checkpoint with these skips.

    Falcon's, which are a class of their own since its products were written out by hand, too: Transformers 4 replaced
    them, Transformers 5 replaces no subclass of ``nn.Linear``.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    # As its quantizer does: modules that the class wants in float32 stay out.
    patterns = [*skip_modules, *(model._keep_in_fp32_modules or [])]
    layers = {}
    for name, module in model.named_modules():
        transposed = isinstance(module, Conv1D)
        if not (transposed or _is_linear(module)) or not should_convert_module(name, patterns):
            continue
        rows, columns = module.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        layers[name] = Linear(name, shape, module.bias is not None, transposed)
    return layers


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether ``module`` computes what ``nn.Linear`` does; other subclasses (routers) may compute anything."""
    kind = type(module)
    return kind is torch.nn.Linear or f"{kind.__module__}.{kind.__qualname__}" in _LIKE_LINEAR


def check_patterns(names: Sequence[str], patterns: Iterable[str], caller: str) -> None:
    """Refuse patterns of :func:`linear_layers` that are no regular expression, or match none of ``names``.

    Raises
    ------
    InvalidArgument
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    for pattern in patterns:
        try:
            matched = any(not should_convert_module(name, [pattern]) for name in names)
        except re.error as error:
            raise InvalidArgument(
                f"{caller} has {pattern!r}, which is no regular expression: {error}; "
                "write the start or the end of a name, without *"
            ) from error
        if not matched:
            raise InvalidArgument(
                f"{caller} has {pattern!r}, which matches no layer; they are called like "
                f"{examples(names) or '(there is none)'}"
            )


def in_blocks(model: Any, skips: Sequence[str]) -> tuple[dict[str, Linear], list[str]]:
    """The layers of :func:`linear_layers` in the model's blocks, which GPTQ and AWQ quantize; the names of the others.

    Raises
    ------
    InvalidArgument
        As :func:`block_list`.
    """
    path = block_list(model)
    found = linear_layers(model, skips)
    chosen = {name: layer for name, layer in found.items() if name.startswith(f"{path}.")}
    return chosen, [name for name in found if name not in chosen]


def default_skips(model: Any) -> list[str]:
    """Modules that stay in floating point unless told otherwise: the output head, and whatever shares its weight."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted(get_keys_to_not_convert(model))


def read_by_mixers(model: Any) -> list[str]:
    """Small layers of Mamba's, Falcon Mamba's and Jamba's mixers, whose weight is multiplied without calling the layer.

    ``dt_proj`` always, ``x_proj`` in the kernel of mamba_ssm that fuses a mixer in training on a GPU. That kernel, and
    those of later models, read the large ``out_proj`` too: it is quantized, so they refuse it.
    """
    return [
        f"{name}.{layer}"
        for name, module in model.named_modules()
        if hasattr(module, "A_log") and hasattr(module, "dt_proj")
        for layer in ("dt_proj", "x_proj")
    ]


def is_in_a_list(model: torch.nn.Module, name: str) -> bool:
    """Whether a module is inside a list of modules, as the layers of a model's blocks are."""
    parts = name.split(".")
    enclosing = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any(isinstance(module, torch.nn.ModuleList) for module in enclosing)


def check_not_tied(model: Any, layers: Iterable[str]) -> None:
    """Refuse to quantize a layer that shares its weight with another module.

    Raises
    ------
    InvalidArgument
        One of ``layers`` is tied.
    """
    chosen = set(layers)
    for one, other in dict(model.all_tied_weights_keys).items():
        if {one.removesuffix(".weight"), other.removesuffix(".weight")} & chosen:
            raise InvalidArgument(f"quantize: {one} and {other} share their values and cannot be quantized; skip them")


def resolve_skips(model: Any, globs: Iterable[str], skipped_anyway: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers that ``globs`` match: a full name, its last part, or that of an enclosing module.

    Raises
    ------
    InvalidArgument
        A glob matches no linear layer, and no module of ``skipped_anyway`` either.
    """
    names = list(linear_layers(model, []))
    chosen: list[str] = []
    for glob in globs:
        matched = [name for name in names if _matches(name, glob)]
        if not matched and not any(_matches(name, glob) for name in skipped_anyway):
            raise InvalidArgument(f"--skip {glob}: matches no linear layer; they are called like {examples(names)}")
        chosen += matched
    return sorted(set(chosen))


def _matches(name: str, glob: str) -> bool:
    parts = name.split(".")
    enclosing = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return fnmatch.fnmatchcase(parts[-1], glob) or any(fnmatch.fnmatchcase(prefix, glob) for prefix in enclosing)


def examples(names: Sequence[str]) -> str:
    first_of_kind = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    return ", ".join(sorted(first_of_kind.values())[:8])


def kind_of(name: str) -> str:
    """The kind of layer that a parameter belongs to: ``model.layers.3.mlp.up_proj.weight`` is of ``up_proj``."""
    *path, leaf = name.split(".")
    named = [part for part in path if not part.isdigit()]
    kind = named[-1] if named else leaf
    return kind if leaf == "weight" else f"{kind}.{leaf}"


def is_parameter(model: Any, name: str) -> bool:
    """Whether ``name`` is one of the model's parameters: no buffer, and not unknown."""
    module, _, leaf = name.rpartition(".")
    try:
        return leaf in model.get_submodule(module)._parameters
    except AttributeError:
        return False


def stays_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the model class wants this parameter in float32 where the rest is in ``dtype``."""
    wanted = set(model._keep_in_fp32_modules_strict or [])
    if dtype == torch.float16:
        wanted |= set(model._keep_in_fp32_modules or [])
    return any(part in name.split(".") for part in wanted)


def matches_any(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of a model class's regular expressions (keys to ignore) is found in ``name``."""
    return any(re.search(pattern, name) for pattern in patterns or [])


def block_list(model: Any) -> str:
    """Name of the list of blocks: of the module lists, the one with the most linear layers below it.

    Raises
    ------
    InvalidArgument
        The model has no list of modules with linear layers.
    """
    layers = list(linear_layers(model, []))
    lists = [name for name, module in model.named_modules() if type(module) is torch.nn.ModuleList]
    counts = {name: sum(layer.startswith(f"{name}.") for layer in layers) for name in lists}
    if not any(counts.values()):
        raise InvalidArgument(f"quantize: {type(model).__name__} has no list of blocks with linear layers")
    return str(max(counts, key=lambda name: counts[name]))
