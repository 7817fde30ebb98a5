"""What stands twice is the same in both places."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from qcore import codebooks, errors

ROOT = Path(__file__).parents[2]


def test_the_codebook_header_is_what_codebooks_prints() -> None:
    header = ROOT / "qcore" / "include" / "qcore_codebooks.h"
    assert header.read_text(encoding="utf-8") == codebooks.c_header()


def test_the_drawn_error_tree_is_the_real_one() -> None:
    drawn: dict[str, list[str]] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ([│├└─ ]*)(\w+)(?: \((\w+)\))?(?:   *\S.*)?", line)
        if match is None:
            continue
        branch, name, builtin = match.groups()
        depth = len(branch) // 4
        del parents[depth:]
        drawn[name] = [*parents[-1:], *([builtin] if builtin else [])] or ["Exception"]
        parents.append(name)
    classes = {
        name: [base.__name__ for base in value.__bases__]
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if value.__module__ == errors.__name__
    }
    assert len(classes) >= 12
    assert drawn == classes


def test_every_error_says_when_it_is_raised() -> None:
    undocumented = [
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if value.__module__ == errors.__name__ and not value.__dict__.get("__doc__")
    ]
    assert not undocumented
