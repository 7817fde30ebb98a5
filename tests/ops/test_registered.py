"""The registered products called again and again, as compiled code calls them: what is kept is never stale."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcore import codebooks
from qcore.backend.interface import Weight4bit, Weight8bit, WeightInt4
from qcore.backend.registry import selection, use_backend
from qcore.errors import InvalidArgument, InvalidDtype
from qcore.ops import fourbit, gemm_4bit, int4, int8_linear, weight4bit
from qcore.ops.registered import Known, KnownWeights

pytestmark = pytest.mark.usefixtures("backend")
DYNAMIC = torch.tensor(codebooks.DYNAMIC)
N, K = 24, 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_4bit(seed: int) -> Weight4bit:
    packed, absmax = fourbit.quantize_4bit(torch.randn(N, K, generator=seeded(seed)), "nf4", 64)
    return Weight4bit(packed.view(-1), absmax, "nf4", 64, (N, K))


def of_4bit_nested(seed: int) -> Weight4bit:
    flat = of_4bit(seed)
    codes, scales, offset = fourbit.quantize_absmax(flat.absmax, DYNAMIC, 256)
    code = DYNAMIC * (1 + seed)
    return replace(
        flat, absmax=codes, nested_absmax=scales, nested_code=code, nested_offset=offset, nested_blocksize=256
    )


def of_int4(seed: int) -> WeightInt4:
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=seeded(seed))
    return WeightInt4(packed, torch.rand(N, K // 32, generator=seeded(seed)), None, 32, (N, K))


def of_int4_ordered(seed: int) -> WeightInt4:
    zeros = torch.randint(0, 16, (N, K // 32), dtype=torch.uint8, generator=seeded(seed))
    return replace(of_int4(seed), zeros=zeros, perm=torch.randperm(K, generator=seeded(seed)).int())


def of_int8(seed: int) -> Weight8bit:
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=seeded(seed))
    return Weight8bit(codes, torch.rand(N, generator=seeded(seed)) + 0.5)


def with_int8(A: Tensor, weight: Weight8bit, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.qcore.int8_linear(A, weight.codes, weight.scales, bias, 0.0)[0]
    return result


def decoded_int8(weight: Weight8bit) -> Tensor:
    return weight.codes.double() * weight.scales.double()[:, None] / 127


@dataclass(frozen=True)
class Product:
    make: Callable[[int], Any]  # the weight of a seed
    call: Callable[[Tensor, Any, Tensor | None], Tensor]
    decode: Callable[[Any], Tensor]
    known: KnownWeights[Any, Any]

    def check(self, A: Tensor, weight: Any, bias: Tensor | None = None) -> None:
        got = self.call(A, weight, bias)
        W, addend = self.decode(weight).double(), torch.zeros(()) if bias is None else bias.double()
        exact, largest = A.double() @ W.t() + addend, A.double().abs() @ W.abs().t() + addend.abs()
        assert (got.dtype, got.shape) == (A.dtype, exact.shape)
        assert ((got - exact).abs() <= (2.0**-7 if A.dtype == torch.bfloat16 else 1e-5) * largest).all()


def product_of_4bit(make: Callable[[int], Weight4bit]) -> Product:
    return Product(
        make,
        lambda A, weight, bias: torch.ops.qcore.gemm_4bit(A, bias, *weight4bit.weight_arguments(weight)),
        lambda weight: fourbit.dequantize_4bit(weight, torch.float32),
        gemm_4bit._weights,
    )


def product_of_int4(make: Callable[[int], WeightInt4]) -> Product:
    return Product(
        make,
        lambda A, weight, bias: torch.ops.qcore.gemm_int4(A, bias, *int4.weight_arguments(weight)),
        lambda weight: int4.dequantize_int4(weight, torch.float32),
        int4._weights,
    )


PRODUCTS = {
    "4bit": product_of_4bit(of_4bit),
    "4bit-nested": product_of_4bit(of_4bit_nested),
    "int4": product_of_int4(of_int4),
    "int4-ordered": product_of_int4(of_int4_ordered),
    "int8": Product(of_int8, with_int8, decoded_int8, int8_linear._weights),
}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> Product:
    return PRODUCTS[request.param]


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Integers, 127 the largest of a row: their int8 codes are they themselves."""
    A = torch.randint(-127, 128, shape, generator=seeded(seed)).float()
    A[..., :1] = 127
    return A


def tensors(weight: Any) -> dict[str, Tensor]:
    parts = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def scales_of(weight: Any) -> Tensor:
    scales: Tensor = weight.absmax if isinstance(weight, Weight4bit) else weight.scales
    return scales


