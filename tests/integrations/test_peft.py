"""LoRA on quantized layers: trains, merges, unmerges, saves and reloads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import HRAConfig, LoraConfig, MissConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from qcore import QcoreConfig
from qcore.errors import InvalidArgument, Unsupported
from qcore.integrations.layers import dequantized
from qcore.integrations.peft import _CALLING, LoraQuantizedLinear

IDS = torch.arange(2, 20)[None]


def quantized(source: Path, format_: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=QcoreConfig(format_))
    return prepare_model_for_kbit_training(model)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def trained(source: Path, format_: str, *, dora: bool = False) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(quantized(source, format_), config).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize(("format_", "dora"), [("nf4", False), ("int8", False), ("nf4", True)])
def test_it_trains_merges_and_comes_back(tmp_path: Path, format_: str, dora: bool) -> None:
    source = save_model("qwen2", tmp_path / "float")
    model, losses = trained(source, format_, dora=dora)
    assert losses[-1] < losses[0] - 0.05
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraQuantizedLinear)
    before, codes = logits(model), layer.get_base_layer().weight.data.clone()
    numbers = dequantized(layer.get_base_layer().weight, torch.float32)
    update = layer.get_delta_weight("default").detach()

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(quantized(source, format_), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), before)

    model.merge_adapter(safe_merge=True)
    merged = logits(model)
    assert not torch.equal(layer.get_base_layer().weight.data, codes)
    if not dora:  # the sum, to within half a step of the format: a sixth of a block's largest value in NF4
        error = (dequantized(layer.get_base_layer().weight, torch.float32) - numbers - update).abs().max()
        assert float(error) < 0.2 * float((numbers + update).abs().max())
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight.data, codes)
    assert torch.equal(logits(model), before)

    final = reloaded.merge_and_unload()
    assert torch.equal(logits(final), merged)
    final.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), merged)


def test_a_broken_adapter_is_not_merged(tmp_path: Path) -> None:
    model, _ = trained(save_model("llama", tmp_path), "nf4")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    codes = layer.get_base_layer().weight.data.clone()
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidArgument, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight.data, codes)
    assert not layer.merged


# A configuration for each method that is let through; none of them starts as the identity, where it has the choice, and
# none is so large that it blows up the rounding of the inputs in int8.
RANDOM = {"init_weights": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 4, "lora_alpha": 1, "total_step": 10, "init_lora_weights": False}),
    "beft": ("BeftConfig", RANDOM),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **RANDOM}),
    "c3a": ("C3AConfig", {"block_size": 24, **RANDOM}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50, **RANDOM}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, **RANDOM}),
    "ia3": ("IA3Config", {"feedforward_modules": ["v_proj"], "init_ia3_weights": False}),
    "lily": ("LilyConfig", {"r": 4, "stride_A": 1, "num_B": 2, **RANDOM}),
    "miss": ("MissConfig", {"r": 4, **RANDOM}),
    "oft": ("OFTConfig", {"oft_block_size": 4, **RANDOM}),
    "poly": ("PolyConfig", {"task_type": "CAUSAL_LM", "r": 4, "n_tasks": 2, "n_skills": 2, **RANDOM}),
    "pvera": ("PveraConfig", {"r": 8, **RANDOM}),
    "randlora": ("RandLoraConfig", {"r": 8, "randlora_alpha": 8, **RANDOM}),
    "road": ("RoadConfig", {"group_size": 8, **RANDOM}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 8}),
    "vera": ("VeraConfig", {"r": 8, **RANDOM}),
    "waveft": ("WaveFTConfig", {"n_frequency": 50, **RANDOM}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["nf4", "int8"])
def twins(llama: Path, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A quantized model, and one of the values that its codes stand for."""
    options = {"dtype": torch.float32, "quantization_config": QcoreConfig(request.param)}
    model, values = (AutoModelForCausalLM.from_pretrained(llama, **options) for _ in range(2))
    return model, values.dequantize().float()


