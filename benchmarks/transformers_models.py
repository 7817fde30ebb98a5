"""SmolLM2 through Transformers: perplexity, bytes, prefill and decode speed, beside bitsandbytes in one run.

Each format is loaded through ``from_pretrained`` by both libraries and timed in turns: one prefill and one decode of
each a round, so that both see the same state of the machine. ``--shares`` says where a decode step's time goes.
``--compiled`` adds decoding with a static cache and ``torch.compile``, as ``generate`` does it for such a cache, and
the model in bfloat16 beside each format.

    python benchmarks/transformers_models.py [--json FILE] [--formats nf4 ...] [--shares] [--compiled]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StaticCache

from qcore import QcoreConfig
from qcore.bench.report import machine
from qcore.bench.run import require_native
from qcore.cli.demo_inputs import default_cache, fetch_articles
from qcore.cli.tokenizer import load_tokenizer
from qcore.integrations.perplexity import perplexity, tokens_of
from qcore.nn import Linear4bit, Linear8bitLt

# Name -> configurations of qcore and of bitsandbytes.
Makers = tuple[Callable[[torch.dtype], Any], Callable[[torch.dtype], Any]]


def _four_bit(format: str, nested: bool) -> Makers:
    def theirs(dtype: torch.dtype) -> Any:
        options = {"bnb_4bit_quant_type": format, "bnb_4bit_use_double_quant": nested}
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)

    return (lambda _: QcoreConfig(format, double_quant=nested)), theirs


FORMATS: dict[str, Makers] = {
    "float": ((lambda _: None), (lambda _: None)),
    "int8": ((lambda _: QcoreConfig("int8")), (lambda _: BitsAndBytesConfig(load_in_8bit=True))),
    "nf4": _four_bit("nf4", False),
    "nf4, nested": _four_bit("nf4", True),
    "fp4": _four_bit("fp4", False),
}


def load(path: Path, config: Any, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype).eval()


def stored_bytes(model: Any) -> int:
    """Everything that a checkpoint of the model would hold, statistics included, tied weights once."""
    seen = {}
    for value in model.state_dict().values():
        if isinstance(value, torch.Tensor):
            seen[(value.data_ptr(), value.numel())] = value.numel() * value.element_size()
    return sum(seen.values())


class CompiledDecode:
    """Decode with a static cache and a compiled step; the prompt is read once, uncompiled, as in ``generate``."""

    def __init__(self, model: Any, prompt: torch.Tensor, new_tokens: int) -> None:
        self.start, self.new_tokens = prompt.shape[1], new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=self.start + new_tokens)
        self.rates: list[float] = []
        self.step = torch.compile(model.forward, dynamic=False)
        with torch.no_grad():
            out = model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.first = out.logits[:, -1:].argmax(-1)
        self.round()
        self.rates.clear()

    @torch.no_grad()
    def round(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)
        token, began = self.first, time.perf_counter()
        for _ in range(self.new_tokens):
            out = self.step(token, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        self.rates.append(self.new_tokens / (time.perf_counter() - began))


class Speed:
    """Prefill and decode of one model, greedy, without Transformers' generation loop around them."""

    def __init__(self, model: Any, prompt: torch.Tensor, new_tokens: int, compiled: bool) -> None:
        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.compiled = CompiledDecode(model, prompt, new_tokens) if compiled else None

    @torch.inference_mode()
    def round(self) -> None:
        began = time.perf_counter()
        out = self.model(self.prompt, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(self.new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        self.prefill.append(self.prompt.numel() / (first - began))
        self.decode.append(self.new_tokens / (time.perf_counter() - first))

    def medians(self) -> dict[str, Any]:
        # The first round warms up: kernels are chosen, weights prepared.
        medians: dict[str, Any] = {
            "prefill_tokens_per_second": statistics.median(self.prefill[1:]),
            "decode_tokens_per_second": statistics.median(self.decode[1:]),
        }
        if self.compiled is not None:
            medians["compiled_decode_tokens_per_second"] = statistics.median(self.compiled.rates[1:])
        return medians


@contextmanager
def timed(model: Any) -> Iterator[dict[str, float]]:
    """Seconds spent in quantized layers, the output head and attention while the block runs."""
    spent = {"quantized layers": 0.0, "output head": 0.0, "attention": 0.0}
    patched = []

    def watch(owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = inner(*args, **kwargs)
            spent[kind] += time.perf_counter() - began
            return result

        setattr(owner, name, call)
        patched.append((owner, name, inner))

    for module in model.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            watch(module, "forward", "quantized layers")
    watch(model.get_output_embeddings(), "forward", "output head")
    watch(torch.nn.functional, "scaled_dot_product_attention", "attention")
    try:
        yield spent
    finally:
        for owner, name, inner in patched:
            if owner is torch.nn.functional:
                setattr(owner, name, inner)
            else:
                delattr(owner, name)


def shares(speed: Speed) -> dict[str, float]:
    """Parts of a decode step's time; the rest is Python, norms, rotary embedding and the cache."""
    with torch.inference_mode(), timed(speed.model) as spent:
        out = speed.model(speed.prompt[:, :64], use_cache=True, logits_to_keep=1)
        spent.update(dict.fromkeys(spent, 0.0))
        began = time.perf_counter()
        for _ in range(speed.new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = speed.model(token, past_key_values=out.past_key_values, use_cache=True)
        whole = time.perf_counter() - began
    parts = {name: seconds / whole for name, seconds in spent.items()}
    return {**parts, "rest": 1 - sum(parts.values())}


def measure(
    name: str, options: argparse.Namespace, dtype: torch.dtype, windows: torch.Tensor, beside: list[Speed]
) -> tuple[list[dict[str, Any]], list[Speed]]:
    """Both libraries on one format, in turns with the models in ``beside``."""
    makers = FORMATS[name][:1] if name == "float" else FORMATS[name]
    libraries = ["torch"] if name == "float" else ["qcore", "bitsandbytes"]
    rows, speeds = [], []
    for library, make in zip(libraries, makers, strict=True):
        model = load(options.model, make(dtype), dtype)
        row = {"format": name, "library": library, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"footprint_bytes": model.get_memory_footprint(), "stored_bytes": stored_bytes(model)}
        if windows.numel():
            row["perplexity"] = perplexity(model, windows)
        rows.append(row)
        prompt = windows.new_tensor(list(range(100, 100 + options.prompt)))[None]
        speeds.append(Speed(model, prompt, options.new_tokens, options.compiled))
    if name == "float" and len(options.formats) > 1:  # takes part in the rounds of the others
        return rows, speeds
    print(f"{name}: timing", flush=True)
    for _ in range(options.rounds + 1):
        for speed in [*beside, *speeds]:
            speed.round()
            if speed.compiled is not None:  # outside inference mode, whose tensors would be compiled for again
                speed.compiled.round()
    for row, speed in zip(rows, speeds, strict=True):
        row |= speed.medians()
        if options.shares and row["library"] == "qcore":
            row["shares_of_decode"] = shares(speed)
    print(f"{name}: timed", flush=True)
    return rows, speeds


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(header_style="bold")
    for name in ("format", "library", "dtype"):
        table.add_column(name)
    for name in ("MB", "stored MB", "perplexity", "prefill tok/s", "decode tok/s", "compiled"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = [f"{row[key] / 1e6:.1f}" for key in ("footprint_bytes", "stored_bytes")]
        value = f"{row['perplexity']:.3f}" if "perplexity" in row else ""
        rates = [row.get(f"{key}_tokens_per_second") for key in ("prefill", "decode", "compiled_decode")]
        speeds = ["" if rate is None else f"{rate:.1f}" for rate in rates]
        table.add_row(row["format"], row["library"], row["dtype"], *sizes, value, *speeds)
    Console(width=110).print(table)
    for row in rows:
        if "shares_of_decode" in row:
            parts = ", ".join(f"{key} {value:.0%}" for key, value in row["shares_of_decode"].items())
            print(f"{row['format']}, {row['dtype']}: a decode step is {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_cache() / "SmolLM2-135M")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="for the perplexity, in windows of 512; 0 for none")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shares", action="store_true", help="also where the time of a decode step goes")
    parser.add_argument("--compiled", action="store_true", help="also a compiled decode step on a static cache")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    require_native()
    text = fetch_articles(default_cache()).read_text(encoding="utf-8")
    windows = torch.zeros(0, 512, dtype=torch.int64)
    if options.tokens:
        windows = tokens_of(load_tokenizer(options.model), text, options.tokens, 512)
    rows: list[dict[str, Any]] = []
    tree = {"schema": 1, "kind": "models through transformers", "machine": machine(torch.get_num_threads())}
    for dtype in options.dtype:
        plain: list[Speed] = []
        for name in [name for name in FORMATS if name in options.formats]:
            found, speeds = measure(name, options, getattr(torch, dtype), windows, plain)
            rows += found
            if name == "float":
                plain, plain_row = speeds, found[0]
            elif plain:
                plain_row |= plain[0].medians()
            show(found)
            del speeds
            gc.collect()
            if options.json:
                options.json.write_text(json.dumps({**tree, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
