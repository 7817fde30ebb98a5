"""Optimizers whose state takes 8 bits a value, 32, or memory beyond the device's (``docs/spec/60-optimizers.md``).

Names, arguments and defaults are those of ``bitsandbytes.optim`` 0.50.2; keyword arguments beyond them are in
:class:`~qcore.optim.settings.Options`.
"""

from qcore.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from qcore.optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from qcore.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from qcore.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from qcore.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from qcore.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from qcore.optim.optimizer import Optimizer8bit
from qcore.optim.overrides import GlobalOptimManager
from qcore.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from qcore.optim.sgd import SGD, SGD8bit, SGD32bit

__all__ = [
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "LAMB",
    "LAMB8bit",
    "LAMB32bit",
    "LARS",
    "LARS8bit",
    "LARS32bit",
    "PytorchLARS",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD",
    "SGD8bit",
    "SGD32bit",
    "GlobalOptimManager",
    "Optimizer8bit",
]
