"""Quantize and dequantize tensors under bitsandbytes' names and signatures (0.50.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.errors import InvalidArgument
from qcore.functional.codemaps import code_table, dynamic_code, get_4bit_type
from qcore.functional.outputs import into
from qcore.functional.quant_state import QuantState, widened
from qcore.ops import blockwise, fourbit, validate

NESTED_BLOCKSIZE = 256  # of every file that bitsandbytes writes (QC-NEST-002)


def _require_finite(op: str, A: Tensor) -> None:
    finite = torch.isfinite(A)
    if not bool(finite.all()):
        where = (~finite).nonzero()
        first = tuple(where[0].tolist())
        raise InvalidArgument(f"{op}: A has {len(where)} NaN or infinite elements, the first at {first}")


def _require_state(op: str, state: QuantState) -> None:
    if not isinstance(state, QuantState):
        raise InvalidArgument(
            f"{op}: quant_state is a {type(state).__name__}, needs the QuantState of the quantization"
        )


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
    *,
    check_finite: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 8 bits, each block scaled by its largest magnitude (QC-Q8-001 to -004).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, any shape.
    code : Tensor, optional
        float32 ``(256,)`` in ascending order; the signed dynamic codebook by default.
    absmax, out : Tensor, optional
        Take the scales and the codes.
    blocksize : int
        Power of two from 32 to 4096.
    nested : bool
        Quantize the scales too.
    check_finite : bool
        Raise if ``A`` holds a NaN or an infinity. Otherwise a NaN reads back as 0, and a block with an infinity as NaN.

    Returns
    -------
    codes : Tensor
        uint8, the shape of ``A``.
    state : QuantState
        What :func:`dequantize_blockwise` needs.

    Raises
    ------
    InvalidArgument, InvalidDtype
        A dtype, shape, device, codebook or block size does not fit; nothing is written then.
    """
    op = "quantize_blockwise"
    validate.floats(op, "A", A)
    if check_finite:
        _require_finite(op, A)
    code = code_table(op, code, A.device)
    codes, scales = blockwise.quantize_blockwise(A, code, blocksize)
    offset = state2 = None
    if nested:
        scales, offset, state2 = _nest(scales, blocksize)
    scales, codes = into(op, ("absmax", absmax, scales), ("out", out, codes))
    state = QuantState(
        absmax=scales, code=code.clone(), blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2
    )
    return codes, state


