"""Settings of single parameters that differ from their group's: ``GlobalOptimManager``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import InvalidArgument

log = logging.getLogger("qcore")

# What may be set for one parameter: whatever a parameter group has.
KEYS = frozenset(
    {
        *("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3"),
        *("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros", "percentile_clipping", "is_paged"),
    }
)


class GlobalOptimManager:
    """Settings of single parameters, for every optimizer of the process.

    Settings follow the parameter: they count whenever they are made, before the optimizer exists or between two of its
    steps, and wherever the parameter is moved. If ``optim_bits`` changes while the optimizer holds state, the state is
    converted at the next step.

    Examples
    --------
    >>> overrides = GlobalOptimManager.get_instance()
    >>> overrides.override_config(model.embedding.weight, "optim_bits", 32)
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager is one for the whole process: call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one instance."""
        if cls._instance is None:
            cls._instance = object.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    get_inuserce = get_instance  # as published examples spell it

    def initialize(self) -> None:
        """Forget every setting."""
        # id(parameter) -> (the parameter, its settings): an id alone may come to belong to another tensor.
        self._settings: dict[int, tuple[weakref.ref[Tensor], dict[str, Any]]] = {}
        # (group, index) -> (the parameter registered there, its shape)
        self._registered: dict[tuple[int, int], tuple[weakref.ref[Tensor], torch.Size]] = {}
        self._modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []
        self.version = 0  # counts changes, so that an optimizer knows when to look again

    def register_parameters(self, params: Iterable[Any], verbose: bool = False) -> None:
        """Say which parameters an optimizer will get, in its order.

        Needed only where moving a model replaces its parameters: settings of a registered parameter that is gone count
        for the one that takes its place (same position, same shape).

        Parameters
        ----------
        params : iterable of Tensor, of (str, Tensor) or of parameter groups
        verbose : bool
            Log how many there are and which have settings of their own.
        """
        groups = list(params)
        if not groups:
            raise InvalidArgument("register_parameters: params is empty, needs parameters or parameter groups")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        count = overridden = 0
        for group_index, group in enumerate(groups):
            for index, item in enumerate(group["params"]):
                parameter = item[1] if isinstance(item, tuple) else item
                self._registered[group_index, index] = (weakref.ref(parameter), parameter.shape)
                count += 1
                overridden += bool(self._of(parameter))
        self.version += 1
        if verbose:
            log.warning("registered %d parameters in %d groups, %d with overrides", count, len(groups), overridden)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Set hyperparameters of some parameters.

        Parameters
        ----------
        parameters : Tensor or iterable of Tensor
        key, value : str and its value, optional
        key_value_dict : mapping, optional
            Several at once; either this or ``key``.
        """
        if (key is None) == (key_value_dict is None):
            raise InvalidArgument("override_config: needs either key and value, or key_value_dict")
        settings = _checked({key: value} if key is not None else dict(key_value_dict or {}))
        for parameter in [parameters] if isinstance(parameters, Tensor) else list(parameters):
            self._set(parameter, settings)
        self.version += 1

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Set hyperparameters of ``module``'s parameter ``param_name``, whichever tensor that is at a step."""
        if not isinstance(getattr(module, param_name, None), Tensor):
            raise InvalidArgument(f"register_module_override: {type(module).__name__} has no parameter {param_name!r}")
        self._modules.append((weakref.ref(module), param_name, _checked(dict(config))))
        self.version += 1

    def _set(self, parameter: Tensor, settings: dict[str, Any]) -> None:
        key = id(parameter)
        known = dict(self._of(parameter))
        # Kept when the parameter dies: the one that takes its place may ask (see register_parameters).
        self._settings[key] = (weakref.ref(parameter), {**known, **settings})

    def _of(self, parameter: Tensor) -> dict[str, Any]:
        reference, settings = self._settings.get(id(parameter), (None, {}))
        return settings if reference is not None and reference() is parameter else {}

    def config_of(self, parameter: Tensor, group_index: int, index: int) -> dict[str, Any]:
        """The settings of a parameter at this place of an optimizer; empty for almost every one."""
        found = dict(self._of(parameter))
        registered, shape = self._registered.get((group_index, index), (None, None))
        if not found and registered is not None and registered() is None and shape == parameter.shape:
            found = next((dict(known) for known_ref, known in self._settings.values() if known_ref is registered), {})
        for reference, name, settings in self._modules:
            module = reference()
            if module is not None and getattr(module, name, None) is parameter:
                found.update(settings)
        return found


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - KEYS)
    if unknown:
        raise InvalidArgument(
            f"GlobalOptimManager: {', '.join(unknown)} cannot be set for one parameter; known are "
            f"{', '.join(sorted(KEYS))}"
        )
    return settings
