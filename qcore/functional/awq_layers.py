"""AWQ checkpoints of version ``gemm``: the tensors of one layer as a :class:`WeightInt4` and back, without a loss.

A layer of shape (O, I) with groups of g inputs, G = I / g, is three tensors; a word holds eight outputs in the order
0, 2, 4, 6, 1, 3, 5, 7, which unpacks with few instructions on a GPU:

========= ================= ===========================================================
qweight   int32 (I, O/8)    bits 4j of column c hold output 8c + ORDER[j]
qzeros    int32 (G, O/8)    zero points in the same order
scales    float (G, O)      w = scales * (q - zero)
========= ================= ===========================================================

Sources: Lin et al., *AWQ*, 2023 (arXiv 2306.00978); the layout as AutoAWQ 0.2 writes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcore.backend.weights import WeightInt4
from qcore.errors import FormatError, InvalidArgument
from qcore.functional.gptq_layers import codes_of, pack, pack_rows, unpack, zeros_of

NAMES = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def read_layer(tensors: Mapping[str, Tensor], group_size: int, name: str = "") -> WeightInt4:
    """The weight that ``tensors`` (``qweight``, ``qzeros``, ``scales``) stand for.

    ``group_size`` is the inputs a group, -1 for one group. Raises ``FormatError`` if a tensor is missing or of another
    dtype or shape.
    """
    for part in NAMES:
        value = tensors.get(part)
        if value is None:
            raise FormatError(f"{name}.{part} is missing; a layer in AWQ's format has qweight, qzeros and scales")
        if (value.dtype != torch.int32 if part != "scales" else not value.is_floating_point()) or value.dim() != 2:
            raise FormatError(f"{name}.{part} is {value.dtype} {tuple(value.shape)}; is it of AWQ's version gemm?")
    qweight, qzeros, scales = (tensors[part] for part in NAMES)
    inputs, outputs = qweight.shape[0], 8 * qweight.shape[1]
    size = inputs if group_size in (-1, 0) else group_size
    if inputs % size:
        raise FormatError(f"{name}.qweight has {inputs} inputs, which groups of {size} do not divide")
    for part, value, shape in (
        ("qzeros", qzeros, (inputs // size, outputs // 8)),
        ("scales", scales, (inputs // size, outputs)),
    ):
        if tuple(value.shape) != shape:
            raise FormatError(f"{name}.{part} has shape {tuple(value.shape)}, groups of {size} inputs need {shape}")
    codes = unpack(qweight)[..., _INVERSE].reshape(inputs, outputs).t()
    zeros = unpack(qzeros)[..., _INVERSE].reshape(-1, outputs).t().contiguous()
    plain = bool((zeros == 8).all()) if not zeros.is_meta else False
    return WeightInt4(pack_rows(codes), scales.t().contiguous(), None if plain else zeros, size, (outputs, inputs))


def write_layer(weight: WeightInt4) -> dict[str, Tensor]:
    """The tensors of ``weight``: the inverse of :func:`read_layer`.

    Raises
    ------
    InvalidArgument
        The columns are permuted, the outputs are no multiple of 8, the groups do not divide the inputs, or a zero point
        is beyond 15: AWQ's format has no place for it.
    """
    outputs, inputs = weight.shape
    if weight.perm is not None:
        raise InvalidArgument("awq: the format has no order of columns; write this weight as GPTQ")
    if outputs % 8 or inputs % weight.group_size:
        raise InvalidArgument(
            f"awq: a weight of shape {weight.shape} in groups of {weight.group_size} cannot be stored; outputs have to "
            "be a multiple of 8, and groups to divide the inputs"
        )
    codes = codes_of(weight).t().reshape(inputs, outputs // 8, 8)[..., ORDER]
    zeros = zeros_of(weight).t().reshape(-1, outputs // 8, 8)[..., ORDER]
    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": weight.scales.t().contiguous()}
