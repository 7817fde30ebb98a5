"""The mutants and their runner: the right backends pass, a kill is a kill, a survivor fails the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qcore.backend import OPS
from qcore.backend.abi import constants as QC
from qcore.backend.abi import ffi
from qcore.errors import InvalidArgument
from qcore_conformance.cases import select
from qcore_conformance.cli import main
from qcore_conformance.model import Outcome
from qcore_conformance.mutants import Steps, all_mutants, native, runner
from qcore_conformance.mutants.command import to_json, to_markdown
from qcore_conformance.mutants.memory import AnyOp
from qcore_conformance.mutants.runner import Control, Matrix, Row
from qcore_conformance.session import Session

STEPS = "qcore_conformance.mutants.steps:Steps"
ALIVE = Row("m", "It is wrong.", "QC-NUM-001", "int8_gemm", 9, 0.1)
DEAD = Row("m", "It is wrong.", "QC-NUM-001", "gemm_4bit", 1, 0.1, "gemm_4bit/L1/x", "L1", "failed", "no", True)


def hunt(spec: str, op: str, clause: str, expects: Outcome = Outcome.FAILED):
    return runner._hunt(runner._Job(spec, op, 0, clause, expects, expects is not Outcome.FAILED))


def test_there_are_more_than_forty_and_each_has_a_name_of_its_own() -> None:
    names = [mutant.name for mutant in all_mutants()]
    assert len(names) > 40
    assert len(names) == len(set(names))


@pytest.mark.parametrize("backend", [Steps, AnyOp])
@pytest.mark.parametrize("op", OPS)
def test_right_backends_pass(backend: type, op: str) -> None:
    session = Session(backend())
    cases = [case for case in select([op], ["L0", "L1", "L2"]) if not case.id.endswith("/threads")]
    for case in cases[:: max(1, len(cases) // 12)]:
        result = session.run_case(case)
        assert result.outcome in (Outcome.PASSED, Outcome.NOT_RUN), f"{case.id}: {result.message}"


def test_steps_replace_what_the_reference_wrote() -> None:
    class Nothing(Steps):
        def store(self, values, out) -> None:
            out.fill_(7)

    out = torch.zeros(4)
    Nothing().dequantize_blockwise(
        torch.zeros(4, dtype=torch.uint8), torch.ones(1), torch.linspace(-1, 1, 256), 64, out=out
    )
    assert out.tolist() == [7.0] * 4


def test_a_mutant_is_killed_by_a_case_of_its_clause() -> None:
    found = hunt("qcore_conformance.mutants.fourbit:NibblesSwappedOnPacking", "quantize_4bit", "QC-4BIT-002")
    assert found.outcome == "failed"
    assert found.cites


def test_a_right_backend_survives() -> None:
    found = hunt(STEPS, "int8_gemm", "QC-INT8-005")
    assert found.case_id == ""
    assert found.cases_run > 5


@pytest.mark.parametrize(
    ("name", "expects"),
    [
        ("Segfaults", Outcome.CRASHED),
        ("ExitsQuietly", Outcome.CRASHED),
        ("Hangs", Outcome.HUNG),
    ],
)
def test_a_mutant_that_takes_its_process_is_reported_as_that(
    name: str, expects: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "HANG_SECONDS", 3.0)
    found = hunt(f"qcore_conformance.mutants.memory:{name}", "gemm_4bit", "QC-NUM-006", expects)
    assert found.outcome == expects.value


def test_a_failed_check_does_not_count_for_a_mutant_that_has_to_crash() -> None:
    found = hunt("qcore_conformance.mutants.int8:CodesTruncated", "int8_gemm", "QC-INT8-005", Outcome.CRASHED)
    assert found.case_id == ""


def test_a_case_that_a_right_backend_fails_convicts_nobody() -> None:
    control = runner._control("qcore_conformance.mutants.int8:PairsSaturate", 0, ["int8_gemm/L1/extremes-k64"])
    assert (control.passed, len(control.alarms)) == (0, 1)
    assert Matrix(0, rows=[DEAD], controls=[control]).exit_code == 1


def test_exit_codes() -> None:
    passing = Control(STEPS, "gemm_4bit", 1, ())
    assert Matrix(0, rows=[DEAD], controls=[passing]).exit_code == 0
    assert Matrix(0, rows=[DEAD, ALIVE], controls=[passing]).exit_code == 1
    assert Matrix(0).exit_code == 2


def test_renderings_name_the_survivor() -> None:
    matrix = Matrix(3, rows=[DEAD, ALIVE], controls=[Control(STEPS, "gemm_4bit", 1, ())])
    text = to_markdown(matrix)
    assert "0 of 1 mutants killed, in 1 of 2 op slots" in text
    assert "**SURVIVED in int8_gemm**" in text
    assert json.loads(to_json(matrix))["rows"][1]["case_id"] == ""


def test_an_unknown_mutant_is_refused_with_a_hint() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'bias-dropped'"):
        runner.run(["bias-droped"])
    assert CliRunner().invoke(main, ["mutants", "--mutant", "nothing-like-it"]).exit_code == 2


def test_the_command_kills_and_reports(tmp_path: Path) -> None:
    arguments = ["mutants", "--mutant", "bias-dropped", "--mutant", "rows-divide", "--report", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "2 of 2 mutants killed" in result.output
    tree = json.loads((tmp_path / "mutants.json").read_text())
    assert [row["cites"] for row in tree["rows"]] == [True, True]
    assert {control["passed"] for control in tree["controls"]} == {1}
    assert "bias-dropped" in (tmp_path / "mutants.md").read_text()


def test_the_list_names_every_mutant() -> None:
    output = CliRunner().invoke(main, ["mutants", "--list"]).output
    assert output.count("\n") == len(all_mutants()) + len(native.names())


def test_a_careless_library_is_caught_through_the_c_abi() -> None:
    names = ["abi-writes-first", "abi-nesting-unchecked"]
    matrix = runner.run(names)
    assert [(row.mutant, row.outcome) for row in matrix.rows] == [(names[0], "failed"), (names[1], "crashed")]
    assert {control.backend for control in matrix.controls} == {"cpu"}
    assert matrix.exit_code == 0


def test_only_what_is_marked_spoils_the_memory_functions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = native.Careless("abi-null-accepted", "contract", "QC-NUM-006", "It is wrong.", Outcome.FAILED)
    marked = next(row for row in native.TABLE if row.name == "memory-full-writes")
    monkeypatch.setattr(native, "TABLE", (row, marked))
    made = native.native_mutants(tmp_path)
    assert [mutant.control for mutant in made] == ["", str(tmp_path / f"{native.MEMORY_CONTROL}.so")]
    libraries = [ffi.dlopen(mutant.spec) for mutant in made]
    tables = [library.qcore_backend_open(QC.QC_ABI_MAJOR) for library in libraries]
    assert [table.memory_free != ffi.NULL for table in tables] == [False, True]


def test_a_memory_mutant_says_what_failed_last(tmp_path: Path) -> None:
    (mutant,) = native.native_mutants(tmp_path, ("memory-full-writes",))
    library = ffi.dlopen(mutant.control)  # as long as its table is in use
    api = library.qcore_backend_open(QC.QC_ABI_MAJOR)

    def said() -> str:
        return ffi.string(api.last_error()).decode()

    for _ in range(2):  # the same errors again
        assert api.memory_kind(7, ffi.NULL) != 0
        assert said().startswith("memory_kind: device")
        assert api.describe(0, ffi.NULL) != 0
        assert said().startswith("describe: ")
