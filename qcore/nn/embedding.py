"""Embedding tables: quantized ones, and float ones whose optimizer state stays in 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as nnF
from torch import Tensor, nn

from qcore.backend.interface import Weight4bit
from qcore.errors import InvalidArgument
from qcore.functional import QuantState
from qcore.nn.int8_params import Int8Params
from qcore.nn.params import Params4bit
from qcore.nn.quantized import Quantized4bit, Quantized8bit, QuantizedModule
from qcore.ops.fourbit import dequantize_4bit
from qcore.ops.int8 import int8_dequantize_rows

Self = TypeVar("Self", bound="QuantizedEmbedding")


class Embedding(nn.Embedding):
    """``nn.Embedding`` with Xavier-uniform values, whose optimizer state stays in 32 bits.

    ``_optim_bits_override`` maps a parameter's name to the bits of its optimizer state; 8-bit optimizers read it.
    Parameters are those of ``torch.nn.Embedding``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight)
        super().__init__(num_embeddings, embedding_dim, *options, device=device, dtype=dtype)
        self._optim_bits_override = {"weight": 32}

    def reset_parameters(self) -> None:
        """Xavier-uniform values, zero at ``padding_idx``."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """:class:`Embedding` followed by a layer norm: Dettmers et al., *8-bit Optimizers*, 2021, section 2.3.

    The norm is computed in float32 (float64 for a float64 table); the result has the dtype of the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, device, dtype)
        super().__init__(num_embeddings, embedding_dim, *options)
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``(...)`` to ``(..., embedding_dim)``."""
        rows = super().forward(input)
        wide = torch.promote_types(rows.dtype, torch.float32)
        norm = self.norm
        normed = nnF.layer_norm(
            rows.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps
        )
        return normed.to(self.weight.dtype)


class QuantizedEmbedding(QuantizedModule):
    """What the quantized tables share: the dtype of their rows, which follows the module's conversions."""

    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.num_embeddings, self.embedding_dim)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Codes do not follow .half() and the like, but the rows read from them shall.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def _indices(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(f"{type(self).__name__}: input is {input.dtype}, needs int64 or int32 indices")
        return input.reshape(-1)


class Embedding8bit(Quantized8bit, QuantizedEmbedding, nn.Embedding):
    """``nn.Embedding`` with int8 rows and one scale a row; frozen.

    Quantized like :class:`~qcore.nn.Linear8bitLt`: at the first move to a device, or by :meth:`quantize`.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    device : torch.device, optional
    dtype : torch.dtype, optional
        dtype of the rows that come out.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``(...)`` to ``(..., embedding_dim)`` (QC-INT8-008)."""
        scales = self._scales()
        if scales is None:
            raise InvalidArgument(
                "Embedding8bit: the weight is not quantized yet; move the layer to a device with .to(device), "
                "'cpu' included, or call .quantize()"
            )
        index = self._indices(input)
        codes = nnF.embedding(index, self.weight.data)
        rows = int8_dequantize_rows(codes, nnF.embedding(index, scales.view(-1, 1)).view(-1), self.dtype)
        return rows.view(*input.shape, self.embedding_dim)


class Embedding4bit(Quantized4bit, QuantizedEmbedding, nn.Embedding):
    """``nn.Embedding`` with rows in NF4 or FP4; frozen.

    Quantized like :class:`~qcore.nn.Linear4bit`. A lookup decodes the blocks that its rows touch, and no others,
    whether or not ``embedding_dim`` is a multiple of the block size.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    dtype : torch.dtype, optional
        dtype of the rows that come out.
    quant_type : str
        ``"fp4"`` or ``"nf4"``.
    quant_storage : torch.dtype
        dtype under which the packed bytes are stored.
    device : torch.device, optional
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state: QuantState | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``(...)`` to ``(..., embedding_dim)`` (QC-4BIT-003)."""
        weight = self._state().weight(self.weight)
        index = self._indices(input).long()
        rows = _rows_of(weight, index, self.num_embeddings, self.embedding_dim, self.dtype)
        return rows.view(*input.shape, self.embedding_dim)


def _rows_of(weight: Weight4bit, index: Tensor, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows ``index`` (1-D) of a 4-bit table ``(rows, dim)``: the blocks that cover them, decoded and cut."""
    size = weight.blocksize
    if dim % size == 0:
        blocks = index.unsqueeze(1) * (dim // size) + torch.arange(dim // size, device=index.device)
        packed = nnF.embedding(index, weight.packed.view(rows, dim // 2)).view(-1)
        cut = Weight4bit(packed, _absmax_of(weight, blocks), weight.quant_type, size, (index.numel(), dim))
        return dequantize_4bit(cut, dtype)
    # Adds 0, and refuses an index that the table does not have: below, only addresses are left.
    start = index * dim + nnF.embedding(index, index.new_zeros(1, 1).expand(rows, 1)).view(-1)
    count = (dim - 2) // size + 2  # blocks that a row can touch, wherever it starts
    blocks = (start // size).unsqueeze(1) + torch.arange(count, device=index.device)
    blocks = blocks.clamp_(max=weight.absmax.numel() - 1)
    addresses = blocks.unsqueeze(2) * (size // 2) + torch.arange(size // 2, device=index.device)
    packed = weight.packed[addresses.view(-1).clamp_(max=weight.packed.numel() - 1)]
    cut = Weight4bit(packed, _absmax_of(weight, blocks), weight.quant_type, size, (index.numel(), count * size))
    columns = (start % size).unsqueeze(1) + torch.arange(dim, device=index.device)
    return dequantize_4bit(cut, dtype).gather(1, columns)


def _absmax_of(weight: Weight4bit, blocks: Tensor) -> Tensor:
    """Scales of some blocks, flat; nested ones are decoded here, since they no longer lie in blocks of their own."""
    blocks = blocks.view(-1)
    absmax = weight.absmax[blocks]
    if weight.nested_absmax is None or weight.nested_code is None or weight.nested_offset is None:
        return absmax
    nested = weight.nested_absmax[blocks // weight.nested_blocksize]
    return weight.nested_code[absmax.int()] * nested + weight.nested_offset  # QC-NEST-003


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` in FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` in NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)
