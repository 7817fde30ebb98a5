"""Train a small GPT on Python's own manual, once with each optimizer, and compare losses and memory.

The text is ``pydoc_data.topics`` of the standard library (about 466 kB), by bytes. Every run starts from the same
weights and sees the same batches, so that what differs is the optimizer. The validation loss is taken on the last tenth
of the text.

    python examples/train_gpt.py --steps 1000 --out docs/results/train-gpt
    python examples/train_gpt.py --steps 50 --only AdamW8bit

Writes OUT.json (every loss, memory) and OUT.svg (the curves). With --only, the other runs of an OUT.json of the same
settings stay in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcore import optim
from qcore.bench.report import machine

VOCABULARY = 256  # bytes
CONTEXT = 64


@dataclass(frozen=True)
class Size:
    """Of the model and of a batch."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 8


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a norm and around a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder over bytes, its input and output embeddings tied."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.places = nn.Embedding(CONTEXT, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean loss of each next byte; ``windows`` int64 ``(batch, CONTEXT + 1)``."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


class Text:
    """The manual, split into training and validation bytes."""

    def __init__(self) -> None:
        joined = "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
        data = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
        border = len(data) * 9 // 10
        self.training, self.validation = data[:border], data[border:]

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.training) - CONTEXT - 1, (count,), generator=generator)
        return torch.stack([self.training[start : start + CONTEXT + 1] for start in starts.tolist()])

    def held_out(self, count: int) -> Tensor:
        """Windows spread evenly over the validation text."""
        starts = torch.linspace(0, len(self.validation) - CONTEXT - 1, count).long()
        return torch.stack([self.validation[start : start + CONTEXT + 1] for start in starts.tolist()])


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
# Lion and AdEMAMix at a usual rate, not tuned: Lion's is a fraction of AdamW's; AdEMAMix has the second moment of its
# paper, since with AdamW's 0.95 single steps went to losses of 87 and 108.
LION: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.5}
ADEMAMIX: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999, 0.999),
    "alpha": 2.0,
    "t_alpha": 1000,
    "t_beta3": 1000,
    "weight_decay": 0.1,
}
OPTIMIZERS: dict[str, Make] = {
    "AdamW fp32": lambda params: torch.optim.AdamW(params, **ADAMW),
    "AdamW8bit": lambda params: optim.AdamW8bit(params, **ADAMW),
    "Lion fp32": lambda params: optim.Lion32bit(params, **LION),
    "Lion8bit": lambda params: optim.Lion8bit(params, **LION),
    "AdEMAMix fp32": lambda params: optim.AdEMAMix32bit(params, **ADEMAMIX),
    "AdEMAMix8bit": lambda params: optim.AdEMAMix8bit(params, **ADEMAMIX),
}


@dataclass
class Run:
    """What one optimizer did."""

    training: list[float]  # loss of every step
    validation: list[tuple[int, float]]  # (step, loss)
    state_bytes: int
    parameter_bytes: int
    seconds: float  # of the whole run, beside whatever else the machine was doing


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the optimizer's state; a codebook that all parameters share counts once."""
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel()
    }
    return sum(tensors.values())


def train(model: GPT, make: Make, text: Text, steps: int, batch: int, seed: int) -> Run:
    """A run: linear warm-up over a twentieth of the steps, then a cosine down to a tenth."""
    optimizer = make(model.parameters())
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    held_out = text.held_out(128)
    training, validation = [], []
    began = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(text.batch(batch, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        training.append(round(loss.item(), 5))
        if (step + 1) % max(1, steps // 20) == 0:
            with torch.no_grad():
                validation.append((step + 1, model.loss(held_out).item()))
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return Run(training, validation, state_bytes(optimizer), parameters, time.perf_counter() - began)


def plot(runs: dict[str, Run], path: Path) -> None:
    """Curves on the left, memory of the state on the right."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "qcore", "svg.fonttype": "none"})  # the same figures, the same file
    from matplotlib import pyplot

    figure, (curves, memory) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 1), layout="constrained")
    for index, (name, run) in enumerate(runs.items()):
        color = f"C{index}"
        window = max(1, len(run.training) // 50)
        smooth = torch.tensor(run.training).unfold(0, window, 1).mean(1)
        curves.plot(range(window, len(run.training) + 1), smooth, color=color, alpha=0.4, linewidth=1)
        curves.plot(*zip(*run.validation, strict=True), color=color, marker=".", label=f"{name}: {final(run):.3f}")
        memory.bar(index, run.state_bytes / 1e6, color=color)
    curves.set(xlabel="step", ylabel="loss (nats a byte)", title="validation (points), training (thin)")
    curves.legend(title="final validation loss")
    memory.set(title="optimizer state, MB")
    memory.set_xticks(range(len(runs)), list(runs), rotation=30, ha="right")
    figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def recorded(out: Path, settings: dict[str, int]) -> dict[str, Run]:
    """The runs of an earlier record of the same settings."""
    path = out.with_suffix(".json")
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    runs = record["runs"] if record.get("settings") == settings else {}
    return {name: Run(**run) for name, run in runs.items()}


def final(run: Run) -> float:
    """The last validation loss."""
    return run.validation[-1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--batch", type=int, default=Size.batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.svg")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    size = Size(options.width, options.layers, batch=options.batch)
    torch.manual_seed(options.seed)
    text, start = Text(), GPT(size)
    print(f"{sum(p.numel() for p in start.parameters()):,} parameters, {len(text.training):,} bytes of text")
    settings = {**asdict(size), "context": CONTEXT, "steps": options.steps, "seed": options.seed}
    runs = recorded(options.out, settings) if options.out else {}
    for name in options.only:
        make = OPTIMIZERS[name]
        runs[name] = run = train(copy.deepcopy(start), make, text, options.steps, options.batch, options.seed)
        megabytes = run.state_bytes / 1e6
        print(f"{name:14} loss {final(run):.4f}  state {megabytes:6.2f} MB  {run.seconds:5.0f} s", flush=True)
    if options.out:
        runs = {name: runs[name] for name in OPTIMIZERS if name in runs}
        record = {
            "schema": 1,
            "kind": "optimizers training a small GPT",
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(torch.get_num_threads()),
            "settings": settings,
            "runs": {name: asdict(run) for name, run in runs.items()},
        }
        options.out.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        plot(runs, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
