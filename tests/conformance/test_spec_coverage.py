"""The spec, the header, the frontend, the reference and the suite name the same clauses and ops.

The checks are functions of text and lists, so that each is also tried on input that it has to refuse.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qcore.backend import OPS, Backend, get_backend
from qcore_conformance.cases import all_cases
from qcore_conformance.model import LEVELS, Case
from qcore_conformance.mutants import all_mutants, native

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "docs" / "spec"
HEADER = ROOT / "qcore" / "include" / "qcore_backend.h"
# Functions of the table that are no ops.
MEMORY = {"memory_kind", "memory_allocate", "memory_free", "memory_prefetch"}
SERVICES = {"last_error", "device_count", "describe", "workspace", *MEMORY}
CLAUSE = r"QC-[A-Z0-9]+-\d{3}"


def clauses_in(text: str) -> list[str]:
    """The clauses that a chapter states, in order: its third-level headings."""
    return re.findall(rf"^### ({CLAUSE})\b", text, re.MULTILINE)


def spec_clauses() -> list[str]:
    return [clause for path in sorted(SPEC.glob("*.md")) for clause in clauses_in(path.read_text(encoding="utf-8"))]


def twice(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def without_case(clauses: Iterable[str], cases: Sequence[Case]) -> list[str]:
    return sorted(set(clauses) - {clause for case in cases for clause in case.clauses})


def unknown_clauses(clauses: Iterable[str], cases: Sequence[Case]) -> list[str]:
    known = set(clauses)
    return sorted(f"{case.id}: {clause}" for case in cases for clause in case.clauses if clause not in known)


def slots_in(header: str) -> dict[str, str]:
    """The ops of the table, in order, each with the comment that stands before its slot."""
    table = header[header.index("typedef struct qc_api {") : header.index("} qc_api;")]
    pattern = r"/\*((?:(?!\*/).)*)\*/\s*qc_status \(\*(\w+)\)\(|qc_status \(\*(\w+)\)\("
    slots = {}
    for comment, commented, bare in re.findall(pattern, table, re.DOTALL):
        slots[commented or bare] = comment
    return {name: comment for name, comment in slots.items() if name not in SERVICES}


def op_numbers_in(header: str) -> list[str]:
    """The QC_OP_ names in the order of their numbers, in lower case; refuses a gap."""
    found = sorted((int(number), name.lower()) for name, number in re.findall(r"#define QC_OP_(\w+) (\d+)", header))
    assert [number for number, _ in found] == list(range(len(found))), "QC_OP_ numbers have a gap or a double"
    return [name for _, name in found]


def places_missing(
    op: str, slots: Iterable[str], frontend: object, reference: Backend, cases: Sequence[Case]
) -> list[str]:
    """Which of an op's four places are missing."""
    missing = []
    if op not in set(slots):
        missing.append("slot in qcore_backend.h")
    if not hasattr(frontend, op):
        missing.append("op registered as torch.ops.qcore")
    if not reference.supports(op):
        missing.append("method of the NumPy reference")
    if all(case.op != op for case in cases):
        missing.append("conformance case")
    return missing


def cited_in(paths: Iterable[Path]) -> set[str]:
    return {
        clause for path in paths for clause in re.findall(CLAUSE, path.read_text(encoding="utf-8", errors="replace"))
    }


def test_no_clause_is_stated_twice() -> None:
    assert twice(spec_clauses()) == []
    assert twice(["QC-A-001", "QC-A-002", "QC-A-001"]) == ["QC-A-001"]


def test_the_spec_was_found() -> None:
    assert len(spec_clauses()) > 40
    assert clauses_in("### QC-NF4-001 Table\nsee QC-NF4-002\n## QC-NF4-003 no clause\n") == ["QC-NF4-001"]


def test_every_clause_has_a_case() -> None:
    assert without_case(spec_clauses(), all_cases()) == []
    assert without_case([*spec_clauses(), "QC-NEW-001"], all_cases()) == ["QC-NEW-001"]


