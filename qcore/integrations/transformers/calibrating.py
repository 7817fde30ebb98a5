"""Transformers' own ``GPTQConfig`` and ``AwqConfig`` where the library that it would call is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from qcore.errors import InvalidArgument, Unsupported
from qcore.formats.plan import Options
from qcore.integrations.calibration_data import token_batches

_UNSUPPORTED = ("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "meta")


class CalibratingQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes a model that Transformers has loaded, as its ``GPTQConfig`` asks.

    Raises
    ------
    InvalidArgument
        No ``dataset``.
    Unsupported
        Another number of bits, another library's kernel, or what qcore has no counterpart of.
    """

    requires_calibration = False

    def __init__(self, quantization_config: GPTQConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        check_backend(quantization_config)
        config = quantization_config
        if isinstance(config, AwqConfig):
            raise Unsupported(
                "AwqConfig: Transformers reads AWQ checkpoints and makes none; run `qcore quantize MODEL -o OUT "
                "--format awq --calibration TEXT` and load OUT, or see qcore.compat.awq"
            )
        if config.bits != 4 or config.format not in ("gptq", "gptq_v2"):
            raise Unsupported(f"GPTQConfig: {config.bits} bits, format {config.format}; qcore quantizes to 4, 'gptq'")
        set_ = [name for name in _UNSUPPORTED if getattr(config, name, None) is not None]
        if set_:
            raise Unsupported(f"GPTQConfig: {set_[0]} is not supported; leave it out")
        if config.dataset is None:
            raise InvalidArgument("GPTQConfig: the model is not quantized yet; pass dataset='c4', or a list of texts")

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Nothing beyond Transformers' own checks is needed."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        """Nothing: float weights are loaded."""

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        from transformers import AutoTokenizer

        from qcore.integrations.quantize_model import quantize_model  # which needs this package

        config = self.quantization_config
        tokenizer = config.tokenizer or model.name_or_path
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        limit = int(getattr(model.config, "max_position_embeddings", None) or 2048)
        length = config.model_seqlen or min(limit, 2048)
        batches = token_batches(config.dataset, tokenizer, length=length, caller="GPTQConfig")
        device = model.get_input_embeddings().weight.device
        chosen = Options(
            "gptq",
            group_size=config.group_size,
            symmetric=config.sym,
            act_order=config.desc_act,
            group_order=bool(getattr(config, "act_group_aware", True)),
            damping=config.damp_percent,
            true_sequential=config.true_sequential,
            calibration="dataset",
        )
        return quantize_model(model, [batch.to(device) for batch in batches], chosen)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def check_backend(config: Any) -> None:
    """Refuse a ``GPTQConfig`` or ``AwqConfig`` that asks for a kernel of GPTQModel."""
    backend = getattr(config, "backend", None)
    name = str(getattr(backend, "value", backend)).lower()
    if name not in ("none", "auto", "auto_trainable"):
        raise Unsupported(f"{type(config).__name__}: backend {name!r} is one of GPTQModel's; leave it out")


def has_gptqmodel() -> bool:
    """Whether Transformers can hand GPTQ and AWQ to the library that it calls for them."""
    return find_spec("gptqmodel") is not None
