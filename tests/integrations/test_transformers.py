"""from_pretrained quantizes, saves and reloads, beside bitsandbytes and the command line, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from torch.nn.functional import pad
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    ResNetConfig,
    ResNetModel,
)

import qcore
from fake_hub import running_hub
from qcore import QcoreConfig, codebooks
from qcore.errors import BackendUnavailable, FormatError, InvalidArgument, InvalidDtype
from qcore.formats.plan import Options
from qcore.formats.quantize import quantize_checkpoint
from qcore.integrations.checkpoint import load_model
from qcore.nn import Linear4bit, Linear8bitLt

IDS = torch.arange(2, 20)[None]
FP4 = torch.tensor(codebooks.FP4, dtype=torch.float64)
FORMATS = ["nf4", "fp4", "int8"]


def load(path: Path, config: Any = None, **options: Any) -> Any:
    # Passed as None it would take the place of the checkpoint's own.
    passed = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(path, **passed, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)


def quantized_layers(model: Any) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_it_saves_what_the_command_line_writes_and_reloads_it(tmp_path: Path, name: str, format_: str) -> None:
    source = save_model(name, tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "command", Options(format_))
    model = load(source, QcoreConfig(format_))
    assert len(quantized_layers(model)) == (2 * 4 if name == "gpt2" else 3 * 7)
    assert model.is_loaded_in_8bit == (format_ == "int8") != model.is_loaded_in_4bit
    model.save_pretrained(tmp_path / "saved")
    assert equal(tensors(tmp_path / "saved"), tensors(tmp_path / "command"))
    for folder in ("saved", "command"):
        again = load(tmp_path / folder)
        assert quantized_layers(again) == quantized_layers(model)
        assert torch.equal(logits(again), logits(model)), folder
    again.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "shards", device_map="cpu")), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert equal(tensors(tmp_path / "again"), tensors(tmp_path / "saved"))
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))


def assert_equal_but_for_zeros_and_ties(one: Any, other: Any, source: Any) -> None:
    """bitsandbytes on the CPU takes the other FP4 code of 0, and at a midpoint may take the other neighbour."""
    codes = {name for name in one if f"{name}.absmax" in one}
    one_rest, other_rest = ({name: each[name] for name in each.keys() - codes} for each in (one, other))
    assert len(codes) == 21
    assert equal(one_rest, other_rest)
    for name in codes:
        weight = source[name].double().flatten()
        absmax = pad(weight.abs(), (0, -len(weight) % 64)).view(-1, 64).amax(1).repeat_interleave(64)[: len(weight)]
        first, second = (
            FP4[torch.stack([each[name] >> 4, each[name] & 15], -1).flatten().long()] for each in (one, other)
        )
        differs = first != second
        middle = (first[differs] + second[differs]) / 2
        torch.testing.assert_close((weight / absmax)[differs], middle, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("format_", "nested"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)])
def test_bitsandbytes_and_qcore_load_each_others_folders(tmp_path: Path, format_: str, nested: bool) -> None:
    source = save_model("llama", tmp_path / "float")
    four = format_ != "int8"
    kind = {"bnb_4bit_quant_type": format_} if four else {}
    config = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_use_double_quant=nested, **kind)
    written = load(source, config, dtype=torch.float32)
    written.save_pretrained(tmp_path / "theirs")
    ours = load(source, QcoreConfig(format_, **({"double_quant": nested} if four else {})), dtype=torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    assert ours.get_memory_footprint() <= written.get_memory_footprint()
    reloaded = load(tmp_path / "theirs", QcoreConfig(format_))
    assert len(quantized_layers(reloaded)) == 21
    reloaded.save_pretrained(tmp_path / "resaved")
    assert equal(tensors(tmp_path / "resaved"), tensors(tmp_path / "theirs"))
    if format_ == "nf4":
        assert equal(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    if format_ == "fp4":
        assert_equal_but_for_zeros_and_ties(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"), tensors(source))
    if four:
        for name in quantized_layers(reloaded):
            weight, their = (model.get_submodule(name).weight for model in (reloaded, written))
            expected = bitsandbytes.functional.dequantize_4bit(their.data, their.quant_state)
            assert torch.equal(qcore.functional.dequantize_4bit(weight.data, weight.quant_state), expected), name
    # In eval mode its layers repack their weights on some processors.
    theirs = load(tmp_path / "ours", config).train()
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    for mine, other in ((ours, theirs), (reloaded, written.train())):
        expected = logits(other)
        assert float((logits(mine) - expected).norm() / expected.norm()) < (1e-5 if four else 0.03)
    # A folder that bitsandbytes wrote is bitsandbytes' unless qcore is asked for.
    assert type(load(tmp_path / "theirs").model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")


WITHOUT_QCORE = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
sys.modules["bitsandbytes"] = None
for folder, error in (({dense!r}, ImportError), ({moe!r}, RuntimeError)):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except error:
        continue
    raise SystemExit(f"{{folder}} loaded without the library that understands it")
import qcore
for folder in ({dense!r}, {moe!r}):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(type(module).__module__.startswith("qcore.nn") for module in model.modules())
"""


