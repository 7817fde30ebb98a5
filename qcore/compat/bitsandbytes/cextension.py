"""``bitsandbytes.cextension``: what torch was built for. qcore loads its native libraries in ``qcore.backend``."""

from __future__ import annotations

import torch

HIP_ENVIRONMENT = torch.version.hip is not None
BNB_BACKEND = "ROCm" if HIP_ENVIRONMENT else "CUDA" if torch.cuda.is_available() else "CPU"
