"""PEFT's dispatch on bitsandbytes' layers: adapters train, merge, unmerge, save and reload."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qcore

IDS = torch.arange(3, 35).view(4, 8)
CONFIGS = {
    "4bit": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), Linear4bit, qcore.nn.Linear4bit),
    "8bit": (BitsAndBytesConfig(load_in_8bit=True), Linear8bitLt, qcore.nn.Linear8bitLt),
}


def base(checkpoint, config):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def train(model, steps=6):
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", CONFIGS)
def test_adapters_train_merge_and_reload(checkpoint, tmp_path, bits, kind):
    config, wrapper, layer = CONFIGS[bits]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=kind == "dora")
    model = get_peft_model(base(checkpoint, config), lora)
    wrapped = [module for module in model.modules() if isinstance(module, wrapper)]
    assert len(wrapped) == 9
    assert all(type(module.get_base_layer()) is layer for module in wrapped)
    codes = wrapped[0].get_base_layer().weight.data.clone()
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(wrapped[0].get_base_layer().weight.data, codes)
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(checkpoint, config), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)
        spread = logits.std()
        with pytest.warns(UserWarning, match="rounding errors"):
            model.merge_adapter()
        assert not torch.equal(wrapped[0].get_base_layer().weight.data, codes)
        assert (model(IDS).logits - logits).abs().mean() < 0.3 * spread
        with pytest.warns(UserWarning, match="rounding errors"):
            model.unmerge_adapter()
        assert (model(IDS).logits - logits).abs().mean() < 0.3 * spread
        merged = again.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is layer


def test_a_parameter_is_rebuilt_from_its_own_attributes(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=CONFIGS["4bit"][0])
    old = model.model.layers[0].mlp.up_proj.weight
    new = qcore.nn.Params4bit(old.data, requires_grad=False, **old.__dict__)
    assert type(new).__name__ == "Params4bit"
    assert new.quant_state is old.quant_state
    eight = qcore.nn.Linear8bitLt(8, 4, has_fp16_weights=False).to("cpu").weight
    assert torch.equal(qcore.nn.Int8Params(eight.data, requires_grad=False, **eight.__dict__).SCB, eight.SCB)
