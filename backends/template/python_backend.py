"""A backend as one Python class: copy it, put your kernels behind the methods, keep the ops that you serve.

The frontend has checked every argument and allocated every output, so a method only computes. An op that is not
overridden is unsupported: asking for it raises, and the conformance suite reports it as such. Select this one by name::

    PYTHONPATH=backends/template QCORE_BACKEND=python_backend:TemplateBackend python program.py
    PYTHONPATH=backends/template qcore-conformance run --backend python_backend:TemplateBackend

An installed package registers itself with an entry point of the group ``qcore.backends`` instead
(docs/add-a-backend.md).
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from qcore import codebooks
from qcore.backend.interface import OPS, Backend, Description, Weight4bit


class TemplateBackend(Backend):
    """The three ops of a 4-bit linear layer, in plain torch."""

    name = "template"
    # The torch device types whose tensors this backend takes: frozenset({"cuda"}) for a GPU.
    device_types = frozenset({"cpu"})

    def describe(self, device: torch.device) -> Description:
        """Describe the backend on ``device``: the fingerprint in every report, and the declarations of the spec."""
        return Description(
            name=self.name,
            device=platform.processor() or platform.machine(),
            arch=platform.machine(),
            runtime=f"torch {torch.__version__}",
            library=__file__,
            ops={op: version for op, version in OPS.items() if self.supports(op)},
            # QC-GEMM4-002: the sum runs in float64, so that only its rounding to float32 and the bias count. A chain of
            # K float64 roundings weighs less than K / 4096 float32 ones.
            declarations={"gemm_4bit": {"depth": {"lanes": 4096, "extra": 2}, "weight_rounding": "float32"}},
        )

    def quantize_4bit(self, A: Tensor, quant_type: str, blocksize: int, *, absmax: Tensor, out: Tensor) -> None:
        """QC-4BIT-001, QC-4BIT-002: n values of ``A`` -> ``absmax`` ``(ceil(n/blocksize),)``, ``out`` ``ceil(n/2)``."""
        n = A.numel()
        blocks = absmax.numel()
        x = torch.zeros(blocks * blocksize, dtype=torch.float32, device=A.device)
        x[:n] = A.flatten()
        x = x.view(blocks, blocksize)
        # QC-Q8-002: NaN elements are left out.
        largest = torch.where(x.isnan(), 0, x.abs()).amax(dim=1)
        # QC-Q8-003: one reciprocal, one product, each rounded; what is NaN then (0 * inf included) becomes 0.
        y = x * (1 / largest)[:, None]
        codes = _codes(torch.where(y.isnan(), 0, y), quant_type).flatten()[:n]
        # QC-4BIT-002: the high nibble first; the nibble behind an odd end holds the code of 0.
        nibbles = torch.full((2 * out.numel(),), 7 if quant_type == "nf4" else 0, dtype=torch.uint8, device=A.device)
        nibbles[:n] = codes
        absmax.copy_(largest)
        out.view(-1).copy_(nibbles[0::2] << 4 | nibbles[1::2])

    def dequantize_4bit(self, weight: Weight4bit, *, out: Tensor) -> None:
        """QC-4BIT-003: ``weight`` -> ``out`` of as many elements, rounded once to its dtype."""
        out.view(-1).copy_(_decode(weight))

    def gemm_4bit(self, A: Tensor, weight: Weight4bit, bias: Tensor | None, *, out: Tensor) -> None:
        """QC-GEMM4-001 to QC-GEMM4-007: ``A`` ``(M, K)``, ``weight`` ``(N, K)`` -> ``out`` ``(M, N)``."""
        W = _decode(weight).view(weight.shape)
        # In float64: torch may compute float32 products in bfloat16, if the user has asked it to.
        product = (A.double() @ W.double().T).float()
        out.copy_(product if bias is None else product + bias.float())


def _codes(y: Tensor, quant_type: str) -> Tensor:
    """QC-NF4-002, QC-FP4-002: the code of each scaled value; ``bucketize`` counts the thresholds below it."""
    if quant_type == "nf4":
        table = torch.tensor(codebooks.NF4, device=y.device)
        return torch.bucketize(y, (table[:-1] + table[1:]) * 0.5).to(torch.uint8)
    thresholds = torch.tensor(codebooks.FP4_THRESHOLDS, device=y.device)
    order = torch.tensor(codebooks.FP4_ORDER, dtype=torch.uint8, device=y.device)
    return order[torch.bucketize(y.abs(), thresholds)] + 8 * (y < 0).to(torch.uint8)


def _decode(weight: Weight4bit) -> Tensor:
    """QC-4BIT-003: the float32 values of ``weight``, flat."""
    numel = 1
    for size in weight.shape:
        numel *= size
    packed = weight.packed.view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:numel].long()
    table = torch.tensor(codebooks.NF4 if weight.quant_type == "nf4" else codebooks.FP4, device=packed.device)
    scale = _absmax(weight).repeat_interleave(weight.blocksize)[:numel]
    return table[codes] * scale


def _absmax(weight: Weight4bit) -> Tensor:
    """QC-NEST-003: the float32 absmax of each block of ``weight``."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_code is not None
    assert weight.nested_offset is not None
    scale = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.long()] * scale + weight.nested_offset
