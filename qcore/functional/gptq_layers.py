"""GPTQ checkpoints: the tensors of one layer as a :class:`WeightInt4` and back, without a loss in either direction.

A layer of shape (O, I) with groups of g inputs, G = ceil(I / g), is four tensors:

========= ================= ===========================================================================
qweight   int32 (I/8, O)    bits 4j of row r hold input 8r + j
qzeros    int32 (G, O/8)    bits 4j of column c hold output 8c + j; ``gptq`` stores one less, ``gptq_v2`` the zero point
scales    float (G, O)      w = scales[g_idx] * (q - zero)
g_idx     int32 (I,)        group of each input; absent: i // g. Not ascending where columns were quantized by
                            importance (``desc_act``)
========= ================= ===========================================================================

``gptq`` takes one off every zero point by subtracting 0x11111111 from the packed word, so a zero point of 0 borrows
from its neighbour; adding the same word gives every value back. Files of an old AutoGPTQ that lost the borrow cannot be
told from others. Sources: Frantar et al., *GPTQ*, 2022 (arXiv 2210.17323); the layout as AutoGPTQ 0.7 and GPTQModel
write it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcore.backend.weights import WeightInt4
from qcore.errors import FormatError, InvalidArgument

NAMES = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")
_ONES = 0x11111111
_SHIFTS = tuple(range(0, 32, 4))
_PLAIN_ZERO = 8  # of a symmetric grid


def read_layer(tensors: Mapping[str, Tensor], group_size: int, checkpoint_format: str, name: str = "") -> WeightInt4:
    """The weight that ``tensors`` (``qweight``, ``qzeros``, ``scales``, perhaps ``g_idx``) stand for.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    group_size : int
        Inputs a group; -1 for one group.
    checkpoint_format : {"gptq", "gptq_v2"}
    name : str
        What messages call the layer.

    Raises
    ------
    FormatError
        A tensor is missing, of another dtype or shape, or groups are of unequal length.
    """
    qweight, qzeros, scales = (_tensor(tensors, part, name) for part in ("qweight", "qzeros", "scales"))
    inputs, outputs = 8 * qweight.shape[0], qweight.shape[1]
    size = inputs if group_size in (-1, 0) else min(group_size, inputs)
    groups = -(-inputs // size)
    _check(name, "qzeros", qzeros, (groups, outputs // 8), f"{outputs} outputs in {groups} groups")
    _check(name, "scales", scales, (groups, outputs), f"{outputs} outputs in {groups} groups")
    if checkpoint_format == "gptq":
        qzeros = qzeros + _ONES
    codes = unpack(qweight.t()).reshape(outputs, inputs)  # a word holds eight inputs of one output
    zeros = unpack(qzeros).reshape(groups, outputs)
    perm = None
    g_idx = tensors.get("g_idx")
    if g_idx is not None and g_idx.numel():
        _check(name, "g_idx", g_idx, (inputs,), f"{inputs} inputs")
        perm = _order(g_idx, size, name)
    if perm is not None:
        codes = codes[:, perm.long()]
    plain = bool((zeros == _PLAIN_ZERO).all()) if not zeros.is_meta else False
    return WeightInt4(
        pack_rows(codes),
        scales.t().contiguous(),
        None if plain else zeros.t().contiguous(),
        size,
        (outputs, inputs),
        perm,
    )


def write_layer(weight: WeightInt4, checkpoint_format: str) -> dict[str, Tensor]:
    """The tensors of ``weight``: the inverse of :func:`read_layer`.

    Raises
    ------
    InvalidArgument
        The shape is no multiple of 8, or a zero point is beyond 15.
    """
    outputs, inputs = weight.shape
    if inputs % 8 or outputs % 8:
        raise InvalidArgument(
            f"gptq: a weight of shape {weight.shape} cannot be stored; both sizes have to be multiples of 8"
        )
    codes, zeros = codes_of(weight), zeros_of(weight)
    group = torch.arange(inputs, dtype=torch.int32, device=codes.device) // weight.group_size
    if weight.perm is None:
        g_idx = group
    else:
        g_idx = torch.empty_like(group).index_copy_(0, weight.perm.long(), group)
        codes = torch.empty_like(codes).index_copy_(1, weight.perm.long(), codes)
    qzeros = pack(zeros.t().reshape(-1, outputs // 8, 8))
    if checkpoint_format == "gptq":
        qzeros = qzeros - _ONES
    qweight = pack(codes.reshape(outputs, inputs // 8, 8)).t().contiguous()
    return {"qweight": qweight, "qzeros": qzeros, "scales": weight.scales.t().contiguous(), "g_idx": g_idx}


def _tensor(tensors: Mapping[str, Tensor], part: str, name: str) -> Tensor:
    value = tensors.get(part)
    if value is None:
        raise FormatError(f"{name}.{part} is missing; a layer in GPTQ's format has qweight, qzeros and scales")
    if part == "scales" and not value.is_floating_point():
        raise FormatError(f"{name}.scales is {value.dtype}, needs a float dtype")
    if part != "scales" and value.dtype != torch.int32:
        raise FormatError(f"{name}.{part} is {value.dtype}, needs int32")
    if value.dim() != 2:
        raise FormatError(f"{name}.{part} has shape {tuple(value.shape)}, needs two dimensions")
    return value


def _check(name: str, part: str, value: Tensor, shape: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != shape:
        raise FormatError(f"{name}.{part} has shape {tuple(value.shape)}, {why} need {shape}; is group_size right?")


def _order(g_idx: Tensor, size: int, name: str) -> Tensor | None:
    """The permutation that brings the inputs of each group together; None where they are already."""
    if g_idx.is_meta:
        return None
    plain = torch.arange(g_idx.numel(), dtype=g_idx.dtype, device=g_idx.device) // size
    if torch.equal(g_idx, plain):
        return None
    ordered, perm = g_idx.sort(stable=True)
    if not torch.equal(ordered, plain):
        raise FormatError(
            f"{name}.g_idx has groups of unequal length; only groups of {size} inputs, the last one shorter, are read"
        )
    return perm.int()


def unpack(words: Tensor) -> Tensor:
    """Eight 4-bit values of each int32 word, lowest first: ``(..., n)`` to uint8 ``(..., n, 8)``."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8)


def pack(values: Tensor) -> Tensor:
    """The inverse of :func:`unpack`: values 0 to 15 ``(..., 8)`` to int32 ``(...)``."""
    if not values.is_meta and values.numel() and int(values.max()) > 15:
        raise InvalidArgument(f"gptq, awq: a zero point is {int(values.max())}; four bits hold 0 to 15")
    word = torch.zeros(values.shape[:-1], dtype=torch.int32, device=values.device)
    for j, shift in enumerate(_SHIFTS):
        word |= values[..., j].int() << shift
    return word


def pack_rows(codes: Tensor) -> Tensor:
    """Codes ``(N, K)``, one a byte, as ``packed`` of a :class:`WeightInt4` (QC-INT4-001)."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def codes_of(weight: WeightInt4) -> Tensor:
    """One code a byte ``(N, K)``, in the order of ``packed``."""
    pairs = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1)
    return pairs.view(weight.shape[0], -1)[:, : weight.shape[1]].contiguous()


def zeros_of(weight: WeightInt4) -> Tensor:
    """The zero points ``(N, G)``."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, _PLAIN_ZERO, dtype=torch.uint8, device=weight.packed.device)
