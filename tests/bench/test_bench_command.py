"""``qcore bench cpu`` on shapes that take no time: what it prints, writes and refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from qcore.backend import Backend
from qcore.backend.interface import OPS
from qcore.backend.registry import use_backend
from qcore.bench import peers
from qcore.bench.report import SCHEMA, read_json
from qcore.bench.run import NAMES
from qcore.cli.main import run
from qcore.errors import FormatError

# One thread: a team that shares its cores with other tests waits for its members more than it works.
TINY = ("--quick", "--shape", "64x128", "--m", "3", "--seconds", "0.001", "--rounds", "3", "--threads", "1")


def bench(*arguments: str) -> int:
    return run(["bench", "cpu", *TINY, "--allow-reference", *arguments])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # a narrower terminal folds the names


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of everything on the backend that the machine has."""
    path = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    assert bench("--json", str(path), "--plot", str(path.with_suffix(".svg"))) == 0
    return path


def test_every_op_and_layer_is_measured_beside_its_peers(report_path: Path) -> None:
    report = read_json(report_path)
    assert report.complete
    assert {result.op for result in report.results} == set(NAMES) >= set(OPS)
    assert {result.variant for result in report.results if result.op == "dequantize_4bit"} == {
        "nf4", "nf4 out=", "fp4", "fp4 out=",
    }  # fmt: skip
    without_peer = {
        "int8_quantize_cols",
        "gemm_4bit_transposed",
        "int8_linear_transposed",
        "gemm_int4",
    }  # bitsandbytes has no such function
    for result in report.results:
        name = f"{result.op} {result.variant} {result.dtype}"
        assert not result.errors, name
        assert result.seconds > 0, name
        assert ("bitsandbytes" in result.ratios) is (result.op not in without_peer), name
        assert (result.floor is None) is (result.op in ("alternate", "host_cost")), name
        if result.operations and result.floor:
            assert {"torch f32", "torch bf16"} <= result.ratios.keys(), name
            assert result.operations == 2 * 3 * 64 * 128, name
            assert result.floor.parts["multiply"] > 0, name
        if result.op == "alternate":
            assert result.over_sum.keys() == {"qcore", "bitsandbytes"}


def test_the_json_names_machine_versions_and_schema(report_path: Path) -> None:
    tree = json.loads(report_path.read_text())
    assert tree["schema"] == SCHEMA
    assert tree["kind"] == "qcore bench cpu"
    machine = tree["machine"]
    assert machine["threads"] == 1
    assert machine["cores"] > 0
    assert machine["processor"]
    assert machine["isa"]
    assert machine["versions"]["torch"] == torch.__version__
    assert tree["started"].startswith("20")
    assert tree["peers"]["torch"] == {"available": True, "version": torch.__version__, "note": ""}
    assert tree["rates"].keys() == {"read", "write", "copy", "read_8MB", "f32", "f16", "bf16", "int8"}
    assert all(rate > 0 for rate in tree["rates"].values())
    first = tree["results"][0]
    moved = first["bytes_read"] + first["bytes_written"]
    assert first["gb_per_s"] == pytest.approx(moved / first["timings"]["qcore"]["median"] / 1e9)
    assert "libqcore_cpu_probe.so" not in tree["loops"] or tree["units"]["f32"] != "torch matrix product"


def test_the_plot_is_drawn(report_path: Path) -> None:
    text = report_path.with_suffix(".svg").read_text()
    assert text.count("<path") > 50
    assert "</svg>" in text


