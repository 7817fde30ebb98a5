"""8-bit state as numbers and numbers as 8-bit state, outside of a step: for checkpoints and changes of precision."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qcore import codebooks
from qcore.backend.optimizer import OPTIMIZER_BLOCK
from qcore.ops.blockwise import dequantize_blockwise, quantize_blockwise

_AT_ONCE = 4096  # blocks; bounds the memory that _restore_scales takes


@cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """The dynamic codebook, one tensor a device: a state dict holds it once, not once a parameter."""
    return torch.tensor(codebooks.DYNAMIC if signed else codebooks.DYNAMIC_UNSIGNED, device=device)


def zero_code(signed: bool) -> int:
    """The code of 0."""
    return (codebooks.DYNAMIC if signed else codebooks.DYNAMIC_UNSIGNED).index(0.0)


def decode_rows(codes: Tensor, absmax: Tensor, out: Tensor, signed: bool) -> None:
    """Decode uint8 ``codes`` ``(rows, n)`` with scales ``(rows, blocks)`` into float32 ``out`` ``(rows, n)``."""
    code = codebook(signed, codes.device)
    for row, scale, target in zip(codes, absmax, out, strict=True):
        dequantize_blockwise(row, scale, code, OPTIMIZER_BLOCK, torch.float32, out=target)


def encode_rows(values: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Encode float32 ``values`` ``(rows, n)`` into uint8 ``codes`` and scales ``absmax`` ``(rows, blocks)``.

    A block that was decoded from codes goes back to codes that decode to the same bits. A positive second moment never
    becomes 0, which would make its update as large as ``1 / eps`` (QC-OPT-021).
    """
    code = codebook(signed, values.device)
    for row, target, scale in zip(values, codes, absmax, strict=True):
        new_codes, new_scale = quantize_blockwise(row, code, OPTIMIZER_BLOCK)
        target.copy_(new_codes)
        scale.copy_(new_scale)
        if signed:
            _restore_scales(row, code, target, scale)
        else:
            target[(target == 0) & (row > 0)] = 1


def _restore_scales(values: Tensor, code: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Give blocks that were decoded from codes the scale back that they were decoded with.

    The signed codebook ends at 1 but begins at -0.993. So where a negative element has the largest magnitude, the old
    scale is larger than any element. It is looked for near ``-magnitude / code[0]``, and taken if it gives every
    element of the block exactly.
    """
    full = values.numel() // OPTIMIZER_BLOCK
    _restore_full(values[: full * OPTIMIZER_BLOCK].view(full, OPTIMIZER_BLOCK), code, codes, absmax[:full])
    tail = values[full * OPTIMIZER_BLOCK :]
    if tail.numel():
        _restore_full(tail[None], code, codes[full * OPTIMIZER_BLOCK :], absmax[full:])


def _restore_full(blocks: Tensor, code: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """:func:`_restore_scales` for blocks of one length, ``(blocks, length)``."""
    middles = (code[:-1] + code[1:]) * 0.5
    targets = codes[: blocks.numel()].view(blocks.shape)
    lowest, highest = blocks.aminmax(dim=1) if blocks.numel() else (absmax, absmax)
    suspects = ((lowest == -absmax) & (highest < absmax)).nonzero().view(-1)
    for chosen in suspects.split(_AT_ONCE):
        rows, scale = blocks[chosen], absmax[chosen] / -code[0]
        guess = torch.bucketize(rows / scale[:, None], middles)
        # The codes do not change with the last bits of the scale; what was never codes is sorted out here.
        near = ((code[guess] * scale[:, None] - rows).abs() <= 1e-5 * scale[:, None]).all(1)
        chosen, rows, scale, guess = chosen[near], rows[near], scale[near], guess[near]
        for ulps in (0, 1, -1, 2, -2):
            moved = (scale.view(torch.int32) + ulps).view(torch.float32)
            exact = (code[guess] * moved[:, None] == rows).all(1)
            targets[chosen[exact]] = guess[exact].to(torch.uint8)
            absmax[chosen[exact]] = moved[exact]