def refuse_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnownWeights, "_learn", lambda *_: pytest.fail("the weight was checked again"))


def test_every_call_fits_what_it_brings(product: Product) -> None:
    weight = product.make(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for shape in ((1, K), (3, K), (2, 1, K), (0, K), (K,), (1, K)):
            product.check(activations(*shape).to(dtype), weight)
    A, bias = activations(2, K), 100 * torch.randn(2 * N, generator=seeded(0))
    for one in (bias[:N], None, bias[N:], bias[::2], bias[:N]):
        product.check(A, weight, one)
    product.check(activations(2, 2 * K)[:, :K], weight)
    product.check(A, weight)


def test_an_error_is_raised_in_the_second_call_as_in_the_first(product: Product) -> None:
    weight, A = product.make(0), activations(2, K)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="needs"):
            product.call(activations(2, K + 1), weight, None)
        with pytest.raises(InvalidArgument, match="bias has shape"):
            product.call(A, weight, torch.ones(N + 1))
        with pytest.raises(InvalidDtype, match="A is torch"):
            product.call(A.double(), weight, None)
        with pytest.raises(InvalidDtype, match="bias is torch"):
            product.call(A, weight, torch.ones(N).double())
        for name, part in tensors(weight).items():
            with pytest.raises(InvalidArgument, match="needs"):
                product.call(A, replace(weight, **{name: part[:-1]}), None)
        product.check(A, weight)


CHANGES: dict[str, Callable[[Any, str, Tensor], Any]] = {
    "values": lambda weight, name, new: (getattr(weight, name).copy_(new), weight)[1],
    "memory": lambda weight, name, new: (getattr(weight, name).set_(new), weight)[1],
    "data": lambda weight, name, new: (setattr(getattr(weight, name), "data", new), weight)[1],
    "tensor": lambda weight, name, new: replace(weight, **{name: new}),
    "strided": lambda weight, name, new: replace(weight, **{name: torch.stack([new, new], -1)[..., 0]}),
}


PARTS = [(key, part) for key in PRODUCTS for part in tensors(PRODUCTS[key].make(0))]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("key", "part"), PARTS)
def test_a_change_of_any_part_is_seen(key: str, part: str, change: str) -> None:
    product, A = PRODUCTS[key], activations(2, K)
    weight = product.make(0)
    before = product.call(A, weight, None)
    product.check(A, weight)
    changed = CHANGES[change](weight, part, getattr(product.make(1), part))
    for _ in range(2):
        product.check(A, changed)
    assert not torch.equal(product.call(A, changed, None), before)
    product.check(A, weight)


@pytest.mark.parametrize(("key", "part"), PARTS)
def test_values_that_change_behind_a_strided_part_are_seen(key: str, part: str) -> None:
    product, A = PRODUCTS[key], activations(2, K)
    strided = CHANGES["strided"](product.make(0), part, getattr(product.make(0), part))
    product.check(A, strided)
    getattr(strided, part).copy_(getattr(product.make(1), part))
    product.check(A, strided)


@pytest.mark.parametrize(
    ("key", "other"), [("4bit", {"quant_type": "fp4"}), ("4bit", {"shape": (K, N)}), ("int4", {"group_size": 40})]
)
def test_another_format_of_the_same_tensors_is_seen(key: str, other: dict[str, Any]) -> None:
    weight = PRODUCTS[key].make(0)
    for each in (weight, weight, replace(weight, **other), weight):
        PRODUCTS[key].check(activations(2, each.shape[1]), each)


def test_the_same_memory_read_otherwise_is_seen() -> None:
    A, square = activations(2, K), torch.randint(-127, 128, (K, K), dtype=torch.int8, generator=seeded(0))
    turned = Weight8bit(square, torch.ones(K))
    for each in (turned, replace(turned, codes=square.t()), turned):
        PRODUCTS["int8"].check(A, each)
    nested = of_4bit_nested(0)
    for name in ("nested_absmax", "nested_offset"):
        part = getattr(nested, name)
        PRODUCTS["4bit-nested"].check(A, nested)
        got = PRODUCTS["4bit-nested"].call(A, replace(nested, **{name: torch._neg_view(part)}), None)
        assert torch.equal(got, PRODUCTS["4bit-nested"].call(A, replace(nested, **{name: -part}), None))
    for product, name in (("4bit", "packed"), ("int4", "packed"), ("int8", "codes")):
        weight = PRODUCTS[product].make(0)
        PRODUCTS[product].check(A, weight)
        other = getattr(weight, name).view(torch.uint8 if name == "codes" else torch.int8)
        with pytest.raises(InvalidDtype, match="needs torch"):
            PRODUCTS[product].call(A, replace(weight, **{name: other}), None)


