"""What the reader reads and the writer writes is what the safetensors library reads and writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qcore.errors import FormatError, OutputError
from qcore.formats.safetensors import DTYPES, SafetensorsFile
from qcore.formats.shard_writer import ShardWriter, Spec, verify_shard

SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 3, 4), (1000, 33)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
    return data.to(torch.uint8).view(dtype).reshape(shape)


def all_tensors() -> dict[str, torch.Tensor]:
    pairs = [(name, shape) for name in DTYPES for shape in SHAPES]
    return {f"{name}{list(s)}": random_tensor(DTYPES[name], s, seed) for seed, (name, s) in enumerate(pairs)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert bits(tensor) == bits(other[name]), name


def write(path: Path, tensors: dict[str, torch.Tensor], late: dict[str, bytes] | None = None) -> dict[str, str]:
    late = late or {}
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    specs += [Spec(name, torch.uint8, (len(text) + 30,), late=True) for name, text in late.items()]
    writer = ShardWriter(path, specs)
    try:
        for name, tensor in tensors.items():
            for chunk in tensor.reshape(-1).split(1000):
                writer.write(name, chunk)
        for name, text in late.items():
            writer.write_late(name, text)
        digests = writer.finish()
    except BaseException:
        writer.abort()
        raise
    verify_shard(path, specs, digests)
    return digests


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = all_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert_same({name: file.read(name) for name in file.entries}, tensors)
    file.close()


def test_reads_any_range_of_rows(tmp_path: Path) -> None:
    tensor = random_tensor(torch.bfloat16, (97, 5), 1)
    safetensors.torch.save_file({"w": tensor, "v": tensor[:2].clone()}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for start, stop in [(0, 97), (0, 1), (96, 97), (13, 50), (5, 5)]:
        assert bits(file.read_rows("w", start, stop)) == bits(tensor[start:stop])
    file.close()


def test_the_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    """Mapped too, which needs every tensor aligned to its element, behind late texts of odd length as well."""
    tensors = all_tensors()
    write(tmp_path / "a.safetensors", tensors, {"t.state": b"{odd}", "u.state": b"{}"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert bytes(loaded.pop("t.state").numpy()) == b"{odd}"
    assert bytes(loaded.pop("u.state").numpy()) == b"{}"
    assert_same(loaded, tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as mapped:
        assert mapped.metadata() == {"format": "pt"}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, all_tensors(), {"t.state": b"text"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_verification_finds_one_flipped_bit(tmp_path: Path) -> None:
    tensors = {"w": random_tensor(torch.float32, (50, 3), 0), "v": random_tensor(torch.int8, (9,), 1)}
    digests = write(tmp_path / "a", tensors)
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    data = bytearray((tmp_path / "a").read_bytes())
    data[-1] ^= 0x10
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FormatError, match="'v' reads back with other bytes"):
        verify_shard(tmp_path / "a", specs, digests)


def test_an_incomplete_tensor_is_not_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", [Spec("w", torch.float32, (4,))])
    writer.write("w", torch.zeros(3))
    with pytest.raises(FormatError, match="12 bytes written of tensor 'w', 16 expected"):
        writer.finish()
    writer.abort()
    assert not (tmp_path / "a").exists()


def test_every_truncation_is_found(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.arange(10.0), "v": torch.zeros(3)}, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for length in range(len(data)):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(FormatError):
            SafetensorsFile(tmp_path / "a")


def test_bytes_after_the_last_tensor_are_found(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.arange(10.0)}, tmp_path / "a")
    with (tmp_path / "a").open("ab") as file:
        file.write(b"x")
    with pytest.raises(FormatError, match="longer than its header says"):
        SafetensorsFile(tmp_path / "a")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "not JSON": b"{",
    "a list": b"[]",
    "no shape": {"w": {"dtype": "F32", "data_offsets": [0, 8]}},
    "unknown dtype": {"w": GOOD | {"dtype": "F8_E4M3"}},
    "negative size": {"w": GOOD | {"shape": [-2]}},
    "fractional size": {"w": GOOD | {"shape": [2.0]}},
    "too large a shape": {"w": GOOD | {"shape": [2**62, 2**62]}},
    "shape and length disagree": {"w": GOOD | {"shape": [3]}},
    "backwards": {"w": GOOD | {"data_offsets": [8, 0]}},
    "three offsets": {"w": GOOD | {"data_offsets": [0, 4, 8]}},
    "overlap": {"w": GOOD, "v": GOOD},
    "hole": {"w": GOOD, "v": GOOD | {"data_offsets": [12, 20]}},
    "past the end": {"w": GOOD, "v": GOOD | {"data_offsets": [8, 16]}},
    "named twice": b'{"w": %s, "w": %s}' % ((json.dumps(GOOD).encode(),) * 2),
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_refused(tmp_path: Path, header: object) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path / "a")


def test_a_length_field_of_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match="truncated or not a safetensors file"):
        SafetensorsFile(tmp_path / "a")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(tmp_path / "a", {"w": torch.zeros(100)})
    assert not (tmp_path / "a").exists()


def test_a_really_full_disk_is_an_output_error(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OutputError, match="No space left on device"):
            write(tmp_path / "a", {"w": torch.zeros(100_000)})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
