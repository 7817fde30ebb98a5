"""What cannot be stepped is refused before anything changes: parameters, state and step counts stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cases import gradients, run
from qcore import optim
from qcore.backend import Backend
from qcore.errors import InvalidArgument, InvalidDtype, OutOfMemory, QcoreError


def sparse(param: nn.Parameter) -> Tensor:
    return torch.ones_like(param).to_sparse()


def nan(param: nn.Parameter) -> Tensor:
    gradient = torch.ones_like(param)
    gradient.view(-1)[3] = float("nan")
    return gradient


def infinite(param: nn.Parameter) -> Tensor:
    return nan(param).nan_to_num(nan=float("inf"))


def half(param: nn.Parameter) -> Tensor:
    param.grad_dtype = None  # lets a gradient of another dtype in
    return torch.ones_like(param, dtype=torch.float16)


def double(param: nn.Parameter) -> Tensor:
    param.grad_dtype = None
    return torch.ones_like(param, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (sparse, r"gradient of parameter 1 \(second\) is sparse \(torch.sparse_coo\), needs a dense one"),
        (nan, r"gradient of parameter 1 \(second\) holds a NaN or an infinity \(check_finite=True\)"),
        (infinite, r"gradient of parameter 1 \(second\) holds a NaN or an infinity"),
        (half, r"gradient of parameter 1 \(second\) is torch.float16, that of parameter 0 \(first\)"),
        (double, r"gradient of parameter 1 \(second\) is torch.float64, needs float32, float16 or bfloat16"),
    ],
    ids=["sparse", "nan", "infinite", "half", "double"],
)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("apart", [False, True], ids=["one group", "two groups"])
def test_a_bad_gradient_changes_nothing(
    gradient: Callable[[nn.Parameter], Tensor], message: str, steps: int, apart: bool
) -> None:
    first, second = nn.Parameter(torch.randn(40, 10)), nn.Parameter(torch.randn(30, 20))
    named = [("first", first), ("second", second)]
    if apart and gradient is half:
        return  # a group of its own may have a dtype of its own
    groups = [{"params": [pair]} for pair in named] if apart else named
    optimizer = optim.AdamW8bit(groups, min_8bit_size=0, check_finite=True)
    for grad in gradients((40, 10), steps):
        first.grad, second.grad = grad, torch.ones(30, 20)
        optimizer.step()
    before = copy.deepcopy((first, second))
    state = copy.deepcopy(optimizer.state_dict())
    first.grad, second.grad = torch.ones(40, 10), gradient(second)
    with pytest.raises(QcoreError, match=message):
        optimizer.step()
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    for key, saved in state["state"].items():
        now = optimizer.state_dict()["state"][key]
        assert now["step"] == saved["step"] == steps
        for name, value in saved["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(now["__bnb_optimizer_quant_state__"][name], value)


def test_without_a_check_a_nan_stays_where_it_is(backend: Backend) -> None:
    """QC-OPT-022: at 8 bits its element is passed over, at 32 bits it spreads to the parameter; no other changes."""
    results = {}
    for bits in (8, 32):
        param, clean = nn.Parameter(torch.ones(600)), nn.Parameter(torch.ones(600))
        for target, gradient in ((param, nan(param)), (clean, torch.ones(600))):
            optimizer = getattr(optim, f"AdamW{bits}bit")([target], min_8bit_size=0)
            target.grad = gradient
            optimizer.step()
        others = torch.arange(600) != 3
        assert torch.equal(param[others], clean[others])
        results[bits] = param[3].item()
    assert results[8] == 1.0
    assert results[32] != results[32]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_a_parameter_of_another_kind_is_refused(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(4, dtype=dtype))
    with pytest.raises(InvalidDtype, match=rf"AdamW8bit: parameter 0 \(scale\) is {dtype}, needs float32, float16 or"):
        optim.AdamW8bit([("scale", param)])


def test_a_parameter_that_changed_its_dtype_is_refused() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = optim.AdamW8bit([param])
    param.data = param.data.double()
    param.grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(InvalidDtype, match=r"parameter 0 is torch\.float64"):
        optimizer.step()


def test_a_parameter_that_became_bfloat16_goes_on_as_one() -> None:
    net = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
    optimizer = optim.AdamW8bit(net.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        net[0].to(dtype)
        net.zero_grad()
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert net[0].weight.dtype == torch.bfloat16
    for layer in net:
        assert ((layer.weight.float().mean() + 0.2).abs() < 0.01).item()  # two steps of -lr from a mean of 0


def test_a_parameter_that_changed_its_size_is_refused() -> None:
    param = nn.Parameter(torch.ones(600))
    optimizer = optim.AdamW8bit([param], min_8bit_size=0)
    param.grad = torch.ones(600)
    optimizer.step()
    before = param.detach()[:300].clone()
    param.data = param.data[:300].clone()
    param.grad = torch.ones(300)
    with pytest.raises(InvalidArgument, match=r"parameter 0 has shape \(300,\) and state1 of shape \(600,\)"):
        optimizer.step()
    assert torch.equal(param, before)


def test_tied_memory_is_refused() -> None:
    whole = torch.ones(600)
    first, second = nn.Parameter(whole[:400]), nn.Parameter(whole[200:])
    optimizer = optim.AdamW8bit([first, second])
    first.grad, second.grad = torch.ones(400), torch.ones(400)
    with pytest.raises(InvalidArgument, match="share memory"):
        optimizer.step()
    assert torch.equal(whole, torch.ones(600))


def test_state_that_does_not_fit_in_memory_is_an_error_of_the_tree() -> None:
    from qcore.functional.paged import DeviceMemory

    with pytest.raises(
        OutOfMemory, match=r"optimizer state: \d+ bytes for a torch.float32 tensor .* do not fit on cpu"
    ):
        DeviceMemory().zeros((1 << 30, 1 << 20), torch.float32, torch.device("cpu"))


def test_state_changed_to_another_length_is_refused() -> None:
    param = nn.Parameter(torch.ones(600))
    optimizer = optim.AdamW8bit([param], min_8bit_size=0)
    param.grad = torch.ones(600)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["state1"] = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(InvalidArgument, match="state1"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("key", ["state1", "state2", "absmax1", "absmax2"])
def test_state_without_values_is_refused(key: str) -> None:
    param = nn.Parameter(torch.ones(600))
    optimizer = optim.AdamW8bit([param], min_8bit_size=0)
    run(optimizer, [torch.ones(600)])
    before, state = param.detach().clone(), optimizer.state[param]
    state[key] = state[key].to("meta")
    with pytest.raises(InvalidArgument, match=f"{key} of parameter 0 is on the meta device, where it has no values"):
        optimizer.step()
    assert torch.equal(param, before)
    assert state["step"] == 1


def test_a_parameter_without_memory_is_refused() -> None:
    param = nn.Parameter(torch.ones(600, device="meta"))
    optimizer = optim.AdamW8bit([param])
    param.grad = torch.ones(600, device="meta")
    with pytest.raises(InvalidArgument, match="parameter 0 is on the meta device, where it has no memory"):
        optimizer.step()
    assert not optimizer.state
