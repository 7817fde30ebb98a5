"""Memory while a Transformers model is quantized: what the process itself allocates, sampled meanwhile.

    OMP_NUM_THREADS=1 python benchmarks/load_memory.py [--model FOLDER] [--formats nf4 int8] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/load_memory.py --gigabytes 2 --shards 4
    OMP_NUM_THREADS=1 python benchmarks/load_memory.py --gigabytes 0.5 --width 1024 --formats gptq awq

nf4, fp4 and int8 quantize in ``from_pretrained``; gptq and awq quantize a model that is in memory in floating point,
on random tokens. ``--gigabytes`` makes a Llama-like checkpoint of random bfloat16 weights. Pages of the checkpoint that
the operating system maps and can drop at any time are left out (``RssAnon``, Linux); a tensor that keeps its dtype is
such pages, so the default loads a bfloat16 checkpoint into float32. ``--json`` adds this run to the runs in FILE, in
place of one with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from quantize_memory import VOCABULARY, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from qcore import QcoreConfig
from qcore.bench.report import machine, now
from qcore.cli.demo_inputs import default_cache
from qcore.formats.plan import Options
from qcore.integrations.quantize_model import quantize_model

STATUS = Path("/proc/self/status")
WHILE_LOADING = ("nf4", "fp4", "int8")


def anonymous() -> int:
    """Bytes of resident memory that no file stands behind."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(Thread):
    """Samples until :meth:`stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self._stopped = anonymous(), Event()

    def run(self) -> None:
        while not self._stopped.wait(0.002):
            self.value = max(self.value, anonymous())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.value


def stored_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, one that two modules share once."""
    stored = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
    return sum(stored.values())


def measure(folder: Path, format_: str, dtype: torch.dtype) -> dict[str, int]:
    """Quantize once; bytes that were allocated, above the libraries."""
    with torch.device("meta"):  # imports the model's code
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    before = anonymous()
    figures: dict[str, int] = {}
    if format_ in WHILE_LOADING:
        peak = Peak()
        peak.start()
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QcoreConfig(format_), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for parameter in model.parameters():  # out of the mapped file
            parameter.data = parameter.data.clone()
        figures["float model"] = stored_bytes(model)
        figures["largest block"] = max(sum(p.nbytes for p in block.parameters()) for block in model.model.layers)
        batches = list(torch.randint(VOCABULARY, (2, 1, 256), generator=torch.Generator().manual_seed(0)))
        peak = Peak()
        peak.start()
        quantize_model(model, batches, Options(format_))
    highest = peak.stop() - before
    figures |= {"model": stored_bytes(model), "largest tensor": max(value.nbytes for value in model.parameters())}
    return {**figures, "after": anonymous() - before, "peak": highest}


def record(path: Path, run: dict[str, Any]) -> None:
    """Add ``run`` to the runs in ``path``, in place of one with the same arguments."""
    here = machine(torch.get_num_threads())
    tree = {"schema": 1, "kind": "memory while a model is quantized", "machine": here, "runs": []}
    if path.exists():
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["machine"] != here:
            raise SystemExit(f"{path}: its runs are of another machine or other versions; remove it to begin again")
    runs = {one["arguments"]: one for one in tree["runs"]} | {run["arguments"]: run}
    path.write_text(json.dumps({**tree, "runs": list(runs.values())}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_cache() / "SmolLM2-135M")
    parser.add_argument("--formats", nargs="+", choices=[*WHILE_LOADING, "gptq", "awq"], default=["nf4", "int8"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32", help="of what is not quantized")
    parser.add_argument("--gigabytes", type=float, help="make a checkpoint of this size instead of reading --model")
    parser.add_argument("--shards", type=int, default=4, help="files of that checkpoint")
    parser.add_argument("--width", type=int, default=4096, help="hidden size of that checkpoint, a multiple of 512")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=[*WHILE_LOADING, "gptq", "awq"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.width < 512 or options.width % 512:  # four query heads of 128 share a key head
        parser.error(f"--width is {options.width}, expected a multiple of 512")
    if options.shards < 1:
        parser.error(f"--shards is {options.shards}, expected at least 1")
    if options.measure is not None:  # one of the processes below
        found = measure(options.model, options.measure, getattr(torch, options.dtype))
        print(json.dumps(found), flush=True)
        return
    arguments = [text for index, text in enumerate(sys.argv[1:]) if "--json" not in sys.argv[index : index + 2]]
    run: dict[str, Any] = {"arguments": shlex.join(arguments), "started": now(), "dtype": options.dtype, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = options.model
        if options.gigabytes is not None:
            folder = Path(name)
            size = int(options.gigabytes * 1e9 / options.shards)
            nbytes = write_checkpoint(folder, options.gigabytes, hidden=options.width, shard_bytes=size)
            files = sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
            print(f"checkpoint: {nbytes / 1e6:.1f} MB in {len(files)} files, the largest of {files[-1] / 1e6:.1f} MB")
            run["checkpoint"] = {"bytes": nbytes, "files": len(files), "largest file": files[-1]}
        for format_ in options.formats:  # a process each: memory that one has freed would serve the next
            command = [sys.executable, __file__, "--model", str(folder), "--measure", format_]
            # Small tensors in maps of their own: what is freed is then returned, and not counted on.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            command += ["--dtype", options.dtype]
            done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            said = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in figures.items())
            print(f"{format_}, {options.dtype}: {said}", flush=True)
            run["rows"].append({"format": format_, **figures})
    if options.json is not None:
        record(options.json, run)


if __name__ == "__main__":
    main()
