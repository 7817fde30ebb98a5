"""``torch.ops.qcore.gemm_4bit`` called again and again, as compiled code calls it: what is kept is never stale."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expected import random
from qcore import codebooks
from qcore.backend.interface import Weight4bit
from qcore.backend.registry import selection, use_backend
from qcore.errors import InvalidArgument
from qcore.ops import fourbit, registered
from qcore.ops.weight4bit import weight_arguments

pytestmark = pytest.mark.usefixtures("backend")
DYNAMIC = torch.tensor(codebooks.DYNAMIC)
N, K = 24, 64


def weight(seed: int = 0, *, nested: bool = False, quant_type: str = "nf4") -> Weight4bit:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    packed, absmax = fourbit.quantize_4bit(values, quant_type, 64)
    if not nested:
        return Weight4bit(packed.view(-1), absmax, quant_type, 64, (N, K))
    codes, scales, offset = fourbit.quantize_absmax(absmax, DYNAMIC, 256)
    return Weight4bit(packed.view(-1), codes, quant_type, 64, (N, K), scales, DYNAMIC.clone(), offset, 256)


def product(A: Tensor, of: Weight4bit, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.qcore.gemm_4bit(A, bias, *weight_arguments(of))
    return result


def truth(A: Tensor, of: Weight4bit, bias: Tensor | None = None) -> Tensor:
    decoded = fourbit.dequantize_4bit(of, torch.float32).double()
    return (A.double() @ decoded.t() + (0 if bias is None else bias.double())).to(A.dtype)


def check(A: Tensor, of: Weight4bit, bias: Tensor | None = None) -> None:
    got, want = product(A, of, bias), truth(A, of, bias)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0.1 if A.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_every_call_fits_what_it_brings(nested: bool) -> None:
    known = weight(nested=nested)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for shape in ((1, K), (3, K), (2, 1, K), (0, K), (1, K)):
            check(random(*shape).to(dtype), known)
    A, bias = random(2, K), random(N)
    for one in (bias, None, bias * 2, random(2 * N)[::2], bias):
        check(A, known, one)
    check(random(K, 2).t(), known)
    check(A, known)


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_is_raised_in_the_second_call_as_in_the_first(nested: bool) -> None:
    known, A = weight(nested=nested), random(2, K)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="needs"):
            product(random(2, K + 1), known)
        with pytest.raises(InvalidArgument, match="bias has shape"):
            product(A, known, random(N + 1))
        with pytest.raises(InvalidArgument, match="packed has"):
            product(A, replace(known, packed=known.packed[:-1]))
        check(A, known)


CHANGES: dict[str, Callable[[Weight4bit], Weight4bit]] = {
    "codes in place": lambda of: (of.packed.copy_(weight(1).packed), of)[1],
    "other codes": lambda of: replace(of, packed=weight(1).packed),
    "codes moved": lambda of: replace(of, packed=torch.cat([of.packed[:1], of.packed])[1:]),
    "strided codes": lambda of: replace(of, packed=of.packed.repeat_interleave(2)[::2]),
    "scales in place": lambda of: (of.absmax.copy_(weight(1).absmax), of)[1],
    "other scales": lambda of: replace(of, absmax=weight(1).absmax),
    "scales' memory": lambda of: (of.absmax.set_(weight(1).absmax), of)[1],  # type: ignore[call-overload]
    "format": lambda of: replace(of, quant_type="fp4"),
    "shape": lambda of: replace(of, shape=(K, N)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    known, A = weight(), random(2, K)
    check(A, known)
    check(A, known)
    changed = CHANGES[change](known)
    A = random(2, changed.shape[1])
    for _ in range(2):
        check(A, changed)
    check(random(2, K), known)


@pytest.mark.parametrize("part", ["nested_absmax", "nested_code", "nested_offset"])
@pytest.mark.parametrize("how", ["values", "memory", "tensor"])
def test_a_change_of_nested_scales_is_seen(part: str, how: str) -> None:
    known, A = weight(nested=True), random(2, K)
    check(A, known)
    old: Tensor = getattr(known, part)
    changed = known
    if how == "values":
        old.mul_(2)
    elif how == "memory":
        old.set_(old * 2)  # type: ignore[call-overload]
    else:
        changed = replace(known, **{part: old * 2})
    for _ in range(2):
        check(A, changed)
    check(A, known)


def test_views_made_anew_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known, A = weight(nested=True), random(2, K)
    check(A, known)
    for slow in ("_learn", "_checked"):
        monkeypatch.setattr(registered, slow, lambda *_, name=slow: pytest.fail(name))
    assert known.nested_offset is not None
    offset = known.nested_offset.reshape(1)
    check(A, replace(known, nested_offset=offset[:], packed=known.packed.view(-1)))


def test_activations_of_another_shape_leave_the_weight_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = weight(nested=True)
    check(random(2, K), known)
    monkeypatch.setattr(registered, "_learn", lambda *_: pytest.fail("checked again"))
    for rows in (1, 3, 1):
        check(random(rows, K), known)


def test_another_backend_takes_over() -> None:
    known, A = weight(), random(2, K)
    check(A, known)
    with use_backend("cpu_reference"):
        check(A, known)
        assert registered._known[id(known.absmax)].selection is selection()
    check(A, known)


def test_what_is_kept_goes_with_the_weight() -> None:
    known = weight(nested=True)
    check(random(2, K), known)
    key = id(known.absmax)
    assert key in registered._known
    del known
    gc.collect()
    assert key not in registered._known


def test_gradients_flow_where_they_are_wanted() -> None:
    known, A, bias = weight(), random(2, K), random(N)
    check(A, known, bias)
    A.requires_grad_()
    bias.requires_grad_()
    product(A, known, bias).sum().backward()
    decoded = fourbit.dequantize_4bit(known, torch.float32)
    assert A.grad is not None
    torch.testing.assert_close(A.grad, decoded.sum(0).expand(2, K), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias.grad, torch.full((N,), 2.0))
    with torch.no_grad():
        assert not product(A, known, bias).requires_grad


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
