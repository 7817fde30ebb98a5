"""What a configuration that is passed along with a quantized checkpoint may ask for: nothing that the codes are not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qcore import QcoreConfig
from qcore.errors import FormatError, InvalidArgument
from qcore.formats.plan import Options
from qcore.formats.quantize import quantize_checkpoint
from qcore.integrations.calibrated import make_blocks
from qcore.nn import Linear4bit


def load(folder: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in each format, and as ``theirs`` one of bitsandbytes, which lists no layers to leave out."""
    root = tmp_path_factory.mktemp("folders")
    source = save_model("llama", root / "float", torch.float32)
    for format_ in ("nf4", "int8", "gptq", "awq"):
        options = Options(format_, group_size=8, dtype="float32")
        quantize_checkpoint(source, root / format_, options, make=partial(make_blocks, None, options))
    load(source, QcoreConfig("nf4", quantize_head=True)).save_pretrained(root / "head")
    load(source, BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(root / "theirs")
    section = json.loads((root / "theirs/config.json").read_text())["quantization_config"]
    assert section["llm_int8_skip_modules"] is None
    assert "model.layers.1.mlp.up_proj.SCB" in load_file(root / "theirs/model.safetensors")
    return root


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("nf4", "nf4", {"threshold": 3.0}, "threshold=3.0, which nf4 does not have"),
    ("nf4", "nf4", {"quantize_head": True}, "quantize_head=True, but lm_head of the checkpoint is not quantized"),
    (
        "nf4",
        "nf4",
        {"quant_storage": torch.bfloat16},
        "quant_storage=torch.bfloat16, the checkpoint was quantized with",
    ),
    ("int8", "int8", {"blocksize": 128}, "blocksize=128, which int8 does not have"),
    ("int8", "int8", {"double_quant": False}, "double_quant=False, which int8 does not have"),
    ("int8", "int8", {"threshold": 3.0}, "threshold=3.0, the checkpoint was quantized with 6.0"),
    ("int8", "int8", {"compute_dtype": "float32"}, "compute_dtype=torch.float32, which int8 does not have"),
    ("theirs", "int8", {"skip_modules": ["up_proj"]}, "but model.layers.0.mlp.up_proj of the checkpoint is quantized"),
    ("theirs", "int8", {"quantize_head": True}, "lm_head of the checkpoint is not quantized"),
    ("gptq", "gptq", {"blocksize": 128}, "blocksize=128, which gptq does not have"),
    ("gptq", "gptq", {"double_quant": False}, "double_quant=False, which gptq does not have"),
    ("gptq", "gptq", {"threshold": 3.0}, "threshold=3.0, which gptq does not have"),
    ("gptq", "gptq", {"quantize_head": True}, "lm_head of the checkpoint is not quantized"),
    ("gptq", "gptq", {"skip_modules": ["up_proj"]}, "up_proj"),
    ("awq", "awq", {"quant_storage": torch.bfloat16}, "which awq does not have"),
    ("awq", "awq", {"quantize_head": True}, "lm_head of the checkpoint is not quantized"),
]


@pytest.mark.parametrize(("folder", "format_", "arguments", "message"), REFUSED)
def test_what_the_codes_are_not_is_refused(
    folders: Path, folder: str, format_: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"QcoreConfig has .*{message}"):
        load(folders / folder, QcoreConfig(format_, **arguments))


@pytest.mark.parametrize(
    ("folder", "format_", "arguments"),
    [
        ("head", "nf4", {"quantize_head": True, "blocksize": 64, "double_quant": True}),
        ("theirs", "int8", {"skip_modules": ["lm_head"], "threshold": 6.0}),
        ("gptq", "gptq", {"skip_modules": ["lm_head"], "compute_dtype": torch.bfloat16}),
    ],
)
def test_what_the_codes_are_is_accepted(folders: Path, folder: str, format_: str, arguments: dict[str, Any]) -> None:
    model = load(folders / folder, QcoreConfig(format_, **arguments))
    assert isinstance(model.lm_head, Linear4bit) == (folder == "head")


@pytest.mark.parametrize("skips", [3, "lm_head"])
@pytest.mark.parametrize("arguments", [None, {}, {"skip_modules": ["lm_head"]}])
def test_a_damaged_list_of_layers_is_refused(
    folders: Path, tmp_path: Path, skips: Any, arguments: dict[str, Any] | None
) -> None:
    config = json.loads((folders / "int8/config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skips
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folders / "int8/model.safetensors")
    passed = {} if arguments is None else {"quantization_config": QcoreConfig("int8", **arguments)}
    with pytest.raises(FormatError, match=f"llm_int8_skip_modules is {skips!r}, expected a list of names"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **passed)