@pytest.mark.parametrize("method", _CALLING)
def test_a_method_that_calls_the_layer_trains_as_on_the_dequantized_model(twins: tuple[Any, Any], method: str) -> None:
    """One step of training; the adapter that comes of it does the same beside the codes as beside their values."""
    kind, options = METHODS[method]
    inputs = {"input_ids": IDS, **({"task_ids": torch.zeros(1, dtype=torch.long)} if method == "poly" else {})}

    def adapted(base: Any) -> Any:
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(base), getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **options))

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model.eval()(**inputs).logits
        return result

    model = adapted(twins[0])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    before, codes = run(model), layer.weight.data.clone()
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    model.train()(**inputs, labels=IDS).loss.backward()
    torch.optim.SGD(parameters.values(), 1e-2).step()
    after = run(model)
    assert not torch.equal(after, before)
    assert torch.equal(layer.weight.data, codes)

    truth = adapted(twins[1])
    with torch.no_grad():
        for name, parameter in parameters.items():
            truth.get_parameter(name).copy_(parameter)
    expected = run(truth)
    error = float((after - expected).norm() / expected.norm())
    # In int8 the layer rounds its inputs to 8 bits too; codes taken for values are off by more than 1.
    assert error < (1e-4 if layer.weight.dtype is torch.uint8 else 0.03)


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_merging_does_not_take_codes_for_the_weight(llama: Path, format_: str) -> None:
    kind, options = METHODS["oft"]
    model = get_peft_model(quantized(llama, format_), getattr(peft, kind)(target_modules=["q_proj"], **options))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    before, codes = logits(model), layer.weight.data.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(Unsupported, match="merge: PEFT's oft would add to the codes"):
            merge()
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (HRAConfig(target_modules=["lm_head", "q_proj"]), "hra is not known to leave alone"),
        (HRAConfig(target_modules="all-linear"), "hra is not known to leave alone"),
        (HRAConfig(), "hra is not known to leave alone"),
        (MissConfig(target_modules=["q_proj"], r=4, init_weights="bat"), "miss with init_weights='bat' reads"),
    ],
    ids=["float-first", "all-linear", "default", "bat"],
)
def test_a_refused_method_leaves_the_model_as_it_was(llama: Path, config: Any, reason: str) -> None:
    """In int8 codes have the weight's very shape, and the head, which is not quantized, could take the adapter."""
    model = quantized(llama, "int8")
    before, modules = logits(model), [type(each) for each in model.modules()]
    asked = {name: each.requires_grad for name, each in model.named_parameters()}
    targets = config.target_modules
    with pytest.raises(Unsupported, match=rf"PEFT's {reason} the weight of model.layers.0.self_attn.q_proj"):
        get_peft_model(model, config)
    assert config.target_modules == targets
    assert [type(each) for each in model.modules()] == modules
    assert {name: each.requires_grad for name, each in model.named_parameters()} == asked
    assert torch.equal(logits(model), before)


def test_a_state_dict_that_names_the_layers_is_looked_at_too(llama: Path) -> None:
    model = quantized(llama, "int8")
    state = {"model.layers.1.mlp.up_proj.hra_u": torch.zeros(72, 8)}
    with pytest.raises(Unsupported, match=r"hra is not known to leave alone the weight of model\.layers\.1"):
        peft.inject_adapter_in_model(HRAConfig(target_modules=["lm_head"]), model, state_dict=state)
    assert not any(isinstance(each, BaseTunerLayer) for each in model.modules())


def test_layers_that_are_not_quantized_take_every_method(llama: Path) -> None:
    head = get_peft_model(quantized(llama, "int8"), HRAConfig(target_modules=["lm_head"]))
    assert isinstance(head.base_model.model.lm_head, BaseTunerLayer)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), HRAConfig(target_modules=["q_proj"]))
    plain.merge_and_unload()
