"""A loaded checkpoint computes what its dequantized weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qcore.backend import Backend
from qcore.errors import FormatError
from qcore.formats.plan import Options
from qcore.formats.quantize import quantize_checkpoint
from qcore.functional import dequantize_4bit, int8_vectorwise_dequant
from qcore.integrations.checkpoint import load_model
from qcore.nn import Linear4bit, Linear8bitLt

IDS = torch.tensor([[0, 5, 7, 9, 3, 4, 11, 2, 30, 47]])
FORMATS = ["nf4", "fp4", "int8"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def quantized(tmp_path: Path, name: str, format_: str, **options: object) -> Path:
    source = save_model(name, tmp_path / "float", torch.float32)
    quantize_checkpoint(source, tmp_path / "out", Options(format_, **options))  # type: ignore[arg-type]
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_four_bit_layers_compute_with_the_dequantized_weights(
    tmp_path: Path, backend: Backend, name: str, format_: str
) -> None:
    out = quantized(tmp_path, name, format_)
    model = load_model(out)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == (8 if name == "gpt2" else 21)
    for key, module in layers.items():
        weight = dequantize_4bit(module.weight, module.weight.quant_state)
        target = plain.get_submodule(key).weight
        target.data = weight.t().contiguous() if name == "gpt2" else weight
    assert torch.allclose(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_int8_layers_compute_near_their_weights(tmp_path: Path, backend: Backend, name: str) -> None:
    """Inputs are quantized to eight bits too, so near is what there is."""
    out = quantized(tmp_path, name, "int8")
    model = load_model(out)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    for key, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            weight = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            plain.get_submodule(key).weight.data = weight.t().contiguous() if name == "gpt2" else weight
    difference = logits(model) - logits(plain)
    assert float(difference.norm() / logits(plain).norm()) < 0.02


@pytest.mark.parametrize("format_", FORMATS)
def test_a_folder_that_bitsandbytes_wrote_loads(tmp_path: Path, format_: str) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    four = format_ != "int8"
    config = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type=format_ if four else "fp4",
        bnb_4bit_use_double_quant=format_ == "nf4",
    )
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    written = load_file(tmp_path / "theirs/model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))}
    assert len(layers) == 21
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            assert torch.equal(value, written[f"{name}.{key}"]), f"{name}.{key}"
    # In eval mode its CPU layers repack their weights, which fails at these widths.
    expected = logits(theirs.train())
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.02


def test_a_float_checkpoint_loads_as_it_is(tmp_path: Path) -> None:
    for name in ("llama", "llama-tied", "qwen2", "gpt2"):
        source = save_model(name, tmp_path / name)
        own = logits(AutoModelForCausalLM.from_pretrained(source))
        assert torch.equal(logits(load_model(source)), own), name


def test_dtype_overrides_the_checkpoint(tmp_path: Path) -> None:
    out = quantized(tmp_path, "llama", "nf4", dtype="bfloat16")
    assert logits(load_model(out)).dtype == torch.bfloat16
    model = load_model(out, dtype=torch.float32)
    assert logits(model).dtype == torch.float32
    assert {layer.compute_dtype for layer in model.modules() if isinstance(layer, Linear4bit)} == {torch.float32}


@pytest.mark.parametrize(("stated", "used"), [("float32", None), ("bfloat16", torch.bfloat16)])
def test_the_default_of_bitsandbytes_does_not_slow_other_dtypes_down(tmp_path: Path, stated: str, used: Any) -> None:
    """It notes float32 where nobody chose a dtype, which is several times slower than that of the activations."""
    out = quantized(tmp_path, "llama", "nf4", dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["qcore"]
    config["quantization_config"]["bnb_4bit_compute_dtype"] = stated
    (out / "config.json").write_text(json.dumps(config))
    assert {m.compute_dtype for m in load_model(out).modules() if isinstance(m, Linear4bit)} == {used}


def test_shards_load(tmp_path: Path) -> None:
    out = quantized(tmp_path, "llama", "nf4")
    quantize_checkpoint(tmp_path / "float", tmp_path / "shards", Options("nf4", shard_bytes=20_000))
    assert torch.equal(logits(load_model(out)), logits(load_model(tmp_path / "shards")))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    kept = load_file(folder / "model.safetensors") | tensors
    save_file({key: value for key, value in kept.items() if value is not None}, folder / "model.safetensors")


LAYER = "model.layers.1.mlp.up_proj"
DAMAGED: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no weight": ({f"{LAYER}.weight": None}, "up_proj"),
    "no absmax": ({f"{LAYER}.weight.absmax": None}, "absmax"),
    "no state": ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": None}, "up_proj"),
    "short weight": ({f"{LAYER}.weight": torch.zeros(5, 1, dtype=torch.uint8)}, "up_proj"),
    "no norm": ({"model.norm.weight": None}, "1 tensors are missing: model.norm.weight"),
    "short norm": ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight has shape \(3,\), the model \(72,\)"),
    "unknown": ({"model.extra.weight": torch.zeros(3)}, "1 tensors are not in the model: model.extra.weight"),
}


@pytest.mark.parametrize(("tensors", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_an_inconsistent_folder_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    out = quantized(tmp_path, "llama", "nf4")
    change(out, **tensors)
    with pytest.raises(FormatError, match=message):
        load_model(out)


def test_codes_are_not_taken_for_numbers(tmp_path: Path) -> None:
    """Without its quantization_config a quantized folder must not load as a float model."""
    out = quantized(tmp_path, "llama", "int8")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"is torch.int8 where the model has a float weight"):
        load_model(out)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    out = quantized(tmp_path, "llama", "nf4")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="quant_method is 'hqq'"):
        load_model(out)
