"""Timing calls side by side: all of them once a round, medians over rounds, ratios within rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[], object]
Clock = Callable[[], float]

# Rounds that every call gets, however slow it is.
FEWEST_ROUNDS = 3
# Part of the time that goes to calls so slow that they sit out some rounds.
_SHARE_OF_SLOW = 0.4
_LONGEST = 200  # characters of a peer's error


@dataclass(frozen=True)
class Effort:
    """How long one workload is measured.

    Attributes
    ----------
    rounds : int
        Most rounds.
    seconds : float
        Time for all rounds of all calls, about; calls so slow that ``FEWEST_ROUNDS`` take longer get those.
    slice_seconds : float
        A call is repeated for so long in one round, at least once.
    """

    rounds: int
    seconds: float
    slice_seconds: float = 0.004


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one value for each round that the call took part in."""

    by_round: Mapping[int, float]
    repeats: int

    @property
    def median(self) -> float:
        return statistics.median(self.by_round.values())

    @property
    def quartiles(self) -> tuple[float, float]:
        values = sorted(self.by_round.values())
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high


def side_by_side(
    calls: Mapping[str, Call], effort: Effort, clock: Clock = time.perf_counter
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Time every call once a round, so that all of them see the same state of the machine.

    Parameters
    ----------
    calls : mapping of str to callable
        A call that raises is left out, unless it is the first, which is what the run is about.
    effort : Effort
    clock : callable
        ``time.thread_time`` for work on one thread that other processes should not disturb.

    Returns
    -------
    samples : dict of str to Samples
    errors : dict of str to str
        What the calls that were left out raised.
    """
    cost, counts, errors = {}, {}, {}
    first = next(iter(calls))
    for name, call in calls.items():
        try:
            call()  # first calls allocate, prepare and compile
            once = max(_time(call, 1, clock), 1e-9)
        except Exception as error:  # a peer may raise anything; that it does is the result
            if name == first:
                raise
            errors[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:_LONGEST]}"
            continue
        counts[name] = max(1, int(effort.slice_seconds / once))
        cost[name] = counts[name] * once
    rounds, strides = _rounds(cost, effort)
    times: dict[str, dict[int, float]] = {name: {} for name in counts}
    for index in range(rounds):
        for name, count in counts.items():
            if index % strides[name] == 0:
                times[name][index] = _time(calls[name], count, clock)
    return {name: Samples(taken, counts[name]) for name, taken in times.items()}, errors


def _rounds(cost: Mapping[str, float], effort: Effort) -> tuple[int, dict[str, int]]:
    """Number of rounds, and for each call the distance of the rounds that it takes part in."""
    slow_from = effort.seconds / (2 * len(cost))
    slow = sum(seconds for seconds in cost.values() if seconds > slow_from)
    fast = sum(seconds for seconds in cost.values() if seconds <= slow_from)
    budget = effort.seconds * (1 - _SHARE_OF_SLOW if slow else 1)
    rounds = effort.rounds if fast == 0 else int(budget / fast)
    rounds = max(FEWEST_ROUNDS, min(effort.rounds, rounds))
    affordable = rounds if slow == 0 else max(FEWEST_ROUNDS, int(effort.seconds * _SHARE_OF_SLOW / slow))
    if fast == 0:
        rounds = min(rounds, affordable)
    # With rounds = stride * affordable + rest, round 0, stride, ... are at least `affordable`.
    stride = max(1, rounds // min(affordable, rounds))
    return rounds, {name: stride if seconds > slow_from else 1 for name, seconds in cost.items()}


def _time(call: Call, count: int, clock: Clock) -> float:
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def ratio(numerator: Samples, denominator: Samples) -> float:
    """Median of the ratios within rounds."""
    shared = numerator.by_round.keys() & denominator.by_round.keys()
    return statistics.median(numerator.by_round[index] / denominator.by_round[index] for index in shared)


def total(parts: Sequence[Samples]) -> Samples:
    """The sum of calls, round by round."""
    shared = set.intersection(*(set(part.by_round) for part in parts))
    return Samples({index: sum(part.by_round[index] for part in parts) for index in sorted(shared)}, 1)
