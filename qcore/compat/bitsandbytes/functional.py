"""``bitsandbytes.functional``: qcore's, and what only bitsandbytes' callers ask for."""

from __future__ import annotations

from qcore import functional
from qcore.functional import *  # noqa: F403

__all__ = [*functional.__all__, "has_avx512bf16"]  # noqa: PLE0604


def has_avx512bf16() -> bool:
    """Whether weights are repacked, and activations rounded to bfloat16, by the first forward pass on this CPU.

    In bitsandbytes they are where the CPU has AVX512-BF16. Never here: codes stay as they are saved, and activations
    keep their dtype.
    """
    return False
