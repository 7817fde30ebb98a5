"""Public figures of GPUs: what their vendors say that they can do at most.

Rates are dense (without structured sparsity), products of 16-bit floats with float32 sums. The comment beside a figure
names the document that it is from; where none gives it, it is operations a clock and unit, times units, times boost
clock. The documents, and the units and clocks in them:

- H100 SXM: the white paper NVIDIA H100 Tensor Core GPU Architecture (132 multiprocessors; 1.83 GHz where the matrix
  units work, 1.98 GHz elsewhere) and the GPU's data sheet;
- GeForce RTX 4090: appendix A of the white paper NVIDIA Ada GPU Architecture (128 multiprocessors, 2.52 GHz);
- Instinct MI300X: its data sheet (304 compute units, 2.1 GHz);
- Radeon RX 7900 XTX and RX 9070 XT: their product pages (96 compute units, 2.5 GHz; 64, 2.97 GHz) and GPUOpen's Using
  the Matrix Cores of AMD RDNA 4 architecture GPUs, which has the operations a clock and unit of both.

A test multiplies units, clocks and operations again.
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
    lanes : float
        Instructions times lanes a second of the vector units. Of the public float32 rate this is a half on NVIDIA's
        and a quarter on AMD's, which count packed (CDNA 3) or paired (RDNA 3, RDNA 4) instructions: two multiplications
        and two additions a lane. The kernels' decoding is not made of those.
    sources : tuple of str
        The vendor's documents.
    """

    key: str
    name: str
    arch: str
    bandwidth: float
    cache: int
    f16: float
    int8: float
    lanes: float
    sources: tuple[str, ...]


_MIB = 1 << 20

GPUS: tuple[Gpu, ...] = (
    Gpu(
        "h100", "NVIDIA H100 SXM", "sm_90",
        3.35e12,  # data sheet
        50 * _MIB,  # white paper: 50 MB of L2
        989.4e12,  # white paper; 1978.9 with sparsity
        1978.9e12,  # white paper; 3957.8 with sparsity
        66.9e12 / 2,  # white paper
        ("https://www.nvidia.com/en-us/data-center/h100/",
         "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"),
    ),
    Gpu(
        "rtx4090", "NVIDIA GeForce RTX 4090", "sm_89",
        1.008e12,  # white paper, like all of these
        72 * _MIB,  # 73728 KB of L2
        165.2e12,  # with float32 sums; with float16 sums 330.3
        660.6e12,
        82.6e12 / 2,
        ("https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",),
    ),
    Gpu(
        "mi300x", "AMD Instinct MI300X", "gfx942",
        5.3e12,  # data sheet
        256 * _MIB,  # data sheet: Infinity Cache
        1307.4e12,  # data sheet
        2614.9e12,  # data sheet
        163.4e12 / 4,  # data sheet: 256 operations a clock and unit
        ("https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",),
    ),
    Gpu(
        "rx7900xtx", "AMD Radeon RX 7900 XTX", "gfx1100",
        0.96e12,  # product page
        96 * _MIB,  # product page: Infinity Cache
        122.8e12,  # product page; GPUOpen: 512 a clock and unit
        122.8e12,  # GPUOpen: 512 a clock and unit, as float16
        61.4e12 / 4,  # product page
        ("https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html",
         "https://gpuopen.com/learn/using_matrix_core_amd_rdna4"),
    ),
    Gpu(
        "rx9070xt", "AMD Radeon RX 9070 XT", "gfx1201",
        0.64e12,  # product page: 256 bits at 20 Gbit/s
        64 * _MIB,  # product page: Infinity Cache
        194.6e12,  # GPUOpen: 1024 a clock and unit
        389.3e12,  # GPUOpen: 2048 a clock and unit; product page: 779 with sparsity
        48.7e12 / 4,  # product page
        ("https://www.amd.com/en/products/graphics/desktops/radeon/9000-series/amd-radeon-rx-9070xt.html",
         "https://gpuopen.com/learn/using_matrix_core_amd_rdna4"),
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
