"""What a quantization run will write, decided from names and shapes before anything is read or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qcore.errors import FormatError, InvalidArgument
from qcore.formats import architecture, grouped
from qcore.formats.bitsandbytes import FourBitLayout, int8_specs
from qcore.formats.quantization_config import (
    FORMATS,
    GROUPED,
    QuantizationSettings,
    grouped_layout,
    write_quantization,
)
from qcore.formats.shard_writer import Spec
from qcore.formats.source import SINGLE, Source, TensorInfo

FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_READABLE = frozenset({torch.float64, *FLOATS.values()})
BLOCKSIZES = tuple(2**power for power in range(5, 13))  # QC-NUM-005
# Rows that are compared at a time when two tied tensors are both in the file.
_COMPARE_NUMEL = 4 << 20


@dataclass(frozen=True)
class Options:
    """Arguments of a run; all of them go into the journal, so that a resumed run has the same.

    ``format`` is nf4, fp4, int8, gptq, awq, or float (convert only). ``dtype`` is that of everything that stays in
    floating point, and what 4-bit weights dequantize to; ``None`` takes the checkpoint's own, bfloat16 if it states
    none. From ``group_size`` on they are of gptq and awq: ``true_sequential`` lets layers of a block see the errors of
    those in front of them (gptq); ``calibration`` is the SHA-256 of the text, ``None`` to round to nearest; ``windows``
    of ``window`` tokens are taken from it.
    """

    format: str
    blocksize: int = 64
    double_quant: bool = True
    dtype: str | None = None
    compute_dtype: str | None = None
    skip: tuple[str, ...] = ()
    quantize_head: bool = False
    keep_unknown: bool = False
    shard_bytes: int = 2_000_000_000
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    group_order: bool = True
    damping: float = 0.05
    true_sequential: bool = True
    calibration: str | None = None
    windows: int = 128
    window: int = 512

    def __post_init__(self) -> None:
        if self.format not in (*FORMATS, *GROUPED, "float"):
            raise InvalidArgument(f"quantize: format is {self.format!r}, expected nf4, fp4, int8, gptq, awq or float")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise InvalidArgument(f"quantize: group size is {self.group_size}, expected -1 or a multiple of 8")
        if self.act_order and (self.format != "gptq" or self.calibration is None):
            raise InvalidArgument("quantize: an order by activations needs the format gptq and a calibration text")
        if self.windows < 1 or self.window < 2 or not 0 < self.damping < 1:
            raise InvalidArgument(
                f"quantize: {self.windows} windows of {self.window} tokens and damping {self.damping}; at least 1 "
                "window of 2 tokens, and damping between 0 and 1"
            )
        if self.format in GROUPED and self.quantize_head:
            raise InvalidArgument(f"quantize: the output head of {self.format} checkpoints stays in floating point")
        if self.blocksize not in BLOCKSIZES:
            raise InvalidArgument(f"quantize: blocksize is {self.blocksize}, expected a power of two from 32 to 4096")
        for name in (self.dtype, self.compute_dtype):
            if name is not None and name not in FLOATS:
                raise InvalidArgument(f"quantize: dtype is {name!r}, expected one of {', '.join(FLOATS)}")
        if self.shard_bytes < 1:
            raise InvalidArgument(f"quantize: shard size is {self.shard_bytes} bytes, expected at least 1")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "skip": sorted(self.skip)}


@dataclass(frozen=True)
class Step:
    """One tensor's way: ``action`` is a format or cast; ``specs`` are the tensors that come out.

    A NaN or an infinity is refused if ``finite``.
    """

    info: TensorInfo
    action: str
    kind: str
    dtype: torch.dtype
    specs: tuple[Spec, ...]
    layout: FourBitLayout | None = None
    transposed: bool = False
    finite: bool = True

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Plan:
    """Steps in shards, the output's ``config.json``, and what is dropped.

    ``experts`` are fused weights that stay in floating point although they are most of what could be quantized.
    """

    shards: list[list[Step]]
    config: dict[str, Any]
    dropped: list[str]
    settings: QuantizationSettings | None = None
    experts: tuple[str, ...] = ()

    @property
    def steps(self) -> list[Step]:
        return [step for shard in self.shards for step in shard]

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps)

    def shard_names(self) -> list[str]:
        count = len(self.shards)
        if count == 1:
            return [SINGLE]
        return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def make_plan(source: Source, options: Options) -> Plan:
    """Match the source's tensors with its model's parameters and decide what becomes of each.

    Raises
    ------
    FormatError
        A tensor is unknown to the model, missing, or of another shape or dtype; the source is quantized already.
    Unsupported
        Transformers fuses several tensors of the source to one parameter (the experts of Mixtral and others).
    InvalidArgument
        A skip matches nothing, or a tied head is to be quantized.
    """
    config = source.config()
    quantized = config.pop("quantization_config", None)  # null stands for none
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else repr(quantized)
        raise FormatError(f"{source.path}: is quantized already ({method}); name the float checkpoint")
    dtype = FLOATS[options.dtype or _own_dtype(config)]
    model = architecture.empty_model(config, dtype)
    names, dropped, untied = _match(source, model, options)
    skips = _skips(model, options)
    linear = {} if options.format == "float" else architecture.linear_layers(model, skips)
    if options.format in GROUPED:
        linear, outside = architecture.in_blocks(model, skips)
        skips = sorted({*skips, *outside})
    if not untied:
        architecture.check_not_tied(model, linear)
    settings = _settings(options, skips)
    steps = [_step(source.tensors[old], new, model, linear, options, dtype, settings) for old, new in names.items()]
    if options.format != "float" and not any(step.action == options.format for step in steps):
        raise InvalidArgument("quantize: every linear layer is skipped; nothing would be quantized")
    result = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    result["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        result["tie_word_embeddings"] = False
    if settings is not None:
        result["quantization_config"] = write_quantization(settings, dtype)
    fused = () if settings is None else tuple(architecture.fused_weights(model))
    return Plan(_shards(steps, options.shard_bytes), result, dropped, settings, fused)


def _settings(options: Options, skips: list[str]) -> QuantizationSettings | None:
    if options.format == "float":
        return None
    compute = FLOATS[options.compute_dtype] if options.compute_dtype else None
    settings = QuantizationSettings(options.format, options.blocksize, options.double_quant, compute)
    if options.format in GROUPED:
        settings = replace(
            settings,
            group_size=options.group_size,
            symmetric=options.symmetric,
            act_order=options.act_order,
            true_sequential=options.true_sequential,
            checkpoint_format=grouped_layout(options.format, options.symmetric),
        )
    return replace(settings, skip_modules=skips)


def _own_dtype(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return name if name in FLOATS else "bfloat16"


def _skips(model: Any, options: Options) -> list[str]:
    head = [] if options.quantize_head else architecture.default_skips(model)
    defaults = [*head, *architecture.read_by_mixers(model)]
    return sorted({*defaults, *architecture.resolve_skips(model, options.skip, defaults)})


def _match(source: Source, model: Any, options: Options) -> tuple[dict[str, str], list[str], bool]:
    """Map the source's tensor names to the model's; also what is dropped, and whether tied tensors differ."""
    parameters: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    spelled = architecture.checkpoint_names(model, source.tensors, str(source.path))
    stored = {new: old for old, new in spelled.items()}
    names: dict[str, str] = {}
    dropped: list[str] = []
    unknown: list[str] = []
    untied = False
    for name, own in spelled.items():
        target = tied.get(own)
        if target in stored and _equal(source, name, stored[target]):
            dropped.append(name)
        elif target in stored:
            names[name], untied = own, True
        elif target is not None:
            names[name] = target
        elif own in parameters:
            names[name] = own
        elif architecture.matches_any(name, model._keys_to_ignore_on_load_unexpected):
            dropped.append(name)
        else:
            unknown.append(name)
    if unknown and not options.keep_unknown:
        raise FormatError(
            f"{source.path}: {len(unknown)} tensors have no place in {type(model).__name__}: {_some(unknown)}; "
            "pass --keep-unknown to copy them as they are"
        )
    names |= {name: name for name in unknown}
    _check_complete(source, model, parameters, names, tied)
    return names, dropped, untied


def _check_complete(
    source: Source, model: Any, parameters: dict[str, torch.Tensor], names: dict[str, str], tied: dict[str, str]
) -> None:
    present = set(names.values())
    missing = [
        name
        for name in parameters
        if name not in present
        and tied.get(name) not in present
        and not architecture.matches_any(name, model._keys_to_ignore_on_load_missing)
    ]
    if missing:
        raise FormatError(
            f"{source.path}: {len(missing)} tensors of {type(model).__name__} are missing: {_some(missing)}"
        )
    for old, new in names.items():
        if new not in parameters:
            continue
        info, needed = source.tensors[old], parameters[new]
        if tuple(needed.shape) != info.shape:
            raise FormatError(
                f"{source.path}: tensor {old!r} has shape {info.shape}, config.json asks for {tuple(needed.shape)}"
            )
        if needed.is_floating_point() and info.dtype not in _READABLE:
            raise FormatError(f"{source.path}: tensor {old!r} is {info.dtype}; it must be floating point")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _equal(source: Source, one: str, other: str) -> bool:
    first, second = source.tensors[one], source.tensors[other]
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    step = max(1, _COMPARE_NUMEL // max(1, first.row_numel))
    ranges = ((start, min(first.rows, start + step)) for start in range(0, first.rows, step))
    return all(torch.equal(source.read_rows(one, *rows), source.read_rows(other, *rows)) for rows in ranges)


def _step(
    info: TensorInfo,
    name: str,
    model: Any,
    linear: dict[str, architecture.Linear],
    options: Options,
    dtype: torch.dtype,
    settings: QuantizationSettings | None,
) -> Step:
    kind = architecture.kind_of(name)
    layer = linear.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if layer is None:
        if not info.dtype.is_floating_point:
            target = info.dtype
        else:
            target = torch.float32 if architecture.stays_float32(model, name, dtype) else dtype
        # A buffer may hold an infinity (a mask), and so may what the model does not know.
        trained = architecture.is_parameter(model, name)
        return Step(info, "cast", kind, target, (Spec(name, target, info.shape),), finite=trained)
    if info.dtype not in _READABLE:
        raise FormatError(f"tensor {info.name!r} is {info.dtype}; a linear weight must be floating point")
    if settings is not None and options.format in GROUPED:
        specs = grouped.layer_specs(name.removesuffix("weight"), layer.shape, settings)
        return Step(info, options.format, kind, dtype, specs, transposed=layer.transposed)
    if options.format == "int8":
        return Step(info, "int8", kind, dtype, tuple(int8_specs(name, layer.shape)), transposed=layer.transposed)
    layout = FourBitLayout(name, options.format, options.blocksize, layer.shape, dtype, options.double_quant)
    return Step(info, options.format, kind, dtype, tuple(layout.specs()), layout, layer.transposed)


def _shards(steps: list[Step], limit: int) -> list[list[Step]]:
    """Fill shards in order; a step whose tensors are larger than the limit has one of its own."""
    shards: list[list[Step]] = []
    room = 0
    for step in steps:
        if not shards or step.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(step)
        room -= step.nbytes
    return shards
