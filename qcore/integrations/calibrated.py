"""Quantize a Transformers model block by block to GPTQ or AWQ, on text that is calibrated with.

The tokens run through the float weights of one block, whose layers' inputs are observed; the layers are quantized; the
tokens run through the block again as it is now, and what comes out is the next block's input. So errors of earlier
blocks are seen, and made up for, by later ones. One block's weights are in memory at a time, beside the hidden states
of all tokens. A finished block is a file of its own, which an interrupted run finds again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcore.algorithms import awq, gptq
from qcore.algorithms.calibration import Statistics, observe
from qcore.algorithms.grid import round_to_nearest
from qcore.backend.weights import WeightInt4
from qcore.errors import FormatError, InvalidArgument
from qcore.formats import architecture
from qcore.formats.convert import ErrorSum
from qcore.formats.output import PartialOutput
from qcore.formats.plan import FLOATS, Options, Plan, Step
from qcore.formats.quantize import BLOCKS, Listener
from qcore.formats.safetensors import SafetensorsFile
from qcore.formats.shard_writer import ShardWriter, Spec, verify_shard
from qcore.formats.source import Source
from qcore.functional import awq_layers, gptq_layers
from qcore.integrations.producers import find_producer
from qcore.ops.int4 import dequantize_int4

_BATCH = 8  # windows that run through a block at a time


def make_blocks(
    windows: Tensor | None, options: Options, source: Source, plan: Plan, output: PartialOutput, listener: Listener
) -> Blocks:
    """Quantize every block; ``partial(make_blocks, windows, options)`` is the ``make`` of ``quantize_checkpoint``.

    Parameters
    ----------
    windows : Tensor, optional
        int64 ``(count, length)`` tokens; None to round to nearest.

    Raises
    ------
    FormatError, InvalidArgument
        The source is damaged, or a layer cannot be quantized.
    """
    return Blocks(windows, options, source, plan, output, listener).run()


@dataclass
class _Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Enough(Exception):
    """The last block was reached."""


class Blocks:
    """The made tensors; see :func:`make_blocks`."""

    def __init__(
        self,
        windows: Tensor | None,
        options: Options,
        source: Source,
        plan: Plan,
        output: PartialOutput,
        listener: Listener,
    ) -> None:
        self._windows, self._options, self._source = windows, options, source
        self._output, self._listener = output, listener
        config = source.config()
        self._dtype = FLOATS[str(plan.config["dtype"])]
        self._model = architecture.empty_model(config, self._dtype)
        self._path = architecture.block_list(self._model)
        # The model's names for what is read: a layer's own weight, or the tensor itself.
        self._sources = {_model_name(step): step for step in plan.steps}
        self._quantized = {_model_name(step)[: -len(".weight")] for step in plan.steps if step.action == options.format}
        self._files: list[SafetensorsFile] = []
        self._places: dict[str, SafetensorsFile] = {}
        self._errors: dict[str, ErrorSum] = {}

    def tensor(self, name: str) -> Tensor | None:
        file = self._places.get(name)
        return None if file is None else file.read(name)

    def error(self, step: Step) -> ErrorSum:
        return self._errors.get(_model_name(step), ErrorSum())

    def run(self) -> Blocks:
        """Make what is not there yet."""
        blocks: nn.ModuleList = self._model.get_submodule(self._path)
        (self._output.path / BLOCKS).mkdir(exist_ok=True)
        hidden, calls = ([], []) if self._windows is None else self._first_inputs(blocks)
        for index, block in enumerate(blocks):
            prefix = f"{self._path}.{index}."
            self._fill(block, prefix)
            kept = self._kept(index)
            batches = [partial(_forward, block, x, call) for x, call in zip(hidden, calls[index] if calls else [])]
            tensors, weights = ({}, {}) if kept else self._quantize(block, prefix, batches)
            if not kept:
                self._write(index, tensors)
            last = index + 1 == len(blocks)
            if hidden and not last:
                self._replace(block, prefix, weights)
                with torch.inference_mode():
                    for i, batch in enumerate(batches):
                        hidden[i] = batch()
            _empty(block)
            self._listener.calibrated(index + 1, len(blocks))
        return self

    def _first_inputs(self, blocks: nn.ModuleList) -> tuple[list[Tensor], list[list[_Call]]]:
        """Hidden states before the first block, and what each block is called with, by batch."""
        assert self._windows is not None
        head = self._model.get_output_embeddings()
        for name, module in self._model.named_modules():
            if name.startswith(f"{self._path}.") or module is head:
                continue
            for key in module._parameters:
                self._put(self._model, f"{name}.{key}" if name else key)
        real = list(blocks)
        hidden: list[Tensor] = []
        calls: list[list[_Call]] = [[] for _ in real]
        path, _, key = self._path.rpartition(".")
        parent = self._model.get_submodule(path)
        stubs = nn.ModuleList([_Stub(block, index, calls, hidden) for index, block in enumerate(real)])
        setattr(parent, key, stubs)
        try:
            with torch.inference_mode():
                for ids in self._windows.split(_BATCH):
                    try:
                        self._model(ids, use_cache=False)
                    except _Enough:
                        continue
        finally:
            setattr(parent, key, blocks)
        _empty(self._model)
        return hidden, calls

    def _fill(self, block: nn.Module, prefix: str) -> None:
        for name in [*dict(block.named_parameters())]:
            self._put(self._model, prefix + name)

    def _put(self, model: nn.Module, name: str) -> None:
        """Read one parameter into its place."""
        step = self._sources.get(name)
        if step is None:
            raise FormatError(f"{self._source.path}: {name} is missing; calibration needs the whole block")
        path, _, key = name.rpartition(".")
        value = self._source.read(step.info.name)
        module = model.get_submodule(path)
        target = value.to(self._dtype if value.is_floating_point() else value.dtype)
        module._parameters[key] = nn.Parameter(target, requires_grad=False)

    def _quantize(
        self, block: nn.Module, prefix: str, batches: Sequence[Callable[[], Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, WeightInt4]]:
        modules = dict(block.named_modules())
        names = [name for name in modules if prefix + name in self._quantized]
        made: dict[str, WeightInt4] = {}
        tensors: dict[str, Tensor] = {}
        options = self._options
        originals = {name: self._weight(modules[name], prefix + name).float().clone() for name in names}
        if self._windows is None:
            for name in names:
                size = options.group_size if options.group_size != -1 else originals[name].shape[1]
                made[name] = round_to_nearest(originals[name], size, symmetric=options.symmetric)
        else:
            statistics = observe(block, names, batches)
            missing = set(names) - {name for each in statistics for name in each.layers}
            if missing:
                raise InvalidArgument(
                    f"quantize: no token of the calibration text reaches {prefix}{min(missing)}; use more text, or "
                    "pass --skip for it"
                )
            if options.format == "gptq":
                made = self._gptq(originals, statistics)
            else:
                made, scaled = self._awq(block, prefix, originals, statistics)
                tensors |= {prefix + name: value for name, value in scaled.items()}
        for name, weight in made.items():
            values = dequantize_int4(weight, torch.float32)
            wanted = self._weight(modules[name], prefix + name).float()  # scaled, by AWQ
            squares = float((values - wanted).square().sum()), float(wanted.square().sum())
            self._errors[f"{prefix}{name}.weight"] = ErrorSum(*squares)
            layer = self._layer(weight)
            tensors |= {f"{prefix}{name}.{part}": value for part, value in layer.items()}
        return tensors, made

    def _layer(self, weight: WeightInt4) -> dict[str, Tensor]:
        if self._options.format == "awq":
            return awq_layers.write_layer(weight)
        return gptq_layers.write_layer(weight, "gptq" if self._options.symmetric else "gptq_v2")

    def _weight(self, module: Any, name: str) -> Tensor:
        """The weight ``(out, in)``; a view, so that writing to it changes the module."""
        weight: Tensor = module.weight
        return weight.t() if self._sources[f"{name}.weight"].transposed else weight

    def _gptq(self, originals: dict[str, Tensor], statistics: list[Statistics]) -> dict[str, WeightInt4]:
        options = self._options
        settings = gptq.GptqOptions(options.group_size, options.symmetric, options.act_order, options.damping)
        made = {}
        for each in statistics:
            # Layers with one input have one Hessian: they are quantized as one, and taken apart again.
            together = torch.cat([originals[name] for name in each.layers])
            whole = gptq.quantize(together, each.hessian, settings)
            start = 0
            for name in each.layers:
                rows = slice(start, start + len(originals[name]))
                start = rows.stop
                zeros = None if whole.zeros is None else whole.zeros[rows]
                shape = (len(originals[name]), whole.shape[1])
                made[name] = WeightInt4(
                    whole.packed[rows], whole.scales[rows], zeros, whole.group_size, shape, whole.perm
                )
        return made

    def _awq(
        self, block: nn.Module, prefix: str, originals: dict[str, Tensor], statistics: list[Statistics]
    ) -> tuple[dict[str, WeightInt4], dict[str, Tensor]]:
        options = self._options
        weights = dict(originals)
        changed: dict[str, Tensor] = {}
        factors: dict[int, Tensor] = {}
        for index, each in enumerate(statistics):
            size = options.group_size if options.group_size != -1 else len(each.hessian)
            producer = find_producer(block, each, weights, self._model.config)
            if producer is None:
                continue
            owner = producer.owner
            found = awq.search_scales(
                [weights[name] for name in each.layers],
                each.hessian,
                each.mean_magnitude,
                size,
                symmetric=options.symmetric,
                owner=owner,
            )
            if not producer.divide(found, weights, changed):
                continue
            factors[index] = found
            for name in each.layers:
                weights[name] = weights[name] * found
        made = {}
        for index, each in enumerate(statistics):
            size = options.group_size if options.group_size != -1 else len(each.hessian)
            factor = factors.get(index)
            hessian = each.hessian if factor is None else each.hessian / (factor[:, None] * factor[None, :])
            for name in each.layers:
                # As the authors do: a clipped query or key changes which tokens attend to which.
                clip = not name.endswith(("q_proj", "k_proj"))
                made[name] = awq.quantize(weights[name], hessian, size, symmetric=options.symmetric, clip=clip)
        self._install(block, prefix, weights, changed)
        return made, changed

    def _install(self, block: nn.Module, prefix: str, weights: dict[str, Tensor], changed: dict[str, Tensor]) -> None:
        """Put the scaled weights and norms into the block, which runs with them from now on."""
        with torch.no_grad():
            for name, value in weights.items():
                self._weight(block.get_submodule(name), prefix + name).copy_(value)
            for name, value in changed.items():
                block.get_parameter(name).copy_(value)

    def _replace(self, block: nn.Module, prefix: str, weights: dict[str, WeightInt4]) -> None:
        """Dequantized weights in the place of the float ones, and what was changed beside them."""
        with torch.no_grad():
            for name in dict(block.named_parameters()):
                stored = self.tensor(prefix + name)
                if stored is not None:
                    block.get_parameter(name).copy_(stored)
            for name, module in block.named_modules():
                if prefix + name not in self._quantized:
                    continue
                weight = weights.get(name) or self._read_layer(prefix + name)
                self._weight(module, prefix + name).copy_(dequantize_int4(weight, self._dtype))

    def _read_layer(self, name: str) -> WeightInt4:
        parts = {part: self.tensor(f"{name}.{part}") for part in gptq_layers.NAMES}
        tensors = {part: value for part, value in parts.items() if value is not None}
        if self._options.format == "awq":
            return awq_layers.read_layer(tensors, self._options.group_size, name)
        layout = "gptq" if self._options.symmetric else "gptq_v2"
        return gptq_layers.read_layer(tensors, self._options.group_size, layout, name)

    def _name(self, index: int) -> str:
        return f"{BLOCKS}/block-{index:05d}.safetensors"

    def _write(self, index: int, tensors: dict[str, Tensor]) -> None:
        specs = [Spec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        writer = ShardWriter(self._output.path / self._name(index), specs)
        try:
            for name, value in tensors.items():
                writer.write(name, value.contiguous())
            digests = writer.finish()
        except BaseException:
            writer.abort()
            raise
        prefix = f"{self._path}.{index}."
        errors = {k: [e.error, e.signal] for k, e in self._errors.items() if k.startswith(prefix)}
        described = [[spec.name, str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in specs]
        self._output.record(self._name(index), {"sha256": digests, "errors": errors, "specs": described})
        self._open(index)

    def _kept(self, index: int) -> bool:
        """Whether the file of an earlier run is whole; it is opened then."""
        done = self._output.finished(self._name(index))
        if done is None:
            return False
        specs = [Spec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in done["specs"]]
        try:
            verify_shard(self._output.path / self._name(index), specs, done["sha256"])
        except FormatError:
            self._output.forget(self._name(index))
            return False
        self._errors |= {name: ErrorSum(*pair) for name, pair in done["errors"].items()}
        self._open(index)
        return True

    def _open(self, index: int) -> None:
        file = SafetensorsFile(self._output.path / self._name(index))
        self._files.append(file)
        self._places |= dict.fromkeys(file.entries, file)


class _Stub(nn.Module):
    """Stands where a block stood, notes what it is called with, and lets the hidden states through."""

    def __init__(self, block: nn.Module, index: int, calls: list[list[_Call]], hidden: list[Tensor]) -> None:
        super().__init__()
        self._known = (block, index, calls, hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_known"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _, index, calls, hidden = self._known
        calls[index].append(_Call(args, kwargs))
        if index == 0:
            hidden.append(x)
        if index + 1 == len(calls):
            raise _Enough
        return x


def _forward(block: nn.Module, x: Tensor, call: _Call) -> Tensor:
    out = block(x, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _empty(block: nn.Module) -> None:
    for module in block.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(value.to("meta"), requires_grad=False)


def _model_name(step: Step) -> str:
    """The model's name of the tensor that a step reads."""
    name = step.specs[0].name
    return f"{name.removesuffix('.qweight')}.weight" if step.action in ("gptq", "awq") else name


def calibration_windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """``count`` windows of ``length`` tokens, spread evenly over ``text``: int64 ``(count, length)``.

    Raises
    ------
    InvalidArgument
        The text has fewer.
    """
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    found = ids.numel() // length
    if found < count:
        raise InvalidArgument(
            f"quantize: the calibration text has {ids.numel()} tokens, {count} windows of {length} need "
            f"{count * length}; pass more text, or --windows {max(found, 1)}"
        )
    windows = ids[: found * length].view(found, length)
    return windows[torch.linspace(0, found - 1, count).long()]
