"""Peak memory of ``qcore quantize`` on a synthetic checkpoint of any size.

    python benchmarks/quantize_memory.py --gigabytes 8 [--json FILE]

Writes a Llama-like checkpoint of random bfloat16 weights in shards of 2 GB, quantizes it in a process of its own and
prints that process's peak resident memory and what the same process takes before it reads a tensor. Mapped pages would
count as resident memory; ``qcore quantize`` maps nothing. The peak is the kernel's own ``VmHWM`` (Linux): ``ru_maxrss``
of a child is never less than what its parent had when it was started.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qcore.bench.report import machine, now
from qcore.formats.shard_writer import ShardWriter, Spec

HIDDEN, VOCABULARY = 4096, 32000
SHARD_BYTES = 2_000_000_000
_CHUNK_ROWS = 2048


def config(layers: int, hidden: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def layer_specs(index: int, hidden: int) -> list[Spec]:
    inner = hidden * 7 // 2
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return [Spec(f"model.layers.{index}.{name}.weight", torch.bfloat16, shape) for name, shape in shapes.items()]


def write_checkpoint(folder: Path, gigabytes: float, *, hidden: int = HIDDEN, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the checkpoint, chunk by chunk; returns its bytes."""
    ends = [Spec(f"{name}.weight", torch.bfloat16, (VOCABULARY, hidden)) for name in ("model.embed_tokens", "lm_head")]
    ends.append(Spec("model.norm.weight", torch.bfloat16, (hidden,)))
    fixed, per_layer = sum(spec.nbytes for spec in ends), sum(spec.nbytes for spec in layer_specs(0, hidden))
    layers = max(1, math.ceil((gigabytes * 1e9 - fixed) / per_layer))
    specs = ends + [spec for index in range(layers) for spec in layer_specs(index, hidden)]
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if sum(one.nbytes for one in shards[-1]) + spec.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    generator, names = torch.Generator().manual_seed(0), {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(folder / file, shard)
        for spec in shard:
            names[spec.name] = file
            width = math.prod(spec.shape[1:])
            for start in range(0, spec.shape[0], _CHUNK_ROWS):
                count = min(_CHUNK_ROWS, spec.shape[0] - start) * width
                writer.write(spec.name, torch.randn(count, generator=generator).mul_(0.02).bfloat16())
        writer.finish()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps(config(layers, hidden)))
    return sum(spec.nbytes for spec in specs)


def run(*args: str) -> tuple[float, float, str]:
    """Run ``qcore`` in a process; returns its seconds, its peak resident memory in bytes, and its last line."""
    program = (
        "import sys; from qcore.cli.main import run; code = run(sys.argv[1:]);"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0], file=sys.stderr); sys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"qcore {' '.join(args)} failed:\n{done.stderr}")
    return time.monotonic() - began, int(done.stderr.split()[-1]) * 1024, done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--formats", nargs="+", default=["nf4", "int8"])
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint; a temporary folder if left out")
    parser.add_argument("--limit", type=float, default=1.5, help="fail above this many GB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started, rows = now(), []
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        (folder / "source").mkdir()
        began = time.monotonic()
        nbytes = write_checkpoint(folder / "source", args.gigabytes)
        print(f"checkpoint: {nbytes / 1e9:.2f} GB in bfloat16, written in {time.monotonic() - began:.0f} s")
        _, base, _ = run("quantize", str(folder / "source"), "-o", str(folder / "none"), "--dry-run")
        print(f"dry run (imports, model class, plan): peak {base / 1e9:.2f} GB")
        worst = 0.0
        for name in args.formats:
            seconds, peak, last = run("quantize", str(folder / "source"), "-o", str(folder / name), "--format", name)
            print(f"{name}: peak {peak / 1e9:.2f} GB, {seconds:.0f} s, {nbytes / seconds / 1e6:.0f} MB/s; {last}")
            rows.append({"format": name, "peak_bytes": peak})
            shutil.rmtree(folder / name)
            worst = max(worst, peak)
    finally:
        shutil.rmtree(folder)
    if args.json:
        tree = {"schema": 1, "kind": "memory of qcore quantize", "started": started}
        tree |= {"machine": machine(torch.get_num_threads()), "checkpoint_bytes": nbytes, "before_bytes": base}
        args.json.write_text(json.dumps({**tree, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"(the writer of the checkpoint: peak {own / 1e9:.2f} GB)")
    if worst > args.limit * 1e9:
        raise SystemExit(f"peak {worst / 1e9:.2f} GB is above {args.limit} GB")


if __name__ == "__main__":
    main()
