"""What takes the place of :mod:`qcore.integrations.peft` in a PEFT of a version that qcore does not work with."""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from qcore.errors import IncompatibleVersion
from qcore.integrations.arrival import stands_in_for_bitsandbytes
from qcore.nn import Linear4bit, Linear8bitLt, LinearInt4


def install(error: IncompatibleVersion) -> None:
    """Let every method of PEFT raise ``error`` for a model with quantized layers, before it replaces one.

    PEFT alone would take them for plain linear layers, whose weights it may read and add to. Models without such
    layers go on as before, and so do programs for bitsandbytes under ``install_as_bitsandbytes()``.
    """
    inject = BaseTuner.inject_adapter

    @wraps(inject)
    def inject_adapter(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        quantized = any(isinstance(module, (Linear4bit, Linear8bitLt, LinearInt4)) for module in model.modules())
        if quantized and not stands_in_for_bitsandbytes():
            raise IncompatibleVersion(str(error)) from error
        return inject(self, model, *arguments, **options)

    BaseTuner.inject_adapter = inject_adapter
