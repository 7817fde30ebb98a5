"""LoRA on quantized layers: what PEFT builds for a :class:`~qcore.nn.Linear4bit` or :class:`~qcore.nn.Linear8bitLt`.

PEFT takes a subclass of ``nn.Linear`` for one whose weight it may add to. ``import qcore`` puts a choice of its own
before PEFT's, and lets PEFT's variants (DoRA) read a quantized weight; layers of other libraries go on as before. Of
PEFT's other methods it lets through what is known not to take codes for numbers: int8 codes have the weight's shape.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial, wraps
from importlib.util import find_spec
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor

from qcore.errors import InvalidArgument, Unsupported
from qcore.integrations.arrival import stands_in_for_bitsandbytes
from qcore.integrations.layers import dequantized
from qcore.integrations.versions import working_with
from qcore.nn import Int8Params, Linear4bit, Linear8bitLt, LinearInt4, Params4bit
from qcore.nn.coded import CodedParameter

with working_with("peft", "PEFT on quantized layers"):
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
    )
    from peft.utils import integrations

    # Looked up later too, when a model is on its way through PEFT; one that is gone is to be named now.
    _LOOKED_UP = (
        BaseTuner.inject_adapter,
        BaseTuner._prepare_adapter_config,
        BaseTuner._check_target_module_exists,
        BaseTuner.get_model_config,
        LoraModel._create_new_module,
        integrations.dequantize_bnb_weight,
    )

# Packages below peft.tuners whose layers call the quantized one and leave its weight alone, until they merge.
_CALLING = (
    "adalora", "beft", "boft", "c3a", "fourierft", "gralora", "ia3", "lily", "miss", "oft", "poly", "pvera", "randlora",
    "road", "vblora", "vera", "waveft",
)  # fmt: skip


class LoraQuantizedLinear(Linear):  # type: ignore[misc]
    """LoRA beside a frozen quantized layer.

    Merging quantizes the sum of weight and update anew, once for all adapters that are merged, which rounds it;
    unmerging puts the very codes back that were there before. They are kept meanwhile: half a byte a weight in 4 bits.
    """

    # The weight before the first merge, or nothing; in a tuple, or it would be registered as a parameter.
    _kept: tuple[CodedParameter, ...] = ()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weight, as PEFT's ``merge``; ``safe_merge`` refuses values that are not finite."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        together = [*self.merged_adapters, *names]
        if len(together) > 1 and any(name in self.lora_variant for name in together):
            raise Unsupported(f"merge: {together} are not all plain LoRA; merge one such adapter at a time")
        layer = self.get_base_layer()
        before = self._weight_before()
        weight = dequantized(before, torch.float32)
        for name in together:
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight)
            else:
                weight = weight + self.get_delta_weight(name).float()
        weight, bias = weight.detach(), self._bias_with(names)
        for value in (weight, bias):
            if safe_merge and value is not None and not torch.isfinite(value).all():
                raise InvalidArgument(f"merge: adapters {names} give values that are NaN or infinite")
        _put(layer, _requantized(before, weight))
        if bias is not None:
            layer.bias.data = bias
        self._kept = (before,)
        self.merged_adapters.extend(names)

    def _weight_before(self) -> CodedParameter:
        weight: CodedParameter = self.get_base_layer().weight
        return self._kept[0].to(weight.device) if self._kept else weight  # type: ignore[return-value]

    def _bias_with(self, names: list[str], sign: float = 1.0) -> Tensor | None:
        updated = [name for name in names if self.lora_bias[name]]
        if not updated:
            return None
        bias = self.get_base_layer().bias
        if bias is None:
            raise InvalidArgument("merge: lora_bias=True, but the layer has no bias to add to")
        result: Tensor = bias.data.float()
        for name in updated:
            result = result + sign * self.scaling[name] * self.lora_B[name].bias.detach().float()
        return result.to(bias.dtype)

    def unmerge(self) -> None:
        """Put back the weight as it was before the first merge."""
        if not self._kept:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        bias = self._bias_with(self.merged_adapters, -1.0)
        if bias is not None:
            self.get_base_layer().bias.data = bias
        _put(self.get_base_layer(), self._weight_before())
        self._kept = ()
        self.merged_adapters.clear()
        self._caches.clear()


def _requantized(before: CodedParameter, weight: Tensor) -> CodedParameter:
    """``weight`` (out, in) in the format of ``before``."""
    new: CodedParameter
    if isinstance(before, Params4bit):
        attributes = {**before.__dict__, "quant_state": None, "bnb_quantized": False}
        four_bit = Params4bit(weight, requires_grad=False, **attributes).quantize()
        if four_bit.quant_state is not None and before.quant_state is not None:
            four_bit.quant_state.dtype = before.quant_state.dtype
        new = four_bit
    else:
        new = Int8Params(weight, requires_grad=False).quantize()
    return new


def _put(layer: Any, weight: CodedParameter) -> None:
    layer.weight = weight
    if isinstance(weight, Params4bit):
        layer.quant_state = weight.quant_state
    layer._changed()


def _dispatch(target: Any, adapter_name: str, config: Any, **options: Any) -> LoraQuantizedLinear | None:
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(layer, (Linear4bit, Linear8bitLt)):
        return None
    return LoraQuantizedLinear(target, adapter_name, config=config, **options)


def _quantized(module: Any) -> bool:
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(layer, (Linear4bit, Linear8bitLt, LinearInt4))


def _package(thing: Any) -> str:
    """Where in ``peft.tuners`` the class of ``thing`` is, as in ``oft.layer``; the method's name stands first."""
    return type(thing).__module__.removeprefix("peft.tuners.")


