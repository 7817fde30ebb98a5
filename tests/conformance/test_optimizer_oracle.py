"""The oracle of optimizer_step against published vectors, torch and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qcore_conformance import optimizer_oracle as oracle
from qcore_conformance.cases.optimizer import rule
from qcore_conformance.floats import rounded
from qcore_conformance.optimizer_call import Tensor

# Random123's known answers for philox4x32 with 10 rounds: counter, key, result; the first word is the lowest.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def number(words: str) -> int:
    return sum(int(word, 16) << 32 * place for place, word in enumerate(words.split()))


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_numbers(counter: str, key: str, result: str) -> None:
    assert list(oracle.philox(number(counter), number(key))) == [int(word, 16) for word in result.split()]


def test_each_element_has_a_number_of_its_own_and_streams_differ() -> None:
    words = oracle.philox(1 | 5 << 64, 7)
    assert oracle.random_numbers(12, 7, 5)[8:] == [words[0] & 0xFFFF, words[0] >> 16, words[1] & 0xFFFF, words[1] >> 16]
    assert oracle.random_numbers(64, 7, 5) != oracle.random_numbers(64, 7, 6)


@pytest.mark.parametrize("n", [1, 15, 256, 257, 256 * 300 + 5])
def test_sum_of_squares_is_one(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32).astype(np.float64)
    assert oracle.sum_of_squares(x) == pytest.approx(math.fsum((x * x).tolist()), rel=1e-14)


def test_twenty_steps_of_adam_are_those_of_torch() -> None:
    """In float64, to which a float32 run stays close."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(50)
    param = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.AdamW([param], lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    zeros = rounded(np.zeros(50), "f32")
    ours = Tensor(rounded(start, "f32"), zeros, zeros, zeros)
    for t in range(1, 21):
        grad = rng.standard_normal(50)
        root, first = math.sqrt(1 - 0.99**t), 1 - 0.9**t
        a_rule = rule(
            "adam", 32, step_size=-0.01 * root / first, eps=1e-6 * root, decay=1 - 0.001, beta2=0.99, gain2=0.01
        )
        ours = oracle.optimizer_step(a_rule, Tensor(ours.param, rounded(grad, "f32"), ours.state1, ours.state2))
        param.grad = torch.tensor(grad)
        theirs.step()
    assert np.abs(ours.param.f64() - param.detach().numpy()).max() < 2e-6
