"""Paged optimizer state through the C ABI: the emulation's memory stands in for managed and for pinned memory.

Needs the libraries of ``nox -s simt`` (build/simt).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcore import optim
from qcore.backend import cffi_memory, use_backend
from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.backend.cffi_backend import CffiBackend
from qcore.errors import InvalidArgument, OutOfMemory
from qcore.functional import paged

LIBRARY = Path(__file__).parents[2] / "build" / "simt" / "libqcore_simt32.so"
CPU = torch.device("cpu")


class Counted(CffiBackend):
    """The emulation; counts what is allocated and freed, and notes what is prefetched."""

    def __init__(self) -> None:
        super().__init__("simt32", LIBRARY)
        self.calls: Counter[str] = Counter()
        self.prefetched: list[int] = []

    def _function(self, op: str):  # type: ignore[no-untyped-def]
        function = super()._function(op)

        def counted(*arguments):  # type: ignore[no-untyped-def]
            self.calls[op] += 1
            if op == "memory_prefetch":
                self.prefetched.append(arguments[4])
            return function(*arguments)

        return counted if op in cffi_memory.FUNCTIONS else function

    def alive(self) -> int:
        return self.calls["memory_allocate"] - self.calls["memory_free"]


@pytest.fixture(params=["managed", "pinned"])
def simt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The emulation with each kind of memory, and with a threshold and windows for small tensors."""
    if not LIBRARY.exists():
        if os.environ.get("QCORE_REQUIRE_SIMT") == "1":
            pytest.fail(f"{LIBRARY} is missing; nox -s simt builds it")
        pytest.skip(f"{LIBRARY} is missing; nox -s simt builds it")
    monkeypatch.setenv("QCORE_SIMT_MEMORY", request.param)
    monkeypatch.setattr(paged, "SMALLEST", 256)
    monkeypatch.setattr(paged.BackendMemory, "window", 1500)
    backend = Counted()
    assert backend.paged_memory(CPU).kind == request.param
    return backend


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator) for size in (1000, 700, 1025, 10)]


def trained(optimizer: optim.Optimizer8bit, steps: int = 2) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for step in range(steps):
        for param, start in zip(params, starts(), strict=True):
            param.grad = start.roll(step) + param.detach()
        optimizer.step()
    return [param.detach().clone() for param in params]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(start) for start in starts()]


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam32bit", "Lion8bit", "AdEMAMix8bit"])
def test_paged_steps_have_the_bits_of_others_and_leave_nothing(simt: Counted, name: str) -> None:
    with use_backend(simt):
        optimizer = getattr(optim, f"Paged{name}")(parameters(), min_8bit_size=0)
        plain = getattr(optim, name)(parameters(), min_8bit_size=0)
        assert all(map(torch.equal, trained(optimizer), trained(plain)))
        moments = 1 if "Lion" in name else 2
        assert simt.alive() == 3 * moments  # the last parameter's is too small
        for mine, other in zip(optimizer.state.values(), plain.state.values(), strict=True):
            for key in ("state1", "state2", "absmax1", "absmax2"):
                assert key not in other or torch.equal(mine[key], other[key])
        assert (
            bool(simt.prefetched) == (simt.calls["memory_prefetch"] > 0) == (simt.paged_memory(CPU).kind == "managed")
        )
        del optimizer, mine
    assert simt.alive() == 0


def test_windows_are_prefetched_in_their_order(simt: Counted) -> None:
    with use_backend(simt):
        trained(optim.PagedLion8bit(parameters(), min_8bit_size=0), steps=1)
    managed = simt.paged_memory(CPU).kind == "managed"
    assert simt.prefetched == ([1000, 700, 1025] if managed else [])


def test_state_dicts_go_between_paged_and_others(simt: Counted) -> None:
    with use_backend(simt):
        first, plain = (
            optim.PagedAdamW8bit(parameters(), min_8bit_size=0),
            optim.AdamW8bit(parameters(), min_8bit_size=0),
        )
        trained(first)
        saved = first.state_dict()
        second = optim.PagedAdamW8bit(parameters(), min_8bit_size=0)
        for loading in (second, plain):
            loading.load_state_dict(saved)
        assert simt.alive() == 12
        assert all(map(torch.equal, trained(second), trained(plain)))
        first.close()
        assert simt.alive() == 12  # the state dict still has the tensors
        del saved
        assert simt.alive() == 6
        with pytest.raises(InvalidArgument, match=r"its memory was closed by close\(\)"):
            first.step()


def test_more_than_there_is_is_an_error_before_the_step(simt: Counted) -> None:
    memory = simt.paged_memory(CPU)
    with pytest.raises(OutOfMemory, match=r"memory_allocate: \d+ bytes cannot be had"):
        memory.empty((1 << 50,), torch.uint8)
    assert not memory.holds(torch.zeros(1))
    assert memory.empty((0, 3), torch.float32).shape == (0, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("memory_kind", (1, None), "memory_kind: device: expected 0"),
        ("memory_kind", (0, None), "memory_kind: kind: expected an address, got 0"),
        ("memory_allocate", (0, 2, 8, None), "memory_allocate: kind: expected QC_MEMORY_MANAGED"),
        ("memory_allocate", (0, 1, 0, None), "memory_allocate: bytes: expected at least 1, got 0"),
        ("memory_allocate", (0, 1, 8, None), "memory_allocate: address: expected an address, got 0"),
        ("memory_free", (0, 3, 64), "memory_free: kind: expected"),
        ("memory_prefetch", (0, 0, 0, 0, 8, 0), "memory_prefetch: address: expected that of 8 bytes, got 0"),
        ("memory_prefetch", (0, 0, 0, 64, -8, 0), "memory_prefetch: bytes: expected a count"),
        ("memory_prefetch", (0, 0, 0, 64, 8, 2), "memory_prefetch: to_host: expected 0 or 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(
    simt: Counted, function: str, arguments: tuple[int | None, ...], message: str
) -> None:
    given = [ffi.NULL if value is None else value for value in arguments]
    assert simt._function(function)(*given) == (QC.QC_NO_DEVICE if arguments[0] else QC.QC_INVALID_ARGUMENT)
    assert ffi.string(simt._api.last_error()).decode().startswith(message)


def test_the_other_kind_can_be_chosen(simt: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_PAGED_MEMORY", "pinned")
    assert simt.paged_memory(CPU).kind == "pinned"
    monkeypatch.setenv("QCORE_PAGED_MEMORY", "swap")
    with pytest.raises(InvalidArgument, match="QCORE_PAGED_MEMORY is 'swap', needs managed or pinned"):
        simt.paged_memory(CPU)


def test_a_kind_that_a_device_lacks_is_unsupported(simt: Counted) -> None:
    place = ffi.new("uintptr_t *")
    status = simt._function("memory_allocate")(0, QC.QC_MEMORY_MANAGED, 64, place)
    assert status == (QC.QC_OK if simt.paged_memory(CPU).kind == "managed" else QC.QC_UNSUPPORTED)
    assert simt._function("memory_free")(0, QC.QC_MEMORY_MANAGED, place[0]) == QC.QC_OK  # 0: nothing happens
