"""Tensor-level functions under bitsandbytes' names and signatures (0.50.2): ``qcore.functional.quantize_4bit`` ..."""

from qcore.functional.activations import fake_quantize_tensor, quantize_activation
from qcore.functional.codemaps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from qcore.functional.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from qcore.functional.paged import get_paged, prefetch_tensor
from qcore.functional.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict
from qcore.functional.quantization import (
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "fake_quantize_tensor",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_activation",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]
