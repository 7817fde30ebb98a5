"""The interfaces of AutoGPTQ, GPTQModel and AutoAWQ: quantize, save, load; what they cannot do is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, GPTQConfig

from qcore.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from qcore.compat.awq import AutoAWQForCausalLM
from qcore.compat.gptqmodel import GPTQModel, QuantizeConfig
from qcore.errors import InvalidArgument, QcoreError, Unsupported
from qcore.integrations.calibration_data import token_batches

TEXTS = ["the sky is blue because light scatters", "short waves in air", "light of short waves is blue in the sky"]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "float", torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_gptqmodel_quantizes_texts_saves_and_loads(source: Path, tmp_path: Path) -> None:
    model = GPTQModel.load(source, {"bits": 4, "group_size": 8, "sym": False})
    truth = logits(model)
    model.quantize(TEXTS)
    model.save(tmp_path / "out")
    again = GPTQModel.load(str(tmp_path / "out"))
    found = logits(again)
    assert torch.equal(found, logits(model))
    assert 0 < (found - truth).abs().max() < 0.5 * truth.abs().max()
    written = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (written["sym"], written["checkpoint_format"]) == (False, "gptq_v2")
    assert again.tokenizer.decode(again.generate("the sky is", max_new_tokens=2)[0]).startswith("the sky is")


def test_autogptq_reads_what_it_wrote(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = BaseQuantizeConfig(group_size=8, damp_percent=0.1)
    model = AutoGPTQForCausalLM.from_pretrained(source, config)
    model.quantize([tokenizer(text) for text in TEXTS])
    model.save_quantized(tmp_path / "out")
    again = AutoGPTQForCausalLM.from_quantized(
        str(tmp_path / "out"), device="cpu", use_triton=False, disable_exllama=True
    )
    # A checkpoint holds which columns form a group (desc_act), not in which order they came.
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert (BaseQuantizeConfig.from_pretrained(tmp_path / "out").damp_percent, again.device.type) == (0.1, "cpu")


def test_a_folder_of_older_writers_loads_and_qcore_is_asked_for_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoGPTQ before 0.5 wrote quantize_config.json alone; GPTQModel, where it is installed, is not called."""
    model = AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(group_size=8, desc_act=False))
    model.quantize([{"input_ids": list(range(200, 3, -1)), "attention_mask": [0] * 160 + [1] * 37}])
    model.save_quantized(tmp_path / "out")
    monkeypatch.setattr("qcore.integrations.transformers.has_gptqmodel", lambda: True)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    section = config.pop("quantization_config")
    del section["qcore"]
    for each in (config | {"quantization_config": section}, config):
        path.write_text(json.dumps(each))
        assert torch.equal(logits(AutoGPTQForCausalLM.from_quantized(tmp_path / "out")), logits(model))


