"""The backend interface, the C ABI adapter and the registry that chooses a backend for a device."""

from qcore.backend.interface import OPS, Backend, Description, PreparedGemm, Weight4bit
from qcore.backend.registry import BackendStatus, backend_for, backend_report, get_backend, use_backend

__all__ = [
    "OPS",
    "Backend",
    "BackendStatus",
    "Description",
    "PreparedGemm",
    "Weight4bit",
    "backend_for",
    "backend_report",
    "get_backend",
    "use_backend",
]
