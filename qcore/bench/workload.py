"""What a workload is, and the tensors and layers that the workloads of one weight share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qcore.nn
from qcore import functional as F
from qcore.bench import peers
from qcore.bench.measure import Call

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKSIZE = 64  # of 4-bit weights, as in every QLoRA checkpoint
BLOCKSIZE_8BIT = 256


@dataclass
class Workload:
    """One thing that is timed, ready to run.

    Attributes
    ----------
    calls : dict of str to callable
        ``"qcore"`` first, then peers, then parts of the work that explain it.
    read, written : int
        Bytes that have to be moved; both 0 where no floor is asked for.
    operations : int
        Multiplications and additions; 0 for what only moves data.
    unit : str, optional
        dtype of the factors, which decides what unit could multiply them.
    in_place : bool
        What is written is among what is read, at the same addresses.
    grad : bool
        Record gradients.
    one_thread : bool
        Run on one thread and count its CPU time: for host costs, which another process's turn would hide.
    sums : dict of str to tuple of str
        Call -> the calls that its time is compared with the sum of.
    """

    calls: dict[str, Call]
    read: int = 0
    written: int = 0
    operations: int = 0
    unit: str | None = None
    in_place: bool = False
    grad: bool = False
    one_thread: bool = False
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)


Build = Callable[["Shared"], Workload]


@dataclass(frozen=True)
class Spec:
    """A workload before its tensors exist."""

    op: str
    variant: str
    dtype: str
    shape: tuple[int, int]
    m: int | None
    build: Build

    @property
    def label(self) -> str:
        rows = "" if self.m is None else f" M={self.m}"
        return " ".join(filter(None, (self.op, self.variant, self.dtype, f"{self.shape[0]}x{self.shape[1]}{rows}")))


class Shared:
    """Weights and layers of one shape ``(N, K)``, each made when it is first needed.

    Attributes
    ----------
    torch, bitsandbytes : bool
        Which peers take part.
    """

    def __init__(self, shape: tuple[int, int], peer_names: frozenset[str]) -> None:
        self.shape = shape
        self.torch, self.bitsandbytes = "torch" in peer_names, "bitsandbytes" in peer_names
        self._made: dict[tuple[Any, ...], Any] = {}
        self._generator = torch.Generator().manual_seed(0)

    def once(self, *key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def normal(self, rows: int, columns: int, dtype: str) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator).to(DTYPES[dtype])

    def weight(self, dtype: str) -> Tensor:
        """Normal values of scale 0.02, ``(N, K)``."""
        made: Tensor = self.once("weight", dtype, make=lambda: self._weight(dtype))
        return made

    def _weight(self, dtype: str) -> Tensor:
        return (0.02 * self.normal(*self.shape, "f32")) if dtype == "f32" else self.weight("f32").to(DTYPES[dtype])

    def linear(self, dtype: str) -> torch.nn.Linear:
        """torch's own layer with the weight, no bias."""

        def make() -> torch.nn.Linear:
            layer = torch.nn.Linear(self.shape[1], self.shape[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(self.weight(dtype), requires_grad=False)
            return layer

        made: torch.nn.Linear = self.once("linear", dtype, make=make)
        return made

    def linear4bit(self, quant_type: str, dtype: str) -> qcore.nn.Linear4bit:
        def make() -> qcore.nn.Linear4bit:
            n, k = self.shape
            compute = DTYPES[dtype]
            layer = qcore.nn.Linear4bit(k, n, bias=False, compute_dtype=compute, quant_type=quant_type, device="meta")
            # As from a checkpoint: quantized once, by qcore.
            layer.load_state_dict({"weight": self.weight("f32")}, assign=True)
            return layer.to("cpu").eval()

        made: qcore.nn.Linear4bit = self.once("linear4bit", quant_type, dtype, make=make)
        return made

    def linear8bit(self, threshold: float) -> qcore.nn.Linear8bitLt:
        def make() -> qcore.nn.Linear8bitLt:
            n, k = self.shape
            layer = qcore.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
            layer.load_state_dict({"weight": self.weight("f32")})
            return layer.to("cpu").eval()

        made: qcore.nn.Linear8bitLt = self.once("linear8bit", threshold, make=make)
        return made

    def their_linear4bit(self, quant_type: str, dtype: str, *, training: bool = False) -> Any:
        def make() -> Any:
            return peers.linear4bit(self.linear("f32"), quant_type, DTYPES[dtype]).train(training)

        return self.once("bitsandbytes", quant_type, dtype, training, make=make)

    def their_linear8bit(self, threshold: float) -> Any:
        return self.once(
            "bitsandbytes int8", threshold, make=lambda: peers.linear8bit(self.linear("f32"), threshold).train()
        )

    def codes(self) -> tuple[Tensor, Tensor]:
        """int8 codes of the weight and the magnitudes of its rows."""

        def make() -> tuple[Tensor, Tensor]:
            codes, stats, _ = F.int8_vectorwise_quant(self.weight("f32"))
            return codes, stats

        made: tuple[Tensor, Tensor] = self.once("codes", make=make)
        return made

    def with_torch(self, calls: dict[str, Call], x: Tensor, *dtypes: str) -> dict[str, Call]:
        """``calls`` and torch's layer on ``x``, in each dtype."""
        for dtype in dtypes if self.torch else ():
            layer, a = self.linear(dtype), x.to(DTYPES[dtype])
            calls[f"torch {dtype}"] = lambda layer=layer, a=a: layer(a)  # type: ignore[misc]
        return calls


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
