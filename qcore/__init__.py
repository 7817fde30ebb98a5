"""Quantization for PyTorch on any device: ``import qcore as bnb``.

Names are loaded when they are first used, so that importing the package costs nothing and ``qcore.codebooks`` needs no
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcore.integrations.arrival import watch

if TYPE_CHECKING:
    from qcore import backend, errors, functional, nn, ops, optim
    from qcore.autograd import MatmulLtState, matmul, matmul_4bit
    from qcore.backend.registry import use_backend
    from qcore.compat.alias import install_as_bitsandbytes
    from qcore.integrations.transformers import QcoreConfig

    __version__: str
    CUDA_AVAILABLE: bool

__all__ = [
    "CUDA_AVAILABLE",
    "MatmulLtState",
    "QcoreConfig",
    "__version__",
    "backend",
    "errors",
    "functional",
    "install_as_bitsandbytes",
    "matmul",
    "matmul_4bit",
    "nn",
    "ops",
    "optim",
    "use_backend",
]

_ORIGIN = {
    "MatmulLtState": "qcore.autograd",
    "QcoreConfig": "qcore.integrations.transformers",
    "install_as_bitsandbytes": "qcore.compat.alias",
    "matmul": "qcore.kernel_choice",  # with matmul.execute and matmul.mat_mul_fused
    "matmul_4bit": "qcore.autograd",
    "use_backend": "qcore.backend.registry",
}
_MODULES = frozenset({"backend", "errors", "functional", "nn", "ops", "optim"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"qcore.{name}")
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("qcore-quant")
    elif name == "CUDA_AVAILABLE":  # torch's word for a CUDA or HIP device
        value = import_module("torch").cuda.is_available()
    elif name in _ORIGIN:
        value = getattr(import_module(_ORIGIN[name]), name)
    else:
        raise AttributeError(f"module 'qcore' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


watch()
