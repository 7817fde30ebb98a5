"""Transformers models with qcore's layers: ``from_pretrained(path, quantization_config=qcore.QcoreConfig("nf4"))``.

``import qcore`` alone makes Transformers know the method ``qcore``, and read folders that qcore wrote in the layouts of
bitsandbytes, GPTQ and AWQ. It takes nothing away from an installed library: a folder that bitsandbytes wrote goes to
bitsandbytes, one of GPTQ or AWQ to GPTQModel, and to qcore where a :class:`QcoreConfig` is passed along or the library
is not installed. In the same way Transformers' own ``GPTQConfig`` quantizes with GPTQModel, and without it with qcore.
"""

from __future__ import annotations

import copy
from typing import Any

from qcore.errors import InvalidArgument
from qcore.formats.quantization_config import FORMATS, GROUPED
from qcore.integrations.versions import working_with

with working_with("transformers", "QcoreConfig"):
    from transformers.quantizers import auto

    from qcore.integrations.transformers.calibrating import CalibratingQuantizer, check_backend, has_gptqmodel
    from qcore.integrations.transformers.config import QcoreConfig
    from qcore.integrations.transformers.quantizer import QcoreQuantizer

__all__ = ["QcoreConfig", "QcoreQuantizer", "register"]

METHOD = "qcore"


def register() -> None:
    """Make the quantizer known to Transformers; does nothing the second time."""
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(METHOD)(QcoreConfig)
    auto.register_quantizer(METHOD)(QcoreQuantizer)
    theirs = auto.AutoHfQuantizer.merge_quantization_configs

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        """Choose between the configuration in a checkpoint and the one passed along with it."""
        check_is_configuration(quantization_config_from_args)
        passed = parsed(quantization_config_from_args)
        if not is_ours(quantization_config, passed):
            return theirs(quantization_config, passed)
        placed = isinstance(quantization_config, QcoreConfig)
        if isinstance(quantization_config, dict):
            # qcore writes a list of what stays in floating point into every checkpoint.
            placed = "qcore" in quantization_config and parsed(quantization_config).settings.skip_modules is None
            quantization_config = QcoreConfig.from_dict(quantization_config)
        if not isinstance(passed, QcoreConfig):  # of what a GPTQConfig says, the checkpoint knows all but the kernel
            check_backend(passed)
            passed = None
        if placed:  # whether the files hold codes, and which, is known when they are there
            chosen = copy.deepcopy(quantization_config if passed is None else passed)
            chosen.placed = True
            return chosen
        return quantization_config if passed is None else quantization_config.with_arguments(passed)

    auto.AutoHfQuantizer.merge_quantization_configs = classmethod(merge)
    theirs_of_config = auto.AutoHfQuantizer.from_config

    def from_config(cls: Any, /, quantization_config: Any, **options: Any) -> Any:
        """Their quantizer of a configuration; of anything else they would ask for attributes that it does not have."""
        check_is_configuration(quantization_config)
        return theirs_of_config(parsed(quantization_config), **options)

    auto.AutoHfQuantizer.from_config = classmethod(from_config)
    for method in GROUPED:
        theirs_of_method = auto.AUTO_QUANTIZER_MAPPING[method]

        def choose(config: Any, theirs_of_method: Any = theirs_of_method, **options: Any) -> Any:
            """Their quantizer where the library that it calls is installed, ours elsewhere."""
            return (theirs_of_method if has_gptqmodel() else CalibratingQuantizer)(config, **options)

        auto.AUTO_QUANTIZER_MAPPING[method] = choose


def check_is_configuration(passed: Any) -> None:
    """Say what to write for ``quantization_config="nf4"``, which looks as if it were meant to work.

    Raises
    ------
    InvalidArgument
        ``passed`` is neither a configuration nor a dictionary.
    """
    if passed is None or isinstance(passed, dict) or hasattr(passed, "quant_method"):
        return
    known = (*FORMATS, *GROUPED)
    fix = f'QcoreConfig("{passed}")' if passed in known else f'QcoreConfig("nf4"); formats are {", ".join(known)}'
    raise InvalidArgument(f"from_pretrained: quantization_config is {passed!r}, expected a configuration: qcore.{fix}")


def parsed(passed: Any) -> Any:
    """``passed``, as a :class:`QcoreConfig` if it is what ``to_dict()`` of one gives.

    Transformers would make bitsandbytes' configuration of it, whose section it is.
    """
    if isinstance(passed, dict) and ("qcore" in passed or passed.get("quant_method") == METHOD):
        return QcoreConfig.from_dict(passed)
    return passed


def is_ours(stored: Any, passed: Any) -> bool:
    """Whether qcore loads a checkpoint whose section is ``stored``, for a caller who passed ``passed`` along."""
    section = stored if isinstance(stored, dict) else stored.to_dict()
    method = section.get("quant_method")
    if not isinstance(passed, (QcoreConfig, type(None))):
        # Another library was asked for by name; Transformers says so where that does not fit.
        asked = passed.get("quant_method") if isinstance(passed, dict) else passed.quant_method
        return method in GROUPED and method == asked and not has_gptqmodel()
    if isinstance(stored, QcoreConfig):
        return True
    if method in GROUPED:
        return "qcore" in section or passed is not None or not has_gptqmodel()
    if method != "bitsandbytes":
        return bool(method == METHOD or isinstance(passed, QcoreConfig))
    return "qcore" in section or passed is not None or not _has_bitsandbytes()


def _has_bitsandbytes() -> bool:
    """Whether Transformers would find bitsandbytes."""
    from transformers.utils import is_bitsandbytes_available

    return bool(is_bitsandbytes_available())


with working_with("transformers", "QcoreConfig"):
    register()
