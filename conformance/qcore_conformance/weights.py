"""4-bit weights for GEMM cases: as NumPy parts, decoded by the oracle, and as a backend takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qcore_conformance import oracle
from qcore_conformance.floats import Floats, rounded
from qcore_conformance.generators import CODEBOOKS, Rng

if TYPE_CHECKING:
    from qcore.backend import Weight4bit, WeightInt4


@dataclass(frozen=True, eq=False)
class Weight:
    """The parts of :class:`~qcore.backend.interface.Weight4bit` as arrays."""

    packed: NDArray[np.uint8]
    absmax: Floats | NDArray[np.uint8]
    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    nested_absmax: Floats | None = None
    nested_code: NDArray[np.float32] | None = None
    nested_offset: Floats | None = None
    nested_blocksize: int = 0

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def absmax_values(self) -> Floats:
        """The absmax as float32, decoded if it is nested (QC-NEST-003)."""
        if isinstance(self.absmax, Floats):
            return self.absmax
        assert self.nested_absmax is not None
        assert self.nested_code is not None
        assert self.nested_offset is not None
        return oracle.dequantize_absmax(
            self.absmax, self.nested_absmax, self.nested_code, self.nested_offset, self.nested_blocksize
        )

    def decoded(self, dtype: str = "f32") -> Floats:
        """The weights by QC-4BIT-003, in ``shape``."""
        flat = oracle.dequantize_4bit(
            self.packed, self.absmax_values(), self.quant_type, self.numel, self.blocksize, dtype
        )
        return flat.reshape(*self.shape)

    def inputs(self) -> dict[str, Any]:
        """The arrays by name, for ``Session.call``; absent ones are None."""
        return {
            "packed": self.packed,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "nested_code": self.nested_code,
            "nested_offset": self.nested_offset,
        }

    def bind(self, tensors: dict[str, Any]) -> Weight4bit:
        """The backend's argument, from the tensors that ``Session.call`` made of :meth:`inputs`."""
        from qcore.backend import Weight4bit

        return Weight4bit(
            packed=tensors["packed"],
            absmax=tensors["absmax"],
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            shape=self.shape,
            nested_absmax=tensors["nested_absmax"],
            nested_code=tensors["nested_code"],
            nested_offset=tensors["nested_offset"],
            nested_blocksize=self.nested_blocksize,
        )


def random_packed(rng: Rng, n: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (n + 1) // 2, dtype=np.uint8)


def random_weight(
    rng: Rng, quant_type: str, blocksize: int, shape: tuple[int, ...], nested_blocksize: int = 0
) -> Weight:
    """Every nibble, absmax of varying size; nested if ``nested_blocksize`` is not 0.

    No weight is denormal in float16, where a declared rounding of the weights would not be relative (QC-GEMM4-004).
    """
    n = int(np.prod(shape, dtype=np.int64))
    blocks = -(-n // blocksize)
    packed = random_packed(rng, n)
    if not nested_blocksize:
        absmax = rounded(np.exp(0.5 * rng.standard_normal(blocks)) * 0.5, "f32")
        return Weight(packed, absmax, quant_type, blocksize, shape)
    codes = rng.integers(0, 256, blocks, dtype=np.uint8)
    scales = rounded(rng.uniform(0.1, 0.3, -(-blocks // nested_blocksize)), "f32")
    mean = rounded(rng.uniform(0.4, 0.8, 1), "f32")
    return Weight(packed, codes, quant_type, blocksize, shape, scales, CODEBOOKS["dynamic"], mean, nested_blocksize)


def integer_weight(rng: Rng, quant_type: str, blocksize: int, shape: tuple[int, ...]) -> Weight:
    """Weights that are small multiples of a power of two in any compute dtype (QC-GEMM4-005)."""
    n = int(np.prod(shape, dtype=np.int64))
    # NF4: 0, -1, 1. FP4: 0, 1, 1/2, 1/4 and their negatives, code 8 included.
    choices = {"nf4": (7, 0, 15), "fp4": (0, 3, 5, 7, 8, 11, 13, 15)}[quant_type]
    codes = rng.choice(np.array(choices, dtype=np.uint8), n)
    absmax = rounded(2.0 ** rng.integers(0, 3, -(-n // blocksize)), "f32")
    return Weight(oracle.pack(codes, quant_type), absmax, quant_type, blocksize, shape)


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """The parts of :class:`~qcore.backend.weights.WeightInt4` as arrays."""

    packed: NDArray[np.uint8]
    scales: Floats
    zeros: NDArray[np.uint8] | None
    group_size: int
    shape: tuple[int, int]
    perm: NDArray[np.int32] | None = None

    def decoded(self, dtype: str = "f32") -> Floats:
        """The weights by QC-INT4-002, in the order of X."""
        return oracle.dequantize_int4(
            self.packed, self.scales, self.zeros, self.perm, self.group_size, self.shape[1], dtype
        )

    def inputs(self) -> dict[str, Any]:
        """The arrays by name, for ``Session.call``; absent ones are None."""
        return {"packed": self.packed, "scales": self.scales, "zeros": self.zeros, "perm": self.perm}

    def bind(self, tensors: dict[str, Any]) -> WeightInt4:
        """The backend's argument, from the tensors that ``Session.call`` made of :meth:`inputs`."""
        from qcore.backend import WeightInt4

        parts = (tensors["packed"], tensors["scales"], tensors["zeros"])
        return WeightInt4(*parts, self.group_size, self.shape, tensors["perm"])


def random_int4(
    rng: Rng, group_size: int, shape: tuple[int, int], kind: str = "f16", *, zeros: bool = True, ordered: bool = False
) -> Int4Weight:
    """Every code and zero point, scales of varying size and sign in ``kind``; ``ordered`` columns are permuted.

    No weight is denormal in float16 (QC-GEMM4-004).
    """
    n, k = shape
    groups = -(-k // group_size)
    packed = rng.integers(0, 256, (n, (k + 1) // 2), dtype=np.uint8)
    sizes = np.exp(0.5 * rng.standard_normal((n, groups))) * rng.choice([0.0625, 0.0625, -0.0625], (n, groups))
    points = rng.integers(0, 16, (n, groups), dtype=np.uint8) if zeros else None
    perm = rng.permutation(k).astype(np.int32) if ordered else None
    return Int4Weight(packed, rounded(sizes, kind), points, group_size, shape, perm)


def integer_int4(rng: Rng, group_size: int, shape: tuple[int, int], *, zeros: bool, ordered: bool) -> Int4Weight:
    """Weights that are small integers in any compute dtype (QC-INT4-006)."""
    weight = random_int4(rng, group_size, shape, "bf16", zeros=zeros, ordered=ordered)
    scales = rounded(rng.choice([1.0, 2.0, -1.0, 0.0], weight.scales.shape), "bf16")
    return Int4Weight(weight.packed, scales, weight.zeros, group_size, shape, weight.perm)
