"""The pytest plugin, run by pytester: once as a third party runs it, else in this process, which has torch already."""

from __future__ import annotations

import pytest

import qcore_conformance.runner  # noqa: F401 (stays loaded: pytester forgets what a run in this process imports)
from qcore_conformance.cases import all_cases

all_cases()
pytest_plugins = ["pytester"]

WITHOUT = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
RUN = ("-p", "qcore_conformance.plugin", "--pyargs", "qcore_conformance", *WITHOUT)


@pytest.fixture
def suite(pytester: pytest.Pytester):
    def run(*arguments: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess(*RUN, *arguments)

    return run


def test_cases_are_items_with_their_ids(suite) -> None:
    result = suite("--qcore-backend=cpu_reference", "--qcore-op=int8_gemm", "--qcore-level=L1", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["*::int8_gemm/L1/sizes", "*::int8_gemm/L1/extremes-k64"])
    assert "quantize_4bit" not in result.stdout.str()
    assert result.ret == 0


def test_a_right_backend_passes(pytester: pytest.Pytester) -> None:
    arguments = ("--qcore-backend=cpu_reference", "--qcore-op=int8_gemm", "-k", "sizes or extremes-k64")
    result = pytester.runpytest_subprocess(*RUN, *arguments, timeout=280)
    result.assert_outcomes(passed=2, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["qcore-conformance: backend cpu_reference, seed 0"])


def test_a_wrong_backend_fails_with_clause_and_repro(suite) -> None:
    backend = "qcore_conformance.mutants.int8:PairsSaturate"
    result = suite(f"--qcore-backend={backend}", "--qcore-op=int8_gemm", "--qcore-seed=5", "-k", "extremes-k64")
    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(
        [
            "clauses: QC-INT8-005",
            f"reproduce: qcore-conformance repro int8_gemm/L1/extremes-k64 --backend {backend} --seed 5",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_what_cannot_run_is_skipped_with_its_reason(suite) -> None:
    result = suite("--qcore-backend=cpu_reference", "--qcore-op=int8_gemm", "--qcore-level=L3", "-rs", "-k", "second")
    result.assert_outcomes(skipped=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["SKIPPED*not_run: *"])


def test_an_op_that_is_left_out_is_skipped(suite, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        acme="""
        from qcore.backend import Backend, Description

        class Acme(Backend):
            name = "acme"

            def describe(self, device):
                return Description("acme", "Acme A1", "a1")
        """
    )
    pytester.syspathinsert()
    result = suite("--qcore-backend=acme:Acme", "--qcore-op=int8_gemm", "-rs", "-k", "sizes")
    result.assert_outcomes(skipped=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["SKIPPED*unsupported: *does not serve int8_gemm*"])


def test_a_crash_in_a_case_of_its_own_process_is_a_failure(suite) -> None:
    backend = "qcore_conformance.mutants.memory:LoadsPastEnd"
    result = suite(f"--qcore-backend={backend}", "--qcore-op=int8_gemm", "-k", "protected")
    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["crashed: the worker was killed by SIGSEGV*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "*say which backend to test: --qcore-backend=NAME"),
        (("--qcore-backend=cpu_referenze",), "*no backend 'cpu_referenze'*"),
        (("--qcore-backend=cpu_reference", "--qcore-op=int8"), "*unknown op 'int8'*"),
        (("--qcore-backend=cpu_reference", "--qcore-op=contract", "--qcore-level=L3"), "*nothing would be checked"),
    ],
)
def test_a_question_without_sense_is_a_usage_error(suite, arguments: tuple[str, ...], message: str) -> None:
    result = suite(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR or result.ret == pytest.ExitCode.INTERRUPTED
    (result.stderr if "ERROR" in result.stderr.str() else result.stdout).fnmatch_lines([message])
