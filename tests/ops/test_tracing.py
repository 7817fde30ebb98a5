"""Tracers see every op: exact fakes, no graph breaks, dynamic shapes, meta tensors, dispatch modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from expected import random
from qcore import codebooks
from qcore.backend import OPS
from qcore.backend.interface import Weight4bit
from qcore.ops import blockwise, fourbit, int8, optimizer

pytestmark = pytest.mark.usefixtures("backend")
DYNAMIC = torch.tensor(codebooks.DYNAMIC)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def optimizer_arguments() -> tuple[Any, ...]:
    """8-bit Adam on two tensors, as the flat lists of the schema."""
    params, grads = [random(5, 33), random(300)], [random(5, 33), random(300)]
    states = [[torch.full_like(p, code, dtype=torch.uint8) for p in params] for code in (127, 0)]
    absmax = [[torch.zeros(-(-p.numel() // 256)) for p in params] for _ in range(2)]
    rule = optimizer.optimizer_rule("adam", lr=0.01, step=1, betas=(0.9, 0.99), eps=1e-8, state_bits=8)
    tensors = optimizer.OptimizerTensors(params, grads, *states, *absmax)
    return optimizer.schema_arguments(rule, tensors)


def int4_weight() -> tuple[Any, ...]:
    """Groups of 32 in another order, as the flat arguments of the schema."""
    bytes_ = torch.arange(12 * 32, dtype=torch.int32).to(torch.uint8).view(12, 32)
    perm = torch.randperm(64, generator=torch.Generator().manual_seed(3)).int()
    return bytes_, random(12, 2).half(), bytes_[:, :2] & 15, 32, (12, 64), perm


def arguments(op: str) -> tuple[Any, ...]:
    """One valid call of ``torch.ops.qcore.<op>``."""
    packed, absmax = fourbit.quantize_4bit(random(12, 64), "nf4", 64)
    nested = fourbit.quantize_absmax(absmax, DYNAMIC, 256)
    weight = (packed.view(-1), nested[0], "nf4", 64, (12, 64), nested[1], DYNAMIC, nested[2], 256)
    calls: dict[str, tuple[Any, ...]] = {
        "quantize_blockwise": (random(5, 33), DYNAMIC, 32),
        "dequantize_blockwise": (codes(5, 33).view(torch.uint8), random(6).abs(), DYNAMIC, 32, torch.bfloat16),
        "quantize_4bit": (random(5, 33), "fp4", 64),
        "dequantize_4bit": (*weight, torch.float16),
        "quantize_absmax": (absmax, DYNAMIC, 256),
        "dequantize_absmax": (nested[0], nested[1], DYNAMIC, nested[2], 256),
        "gemm_4bit": (random(2, 3, 64), random(12), *weight),
        "gemm_4bit_transposed": (random(2, 3, 12), *weight),
        "int8_quantize_rows": (random(2, 3, 40), 1.5),
        "int8_quantize_cols": (random(6, 40), 1.5),
        "int8_gemm": (codes(2, 3, 40), codes(12, 40)),
        "int8_dequantize_gemm": (torch.arange(72).int().view(2, 3, 12), random(6), random(12), None, torch.float16),
        "int8_scaled_gemm": (codes(2, 3, 40), codes(12, 40), random(6), random(12), random(12), torch.bfloat16),
        "int8_dequantize_rows": (codes(2, 3, 40), random(6), torch.float32),
        "int8_linear_transposed": (random(2, 3, 12), codes(12, 40), random(12).abs()),
        "int8_linear": (random(2, 3, 40), codes(12, 40), random(12).abs(), random(12), 1.5),
        "gemm_int4": (random(2, 3, 64), random(12), *int4_weight()),
        "optimizer_step": optimizer_arguments(),
    }
    return calls[op]


def moved(part: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """An argument with its tensors moved."""
    if isinstance(part, list):
        return [moved(entry, move) for entry in part]
    return move(part) if isinstance(part, Tensor) else part


def results(value: Any) -> list[Tensor]:
    return [part for part in (value if isinstance(value, tuple) else (value,)) if part is not None]


@pytest.mark.parametrize("op", OPS)
def test_every_op_passes_torchs_own_checks(op: str) -> None:
    overload = getattr(torch.ops.qcore, op).default
    torch.library.opcheck(overload, arguments(op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_the_fake_has_the_shapes_dtypes_and_strides_of_the_result(op: str, where: str) -> None:
    overload, call = getattr(torch.ops.qcore, op), arguments(op)
    real = results(overload(*call))
    if where == "meta":
        fake = results(overload(*(moved(part, lambda tensor: tensor.to("meta")) for part in call)))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = results(overload(*(moved(part, mode.from_tensor) for part in call)))
    assert [(a.shape, a.dtype, a.stride()) for a in fake] == [(a.shape, a.dtype, a.stride()) for a in real]


def weight_4bit() -> Weight4bit:
    packed, absmax = fourbit.quantize_4bit(random(12, 64), "nf4", 64)
    return Weight4bit(packed.view(-1), absmax, "nf4", 64, (12, 64))


CODES, SCALES = codes(12, 64), torch.ones(12)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[int], Tensor]]] = {
    "blockwise": (
        lambda x: blockwise.dequantize_blockwise(
            *blockwise.quantize_blockwise(x.relu(), DYNAMIC, 64), DYNAMIC, 64, torch.float32
        ),
        lambda m: random(m, 64, seed=m),
    ),
    "quantize_4bit": (lambda x: fourbit.quantize_4bit(x * 2, "nf4", 64), lambda m: random(m, 64, seed=m)),
    "int8": (
        lambda x: int8.int8_scaled_gemm(
            int8.int8_quantize_rows(x * 2)[0], CODES, int8.int8_quantize_rows(x * 2)[1], SCALES
        ),
        lambda m: random(m, 64, seed=m),
    ),
    "int8_outliers": (lambda x: int8.int8_quantize_rows(x * 2, 3.0), lambda m: random(m, 64, seed=m)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_without_breaks(name: str, dynamic: bool) -> None:
    function, make = FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (2, 5, 9) if dynamic else (2,):
        x = make(m)
        for got, wanted in zip(results(compiled(x)), results(function(x)), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", ["function", "handle"])
def test_a_product_compiles_with_its_gradient_and_any_number_of_rows(how: str, backend_name: str) -> None:
    weight, bias = weight_4bit(), random(12)
    handle = fourbit.prepare_gemm_4bit(weight)

    def product(x: Tensor) -> Tensor:
        y = handle(x, bias) if how == "handle" else fourbit.gemm_4bit(x, weight, bias)
        return y.relu()

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend=backend_name)
    for m in (2, 5, 9):
        x, same = (random(m, 64, seed=m).requires_grad_() for _ in range(2))
        y, wanted = compiled(x), product(same)
        y.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(x.grad, same.grad)


def test_a_compiled_handle_follows_its_weight() -> None:
    param = torch.nn.Parameter(weight_4bit().packed, requires_grad=False)
    weight = weight_4bit()
    handle = fourbit.prepare_gemm_4bit(
        lambda: Weight4bit(param.data, weight.absmax, "nf4", 64, (12, 64)), packed=param, state=weight
    )
    torch._dynamo.reset()
    compiled, x = torch.compile(lambda x: handle(x), fullgraph=True, backend="aot_eager"), random(2, 64)
    assert torch.equal(compiled(x), handle(x))
    param.data = param.data.flip(0).clone()
    assert torch.equal(compiled(x), handle(x))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["function", "handle"])
def test_a_dispatch_mode_sees_the_op(how: str) -> None:
    weight, x = weight_4bit(), random(2, 64)
    handle = fourbit.prepare_gemm_4bit(weight)
    handle(x)
    with Seen() as seen:
        _ = handle(x) if how == "handle" else fourbit.gemm_4bit(x, weight)
    assert "qcore.gemm_4bit.default" in seen.ops


def test_bad_arguments_fail_while_tracing() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fourbit.quantize_4bit(x, "nf4", 48), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="quantize_4bit: blocksize is 48"):
        compiled(random(64))


def test_export_keeps_the_op() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight_4bit()
            self.register_buffer("packed", self.weight.packed)
            self.register_buffer("absmax", self.weight.absmax)

        def forward(self, x: Tensor) -> Tensor:
            return fourbit.gemm_4bit(x, Weight4bit(self.packed, self.absmax, "nf4", 64, (12, 64)))

    layer, x = Layer(), random(2, 64)
    program = torch.export.export(layer, (x,))
    assert "qcore.gemm_4bit" in str(program.graph)
    assert torch.equal(program.module()(x), layer(x))
