"""GPTQModel's interface over qcore: ``from qcore.compat.gptqmodel import GPTQModel, QuantizeConfig``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from qcore.compat.causal_lm import refuse
from qcore.errors import InvalidArgument

__all__ = ["GPTQModel", "QuantizeConfig"]


@dataclass
class QuantizeConfig(BaseQuantizeConfig):
    """As AutoGPTQ's, with GPTQModel's defaults; a model with zero points is written as ``gptq_v2``.

    Parameters
    ----------
    bits, group_size, damp_percent, desc_act, static_groups, sym, true_sequential
        See :class:`qcore.compat.auto_gptq.BaseQuantizeConfig`.
    """

    group_size: int = 128
    damp_percent: float = 0.05
    desc_act: bool = False


class GPTQModel(AutoGPTQForCausalLM):
    """A causal language model to quantize by GPTQ, or quantized by it; see :meth:`load`.

    Attributes
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        Of the model's folder.
    """

    tokenizer: Any = None

    @classmethod
    def load(
        cls,
        model_id_or_path: str | Path,
        quantize_config: QuantizeConfig | dict[str, Any] | None = None,
        device_map: Any = None,
        device: str | torch.device | None = None,
        backend: Any = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> GPTQModel:
        """Load a quantized checkpoint, or with ``quantize_config`` a float model to be quantized.

        Parameters
        ----------
        model_id_or_path : str or Path
        quantize_config : QuantizeConfig or dict, optional
        device_map, device, trust_remote_code, **kwargs
            For Transformers' ``from_pretrained``.
        backend
            "auto" or None: qcore's own kernels.

        Raises
        ------
        InvalidArgument
            A float model without ``quantize_config``, or a quantized one with it.
        Unsupported
            Another backend.
        """
        from transformers import AutoTokenizer

        refuse(f"{cls.__name__}.load", {"backend": backend})
        common = {"device_map": device_map, "device": device, "trust_remote_code": trust_remote_code, **kwargs}
        found: Any
        if quantize_config is None:
            found = cls.from_quantized(model_id_or_path, **common)
        else:
            if isinstance(quantize_config, dict):
                quantize_config = QuantizeConfig(**quantize_config)
            found = cls.from_pretrained(model_id_or_path, quantize_config, **common)
        name = str(model_id_or_path).strip()
        found.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        result: GPTQModel = found
        return result

    def quantize(  # type: ignore[override]
        self,
        calibration: list[Any] | str | None = None,
        batch_size: int = 1,
        tokenizer: Any = None,
        *,
        calibration_dataset: list[Any] | str | None = None,
        **unknown: Any,
    ) -> None:
        """Quantize the linear layers of the model's blocks, in place.

        Parameters
        ----------
        calibration : list or str
            Texts, sequences of token ids, or what a tokenizer returns; ``"c4"`` for 128 windows of 2048 tokens of C4.
            ``calibration_dataset`` is the same, by its old name.
        batch_size
            Accepted: examples of one length run together anyway.
        tokenizer
            For texts; the model's own if left out.

        Raises
        ------
        InvalidArgument, Unsupported
            As :meth:`AutoGPTQForCausalLM.quantize`.
        """
        who = f"{type(self).__name__}.quantize"
        refuse(who, unknown)
        data = calibration if calibration is not None else calibration_dataset
        if data is None:
            raise InvalidArgument(f"{who}: calibration is missing; pass a list of texts")
        config = self.quantize_config or QuantizeConfig()
        named = isinstance(data, str)
        self._calibrate(
            data,
            tokenizer or self.tokenizer,
            config._options(),
            samples=128 if named else len(data),
            length=2048 if named else 4096,
        )

    def save(self, save_dir: str | Path, **unknown: Any) -> None:
        """Write checkpoint and tokenizer to ``save_dir``; raises as :meth:`AutoGPTQForCausalLM.save_quantized`."""
        self.save_quantized(save_dir, **unknown)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_dir)

    def generate(self, inputs: str | Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's ``generate``; a text is tokenized first."""
        if isinstance(inputs, str):
            encoded = self.tokenizer(inputs, return_tensors="pt", return_token_type_ids=False)
            kwargs |= {key: value.to(self.model.device) for key, value in encoded.items()}
            inputs = None
        return super().generate(**kwargs) if inputs is None else super().generate(inputs, **kwargs)
