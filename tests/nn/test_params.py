"""Parameters that hold codes: moved, copied and pickled whole."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qcore import functional as F
from qcore.errors import FormatError, InvalidArgument, InvalidDtype
from qcore.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

pytestmark = pytest.mark.usefixtures("backend")


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}


def same_4bit(a: Params4bit, b: Params4bit) -> bool:
    state = {"absmax": "absmax", "code": "code"} | ({"nested_absmax": "nested_absmax"} if a.compress_statistics else {})
    return (
        type(a) is type(b) is Params4bit
        and torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in state)
        and (a.blocksize, a.quant_type, a.quant_storage, a.compress_statistics, a.bnb_quantized)
        == (b.blocksize, b.quant_type, b.quant_storage, b.compress_statistics, b.bnb_quantized)
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_the_first_move_to_a_device_quantizes(quant_type, nested, storage, blocksize):
    source = torch.randn(24, 128)
    options = {"quant_type": quant_type, "compress_statistics": nested}
    options |= {"quant_storage": storage, "blocksize": blocksize}
    param = Params4bit(source.clone(), **options)
    assert not param.bnb_quantized
    moved = param.to("cpu")
    packed, state = F.quantize_4bit(source, **options)
    assert isinstance(moved, Params4bit)
    assert moved.dtype == storage
    assert moved.bnb_quantized
    assert torch.equal(moved.data.view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(moved.absmax, state.absmax)
    assert moved.quant_state.shape == (24, 128)
    assert moved.to("cpu") is moved


def test_meta_and_dtype_alone_do_not_quantize():
    param = Params4bit(torch.randn(8, 64), quant_type="nf4")
    half, meta = param.to(torch.float16), param.to("meta")
    assert (half.dtype, half.bnb_quantized, half.quant_type) == (torch.float16, False, "nf4")
    assert (meta.is_meta, meta.bnb_quantized, meta.shape) == (True, False, (8, 64))
    assert param.dtype == torch.float32
    assert not param.bnb_quantized
    with pytest.raises(InvalidArgument, match="meta"):
        meta.quantize()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "convert",
    [lambda p: p.to(torch.float16), lambda p: p.half(), lambda p: p.to("cpu", torch.float16), lambda p: p.float()],
    ids=["to", "half", "to both", "float"],
)
def test_codes_survive_a_change_of_dtype(storage, convert):
    param = Params4bit(torch.randn(8, 64), quant_type="nf4", quant_storage=storage).quantize()
    codes = param.data.view(torch.uint8).clone()
    converted = convert(param)
    assert converted.dtype == storage
    assert torch.equal(converted.data.view(torch.uint8), codes)
    with pytest.raises(InvalidDtype, match="float64"):
        param.double()


def test_quantized_weights_move_whole_and_leave_the_source_alone():
    param = Params4bit(torch.randn(64, 64), quant_type="nf4").quantize()
    meta = param.to("meta")
    assert meta.is_meta
    assert meta.absmax.is_meta
    assert meta.nested_absmax.is_meta
    assert meta.offset.is_meta
    assert not param.absmax.is_meta
    assert not param.nested_absmax.is_meta


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_4bit_parameters_are_copied_whole(copier, quantized, nested):
    param = Params4bit(torch.randn(16, 64), quant_type="nf4", compress_statistics=nested, blocksize=128, note="kept")
    if quantized:
        param.quantize()
    again = copier(param)
    assert again.note == "kept"
    assert again.requires_grad == param.requires_grad
    if quantized:
        assert same_4bit(param, again)
    else:
        assert torch.equal(again.data, param.data)
        assert (again.blocksize, again.bnb_quantized) == (128, False)
    shares = again.data_ptr() == param.data_ptr()
    assert shares == (copier is copy.copy)


def test_its_own_dict_is_accepted():
    param = Params4bit(torch.randn(16, 64), quant_type="nf4", quant_storage=torch.bfloat16).quantize()
    param._is_hf_initialized = True
    again = Params4bit(param.data, requires_grad=False, **param.__dict__)
    assert same_4bit(param, again)
    assert again._is_hf_initialized
    codes = Int8Params(torch.randn(4, 8)).quantize()
    assert torch.equal(Int8Params(codes.data, requires_grad=False, **codes.__dict__).SCB, codes.SCB)


def test_copies_of_a_layer_own_their_weights():
    layer = Linear4bit(64, 32, quant_type="nf4").quantize()
    for copier in (copy.deepcopy, COPIERS["pickle"]):
        again = copier(layer)
        assert again.weight.module is again
        assert again.quant_state is again.weight.quant_state
        assert again.weight.quant_state is not layer.weight.quant_state
        x = torch.randn(3, 64)
        want = layer(x)
        assert torch.equal(again(x), want)
        again.weight.data.zero_()
        assert torch.equal(layer(x), want)
        assert not torch.equal(again(x), want)
    alone = copy.deepcopy(layer.weight)
    assert alone.module is layer, "a copy of the parameter alone does not copy its layer"


def test_ties_survive_a_deep_copy():
    a, b = Linear4bit(64, 64, bias=False), Linear4bit(64, 64, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b).to("cpu")
    assert model[0].weight is model[1].weight
    again = copy.deepcopy(model)
    assert again[0].weight is again[1].weight
    x = torch.randn(2, 64)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_prequantized_entries_make_a_weight(nested):
    param = Params4bit(torch.randn(16, 64), quant_type="nf4", compress_statistics=nested).quantize()
    entries = param.quant_state.as_dict(packed=True)
    before = dict(entries)
    layer = Linear4bit(64, 16)
    again = Params4bit.from_prequantized(param.data, entries, device="cpu", module=layer)
    assert same_4bit(param, again)
    assert layer.quant_state is again.quant_state
    assert entries.keys() == before.keys(), "the caller's dict stays as it is"
    with pytest.raises(FormatError, match="bytes"):
        Params4bit.from_prequantized(param.data[:-1], entries, device="cpu")


def test_parts_are_found_by_the_names_of_a_state_dict():
    flat = Params4bit(torch.randn(16, 64), compress_statistics=False).quantize()
    nested = Params4bit(torch.randn(16, 64), compress_statistics=True).quantize()
    assert flat.quant_map is flat.code is flat.quant_state.code
    assert nested.nested_absmax is nested.state2.absmax
    assert nested.nested_quant_map is nested.state2.code
    assert (nested.nested_blocksize, nested.nested_dtype) == (256, torch.float32)
    assert nested.nested_offset is nested.offset
    for name in ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype"):
        assert not hasattr(flat, name)
    assert not hasattr(Params4bit(torch.randn(16, 64)), "absmax")


@pytest.mark.parametrize("cut", [torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split])
def test_pieces_are_parameters_too(cut):
    param = Params4bit(torch.randn(16, 64), quant_type="nf4").quantize()
    count = 4 if "chunk" in cut.__name__ else param.shape[0] // 4
    pieces = cut(param, count)
    assert len(pieces) == 4
    assert all(type(piece) is Params4bit and piece.quant_state is param.quant_state for piece in pieces)
    assert torch.equal(torch.cat([piece.data for piece in pieces]), param.data)


def test_bad_options_are_named():
    with pytest.raises(InvalidArgument, match="quant_type is 'int4'"):
        Params4bit(torch.randn(4, 4), quant_type="int4")
    with pytest.raises(InvalidArgument, match="blocksize is 48"):
        Params4bit(torch.randn(4, 4), blocksize=48)
    with pytest.raises(InvalidDtype, match="float64"):
        Params4bit(torch.randn(4, 4, dtype=torch.float64)).to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_weights_are_quantized_as_they_are(dtype):
    source = (torch.randn(8, 32) * 1e3).to(dtype)
    source[0, 0] = 60000.0
    param = Int8Params(source.clone(), requires_grad=False).to("cpu")
    assert param.dtype == torch.int8
    assert param.CB is not None
    assert torch.equal(param.SCB, source.float().abs().amax(1))
    error = (param.CB.float() * param.SCB[:, None] / 127 - source.float()).abs()
    assert (error <= param.SCB[:, None] / 254 * 1.00001).all()
    kept = Int8Params(source.clone(), has_fp16_weights=True).to("cpu")
    assert kept.dtype == dtype
    assert kept.CB is None
    assert kept.SCB is None


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_int8_parameters_are_copied_whole(copier):
    param = Int8Params(torch.randn(8, 32), requires_grad=False, note="kept").quantize()
    again = copier(param)
    assert type(again) is Int8Params
    assert again.note == "kept"
    assert torch.equal(again.data, param.data)
    assert torch.equal(again.SCB, param.SCB)
    assert torch.equal(param.half().data, param.data)
    meta = param.to("meta")
    assert meta.is_meta
    assert meta.SCB.is_meta
    assert not param.SCB.is_meta


@pytest.mark.parametrize("make", [lambda: Linear4bit(64, 32), lambda: Linear8bitLt(64, 32, has_fp16_weights=False)])
def test_a_module_moves_to_meta_and_back_empty(make):
    layer = make().to("cpu")
    codes = layer.weight.data.clone()
    parameter = layer.weight
    layer.to("cpu")
    assert layer.weight is parameter
    layer.half().float().bfloat16()
    assert torch.equal(layer.weight.data, codes)
    layer.to("meta")
    assert layer.weight.is_meta
    assert all(value.is_meta for value in layer.state_dict().values() if value.numel() == 32)
    layer.to_empty(device="cpu")
    assert layer.weight.device.type == "cpu"
    assert layer.weight.shape == codes.shape
    if isinstance(layer, Linear4bit):
        assert layer.weight.absmax.device.type == "cpu"
        assert layer.quant_state is layer.weight.quant_state
    else:
        assert layer.weight.SCB.device.type == "cpu"
