"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcore.errors import FormatError


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer in folder ``path``; nothing is downloaded."""
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise FormatError(f"{path}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{path}: has no tokenizer that Transformers can load: {error}") from error
