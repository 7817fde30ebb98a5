"""``quantization_config`` of a ``config.json``: how the layers of a quantized checkpoint are to be built.

Two spellings. Whatever bitsandbytes can represent is written as Transformers writes it for bitsandbytes
(``quant_method: bitsandbytes``), so that either library loads the folder; the entry ``qcore`` beside the known ones
says who wrote it, and bitsandbytes ignores it. The rest, fused experts so far, has ``quant_method: qcore``.

A Transformers without qcore skips a method that it does not know and reads the tensors into plain layers. Under
``quant_method: qcore`` every tensor with codes therefore has a shape that no plain layer takes: packed 4-bit codes have
one anyway, int8 codes are stored flat, and the name of a fused parameter holds its shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qcore.errors import FormatError
from qcore.formats import grouped
from qcore.ops import validate

FORMATS = ("nf4", "fp4", "int8")
# Integers in groups, whose checkpoints are those of GPTQ and AWQ (qcore.formats.grouped).
GROUPED = ("gptq", "awq")
# Version of what the entry ``qcore`` and the method ``qcore`` mean; a reader refuses a later one.
SCHEMA = 1


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


def read_section(section: Any) -> QuantizationSettings:
    """Read ``quantization_config``, the section of a ``config.json``.

    Raises
    ------
    FormatError
        Another quantization method, a later schema, or a value that the method does not have.
    """
    if not isinstance(section, dict):
        raise FormatError(f"quantization_config: is {section!r}, expected an object; the file was changed by hand")
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
    four_bit, eight_bit = (
        _accepted(f"load_in_{bits}", section.get(f"load_in_{bits}", section.get(f"_load_in_{bits}", False)), *_FLAG)
        for bits in ("4bit", "8bit")
    )
    if four_bit == eight_bit:
        raise FormatError("quantization_config: exactly one of load_in_4bit and load_in_8bit must be true")
    format = section.get("bnb_4bit_quant_type", "fp4") if four_bit else "int8"
    if four_bit:
        _accepted("bnb_4bit_quant_type", format, "nf4 or fp4", lambda value: value in ("nf4", "fp4"))
    compute = own.get("compute_dtype", section.get("bnb_4bit_compute_dtype"))
    if (
        "compute_dtype" not in own
        and compute is not None
        and dtype_of(compute, "bnb_4bit_compute_dtype") == torch.float32
    ):
        compute = None  # bitsandbytes' default, which nobody chose: several times slower than that of the activations
    return _settings(
        {
            "format": format,
            "blocksize": own.get("blocksize", 64),
            "nested": section.get("bnb_4bit_use_double_quant", False),
            "compute_dtype": compute,
            "quant_storage": section.get("bnb_4bit_quant_storage", "uint8"),
            "skip_modules": section.get("llm_int8_skip_modules"),
            "threshold": section.get("llm_int8_threshold", 6.0),
        },
        _OF_BITSANDBYTES,
    )


def _read_grouped(section: dict[str, Any]) -> QuantizationSettings:
    own = _own_entry(section)
    values = grouped.read_section(section) | {"compute_dtype": own.get("compute_dtype")}
    spelled = dict(grouped.FLAGS) if section["quant_method"] == "gptq" else {}
    if "skip_modules" in own:
        return _settings(values | {"skip_modules": own["skip_modules"]}, spelled)
    values["skip_modules"] = section.get("modules_to_not_convert")
    return _settings(values, {**spelled, "skip_modules": "modules_to_not_convert"})


def _read_own(section: dict[str, Any]) -> QuantizationSettings:
    _check_schema(section)
    _accepted("format", section.get("format"), f"one of {FORMATS}", lambda value: value in FORMATS)
    known = QuantizationSettings.__dataclass_fields__
    return _settings({key: value for key, value in section.items() if key in known}, {})


def _own_entry(section: dict[str, Any]) -> dict[str, Any]:
    """What qcore notes beside another method's section, checked for its schema."""
    own = section.get("qcore", {})
    if not isinstance(own, dict):
        raise FormatError(f"quantization_config: qcore is {own!r}, expected an object; the file was changed by hand")
    _check_schema(own)
    return own


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _patterns(value: Any) -> bool:
    try:
        return isinstance(value, list) and all(isinstance(each, str) and re.compile(each) for each in value)
    except re.error:
        return False


_FLAG: tuple[str, Callable[[Any], bool]] = ("true or false", lambda value: isinstance(value, bool))
# bitsandbytes keeps packed codes under these; a layer of qcore takes all of them.
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What each setting may be: in words, and as a test.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (f"one of {(*FORMATS, *GROUPED)}", lambda value: value in (*FORMATS, *GROUPED)),
    "blocksize": ("a power of two from 32 to 4096", lambda value: _whole(value) and value in validate.BLOCKSIZES),
    "nested": _FLAG,
    "compute_dtype": ("float32, float16 or bfloat16", lambda value: value is None or value in validate.FLOATS),
    "quant_storage": (f"one of {', '.join(map(name_of, _STORAGE))}", lambda value: value in _STORAGE),
    "skip_modules": ("a list of names or regular expressions", lambda value: value is None or _patterns(value)),
    "threshold": (
        "a number from 0 on",
        lambda value: (_whole(value) or isinstance(value, float)) and 0 <= value < math.inf,
    ),
    "experts": _FLAG,
    "group_size": (
        "-1 or a multiple of 8",
        lambda value: _whole(value) and (value == -1 or (value > 0 and value % 8 == 0)),
    ),
    "symmetric": _FLAG,
    "act_order": _FLAG,
    "true_sequential": _FLAG,
    "checkpoint_format": ("gptq, gptq_v2 or awq", lambda value: value in ("gptq", "gptq_v2", "awq")),
}
# What a section of bitsandbytes calls them.
_OF_BITSANDBYTES = {
    "blocksize": "qcore.blocksize",
    "nested": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "quant_storage": "bnb_4bit_quant_storage",
    "skip_modules": "llm_int8_skip_modules",
    "threshold": "llm_int8_threshold",
}


def _settings(values: dict[str, Any], spelled: Mapping[str, str]) -> QuantizationSettings:
    """The settings of what a file states, by field; ``spelled`` has what the section calls a field, if not that."""
    found = {}
    for field, value in values.items():
        what = spelled.get(field, field)
        if field in ("compute_dtype", "quant_storage") and value is not None:
            value = dtype_of(value, what)
        found[field] = _accepted(what, value, *_ALLOWED[field])
    return QuantizationSettings(**found)


def _accepted(what: str, value: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
    if not accepts(value):
        raise FormatError(
            f"quantization_config: {what} is {value!r}, expected {expected}; the file was changed by hand"
        )
    return value


def _check_schema(section: dict[str, Any]) -> None:
    schema = section.get("schema", SCHEMA)
    if not _whole(schema) or schema > SCHEMA:
        raise FormatError(
            f"quantization_config: was written by a later qcore (schema {schema}, this one reads up to {SCHEMA}); "
            "upgrade qcore-quant"
        )
