"""``fully_shard``: shards step as the spec says, checkpoints go from 2 ranks to 1 and to 4, on gloo processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("shards.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    command = [sys.executable, PROGRAM, tmp_path_factory.mktemp("shards")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_rank_steps_its_shard_in_blocks_of_its_own(results: dict[str, dict[str, Any]]) -> None:
    result = results["two"]
    assert result["state_dtypes"] == ["torch.float32", "torch.uint8"]  # the bias is below min_8bit_size
    assert result["state_shape"] == [64, 130]  # half of (128, 130): 8320 elements are no multiple of 256
    assert result["absmax"] == 33
    assert result["shard_is_plain_step"]


def test_32_bit_shards_step_like_the_whole_model(results: dict[str, dict[str, Any]]) -> None:
    assert results["two"]["float_matches_unsharded"]


def test_a_checkpoint_on_the_same_ranks_goes_on_bit_for_bit(results: dict[str, dict[str, Any]]) -> None:
    result = results["two"]
    assert result["saved_types"] == ["DTensor", "DTensor"]
    assert result["resumed_is_exact"]


@pytest.mark.parametrize("name", ["LAMB8bit", "LARS8bit", "LAMB32bit", "LARS32bit"])
def test_a_limited_update_is_limited_by_the_whole_norm(results: dict[str, dict[str, Any]], name: str) -> None:
    """Up to the last bits of the step size: the sums of the shards are rounded in another order."""
    difference, effect = results["two"]["limited"][name]
    assert difference < 1e-5 * effect


@pytest.mark.parametrize("ranks", ["one", "four"])
def test_a_checkpoint_of_two_ranks_goes_on_with_others(results: dict[str, dict[str, Any]], ranks: str) -> None:
    """Other blocks, so other scales: each decoded moment within half of the codebook's widest step, 0.0141."""
    trained, result = results["two"], results[ranks]
    assert result["step"] == trained["step"] == 5
    assert 0 < result["moment_error"] < 0.0071  # of the largest value within a block's length
    assert result["final_loss"] == pytest.approx(trained["final_loss"], rel=0.02)
    assert result["final_loss"] < 0.9 * trained["middle_loss"]
