"""Checkpoints quantized to GPTQ and AWQ, block by block: what they compute, interruption, Transformers."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config_of, contents, save_model
from transformers import AutoModelForCausalLM, FalconConfig, GPTJConfig, OPTConfig

import qcore
from qcore.algorithms import gptq
from qcore.algorithms.calibration import observe
from qcore.errors import InvalidArgument, Unsupported
from qcore.formats.plan import Options
from qcore.formats.quantize import Listener, quantize_checkpoint
from qcore.integrations.blocks import quantize_block
from qcore.integrations.calibrated import make_blocks
from qcore.integrations.checkpoint import load_model
from qcore.integrations.quantize_model import quantize_model
from qcore.nn import LinearInt4
from qcore.ops.int4 import dequantize_int4

IDS = torch.randint(0, 48, (40, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS[:4]).logits


def quantize(source: Path, out: Path, format_: str, *, calibrated: bool = True, **options: Any) -> Path:
    chosen = Options(format_, group_size=8, dtype="float32", calibration="text" if calibrated else None, **options)
    listener = options.pop("listener", None)
    make = partial(make_blocks, IDS if calibrated else None, chosen)
    quantize_checkpoint(source, out, chosen, make=make, listener=listener)
    return out


def with_large_channels(folder: Path) -> Path:
    """The model with three channels behind each norm that are ten times as large: what real models have."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.dim() == 1 and name.endswith("weight") and ("layernorm" in name or ".ln_" in name):
            value[5:8] *= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "format_", "options"),
    [
        ("llama", "gptq", {"act_order": True, "symmetric": False}),
        ("gpt2", "gptq", {}),
        ("qwen2", "awq", {"symmetric": False}),
    ],
)
def test_a_calibrated_checkpoint_computes_with_its_weights_and_beats_rounding(
    tmp_path: Path, name: str, format_: str, options: dict[str, Any]
) -> None:
    source = with_large_channels(save_model(name, tmp_path / "float", torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    truth = logits(plain)
    model = load_model(quantize(source, tmp_path / "out", format_, **options))
    layers = {key: module for key, module in model.named_modules() if isinstance(module, LinearInt4)}
    assert len(layers) == (8 if name == "gpt2" else 21)
    assert not (tmp_path / "out" / "blocks").exists()
    found = logits(model)
    nearest = {key: value for key, value in options.items() if key != "act_order"}
    rounded = load_model(quantize(source, tmp_path / "nearest", format_, calibrated=False, **nearest))
    assert (found - truth).square().mean() < 0.8 * (logits(rounded) - truth).square().mean()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in plain.state_dict().items():
        if key in stored:
            value.copy_(stored[key])
    for key, module in layers.items():
        weight = dequantize_int4(module.weight.value(), torch.float32)
        plain.get_submodule(key).weight.data.copy_(weight.t() if name == "gpt2" else weight)
    assert torch.allclose(logits(plain), found, atol=2e-4)


class _Stops(Listener):
    def calibrated(self, block: int, count: int) -> None:
        if block == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_the_next_block(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    chosen = Options("gptq", group_size=8, calibration="text", symmetric=False)
    make = partial(make_blocks, IDS, chosen)
    quantize_checkpoint(source, tmp_path / "whole", chosen, make=make)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", chosen, make=make, listener=_Stops())
    finished = sorted((tmp_path / "out.partial" / "blocks").iterdir())
    assert [file.name for file in finished] == ["block-00000.safetensors", "block-00001.safetensors"]
    times = [file.stat().st_mtime_ns for file in finished]
    seen = []

    class Watches(Listener):
        def planned(self, plan: Any) -> None:
            seen.extend(times)

        def read(self, nbytes: int) -> None:
            if finished[0].exists():
                assert [file.stat().st_mtime_ns for file in finished] == times

    quantize_checkpoint(source, tmp_path / "out", chosen, make=make, listener=Watches())
    assert seen
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("format_", "options"), [("gptq", {"act_order": True}), ("awq", {"symmetric": False})])
def test_transformers_loads_generates_and_saves(tmp_path: Path, format_: str, options: dict[str, Any]) -> None:
    source = save_model("llama-tied", tmp_path / "float", torch.float32)
    out = quantize(source, tmp_path / "out", format_, **options)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.model.layers[0].mlp.up_proj, LinearInt4)
    assert torch.allclose(logits(model), logits(load_model(out)), atol=1e-5)
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, IDS.shape[1] + 4)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=qcore.QcoreConfig(format_))
    assert torch.equal(logits(again), logits(model))
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "saved"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.allclose(logits(model.dequantize()), logits(again), atol=1e-4)


def test_a_model_in_memory_becomes_what_its_checkpoint_becomes(tmp_path: Path, monkeypatch: Any) -> None:
    source = save_model("qwen2", tmp_path / "float", torch.float32)
    out = quantize(source, tmp_path / "out", "gptq", symmetric=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    options = Options("gptq", group_size=8, symmetric=False, calibration="text")
    names = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    floats = [weakref.ref(model.model.get_submodule(name).weight) for name in names]
    wide, left = [], []

    def watched(*arguments: Any) -> Any:
        found = quantize_block(*arguments)
        wide.extend(weakref.ref(weight) for weight in found.wanted.values())
        return found

    def progress(done: int, count: int) -> None:
        left.append((len(wide), sum(weight() is not None for weight in wide)))

    monkeypatch.setattr("qcore.integrations.quantize_model.quantize_block", watched)
    assert quantize_model(model, IDS.split(8), options, progress=progress) is model
    assert left == [(7, 0), (14, 0), (21, 0)], "a block's weights in float32 are there when the next one begins"
    assert len(floats) == 21
    assert not any(weight() is not None for weight in floats), "what would be put back on failure is still there"
    model.save_pretrained(tmp_path / "saved")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "format_"), [("qwen2", "awq"), ("gpt2", "gptq")])
