"""AutoAWQ's interface over qcore: ``from qcore.compat.awq import AutoAWQForCausalLM``.

Programs written for AutoAWQ 0.2 quantize with qcore's AWQ, on CPUs too, and write the same checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qcore.compat.causal_lm import QuantizableCausalLM, hub_arguments, load_float, load_quantized, refuse
from qcore.errors import InvalidArgument, Unsupported
from qcore.formats.plan import Options

__all__ = ["AutoAWQForCausalLM"]

_DEFAULTS = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None}


class AutoAWQForCausalLM(QuantizableCausalLM):
    """A causal language model to quantize by AWQ, or quantized by it; see :meth:`from_pretrained`.

    Attributes
    ----------
    model : PreTrainedModel
    quant_config : dict
        What :meth:`quantize` was given, completed.
    """

    quant_config: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        trust_remote_code: bool = True,
        device_map: Any = None,
        **kwargs: Any,
    ) -> AutoAWQForCausalLM:
        """Load a float model, to be quantized.

        The arguments are for Transformers' ``from_pretrained``. Without ``torch_dtype`` the model keeps the dtype of
        its checkpoint (AutoAWQ: float16). Raises ``InvalidArgument`` if it is quantized already, ``Unsupported`` for
        ``safetensors=False``.
        """
        who = f"{cls.__name__}.from_pretrained"
        refuse(who, {"safetensors": kwargs.pop("safetensors", None)}, {"safetensors": True})
        values = {"torch_dtype": torch_dtype, "trust_remote_code": trust_remote_code, "device_map": device_map}
        return cls(load_float(model_path, who, **values, **kwargs), quantized=False)

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        trust_remote_code: bool = True,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        quant_filename: str | None = None,
        **others: Any,
    ) -> AutoAWQForCausalLM:
        """Load an AWQ checkpoint of version ``gemm``.

        ``quant_filename`` is the name of its weight file, if that is not the usual one; ``revision``, ``subfolder``,
        ``cache_dir``, ``force_download``, ``local_files_only``, ``proxies`` and ``token`` are of a checkpoint on the
        hub. Arguments that pick one of AutoAWQ's kernels (``fuse_layers``, ``use_exllama``, ...) may be there and
        False; qcore has its own. Raises ``InvalidArgument`` for a checkpoint in another format, a file that is not
        there and the revision of a folder, ``Unsupported`` for kernels and for arguments that would be ignored.
        """
        who = f"{cls.__name__}.from_quantized"
        hub = hub_arguments(who, quant_path, others)
        refuse(who, others, {"safetensors": True})
        model = load_quantized(
            quant_path,
            who,
            ("awq",),
            device_map=device_map,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            torch_dtype=torch_dtype,
            basename=quant_filename or None,
            hub=hub,
        )
        return cls(model, quantized=True)

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: dict[str, Any] | None = None,
        calib_data: str | list[Any] = "c4",
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        **unknown: Any,
    ) -> None:
        """Quantize the linear layers of the model's blocks, in place.

        Parameters
        ----------
        tokenizer
            For texts.
        quant_config : dict
            ``zero_point``, ``q_group_size`` (a divisor of every layer's inputs), ``w_bit`` (4), ``version`` ("GEMM"),
            ``modules_to_not_convert``.
        calib_data : str or list
            Texts, sequences of token ids, or ``"c4"``. AutoAWQ's default is another data set, the Pile's validation
            part, which is not fetched.
        max_calib_samples, max_calib_seq_len : int
            Most examples, and most tokens of each.

        Raises
        ------
        InvalidArgument
            The model is quantized, there are no tokens, or a layer does not fit the format.
        Unsupported
            Another number of bits or version, or an argument that would be ignored.
        """
        who = f"{type(self).__name__}.quantize"
        refuse(who, unknown)
        config = {**_DEFAULTS, **(quant_config or {})}
        odd = set(config) - set(_DEFAULTS)
        if odd:
            raise InvalidArgument(f"{who}: quant_config has {sorted(odd)}; known are {', '.join(_DEFAULTS)}")
        if config["w_bit"] != 4 or str(config["version"]).lower() != "gemm":
            raise Unsupported(f"{who}: {config['w_bit']} bits, version {config['version']}; 4 bits, 'GEMM' are written")
        options = Options(
            "awq", group_size=config["q_group_size"], symmetric=not config["zero_point"], calibration="examples"
        )
        skips = config["modules_to_not_convert"] or []
        self._calibrate(calib_data, tokenizer, options, max_calib_samples, max_calib_seq_len, skips)
        self.quant_config = config

    def save_quantized(
        self, save_dir: str | Path, safetensors: bool = True, shard_size: str = "5GB", **unknown: Any
    ) -> None:
        """Write the checkpoint to ``save_dir``, in files of at most ``shard_size``.

        Raises ``InvalidArgument`` if the model is not quantized, ``Unsupported`` for ``safetensors=False``.
        """
        refuse(f"{type(self).__name__}.save_quantized", {"safetensors": safetensors, **unknown}, {"safetensors": True})
        self._save(save_dir, max_shard_size=shard_size)
