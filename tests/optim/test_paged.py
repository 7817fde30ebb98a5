"""Paged state: in files without a name, the same bits as in memory, more of it than memory allows, clear errors."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cases import gradients, run
from qcore import optim
from qcore.errors import InvalidArgument, OutOfMemory, OutputError, Unsupported
from qcore.ops.optimizer import PreparedOptimizerStep
from qcore.optim.memory import FileMemory, paged_memory

LARGE = 150_000  # elements whose 8-bit codes are a page tier's business


def maps_in(directory: Path) -> int:
    """Files of a directory that are mapped, whether or not they have a name."""
    return sum(str(directory) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdam32bit", "PagedLion", "PagedAdEMAMix8bit"])
def test_paged_state_is_in_files_without_a_name_and_steps_alike(name: str, tmp_path: Path) -> None:
    start, grads = torch.randn(LARGE), gradients((LARGE,), 2)
    paged, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = getattr(optim, name)([paged], paged_dir=str(tmp_path))
    run(optimizer, grads)
    run(getattr(optim, name.removeprefix("Paged"))([plain]), grads)
    assert torch.equal(paged, plain)
    assert maps_in(tmp_path) == (1 if "Lion" in name else 2)
    assert list(tmp_path.iterdir()) == []
    del optimizer
    assert maps_in(tmp_path) == 0


def test_optimizers_without_a_paged_class_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_PAGED_DIR", str(tmp_path))
    param = nn.Parameter(torch.randn(LARGE))
    optimizer = optim.RMSprop8bit([param], is_paged=True)
    run(optimizer, gradients((LARGE,), 1))
    assert maps_in(tmp_path) == 1


def test_small_state_stays_in_memory(tmp_path: Path) -> None:
    run(optim.PagedAdamW([nn.Parameter(torch.randn(5000))], paged_dir=str(tmp_path)), gradients((5000,), 1))
    assert maps_in(tmp_path) == 0


PROGRAM = """
import hashlib, resource, sys
import torch
from torch import nn
from qcore import optim
from qcore.errors import OutOfMemory

N = 4_000_000
start, gradient = torch.linspace(-1, 1, N), torch.linspace(1, -2, N)
param = nn.Parameter(start.clone())

def train(kind, **options):
    param.data.copy_(start)
    optimizer = kind([param], lr=1e-2, **options)
    param.grad = gradient
    for _ in range(3):
        optimizer.step()
    return hashlib.sha256(param.detach().numpy()).hexdigest()

unlimited = train(optim.AdamW32bit)  # also starts the threads, whose stacks count
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + N * 4, resource.RLIM_INFINITY))  # half of the state
try:
    train(optim.AdamW32bit)
except MemoryError as error:
    print("refused:", error)
print("same:", train(optim.PagedAdamW32bit, paged_dir=sys.argv[1]) == unlimited)
"""


def test_state_larger_than_memory_trains_to_the_same_bits(tmp_path: Path) -> None:
    """32 MB of state where 16 MB may be had: an error in memory, the unlimited run's bits when paged."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, same = done.stdout.splitlines()
    assert refused.startswith("refused: optimizer state: 16000000 bytes for a torch.float32 tensor of shape (4000000,)")
    assert "page it (is_paged=True)" in refused
    assert same == "same: True"


def test_several_windows_step_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileMemory, "window", LARGE)
    sizes: list[int] = []
    original = PreparedOptimizerStep.__call__

    def counted(self, rule, grads, grad_scales=()):  # type: ignore[no-untyped-def]
        sizes.append(len(grads))
        return original(self, rule, grads, grad_scales)

    monkeypatch.setattr(PreparedOptimizerStep, "__call__", counted)
    ahead: list[int] = []
    prefetch = FileMemory.prefetch

    def noted(self, tensors):  # type: ignore[no-untyped-def]
        ahead.append(len(sizes))
        prefetch(self, tensors)

    monkeypatch.setattr(FileMemory, "prefetch", noted)
    starts = [torch.randn(LARGE) for _ in range(3)]
    paged, plain = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    for optimizer in (optim.PagedAdamW8bit(paged, paged_dir=str(tmp_path)), optim.AdamW8bit(plain)):
        for param, start in zip(optimizer.param_groups[0]["params"], starts, strict=True):
            param.grad = start
        optimizer.step()
    assert sizes == [1, 1, 1, 3]
    assert ahead == [0, 1]  # the second window is asked for before the first one's call, the third before the second's
    assert all(map(torch.equal, paged, plain))


def test_a_copy_and_a_loaded_state_are_paged_again(tmp_path: Path) -> None:
    param, grads = nn.Parameter(torch.randn(LARGE)), gradients((LARGE,), 3)
    optimizer = optim.PagedLion8bit([param], paged_dir=str(tmp_path))
    run(optimizer, grads)
    other_param, copied = copy.deepcopy((param, optimizer))
    run(copied, grads)
    third = nn.Parameter(param.detach().clone())
    loaded = optim.PagedLion8bit([third], paged_dir=str(tmp_path))
    loaded.load_state_dict(optimizer.state_dict())
    run(loaded, grads)
    run(optimizer, grads)
    assert torch.equal(param, other_param)
    assert torch.equal(param, third)
    assert maps_in(tmp_path) == 3


def test_a_closed_map_is_an_error_and_the_parameters_stay(tmp_path: Path) -> None:
    param = nn.Parameter(torch.randn(LARGE))
    optimizer = optim.PagedAdamW8bit([param], paged_dir=str(tmp_path))
    run(optimizer, gradients((LARGE,), 1))
    before, saved = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.close()
    assert maps_in(tmp_path) == 0
    with pytest.raises(InvalidArgument, match=r"paged state: its map was closed by close\(\)"):
        optimizer.step()
    with pytest.raises(InvalidArgument, match="its map was closed"):
        optimizer.load_state_dict(saved)
    assert torch.equal(param, before)


def test_a_full_disk_is_an_error_before_the_step(tmp_path: Path) -> None:
    param = nn.Parameter(torch.randn(LARGE))
    optimizer = optim.PagedAdamW32bit([param], paged_dir=str(tmp_path))
    before = param.detach().clone()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            OutOfMemory, match=rf"paged state: 600000 bytes cannot be had in {tmp_path}: File too large"
        ):
            run(optimizer, gradients((LARGE,), 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(param, before)
    assert list(tmp_path.iterdir()) == []
    run(optimizer, gradients((LARGE,), 1))  # there is room again


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"missing is not a directory; make it, or choose another with paged_dir"):
        FileMemory(tmp_path / "missing")
    memory = FileMemory(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(OutputError, match="paged state: no file can be made in"):
        memory.zeros((LARGE,), torch.float32, torch.device("cpu"))


def test_a_device_without_a_paged_tier_is_refused() -> None:
    with pytest.raises(Unsupported, match="paged state on cuda: needs managed or pinned memory"):
        paged_memory(torch.device("cuda"), None)
