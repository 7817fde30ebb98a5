"""Large states ask for huge pages, and only for pages that are theirs alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcore import optim
from qcore.functional.huge_pages import prefer_huge_pages
from qcore.functional.paged import DeviceMemory

SMAPS = Path("/proc/self/smaps")
PAGE = 2 << 20
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a kernel without transparent huge pages"
)


def asked_for(address: int) -> bool:
    """Whether the mapping of an address has the flag that madvise sets."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{address:x} is not mapped")


def test_large_zeros_lie_in_huge_pages() -> None:
    values = DeviceMemory().zeros((3, PAGE, 2), torch.float32, torch.device("cpu"))
    assert values.is_contiguous()
    assert values.count_nonzero() == 0
    first = -(-values.data_ptr() // PAGE) * PAGE
    assert asked_for(first)
    assert asked_for(first + 5 * PAGE)


def test_pages_that_are_shared_with_others_are_left_alone() -> None:
    values = DeviceMemory().zeros((48 << 20,), torch.uint8, torch.device("cpu"))
    end = values.data_ptr() + values.numel()
    if values.data_ptr() % PAGE != 0:
        assert not asked_for(values.data_ptr())
    if end % PAGE != 0:
        assert not asked_for(end - 1)


def test_states_of_an_optimizer_do() -> None:
    param = torch.nn.Parameter(torch.zeros(4096, 4096))
    param.grad = torch.ones_like(param)
    optimizer = optim.AdamW8bit([param])
    optimizer.step()
    for key in ("state1", "state2"):
        middle = optimizer.state[param][key].data_ptr() + (8 << 20)
        assert asked_for(middle), key


def test_small_and_fake_tensors_are_left_alone() -> None:
    prefer_huge_pages(torch.empty(100))
    with FakeTensorMode():
        prefer_huge_pages(torch.empty(16 << 20))  # its address would be an error


@pytest.mark.parametrize("size", [100, 16 << 20])
def test_zeros_lie_on_the_device_that_is_asked_for(size: int) -> None:
    with torch.device("meta"):
        assert DeviceMemory().zeros((size,), torch.uint8, torch.device("cpu")).device.type == "cpu"
