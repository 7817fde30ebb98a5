"""Fused experts are quantized matrix by matrix, run, and come back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from qcore import QcoreConfig
from qcore.functional import dequantize_4bit, quantize_4bit
from qcore.integrations.checkpoint import load_model
from qcore.integrations.experts import ExpertList

IDS = torch.arange(2, 30)[None]
MODELS = ["mixtral", "qwen2-moe", "gpt-oss"]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def by_hand(source: Path) -> Any:
    """The float model with every matrix replaced by what its codes stand for, computed by Transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 3:
                turned = value.transpose(1, 2) if "gpt_oss" in model.config.model_type else value
                for matrix in turned:
                    codes, state = quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)
                    matrix.copy_(dequantize_4bit(codes, state))
            elif name.endswith(("_proj.weight", "shared_expert_gate.weight")):
                codes, state = quantize_4bit(value, quant_type="nf4", compress_statistics=True)
                value.copy_(dequantize_4bit(codes, state))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_is_quantized_for_itself(tmp_path: Path, name: str) -> None:
    source = save_model(name, tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=QcoreConfig("nf4"), dtype=torch.float32)
    lists = [module for module in model.modules() if isinstance(module, ExpertList)]
    assert [len(each) for each in lists] == [4] * 6
    expected = logits(by_hand(source))
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-5
    plain = model.dequantize()
    assert float((logits(plain) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("format_", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_saved_and_reloaded(tmp_path: Path, name: str, format_: str) -> None:
    source = save_model(name, tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=QcoreConfig(format_))
    out = tmp_path / "out"
    model.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_model(out)), logits(model))
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_skipped_experts_stay_in_floating_point(tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "float")
    config = QcoreConfig("nf4", skip_modules=["model.layers.0.mlp.experts", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    kinds = {
        name: isinstance(getattr(layer.mlp.experts, key), ExpertList)
        for index, layer in enumerate(model.model.layers)
        for key in ("gate_up_proj", "down_proj")
        for name in [f"{index}.{key}"]
    }
    assert [name for name, is_list in kinds.items() if is_list] == ["1.gate_up_proj", "2.gate_up_proj"]
    assert torch.isfinite(logits(model)).all()
