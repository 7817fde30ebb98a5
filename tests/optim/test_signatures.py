"""``import qcore as bnb``: the optimizers of bitsandbytes 0.50.2, with its parameters, in its order, and defaults."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import bitsandbytes.optim as B
import pytest
import torch
from torch import nn

import qcore
from qcore import optim
from qcore.errors import InvalidArgument, Unsupported

NAMES = sorted(name for name, value in vars(B).items() if inspect.isclass(value))
OPTIMIZERS = [name for name in NAMES if name not in ("GlobalOptimManager", "PytorchLARS")]


def positional(kind: type) -> list[tuple[str, object]]:
    found = list(inspect.signature(kind).parameters.values())
    return [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]


def make(name: str, **arguments: Any) -> Any:
    if name.startswith(("SGD", "LARS")):
        arguments = {"lr": 0.1, "momentum": 0.9, **arguments}
    return getattr(optim, name)([nn.Parameter(torch.zeros(5000))], **arguments)


def test_every_optimizer_is_there() -> None:
    assert len(OPTIMIZERS) == 39
    assert set(NAMES) <= set(optim.__all__)
    assert qcore.optim is optim


@pytest.mark.parametrize("name", [*OPTIMIZERS, "PytorchLARS"])
def test_parameters_are_bitsandbytes(name: str) -> None:
    theirs, ours = positional(getattr(B, name)), positional(getattr(optim, name))
    assert ours[: len(theirs)] == theirs
    # What is more can only be given after all of theirs.
    assert [extra for extra, _ in ours[len(theirs) :]] in ([], ["is_paged"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_class_name_says_what_the_state_is(name: str) -> None:
    optimizer = make(name)
    assert optimizer.defaults["optim_bits"] == (8 if "8bit" in name else 32)
    assert optimizer.defaults["is_paged"] == name.startswith("Paged")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_have_bitsandbytes_hyperparameters(name: str) -> None:
    arguments = {"lr": 0.1, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    theirs = getattr(B, name)([nn.Parameter(torch.zeros(5))], **arguments).state_dict()["param_groups"][0]
    ours = make(name).state_dict()["param_groups"][0]
    assert {key: ours[key] for key in theirs} == theirs


def test_bits_can_be_asked_for() -> None:
    assert make("AdamW", optim_bits=8).defaults["optim_bits"] == 8
    assert make("PagedLion", optim_bits=8).defaults["optim_bits"] == 8
    with pytest.raises(InvalidArgument, match="Adam32bit: optim_bits is 8, this class keeps 32-bit state"):
        make("Adam32bit", optim_bits=8)
    with pytest.raises(InvalidArgument, match="optim_bits is 4, needs 8 or 32"):
        make("AdamW", optim_bits=4)


def test_args_take_precedence() -> None:
    args = SimpleNamespace(optim_bits=8, min_8bit_size=64, max_unorm=0.5, skip_zeros=True, unrelated=1)
    defaults = make("Adam", args=args).defaults
    assert (defaults["optim_bits"], defaults["min_8bit_size"]) == (8, 64)
    assert (defaults["max_unorm"], defaults["skip_zeros"]) == (0.5, True)


def test_settings_can_be_read_as_bitsandbytes_has_them() -> None:
    args = make("LAMB", max_unorm=0.5, optim_bits=8).args
    assert (args.max_unorm, args.optim_bits, args.min_8bit_size) == (0.5, 8, 4096)
    assert (args.skip_zeros, args.percentile_clipping) == (False, 100)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdamW8bit", {"amsgrad": True}, "AdamW8bit: amsgrad=True is not supported"),
        ("LAMB", {"amsgrad": True}, "LAMB: amsgrad=True is not supported"),
        ("RMSprop", {"centered": True}, "RMSprop: centered=True is not supported"),
        ("RMSprop8bit", {"momentum": 0.5}, "RMSprop8bit: momentum=0.5 is not supported"),
        ("SGD", {"momentum": 0}, "SGD: momentum is 0, so there is no state to keep small; use torch.optim.SGD"),
        ("LARS8bit", {"momentum": 0}, "LARS8bit: momentum is 0"),
        ("SGD", {"nesterov": True, "dampening": 0.5}, "SGD: nesterov=True needs dampening=0, came 0.5"),
        ("Adam8bit", {"block_wise": False}, "Adam8bit: block_wise=False is not supported"),
        ("Lion", {"percentile_clipping": 0}, "percentile_clipping is 0, needs a whole number from 1 to 100"),
        ("AdEMAMix", {"t_beta3": 10, "betas": (0.0, 0.9, 0.99)}, "t_beta3 needs betas"),
        ("Adam", {"lr": -1.0}, "Adam: lr is -1.0, needs a finite number that is not negative"),
        ("Adam", {"lr": float("nan")}, "Adam: lr is nan"),
        ("Adam", {"betas": (0.9, 1.0)}, r"Adam: betas\[1\] is 1.0, needs 0 <= beta < 1"),
        ("Adam", {"betas": (0.9,)}, "betas"),
        ("Adam", {"kahan": True, "stochastic_rounding": True}, "choose one"),
        ("Adam", {"seed": -1}, "seed is -1"),
        ("Adagrad8bit", {"optim_bits": 32}, "Adagrad8bit: optim_bits is 32, this class keeps 8-bit state"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    # bitsandbytes' exceptions: NotImplementedError where there would be no state, else ValueError.
    with pytest.raises(Unsupported if "momentum is 0" in message else InvalidArgument, match=message):
        make(name, **arguments)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unknown argument fused; known options: check_finite"):
        make("Adam", fused=True)


def test_betas_may_be_text() -> None:
    assert make("Adam", betas="(0.8, 0.95)").defaults["betas"] == (0.8, 0.95)
