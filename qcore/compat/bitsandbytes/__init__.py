"""bitsandbytes' top level over qcore: the module that ``import bitsandbytes`` gives while the shim is active.

The modules below it have the names that bitsandbytes 0.50.2 gives them where ``qcore.compat.alias`` says so. Importing
this one by its own name changes nothing for ``import bitsandbytes``.
"""

from __future__ import annotations

from typing import Any

from qcore import nn
from qcore.autograd import MatmulLtState, matmul_4bit
from qcore.compat.bitsandbytes import autograd, cextension, functional, optim
from qcore.compat.bitsandbytes import state_packing as utils
from qcore.compat.metadata import stand_in_version
from qcore.kernel_choice import matmul

__all__ = [
    "BitsAndBytesConfig",
    "MatmulLtState",
    "autograd",
    "cextension",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]

__version__ = stand_in_version()

# transformers, diffusers and accelerate read these: not CUDA alone, and on which kinds of device.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}


def __getattr__(name: str) -> Any:
    if name == "BitsAndBytesConfig":  # needs transformers
        from qcore.compat.bitsandbytes.config import BitsAndBytesConfig

        return BitsAndBytesConfig
    if name == "CUDA_AVAILABLE":
        import qcore

        return qcore.CUDA_AVAILABLE
    raise AttributeError(f"module 'bitsandbytes' (served by qcore) has no attribute {name!r}")
