"""optimizer_step at the level of the ops: what it refuses, strides, handles, versions, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from expected import random
from qcore.backend import OptimizerRule, OptimizerTensors, get_backend, use_backend
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops.optimizer import optimizer_rule, optimizer_step, prepare_optimizer_step, state_codebook, zero_code

pytestmark = pytest.mark.usefixtures("backend")


def adam(bits: int = 8, **changes: Any) -> OptimizerRule:
    settings = {"lr": 0.01, "step": 3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "state_bits": bits}
    return optimizer_rule("adam", **(settings | changes))


def tensors(*shapes: tuple[int, ...], bits: int = 8, dtype: torch.dtype = torch.float32) -> OptimizerTensors:
    params = [random(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    grads = [random(*shape, seed=9 + i).to(dtype) for i, shape in enumerate(shapes)]
    if bits == 32:
        return OptimizerTensors(params, grads, *([torch.zeros(p.shape) for p in params] for _ in range(2)))
    codes = ([torch.full(p.shape, zero_code("adam", s), dtype=torch.uint8) for p in params] for s in (1, 2))
    absmax = ([torch.zeros(-(-p.numel() // 256)) for p in params] for _ in range(2))
    return OptimizerTensors(params, grads, *codes, *absmax)


def copied(t: OptimizerTensors) -> OptimizerTensors:
    names = ("params", "grads", "state1", "state2", "absmax1", "absmax2", "compensation")
    return replace(t, **{name: [part.clone() for part in getattr(t, name)] for name in names})


def contents(t: OptimizerTensors) -> list[Tensor]:
    return [*t.params, *t.state1, *t.state2, *t.absmax1, *t.absmax2]


def same(a: OptimizerTensors, b: OptimizerTensors) -> bool:
    return all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


def with_entry(t: OptimizerTensors, name: str, value: Tensor) -> OptimizerTensors:
    return replace(t, **{name: [value, *getattr(t, name)[1:]]})


GOOD = ((5, 33), (300,))
BAD: dict[str, tuple[Callable[[OptimizerTensors], OptimizerTensors], type[Exception], str]] = {
    "param dtype": (
        lambda t: with_entry(t, "params", t.params[0].double()), InvalidDtype, r"params\[0\] is torch.float64",
    ),
    "two dtypes": (lambda t: with_entry(t, "params", t.params[0].half()), InvalidDtype, r"params\[1\] is"),
    "grad shape": (lambda t: with_entry(t, "grads", t.grads[0].T), InvalidArgument, r"grads\[0\] has shape \(33, 5\)"),
    "grad dtype": (lambda t: with_entry(t, "grads", t.grads[0].half()), InvalidDtype, r"grads\[1\] is torch.float32"),
    "sparse grad": (lambda t: with_entry(t, "grads", t.grads[0].to_sparse()), InvalidArgument, "has layout"),
    "meta grad": (lambda t: with_entry(t, "grads", t.grads[0].to("meta")), InvalidArgument, r"grads\[0\] is on meta"),
    "state dtype": (
        lambda t: with_entry(t, "state1", t.state1[0].float()), InvalidDtype, r"state1\[0\] is torch.float32",
    ),
    "state length": (lambda t: with_entry(t, "state2", t.state2[0][:4]), InvalidArgument, "has 132 values"),
    "state strides": (lambda t: with_entry(t, "state1", t.state1[0].T), InvalidArgument, r"state1\[0\] has strides"),
    "absmax length": (lambda t: with_entry(t, "absmax1", torch.zeros(2)), InvalidArgument, "has 2 values"),
    "missing list": (lambda t: replace(t, absmax2=()), InvalidArgument, "absmax2 has 0 entries"),
    "extra list": (lambda t: replace(t, grads=t.grads[:1]), InvalidArgument, "1 grads"),
    "scales": (lambda t: replace(t, grad_scales=[1.0]), InvalidArgument, "1 grad_scales"),
    "compensation": (lambda t: replace(t, compensation=t.grads), InvalidDtype, "compensation is for float16"),
    "shared states": (lambda t: with_entry(t, "state2", t.state1[0]), InvalidArgument, "share memory"),
    "grad is param": (lambda t: with_entry(t, "grads", t.params[0]), InvalidArgument, "share memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_nothing_changes(name: str) -> None:
    spoil, error, message = BAD[name]
    good = tensors(*GOOD)
    before, bad = copied(good), spoil(good)
    with pytest.raises(error, match=message):
        optimizer_step(adam(), bad)
    assert same(good, before)


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -1.0}, "lr is -1.0"),
    "nan": ({"eps": float("nan")}, "eps is nan"),
    "step": ({"step": 0}, "step is 0"),
    "beta": ({"betas": (0.9, 1.0)}, "betas"),
    "one beta": ({"betas": (0.9,)}, "needs 2 values"),
    "bits": ({"state_bits": 16}, "state_bits is 16"),
    "nesterov": ({"nesterov": True}, "mean nothing to adam"),
    "alpha": ({"alpha": 2.0}, "means nothing to adam"),
    "signed": ({"signed_state": True}, "signed_state"),
    "seed": ({"seed": 2**32}, "seed"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_means_nothing_is_refused(name: str) -> None:
    changes, message = RULES[name]
    with pytest.raises(InvalidArgument, match=message):
        adam(**changes)


@pytest.mark.parametrize("bits", [8, 32])
def test_any_strides_of_parameter_and_gradient_give_the_same_step(bits: int) -> None:
    plain = tensors((6, 50), bits=bits)
    turned = copied(plain)
    param, grad = (part[0].T.contiguous().T for part in (turned.params, turned.grads))
    assert not param.is_contiguous()
    optimizer_step(adam(bits), plain)
    optimizer_step(adam(bits), replace(turned, params=[param], grads=[grad]))
    assert torch.equal(param, plain.params[0])
    assert torch.equal(turned.state1[0], plain.state1[0])


@pytest.mark.parametrize("bits", [8, 32])
def test_a_handle_gives_what_single_calls_give_and_follows_a_moved_parameter(bits: int) -> None:
    single, packed = tensors(*GOOD, bits=bits), tensors(*GOOD, bits=bits)
    handle = prepare_optimizer_step(adam(bits), replace(packed, grads=()))
    for step in range(1, 5):
        grads = [random(*shape, seed=step + 50) for shape in GOOD]
        rule = adam(bits, step=step, lr=0.01 / step)
        optimizer_step(rule, replace(single, grads=grads, grad_scales=[0.5, 2.0]))
        handle(rule, grads, [0.5, 2.0])
        packed.params[0].data = packed.params[0].data.clone()
        assert same(single, packed)


def test_a_handle_refuses_the_rule_of_another_kind_and_follows_the_backend() -> None:
    t = tensors(*GOOD)
    handle = prepare_optimizer_step(adam(), t)
    with pytest.raises(InvalidArgument, match="prepared for"):
        handle(adam(32), t.grads)
    with use_backend("cpu_reference"):
        handle(adam(), t.grads)


def test_every_step_counts_as_a_change_of_the_parameter() -> None:
    t = tensors(*GOOD)
    before = [param._version for param in t.params]
    optimizer_step(adam(), t)
    assert all(param._version > version for param, version in zip(t.params, before, strict=True))


def test_nothing_to_do_is_no_error() -> None:
    optimizer_step(adam(), OptimizerTensors([], [], [], []))
    empty = tensors((0,), (3, 0))
    optimizer_step(adam(), empty)


def test_a_compiled_step_gives_the_same_bits() -> None:
    eager, compiled = tensors(*GOOD), tensors(*GOOD)
    handle = prepare_optimizer_step(adam(), compiled)
    step = torch.compile(lambda grads: handle(adam(), grads), fullgraph=True, backend="aot_eager")
    optimizer_step(adam(), eager)
    step(list(compiled.grads))
    assert same(eager, compiled)


def test_both_backends_take_the_same_steps() -> None:
    ours, reference = tensors(*GOOD), tensors(*GOOD)
    optimizer_step(adam(), ours)
    get_backend("cpu_reference").optimizer_step(adam(), reference)
    assert same(ours, reference)


def test_codebooks_and_zero_codes_fit() -> None:
    for algorithm in ("adam", "lion", "rmsprop"):
        for signed in (False, True):
            book = state_codebook(algorithm, 1, signed_state=signed)
            assert book[zero_code(algorithm, 1, signed_state=signed)] == 0.0
