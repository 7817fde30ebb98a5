"""Modules on the disk or behind Accelerate's hooks compute what they compute in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from qcore import QcoreConfig
from qcore.errors import Unsupported

IDS = torch.arange(2, 20)[None]
LAYERS = ["cpu", "disk", "disk"]
MAP = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu") | {
    f"model.layers.{index}": place for index, place in enumerate(LAYERS)
}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def load(path: Path, config: Any = None, **options: Any) -> Any:
    # Passed as None it would take the place of the checkpoint's own.
    passed = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(path, **passed, **options)


def test_4bit_layers_on_the_disk(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    whole = load(source, QcoreConfig("nf4"))
    whole.save_pretrained(tmp_path / "saved")
    expected = logits(whole)
    for path, config in ((source, QcoreConfig("nf4")), (tmp_path / "saved", None)):
        model = load(path, config, device_map=MAP, offload_folder=tmp_path / f"disk-{path.name}")
        assert model.model.layers[2].mlp.up_proj.weight.is_meta
        for _ in range(2):  # the second pass finds what the first left behind
            assert torch.equal(logits(model), expected), path.name
        model.save_pretrained(tmp_path / "again")
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        with pytest.raises(Unsupported, match="14 layers are offloaded"):
            model.dequantize()


def test_max_memory_sends_the_rest_to_the_disk(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    expected = logits(load(source, QcoreConfig("nf4")))
    places: set[str] = set()
    for memory in (60_000, 100_000):  # versions of Transformers differ in what they count
        folder = tmp_path / f"disk-{memory}"
        model = load(source, QcoreConfig("nf4"), device_map="auto", max_memory={"cpu": memory}, offload_folder=folder)
        places = set(getattr(model, "hf_device_map", {}).values())
        if {"cpu", "disk"} <= places:
            break
    assert {"cpu", "disk"} <= places
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_chosen_modules_stay_in_floating_point(tmp_path: Path, format_: str) -> None:
    source = save_model("llama", tmp_path / "float")
    config = QcoreConfig(format_, fp32_cpu_offload=True)
    model = load(source, config, device_map=MAP, offload_folder=tmp_path / "disk", dtype=torch.float32)
    kinds = [type(layer.mlp.up_proj) is torch.nn.Linear for layer in model.model.layers]
    assert kinds == [False, True, True]
    in_memory = load(
        source, QcoreConfig(format_, skip_modules=["model.layers.1", "model.layers.2"]), dtype=torch.float32
    )
    assert torch.equal(logits(model), logits(in_memory))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="int8 goes through the accelerator that there is")
def test_int8_on_the_disk_needs_an_accelerator(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="puts int8 layers on the disk"):
        load(
            save_model("llama", tmp_path / "float"), QcoreConfig("int8"), device_map=MAP, offload_folder=tmp_path / "d"
        )


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_cpu_offload_keeps_what_the_codes_mean(tmp_path: Path, format_: str) -> None:
    source = save_model("llama", tmp_path / "float")
    model = load(source, QcoreConfig(format_))
    expected = logits(model)
    cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(logits(model), expected)
