"""Memory while ``from_pretrained`` quantizes: what the process itself allocates, sampled while it loads.

Pages of the checkpoint that the operating system maps and can drop at any time are left out (``RssAnon``, Linux); a
tensor that keeps its dtype is such pages, so the default loads a bfloat16 checkpoint into float32.

    OMP_NUM_THREADS=1 python benchmarks/load_memory.py [--model FOLDER] [--formats nf4 int8]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qcore import QcoreConfig
from qcore.cli.demo_inputs import default_cache

STATUS = Path("/proc/self/status")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_cache() / "SmolLM2-135M")
    parser.add_argument("--formats", nargs="+", choices=["nf4", "fp4", "int8"], default=["nf4", "int8"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32", help="of what is not quantized")
    options = parser.parse_args()
    if len(options.formats) > 1:  # a process each: memory that one load has freed would serve the next
        for format in options.formats:
            command = [sys.executable, __file__, "--model", str(options.model), "--formats", format]
            subprocess.run([*command, "--dtype", options.dtype], check=True)
        return
    with torch.device("meta"):  # imports the model's code
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    config = QcoreConfig(options.formats[0])
    before, peak = anonymous(), Peak()
    peak.start()
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, dtype=getattr(torch, options.dtype)
    )
    highest, after = peak.stop() - before, anonymous() - before
    stored = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
    largest = max(value.numel() * value.element_size() for value in model.parameters())
    figures = {"model": sum(stored.values()), "largest tensor": largest, "after loading": after, "peak": highest}
    sizes = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in figures.items())
    print(f"{options.formats[0]}, {options.dtype}: {sizes}")


if __name__ == "__main__":
    main()
