"""One step of every optimizer: QC-OPT-001 to QC-OPT-023, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qcore.backend import ALGORITHMS, OPTIMIZER_BLOCK, OptimizerRule
from qcore_conformance import generators, optimizer_oracle, oracle
from qcore_conformance.checks import expect_floats, expect_integers
from qcore_conformance.floats import DTYPES, Floats, neighbours, rounded
from qcore_conformance.model import Case
from qcore_conformance.optimizer_call import Tensor, described, optimizer_step, random_tensor
from qcore_conformance.session import Session

_OP = "optimizer_step"
_CLAUSE = {
    "adam": "QC-OPT-010",
    "ademamix": "QC-OPT-011",
    "lion": "QC-OPT-012",
    "momentum": "QC-OPT-013",
    "rmsprop": "QC-OPT-014",
    "adagrad": "QC-OPT-015",
}
_BASE = ("QC-NUM-001", "QC-NUM-002", "QC-NUM-003", "QC-NUM-004", "QC-OPT-002", "QC-OPT-003", "QC-OPT-004")
_CODES = ("QC-OPT-020", "QC-OPT-021")
# Every tail of a block and of a vector, none at all, and more than one block.
_LENGTHS = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 257, 511, 600, 1009)
_GRADIENTS = ("normal", "lognormal", "bits", "denormal", "largest", "zeros", "zeros-mixed", "nan-inf", "all-nan")


def rule(algorithm: str, bits: int, **changes: Any) -> OptimizerRule:
    """A rule with scalars of usual size, none of them a float32 number (QC-OPT-002)."""
    return OptimizerRule(
        algorithm,
        bits,
        **{
            "step_size": -0.0123,
            "decay": 0.9987,
            "eps": 3.3e-6,
            "beta1": 0.9,
            "gain1": 0.1,
            "beta2": 0.997,
            "gain2": 0.003,
            "beta3": 0.9991,
            "gain3": 0.0009,
            "correction1": 1.7 if algorithm == "ademamix" else 1.0,
            "correction2": 2.3 if algorithm == "ademamix" else 1.0,
            "alpha": 5.1 if algorithm == "ademamix" else 0.0,
            **changes,
        },
    )


def check(s: Session, a_rule: OptimizerRule, tensors: Sequence[Tensor], *, scaled: bool = True) -> list[Tensor]:
    """One call; every part of every tensor is what the oracle says. Returns the tensors after it."""
    got = optimizer_step(s, a_rule, tensors, scaled=scaled)
    for i, (before, after) in enumerate(zip(tensors, got, strict=True)):
        want = optimizer_oracle.optimizer_step(a_rule, before if scaled else replace(before, grad_scale=1.0))
        for name, expected in want.parts():
            actual = getattr(after, name)
            what = f"{name}[{i}] of {before.param.size} ({described(a_rule)})"
            if isinstance(expected, Floats):
                expect_floats(what, actual.reshape(-1), expected.reshape(-1))
            else:
                expect_integers(what, actual.reshape(-1), expected.reshape(-1))
    return got


def _lengths(a_rule: OptimizerRule) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        tensors = [random_tensor(s.rng, a_rule, n) for n in _LENGTHS]
        check(s, a_rule, tensors)
        check(s, a_rule, tensors[4:7], scaled=False)

    return run


def _dtypes(a_rule: OptimizerRule) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for dtype in DTYPES:
            for grad_dtype in DTYPES:
                check(s, a_rule, [random_tensor(s.rng, a_rule, n, dtype, grad_dtype) for n in (300, 77)])

    return run


def _gradients(a_rule: OptimizerRule) -> Callable[[Session], None]:
    """Gradients of every kind, each in blocks of its own and all of them mixed in one."""

    def run(s: Session) -> None:
        grads = [generators.values(kind, s.rng, 300, "f32") for kind in _GRADIENTS]
        mixed = Floats(np.concatenate([grad.bits[:30] for grad in grads]), "f32")
        for variant in (a_rule, replace(a_rule, skip_zeros=True), replace(a_rule, eps=0.0, l2=0.3, beta1=0.0)):
            check(s, variant, [random_tensor(s.rng, variant, grad.size, grads=grad) for grad in (*grads, mixed)])

    return run


def _states(algorithm: str) -> Callable[[Session], None]:
    """States of every kind: at 32 bits any value, at 8 bits any absmax over every code."""

    def run(s: Session) -> None:
        for bits, signed in ((32, False), (8, False), (8, True)):
            if signed and algorithm not in ("rmsprop", "adagrad"):
                continue
            a_rule = rule(algorithm, bits, signed_state=signed)
            for kind in ("lognormal", "bits", "denormal", "smallest", "zeros", "nan-inf"):
                tensor = random_tensor(s.rng, a_rule, 300)
                parts: dict[str, Any] = {}
                for name, part in tensor.parts():
                    if name.startswith("absmax") or (bits == 32 and name.startswith("state")):
                        parts[name] = generators.values(kind, s.rng, part.size, "f32")
                for skips in (False, True):
                    zeros = generators.values("zeros-mixed", s.rng, 300, "f32")
                    check(s, replace(a_rule, skip_zeros=skips), [replace(tensor, grad=zeros, **parts)])

    return run


def _every_code(algorithm: str, signed: bool) -> Callable[[Session], None]:
    """All 256 codes come back through the parameter: with these scalars the update is the state itself."""

    def run(s: Session) -> None:
        a_rule = rule(algorithm, 8, signed_state=signed, beta1=1.0, beta2=1.0, beta3=1.0, eps=1.0)
        for scale in (1.0, 3.0, 1e-3, 1e-30):
            tensor = random_tensor(s.rng, a_rule, 256, grads=rounded(np.zeros(256), "f32"))
            codes = np.arange(256, dtype=np.uint8)
            state1 = np.tile(codes, tensor.state1.size // 256)
            parts = {
                name: rounded(np.full(part.size, scale), "f32") for name, part in tensor.parts() if "absmax" in name
            }
            state2 = None if tensor.state2 is None else codes
            check(s, a_rule, [replace(tensor, state1=state1, state2=state2, **parts)])

    return run


def _thresholds(algorithm: str, signed: bool) -> Callable[[Session], None]:
    """New states on every threshold of the codebook and beside it: the gradient is the state, or its root."""

    def run(s: Session) -> None:
        squares = algorithm != "momentum"
        book = generators.CODEBOOKS["dynamic-unsigned" if squares and not signed else "dynamic"]
        points = oracle.midpoints(book)
        points = points[points > 0] if squares else points
        for scale in (1.0, 0.125, 3.0, 0.7, 2.0**-40):
            a_rule = rule(algorithm, 8, signed_state=signed, beta1=0.0, gain1=1.0, decay=1.0)
            if squares:
                around = np.sqrt(neighbours(points * scale, "f32").f64())
                grads = neighbours(np.concatenate([around, [np.sqrt(scale)]]), "f32")
                blocks = np.array_split(grads.bits, -(-grads.size // 200))
                top = rounded([np.sqrt(scale)], "f32").bits
                tensors = [Floats(np.concatenate([top, block]), "f32") for block in blocks]
            else:
                tensors = [generators.decision_points(points, OPTIMIZER_BLOCK, scale, "f32")]
            empty = [
                replace(
                    random_tensor(s.rng, a_rule, grads.size, grads=grads), grad_scale=1.0, absmax1=_zeros(grads.size)
                )
                for grads in tensors
            ]
            check(s, a_rule, empty)
            check(s, replace(a_rule, bnb_codes=True), empty)

    return run


def _zeros(n: int) -> Floats:
    return rounded(np.zeros(-(-n // OPTIMIZER_BLOCK)), "f32")


def _decay(a_rule: OptimizerRule) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for changes in ({"l2": 0.123}, {"decay": 1.0}, {"l2": 0.07, "decay": 0.5}, {"decay": -0.25}):
            check(s, replace(a_rule, **changes), [random_tensor(s.rng, a_rule, 700)])

    return run


def _compensated(dtype: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for algorithm in ALGORITHMS:
            for bits in (8, 32):
                for step_size in (-1e-4, -1e30):  # too small for the parameter's own dtype; beyond its range
                    a_rule = rule(algorithm, bits, step_size=step_size, l2=0.01)
                    tensors = [random_tensor(s.rng, a_rule, 300, dtype, compensated=True)]
                    for _ in range(2):
                        tensors = check(s, a_rule, tensors)
                    zeros = [replace(t, grad=generators.values("nan-inf", s.rng, t.param.size, dtype)) for t in tensors]
                    check(s, replace(a_rule, skip_zeros=True), zeros)

    return run


def _stochastic(bits: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for algorithm, seed in zip(ALGORITHMS, (0, 1, 0x0000_0007_DEAD_BEEF, 2**64 - 1, 2**32, 77), strict=True):
            a_rule = rule(algorithm, bits, stochastic=True, seed=seed)
            tensors = [random_tensor(s.rng, a_rule, n, "bf16", "f32") for n in (300, 7, 0)]
            check(s, a_rule, [replace(tensors[0], stream=2**64 - 1), *tensors[1:]])
        grads = generators.values("bits", s.rng, 600, "f32")
        for skips in (False, True):
            a_rule = rule("momentum", bits, stochastic=True, seed=3, skip_zeros=skips, step_size=-1.0)
            tensor = random_tensor(s.rng, a_rule, 600, "bf16", grads=grads)
            check(s, a_rule, [replace(tensor, param=generators.values("bits", s.rng, 600, "bf16"))])

    return run


def _stochastic_mean(s: Session) -> None:
    """Over many elements the parameters move by what was asked for, although each step is below their spacing."""
    n, size = 40_000, 2.0**-12
    a_rule = rule("momentum", 32, stochastic=True, seed=5, beta1=0.0, gain1=1.0, decay=1.0, step_size=size)
    ones = rounded(np.ones(n), "bf16")
    tensor = Tensor(ones, rounded(np.ones(n), "f32"), rounded(np.zeros(n), "f32"), stream=9)
    moved = optimizer_step(s, a_rule, [tensor])[0].param.f64()
    spacing = 2.0**-7
    assert set(np.unique(moved)) == {1.0, 1.0 + spacing}, f"values {np.unique(moved)}"
    share, expected = float((moved > 1).mean()), size / spacing
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert abs(share - expected) <= 5 * deviation, f"{share:.5f} of the elements moved up, expected {expected:.5f}"


def _limited(algorithm: str) -> Callable[[Session], None]:
    """Limits that hold and that do not, parameters of norm 0, more blocks than lanes, elements that are kept."""

    def run(s: Session) -> None:
        for bits in (8, 32):
            for max_unorm, factor in ((1e-4, 1.0), (0.02, 0.37), (1.0, 3.1), (1e6, 1.0)):
                a_rule = rule(algorithm, bits, max_unorm=max_unorm, unorm_factor=factor)
                tensors = [random_tensor(s.rng, a_rule, n) for n in (1, 17, 300, 0, 1009)]
                still = replace(tensors[2], param=rounded(np.zeros(300), "f32"))
                check(s, a_rule, [*tensors, still])
            a_rule = rule(algorithm, bits, max_unorm=0.02, skip_zeros=True, l2=0.1)
            grads = [generators.values(kind, s.rng, 600, "f32") for kind in ("zeros-mixed", "nan-inf", "bits")]
            check(s, a_rule, [random_tensor(s.rng, a_rule, 600, grads=grad) for grad in grads])
            check(s, a_rule, [random_tensor(s.rng, a_rule, 300, "bf16", compensated=True)])
            # Squares that overflow beside averages that do not: an update of 0, at 8 bits of an element that is kept.
            large = rounded(np.where(s.rng.random(600) < 0.1, 1e25, s.rng.standard_normal(600)), "f32")
            for l2 in (0.0, 0.1):
                a_rule = rule(algorithm, bits, max_unorm=0.02, l2=l2)
                check(s, a_rule, [random_tensor(s.rng, a_rule, 600, grads=grad) for grad in (*grads, large)])

    return run


def _limited_blocks(s: Session) -> None:
    for n in (256 * 256, 256 * 300 + 100):
        a_rule = rule("adam", 8, max_unorm=0.01)
        tensor = random_tensor(s.rng, a_rule, n)
        wide = generators.values("lognormal", s.rng, n, "f32")
        check(s, a_rule, [replace(tensor, param=wide)])


def _bnb_codes(algorithm: str) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        for signed in (False, True):
            if signed and algorithm not in ("rmsprop", "adagrad"):
                continue
            a_rule = rule(algorithm, 8, bnb_codes=True, signed_state=signed)
            for kind in ("normal", "lognormal", "zeros-mixed", "zeros", "denormal"):
                grads = generators.values(kind, s.rng, 600, "f32")
                check(s, a_rule, [random_tensor(s.rng, a_rule, 600, grads=grads)])

    return run


def _floor(algorithm: str) -> Callable[[Session], None]:
    """Gradients over many scales in a block: second moments that round to 0 stay above it, unless bnb_codes is set."""

    def run(s: Session) -> None:
        for signed in (False, True):
            if signed and algorithm in ("adam", "ademamix"):
                continue
            a_rule = rule(algorithm, 8, signed_state=signed)
            sizes = np.exp(6 * s.rng.standard_normal(512))
            grads = rounded(sizes * s.rng.choice([-1.0, 1.0, 0.0], 512), "f32")
            before = replace(random_tensor(s.rng, a_rule, 512, grads=grads), grad_scale=1.0)
            zeros = {name: rounded(np.zeros(part.size), "f32") for name, part in before.parts() if "absmax" in name}
            after = check(s, a_rule, [replace(before, **zeros)])[0]
            codes = after.state2 if algorithm in ("adam", "ademamix") else after.state1
            zero = 127 if signed else 0
            assert isinstance(codes, np.ndarray)
            moved = grads.f64() != 0
            assert (codes[moved] != zero).all(), "a second moment above 0 took the code of 0 (QC-OPT-021)"
            assert (codes[~moved] == zero).all(), "a second moment of 0 took another code than that of 0"

    return run


def _nesterov(bits: int) -> Callable[[Session], None]:
    def run(s: Session) -> None:
        a_rule = rule("momentum", bits, nesterov=True, l2=0.1)
        check(s, a_rule, [random_tensor(s.rng, a_rule, n) for n in (700, 31)])
        check(s, replace(a_rule, gain1=1.0, max_unorm=0.02), [random_tensor(s.rng, a_rule, 700)])

    return run


def _many(bits: int) -> Callable[[Session], None]:
    """Many small tensors in one call give what each gives alone, in any order; no tensors are no error."""

    def run(s: Session) -> None:
        a_rule = rule("adam", bits)
        tensors = [random_tensor(s.rng, a_rule, int(n)) for n in s.rng.integers(0, 300, 20)]
        together = check(s, a_rule, tensors)
        order = s.rng.permutation(len(tensors))
        shuffled = optimizer_step(s, a_rule, [tensors[i] for i in order])
        for place, i in enumerate(order):
            for (name, one), (_, other) in zip(together[i].parts(), shuffled[place].parts(), strict=True):
                same = np.array_equal(*((x.bits if isinstance(x, Floats) else x) for x in (one, other)))
                assert same, f"{name} of tensor {i} depends on where it stands in the call (QC-OPT-001)"
        check(s, a_rule, [])

    return run


def _run(algorithm: str, bits: int) -> Callable[[Session], None]:
    """Twenty steps from fresh states."""

    def run(s: Session) -> None:
        base = rule(algorithm, bits)
        tensor = random_tensor(s.rng, base, 600)
        fresh: dict[str, Any] = {}
        for name, part in tensor.parts():
            if name.startswith("absmax") or (name.startswith("state") and bits == 32):
                fresh[name] = rounded(np.zeros(part.size), "f32")
            elif name.startswith("state"):
                squares = name == "state2" or algorithm in ("rmsprop", "adagrad")
                fresh[name] = np.full(part.size, 0 if squares else 127, np.uint8)
        tensors = [replace(tensor, **fresh)]
        for t in range(1, 21):
            k = float(np.sqrt(1 - 0.997**t) / (1 - 0.9**t))
            a_rule = replace(base, step_size=-0.01 * k) if algorithm == "adam" else base
            tensors = [replace(tensors[0], grad=generators.values("normal", s.rng, 600, "f32"))]
            tensors = check(s, a_rule, tensors)

    return run


def _shape(s: Session) -> None:
    """Blocks run across rows (QC-NUM-004)."""
    a_rule = rule("adam", 8)
    tensor = random_tensor(s.rng, a_rule, 7 * 5 * 13)
    assert isinstance(tensor.state1, np.ndarray)
    shaped = replace(
        tensor,
        param=tensor.param.reshape(7, 5, 13),
        grad=tensor.grad.reshape(7, 5, 13),
        state1=tensor.state1.reshape(7, 5, 13),
    )
    got = optimizer_step(s, a_rule, [shaped])[0]
    want = optimizer_oracle.optimizer_step(a_rule, tensor)
    expect_floats("param", got.param.reshape(-1), want.param)
    assert isinstance(got.state1, np.ndarray)
    assert isinstance(want.state1, np.ndarray)
    expect_integers("state1", got.state1.reshape(-1), want.state1)


def cases() -> Iterator[Case]:
    def case(name: str, run: Callable[[Session], None], *clauses: str, level: str = "L1", **params: Any) -> Case:
        return Case(f"{_OP}/{level}/{name}", _OP, level, (*_BASE, *clauses), run, params)

    for algorithm, clause in _CLAUSE.items():
        squares = algorithm not in ("lion", "momentum")
        for bits in (32, 8):
            own = (clause, *_CODES) if bits == 8 else (clause,)
            label, a_rule = f"{algorithm}-{bits}", rule(algorithm, bits)
            yield case(f"{label}-lengths", _lengths(a_rule), *own, "QC-NUM-005", "QC-OPT-001")
            yield case(f"{label}-dtypes", _dtypes(a_rule), *own, "QC-OPT-001")
            yield case(f"{label}-gradients", _gradients(a_rule), *own, "QC-OPT-005", "QC-OPT-022")
            yield case(f"{label}-decay", _decay(a_rule), *own)
            yield case(f"{label}-20-steps", _run(algorithm, bits), *own)
        yield case(f"{algorithm}-states", _states(algorithm), clause, *_CODES, "QC-OPT-005", "QC-OPT-022")
        yield case(f"{algorithm}-8-bnb-codes", _bnb_codes(algorithm), clause, *_CODES, "QC-OPT-023")
        yield case(f"{algorithm}-max-unorm", _limited(algorithm), clause, "QC-OPT-008", "QC-OPT-009")
        for signed in (False, True) if algorithm in ("rmsprop", "adagrad") else (False,):
            name = f"{algorithm}-8{'-signed' if signed else ''}"
            yield case(f"{name}-every-code", _every_code(algorithm, signed), clause, *_CODES)
            if algorithm in ("momentum", "rmsprop", "adagrad"):
                yield case(f"{name}-thresholds", _thresholds(algorithm, signed), clause, *_CODES, "QC-OPT-023")
        if squares:
            yield case(f"{algorithm}-8-floor", _floor(algorithm), clause, *_CODES)
    for dtype in ("f16", "bf16"):
        yield case(f"{dtype}-compensation", _compensated(dtype), "QC-OPT-006", "QC-OPT-005", "QC-OPT-022")
    for bits in (32, 8):
        yield case(f"bf16-{bits}-stochastic", _stochastic(bits), "QC-OPT-007", "QC-OPT-005")
        yield case(f"momentum-{bits}-nesterov", _nesterov(bits), "QC-OPT-013", "QC-OPT-008")
        yield case(f"adam-{bits}-many-tensors", _many(bits), "QC-OPT-001", "QC-OPT-010")
    yield case("bf16-stochastic-mean", _stochastic_mean, "QC-OPT-007", level="L2")
    yield case("adam-8-max-unorm-many-blocks", _limited_blocks, "QC-OPT-008", "QC-OPT-009", "QC-NUM-005")
    yield case("adam-8-shape-7x5x13", _shape, "QC-OPT-010", *_CODES)
