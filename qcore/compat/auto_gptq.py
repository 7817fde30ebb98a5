"""AutoGPTQ's interface over qcore: ``from qcore.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig``.

Programs written for AutoGPTQ 0.7 quantize with qcore's GPTQ, on CPUs too, and write the same checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qcore.compat.causal_lm import QuantizableCausalLM, hub_arguments, load_float, load_quantized, refuse
from qcore.errors import InvalidArgument, Unsupported
from qcore.formats.grouped import FILES
from qcore.formats.plan import Options

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig"]


@dataclass
class BaseQuantizeConfig:
    """How to quantize; names, order and defaults are AutoGPTQ's.

    Parameters
    ----------
    bits
        4: other widths are not supported.
    group_size
        Inputs a scale: -1 for one scale a row, or a multiple of 8.
    damp_percent
        Share of the Hessian's mean diagonal that is added to it, between 0 and 1.
    desc_act
        Quantize columns by falling importance, and let groups be runs of that order.
    static_groups
        False: scales are chosen when their columns are reached.
    sym
        Without zero points.
    true_sequential
        Let layers of a block see the errors of those in front of them.
    quant_method, checkpoint_format
        "gptq"; "gptq_v2" stores zero points as they are, and is what a model with zero points is written in.
    model_name_or_path, model_file_base_name
        Where a quantized model is; noted by ``save_quantized``.

    Raises
    ------
    InvalidArgument, Unsupported
        A value is not allowed, or has no meaning here.
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    quant_method: str = "gptq"
    checkpoint_format: str = "gptq"
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        who = type(self).__name__
        if self.bits != 4:
            raise Unsupported(f"{who}: bits is {self.bits}; qcore quantizes to 4")
        if self.static_groups:
            raise Unsupported(f"{who}: static_groups is not supported; leave it out")
        if self.quant_method != "gptq" or self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise Unsupported(
                f"{who}: {self.quant_method} in {self.checkpoint_format}; 'gptq' and 'gptq_v2' are written"
            )
        if self.checkpoint_format == "gptq_v2" and self.sym:
            raise Unsupported(f"{who}: checkpoint_format 'gptq_v2' is for sym=False; a symmetric model is 'gptq'")
        self._options()

    def _options(self) -> Options:
        return Options(
            "gptq",
            group_size=self.group_size,
            symmetric=self.sym,
            act_order=self.desc_act,
            damping=self.damp_percent,
            true_sequential=self.true_sequential,
            calibration="examples",
        )

    def to_dict(self) -> dict[str, Any]:
        """Every value by its name."""
        return asdict(self)

    def save_pretrained(self, save_dir: str | Path) -> None:
        """Write ``quantize_config.json`` into ``save_dir``."""
        text = json.dumps(self.to_dict(), indent=2)
        (Path(save_dir) / FILES["gptq"]).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path) -> BaseQuantizeConfig:
        """Read ``quantize_config.json`` of the folder ``save_dir``; other entries than these are left out."""
        path = Path(save_dir) / FILES["gptq"]
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"BaseQuantizeConfig.from_pretrained: {path} cannot be read: {error}") from error
        return cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})


