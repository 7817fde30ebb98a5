"""GGUF files of the Llama family as a source of float weights, read by rows.

llama.cpp keeps the rows of each query and key head in the order of its rotary embedding (pairs interleaved); Hugging
Face models keep them half by half. Within a head of 2n rows, row ``half * n + i`` here is row ``2 * i + half`` there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore.errors import FormatError
from qcore.formats.gguf_header import GgufTensor, read_gguf_header
from qcore.formats.safetensors import read_exactly
from qcore.formats.source import Source, TensorInfo, read_json

# Architectures whose tensors carry the Hugging Face values under other names; for the rest (Gemma's shifted norms,
# fused experts) a conversion would be silently wrong.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_PERMUTED = ("llama",)

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Scaling factors of the rotary embedding: config.json states them, the file's metadata does not.
_ROPE_FACTORS = "rope_freqs.weight"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def hugging_face_name(name: str) -> str | None:
    """Translate a GGUF tensor name of the Llama family; ``None`` if it has no counterpart."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, stem, kind = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{kind}" if stem in _TOP else None
    return f"model.layers.{layer}.{_LAYER[stem]}.{kind}" if stem in _LAYER else None


class GgufSource(Source):
    """A GGUF file; ``config.json`` and tokenizer come from files beside it, else from its metadata."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        header = read_gguf_header(path)
        self._fields = header.fields
        self._gguf: dict[str, GgufTensor] = {}
        self._architecture = header.fields.get("general.architecture")
        if self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise FormatError(f"{path}: GGUF architecture {self._architecture!r}; known are {known}")
        self.tensors: dict[str, TensorInfo] = {}
        for tensor in sorted(header.tensors.values(), key=lambda t: t.start):
            if tensor.name != _ROPE_FACTORS:
                self._add(tensor)
        if _ROPE_FACTORS in header.tensors and not (path.parent / "config.json").is_file():
            raise FormatError(
                f"{path}: has scaled rotary frequencies ({_ROPE_FACTORS}), which its metadata does not describe; "
                f"put the model's config.json into {path.parent}"
            )
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _add(self, tensor: GgufTensor) -> None:
        name = hugging_face_name(tensor.name)
        if name is None:
            raise FormatError(f"{self.path}: tensor {tensor.name!r} has no place in a {self._architecture} model")
        row_group = self._head_rows(tensor) if self._architecture in _PERMUTED else 1
        dtype = _TORCH_TYPES.get(tensor.type_name, torch.float32)
        self._gguf[name] = tensor
        self.tensors[name] = TensorInfo(name, dtype, tensor.shape, tensor.nbytes, row_group)

    def _head_rows(self, tensor: GgufTensor) -> int:
        """Rows of one head of a query or key tensor; 1 for a tensor whose rows are in order."""
        if ".attn_q." not in tensor.name and ".attn_k." not in tensor.name:
            return 1
        key = "attention.head_count" if ".attn_q." in tensor.name else "attention.head_count_kv"
        heads = self._fields.get(f"{self._architecture}.{key}", self._fields.get("llama.attention.head_count"))
        if not isinstance(heads, int) or heads < 1 or tensor.shape[0] % (2 * heads):
            raise FormatError(f"{self.path}: {tensor.name} has {tensor.shape[0]} rows, {key} is {heads}")
        return tensor.shape[0] // heads

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        info, tensor = self.tensors[name], self._gguf[name]
        if len(tensor.shape) == 1:
            # The whole tensor is one row of blocks.
            return self._decode(tensor, 0, 1).reshape(tensor.shape)[start:stop].clone()
        values = self._decode(tensor, start, stop).reshape(stop - start, *tensor.shape[1:])
        if info.row_group == 1:
            return values
        halves = values.reshape(-1, info.row_group // 2, 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)

    def _decode(self, tensor: GgufTensor, start: int, stop: int) -> Tensor:
        raw = torch.empty((stop - start, tensor.row_bytes), dtype=torch.uint8)
        read_exactly(self._fd, raw, tensor.start + start * tensor.row_bytes, f"{self.path}: tensor {tensor.name!r}")
        if tensor.type_name in _TORCH_TYPES:
            return raw.view(_TORCH_TYPES[tensor.type_name])
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[tensor.type_name]))
        except NotImplementedError as error:
            raise FormatError(
                f"{self.path}: tensor {tensor.name!r}: type {tensor.type_name} is not supported"
            ) from error

    def config(self) -> dict[str, Any]:
        beside = self.path.parent / "config.json"
        if beside.is_file():
            given = read_json(beside)
            if not isinstance(given, dict):
                raise FormatError(f"{beside}: is not a JSON object")
            return given
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        except Exception as error:
            raise FormatError(f"{self.path}: Transformers makes no configuration of its metadata: {error}") from error
        result = dict(config.to_diff_dict())
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            result.pop(key, None)
        if not result.get("architectures"):
            from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

            result["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        return result

    def write_companions(self, out: Path) -> None:
        import shutil

        beside = [self.path.parent / name for name in (*_TOKENIZER_FILES, "generation_config.json")]
        for file in beside:
            if file.is_file():
                shutil.copyfile(file, out / file.name)
        if not (self.path.parent / _TOKENIZER_FILES[0]).is_file():
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
            except Exception as error:
                raise FormatError(f"{self.path}: Transformers makes no tokenizer of its metadata: {error}") from error
            tokenizer.save_pretrained(str(out))

    def close(self) -> None:
        os.close(self._fd)
