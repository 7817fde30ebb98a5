"""Waivers: what they cover, what they turn results into, and which files are refused."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

import sample_reports as samples
from qcore.errors import FormatError
from qcore_conformance.model import Outcome
from qcore_conformance.report import verdict
from qcore_conformance.waivers import Waiver, apply_waivers, read_waivers

TODAY = date(2026, 11, 22)
ENTRY = """
[[waiver]]
case = "gemm_4bit/*"
backend = "acme"
reason = "the unit flushes denormals"
link = "https://example.org/17"
expires = 2026-11-22
"""


def read(tmp_path: Path, text: str) -> list[Waiver]:
    path = tmp_path / "waivers.toml"
    path.write_text(text)
    return read_waivers(path, TODAY)


def waiver(**fields: str) -> Waiver:
    return Waiver(reason="r", link="l", expires=TODAY, **fields)


def test_a_waiver_holds_on_its_last_day(tmp_path: Path) -> None:
    (read_one,) = read(tmp_path, ENTRY)
    assert (read_one.case, read_one.backend, read_one.clause, read_one.device) == ("gemm_4bit/*", "acme", "*", "*")


def test_an_expired_waiver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="waiver 1: expired on 2026-11-21"):
        read(tmp_path, ENTRY.replace("11-22", "11-21"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("link =", "url =", r"unknown keys \['url'\]"),
        ('reason = "the unit flushes denormals"', "", "reason is missing"),
        ("the unit flushes denormals", "  ", "reason must be a string that is not empty"),
        ('link = "https://example.org/17"', "", "link is missing"),
        ("expires = 2026-11-22", "", "expires is missing"),
        ("2026-11-22", '"2026-11-22"', "expires must be a date"),
        ("2026-11-22", "2026-11-22T10:00:00", "expires must be a date"),
        ('case = "gemm_4bit/*"', "", "neither which clause nor which case"),
        ('backend = "acme"', "", "neither which backend nor which device"),
        ('"acme"', "3", "backend must be a string"),
        ("[[waiver]]", "[[waivers]]", r"got keys \['waivers'\]"),
        ("[[waiver]]", "[waiver]", "expected \\[\\[waiver\\]\\] entries only"),
        ("[[waiver]]", "[[waiver]", "not TOML"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ENTRY
    with pytest.raises(FormatError, match=message):
        read(tmp_path, ENTRY.replace(old, new))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no\.toml: cannot be read"):
        read_waivers(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Outcome.FAILED, Outcome.WAIVED),
        (Outcome.CRASHED, Outcome.WAIVED),
        (Outcome.HUNG, Outcome.WAIVED),
        (Outcome.PASSED, Outcome.UNEXPECTED_PASS),
        (Outcome.NOT_RUN, Outcome.NOT_RUN),
        (Outcome.UNSUPPORTED, Outcome.UNSUPPORTED),
    ],
)
def test_what_a_waiver_turns_a_result_into(before: Outcome, after: Outcome) -> None:
    report, unused = apply_waivers(samples.report([samples.result("gemm_4bit/L2/a", before)]), [waiver(case="gemm*")])
    assert report.results[0].outcome is after
    assert unused == []
    if after is not before:
        assert report.results[0].waiver == {"reason": "r", "link": "l", "expires": "2026-11-22"}


def test_a_waived_failure_does_not_fail_the_run_and_is_not_conformant() -> None:
    report = samples.report([samples.result("gemm_4bit/L2/a", Outcome.FAILED), samples.result("gemm_4bit/L2/b")])
    assert verdict(report).exit_code == 1
    waived, _ = apply_waivers(report, [waiver(case="*/a")])
    assert (verdict(waived).exit_code, verdict(waived).conformant) == (0, False)


def test_an_unexpected_pass_fails_the_run() -> None:
    waived, _ = apply_waivers(samples.report([samples.result("gemm_4bit/L2/a")]), [waiver(case="*")])
    assert verdict(waived).exit_code == 1


@pytest.mark.parametrize(
    ("fields", "covered"),
    [
        ({"case": "gemm_4bit/L2/*"}, True),
        ({"case": "gemm_4bit/L1/*"}, False),
        ({"clause": "QC-GEMM4-*"}, True),
        ({"clause": "QC-INT8-*"}, False),
        ({"clause": "QC-GEMM4-004", "case": "*/b"}, False),
        ({"case": "*", "backend": "hip"}, False),
        ({"case": "*", "device": "acme-a?"}, True),
        ({"case": "*", "device": "Acme*"}, True),
        ({"case": "*", "device": "gfx*"}, False),
        ({"case": "*", "backend": "acme", "device": "gfx*"}, False),
    ],
)
def test_what_a_waiver_covers(fields: dict[str, str], covered: bool) -> None:
    report = samples.report([samples.result("gemm_4bit/L2/a", Outcome.FAILED)])
    waivers = [waiver(**fields)]
    waived, unused = apply_waivers(report, waivers)
    assert (waived.results[0].outcome is Outcome.WAIVED) is covered
    assert unused == ([] if covered else waivers)


def test_the_first_matching_waiver_speaks() -> None:
    report = samples.report([samples.result("gemm_4bit/L2/a", Outcome.FAILED)])
    first = Waiver(reason="first", link="l", expires=TODAY, case="*")
    waived, unused = apply_waivers(report, [first, waiver(clause="QC-GEMM4-*")])
    assert waived.results[0].waiver is not None
    assert waived.results[0].waiver["reason"] == "first"
    assert unused == []
