"""Text that an option names."""

from __future__ import annotations

from pathlib import Path

from qcore.errors import InvalidArgument


def read_text(option: str, path: Path) -> str:
    """The UTF-8 text in ``path``; ``InvalidArgument`` names ``option`` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{option} {path}: cannot be read: {error}") from error
