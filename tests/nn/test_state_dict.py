"""State dicts: bit for bit those of bitsandbytes, both ways; loading is whole or not at all."""

from __future__ import annotations

import copy
import io
import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from qcore import functional as F
from qcore.errors import FormatError
from qcore.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt, Params4bit
from truth import weight_4bit

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("backend")

FORMATS = [
    (quant_type, nested, storage)
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
    for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
]
each_format = pytest.mark.parametrize(("quant_type", "nested", "storage"), FORMATS, ids=str)


def theirs_4bit(quant_type="nf4", nested=True, storage=torch.uint8, dtype=torch.float32, n=96, k=64):
    layer = bnb.nn.Linear4bit(k, n, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    return layer.to(dtype).to("cpu")


def ours_4bit(quant_type="nf4", nested=True, storage=torch.uint8, dtype=torch.float32, n=96, k=64):
    layer = Linear4bit(k, n, compress_statistics=nested, quant_type=quant_type, quant_storage=storage, dtype=dtype)
    return layer.to("cpu")


def bits(tensor):
    return (tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert bits(a[name]) == bits(b[name]), name


def detached(layer):
    return copy.deepcopy(layer.state_dict())


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_bitsandbytes_saves_loads_and_saves_the_same(quant_type, nested, storage, dtype):
    saved = detached(theirs_4bit(quant_type, nested, storage, dtype))
    for layer in (Linear4bit(64, 96), ours_4bit("nf4", False), ours_4bit("fp4", True, torch.bfloat16)):
        assert not any(layer.load_state_dict(saved, strict=True))
        assert layer.weight.bnb_quantized
        assert_same(layer.state_dict(), saved | {"bias": layer.bias})
        layer.train()(torch.randn(3, 64, requires_grad=True)).sum().backward()
        with torch.no_grad():
            layer.eval()(torch.randn(1, 64))
        assert_same(layer.state_dict(), saved | {"bias": layer.bias})


@each_format
def test_what_qcore_saves_bitsandbytes_reads_and_saves_the_same(quant_type, nested, storage):
    layer = ours_4bit(quant_type, nested, storage)
    saved = detached(layer)
    other = bnb.nn.Linear4bit(64, 96, quant_type="fp4")
    stats = {key[7:]: value for key, value in saved.items() if key.startswith("weight.")}
    other.weight = bnb.nn.Params4bit.from_prequantized(saved["weight"], stats, device="cpu", module=other)
    other.bias = nn.Parameter(saved["bias"])
    assert_same(other.state_dict(), saved)
    want = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(bnb.functional.dequantize_4bit(other.weight.data, other.weight.quant_state), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_same_weight_gives_the_same_entries(quant_type, nested, dtype):
    # Multiples of 1/8 under scales that are powers of two: no ties, and exact reciprocals in either library.
    source = torch.randint(-7, 8, (96, 64)).to(dtype) / 8
    source[:, 0] = 1.0
    source *= 2.0 ** torch.randint(-3, 4, (96, 1))
    options = {"compress_statistics": nested, "quant_type": quant_type}
    layers = []
    for kind in (Linear4bit, bnb.nn.Linear4bit):
        layer = kind(64, 96, **options).to(dtype)
        layer.load_state_dict({"weight": source, "bias": torch.zeros(96)})
        layers.append(layer.to("cpu"))
    ours, theirs = (layer.state_dict() for layer in layers)
    # Their CPU path quantizes scales through a coarse table (QC-Q8-004), and sums the offset in another order.
    inexact = {"weight.absmax", "weight.nested_absmax", f"weight.quant_state.bitsandbytes__{quant_type}"}
    for name in ours.keys() - (inexact if nested else set()):
        assert bits(ours[name]) == bits(theirs[name]), name
    assert list(ours) == list(theirs)
    said = [
        json.loads(bytes(state[f"weight.quant_state.bitsandbytes__{quant_type}"].tolist())) for state in (ours, theirs)
    ]
    assert list(said[0]) == list(said[1])
    offsets = [text.pop("nested_offset", 0.0) for text in said]
    assert said[0] == said[1]
    assert offsets[0] == pytest.approx(offsets[1], rel=1e-6)
    read = [weight_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]
    assert np.allclose(*read, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_dicts_interchange_both_ways(has_bias):
    weight = torch.randn(48, 64).half().float()
    theirs = bnb.nn.Linear8bitLt(64, 48, has_bias, has_fp16_weights=False)
    theirs.weight.data = weight.clone()
    theirs = theirs.to("cpu")
    saved = detached(theirs)
    for layer in (
        Linear8bitLt(64, 48, has_bias, has_fp16_weights=False),
        Linear8bitLt(64, 48, has_bias, has_fp16_weights=False).to("cpu"),
    ):
        assert not any(layer.load_state_dict(saved, strict=True))
        assert_same(layer.state_dict(), saved)
        layer(torch.randn(3, 64))
        assert_same(layer.state_dict(), saved)
    ours = Linear8bitLt(64, 48, has_bias, has_fp16_weights=False)
    ours.weight.data = weight.clone()
    ours = ours.to("cpu")
    assert list(ours.state_dict()) == list(saved)
    assert bits(ours.state_dict()["SCB"]) == bits(saved["SCB"])
    assert (ours.state_dict()["weight"].int() - saved["weight"].int()).abs().max() <= 1
    back = bnb.nn.Linear8bitLt(64, 48, has_bias, has_fp16_weights=False).to("cpu")
    assert not any(back.load_state_dict(ours.state_dict(), strict=True))
    assert_same(back.state_dict(), ours.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(Linear4bit(64, 64, quant_type="nf4"), Linear4bit(64, 64, quant_type="nf4")),
        lambda: nn.Sequential(
            Linear8bitLt(64, 64, has_fp16_weights=False), Linear8bitLt(64, 64, has_fp16_weights=False)
        ),
        lambda: Embedding4bit(50, 64, quant_type="nf4"),
        lambda: Embedding8bit(50, 64),
    ],
    ids=["4bit", "8bit", "embedding 4bit", "embedding 8bit"],
)
@pytest.mark.parametrize("channel", ["torch", "safetensors"])
def test_files_round_trip(make, channel):
    model = make().to("cpu")
    if channel == "torch":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    else:
        saved = load_safetensors(save_safetensors(model.state_dict()))
    x = torch.randint(0, 50, (7,)) if isinstance(model, nn.Embedding) else torch.randn(7, 64)
    for fresh in (make(), make().to("cpu")):
        assert not any(fresh.load_state_dict(saved))
        assert torch.equal(fresh(x), model(x))
        assert {name: bits(value) for name, value in fresh.state_dict().items()} == {
            name: bits(value) for name, value in model.state_dict().items()
        }


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_meta_model_takes_a_checkpoint_by_assignment(kind):
    def make(device):
        if kind == "4bit":
            return nn.Sequential(Linear4bit(64, 32, quant_type="nf4", device=device))
        return nn.Sequential(Linear8bitLt(64, 32, has_fp16_weights=False, device=device))

    model = make(None).to("cpu")
    saved, x = detached(model), torch.randn(2, 64)
    empty = make("meta")
    with pytest.warns(UserWarning, match="assign=True"):
        empty.load_state_dict(saved)
    assert empty[0].weight.is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty.load_state_dict(saved, assign=True)
    assert torch.equal(empty(x), model(x))
    assert empty[0].weight.data_ptr() == saved["0.weight"].data_ptr()
    numbers = {"0.weight": torch.randn(32, 64), "0.bias": torch.zeros(32)}
    late = make("meta")
    late.load_state_dict(numbers, assign=True)
    assert type(late[0].weight) is type(model[0].weight)
    early = make(None)
    early.load_state_dict(numbers)
    assert torch.equal(late.to("cpu")(x), early.to("cpu")(x))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_numbers_go_into_a_quantized_layer_quantized(kind):
    def make():
        return Linear4bit(64, 32) if kind == "4bit" else Linear8bitLt(64, 32, has_fp16_weights=False)

    numbers = {"weight": torch.randn(32, 64), "bias": torch.randn(32)}
    fresh, quantized = make(), make().to("cpu")
    parameter = quantized.weight
    fresh.load_state_dict(numbers)
    assert torch.equal(fresh.weight.data, numbers["weight"])
    quantized.load_state_dict(numbers)
    assert quantized.weight is parameter
    assert_same(quantized.state_dict(), fresh.to("cpu").state_dict())


def test_a_loaded_layer_shares_nothing_with_the_checkpoint():
    saved = ours_4bit().state_dict()
    layer, x = Linear4bit(64, 96), torch.randn(2, 64)
    layer.load_state_dict(saved)
    want = layer(x)
    for name, value in saved.items():
        if "quant_state" not in name:
            value.zero_()
    assert torch.equal(layer(x), want)


def shorten(name):
    return lambda saved: saved.update({name: saved[name][:-1]})


def rewrite(**changes):
    def change(saved):
        name = "weight.quant_state.bitsandbytes__nf4"
        said = json.loads(bytes(saved[name].tolist()))
        said.update(changes)
        saved[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


BROKEN_4BIT = {
    "no absmax": lambda saved: saved.pop("weight.absmax"),
    "no quant_map": lambda saved: saved.pop("weight.quant_map"),
    "no nested_absmax": lambda saved: saved.pop("weight.nested_absmax"),
    "no nested_quant_map": lambda saved: saved.pop("weight.nested_quant_map"),
    "no quant_state": lambda saved: saved.pop("weight.quant_state.bitsandbytes__nf4"),
    "no weight": lambda saved: saved.pop("weight"),
    "only the codes": lambda saved: [saved.pop(name) for name in list(saved) if name.startswith("weight.")],
    "short weight": shorten("weight"),
    "short absmax": shorten("weight.absmax"),
    "short quant_map": shorten("weight.quant_map"),
    "short nested_absmax": shorten("weight.nested_absmax"),
    "short nested_quant_map": shorten("weight.nested_quant_map"),
    "short quant_state": shorten("weight.quant_state.bitsandbytes__nf4"),
    "absmax of another dtype": lambda saved: saved.update({"weight.absmax": saved["weight.absmax"].float()}),
    "other values": lambda saved: saved.update({"weight.quant_map": saved["weight.quant_map"] * 0.5}),
    "other shape": rewrite(shape=[96, 65]),
    "shape of text": rewrite(shape="96"),
    "other blocksize": rewrite(blocksize=128),
    "blocksize of nothing": rewrite(blocksize=0),
    "other nested_blocksize": rewrite(nested_blocksize=32),
    "unknown dtype": rewrite(dtype="float33"),
    "unknown quant_type": rewrite(quant_type="nf5"),
}


@pytest.mark.parametrize("damage", BROKEN_4BIT.values(), ids=BROKEN_4BIT)
@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_4bit_checkpoint_is_refused_and_nothing_changes(damage, strict):
    saved = detached(ours_4bit(n=96, k=96))
    saved["bias"] = saved["bias"] + 1.0
    damage(saved)
    layer = ours_4bit("fp4", n=96, k=96)
    before, x = detached(layer), torch.randn(2, 96)
    want = layer(x)
    with pytest.raises(FormatError, match="weight"):
        layer.load_state_dict(saved, strict=strict)
    assert_same(layer.state_dict(), before)
    assert torch.equal(layer(x), want)


BROKEN_8BIT = {
    "no SCB": lambda saved: saved.pop("SCB"),
    "no weight": lambda saved: saved.pop("weight"),
    "short SCB": shorten("SCB"),
    "SCB of another dtype": lambda saved: saved.update(SCB=saved["SCB"].half()),
    "numbers with SCB": lambda saved: saved.update(weight=saved["weight"].float()),
    "turing layout": lambda saved: saved.update(weight_format=torch.tensor(2, dtype=torch.uint8)),
    "unknown layout": lambda saved: saved.update(weight_format=torch.tensor(9, dtype=torch.uint8)),
}


@pytest.mark.parametrize("damage", BROKEN_8BIT.values(), ids=BROKEN_8BIT)
@pytest.mark.parametrize("quantized", [False, True], ids=["fresh", "quantized"])
def test_a_damaged_int8_checkpoint_is_refused_and_nothing_changes(damage, quantized):
    saved = detached(Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu"))
    damage(saved)
    layer = Linear8bitLt(64, 48, has_fp16_weights=False)
    layer = layer.to("cpu") if quantized else layer
    before = detached(layer)
    with pytest.raises(FormatError):
        layer.load_state_dict(saved)
    assert_same(layer.state_dict(), before)


def test_codes_do_not_go_into_a_layer_of_numbers():
    saved = Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu").state_dict()
    with pytest.raises(FormatError, match="has_fp16_weights=False"):
        Linear8bitLt(64, 48, has_fp16_weights=True).load_state_dict(saved)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_missing_unexpected_and_misfitting_keys_are_reported(kind):
    def make(n=48):
        return Linear4bit(64, n) if kind == "4bit" else Linear8bitLt(64, n, has_fp16_weights=False)

    layer, saved = make().to("cpu"), detached(make().to("cpu"))
    before = detached(layer)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(detached(make(40).to("cpu")))
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .*\(48, 63\)"):
        layer.load_state_dict({"weight": torch.randn(48, 63), "bias": before["bias"]})
    assert bits(layer.weight.data) == bits(before["weight"])
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": saved["bias"]})
    assert layer.load_state_dict({"bias": saved["bias"]}, strict=False).missing_keys in (["weight"], [])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight\.other"'):
        layer.load_state_dict(saved | {"weight.other": torch.zeros(1)})
    assert layer.load_state_dict(saved | {"other": torch.zeros(1)}, strict=False).unexpected_keys == ["other"]


def test_a_whole_model_loads_through_its_prefixes():
    def make():
        return nn.ModuleDict({"a": nn.Sequential(ours_4bit(), nn.ReLU()), "b": Linear4bit(64, 96, bias=False)})

    model, other = make(), make()
    model["b"].quantize()
    other.load_state_dict(model.state_dict())
    assert_same(other.state_dict(), model.state_dict())


def test_keep_vars_and_wrapped_parameters():
    layer = ours_4bit()
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    assert isinstance(layer.weight, Params4bit)
