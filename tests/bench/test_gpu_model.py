"""The performance model of the GPU kernels against figures worked out by hand; ``qcore bench gpu`` without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcore.bench.gpu import devices, model
from qcore.bench.gpu.measure import build
from qcore.cli.main import run

H100, RTX4090 = devices.gpu("h100"), devices.gpu("rtx4090")


def test_a_decode_step_on_an_h100_by_hand() -> None:
    """4096 x 4096: 8,388,608 bytes of codes, 262,144 scales of 4 bytes, 8,192 bytes of X; 8,192 written."""
    work = model.gemm_4bit(1, 4096, 4096)
    assert work.read == 8_388_608 + 1_048_576 + 8_192 == 9_445_376
    assert work.written == 8_192
    assert work.operations == 33_554_432
    expected = model.predict(work, H100)
    assert expected.floor == pytest.approx(9_453_568 / 3.35e12) == pytest.approx(2.8220e-6, rel=1e-4)
    # 6 instructions for each of 16,777,216 weights at 33.45e12 a second: 3.0094 us; memory 3.1355 us at 90 %.
    assert expected.predicted == pytest.approx(3.1355e-6 + 2e-6, rel=1e-4)
    assert expected.bound == "memory"


def test_a_prefill_on_an_rtx_4090_by_hand() -> None:
    """2048 rows: 68,719,476,736 operations, 416 us at the public rate; 16 decodings of the weight."""
    work = model.gemm_4bit(2048, 4096, 4096)
    assert work.passes == 16
    expected = model.predict(work, RTX4090)
    assert expected.floor == pytest.approx(68_719_476_736 / 165.2e12) == pytest.approx(415.98e-6, rel=1e-4)
    # Products at 70 %: 594.25 us; decoding 16 * 6 * 16,777,216 / 41.3e12 = 39.0 us; memory less. One launch.
    assert expected.predicted == pytest.approx(596.25e-6, rel=1e-4)
    assert expected.bound == "product"


def test_integers_in_groups_by_hand() -> None:
    """4096 x 4096 in groups of 128: 8,388,608 bytes of codes, 131,072 groups of 2 + 1 bytes, 8,192 bytes of X."""
    work = model.gemm_int4(1, 4096, 4096)
    assert work.read == 8_388_608 + 393_216 + 8_192
    assert model.predict(work, H100).floor == pytest.approx((work.read + 8_192) / 3.35e12)


def test_a_gradient_reads_what_the_product_writes() -> None:
    there, back = model.gemm_4bit(64, 4096, 14336), model.gemm_4bit_transposed(64, 4096, 14336)
    assert (back.read - back.again, back.written) == (there.written, there.read - there.again)
    assert back.operations == there.operations


def test_an_int8_gradient_by_hand() -> None:
    """4096 x 4096: 16,777,216 bytes of codes, 4,096 scales, 8,192 bytes of Y; 8,192 written: 5.57 us at 90 %."""
    work = model.int8_linear_transposed(1, 4096, 4096)
    assert (work.read, work.written) == (16_777_216 + 16_384 + 8_192, 8_192)
    expected = model.predict(work, H100)
    assert expected.predicted == pytest.approx(16_809_984 / (3.35e12 * 0.9) + 2e-6)
    assert expected.bound == "memory"


def test_a_weight_beyond_the_cache_is_read_in_every_pass() -> None:
    work = model.gemm_4bit(256, 8192, 28672)  # 132 MB of weight; the RTX 4090's cache holds 72 MiB
    small_cache = model.predict(replace(work, operations=0, instructions=0), RTX4090).predicted
    large_cache = model.predict(replace(work, operations=0, instructions=0), replace(RTX4090, cache=1 << 30)).predicted
    assert small_cache - large_cache == pytest.approx(132_120_576 / (1.008e12 * 0.9))


def test_an_elementwise_op_by_hand() -> None:
    """dequantize_4bit of 4096 x 4096: 9,437,184 bytes in, 33,554,432 out: 12.83 us at 3.35 TB/s."""
    work = next(work for work in model.elementwise(4096, 4096) if work.op == "dequantize_4bit")
    assert (work.read, work.written) == (9_437_184, 33_554_432)
    assert model.predict(work, H100).floor == pytest.approx(12.833e-6, rel=1e-4)


def test_an_optimizer_step_by_hand() -> None:
    """8-bit AdamW: 4 + 4 + 1 + 1 bytes read and 4 + 1 + 1 written an element, and two scales in 256 both ways."""
    work = model.adamw(8, 1024, 1024)
    assert work.read == 1024 * 1024 * 10 + 2 * 4 * 4096
    assert work.written == 1024 * 1024 * 6 + 2 * 4 * 4096


@pytest.mark.parametrize("known", devices.GPUS, ids=lambda known: known.key)
def test_no_prediction_beats_the_floor(known: devices.Gpu) -> None:
    for work in model.workloads():
        expected = model.predict(work, known)
        assert not expected.predicted <= expected.floor, work.label
        assert expected.predicted < 100 * expected.floor + 10e-6, work.label


# Units, and in a clock of each: operations of 16-bit and of 8-bit products, lanes; GHz for products and for lanes; bits
# of the memory's bus and Gbit/s of each.
MADE_OF = {
    "h100": (132, 4096, 8192, 128, 1.83, 1.98, 5120, 5.23),
    "rtx4090": (128, 512, 2048, 128, 2.52, 2.52, 384, 21),
    "mi300x": (304, 2048, 4096, 64, 2.1, 2.1, 8192, 5.2),
    "rx7900xtx": (96, 512, 512, 64, 2.5, 2.5, 384, 20),
    "rx9070xt": (64, 1024, 2048, 64, 2.97, 2.97, 256, 20),
}


@pytest.mark.parametrize("known", devices.GPUS, ids=lambda known: known.key)
def test_the_public_figures_are_what_units_and_clocks_make(known: devices.Gpu) -> None:
    units, f16, int8, lanes, product_clock, clock, bits, rate = MADE_OF[known.key]
    assert known.f16 == pytest.approx(units * f16 * product_clock * 1e9, rel=2e-3)
    assert known.int8 == pytest.approx(units * int8 * product_clock * 1e9, rel=2e-3)
    assert known.lanes == pytest.approx(units * lanes * clock * 1e9, rel=2e-3)
    assert known.bandwidth == pytest.approx(bits * rate / 8 * 1e9, rel=6e-3)


def test_every_figure_names_its_vendors_page() -> None:
    for known in devices.GPUS:
        vendor = "nvidia.com" if known.arch.startswith("sm_") else "amd.com"
        assert any(vendor in source for source in known.sources)


def test_drivers_names_are_recognised() -> None:
    assert devices.gpu_named("NVIDIA H100 80GB HBM3") is H100
    assert devices.gpu_named("NVIDIA GeForce RTX 4090") is RTX4090
    assert devices.gpu_named("AMD Radeon RX 7900 XTX") is devices.gpu("rx7900xtx")
    assert devices.gpu_named("AMD Instinct MI300X") is devices.gpu("mi300x")
    assert devices.gpu_named("NVIDIA A100-SXM4-80GB") is None


def test_what_is_measured_is_what_is_modelled() -> None:
    """Every workload's call can be made and run; here on the CPU, at a small size."""
    for work in model.workloads(((128, 256),), (3,)):
        build(work, torch.device("cpu"))()


def test_without_a_gpu_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "model.json"
    arguments = ["--device-model", "mi300x", "--shape", "4096x4096", "--m", "1", "--json", str(path)]
    assert run(["bench", "gpu", *arguments]) == 0
    said = capsys.readouterr().out
    assert "Not yet measured" in said
    assert ("sees no GPU: what follows is predicted" in said) is not torch.cuda.is_available()
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["model"]["key"] == "mi300x"
    first = report["results"][0]
    assert first["workload"] == "gemm_4bit nf4 bf16 M=1 N=4096 K=4096"
    assert first["measured"] == "not yet measured"
    assert first["floor"] == pytest.approx(9_453_568 / 5.3e12)


def test_an_unknown_model_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "gpu", "--device-model", "h1000"]) == 2
    said = capsys.readouterr().err
    assert "did you mean h100?" in said
    assert "rx9070xt" in said
