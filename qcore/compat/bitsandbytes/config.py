"""``from bitsandbytes import BitsAndBytesConfig``: transformers' class, which here refuses names it does not know."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import transformers

from qcore.errors import InvalidArgument


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):  # type: ignore[misc]
    """transformers' ``BitsAndBytesConfig``; an unknown argument is an error that names the nearest known one.

    transformers itself logs an unknown argument and goes on, so that a misspelt ``load_in_4bit`` loads an unquantized
    model.

    Raises
    ------
    InvalidArgument
        An argument is unknown.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parameters = inspect.signature(transformers.BitsAndBytesConfig.__init__).parameters
        known = [name for name in parameters if name not in ("self", "kwargs")]
        # What to_dict() writes and from_dict() passes on.
        extra = {"quant_method", "_load_in_4bit", "_load_in_8bit"}
        for name in kwargs.keys() - set(known) - extra:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InvalidArgument(f"BitsAndBytesConfig: unknown argument {name}; {hint}")
        super().__init__(*args, **kwargs)
