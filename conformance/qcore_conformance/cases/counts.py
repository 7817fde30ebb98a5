"""Counts beyond 16 bits in every op: the cheap half of QC-NUM-005 (the stress cases go beyond 2^31)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qcore_conformance import calls, generators, oracle
from qcore_conformance.cases import optimizer
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.model import Case
from qcore_conformance.optimizer_call import random_tensor
from qcore_conformance.session import Session
from qcore_conformance.weights import random_weight

# More than twice 2^16, no multiple of a blocksize; and odd.
_N = 2 * 65536 + 4211
_BLOCKSIZE = 64
_BLOCKS = -(-_N // _BLOCKSIZE)


def _quantize_blockwise(s: Session) -> None:
    a, code = generators.values("lognormal", s.rng, _N, "f32"), generators.CODEBOOKS["dynamic"]
    got, want = calls.quantize_blockwise(s, a, code, _BLOCKSIZE), oracle.quantize_blockwise(a, code, _BLOCKSIZE)
    expect_floats("absmax", got.absmax, want.absmax)
    expect_integers("out", got.codes, want.codes)


def _dequantize_blockwise(s: Session) -> None:
    codes, code = s.rng.integers(0, 256, _N, dtype=np.uint8), generators.CODEBOOKS["dynamic"]
    absmax = generators.values("lognormal", s.rng, _BLOCKS, "f32")
    got = calls.dequantize_blockwise(s, codes, absmax, code, _BLOCKSIZE, "f32")
    expect_floats("out", got, oracle.dequantize_blockwise(codes, absmax, code, _BLOCKSIZE, "f32"))


def _quantize_4bit(s: Session) -> None:
    a = generators.values("lognormal", s.rng, _N, "f32")
    got, want = calls.quantize_4bit(s, a, "nf4", _BLOCKSIZE), oracle.quantize_4bit(a, "nf4", _BLOCKSIZE)
    expect_floats("absmax", got.absmax, want.absmax)
    expect_integers("out", got.codes, want.codes)


def _dequantize_4bit(s: Session) -> None:
    for nested in (0, 256):
        weight = random_weight(s.rng, "nf4", _BLOCKSIZE, (_N,), nested)
        expect_floats("out", calls.dequantize_4bit(s, weight, "f32"), weight.decoded("f32"))


def _quantize_absmax(s: Session) -> None:
    absmax, code = generators.values("lognormal", s.rng, _N, "f32"), generators.CODEBOOKS["dynamic"]
    got, want = calls.quantize_absmax(s, absmax, code, 256), oracle.quantize_absmax(absmax, code, 256)
    expect_floats("offset", got.offset, want.offset)
    expect_floats("nested_absmax", got.nested_absmax, want.nested_absmax)
    expect_integers("out", got.codes, want.codes)


def _dequantize_absmax(s: Session) -> None:
    codes, code = s.rng.integers(0, 256, _N, dtype=np.uint8), generators.CODEBOOKS["dynamic"]
    nested, offset = (generators.values("lognormal", s.rng, n, "f32") for n in (-(-_N // 256), 1))
    got = calls.dequantize_absmax(s, codes, nested, code, offset, 256)
    expect_floats("out", got, oracle.dequantize_absmax(codes, nested, code, offset, 256))


def _optimizer_step(s: Session) -> None:
    for algorithm, bits in (("adam", 8), ("momentum", 32)):
        a_rule = optimizer.rule(algorithm, bits)
        optimizer.check(s, a_rule, [random_tensor(s.rng, a_rule, _N)])


_CHECKS: dict[str, Callable[[Session], None]] = {
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "quantize_absmax": _quantize_absmax,
    "dequantize_absmax": _dequantize_absmax,
    "optimizer_step": _optimizer_step,
}


def cases() -> Iterator[Case]:
    for op, run in _CHECKS.items():
        yield Case(f"{op}/L1/f32-n{_N}", op, "L1", ("QC-NUM-004", "QC-NUM-005"), run, {"n": _N})
