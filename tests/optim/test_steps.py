"""An optimizer among the rest of torch: groups, closures, schedules, scalers, compilation, copies, unusual tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import papers
from cases import gradients, run
from qcore import optim
from qcore.backend import Backend


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[float]:
    """Losses of some steps on fixed data."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 64, generator=generator), torch.randn(32, 8, generator=generator)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_only_large_parameters_have_8_bit_state() -> None:
    net = model()
    optimizer = optim.AdamW8bit(net.parameters())
    train(net, optimizer, 1)
    dtypes = [optimizer.state[param]["state1"].dtype for param in net.parameters()]
    assert dtypes == [torch.uint8, torch.float32, torch.float32, torch.float32]  # 64 x 96 is over 4096, the rest under


def test_a_list_of_parameters_takes_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore.ops.optimizer import PreparedOptimizerStep

    sizes: list[int] = []
    original = PreparedOptimizerStep.__call__

    def counted(self, rule, grads, grad_scales=()):  # type: ignore[no-untyped-def]
        sizes.append(len(grads))
        return original(self, rule, grads, grad_scales)

    monkeypatch.setattr(PreparedOptimizerStep, "__call__", counted)
    params = [nn.Parameter(torch.randn(10)) for _ in range(50)]
    optimizer = optim.AdamW32bit(params)
    for param in params:
        param.grad = torch.randn(10)
    optimizer.step()
    optimizer.step()
    assert sizes == [50, 50]
    # A parameter without a gradient falls behind by a step, and from then on needs a call of its own.
    params[7].grad = None
    optimizer.step()
    params[7].grad = torch.randn(10)
    optimizer.step()
    assert sizes == [50, 50, 49, 49, 1]
    assert [optimizer.state[param]["step"] for param in params[6:9]] == [4, 3, 4]


def test_a_list_steps_as_its_tensors_would_alone(backend: Backend) -> None:
    starts, grads = [torch.randn(n) for n in (1, 255, 257, 600)], [torch.randn(n) for n in (1, 255, 257, 600)]
    together = [nn.Parameter(start.clone()) for start in starts]
    optimizer = optim.AdamW8bit(together, min_8bit_size=256)
    for param, grad in zip(together, grads, strict=True):
        param.grad = grad
    optimizer.step()
    for param, start, grad in zip(together, starts, grads, strict=True):
        alone = nn.Parameter(start.clone())
        run(optim.AdamW8bit([alone], min_8bit_size=256), [grad])
        assert torch.equal(param, alone)


def test_groups_have_settings_of_their_own() -> None:
    starts, grads = [torch.randn(300), torch.randn(300), torch.randn(300)], gradients((300,), 3)
    first, second, third = (nn.Parameter(start.clone()) for start in starts)
    groups = [{"params": [first]}, {"params": [second], "lr": 0.1, "weight_decay": 0.5, "optim_bits": 8}]
    optimizer = optim.AdamW(groups, lr=0.01, min_8bit_size=0)
    optimizer.add_param_group({"params": [third], "betas": (0.5, 0.5)})
    for grad in grads:
        for param in (first, second, third):
            param.grad = grad
        optimizer.step()
    own = [{"lr": 0.01}, {"lr": 0.1, "weight_decay": 0.5, "optim_bits": 8}, {"lr": 0.01, "betas": (0.5, 0.5)}]
    for param, start, arguments in zip((first, second, third), starts, own, strict=True):
        alone = nn.Parameter(start.clone())
        run(optim.AdamW([alone], min_8bit_size=0, **arguments), grads)
        assert torch.equal(param, alone)


