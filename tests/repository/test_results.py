"""The figures of docs/results: the tables are those of the JSON files, and the JSON files are whole."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_say_what_the_json_files_say() -> None:
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / "results.py", "tables", "--check"], check=False)
    assert run.returncode == 0, "docs/results/README.md is not up to date: python benchmarks/results.py tables"


def test_a_changed_figure_is_noticed(results: ModuleType) -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["rows"]
    figure = f"{rows[0]['perplexities'][0]:.2f}"
    assert figure in text
    assert results.with_tables(text.replace(figure, "1.00")) == text
    with pytest.raises(SystemExit, match="needs the lines"):
        results.with_tables("# Results")


def test_every_json_file_names_machine_and_kind() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        tree = json.loads(path.read_text(encoding="utf-8"))
        assert tree["schema"] == 1, path
        assert tree["kind"], path
        assert "machine" in tree or all("environment" in run for run in tree["runs"]), path


def test_the_recorded_conformance_is_of_whole_runs() -> None:
    tree = json.loads((RESULTS / "conformance.json").read_text(encoding="utf-8"))
    assert {run["run"] for run in tree["runs"]} == {"cpu_reference", "cpu", "cpu-avx2", "cpu-portable"}
    assert all(run["verdict"] == "CONFORMANT" and run["failed"] == 0 for run in tree["runs"])
    assert tree["mutants"]["survived"] == 0


def test_a_compiled_decode_is_held_against_the_faster_of_the_two(results: ModuleType) -> None:
    def row(library: str, prefill: float, decode: float, compiled: float) -> dict[str, object]:
        speeds = {"prefill": prefill, "decode": decode, "compiled_decode": compiled}
        return {
            "format": "nf4",
            "library": library,
            "dtype": "bfloat16",
            "stored_bytes": 1e6,
            "perplexity": 20.0,
            **{f"{kind}_tokens_per_second": speed for kind, speed in speeds.items()},
        }

    rows = [row("qcore", 900, 30, 40), row("bitsandbytes", 300, 20, 16)]
    rows[0]["shares_of_decode"] = {"quantized layers": 0.25, "rest": 0.75}
    table = results.models_table({"machine": {"processor": "P", "threads": 2, "isa": "x"}, "rows": rows})
    assert "| nf4, bfloat16 | qcore | 1.0 | 20.00 | 900.0 | 30.0 | 40.0 |" in table
    assert "| nf4 | 3.00x | 1.50x | 2.50x | 2.00x |" in table  # 40 over 16, and over the faster 20
    assert "| nf4 | 25% | 75% | 1.50x | 2.00x |" in table
