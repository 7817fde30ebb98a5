"""Public figures of GPUs: what their vendors say that they can do at most.

Rates are dense (without structured sparsity), products of 16-bit floats with float32 sums. Where a page gives only the
rate with sparsity, it is halved; where it gives none, the rate is operations a clock and unit, from the vendor's
architecture paper, times units times boost clock, as said beside the figure.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from qcore.errors import InvalidArgument


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes
    ----------
    bandwidth : float
        Of memory, bytes a second.
    cache : int
        Bytes of the last cache before memory (second-level cache, Infinity Cache).
    f16, int8 : float
        Operations a second (a multiplication and an addition are two) of the matrix units; bfloat16 as float16.
    f32 : float
        Operations a second of the vector units; half of it is their instructions times lanes.
    sources : tuple of str
        The vendor's pages.
    """

    key: str
    name: str
    arch: str
    bandwidth: float
    cache: int
    f16: float
    int8: float
    f32: float
    sources: tuple[str, ...]


_MIB = 1 << 20

GPUS: tuple[Gpu, ...] = (
    Gpu(
        "h100", "NVIDIA H100 SXM", "sm_90", 3.35e12, 50 * _MIB,
        989.5e12,  # 1979 with sparsity
        1979e12,  # 3958 with sparsity
        67e12,
        ("https://www.nvidia.com/en-us/data-center/h100/",
         "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"),
    ),
    Gpu(
        "rtx4090", "NVIDIA GeForce RTX 4090", "sm_89", 1.008e12, 72 * _MIB,
        165.2e12, 660.6e12, 82.6e12,
        ("https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",),
    ),
    Gpu(
        "mi300x", "AMD Instinct MI300X", "gfx942", 5.3e12, 256 * _MIB,
        1307.4e12, 2614.9e12, 163.4e12,
        ("https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",),
    ),
    Gpu(
        "rx7900xtx", "AMD Radeon RX 7900 XTX", "gfx1100", 0.96e12, 96 * _MIB,
        122.8e12,
        122.8e12,  # 512 a clock and unit, as float16, 96 units at 2.5 GHz
        61.4e12,
        ("https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html",
         "https://gpuopen.com/learn/wmma_on_rdna3/"),
    ),
    Gpu(
        "rx9070xt", "AMD Radeon RX 9070 XT", "gfx1201", 0.64e12, 64 * _MIB,
        194.6e12,  # 1024 a clock and unit, 64 units at 2.97 GHz
        389.3e12,  # 779 with sparsity
        48.7e12,
        ("https://www.amd.com/en/products/graphics/desktops/radeon/9000-series/amd-radeon-rx-9070xt.html",),
    ),
)  # fmt: skip


def gpu(key: str) -> Gpu:
    """The GPU of that key; ``InvalidArgument`` lists the keys."""
    for known in GPUS:
        if known.key == key.lower():
            return known
    near = difflib.get_close_matches(key.lower(), [known.key for known in GPUS], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InvalidArgument(
        f"bench gpu: --device-model {key!r} is unknown; {hint}There are: {', '.join(known.key for known in GPUS)}"
    )


def gpu_named(name: str) -> Gpu | None:
    """The GPU whose driver calls it ``name``, such as ``"NVIDIA H100 80GB HBM3"``; None for one without figures."""
    plain = name.lower().replace(" ", "").replace("-", "")
    return next((known for known in GPUS if known.key in plain), None)
