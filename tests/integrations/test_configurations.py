"""A QcoreConfig as a dictionary, or on the model's configuration, does what it does as the argument."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig
from transformers.quantizers.auto import AutoHfQuantizer

from qcore import QcoreConfig
from qcore.errors import FormatError, InvalidArgument, Unsupported
from qcore.nn import Linear4bit, Linear8bitLt

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"format": "nf4"},
    "every 4-bit argument": {
        "format": "fp4",
        "blocksize": 128,
        "double_quant": False,
        "compute_dtype": "bfloat16",
        "quant_storage": "bfloat16",
        "quantize_head": True,
    },
    "int8": {"format": "int8", "threshold": 3.0, "skip_modules": ["up_proj", r"model\.layers\.1"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> QcoreConfig:
    return QcoreConfig(**request.param)


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def layers(model: Any) -> dict[str, tuple[Any, ...]]:
    """Every quantized layer with its codes and what decides how it computes."""
    return {
        name: (
            layer.weight.data.view(torch.uint8).flatten().tolist(),
            getattr(layer, "compute_dtype", None),
            getattr(layer, "threshold", None),
            getattr(getattr(layer, "quant_state", None), "blocksize", None),
            layer.weight.dtype,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, (Linear4bit, Linear8bitLt))
    }


def configured(path: Path, section: Any) -> Any:
    found = AutoConfig.from_pretrained(path)
    found.quantization_config = section
    return found


@pytest.mark.parametrize(
    "arguments", [*CONFIGS.values(), {"format": "nf4", "fp32_cpu_offload": True}, {"format": "gptq"}, {"format": "awq"}]
)
def test_a_dictionary_is_the_configuration_again(arguments: dict[str, Any]) -> None:
    config = QcoreConfig(**arguments)
    written = json.loads(json.dumps(config.to_dict()))
    assert vars(QcoreConfig.from_dict(written)) == vars(config)
    assert dict(config) == config.to_dict()


def test_a_dictionary_quantizes_as_the_configuration_does_although_bitsandbytes_is_installed(
    source: Path, config: QcoreConfig
) -> None:
    expected = layers(load(source, quantization_config=config))
    assert expected
    assert layers(load(source, quantization_config=config.to_dict())) == expected
    bitsandbytes = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    theirs = load(source, quantization_config=bitsandbytes)
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("spelling", [lambda config: config, QcoreConfig.to_dict], ids=["object", "dictionary"])
def test_what_is_on_the_models_configuration_quantizes_a_float_folder_and_loads_a_quantized_one(
    tmp_path: Path, source: Path, config: QcoreConfig, spelling: Any
) -> None:
    argument = load(source, quantization_config=config)
    placed = configured(source, spelling(config))
    model = load(source, config=placed)
    assert layers(model) == layers(argument)
    assert layers(load(source, config=model.config)) == layers(argument)  # as it is after a load
    model.save_pretrained(tmp_path / "saved")
    argument.save_pretrained(tmp_path / "expected")
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "expected"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in saved)
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "expected")]
    assert written[0] == written[1]
    assert "asked" not in written[0]["quantization_config"]["qcore"]
    for found in (placed, model.config):
        assert layers(load(tmp_path / "saved", config=found)) == layers(argument)
    assert layers(load(tmp_path / "saved", quantization_config=spelling(config))) == layers(argument)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (QcoreConfig("nf4", blocksize=128), "blocksize=128, the checkpoint was quantized with 64"),
        (QcoreConfig("nf4", double_quant=False), "double_quant=False, the checkpoint was quantized with True"),
        (QcoreConfig("int8"), "the checkpoint is quantized to nf4, QcoreConfig asks for int8"),
    ],
)
def test_what_is_on_the_models_configuration_has_to_fit_the_codes(
    tmp_path: Path, source: Path, asked: QcoreConfig, message: str
) -> None:
    model = load(source, quantization_config=QcoreConfig("nf4"))
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        load(tmp_path, config=configured(source, asked))
    with pytest.raises(InvalidArgument, match=message):
        load(tmp_path, config=model.config, quantization_config=asked)


def test_a_gptq_configuration_does_not_replace_what_is_on_the_models_configuration() -> None:
    merged = AutoHfQuantizer.merge_quantization_configs(QcoreConfig("gptq"), GPTQConfig(bits=4))
    assert isinstance(merged, QcoreConfig)
    assert merged.format == "gptq"
    with pytest.raises(Unsupported, match="marlin"):
        AutoHfQuantizer.merge_quantization_configs(QcoreConfig("gptq"), GPTQConfig(bits=4, backend="marlin"))


def test_the_section_of_a_checkpoint_quantizes_another_one_the_same_way(tmp_path: Path, source: Path) -> None:
    """It lists every layer that stays in floating point: of the head and of what was asked for none is added."""
    model = load(source, quantization_config=QcoreConfig("nf4", skip_modules=["up_proj"], quantize_head=True))
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["llm_int8_skip_modules"] == ["up_proj"]
    assert layers(load(source, quantization_config=section)) == layers(model)


def test_the_argument_stands_above_what_is_on_the_models_configuration(source: Path) -> None:
    placed = configured(source, QcoreConfig("int8"))
    model = load(source, config=placed, quantization_config=QcoreConfig("nf4"))
    assert {type(layer) for layer in model.modules()} & {Linear4bit, Linear8bitLt} == {Linear4bit}
    assert placed.quantization_config.format == "int8"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"asked": ["lm_head"]}, FormatError, r"qcore.asked is \['lm_head'\], expected an object"),
        ({"asked": {"quantise_head": True}}, InvalidArgument, "unknown argument quantise_head; did you mean quantize_"),
        ({"asked": {"quantize_head": "yes"}}, InvalidArgument, "quantize_head is 'yes', expected True or False"),
        ({"asked": {"skip_modules": ["up_prj"]}}, InvalidArgument, "'up_prj', which matches no layer"),
        ({"schema": 2}, FormatError, "was written by a later qcore"),
    ],
)
def test_a_damaged_dictionary_is_refused(
    source: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    section = QcoreConfig("nf4").to_dict()
    section["qcore"] |= change
    with pytest.raises(error, match=message):
        load(source, quantization_config=section)


def test_a_dictionary_of_another_method_does_not_stand_for_a_qcore_folder(tmp_path: Path, source: Path) -> None:
    load(source, quantization_config=QcoreConfig("nf4")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The model is quantized with"):
        load(tmp_path, quantization_config={"quant_method": "hqq"})