def test_a_table_for_readers(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--op", "gemm_4bit", "--op", "host_cost", "--dtype", "f32") == 0
    printed = capsys.readouterr().out
    assert " 1 threads" in printed
    row = next(line for line in printed.splitlines() if line.startswith("│ gemm_4bit nf4 f32"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1] == "3"
    assert float(cells[2]) > 0
    assert all(cell.endswith("x") for cell in cells[-3:])
    assert "qcore Linear4bit" in printed
    assert "linear8bitlt" not in printed


def test_a_peer_that_is_not_installed_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = peers.version

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(peers, "version", version)
    path = tmp_path / "bench.json"
    assert bench("--op", "gemm_4bit", "--dtype", "bf16", "--json", str(path)) == 0
    assert "bitsandbytes: left out (not installed: pip install bitsandbytes)" in capsys.readouterr().out
    report = read_json(path)
    assert not report.peers["bitsandbytes"].available
    assert all("bitsandbytes" not in result.timings for result in report.results)


def test_peers_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert bench("--op", "int8_gemm", "--peers", "none", "--json", str(path)) == 0
    assert "torch" in capsys.readouterr().out
    (result,) = read_json(path).results
    assert list(result.timings) == ["qcore"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "gemm_4bits"), "--op 'gemm_4bits' is unknown; did you mean gemm_4bit? There are: quantize_blockwise"),
        (("--shape", "4096"), "--shape '4096': expected OUTxIN, such as 4096x14336"),
        (("--shape", "0x64"), "--shape '0x64': expected"),
        (("--shape", "64x999999999"), "from 1 to 131072"),
        (("--peers", "torch,onednn"), "--peers 'torch,onednn': expected none or some of torch, bitsandbytes"),
        (("--plot", "roof.pdf"), "--plot roof.pdf: expected a name that ends in .png or .svg"),
        (("--m", "0"), "0 is not in the range"),
        (("--dtype", "f64"), "'f64' is not one of"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "cpu", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_reference_is_not_timed_by_accident(capsys: pytest.CaptureFixture[str]) -> None:
    with use_backend("cpu_reference"):
        assert run(["bench", "cpu", "--shape", "64x64"]) == 1
    assert "served by the NumPy reference" in capsys.readouterr().err


def test_without_the_probe_torch_measures_the_floor(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--op", "dequantize_4bit", "--op", "gemm_4bit", "--dtype", "f32") == 0
    loops = "torch" if backend.name == "cpu_reference" else "libqcore_cpu_probe.so"
    assert f"floors by {loops}" in capsys.readouterr().out


def ctrl_c() -> None:
    # Not the signal: where a shell runs tests in the background, it is ignored.
    raise KeyboardInterrupt


def time_limit() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("stop", [ctrl_c, time_limit])
def test_an_interrupted_run_shows_and_writes_what_it_has(
    stop: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcore.bench import run as runs

    measure, seen = runs.measure, []

    def stop_at_third(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 3:
            stop()
        return measure(*arguments)

    monkeypatch.setattr(runs, "measure", stop_at_third)
    path = tmp_path / "bench.json"
    assert bench("--op", "quantize_4bit", "--dtype", "bf16", "--dtype", "f32", "--json", str(path)) == 130
    shown = capsys.readouterr()
    assert "interrupted after 2 of 4 workloads" in shown.err
    assert "quantize_4bit nf4 bf16" in shown.out
    report = read_json(path)
    assert not report.complete
    assert len(report.results) == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.update(schema=SCHEMA + 1), "run the bench again"),
        (lambda tree: tree.update(kind="other"), "no JSON of `qcore bench cpu --json`"),
        (lambda tree: tree["results"][0].pop("timings"), "not the fields"),
        (lambda tree: tree.pop("machine"), "not the fields"),
    ],
)
def test_another_json_is_refused(edit: Any, message: str, report_path: Path, tmp_path: Path) -> None:
    tree = json.loads(report_path.read_text())
    edit(tree)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(tree))
    with pytest.raises(FormatError, match=message):
        read_json(changed)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert bench("--op", "quantize_absmax", "--json", str(tmp_path / "file" / "bench.json")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_help_does_not_wait_for_bitsandbytes() -> None:
    program = (
        "import sys; from qcore.cli.main import run; code = run(['bench', 'cpu', '--help']);"
        "sys.exit(code or 'bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
