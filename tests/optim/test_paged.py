"""Paged state: in files without a name, the same bits as in memory, more of it than memory allows, clear errors."""

from __future__ import annotations

import copy
import io
import pickle
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import gradients, run
from qcore import functional, optim
from qcore.backend import OptimizerRule, OptimizerTensors, PagedMemory, use_backend
from qcore.errors import (
    BackendUnavailable,
    DeviceError,
    InvalidArgument,
    InvalidDtype,
    OutOfMemory,
    OutputError,
    Unsupported,
)
from qcore.functional import paged
from qcore.functional.paged import FileMemory, paged_memory
from qcore.ops.optimizer import PreparedOptimizerStep
from qcore_cpu_reference import ReferenceBackend

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


class Host(ReferenceBackend):
    """The reference with memory of its own: bytearrays that count themselves."""

    name = "host"

    def __init__(self, room: int = 1 << 40) -> None:
        self.memory = Bytes(room)

    def paged_memory(self, device: torch.device) -> PagedMemory:
        return self.memory

    def optimizer_step(self, rule: OptimizerRule, tensors: OptimizerTensors) -> None:
        self.memory.said.append("step")
        super().optimizer_step(rule, tensors)


class Bytes(PagedMemory):
    """What a backend that is written in Python may have."""

    kind = "counted"

    def __init__(self, room: int) -> None:
        self.room = room
        self.alive: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.said: list[str] = []
        self.broken = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.full(shape, 77, dtype=dtype)
        if tensor.nbytes > self.room:
            raise OutOfMemory(f"{tensor.nbytes} bytes of {self.room}")
        self.alive[tensor.data_ptr()] = tensor.untyped_storage()
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self.alive

    def prefetch(self, tensors: Iterable[Tensor], to_host: bool = False) -> None:
        self.said.append(f"prefetch {sum(tensor.nbytes for tensor in tensors)}{' to the host' if to_host else ''}")
        if self.broken:
            raise DeviceError("the bus is on fire")

    def wait(self) -> None:
        self.said.append("wait")