def test_a_model_in_memory_is_as_it_was_when_a_block_fails(name: str, format_: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).train()
    model.get_input_embeddings().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects, modes = dict(model.named_parameters()), [module.training for module in model.modules()]
    options = Options(format_, group_size=8, symmetric=False, calibration="text")

    def stop(done: int, count: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def half(block: Any, *arguments: Any) -> Any:
        quantize_block(block, *arguments)
        raise InvalidArgument("after the block's weights are what the codes stand for")

    def untouched() -> None:
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert after.keys() == before.keys()
        assert all(value is objects[key] for key, value in model.named_parameters())
        assert [module.training for module in model.modules()] == modes

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, [IDS[:4]], options, progress=stop)
    untouched()
    with monkeypatch.context() as patch:
        patch.setattr("qcore.integrations.quantize_model.quantize_block", half)
        with pytest.raises(InvalidArgument, match="codes stand for"):
            quantize_model(model, [IDS[:4]], options)
    untouched()
    quantize_model(model, [IDS[:4]], options)
    assert sum(isinstance(module, LinearInt4) for module in model.modules()) == (8 if name == "gpt2" else 21)
    assert [module for module in model.modules() if not module.training] == [model.get_input_embeddings()]


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_make_up_for_the_errors_of_those_in_front_of_them(sequential: bool) -> None:
    """With true_sequential, the inputs of the second layer are those that the quantized first layer gives."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.SiLU(), torch.nn.Linear(24, 16))
    x = torch.randn(300, 16)
    options = Options("gptq", group_size=8, calibration="text", true_sequential=sequential)
    weight = block[2].weight.detach().clone()
    before = block[:2](x).detach()
    found = quantize_block(block, ["0", "2"], [lambda: block(x)], options, None, "block.")
    seen = block[:2](x).detach() if sequential else before
    alone = gptq.quantize(weight, seen.t() @ seen, gptq.GptqOptions(8))
    assert torch.equal(dequantize_int4(found.weights["2"], torch.float32), dequantize_int4(alone, torch.float32))
    assert torch.equal(block[2].weight, dequantize_int4(alone, torch.float32))


def test_what_is_observed_runs_no_further_than_it_has_to() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Identity())
    ran = []
    block[2].register_forward_pre_hook(lambda *_: ran.append(True))
    x = torch.randn(5, 4)
    (found,) = observe(block, ["1"], [lambda: block(x)] * 3, to_the_end=False)
    assert (found.tokens, ran) == (15, [])
    assert torch.allclose(found.hessian, 3 * block[0](x).T @ block[0](x))


def test_a_float_checkpoint_is_not_calibrated_while_it_loads(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    with pytest.raises(Unsupported, match="qcore quantize MODEL -o OUT --format awq --calibration TEXT"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=qcore.QcoreConfig("awq"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "awq", "group_size": 16}, "groups of 16 do not divide as awq wants"),
        ({"format": "gptq", "group_size": 12}, "multiple of 8"),
        ({"format": "gptq", "act_order": True}, "calibration text"),
        ({"format": "awq", "quantize_head": True}, "stays in floating point"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    source = save_model("llama", tmp_path / "float", torch.float32)
    with pytest.raises(InvalidArgument, match=says):
        quantize_checkpoint(source, tmp_path / "out", Options(**options))


def _many_blocks(name: str) -> Any:
    shape = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "gptj":  # asks each block for [0], which three dimensions of a tensor stand three times
        config: Any = GPTJConfig(vocab_size=48, n_embd=32, n_layer=5, n_head=4, rotary_dim=4, n_positions=64)
    elif name == "falcon":  # a class of its own for linear layers; attention and MLP read one norm
        config = FalconConfig(**shape, multi_query=True, parallel_attn=True, alibi=False, bias=False)
    else:  # opt-350m has linear layers in front of its blocks and behind them
        config = OPTConfig(**shape, word_embed_proj_dim=16, ffn_dim=64, max_position_embeddings=64)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("name", "format_"), [("gptj", "gptq"), ("opt", "gptq"), ("opt", "awq"), ("falcon", "awq")])
def test_models_whose_blocks_give_tuples_or_stand_between_linear_layers(
    tmp_path: Path, name: str, format_: str
) -> None:
    model = _many_blocks(name)
    truth = logits(model)
    options = Options(format_, group_size=8, symmetric=False, calibration="text")
    quantize_model(model, [IDS[:8]], options).save_pretrained(tmp_path / "saved")
    assert 0 < (logits(model) - truth).norm() < 0.2 * truth.norm()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))


def test_statistics_lie_where_the_inputs_do() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(16, 24, device="meta"), torch.nn.Linear(24, 16, device="meta"))
    found = observe(block, ["0", "1"], [lambda: block(torch.ones(4, 16, device="meta"))])
    assert {part.device.type for each in found for part in (each.hessian, each.magnitude)} == {"meta"}


def test_experts_that_stay_in_floating_point_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(config_of("mixtral"))
    with caplog.at_level("WARNING"):
        quantize_model(model, None, Options("gptq", group_size=8))
    assert "leaves 6 fused expert weights in floating point, such as model.layers.0.mlp.experts" in caplog.text
