"""QLoRA on SmolLM2-135M-Instruct and Wikipedia text, beside LoRA on the unquantized model: minutes on two cores.

LoRA of rank 16 on q, k, v and o, gradient checkpointing, paged 8-bit AdamW, a quantized base. Both runs see the same
batches in the same order from the same initial adapters, and are judged on text that neither was trained on. The
adapter is saved, reloaded and merged at the end.

    python examples/qlora.py [--steps 60] [--json FILE] [--image FILE]

The model and the text come out of packages and are kept in the demo's cache: ``qcore demo`` makes the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

import qcore
from qcore.bench.report import machine
from qcore.cli.demo_inputs import default_cache, fetch_articles
from qcore.cli.tokenizer import load_tokenizer
from qcore.integrations.perplexity import tokens_of

HELD_OUT = 8  # windows at the start of the text, which no step sees


def base_model(path: Path, format: str | None) -> Any:
    """The model: quantized layers compute in bfloat16 as in QLoRA's paper, the rest and the adapters are float32."""
    config = None if format is None else qcore.QcoreConfig(format, compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    if config is not None:
        return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def with_adapters(model: Any, rank: int) -> Any:
    """LoRA on the attention's projections; the same seed gives every run the same start."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))


def batches(windows: torch.Tensor, size: int, steps: int) -> Iterator[torch.Tensor]:
    """``steps`` batches ``(size, length)`` in a fixed random order."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        chosen = [order[(step * size + index) % len(order)] for index in range(size)]
        yield windows[torch.stack(chosen)]


@torch.no_grad()
def held_out_loss(model: Any, windows: torch.Tensor) -> float:
    """Mean loss a token on text that was not trained on."""
    model.eval()
    return statistics.fmean(float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows)


def train(model: Any, windows: torch.Tensor, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train the adapters; returns losses and times."""
    trainable = [each for each in model.parameters() if each.requires_grad]
    optimizer = qcore.optim.PagedAdamW8bit(trainable, lr=options.rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.rate, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
    )
    before = held_out_loss(model, windows[:HELD_OUT])
    losses, seconds = [], []
    for step, ids in enumerate(batches(windows[HELD_OUT:], options.batch, options.steps)):
        began = time.perf_counter()
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
        print(f"{name}: step {step + 1}/{options.steps}, loss {losses[-1]:.3f}, {seconds[-1]:.1f} s", flush=True)
    return {
        "losses": losses,
        "held_out_before": before,
        "held_out_after": held_out_loss(model, windows[:HELD_OUT]),
        "seconds_a_step": statistics.median(seconds),
        "footprint_bytes": model.get_base_model().get_memory_footprint(),
        "optimizer": type(optimizer).__name__,
        "trainable_parameters": trainable_count(model),
    }


def check_adapter(model: Any, options: argparse.Namespace, windows: torch.Tensor) -> dict[str, Any]:
    """Save the adapter, load it onto a fresh quantized base, merge it there and into the dequantized base."""
    model.save_pretrained(options.out)
    size, stored = 4 * trainable_count(model), (options.out / "adapter_model.safetensors").stat().st_size
    if not size <= stored < 1.02 * size:
        raise SystemExit(f"the adapter has {size} bytes of values, its file {stored}")
    trained = held_out_loss(model, windows)
    result = merged_losses(options, windows)
    if not math.isclose(result["loss_reloaded"], trained, rel_tol=1e-5):
        raise SystemExit(f"the reloaded adapter has loss {result['loss_reloaded']}, the trained one {trained}")
    return {"adapter_bytes": stored, **result}


def merged_losses(options: argparse.Namespace, windows: torch.Tensor) -> dict[str, float]:
    """Losses of the saved adapter beside the quantized base, merged into it, and into the dequantized base."""
    reloaded = PeftModel.from_pretrained(base_model(options.model, options.format), options.out)
    result = {"loss_reloaded": held_out_loss(reloaded, windows)}
    result["loss_merged"] = held_out_loss(reloaded.merge_and_unload(), windows)
    plain = base_model(options.model, options.format).dequantize()
    float_merged = PeftModel.from_pretrained(plain, options.out).merge_and_unload()
    return {**result, "loss_merged_into_dequantized": held_out_loss(float_merged, windows)}


def trainable_count(model: Any) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


def draw(result: dict[str, Any], image: Path) -> None:
    """Both curves in one plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, run in result["runs"].items():
        label = f"{name}: held out {run['held_out_before']:.3f} to {run['held_out_after']:.3f}"
        axes.plot(range(1, len(run["losses"]) + 1), run["losses"], label=label)
    axes.set(
        xlabel="step", ylabel="training loss, nats a token", title="LoRA r=16 on q, k, v, o: SmolLM2-135M-Instruct"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_cache() / "SmolLM2-135M")
    parser.add_argument("--format", choices=["nf4", "fp4", "int8"], default="nf4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("build/qlora-adapter"))
    parser.add_argument("--only", action="store_true", help="leave the run on the unquantized model out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--image", type=Path)
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no model; `qcore demo` makes one, or pass --model")

    text = fetch_articles(default_cache()).read_text(encoding="utf-8")
    count = (HELD_OUT + options.batch * options.steps) * options.length
    windows = tokens_of(load_tokenizer(options.model), text, count, options.length)
    runs: dict[str, Any] = {}
    result = {
        "schema": 1,
        "kind": "qlora",
        "machine": machine(torch.get_num_threads()),
        "steps": options.steps,
        "batch": options.batch,
        "length": options.length,
        "rank": options.rank,
        "runs": runs,
    }
    model = with_adapters(base_model(options.model, options.format), options.rank)
    name = f"{options.format}, double quantization" if options.format != "int8" else "int8"
    runs[name] = train(model, windows, options, options.format)
    result["adapter"] = check_adapter(model, options, windows[:HELD_OUT])
    if not options.only:
        runs["float32"] = train(
            with_adapters(base_model(options.model, None), options.rank), windows, options, "float32"
        )
    print(json.dumps({key: {k: v for k, v in run.items() if k != "losses"} for key, run in runs.items()}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.image:
        draw(result, options.image)


if __name__ == "__main__":
    main()
