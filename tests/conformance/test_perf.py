"""Timing: what is counted, what is left out, what the figures are made of."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qcore.backend import OPS, get_backend
from qcore_conformance import perf
from qcore_conformance.cli import main
from qcore_conformance.perf_workloads import workloads

CPU = torch.device("cpu")


def test_there_is_a_workload_for_every_op() -> None:
    works = workloads(get_backend("cpu_reference"), CPU, torch.float32, 64, 4)
    assert {work.op for work in works} == set(OPS)


def test_bytes_are_those_of_the_tensors() -> None:
    works = {(w.op, w.label): w for w in workloads(get_backend("cpu_reference"), CPU, torch.bfloat16, 128, 4)}
    n = 128 * 128
    quantize = works["quantize_4bit", "nf4"]
    assert (quantize.bytes_read, quantize.bytes_written) == (2 * n, n // 2 + 4 * n // 64)
    gemm = works["gemm_4bit", "nf4 M=4"]
    assert (gemm.bytes_read, gemm.bytes_written) == (n // 2 + 4 * n // 64 + 4 * 128 * 2, 4 * 128 * 2)
    assert gemm.operations == 2 * 4 * n


def test_every_workload_can_be_called() -> None:
    for work in workloads(get_backend("cpu_reference"), CPU, torch.float16, 64, 4):
        work.call()


def test_the_clock_measures_the_call() -> None:
    times = perf._Clock(CPU, 0.05)(lambda: time.sleep(0.02))
    assert len(times) >= 3
    assert min(times) >= 0.02


def test_the_floor_adds_a_copy_and_a_read() -> None:
    floor = perf.Floor(read=100.0, copy=50.0, bytes=1)
    assert floor.seconds(read=300, written=100) == pytest.approx(2 * 100 / 50 + 200 / 100)
    assert floor.seconds(read=100, written=100) == pytest.approx(4)


def test_the_command_writes_figures(tmp_path: Path) -> None:
    path = tmp_path / "perf.json"
    arguments = ["perf", "--backend", "cpu_reference", "--op", "int8_gemm", "--size", "64", "--rows", "4"]
    result = CliRunner().invoke(main, [*arguments, "--seconds", "0", "--json", str(path)])
    assert result.exit_code == 0, result.output
    tree = json.loads(path.read_text())
    assert [timing["label"] for timing in tree["timings"]] == ["M=1", "M=4"]
    for timing in tree["timings"]:
        assert timing["gb_per_s"] == pytest.approx(timing["bytes_moved"] / timing["seconds"] / 1e9)
        assert timing["over_floor"] == pytest.approx(timing["seconds"] / timing["floor_seconds"])
    assert "floor on 67 MB" in result.output


@pytest.mark.parametrize("arguments", [["--backend", "nothing"], ["--backend", "cpu_reference", "--op", "int8"]])
def test_a_question_without_sense_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, ["perf", *arguments]).exit_code == 2
