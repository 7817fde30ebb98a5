"""Any shared library with the C ABI of ``qcore_backend.h`` as a :class:`~qcore.backend.interface.Backend`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.backend.cffi_memory import FUNCTIONS as MEMORY
from qcore.backend.cffi_memory import CffiMemory
from qcore.backend.cffi_optimizer import PackedTensors, pack_rule
from qcore.backend.cffi_weights import DTYPES, FORMATS, address, pack_4bit, pack_int4
from qcore.backend.interface import OPS, Backend, Description, PreparedGemm, PreparedInt8, PreparedTransposed
from qcore.backend.library import open_library
from qcore.backend.optimizer import OptimizerRule, OptimizerTensors, PreparedStep
from qcore.backend.paged import PagedMemory
from qcore.backend.weights import Weight4bit, Weight8bit, WeightInt4
from qcore.errors import (
    BackendError,
    BackendUnavailable,
    DeviceError,
    InternalError,
    InvalidArgument,
    OutOfMemory,
    Unsupported,
)

_ERRORS: dict[int, type[Exception]] = {
    QC.QC_INVALID_ARGUMENT: InvalidArgument,
    QC.QC_UNSUPPORTED: Unsupported,
    QC.QC_NO_DEVICE: BackendUnavailable,
    QC.QC_OUT_OF_MEMORY: OutOfMemory,
    QC.QC_DEVICE_ERROR: DeviceError,
    QC.QC_INTERNAL: InternalError,
}


class CffiBackend(Backend):
    """A backend behind the C ABI.

    Parameters
    ----------
    name : str
        Name under which it was asked for.
    path : str or Path
        The shared library.
    device_types : frozenset of str, optional
        torch device types that it serves; by default the one that its ``describe`` names.

    Raises
    ------
    BackendUnavailable
        The file is missing, cannot be loaded, is no qcore backend, was built for another ABI, or finds no device.
    """

    def __init__(self, name: str, path: str | os.PathLike[str], device_types: frozenset[str] | None = None) -> None:
        self.name = name
        self.path = Path(path).resolve()
        self._library, self._api = open_library(name, self.path)
        count = ffi.new("int32_t *")
        try:
            self._check(self._api.device_count(count))
        except BackendError as error:
            raise BackendUnavailable(f"backend {name!r}: {self.path}: {error}") from error
        self.device_count: int = count[0]
        if self.device_count < 1:
            raise BackendUnavailable(f"backend {name!r}: {self.path} found no device")
        self._functions = {op: self._function(op) for op in OPS}
        torch_device = str(self._describe(0).get("torch_device", "cpu"))
        self.device_types = device_types or frozenset({torch_device})
        self._host = torch_device == "cpu"
        self._workspace_bytes = lru_cache(maxsize=4096)(self._query_workspace)

    def _function(self, op: str) -> Any:
        """The table's entry, or None where the library is older than the entry or leaves it NULL."""
        if self._api.size < ffi.offsetof("qc_api", op) + ffi.sizeof("void *"):
            return None
        entry = getattr(self._api, op)
        return None if entry == ffi.NULL else entry

    def _check(self, status: int) -> None:
        if status != QC.QC_OK:
            text = ffi.string(self._api.last_error()).decode("utf-8", "replace")
            raise _ERRORS.get(status, BackendError)(text or f"backend {self.name!r}: status {status}")

    def _describe(self, index: int) -> dict[str, Any]:
        text = ffi.new("const char **")
        self._check(self._api.describe(index, text))
        try:
            description = json.loads(ffi.string(text[0]).decode("utf-8"))
        except ValueError as error:
            raise BackendUnavailable(f"backend {self.name!r}: {self.path}: describe gives no JSON: {error}") from error
        if not isinstance(description, dict):
            raise BackendUnavailable(f"backend {self.name!r}: {self.path}: describe gives JSON that is no object")
        return description

    def describe(self, device: torch.device) -> Description:
        said = self._describe(device.index or 0)
        return Description(
            name=self.name,
            device=said.get("name", ""),
            arch=said.get("arch", ""),
            driver=said.get("driver", ""),
            runtime=said.get("runtime", ""),
            library=str(self.path),
            library_sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
            abi=f"{self._api.abi_major}.{self._api.abi_minor}",
            ops={op: version for op, version in OPS.items() if self.supports(op)},
            declarations=said.get("declarations", {}),
        )

    def supports(self, op: str) -> bool:
        return self._functions[op] is not None

    def _where(self, tensor: Tensor) -> tuple[int, int]:
        """The ABI's (device, stream): the current stream of the tensor's device, or the thread limit on a host."""
        if self._host:
            return 0, torch.get_num_threads()
        index = tensor.device.index
        return index, torch._C._cuda_getCurrentRawStream(index)

    def _call(self, op: str, device: int, *arguments: Any) -> None:
        function = self._functions[op]
        if function is None:
            raise self._unsupported(op)
        if self._host or device == torch._C._cuda_getDevice():
            self._check(function(device, *arguments))
        else:
            self._check(_on_device(function, device, *arguments))

    def _query_workspace(self, op: int, device: int, stream: int, dtype: int, m: int, n: int, k: int) -> int:
        count = ffi.new("int64_t *")
        self._check(self._api.workspace(op, device, stream, dtype, m, n, k, count))
        return int(count[0])

    def _workspace(
        self, op: int, device: int, stream: int, dtype: int, m: int, n: int, k: int, like: Tensor, more: int = 0
    ) -> tuple[Tensor | None, int, int]:
        """Scratch for one call, ``more`` bytes than the library says: the tensor, its address and its size."""
        # The size may depend on the number of threads, never on which stream of a GPU is current.
        size = self._workspace_bytes(op, device, stream if self._host else 0, dtype, m, n, k) + more
        if size == 0:
            return None, 0, 0
        scratch = torch.empty(size, dtype=torch.uint8, device=like.device)
        return scratch, scratch.data_ptr(), size

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        where = (*self._where(A), DTYPES[A.dtype])
        n = A.numel()
        self._call("quantize_blockwise", *where, address(A), address(code), n, blocksize, address(absmax), address(out))

    def dequantize_blockwise(self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor) -> None:
        where = (*self._where(A), DTYPES[out.dtype])
        n = A.numel()
        self._call(
            "dequantize_blockwise", *where, address(A), address(absmax), address(code), n, blocksize, address(out)
        )

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        where = (*self._where(A), DTYPES[A.dtype], FORMATS[quant_type])
        self._call("quantize_4bit", *where, address(A), A.numel(), blocksize, address(absmax), address(out))

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        where = (*self._where(out), DTYPES[out.dtype])
        self._call("dequantize_4bit", *where, pack_4bit(weight), address(out))

    def quantize_absmax(
        self, absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor, nested_absmax: Tensor, offset: Tensor
    ) -> None:
        pointers = (address(out), address(nested_absmax), address(offset))
        n = absmax.numel()
        self._call("quantize_absmax", *self._where(absmax), address(absmax), address(code), n, blocksize, *pointers)

    def dequantize_absmax(
        self, A: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int, *, out: Tensor
    ) -> None:
        pointers = (address(A), address(nested_absmax), address(code), address(offset))
        self._call("dequantize_absmax", *self._where(A), *pointers, A.numel(), blocksize, address(out))

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        self.prepare_gemm_4bit(weight)(A, bias, out)

    def prepare_gemm_4bit(self, weight: Weight4bit) -> PreparedGemm:
        return self._prepare_gemm("gemm_4bit", QC.QC_OP_GEMM_4BIT, weight, pack_4bit(weight), False)

    def gemm_int4(self, A: Tensor, weight: WeightInt4, bias: Tensor | None, *, out: Tensor) -> None:
        self.prepare_gemm_int4(weight)(A, bias, out)

    def prepare_gemm_int4(self, weight: WeightInt4) -> PreparedGemm:
        gathers = weight.perm is not None
        return self._prepare_gemm("gemm_int4", QC.QC_OP_GEMM_INT4, weight, pack_int4(weight), gathers)

    def _prepare_gemm(
        self, name: str, op: int, weight: Weight4bit | WeightInt4, packed: Any, gathers: bool
    ) -> PreparedGemm:
        """``packed`` is the struct of ``weight``; a product that ``gathers`` needs room for X in another order."""
        function = self._functions[name]
        if function is None:
            raise self._unsupported(name)
        n, k = weight.shape
        where, workspace_of, check, host = self._where, self._workspace, self._check, self._host
        threads: Callable[[], int] = torch.get_num_threads
        on_device = partial(_on_device, function)
        # The last (dtype, outputs, threads) that needed no scratch on a host, with the dtype's code and the rows; one
        # tuple, so that two threads never see halves of two calls.
        last: tuple[tuple[torch.dtype, int, int] | None, int, int] = (None, 0, 0)

        def gemm(A: Tensor, bias: Tensor | None, out: Tensor) -> None:
            nonlocal last
            device, stream = (0, threads()) if host else where(A)
            key = (A.dtype, out.numel(), stream)
            scratch, address, size = None, 0, 0
            known, dtype, m = last
            if key != known:
                dtype, m = DTYPES[A.dtype], out.numel() // n if n else 0
                gathered = -(-m * k * A.element_size() // 64) * 64 if gathers else 0  # QC-INT4-003
                scratch, address, size = workspace_of(op, device, stream, dtype, m, n, k, A, gathered)
                if host and scratch is None:
                    last = (key, dtype, m)
            bias_dtype, bias_ptr = (dtype, 0) if bias is None else (DTYPES[bias.dtype], bias.data_ptr())
            x, y = A.data_ptr(), out.data_ptr()
            run = function if host or device == torch._C._cuda_getDevice() else on_device
            status = run(device, stream, dtype, m, n, k, x, packed, bias_dtype, bias_ptr, y, address, size)
            if status:
                check(status)

        # The struct holds bare addresses: the tensors behind them live as long as the prepared call.
        gemm.weight = weight  # type: ignore[attr-defined]
        return gemm

    def gemm_4bit_transposed(self, A: Tensor, weight: Weight4bit, *, out: Tensor) -> None:
        self.prepare_gemm_4bit_transposed(weight)(A, out)

    def prepare_gemm_4bit_transposed(self, weight: Weight4bit) -> PreparedTransposed:
        packed = (pack_4bit(weight),)
        return self._prepare_transposed("gemm_4bit_transposed", QC.QC_OP_GEMM_4BIT_TRANSPOSED, weight, packed)

    def _prepare_transposed(
        self, name: str, op: int, weight: Weight4bit | Weight8bit, packed: tuple[Any, ...]
    ) -> PreparedTransposed:
        """``packed`` is the weight as the function ``name`` takes it."""
        function = self._functions[name]
        if function is None:
            raise self._unsupported(name)
        n, k = weight.codes.shape if isinstance(weight, Weight8bit) else weight.shape
        where, workspace_of, check, host = self._where, self._workspace, self._check, self._host
        on_device = partial(_on_device, function)

        def gemm(A: Tensor, out: Tensor) -> None:
            device, stream = where(A)
            dtype, m = DTYPES[A.dtype], out.numel() // k if k else 0
            _scratch, address, size = workspace_of(op, device, stream, dtype, m, n, k, A)
            run = function if host or device == torch._C._cuda_getDevice() else on_device
            status = run(device, stream, dtype, m, n, k, A.data_ptr(), *packed, out.data_ptr(), address, size)
            if status:
                check(status)

        # As in prepare_gemm_4bit: only addresses are held.
        gemm.weight = weight  # type: ignore[attr-defined]
        return gemm

    def int8_quantize_rows(
        self, A: Tensor, threshold: float, *, out: Tensor, row_stats: Tensor, outlier_cols: Tensor | None
    ) -> None:
        where = (*self._where(A), DTYPES[A.dtype])
        m, k = A.shape
        pointers = (address(out), address(row_stats), address(outlier_cols))
        self._call("int8_quantize_rows", *where, address(A), m, k, threshold, *pointers)

    def int8_quantize_cols(self, A: Tensor, threshold: float, *, out: Tensor, col_stats: Tensor) -> None:
        where = (*self._where(A), DTYPES[A.dtype])
        m, k = A.shape
        self._call("int8_quantize_cols", *where, address(A), m, k, threshold, address(out), address(col_stats))

    def int8_gemm(self, A: Tensor, B: Tensor, *, out: Tensor) -> None:
        device, stream = self._where(A)
        sizes = (A.shape[0], B.shape[0], A.shape[1])
        _scratch, *workspace = self._workspace(QC.QC_OP_INT8_GEMM, device, stream, QC.QC_F32, *sizes, A)
        self._call("int8_gemm", device, stream, *sizes, address(A), address(B), address(out), *workspace)

    def int8_dequantize_gemm(
        self, C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        where = (*self._where(C), DTYPES[out.dtype])
        pointers = (address(C), address(row_stats), address(col_stats))
        self._call("int8_dequantize_gemm", *where, *C.shape, *pointers, *_bias(bias, out), address(out))

    def int8_scaled_gemm(
        self, A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        device, stream = self._where(A)
        dtype = DTYPES[out.dtype]
        sizes = (A.shape[0], B.shape[0], A.shape[1])
        _scratch, *workspace = self._workspace(QC.QC_OP_INT8_SCALED_GEMM, device, stream, dtype, *sizes, A)
        pointers = (address(A), address(B), address(row_stats), address(col_stats))
        self._call(
            "int8_scaled_gemm", device, stream, dtype, *sizes, *pointers, *_bias(bias, out), address(out), *workspace
        )

    def int8_linear(
        self, A: Tensor, W: Weight8bit, threshold: float, bias: Tensor | None, *, out: Tensor, outliers: Tensor | None
    ) -> None:
        self.prepare_int8_linear(W)(A, threshold, bias, out, outliers)

    def prepare_int8_linear(self, W: Weight8bit) -> PreparedInt8:
        function = self._functions["int8_linear"]
        if function is None:
            raise self._unsupported("int8_linear")
        n, k = W.codes.shape
        where, workspace_of, check = self._where, self._workspace, self._check
        codes, scales = W.codes.data_ptr(), W.scales.data_ptr()

        def linear(A: Tensor, threshold: float, bias: Tensor | None, out: Tensor, outliers: Tensor | None) -> None:
            device, stream = where(A)
            dtype, m = DTYPES[A.dtype], A.numel() // k if k else out.numel() // max(n, 1)
            _scratch, *workspace = workspace_of(QC.QC_OP_INT8_LINEAR, device, stream, dtype, m, n, k, A)
            bias_dtype, bias_ptr = (dtype, 0) if bias is None else (DTYPES[bias.dtype], bias.data_ptr())
            x, y, found = A.data_ptr(), out.data_ptr(), 0 if outliers is None else outliers.data_ptr()
            inputs = (m, n, k, x, codes, scales, threshold, bias_dtype, bias_ptr)
            check(function(device, stream, dtype, *inputs, y, found, *workspace))

        # Only addresses are kept: the tensors behind them live as long as the prepared call.
        linear.weight = W  # type: ignore[attr-defined]
        return linear

    def int8_linear_transposed(self, A: Tensor, W: Weight8bit, *, out: Tensor) -> None:
        self.prepare_int8_linear_transposed(W)(A, out)

    def prepare_int8_linear_transposed(self, W: Weight8bit) -> PreparedTransposed:
        packed = (W.codes.data_ptr(), W.scales.data_ptr())
        return self._prepare_transposed("int8_linear_transposed", QC.QC_OP_INT8_LINEAR_TRANSPOSED, W, packed)

    def int8_dequantize_rows(self, A: Tensor, row_stats: Tensor, *, out: Tensor) -> None:
        where = (*self._where(A), DTYPES[out.dtype])
        self._call("int8_dequantize_rows", *where, *A.shape, address(A), address(row_stats), address(out))

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        self.prepare_optimizer_step(tensors)(rule, tensors.grads, tensors.grad_scales)

    def prepare_optimizer_step(self, t: OptimizerTensors) -> PreparedStep:
        packed = PackedTensors(t)

        def step(rule: OptimizerRule, grads: Sequence[Tensor], grad_scales: Sequence[float]) -> None:
            if not grads:
                return
            device, stream = self._where(t.params[0])
            packed.bring(grads, grad_scales)
            dtypes = (DTYPES[packed.param_dtype], DTYPES[grads[0].dtype])
            _scratch, address, size = None, 0, 0
            if rule.max_unorm:
                sizes = (packed.blocks, packed.count, 0)
                _scratch, address, size = self._workspace(
                    QC.QC_OP_OPTIMIZER_STEP, device, stream, dtypes[0], *sizes, t.params[0]
                )
            self._call("optimizer_step", device, stream, pack_rule(rule, *dtypes), packed.struct, address, size)

        return step

    def paged_memory(self, device: torch.device) -> PagedMemory:
        functions: dict[str, Any] = {name: self._function(name) for name in MEMORY}
        if not all(functions.values()):
            return super().paged_memory(device)
        if not self._host:
            device = torch.empty(0, device=device).device  # with an index
            for name in ("memory_allocate", "memory_prefetch"):
                functions[name] = partial(_on_device, functions[name])
        return CffiMemory(self._library, functions, self._check, device)


def _on_device(function: Callable[..., int], device: int, *arguments: Any) -> int:
    """Call a function of the table with ``device`` current, which it may rely on, then the one before it again."""
    with torch.cuda.device(device):
        return function(device, *arguments)


def _bias(bias: Tensor | None, out: Tensor) -> tuple[int, int]:
    """(bias_dtype, bias) of the ABI; the dtype of an absent bias is never read but has to be a known one."""
    return (DTYPES[out.dtype], 0) if bias is None else (DTYPES[bias.dtype], bias.data_ptr())
