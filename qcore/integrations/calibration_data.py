"""Tokens to calibrate with, from what users of GPTQ and AWQ libraries pass: texts, tokens, the name of a data set."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qcore.errors import InvalidArgument

# The file that the authors of GPTQ calibrated with (arXiv 2210.17323, section 4).
C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
_BATCH = 8  # sequences of one length that run together


def token_batches(
    data: str | Iterable[Any], tokenizer: Any, *, samples: int = 128, length: int = 512, caller: str = "quantize"
) -> list[Tensor]:
    """Batches of tokens.

    Parameters
    ----------
    data : str or iterable
        ``"c4"``: the first shard of C4's English part, from the hub or its cache, in windows of ``length`` tokens. Or
        examples: a text each, one sequence of token ids, or a mapping with ``input_ids`` of one sequence and perhaps
        ``attention_mask``, as tokenizers return; what is masked out is left out.
    tokenizer
        For texts; may be None where there are none.
    samples, length : int
        Most examples to use, and most tokens of each.
    caller : str
        What messages begin with.

    Returns
    -------
    list of Tensor
        int64 ``(sequences, length)``, up to eight sequences of one length together.

    Raises
    ------
    InvalidArgument
        An unknown name, no tokens, texts without a tokenizer, or an example of another kind.
    """
    if samples < 1 or length < 2:
        raise InvalidArgument(f"{caller}: {samples} examples of {length} tokens; at least 1 of 2 tokens are needed")
    if isinstance(data, str):
        if data not in ("c4", "c4-new"):
            raise InvalidArgument(f"{caller}: data set {data!r} is not known; pass a list of texts, or 'c4'")
        found = list(islice(_windows(_c4_texts(caller), tokenizer, length), samples))
    elif isinstance(data, Mapping):
        raise InvalidArgument(f"{caller}: came one mapping, needs a list of examples; write [example]")
    else:
        found = [_tokens(each, tokenizer, caller)[:length] for each in islice(data, samples)]
    found = [each for each in found if each.numel()]
    if not found:
        raise InvalidArgument(f"{caller}: the examples have no tokens; pass more text")
    by_length: dict[int, list[Tensor]] = {}
    for each in found:
        by_length.setdefault(len(each), []).append(each)
    return [batch for same in by_length.values() for batch in torch.stack(same).split(_BATCH)]


def _tokens(example: Any, tokenizer: Any, caller: str) -> Tensor:
    if isinstance(example, str):
        if tokenizer is None:
            raise InvalidArgument(f"{caller}: examples are texts; pass the tokenizer as well")
        example = tokenizer(example, verbose=False)
    mask = None
    if isinstance(example, Mapping) or hasattr(example, "input_ids"):  # BatchEncoding is no Mapping everywhere
        if "input_ids" not in example:
            raise InvalidArgument(
                f"{caller}: an example has {', '.join(map(str, example))}, needs input_ids; pass the texts themselves"
            )
        mask = example.get("attention_mask")
        example = example["input_ids"]
    try:
        ids = torch.as_tensor(example)
        kept = None if mask is None else torch.as_tensor(mask, device=ids.device).bool()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"{caller}: an example is {type(example).__name__}, needs a text or tokens") from error
    if ids.is_floating_point() and ids.numel():
        raise InvalidArgument(f"{caller}: an example holds {ids.dtype}, needs a text or whole numbers")
    if ids.numel() != ids.shape[-1:].numel():
        raise InvalidArgument(f"{caller}: an example has shape {tuple(ids.shape)}; pass each sequence by itself")
    ids = ids.reshape(-1)
    if kept is not None and kept.numel() != ids.numel():
        raise InvalidArgument(f"{caller}: an example has {ids.numel()} tokens and a mask of {kept.numel()}")
    kept = None if kept is None else kept.reshape(-1)
    return ids.long() if kept is None else ids.long()[kept]


def _windows(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """``length`` tokens each of ``texts`` in a row; what is left at the end is not used."""
    rest: list[int] = []
    for text in texts:
        rest += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(rest) >= length:
            yield torch.tensor(rest[:length])
            rest = rest[length:]


def _c4_texts(caller: str) -> Iterator[str]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(*C4, repo_type="dataset")
    except Exception as error:  # the hub's errors have no common base
        raise InvalidArgument(
            f"{caller}: C4 cannot be fetched ({error}); pass texts of your own, such as dataset=[...]"
        ) from error
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield str(json.loads(line)["text"])
