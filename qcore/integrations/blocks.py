"""Quantize one block of a model to GPTQ or AWQ in memory, and run tokens through a model block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcore.algorithms import awq, gptq
from qcore.algorithms.calibration import Statistics, observe
from qcore.algorithms.grid import round_to_nearest
from qcore.backend.weights import WeightInt4
from qcore.errors import InvalidArgument
from qcore.formats.plan import Options
from qcore.integrations.producers import find_producer
from qcore.ops.int4 import dequantize_int4

Batches = Sequence[Callable[[], Tensor]]


@dataclass
class BlockWeights:
    """What became of a block; names are those in the block.

    Attributes
    ----------
    weights : dict
        Quantized layers.
    changed : dict
        Other parameters that are not what they were: norms and biases that took an AWQ scale back.
    wanted : dict
        float32 ``(out, in)`` that each quantized weight stands for: the layer's own, scaled by AWQ.
    """

    weights: dict[str, WeightInt4] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    wanted: dict[str, Tensor] = field(default_factory=dict)


def float_weight(module: Any) -> Tensor:
    """The weight of a linear layer as ``(out, in)``: a view, so that writing to it changes the module."""
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = module.weight
    return weight.t() if isinstance(module, Conv1D) else weight


def quantize_block(
    block: nn.Module, names: Sequence[str], batches: Batches | None, options: Options, config: Any, where: str
) -> BlockWeights:
    """Choose the codes of the linear layers ``names`` of ``block``.

    Parameters
    ----------
    block : nn.Module
        With float weights. GPTQ leaves quantized ones in it, AWQ scaled ones; see :func:`install`.
    names : sequence of str
        Linear layers, by name in the block.
    batches : sequence of callable, optional
        Each runs one batch through the block; None to round to nearest.
    options : Options
    config
        The model's configuration (size of an attention head).
    where : str
        The block's name and a dot, for messages.

    Raises
    ------
    InvalidArgument
        No token reaches a layer, or a layer cannot be quantized.
    """
    modules = dict(block.named_modules())
    originals = {name: float_weight(modules[name]).detach().float().clone() for name in names}
    if batches is None:
        found = BlockWeights(wanted=originals)
        for name, weight in originals.items():
            size = _group_size(options, weight)
            found.weights[name] = round_to_nearest(weight, size, symmetric=options.symmetric)
        return found
    sequential = options.format == "gptq" and options.true_sequential
    # One batch says which layers share an input; then each stage sees them all.
    statistics = observe(block, names, batches[:1] if sequential else batches)
    if sequential and len(names) > sum(len(each.layers) for each in statistics):
        statistics = observe(block, names, batches)
    missing = set(names) - {name for each in statistics for name in each.layers}
    if missing:
        raise InvalidArgument(
            f"quantize: no token of the calibration text reaches {where}{min(missing)}; use more text, or skip it "
            "(--skip)"
        )
    if options.format == "gptq":
        return _gptq(block, originals, statistics, batches, options)
    return _awq(block, originals, statistics, options, config)


def install(block: nn.Module, weights: dict[str, WeightInt4], changed: dict[str, Tensor]) -> None:
    """Put what quantized weights stand for, and the parameters that changed beside them, into a float block."""
    modules = dict(block.named_modules())
    with torch.no_grad():
        for name, value in changed.items():
            block.get_parameter(name).copy_(value)
        for name, weight in weights.items():
            target = float_weight(modules[name])
            target.copy_(dequantize_int4(weight, target.dtype))


def _group_size(options: Options, weight: Tensor) -> int:
    return options.group_size if options.group_size != -1 else weight.shape[1]


def _stages(statistics: list[Statistics]) -> list[list[Statistics]]:
    """Inputs that are seen anew together: those of layers with the same last names, such as of all experts."""
    stages: dict[tuple[str, ...], list[Statistics]] = {}
    for each in statistics:
        stages.setdefault(tuple(name.rpartition(".")[2] for name in each.layers), []).append(each)
    return list(stages.values())


def _gptq(
    block: nn.Module,
    originals: dict[str, Tensor],
    statistics: list[Statistics],
    batches: Batches,
    options: Options,
) -> BlockWeights:
    settings = gptq.GptqOptions(
        options.group_size, options.symmetric, options.act_order, options.group_order, options.damping
    )
    found = BlockWeights(wanted=originals)
    for stage in _stages(statistics):
        if options.true_sequential:
            # The layers in front are quantized by now, and these make up for their errors.
            layers = [name for each in stage for name in each.layers]
            stage = observe(block, layers, batches, to_the_end=False)
        made: dict[str, WeightInt4] = {}
        for each in stage:
            made |= _gptq_together({name: originals[name] for name in each.layers}, each.hessian, settings)
        found.weights |= made
        install(block, made, {})
    return found


def _gptq_together(weights: dict[str, Tensor], hessian: Tensor, settings: gptq.GptqOptions) -> dict[str, WeightInt4]:
    """Layers with one input have one Hessian: they are quantized as one, and taken apart again."""
    whole = gptq.quantize(torch.cat(list(weights.values())), hessian, settings)
    made, start = {}, 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        start = rows.stop
        zeros = None if whole.zeros is None else whole.zeros[rows]
        shape = (len(weight), whole.shape[1])
        made[name] = WeightInt4(whole.packed[rows], whole.scales[rows], zeros, whole.group_size, shape, whole.perm)
    return made


def _awq(
    block: nn.Module, originals: dict[str, Tensor], statistics: list[Statistics], options: Options, config: Any
) -> BlockWeights:
    weights = dict(originals)
    changed: dict[str, Tensor] = {}
    factors: dict[int, Tensor] = {}
    for index, each in enumerate(statistics):
        producer = find_producer(block, each, weights, config)
        if producer is None:
            continue
        found = awq.search_scales(
            [weights[name] for name in each.layers],
            each.hessian,
            each.mean_magnitude,
            _group_size(options, each.hessian),
            symmetric=options.symmetric,
            owner=producer.owner,
        )
        if not producer.divide(found, weights, changed):
            continue
        factors[index] = found
        for name in each.layers:
            weights[name] = weights[name] * found
    made = {}
    for index, each in enumerate(statistics):
        factor = factors.get(index)
        hessian = each.hessian if factor is None else each.hessian / (factor[:, None] * factor[None, :])
        for name in each.layers:
            # As the authors do: a clipped query or key changes which tokens attend to which.
            clip = not name.endswith(("q_proj", "k_proj"))
            size = _group_size(options, hessian)
            made[name] = awq.quantize(weights[name], hessian, size, symmetric=options.symmetric, clip=clip)
    modules = dict(block.named_modules())
    with torch.no_grad():
        for name, value in weights.items():
            float_weight(modules[name]).copy_(value)
        for name, value in changed.items():
            block.get_parameter(name).copy_(value)
    wanted = {name: float_weight(modules[name]).float() for name in made}
    return BlockWeights(made, changed, wanted)


@dataclass
class Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def block_inputs(model: Any, path: str, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Call]]]:
    """Hidden states in front of the first block for each batch of tokens, and what each block is called with.

    ``path`` names the model's list of blocks, none of which is run.
    """
    blocks: nn.ModuleList = model.get_submodule(path)
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]
    stubs = nn.ModuleList([_Stub(block, index, calls, hidden) for index, block in enumerate(blocks)])
    model.set_submodule(path, stubs)
    try:
        with torch.inference_mode():
            for ids in batches:
                try:
                    model(ids, use_cache=False)
                except _Enough:
                    continue
    finally:
        model.set_submodule(path, blocks)
    return hidden, calls


def block_batches(block: nn.Module, hidden: list[Tensor], calls: list[Call]) -> list[Callable[[], Tensor]]:
    """For each batch, what runs it through ``block`` and returns the next hidden states."""
    return [partial(_forward, block, x, call) for x, call in zip(hidden, calls, strict=True)]


class _Enough(Exception):
    """The last block was reached."""


class _Hidden(Tensor):
    """Hidden states that are their own first part: some models ask a block for ``[0]``, where others take it whole."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        return self if type(index) is int and index == 0 else super().__getitem__(index)


class _Stub(nn.Module):
    """Stands where a block stood, notes what it is called with, and lets the hidden states through."""

    def __init__(self, block: nn.Module, index: int, calls: list[list[Call]], hidden: list[Tensor]) -> None:
        super().__init__()
        self._known = (block, index, calls, hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_known"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _, index, calls, hidden = self._known
        calls[index].append(Call(args, kwargs))
        if index == 0:
            hidden.append(x)
        if index + 1 == len(calls):
            raise _Enough
        return x.as_subclass(_Hidden)


def _forward(block: nn.Module, x: Tensor, call: Call) -> Tensor:
    out = block(x, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
