"""L3: more than 2^31 elements, streams, graphs, a second device, two threads, fifty repeats."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore_conformance import oracle
from qcore_conformance.cases.memory import same_bits
from qcore_conformance.floats import Floats, f32, rounded
from qcore_conformance.generators import CODEBOOKS, values
from qcore_conformance.guards import GUARDS
from qcore_conformance.model import Case, NotRun
from qcore_conformance.samples import LARGE, OPS, TAILS, Sample, samples
from qcore_conformance.session import Session, to_torch
from qcore_conformance.streams import DELAYED, captured, needs_cuda, on_side_stream
from qcore_conformance.weights import random_weight

if TYPE_CHECKING:
    import torch

_REPEATS = 50
_PERIOD = 1 << 20  # a multiple of every blocksize
_HUGE = 2**31 + 3 * _PERIOD + 77
_REST = _HUGE % _PERIOD


def _repeats(op: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        if not s.is_deterministic(op):
            raise NotRun(f"{op} is declared nondeterministic")
        for dtype in ("f32", "bf16"):
            for sample in samples(op, s.rng, dtype, LARGE):
                with s.calling(placements=GUARDS[:1]):
                    first = sample(s)
                    for i in range(1, _REPEATS):
                        assert same_bits(first, sample(s)), f"{dtype}: call {i + 1} of {_REPEATS} gave other bits"

    return run


def _two_threads(op: str) -> Callable[[Session], None]:
    """Two threads call at once, each with its own tensors; each gets what it gets alone."""

    def run(s: Session) -> None:
        if not s.is_deterministic(op):
            raise NotRun(f"{op} is declared nondeterministic")
        jobs = [[*samples(op, s.rng, "bf16", TAILS), *samples(op, s.rng, "f32", LARGE)] for _ in range(2)]
        alone = [[sample(s) for sample in job] for job in jobs]
        problems: list[BaseException] = []
        start = threading.Barrier(2)

        def work(job: list[Sample], wanted: list[Any]) -> None:
            try:
                own = Session(s.backend, s.device, s.seed, spec=s.spec)
                for sample, want in zip(job, wanted):
                    start.wait()  # both at the same shape: what they might share fits either
                    for _ in range(5):
                        assert same_bits(sample(own), want), "a call beside another thread's gave other bits"
            except BaseException as error:  # raised again by the case's own thread
                problems.append(error)
                start.abort()

        threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, alone)]
        turns = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # on a busy machine the calls would hardly overlap otherwise
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(turns)
        for problem in problems:
            if not isinstance(problem, threading.BrokenBarrierError):
                raise problem

    return run


def _delayed_producer(op: str) -> Callable[[Session], None]:
    """Inputs that a slow kernel of the current stream is still to write: a call on another stream reads zeros."""

    def run(s: Session) -> None:
        needs_cuda(s)
        for sample in samples(op, s.rng, "bf16", LARGE):
            want = sample(s)
            with s.calling(placements=DELAYED, around=on_side_stream):
                assert same_bits(sample(s), want), "the call did not wait for the stream's earlier work"

    return run


def _graph(op: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        needs_cuda(s)
        for sample in [*samples(op, s.rng, "bf16", TAILS), *samples(op, s.rng, "f16", LARGE)]:
            want = sample(s)
            with s.calling(around=captured):
                assert same_bits(sample(s), want), "the replayed graph gave other bits"

    return run


def _second_device(op: str) -> Callable[[Session], None]:
    """Tensors of device 1 while device 0 is current."""

    def run(s: Session) -> None:
        import torch

        needs_cuda(s)
        if torch.cuda.device_count() < 2:
            raise NotRun("there is one device only")
        other = Session(s.backend, "cuda:1", s.seed, spec=s.spec)
        with torch.cuda.device(0):
            for sample in samples(op, s.rng, "bf16", LARGE):
                assert same_bits(sample(other), sample(s)), "device 1 gave other bits than device 0"
            assert torch.cuda.current_device() == 0, "the call changed the current device"

    return run


def _room(s: Session, nbytes: int) -> AbstractContextManager[None]:
    """Raise ``NotRun`` without that much free memory, with a margin, and more for a backend with temporaries."""
    from qcore_conformance.streams import free_memory, freed

    native = bool(s.description.abi)
    needed = int(nbytes * 1.2) if native else nbytes + 32 * _HUGE
    available = free_memory(s.device)
    if available < needed:
        raise NotRun(f"needs {needed / 2**30:.1f} GiB of free memory, {available / 2**30:.1f} GiB are free")
    return freed(s.device)


def _tiled(s: Session, tile: Any, n: int) -> torch.Tensor:
    """``n`` elements on the device: the tile, again and again."""
    import torch

    one = to_torch(tile).to(s.device)
    out = torch.empty(n, dtype=one.dtype, device=s.device)
    whole = n // one.numel() * one.numel()
    out[:whole].view(-1, one.numel()).copy_(one.expand(whole // one.numel(), -1))
    out[whole:].copy_(one[: n - whole])
    return out


def _expect_tiled(what: str, actual: torch.Tensor, tile: Any, rest: Any) -> None:
    """Every period equals the tile bit for bit, and the tail equals ``rest``."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    flat = actual.view(bits)
    one, tail = (to_torch(part).to(actual.device).view(bits) for part in (tile, rest))
    whole = flat.numel() // one.numel() * one.numel()
    for i, start in enumerate(range(0, whole, one.numel())):
        period = flat[start : start + one.numel()]
        assert torch.equal(period, one), f"{what}: period {i}, from element {start}, is wrong"
    assert torch.equal(flat[whole:], tail), f"{what}: the tail, from element {whole}, is wrong"


