"""Choose among ways to compute the same thing: time each once for a kind of problem, then keep the fastest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping

import torch

log = logging.getLogger("qcore")

ROUNDS = 5

_fastest: dict[Hashable, str] = {}


def fastest(key: Hashable, candidates: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Name of the fastest candidate for the problems that ``key`` stands for.

    Parameters
    ----------
    key : hashable
        What the time depends on: shapes, dtypes, device, backend.
    candidates : mapping
        Calls without arguments, by name. They are run once each to warm up, then :data:`ROUNDS` times in turn; the
        shortest time of each counts.
    device : torch.device
        Where they run; a GPU is waited for.

    Returns
    -------
    str
        The same name for the same ``key`` until the process ends, or :func:`forget`.
    """
    if key not in _fastest:
        for call in candidates.values():
            call()
        times = dict.fromkeys(candidates, float("inf"))
        for _ in range(ROUNDS):
            for name, call in candidates.items():
                times[name] = min(times[name], _seconds(call, device))
        _fastest[key] = min(times, key=lambda name: times[name])
        shown = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in times.items())
        log.info("autotune %s: %s; takes %s", key, shown, _fastest[key])
    return _fastest[key]


def forget() -> None:
    """Time every kind of problem anew."""
    _fastest.clear()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
