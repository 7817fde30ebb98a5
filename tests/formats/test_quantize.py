"""A quantized folder loads in Transformers with bitsandbytes, bit for bit, and its error is what the report says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import contents, save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qcore.backend import Backend
from qcore.errors import FormatError, InvalidArgument, Unsupported
from qcore.formats.plan import Options
from qcore.formats.quantize import Report, quantize_checkpoint
from qcore.integrations.checkpoint import load_model

FORMATS = [
    ("nf4", {"double_quant": True}),
    ("nf4", {"double_quant": False, "blocksize": 128}),
    ("fp4", {"double_quant": True, "blocksize": 32}),
    ("fp4", {"double_quant": False}),
    ("int8", {}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in FORMATS]


def quantize(source: Path, out: Path, format_: str, **options: object) -> Report:
    return quantize_checkpoint(source, out, Options(format_, **options))  # type: ignore[arg-type]


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The weight that bitsandbytes' layer holds, in float64, by the definition of the formats."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        return weight.data.double() * weight.SCB.double()[:, None] / 127
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        nested = state.state2
        scale = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.long()].double() * scale.double() + state.offset.double()
    codes = torch.stack([weight.data.view(-1) >> 4, weight.data.view(-1) & 15], 1).view(-1)[: math.prod(state.shape)]
    scales = absmax.double().repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.long()].double() * scales).view(state.shape)


def by_bitsandbytes(folder: Path) -> Any:
    """The folder with bitsandbytes' layers: its own configuration asks for them, where qcore is imported too."""
    section = json.loads((folder / "config.json").read_text()).get("quantization_config")
    theirs = None if section is None else BitsAndBytesConfig.from_dict(section)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=theirs)


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize(("format_", "options"), FORMATS, ids=IDS)
def test_bitsandbytes_loads_it_bit_for_bit(
    tmp_path: Path, backend: Backend, name: str, format_: str, options: dict[str, object]
) -> None:
    source = save_model(name, tmp_path / "float")
    quantize(source, tmp_path / "out", format_, **options)
    model = by_bitsandbytes(tmp_path / "out")
    written, original = load_file(tmp_path / "out/model.safetensors"), load_file(source / "model.safetensors")
    assert model.dtype == torch.bfloat16
    layers = quantized_layers(model)
    assert len(layers) == (2 * 4 if name == "gpt2" else 3 * 7)
    for layer, module in layers.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, written.pop(f"{layer}.{key}")), f"{layer}.{key}"
        weight = original.pop(f"{layer}.weight")
        weight = weight.t() if name == "gpt2" else weight
        scale = weight.double().abs().max()
        assert float((dequantized(module) - weight.double()).abs().max()) < 0.2 * scale
    for key, value in written.items():
        assert torch.equal(value, original[key]), key
    ids = torch.arange(2, 20)[None]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(("format_", "options"), FORMATS, ids=IDS)
def test_the_reported_error_is_that_of_the_written_weights(
    tmp_path: Path, backend: Backend, format_: str, options: dict[str, object]
) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    report = quantize(source, tmp_path / "out", format_, **options)
    original = load_file(source / "model.safetensors")
    error, signal = dict.fromkeys((row.kind for row in report.rows), 0.0), {}
    signal = dict(error)
    for name, module in quantized_layers(by_bitsandbytes(tmp_path / "out")).items():
        weight, kind = original[f"{name}.weight"].double(), name.rsplit(".", 1)[1]
        error[kind] += float((dequantized(module) - weight).square().sum())
        signal[kind] += float(weight.square().sum())
    rows = [row for row in report.rows if row.action == format_]
    assert len(rows) == 7
    for row in rows:
        assert row.relative == pytest.approx(math.sqrt(error[row.kind] / signal[row.kind]), rel=1e-4)
        assert 0.001 < row.relative <= row.worst < 0.15


