"""Which versions of other libraries qcore works with, and what it says of the others.

``pyproject.toml`` has the same floors. docs/compat.md says what the tests ran on, and why older ones are refused.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager

from qcore.errors import IncompatibleVersion

# Library -> the oldest version that works, and the newest that the tests ran on.
VERSIONS = {"transformers": ("5.12.1", "5.23.0"), "accelerate": ("1.1", "1.15.0"), "peft": ("0.20", "0.21.2")}


def check(library: str, feature: str, *, required: bool = True) -> None:
    """Refuse a ``library`` that is too old for ``feature``, or absent although it is required.

    Raises
    ------
    IncompatibleVersion
        Names the feature, the library, what was found, what is needed, and the command that installs it.
    """
    oldest, _ = VERSIONS[library]
    found = _installed(library)
    if found is None:
        if not required:
            return
        there = "which is not installed"
    elif _numbers(found) < _numbers(oldest):
        there = f"this is {found}"
    else:
        return
    raise IncompatibleVersion(
        f'{feature} needs {library} {oldest} or later, {there}; run: pip install --upgrade "{library}>={oldest}"'
    )


@contextmanager
def working_with(library: str, feature: str) -> Iterator[None]:
    """Import and use names of ``library``, of a version that may be later than any that qcore has seen.

    Raises
    ------
    IncompatibleVersion
        It is too old or absent, or it is later and has no longer a name that qcore uses.
    """
    check(library, feature)
    try:
        yield
    except (ImportError, AttributeError) as error:
        oldest, newest = VERSIONS[library]
        found = _installed(library)
        if found is None or _numbers(found) <= _numbers(newest):
            raise
        raise IncompatibleVersion(
            f"{feature} does not work with {library} {found} yet ({error}); upgrade qcore-quant, or run: "
            f'pip install "{library}>={oldest},<={newest}"'
        ) from error


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """``[5, 0, 0]`` of ``"5"``, ``"5.0.0.dev0"`` and ``"5.0rc1"``: what is on the way to a version counts as it."""
    release = re.match(r"\d+(\.\d+)*", version)
    found = [int(part) for part in release[0].split(".")] if release else []
    return (found + [0, 0, 0])[:3]
