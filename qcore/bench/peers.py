"""What qcore is measured against: torch, and bitsandbytes if it is installed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from qcore.backend.weights import WeightInt4
from qcore.errors import InvalidArgument

NAMES = ("torch", "bitsandbytes")


@dataclass(frozen=True)
class PeerStatus:
    """Whether a peer takes part, and if not, why."""

    available: bool
    version: str | None
    note: str


def parse(text: str) -> tuple[str, ...]:
    """``"torch,bitsandbytes"`` or ``"none"``."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if names == ("none",):
        return ()
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise InvalidArgument(f"bench: --peers {text!r}: expected none or some of {', '.join(NAMES)}")
    return names


@cache
def bitsandbytes() -> Any:
    """The module, or None where it is not installed; ``ImportError`` if it is and cannot be imported."""
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        return None
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # what it says on import is in the note
        import bitsandbytes.functional
        import bitsandbytes.nn
        import bitsandbytes.optim
    return bitsandbytes


def status(wanted: Sequence[str]) -> dict[str, PeerStatus]:
    """Every peer that there is, wanted or not."""
    found = {}
    for name in NAMES:
        try:
            installed = version(name)
        except PackageNotFoundError:
            found[name] = PeerStatus(False, None, f"not installed: pip install {name}")
            continue
        found[name] = PeerStatus(name in wanted, installed, "" if name in wanted else "left out by --peers")
    if found["bitsandbytes"].available:
        found["bitsandbytes"] = _bitsandbytes_status(found["bitsandbytes"].version)
    return found


def _bitsandbytes_status(installed: str | None) -> PeerStatus:
    try:
        module = bitsandbytes()
    except ImportError as error:
        return PeerStatus(False, installed, f"cannot be imported: {error}")
    fast = bool(module.functional.has_avx512bf16())
    note = "its AVX-512 bf16 kernel, weights repacked in evaluation mode" if fast else "no AVX-512 bf16 kernel here"
    try:
        version("kernels")
    except PackageNotFoundError:
        note += "; its optional downloaded kernel (package kernels) is not installed"
    return PeerStatus(True, installed, note)


def linear4bit(plain: torch.nn.Linear, quant_type: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' layer with the weight of ``plain``, in evaluation mode, in which it is fastest."""
    module = bitsandbytes()
    n, k = plain.weight.shape
    layer = module.nn.Linear4bit(k, n, bias=plain.bias is not None, compute_dtype=dtype, quant_type=quant_type)
    layer.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
    return layer.to(dtype).to("cpu").eval()


def linear8bit(plain: torch.nn.Linear, threshold: float) -> Any:
    """bitsandbytes' int8 layer with the weight of ``plain``."""
    module = bitsandbytes()
    n, k = plain.weight.shape
    layer = module.nn.Linear8bitLt(k, n, bias=plain.bias is not None, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict({name: value.half() for name, value in plain.state_dict().items()})
    return layer.to("cpu").eval()


def torch_int4(weight: WeightInt4) -> Tensor:
    """The codes of ``weight`` (N, K) as torch's own CPU kernel for 4-bit integers in groups wants them."""
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], 2).view(weight.shape)
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
