"""The layers, forward and backward, and a model that takes turns between torch's ops and qcore's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu

from qcore.bench.measure import Call
from qcore.bench.workload import DTYPES, Build, Shared, Spec, Workload, nbytes

# LLM.int8()'s own threshold, and outlier columns as the paper finds them: a few of thousands.
THRESHOLD, OUTLIER_COLUMNS = 6.0, 8
TURNS = 4


def specs(shape: tuple[int, int], dtype: str, rows: Sequence[int]) -> Iterator[Spec]:
    """Layers of one shape in one dtype, with each number of rows."""
    for m in rows:
        yield Spec("linear4bit", "nf4 forward", dtype, shape, m, _linear4bit(dtype, m))
        yield Spec("linear4bit", "nf4 backward", dtype, shape, m, _linear4bit_backward(dtype, m))
        yield Spec("linear8bitlt", "forward", dtype, shape, m, _linear8bit(dtype, m, 0.0))
        yield Spec("linear8bitlt", "threshold 6 forward", dtype, shape, m, _linear8bit(dtype, m, THRESHOLD))
        yield Spec("linear8bitlt", "backward", dtype, shape, m, _linear8bit_backward(dtype, m))


def alternating(shape: tuple[int, int], dtype: str, rows: Sequence[int]) -> Iterator[Spec]:
    """Turns of torch and qcore at one shape, with each number of rows."""
    for m in rows:
        yield Spec("alternate", f"{TURNS} turns", dtype, shape, m, _alternate(dtype, m))


def _sizes(s: Shared, x: Tensor, weight_bytes: int) -> tuple[int, int, int]:
    """Bytes read, bytes written, operations of a product."""
    n, k = s.shape
    return weight_bytes + nbytes(x), x.shape[0] * n * x.element_size(), 2 * x.shape[0] * n * k


def _fourbit_bytes(s: Shared) -> int:
    # Codes, and nested scales of one byte a block of 64.
    n, k = s.shape
    return n * k // 2 + n * k // 64


def _linear4bit(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        x, ours = s.normal(m, s.shape[1], dtype), s.linear4bit("nf4", dtype)
        calls: dict[str, Call] = {"qcore": lambda: ours(x)}
        if s.bitsandbytes:
            theirs = s.their_linear4bit("nf4", dtype)
            calls["bitsandbytes"] = lambda: theirs(x)
        return Workload(s.with_torch(calls, x, "f32", "bf16"), *_sizes(s, x, _fourbit_bytes(s)), dtype)

    return build


def _linear8bit(dtype: str, m: int, threshold: float) -> Build:
    def build(s: Shared) -> Workload:
        x, ours = s.normal(m, s.shape[1], dtype), s.linear8bit(threshold)
        if threshold:
            x[:, :: max(1, s.shape[1] // OUTLIER_COLUMNS)] *= 2 * threshold
        calls: dict[str, Call] = {"qcore": lambda: ours(x)}
        if s.bitsandbytes:
            theirs = s.their_linear8bit(threshold)
            calls["bitsandbytes"] = lambda: theirs(x)
        s.with_torch(calls, x, "f32", "bf16")
        return Workload(calls, *_sizes(s, x, s.shape[0] * s.shape[1]), "int8")

    return build


def _linear4bit_backward(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        layers = {"qcore": s.linear4bit("nf4", dtype)}
        if s.bitsandbytes:
            layers["bitsandbytes"] = s.their_linear4bit("nf4", dtype, training=True)
        return _backward(s, dtype, m, layers, _fourbit_bytes(s))

    return build


def _linear8bit_backward(dtype: str, m: int) -> Build:
    def build(s: Shared) -> Workload:
        layers = {"qcore": s.linear8bit(0.0)}
        if s.bitsandbytes:
            layers["bitsandbytes"] = s.their_linear8bit(0.0)
        return _backward(s, dtype, m, layers, s.shape[0] * s.shape[1])

    return build


def _backward(s: Shared, dtype: str, m: int, layers: Mapping[str, torch.nn.Module], weight_bytes: int) -> Workload:
    """The gradient of the input alone: the weights are frozen."""
    (n, k), own = s.shape, DTYPES[dtype]
    found: dict[str, tuple[torch.nn.Module, torch.dtype]] = {name: (layer, own) for name, layer in layers.items()}
    if s.torch:
        found |= {f"torch {name}": (s.linear(name), DTYPES[name]) for name in ("f32", "bf16")}
    calls = {name: _gradient(layer, s.normal(m, k, "f32").to(kind)) for name, (layer, kind) in found.items()}
    moved = m * own.itemsize
    return Workload(calls, weight_bytes + n * moved, k * moved, 2 * m * n * k, dtype, grad=True)


def _gradient(layer: torch.nn.Module, x: Tensor) -> Call:
    """The backward pass of a forward pass that took place once, of a layer that had been called with such an input."""
    for _ in range(2):  # the first call makes a handle, the second what the handle keeps
        layer(x)
    x.requires_grad_()
    with torch.enable_grad():
        y = layer(x)
    gradient = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, gradient, retain_graph=True)


def _alternate(dtype: str, m: int) -> Build:
    """torch's layer and an elementwise op, then a quantized layer, again and again.

    Threads that fight show here: a second pool of threads, or one that is started and ended each time, makes the turns
    slower than the same calls one kind after the other.
    """

    def build(s: Shared) -> Workload:
        x, plain = s.normal(m, s.shape[1], dtype), s.linear(dtype)

        def torch_turn() -> None:
            gelu(plain(x))

        def turns(*calls: Call) -> Call:
            def run() -> None:
                for _ in range(TURNS):
                    for call in calls:
                        call()

            return run

        layers = {"qcore": s.linear4bit("nf4", dtype)}
        if s.bitsandbytes:
            layers["bitsandbytes"] = s.their_linear4bit("nf4", dtype)
        calls: dict[str, Call] = {}
        sums: dict[str, tuple[str, ...]] = {}
        for name, layer in layers.items():
            calls[name] = turns(torch_turn, lambda layer=layer: layer(x))  # type: ignore[misc]
            sums[name] = ("torch alone", f"{name} alone")
        calls["torch alone"] = turns(torch_turn)
        for name, layer in layers.items():
            calls[f"{name} alone"] = turns(lambda layer=layer: layer(x))  # type: ignore[misc]
        return Workload(calls, sums=sums)

    return build
