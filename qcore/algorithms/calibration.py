"""What the linear layers of a block see while data run through it: Hessians and mean magnitudes of their inputs.

Layers that are given the same tensor (query, key and value; gate and up) share one set of statistics. Whose output that
tensor is, is found out as well: a norm can take a scale back that its followers were given (AWQ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 4096  # of an input that are multiplied at a time


@dataclass
class Statistics:
    """Of one input tensor, over every batch.

    Attributes
    ----------
    layers : list of str
        The layers that take it, by name in the block.
    hessian : Tensor
        float32 ``(K, K)``, the sum of ``x x^T``.
    magnitude : Tensor
        float32 ``(K,)``, the sum of ``|x|``.
    tokens : int
    producer : str, optional
        The module of the block that gives it out, if that has one weight a channel.
    sample : tuple of Tensor, optional
        An input of the producer and what it gave.
    """

    layers: list[str]
    hessian: Tensor
    magnitude: Tensor
    tokens: int = 0
    producer: str | None = None
    sample: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor) -> None:
        """Take in ``x`` ``(..., K)``."""
        flat = x.detach().reshape(-1, x.shape[-1])
        with _exact_products(x.dtype):
            for start in range(0, len(flat), _ROWS):
                rows = flat[start : start + _ROWS].float()
                self.hessian.addmm_(rows.t(), rows)
                self.magnitude += rows.abs().sum(0)
        self.tokens += len(flat)

    @property
    def mean_magnitude(self) -> Tensor:
        return self.magnitude / max(self.tokens, 1)


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of bfloat16 values run on bfloat16 units: the factors are exact, the sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class _Observer:
    """Hooks of one block; in the first batch it is found out who shares an input with whom."""

    block: nn.Module
    found: dict[str, Statistics] = field(default_factory=dict)  # by the first layer that takes the input
    leader: dict[str, str] = field(default_factory=dict)
    # The tensors of the first batch, kept so that no address is used twice, with their layer.
    inputs: list[tuple[Tensor, str]] = field(default_factory=list)
    outputs: list[tuple[Tensor, str, Tensor]] = field(default_factory=list)
    first: bool = True
    # Layers that this batch has not reached yet; None to run every batch to its end.
    awaited: set[str] | None = None

    def before(self, name: str, x: Tensor) -> None:
        if name not in self.leader:
            same = (other for tensor, other in self.inputs if _same(tensor, x))
            self.leader[name] = leader = next(same, name)
            if leader == name:
                k = x.shape[-1]
                self.found[name] = Statistics([], torch.zeros(k, k, device=x.device), torch.zeros(k, device=x.device))
                self.inputs.append((x, name))
                made = next(((n, given, out) for out, n, given in self.outputs if _same(out, x)), None)
                if made is not None:
                    self.found[name].producer = made[0]
                    self.found[name].sample = made[1][:1].clone(), made[2][:1].clone()
            self.found[leader].layers.append(name)
        if self.leader[name] == name:
            self.found[name].add(x)
        if self.awaited is not None:
            self.awaited.discard(name)
            if not self.awaited:
                raise _Enough

    def after(self, name: str, given: Tensor, out: Any) -> None:
        if self.first and isinstance(out, Tensor):
            self.outputs.append((out, name, given))


class _Enough(Exception):
    """Every layer was reached."""


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def observe(
    block: nn.Module, layers: Iterable[str], batches: Iterable[Callable[[], Any]], *, to_the_end: bool = True
) -> list[Statistics]:
    """Run ``batches`` through ``block`` and gather what its ``layers`` (names of linear modules) are given.

    Returns statistics in the order in which the inputs are first used. A layer that no batch reaches is in none. With
    ``to_the_end`` false a batch stops where the last of the layers is reached.
    """
    observer = _Observer(block)
    layers = list(layers)
    modules = dict(block.named_modules())
    handles = []
    for name in layers:
        handles.append(
            modules[name].register_forward_pre_hook(lambda _, args, name=name: observer.before(name, args[0]))
        )
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            handles.append(
                module.register_forward_hook(lambda _, args, out, name=name: observer.after(name, args[0], out))
            )
    try:
        with torch.no_grad():
            for batch in batches:
                observer.awaited = None if to_the_end else set(layers)
                with suppress(_Enough):
                    batch()
                observer.first = False
                observer.inputs.clear()
                observer.outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return list(observer.found.values())
