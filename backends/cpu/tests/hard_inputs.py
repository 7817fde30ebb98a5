"""Inputs that decide whether a kernel keeps to the clauses: thresholds, extremes, tails, special values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from qcore import codebooks

F32 = NDArray[np.float32]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def code_tables(seed: int) -> dict[str, F32]:
    """The standard codebooks, and ones that a look-up by bits finds hard."""
    rng = np.random.default_rng(seed)
    largest = np.finfo(np.float32).max
    tables = {
        name.lower(): np.array(getattr(codebooks, name), np.float32)
        for name in ("DYNAMIC", "DYNAMIC_UNSIGNED", "LINEAR", "LINEAR_UNSIGNED", "FP8")
    }
    tables["random"] = np.sort(rng.uniform(-1, 1, 256))
    tables["repeated"] = np.sort(rng.choice(rng.uniform(-1, 1, 20), 256))
    tables["constant"] = np.full(256, 0.25)
    tables["zeros"] = np.zeros(256)
    tables["padded"] = np.sort(np.concatenate([np.linspace(-1, 1, 16), np.zeros(240)]))
    tables["crowded"] = np.sort(np.concatenate([np.linspace(-1, 1, 56), 0.5 + np.arange(200) * 2.0**-24]))
    tables["wide"] = np.sort(np.concatenate([np.linspace(-1, 1, 128) * largest, rng.normal(size=128)]))
    tables["denormal"] = (np.arange(256) - 128) * 2.0**-149
    tables["negative"] = -np.geomspace(1, 1e-6, 256)
    tables["positive"] = np.geomspace(1e-30, 1, 256)
    tables["two"] = np.repeat([-1.0, 1.0], 128)
    tables["minus_zero"] = np.sort(np.concatenate([np.linspace(-1, -0.01, 128), [-0.0], np.linspace(0.0, 1, 127)]))
    return {name: table.astype(np.float32) for name, table in tables.items()}


def around(values: F32) -> F32:
    """Each value, its two fp32 neighbours on either side, and all of their negatives."""
    near = [values]
    for direction in (np.float32(-np.inf), np.float32(np.inf)):
        step = values
        for _ in range(2):
            step = np.nextafter(step, direction)
            near.append(step)
    positive = np.concatenate(near)
    return np.concatenate([positive, -positive])


def in_unit_blocks(values: F32, blocksize: int) -> F32:
    """The values of [-1, 1], each block opened by a 1, so that scaling changes none of them."""
    values = values[np.abs(values) <= 1]
    rows = -(-values.size // (blocksize - 1))
    padded = np.zeros(rows * (blocksize - 1), np.float32)
    padded[: values.size] = values
    return np.concatenate([np.ones((rows, 1), np.float32), padded.reshape(rows, -1)], axis=1).ravel()


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def vectors(thresholds: F32, blocksize: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Named one-dimensional inputs of every dtype for one op at one block size."""
    rng = np.random.default_rng(seed)
    yield "thresholds", torch.from_numpy(in_unit_blocks(around(thresholds), blocksize))
    for exponent in (-149, -140, -127, -120, -60, 0, 60, 126, 127):
        values = rng.normal(size=3 * blocksize + 7).clip(-1.9, 1.9) * 2.0**exponent
        yield f"scale 2^{exponent}", torch.from_numpy(values.astype(np.float32))
    special = rng.normal(size=8 * blocksize).astype(np.float32)
    special[: 2 * blocksize] = 0
    special[blocksize : 2 * blocksize : 2] = -0.0
    special[3 * blocksize - 1] = np.nan
    special[3 * blocksize + 5] = np.inf
    special[4 * blocksize + 3 : 4 * blocksize + 6] = -np.inf, np.nan, np.inf
    special[5 * blocksize : 6 * blocksize] = np.nan
    special[6 * blocksize : 7 * blocksize] *= 1e-44
    special[7 * blocksize + 1] = np.nan
    yield "special", torch.from_numpy(special)
    for dtype in (torch.float16, torch.bfloat16):
        yield f"every {dtype}", every_16_bit_value(dtype)
        every = every_16_bit_value(dtype).float()
        unit = in_unit_blocks(every[every.abs() <= 1].numpy(), blocksize)
        yield f"every {dtype} in [-1, 1]", torch.from_numpy(unit).to(dtype)
    for n in (0, 1, 2, 3, 15, 17, 31, 33, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + blocksize // 2 + 1):
        values = torch.from_numpy(rng.normal(size=n).astype(np.float32))
        for dtype in DTYPES:
            yield f"{n} values, {dtype}", values.to(dtype)
