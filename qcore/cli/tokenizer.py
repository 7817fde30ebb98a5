"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qcore.errors import FormatError
from qcore.formats.source import open_source


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer in folder ``path``; nothing is downloaded."""
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise FormatError(f"{path}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{path}: has no tokenizer that Transformers can load: {error}") from error


def source_tokenizer(path: Path) -> Any:
    """The tokenizer of a float checkpoint, a folder or a GGUF file, as it will be written beside the quantized one."""
    if path.is_dir():
        return load_tokenizer(path)
    source = open_source(path)
    try:
        with TemporaryDirectory() as folder:
            source.write_companions(Path(folder))
            return load_tokenizer(Path(folder))
    finally:
        source.close()
