"""Codebooks are those of bitsandbytes 0.50.2, for every argument that it accepts."""

from __future__ import annotations

import itertools
import sys
from statistics import NormalDist
from types import ModuleType, SimpleNamespace

import bitsandbytes.functional as B
import numpy as np
import pytest
import torch

from qcore import codebooks
from qcore import functional as F
from qcore.errors import InvalidArgument, Unsupported


@pytest.mark.parametrize("arguments", list(itertools.product([True, False], range(1, 8), range(2, 9))), ids=str)
def test_dynamic_maps(arguments: tuple[bool, int, int]) -> None:
    try:
        expected = B.create_dynamic_map(*arguments)
    except (AssertionError, TypeError, RuntimeError):
        with pytest.raises(InvalidArgument, match="create_dynamic_map"):
            F.create_dynamic_map(*arguments)
    else:
        assert torch.equal(F.create_dynamic_map(*arguments), expected)


@pytest.mark.parametrize("arguments", list(itertools.product([True, False], range(1, 9), [True, False])), ids=str)
def test_linear_maps(arguments: tuple[bool, int, bool]) -> None:
    assert torch.equal(F.create_linear_map(*arguments), B.create_linear_map(*arguments))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("exponent_bits", "precision_bits"), list(itertools.product(range(1, 7), range(5))))
def test_fp8_maps(signed: bool, exponent_bits: int, precision_bits: int) -> None:
    total_bits = exponent_bits + precision_bits + signed
    if total_bits > 8:
        with pytest.raises(InvalidArgument, match="at most 8 bits"):
            F.create_fp8_map(signed, exponent_bits, precision_bits, total_bits)
        return
    expected = B.create_fp8_map(signed, exponent_bits, precision_bits, total_bits)
    assert torch.equal(F.create_fp8_map(signed, exponent_bits, precision_bits, total_bits), expected)


def test_the_standard_maps_are_computed_as_they_are_tabulated() -> None:
    """The table of the default arguments is what the general formula gives."""
    assert torch.equal(torch.tensor(codebooks.DYNAMIC), B.create_dynamic_map())
    assert torch.equal(torch.tensor(codebooks.DYNAMIC_UNSIGNED), B.create_dynamic_map(signed=False))


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("offset", [0.9677083, 0.95, 0.99, 0.6])
def test_normal_maps(offset: float, extra: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # bitsandbytes takes the quantiles from scipy; the standard library's are as accurate.
    norm = SimpleNamespace(ppf=lambda points: np.array([NormalDist().inv_cdf(p) for p in points.tolist()]))
    monkeypatch.setitem(sys.modules, "scipy", ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.stats", SimpleNamespace(norm=norm))
    assert torch.equal(F.create_normal_map(offset, extra), B.create_normal_map(offset, extra))


def test_the_normal_map_holds_the_nf4_values() -> None:
    code = F.create_normal_map()
    assert code.shape == (256,)
    values = torch.unique(code)
    torch.testing.assert_close(values, torch.tensor(codebooks.NF4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("typename", ["nf4", "fp4", "af4"])
def test_4bit_types(typename: str) -> None:
    assert torch.equal(F.get_4bit_type(typename, "cpu"), B.get_4bit_type(typename, "cpu"))


def test_int4_is_its_definition() -> None:
    code = F.get_4bit_type("int4", "cpu")  # bitsandbytes cannot make it: it divides an integer tensor in place
    assert torch.equal(code, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]) / 7)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(Unsupported, match="af4 is defined for blocksize 64"):
        F.get_4bit_type("af4", "cpu", blocksize=128)
    with pytest.raises(NotImplementedError, match="typename is 'int3'"):
        F.get_4bit_type("int3", "cpu")
    with pytest.raises(InvalidArgument, match="do not make"):
        F.create_fp8_map(True, 5, 3, 8)
    with pytest.raises(InvalidArgument, match="total_bits is 9"):
        F.create_linear_map(True, 9)
    with pytest.raises(InvalidArgument, match="quantile"):
        F.create_normal_map(0.5)
