"""The ``torch.ops.qcore`` library, and the rule for when a call goes through it.

In plain eager mode an op is an ordinary Python function. Under ``torch.compile``, ``torch.export``, a dispatch mode or
a functorch transform, on meta tensors and tensor subclasses, the same function calls the registered op instead, so that
the tracer sees one opaque node whose fake kernel gives the exact shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

_LIBRARY = torch.library.Library("qcore", "DEF")
_NO_DISPATCH = Tensor.__torch_dispatch__
# Of the tensors by which torch.autograd.grad(is_grads_batched=True) stands for a batch of gradients.
is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


_kernels: dict[str, Callable[..., Any]] = {}
_DEVICES = frozenset({torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA})
# What register_autograd needs of torch beyond its public interface.
_INSIDE = (
    "_AutoDispatchBelowAutograd",
    "_after_autograd_keyset",
    "_after_ADInplaceOrView_keyset",
    "_any_requires_grad",
)
_HAS_INSIDE = all(hasattr(torch._C, name) for name in _INSIDE)


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.qcore.<name>``: ``kernel`` on every device, ``fake`` for shapes alone."""
    _kernels[name] = kernel
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qcore::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, setup_context: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Give ``torch.ops.qcore.<name>`` a gradient.

    Compiled code calls the op for every layer of every token, where ``torch.library.register_autograd`` takes 10 us to
    find that nothing is to be recorded, and to be dispatched once more. Here a call that has nothing to record and only
    the device in front of it goes to the kernel at once. A torch that has not the means for it gets torch's own way.
    """
    if not _HAS_INSIDE:
        torch.library.register_autograd(f"qcore::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        return
    op, kernel = getattr(torch.ops.qcore, name).default, _kernels[name]

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments_and_keyset: Any) -> Any:
            *arguments, keyset = arguments_and_keyset
            result = below(keyset, arguments)
            setup_context(ctx, tuple(arguments), result)
            return result

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return *backward(ctx, *gradients), None

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def call(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Recorded.apply(*arguments, keyset)  # type: ignore[no-untyped-call]
        if (keyset & torch._C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _DEVICES:
            return kernel(*arguments)
        return below(keyset, arguments)

    _LIBRARY.impl(name, call, "Autograd", with_keyset=True)


def traced(*tensors: Tensor | None) -> bool:
    """Whether somebody other than the backend has to see this call.

    A tracer, a mode, a subclass, a meta tensor, or a batch without memory (:data:`is_batched`).
    """
    if is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return True
    return any(
        isinstance(tensor, Tensor)
        and (type(tensor).__torch_dispatch__ is not _NO_DISPATCH or tensor.is_meta or is_batched(tensor))
        for tensor in tensors
    )
