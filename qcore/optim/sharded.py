"""Parameters that are DTensors, as ``fully_shard`` makes them (FSDP2).

A step works on each rank's own shard: state is local, and its blocks of 256 begin where the shard begins. A state dict
holds float32 DTensors, sharded like the parameter, so that ``torch.distributed.checkpoint`` writes and reads it on any
number of ranks; 8-bit state is decoded for it and encoded again when it is loaded, each block to the same bits if its
elements are still one block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcore.errors import InvalidArgument

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter)


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor; importing that class costs half a second, so plain tensors do not."""
    if type(tensor) in _PLAIN or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def local(tensor: Tensor, name: str) -> Tensor:
    """The memory of a tensor on this rank."""
    if type(tensor) in _PLAIN:
        return tensor
    dtensor = as_dtensor(tensor)
    if dtensor is not None:
        with torch.no_grad():
            shard: Tensor = dtensor.to_local()
        return shard
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise InvalidArgument(
            f"{name} is a {type(tensor).__name__}, which keeps its elements in other tensors; needs a plain tensor or "
            "a DTensor"
        )
    return tensor


def local_gradient(param: Tensor, grad: Tensor, name: str) -> Tensor:
    """The part of a gradient that belongs to the local part of its parameter."""
    dtensor, gradient = as_dtensor(param), as_dtensor(grad)
    if dtensor is not None and gradient is not None and gradient.placements != dtensor.placements:
        grad = gradient.redistribute(placements=dtensor.placements)
    return local(grad, name)


def is_split(param: Tensor) -> bool:
    """Whether other ranks hold other elements of the parameter."""
    dtensor = as_dtensor(param)
    return dtensor is not None and any(
        not placement.is_replicate() and dtensor.device_mesh.size(dim) > 1
        for dim, placement in enumerate(dtensor.placements)
    )


def rank_of(param: Tensor) -> int:
    """This rank's number among those that share the parameter."""
    dtensor = as_dtensor(param)
    if dtensor is None:
        return 0
    number = 0
    for dim, place in enumerate(dtensor.device_mesh.get_coordinate() or ()):
        number = number * dtensor.device_mesh.size(dim) + place
    return number


def wrap(param: Tensor, values: Tensor) -> Tensor:
    """Local state as a DTensor that is sharded like ``param``; ``values`` may have one more dimension in front."""
    dtensor = as_dtensor(param)
    if dtensor is None:
        return values
    from torch.distributed.tensor import DTensor

    front = tuple(values.shape[: values.dim() - dtensor.dim()])
    shape = torch.Size((*front, *dtensor.shape))
    return DTensor.from_local(
        values,
        dtensor.device_mesh,
        _placements(dtensor, len(front)),
        run_check=False,
        shape=shape,
        stride=_contiguous_strides(shape),
    )


def unwrap(param: Tensor, values: Tensor, name: str) -> Tensor:
    """The local part of state that was saved for ``param``: of a DTensor, or of the whole tensor."""
    dtensor, saved = as_dtensor(param), as_dtensor(values)
    if dtensor is None:
        return saved.full_tensor() if saved is not None else values
    from torch.distributed.tensor import distribute_tensor

    front = values.dim() - dtensor.dim()
    if tuple(values.shape[front:]) != tuple(dtensor.shape):
        if saved is None and tuple(values.shape[front:]) == tuple(dtensor.to_local().shape):
            return values
        raise InvalidArgument(
            f"load_state_dict: state of {name} has shape {tuple(values.shape)}, the whole parameter "
            f"{tuple(dtensor.shape)}"
        )
    placements = _placements(dtensor, front)
    if saved is not None:
        return saved.redistribute(dtensor.device_mesh, placements).to_local()
    return distribute_tensor(values, dtensor.device_mesh, placements, src_data_rank=None).to_local()


def _placements(dtensor: DTensor, front: int) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [
        Shard(placement.dim + front) if isinstance(placement, Shard) else placement for placement in dtensor.placements
    ]


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))
