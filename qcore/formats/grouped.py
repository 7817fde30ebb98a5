"""Checkpoints of GPTQ and AWQ: their ``quantization_config`` and the tensors of a layer.

A folder says how it is quantized in ``config.json``, section ``quantization_config``; AutoGPTQ wrote the same into
``quantize_config.json``, GPTQModel writes both, AutoAWQ once wrote ``quant_config.json``. The entry ``qcore`` beside
the known ones says what they have no word for; others ignore it. What the tensors mean is in
:mod:`qcore.functional.gptq_layers` and :mod:`qcore.functional.awq_layers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcore.errors import FormatError, InvalidArgument
from qcore.formats.shard_writer import Spec
from qcore.formats.source import read_json

if TYPE_CHECKING:
    from qcore.formats.quantization_config import QuantizationSettings

# Beside config.json: the file of each method, newest first.
FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}

# Settings that a section of gptq may leave out, or state as null, for their defaults.
FLAGS = {"symmetric": "sym", "act_order": "desc_act", "true_sequential": "true_sequential"}


def write_section(settings: QuantizationSettings, own: dict[str, Any]) -> dict[str, Any]:
    """The section for settings whose format is gptq or awq; ``own`` becomes its entry ``qcore``."""
    common = {"bits": 4, "group_size": settings.group_size}
    if settings.format == "awq":
        return {
            **common,
            "modules_to_not_convert": settings.skip_modules,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
            "qcore": {**own, "symmetric": settings.symmetric},
        }
    return {
        **common,
        "checkpoint_format": settings.checkpoint_format,
        "desc_act": settings.act_order,
        "lm_head": False,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": settings.symmetric,
        "true_sequential": settings.true_sequential,
        "qcore": own,
    }


def read_section(section: dict[str, Any]) -> dict[str, Any]:
    """What a section of method gptq or awq states, unchecked, by the names in ``QuantizationSettings``.

    Raises
    ------
    FormatError
        Another number of bits, or a layout of one kind of kernel (marlin, gemv).
    """
    method = section["quant_method"]
    bits = section.get("bits", section.get("w_bit"))
    if bits != 4:
        raise FormatError(f"quantization_config: {method} with {bits} bits; this reader knows 4")
    size = section.get("group_size", section.get("q_group_size", 128))
    if method == "awq":
        version = str(section.get("version", "gemm")).lower()
        if version != "gemm":
            raise FormatError(f"quantization_config: awq version is {version!r}; this reader knows 'gemm'")
        symmetric = section.get("qcore", {}).get("symmetric", False)
        return {"format": "awq", "group_size": size, "symmetric": symmetric, "checkpoint_format": "awq"}
    layout = section.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or section.get("is_marlin_format"):
        raise FormatError(
            f"quantization_config: checkpoint_format is {layout!r}; this reader knows 'gptq' and 'gptq_v2', convert it "
            "back with the library that wrote it"
        )
    return {
        "format": "gptq",
        "group_size": size,
        "checkpoint_format": layout,
        **{field: section[key] for field, key in FLAGS.items() if section.get(key) is not None},
    }


def section_of(folder: Path, config: dict[str, Any]) -> Any:
    """``config["quantization_config"]``, or what older writers put into a file of its own; None for a float model.

    Unchecked; :func:`qcore.formats.quantization_config.read_section` reads it.
    """
    section = config.get("quantization_config")
    if section is not None:
        return section
    for method, name in FILES.items():
        if (folder / name).is_file():
            stated = read_json(folder / name)
            return {"quant_method": method, **stated} if isinstance(stated, dict) else stated
    return None


def layer_specs(prefix: str, shape: tuple[int, int], settings: QuantizationSettings) -> tuple[Spec, ...]:
    """The tensors of a layer of ``shape`` (out, in) below ``prefix`` (``"model.layers.0.mlp.up_proj."``).

    Raises
    ------
    InvalidArgument
        The format has no place for a layer of this shape.
    """
    outputs, inputs = shape
    size = inputs if settings.group_size == -1 else settings.group_size
    if outputs % 8 or inputs % 8:
        raise InvalidArgument(
            f"quantize: {prefix}weight has shape {shape}; {settings.format} packs eights of both, pass --skip for it"
        )
    if settings.format == "awq":
        if inputs % size:
            raise InvalidArgument(
                f"quantize: {prefix}weight has {inputs} inputs, which groups of {size} do not divide as awq wants; "
                "pass another --group-size, or --skip for it"
            )
        qweight = Spec(f"{prefix}qweight", torch.int32, (inputs, outputs // 8))
    else:
        qweight = Spec(f"{prefix}qweight", torch.int32, (inputs // 8, outputs))
    groups = -(-inputs // size)
    parts = [
        qweight,
        Spec(f"{prefix}qzeros", torch.int32, (groups, outputs // 8)),
        Spec(f"{prefix}scales", torch.float16, (groups, outputs)),
    ]
    if settings.format == "gptq":
        parts.append(Spec(f"{prefix}g_idx", torch.int32, (inputs,)))
    return tuple(parts)