def test_the_codes_are_those_that_bitsandbytes_makes(tmp_path: Path) -> None:
    """Of the same bfloat16 weights; bitsandbytes' CPU code differs from its CUDA code in rare ties only."""
    source = save_model("llama", tmp_path / "float")
    quantize(source, tmp_path / "out", "nf4", double_quant=False)
    ours = load_file(tmp_path / "out/model.safetensors")
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" in name:
            packed, state = bnb.functional.quantize_nf4(weight, blocksize=64)
            assert torch.equal(ours[f"{name}.absmax"], state.absmax), name
            assert float((ours[name] != packed).float().mean()) < 0.002, name


def test_a_wider_source_is_not_rounded_first(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    quantize(source, tmp_path / "out", "nf4", dtype="bfloat16", double_quant=False)
    written = load_file(tmp_path / "out/model.safetensors")
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight.absmax"][0], weight.flatten()[:64].abs().max())
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    state = bytes(written["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"].numpy())
    assert json.loads(state) == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [104, 72]}


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is read in many pieces gives the same file as one that is read whole."""
    source = save_model("llama", tmp_path / "float")
    for out, chunk in (("whole", 1 << 20), ("pieces", 500)):
        monkeypatch.setattr("qcore.formats.convert.CHUNK_NUMEL", chunk)
        quantize(source, tmp_path / out, "nf4")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "pieces/model.safetensors").read_bytes()


def test_shards_in_and_out(tmp_path: Path) -> None:
    whole = save_model("llama", tmp_path / "whole")
    shards = save_model("llama", tmp_path / "shards", shard="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    quantize(whole, tmp_path / "a", "nf4")
    quantize(shards, tmp_path / "b", "nf4", shard_bytes=30_000)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    single = load_file(tmp_path / "a/model.safetensors")
    assert together.keys() == single.keys()
    assert all(torch.equal(tensor, single[name]) for name, tensor in together.items())
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in together.values())
    one, other = (by_bitsandbytes(tmp_path / name) for name in "ab")
    ids = torch.arange(2, 20)[None]
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_skips_are_named_in_full_and_honoured(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    quantize(source, tmp_path / "out", "nf4", skip=("lm_head", "model.layers.0", "*.2.*.down_proj", "q_proj"))
    skipped = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert len(skipped) == 1 + 7 + 1 + 2
    layers = quantized_layers(by_bitsandbytes(tmp_path / "out"))
    assert len(layers) == 3 * 7 - 10
    assert not any(layer.startswith("model.layers.0.") or layer.endswith("q_proj") for layer in layers)


def test_the_head_is_quantized_on_demand(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    quantize(source, tmp_path / "out", "nf4", quantize_head=True)
    assert "lm_head" in quantized_layers(by_bitsandbytes(tmp_path / "out"))


def test_a_tied_head_cannot_be_quantized(tmp_path: Path) -> None:
    source = save_model("llama-tied", tmp_path / "float")
    with pytest.raises(InvalidArgument, match="share their values"):
        quantize(source, tmp_path / "out", "nf4", quantize_head=True)


def test_conversion_without_quantization_keeps_the_values(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    report = quantize(source, tmp_path / "out", "float")
    one, other = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert {row.error for row in report.rows} == {0.0}


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (with None) remove tensors of a checkpoint."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors") | change
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_a_tied_head_that_is_stored_twice_is_written_once(tmp_path: Path) -> None:
    source = save_model("llama-tied", tmp_path / "float")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(source, {"lm_head.weight": embedding.clone()})
    report = quantize(source, tmp_path / "out", "nf4")
    assert report.dropped == ["lm_head.weight"]
    model = by_bitsandbytes(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_with_values_of_its_own_is_kept(tmp_path: Path) -> None:
    source = save_model("llama-tied", tmp_path / "float")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(source, {"lm_head.weight": embedding + 1})
    quantize(source, tmp_path / "out", "nf4")
    model = by_bitsandbytes(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, embedding + 1)


NAME = "model.layers.1.self_attn.k_proj.weight"
ODD = {
    "missing": ({NAME: None}, "1 tensors of LlamaForCausalLM are missing"),
    "unknown": ({"model.extra.weight": torch.zeros(2)}, "1 tensors have no place in LlamaForCausalLM"),
    "wrong shape": ({NAME: torch.zeros(3, 3)}, r"has shape \(3, 3\), config.json asks for \(24, 72\)"),
    "integers": ({NAME: torch.zeros(24, 72, dtype=torch.int32)}, "must be floating point"),
    "NaN": ({NAME: torch.full((24, 72), math.nan)}, "1728 values that are NaN or infinite"),
    "infinity": ({NAME: torch.full((24, 72), math.inf, dtype=torch.float16)}, "1728 values that are NaN or infinite"),
}


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD.keys())
def test_a_source_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    source = save_model("llama", tmp_path / "float")
    rewrite(source, change)
    with pytest.raises(FormatError, match=message):
        quantize(source, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_unknown_tensors_are_copied_on_demand(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    rewrite(source, {"model.extra.weight": torch.arange(5, dtype=torch.int64)})
    quantize(source, tmp_path / "out", "nf4", keep_unknown=True)
    assert load_file(tmp_path / "out/model.safetensors")["model.extra.weight"].tolist() == [0, 1, 2, 3, 4]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    rewrite(source, {"model.norm.weight": torch.full((72,), 1e6)})
    with pytest.raises(FormatError, match=r"'model.norm.weight' has values beyond the range of torch.float16"):
        quantize(source, tmp_path / "out", "nf4", dtype="float16")


@pytest.mark.parametrize("config", [b"", b"[1]", b'{"model_type": "nosuch"}', b'{"model_type": "t5"}'])
def test_a_damaged_configuration_is_refused(tmp_path: Path, config: bytes) -> None:
    source = save_model("llama", tmp_path / "float")
    (source / "config.json").write_bytes(config)
    with pytest.raises(FormatError):
        quantize(source, tmp_path / "out", "nf4")


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    quantize(source, tmp_path / "out", "nf4")
    with pytest.raises(FormatError, match="is quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", "nf4")


def test_an_index_must_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float", shard="50KB")
    index = source / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["lm_head.weight"] = "../float/model.safetensors"
    index.write_text(json.dumps(names))
    with pytest.raises(FormatError, match="is not a file name"):
        quantize(source, tmp_path / "out", "nf4")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float", shard="50KB")
    sorted(source.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FormatError, match="is not there; the checkpoint is incomplete"):
        quantize(source, tmp_path / "out", "nf4")


@pytest.mark.parametrize(
    "options", [{"blocksize": 48}, {"format": "nf5"}, {"dtype": "int8"}, {"shard_bytes": 0}, {"compute_dtype": "f4"}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Options(**{"format": "nf4", **options})  # type: ignore[arg-type]


def respell(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(old, new): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_of_other_writers_are_understood(tmp_path: Path) -> None:
    """GPT-2 on the hub is written without the prefix that the class for text generation gives its names."""
    source = save_model("gpt2", tmp_path / "float")
    quantize(source, tmp_path / "out", "nf4")
    expected = logits_of(load_model(source))
    respell(source, "transformer.", "")
    quantize(source, tmp_path / "respelt", "nf4")
    assert contents(tmp_path / "out") == contents(tmp_path / "respelt")
    assert torch.equal(logits_of(load_model(source)), expected)
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.ln_f.bias"] = tensors["ln_f.bias"] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"ln_f\.bias are both transformer\.ln_f\.bias of GPT2LMHeadModel"):
        quantize(source, tmp_path / "twice", "nf4")


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("format_", ["nf4", "gptq"])
def test_experts_in_pieces_are_refused_with_the_way_to_quantize_them(tmp_path: Path, format_: str) -> None:
    """Mixtral's experts are matrices in the file and one parameter in the model."""
    source = save_model("mixtral", tmp_path / "float")
    says = "keeps 36 of the tensors fused, such as model.layers.0.block_sparse_moe.experts.0.w1.weight in"
    with pytest.raises(Unsupported, match=says):
        quantize(source, tmp_path / "out", format_, group_size=8)
    with pytest.raises(Unsupported, match=says):
        load_model(source)
    assert not (tmp_path / "out").exists()
