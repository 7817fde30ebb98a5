"""Perplexity of SmolLM2-135M-Instruct in 4-bit integers: round to nearest, GPTQ and AWQ.

    python benchmarks/int4_perplexity.py -o docs/results/int4.json [--only "gptq, groups of 128, act-order" ...]

The model and the articles are the demo's. Measured are the first 16384 tokens of the Wikipedia articles and of Python's
manual, in windows of 512; calibrated is on windows of 512 tokens spread over the last three quarters of the articles,
which the measured ones do not reach into, and Python's manual is never calibrated on. Each row is written as soon as it
is there; ``--only`` measures some of them again. Every linear layer inside the blocks is quantized, the embedding and
the output head are not. Groups of 128 do not divide 576 inputs: GPTQ makes the last one shorter, AWQ's format cannot.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcore.bench.report import machine, now
from qcore.cli.demo_inputs import default_cache, fetch_articles
from qcore.formats.plan import Options
from qcore.integrations.calibrated import calibration_windows
from qcore.integrations.perplexity import perplexity, pydoc_topics, tokens_of
from qcore.integrations.quantize_model import quantize_model

TOKENS, WINDOW, BATCH = 16384, 512, 8
ASYMMETRIC = {"symmetric": False}
ROWS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "nearest, groups of 128": {"format": "gptq", "calibration": None, **ASYMMETRIC},
    "gptq, groups of 128, act-order": {"format": "gptq", "act_order": True, **ASYMMETRIC},
    "gptq, groups of 64, symmetric": {"format": "gptq", "group_size": 64},
    "awq, groups of 64": {"format": "awq", "group_size": 64, **ASYMMETRIC},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--windows", type=int, default=64, help="to calibrate with")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="the demo's folder; `make demo` fills it")
    options = parser.parse_args()
    source = options.cache / "SmolLM2-135M"
    tokenizer = AutoTokenizer.from_pretrained(source)
    articles = fetch_articles(options.cache).read_text(encoding="utf-8")
    calibration = calibration_windows(tokenizer, articles[len(articles) // 4 :], options.windows, WINDOW)
    texts = {"Wikipedia": articles, "Python's manual": pydoc_topics()}
    measured = {name: tokens_of(tokenizer, text, TOKENS, WINDOW) for name, text in texts.items()}
    known = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    rows: dict[str, Any] = known.get("rows", {})
    for name in options.only or ROWS:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        settings, began = ROWS[name], time.process_time()
        if settings is not None:
            chosen = Options(**{"calibration": "articles", "windows": options.windows, **settings})
            quantize_model(model, None if chosen.calibration is None else calibration.split(BATCH), chosen)
        row: dict[str, Any] = {"settings": settings, "processor_seconds": round(time.process_time() - began)}
        if settings is not None and "calibration" not in settings:
            row["calibration_tokens"] = calibration.numel()
        row["bytes"] = sum(p.numel() * p.element_size() for p in model.state_dict().values()) - _tied(model)
        row["perplexity"] = {text: round(perplexity(model, tokens), 3) for text, tokens in measured.items()}
        rows[name] = row
        print(f"{name}: {row['perplexity']}", flush=True)
        ordered = {each: rows[each] for each in ROWS if each in rows}
        tree = {
            "schema": 1,
            "kind": "perplexity of 4-bit integers",
            "model": "SmolLM2-135M-Instruct",
            "started": now(),
            "machine": machine(torch.get_num_threads()),
            "tokens": TOKENS,
            "window": WINDOW,
            "rows": ordered,
        }
        options.output.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _tied(model: Any) -> int:
    """Bytes of the output head where it is the embedding."""
    head = model.get_output_embeddings().weight
    return head.numel() * head.element_size() if head is model.get_input_embeddings().weight else 0


if __name__ == "__main__":
    main()
