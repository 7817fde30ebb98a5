"""Float checkpoints, read by rows: safetensors folders here, GGUF files in :mod:`qcore.formats.gguf`."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore.errors import FormatError
from qcore.formats.safetensors import SafetensorsFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a source. ``nbytes`` is what it takes there, ``dtype`` what reading it gives.

    Rows are read in multiples of ``row_group`` (a head of attention whose rows the file keeps in another order).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    row_group: int = 1

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


class Source(ABC):
    """A checkpoint of floating-point weights.

    ``path`` is what the user named; ``files`` are those that hold its weights; ``tensors`` are in file order.
    """

    path: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read ``tensor[start:stop]`` into memory of its own, shape ``(stop - start, *shape[1:])``."""

    def read(self, name: str) -> Tensor:
        """Read a whole tensor."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The model's configuration, as ``config.json`` holds it."""

    @abstractmethod
    def write_companions(self, out: Path) -> None:
        """Put tokenizer, generation configuration and other small files into the folder ``out``."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def stats(self) -> list[dict[str, Any]]:
        """Name, size and modification time of every file: what must not have changed when a run is resumed."""
        result = []
        for file in self.files:
            stat = file.stat()
            result.append({"name": file.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
        return result


def read_json(path: Path) -> Any:
    """Parse a JSON file; ``FormatError`` if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error


def weight_files(folder: Path) -> dict[str, Path] | list[Path]:
    """Find a folder's safetensors files: with an index a mapping of tensor name to file, else a list of one."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{folder / INDEX}: has no weight_map")
        for file in weight_map.values():
            # An index is data: it must not lead out of its folder.
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(f"{folder / INDEX}: {file!r} is not a file name")
            if not (folder / file).is_file():
                raise FormatError(f"{folder / INDEX}: names {file}, which is not there; the checkpoint is incomplete")
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if len(files) > 1:
        raise FormatError(f"{folder}: {len(files)} safetensors files and no {INDEX}; the checkpoint is incomplete")
    for pattern, advice in (
        ("*.gguf", "name the .gguf file itself"),
        ("*.bin", "pickled weights are not read; save it again with save_pretrained (safetensors)"),
    ):
        if any(folder.glob(pattern)):
            raise FormatError(f"{folder}: no safetensors files, but {pattern}; {advice}")
    raise FormatError(f"{folder}: no safetensors files")


class SafetensorsSource(Source):
    """A folder as ``save_pretrained`` writes it: ``config.json`` and one safetensors file, or several with an index."""

    # Weights in any form, and what the output has its own version of; the rest is copied.
    _WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt"})

    def __init__(self, path: Path) -> None:
        self.path = path
        found = weight_files(path)
        self.files = sorted(set(found.values())) if isinstance(found, dict) else found
        self._files: dict[Path, SafetensorsFile] = {}
        self._place: dict[str, SafetensorsFile] = {}
        self.tensors = {}
        try:
            for file in self.files:
                self._open(file)
            if isinstance(found, dict):
                self._check_index(found)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        file = self._files[path] = SafetensorsFile(path)
        for entry in sorted(file.entries.values(), key=lambda e: e.start):
            if entry.name in self._place:
                raise FormatError(f"{path}: tensor {entry.name!r} is also in {self._place[entry.name].path.name}")
            self._place[entry.name] = file
            self.tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, entry.nbytes)

    def _check_index(self, weight_map: dict[str, Path]) -> None:
        for name, path in weight_map.items():
            if name not in self._files[path].entries:
                raise FormatError(f"{self.path / INDEX}: says that {path.name} holds {name!r}, which it does not")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._place[name].read_rows(name, start, stop)

    def config(self) -> dict[str, Any]:
        config = read_json(self.path / "config.json")
        if not isinstance(config, dict):
            raise FormatError(f"{self.path / 'config.json'}: is not a JSON object")
        return config

    def write_companions(self, out: Path) -> None:
        import shutil

        for file in sorted(self.path.iterdir()):
            weights = file.suffix in self._WEIGHTS or file.name.endswith(".index.json")
            if file.is_file() and not weights and file.name != "config.json" and not file.name.startswith("."):
                shutil.copyfile(file, out / file.name)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def open_source(path: Path) -> Source:
    """Open a safetensors folder or a GGUF file.

    Raises
    ------
    FormatError
        There is nothing at ``path``, or it is neither, or it is truncated or inconsistent.
    """
    if path.is_dir():
        return SafetensorsSource(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise FormatError(f"{path}: expected a folder with safetensors files, or a .gguf file")
        from qcore.formats.gguf import GgufSource

        return GgufSource(path)
    raise FormatError(f"{path}: no such folder or file; download a model first (`hf download NAME --local-dir FOLDER`)")
