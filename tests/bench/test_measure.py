"""How times are taken: rounds, repeats, ratios, floors; on a clock that the test turns."""

from __future__ import annotations

import pytest

from qcore.bench.floors import floor
from qcore.bench.measure import FEWEST_ROUNDS, Effort, Samples, ratio, side_by_side, total


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float):
        """A call that takes these seconds, the last again and again."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def samples(*seconds: float) -> Samples:
    return Samples(dict(enumerate(seconds)), 1)


def test_calls_take_turns_and_short_ones_are_repeated() -> None:
    clock = Clock()
    calls = {"a": clock.takes("a", 0.001), "b": clock.takes("b", 0.01)}
    found, errors = side_by_side(calls, Effort(rounds=5, seconds=1, slice_seconds=0.004), clock)
    assert not errors
    assert clock.calls[4:9] == ["a", "a", "a", "a", "b"]  # after one call to warm up and one to look at the clock
    assert {name: (taken.repeats, len(taken.by_round)) for name, taken in found.items()} == {"a": (4, 5), "b": (1, 5)}
    assert found["a"].median == pytest.approx(0.001)
    assert ratio(found["b"], found["a"]) == pytest.approx(10)


def test_the_time_is_shared_and_a_slow_peer_sits_out_rounds() -> None:
    clock = Clock()
    calls = {"qcore": clock.takes("qcore", 0.01), "slow": clock.takes("slow", 2.0)}
    found, _ = side_by_side(calls, Effort(rounds=21, seconds=1), clock)
    assert len(found["slow"].by_round) == FEWEST_ROUNDS
    assert len(found["qcore"].by_round) == 21
    assert ratio(found["slow"], found["qcore"]) == pytest.approx(200)


def test_the_time_is_kept_to() -> None:
    clock = Clock()
    calls = {name: clock.takes(name, 0.05) for name in "abcd"}
    side_by_side(calls, Effort(rounds=1000, seconds=2), clock)
    assert 1.5 < clock.now < 3


def test_a_peer_that_raises_is_reported_and_the_rest_goes_on() -> None:
    clock = Clock()

    def broken() -> None:
        raise NotImplementedError("no such kernel\nand a long list")

    found, errors = side_by_side({"qcore": clock.takes("qcore", 0.01), "peer": broken}, Effort(3, 1), clock)
    assert list(found) == ["qcore"]
    assert errors == {"peer": "NotImplementedError: no such kernel"}
    with pytest.raises(NotImplementedError):
        side_by_side({"qcore": broken}, Effort(3, 1), clock)


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that halves its speed in the middle changes no ratio."""
    mine, theirs = samples(1, 1, 2, 2, 2), samples(3, 3, 6, 6, 6)
    assert ratio(theirs, mine) == 3
    assert mine.quartiles == (1, 2)
    assert list(total([mine, theirs]).by_round.values()) == [4, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ("read", "written", "seconds", "least"),
    [
        # 100 bytes in, 100 out: a copy of all of them, or in and then out.
        (100, 100, {"read": 2.0, "write": 3.0, "copy": 4.0}, 4.0),
        (100, 100, {"read": 2.0, "write": 3.0, "copy": 9.0}, 5.0),
        # 400 in, 100 out: the copy moves 100 of them, 300 more are read.
        (400, 100, {"read": 4.0, "write": 1.0, "copy": 1.5}, 4.5),
        (100, 0, {"read": 2.0}, 2.0),
        (100, 100, {"read": 2.0, "write": 3.0, "copy": 4.0, "multiply": 7.0}, 7.0),
    ],
)
def test_the_floor_is_the_least_time(read: int, written: int, seconds: dict[str, float], least: float) -> None:
    found = floor({name: samples(value) for name, value in seconds.items()}, dict.fromkeys(seconds, 1.0), read, written)
    assert found is not None
    assert found.median == pytest.approx(least)


def test_loops_on_larger_buffers_are_scaled() -> None:
    found = floor({"read": samples(8.0, 4.0)}, {"read": 0.25}, 100, 0)
    assert found is not None
    assert list(found.by_round.values()) == [2.0, 1.0]
    assert floor({}, {}, 0, 0) is None