def _nest(absmax: Tensor, blocksize: int) -> tuple[Tensor, Tensor, QuantState]:
    """(codes, 0-dim offset, state of the codes) of quantized scales (QC-NEST-001, QC-NEST-002)."""
    code = dynamic_code(absmax.device)
    codes, nested_absmax, offset = fourbit.quantize_absmax(absmax, code, blocksize)
    state2 = QuantState(absmax=nested_absmax, code=code.clone(), blocksize=blocksize, dtype=torch.float32)
    return codes, offset.reshape(()), state2


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Read back what :func:`quantize_blockwise` wrote (QC-Q8-005).

    Parameters
    ----------
    A : Tensor
        uint8 codes.
    quant_state : QuantState, optional
        Takes the place of the arguments below but ``out``.
    absmax : Tensor, optional
        float32, one scale a block; needed without ``quant_state``.
    code : Tensor, optional
        float32 ``(256,)``; the signed dynamic codebook by default.
    out : Tensor, optional
        Takes the result.
    blocksize : int
    nested : bool
        Nested scales need ``quant_state``, which says whether they are.

    Returns
    -------
    Tensor
        The shape of ``A`` in ``quant_state.dtype``; without a state in the dtype of ``out``, or float32.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Neither ``quant_state`` nor ``absmax`` is given, or parts do not fit each other or ``out``.
    """
    op = "dequantize_blockwise"
    validate.tensor(op, "A", A)
    if out is not None:
        validate.tensor(op, "out", out)
    if quant_state is None:
        if absmax is None:
            raise InvalidArgument(f"{op}: neither quant_state nor absmax was given, needs one of them")
        if nested:
            raise InvalidArgument(f"{op}: nested absmax needs quant_state, which holds its codebook and offset")
        dtype = torch.float32 if out is None else out.dtype
        quant_state = QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=dtype)
    _require_state(op, quant_state)
    if quant_state.blocksize is None:
        raise InvalidArgument(f"{op}: quant_state has no blocksize")
    scales = _scales(quant_state)
    table = code_table(op, quant_state.code, A.device)
    dtype = quant_state.dtype or torch.float32
    return blockwise.dequantize_blockwise(A, scales, table, quant_state.blocksize, dtype, out)


def _scales(state: QuantState) -> Tensor:
    """The float32 absmax of a state, decoded if it is nested (QC-NEST-003)."""
    state2 = state.state2
    if state2 is None:
        return widened("absmax", state.absmax)
    if state2.blocksize is None or state.offset is None:
        raise InvalidArgument("dequantize: quant_state is nested, but state2.blocksize or offset is missing")
    code = dynamic_code(state.absmax.device) if state2.code is None else state2.code
    return fourbit.dequantize_absmax(state.absmax, state2.absmax, code, state.offset, state2.blocksize)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
    *,
    check_finite: bool = False,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to FP4: its arguments, its result (packed codes and their state) and its errors.

    Raises
    ------
    InvalidArgument, InvalidDtype
        As :func:`quantize_4bit`.
    """
    options = (blocksize, compress_statistics, "fp4", quant_storage)
    return quantize_4bit(A, absmax, out, *options, check_finite=check_finite)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
    *,
    check_finite: bool = False,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to NF4: its arguments, its result (packed codes and their state) and its errors.

    Raises
    ------
    InvalidArgument, InvalidDtype
        As :func:`quantize_4bit`.
    """
    options = (blocksize, compress_statistics, "nf4", quant_storage)
    return quantize_4bit(A, absmax, out, *options, check_finite=check_finite)


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    *,
    check_finite: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 4 bits, each block scaled by its largest magnitude (QC-4BIT-001, QC-4BIT-002).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, any shape.
    absmax, out : Tensor, optional
        Take the scales (uint8 with ``compress_statistics``, else float32) and the packed codes.
    blocksize : int, optional
        Power of two from 32 to 4096; 64 by default.
    compress_statistics : bool
        Quantize the scales too, in blocks of 256.
    quant_type : {"fp4", "nf4"}
    quant_storage : torch.dtype
        dtype under which the packed bytes are returned.
    check_finite : bool
        Raise if ``A`` holds a NaN or an infinity. Otherwise a NaN reads back as 0, and a block with an infinity as NaN.

    Returns
    -------
    packed : Tensor
        ``(ceil(A.numel() / 2) / itemsize, 1)`` in ``quant_storage``.
    state : QuantState
        What :func:`dequantize_4bit` needs.

    Raises
    ------
    InvalidArgument, InvalidDtype
        A dtype, shape, device, format or block size does not fit; nothing is written then.
    """
    op = "quantize_4bit"
    blocksize = 64 if blocksize is None else blocksize
    validate.floats(op, "A", A)
    validate.storage_dtype(op, quant_storage)
    storage_bytes = (A.numel() + 1) // 2
    if storage_bytes % quant_storage.itemsize:
        raise InvalidArgument(
            f"{op}: {storage_bytes} packed bytes do not divide into elements of quant_storage {quant_storage}; use "
            "torch.uint8"
        )
    if check_finite:
        _require_finite(op, A)
    packed, scales = fourbit.quantize_4bit(A, quant_type, blocksize)
    if quant_storage != torch.uint8:
        packed = packed.view(-1).view(quant_storage).unsqueeze(1)
    offset = state2 = None
    if compress_statistics:
        scales, offset, state2 = _nest(scales, NESTED_BLOCKSIZE)
    scales, packed = into(op, ("absmax", absmax, scales), ("out", out, packed))
    state = QuantState(
        absmax=scales,
        shape=A.shape,
        code=get_4bit_type(quant_type, device=A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    return packed, state


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` of FP4: its arguments, its result (the tensor) and its errors.

    Raises
    ------
    InvalidArgument, InvalidDtype
        As :func:`dequantize_4bit`.
    """
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` of NF4: its arguments, its result (the tensor) and its errors.

    Raises
    ------
    InvalidArgument, InvalidDtype
        As :func:`dequantize_4bit`.
    """
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Read back what :func:`quantize_4bit` wrote (QC-4BIT-003).

    Parameters
    ----------
    A : Tensor
        The packed codes, under any ``quant_storage``. A row ``(1, bytes)`` stands for the transposed tensor.
    quant_state : QuantState, optional
        Takes the place of the arguments below but ``out``.
    absmax, out : Tensor, optional
        Both are needed without ``quant_state``; ``out`` then says shape and dtype.
    blocksize : int, optional
        64 by default.
    quant_type : {"fp4", "nf4"}

    Returns
    -------
    Tensor
        ``quant_state.shape`` in ``quant_state.dtype``, transposed if ``A`` is a row.

    Raises
    ------
    InvalidArgument, InvalidDtype
        Parts of ``quant_state`` are missing, or do not fit each other, ``A`` or ``out``.
    """
    op = "dequantize_4bit"
    if quant_state is None:
        if absmax is None or out is None:
            raise InvalidArgument(f"{op}: without quant_state both absmax and out are needed")
        validate.tensor(op, "out", out)
        shape, size = out.shape, 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax=absmax, shape=shape, dtype=out.dtype, blocksize=size, quant_type=quant_type)
    _require_state(op, quant_state)
    result = fourbit.dequantize_4bit(quant_state.weight(A), quant_state.dtype or torch.float32, out)
    # A tensor that packs into one byte is (1, 1) either way: it is no row.
    is_row = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return result.t() if is_row else result


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A @ W.T`` with a 4-bit weight, for any number of rows (QC-GEMM4-001 to -007).

    Parameters
    ----------
    A : Tensor
        float32, float16 or bfloat16, ``(..., K)``.
    B : Tensor
        The packed weight.
    out : Tensor, optional
        Takes the result.
    transposed_A, transposed_B : bool
        Only False is supported.
    state : QuantState
        Of ``B``, with shape ``(N, K)``.

    Returns
    -------
    Tensor
        ``(..., N)`` in the dtype of ``A``.

    Raises
    ------
    InvalidArgument, InvalidDtype
        ``state`` is missing, an argument is transposed, or shapes, dtypes or devices do not fit.
    """
    op = "gemv_4bit"
    if state is None:
        raise InvalidArgument(f"{op}: state is None, needs the QuantState of quantize_4bit")
    if transposed_A or transposed_B:
        raise InvalidArgument(f"{op}: transposed_A and transposed_B are not supported; pass A.t() or requantize B.t()")
    _require_state(op, state)
    return into(op, ("out", out, fourbit.gemm_4bit(A, state.weight(B))))[0]
