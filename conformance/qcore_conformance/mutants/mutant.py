"""What a mutant is: a backend with one deliberate mistake, the sentence that names it, the clause that it breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qcore.backend import Backend
from qcore_conformance.model import Outcome

B = TypeVar("B", bound=type[Backend])


@dataclass(frozen=True)
class Mutant:
    """One wrong backend.

    ``ops`` are those that are wrong: the suite has to notice each of them from the cases of that op alone. ``spec`` is
    what ``--backend`` takes to run the suite on it. ``expects`` is the outcome that notices it; one that ends its
    process or has to be called through the C ABI runs in a worker process.
    """

    name: str
    says: str
    clause: str
    ops: tuple[str, ...]
    spec: str
    expects: Outcome = Outcome.FAILED
    native: bool = False
    control: str = ""  # what a native mutant spoils, where that is not the cpu backend

    @property
    def isolated(self) -> bool:
        return self.native or self.expects is not Outcome.FAILED


_all: list[Mutant] = []


def mutant(clause: str, *ops: str, expects: Outcome = Outcome.FAILED) -> Callable[[B], B]:
    """Register a class as a mutant; its name and docstring are the mutant's."""

    def register(cls: B) -> B:
        assert cls.__doc__, cls
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        cls.name = name
        spec = f"{cls.__module__}:{cls.__qualname__}"
        _all.append(Mutant(name, " ".join(cls.__doc__.split()), clause, ops, spec, expects))
        return cls

    return register


def registered() -> tuple[Mutant, ...]:
    """Every mutant registered so far, in order."""
    return tuple(_all)
