"""Deliberately wrong backends: the suite is right only if it notices every one of them.

A mutant is a small class in one of the modules here, with the clause that it breaks. ``qcore-conformance mutants``
runs the suite on each and prints which case noticed it; it fails if one survives, or if a right backend does not. To
add one, write a class with the decorator :func:`~qcore_conformance.mutants.mutant.mutant`; every bug found in the
field adds one.
"""

from __future__ import annotations

from qcore_conformance.mutants import (
    blocks,
    eightbit,
    fourbit,
    gemm,
    gemm_int4,
    gemm_transposed,
    int8,
    int8_linear,
    int8_transposed,
    memory,
    optimizer,
    rounding,
)
from qcore_conformance.mutants.mutant import Mutant, registered
from qcore_conformance.mutants.steps import Steps

__all__ = ["Mutant", "Steps", "all_mutants"]

_MODULES = (
    rounding,
    blocks,
    eightbit,
    fourbit,
    gemm,
    gemm_transposed,
    int8,
    int8_linear,
    int8_transposed,
    gemm_int4,
    optimizer,
    memory,
)


def all_mutants() -> tuple[Mutant, ...]:
    """Every mutant in Python, in the order of the modules; those of the C ABI are in ``native``."""
    order = {module.__name__: index for index, module in enumerate(_MODULES)}
    return tuple(sorted(registered(), key=lambda mutant: order[mutant.spec.partition(":")[0]]))
