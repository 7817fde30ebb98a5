"""16-bit parameters: small updates survive with a Kahan buffer or stochastic rounding, and vanish without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import gradients, run
from qcore import optim
from qcore.backend import Backend
from qcore.errors import InvalidDtype

STEPS = 100


def moved(dtype: torch.dtype, **options: object) -> float:
    """Mean movement after 100 steps of 1e-4 from 1, where a unit in the last place of bfloat16 is 2**-7 = 0.0078."""
    param = nn.Parameter(torch.ones(4096, dtype=dtype))
    run(optim.Lion8bit([param], lr=1e-4, **options), [torch.ones(4096)] * STEPS)  # type: ignore[arg-type]
    return 1.0 - param.double().mean().item()


def test_rounding_to_nearest_loses_small_updates(backend: Backend) -> None:
    assert moved(torch.bfloat16) == 0.0
    assert moved(torch.float32) == pytest.approx(STEPS * 1e-4, rel=1e-3)


def test_a_kahan_buffer_keeps_them(backend: Backend) -> None:
    assert moved(torch.bfloat16, kahan=True) == pytest.approx(2**-7, abs=2**-8)  # the nearest to 0.01 there is
    assert moved(torch.float16, kahan=True) == pytest.approx(STEPS * 1e-4, abs=2**-11)


def test_stochastic_rounding_keeps_them_on_average(backend: Backend) -> None:
    got = moved(torch.bfloat16, stochastic_rounding=True, seed=7)
    # Each step moves by a unit of 2**-8 (below 1) with probability 1e-4 * 2**8; 4096 parameters, 100 steps.
    deviation = (STEPS * 1e-4 * 2**-8 / 4096) ** 0.5
    assert abs(got - STEPS * 1e-4) < 5 * deviation


def test_a_seed_is_a_run(backend: Backend) -> None:
    def final(seed: int) -> torch.Tensor:
        params = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = optim.AdamW8bit(params, lr=1e-4, stochastic_rounding=True, seed=seed)
        for grad in gradients((500,), 5):
            for param in params:
                param.grad = grad.bfloat16()
            optimizer.step()
        assert not torch.equal(*params)  # each parameter has a stream of its own
        return torch.cat([param.detach() for param in params])

    assert torch.equal(final(1), final(1))
    assert not torch.equal(final(1), final(2))


def test_a_kahan_run_goes_on_from_its_state_dict() -> None:
    grads = gradients((600,), 6)
    whole, first = nn.Parameter(torch.ones(600).bfloat16()), nn.Parameter(torch.ones(600).bfloat16())
    run(optim.AdamW8bit([whole], lr=1e-4, min_8bit_size=0, kahan=True), grads)
    before = optim.AdamW8bit([first], lr=1e-4, min_8bit_size=0, kahan=True)
    run(before, grads[:3])
    second = nn.Parameter(first.detach().clone())
    after = optim.AdamW8bit([second], min_8bit_size=0, kahan=True)
    after.load_state_dict(before.state_dict())
    run(after, grads[3:])
    assert torch.equal(whole, second)


def test_float32_parameters_need_neither() -> None:
    params = [nn.Parameter(torch.ones(500)), nn.Parameter(torch.ones(500).bfloat16())]
    optimizer = optim.AdamW(params, kahan=True)
    for param in params:
        param.grad = torch.ones(500, dtype=param.dtype)
    optimizer.step()
    assert "kahan" not in optimizer.state[params[0]]
    assert optimizer.state[params[1]]["kahan"].dtype == torch.bfloat16


def test_stochastic_rounding_is_for_bfloat16() -> None:
    param = nn.Parameter(torch.ones(500).half())
    with pytest.raises(InvalidDtype, match="stochastic_rounding: parameter 0 is float16, needs bfloat16"):
        run(optim.AdamW8bit([param], stochastic_rounding=True), [torch.ones(500)])
    assert torch.equal(param, torch.ones(500).half())
