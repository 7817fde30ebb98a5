"""The steps are those of the papers (float64) and of torch.optim; at 8 bits as near as the codes allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cases import CASES, Case, gradients, run, true
from qcore import optim
from qcore.backend import Backend, use_backend

SHAPE = (37, 29)  # 1073 elements: four blocks and a tail


@pytest.mark.parametrize("case", CASES, ids=str)
def test_32_bit_steps_are_the_papers(case: Case, backend: Backend) -> None:
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 20)
    got = run(case.make([nn.Parameter(start.clone())], 32), grads)
    want = true(case, start, grads)
    # 20 steps, each with a few roundings of the parameter and of an update that is no larger than the total movement.
    scale = np.abs(want) + np.abs(want - start.double().numpy()) + 20 * case.arguments["lr"]
    assert np.abs(got - want).max() > 0 or case.family == "Lion"  # float32 is not float64
    assert (np.abs(got - want) <= 60 * 2.0**-24 * scale).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_8_bit_steps_follow_the_papers(case: Case, backend: Backend) -> None:
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 20)
    got = run(case.make([nn.Parameter(start.clone())], 8), grads)
    want = true(case, start, grads)
    moved = np.linalg.norm(want - start.double().numpy())
    # The dynamic code has relative steps of 0.8% to 5%, and errors of a slow average add up over the steps.
    assert np.linalg.norm(got - want) < 0.05 * moved
    assert not np.array_equal(got, run(case.make([nn.Parameter(start.clone())], 32), grads))


PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}, {}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, {}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, {}),
    ("RMSprop", {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.1}, {}),
    ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.25}, {}),
]


@pytest.mark.parametrize(("family", "arguments", "_"), PAIRS, ids=lambda value: str(value) if value else "")
def test_32_bit_steps_are_torchs_within_ulps(
    family: str, arguments: dict[str, Any], _: dict[str, Any], backend: Backend
) -> None:
    """10 steps; both round differently, so a handful of units in the last place of the largest value that went in."""
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 10)
    ours = run(getattr(optim, family)([nn.Parameter(start.clone())], **arguments), grads)
    theirs = run(getattr(torch.optim, family)([nn.Parameter(start.clone())], **arguments), grads)
    ulp = np.spacing(np.maximum(np.abs(theirs), np.abs(start.numpy())).astype(np.float32))
    assert (np.abs(ours - theirs) <= 16 * ulp).all()
    assert np.median(np.abs(ours - theirs) / ulp) <= 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_backend_gives_the_references_bits(case: Case, backend: Backend) -> None:
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 3)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    states = []
    for param, name in zip(params, ("cpu_reference", backend), strict=True):
        with use_backend(name):
            optimizer = case.make([param], 8)
            run(optimizer, grads)
        states.append(optimizer.state[param])
    assert torch.equal(*params)
    for key, value in states[0].items():
        assert key == "step" or torch.equal(value, states[1][key]), key


def test_pytorch_lars_is_lars() -> None:
    start, grads = torch.randn(SHAPE), gradients(SHAPE, 10)
    arguments: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "max_unorm": 0.02}
    got = run(optim.PytorchLARS([nn.Parameter(start.clone())], **arguments), grads)
    want = true(next(case for case in CASES if case.family == "LARS"), start, grads)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
