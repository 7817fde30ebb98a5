"""The quantizer that Transformers calls while it loads, saves and dequantizes a model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from qcore.backend.registry import backend_for
from qcore.errors import BackendUnavailable, FormatError, InvalidArgument, InvalidDtype, Unsupported
from qcore.formats import architecture
from qcore.formats.quantization_config import GROUPED, QuantizationSettings, dtype_of
from qcore.integrations import experts, layers
from qcore.integrations.experts import ExpertList, FusedExperts
from qcore.integrations.transformers.config import QcoreConfig
from qcore.nn import Linear4bit, Linear8bitLt, LinearInt4
from qcore.ops import validate

log = logging.get_logger(__name__)

_QUANTIZED = (Linear4bit, Linear8bitLt, LinearInt4)
# Tensors beside quantized weights: of bitsandbytes and qcore, of GPTQ and AWQ. A layer has one of the first three.
_CODED = ("SCB", "weight.absmax", "qweight")
_CODES = re.compile(r"\.(SCB|weight\.absmax|weight\.quant_state\..*|qweight)$")


class QcoreQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes while loading, and loads what qcore or bitsandbytes has quantized.

    Attributes
    ----------
    experts : dict
        Fused parameters that are to be quantized, by name.
    transposed : set of str
        Layers that are ``Conv1D`` in the float model: their weights are transposed.
    dtype : torch.dtype
        Of what stays in floating point.
    broken : list of str
        What was found to be wrong with tensors while they were loaded.
    """

    requires_calibration = False
    quantization_config: QcoreConfig

    def __init__(self, quantization_config: QcoreConfig, **options: Any) -> None:
        if not isinstance(quantization_config, QcoreConfig):
            raise InvalidArgument(
                f"from_pretrained: quantization_config is {quantization_config!r}, needs an object such as "
                'QcoreConfig("nf4")'
            )
        # A copy: what loading finds out about the model is noted in it, and the caller may use theirs again.
        super().__init__(copy.deepcopy(quantization_config), **options)
        self.experts: dict[str, FusedExperts] = {}
        self.transposed: set[str] = set()
        self.dtype = torch.float32
        self.broken: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Refuse what cannot work; Transformers asks before loading, and again once it has made the map."""
        config = self.quantization_config
        if config.fp32_cpu_offload and not isinstance(device_map, dict):
            raise InvalidArgument(
                f"QcoreConfig: fp32_cpu_offload needs a device_map that names modules, came {device_map!r}; write one, "
                'as {"lm_head": "cpu", "model": 0}'
            )
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and config.format == "int8" and not (config.fp32_cpu_offload or torch.accelerator.is_available()):
            raise Unsupported(
                "device_map puts int8 layers on the disk; Accelerate brings int8 weights back through an accelerator, "
                "and there is none: use a 4-bit format, or fp32_cpu_offload=True for these modules"
            )
        for device in _devices(device_map):
            if device.type == "cuda" and not torch.cuda.is_available():
                raise BackendUnavailable(
                    f"device_map asks for {device}, but this PyTorch ({torch.__version__}) sees no such device; "
                    "leave device_map out to load on the CPU, or install a CUDA or ROCm build of PyTorch"
                )
            backend_for(device)

    def update_device_map(self, device_map: Any) -> Any:
        """Without a map the model goes to the GPU, if there is one: as with bitsandbytes."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.device("cuda", torch.cuda.current_device())}
        return device_map

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leave a tenth for the float tensor that is being quantized, and for activations."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    @property
    def quantized_element_size(self) -> float:
        """Bytes an element, statistics included."""
        settings = self.quantization_config.settings
        if settings.format == "int8":
            return 1.0
        if settings.format in GROUPED:
            return 0.5 + 3 / max(settings.group_size, 8)
        return 0.5 + (1 + 4 / 256 if settings.nested else 4) / settings.blocksize

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        if param_name in self.experts:
            return True
        path, _, key = param_name.rpartition(".")
        return key == "weight" and isinstance(model.get_submodule(path), _QUANTIZED)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **options: Any,
    ) -> None:
        config, self.dtype = self.quantization_config, dtype or torch.get_default_dtype()
        if config.placed:
            self.pre_quantized = _first_codes(checkpoint_files or []) is not None
            if self.pre_quantized:
                _take_stored(config, Path(checkpoint_files[0]).parent)  # type: ignore[index]
        elif not self.pre_quantized:
            _refuse_codes(checkpoint_files or [])
        if config.format in GROUPED and not self.pre_quantized:
            raise Unsupported(
                f"QcoreConfig: {config.format} needs a calibration text, which from_pretrained does not have; run "
                f"`qcore quantize MODEL -o OUT --format {config.format} --calibration TEXT`, and load OUT"
            )
        if self.dtype not in validate.FLOATS:
            raise InvalidDtype(
                f"from_pretrained: dtype is {self.dtype}, which quantized layers do not compute in; pass "
                "dtype=torch.float32, torch.bfloat16 or torch.float16"
            )
        skips = self._skips(model)
        if config.fp32_cpu_offload and self.pre_quantized:
            raise InvalidArgument(
                "QcoreConfig: fp32_cpu_offload needs the float checkpoint, this one is quantized; name the float one, "
                "or leave fp32_cpu_offload out: quantized modules may be on the CPU and on the disk"
            )
        if config.fp32_cpu_offload and isinstance(device_map, dict):
            places = {str(device) for device in device_map.values()}
            away = {"cpu", "disk"} if places - {"cpu", "disk"} else {"disk"}
            skips += [key for key, device in device_map.items() if str(device) in away and key]
        linear = architecture.linear_layers(model, skips)
        if config.format in GROUPED:  # their sections do not list every layer that stays in floating point
            plain = _stored(model, linear, checkpoint_files or [], ("weight",))
            linear = {name: layer for name, layer in linear.items() if name not in plain}
        if self.pre_quantized:
            self._check_asked(model, linear, checkpoint_files or [])
        takes_experts = config.settings.experts or not self.pre_quantized
        fused = experts.find(model, skips) if takes_experts else {}
        if not linear and not fused:
            name = type(model).__name__
            if architecture.linear_layers(model, []) or experts.find(model, []):
                raise InvalidArgument(
                    f"QcoreConfig: every linear layer of {name} is left out by {skips}; leave some in"
                )
            raise InvalidArgument(f"QcoreConfig: {name} has no linear layer to quantize; leave quantization_config out")
        if not self.pre_quantized:
            architecture.check_not_tied(model, linear)
            left = experts.unreachable(model, skips)
            if left:
                log.warning(f"qcore leaves {len(left)} fused expert weights in floating point, such as {left[0]}")
        config.model_dtype, config.placed = self.dtype, False
        config.settings = replace(config.settings, skip_modules=sorted(set(skips)), experts=bool(fused))
        self.transposed = {name for name, layer in linear.items() if layer.transposed}
        layers.exchange(model, linear, config.settings)
        if self.pre_quantized:
            experts.exchange(model, fused, config.settings)
            # Saved with each list, so that nothing else takes the folder for a float checkpoint.
            ignored = model._keys_to_ignore_on_load_unexpected
            kind = set if isinstance(ignored, set) else list  # Transformers before 5.9 adds a list to it
            names = [rf"^{re.escape(name)}$" for name in fused]
            model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), *names])
        else:
            self.experts = fused

    def _skips(self, model: Any) -> list[str]:
        """Patterns of the modules that stay as they are: the checkpoint's, or the defaults and those asked for."""
        config = self.quantization_config
        if config.settings.skip_modules is not None:  # of a checkpoint, or of a model whose configuration is used again
            mixers = [] if self.pre_quantized else architecture.read_by_mixers(model)
            return [*config.settings.skip_modules, *mixers]
        asked = config.skip_modules or []
        names = [*architecture.linear_layers(model, []), *experts.find(model, [])]
        architecture.check_patterns(names, asked, "QcoreConfig: skip_modules")
        quantizes_head = config.quantize_head and (config.placed or not self.pre_quantized)
        head = [] if quantizes_head else architecture.default_skips(model)
        # Another writer's folder without a list may have codes of what mixers multiply themselves.
        return [*head, *([] if self.pre_quantized else architecture.read_by_mixers(model)), *asked]

    def _check_asked(self, model: Any, quantized: Iterable[str], files: list[str]) -> None:
        """Refuse a configuration passed along with a checkpoint that asks for other layers than those with codes."""
        config, head = self.quantization_config, model.get_output_embeddings()
        name = next((name for name, module in model.named_modules() if module is head), "the output head")
        fix = "leave it out, or name the float checkpoint to quantize anew"
        if config.quantize_head and name not in quantized:
            raise InvalidArgument(
                f"from_pretrained: QcoreConfig has quantize_head=True, but {name} of the checkpoint is not quantized; "
                f"{fix}"
            )
        left = set(architecture.linear_layers(model, [])) - set(quantized)
        if config.skip_modules and (coded := _stored(model, left, files, _CODED)):
            raise InvalidArgument(
                f"from_pretrained: QcoreConfig has skip_modules={config.skip_modules}, but {min(coded)} of the "
                f"checkpoint is quantized; {fix}"
            )

    def get_quantize_ops(self) -> Any:
        from qcore.integrations.transformers.operations import Quantize

        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightConverter

        from qcore.integrations.transformers.operations import Keep, Load, part_names

        if not self.pre_quantized:
            return [WeightConverter(["weight"], "weight", [Keep()])]
        return [WeightConverter(part_names(self.quantization_config.format), "weight", [Load(self)])]

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        if self.broken:
            more = f" (and {len(self.broken) - 1} more)" if len(self.broken) > 1 else ""
            raise FormatError(f"the checkpoint does not fit: {self.broken[0]}{more}")
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, _QUANTIZED)}
        missing = [name for name, module in quantized.items() if not getattr(module.weight, "is_coded", False)]
        # A model of another class than the checkpoint's may have layers of its own: a head, which is to be trained. One
        # of a list of blocks is none.
        adds_layers = type(model).__name__ not in (model.config.architectures or [])
        inside = any(architecture.is_in_a_list(model, name) for name in missing)
        if missing and adds_layers and not inside and len(missing) < len(quantized):
            self._keep_float(model, missing)
        elif missing:
            raise FormatError(f"{len(missing)} layers have no quantized weight in the checkpoint: {missing[:4]}")
        self._keep_names(model)
        # What PEFT, Accelerate and the Trainer ask.
        model.is_loaded_in_4bit = self.quantization_config.format in ("nf4", "fp4")
        model.is_loaded_in_8bit = self.quantization_config.format == "int8"
        return model

    def _keep_float(self, model: Any, names: list[str]) -> None:
        """Leave layers that the checkpoint has no weight for as the model class begins with them."""
        for name in names:
            layer = model.get_submodule(name)
            new: nn.Module = layers.float_layer(layer, layer.weight.dtype, transposed=name in self.transposed)
            layers.keep_hook(layer, new)
            model.set_submodule(name, new)
        log.warning(f"qcore leaves {', '.join(names)} in floating point: the checkpoint has no weights for them")
        config = self.quantization_config
        config.settings = replace(config.settings, skip_modules=sorted({*(config.settings.skip_modules or ()), *names}))

    def take(self, model: Any, settings: QuantizationSettings, dtype: torch.dtype, transposed: set[str]) -> None:
        """Become the quantizer of a model in memory, whose layers have been exchanged.

        ``transposed`` names those that were ``Conv1D``.
        """
        self.quantization_config.settings, self.quantization_config.model_dtype = settings, dtype
        self.dtype, self.transposed = dtype, transposed
        model.hf_quantizer = self
        self.postprocess_model(model)

    def _keep_names(self, model: Any) -> None:
        """Let the model be saved under its own names where a conversion back would cut codes to pieces."""
        from transformers.core_model_loading import WeightConverter

        quantized = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _QUANTIZED)]
        model._weight_conversions = [
            each
            for each in getattr(model, "_weight_conversions", None) or []
            if not isinstance(each, WeightConverter)
            or not any(target in name for target in each.target_patterns for name in quantized)
        ]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """With fused experts: shapes under the fused names and flat int8 codes, which no plain layer takes."""
        if not self.quantization_config.settings.experts:
            return None, {}
        state: dict[str, Tensor] = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, ExpertList):
                state[name] = torch.tensor(module.fused_shape)
            elif isinstance(module, Linear8bitLt):
                state[f"{name}.weight"] = state[f"{name}.weight"].reshape(-1)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Saving leaves a string in the model's configuration, which Transformers then passes here.
        dtype = dtype_of(dtype or self.dtype, "dtype")
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, _QUANTIZED)}
        away = [name for name, module in quantized.items() if module.weight.is_meta]
        if away:
            raise Unsupported(f"dequantize: {len(away)} layers are offloaded, such as {away[0]}; load without offload")
        fused = {name: module for name, module in model.named_modules() if isinstance(module, ExpertList)}
        for name in fused:
            path, _, key = name.rpartition(".")
            module: Any = model.get_submodule(path)
            experts.restore(module, key, dtype)
            module.config._experts_implementation_internal = "eager"
        for name, layer in quantized.items():
            if name.rpartition(".")[0] in fused:
                continue
            new: nn.Module = layers.float_layer(layer, dtype, transposed=name in self.transposed)
            layers.keep_hook(layer, new)
            model.set_submodule(name, new)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        return model.to(dtype) if dtype != self.dtype else model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: the quantized weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_codes(files: list[str]) -> None:
    """Transformers would cast int8 codes to numbers before anything of ours sees them."""
    found = _first_codes(files)
    if found is not None:
        raise FormatError(
            f"{found[0]}: quantized already ({found[1]}), but the folder's config.json has no quantization_config; "
            "put that section back, or name the float checkpoint"
        )


