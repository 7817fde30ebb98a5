"""Compares the codes of optimizer_step and of quantize_blockwise with a search over the thresholds, value by value.

On AVX-512 both find them by arithmetic (src/state_codes.h). Run by test_paths.py once per instruction set. The states
take the gradient, or its square, unchanged.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

import qcore_cpu
from qcore import codebooks
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.interface import Backend
from qcore.backend.optimizer import OptimizerRule, OptimizerTensors

BLOCK = 256
TABLES = {"signed": codebooks.DYNAMIC, "unsigned": codebooks.DYNAMIC_UNSIGNED}


def magnitudes(table: str, count: int, seed: int) -> np.ndarray:
    """Values in (0, 1]: random ones of every binade, and each threshold with its neighbours."""
    code = np.array(TABLES[table], np.float32)
    middle = ((code[:-1] + code[1:]) * np.float32(0.5)).view(np.int32)
    around = (middle[middle > 0][:, None] + np.arange(-40, 41)).reshape(-1)
    rng = np.random.default_rng(seed)
    bits = np.concatenate([around, rng.integers(1, 0x3F800000, count), rng.integers(0x34000000, 0x3F800000, count)])
    return rng.permutation(bits).astype(np.int32).view(np.float32)


def in_blocks(values: np.ndarray) -> torch.Tensor:
    """Blocks whose first element is 1, so that the scale is 1."""
    rows = np.resize(values, (-(-values.size // (BLOCK - 1)), BLOCK - 1))
    return torch.from_numpy(np.concatenate([np.ones((len(rows), 1), np.float32), rows], axis=1).reshape(-1))


def codes_of_step(backend: Backend, algorithm: str, grad: torch.Tensor, signed_state: bool) -> torch.Tensor:
    rule = OptimizerRule(algorithm, 8, 0.0, eps=1.0, signed_state=signed_state, bnb_codes=False)
    state, absmax = torch.zeros(grad.numel(), dtype=torch.uint8), torch.zeros(grad.numel() // BLOCK)
    backend.optimizer_step(rule, OptimizerTensors([torch.zeros_like(grad)], [grad], [state], (), [absmax]))
    return state


def searched(values: torch.Tensor, table: str) -> torch.Tensor:
    """QC-Q8-004 by NumPy, for values whose scale is 1."""
    code, y = np.array(TABLES[table], np.float32), values.numpy()
    middle = (code[:-1] + code[1:]) * np.float32(0.5)
    goes_up = (np.arange(255) % 2 == 1) & (code[:-1] < code[1:])
    index = np.searchsorted(middle, y, side="left")  # the number of thresholds below
    at = np.minimum(index, 254)
    index += (middle[at] == y) & goes_up[at]
    return torch.from_numpy(index.astype(np.uint8))


def codes_of_quantize(backend: Backend, values: torch.Tensor, table: str) -> torch.Tensor:
    codes, absmax = torch.empty(values.numel(), dtype=torch.uint8), torch.empty(values.numel() // BLOCK)
    backend.quantize_blockwise(values, torch.tensor(TABLES[table]), BLOCK, absmax=absmax, out=codes)
    return codes


def expect(op: str, table: str, values: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> None:
    wrong = (got != want).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        sys.exit(f"{op}, {table}: {float(values[at]).hex()} takes code {got[at]}, expected {want[at]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1 << 20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    backend: CffiBackend = qcore_cpu.load()
    compared = 0
    for algorithm, table in (("momentum", "signed"), ("rmsprop", "unsigned"), ("rmsprop", "signed")):
        x = in_blocks(magnitudes(table, arguments.count, arguments.seed))
        if algorithm == "momentum":
            x[1::2] *= -1
            values = x
        else:
            x = x.sqrt()
            values = x * x
        want = searched(values, table)
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            narrow = values.to(kind)
            got = codes_of_quantize(backend, narrow, table)
            expect("quantize_blockwise", table, narrow, got, searched(narrow.float(), table))
            compared += values.numel()
        zero = int(TABLES[table].index(0.0))
        if algorithm == "rmsprop":  # QC-OPT-021
            want = torch.where((values > 0) & (want == zero), zero + 1, want)
        got = codes_of_step(backend, algorithm, x, table == "signed" and algorithm == "rmsprop")
        expect(algorithm, table, values, got, want)
        compared += values.numel()
    print(f"{backend.describe(torch.device('cpu')).arch}: {compared} codes equal")


if __name__ == "__main__":
    main()
