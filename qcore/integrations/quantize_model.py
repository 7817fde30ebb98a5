"""Quantize a Transformers model that is in memory to GPTQ or AWQ, on tokens that are calibrated with.

As :mod:`qcore.integrations.calibrated` does with a checkpoint that is larger than the memory: block by block, each with
the hidden states that the quantized blocks in front of it give. The model is touched when the last block is done: until
then a block has its float weights back as soon as the next one's inputs are known, and the quantized ones wait beside
the model, which adds half a byte a weight to the peak, and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from qcore.errors import InvalidArgument, Unsupported
from qcore.formats import architecture, grouped
from qcore.formats.plan import Options
from qcore.formats.quantization_config import QuantizationSettings, grouped_layout
from qcore.integrations import experts
from qcore.integrations.blocks import block_batches, block_inputs, float_weight, install, quantize_block
from qcore.integrations.layers import keep_hook
from qcore.integrations.transformers.config import QcoreConfig
from qcore.integrations.transformers.quantizer import QcoreQuantizer
from qcore.nn import LinearInt4

log = logging.get_logger(__name__)


def quantize_model(
    model: Any,
    batches: Sequence[Tensor] | None,
    options: Options,
    *,
    skip_modules: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Replace the linear layers in the blocks of ``model`` by :class:`LinearInt4`, in place.

    Whatever is raised before the last block is done, by ``progress`` and Ctrl-C too, leaves the model as it was.

    Parameters
    ----------
    model : PreTrainedModel
        With float weights, in memory; the blocks run where they are. Fused experts are left alone, with a warning.
    batches : sequence of Tensor, optional
        int64 ``(sequences, length)`` tokens each; None to round to nearest.
    options : Options
        ``format`` gptq or awq, and what belongs to it.
    skip_modules : iterable of str
        Layers to leave in floating point, as for ``QcoreConfig``; the output head always is.
    progress : callable, optional
        Called with the blocks that are done and how many there are.

    Returns
    -------
    PreTrainedModel
        ``model``; it saves as a checkpoint in that format.

    Raises
    ------
    InvalidArgument
        No tokens, a pattern that matches no layer, a layer that the format cannot hold or that no token reaches, or a
        Hessian that is not finite.
    Unsupported
        Part of the model is offloaded.
    """
    defaults = [*architecture.default_skips(model), *architecture.read_by_mixers(model)]
    skips = [*defaults, *skip_modules]
    names = [*architecture.linear_layers(model, []), *experts.find(model, [])]
    architecture.check_patterns(names, skips[len(defaults) :], "quantize: skip_modules")
    path = architecture.block_list(model)
    layers, outside = architecture.in_blocks(model, skips)
    settings = QuantizationSettings(
        options.format,
        group_size=options.group_size,
        symmetric=options.symmetric,
        act_order=options.act_order,
        true_sequential=options.true_sequential,
        checkpoint_format=grouped_layout(options.format, options.symmetric),
        skip_modules=sorted({*skips, *outside}),
    )
    _check(model, layers, settings, batches)
    left = [*experts.find(model, skips), *experts.unreachable(model, skips)]
    if left:
        log.warning(f"qcore leaves {len(left)} fused expert weights in floating point, such as {left[0]}")
    blocks, dtype = model.get_submodule(path), next(model.parameters()).dtype
    waiting: dict[str, LinearInt4] = {}
    changed: dict[str, Tensor] = {}
    with _in_eval_mode(model):
        hidden, calls = (None, []) if batches is None else block_inputs(model, path, batches)
        for index, block in enumerate(blocks):
            prefix = f"{path}.{index}."
            names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
            runs = None if hidden is None else block_batches(block, hidden, calls[index])
            with _put_back(block, names):
                found = quantize_block(block, names, runs, options, model.config, prefix)
                install(block, {}, found.changed)
                if hidden is not None and runs is not None and index + 1 < len(blocks):
                    with torch.inference_mode():
                        for i, run in enumerate(runs):
                            hidden[i] = run()
            changed |= {prefix + name: value for name, value in found.changed.items()}
            for name, weight in found.weights.items():
                waiting[prefix + name] = LinearInt4.of(weight, checkpoint_format=settings.checkpoint_format)
            del found  # the block's weights in float32
            if progress is not None:
                progress(index + 1, len(blocks))
    install(model, {}, changed)
    for name in list(waiting):
        _exchange(model, name, waiting.pop(name))
    quantizer = QcoreQuantizer(QcoreConfig(options.format), pre_quantized=True)
    quantizer.take(model, settings, dtype, {name for name, layer in layers.items() if layer.transposed})
    return model


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in eval mode, and afterwards in the one that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _put_back(block: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give the linear layers ``names``, and the vectors beside them, the values back that they had."""
    weights = {f"{name}.weight" for name in names}
    kept = {
        name: value.detach().clone()
        for name, value in block.named_parameters()
        if name in weights or value.dim() < 2  # norms and biases are what AWQ changes
    }
    try:
        yield
    finally:
        install(block, {}, kept)


def _exchange(model: nn.Module, name: str, layer: LinearInt4) -> None:
    """Put ``layer`` where the float one was, with its bias and whatever Accelerate hooked to it."""
    old: Any = model.get_submodule(name)
    layer.bias = old.bias
    layer.train(old.training)
    keep_hook(old, layer)
    model.set_submodule(name, layer)


def _check(
    model: Any, layers: dict[str, architecture.Linear], settings: QuantizationSettings, batches: Sequence[Tensor] | None
) -> None:
    if settings.format not in ("gptq", "awq"):
        raise InvalidArgument(f"quantize: format is {settings.format!r}, expected gptq or awq")
    if not layers:
        raise InvalidArgument("quantize: every linear layer is skipped; nothing would be quantized")
    if batches is not None and not any(batch.numel() for batch in batches):
        raise InvalidArgument("quantize: no tokens to calibrate with; pass examples that have some")
    away = [name for name in layers if float_weight(model.get_submodule(name)).is_meta]
    if away:
        raise Unsupported(f"quantize: {len(away)} layers are offloaded, such as {away[0]}; load without offload")
    for name, layer in layers.items():
        grouped.layer_specs(f"{name}.", layer.shape, settings)
