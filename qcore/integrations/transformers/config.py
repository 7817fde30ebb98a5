"""``QcoreConfig``: what to pass to ``from_pretrained`` as ``quantization_config``."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcore.errors import FormatError, InvalidArgument, InvalidDtype
from qcore.formats.plan import BLOCKSIZES
from qcore.formats.quantization_config import (
    FORMATS,
    GROUPED,
    QuantizationSettings,
    dtype_of,
    grouped_layout,
    read_section,
    write_quantization,
)
from qcore.integrations.versions import check
from qcore.ops import validate

_STORAGE = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)

# Arguments that not every format has: the field of the settings that each is, and the formats that have it.
_OF_FORMATS = {
    "blocksize": ("blocksize", ("nf4", "fp4")),
    "double_quant": ("nested", ("nf4", "fp4")),
    "quant_storage": ("quant_storage", ("nf4", "fp4")),
    "threshold": ("threshold", ("int8",)),
    "compute_dtype": ("compute_dtype", ("nf4", "fp4", *GROUPED)),
}


class QcoreConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How ``from_pretrained`` quantizes a model: ``quantization_config=qcore.QcoreConfig("nf4")``.

    An argument that the format does not have is refused. A checkpoint that is quantized already says itself how: of a
    configuration that is passed along with it, only ``compute_dtype`` changes anything. ``format`` and every other
    argument that is not at its default have to be what the checkpoint was quantized with.

    Parameters
    ----------
    format : str
        ``"nf4"``, ``"fp4"`` or ``"int8"``; ``"gptq"`` or ``"awq"`` for a checkpoint that is quantized to it.
    blocksize : int
        Elements a scale (4 bits), a power of two from 32 to 4096.
    double_quant : bool
        Quantize the scales too (4 bits).
    compute_dtype : torch.dtype or str, optional
        dtype to compute in (4 bits); None for that of the activations.
    quant_storage : torch.dtype or str
        dtype under which packed codes are stored (4 bits); FSDP wants that of the other parameters.
    skip_modules : iterable of str, optional
        Layers to leave in floating point besides the output head: the start of a dotted name, its end, or a regular
        expression for the start, as ``llm_int8_skip_modules``. Each has to match a layer.
    quantize_head : bool
        Quantize the output head as well, unless it shares its weight with the embedding.
    threshold : float
        Magnitude from which on an activation is an outlier (int8); 0 for none.
    fp32_cpu_offload : bool
        Leave modules that a ``device_map`` puts on ``"disk"``, or on ``"cpu"`` beside an accelerator, in floating
        point.

    Raises
    ------
    InvalidArgument, InvalidDtype
        A value is not allowed.
    IncompatibleVersion
        The installed Accelerate is too old.
    """

    quant_method = "qcore"

    def __init__(
        self,
        format: str | None = None,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        quant_storage: torch.dtype | str = torch.uint8,
        skip_modules: Iterable[str] | None = None,
        quantize_head: bool = False,
        threshold: float = 6.0,
        fp32_cpu_offload: bool = False,
        **unknown: Any,
    ) -> None:
        # Transformers takes one that is too old for none at all, and advises to install what is installed.
        check("accelerate", "QcoreConfig", required=False)
        for name in unknown:
            known = [each for each in inspect.signature(type(self)).parameters if each != "unknown"]
            near = difflib.get_close_matches(name.removeprefix("bnb_4bit_").removeprefix("llm_int8_"), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InvalidArgument(f"QcoreConfig: unknown argument {name}; {hint}")
        if format is None or format not in (*FORMATS, *GROUPED):
            raise InvalidArgument(
                f'QcoreConfig: format is {format!r}, expected nf4, fp4, int8, gptq or awq, as in QcoreConfig("nf4")'
            )
        if type(blocksize) is not int or blocksize not in BLOCKSIZES:
            raise InvalidArgument(f"QcoreConfig: blocksize is {blocksize!r}, expected a power of two from 32 to 4096")
        if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
            raise InvalidArgument(f"QcoreConfig: threshold is {threshold!r}, expected a number from 0 on; 0 for none")
        flags = {"double_quant": double_quant, "quantize_head": quantize_head, "fp32_cpu_offload": fp32_cpu_offload}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise InvalidArgument(f"QcoreConfig: {name} is {value!r}, expected True or False")
        if isinstance(skip_modules, str):
            raise InvalidArgument(f"QcoreConfig: skip_modules is the string {skip_modules!r}, needs a list of names")
        try:
            skips = None if skip_modules is None else list(skip_modules)
        except TypeError:
            raise InvalidArgument(f"QcoreConfig: skip_modules is {skip_modules!r}, expected a list of names") from None
        if not all(isinstance(each, str) and each for each in skips or ()):
            raise InvalidArgument(f"QcoreConfig: skip_modules is {skips!r}, expected names, which are not empty")
        compute = _dtype("compute_dtype", compute_dtype, tuple(validate.FLOATS))
        storage = _dtype("quant_storage", quant_storage, _STORAGE)
        self.settings = QuantizationSettings(
            format, blocksize, double_quant, compute, storage or torch.uint8, None, float(threshold)
        )
        if format == "awq":
            self.settings = replace(self.settings, checkpoint_format=grouped_layout(format, self.settings.symmetric))
        default = QuantizationSettings(format)
        for name, (field, formats) in _OF_FORMATS.items():
            value = getattr(self.settings, field)
            if format not in formats and value != getattr(default, field):
                raise InvalidArgument(
                    f"QcoreConfig has {name}={value}, which {format} does not have ({', '.join(formats)} do); leave it "
                    "out"
                )
        self.skip_modules = skips
        self.quantize_head = quantize_head
        self.fp32_cpu_offload = fp32_cpu_offload
        # dtype of the model that was loaded with this configuration; the written section names it.
        self.model_dtype: torch.dtype | None = None
        # Whether it was found where a checkpoint's section is, without being one: the files say what they are.
        self.placed = False

    @property
    def format(self) -> str:
        """nf4, fp4, int8, gptq or awq."""
        return self.settings.format

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """dtype to compute in; None for that of the activations."""
        return self.settings.compute_dtype

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> QcoreConfig | tuple[QcoreConfig, dict[str, Any]]:
        """Read what :meth:`to_dict` gives, or the section of a ``config.json`` of bitsandbytes, GPTQ or AWQ.

        Raises
        ------
        FormatError
            It is another method's, inconsistent, or of a later schema.
        InvalidArgument
            What it asks of a model that is not loaded yet is not allowed.
        """
        settings = read_section(config_dict)
        asked = config_dict.get("qcore", {}).get("asked")
        if asked is not None and not isinstance(asked, dict):
            raise FormatError(f"quantization_config: qcore.asked is {asked!r}, expected an object")
        config = cls(settings.format, **(asked or {}))
        if settings.format == "int8":  # whose sections say False of what int8 does not have
            settings = replace(settings, nested=config.settings.nested)
        config.settings = settings if asked is None else replace(settings, skip_modules=None)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The section as it is written to ``config.json``: bitsandbytes' wherever bitsandbytes has the format.

        :meth:`from_dict` makes the same configuration of it. Of one that no model was loaded with yet, the entry
        ``qcore`` says what is asked for besides.
        """
        settings = self.settings
        if settings.skip_modules is not None:
            return write_quantization(settings, self.model_dtype or torch.float32)
        asked = {name: getattr(self, name) for name in ("quantize_head", "fp32_cpu_offload") if getattr(self, name)}
        if self.skip_modules:
            asked["skip_modules"] = list(self.skip_modules)
            settings = replace(settings, skip_modules=list(self.skip_modules))
        section = write_quantization(settings, self.model_dtype or torch.float32)
        if asked:
            section["qcore"]["asked"] = asked
        return section

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Let ``dict(config)`` be ``config.to_dict()``."""
        yield from self.to_dict().items()

    def get(self, key: str, default: Any = None) -> Any:
        """``to_dict().get``, but for the method: Transformers asks ``config.quantization_config`` for it.

        There it expects a checkpoint's section, and a program may have put a configuration.
        """
        return self.quant_method if key == "quant_method" else default

    def with_arguments(self, passed: QcoreConfig) -> QcoreConfig:
        """This configuration of a checkpoint with what ``passed`` may change about it.

        Raises
        ------
        InvalidArgument
            ``passed`` asks for something else than the codes are: another format, or an argument that is neither left
            at its default nor what the checkpoint has. Whether ``quantize_head`` is, and ``skip_modules`` where the
            checkpoint lists none, the quantizer finds out from the tensors.
        """
        if passed.format != self.format:
            raise InvalidArgument(
                f"from_pretrained: the checkpoint is quantized to {self.format}, QcoreConfig asks for {passed.format}; "
                "name the float checkpoint to quantize anew, or leave quantization_config out"
            )
        default, stored, asked = QuantizationSettings(passed.format), self.settings, passed.settings
        for name, (field, formats) in _OF_FORMATS.items():
            value = getattr(asked, field)
            if passed.format not in formats or value == getattr(default, field):
                continue
            if name != "compute_dtype" and value != getattr(stored, field):
                raise InvalidArgument(
                    f"from_pretrained: QcoreConfig has {name}={value}, the checkpoint was quantized with "
                    f"{getattr(stored, field)}; leave it out, or name the float checkpoint to quantize anew"
                )
        if stored.skip_modules is None:  # the defaults, to which what was asked for is added
            self.skip_modules = passed.skip_modules
        elif unknown := set(passed.skip_modules or ()) - set(stored.skip_modules):
            raise InvalidArgument(
                f"from_pretrained: QcoreConfig has skip_modules={sorted(unknown)}, but the checkpoint was quantized "
                f"with {stored.skip_modules}; leave it out, or name the float checkpoint to quantize anew"
            )
        self.quantize_head = passed.quantize_head
        if passed.compute_dtype is not None:
            self.settings = replace(self.settings, compute_dtype=passed.compute_dtype)
        self.fp32_cpu_offload = passed.fp32_cpu_offload
        return self


def _dtype(name: str, value: torch.dtype | str | None, allowed: tuple[torch.dtype, ...]) -> torch.dtype | None:
    found = dtype_of(value, name) if isinstance(value, str) else value
    if found is not None and found not in allowed:
        raise InvalidDtype(f"QcoreConfig: {name} is {value!r}, expected one of {', '.join(map(str, allowed))}")
    return found
