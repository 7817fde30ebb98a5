"""One guarded call of ``optimizer_step``: arrays in, arrays out. Outputs start as copies of what changes in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qcore.backend import ALGORITHMS, OPTIMIZER_BLOCK, OptimizerRule, OptimizerTensors
from qcore_conformance import generators
from qcore_conformance.floats import Floats, rounded

if TYPE_CHECKING:
    from qcore_conformance.session import Session

Array = Floats | NDArray[np.uint8]
CHANGED = ("param", "state1", "state2", "absmax1", "absmax2", "compensation")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a call; absent parts are None. AdEMAMix: two rows in ``state1`` and ``absmax1``."""

    param: Floats
    grad: Floats
    state1: Array
    state2: Array | None = None
    absmax1: Floats | None = None
    absmax2: Floats | None = None
    compensation: Floats | None = None
    grad_scale: float = 1.0
    stream: int = 0

    def parts(self) -> Iterator[tuple[str, Array]]:
        """What changes, by name."""
        for name in CHANGED:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


def optimizer_step(s: Session, rule: OptimizerRule, tensors: Sequence[Tensor], *, scaled: bool = True) -> list[Tensor]:
    """The tensors after the step. ``scaled=False`` leaves the list of factors out."""
    from qcore_conformance.session import to_torch

    inputs: dict[str, Array | None] = {f"grad{i}": tensor.grad for i, tensor in enumerate(tensors)}
    inputs |= {f"{name}{i}": value for i, tensor in enumerate(tensors) for name, value in tensor.parts()}
    outputs = {f"{name}{i}_after": to_torch(v) for i, tensor in enumerate(tensors) for name, v in tensor.parts()}

    def invoke(backend: Any, t: dict[str, Any]) -> None:
        for i, tensor in enumerate(tensors):
            for name, _ in tensor.parts():
                t[f"{name}{i}_after"].copy_(t[f"{name}{i}"])
        backend.optimizer_step(rule, bind(tensors, t, "_after", scaled))

    results = s.call("optimizer_step", inputs, outputs, invoke)
    return [
        replace(tensor, **{name: results[f"{name}{i}_after"] for name, _ in tensor.parts()})
        for i, tensor in enumerate(tensors)
    ]


def bind(tensors: Sequence[Tensor], t: dict[str, Any], suffix: str, scaled: bool) -> OptimizerTensors:
    """The interface's lists, from placed tensors by name."""

    def every(name: str) -> list[Any]:
        present = [i for i, tensor in enumerate(tensors) if getattr(tensor, name) is not None]
        return [t[f"{name}{i}{suffix}"] for i in present]

    return OptimizerTensors(
        every("param"),
        [t[f"grad{i}"] for i in range(len(tensors))],
        *(every(name) for name in CHANGED[1:]),
        [tensor.grad_scale for tensor in tensors] if scaled else [],
        [tensor.stream for tensor in tensors],
    )


def random_tensor(
    rng: generators.Rng,
    rule: OptimizerRule,
    n: int,
    dtype: str = "f32",
    grad_dtype: str | None = None,
    *,
    compensated: bool = False,
    grads: Floats | None = None,
) -> Tensor:
    """A tensor in the middle of a run: states of about the size that its gradients give them."""
    rows = 2 if rule.algorithm == "ademamix" else 1
    blocks = -(-n // OPTIMIZER_BLOCK)
    squares = rule.algorithm in ("rmsprop", "adagrad")
    two, coded = ALGORITHMS[rule.algorithm] == 2, rule.state_bits == 8

    def state(count: int, positive: bool, signed: bool) -> Array:
        if coded:
            return rng.integers(128 if positive and signed else 0, 256, count, dtype=np.uint8)
        x = 0.1 * rng.standard_normal(count)
        return rounded(x**2 if positive else x, "f32")

    def absmax(count: int) -> Floats:
        return rounded(rng.uniform(0.01, 1, count), "f32")

    return Tensor(
        param=generators.values("normal", rng, n, dtype),
        grad=generators.values("normal", rng, n, grad_dtype or dtype) if grads is None else grads,
        state1=state(rows * n, squares, rule.signed_state),
        state2=state(n, True, False) if two else None,
        absmax1=absmax(rows * blocks) if coded else None,
        absmax2=absmax(blocks) if coded and two else None,
        compensation=rounded(rng.standard_normal(n) * 2.0**-12, dtype) if compensated else None,
        grad_scale=float(np.float32(rng.uniform(0.5, 1.5))),
        stream=int(rng.integers(0, 2**63)),
    )


def described(rule: OptimizerRule) -> str:
    """The rule's fields that are not at their defaults."""
    default = OptimizerRule(rule.algorithm, rule.state_bits, rule.step_size)
    changed = [f.name for f in fields(rule) if getattr(rule, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name}={getattr(rule, name)!r}" for name in changed)
