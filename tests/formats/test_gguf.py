"""A GGUF file gives the weights that Transformers' own loader gives, read whole or by rows."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import WORDS, save_model
from transformers import AutoModelForCausalLM

from qcore.errors import FormatError
from qcore.formats.gguf import GgufSource, hugging_face_name
from qcore.formats.plan import Options
from qcore.formats.quantize import quantize_checkpoint

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 128, 256, 2
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# The gguf package writes no K-quants: blocks of random bytes, whose scales are made finite.
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter puts them: the two halves of each head, alternating."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A two-layer model under Hugging Face's names, in float32."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (48, WIDTH), "lm_head": (48, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (WIDTH,),
            f"{prefix}.post_attention_layernorm": (WIDTH,),
            f"{prefix}.self_attn.q_proj": (WIDTH, WIDTH),
            f"{prefix}.self_attn.k_proj": (WIDTH // 2, WIDTH),
            f"{prefix}.self_attn.v_proj": (WIDTH // 2, WIDTH),
            f"{prefix}.self_attn.o_proj": (WIDTH, WIDTH),
            f"{prefix}.mlp.gate_proj": (INNER, WIDTH),
            f"{prefix}.mlp.up_proj": (INNER, WIDTH),
            f"{prefix}.mlp.down_proj": (WIDTH, INNER),
        }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    parts = stem.split(".")
    return f"blk.{parts[2]}.{NAMES[parts[-1]]}.weight"


def write_gguf(path: Path, type_name: str, architecture: str = "llama", **extra: np.ndarray) -> dict[str, np.ndarray]:
    """Write a model with its matrices in ``type_name``; returns the float32 values that the file holds."""
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(48)
    tokens = [*dict.fromkeys([*WORDS, "t", "h", "e", "th"])]
    tokens += [f"w{index}" for index in range(48 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 48)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    held = {}
    for name, value in tensors().items():
        permuted = value
        if architecture == "llama" and ".q_proj." in name:
            permuted = interleave(value, HEADS)
        elif architecture == "llama" and ".k_proj." in name:
            permuted = interleave(value, KV_HEADS)
        if value.ndim == 1:
            writer.add_tensor(gguf_name(name), permuted)
            held[name] = value
            continue
        packed = gguf.quants.quantize(permuted, kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        held[name] = gguf.quants.dequantize(packed, kind).reshape(value.shape)
    for name, value in extra.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("type_name", TYPES)
def test_weights_are_those_of_transformers(tmp_path: Path, type_name: str) -> None:
    write_gguf(tmp_path / "m.gguf", type_name)
    source = GgufSource(tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    state = model.state_dict()
    assert source.tensors.keys() == state.keys()
    for name in source.tensors:
        assert torch.equal(source.read(name).float(), state[name]), name
    source.close()


def test_queries_and_keys_are_put_back_in_order(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F32")
    source = GgufSource(tmp_path / "m.gguf")
    for name, value in tensors().items():
        assert np.array_equal(source.read(name).numpy(), value), name
    source.close()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures_are_in_order_already(tmp_path: Path, architecture: str) -> None:
    write_gguf(tmp_path / "m.gguf", "F32", architecture)
    source = GgufSource(tmp_path / "m.gguf")
    for name, value in tensors().items():
        assert np.array_equal(source.read(name).numpy(), value), name
    source.close()


@pytest.mark.parametrize("type_name", ["F16", "Q4_1", "Q8_0"])
def test_rows_are_slices_of_the_whole(tmp_path: Path, type_name: str) -> None:
    write_gguf(tmp_path / "m.gguf", type_name)
    source = GgufSource(tmp_path / "m.gguf")
    for name, info in source.tensors.items():
        whole = source.read(name)
        for start in range(0, info.rows, max(info.row_group, 16)):
            stop = min(info.rows, start + max(info.row_group, 16))
            assert torch.equal(source.read_rows(name, start, stop), whole[start:stop]), name
    assert source.tensors["model.layers.0.self_attn.q_proj.weight"].row_group == WIDTH // HEADS
    source.close()


@pytest.mark.parametrize("type_name", K_QUANTS)
def test_k_quants_are_decoded_by_rows(tmp_path: Path, type_name: str) -> None:
    from transformers.integrations.gguf.dequant import GGML_NAME, dequantize

    kind = gguf.GGMLQuantizationType[type_name]
    assert GGML_NAME[kind.value] == type_name
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (8, 2 * block_bytes), dtype=np.uint8)
    halves = raw.view(np.uint16)
    halves &= 0x3BFF  # no float16 among them is infinite, NaN or large
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "m.gguf")
    (name,) = source.tensors
    expected = dequantize(torch.from_numpy(raw), kind.value, torch.float32).view(8, 512)
    together = torch.cat([source.read_rows(name, row, row + 2) for row in range(0, 8, 2)])
    assert torch.allclose(together, expected, rtol=1e-6, atol=1e-6)
    assert float(expected.abs().max()) > 0
    source.close()


def test_a_gguf_file_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "m.gguf", "Q8_0")
    quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "out", Options("float", dtype="float32"))
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["lm_head.weight"], torch.from_numpy(held["lm_head.weight"]))
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.arange(2, 20)[None]
    assert torch.equal(folder(ids).logits, direct(ids).logits)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_a_configuration_beside_the_file_comes_first(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F32")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "mark": 1}')
    source = GgufSource(tmp_path / "m.gguf")
    assert source.config()["mark"] == 1
    source.close()


def test_every_truncation_is_found(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "Q4_0")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data)
    GgufSource(tmp_path / "m.gguf").close()
    # Every length within the header, and some within the tensors.
    for length in [*range(0, 3000, 7), len(data) // 2, len(data) - 33]:
        (tmp_path / "t.gguf").write_bytes(data[:length])
        with pytest.raises(FormatError):
            GgufSource(tmp_path / "t.gguf")


def test_scaled_rotary_frequencies_need_a_configuration(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F32", **{"rope_freqs.weight": np.ones(16, np.float32)})
    with pytest.raises(FormatError, match=r"put the model's config.json into"):
        GgufSource(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("{}")
    GgufSource(tmp_path / "m.gguf").close()


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F32", **{"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)})
    with pytest.raises(FormatError, match=r"'blk.0.ffn_gate_exps.weight' has no place in a llama model"):
        GgufSource(tmp_path / "m.gguf")


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F32", "gemma2")
    with pytest.raises(FormatError, match="architecture 'gemma2'; known are llama, qwen2, qwen3"):
        GgufSource(tmp_path / "m.gguf")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF" + b"\x01" + bytes(99)])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(FormatError):
        GgufSource(tmp_path / "m.gguf")


def test_names_are_translated() -> None:
    assert hugging_face_name("blk.17.attn_q.bias") == "model.layers.17.self_attn.q_proj.bias"
    assert hugging_face_name("output_norm.weight") == "model.norm.weight"
    assert hugging_face_name("blk.0.token_embd.weight") is None
    assert hugging_face_name("attn_q.weight") is None


def test_the_model_of_the_names_is_the_one_of_the_tests(tmp_path: Path) -> None:
    """Names here and names in a saved model agree."""
    saved = load_file(save_model("llama", tmp_path / "float") / "model.safetensors")
    assert {hugging_face_name(gguf_name(name)) for name in saved} == set(saved)
