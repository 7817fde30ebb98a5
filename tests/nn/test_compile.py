"""``torch.compile(fullgraph=True)``: no graph breaks, and the results of eager mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcore import functional as F
from qcore.autograd import MatmulLtState, matmul, matmul_4bit
from qcore.nn import Embedding8bit, EmbeddingNF4, Linear4bit, Linear8bitLt
from qcore.ops.int8_linear import int8_linear

pytestmark = pytest.mark.usefixtures("backend")


def compiled(function, mode="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=mode)


class Small(nn.Module):
    def __init__(self, threshold=0.0):
        super().__init__()
        self.embed = EmbeddingNF4(40, 64)
        self.first = Linear4bit(64, 96, quant_type="nf4")
        self.second = Linear8bitLt(96, 64, has_fp16_weights=False, threshold=threshold)
        self.third = Linear4bit(64, 16, compress_statistics=False, quant_storage=torch.bfloat16)

    def forward(self, index):
        return self.third(self.second(nn.functional.gelu(self.first(self.embed(index)))))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_a_small_model_compiles_without_breaks(threshold, mode):
    model = Small(threshold).to("cpu")
    index = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        want = model(index)
        got = compiled(model, mode)(index)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    if mode != "inductor":
        assert torch.equal(got, want)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_eager_mode(threshold, dtype):
    model = (
        nn.Sequential(
            Linear4bit(64, 96, quant_type="nf4"),
            nn.ReLU(),
            Linear8bitLt(96, 64, has_fp16_weights=False, threshold=threshold),
        )
        .to(dtype)
        .to("cpu")
    )
    fast = compiled(model)
    x = torch.randn(5, 64).to(dtype)
    results = []
    for run in (model, fast):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.float().square().sum().backward()
        results.append((y, leaf.grad, model[0].bias.grad.clone(), model[2].bias.grad.clone()))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_a_trained_int8_weight_compiles():
    layer = Linear8bitLt(64, 32, has_fp16_weights=True, threshold=2.0)
    x = torch.randn(5, 64)
    results = []
    for run in (layer, compiled(layer)):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append((y, layer.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_functions_compile():
    packed, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    assert torch.equal(compiled(lambda a: matmul_4bit(a, packed, state))(x), matmul_4bit(x, packed, state))
    assert torch.equal(compiled(lambda a: matmul(a, weight))(x), matmul(x, weight))
    cached = MatmulLtState(threshold=1.0, is_training=False)
    assert torch.equal(compiled(lambda a: matmul(a, weight, state=cached))(x), matmul(x, weight, threshold=1.0))


def test_shapes_may_be_dynamic():
    model = nn.Sequential(Linear4bit(64, 32), Linear8bitLt(32, 16, has_fp16_weights=False, threshold=1.0)).to("cpu")
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (1, 2, 5, 8):
            x = torch.randn(rows, 3, 64)
            assert torch.equal(fast(x), model(x))


def test_autocast_is_traced():
    model = nn.Sequential(Linear4bit(64, 32), Linear8bitLt(32, 16, has_fp16_weights=False)).to("cpu")
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = model(x), compiled(model)(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_a_changed_weight_is_seen_by_compiled_code():
    layer, other, x = (
        Linear4bit(64, 32, bias=False).to("cpu"),
        Linear4bit(64, 32, bias=False).to("cpu"),
        torch.randn(2, 64),
    )
    fast = compiled(layer)
    with torch.no_grad():
        assert torch.equal(fast(x), layer(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(fast(x), other(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear4bit(64, 32),
        lambda: Linear8bitLt(64, 32, has_fp16_weights=False),
        lambda: Linear8bitLt(64, 32, has_fp16_weights=False, threshold=1.0),
    ],
    ids=["4 bits", "8 bits", "8 bits with outliers"],
)
def test_eager_calls_between_compiled_ones_compile_nothing_again(make):
    layer, graphs = make().to("cpu"), []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast, x = torch.compile(layer, fullgraph=True, backend=count), torch.randn(2, 64)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(x), layer(x))
    assert len(graphs) == 1


def test_the_embedding_of_bytes_compiles():
    layer = Embedding8bit(12, 40).to("cpu")
    index = torch.randint(0, 12, (4,))
    assert torch.equal(compiled(layer)(index), layer(index))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_registered_op_keeps_torchs_rules(threshold, trained):
    A, bias = torch.randn(3, 40, requires_grad=True), torch.randn(16, requires_grad=True)
    if trained:
        B, scales = torch.randn(16, 40, requires_grad=True), None
    else:
        B, scales = torch.randint(-127, 128, (16, 40), dtype=torch.int8), torch.rand(16)
    # Gradients are those of the quantized product on purpose, so gradcheck by differences does not apply.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qcore.int8_linear, (A, B, scales, bias, threshold), test_utils=checks)
    assert int8_linear(A, B, scales, bias, threshold)[0].requires_grad
