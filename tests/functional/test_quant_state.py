"""``QuantState``: bitsandbytes' bytes both ways, and a clear refusal of everything else."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as B
import pytest
import torch
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from torch import Tensor

from qcore import functional as F
from qcore.errors import FormatError, InvalidArgument

KEY = "quant_state.bitsandbytes__nf4"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def theirs(nested: bool, quant_type: str = "nf4", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, B.QuantState]:
    A = random(33, 100, dtype=dtype)
    return B.quantize_4bit(A, quant_type=quant_type, compress_statistics=nested)


def assert_same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(mine) == list(other), "the same keys in the same order"
    for key, value in other.items():
        if isinstance(value, Tensor):
            assert (mine[key].dtype, mine[key].shape) == (value.dtype, value.shape)
            assert torch.equal(mine[key], value)
        else:
            assert mine[key] == value


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_gives_bitsandbytes_bytes(dtype: torch.dtype, quant_type: str, nested: bool, packed: bool) -> None:
    _, state = theirs(nested, quant_type, dtype)
    before = state.as_dict(packed=packed)
    mine = F.QuantState.from_dict(before, device="cpu")
    assert_same(mine.as_dict(packed=packed), state.as_dict(packed=packed))
    assert list(before) == list(state.as_dict(packed=packed)), "reading does not change the caller's dictionary"
    back = B.QuantState.from_dict(mine.as_dict(packed=packed), device="cpu")
    assert back == state
    assert_same(back.as_dict(packed=packed), state.as_dict(packed=packed))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_what_was_quantized_here(backend: object, nested: bool) -> None:
    packed, state = F.quantize_nf4(random(33, 100), compress_statistics=nested)
    back = B.QuantState.from_dict(state.as_dict(packed=True), device="cpu")
    assert torch.equal(B.dequantize_4bit(packed, back), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("content", [{}, {"a": 1.5, "b": [1, 2], "c": "é", "d": None}, {"offset": 0.04871530085802078}])
def test_packed_dictionaries_are_byte_for_byte_the_same(content: dict[str, Any]) -> None:
    assert torch.equal(F.pack_dict_to_tensor(content), pack_dict_to_tensor(content))
    assert F.unpack_tensor_to_dict(pack_dict_to_tensor(content)) == content
    assert unpack_tensor_to_dict(F.pack_dict_to_tensor(content)) == content


def test_keys_may_carry_a_prefix() -> None:
    _, state = theirs(True)
    prefixed = {f"model.layer.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert_same(F.QuantState.from_dict(prefixed, "cpu").as_dict(packed=True), state.as_dict(packed=True))


def test_the_packed_item_is_an_attribute_too() -> None:
    _, state = theirs(False)
    mine = F.QuantState.from_dict(state.as_dict(), "cpu")
    assert torch.equal(mine.bitsandbytes__nf4, state.bitsandbytes__nf4)
    for name in ("bitsandbytes__fp4", "missing"):
        with pytest.raises(AttributeError, match=name):
            getattr(mine, name)


@pytest.mark.parametrize("nested", [False, True])
def test_the_old_list_form(nested: bool) -> None:
    _, state = theirs(nested)
    mine = F.QuantState.from_dict(state.as_dict(), "cpu")
    assert mine[1:4] == state[1:4] == [state.shape, torch.bfloat16, 64]
    assert mine[5] == "nf4"
    assert torch.equal(mine[0], state[0])
    assert (mine[4] is None) == (not nested)
    if nested:
        assert mine[4] == [mine.offset, mine.state2]


def test_equality_sees_every_part() -> None:
    _, state = theirs(True)
    first = F.QuantState.from_dict(state.as_dict(), "cpu")
    assert first == F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert first == copy.deepcopy(first) == pickle.loads(pickle.dumps(first))
    changes: dict[str, Any] = {
        "absmax": first.absmax + 1,
        "shape": torch.Size((100, 33)),
        "dtype": torch.float16,
        "blocksize": 128,
        "quant_type": "fp4",
        "offset": first.offset + 1,
        "code": first.code + 0.01,
        "state2": None,
    }
    for name, value in changes.items():
        other = copy.deepcopy(first)
        setattr(other, name, value)
        assert first != other, name
    assert first != "nf4"


def test_to_moves_every_tensor() -> None:
    _, state = theirs(True)
    mine = F.QuantState.from_dict(state.as_dict(), "cpu")
    mine.to("meta")
    tensors = (mine.absmax, mine.code, mine.offset, mine.state2.absmax, mine.state2.code)
    assert all(tensor.is_meta for tensor in tensors)


def test_a_slightly_different_codebook_is_kept_as_it_was_stored() -> None:
    _, state = theirs(False)
    items = state.as_dict(packed=True)
    items["quant_map"] = items["quant_map"] + 5e-7
    mine = F.QuantState.from_dict(items, "cpu")
    assert torch.equal(mine.as_dict(packed=True)["quant_map"], items["quant_map"])


def test_absmax_in_sixteen_bits_is_read_as_float32() -> None:
    _, state = theirs(False)
    items = {**state.as_dict(packed=True), "absmax": state.absmax.bfloat16()}
    assert torch.equal(F.QuantState.from_dict(items, "cpu").absmax, state.absmax.bfloat16().float())


def test_a_state_of_blockwise_quantization_round_trips(backend: object) -> None:
    codes, state = F.quantize_blockwise(random(64, 64), blocksize=256, nested=True)
    back = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert back == state
    assert torch.equal(F.dequantize_blockwise(codes, back), F.dequantize_blockwise(codes, state))
    with pytest.raises(InvalidArgument, match="only a state of quantize_4bit"):
        state.weight(codes)


def edit(items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change values inside the packed item."""
    content = {**unpack_tensor_to_dict(items[KEY]), **changes}
    return {**items, KEY: pack_dict_to_tensor({key: value for key, value in content.items() if value != "absent"})}


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "truncated absmax": (lambda d: {**d, "absmax": d["absmax"][:-1]}, r"absmax has shape \(51,\), .* needs \(52,\)"),
    "transposed absmax": (
        lambda d: {**d, "absmax": d["absmax"].view(4, 13)},
        r"absmax has shape \(4, 13\), .* repacked the layer",
    ),
    "float absmax": (lambda d: {**d, "absmax": d["absmax"].float()}, r"absmax is torch.float32, .* needs uint8"),
    "absmax no tensor": (lambda d: {**d, "absmax": [1.0]}, r"absmax is a list"),
    "other codebook": (lambda d: {**d, "quant_map": d["quant_map"] * 0.9}, r"quant_map is not the nf4 codebook"),
    "short codebook": (lambda d: {**d, "quant_map": d["quant_map"][:15]}, r"quant_map is not the nf4 codebook"),
    "nested codebook": (lambda d: {**d, "nested_quant_map": d["nested_quant_map"][:16]}, r"nested_quant_map has shape"),
    "nested NaN": (lambda d: {**d, "nested_quant_map": d["nested_quant_map"] * torch.nan}, r"needs 256 finite values"),
    "nested absmax": (
        lambda d: {**d, "nested_absmax": torch.ones(2)},
        r"nested_absmax has shape \(2,\), .* need \(1,\)",
    ),
    "nested offset": (lambda d: edit(d, nested_offset="x"), r"nested_offset is 'x'"),
    "nested offset missing": (lambda d: edit(d, nested_offset="absent"), r"nested_absmax without nested_offset"),
    "nested blocksize": (lambda d: edit(d, nested_blocksize=100), r"nested_blocksize is 100"),
    "blocksize": (lambda d: edit(d, blocksize=65), r"blocksize is 65, needs a power of two"),
    "shape": (lambda d: edit(d, shape=[-1, 100]), r"shape is \[-1, 100\]"),
    "other shape": (
        lambda d: edit(d, shape=[64, 100]),
        r"a tensor of shape \(64, 100\) at blocksize 64 needs \(100,\)",
    ),
    "dtype": (lambda d: edit(d, dtype="int32"), r"dtype is 'int32', needs one of bfloat16, float16, float32"),
    "quant_type": (lambda d: edit(d, quant_type="af4"), r"quant_type is 'af4'"),
    "missing": (lambda d: edit(d, blocksize="absent"), r"blocksize missing; the checkpoint is incomplete"),
    "unknown": (lambda d: {**d, "zero_points": torch.ones(1)}, r"unknown item 'zero_points'"),
    "twice": (lambda d: {**d, "blocksize": 64}, r"item 'blocksize' appears twice"),
    "two packed": (lambda d: {**d, "quant_state.bitsandbytes__fp4": d[KEY]}, r"needs one item"),
    "other packed": (lambda d: {**{k: v for k, v in d.items() if k != KEY}, KEY + "x": d[KEY]}, r"needs one item"),
    "no packed": (lambda d: {k: v for k, v in d.items() if k != KEY}, r"missing; the checkpoint is incomplete"),
    "cut JSON": (lambda d: {**d, KEY: d[KEY][:-5]}, r"not the JSON object"),
    "no text": (lambda d: {**d, KEY: torch.full((4,), 255, dtype=torch.uint8)}, r"not the JSON object"),
    "no object": (lambda d: {**d, KEY: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, r"it holds a list"),
    "no bytes": (lambda d: {**d, KEY: torch.ones(4)}, r"torch.float32, not uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_state_is_refused(case: str) -> None:
    damage, message = BAD[case]
    _, state = theirs(True)
    items = state.as_dict(packed=True)
    F.QuantState.from_dict(items, "cpu")
    with pytest.raises(FormatError, match=message):
        F.QuantState.from_dict(damage(items), "cpu")


def test_the_packed_text_is_the_one_that_the_format_names() -> None:
    _, state = theirs(True)
    text = bytes(F.QuantState.from_dict(state.as_dict(), "cpu").as_dict(packed=True)[KEY].tolist()).decode()
    assert text == json.dumps(
        {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [33, 100],
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": state.offset.item(),
        }
    )
