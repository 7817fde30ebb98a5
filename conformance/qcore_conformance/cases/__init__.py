"""The cases, one module an op family, imported when they are first asked for.

A module has a function ``cases()`` that yields :class:`~qcore_conformance.model.Case` objects. To add an op, add its
name to ``FAMILIES`` and its cases to a module; every clause of the spec needs a case that lists it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module

from qcore_conformance.model import LEVELS, Case

# Module of this package -> ops whose cases it holds. "contract" is about the backend as a whole.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "contract": ("contract",),
    "blockwise": ("quantize_blockwise", "dequantize_blockwise"),
    "fourbit": ("quantize_4bit", "dequantize_4bit"),
    "absmax": ("quantize_absmax", "dequantize_absmax"),
    "gemm_4bit": ("gemm_4bit",),
    "gemm_4bit_transposed": ("gemm_4bit_transposed",),
    "int8": (
        "int8_quantize_rows",
        "int8_quantize_cols",
        "int8_gemm",
        "int8_dequantize_gemm",
        "int8_scaled_gemm",
        "int8_dequantize_rows",
    ),
    "optimizer": ("optimizer_step",),
    "int8_linear": ("int8_linear",),
    "gemm_int4": ("gemm_int4",),
    "int8_transposed": ("int8_linear_transposed",),
}
# Modules that add cases for ops of any family.
ACROSS = ("frontend", "rejection", "rounding", "counts", "memory", "paged_memory", "stress")
OPS = tuple(op for ops in FAMILIES.values() for op in ops)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in a fixed order: by op, then by level."""
    found: dict[str, Case] = {}
    for module in (*FAMILIES, *ACROSS):
        for case in import_module(f"qcore_conformance.cases.{module}").cases():
            if case.id in found:
                raise ValueError(f"two cases are called {case.id!r}")
            found[case.id] = case
    order = {op: index for index, op in enumerate(OPS)}
    return tuple(sorted(found.values(), key=lambda case: (order[case.op], LEVELS.index(case.level))))


def case_by_id(case_id: str) -> Case:
    """Raises ``KeyError`` if there is none."""
    for case in all_cases():
        if case.id == case_id:
            return case
    raise KeyError(case_id)


def select(ops: Iterable[str] = (), levels: Iterable[str] = ()) -> tuple[Case, ...]:
    """The cases of these ops and levels; all ops or levels if none are given."""
    ops, levels = set(ops) or set(OPS), set(levels) or set(LEVELS)
    return tuple(case for case in all_cases() if case.op in ops and case.level in levels)
