"""The backend interface, the C ABI adapter and the registry that chooses a backend for a device."""

from qcore.backend.interface import OPS, Backend, Description, PreparedGemm, PreparedInt8
from qcore.backend.optimizer import (
    ALGORITHMS,
    OPTIMIZER_BLOCK,
    OptimizerRule,
    OptimizerTensors,
    PreparedStep,
)
from qcore.backend.paged import PagedMemory
from qcore.backend.registry import BackendStatus, backend_for, backend_report, get_backend, use_backend
from qcore.backend.weights import Weight4bit, Weight8bit, WeightInt4

__all__ = [
    "ALGORITHMS",
    "OPS",
    "OPTIMIZER_BLOCK",
    "Backend",
    "BackendStatus",
    "Description",
    "OptimizerRule",
    "OptimizerTensors",
    "PagedMemory",
    "PreparedGemm",
    "PreparedInt8",
    "PreparedStep",
    "Weight4bit",
    "Weight8bit",
    "WeightInt4",
    "backend_for",
    "backend_report",
    "get_backend",
    "use_backend",
]