def test_every_case_cites_known_clauses() -> None:
    assert unknown_clauses(spec_clauses(), all_cases()) == []
    without = [clause for clause in spec_clauses() if clause != "QC-NF4-002"]
    assert unknown_clauses(without, all_cases())


def test_every_case_cites_a_clause_and_is_named_after_its_op_and_level() -> None:
    for case in all_cases():
        assert case.clauses, case.id
        assert re.fullmatch(rf"{re.escape(case.op)}/{case.level}/\S+", case.id), case.id
        assert case.level in LEVELS
        assert case.op in OPS or case.op == "contract"


def test_no_case_id_is_used_twice() -> None:
    assert twice(case.id for case in all_cases()) == []


def test_every_clause_that_a_source_cites_exists() -> None:
    folders = ("qcore", "backends", "conformance")
    kinds = {".py", ".h", ".hpp", ".cpp", ".c", ".cuh", ".cu"}
    paths = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in kinds and "build" not in p.parts]
    assert len(paths) > 50
    cited = cited_in(paths)
    assert len(cited) > 30
    assert sorted(cited - set(spec_clauses())) == []


def test_every_clause_is_cited_by_the_header_table_or_is_a_convention_or_a_table() -> None:
    comments = "".join(slots_in(HEADER.read_text()).values())
    for first, last in re.findall(rf"({CLAUSE})\.\.(\d{{3}})", comments):
        assert first[-3:] < last, (first, last)
    assert set(re.findall(CLAUSE, comments)) <= set(spec_clauses())


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_four_places(op: str) -> None:
    import_module("qcore.ops")
    header, reference = HEADER.read_text(), get_backend("cpu_reference")
    assert places_missing(op, slots_in(header), torch.ops.qcore, reference, all_cases()) == []


def test_an_op_without_its_places_is_noticed() -> None:
    class Empty(Backend):
        name = "empty"

        def describe(self, device: torch.device):
            raise NotImplementedError

    assert len(places_missing("quantize_4bit", [], SimpleNamespace(), Empty(), [])) == 4


@pytest.mark.parametrize("op", OPS)
def test_every_slot_cites_its_clauses(op: str) -> None:
    assert re.search(CLAUSE, slots_in(HEADER.read_text())[op]), f"{op}: its slot has no comment that cites a clause"


def test_a_slot_without_a_comment_is_noticed() -> None:
    text = "typedef struct qc_api {\n  /* QC-A-001 */ qc_status (*one)(int a);\n  qc_status (*two)(int a);\n} qc_api;"
    assert slots_in(text) == {"one": " QC-A-001 ", "two": ""}


def test_the_ops_table_equals_the_header() -> None:
    header = HEADER.read_text()
    assert list(slots_in(header)) == list(OPS)
    assert op_numbers_in(header) == list(OPS)


def test_a_gap_in_the_op_numbers_is_noticed() -> None:
    with pytest.raises(AssertionError, match="gap"):
        op_numbers_in("#define QC_OP_ONE 0\n#define QC_OP_TWO 2\n")


@pytest.mark.parametrize("op", OPS)
def test_the_interface_has_a_method_for_every_op(op: str) -> None:
    assert inspect.isfunction(getattr(Backend, op))


def test_the_interface_has_no_op_beyond_the_table() -> None:
    prepared = {"gemm_4bit", "gemm_4bit_transposed", "gemm_int4"}
    prepared |= {"int8_linear", "int8_linear_transposed", "optimizer_step"}
    others = {"describe", "supports", "paged_memory", *(f"prepare_{op}" for op in prepared)}
    public = {name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_")}
    assert public - others == set(OPS)


def test_every_mutant_breaks_a_known_clause_and_op() -> None:
    clauses = set(spec_clauses())
    for mutant in all_mutants():
        assert mutant.clause in clauses, mutant.name
        assert mutant.ops, mutant.name
        assert set(mutant.ops) <= set(OPS), mutant.name
    for row in native.TABLE:
        assert row.clause in clauses, row.name
        assert row.op in (*OPS, "contract"), row.name


def test_every_op_has_mutants() -> None:
    count = Counter(op for mutant in all_mutants() for op in mutant.ops)
    assert min(count[op] for op in OPS) >= 10
