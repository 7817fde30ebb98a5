"""``LinearInt4``: products, gradients, tracing, moves, copies, and checkpoints in three formats."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from qcore.backend.registry import use_backend
from qcore.backend.weights import WeightInt4
from qcore.errors import FormatError, InvalidArgument
from qcore.nn import LinearInt4
from qcore.ops.int4 import dequantize_int4


def random_weight(n: int = 24, k: int = 64, group: int = 32, *, ordered: bool = False) -> WeightInt4:
    generator = torch.Generator().manual_seed(0)
    groups = -(-k // group)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).half()
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    perm = torch.randperm(k, generator=generator).int() if ordered else None
    return WeightInt4(packed, scales, zeros, group, (n, k), perm)


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "cpu_reference"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_multiplies_by_the_decoded_weight(dtype: torch.dtype, ordered: bool, backend: str) -> None:
    weight, bias = random_weight(ordered=ordered), random_input(24)
    layer = LinearInt4.of(weight, bias)
    decoded = dequantize_int4(weight, torch.float32).to(dtype)
    for shape in ((1, 64), (2, 3, 64), (33, 64)):
        x = random_input(*shape, dtype=dtype)
        expected = nn.functional.linear(x.double(), decoded.double(), bias.double())
        with use_backend(backend):
            first, second = layer(x), layer(x)  # the first prepares, the second takes the short path
        assert torch.equal(first, second)
        assert first.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert (first.double() - expected).abs().max() <= tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize("part", ["packed", "scales", "scales.data", "zeros", "perm"])
def test_a_part_that_is_replaced_counts_from_the_next_call(part: str) -> None:
    weight = random_weight(ordered=True)
    layer, x = LinearInt4.of(weight), random_input(2, 64)
    before = [layer(x), layer(x)][1]
    parameter = layer.weight
    if part == "packed":
        parameter.data = weight.packed.flip(0)
    elif part == "scales.data":
        parameter.scales.data = weight.scales.flip(0)
    else:
        setattr(parameter, part, getattr(weight, part).flip(0))
    after = layer(x)
    assert not torch.equal(after, before)
    expected = x @ dequantize_int4(parameter.value(), torch.float32).T
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow_to_the_input_and_the_bias() -> None:
    weight = random_weight(ordered=True)
    layer = LinearInt4.of(weight, torch.zeros(24))
    layer.bias.requires_grad_()
    x = random_input(5, 64).requires_grad_()
    gradient = random_input(5, 24)
    layer(x).backward(gradient)
    assert torch.allclose(x.grad, gradient @ dequantize_int4(weight, torch.float32), atol=1e-5)
    assert torch.allclose(layer.bias.grad, gradient.sum(0), atol=1e-5)


def test_the_layer_compiles_in_one_graph() -> None:
    layer, x = LinearInt4.of(random_weight(ordered=True)), random_input(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_autocast_decides_the_dtype() -> None:
    layer, x = LinearInt4.of(random_weight()), random_input(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda l: l.to("cpu")]
)
def test_copies_compute_the_same(again) -> None:
    layer, x = LinearInt4.of(random_weight(ordered=True), torch.ones(24)), random_input(2, 64)
    expected = layer(x)
    assert torch.equal(again(layer)(x), expected)
    assert layer.half()(x).dtype == torch.float32
    assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "awq"])
def test_a_state_dict_goes_through_a_fresh_layer(checkpoint_format: str) -> None:
    weight = random_weight(ordered=checkpoint_format != "awq")
    layer = LinearInt4.of(weight, torch.ones(24), checkpoint_format=checkpoint_format)
    state = layer.state_dict()
    names = {"qweight", "qzeros", "scales", "bias"} | ({"g_idx"} if checkpoint_format != "awq" else set())
    assert set(state) == names
    fresh = LinearInt4(64, 24, group_size=32, checkpoint_format=checkpoint_format)
    fresh.load_state_dict(state)
    # g_idx says which columns are in a group, not their order there: the weight is the same, sums may round elsewhere.
    assert torch.equal(dequantize_int4(fresh.weight.value(), torch.float32), dequantize_int4(weight, torch.float32))
    x = random_input(3, 64)
    assert torch.allclose(fresh(x), layer(x), atol=1e-5)
    again = fresh.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in names)


def test_what_does_not_fit_is_refused() -> None:
    layer = LinearInt4(64, 24, group_size=32)
    with pytest.raises(InvalidArgument, match="no weight yet"):
        layer(random_input(1, 64))
    with pytest.raises(InvalidArgument, match="checkpoint_format is 'marlin'"):
        LinearInt4(64, 24, checkpoint_format="marlin")
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.zeros(24)})
    state = LinearInt4.of(random_weight()).state_dict()
    with pytest.raises(FormatError, match="is group_size right"):
        LinearInt4(64, 24, False, group_size=16).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LinearInt4(64, 32, False, group_size=32).load_state_dict(state)
    doubled = WeightInt4(*(getattr(random_weight(), name) for name in ("packed", "scales", "zeros")), 32, (24, 64),
                         torch.zeros(64, dtype=torch.int32))  # fmt: skip
    with pytest.raises(InvalidArgument, match="no permutation"):
        LinearInt4.of(doubled)
