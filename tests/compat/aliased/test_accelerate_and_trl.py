"""accelerate's loader and TRL's trainer on quantized models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qcore


@pytest.mark.parametrize("bits", [4, 8])
def test_accelerate_loads_and_quantizes(checkpoint, tmp_path, bits):
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    # accelerate refuses "cpu" as a target of quantized layers; a torch.device it takes, from a torch file.
    torch.save(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict(), tmp_path / "pytorch_model.bin")
    device_map = {"": 0 if torch.cuda.is_available() else torch.device("cpu")}
    model = load_and_quantize_model(
        empty,
        BnbQuantizationConfig(**options),
        weights_location=str(tmp_path / "pytorch_model.bin"),
        device_map=device_map,
    )
    kind = qcore.nn.Linear4bit if bits == 4 else qcore.nn.Linear8bitLt
    assert type(model.model.layers[0].mlp.up_proj) is kind
    ids = torch.arange(3, 11).view(1, 8).to(model.device)
    assert torch.isfinite(model(ids).logits).all()


def test_sft_trainer_tunes_adapters_on_a_4bit_model(checkpoint, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from peft import LoraConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    rows = datasets.Dataset.from_dict({"text": ["the sky is blue because light scatters more in air"] * 8})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
