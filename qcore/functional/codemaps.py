"""Codebooks as tensors, under bitsandbytes' names and equal to its tables.

The standard arguments give the exact tables of ``qcore.codebooks``; others are computed in the same order of float32
operations as the published definitions: dynamic tree quantization (Dettmers, arXiv 1511.04561, section 2), normal float
(QLoRA, arXiv 2305.14314, appendix E), abnormal float (Yoshida, arXiv 2306.06965).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qcore import codebooks
from qcore.errors import InvalidArgument, Unsupported
from qcore.ops import validate

# AF4 for blocks of 64 (arXiv 2306.06965, table of codes), by code: descending.
_AF4 = (
    *(1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164),
    *(0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0),
)
_INT4 = tuple(float(value) / 7 for value in (*range(7, -1, -1), *range(0, -8, -1)))

_dynamic: dict[torch.device, Tensor] = {}


def dynamic_code(device: torch.device) -> Tensor:
    """The signed dynamic codebook on ``device``: one tensor, shared, not to be changed."""
    code = _dynamic.get(device)
    if code is None:
        code = _dynamic[device] = torch.tensor(codebooks.DYNAMIC, dtype=torch.float32, device=device)
    return code


def code_table(op: str, code: Tensor | None, device: torch.device) -> Tensor:
    """An 8-bit codebook in float32 on ``device``, the signed dynamic one by default; a 16-bit one is exact in it.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``code`` is no tensor of float32, float16 or bfloat16.
    """
    if code is None:
        return dynamic_code(device)
    validate.floats(op, "code", code)
    return code.to(device=device, dtype=torch.float32)


def _filled(values: list[float], op: str) -> Tensor:
    """``values`` and as many zeros as make 256, in ascending order."""
    if len(values) > 256:
        raise InvalidArgument(f"{op}: {len(values)} values, a codebook has 256; ask for at most 8 bits")
    # float32 before the sort: doubles that differ only beyond it are one value.
    return torch.tensor(sorted([*values, *[0.0] * (256 - len(values))]), dtype=torch.float32)


def _require_counts(op: str, **bits: int) -> None:
    for name, value in bits.items():
        if not isinstance(value, int):
            raise InvalidArgument(f"{op}: {name} is {value!r}, needs an int")


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Dynamic tree quantization: as the exponent shrinks, its unary code leaves fewer bits to the fraction.

    Parameters
    ----------
    signed : bool
    max_exponent_bits : int
        Number of decades.
    total_bits : int
        Bits a code, at most 8.

    Returns
    -------
    Tensor
        float32 ``(256,)``, ascending; unused codes are 0.

    Raises
    ------
    InvalidArgument
        The bits are no ints, or do not make a codebook of at most 256 values.
    """
    _require_counts("create_dynamic_map", max_exponent_bits=max_exponent_bits, total_bits=total_bits)
    if (max_exponent_bits, total_bits) == (7, 8):
        return torch.tensor(codebooks.DYNAMIC if signed else codebooks.DYNAMIC_UNSIGNED, dtype=torch.float32)
    op, spare = "create_dynamic_map", total_bits - 1 - max_exponent_bits
    if max_exponent_bits < 1 or not 2 <= total_bits <= 8:
        raise InvalidArgument(
            f"{op}: max_exponent_bits={max_exponent_bits}, total_bits={total_bits}; needs 1 or more and 2 to 8"
        )
    values = [0.0, 1.0]
    signs = (1.0, -1.0) if signed else (1.0,)
    # (decade, number of intervals in it); with bits to spare the last decade appears once more, one interval short.
    decades = [(i, int(2.0 ** (i + spare + (0 if signed else 1)))) for i in range(max_exponent_bits)]
    if spare > 0:
        decades.append((max_exponent_bits - 1, 2**spare - 1))
    for decade, intervals in decades:
        bounds = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        scale = 10.0 ** (decade - (max_exponent_bits - 1))
        values += [sign * mean for sign in signs for mean in (scale * means).tolist()]
    if len(values) != 2**total_bits:
        raise InvalidArgument(
            f"{op}: signed={signed}, max_exponent_bits={max_exponent_bits} gives {len(values)} values, total_bits="
            f"{total_bits} has {2**total_bits}"
        )
    return _filled(values, op)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values from -1 (or 0) to 1.

    Parameters
    ----------
    signed : bool
    total_bits : int
        Bits a code, at most 8.
    add_zero : bool
        Give up one value of a signed map so that 0 is one.

    Returns
    -------
    Tensor
        float32 ``(256,)``; unused codes are 0, in the middle.

    Raises
    ------
    InvalidArgument
        ``total_bits`` is not an int from 1 to 8.
    """
    _require_counts("create_linear_map", total_bits=total_bits)
    if total_bits == 8 and add_zero:
        return torch.tensor(codebooks.LINEAR if signed else codebooks.LINEAR_UNSIGNED, dtype=torch.float32)
    if not 1 <= total_bits <= 8:
        raise InvalidArgument(f"create_linear_map: total_bits is {total_bits}, needs 1 to 8")
    count = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    middle = count // 2
    return torch.cat([values[:middle], torch.zeros(256 - count), values[middle:]])


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """A floating-point format with subnormals and no infinities, scaled to a largest value of 1.

    Parameters
    ----------
    signed : bool
    exponent_bits, precision_bits, total_bits : int
        ``exponent_bits + precision_bits`` and the sign, if there is one, make ``total_bits``.

    Returns
    -------
    Tensor
        float32 ``(256,)``, ascending; unused codes are 0.

    Raises
    ------
    InvalidArgument
        The bits are no ints, or do not add up to ``total_bits``.
    """
    op = "create_fp8_map"
    _require_counts(op, exponent_bits=exponent_bits, precision_bits=precision_bits, total_bits=total_bits)
    if (signed, exponent_bits, precision_bits, total_bits) == (True, 5, 2, 8):
        return torch.tensor(codebooks.FP8, dtype=torch.float32)
    if exponent_bits + precision_bits + (1 if signed else 0) != total_bits or exponent_bits < 1 or precision_bits < 0:
        raise InvalidArgument(
            f"{op}: {exponent_bits} exponent bits, {precision_bits} precision bits and signed={signed} do not make "
            f"total_bits={total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent, fraction in itertools.product(range(2**exponent_bits), range(2**precision_bits)):
        mantissa = fraction / 2**precision_bits
        # The field counts down: a larger one is a smaller number. Field 0 is subnormal.
        value = mantissa * 2.0**-bias if exponent == 0 else (1 + mantissa) * 2.0 ** (bias + 1 - exponent)
        values += [value, -value] if signed else [value]
    code = _filled(values, op)
    return code / code.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Values of equal probability under a normal distribution, scaled to a largest value of 1.

    Parameters
    ----------
    offset : float
        Quantile of the outermost value, between 0.5 and 1.
    use_extra_value : bool
        8 values on one side and 7 on the other, instead of 7 and 7.

    Returns
    -------
    Tensor
        float32 ``(256,)``, ascending; all but 15 (or 14) codes are 0.

    Raises
    ------
    InvalidArgument
        ``offset`` is not between 0.5 and 1.
    """
    if not 0.5 < offset < 1.0:
        raise InvalidArgument(f"create_normal_map: offset is {offset}, needs a quantile between 0.5 and 1")

    def quantiles(count: int) -> list[float]:
        # float32 quantiles, an accurate inverse of the distribution function, and one rounding.
        points = torch.linspace(offset, 0.5, count + 1)[:-1].double()
        return [float(value) for value in torch.special.ndtri(points).float()]

    lower, upper = quantiles(7), quantiles(8 if use_extra_value else 7)
    code = _filled([*(-value for value in lower), *upper], "create_normal_map")
    return code / code.max()


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The sixteen values of a 4-bit format, by code.

    Parameters
    ----------
    typename : {"nf4", "fp4", "int4", "af4"}
        qcore quantizes to the first two.
    device : torch.device, optional
        By default the current CUDA or HIP device, or the CPU where there is none.
    blocksize : int
        AF4 is defined for 64 only.

    Returns
    -------
    Tensor
        float32 ``(16,)``.

    Raises
    ------
    Unsupported
        There is no such format, or AF4 at another block size.
    InvalidArgument
        torch knows no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = {"nf4": codebooks.NF4, "fp4": codebooks.FP4, "int4": _INT4, "af4": _AF4}
    if not isinstance(typename, str) or typename not in tables:
        raise Unsupported(f"get_4bit_type: typename is {typename!r}, needs one of {', '.join(tables)}")
    if typename == "af4" and blocksize != 64:
        raise Unsupported(f"get_4bit_type: af4 is defined for blocksize 64, not {blocksize}")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"get_4bit_type: device is {device!r}, which torch does not know") from error
    return torch.tensor(tables[typename], dtype=torch.float32, device=place)
