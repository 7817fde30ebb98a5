"""The base of parameters that hold codes: they carry all that the codes mean, so a copy is never half a weight."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="CodedParameter")


def _rebuild(cls: type[torch.nn.Parameter], data: Tensor, requires_grad: bool) -> torch.nn.Parameter:
    return cls(data, requires_grad=requires_grad)


class CodedParameter(torch.nn.Parameter):
    """A parameter with attributes of its own, which copies and pickles keep."""

    # Attributes that point back at an owner: a deep copy follows them only to an owner that is copied as well.
    _owners: tuple[str, ...] = ()

    def _with_data(self: Self, data: Tensor) -> Self:
        return type(self)(data, requires_grad=self.requires_grad, **self._attributes())

    def _attributes(self) -> dict[str, Any]:
        # accelerate writes requires_grad into __dict__, for its own call of the constructor.
        return {name: value for name, value in self.__dict__.items() if name != "requires_grad"}

    def __copy__(self: Self) -> Self:
        return self._with_data(self.data)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        if id(self) in memo:
            known: Self = memo[id(self)]
            return known
        attributes = {
            name: memo.get(id(value), value) if name in self._owners else copy.deepcopy(value, memo)
            for name, value in self._attributes().items()
        }
        result = type(self)(self.data.clone(), requires_grad=self.requires_grad, **attributes)
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The attributes go in as state, not as arguments: the owner holds this parameter, and state may be cyclic.
        return _rebuild, (type(self), self.data, self.requires_grad), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def is_coded(self) -> bool:
        """Whether the data are codes, not numbers."""
        raise NotImplementedError

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(  # type: ignore[override]
        self, device: int | str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> Tensor:
        return self.to(_indexed("cuda", device), non_blocking=non_blocking)

    def xpu(  # type: ignore[override]
        self, device: int | str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> Tensor:
        return self.to(_indexed("xpu", device), non_blocking=non_blocking)

    def half(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.float64)


def _indexed(kind: str, device: int | str | torch.device | None) -> str | torch.device:
    if device is None:
        return kind
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device)
