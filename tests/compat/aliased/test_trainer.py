"""transformers' Trainer with bitsandbytes' optimizers by name."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from tiny_models import config_of
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qcore

ROW = {"input_ids": list(range(3, 11)), "attention_mask": [1] * 8, "labels": list(range(3, 11))}
# Every name that the Trainer looks up in bitsandbytes.
NAMES = {
    "adamw_bnb_8bit": bnb.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW,
    "paged_adamw_32bit": bnb.optim.AdamW,
    "paged_adamw_8bit": bnb.optim.AdamW,
    "ademamix": bnb.optim.AdEMAMix,
    "ademamix_8bit": bnb.optim.AdEMAMix,
    "paged_ademamix_32bit": bnb.optim.AdEMAMix,
    "paged_ademamix_8bit": bnb.optim.AdEMAMix,
    "lion_32bit": bnb.optim.Lion,
    "lion_8bit": bnb.optim.Lion,
    "paged_lion_32bit": bnb.optim.Lion,
    "paged_lion_8bit": bnb.optim.Lion,
    "rmsprop_bnb": bnb.optim.RMSprop,
    "rmsprop_bnb_8bit": bnb.optim.RMSprop,
    "rmsprop_bnb_32bit": bnb.optim.RMSprop,
}


def test_the_names_are_all_that_the_trainer_has():
    from transformers import trainer_optimizer

    assert {name.value for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_by_name_trains_in_its_bits(tmp_path, name):
    config = config_of("llama")
    config.vocab_size = 128  # an embedding of 9216 values: 8-bit state unless somebody asks for 32
    model = AutoModelForCausalLM.from_config(config)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, optim=name, learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[ROW] * 8)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is NAMES[name]
    assert isinstance(optimizer, getattr(qcore.optim, type(optimizer).__name__))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert optimizer.defaults["is_paged"] == name.startswith("paged")
    state = optimizer.state[model.model.layers[0].mlp.up_proj.weight]
    assert state["state1"].dtype == (torch.uint8 if name.endswith("8bit") else torch.float32)
    # The Trainer keeps embeddings in 32 bits, which it asks for by the optimizer's name.
    assert optimizer.state[model.model.embed_tokens.weight]["state1"].dtype == torch.float32


def test_the_names_are_bitsandbytes():
    from bitsandbytes.optim.adamw import AdamW8bit
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert "bitsandbytes" in str(AdamW8bit)
    assert issubclass(AdamW8bit, qcore.optim.AdamW8bit)
    assert issubclass(Optimizer8bit, torch.optim.Optimizer)
    assert bnb.optim.GlobalOptimManager is qcore.optim.GlobalOptimManager