def _check(tuner: BaseTuner, model: Any, config: Any, state: dict[str, Tensor] | None) -> None:
    """Refuse a method of PEFT that would read or change codes as if they were a weight, before any layer is replaced.

    Raises
    ------
    Unsupported
        A method that is not known to leave the weight alone. Merging is refused when it is asked for.
    """
    method = _package(config).partition(".")[0]
    bat = method == "miss" and config.init_weights == "bat"
    if method == "lora" or (method in _CALLING and not bat):
        return
    # PEFT's own targets, found as inject_adapter finds them; a copy, since a program may use its configuration again.
    config = tuner._prepare_adapter_config(copy.deepcopy(config), tuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    for name, module in model.named_modules():
        if not name or not _quantized(module):
            continue
        if state is None:
            targeted = tuner._check_target_module_exists(config, name)
        else:
            targeted = any(key.startswith(f"{name}.") for key in state)
        if not targeted or _decodes(method, module):
            continue
        why = "with init_weights='bat' reads" if bat else "is not known to leave alone"
        raise Unsupported(
            f"PEFT's {method} {why} the weight of {name}, which is quantized; dequantize() the model first, or use "
            f"LoRA or one of {', '.join(_CALLING)}"
        )


def _decodes(method: str, module: Any) -> bool:
    """Whether PEFT gives ``module`` its layer for bitsandbytes, which decodes: programs for bitsandbytes get those."""
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, LinearInt4) or not stands_in_for_bitsandbytes():
        return False
    return find_spec(f"peft.tuners.{method}.bnb") is not None


def _guard_merge(model: Any) -> None:
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer) or not _quantized(module):
            continue
        method, _, file = _package(module).partition(".")
        # LoraQuantizedLinear and PEFT's layers for bitsandbytes decode the weight; PEFT's own LoRA is left as it is.
        if method != "lora" and file != "bnb" and not isinstance(module, LoraQuantizedLinear):
            module.merge = partial(_refuse_merge, method)


def _refuse_merge(method: str, *arguments: Any, **options: Any) -> NoReturn:
    raise Unsupported(
        f"merge: PEFT's {method} would add to the codes of a quantized layer as if they were its weight; keep the "
        "adapter beside it, or load the adapter on the dequantized model and merge there"
    )


def register() -> None:
    """Make PEFT choose :class:`LoraQuantizedLinear`; does nothing the second time."""
    theirs, dequantize = LoraModel._create_new_module, integrations.dequantize_bnb_weight
    inject = BaseTuner.inject_adapter
    if getattr(theirs, "_knows_qcore", False):
        return

    def create(lora_config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        # Programs for bitsandbytes look for PEFT's own classes.
        theirs_alone = lora_config._custom_modules or stands_in_for_bitsandbytes()
        chosen = None if theirs_alone else _dispatch(target, adapter_name, lora_config, **options)
        return theirs(lora_config, adapter_name, target, **options) if chosen is None else chosen

    def dequantize_weight(weight: Any, state: Any = None) -> Tensor:
        if not isinstance(weight, CodedParameter):
            return dequantize(weight, state=state)  # type: ignore[no-any-return]
        return dequantized(weight)

    @wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *arguments: Any, **options: Any) -> None:
        given = signature(inject).bind(self, model, adapter_name, *arguments, **options).arguments
        _check(self, model, self.peft_config[adapter_name], given.get("state_dict"))
        inject(self, model, adapter_name, *arguments, **options)
        _guard_merge(model)

    BaseTuner.inject_adapter = inject_adapter
    create._knows_qcore = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create)
    # By its name in the module: that is where PEFT's variants look it up.
    integrations.dequantize_bnb_weight = dequantize_weight


register()
