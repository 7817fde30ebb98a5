"""``import qcore as bnb``: bitsandbytes 0.50.2's names, with the same parameters in the same order."""

from __future__ import annotations

import inspect
import subprocess
import sys

import bitsandbytes
import bitsandbytes.functional as B
import pytest

import qcore
from qcore import functional as F

SHARED = sorted(name for name in F.__all__ if hasattr(B, name) and inspect.isfunction(getattr(B, name)))


def parameters(function: object) -> list[tuple[str, object]]:
    """Positional parameters: name and default."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_every_quantization_function_is_there() -> None:
    wanted = "quantize_blockwise dequantize_blockwise quantize_4bit quantize_nf4 quantize_fp4 dequantize_4bit "
    wanted += "dequantize_nf4 dequantize_fp4 create_dynamic_map create_linear_map create_fp8_map create_normal_map "
    wanted += "get_4bit_type gemv_4bit int8_vectorwise_quant int8_double_quant int8_linear_matmul int8_mm_dequant "
    wanted += "int8_vectorwise_dequant pack_dict_to_tensor unpack_tensor_to_dict get_paged prefetch_tensor"
    assert set(wanted.split()) == set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_parameters_are_bitsandbytes(name: str) -> None:
    assert parameters(getattr(F, name)) == parameters(getattr(B, name))


def test_quant_state_has_the_same_parameters_and_keys() -> None:
    assert parameters(F.QuantState) == parameters(B.QuantState)
    assert list(F.QuantState.valid_qs_keys) == B.QuantState.valid_qs_keys
    assert list(F.QuantState.valid_qs_type_keys) == B.QuantState.valid_qs_type_keys
    assert F.QuantState.valid_quant_types == B.QuantState.valid_quant_types


@pytest.mark.parametrize("name", ["matmul", "matmul_4bit"])
def test_products_have_the_same_parameters(name: str) -> None:
    assert parameters(getattr(qcore, name)) == parameters(getattr(bitsandbytes, name))


def test_public_names_load_on_first_use() -> None:
    for name in qcore.__all__:
        assert getattr(qcore, name) is not None
    assert dir(qcore) == qcore.__all__
    with pytest.raises(AttributeError, match="no attribute 'adam'"):
        _ = qcore.adam


def test_importing_the_package_does_not_import_torch() -> None:
    script = "import sys, qcore, qcore.codebooks, qcore.errors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