def _first_codes(files: list[str]) -> tuple[str, str] | None:
    """The first file that has a tensor of a quantized layer, and its name."""
    for path in files:
        for name in _tensor_names(Path(path)):
            if _CODES.search(name):
                return path, name
    return None


def _take_stored(config: QcoreConfig, folder: Path) -> None:
    """Let ``config`` be what the codes in ``folder`` were made with, as its section says.

    Raises
    ------
    InvalidArgument
        ``config`` asks for something else.
    """
    path = folder / "config.json"
    section = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") if path.is_file() else None
    if section is not None:
        stored: Any = QcoreConfig.from_dict(section)
        config.__dict__.update(vars(stored.with_arguments(config)))


def _tensor_names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    if path.suffix == ".bin":
        return list(torch.load(path, map_location="meta", weights_only=True))
    return []


def _stored(model: Any, names: Iterable[str], files: list[str], kinds: tuple[str, ...]) -> set[str]:
    """Those of the layers ``names`` of which the checkpoint has a tensor of ``kinds``, such as ``weight``."""
    stored = {name for path in map(Path, files) for name in _tensor_names(path)}
    prefix = f"{model.base_model_prefix}."
    spellings = {name: (name, prefix + name, name.removeprefix(prefix)) for name in names}
    return {
        name for name, each in spellings.items() if any(f"{one}.{kind}" in stored for one in each for kind in kinds)
    }


def _devices(device_map: Any) -> list[torch.device]:
    """The devices that a map names itself; "auto" and the like name none."""
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    found = []
    for value in values:
        if value in (None, "disk", "auto", "balanced", "balanced_low_0", "sequential"):
            continue
        found.append(torch.device("cuda", value) if isinstance(value, int) else torch.device(value))
    return found
