"""Workers: a crash or a hang is a result, the run goes on, and the exit code says what happened."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qcore.errors import BackendNotFound, BackendUnavailable
from qcore_conformance.cases import all_cases, case_by_id, select
from qcore_conformance.cli import main
from qcore_conformance.model import Outcome
from qcore_conformance.report import read_json, verdict
from qcore_conformance.runner import Target, run_cases

CASES = [
    case_by_id(case_id)
    for case_id in (
        "quantize_absmax/L1/dynamic-bs256-zeros",
        "dequantize_absmax/L1/two-roundings",
        "dequantize_absmax/L1/golden-n150",
        "int8_gemm/L1/one-hot",
    )
]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def _cli(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def _outcomes(backend: str, **options: float) -> list[Outcome]:
    report = run_cases(Target(f"broken_backends:{backend}", **options), CASES)
    return [result.outcome for result in report.results]


def test_a_right_backend_passes() -> None:
    assert _outcomes("Right") == [Outcome.PASSED] * 4


@pytest.mark.parametrize(
    ("backend", "says"),
    [("Crashes", ("SIGABRT", "about to go")), ("Exits", ("exited with code 7",))],
)
def test_a_crash_is_a_result_and_the_run_goes_on(backend: str, says: tuple[str, ...]) -> None:
    report = run_cases(Target(f"broken_backends:{backend}"), CASES)
    p, c = Outcome.PASSED, Outcome.CRASHED
    assert [result.outcome for result in report.results] == [p, c, c, p]
    for word in says:
        assert word in report.results[1].message
    assert report.backend["name"] == backend.lower()


def test_a_hang_is_a_result_and_the_run_goes_on() -> None:
    p, h = Outcome.PASSED, Outcome.HUNG
    assert _outcomes("Hangs", case_seconds=3.0) == [p, h, h, p]


def test_a_run_out_of_time_leaves_the_rest_not_run_and_is_partial() -> None:
    report = run_cases(Target("broken_backends:Right"), CASES, budget=0.0)
    assert [result.outcome for result in report.results] == [Outcome.PASSED, *[Outcome.NOT_RUN] * 3]
    assert report.results[1].message == "the run's 0 s were over"
    assert not report.complete


def test_an_exception_of_a_backend_is_a_failure() -> None:
    report = run_cases(Target("broken_backends:Raises"), CASES)
    assert report.results[1].outcome is Outcome.FAILED
    assert report.results[1].message == "ZeroDivisionError: by my own mistake"


def test_what_a_backend_prints_does_not_break_the_protocol() -> None:
    assert _outcomes("Chatters") == [Outcome.PASSED] * 4


def test_two_workers_give_the_same_report_as_one() -> None:
    one, two = (run_cases(Target("broken_backends:Crashes"), CASES, jobs=jobs) for jobs in (1, 2))
    assert [(r.case_id, r.outcome) for r in one.results] == [(r.case_id, r.outcome) for r in two.results]


def test_a_backend_that_cannot_be_had_is_an_error_before_any_case() -> None:
    with pytest.raises(BackendNotFound, match="Did you mean 'cpu_reference'"):
        run_cases(Target("cpu_refrence"), CASES)
    with pytest.raises(BackendUnavailable, match="no device of this kind"):
        run_cases(Target("broken_backends:Unavailable"), CASES)
    with pytest.raises(BackendUnavailable, match="SIGABRT"):
        run_cases(Target("broken_backends:CrashesWhenLoaded"), CASES)


def test_a_failure_exits_with_1_and_prints_the_line_that_reproduces_it(tmp_path: Path) -> None:
    words = ("run", "--backend", "broken_backends:LeavesTheTail", "--op", "dequantize_absmax", "--level", "L1")
    result = _cli(*words, "--seed", "5", "--report", str(tmp_path))
    assert result.exit_code == 1, result.output
    report = read_json(tmp_path / "report.json")
    failed = [r for r in report.results if r.outcome is Outcome.FAILED]
    assert failed
    for one in failed:
        assert one.repro in result.output
    line = shlex.split(failed[0].repro)
    assert line[0] == "qcore-conformance"
    again = _cli(*line[1:])
    assert again.exit_code == 1
    assert failed[0].message in again.output


def test_a_run_that_passes_exits_with_0(tmp_path: Path) -> None:
    result = _cli("run", "--backend", "broken_backends:Right", "--op", "dequantize_absmax", "--report", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} >= {"report.json", "junit.xml", "report.md", "report.html"}
    report = read_json(tmp_path / "report.json")
    assert report.selection == {
        "backend": "broken_backends:Right",
        "device": None,
        "ops": ["dequantize_absmax"],
        "levels": ["L0", "L1", "L2"],
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("run", "--backend", "nonesuch"), "no backend 'nonesuch'"),
        (("run", "--backend", "/nonesuch/lib.so"), "no such file"),
        (("run", "--backend", "broken_backends:Nonesuch"), "Nonesuch"),
        (("run", "--backend", "cpu_reference", "--op", "quantise_4bit"), "Did you mean 'quantize_4bit'"),
        (("run", "--backend", "cpu_reference", "--level", "L4"), "'L4' is not one of"),
        (("run", "--backend", "cpu_reference", "--op", "int8_gemm", "--level", "L2"), "nothing would be checked"),
        (("run",), "Missing option '--backend'"),
        (("list", "--op", "nonesuch"), "unknown op 'nonesuch'"),
        (("repro", "int8_gemm/L1/one-hott", "--backend", "cpu_reference"), "int8_gemm/L1/one-hot"),
        (("repro", "int8_gemm/L1/one-hot", "--backend", "nonesuch"), "no backend 'nonesuch'"),
        (("repro", "nope", "--backend", "cpu_reference"), "`qcore-conformance list` names them all"),
        (("repro", "int8_gemm/L1/one-hot", "--backend", "cpu_reference", "--device", "meta"), "--device meta: "),
        (("run", "--backend", "cpu_reference", "--waivers", "nonesuch.toml"), "nonesuch.toml"),
        (("run", "--backend", "cpu_reference", "--device", "nope"), "--device nope: torch cannot use it here"),
        (("record", "/nonesuch/calls", "--declared-by", "cpu_reference"), "/nonesuch/calls: cannot be written"),
    ],
)
def test_a_question_that_makes_no_sense_exits_with_2(words: tuple[str, ...], text: str) -> None:
    result = _cli(*words)
    assert result.exit_code == 2, result.output
    assert text in result.output


def test_cases_that_need_a_device_are_not_run_on_a_host() -> None:
    only_devices = [case for case in select(["int8_gemm"], ["L3"]) if "graph" in case.id]
    report = run_cases(Target("broken_backends:Right"), only_devices)
    assert [r.outcome for r in report.results] == [Outcome.NOT_RUN]
    assert verdict(report).exit_code == 2


def test_a_report_that_cannot_be_written_is_refused_before_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcore_conformance.runner.run_cases", lambda *_, **__: pytest.fail("the suite has run"))
    result = _cli("run", "--backend", "cpu_reference", "--report", "/proc/x")
    assert result.exit_code == 2, result.output
    assert "/proc/x" in result.output


def test_an_isolated_case_is_reproduced() -> None:
    case = next(case for case in all_cases() if case.params.get("isolated") and case.op == "dequantize_absmax")
    result = _cli("repro", case.id, "--backend", "broken_backends:Right")
    assert "needs a worker process" not in result.output
    case = next(case for case in all_cases() if case.id.startswith("dequantize_absmax") and "pages" in case.id)
    result = _cli("repro", case.id, "--backend", "cpu_reference")
    assert result.exit_code == 0, result.output


def test_list_prints_every_case_once() -> None:
    result = _cli("list")
    assert result.output.split() == [case.id for case in all_cases()]
    with_clauses = _cli("list", "--op", "int8_gemm", "--clauses")
    assert "QC-INT8-005" in with_clauses.output


def test_help_names_the_subcommands() -> None:
    output = _cli("--help").output
    for command in ("run", "list", "repro", "mutants", "perf", "diff"):
        assert command in output
