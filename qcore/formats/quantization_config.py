"""``quantization_config`` of a ``config.json``: how the layers of a quantized checkpoint are to be built.

Two spellings. Whatever bitsandbytes can represent is written as Transformers writes it for bitsandbytes
(``quant_method: bitsandbytes``), so that either library loads the folder; the entry ``qcore`` beside the known ones
says who wrote it, and bitsandbytes ignores it. The rest, fused experts so far, has ``quant_method: qcore``.

A Transformers without qcore skips a method that it does not know and reads the tensors into plain layers. Under
``quant_method: qcore`` every tensor with codes therefore has a shape that no plain layer takes: packed 4-bit codes have
one anyway, int8 codes are stored flat, and the name of a fused parameter holds its shape.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from qcore.errors import FormatError
from qcore.formats import grouped

FORMATS = ("nf4", "fp4", "int8")
# Integers in groups, whose checkpoints are those of GPTQ and AWQ (qcore.formats.grouped).
GROUPED = ("gptq", "awq")
# Version of what the entry ``qcore`` and the method ``qcore`` mean; a reader refuses a later one.
SCHEMA = 1
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class QuantizationSettings:
    """How linear layers are quantized.

    Parameters
    ----------
    format
        nf4, fp4, int8, gptq or awq.
    nested
        Whether the scales of 4-bit weights are quantized too.
    compute_dtype
        dtype that 4-bit layers compute in; None for that of their input.
    skip_modules
        Patterns of layers that stay in floating point; None for the output head and whatever shares its weight.
    threshold
        Magnitude from which on an activation is an outlier (int8).
    experts
        Whether fused experts are quantized; bitsandbytes has no such layout.
    group_size, symmetric, act_order, true_sequential
        Of gptq and awq: inputs a group (-1: one group), zero point 8 everywhere, columns in another order, layers
        calibrated on what the quantized ones in front of them give.
    checkpoint_format
        gptq or gptq_v2, the two spellings of zero points; awq.
    """

    format: str
    blocksize: int = 64
    nested: bool = True
    compute_dtype: torch.dtype | None = None
    quant_storage: torch.dtype = torch.uint8
    skip_modules: list[str] | None = None
    threshold: float = 6.0
    experts: bool = False
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    true_sequential: bool = True
    checkpoint_format: str = "gptq"


def grouped_layout(format: str, symmetric: bool) -> str:
    """The ``checkpoint_format`` that gptq or awq is written in.

    Zero points of their own are stored as they are; what AutoGPTQ did to them is kept for files without any.
    """
    return "awq" if format == "awq" else "gptq" if symmetric else "gptq_v2"


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(value: Any, what: str) -> torch.dtype:
    """The dtype called ``value`` (``"bfloat16"``, ``"torch.bfloat16"``); ``FormatError`` if there is none."""
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"quantization_config: {what} is {value!r}, which is no dtype")
    return dtype


def write_quantization(settings: QuantizationSettings, dtype: torch.dtype) -> dict[str, Any]:
    """The section for ``config.json``; ``dtype`` is that of the layers that stay in floating point."""
    compute = None if settings.compute_dtype is None else name_of(settings.compute_dtype)
    if settings.format in GROUPED:
        own = {"schema": SCHEMA, "compute_dtype": compute, "skip_modules": settings.skip_modules}
        return grouped.write_section(settings, own)
    if settings.experts:
        values = {**asdict(settings), "compute_dtype": compute, "quant_storage": name_of(settings.quant_storage)}
        return {"quant_method": "qcore", "schema": SCHEMA, **values}
    four_bit = settings.format != "int8"
    return {
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": compute or name_of(dtype),
        "bnb_4bit_quant_storage": name_of(settings.quant_storage),
        "bnb_4bit_quant_type": settings.format if four_bit else "fp4",
        "bnb_4bit_use_double_quant": settings.nested if four_bit else False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": settings.skip_modules,
        "llm_int8_threshold": settings.threshold,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": "bitsandbytes",
        "qcore": {"schema": SCHEMA, "compute_dtype": compute, "blocksize": settings.blocksize},
    }


def read_quantization(config: dict[str, Any]) -> QuantizationSettings | None:
    """Read ``config["quantization_config"]``; ``None`` for a float checkpoint.

    Raises
    ------
    FormatError
        Another quantization method, a later schema, or a value that is not known.
    """
    section = config.get("quantization_config")
    return None if section is None else read_section(section)


def read_section(section: dict[str, Any]) -> QuantizationSettings:
    """Read the section itself, as :func:`read_quantization`."""
    method = section.get("quant_method")
    if method == "qcore":
        return _read_own(section)
    if method in GROUPED:
        return _read_grouped(section)
    if method != "bitsandbytes":
        raise FormatError(
            f"quantization_config: quant_method is {method!r}; this reader knows 'bitsandbytes', 'gptq', 'awq' and "
            "'qcore'"
        )
    own = _own_entry(section)
    four_bit = bool(section.get("load_in_4bit", section.get("_load_in_4bit", False)))
    eight_bit = bool(section.get("load_in_8bit", section.get("_load_in_8bit", False)))
    if four_bit == eight_bit:
        raise FormatError("quantization_config: exactly one of load_in_4bit and load_in_8bit must be true")
    format = section.get("bnb_4bit_quant_type", "fp4") if four_bit else "int8"
    if format not in FORMATS:
        raise FormatError(f"quantization_config: bnb_4bit_quant_type is {format!r}, expected nf4 or fp4")
    compute = own.get("compute_dtype", section.get("bnb_4bit_compute_dtype"))
    if "compute_dtype" not in own and compute is not None and dtype_of(compute, "compute") == torch.float32:
        compute = None  # bitsandbytes' default, which nobody chose: several times slower than that of the activations
    return QuantizationSettings(
        format,
        _number(int, "qcore.blocksize", own.get("blocksize", 64)),
        bool(section.get("bnb_4bit_use_double_quant", False)),
        None if compute is None else dtype_of(compute, "bnb_4bit_compute_dtype"),
        dtype_of(section.get("bnb_4bit_quant_storage", "uint8"), "bnb_4bit_quant_storage"),
        section.get("llm_int8_skip_modules"),
        _number(float, "llm_int8_threshold", section.get("llm_int8_threshold", 6.0)),
    )


def _read_grouped(section: dict[str, Any]) -> QuantizationSettings:
    own = _own_entry(section)
    values = grouped.read_section(section)
    compute = own.get("compute_dtype")
    skips = own.get("skip_modules", section.get("modules_to_not_convert"))
    return QuantizationSettings(
        **values, compute_dtype=None if compute is None else dtype_of(compute, "compute_dtype"), skip_modules=skips
    )


def _read_own(section: dict[str, Any]) -> QuantizationSettings:
    _check_schema(section)
    known = QuantizationSettings.__dataclass_fields__
    values = {key: value for key, value in section.items() if key in known}
    if values.get("format") not in FORMATS:
        raise FormatError(f"quantization_config: format is {values.get('format')!r}, expected one of {FORMATS}")
    for key in ("compute_dtype", "quant_storage"):
        if values.get(key) is not None:
            values[key] = dtype_of(values[key], key)
    return QuantizationSettings(**values)


def _own_entry(section: dict[str, Any]) -> dict[str, Any]:
    """What qcore notes beside another method's section, checked for its schema."""
    own = section.get("qcore", {})
    if not isinstance(own, dict):
        raise FormatError(f"quantization_config: qcore is {own!r}, expected an object; the file was changed by hand")
    _check_schema(own)
    return own


def _number(kind: type[Number], what: str, value: Any) -> Number:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise FormatError(f"quantization_config: {what} is {value!r}, expected a number") from None


def _check_schema(section: dict[str, Any]) -> None:
    schema = section.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise FormatError(
            f"quantization_config: was written by a later qcore (schema {schema}, this one reads up to {SCHEMA}); "
            "upgrade qcore-quant"
        )
