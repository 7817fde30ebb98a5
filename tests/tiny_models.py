"""Tiny checkpoints made from a configuration and a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
)

_SENTENCE = "the sky is blue because light of short waves scatters more in air than long"
WORDS = ["<s>", "</s>", "<unk>", *_SENTENCE.split()]

# Widths that no block size divides: 72 * 40 is no multiple of 64 in a row, 23 rows make an odd tail.
_LLAMA: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def config_of(name: str) -> PretrainedConfig:
    """The configuration called ``name``.

    llama, llama-tied, qwen2 (biases), gpt2 (transposed weights); mixtral, qwen2-moe and gpt-oss have fused experts,
    qwen2-moe a shared one beside them, and those of gpt-oss are transposed, interleaved and have biases.
    """
    if name == "llama":
        return LlamaConfig(**_LLAMA, tie_word_embeddings=False)
    if name == "llama-tied":
        return LlamaConfig(**_LLAMA, tie_word_embeddings=True)
    if name == "qwen2":
        return Qwen2Config(**_LLAMA, tie_word_embeddings=False)
    if name == "gpt2":
        return GPT2Config(
            vocab_size=48, n_embd=72, n_layer=2, n_head=6, n_positions=128, bos_token_id=0, eos_token_id=1
        )
    if name == "mixtral":
        return MixtralConfig(**_LLAMA, num_local_experts=4)
    if name == "qwen2-moe":
        return Qwen2MoeConfig(
            **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=56
        )
    if name == "gpt-oss":
        return GptOssConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=12)
    raise KeyError(name)


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shard: str = "2GB") -> Path:
    """Write a model with random weights, biases and norms to ``folder``, with a tokenizer of a few words."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
