"""``bitsandbytes.optim``: qcore's optimizers as classes of that module.

transformers' Trainer finds an 8-bit optimizer by ``"bitsandbytes" in str(type(optimizer))`` and keeps embeddings in 32
bits for it, so each class is a subclass that says it comes from here. bitsandbytes' submodules, ``optim.adamw`` and the
like, are this module as well.
"""

from __future__ import annotations

import sys

import torch

from qcore import optim
from qcore.optim import GlobalOptimManager

SUBMODULES = ("adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd")

# The import system asks a package for its path; the finder of qcore.compat.alias serves what is below.
__path__: list[str] = []

__all__ = [*optim.__all__]  # noqa: PLE0604


def _here(name: str) -> type:
    """The optimizer called ``name`` as a class of bitsandbytes.optim."""
    base = getattr(optim, name)
    made = type(name, (base,), {"__doc__": base.__doc__, "__module__": "bitsandbytes.optim"})
    assert issubclass(made, torch.optim.Optimizer)
    return made


for _name in optim.__all__:
    globals()[_name] = GlobalOptimManager if _name == "GlobalOptimManager" else _here(_name)
for _name in SUBMODULES:
    globals()[_name] = sys.modules[__name__]
