"""Addresses, dtypes and the structs of weights in ``qcore_backend.h``, filled from the interface's dataclasses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.backend.weights import Weight4bit, WeightInt4

DTYPES = {torch.float32: QC.QC_F32, torch.float16: QC.QC_F16, torch.bfloat16: QC.QC_BF16}
FORMATS = {"nf4": QC.QC_NF4, "fp4": QC.QC_FP4}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack_4bit(weight: Weight4bit) -> Any:
    """A ``qc_weight_4bit``; the tensors have to live as long as it is used."""
    numel = 1
    for size in weight.shape:
        numel *= size
    return ffi.new(
        "qc_weight_4bit *",
        {
            "packed": address(weight.packed),
            "absmax": address(weight.absmax),
            "nested_absmax": address(weight.nested_absmax),
            "nested_code": address(weight.nested_code),
            "nested_offset": address(weight.nested_offset),
            "numel": numel,
            "blocksize": weight.blocksize,
            "nested_blocksize": weight.nested_blocksize,
            "format": FORMATS[weight.quant_type],
            "layout": 0,
        },
    )


def pack_int4(weight: WeightInt4) -> Any:
    """A ``qc_weight_int4``; the tensors have to live as long as it is used."""
    n, k = weight.shape
    return ffi.new(
        "qc_weight_int4 *",
        {
            "packed": address(weight.packed),
            "scales": address(weight.scales),
            "zeros": address(weight.zeros),
            "perm": address(weight.perm),
            "n": n,
            "k": k,
            "group_size": weight.group_size,
            "scale_dtype": DTYPES[weight.scales.dtype],
            "layout": 0,
        },
    )
