"""A damaged or inconsistent checkpoint is refused with a ``FormatError``, whatever the damage; skips are honoured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from qcore.errors import FormatError, InvalidArgument
from qcore.formats.grouped import section_of
from qcore.formats.plan import Options, make_plan
from qcore.formats.quantization_config import QuantizationSettings, read_section, write_quantization
from qcore.formats.quantize import quantize_checkpoint
from qcore.formats.safetensors import SafetensorsFile
from qcore.formats.source import open_source, weight_files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("damaged") / "float")


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of one tiny checkpoint, to be damaged."""
    folder = tmp_path / "float"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def planned(source: Path, **options: Any) -> Any:
    opened = open_source(source)
    try:
        return make_plan(opened, Options("nf4", **options))
    finally:
        opened.close()


def configure(source: Path, **values: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("glob", ["*", "model*,lm_head", "l*,*_proj"])
def test_a_glob_that_also_names_a_default_skip_keeps_its_other_layers(source: Path, glob: str) -> None:
    with pytest.raises(InvalidArgument, match="every linear layer is skipped"):
        planned(source, skip=tuple(glob.split(",")))


def test_a_glob_beside_the_head_skips_what_it_says(source: Path) -> None:
    plan = planned(source, skip=("[lu]*",))  # lm_head, and every up_proj
    assert sum(step.action == "nf4" for step in plan.steps) == 3 * 6
    assert sum(step.action == "nf4" for step in planned(source, skip=("lm_head",)).steps) == 3 * 7


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": "nf4"},
        {"num_attention_heads": 7},
        {"num_attention_heads": 0},
        {"vocab_size": 10**15},
        {"architectures": ["Nope"]},
        {"architectures": ["AutoConfig"]},
        {"model_type": ["llama"]},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_refused(source: Path, values: dict[str, Any]) -> None:
    configure(source, **values)
    with pytest.raises(FormatError, match=r"config\.json|is quantized already"):
        planned(source)


def test_a_quantization_that_is_null_is_none(source: Path) -> None:
    configure(source, quantization_config=None)
    assert planned(source).config["quantization_config"]["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": ["x"]}}', "[" * 200_000, "1" * 5000], ids=["list", "deep", "long"]
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError):
        weight_files(tmp_path)


