"""Embedding tables: rows read back exactly, and only those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcore.errors import InvalidArgument
from qcore.nn import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, Params4bit, StableEmbedding
from truth import f64, weight_4bit

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [EmbeddingNF4, EmbeddingFP4])
@pytest.mark.parametrize(("rows", "dim"), [(10, 64), (7, 192), (11, 96), (13, 63), (5, 1), (9, 65), (3, 200), (1, 31)])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_rows_are_those_of_the_decoded_table(dtype, kind, rows, dim, nested):
    layer = kind(rows, dim, dtype=dtype)
    layer.weight = Params4bit(layer.weight.data, **{**layer.weight.__dict__, "compress_statistics": nested})
    layer = layer.to("cpu")
    table = torch.from_numpy(weight_4bit(layer.weight.data, layer.weight.quant_state)).to(dtype)
    for index in (torch.arange(rows), torch.randint(0, rows, (2, 3)), torch.tensor(rows - 1), torch.empty(0, 4).int()):
        got = layer(index)
        assert got.dtype == dtype
        assert torch.equal(got, table[index.long()])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_storage_dtype_does_not_matter(storage):
    weight = torch.randn(8, 64)
    layer = EmbeddingNF4(8, 64, quant_storage=storage)
    layer.load_state_dict({"weight": weight})
    plain = EmbeddingNF4(8, 64)
    plain.load_state_dict({"weight": weight})
    index = torch.arange(8)
    assert torch.equal(layer.to("cpu")(index), plain.to("cpu")(index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_are_codes_times_scale(dtype):
    layer = Embedding8bit(12, 40, dtype=dtype).to("cpu")
    index = torch.randint(0, 12, (3, 5))
    codes, scales = layer.weight.data.numpy().astype(np.float32), layer.weight.SCB.numpy()
    table = (codes * scales[:, None]) * np.float32(float.fromhex("0x1.020408p-7"))
    assert torch.equal(layer(index), torch.from_numpy(table).to(dtype)[index])
    assert layer(index).dtype == dtype


@pytest.mark.parametrize(
    "make", [lambda: Embedding8bit(6, 64), lambda: EmbeddingNF4(6, 64), lambda: EmbeddingNF4(6, 65)]
)
def test_bad_use_is_refused(make):
    layer = make()
    with pytest.raises(InvalidArgument, match="not quantized yet"):
        layer(torch.tensor([0]))
    layer.to("cpu")
    for index in (6, -1):
        with pytest.raises((IndexError, RuntimeError), match="index out of range"):
            layer(torch.tensor([0, index]))
    with pytest.raises(InvalidArgument, match="indices"):
        layer(torch.tensor([0.0]))


@pytest.mark.parametrize("make", [lambda: Embedding8bit(6, 64), lambda: Embedding4bit(6, 64)])
def test_rows_follow_conversions_of_the_module(make):
    layer = make().to("cpu")
    codes = layer.weight.data.clone()
    assert layer.half()(torch.tensor([1])).dtype == torch.float16
    assert layer.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    assert torch.equal(layer.weight.data, codes)


@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_float_tables_ask_for_32_bit_optimizer_state(kind):
    layer = kind(20, 16, padding_idx=3)
    assert layer._optim_bits_override == {"weight": 32}
    assert torch.equal(layer.weight[3], torch.zeros(16))
    bound = (6 / (20 + 16)) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > 0.8 * bound


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_stable_embedding_normalizes_in_full_precision(dtype):
    layer = StableEmbedding(20, 16).to(dtype)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2.0)
        layer.norm.bias.normal_()
    index = torch.randint(0, 20, (2, 5))
    rows = f64(layer.weight)[index.numpy()]
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + layer.norm.eps)
    want = torch.from_numpy(normed * f64(layer.norm.weight) + f64(layer.norm.bias))
    got = layer(index)
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert torch.allclose(got.double(), want, rtol=1.01 * tolerance, atol=tolerance if dtype.itemsize > 2 else 1e-4)
    got.sum().backward()
    assert layer.weight.grad is not None
    assert layer.norm.weight.grad is not None
