"""The abstract backend: one class, one method an op; an op is left out by not overriding it.

The frontend validates arguments, makes them contiguous and allocates outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor, device

from qcore.backend.optimizer import OptimizerRule, OptimizerTensors, PreparedStep
from qcore.backend.paged import PagedMemory
from qcore.backend.weights import Weight4bit as Weight4bit
from qcore.backend.weights import Weight8bit as Weight8bit
from qcore.backend.weights import WeightInt4 as WeightInt4
from qcore.errors import Unsupported

OPS: Mapping[str, int] = {  # op -> version of its meaning in the spec; a backend's ops are a subset
    "quantize_blockwise": 1,
    "dequantize_blockwise": 1,
    "quantize_4bit": 1,
    "dequantize_4bit": 1,
    "quantize_absmax": 1,
    "dequantize_absmax": 1,
    "gemm_4bit": 1,
    "int8_quantize_rows": 1,
    "int8_quantize_cols": 1,
    "int8_gemm": 1,
    "int8_dequantize_gemm": 1,
    "int8_scaled_gemm": 1,
    "int8_dequantize_rows": 1,
    "optimizer_step": 1,
    "int8_linear": 1,
    "gemm_int4": 1,
    "gemm_4bit_transposed": 1,
    "int8_linear_transposed": 1,
}


@dataclass(frozen=True)
class Description:
    """What a backend says of itself and of one device: the fingerprint in every report."""

    name: str
    device: str  # human-readable name of the device
    arch: str  # "avx512+amx", "sm_90", "gfx1100", ...
    driver: str = ""
    runtime: str = ""
    library: str = ""  # path of the shared library or module
    library_sha256: str = ""
    abi: str = ""  # "1.0" for a native library
    ops: Mapping[str, int] = field(default_factory=dict)
    declarations: Mapping[str, Any] = field(default_factory=dict)  # see describe() in qcore_backend.h


# (A[...,K], bias[N] or None, out[...,N]) -> None; everything about the weight was checked and packed when it was made.
PreparedGemm = Callable[[Tensor, "Tensor | None", Tensor], None]
PreparedTransposed = Callable[[Tensor, Tensor], None]  # (A[...,N], out[...,K]), likewise
PreparedInt8 = Callable[[Tensor, float, "Tensor | None", Tensor, "Tensor | None"], None]


def _matrix(tensor: Tensor) -> Tensor:
    """Ops take ``(M, K)``, prepared calls any number of leading dimensions."""
    return tensor if tensor.dim() == 2 else tensor.view(prod(tensor.shape[:-1]), tensor.shape[-1])


class Backend(ABC):
    """Computes ops on the tensors of ``device_types``. Subclass it, or load a shared library with ``CffiBackend``."""

    name: str
    device_types: frozenset[str] = frozenset({"cpu"})

    @abstractmethod
    def describe(self, device: device) -> Description:
        """Describe the backend on ``device``; raises ``BackendUnavailable`` if there is no such device."""

    def supports(self, op: str) -> bool:
        """Whether this backend serves ``op``."""
        return getattr(type(self), op) is not getattr(Backend, op)

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        raise self._unsupported("quantize_blockwise")

    def dequantize_blockwise(self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor) -> None:
        raise self._unsupported("dequantize_blockwise")

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        raise self._unsupported("quantize_4bit")

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        raise self._unsupported("dequantize_4bit")

    def quantize_absmax(
        self, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor, nested_absmax: Tensor, offset: Tensor
    ) -> None:
        raise self._unsupported("quantize_absmax")

    def dequantize_absmax(
        self, A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int, *, out: Tensor
    ) -> None:
        raise self._unsupported("dequantize_absmax")

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        raise self._unsupported("gemm_4bit")

    def prepare_gemm_4bit(self, weight: Weight4bit) -> PreparedGemm:
        """Pack a weight once; the result costs one short call per forward pass."""
        return lambda A, bias, out: self.gemm_4bit(_matrix(A), weight, bias, out=_matrix(out))

    def gemm_4bit_transposed(self, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
        raise self._unsupported("gemm_4bit_transposed")

    def prepare_gemm_4bit_transposed(self, weight: Weight4bit) -> PreparedTransposed:
        """As :meth:`prepare_gemm_4bit`."""
        return lambda A, out: self.gemm_4bit_transposed(_matrix(A), weight, out=_matrix(out))

    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        raise self._unsupported("int8_quantize_rows")

    def int8_quantize_cols(self, A: Tensor, threshold: float, *, out: Tensor, col_stats: Tensor) -> None:
        raise self._unsupported("int8_quantize_cols")

    def int8_gemm(self, A: Tensor, B: Tensor, *, out: Tensor) -> None:
        raise self._unsupported("int8_gemm")

    def int8_dequantize_gemm(
        self, C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        raise self._unsupported("int8_dequantize_gemm")

    def int8_scaled_gemm(
        self, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        raise self._unsupported("int8_scaled_gemm")

    def int8_dequantize_rows(self, A: Tensor, row_stats: Tensor, *, out: Tensor) -> None:
        raise self._unsupported("int8_dequantize_rows")

    def int8_linear(
        self, A: Tensor, W: Weight8bit, threshold: float, bias: Tensor | None, *, out: Tensor, outliers: Tensor | None
    ) -> None:
        raise self._unsupported("int8_linear")

    def prepare_int8_linear(self, W: Weight8bit) -> PreparedInt8:
        """As :meth:`prepare_gemm_4bit`; the result takes ``(A, threshold, bias, out, outliers)``."""
        return lambda A, t, bias, out, found: self.int8_linear(_matrix(A), W, t, bias, out=_matrix(out), outliers=found)

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        raise self._unsupported("int8_linear_transposed")

    def prepare_int8_linear_transposed(self, W: Weight8bit) -> PreparedTransposed:
        """As :meth:`prepare_gemm_4bit`."""
        return lambda A, out: self.int8_linear_transposed(_matrix(A), W, out=_matrix(out))

    def gemm_int4(self, A: Tensor, weight: WeightInt4, bias: Tensor | None, *, out: Tensor) -> None:
        raise self._unsupported("gemm_int4")

    def prepare_gemm_int4(self, weight: WeightInt4) -> PreparedGemm:
        """As :meth:`prepare_gemm_4bit`."""
        return lambda A, bias, out: self.gemm_int4(_matrix(A), weight, bias, out=_matrix(out))

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        raise self._unsupported("optimizer_step")

    def prepare_optimizer_step(self, t: OptimizerTensors) -> PreparedStep:
        """Pack the tensors of many steps once; each step brings its rule and its gradients."""
        return lambda rule, grads, scales: self.optimizer_step(rule, replace(t, grads=grads, grad_scales=scales))

    def paged_memory(self, device: device) -> PagedMemory:
        """Memory for optimizer state that may be larger than that of ``device``; raises ``Unsupported`` without."""
        raise Unsupported(f"paged memory: backend {self.name!r} has none for {device.type} tensors")

    def _unsupported(self, op: str) -> Unsupported:
        return Unsupported(f"{op}: backend {self.name!r} does not serve this op; `qcore info` lists those that do")
