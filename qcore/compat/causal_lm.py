"""What the model classes of AutoGPTQ, GPTQModel and AutoAWQ have in common: a Transformers model in a wrapper."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcore.errors import InvalidArgument, Unsupported
from qcore.formats.grouped import FILES
from qcore.formats.plan import Options
from qcore.formats.source import read_json
from qcore.integrations.calibration_data import token_batches
from qcore.integrations.quantize_model import quantize_model
from qcore.integrations.transformers import QcoreConfig

# Arguments of the libraries that choose among their own kernels; qcore's backend chooses by itself.
_KERNELS = re.compile(
    "use_(triton|tritonv2|marlin|qigen|exllama|exllama_v2|cuda_fp16)|inject_fused_(attention|mlp)|"
    "disable_exllama(v2)?|warmup_triton|autotune_warmup_after_quantized|fuse_(layers|qkv)|backend"
)

# Where on the hub a checkpoint is, and how it is fetched: for Transformers.
_HUB = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "proxies", "token")


class QuantizableCausalLM(nn.Module):
    """A causal language model that is quantized, or will be; whatever is not here is asked of ``model``.

    Attributes
    ----------
    model : PreTrainedModel
    quantized : bool
    """

    def __init__(self, model: Any, *, quantized: bool) -> None:
        super().__init__()
        self.model, self.quantized = model, quantized

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, without gradients."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def _calibrate(
        self, data: Any, tokenizer: Any, options: Options, samples: int, length: int, skip_modules: Iterable[str] = ()
    ) -> None:
        who = f"{type(self).__name__}.quantize"
        if self.quantized:
            raise InvalidArgument(f"{who}: the model is quantized already; load the float checkpoint")
        most = getattr(self.model.config, "max_position_embeddings", None) or length
        batches = token_batches(data, tokenizer, samples=samples, length=min(length, most), caller=who)
        device = self.model.get_input_embeddings().weight.device
        quantize_model(self.model, [batch.to(device) for batch in batches], options, skip_modules=skip_modules)
        self.quantized = True

    def _save(self, folder: str | Path, **kwargs: Any) -> None:
        if not self.quantized:
            raise InvalidArgument(f"{type(self).__name__}: there is nothing quantized to save; call quantize() first")
        self.model.save_pretrained(folder, **kwargs)


def load_float(name: str | Path, who: str, **kwargs: Any) -> Any:
    """The float model called ``name``, in the dtype of its checkpoint unless another is asked for.

    Raises
    ------
    InvalidArgument
        It is quantized already.
    """
    model = _load(name, kwargs)
    if getattr(model, "hf_quantizer", None) is not None:
        raise InvalidArgument(f"{who}: {name} is quantized already; use from_quantized, or name the float checkpoint")
    return model


def load_quantized(
    name: str | Path,
    who: str,
    formats: tuple[str, ...],
    *,
    basename: str | None = None,
    section: dict[str, Any] | None = None,
    hub: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """The model called ``name``, which is a checkpoint in one of ``formats``.

    ``basename`` is the name of its weight file, with or without ``.safetensors``; ``section`` says how it is quantized,
    instead of what stands beside it; ``hub`` is of :func:`hub_arguments`.

    Raises
    ------
    InvalidArgument
        It is a float checkpoint, or in another format, or has no such file.
    """
    from transformers import AutoConfig

    name = str(name).strip()
    config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    section = section or _section(name, config, hub)
    method = None if section is None else section.get("quant_method")
    if section is None or method not in formats:
        raise InvalidArgument(f"{who}: {name} is no checkpoint in the format {' or '.join(formats)}")
    config.quantization_config = section
    file = _weight_file(name, who, basename, section, hub)
    if file is not None:
        config.transformers_weights = file
    # Passed along, so that qcore loads it where the library that wrote it is installed too.
    model = _load(name, {**kwargs, **hub, "config": config, "quantization_config": QcoreConfig(method)})
    model.config.transformers_weights = None  # what it is saved as has the usual name
    return model


def hub_arguments(who: str, name: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """Take out of ``given`` what says where on the hub a checkpoint is.

    Raises
    ------
    InvalidArgument
        A revision of a folder.
    """
    given.pop("resume_download", None)  # every download goes on where it stopped
    token = given.pop("use_auth_token", None)
    found = {key: value for key in _HUB if (value := given.pop(key, None)) is not None}
    if token is not None:
        found.setdefault("token", token)
    if Path(str(name).strip()).is_dir() and found.pop("revision", "main") != "main":
        raise InvalidArgument(f"{who}: {name} is a folder, which has no revisions; leave revision out")
    return found


def _weight_file(name: str, who: str, basename: str | None, section: dict[str, Any], hub: dict[str, Any]) -> str | None:
    """The file that the weights are in; None for the usual names, which Transformers finds."""
    hub = {key: value for key, value in hub.items() if key != "force_download"}  # once is enough: when it is loaded
    guesses = [section.get("model_file_base_name"), "model"]
    if section["quant_method"] == "gptq":  # AutoGPTQ's own name
        guesses.append(f"gptq_model-{section.get('bits')}bit-{section.get('group_size')}g")
    for guess in guesses if basename is None else [basename]:
        for ending in (".safetensors", ".safetensors.index.json"):
            file = f"{str(guess).removesuffix('.safetensors')}{ending}"
            if guess and _found(name, file, hub) is not None:
                return None if guess == "model" else file
    if basename is not None:
        raise InvalidArgument(f"{who}: {name} has no file {basename.removesuffix('.safetensors')}.safetensors")
    return None


def _found(name: str, file: str, hub: dict[str, Any]) -> str | None:
    from transformers.utils import cached_file

    path: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    return path


def _section(name: str, config: Any, hub: dict[str, Any]) -> dict[str, Any] | None:
    """How a checkpoint is quantized; older writers said it in a file of its own."""
    for holder in (config, config.get_text_config(decoder=True)):
        section = getattr(holder, "quantization_config", None)
        if section is not None:
            return dict(section if isinstance(section, dict) else section.to_dict())
    for method, file in FILES.items():
        path = _found(name, file, hub)
        if path is not None:
            return {"quant_method": method, **dict(read_json(Path(path)))}
    return None


def _load(name: str | Path, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    device = kwargs.pop("device", None)
    if device is not None and kwargs.get("device_map") is not None:
        raise InvalidArgument(f"{name}: device and device_map both say where the model goes; pass one of them")
    if device is not None:
        kwargs["device_map"] = {"": torch.device(device)}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    dtype = kwargs.pop("torch_dtype", None)
    return AutoModelForCausalLM.from_pretrained(str(name).strip(), **{"dtype": dtype or "auto", **kwargs})


def refuse(who: str, given: dict[str, Any], allowed: dict[str, Any] | None = None) -> None:
    """Refuse arguments that would otherwise be ignored.

    ``allowed`` maps names to the values that mean nothing here; a kernel that is switched off means nothing either.

    Raises
    ------
    Unsupported
        One is set to anything else.
    """
    for name, value in given.items():
        if value is None or (name in (allowed or {}) and value == (allowed or {})[name]):
            continue
        if _KERNELS.fullmatch(name):
            if value is False or name.startswith("disable_") or str(getattr(value, "value", value)) == "auto":
                continue
            raise Unsupported(
                f"{who}: {name}={value!r} picks another library's kernel; leave it out, qcore has its own"
            )
        raise Unsupported(f"{who}: {name}={value!r} is not supported; leave it out")
