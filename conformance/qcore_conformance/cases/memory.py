"""Every op beside pages without access rights, and over every number of threads (QC-NUM-006, QC-NUM-007)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qcore_conformance.floats import DTYPES, Floats
from qcore_conformance.guards import GUARDS
from qcore_conformance.model import Case, NotRun
from qcore_conformance.samples import LARGE, OPS, TAILS, samples
from qcore_conformance.session import Session


def same_bits(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two results are equal bit for bit, NaN payloads included."""
    return all(
        np.array_equal(a.bits if isinstance(a, Floats) else a, b.bits if isinstance(b, Floats) else b)
        for a, b in zip(first, second, strict=True)
    )


def _pages(op: str, dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        from qcore_conformance.pages import PAGES

        for sample in samples(op, s.rng, dtype, TAILS):
            with s.calling(placements=PAGES):
                beside_pages = sample(s)
            assert same_bits(beside_pages, sample(s)), "the result beside a protected page differs"

    return run


def _threads(op: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        import torch

        if not s.on_host:
            raise NotRun("the number of threads is the host's")
        if not s.is_deterministic(op):
            raise NotRun(f"{op} is declared nondeterministic")
        usual = torch.get_num_threads()
        try:
            for dtype in DTYPES:
                for sample in samples(op, s.rng, dtype, LARGE):
                    results = []
                    # More than one thread on both alignments; that these agree on one thread is what other cases check.
                    for threads, placement in ((1, GUARDS[0]), (2, GUARDS[0]), (3, GUARDS[1])):
                        torch.set_num_threads(threads)
                        with s.calling(placements=(placement,)):
                            results.append(sample(s))
                    for threads, result in zip((2, 3), results[1:]):
                        assert same_bits(results[0], result), f"{dtype}: {threads} threads give other bits than one"
        finally:
            torch.set_num_threads(usual)

    return run


def cases() -> Iterator[Case]:
    for op in OPS:
        for dtype in ("f32",) if op in ("quantize_absmax", "dequantize_absmax", "int8_gemm") else DTYPES:
            run = _pages(op, dtype)
            yield Case(f"{op}/L1/{dtype}-protected-pages", op, "L1", ("QC-NUM-006",), run, {"isolated": True})
        yield Case(f"{op}/L1/threads", op, "L1", ("QC-NUM-007",), _threads(op))
