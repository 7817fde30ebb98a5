"""Paged optimizer state on a device: the bits of state in its own memory, more of it than fits, given back.

    python tools/gpu_paged.py LIBRARY [--device cuda] [--elements 4000000]

Eight parameters of so many elements, stepped by AdamW in 8 and in 32 bits, with each kind of memory that the device
has. On a GPU torch's allocator is then held to half of the state: the optimizer that is not paged has to refuse, the
paged one to give the same bits. Exits with 1 and a line where something is wrong; under 20 seconds on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import time

import torch
from torch import nn

import qcore
from qcore import optim
from qcore.backend import dlpack
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.cffi_memory import VARIABLE
from qcore.errors import OutOfMemory, Unsupported

TENSORS, STEPS = 8, 3


class Workload:
    """Parameters that start alike for every optimizer."""

    def __init__(self, device: torch.device, elements: int) -> None:
        self.device = device
        self.start = torch.linspace(-1, 1, elements, device=device)
        self.params = [nn.Parameter(self.start.clone()) for _ in range(TENSORS)]
        for index, param in enumerate(self.params):
            param.grad = self.start.flip(0) * (index + 1)

    def train(self, kind: type[optim.Optimizer8bit]) -> str:
        """The SHA-256 of all parameters after a few steps."""
        for param in self.params:
            param.data.copy_(self.start)
        optimizer = kind(self.params, lr=1e-2)  # type: ignore[call-arg]
        for _ in range(STEPS):
            optimizer.step()
        digest = hashlib.sha256()
        for param in self.params:
            digest.update(param.detach().cpu().numpy())
        return digest.hexdigest()


def expect(condition: bool, what: str) -> None:
    print("ok   " if condition else "WRONG", what, flush=True)
    if not condition:
        raise SystemExit(1)


def check_kind(work: Workload, kind: str, expected: dict[int, str]) -> None:
    """Both optimizers with one kind of memory."""
    began = time.monotonic()
    for bits, paged in ((8, optim.PagedAdamW8bit), (32, optim.PagedAdamW32bit)):
        expect(work.train(paged) == expected[bits], f"{kind}: paged AdamW{bits}bit has the bits of the other")
    gc.collect()
    expect(not dlpack._lent, f"{kind}: all memory was given back")
    print(f"      {kind}: {time.monotonic() - began:.1f} s", flush=True)


def check_limit(work: Workload) -> None:
    """More state than torch may allocate."""
    state = sum(8 * param.numel() for param in work.params)
    total = torch.cuda.get_device_properties(work.device).total_memory
    expected = work.train(optim.AdamW32bit)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + state / 2) / total)
    try:
        work.train(optim.AdamW32bit)
    except OutOfMemory:
        refused = True
    else:
        refused = False
    expect(refused, f"half of {state >> 20} MiB of state is too little for the optimizer that is not paged")
    gc.collect()
    expect(work.train(optim.PagedAdamW32bit) == expected, "and enough for the paged one, with the same bits")
    torch.cuda.set_per_process_memory_fraction(1.0)


def check_errors(backend: CffiBackend, device: torch.device) -> None:
    """Too much memory, and memory that goes while a graph is captured."""
    memory = backend.paged_memory(device)
    try:
        memory.empty((1 << 50,), torch.uint8)
    except OutOfMemory as error:
        expect("memory_allocate" in str(error), f"2^50 bytes: {error}")
    else:
        expect(False, "2^50 bytes were had")
    tensor = memory.empty((1 << 20,), torch.float32).zero_()
    expect(float((tensor + 1).sum()) == 1 << 20, "no error is left behind, and torch computes on such memory")
    if device.type != "cuda":
        return
    graph, out = torch.cuda.CUDAGraph(), torch.zeros(8, device=device)
    with torch.cuda.graph(graph):
        del tensor
        out += 1
    graph.replay()
    torch.cuda.synchronize()
    expect(float(out.sum()) == 8, "memory may be given back while a graph is captured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, default=4_000_000)
    options = parser.parse_args()
    backend, device = CffiBackend("checked", options.library), torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with qcore.use_backend(backend):
        work = Workload(device, options.elements)
        expected = {8: work.train(optim.AdamW8bit), 32: work.train(optim.AdamW32bit)}
        try:
            suits = backend.paged_memory(device).kind
        except Unsupported as error:
            print(f"skipped: {error}")
            return
        print(f"      {device} has {suits} memory", flush=True)
        for kind in ("managed", "pinned") if suits == "managed" else ("pinned",):
            os.environ[VARIABLE] = kind
            check_kind(work, kind, expected)
        del os.environ[VARIABLE]
        check_errors(backend, device)
        if device.type == "cuda":
            check_limit(work)


if __name__ == "__main__":
    main()