def _huge_quantize(s: Session) -> None:
    import torch

    blocksize = 4096
    with _room(s, 3 * _HUGE):
        tile = values("normal", s.rng, _PERIOD, "bf16")
        rest = Floats(tile.bits[:_REST], "bf16")
        a = _tiled(s, tile, _HUGE)
        absmax = torch.empty(-(-_HUGE // blocksize), device=s.device)
        out = torch.full(((_HUGE + 1) // 2,), 0xA5, dtype=torch.uint8, device=s.device)
        s.backend.quantize_4bit(a, "nf4", blocksize, absmax=absmax, out=out)
        s.synchronize()
        want, tail = oracle.quantize_4bit(tile, "nf4", blocksize), oracle.quantize_4bit(rest, "nf4", blocksize)
        _expect_tiled("out", out, want.codes, tail.codes)
        _expect_tiled("absmax", absmax, want.absmax, tail.absmax)


def _huge_dequantize(s: Session) -> None:
    import torch

    blocksize = 4096
    with _room(s, 3 * _HUGE):
        weight = random_weight(s.rng, "fp4", blocksize, (_PERIOD,))
        from qcore.backend import Weight4bit

        assert isinstance(weight.absmax, Floats)
        parts = Weight4bit(
            packed=_tiled(s, weight.packed, (_HUGE + 1) // 2),
            absmax=_tiled(s, weight.absmax, -(-_HUGE // blocksize)),
            quant_type="fp4",
            blocksize=blocksize,
            shape=(_HUGE,),
        )
        out = torch.empty(_HUGE, dtype=torch.bfloat16, device=s.device)
        s.backend.dequantize_4bit(parts, out=out)
        s.synchronize()
        want = weight.decoded("bf16")
        _expect_tiled("out", out, want, Floats(want.bits[:_REST], "bf16"))


def _huge_blockwise(s: Session) -> None:
    import torch

    code, blocksize = CODEBOOKS["dynamic"], 2048
    with _room(s, 4 * _HUGE):
        tile = values("normal", s.rng, _PERIOD, "f16")
        rest = Floats(tile.bits[:_REST], "f16")
        a = _tiled(s, tile, _HUGE)
        table = to_torch(f32(code)).to(s.device)
        absmax = torch.empty(-(-_HUGE // blocksize), device=s.device)
        out = torch.full((_HUGE,), 0xA5, dtype=torch.uint8, device=s.device)
        s.backend.quantize_blockwise(a, table, blocksize, absmax=absmax, out=out)
        s.synchronize()
        want, tail = oracle.quantize_blockwise(tile, code, blocksize), oracle.quantize_blockwise(rest, code, blocksize)
        _expect_tiled("out", out, want.codes, tail.codes)
        _expect_tiled("absmax", absmax, want.absmax, tail.absmax)
        a.fill_(0)
        s.backend.dequantize_blockwise(out, absmax, table, blocksize, out=a)
        s.synchronize()
        decoded, end = (
            oracle.dequantize_blockwise(part.codes, part.absmax, code, blocksize, "f16") for part in (want, tail)
        )
        _expect_tiled("decoded", a, decoded, end)


def _huge_gemm(s: Session) -> None:
    """A weight of more than 2^31 elements; one-hot activations, so that the result is exact."""
    import torch

    from qcore.backend import Weight4bit

    k, blocksize = 4096, 4096
    n = _HUGE // k + 1
    with _room(s, n * k * 2 // 3 + 8 * n):
        weight = random_weight(s.rng, "nf4", blocksize, (_PERIOD // k, k))
        assert isinstance(weight.absmax, Floats)
        parts = Weight4bit(
            packed=_tiled(s, weight.packed, n * k // 2),
            absmax=_tiled(s, weight.absmax, n),
            quant_type="nf4",
            blocksize=blocksize,
            shape=(n, k),
        )
        decoded = weight.decoded("bf16")
        for column in (0, k - 1):
            x = rounded(np.eye(1, k, column), "bf16")
            out = torch.empty((1, n), dtype=torch.bfloat16, device=s.device)
            s.backend.gemm_4bit(to_torch(x).to(s.device), parts, None, out=out)
            s.synchronize()
            want = Floats(decoded.bits[:, column].copy(), "bf16")
            _expect_tiled("out", out.view(-1), want, Floats(want.bits[: n % want.size], "bf16"))


def _huge_int8_gemm(s: Session) -> None:
    import torch

    k = 4096
    n = _HUGE // k + 1
    with _room(s, n * k + 8 * n):
        tile = s.rng.integers(-128, 128, _PERIOD, dtype=np.int8)
        b = _tiled(s, tile, n * k).view(n, k)
        a = s.rng.integers(-128, 128, (1, k), dtype=np.int8)
        out = torch.empty((1, n), dtype=torch.int32, device=s.device)
        s.backend.int8_gemm(to_torch(a).to(s.device), b, out=out)
        s.synchronize()
        want = oracle.int8_gemm(a, tile.reshape(-1, k)).reshape(-1)
        _expect_tiled("out", out.view(-1), want, want[: n % want.size])


def _huge_int8_rows(s: Session) -> None:
    import torch

    k = 4096
    m = _HUGE // k + 1
    with _room(s, 3 * m * k + 8 * m):
        tile = values("normal", s.rng, _PERIOD, "bf16")
        a = _tiled(s, tile, m * k).view(m, k)
        out = torch.empty((m, k), dtype=torch.int8, device=s.device)
        stats = torch.empty(m, device=s.device)
        s.backend.int8_quantize_rows(a, 0.0, out=out, row_stats=stats, outlier_cols=None)
        s.synchronize()
        want = oracle.int8_quantize_rows(tile.reshape(-1, k), 0.0)
        codes = want.codes.reshape(-1).view(np.uint8)
        _expect_tiled("out", out.view(-1), codes, codes[: m * k % _PERIOD])
        _expect_tiled("row_stats", stats, want.stats, Floats(want.stats.bits[: m % want.stats.size], "f32"))


_HUGE_CASES: dict[str, tuple[Callable[[Session], None], ...]] = {
    "quantize_4bit": (_huge_quantize,),
    "dequantize_4bit": (_huge_dequantize,),
    "quantize_blockwise": (_huge_blockwise,),
    "gemm_4bit": (_huge_gemm,),
    "int8_gemm": (_huge_int8_gemm,),
    "int8_quantize_rows": (_huge_int8_rows,),
}


def cases() -> Iterator[Case]:
    for op in OPS:
        yield Case(f"{op}/L3/repeats-50", op, "L3", ("QC-NUM-007",), _repeats(op))
        yield Case(f"{op}/L3/two-threads", op, "L3", ("QC-NUM-007",), _two_threads(op))
        yield Case(f"{op}/L3/delayed-producer", op, "L3", ("QC-NUM-007",), _delayed_producer(op))
        yield Case(f"{op}/L3/graph-capture", op, "L3", ("QC-NUM-007",), _graph(op))
        yield Case(f"{op}/L3/second-device", op, "L3", ("QC-NUM-007",), _second_device(op))
        for run in _HUGE_CASES.get(op, ()):
            yield Case(f"{op}/L3/beyond-2p31-elements", op, "L3", ("QC-NUM-005",), run, {"isolated": True})
