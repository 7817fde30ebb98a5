"""The difference of two runs: which changes are regressions, which ratios count as moved."""

from __future__ import annotations

import math

import pytest

import sample_reports as samples
from qcore_conformance.diff import compare, to_text
from qcore_conformance.model import Outcome

CASE = "gemm_4bit/L2/a"


def run(outcome: Outcome | None, **fields: object):
    return samples.report([] if outcome is None else [samples.result(CASE, outcome, **fields)])


@pytest.mark.parametrize(
    ("before", "after", "regression"),
    [
        *((Outcome.PASSED, outcome, True) for outcome in Outcome if outcome is not Outcome.PASSED),
        (Outcome.PASSED, None, True),
        (Outcome.FAILED, Outcome.PASSED, False),
        (Outcome.FAILED, Outcome.CRASHED, True),
        (Outcome.CRASHED, Outcome.FAILED, False),
        (Outcome.FAILED, Outcome.WAIVED, False),
        (Outcome.WAIVED, Outcome.FAILED, True),
        (Outcome.WAIVED, Outcome.UNEXPECTED_PASS, True),
        (Outcome.UNSUPPORTED, Outcome.FAILED, True),
        (Outcome.UNSUPPORTED, Outcome.PASSED, False),
        (Outcome.NOT_RUN, Outcome.HUNG, True),
        (None, Outcome.PASSED, False),
        (None, Outcome.FAILED, True),
        (Outcome.FAILED, None, False),
    ],
)
def test_which_changes_are_regressions(before: Outcome | None, after: Outcome | None, regression: bool) -> None:
    (change,) = compare(run(before), run(after)).changes
    assert (change.before, change.after, change.regression) == (before, after, regression)


def test_equal_runs_do_not_differ() -> None:
    difference = compare(samples.mixed(), samples.mixed())
    assert (difference.context, difference.changes, difference.moves) == ([], [], [])
    assert to_text(difference) == "no differences\n"


@pytest.mark.parametrize("selection", [{"ops": ["int8_gemm"]}, {"levels": ["L0", "L1"]}])
def test_a_case_that_the_second_run_did_not_select_is_not_missing(selection: dict[str, list[str]]) -> None:
    after = samples.report([], selection=selection)
    assert compare(run(Outcome.PASSED), after).changes == []


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (0.5, 0.5, False),
        (0.5, 0.6, False),
        (0.5, 0.7, True),
        (0.7, 0.5, True),
        (1e-6, 5e-4, False),
        (0.0, 0.5, True),
        (0.5, math.inf, True),
        (0.5, math.nan, True),
        (math.inf, math.inf, False),
    ],
)
def test_which_ratios_moved(before: float, after: float, moved: bool) -> None:
    difference = compare(run(Outcome.PASSED, worst=before), run(Outcome.PASSED, worst=after))
    assert bool(difference.moves) is moved
    assert difference.regressions == []


def test_the_text_names_context_regression_and_repro() -> None:
    after = run(Outcome.FAILED, worst=2.0, message="out[3] is NaN\nand more")
    after.seed = 8
    text = to_text(compare(run(Outcome.PASSED, worst=0.5), after))
    assert "seed: 7 -> 8" in text
    assert "gemm_4bit/L2/a: passed -> failed" in text
    assert "out[3] is NaN\n" in text
    assert "qcore-conformance repro gemm_4bit/L2/a --backend acme --seed 7" in text
    assert "gemm_4bit/L2/a: 0.5 -> 2" in text
