"""``GlobalOptimManager``: settings of single parameters count, whenever they are made."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from torch import nn

from cases import gradients, run
from qcore import optim
from qcore.errors import InvalidArgument
from qcore.optim import GlobalOptimManager


def overrides() -> GlobalOptimManager:
    return GlobalOptimManager.get_instance()


def test_there_is_one_instance() -> None:
    assert overrides() is overrides()
    assert GlobalOptimManager.get_inuserce() is overrides()
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


def test_an_override_before_the_first_step_sets_the_state() -> None:
    net = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))
    overrides().register_parameters(net.parameters())
    overrides().override_config(net[0].weight, "optim_bits", 32)
    overrides().register_module_override(net[1], "weight", {"optim_bits": 32, "lr": 0.5})
    optimizer = optim.SGD8bit(net.parameters(), lr=0.1, momentum=0.9)
    start = net[1].weight.detach().clone()
    net(torch.arange(8)).sum().backward()
    gradient = net[1].weight.grad
    optimizer.step()
    assert optimizer.state[net[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[net[1].weight]["state1"].dtype == torch.float32
    assert gradient is not None
    torch.testing.assert_close(net[1].weight.detach(), start - 0.5 * gradient)


def test_an_override_between_steps_converts_the_state() -> None:
    grads = gradients((5000,), 4)
    param, narrow = nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(5000))
    optimizer, other = optim.AdamW8bit([param]), optim.AdamW8bit([narrow])
    run(optimizer, grads[:2])
    run(other, grads[:2])
    overrides().override_config([param], key_value_dict={"optim_bits": 32, "lr": 1e-3})
    run(optimizer, grads[2:])
    run(other, grads[2:])
    assert optimizer.state[param]["state1"].dtype == torch.float32
    assert optimizer.state[param]["step"] == 4
    assert "absmax1" not in optimizer.state[param]
    assert not torch.equal(param, narrow)
    torch.testing.assert_close(param, narrow, rtol=0.05, atol=1e-4)


def test_an_override_follows_the_group_in_all_it_does_not_set() -> None:
    param, plain = nn.Parameter(torch.ones(600)), nn.Parameter(torch.ones(600))
    overrides().override_config(param, "weight_decay", 0.5)
    optimizer = optim.AdamW([param, plain], lr=0.1, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.01
    param.grad = plain.grad = torch.zeros(600)
    optimizer.step()
    assert torch.allclose(param, torch.full((600,), 1 - 0.01 * 0.5))
    assert torch.equal(plain, torch.ones(600))


def test_a_registered_parameter_hands_its_settings_to_its_successor() -> None:
    net = nn.Linear(100, 100)
    overrides().register_parameters(net.parameters())
    overrides().override_config(net.weight, "optim_bits", 32)
    net.weight = nn.Parameter(net.weight.detach().double().float())  # as a move that replaces parameters does
    gc.collect()
    optimizer = optim.AdamW8bit(net.parameters())
    net(torch.ones(100)).sum().backward()
    optimizer.step()
    assert optimizer.state[net.weight]["state1"].dtype == torch.float32


def test_a_setting_dies_with_its_parameter() -> None:
    for _ in range(20):  # so that an address, and with it an id, is used again
        param = nn.Parameter(torch.ones(5000))
        assert overrides().config_of(param, 0, 0) == {}
        overrides().override_config(param, "optim_bits", 32)
        assert overrides().config_of(param, 0, 0) == {"optim_bits": 32}
        del param


def test_registering_can_say_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(4, 4)
    overrides().override_config(net.bias, "lr", 0.1)
    with caplog.at_level(logging.INFO, logger="qcore"):
        overrides().register_parameters([{"params": list(net.parameters())}], verbose=True)
    assert "registered 2 parameters in 1 groups, 1 with overrides" in caplog.text


def test_settings_that_mean_nothing_are_refused() -> None:
    param = nn.Parameter(torch.ones(4))
    with pytest.raises(InvalidArgument, match="momentum cannot be set for one parameter; known are alpha, betas"):
        overrides().override_config(param, "momentum", 0.9)
    with pytest.raises(InvalidArgument, match="needs either key and value, or key_value_dict"):
        overrides().override_config(param)
    with pytest.raises(InvalidArgument, match="Linear has no parameter 'wieght'"):
        overrides().register_module_override(nn.Linear(2, 2), "wieght", {"lr": 1.0})
    with pytest.raises(InvalidArgument, match="params is empty"):
        overrides().register_parameters([])
    overrides().override_config(param, "optim_bits", 16)
    with pytest.raises(InvalidArgument, match="optim_bits is 16, needs 8 or 32"):
        run(optim.AdamW8bit([param]), [torch.ones(4)])
    assert torch.equal(param, torch.ones(4))