class AutoGPTQForCausalLM(QuantizableCausalLM):
    """A causal language model to quantize by GPTQ, or quantized by it; see :meth:`from_pretrained`.

    Attributes
    ----------
    model : PreTrainedModel
    quantize_config : BaseQuantizeConfig, optional
        None for a checkpoint that was loaded: ``model.config.quantization_config`` says how it is quantized.
    """

    quantize_config: BaseQuantizeConfig | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: dict[Any, Any] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> AutoGPTQForCausalLM:
        """Load a float model, to be quantized.

        Parameters
        ----------
        pretrained_model_name_or_path : str or Path
        quantize_config : BaseQuantizeConfig
        max_memory, trust_remote_code, torch_dtype, **kwargs
            For Transformers' ``from_pretrained``. Without ``torch_dtype`` the model keeps the dtype of its checkpoint
            (AutoGPTQ: float16).

        Raises
        ------
        InvalidArgument
            No ``BaseQuantizeConfig``, or the model is quantized already.
        """
        if not isinstance(quantize_config, BaseQuantizeConfig):
            raise InvalidArgument(f"{cls.__name__}: quantize_config is {quantize_config!r}, needs a BaseQuantizeConfig")
        model = load_float(
            pretrained_model_name_or_path,
            f"{cls.__name__}.from_pretrained",
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            torch_dtype=torch_dtype,
            **kwargs,
        )
        found = cls(model, quantized=False)
        found.quantize_config = quantize_config
        return found

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | None = None,
        quantize_config: BaseQuantizeConfig | dict[str, Any] | None = None,
        model_basename: str | None = None,
        **others: Any,
    ) -> AutoGPTQForCausalLM:
        """Load a GPTQ or AWQ checkpoint of 4 bits.

        Parameters
        ----------
        model_name_or_path : str or Path
        device_map, max_memory, device
            ``device`` is where the whole model goes, or the other two spread it.
        use_safetensors : bool
            True: pickled weights are not read.
        trust_remote_code, torch_dtype
            For Transformers' ``from_pretrained``.
        quantize_config : BaseQuantizeConfig or dict, optional
            How the checkpoint is quantized, instead of what its folder says.
        model_basename : str, optional
            Name of the weight file, without ``.safetensors``. Without it that in ``quantize_config.json``, the usual
            one, or AutoGPTQ's ``gptq_model-4bit-128g`` (its bits and group size).
        **others
            ``revision``, ``subfolder``, ``cache_dir``, ``force_download``, ``local_files_only``, ``proxies``,
            ``token`` of a checkpoint on the hub. Kernels of AutoGPTQ (``use_triton``, ``inject_fused_attention``, ...)
            may be there and False; qcore has its own. ``low_cpu_mem_usage`` may be there; it always is low.

        Raises
        ------
        InvalidArgument
            The checkpoint is in no such format, has no such file, or a folder is asked for a revision.
        Unsupported
            A kernel of AutoGPTQ, ``use_safetensors=False``, or another argument that would be ignored.
        """
        who = f"{cls.__name__}.from_quantized"
        hub = hub_arguments(who, model_name_or_path, others)
        others.pop("low_cpu_mem_usage", None)
        nothing = {"use_safetensors": True, "trainable": False, "strict": True, "use_cuda_fp16": True}
        refuse(who, {"use_safetensors": use_safetensors, **others}, nothing)
        section = None
        if quantize_config is not None:
            given = quantize_config if isinstance(quantize_config, dict) else quantize_config.to_dict()
            section = {"quant_method": "gptq", **given}
        model = load_quantized(
            model_name_or_path,
            who,
            ("gptq", "awq"),
            device_map=device_map,
            max_memory=max_memory,
            device=device,
            trust_remote_code=trust_remote_code,
            torch_dtype=torch_dtype,
            basename=model_basename,
            section=section,
            hub=hub,
        )
        return cls(model, quantized=True)

    def quantize(
        self, examples: list[dict[str, Any]], batch_size: int = 1, cache_examples_on_gpu: bool = True, **kernels: Any
    ) -> None:
        """Quantize the linear layers of the model's blocks, in place.

        Parameters
        ----------
        examples : list of mappings
            ``input_ids`` and ``attention_mask`` of one sequence each, as tokenizers return; no more than 4096 tokens
            of each are used, or as many as the model has positions.
        batch_size, cache_examples_on_gpu
            Accepted: examples of one length run together anyway, and hidden states stay on the model's device.

        Raises
        ------
        InvalidArgument
            The model is quantized, the examples have no tokens, or a layer does not fit the format.
        Unsupported
            A kernel of AutoGPTQ is asked for.
        """
        refuse(f"{type(self).__name__}.quantize", kernels, {"use_cuda_fp16": True})
        assert self.quantize_config is not None or self.quantized
        options = Options("gptq") if self.quantize_config is None else self.quantize_config._options()
        self._calibrate(examples, None, options, samples=len(examples), length=4096)

    def save_quantized(
        self,
        save_dir: str | Path,
        safetensors_metadata: dict[str, str] | None = None,
        use_safetensors: bool = True,
        **unknown: Any,
    ) -> None:
        """Write the checkpoint, with its ``config.json`` and ``quantize_config.json``, to ``save_dir``.

        Raises
        ------
        InvalidArgument
            The model is not quantized.
        Unsupported
            ``use_safetensors=False``, metadata, or an argument that would be ignored.
        """
        who = f"{type(self).__name__}.save_quantized"
        given = {"use_safetensors": use_safetensors, "safetensors_metadata": safetensors_metadata, **unknown}
        refuse(who, given, {"use_safetensors": True})
        self._save(save_dir)
        if self.quantize_config is not None:
            self.quantize_config.model_name_or_path = str(save_dir)
            self.quantize_config.model_file_base_name = "model"
            self.quantize_config.checkpoint_format = "gptq" if self.quantize_config.sym else "gptq_v2"
            self.quantize_config.save_pretrained(save_dir)

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """As :meth:`save_quantized`."""
        self.save_quantized(save_dir, **kwargs)
