"""Perplexity of a causal language model on a text, in windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore.errors import InvalidArgument


def pydoc_topics() -> str:
    """The reference manual that comes with every Python, in the order of its keys: 466 kB of technical English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def tokens_of(tokenizer: Any, text: str, count: int, window: int) -> Tensor:
    """The first ``count`` tokens of ``text``, without special tokens, in whole windows: int64 ``(windows, window)``.

    Raises
    ------
    InvalidArgument
        The text has less than one window.
    """
    # A token is at most a few dozen characters; the bound keeps a large text from being tokenized whole.
    ids: Tensor = tokenizer(text[: 64 * count], add_special_tokens=False, return_tensors="pt", verbose=False)[
        "input_ids"
    ][0]
    windows = min(count, ids.numel()) // window
    if windows == 0:
        raise InvalidArgument(f"eval: the text has {ids.numel()} tokens, one window takes {window}")
    return ids[: windows * window].view(windows, window)


def perplexity(model: Any, windows: Tensor, progress: Callable[[int], None] | None = None) -> float:
    """Perplexity over ``windows`` (int64, ``(count, length)``); each begins without context.

    ``exp`` of the mean negative log likelihood of every token but the first of its window, in float64.
    """
    total, count = 0.0, 0
    device = next(iter(model.parameters())).device
    with torch.inference_mode():
        for ids in windows.to(device):
            logits = model(ids[None], use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += float(loss.double().sum())
            count += loss.numel()
            if progress is not None:
                progress(ids.numel())
    return math.exp(total / count)