def test_a_group_that_cannot_be_stepped_is_not_added() -> None:
    optimizer = optim.AdamW8bit([nn.Parameter(torch.zeros(4))])
    for group in (
        {"params": [nn.Parameter(torch.zeros(4))], "lr": -1.0},
        {"params": nn.Parameter(torch.zeros(4).cfloat())},
    ):
        with pytest.raises(ValueError, match="AdamW8bit"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


def test_a_closure_computes_the_loss_with_gradients() -> None:
    param = nn.Parameter(torch.tensor([3.0]))
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 9.0
    assert param.item() == pytest.approx(2.4)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_schedule_sets_the_rate_of_each_step(tensor_lr: bool) -> None:
    def losses(kind: type, **arguments: object) -> list[float]:
        net = model()
        optimizer = kind(net.parameters(), lr=torch.tensor(0.01) if tensor_lr else 0.01, **arguments)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        found = []
        for _ in range(5):
            found += train(net, optimizer, 2)
            schedule.step()
        return found

    assert losses(optim.AdamW32bit) == pytest.approx(losses(torch.optim.AdamW), rel=1e-5)


def test_one_cycle_moves_momentum() -> None:
    net = model()
    optimizer = optim.AdamW8bit(net.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    train(net, optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    train(net, optimizer, 1)


def test_accumulated_gradients_are_one_step() -> None:
    net, other = model(), model()
    x, y = torch.randn(8, 64), torch.randn(8, 8)
    optimizer, whole = optim.Lion8bit(net.parameters()), optim.Lion8bit(other.parameters())
    for part in range(2):
        rows = slice(4 * part, 4 * part + 4)
        (nn.functional.mse_loss(net(x[rows]), y[rows]) / 2).backward()
    for param, target in zip(net.parameters(), other.parameters(), strict=True):
        assert param.grad is not None
        target.grad = param.grad.clone()
    optimizer.step()
    whole.step()
    assert same(net, other)
    assert optimizer.state[net[0].weight]["step"] == 1


def test_the_gradient_scaler_skips_a_step_that_overflowed() -> None:
    net, plain = model(), model()
    optimizer, unscaled = optim.AdamW8bit(net.parameters()), optim.AdamW8bit(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = torch.randn(32, 64), torch.randn(32, 8)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(net(x), y)).backward()
        if step == 1:
            assert net[0].weight.grad is not None
            net[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            unscaled.zero_grad()
            nn.functional.mse_loss(plain(x), y).backward()
            unscaled.step()
    assert optimizer.state[net[0].weight]["step"] == 2
    assert scaler.get_scale() == 512.0
    assert same(net, plain)  # powers of two scale exactly


def test_a_compiled_training_step_is_the_eager_one_and_is_compiled_once() -> None:
    net, eager = model(), model()
    optimizer, reference = optim.PagedAdamW8bit(net.parameters()), optim.AdamW8bit(eager.parameters())
    x, y = torch.randn(32, 64), torch.randn(32, 8)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()

    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    made: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(lambda: step(net, optimizer), backend=compiler)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, reference)]
    graphs = []
    for _ in range(6):
        compiled()
        step(eager, reference)
        for schedule in schedules:
            schedule.step()
        graphs.append(len(made))
    assert same(net, eager)
    assert graphs[0] > 0  # forward pass and loss are a graph
    assert len(set(graphs[1:])) == 1  # nothing is compiled again: not for a step's number, nor for another rate
    assert torch._dynamo.utils.counters["recompile_limit"] == {}


def test_two_runs_give_the_same_bits() -> None:
    first, second = model(), model()
    for net in (first, second):
        train(net, optim.AdEMAMix8bit(net.parameters(), lr=1e-2), 10)
    assert same(first, second)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(how: str) -> None:
    net = model()
    optimizer = optim.AdamW8bit(net.parameters(), lr=1e-2)
    train(net, optimizer, 3)
    pair = (net, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.defaults == {**optimizer.defaults, "differentiable": False}
    losses = train(net, optimizer, 3)
    before = [param.detach().clone() for param in other.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))  # they share nothing
    assert train(other, copied, 3) == losses
    assert same(net, other)


def test_maximize_climbs() -> None:
    start, grads = torch.randn(600), gradients((600,), 3)
    up, down = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(optim.AdamW8bit([up], min_8bit_size=0, maximize=True), grads)
    run(optim.AdamW8bit([down], min_8bit_size=0), [-grad for grad in grads])
    assert torch.equal(up, down)


def test_strided_parameters_and_gradients_step_like_contiguous_ones(backend: Backend) -> None:
    start, grads = torch.randn(24, 40), gradients((24, 40), 3)
    plain = nn.Parameter(start.clone())
    strided = nn.Parameter(start.t().contiguous().t())
    assert not strided.is_contiguous()
    run(optim.AdamW8bit([plain], min_8bit_size=0), grads)
    optimizer = optim.AdamW8bit([strided], min_8bit_size=0)
    for grad in grads:
        strided.grad = grad.t().contiguous().t()
        optimizer.step()
    assert torch.equal(plain, strided)
    assert not strided.is_contiguous()


def test_a_replaced_parameter_memory_is_noticed() -> None:
    start, grads = torch.randn(600), gradients((600,), 4)
    moved, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, reference = optim.AdamW8bit([moved]), optim.AdamW8bit([plain])
    run(optimizer, grads[:2])
    moved.data = moved.data.clone()
    run(optimizer, grads[2:])
    run(reference, grads)
    assert torch.equal(moved, plain)


@pytest.mark.parametrize("key", ["state1", "state2", "absmax1", "absmax2", "kahan"])
def test_state_that_the_caller_replaces_is_used(key: str) -> None:
    grads = gradients((600,), 2)
    param = nn.Parameter(torch.randn(600).bfloat16())
    optimizer = optim.AdamW8bit([param], min_8bit_size=0, kahan=True)
    run(optimizer, grads)
    replaced = optimizer.state[param][key].clone()
    optimizer.state[param][key] = replaced
    before = replaced.clone()
    run(optimizer, grads)
    assert optimizer.state[param][key] is replaced
    assert not torch.equal(replaced, before)


def test_hooks_and_versions_are_torchs() -> None:
    param = nn.Parameter(torch.randn(600))
    optimizer = optim.AdamW8bit([param])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    saved = param.exp()  # needs its output, not param
    product = param * param
    run(optimizer, [torch.randn(600)])
    assert calls == ["before", "after"]
    saved.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_frozen_quantized_layer_is_passed_over() -> None:
    import qcore

    layer = qcore.nn.Linear4bit(64, 64).to("cpu")
    adapter = nn.Linear(64, 4)
    optimizer = optim.AdamW8bit([*layer.parameters(), *adapter.parameters()])
    adapter(layer(torch.randn(2, 64))).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == set(adapter.parameters()) | {layer.bias}


def test_percentile_clipping_scales_an_outlier_down() -> None:
    steps = [torch.full((300,), 1.0) for _ in range(9)] + [torch.full((300,), 1000.0)]
    clipped, plain = nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(300))
    run(optim.SGD([clipped], lr=1.0, momentum=0.5, percentile_clipping=50), steps)
    run(optim.SGD([plain], lr=1.0, momentum=0.5), [torch.full((300,), 1.0) for _ in range(10)])
    # The history's median is the usual norm: the outlier is scaled to it.
    torch.testing.assert_close(clipped, plain)


@pytest.mark.parametrize("maximize", [False, True])
def test_percentile_clipping_follows_the_last_100_norms(maximize: bool) -> None:
    """Against float64: norms that vary, more of them than the history holds."""
    percentile, start, norms = 30, torch.randn(300), torch.randn(130).exp()
    grads = [norm * gradient / gradient.norm() for norm, gradient in zip(norms, gradients((300,), 130), strict=True)]
    param = nn.Parameter(start.clone())
    got = run(optim.SGD([param], lr=0.1, momentum=0.5, percentile_clipping=percentile, maximize=maximize), grads)
    history, scaled = [float(norms[0])] * 100, []
    for step, (norm, gradient) in enumerate(zip(norms.tolist(), grads, strict=True), 1):
        history[step % 100] = norm
        limit = sorted(history)[percentile]
        scaled.append(gradient.double().numpy() * min(1.0, limit / norm) * (-1.0 if maximize else 1.0))
    want = papers.sgd(lr=0.1, momentum=0.5)(start.double().numpy(), scaled)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_skip_zeros_leaves_what_has_no_gradient(backend: Backend) -> None:
    param = nn.Parameter(torch.randn(600))
    start = param.detach().clone()
    optimizer = optim.AdamW([param], weight_decay=0.5, skip_zeros=True)
    run(optimizer, gradients((600,), 2))
    before, moment = param.detach().clone(), optimizer.state[param]["state1"].clone()
    gradient = torch.zeros(600)
    gradient[::3] = 1.0
    run(optimizer, [gradient])
    untouched = gradient == 0
    assert torch.equal(param[untouched], before[untouched])
    assert torch.equal(optimizer.state[param]["state1"][untouched], moment[untouched])
    assert (param[~untouched] != before[~untouched]).all()
    assert not torch.equal(start, before)


def test_lars_and_lamb_limit_the_update() -> None:
    for make in (optim.LAMB8bit, lambda p, **k: optim.LARS8bit(p, momentum=0.9, **k)):
        param = nn.Parameter(torch.randn(5000))
        start = param.detach().clone()
        run(make([param], lr=1.0, max_unorm=0.01), [torch.randn(5000) * 100])
        assert (param.detach() - start).norm().item() == pytest.approx(0.01 * start.norm().item(), rel=1e-3)


def test_torch_save_of_a_whole_optimizer() -> None:
    net = model()
    optimizer = optim.Adagrad8bit(net.parameters())
    train(net, optimizer, 2)
    file = io.BytesIO()
    torch.save((net, optimizer), file)
    file.seek(0)
    other, loaded = torch.load(file, weights_only=False)
    assert train(other, loaded, 2) == train(net, optimizer, 2)
