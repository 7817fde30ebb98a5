"""Quantize a Transformers model block by block to GPTQ or AWQ, on text that is calibrated with.

The tokens run through the float weights of one block, whose layers' inputs are observed; the layers are quantized; the
tokens run through the block again as it is now, and what comes out is the next block's input. So errors of earlier
blocks are seen, and made up for, by later ones. One block's weights are in memory at a time, beside the hidden states
of all tokens. A finished block is a file of its own, which an interrupted run finds again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
from qcore.integrations.blocks import BlockWeights, Call, block_batches, block_inputs, install, quantize_block
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
        self._dtype = FLOATS[str(plan.config["dtype"])]
        self._model = architecture.empty_model(source.config(), self._dtype)
        self._config = self._model.config
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
        hidden, calls = self._first_inputs()
        for index, block in enumerate(blocks):
            prefix = f"{self._path}.{index}."
            self._fill(block, prefix)
            batches = None if hidden is None else block_batches(block, hidden, calls[index])
            found = None
            if not self._kept(index):
                found = quantize_block(block, self._names(block, prefix), batches, self._options, self._config, prefix)
                self._write(index, self._tensors(prefix, found))
            if hidden is not None and batches is not None and index + 1 < len(blocks):
                found = found or self._read(block, prefix)
                install(block, found.weights, found.changed)
                with torch.inference_mode():
                    for i, batch in enumerate(batches):
                        hidden[i] = batch()
            _empty(block)
            self._listener.calibrated(index + 1, len(blocks))
        return self

    def _first_inputs(self) -> tuple[list[Tensor] | None, list[list[Call]]]:
        """Hidden states before the first block, and what each block is called with, by batch; None to round."""
        if self._windows is None:
            return None, []
        head = self._model.get_output_embeddings()
        for name, module in self._model.named_modules():
            if name.startswith(f"{self._path}.") or module is head:
                continue
            for key in module._parameters:
                self._put(self._model, f"{name}.{key}" if name else key)
        found = block_inputs(self._model, self._path, self._windows.split(_BATCH))
        _empty(self._model)
        return found

    def _names(self, block: nn.Module, prefix: str) -> list[str]:
        return [name for name, _ in block.named_modules() if prefix + name in self._quantized]

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

    def _tensors(self, prefix: str, found: BlockWeights) -> dict[str, Tensor]:
        """What is stored of a block; how far its quantized weights are from the float ones is noted."""
        tensors = {prefix + name: value for name, value in found.changed.items()}
        for name, weight in found.weights.items():
            wanted = found.wanted[name]
            error = dequantize_int4(weight, torch.float32) - wanted
            squares = float(error.square().sum()), float(wanted.square().sum())
            self._errors[f"{prefix}{name}.weight"] = ErrorSum(*squares)
            tensors |= {f"{prefix}{name}.{part}": value for part, value in self._layer(weight).items()}
        return tensors

    def _layer(self, weight: WeightInt4) -> dict[str, Tensor]:
        if self._options.format == "awq":
            return awq_layers.write_layer(weight)
        return gptq_layers.write_layer(weight, "gptq" if self._options.symmetric else "gptq_v2")

    def _read(self, block: nn.Module, prefix: str) -> BlockWeights:
        """A block of an earlier run."""
        stored = {name: self.tensor(prefix + name) for name, _ in block.named_parameters()}
        changed = {name: value for name, value in stored.items() if value is not None}
        return BlockWeights({name: self._read_layer(prefix + name) for name in self._names(block, prefix)}, changed)

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
