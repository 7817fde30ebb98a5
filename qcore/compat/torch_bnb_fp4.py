"""torch-bnb-fp4's interface over qcore: FP4 linear layers, made from ``nn.Linear`` or from ``Linear4bit``.

That library is a second set of CUDA kernels for bitsandbytes' FP4 weights. Here both are the same kernels, so a
``TorchFP4Linear`` computes what its ``Linear4bit`` computes; what it adds is the interface, and the choice of
dequantizing before the product.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from qcore.errors import InvalidArgument
from qcore.kernel_choice import execute
from qcore.nn import Linear4bit, Params4bit

__all__ = ["TorchFP4Linear", "recursively_replace_with_fp4_linear", "swap_linear_with_bnb_linear"]

Model = TypeVar("Model", bound=nn.Module)


def swap_linear_with_bnb_linear(linear: nn.Linear, dtype: torch.dtype = torch.float16) -> Linear4bit:
    """A ``Linear4bit`` in FP4 with the weight and bias of ``linear``, to be quantized when it moves to a device.

    Parameters
    ----------
    linear : nn.Linear
        float32, float16 or bfloat16 weights; stays as it is.
    dtype : torch.dtype
        dtype of the weight before it is quantized, of the bias, and to compute in.

    Returns
    -------
    Linear4bit
        On the device of ``linear``, not quantized yet: call ``.cuda()``, ``.to(device)`` or ``.quantize()``.

    Raises
    ------
    InvalidArgument
        ``linear`` is no plain ``nn.Linear``.
    """
    if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
        raise InvalidArgument(
            f"swap_linear_with_bnb_linear: linear is a {type(linear).__name__}, needs a torch.nn.Linear"
        )
    shape = (linear.in_features, linear.out_features)
    swapped = Linear4bit(
        *shape, linear.bias is not None, compute_dtype=dtype, compress_statistics=False, quant_type="fp4", device="meta"
    )
    swapped.weight = Params4bit(linear.weight.detach().to(dtype), **swapped.weight.__dict__)
    swapped.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype))
    return swapped.train(linear.training)


class TorchFP4Linear(nn.Module):
    """A linear layer with the FP4 weight of a ``Linear4bit``, which it takes over.

    Parameters
    ----------
    lin : Linear4bit
        Quantized, in FP4; nested scales are fine.
    use_codebook_dequant : bool
        Decode by table; otherwise by a tree of comparisons. In qcore every decoder gives the same bits, and each
        backend has one: both values are accepted and mean the same.

    Raises
    ------
    InvalidArgument
        ``lin`` is no ``Linear4bit``, not quantized, or not in FP4.
    """

    def __init__(self, lin: Linear4bit, use_codebook_dequant: bool = True) -> None:
        super().__init__()
        if not isinstance(lin, Linear4bit):
            raise InvalidArgument(
                f"TorchFP4Linear: lin is a {type(lin).__name__}, needs a Linear4bit; see swap_linear_with_bnb_linear"
            )
        state = lin.weight.quant_state
        if state is None:
            raise InvalidArgument("TorchFP4Linear: the weight is not quantized yet; call .to(device) or .quantize()")
        if state.quant_type != "fp4":
            raise InvalidArgument(
                f"TorchFP4Linear: the weight is in {state.quant_type}, needs fp4; keep the Linear4bit"
            )
        self.in_features, self.out_features = lin.in_features, lin.out_features
        self.use_codebook_dequant = use_codebook_dequant
        self.linear = lin

    @property
    def weight(self) -> Params4bit:
        """The quantized weight."""
        weight: Params4bit = self.linear.weight
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """``(out_features,)``, or None."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``: ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x``."""
        result: Tensor = self.linear(x)
        return result

    def dequant_and_forward(self, x: Tensor) -> Tensor:
        """:meth:`forward` with the weight dequantized first, and torch's product."""
        return execute(x, self.weight, bias=self.bias, kernel="dequantize")


def recursively_replace_with_fp4_linear(
    module: Model,
    as_dtype: torch.dtype = torch.float16,
    use_codebook_dequant: bool = True,
    device: torch.device | str | None = None,
) -> Model:
    """Replace every quantized FP4 ``Linear4bit`` below ``module`` by a :class:`TorchFP4Linear`, in place.

    Parameters
    ----------
    module : nn.Module
        Not a ``Linear4bit`` itself.
    as_dtype : torch.dtype
        dtype to compute in, and of the biases.
    use_codebook_dequant : bool
        As for :class:`TorchFP4Linear`.
    device : torch.device, optional
        Where ``module`` shall be moved before.

    Returns
    -------
    nn.Module
        ``module``.

    Raises
    ------
    InvalidArgument
        There is no ``Linear4bit``, or one is not in FP4.
    """
    if device is not None:
        module = module.to(device)
    found = [
        (parent, name, child)
        for parent in list(module.modules())
        if not isinstance(parent, TorchFP4Linear)
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    if not found:
        raise InvalidArgument(
            "recursively_replace_with_fp4_linear: the model has no Linear4bit; load it with bnb_4bit_quant_type='fp4'"
        )
    for parent, name, child in found:
        new = TorchFP4Linear(child, use_codebook_dequant)
        child.compute_dtype = as_dtype
        if child.bias is not None:
            child.bias.data = child.bias.data.to(as_dtype)
        setattr(parent, name, new)
    return module