def step_of(optimizer: optim.Optimizer8bit, starts: list[Tensor]) -> list[Tensor]:
    """Parameters after one step from ``starts`` on gradients of their own values."""
    params = optimizer.param_groups[0]["params"]
    for param, start in zip(params, starts, strict=True):
        param.data.copy_(start)
        param.grad = start
    optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Values of three parameters of which each is a window of its own, although they are small."""
    monkeypatch.setattr(paged, "SMALLEST", 100)
    monkeypatch.setattr(paged.BackendMemory, "window", 600)
    return [torch.randn(600) for _ in range(3)]


def parameters(values: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value.clone()) for value in values]


def test_state_lives_in_the_memory_of_its_backend_and_comes_in_windows(small: list[Tensor]) -> None:
    backend = Host()
    memory = backend.memory
    with use_backend(backend):
        optimizer = optim.PagedLion8bit(parameters(small), min_8bit_size=0)
        stepped = step_of(optimizer, small)
        assert memory.said == ["prefetch 600", *["wait", "prefetch 600", "step"] * 2, "wait", "step"]
        assert all(map(torch.equal, stepped, step_of(optim.Lion8bit(parameters(small), min_8bit_size=0), small)))
        assert len(memory.alive) == 3
        saved = copy.deepcopy(optimizer.state_dict())
        other = optim.PagedLion8bit(parameters(small), min_8bit_size=0)
        other.load_state_dict(saved)
        pickled = pickle.loads(pickle.dumps(optimizer))
        assert len(memory.alive) == 6  # the pickle's state is not in it before its first step
        expected = step_of(optimizer, small)
        assert all(map(torch.equal, expected, step_of(other, small)))
        assert all(map(torch.equal, expected, step_of(pickled, small)))
        assert len(memory.alive) == 9
        optimizer.close()
        assert len(memory.alive) == 6
        with pytest.raises(InvalidArgument, match=r"paged state: its memory was closed by close\(\)"):
            optimizer.step()
        del optimizer, other, pickled
    assert len(memory.alive) == 0


def test_a_prefetch_that_fails_does_not_stop_a_step_half_way(small: list[Tensor]) -> None:
    backend = Host()
    backend.memory.broken = True
    with use_backend(backend):
        optimizer = optim.PagedLion8bit(parameters(small), min_8bit_size=0)
        with pytest.warns(RuntimeWarning, match="could not be brought near, and steps may be slow: the bus") as said:
            result = step_of(optimizer, small)
        assert len(said) == 1
        assert all(map(torch.equal, result, step_of(optim.Lion8bit(parameters(small), min_8bit_size=0), small)))


def test_memory_that_is_out_is_an_error_before_the_step(small: list[Tensor]) -> None:
    with use_backend(Host(room=599)):
        optimizer = optim.PagedLion8bit(parameters(small), min_8bit_size=0)
        with pytest.raises(OutOfMemory, match=r"paged state: 600 bytes of counted memory for a torch\.uint8 tensor"):
            step_of(optimizer, small)
        assert all(map(torch.equal, optimizer.param_groups[0]["params"], small))


def test_state_moves_to_the_memory_of_the_backend_that_is_selected(small: list[Tensor]) -> None:
    first, second = Host(), Host()
    optimizer = optim.PagedLion8bit(parameters(small), min_8bit_size=0)
    for backend in (first, second):
        with use_backend(backend):
            step_of(optimizer, small)
    assert (len(first.memory.alive), len(second.memory.alive)) == (0, 3)


def test_a_directory_means_files_whatever_the_backend_has(tmp_path: Path) -> None:
    with use_backend(Host()):
        assert isinstance(paged_memory(torch.device("cpu"), tmp_path), FileMemory)


def test_a_device_without_a_paged_tier_is_refused() -> None:
    class Bare(ReferenceBackend):
        name = "bare"

    with (
        use_backend(Bare()),
        pytest.raises(
            Unsupported, match="paged state on cuda: needs managed or pinned memory from its backend, and 'ba"
        ),
    ):
        paged_memory(torch.device("cuda"), None)


def test_paged_tensors_of_bitsandbytes_functions(small: list[Tensor]) -> None:
    backend = Host()
    with use_backend(backend):
        tensor = functional.get_paged(20, 30, dtype=torch.uint8, device="cpu")
        assert tensor.is_paged  # type: ignore[attr-defined]
        assert tensor.shape == (20, 30)
        assert not tensor.any()
        functional.prefetch_tensor(tensor)
        functional.prefetch_tensor(tensor, to_cpu=True)
        assert backend.memory.said == ["prefetch 600", "prefetch 600 to the host"]
        with pytest.raises(InvalidArgument, match="prefetch_tensor: A is not paged"):
            functional.prefetch_tensor(torch.zeros(3))
    functional.prefetch_tensor(tensor)  # by the memory that it is in, whichever backend is selected
    assert len(backend.memory.said) == 3
    del tensor
    assert len(backend.memory.alive) == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "error", "message"),
    [
        (((3, 4),), torch.uint8, "cpu", InvalidArgument, "shape: expected counts, one argument each"),
        ((-3, 4), torch.uint8, "cpu", InvalidArgument, "shape: expected counts"),
        ((True,), torch.uint8, "cpu", InvalidArgument, "shape: expected counts"),
        ((3,), "float32", "cpu", InvalidDtype, "dtype: expected one of .* got 'float32'"),
        ((3,), torch.complex64, "cpu", InvalidDtype, "dtype: expected one of .* got torch.complex64"),
        ((10**20,), torch.uint8, "cpu", OutOfMemory, "takes 100000000000000000000 bytes"),
        ((0, 2**70), torch.uint8, "cpu", OutOfMemory, "takes 0 bytes"),
        ((3,), torch.uint8, "nope", InvalidArgument, "device: Expected one of cpu"),
    ],
)
def test_a_paged_tensor_that_cannot_be(
    shape: Any, dtype: Any, device: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"get_paged: {message}|get_paged: shape: .* {message}"):
        functional.get_paged(*shape, dtype=dtype, device=device)


def test_a_paged_tensor_on_a_device_that_nothing_serves() -> None:
    with pytest.raises(BackendUnavailable, match="vulkan"):
        functional.get_paged(3, device="vulkan")


def test_a_paged_tensor_is_saved_and_copied_like_any_other() -> None:
    tensor = functional.get_paged(np.int64(200), 300, dtype=torch.int32, device="cpu")
    tensor += 7
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(tensor)):
        assert torch.equal(other, tensor)
        with pytest.raises(InvalidArgument, match="prefetch_tensor: A is not paged"):  # memory like any other
            functional.prefetch_tensor(other)


def test_paged_tensors_on_a_plain_cpu_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_PAGED_DIR", str(tmp_path))
    monkeypatch.setattr(paged, "_shared", {})
    tensor = functional.get_paged(LARGE, device="cpu")
    functional.prefetch_tensor(tensor)
    assert maps_in(tmp_path) == 1
