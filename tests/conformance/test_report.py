"""The renderings of a report: what is written reads back, and every rendering says what the JSON says."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sample_reports as samples
from qcore.errors import FormatError, OutputError
from qcore_conformance.model import SCHEMA, Outcome
from qcore_conformance.report import from_json, read_json, to_html, to_json, to_junit, to_markdown, verdict, write_all
from qcore_conformance.report.summary import dtype_of, matrix, worst_ratios

P, F = Outcome.PASSED, Outcome.FAILED


def test_json_reads_back_equal() -> None:
    report = samples.mixed()
    assert from_json(to_json(report)) == report


@pytest.mark.parametrize("worst", [math.inf, -math.inf, math.nan])
def test_json_stays_strict_with_a_ratio_that_is_not_finite(worst: float) -> None:
    text = to_json(samples.report([samples.result("gemm_4bit/L2/a", F, worst=worst)]))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    read = from_json(text).results[0].worst
    assert read is not None
    assert read == worst or (math.isnan(read) and math.isnan(worst))


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_another_schema_is_refused(schema: object) -> None:
    tree = json.loads(to_json(samples.mixed()))
    with pytest.raises(FormatError, match="schema"):
        from_json(json.dumps({**tree, "schema": schema}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.pop("seed"), "'seed' is missing"),
        (lambda tree: tree.update(seed="7"), "'seed' has type str"),
        (lambda tree: tree.update(complete=1), "'complete' has type int"),
        (lambda tree: tree.update(seed=True), "'seed' has type bool"),
        (lambda tree: tree.update(extra=1), r"unknown fields \['extra'\]"),
        (lambda tree: tree["results"][0].pop("repro"), r"results\[0\]: field 'repro' is missing"),
        (lambda tree: tree["results"][1].update(outcome="ok"), r"results\[1\]: 'ok' is not a valid Outcome"),
        (lambda tree: tree["results"][1].update(worst="big"), r"results\[1\]: could not convert"),
        (lambda tree: tree["results"].append(3), "expected an object, got int"),
        (lambda tree: tree["results"].append(tree["results"][0]), "stands in it twice"),
    ],
)
def test_an_inconsistent_report_is_refused(edit, message: str) -> None:
    tree = json.loads(to_json(samples.mixed()))
    edit(tree)
    with pytest.raises(FormatError, match=message):
        from_json(json.dumps(tree))


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"report\.json"):
        read_json(path)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nothing\.json: cannot be read"):
        read_json(tmp_path / "nothing.json")


def test_write_all_writes_four_renderings_and_no_leftovers(tmp_path: Path) -> None:
    paths = write_all(samples.mixed(), tmp_path / "out")
    assert [path.name for path in paths] == ["report.json", "junit.xml", "report.md", "report.html"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    assert read_json(paths[0]) == samples.mixed()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(samples.mixed(), tmp_path)
    old = (tmp_path / "report.json").read_text()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_all(samples.report([samples.result("gemm_4bit/L2/a")]), tmp_path)
    assert (tmp_path / "report.json").read_text() == old
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("outcomes", "word", "exit_code", "conformant"),
    [
        ([P, P], "CONFORMANT", 0, True),
        ([P, Outcome.NOT_RUN], "CONFORMANT", 0, True),
        ([P, Outcome.UNSUPPORTED], "CONFORMANT", 0, True),
        ([P, F], "NOT CONFORMANT", 1, False),
        ([P, Outcome.CRASHED], "NOT CONFORMANT", 1, False),
        ([P, Outcome.HUNG], "NOT CONFORMANT", 1, False),
        ([P, Outcome.UNEXPECTED_PASS], "NOT CONFORMANT", 1, False),
        ([P, Outcome.WAIVED], "NOT CONFORMANT", 0, False),
        ([F, Outcome.WAIVED], "NOT CONFORMANT", 1, False),
        ([Outcome.NOT_RUN, Outcome.UNSUPPORTED], "NOTHING RAN", 2, False),
        ([], "NOTHING RAN", 2, False),
    ],
)
def test_verdict(outcomes: list[Outcome], word: str, exit_code: int, conformant: bool) -> None:
    report = samples.report([samples.result(f"gemm_4bit/L2/{i}", outcome) for i, outcome in enumerate(outcomes)])
    judged = verdict(report)
    assert (judged.word, judged.exit_code, judged.conformant) == (word, exit_code, conformant)


@pytest.mark.parametrize(
    ("outcome", "word", "exit_code"),
    [(P, "PASSED (partial selection)", 0), (F, "NOT CONFORMANT", 1), (Outcome.NOT_RUN, "NOTHING RAN", 2)],
)
def test_a_partial_selection_makes_nothing_conformant(outcome: Outcome, word: str, exit_code: int) -> None:
    report = samples.report([samples.result("gemm_4bit/L2/a", outcome)], complete=False)
    judged = verdict(report)
    assert (judged.word, judged.exit_code, judged.conformant) == (word, exit_code, False)
    assert not from_json(to_json(report)).complete
    assert f"**{word}**" in to_markdown(report)
    assert word in to_html(report)


def test_the_verdict_names_what_was_left_out() -> None:
    report = samples.report(
        [
            samples.result("gemm_4bit/L2/a"),
            samples.result("gemm_4bit/L3/b", Outcome.NOT_RUN),
            samples.result("int8_gemm/L1/c", Outcome.UNSUPPORTED),
        ]
    )
    assert verdict(report).sentence == "1 cases passed; does not serve int8_gemm; 1 cases were not run"


@pytest.mark.parametrize(
    ("case_id", "dtype"),
    [
        ("quantize_4bit/L1/nf4-f32-bs64-n65-normal", "f32"),
        ("gemm_4bit/L2/fp4-bf16-m3", "bf16"),
        ("gemm_4bit/L2/f16", "f16"),
        ("int8_gemm/L1/m3-k129", None),
        ("int8_gemm/L1/xf16y", None),
    ],
)
def test_dtype_of_a_case_id(case_id: str, dtype: str | None) -> None:
    assert dtype_of(case_id) == dtype


def test_matrix_counts_by_level_and_dtype() -> None:
    row = {row.op: row for row in matrix(samples.mixed().results)}["gemm_4bit"]
    assert [cell.text for cell in row.levels] == ["", "", "2/3", "0/3"]
    assert [cell.state for cell in row.levels] == ["empty", "empty", "waived", "bad"]
    assert [cell.total for cell in row.dtypes] == [4, 1, 1]
    assert row.all.total == 6


def test_a_ratio_that_is_nan_is_the_worst() -> None:
    results = [samples.result(f"gemm_4bit/L2/{i}", worst=w) for i, w in enumerate((0.5, math.nan, 9.0))]
    (worst,) = worst_ratios(results)
    assert worst.ratio == math.inf
    assert worst.case_id == "gemm_4bit/L2/1"


def test_junit_counts_and_reproduces() -> None:
    root = ET.fromstring(to_junit(samples.mixed()))
    assert {k: root.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "12", "failures": "2", "errors": "2", "skipped": "3",
    }  # fmt: skip
    assert len(root.findall(".//testcase")) == 12
    (failure,) = [case for case in root.iter("testcase") if case.get("name") == "quantize_4bit/L1/fp4-bf16-n65"]
    assert "repro quantize_4bit/L1/fp4-bf16-n65 --backend acme --seed 7" in (failure[0].text or "")
    assert failure[0].get("message") == "byte 3 <is> 0x17, expected 0x71 & more"


def test_markdown_shows_verdict_matrix_failures_and_lists() -> None:
    text = to_markdown(samples.mixed())
    assert "**NOT CONFORMANT**" in text
    assert "| `gemm_4bit` |  |  | ⚠️ 2/3 | ❌ 0/3 | ❌ 1/4 | ⚠️ 0/1 | ✅ 1/1 |" in text
    assert "Reproduce: `qcore-conformance repro gemm_4bit/L3/nf4-f32-threads --backend acme --seed 7`" in text
    assert "v_dot2 \\| flushes" in text
    assert "- `gemm_4bit/L3/nf4-f32-huge`: needs 9 GiB of free memory" in text
    assert "int8_gemm" in text.partition("## Unsupported")[2]


def test_markdown_stays_short_when_everything_fails() -> None:
    results = [samples.result(f"gemm_4bit/L2/{i}", F, message="x") for i in range(500)]
    text = to_markdown(samples.report(results))
    assert text.count("Reproduce:") == 100
    assert "and 400 more" in text


class _Balanced(HTMLParser):
    VOID = frozenset({"meta", "br", "img", "link", "hr", "rect", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [v or "" for k, v in attrs if k == "src" or (k == "href" and tag != "a")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_is_well_formed_self_contained_and_escaped() -> None:
    text = to_html(samples.mixed())
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.outside == []
    assert "<script" not in text
    assert "byte 3 &lt;is&gt; 0x17" in text
    assert 'href="javascript' not in text
    assert '<a href="https://example.org/17">' in text


def test_html_holds_fingerprint_plot_lists_and_repro() -> None:
    text = to_html(samples.mixed())
    for part in ("Acme A1", "acme-a1", "acmert 3", "ab" * 32, "weight_rounding", "needs 9 GiB", "2.13.0", "v_dot2"):
        assert part in text
    assert text.count('class="repro"') == 4
    assert text.count("<rect") == 2  # one bar for each op that has bounded cases
    assert text.count('<g class="over">') == 1
    assert 'class="bound"' in text


def test_html_without_bounded_cases_has_no_plot() -> None:
    text = to_html(samples.report([samples.result("gemm_4bit/L1/a")]))
    assert "<svg" not in text
    assert "CONFORMANT" in text


@pytest.mark.parametrize("worst", [0.0, 1e-30, 1.0, 1e30, math.inf, math.nan])
def test_html_plots_any_ratio(worst: float) -> None:
    text = to_html(samples.report([samples.result("gemm_4bit/L2/a", F, worst=worst)]))
    assert text.count("<rect") == 1
    assert ('<g class="over">' in text) is not (worst <= 1)
