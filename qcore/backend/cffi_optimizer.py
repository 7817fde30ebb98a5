"""The structs of ``optimizer_step`` in ``qcore_backend.h``, filled from the interface's dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.backend.optimizer import OPTIMIZER_BLOCK, OptimizerRule, OptimizerTensors

_ALGORITHMS = {
    "adam": QC.QC_ADAM,
    "ademamix": QC.QC_ADEMAMIX,
    "lion": QC.QC_LION,
    "momentum": QC.QC_MOMENTUM,
    "rmsprop": QC.QC_RMSPROP,
    "adagrad": QC.QC_ADAGRAD,
}
_FLAGS = {
    "nesterov": QC.QC_OPT_NESTEROV,
    "skip_zeros": QC.QC_OPT_SKIP_ZEROS,
    "stochastic": QC.QC_OPT_STOCHASTIC,
    "bnb_codes": QC.QC_OPT_BNB_CODES,
    "signed_state": QC.QC_OPT_SIGNED_STATE,
}
_SCALARS = (
    "step_size", "decay", "l2", "eps", "beta1", "gain1", "beta2", "gain2", "beta3", "gain3", "correction1",
    "correction2", "alpha", "max_unorm", "unorm_factor", "seed",
)  # fmt: skip


def pack_rule(rule: OptimizerRule, param_dtype: int, grad_dtype: int) -> Any:
    """A ``qc_optimizer``; the conversion to ``float`` is the one rounding of QC-OPT-002."""
    fields = {name: getattr(rule, name) for name in _SCALARS}
    fields |= {
        "algorithm": _ALGORITHMS[rule.algorithm],
        "state_bits": rule.state_bits,
        "param_dtype": param_dtype,
        "grad_dtype": grad_dtype,
        "flags": sum(flag for name, flag in _FLAGS.items() if getattr(rule, name)),
    }
    return ffi.new("qc_optimizer *", fields)


class PackedTensors:
    """A ``qc_optimizer_tensors`` and what its addresses point to; the tensors live as long as it does.

    ``struct`` is the pointer for the call, ``blocks`` the ``m`` of ``workspace()``.
    """

    def __init__(self, tensors: OptimizerTensors) -> None:
        self._tensors = tensors
        self.param_dtype: torch.dtype = tensors.params[0].dtype if tensors.params else torch.float32
        sizes = [param.numel() for param in tensors.params]
        self.count = len(sizes)
        self.blocks = sum(-(-size // OPTIMIZER_BLOCK) for size in sizes)
        self._grads: Any = ffi.new("uintptr_t[]", self.count)
        self._scales: Any = ffi.new("float[]", self.count)
        names = ("params", "state1", "state2", "absmax1", "absmax2", "compensation")
        arrays = {name: _addresses(getattr(tensors, name)) for name in names}
        arrays |= {"numel": ffi.new("int64_t[]", sizes), "grads": self._grads}
        arrays["streams"] = ffi.new("uint64_t[]", list(tensors.streams)) if tensors.streams else ffi.NULL
        self._arrays = arrays
        self.struct: Any = ffi.new("qc_optimizer_tensors *", {"count": self.count, **arrays})

    def bring(self, grads: Sequence[Tensor], grad_scales: Sequence[float]) -> None:
        """Put the gradients of this step in."""
        self._grads[0 : self.count] = [grad.data_ptr() for grad in grads]
        if grad_scales:
            self._scales[0 : self.count] = list(grad_scales)
        self.struct.grad_scales = self._scales if grad_scales else ffi.NULL


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return ffi.new("uintptr_t[]", [tensor.data_ptr() for tensor in tensors]) if tensors else ffi.NULL