def test_without_qcore_loading_fails_and_with_it_the_order_of_imports_is_free(tmp_path: Path) -> None:
    """int8 codes have the shape of the weight: nothing but the layout keeps them from being taken for numbers."""
    source = save_model("llama", tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "dense", Options("int8"))
    save_model("mixtral", tmp_path / "moe-float")
    load(tmp_path / "moe-float", QcoreConfig("int8")).save_pretrained(tmp_path / "moe")
    program = WITHOUT_QCORE.format(dense=str(tmp_path / "dense"), moe=str(tmp_path / "moe"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_dtype_skips_head_and_footprint(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    plain = load(source, dtype=torch.float32)
    model = load(source, QcoreConfig("nf4", skip_modules=["up_proj", "model.layers.1"]), dtype=torch.float32)
    kinds = {name.rsplit(".", 1)[-1] for name in quantized_layers(model)}
    assert len(quantized_layers(model)) == 2 * 6
    assert "up_proj" not in kinds
    assert not any(".1." in name for name in quantized_layers(model))
    assert model.dtype == torch.float32
    assert model.get_memory_footprint() < plain.get_memory_footprint()
    model.save_pretrained(tmp_path / "out")
    assert quantized_layers(load(tmp_path / "out")) == quantized_layers(model)
    head = load(source, QcoreConfig("int8", quantize_head=True))
    assert "lm_head" in quantized_layers(head)
    full, part = load(source, QcoreConfig("nf4"), dtype=torch.bfloat16), load(source, QcoreConfig("nf4"))
    assert torch.equal(logits(full), logits(part))  # the checkpoint is bfloat16, and so is what is computed
    computed = load(source, QcoreConfig("nf4", compute_dtype="float32"), dtype=torch.bfloat16)
    assert {m.compute_dtype for m in computed.modules() if isinstance(m, Linear4bit)} == {torch.float32}
    assert logits(computed).dtype == torch.bfloat16


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dequantize_gives_the_float_model_of_the_codes(tmp_path: Path, name: str, format_: str) -> None:
    source = save_model(name, tmp_path / "float")
    model = load(source, QcoreConfig(format_, **({"threshold": 0.0} if format_ == "int8" else {})), dtype=torch.float32)
    before = logits(model)
    model.save_pretrained(tmp_path / "quantized")  # leaves a string where Transformers then looks for a dtype
    plain = model.dequantize()
    assert not quantized_layers(plain)
    # int8 products round the activations, too.
    assert float((logits(plain) - before).norm() / before.norm()) < (0.02 if format_ == "int8" else 1e-5)
    plain.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain", dtype=torch.float32)
    assert tensors(tmp_path / "plain").keys() == tensors(source).keys()
    assert torch.equal(logits(again), logits(plain))


def test_generation_is_the_same_with_a_static_cache_and_under_compile(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    for format_ in ("nf4", "int8"):
        model = load(source, QcoreConfig(format_), dtype=torch.float32)
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown format": ({"format": "nf5"}, InvalidArgument, "format is 'nf5', expected nf4, fp4, int8, gptq or awq"),
    "no format": ({}, InvalidArgument, "format is None, expected nf4, fp4, int8, gptq or awq, as in QcoreConfig"),
    "unknown argument": ({"format": "nf4", "block_size": 64}, InvalidArgument, "did you mean blocksize"),
    "name of bitsandbytes": ({"format": "nf4", "llm_int8_skip_modules": []}, InvalidArgument, "did you mean skip_mod"),
    "threshold": ({"format": "int8", "threshold": -1}, InvalidArgument, "threshold is -1"),
    "no flag": ({"format": "nf4", "double_quant": "yes"}, InvalidArgument, "double_quant is 'yes', expected True or"),
    "block size": ({"format": "nf4", "blocksize": 48}, InvalidArgument, "blocksize is 48"),
    "dtype": ({"format": "nf4", "compute_dtype": "int32"}, InvalidDtype, "compute_dtype is 'int32'"),
    "no dtype": ({"format": "nf4", "compute_dtype": "bf16"}, FormatError, "'bf16', which is no dtype"),
    "string": ({"format": "nf4", "skip_modules": "lm_head"}, InvalidArgument, "needs a list of names"),
    "no list": ({"format": "nf4", "skip_modules": 5}, InvalidArgument, "skip_modules is 5, expected a list"),
    "no names": ({"format": "nf4", "skip_modules": [1]}, InvalidArgument, r"skip_modules is \[1\], expected names"),
    "empty name": ({"format": "nf4", "skip_modules": [""]}, InvalidArgument, "expected names, which are not empty"),
    "float block size": ({"format": "nf4", "blocksize": 64.0}, InvalidArgument, "blocksize is 64.0"),
    "flag as a number": ({"format": "int8", "threshold": True}, InvalidArgument, "threshold is True"),
    "number as a flag": ({"format": "nf4", "fp32_cpu_offload": 1}, InvalidArgument, "fp32_cpu_offload is 1, expected"),
    "of int8": ({"format": "nf4", "threshold": 3.0}, InvalidArgument, r"threshold=3.0, which nf4 does not have \(int8"),
    "of 4 bits": ({"format": "int8", "blocksize": 128}, InvalidArgument, "blocksize=128, which int8 does not have"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_wrong_configuration_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QcoreConfig(**arguments)


BAD_LOADS: dict[str, tuple[str, Any, dict[str, Any], type[Exception], str]] = {
    "skip": ("llama", {"skip_modules": ["up_prj"]}, {}, InvalidArgument, "'up_prj', which matches no layer"),
    "no pattern": ("llama", {"skip_modules": ["*.up_proj"]}, {}, InvalidArgument, "is no regular expression"),
    "all skipped": ("llama", {"skip_modules": ["model"]}, {}, InvalidArgument, "every linear layer of LlamaFor"),
    "tied": ("llama-tied", {"quantize_head": True}, {}, InvalidArgument, "share their values"),
    "no map": ("llama", {"fp32_cpu_offload": True}, {"device_map": "auto"}, InvalidArgument, "that names modules"),
    "dtype": ("llama", {}, {"dtype": torch.float64}, InvalidDtype, "dtype is torch.float64"),
    "no gpu": ("llama", {}, {"device_map": "cuda:0"}, BackendUnavailable, "sees no such device"),
    "no gpu in map": ("llama", {}, {"device_map": {"": 0}}, BackendUnavailable, "sees no such device"),
}


@pytest.mark.parametrize(("name", "arguments", "options", "error", "message"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_a_load_that_makes_no_sense_is_refused(
    tmp_path: Path, name: str, arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "device_map" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        load(save_model(name, tmp_path), QcoreConfig("nf4", **arguments), **options)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_stages=1)
    ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="ResNetModel has no linear layer to quantize; leave quantization_config"):
        ResNetModel.from_pretrained(tmp_path, quantization_config=QcoreConfig("nf4"))


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "out", Options("nf4"))
    with pytest.raises(InvalidArgument, match="quantized to nf4, QcoreConfig asks for int8"):
        load(tmp_path / "out", QcoreConfig("int8"))
    for arguments, message in (
        ({"blocksize": 128}, "blocksize=128, the checkpoint was quantized with 64"),
        ({"double_quant": False}, "double_quant=False, the checkpoint was quantized with True"),
        (
            {"skip_modules": ["up_proj"]},
            r"skip_modules=\['up_proj'\], but the checkpoint was quantized with \['lm_head'",
        ),
    ):
        with pytest.raises(InvalidArgument, match=message):
            load(tmp_path / "out", QcoreConfig("nf4", **arguments))
    load(tmp_path / "out", QcoreConfig("nf4", blocksize=64, skip_modules=["lm_head"]))
    with pytest.raises(InvalidArgument, match="fp32_cpu_offload needs the float checkpoint"):
        load(tmp_path / "out", QcoreConfig("nf4", fp32_cpu_offload=True), device_map={"": "cpu"})
    whole, layer = tensors(tmp_path / "out"), "model.layers.1.mlp.up_proj.weight"
    for name, message in ((f"{layer}.absmax", f"{layer}: .*absmax missing"), (layer, f"{layer} is missing, but")):
        rest = {key: value for key, value in whole.items() if key != name}
        save_file(rest, tmp_path / "out/model.safetensors", {"format": "pt"})
        with pytest.raises(FormatError, match=f"the checkpoint does not fit: .*{message}"):
            load(tmp_path / "out")
    rest = {key: value for key, value in whole.items() if not key.startswith(layer)}
    save_file(rest, tmp_path / "out/model.safetensors", {"format": "pt"})
    for kind in (AutoModelForCausalLM, AutoModel):  # a class of its own may miss a head, but none of its blocks
        with pytest.raises(FormatError, match=r"1 layers have no quantized weight in the checkpoint: .*layers.1.mlp"):
            kind.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("format_", "suffix"), [("nf4", "safetensors"), ("int8", "safetensors"), ("int8", "bin")])
def test_codes_whose_configuration_was_lost_are_not_quantized_again(tmp_path: Path, format_: str, suffix: str) -> None:
    """int8 codes have the shape of the weight, and Transformers casts them before the quantizer sees them."""
    out = tmp_path / "out"
    quantize_checkpoint(save_model("llama", tmp_path / "float"), out, Options(format_))
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    if suffix == "bin":
        torch.save(tensors(out), out / "pytorch_model.bin")
        (out / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"quantized already \(.*config.json has no quantization_config"):
        load(out, QcoreConfig(format_))


def test_a_float_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    short = {"model.layers.1.mlp.up_proj.weight": torch.zeros(5, 72)}
    save_file(tensors(source) | short, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj.weight has shape \(5, 72\), the model \(104, 72\)"):
        load(source, QcoreConfig("nf4"))


def test_a_class_or_a_string_in_the_place_of_a_configuration_is_refused(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float")
    with pytest.raises(InvalidArgument, match="needs an object such as"):
        load(source, QcoreConfig)
    quantize_checkpoint(source, tmp_path / "out", Options("nf4"))
    for folder in (source, tmp_path / "out"):
        with pytest.raises(InvalidArgument, match=r"is 'nf4', expected a configuration: qcore.QcoreConfig\(\"nf4\"\)$"):
            load(folder, "nf4")
        for value in ("4bit", ["nf4"], torch.int8):
            with pytest.raises(InvalidArgument, match=r"\(\"nf4\"\); formats are nf4, fp4, int8, gptq, awq"):
                load(folder, value)


@pytest.mark.parametrize("path", [("qcore", "schema"), ("schema",)])
def test_a_later_schema_is_refused(tmp_path: Path, path: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(save_model("llama", tmp_path / "float"), out, Options("nf4"))
    config = json.loads((out / "config.json").read_text())
    section = config["quantization_config"]
    if len(path) == 1:
        section["quant_method"] = "qcore"
    else:
        section = section["qcore"]
    section["schema"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"later qcore \(schema 2, this one reads up to 1\)"):
        load(out)


def test_importing_qcore_imports_neither_library() -> None:
    program = "import sys, qcore; assert not {'transformers', 'peft', 'accelerate'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert "QcoreConfig" in dir(qcore)


def test_what_is_pushed_to_a_hub_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(save_model("llama", tmp_path / "float"), QcoreConfig("nf4"))
    expected = logits(model)
    with running_hub() as hub:
        constants = {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=hub.endpoint, token="hf_none"))
        model.push_to_hub("someone/tiny-nf4", token="hf_none")
    assert {"config.json", "model.safetensors"} <= hub.files["someone/tiny-nf4"].keys(), hub.refused
    (tmp_path / "fetched").mkdir()
    for name, content in hub.files["someone/tiny-nf4"].items():
        (tmp_path / "fetched" / name).write_bytes(content)
    assert torch.equal(logits(load(tmp_path / "fetched")), expected)
