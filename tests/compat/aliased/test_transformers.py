"""transformers' own bitsandbytes quantizer over qcore's layers."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qcore

IDS = torch.arange(3, 19).view(2, 8)
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4+nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def load(checkpoint, **config):
    options = {"quantization_config": BitsAndBytesConfig(**config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", **options).eval()


def read_back(model):
    """The same model with every quantized layer replaced by a float one of the weight it stands for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            if isinstance(layer, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            else:
                weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
            plain.weight = torch.nn.Parameter(weight.float())
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_loads_saves_and_reloads(checkpoint, tmp_path, config):
    model = load(checkpoint, **config)
    layer = model.model.layers[1].mlp.down_proj
    expected = qcore.nn.Linear8bitLt if "load_in_8bit" in config else qcore.nn.Linear4bit
    assert type(layer) is expected
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        logits, want = model(IDS).logits, read_back(model)(IDS).logits
    # 4-bit layers compute with these very weights; int8 ones quantize their input as well.
    bound = 0.05 * want.std() if "load_in_8bit" in config else 1e-4
    assert (logits - want).abs().max() < bound
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = load(tmp_path)(IDS).logits
    assert torch.equal(again, logits)
    assert model.get_memory_footprint() < 0.75 * AutoModelForCausalLM.from_pretrained(checkpoint).get_memory_footprint()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 11)


def test_chosen_modules_stay_in_float32_on_the_cpu(checkpoint):
    here = torch.device("cpu")  # stands for a GPU: transformers leaves the modules at "cpu" unquantized
    device_map = {"model.embed_tokens": here, "model.norm": here, "model.rotary_emb": here, "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": here for index in (0, 1)} | {"model.layers.2": "cpu"}
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map=device_map)
    kinds = [type(layer.self_attn.q_proj).__name__ for layer in model.model.layers]
    assert kinds == ["Linear8bitLt", "Linear8bitLt", "Linear"]
    assert model.model.layers[2].self_attn.q_proj.weight.dtype == torch.float32
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_arguments_that_transformers_dropped_work_and_say_so(checkpoint, name):
    with pytest.warns(FutureWarning, match=f"BitsAndBytesConfig\\({name}=True\\)"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **{name: True})
    kind = bnb.nn.Linear8bitLt if name == "load_in_8bit" else bnb.nn.Linear4bit
    assert sum(isinstance(module, kind) for module in model.modules()) == 3 * 7


def test_a_dropped_argument_against_its_config_is_refused(checkpoint):
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(qcore.errors.InvalidArgument, match="load_in_8bit=True contradicts"):
        AutoModelForCausalLM.from_pretrained(checkpoint, load_in_8bit=True, quantization_config=config)
    AutoModelForCausalLM.from_pretrained(checkpoint, load_in_4bit=True, quantization_config=config)


def test_a_misspelt_option_is_answered_with_the_right_one():
    from bitsandbytes import BitsAndBytesConfig as Strict

    with pytest.raises(qcore.errors.InvalidArgument, match="did you mean load_in_4bit"):
        Strict(load_int_4bt=True)
    assert Strict.from_dict(Strict(load_in_4bit=True).to_dict()).load_in_4bit
