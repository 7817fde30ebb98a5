"""GPTQ's and AWQ's tensors against readers that take every nibble by hand, and both ways without a loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcore.errors import FormatError, InvalidArgument
from qcore.functional import awq_layers as awq
from qcore.functional import gptq_layers as gptq
from qcore.ops.int4 import checked_order, checked_weight, dequantize_int4

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()


def nibble(word: int, j: int) -> int:
    return (word & 0xFFFFFFFF) >> (4 * j) & 15


def gptq_layer(inputs: int, outputs: int, group: int, *, act_order: bool) -> dict[str, Tensor]:
    groups = -(-inputs // group)
    g_idx = torch.arange(inputs, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(5))]
    scales = torch.rand(groups, outputs, generator=torch.Generator().manual_seed(1)).half() * 0.1
    return {
        "qweight": words(inputs // 8, outputs),
        "qzeros": words(groups, outputs // 8, seed=2),
        "scales": scales,
        "g_idx": g_idx,
    }


def read_gptq_by_hand(layer: dict[str, Tensor], *, adds_one: bool) -> Tensor:
    """``W (O, I)``, one element at a time, from the description of the format."""
    qweight, qzeros = layer["qweight"].tolist(), layer["qzeros"].tolist()
    scales, g_idx = layer["scales"].double().tolist(), layer["g_idx"].tolist()
    inputs, outputs = 8 * len(qweight), len(qweight[0])
    if adds_one:
        qzeros = [[(word + 0x11111111) % 2**32 for word in row] for row in qzeros]
    rows = []
    for o in range(outputs):
        row = []
        for i in range(inputs):
            q, g = nibble(qweight[i // 8][o], i % 8), g_idx[i]
            row.append(scales[g][o] * (q - nibble(qzeros[g][o // 8], o % 8)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def read_awq_by_hand(layer: dict[str, Tensor], group: int) -> Tensor:
    qweight, qzeros, scales = layer["qweight"].tolist(), layer["qzeros"].tolist(), layer["scales"].double().tolist()
    outputs = 8 * len(qweight[0])
    w = torch.empty(outputs, len(qweight), dtype=torch.float64)
    for i, line in enumerate(qweight):
        for c, word in enumerate(line):
            for j in range(8):
                o = 8 * c + AWQ_ORDER[j]
                w[o, i] = scales[i // group][o] * (nibble(word, j) - nibble(qzeros[i // group][c], j))
    return w


@pytest.mark.parametrize("version", gptq.FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(64, 16, 32), (72, 24, 32), (40, 8, 40)])
def test_gptq_layers_mean_what_the_format_says(
    inputs: int, outputs: int, group: int, act_order: bool, version: str
) -> None:
    layer = gptq_layer(inputs, outputs, group, act_order=act_order)
    weight = checked_order(checked_weight(gptq.read_layer(layer, group, version)))
    assert (weight.perm is not None) == (act_order and group < inputs)
    expected = read_gptq_by_hand(layer, adds_one=version == "gptq")
    assert torch.equal(dequantize_int4(weight, torch.float32).double(), expected)


@pytest.mark.parametrize("version", gptq.FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_layers_are_written_as_they_were_read(act_order: bool, version: str) -> None:
    layer = gptq_layer(72, 24, 32, act_order=act_order)
    written = gptq.write_layer(gptq.read_layer(layer, 32, version), version)
    assert written.keys() == layer.keys()
    assert all(torch.equal(written[name], layer[name]) for name in layer)


@pytest.mark.parametrize(("version", "word"), [("gptq", 0x77777777), ("gptq_v2", -0x77777778)])
def test_a_symmetric_gptq_layer_keeps_no_zero_points(version: str, word: int) -> None:
    layer = gptq_layer(64, 16, 32, act_order=False) | {"qzeros": torch.full((2, 2), word, dtype=torch.int32)}
    weight = gptq.read_layer(layer, 32, version)
    assert weight.zeros is None
    assert torch.equal(gptq.write_layer(weight, version)["qzeros"], layer["qzeros"])


def test_one_group_and_a_missing_order() -> None:
    layer = gptq_layer(64, 16, 64, act_order=False)
    expected = read_gptq_by_hand(layer, adds_one=False)
    del layer["g_idx"]
    assert torch.equal(dequantize_int4(gptq.read_layer(layer, -1, "gptq_v2"), torch.float32).double(), expected)


@pytest.mark.parametrize(("inputs", "outputs", "group"), [(64, 16, 32), (48, 24, 16), (40, 8, -1)])
def test_awq_layers_mean_what_the_format_says_and_are_written_back(inputs: int, outputs: int, group: int) -> None:
    size = inputs if group == -1 else group
    scales = torch.rand(inputs // size, outputs, generator=torch.Generator().manual_seed(1)).half()
    layer = {"qweight": words(inputs, outputs // 8), "qzeros": words(inputs // size, outputs // 8), "scales": scales}
    weight = checked_weight(awq.read_layer(layer, group))
    assert torch.equal(dequantize_int4(weight, torch.float32).double(), read_awq_by_hand(layer, size))
    written = awq.write_layer(weight)
    assert written.keys() == layer.keys()
    assert all(torch.equal(written[name], layer[name]) for name in layer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qweight": None}, "qweight is missing"),
        ({"qweight": torch.zeros(8, 16)}, "qweight is torch.float32, needs int32"),
        ({"scales": torch.ones(3, 16)}, "is group_size right"),
        ({"qzeros": torch.zeros(2, 16, dtype=torch.int32)}, "is group_size right"),
        ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "needs a float dtype"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "groups of unequal length"),
    ],
)
def test_a_damaged_gptq_layer_is_refused(change: dict[str, Tensor | None], says: str) -> None:
    layer = {
        name: value for name, value in (gptq_layer(64, 16, 32, act_order=False) | change).items() if value is not None
    }
    with pytest.raises(FormatError, match=says) as refusal:
        gptq.read_layer(layer, 32, "gptq", "model.q_proj")
    assert "model.q_proj" in str(refusal.value)


def test_what_a_format_has_no_place_for_is_refused() -> None:
    ordered = gptq.read_layer(gptq_layer(64, 16, 32, act_order=True), 32, "gptq")
    with pytest.raises(InvalidArgument, match="no order of columns"):
        awq.write_layer(ordered)
    ragged = gptq.read_layer(gptq_layer(72, 24, 32, act_order=False), 32, "gptq")
    with pytest.raises(InvalidArgument, match="groups to divide the inputs"):
        awq.write_layer(ragged)
    with pytest.raises(FormatError, match="do not divide"):
        awq.read_layer({"qweight": words(40, 2), "qzeros": words(2, 2), "scales": torch.ones(2, 16)}, 32, "layer")
