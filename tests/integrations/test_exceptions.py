"""Layers that stay in floating point although nobody asked for it: new heads, and what mixers multiply themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    MambaConfig,
    MambaForCausalLM,
)

from qcore import QcoreConfig
from qcore.nn import Linear4bit, Linear8bitLt

IDS = torch.arange(2, 20)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def quantized_layers(model: Any) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_a_head_that_the_checkpoint_does_not_have_is_a_float_one_to_be_trained(tmp_path: Path, format_: str) -> None:
    """Transformers' default exceptions miss a head with a bias; nor does a quantized folder's list name a new one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(BertConfig(**shape, vocab_size=48)).save_pretrained(tmp_path / "float")
    load_as = AutoModelForSequenceClassification.from_pretrained
    model = load_as(tmp_path / "float", quantization_config=QcoreConfig(format_), num_labels=3)
    assert type(model.classifier) is torch.nn.Linear
    assert model.classifier.weight.requires_grad
    assert 0.01 < float(model.classifier.weight.detach().std()) < 0.04  # the class's own: 0.02
    assert len(quantized_layers(model)) == 2 * 6 + 1
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load_as(tmp_path / "out")), logits(model))
    AutoModel.from_pretrained(tmp_path / "float", quantization_config=QcoreConfig(format_)).save_pretrained(
        tmp_path / "base"
    )
    added = load_as(tmp_path / "base", num_labels=3)
    assert type(added.classifier) is torch.nn.Linear
    assert quantized_layers(added) == quantized_layers(model)
    assert torch.isfinite(logits(added)).all()
    if format_ != "int8":  # which Transformers does not put on a disk
        places = {"bert": "disk", "dropout": "cpu", "classifier": "cpu"}
        placed = load_as(tmp_path / "base", num_labels=3, device_map=places, offload_folder=tmp_path / "disk")
        assert hasattr(placed.dropout, "_hf_hook")
        assert hasattr(placed.classifier, "_hf_hook")


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_a_state_space_model_runs(tmp_path: Path, format_: str) -> None:
    """Its mixers multiply dt_proj.weight themselves, which codes would not survive."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2)
    reference = MambaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QcoreConfig(format_), dtype=torch.float32
    )
    quantized = quantized_layers(model)
    assert {name.rpartition(".")[2] for name in quantized} == {"in_proj", "out_proj"}
    difference = (logits(model) - logits(reference)).norm() / logits(reference).norm()
    assert difference < 0.3