def test_views_made_anew_are_known(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A = product.make(0), activations(2, K)
    product.check(A, weight)
    refuse_to_learn(monkeypatch)
    monkeypatch.setattr(Known, "keep_fit", lambda *_: pytest.fail("the activations were checked again"))
    others = {name: part.view(part.shape) for name, part in tensors(weight).items() if part is not scales_of(weight)}
    product.check(A.clone(), replace(weight, **others))


def test_activations_of_another_shape_leave_the_weight_known(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = product.make(0)
    product.check(activations(2, K), weight)
    refuse_to_learn(monkeypatch)
    for rows in (1, 3, 1):
        product.check(activations(rows, K), weight)


def test_another_thread_may_replace_what_fits_in_the_middle_of_a_call(product: Product) -> None:
    weight, A = product.make(0), activations(2, K)
    product.check(A, weight)
    known = product.known._known[id(scales_of(weight))]

    class Interrupts:
        """A bias that is looked at while a call of another thread, with three rows, is checked."""

        dtype, shape, device = torch.float32, torch.Size([N]), A.device

        def is_contiguous(self) -> bool:
            known.keep_fit(activations(3, K), torch.empty(3, N))
            return True

    assert known.shape_of_result(A, Interrupts()) == (2, N)  # type: ignore[arg-type]
    assert known.shape_of_result(A, None) is None


def test_another_backend_takes_over(product: Product) -> None:
    weight, A = product.make(0), activations(2, K)
    product.check(A, weight)
    with use_backend("cpu_reference"):
        product.check(A, weight)
        assert product.known._known[id(scales_of(weight))].selection is selection()
    product.check(A, weight)


def test_what_is_kept_goes_with_the_scales(product: Product) -> None:
    weight = product.make(0)
    product.check(activations(2, K), weight)
    key = id(scales_of(weight))
    assert key in product.known._known
    del weight
    gc.collect()
    assert key not in product.known._known


def test_scales_in_the_place_of_freed_ones_are_others(product: Product) -> None:
    A = activations(2, K)
    for seed in range(20):  # some of which get the id and the memory of those before
        product.check(A, product.make(seed % 3))


def test_gradients_flow_where_they_are_wanted(product: Product) -> None:
    weight, A, bias = product.make(0), activations(2, K), torch.ones(N)
    product.check(A, weight, bias)
    A.requires_grad_()
    bias.requires_grad_()
    product.call(A, weight, bias).sum().backward()
    assert A.grad is not None
    decoded = product.decode(weight).float()
    torch.testing.assert_close(A.grad, decoded.sum(0).expand(2, K), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias.grad, torch.full((N,), 2.0))
    with torch.no_grad():
        assert not product.call(A, weight, bias).requires_grad


@pytest.mark.parametrize("threshold", [0.0, 1.5, 2e38])
def test_int8_takes_another_threshold_in_every_call(threshold: float) -> None:
    weight, A = of_int8(0), torch.randn(3, 2, K, generator=seeded(2))
    for each in (threshold, 0.0, threshold, 1.0):
        got = torch.ops.qcore.int8_linear(A, weight.codes, weight.scales, None, each)
        want = int8_linear.int8_linear(A, weight.codes, weight.scales, None, each)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        assert got[1].shape == (K if each else 0,)
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(InvalidArgument, match="threshold is"):
                torch.ops.qcore.int8_linear(A, weight.codes, weight.scales, None, bad)


def test_an_order_that_is_none_any_more_is_refused() -> None:
    product, A = PRODUCTS["int4-ordered"], activations(2, K)
    weight = product.make(0)
    product.check(A, weight)
    weight.perm[0] = weight.perm[1]
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="perm is no permutation"):
            product.call(A, weight, None)


WITHOUT_INSIDE = """
import torch
del torch._C._after_ADInplaceOrView_keyset
import qcore
from qcore import functional as F
packed, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
A = torch.randn(2, 64, requires_grad=True)
torch.compile(lambda A: qcore.matmul_4bit(A, packed.t(), state), backend="eager")(A).sum().backward()
assert torch.allclose(A.grad, F.dequantize_4bit(packed, state).sum(0).expand(2, 64), atol=1e-3)
"""


def test_a_torch_without_what_the_fast_way_needs_records_gradients_too() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_INSIDE], check=True)