def test_the_weight_file_and_its_description_may_be_named(source: Path, tmp_path: Path) -> None:
    """Folders of the first AutoGPTQ: a weight file with bits and group size in its name, beside a file of settings."""
    model = AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(group_size=8, desc_act=False))
    model.quantize([{"input_ids": list(range(3, 48)), "attention_mask": [1] * 45}])
    out = tmp_path / "out"
    model.save_quantized(out)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").rename(out / "gptq_model-4bit-8g.safetensors")
    settings = json.loads((out / "quantize_config.json").read_text())
    (out / "quantize_config.json").write_text(json.dumps({**settings, "model_file_base_name": None}))
    again = AutoGPTQForCausalLM.from_quantized(out, revision="main", low_cpu_mem_usage=False, trainable=False)
    assert torch.equal(logits(again), logits(model))
    again.save_quantized(tmp_path / "usual")
    assert torch.equal(logits(AutoGPTQForCausalLM.from_quantized(tmp_path / "usual")), logits(model))
    (out / "gptq_model-4bit-8g.safetensors").rename(out / "other.safetensors")
    (out / "quantize_config.json").unlink()
    named = {"model_basename": "other", "quantize_config": model.quantize_config}
    assert torch.equal(logits(AutoGPTQForCausalLM.from_quantized(out, **named)), logits(model))
    below = AutoGPTQForCausalLM.from_quantized(tmp_path, subfolder="out", **named)
    assert torch.equal(logits(below), logits(model))
    for options, says in (
        ({"model_basename": "model"}, "has no file model.safetensors"),
        ({"model_basename": "other", "revision": "v2"}, "is a folder, which has no revisions"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            AutoGPTQForCausalLM.from_quantized(out, **{**named, **options})
    for options in ({"use_safetensors": False}, {"trainable": True}, {"unheard_of": 1}):
        with pytest.raises(Unsupported, match=f"{next(iter(options))}=.* is not supported; leave it out"):
            AutoGPTQForCausalLM.from_quantized(out, **{**named, **options})


def test_examples_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    """GPT-2 has an embedding of 128 positions, and none behind them."""
    path = save_model("gpt2", tmp_path / "float", torch.float32)
    model = GPTQModel.load(path, QuantizeConfig(group_size=8))
    model.quantize([[index % 48 for index in range(300)]])
    assert model.quantized


def test_autoawq_leaves_out_what_it_is_told_to(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoAWQForCausalLM.from_pretrained(source)
    skip = ["down_proj"]
    model.quantize(tokenizer, {"q_group_size": 8, "modules_to_not_convert": skip}, calib_data=TEXTS)
    model.save_quantized(tmp_path / "out")
    again = AutoAWQForCausalLM.from_quantized(tmp_path / "out", fuse_layers=False)
    assert torch.equal(logits(again), logits(model))
    mlp = again.model.model.layers[1].mlp
    assert [type(layer).__name__ for layer in (mlp.up_proj, mlp.down_proj)] == ["LinearInt4", "Linear"]


def test_transformers_own_configuration_quantizes_while_loading(source: Path, tmp_path: Path) -> None:
    config = GPTQConfig(bits=4, dataset=TEXTS, group_size=8, tokenizer=str(source))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=GPTQConfig(bits=4))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(Unsupported, match="one of GPTQModel's"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=GPTQConfig(bits=4, backend="marlin"))


def test_masked_tokens_are_left_out_and_equal_lengths_run_together() -> None:
    example = {"input_ids": [1, 3, 4, 5], "attention_mask": [0, 1, 1, 1]}
    batches = token_batches([example, torch.tensor([[6, 7, 8, 9]]), [1, 2]], None, length=3)
    assert [batch.tolist() for batch in batches] == [[[3, 4, 5], [6, 7, 8]], [[1, 2]]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: BaseQuantizeConfig(bits=3), Unsupported, "quantizes to 4"),
        (lambda: QuantizeConfig(static_groups=True), Unsupported, "static_groups"),
        (lambda: QuantizeConfig(damp_percent=2.0), InvalidArgument, "damping 2.0"),
        (lambda: QuantizeConfig(group_size=12), InvalidArgument, "multiple of 8"),
        (lambda: token_batches("wikitext2", None), InvalidArgument, "'wikitext2' is not known"),
        (lambda: token_batches(["a text"], None), InvalidArgument, "pass the tokenizer"),
        (lambda: token_batches({"input_ids": [1]}, None), InvalidArgument, "list of examples"),
        (lambda: token_batches([[]], None), InvalidArgument, "no tokens"),
        (lambda: token_batches([[0.5]], None), InvalidArgument, "whole numbers"),
        (lambda: token_batches([torch.ones(2, 8).long()], None), InvalidArgument, "each sequence by itself"),
        (lambda: token_batches([{"text": "a text"}], None), InvalidArgument, "has text, needs input_ids"),
        (
            lambda: token_batches([{"input_ids": [1, 2, 3], "attention_mask": [1]}], None),
            InvalidArgument,
            "3 tokens and a mask of 1",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[], Any], error: type[QcoreError], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda path: GPTQModel.load(path), InvalidArgument, "no checkpoint in the format gptq or awq"),
        (
            lambda path: GPTQModel.load(path, QuantizeConfig(), backend="marlin"),
            Unsupported,
            "another library's kernel",
        ),
        (lambda path: AutoGPTQForCausalLM.from_pretrained(path, None), InvalidArgument, "needs a BaseQuantizeConfig"),
        (
            lambda path: GPTQModel.load(path, QuantizeConfig(), device="cpu", device_map="auto"),
            InvalidArgument,
            "pass one of them",
        ),
        (
            lambda path: AutoAWQForCausalLM.from_pretrained(path).quantize(
                None, {"q_group_size": 8, "modules_to_not_convert": ["down_porj"]}, calib_data=[[1, 2]]
            ),
            InvalidArgument,
            "'down_porj', which matches no layer",
        ),
        (lambda path: AutoAWQForCausalLM.from_quantized(path, fuse_layers=True), Unsupported, "fuse_layers=True"),
        (lambda path: AutoAWQForCausalLM.from_pretrained(path).save_quantized("x"), InvalidArgument, "call quantize"),
        (
            lambda path: AutoAWQForCausalLM.from_pretrained(path).quantize(quant_config={"bits": 4}, calib_data=[[1]]),
            InvalidArgument,
            "known are zero_point, q_group_size",
        ),
        (
            lambda path: AutoAWQForCausalLM.from_pretrained(path).quantize(
                quant_config={"q_group_size": 8, "modules_to_not_convert": ["w1"]}, calib_data=[[1, 2]]
            ),
            InvalidArgument,
            "'w1', which matches no layer",
        ),
        (
            lambda path: AutoModelForCausalLM.from_pretrained(path, quantization_config=GPTQConfig(bits=4)),
            InvalidArgument,
            "pass dataset=",
        ),
        (
            lambda path: AutoModelForCausalLM.from_pretrained(path, quantization_config=AwqConfig()),
            Unsupported,
            "qcore quantize MODEL",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    source: Path, call: Callable[[Path], Any], error: type[QcoreError], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(source)