@pytest.mark.parametrize("header", [b"[" * 200_000, b'{"w": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path / "w.safetensors")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a file"):
        SafetensorsFile(tmp_path)


def rewrite(source: Path, name: str, value: torch.Tensor) -> None:
    save_file(load_file(source / "model.safetensors") | {name: value}, source / "model.safetensors", {"format": "pt"})


def test_an_integer_norm_is_refused(source: Path) -> None:
    rewrite(source, "model.norm.weight", torch.ones(72, dtype=torch.int64))
    with pytest.raises(FormatError, match=r"'model.norm.weight' is torch.int64; it must be floating point"):
        planned(source)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.norm.weight", (72,)), ("model.embed_tokens.weight", (48, 72)), ("lm_head.weight", (48, 72))],
)
def test_a_nan_outside_the_linear_layers_is_refused(source: Path, name: str, shape: tuple[int, ...]) -> None:
    value = torch.ones(shape, dtype=torch.bfloat16)
    value[-1] = math.nan
    rewrite(source, name, value)
    with pytest.raises(FormatError, match=rf"'{name}' has \d+ values that are NaN or infinite"):
        quantize_checkpoint(source, source.parent / "out", Options("nf4"))
    assert not (source.parent / "out").exists()


def test_what_the_model_does_not_know_may_hold_a_nan(source: Path) -> None:
    rewrite(source, "model.extra", torch.tensor([math.nan]))
    quantize_checkpoint(source, source.parent / "out", Options("nf4", keep_unknown=True))
    assert load_file(source.parent / "out/model.safetensors")["model.extra"].isnan().all()


BAD_SECTIONS: list[tuple[QuantizationSettings, dict[str, Any], str]] = [
    (QuantizationSettings("int8"), {"qcore": 3}, "qcore is 3, expected an object"),
    (QuantizationSettings("int8"), {"llm_int8_threshold": "six"}, "llm_int8_threshold is 'six', expected a number"),
    (QuantizationSettings("int8"), {"llm_int8_threshold": math.nan}, "llm_int8_threshold is nan, expected a number"),
    (QuantizationSettings("int8"), {"llm_int8_skip_modules": 3}, "llm_int8_skip_modules is 3, expected a list"),
    (QuantizationSettings("int8"), {"llm_int8_skip_modules": "lm_head"}, "skip_modules is 'lm_head', expected a list"),
    (QuantizationSettings("int8"), {"llm_int8_skip_modules": ["*.up"]}, "expected a list of names or regular"),
    (QuantizationSettings("nf4"), {"qcore": {"blocksize": math.inf}}, "qcore.blocksize is inf, expected a power of"),
    (QuantizationSettings("nf4"), {"qcore": {"blocksize": 64.9}}, "qcore.blocksize is 64.9, expected a power of two"),
    (QuantizationSettings("nf4"), {"bnb_4bit_use_double_quant": "no"}, "double_quant is 'no', expected true or false"),
    (QuantizationSettings("nf4"), {"bnb_4bit_quant_type": "int8"}, "bnb_4bit_quant_type is 'int8', expected nf4 or"),
    (QuantizationSettings("nf4"), {"bnb_4bit_quant_storage": "bool"}, "quant_storage is torch.bool, expected one of"),
    (QuantizationSettings("nf4"), {"load_in_4bit": "false"}, "load_in_4bit is 'false', expected true or false"),
    (QuantizationSettings("nf4", experts=True), {"blocksize": "x"}, "blocksize is 'x', expected a power of two"),
    (QuantizationSettings("nf4", experts=True), {"threshold": "six"}, "threshold is 'six', expected a number"),
    (QuantizationSettings("nf4", experts=True), {"skip_modules": 3}, "skip_modules is 3, expected a list"),
    (QuantizationSettings("nf4", experts=True), {"compute_dtype": "int32"}, "is torch.int32, expected float32"),
    (QuantizationSettings("nf4", experts=True), {"schema": "one"}, "later qcore"),
    (QuantizationSettings("gptq"), {"sym": "yes"}, "sym is 'yes', expected true or false"),
    (QuantizationSettings("gptq"), {"group_size": math.inf}, "group_size is inf, expected -1 or a multiple of 8"),
    (QuantizationSettings("gptq"), {"qcore": {"skip_modules": "head"}}, "skip_modules is 'head', expected a list"),
    (QuantizationSettings("awq"), {"qcore": {}, "modules_to_not_convert": "head"}, "modules_to_not_convert is 'head'"),
    (QuantizationSettings("awq"), {"qcore": {"symmetric": 1}}, "symmetric is 1, expected true or false"),
]


@pytest.mark.parametrize(("settings", "change", "message"), BAD_SECTIONS)
def test_a_section_that_was_changed_by_hand_is_refused(
    settings: QuantizationSettings, change: dict[str, Any], message: str
) -> None:
    section = write_quantization(settings, torch.float32)
    assert read_section(section).format == settings.format
    with pytest.raises(FormatError, match=message):
        read_section(section | change)


@pytest.mark.parametrize("section", [3, "nf4", ["quant_method", "qcore"]])
def test_a_section_that_is_no_object_is_refused(tmp_path: Path, section: Any) -> None:
    (tmp_path / "quant_config.json").write_text(json.dumps(section))
    for found in (section_of(tmp_path, {"quantization_config": section}), section_of(tmp_path, {})):
        with pytest.raises(FormatError, match="expected an object"):
            read_section(found)


def test_what_other_writers_leave_out_or_write_as_null_is_at_its_default() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "sym": None, "desc_act": None, "modules_to_not_convert": None}
    assert read_section(gptq) == QuantizationSettings("gptq")
    four_bit = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_threshold": 6}
    assert read_section(four_bit) == QuantizationSettings("fp4", nested=False)
