"""LoRA on quantized layers: trains, merges, unmerges, saves and reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from qcore import QcoreConfig
from qcore.errors import InvalidArgument
from qcore.integrations.layers import dequantized
from qcore.integrations.peft import LoraQuantizedLinear

IDS = torch.arange(2, 20)[None]


def quantized(source: Path, format_: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=QcoreConfig(format_))
    return prepare_model_for_kbit_training(model)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def trained(source: Path, format_: str, *, dora: bool = False) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(quantized(source, format_), config).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize(("format_", "dora"), [("nf4", False), ("int8", False), ("nf4", True)])
def test_it_trains_merges_and_comes_back(tmp_path: Path, format_: str, dora: bool) -> None:
    source = save_model("qwen2", tmp_path / "float")
    model, losses = trained(source, format_, dora=dora)
    assert losses[-1] < losses[0] - 0.05
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraQuantizedLinear)
    before, codes = logits(model), layer.get_base_layer().weight.data.clone()
    numbers = dequantized(layer.get_base_layer().weight, torch.float32)
    update = layer.get_delta_weight("default").detach()

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(quantized(source, format_), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), before)

    model.merge_adapter(safe_merge=True)
    merged = logits(model)
    assert not torch.equal(layer.get_base_layer().weight.data, codes)
    if not dora:  # the sum, to within half a step of the format: a sixth of a block's largest value in NF4
        error = (dequantized(layer.get_base_layer().weight, torch.float32) - numbers - update).abs().max()
        assert float(error) < 0.2 * float((numbers + update).abs().max())
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight.data, codes)
    assert torch.equal(logits(model), before)

    final = reloaded.merge_and_unload()
    assert torch.equal(logits(final), merged)
    final.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), merged)


def test_a_broken_adapter_is_not_merged(tmp_path: Path) -> None:
    model, _ = trained(save_model("llama", tmp_path), "nf4")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    codes = layer.get_base_layer().weight.data.clone()
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidArgument, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight.data, codes)
    assert not layer.merged
